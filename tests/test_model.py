"""Sec. 3.3-3.5: equal to the released code, and each equation on its own."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_clip, recorded, run

import model
from model import CLIPRC, RegionAlignment, nel_losses
from tools.convert import from_released, our_name
from train import learning_rate, parse_settings

# ------------------------------------------------------------------ against the released programs


def training_view(golden: dict) -> dict:
    """What training sees: an inductive run knows the seen classes only."""
    c = golden["config"]
    labels, text, seen = golden["labels"], golden["text"], c["seen"]
    unseen = [i for i in range(c["num_classes"]) if i not in seen]
    if not c.get("self_training"):
        labels = torch.where(torch.isin(labels, torch.tensor(unseen)), 255, labels)
        text, unseen = text[seen], ()
    return dict(images=golden["images"], labels=labels, text=text, unseen=unseen, weights=(
        c["mask_weight"], c["dice_weight"], c.get("recovery_weight", 0)))


def test_logits_equal_the_released_codes(golden):
    with torch.no_grad():
        logits = from_released(golden["state_dict"])(golden["images"], golden["text"])
    torch.testing.assert_close(logits, golden["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("setting", ["inductive", "transductive"])
def test_encoder_features_equal_the_released_codes(setting):
    golden = recorded(f"clip_rc_{setting}")
    with torch.no_grad():
        features = from_released(golden["state_dict"]).encoder(golden["images"])
    for ours, name in zip(features, ("cls", "image_features", "regions")):
        theirs = golden["encoder"][name]  # (B, D) or (B, D, h, w)
        theirs = theirs if theirs.ndim == 2 else theirs.flatten(2).transpose(1, 2)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_losses_and_gradients_equal_the_released_codes(golden):
    network = from_released(golden["state_dict"])
    losses = network.losses(**training_view(golden))
    names = {"loss_mask": "mask", "loss_dice": "dice",
             "recovery_loss_q": "recovery_q", "recovery_loss_k": "recovery_v"}
    assert {names[name] for name in golden["losses"]} == set(losses)
    for name, value in golden["losses"].items():
        assert losses[names[name]].item() == pytest.approx(float(value), rel=1e-5)
    sum(losses.values()).backward()
    grads = {name: parameter.grad for name, parameter in network.named_parameters()}
    for name, theirs in golden["grads"].items():
        ours = released_view(grads, name)
        if name.endswith("k.bias"):  # its true gradient is 0; both sides hold rounding
            assert ours.norm() < 1e-5 and theirs.norm() < 1e-5
        else:
            assert (ours - theirs).norm() < 1e-3 * theirs.norm(), name


def released_view(ours: dict, name: str) -> torch.Tensor:
    """The tensor among ours that a released name stands for, in the released layout."""
    last = name.split(".")[-1]
    if "prompt_embeddings" in name:
        prompts = ours["encoder.prompts"]
        return prompts[1:] if "deep" in name else prompts[:1]
    if ".q_proj." in name:
        return ours.get(f"ram.descriptor_proj.{last}", ours.get(f"zegclip.descriptor_proj.{last}"))
    tensor = ours[our_name(name)]
    if name.endswith("lateral_proj.weight"):  # released order: R, G, I
        tensor = torch.cat([tensor.chunk(3, 1)[i] for i in (1, 0, 2)], 1)
    return tensor


@pytest.mark.parametrize("setting", ["inductive", "transductive"])
def test_twelve_steps_move_the_weights_as_the_released_trainer_does(setting):
    golden = recorded(f"trajectory_{setting}")
    c = golden["config"]
    network = from_released(golden["state_dict"]).train()
    for module in network.modules():  # the record was made without dropout
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(module, model.CrossAttention):
            module.dropout = 0.0
    s = parse_settings(["--iterations", str(c["iterations"]), "--warmup", str(c["warmup"]),
                        "--lr", str(c["lr"]), "--weight-decay", str(c["weight_decay"])])
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=s.lr, weight_decay=s.weight_decay)
    seen = [i for i in range(c["classes"]) if i not in c["unseen"]]
    for step, (images, labels) in enumerate(zip(golden["images"].float(), golden["labels"].long())):
        optimizer.param_groups[0]["lr"] = learning_rate(step, s)
        assert learning_rate(step, s) == pytest.approx(golden["lr"][step], rel=1e-6)
        if setting == "inductive":
            text, unseen = golden["text"][seen], ()
            labels = torch.where(torch.isin(labels, torch.tensor(c["unseen"])), 255, labels)
        else:
            text, unseen = golden["text"], c["unseen"]
        losses = network.losses(images, labels, text, c["weights"], unseen)
        for name, value in golden["losses"][step].items():
            assert losses[name].item() == pytest.approx(float(value), rel=1e-4), (step, name)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    state = network.state_dict()
    compared = 0
    for name, after in golden["state_dict_after"].items():
        before = golden["state_dict"][name]
        moved = after - before
        if moved.any() and not name.endswith(".k.bias"):  # whose true gradient is 0
            ours = released_view(state, name) - before
            assert (ours - moved).norm() < 0.01 * moved.norm(), name
            compared += 1
    assert compared == sum(p.requires_grad for p in network.parameters()) + 1 - 8  # see prompts


# ------------------------------------------------------------------------ each equation, literally


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("align", ["GR", "G", "R", ""])
def test_region_alignment_is_equations_4_to_6(align):
    torch.manual_seed(0)
    G, I, R, T = unit(2, 8), unit(2, 24, 8), unit(2, 4, 8), unit(5, 8)
    I_hat, R_hat = RegionAlignment(8, align)(G, I, R, T, (4, 6))
    assert I_hat.shape == (2, 24, 8 * (len(align) + 1)) and R_hat.shape == (2, 4, 5, 16)
    R_up = F.interpolate(R.transpose(1, 2).reshape(2, 8, 2, 2), size=(4, 6), mode="bilinear")
    for patch in range(24):
        parts = {"G": G, "R": R_up[:, :, patch // 6, patch % 6]}
        expected = torch.cat([*(parts[feature] for feature in align), I[:, patch]], dim=-1)
        torch.testing.assert_close(I_hat[:, patch], expected)
    for region in range(4):
        for c in range(5):
            R_t = T[c] * (R[:, region] + G)
            expected = torch.cat([R_t, T[c].expand(2, -1)], dim=-1)
            torch.testing.assert_close(R_hat[:, region, c], expected)


def test_a_block_attends_with_eight_heads_and_normalises_after_each_residual():
    torch.manual_seed(0)
    block = model.CrossBlock(16, dropout=0.1).double().eval()
    x, memory = torch.randn(2, 3, 16).double(), torch.randn(2, 7, 16).double()
    q, k, v = block.attention.q(x), block.attention.k(memory), block.attention.v(memory)
    heads = []
    for h in range(8):
        part = slice(2 * h, 2 * h + 2)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(2)
        heads.append(scores.softmax(-1) @ v[..., part])
    y = block.norm1(x + block.attention.out(torch.cat(heads, -1)))
    hidden = block.ffn[0](y).clamp(min=0)
    torch.testing.assert_close(block(x, memory), block.norm2(y + block.ffn[3](hidden)))
    nothing = model.CrossBlock(16, dropout=1.0).double()  # in training: all that is added is lost
    torch.testing.assert_close(nothing(x, memory), nothing.norm2(nothing.norm1(x)))


def test_both_branches_read_what_the_other_was_before_the_layer():
    decoder = model.Decoder(16, layers=1, dropout=0.0, recompute=False)
    I, R = torch.randn(1, 4, 16), torch.randn(1, 3, 16)
    I_d, R_d = decoder(I, R)
    assert torch.equal(I_d, decoder.image_blocks[0](I, R))
    assert torch.equal(R_d, decoder.descriptor_blocks[0](R, I))


def test_the_segmentation_is_the_mean_of_the_regions_maps():
    I_d, R_d = torch.randn(2, 6, 8), torch.randn(2, 4 * 5, 8)  # M = 4 regions, C = 5 classes
    maps = [R_d[:, 5 * region:5 * region + 5] @ I_d.transpose(1, 2) for region in range(4)]
    torch.testing.assert_close(model.segmentation_map(I_d, R_d, 4), sum(maps) / 4)


def test_losses_are_their_definitions_class_by_class(monkeypatch):
    torch.manual_seed(0)
    logits = 3 * torch.randn(3, 6, 10, 12, dtype=torch.float64)
    labels = torch.randint(5, (3, 10, 12))  # class 5 is absent
    labels[torch.rand(3, 10, 12) < 0.2] = 255
    labels[1] = 255
    focal = dice = pairs = 0
    for image, label in zip(logits, labels):
        for c in range(6):
            p = image[c].sigmoid()
            right = torch.where(label == c, p, 1 - p)
            alpha = torch.where(label == c, 0.25, 0.75)
            focal += (-alpha * (1 - right) ** 2 * right.log()).mean()
            if (label == c).any():
                both = p[label == c].sum()
                dice += 1 - (2 * both + 1) / (p.sum() + (label == c).sum() + 1)
                pairs += 1
    ours = nel_losses(logits, labels)
    torch.testing.assert_close(ours, (focal / pairs, dice / pairs), check_dtype=False)
    assert nel_losses(logits, torch.full_like(labels, 255))[1] == 0  # no pair, and no division by 0
    monkeypatch.setattr(model, "mean_over_processes", lambda own: 2 * own)  # the others have more
    torch.testing.assert_close(nel_losses(logits, labels), (ours[0] / 2, ours[1] / 2))


def make_network(**settings) -> CLIPRC:
    torch.manual_seed(0)
    return CLIPRC(make_clip().visual, **{"num_prompts": 3, "regions": 4} | settings)


@pytest.mark.parametrize("kind, layers", [("l1", 1), ("l2", 2), ("kd", 1), ("l1", 0)])
def test_recovery_loss_compares_with_descriptors_and_patches(kind, layers):
    network = make_network(recovery_loss=kind, recovery_layers=layers).eval()
    images, T = torch.randn(2, 3, 64, 64), F.normalize(torch.randn(5, 32), dim=-1)
    G, I, R = network.encoder(images)
    I_hat, R_hat = network.ram(G, I, R, T, (4, 4))
    R_in = network.ram.descriptor_proj(R_hat).flatten(1, 2)
    I_d, R_d = network.decoder(network.ram.image_proj(I_hat), R_in)
    I_r, R_r = network.recovery(I_d, R_d) if layers else (I_d, R_d)
    target = R_hat.flatten(1, 2) if layers else R_in
    losses = network.losses(images, torch.zeros(2, 64, 64).long(), T, (0, 0, 2.0))
    for name, ours, theirs in (("recovery_v", I_r, I), ("recovery_q", R_r, target)):
        p, log_q = theirs.softmax(-1), ours.log_softmax(-1)
        expected = {"l1": (ours - theirs).abs().mean(), "l2": ((ours - theirs) ** 2).mean(),
                    "kd": (p * (p.log() - log_q)).sum(-1).mean()}[kind]
        assert losses[name].item() == pytest.approx(2 * expected.item(), rel=1e-4)


def test_recovery_targets_are_constants_and_the_recovered_side_is_not():
    I_r, I, R_r, R_hat = (torch.randn(1, 4, 8, requires_grad=True) for _ in range(4))
    sum(model.recovery_losses(I_r, I, R_r, R_hat, F.l1_loss).values()).backward()
    assert I.grad is None and R_hat.grad is None
    assert I_r.grad.any() and R_r.grad.any()


def test_recomputed_layers_give_the_same_gradients_in_a_fraction_of_the_memory():
    def step(recompute: bool) -> tuple[int, list[torch.Tensor]]:
        network, sizes = make_network(regions=16, dropout=0.5, recompute=recompute), []
        images = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
        T = F.normalize(torch.randn(20, 32, generator=torch.Generator().manual_seed(2)), dim=-1)
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: sizes.append(tensor.nbytes) or tensor, lambda tensor: tensor):
            losses = network.losses(images, torch.zeros(1, 128, 128).long(), T)
        trained = [p for p in network.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(sum(losses.values()), trained, allow_unused=True)
        return sum(sizes), [*losses.values(), *gradients]
    (kept, first), (recomputed, second) = step(False), step(True)
    assert recomputed < 0.6 * kept
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None)
    assert make_network(regions=256).decoder.recompute and not make_network().decoder.recompute


def test_pseudo_labels_touch_only_unseen_pixels_and_give_only_unseen_classes():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 6, 16, 16), torch.randint(6, (2, 16, 16))
    labels[torch.rand(2, 16, 16) < 0.2] = 255
    new = model.pseudo_labels(logits, labels, (1, 4))
    was_unseen = (labels == 1) | (labels == 4)
    assert torch.equal(new[~was_unseen], labels[~was_unseen])
    expected = torch.where(logits[:, 1] >= logits[:, 4], 1, 4)
    assert torch.equal(new[was_unseen], expected[was_unseen])


# ---------------------------------------------------------------------------------- the settings


LADDER = {"none": {"regions": 0, "ram": False, "rdl": False}, "RLB": {"ram": False, "rdl": False},
          "RAM": {"rdl": False}, "RDL": {}}


def test_every_rung_of_table_5_computes_something_else():
    images, T = torch.randn(2, 3, 64, 64), F.normalize(torch.randn(5, 32), dim=-1)
    labels, seen = torch.randint(5, (2, 64, 64)), []
    for rung, settings in LADDER.items():
        network = make_network(**settings).eval()
        losses = network.losses(images, labels, T)
        recovery = {"recovery_q", "recovery_v"} if rung == "RDL" else set()
        assert set(losses) == {"mask", "dice"} | recovery
        seen.append(network(images, T))
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(seen[:2], seen[1:3]))
    assert torch.equal(seen[2], seen[3])  # the recovery decoder changes training only


def test_initialisation_as_released_copies_the_first_layer():
    released, truncated = make_network(), make_network(initialiser="truncated_normal")
    for branch in ("descriptor_blocks", "image_blocks"):
        first, *others = (block.state_dict() for block in getattr(released.decoder, branch))
        assert all(torch.equal(first[name], other[name]) for other in others for name in first)
    first, second, _ = truncated.decoder.descriptor_blocks
    assert not torch.equal(first.attention.q.weight, second.attention.q.weight)
    assert truncated.ram.image_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert all(not block.ffn[3].weight.any() for block in truncated.decoder.image_blocks)
    for network in (released, truncated):
        assert network.recovery.image_in.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not network.recovery.image_in.bias.any()


def test_descriptor_scale_shrinks_the_initial_weights_of_one_layer_alone():
    full, small = make_network().state_dict(), make_network(descriptor_scale=0.01).state_dict()
    for name, tensor in full.items():
        scale = 0.01 if name == "ram.descriptor_proj.weight" else 1
        torch.testing.assert_close(small[name], scale * tensor, msg=name)


@pytest.mark.parametrize("settings", [{"regions": 0}, {"ram": False}, {"regions": 3}])
def test_settings_that_do_not_go_together_are_refused(settings):
    with pytest.raises(ValueError, match="regions|ram"):
        make_network(**settings)


def test_running_the_file_prints_the_parts():
    result = run(program="model.py")
    assert result.returncode == 0 and "(1, 16, 20, 1024)" in result.stdout, result.stderr
