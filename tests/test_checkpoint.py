"""Checkpoints: nothing is lost in writing, nothing is run in reading, and old files still load."""

import pytest
import torch
import torch.nn.functional as F
from conftest import make_clip, openai_state, write_clip

from model import CLIPRC, model_from_checkpoint
from tools import convert
from util import clip_files
from util.checkpoint import checkpoint_clip, encode_names, read_checkpoint, save_checkpoint
from util.clip_files import clip_digest, encode_text, file_sha256, load_clip

OLD_NAMES = {"region_tokens": "regions", "zegclip.blocks": "decoder", "zegclip.": "",
             "descriptor_blocks": "q_blocks", "image_blocks": "v_blocks",
             "recovery.descriptor_": "recovery.q_", "recovery.image_": "recovery.v_"}


def make_model(clip_path, **settings) -> CLIPRC:
    torch.manual_seed(0)
    return CLIPRC(load_clip(clip_path).visual, num_prompts=3, regions=4, **settings).eval()


def trained_weights(model: CLIPRC) -> dict:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("settings", [{}, {"update_regions": True}, {"ram": False, "rdl": False}])
@pytest.mark.parametrize("form", ["clip-rc 1", "clip-rc 2"])
def test_a_checkpoint_of_either_format_restores_the_model(form, settings, clip_path, tmp_path):
    model, path = make_model(clip_path, **settings), tmp_path / "last.pt"
    weights = stored = trained_weights(model)
    for today, old in OLD_NAMES.items() if form == "clip-rc 1" else ():
        stored = {name.replace(today, old): tensor for name, tensor in stored.items()}
    digest = clip_digest(load_clip(clip_path))
    save_checkpoint(path, model.settings, stored, digest, clip=str(clip_path))
    torch.save(torch.load(path, weights_only=True) | {"format": form}, path)
    checkpoint = read_checkpoint(path)
    images, T = torch.randn(1, 3, 64, 64), F.normalize(torch.randn(5, 32), dim=-1)
    assert torch.equal(model_from_checkpoint(checkpoint, path)(images, T), model(images, T))
    assert all(torch.equal(checkpoint["weights"][name], weights[name]) for name in weights)


def test_weights_that_are_not_finite_never_replace_a_good_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {}, {"a": torch.ones(2)}, None, step=1)
    with pytest.raises(ValueError, match="last.pt is left as it was: b holds NaN.*; lower --lr$"):
        save_checkpoint(path, {}, {"a": torch.ones(2), "b": torch.tensor(torch.inf)}, None, step=2)
    assert read_checkpoint(path)["step"] == 1


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    def disk_full(thing, path):
        path.write_bytes(b"half of it")
        raise RuntimeError("PytorchStreamWriter failed\nwriting file data/0")
    save_checkpoint(tmp_path / "last.pt", {}, {"a": torch.ones(2)}, None, step=1)
    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="last.pt is left as it was") as error:
        save_checkpoint(tmp_path / "last.pt", {}, {"a": torch.ones(2)}, None, step=2)
    assert "\n" not in str(error.value)
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("recorded", ["ViT-B/16", "/home/alice/.cache/clip/ViT-B-16.pt"])
def test_a_checkpoint_finds_a_published_clip_in_anyones_cache_and_downloads_nothing(
        recorded, clip_path, tmp_path, monkeypatch):
    served = tmp_path / file_sha256(clip_path) / "ViT-B-16.pt"
    served.parent.mkdir()
    served.write_bytes(clip_path.read_bytes())
    monkeypatch.setattr(clip_files, "CLIP_URL", tmp_path.as_uri())
    monkeypatch.setitem(clip_files.CLIP_FILES, "ViT-B/16", served.parent.name)
    monkeypatch.setattr(clip_files.Path, "home", lambda: tmp_path)
    checkpoint = {"clip": recorded, "clip_digest": clip_digest(load_clip(clip_path)), "weights": {}}
    with pytest.raises(FileNotFoundError, match="^last.pt was trained on.*this machine.*--clip"):
        checkpoint_clip(checkpoint, "last.pt")
    assert not (tmp_path / ".cache").exists()
    load_clip("ViT-B/16")  # now it is in this user's cache
    assert clip_digest(checkpoint_clip(checkpoint, "last.pt")) == checkpoint["clip_digest"]


@pytest.mark.parametrize("content", [{"weight": 1}, [1, 2], {"format": "clip-rc 0", "weights": {}}])
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="bad.pt is not a checkpoint"):
        read_checkpoint(tmp_path / "bad.pt")


