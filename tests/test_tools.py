"""The benchmarks count what they say; the ablations run what they say, once."""

import json
import signal
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import make_clip

import train
from model import CLIPRC
from tools import ablate, bench
from util.checkpoint import save_checkpoint


@pytest.mark.parametrize("regions, paper", bench.PAPER_GFLOPS.items())
def test_multiply_adds_are_table_6s(regions, paper):
    ours = bench.multiply_adds(bench.forward_pass, regions)
    assert ours == pytest.approx(paper, rel=0.005 if regions <= 16 else 0.02)


def test_a_training_step_computes_no_gradients_of_frozen_weights():
    forward, step = (bench.multiply_adds(x, 16) for x in (bench.forward_pass, bench.training_step))
    assert 2 < step / forward < 2.7  # 3 if every weight were trained


def test_a_case_is_measured_in_the_precision_asked_for(monkeypatch):
    network, on = CLIPRC(make_clip().visual, regions=4), []
    network.encoder.register_forward_hook(lambda *_: on.append(torch.is_autocast_enabled("cpu")))
    monkeypatch.setattr(bench, "vit_b16", lambda regions: network)
    for precision in bench.PRECISIONS:
        row = bench.measure(partial(bench.training_step, size=64), 4, 1, precision, False, "cpu", 1,
                            side=64)
        assert len(row["seconds"]) == 1 and row["GB"] >= 0 and row["best_rate"] > 0
    assert on == [False] * 4 + [True] * 2  # each time a step to warm up and one to measure


def test_a_table_is_written_as_json_and_never_over_another(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "PAPER_GFLOPS", {1: 119.8})
    monkeypatch.setattr(sys, "argv", ["bench", "gflops", "--out", str(tmp_path / "table.json")])
    bench.main()
    (row,) = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert f"{row['ours']:.1f}" in capsys.readouterr().out and row["paper"] == 119.8
    with pytest.raises(ValueError, match="exists already"):
        bench.main()


@pytest.fixture
def ablations(tmp_path, monkeypatch):
    """A function of flags: which runs start, and in which folders. A run ends with hIoU 2 seed."""
    started = []

    def run_all(runs: dict, jobs: int) -> None:
        started.append({name: Path(s.out).name for name, s in runs.items()})
        for s in runs.values():
            Path(s.out).mkdir(parents=True)
            save_checkpoint(Path(s.out, "last.pt"), {}, {}, None, run=asdict(s))
            seen = {"l1": 50, "l2": 60, "kd": 70}[s.recovery_loss]
            log = {"result": {"hIoU": 2 * s.seed, "mIoU_S": seen, "mIoU_U": None}}
            Path(s.out, "log.jsonl").write_text(json.dumps(log))

    def start(*flags: str) -> dict[str, str]:
        monkeypatch.setattr(sys, "argv", ["ablate", "--data-root=toy", f"--out={tmp_path}",
                                          "--regions=4", "--seeds=2", *flags])
        ablate.main()
        return started[-1]

    monkeypatch.setattr(ablate, "run_all", run_all)
    return start


def test_every_row_is_run_and_compared_with_the_paper(ablations, capsys):
    runs = ablations("--tables", "5", "6", "8")
    rows = ("regions=0-ram=False-rdl=False", "ram=False-rdl=False", "rdl=False", "default",
            "update_regions=True", "regions=1", "regions=16", "recovery_loss=l2",
            "recovery_loss=kd", "recovery_layers=0", "recovery_layers=2", "recovery_layers=3")
    assert runs.keys() == {f"{row}-seed={seed}" for row in rows for seed in (0, 1)}
    table = [line.split() for line in capsys.readouterr().out.split("\n")]
    assert "6 M=16 1.0 ± 1.0 50.0 ± 0.0 nan ± nan 88.4 92.8 84.4".split() in table
    for name, seen, paper in (("L2", 60, "86.7 91.8 81.9"), ("KD", 70, "86.4 92.2 81.2")):
        assert f"8 {name} 1.0 ± 1.0 {seen}.0 ± 0.0 nan ± nan {paper}".split() in table
    assert "6 M=64 a region would be smaller than 2x2 patches 89.1 93.0 85.6".split() in table


def test_only_a_finished_run_of_the_same_settings_is_kept(ablations):
    assert len(ablations("--tables", "7", "--seeds", "1")) == 4
    assert len(ablations("--tables", "7", "--workers", "1")) == 4  # the second seed
    anew = ablations("--tables", "7", "--lr", "1e-4")
    assert {f"{name}.2" for name in anew} == {*anew.values()} and len(anew) == 8
    assert not ablations("--tables", "7", "--lr", "1e-4")
    assert len(ablations("--tables", "7", "--data-root", "other")) == 8


def test_a_runs_command_line_says_all_its_settings():
    base = train.parse_settings(["--unseen=", "--jitter", "--lr", "1e-5", "--clip=-x.pt"])
    for changes in [row[1] for table in ablate.ABLATIONS.values() for row in table]:
        s = replace(base, resume=True, **changes)
        assert train.parse_settings(ablate.command(s)[2:]) == s


def stand_in(monkeypatch, folder: Path, code: str) -> dict[str, train.Settings]:
    """Four runs, which execute this code in the place of train.py."""
    code = "import os, signal, sys, time, pathlib\nout = pathlib.Path(sys.argv[1])\n" + code
    monkeypatch.setattr(ablate, "command", lambda s: [sys.executable, "-c", code, s.out])
    return {str(i): train.Settings(out=str(folder / str(i))) for i in range(4)}


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    ablate.run_all(stand_in(monkeypatch, tmp_path, """if 1:
        assert os.environ["OMP_NUM_THREADS"] == "1"
        out.mkdir()
        while not (out.parent / "1").exists(): time.sleep(0.01)  # run 0 waits for run 1
        if out.name == "0": sys.exit("Traceback\\nerror: no such luck")
        (out / "log.jsonl").write_text('{"result": {"hIoU": 4, "mIoU_S": 1, "mIoU_U": 1}}')
    """), jobs=2)
    lines = capsys.readouterr().out.split("\n")
    assert any("0: failed: error: no such luck" in line for line in lines)
    assert "4 of 4" in lines[3] and sum("hIoU 4.0" in line for line in lines) == 3


def test_ctrl_c_stops_all_runs_and_starts_no_more(tmp_path, monkeypatch, request):
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # `pytest &` may ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, usual))
    with pytest.raises(KeyboardInterrupt):
        ablate.run_all(stand_in(monkeypatch, tmp_path, """if 1:
            out.touch()
            while len(list(out.parent.iterdir())) < 2: time.sleep(0.01)
            if out.name == "0": os.kill(os.getppid(), signal.SIGINT)
            time.sleep(20)
            (out.parent / "not stopped").touch()
        """), jobs=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_planned_memory_is_what_the_tensors_of_a_step_take():
    def small(regions: int, **settings) -> CLIPRC:
        return CLIPRC(make_clip().visual, regions=regions, dropout=0.0, **settings)
    with patch.object(bench, "vit_b16", small):
        planned = [bench.planned_memory(4, images, 15, "cpu") for images in (1, 3)]
        with bench.LiveMemory() as live:  # the same on tensors with numbers
            step = bench.training_step(small(4), 1, "float32", torch.device("cpu"))
            step()
            step()
    assert planned[0] == pytest.approx(live.peak / 1e9, rel=0.05)
    assert planned[1] > 2 * planned[0]
