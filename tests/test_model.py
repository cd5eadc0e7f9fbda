"""Sec. 3.3-3.5: equal to the released code, and each fast form equal to its equation as written."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_clip, openai_state

import bench
import convert
import model
from model import CLIPRC, RegionAlignment, encode_text, load_clip, segmentation_losses

# ------------------------------------------------------------------------------- against the released programs


def inductive_view(golden: dict) -> tuple:
    """labels, text and unseen rows as training sees them: inductive runs know the seen classes only."""
    seen, labels, text = golden["config"]["seen"], golden["labels"], golden["text"]
    unseen = [i for i in range(golden["config"]["num_classes"]) if i not in seen]
    if golden["config"].get("self_training"):
        return labels, text, unseen
    assert seen == list(range(len(seen)))
    return torch.where(torch.isin(labels, torch.tensor(unseen)), 255, labels), text[seen], []


def test_logits_equal_the_released_codes(golden):
    network = convert.from_released(golden["state_dict"])
    with torch.no_grad():
        logits = network(golden["images"], golden["text"])
    torch.testing.assert_close(logits, golden["logits"], atol=1e-4, rtol=0)


def test_encoder_features_equal_the_released_codes(golden):
    if "encoder" not in golden:
        pytest.skip("not recorded for ZegCLIP")
    with torch.no_grad():
        G, I, R = convert.from_released(golden["state_dict"]).encoder(golden["images"])
    for ours, theirs in ((G, golden["encoder"]["cls"]), (I, golden["encoder"]["image_features"].flatten(2).transpose(1, 2)),
                         (R, golden["encoder"]["regions"].flatten(2).transpose(1, 2))):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_losses_equal_the_released_codes(golden):
    c = golden["config"]
    labels, text, unseen = inductive_view(golden)
    losses = convert.from_released(golden["state_dict"]).losses(
        golden["images"], labels, text, (c["mask_weight"], c["dice_weight"], c.get("recovery_weight", 0)), unseen)
    names = {"loss_mask": "mask", "loss_dice": "dice", "recovery_loss_q": "recovery_q", "recovery_loss_k": "recovery_v"}
    assert {names[name] for name in golden["losses"]} == set(losses)
    for name, value in golden["losses"].items():
        assert losses[names[name]].item() == pytest.approx(float(value), rel=1e-5)


def test_gradients_equal_the_released_codes(golden):
    c = golden["config"]
    network = convert.from_released(golden["state_dict"])
    labels, text, unseen = inductive_view(golden)
    sum(network.losses(golden["images"], labels, text,
                       (c["mask_weight"], c["dice_weight"], c.get("recovery_weight", 0)), unseen).values()).backward()
    grads = {name: parameter.grad for name, parameter in network.named_parameters()}
    prompts, descriptor = grads["encoder.prompts"], "ram.descriptor_proj." if hasattr(network, "ram") else "descriptor_proj."
    grads |= {"prompt_embeddings": prompts[:1], "deep_prompt_embeddings": prompts[1:]}
    for name, theirs in golden["grads"].items():
        last = name.split(".")[-1]
        ours = grads[last if "prompt_embeddings" in name else descriptor + last if ".q_proj." in name else convert.our_name(name)]
        if name.endswith("lateral_proj.weight"):
            ours = torch.cat([ours.chunk(3, 1)[i] for i in (1, 0, 2)], 1)
        # A key's bias moves all scores of a softmax alike: its true gradient is 0, and what is recorded is rounding.
        error = (ours - theirs).norm() if name.endswith("k.bias") else (ours - theirs).norm() / theirs.norm()
        assert error < (1e-5 if name.endswith("k.bias") else 1e-3), name


# ----------------------------------------------------------------------------------------- each part, literally


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("align", ["GR", "G", "R", ""])
def test_region_alignment_is_equations_4_to_6(align):
    torch.manual_seed(0)
    G, I, R, T = unit(2, 8), unit(2, 24, 8), unit(2, 4, 8), unit(5, 8)
    ram = RegionAlignment(8, align).double()
    q, v, R_t = ram(G, I, R, T, (4, 6))
    up_G = G[:, None].expand(-1, 24, -1)
    up_R = F.interpolate(R.transpose(1, 2).reshape(2, 8, 2, 2), size=(4, 6), mode="bilinear").flatten(2).transpose(1, 2)
    I_hat = torch.cat([{"G": up_G, "R": up_R}[feature] for feature in align] + [I], dim=-1)
    torch.testing.assert_close(v, ram.image_proj(I_hat))
    for b in range(2):
        for region in range(4):
            for c in range(5):
                R_hat = torch.cat([T[c] * (R[b, region] + G[b]), T[c]])
                torch.testing.assert_close(q[b, region * 5 + c], ram.descriptor_proj(R_hat))
                torch.testing.assert_close(R_t[b, region * 5 + c], R_hat[:8])


def test_decoder_layer_attends_as_written():
    torch.manual_seed(0)
    block = model.CrossBlock(16, dropout=0.1).double().eval()
    x, memory = torch.randn(2, 3, 16, dtype=torch.float64), torch.randn(2, 7, 16, dtype=torch.float64)
    with torch.no_grad():
        block.attention.k.bias.normal_()  # leaves the attention as it is, by the softmax, but not ZegCLIP's scores
    q, k, v = block.attention.q(x), block.attention.k(memory), block.attention.v(memory)
    heads, mean_scores = [], 0
    for h in range(8):
        part = slice(2 * h, 2 * h + 2)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(2)
        mean_scores = mean_scores + scores / 8
        heads.append(scores.softmax(-1) @ v[..., part])
    y = block.norm1(x + block.attention.out(torch.cat(heads, -1)))
    hidden = (y @ block.ffn[0].weight.T + block.ffn[0].bias).clamp(min=0)
    expected = block.norm2(y + hidden @ block.ffn[3].weight.T + block.ffn[3].bias)
    torch.testing.assert_close(block(x, memory), expected)
    torch.testing.assert_close(block.attention.mean_scores(x, memory), mean_scores)


def test_branches_read_each_other_before_the_layer():
    decoder = model.TwoWayDecoder(16, layers=1, dropout=0.0)
    q, v = torch.randn(1, 3, 16), torch.randn(1, 4, 16)
    q_out, v_out = decoder(q, v)
    assert torch.equal(q_out, decoder.q_blocks[0](q, v)) and torch.equal(v_out, decoder.v_blocks[0](v, q))


def make_network(**settings) -> CLIPRC:
    torch.manual_seed(0)
    return CLIPRC(make_clip().visual, **{"num_prompts": 3, "regions": 4} | settings)


def test_output_is_equation_8s_mean_over_the_regions_maps():
    network = make_network().eval()
    images, text = torch.randn(2, 3, 64, 64), F.normalize(torch.randn(5, 32), dim=-1)
    G, I, R = network.encoder(images)
    q, v, _ = network.ram(G, I, R, text, (4, 4))
    q_d, v_d = network.decoder(q, v)
    maps = torch.stack([q_d[:, 5 * region:5 * region + 5] @ v_d.transpose(1, 2) for region in range(4)])  # (M, B, C, N)
    expected = F.interpolate(maps.mean(0).view(2, 5, 4, 4), size=(64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(network(images, text), expected)


@pytest.mark.parametrize("ignored", ["some", "one image", "all"])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_losses_without_one_hot_targets_are_the_equations(ignored, scale):
    torch.manual_seed(0)
    logits = (scale * torch.randn(3, 6, 10, 12, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(5, (3, 10, 12))  # class 5 is absent
    labels[torch.rand(3, 10, 12) < 0.2] = 255
    if ignored != "some":
        labels[1 if ignored == "one image" else slice(None)] = 255
    expected = bench.losses_as_written(logits, labels)
    (expected_gradient,) = torch.autograd.grad(sum(expected), logits)
    ours = segmentation_losses(logits, labels)
    (gradient,) = torch.autograd.grad(sum(ours), logits)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_losses_keep_their_digits_over_the_pixels_of_a_real_picture():
    labels = torch.zeros(1, 512, 512, dtype=torch.int64)
    labels[:, 400:] = 1
    logits = torch.linspace(-1, 1, 3)[None, :, None, None].expand(1, 3, 512, 512)  # 204,800 times the same number
    for ours, exact in zip(model.segmentation_losses(logits, labels), bench.losses_as_written(logits.double(), labels)):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["l1", "l2", "kd"])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_recovery_loss_compares_with_descriptors_and_patches(kind, layers):
    network = make_network(recovery_loss=kind, recovery_layers=layers).eval()
    images, text = torch.randn(2, 3, 64, 64), F.normalize(torch.randn(5, 32), dim=-1)
    G, I, R = network.encoder(images)
    R_t = (text * (R + G[:, None])[:, :, None]).flatten(1, 2)
    R_hat = torch.cat([R_t, text.repeat(4, 1).expand(2, -1, -1)], dim=-1)
    q, v, _ = network.ram(G, I, R, text, (4, 4))
    recovered = network.decoder(q, v)
    targets = (q if layers == 0 else R_hat, I)
    if layers:
        recovered = network.recovery(*recovered)
    for name, ours, target in zip(("recovery_q", "recovery_v"), recovered, targets):
        if kind == "kd":
            p, log_q = target.softmax(-1), ours.log_softmax(-1)
            expected = (p * (p.log() - log_q)).sum(-1).mean()
        else:
            expected = (ours - target).abs().mean() if kind == "l1" else ((ours - target) ** 2).mean()
        loss = network.losses(images, torch.zeros(2, 64, 64).long(), text, (0, 0, 2.0))[name]
        assert loss.item() == pytest.approx(2 * expected.item(), rel=1e-4)


def losses_and_gradients(network: CLIPRC) -> list[torch.Tensor]:
    """The losses of a fixed batch with fixed dropout, and the gradients of their sum."""
    images, labels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)), torch.arange(2 * 64 * 64) // 999 % 5
    text = F.normalize(torch.randn(5, 32, generator=torch.Generator().manual_seed(2)), dim=-1)
    torch.manual_seed(3)
    losses = network.losses(images, labels.view(2, 64, 64), text)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(sum(losses.values()), trained, allow_unused=True)
    return [*losses.values(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_every_fast_form_is_the_equation_as_written_dropout_included(dropout):
    network = make_network(dropout=dropout)
    fast = losses_and_gradients(network)
    with bench.as_written():
        literal = losses_and_gradients(network)
    for ours, expected in zip(fast, literal, strict=True):
        assert (ours - expected).norm() <= 1e-5 * expected.norm() + 1e-7


def test_recomputed_layers_give_the_same_gradients_dropout_included():
    kept = losses_and_gradients(make_network(dropout=0.5, recompute=False))
    recomputed = losses_and_gradients(make_network(dropout=0.5, recompute=True))
    assert all(torch.equal(ours, expected) for ours, expected in zip(recomputed, kept, strict=True))


def test_recomputed_layers_keep_a_fraction_of_the_memory():
    def kept(recompute: bool) -> int:
        sizes = []
        network = make_network(regions=16, recompute=recompute)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.nbytes) or tensor, lambda t: t):
            network.losses(torch.randn(1, 3, 128, 128), torch.zeros(1, 128, 128).long(), F.normalize(torch.randn(20, 32)))
        return sum(sizes)
    assert kept(True) < 0.5 * kept(False)
    assert make_network(regions=16).decoder.recompute is False


def test_recovery_targets_are_constants():
    network = make_network().eval()
    features = [t.requires_grad_() for t in (torch.randn(1, 32), torch.randn(1, 16, 32), torch.randn(1, 4, 32))]
    _, parts = network.decode(*features, F.normalize(torch.randn(5, 32), dim=-1), (4, 4))
    parts |= {"q_d": parts["q_d"].detach(), "v_d": parts["v_d"].detach()}
    sum(network.recovery_losses(**parts).values()).backward()
    assert all(feature.grad is None for feature in features)


def test_pseudo_labels_only_touch_unseen_pixels_and_only_name_unseen_classes():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 6, 16, 16), torch.randint(6, (2, 16, 16))
    labels[torch.rand(2, 16, 16) < 0.2] = 255
    unseen = (1, 4)
    new = model.pseudo_labels(logits, labels, unseen)
    was_unseen = (labels == 1) | (labels == 4)
    assert torch.equal(new[~was_unseen], labels[~was_unseen])
    expected = torch.where(logits[:, 1] >= logits[:, 4], 1, 4)
    assert torch.equal(new[was_unseen], expected[was_unseen]) and set(new[was_unseen].tolist()) == {1, 4}


# --------------------------------------------------------------------------------------------------- settings


def test_every_rung_of_the_ladder_trains():
    text = F.normalize(torch.randn(5, 32), dim=-1)
    labels = torch.randint(5, (2, 64, 64))
    for settings, expected in (({"regions": 0, "ram": False, "rdl": False}, {"mask", "dice"}),
                               ({"ram": False, "rdl": False}, {"mask", "dice"}),
                               ({"rdl": False}, {"mask", "dice"}),
                               ({}, {"mask", "dice", "recovery_q", "recovery_v"})):
        losses = make_network(**settings).losses(torch.randn(2, 3, 64, 64), labels, text)
        assert set(losses) == expected and all(loss.isfinite() for loss in losses.values())


def test_region_tokens_alone_reach_zegclips_decoder():
    images, text = torch.randn(1, 3, 64, 64), F.normalize(torch.randn(5, 32), dim=-1)
    with_regions = make_network(ram=False, rdl=False).eval()
    without = make_network(ram=False, rdl=False, regions=0).eval()
    without.load_state_dict({n: t for n, t in with_regions.state_dict().items() if n != "encoder.regions"}, strict=False)
    assert (with_regions(images, text) - without(images, text)).abs().max() > 1e-4


def test_initialisation_as_released_copies_the_layers_and_truncated_normal_does_not():
    released, truncated = make_network(), make_network(initialiser="truncated_normal")
    for branch in ("q_blocks", "v_blocks"):
        first, *others = (block.state_dict() for block in getattr(released.decoder, branch))
        assert all(torch.equal(first[name], other[name]) for other in others for name in first)
    assert not torch.equal(truncated.decoder.q_blocks[0].attention.q.weight, truncated.decoder.q_blocks[1].attention.q.weight)
    assert truncated.ram.image_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert all(not block.ffn[3].weight.any() for block in truncated.decoder.v_blocks)
    for network in (released, truncated):
        assert network.recovery.v_in.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not network.recovery.v_in.bias.any()


@pytest.mark.parametrize("settings, culprit", [({"regions": 0}, "ram"), ({"ram": False}, "rdl"), ({"align": "RG"}, "align"),
                                               ({"recovery_loss": "l3"}, "recovery_loss"), ({"initialiser": "x"}, "initialiser"),
                                               ({"regions": 3}, "regions")])
def test_settings_that_do_not_go_together_are_named(settings, culprit):
    with pytest.raises(ValueError, match=culprit):
        make_network(**settings)


# ------------------------------------------------------------------------------------------------ CLIP's files


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("form", ["plain half", "plain single", "archive half"])
def test_clip_files_of_every_kind_give_the_same_clip(form, tmp_path, monkeypatch):
    original = make_clip()
    half = form.endswith("half")
    if half:
        model.clip.model.convert_weights(original)
    expected = {name: tensor.float() for name, tensor in original.state_dict().items()}
    path = tmp_path / "clip.pt"
    if form.startswith("plain"):
        torch.save(openai_state(original) if half else original.state_dict(), path)
    else:  # OpenAI's archives are TorchScript; half-precision attention cannot be traced on a CPU, so trace, then convert
        traced = torch.jit.trace(make_clip(), (torch.randn(1, 3, 64, 64), torch.ones(1, 77, dtype=torch.int64)))
        for name, parameter in traced.named_parameters():
            parameter.data = original.state_dict()[name].clone()
        torch.jit.save(traced, path)
        with pytest.raises(ValueError, match="neither one that OpenAI published"):  # anyone else's could be a program
            load_clip(path)
        monkeypatch.setitem(model.CLIP_FILES, "small", (model.file_sha256(path), path.name))
    loaded = load_clip(path)
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == {name: torch.float32 for name in expected}
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    tokens = model.tokenize(["a photo of a dog"], 77)
    torch.testing.assert_close(loaded.encode_text(tokens), original.float().encode_text(tokens))
    assert loaded.visual.input_resolution == 64 and not loaded.training


def test_text_is_averaged_over_templates_on_the_unit_sphere(clip_path):
    clip_model = load_clip(clip_path)
    T = encode_text(clip_model, ["dog", "tram"], ["a photo of a {}.", "one {} in the scene."])
    dog = [clip_model.encode_text(model.tokenize([text], 77))[0] for text in ("a photo of a dog.", "one dog in the scene.")]
    expected = F.normalize(sum(F.normalize(e, dim=0) for e in dog), dim=0)
    assert T.shape == (2, 32)
    torch.testing.assert_close(T[0], expected)


def test_tokens_are_openais():
    tokens = model.tokenize(["a photo of a dog"], 77)
    assert tokens.shape == (1, 77) and tokens[0, :8].tolist() == [49406, 320, 1125, 539, 320, 1929, 49407, 0]
    with pytest.raises(ValueError, match="too long"):
        model.tokenize(["word " * 80], 77)


def damaged(path, kind: str):
    state = openai_state(make_clip())
    if kind == "text":
        path.write_text("not a CLIP")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "other":
        torch.save({"weight": torch.ones(3)}, path)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "truncated":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:100_000])
    elif kind == "resnet":
        torch.save({"visual.layer1.0.conv1.weight": torch.ones(3)}, path)
    elif kind == "nan":
        state["visual.proj"][0, 0] = math.nan
        torch.save(state, path)
    elif kind == "shape":
        state["visual.proj"] = state["visual.proj"][:3]
        torch.save(state, path)
    elif kind == "code":
        torch.save({"visual.proj": print}, path)
    return path


@pytest.mark.parametrize("kind", ["text", "empty", "other", "list", "truncated", "resnet", "nan", "shape", "code"])
def test_a_file_that_is_no_clip_is_named(kind, tmp_path):
    path = damaged(tmp_path / "bad.pt", kind)
    with pytest.raises(ValueError, match="bad.pt") as error:
        load_clip(path)
    assert "\n" not in str(error.value)


def test_clip_names_that_cannot_be_loaded_are_refused(tmp_path):
    with pytest.raises(ValueError, match="ResNet"):
        load_clip("RN50")
    with pytest.raises(ValueError, match="ViT-B/16"):
        load_clip(tmp_path / "missing.pt")


def test_published_file_is_checked_against_its_sha256(tmp_path, monkeypatch):
    monkeypatch.setattr(model.Path, "home", lambda: tmp_path)
    file = tmp_path / ".cache" / "clip" / "ViT-B-16.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"something else")
    with pytest.raises(ValueError, match="SHA-256"):
        model.clip_file("ViT-B/16")
    monkeypatch.setitem(model.CLIP_FILES, "ViT-B/16", (model.file_sha256(file), "ViT-B-16.pt"))
    assert model.clip_file("ViT-B/16") == file


def test_download_is_checked_and_kept(tmp_path, monkeypatch):
    source = tmp_path / "served" / "ViT-B-16.pt"
    monkeypatch.setattr(model.Path, "home", lambda: tmp_path)
    sha256 = "0" * 64
    monkeypatch.setitem(model.CLIP_FILES, "ViT-B/16", (sha256, "ViT-B-16.pt"))
    monkeypatch.setattr(model, "CLIP_URL", (tmp_path / "served").as_uri())
    source = tmp_path / "served" / sha256 / "ViT-B-16.pt"
    source.parent.mkdir(parents=True)
    source.write_bytes(b"weights")
    with pytest.raises(ValueError, match="download"):  # the hash differs
        model.clip_file("ViT-B/16")
    assert not list((tmp_path / ".cache" / "clip").iterdir())
    right = model.file_sha256(source)
    source.parent.rename(source.parent.with_name(right))
    monkeypatch.setitem(model.CLIP_FILES, "ViT-B/16", (right, "ViT-B-16.pt"))
    assert model.clip_file("ViT-B/16").read_bytes() == b"weights"


# ------------------------------------------------------------------------------------------------ checkpoints


def test_checkpoint_holds_the_trained_tensors_only_and_restores_the_model(clip_path, tmp_path):
    network = CLIPRC(load_clip(clip_path).visual, num_prompts=3, regions=4, update_regions=True).eval()
    with torch.no_grad():
        network.encoder.regions += 1
    sha256 = model.file_sha256(clip_path)
    model.save_checkpoint(tmp_path / "last.pt", network, sha256, clip=str(clip_path))
    checkpoint = model.read_checkpoint(tmp_path / "last.pt")
    assert not any(name.startswith("encoder.visual") for name in checkpoint["weights"])
    restored = model.model_from_checkpoint(checkpoint, "last.pt")
    images, text = torch.randn(1, 3, 64, 64), F.normalize(torch.randn(5, 32), dim=-1)
    assert torch.equal(restored(images, text), network(images, text))

    other = tmp_path / "other.pt"
    torch.save(openai_state(make_clip(seed=1)), other)
    with pytest.raises(ValueError, match="another CLIP file"):
        model.model_from_checkpoint(checkpoint, "last.pt", other)
    del checkpoint["weights"]["ram.image_proj.bias"]
    with pytest.raises(ValueError, match="last.pt.*ram.image_proj.bias"):
        model.model_from_checkpoint(checkpoint, "last.pt")


def test_a_failed_write_leaves_the_checkpoint_before_it_whole(tmp_path, monkeypatch):
    network = make_network()
    model.save_checkpoint(tmp_path / "last.pt", network, None, step=1)
    real_save = torch.save

    def disk_full(thing, path):
        real_save(thing, path)
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(model.torch, "save", disk_full)
    with pytest.raises(OSError, match="last.pt could not be written"):
        model.save_checkpoint(tmp_path / "last.pt", network, None, step=2)
    assert model.read_checkpoint(tmp_path / "last.pt")["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("kind", ["text", "empty", "other", "list", "code"])
def test_a_file_that_is_no_checkpoint_is_named(kind, tmp_path):
    with pytest.raises(ValueError, match="bad.pt is not a checkpoint"):
        model.read_checkpoint(damaged(tmp_path / "bad.pt", kind))


# ---------------------------------------------------------------------------------------------- released files


def test_converted_file_computes_what_the_released_code_does(golden, tmp_path, monkeypatch, capsys):
    released, ours = tmp_path / "released.pth", tmp_path / "ours.pt"
    text_encoder = {"text_encoder.positional_embedding": torch.ones(3)}
    torch.save({"meta": {"iter": 1}, "state_dict": golden["state_dict"] | text_encoder}, released)
    monkeypatch.setattr("sys.argv", ["convert.py", str(released), str(ours)])
    convert.main()
    assert "3 prompts" in capsys.readouterr().out
    network = model.model_from_checkpoint(model.read_checkpoint(ours), ours)
    with torch.no_grad():
        logits = network(golden["images"], golden["text"])
    torch.testing.assert_close(logits, golden["logits"], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="exists already"):
        convert.main()


def test_weights_of_another_program_are_refused(golden):
    state = dict(golden["state_dict"])
    del state["backbone.prompt_proj.weight"]
    with pytest.raises(ValueError, match="prompt_proj.weight"):
        convert.from_released(state)
    with pytest.raises(ValueError, match="released"):
        convert.from_released({"layer.weight": torch.ones(2)})
