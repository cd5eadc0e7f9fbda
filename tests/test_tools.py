"""Ablations run what they say, benchmarks count what they say, and released files convert."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_clip, refused, run

from model import CLIPRC, model_from_checkpoint
from predict import Segmenter
from tools import ablate, bench
from util.checkpoint import read_checkpoint, save_checkpoint


@pytest.fixture
def ablations(tmp_path, monkeypatch):
    """A function of flags: the runs that it starts. A run ends at once with hIoU 2 seed."""
    def run_all(runs, jobs):
        started[:] = [out.name for out in runs]
        for out, flags in runs.items():
            s = vars(ablate.train.parse_settings(flags))
            out.mkdir()
            save_checkpoint(out / "last.pt", {}, {}, None, run=s)
            (out / "log.jsonl").write_text(json.dumps({"result": {
                "hIoU": 2 * s["seed"], "mIoU_S": len(s["recovery_loss"]), "mIoU_U": None}}))

    def start(*flags):
        monkeypatch.setattr("sys.argv", ["ablate", "--data-root=toy", f"--out={tmp_path}", *flags])
        ablate.main()
        return started
    started = []
    monkeypatch.setattr(ablate, "run_all", run_all)
    return start


def test_every_row_is_run_once_and_compared_with_the_paper(ablations, capsys):
    rows = """regions=0-ram=False- ram=False- recovery_loss=none- - update_regions=True- regions=1-
        regions=16- align=- align=G- align=R- recovery_loss=l2- recovery_loss=kd-
        recovery_layers=0- recovery_layers=2- recovery_layers=3-""".split()
    assert ablations("--regions=4", "--seeds=2") == [
        f"toy-{row.removeprefix('-')}seed={seed}" for row in rows for seed in (0, 1)]
    table = [" ".join(line.split()) for line in capsys.readouterr().out.split("\n")]
    assert "6 M=16 1.0 (1.0) 2.0 (0.0) nan (nan) 88.4 92.8 84.4" in table
    assert "6 M=64 a region would be smaller than 2x2 patches 89.1 93.0 85.6" in table


def test_a_finished_run_is_kept_and_one_of_other_settings_refused(ablations):
    assert len(ablations("--tables", "7", "--seeds", "1")) == 4
    assert ablations("--tables", "7", "--seeds", "1") == []
    with pytest.raises(ValueError, match="another lr"):
        ablations("--tables", "7", "--lr", "1e-4")


def test_multiply_adds_are_table_6s_and_a_step_has_no_gradients_of_frozen_weights():
    for regions, rel in ((16, 0.005), (256, 0.02)):
        ours = bench.multiply_adds(bench.forward_pass, regions)
        assert ours == pytest.approx(bench.PAPER_GFLOPS[regions], rel)
    step = bench.multiply_adds(bench.training_step, 256)
    assert 2 < step / ours < 2.7  # 3 if every weight were trained


def test_a_step_takes_the_planned_memory(monkeypatch):
    monkeypatch.setattr(bench, "vit_b16", lambda regions: CLIPRC(
        make_clip().visual, regions=regions, dropout=0.0))
    *_, memory = bench.measure(bench.training_step, 4, 1, "float32", torch.device("cpu"), 1)
    assert bench.planned_memory(4, 1) == pytest.approx(memory, rel=0.05)


class Stranger:
    """An object in a released file. Whoever makes it again runs its code."""
    def __reduce__(self):
        return exec, ("open('strange', 'w')",)


def convert(golden: dict, folder, *flags: str, change: dict = {}, check=run):
    """Convert a release whose frozen part is in half precision, with the CLIP that it is of."""
    clip, theirs = make_clip().state_dict(), golden["state_dict"]
    frozen = {name: theirs[there] for name in clip
              if (there := name.replace("visual.", "backbone.")) in theirs}
    numbers = dict.fromkeys(("heads", "quick_gelu"), torch.tensor([1, 1]))
    torch.save(clip | frozen | numbers, folder / "clip.pt")
    frozen = {name.replace("visual.", "backbone."): frozen[name].half() for name in frozen}
    position = theirs["backbone.positional_embedding"]  # the release has it at its images' size
    grid = F.interpolate(position[1:].T.view(1, -1, 4, 4), (8, 8), mode="bilinear")[0].flatten(1).T
    frozen["backbone.positional_embedding"] = torch.cat([position[:1], grid])
    meta = {"best": np.float64(88.4), "by": Stranger()}
    torch.save({"state_dict": theirs | frozen | change, "meta": meta}, folder / "their.pth")
    return check(folder / "their.pth", folder / "ours.pt", f"--clip={folder}/clip.pt", *flags,
                 program="tools/convert.py")


def test_a_released_file_computes_the_same_beside_its_clip_alone(golden, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = convert(golden, tmp_path, "--dataset=coco-stuff", "--setting=transductive")
    assert "hIoU is 49.7" in result.stdout and "lowered by 0.\n" in result.stdout
    checkpoint = read_checkpoint("ours.pt")
    with torch.no_grad():
        logits = model_from_checkpoint(checkpoint, "ours.pt")(golden["images"], golden["text"])
    torch.testing.assert_close(logits, golden["logits"], atol=1e-4, rtol=0)
    segmenter = Segmenter("ours.pt", device="cpu")
    assert len(segmenter.names) == 171 and len(segmenter.unseen) == 15 and not segmenter.lower
    assert not (tmp_path / "strange").exists()
    change = {"backbone.proj": 1.01 * golden["state_dict"]["backbone.proj"]}
    (tmp_path / "ours.pt").unlink()
    line = convert(golden, tmp_path, change=change, check=refused)
    assert "encoder.visual.proj is not that of this CLIP" in line