def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "last.pt").write_bytes(b"cos\nmkdir\n(Vtrap\ntR.")  # os.mkdir("trap")
    with pytest.raises(ValueError, match="last.pt is not a checkpoint"):
        read_checkpoint("last.pt")
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("kind", ["digest", "older", "converted"])
def test_only_the_clip_of_the_training_encodes_other_names(kind, clip_path, tmp_path):
    model = make_model(clip_path)
    checkpoint = {"weights": model.state_dict() if kind == "converted" else trained_weights(model)}
    checkpoint |= {"digest": {"clip_digest": clip_digest(load_clip(clip_path))},
                   "older": {"clip_sha256": file_sha256(clip_path)},
                   "converted": {"clip_digest": None}}[kind]
    T = encode_names(checkpoint, "last.pt", ["dog", "tram"], ["a {}"], clip_path)
    assert torch.equal(T, encode_text(load_clip(clip_path), ["dog", "tram"], ["a {}"]))
    for other in (make_clip(seed=1), make_clip(patch=32)):
        torch.save(openai_state(other), tmp_path / "other.pt")
        with pytest.raises(ValueError, match="last.pt was trained on another CLIP"):
            encode_names(checkpoint, "last.pt", ["dog", "tram"], ["a {}"], tmp_path / "other.pt")
        with pytest.raises(ValueError, match="last.pt was trained on another CLIP"):
            now_there = {"clip": str(tmp_path / "other.pt")}  # where the training's file was
            encode_names(checkpoint | now_there, "last.pt", ["dog", "tram"], ["a {}"])


def test_the_same_clip_in_another_form_continues_a_run(tmp_path):
    write_clip("hugging_face_quick_gelu", tmp_path / "theirs")
    clip_model = load_clip(tmp_path / "theirs")
    state = clip_model.state_dict() | {"input_resolution": torch.tensor(64)}
    torch.save(state, tmp_path / "openais.pt")
    images, T = torch.randn(1, 3, 64, 64), F.normalize(torch.randn(5, 16), dim=-1)
    for then, now in (("theirs", "openais.pt"), ("openais.pt", "theirs")):
        model = make_model(tmp_path / then)
        checkpoint = {"clip_digest": clip_digest(load_clip(tmp_path / then)),
                      "model": model.settings, "weights": trained_weights(model)}
        same = model_from_checkpoint(checkpoint, "last.pt", tmp_path / now)
        assert torch.equal(same(images, T), model(images, T))


def test_another_activation_or_number_of_heads_is_another_clip(clip_path):
    clip_model = load_clip(clip_path)
    digests = {clip_digest(clip_model)}
    block = clip_model.visual.transformer.resblocks[0]
    for part, name, value in ((block.attn, "num_heads", 2), (block.mlp, "gelu", torch.nn.GELU()),
                              (block.ln_1, "bias", torch.nn.Parameter(torch.ones(64)))):
        setattr(part, name, value)
        assert clip_digest(clip_model) not in digests
        digests.add(clip_digest(clip_model))


def test_an_older_checkpoint_of_an_openclip_file_is_not_loaded_with_other_numbers(tmp_path):
    write_clip("open_clip_gelu", tmp_path)
    path = tmp_path / "open_clip_pytorch_model.bin"
    checkpoint = {"clip_sha256": file_sha256(path), "weights": {}}
    with pytest.raises(ValueError, match="last.pt is of an earlier version.*train again"):
        encode_names(checkpoint, "last.pt", ["dog"], ["a {}"], path)


def test_a_released_file_computes_the_same_after_conversion(golden, tmp_path, monkeypatch, capsys):
    released, ours = tmp_path / "released.pth", tmp_path / "ours.pt"
    unused = {"text_encoder.positional_embedding": torch.ones(3)}
    torch.save({"meta": {"iter": 1}, "state_dict": golden["state_dict"] | unused}, released)
    monkeypatch.setattr("sys.argv", ["convert", str(released), str(ours)])
    convert.main()
    assert f"eval.py {ours} --dataset voc" in capsys.readouterr().out
    model = model_from_checkpoint(read_checkpoint(ours), ours)
    with torch.no_grad():
        logits = model(golden["images"], golden["text"])
    torch.testing.assert_close(logits, golden["logits"], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="ours.pt exists already"):
        convert.main()


def test_weights_of_another_program_are_refused(golden):
    state = dict(golden["state_dict"])
    del state["backbone.prompt_proj.weight"]
    with pytest.raises(ValueError, match="prompt_proj.weight"):
        convert.from_released(state)
