"""Checkpoints: nothing is lost in writing, nothing is run in reading, older files still load."""

import pytest
import torch
import torch.nn.functional as F
from conftest import make_clip, openai_state

from model import CLIPRC, model_from_checkpoint
from util.checkpoint import (add_to_log, checkpoint_clip, read_checkpoint, read_log,
                             save_checkpoint, start_log)
from util.clip_files import clip_digest, load_clip


def save_model(path, clip_path, settings: dict = {}, older: dict = {}) -> CLIPRC:
    """A checkpoint as train.py writes it."""
    clip_model = load_clip(clip_path)
    torch.manual_seed(0)
    model = CLIPRC(clip_model.visual, num_prompts=3, regions=4, **settings).eval()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    save_checkpoint(path, model.settings | older, trained, clip_digest(clip_model),
                    clip=str(clip_path))
    return model


@pytest.mark.parametrize("settings", [{}, {"update_regions": True}, {"ram": False, "rdl": False}])
def test_a_checkpoint_restores_the_model_and_holds_no_frozen_weight(settings, clip_path, tmp_path):
    older = {"initialiser": "released", "descriptor_scale": 1.0}  # as checkpoints of 66fc0f7 have
    model = save_model(tmp_path / "last.pt", clip_path, settings, older)
    checkpoint = read_checkpoint(tmp_path / "last.pt")
    images, T = torch.randn(1, 3, 64, 64), F.normalize(torch.randn(5, 32), dim=-1)
    again = model_from_checkpoint(checkpoint, "last.pt")
    assert torch.equal(again(images, T), model(images, T))
    assert not any(name.startswith("encoder.visual.") for name in checkpoint["weights"])
    del checkpoint["weights"]["encoder.prompts"]
    with pytest.raises(RuntimeError, match="encoder.prompts"):
        model_from_checkpoint(checkpoint, "last.pt")


def test_weights_not_finite_and_a_full_disk_leave_the_old_checkpoint(tmp_path, monkeypatch):
    path, one = tmp_path / "last.pt", {"a": torch.ones(2)}
    save_checkpoint(path, {}, one, None, step=1)
    with pytest.raises(ValueError, match="last.pt is left as it was: b holds NaN.*; lower --lr$"):
        save_checkpoint(path, {}, one | {"b": torch.tensor(torch.inf)}, None, step=2)

    def disk_full(thing, path):
        path.write_bytes(b"half of it")
        raise RuntimeError("PytorchStreamWriter failed\nwriting file data/0")
    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="^[^\n]*last.pt is left as it was[^\n]*$"):
        save_checkpoint(path, {}, one, None, step=2)
    assert read_checkpoint(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_a_file_that_is_no_checkpoint_names_the_door_and_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pt").write_bytes(b"cos\nmkdir\n(Vtrap\ntR.")  # os.mkdir("trap")
    for content in (None, {"weight": 1}, [1, 2], {"format": "x", "model": {}, "weights": {}}):
        if content is not None:
            torch.save(content, "bad.pt")
        with pytest.raises(ValueError, match="bad.pt is no .*tools.convert bad.pt OURS.pt"):
            read_checkpoint("bad.pt")
    assert not (tmp_path / "trap").exists()


def test_another_clip_is_refused_and_one_that_is_gone_named(clip_path, tmp_path):
    save_model(tmp_path / "last.pt", clip_path)
    checkpoint = read_checkpoint(tmp_path / "last.pt")
    torch.save(openai_state(make_clip(seed=1)), tmp_path / "other.pt")
    with pytest.raises(ValueError, match="last.pt was trained on another CLIP"):
        checkpoint_clip(checkpoint, "last.pt", tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError, match="^last.pt needs its CLIP: --clip gone.pt"):
        checkpoint_clip(checkpoint, "last.pt", "gone.pt")


def test_a_log_is_never_overwritten_and_is_cut_where_a_resumed_run_begins(tmp_path):
    log = tmp_path / "run" / "log.jsonl"
    start_log(log, 0, resume=False)
    for step in (1, 2, 3):
        add_to_log(log, {"step": step, "loss": float("nan")})
    with open(log, "a") as file:
        file.write('{"step": 4, "lo')  # a kill cut this line short
    with pytest.raises(ValueError, match="run holds a run; add --resume"):
        start_log(log, 0, resume=False)
    start_log(log, 2, resume=True)
    assert read_log(log) == [{"step": 1, "loss": None}, {"step": 2, "loss": None}]
