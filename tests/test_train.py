"""Sec. 4.2: the schedule, a run from start to table, stopping and going on, several processes, bad input."""

import contextlib
import io
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import test_data as miniature
import torch
from conftest import ROOT
from PIL import Image

import train
from model import read_checkpoint

PARTS = [(5, (200, 60, 40)), (7, (60, 200, 60)), (15, (60, 80, 220)), (18, (220, 220, 60))]  # bottle, car, person, sofa*


@pytest.fixture(scope="session")
def voc(tmp_path_factory) -> Path:
    """Three pictures of coloured quarters in VOC's layout, a little noisy, a strip of them ignored."""
    root, rng = tmp_path_factory.mktemp("voc"), np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for n in range(3):
        image, label = np.zeros((80, 112, 3)), np.zeros((80, 112), np.uint8)
        for i, (number, colour) in enumerate(rng.permutation(np.array(PARTS, dtype=object))):
            part = np.s_[i // 2 * 40:i // 2 * 40 + 40, i % 2 * 56:i % 2 * 56 + 56]
            image[part], label[part] = colour, number
        label[38:42] = 255
        image = (image + rng.normal(0, 12, image.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(image).save(root / f"JPEGImages/{n}.jpg", quality=95)
        Image.fromarray(label).save(root / f"SegmentationClass/{n}.png")
    for split in ("train", "val"):
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("0\n1\n2\n")
    return root


@pytest.fixture
def flags(voc, clip_path, tmp_path) -> list[str]:
    """A run small enough for a test: 8 steps of 4 pictures of 64x64."""
    return ["--dataset", "voc", "--data-root", str(voc), "--clip", str(clip_path), "--out", str(tmp_path / "run"),
            "--crop-size", "64", "--batch-size", "4", "--iterations", "8", "--regions", "4", "--workers", "0",
            "--save-every", "2", "--log-every", "1", "--device", "cpu"]


def run(*arguments: str, program: str = "train.py") -> subprocess.CompletedProcess:
    """A program from its command line to its exit code; in this process, where PyTorch is imported already."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    argv, sys.argv = sys.argv, [program, *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / program), run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = argv
        for name, handler in handlers.items():
            signal.signal(name, handler)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def start(*arguments: str, launcher: tuple[str, ...] = (), program: Path = ROOT / "train.py") -> subprocess.Popen:
    """The same in a process and a process group of its own, which can be killed."""
    return subprocess.Popen([sys.executable, *launcher, str(program), *arguments], text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})


def torchrun(processes: int, *more: str) -> tuple[str, ...]:
    return "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *more


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(folder / "last.pt")["weights"]


def test_schedule_warms_up_and_falls_like_a_polynomial():
    s = train.parse_settings(["--dataset", "voc", "--data-root", "."])
    assert (s.lr, s.warmup, s.iterations, s.batch_size) == (2e-4, 1500, 40_000, 16)
    rates = [train.learning_rate(step, s) for step in range(s.iterations)]
    assert rates[0] == pytest.approx(2e-4 * 1e-6, rel=1e-3)
    assert rates.index(max(rates)) == 1499 or rates.index(max(rates)) == 1500
    assert rates[20_000] == pytest.approx((2e-4 - 1e-6) * 0.5**0.9 + 1e-6)
    assert rates[-1] == pytest.approx(1e-6, rel=0.05) and all(a > b for a, b in zip(rates[1500:], rates[1501:]))


def test_help_comes_without_pytorch_whose_import_takes_seconds():
    code = f"""import runpy, sys
sys.argv = ["train.py", "--help"]
try:
    runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
except SystemExit as end:
    sys.exit("torch" in sys.modules or end.code)"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and "--weight-decay" in result.stdout, result.stderr
    assert set(train.PRESETS) == set(train.data.DATASETS)  # the names that it lists are written out for it


def test_presets_are_the_papers():
    def preset(*arguments: str) -> tuple:
        s = train.parse_settings([*arguments, "--data-root", "."])
        return s.prompts, s.w_mask, s.w_dice, s.w_rec, s.iterations, s.regions, s.batch_size, s.crop_size, s.initialiser
    same = (16, 16, 512, "released")
    assert preset("--dataset", "voc") == (10, 100, 1, 2, 40_000, *same)
    assert preset("--dataset", "context") == (35, 100, 1, 2, 40_000, *same)
    assert preset("--dataset", "coco-stuff") == (100, 200, 3, 50, 80_000, *same)
    assert preset("--dataset", "coco-stuff", "--setting", "transductive", "--init", "")[4] == 40_000
    assert preset("--dataset", "voc", "--setting", "transductive", "--init", "")[4] == 20_000
    assert preset("--dataset", "voc", "--setting", "supervised")[1:4] == (100, 1, 0)
    assert preset("--dataset", "coco-stuff", "--setting", "supervised")[1:4] == (100, 1.5, 1)
    assert preset("--dataset", "coco-stuff", "--w-rec", "7")[3] == 7
    for name in ("voc", "context", "coco-stuff", "folder"):
        s = train.parse_settings(["--dataset", name, "--data-root", "."])
        assert (s.dropout, s.weight_decay, s.lr) == (0.1, 0.01, 2e-4)


def test_run_ends_with_the_table_that_eval_prints_again(flags, voc, clip_path, tmp_path):
    result = run(*flags)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr and "training:" not in result.stderr  # no terminal, no bar
    folder = tmp_path / "run"
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert all(line["loss"] == pytest.approx(sum(line[k] for k in ("mask", "dice", "recovery_q", "recovery_v")))
               for line in lines if "loss" in line)
    assert Image.open(folder / "loss.png").size > (100, 100)
    assert read_checkpoint(folder / "half.pt")["step"] == 4
    assert "train.txt alone" in result.stdout  # what is not there is said

    table = result.stdout[result.stdout.index("class (* unseen)"):]
    evaluated = run(str(folder / "last.pt"), "--device", "cpu", program="eval.py")
    assert evaluated.returncode == 0, evaluated.stderr
    per_class, row = table.split("\n\n")[0], table.split("CLIP-RC ")[1].splitlines()[0]
    assert per_class in evaluated.stdout and row in evaluated.stdout
    assert re.search(r"^\* sofa ", per_class, re.M) and re.search(r"^  person ", per_class, re.M)

    checkpoint = read_checkpoint(folder / "last.pt")
    assert not any("encoder.visual" in name for name in checkpoint["weights"])
    assert checkpoint["class_names"][15] == "pottedplant" and checkpoint["unseen"] == [15, 16, 17, 18, 19]
    assert "--data-root" in refused(str(tmp_path / "run" / "last.pt"), "--dataset", "context", program="eval.py")  # not VOC's


@pytest.mark.parametrize("name", ["context", "coco-stuff", "coco-stuff, raw", "folder"])
def test_every_data_set_trains_and_is_evaluated(name, clip_path, tmp_path):
    root, out, dataset = tmp_path / "data", tmp_path / "run", name.split(",")[0]
    if dataset == "folder":
        for part, make in (("images", miniature.picture), ("masks", lambda path: miniature.mask(path, [0, 1, 2, 255]))):
            make(root / part / "a.png")
        (root / "classes.txt").write_text("road\nhäuser\n*tree top\n", "utf-8")
    else:
        miniature.context(root) if dataset == "context" else miniature.coco(root, converted="raw" not in name)
    flags = ["--clip", str(clip_path), "--out", str(out), "--crop-size", "32", "--regions", "4", "--batch-size", "2",
             "--iterations", "2", "--workers", "0", "--device", "cpu", "--prompts", "3"]
    trained = run("--dataset", dataset, "--data-root", str(root), *flags)
    assert trained.returncode == 0, trained.stderr
    evaluated = run(str(out / "last.pt"), "--workers", "0", "--save", str(tmp_path / "saved"), program="eval.py")
    assert evaluated.returncode == 0, evaluated.stderr
    row = re.search(r"^CLIP-RC .*$", trained.stdout, re.M)[0]
    assert row in evaluated.stdout and "lowered by 0.1" in evaluated.stdout
    (saved,) = (tmp_path / "saved").iterdir()
    assert Image.open(saved).mode == "P" and Image.open(saved).size == (60, 40)
    if dataset == "coco-stuff":  # Table 4: the same model on another data set's names, nothing lowered
        miniature.context(tmp_path / "context")
        for other, classes in (("context", 60), ("context59", 59)):
            crossed = run(str(out / "last.pt"), "--dataset", other, "--data-root", str(tmp_path / "context"), "--workers", "0",
                          program="eval.py")
            assert crossed.returncode == 0, crossed.stderr
            assert "lowered by 0;" in crossed.stdout.replace("by 0\n", "by 0;\n") and "mAcc" in crossed.stdout
            assert len(crossed.stdout.split("\n\n")[0].splitlines()) == 1 + classes


def test_raw_and_converted_coco_maps_train_the_same_model(clip_path, tmp_path):
    ends = []
    for converted in (False, True):
        root, out = miniature.coco(tmp_path / f"data{converted}", converted), tmp_path / f"run{converted}"
        result = run("--dataset", "coco-stuff", "--data-root", str(root), "--clip", str(clip_path), "--out", str(out),
                     "--crop-size", "32", "--regions", "4", "--batch-size", "2", "--iterations", "3", "--workers", "0",
                     "--prompts", "3", "--device", "cpu")
        assert result.returncode == 0, result.stderr
        ends.append(weights(out))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_transductive_and_supervised_runs_know_all_names_and_only_one_of_them_their_masks(flags, tmp_path, monkeypatch):
    assert run(*flags).returncode == 0
    half = str(tmp_path / "run" / "half.pt")
    real, given = train.CLIPRC.losses, []

    def spy(self, images, labels, text, weights, unseen=(), pairs=None):
        given.append((len(text), tuple(unseen), set(labels.unique().tolist())))
        return real(self, images, labels, text, weights, unseen, pairs)
    monkeypatch.setattr(train.CLIPRC, "losses", spy)
    for setting, init in (("transductive", ["--init", half]), ("supervised", [])):
        result = run(*flags, "--setting", setting, "--out", str(tmp_path / setting), "--iterations", "2", *init)
        assert result.returncode == 0, result.stderr
        evaluated = run(str(tmp_path / setting / "last.pt"), "--workers", "0", program="eval.py")
        assert "lowered by 0" in evaluated.stdout and "lowered by 0.1" not in evaluated.stdout
        assert not (tmp_path / setting / "half.pt").exists()
    assert [unseen for _, unseen, _ in given] == [(15, 16, 17, 18, 19)] * 2 + [()] * 2
    assert all(names == 20 for names, _, _ in given) and all(17 in labels for _, _, labels in given)
    assert "none.pt" in refused(*flags, "--setting", "transductive", "--init", str(tmp_path / "none.pt"))


def test_a_transductive_run_starts_from_the_inductive_runs_middle(flags, tmp_path):
    assert run(*flags).returncode == 0
    half = tmp_path / "run" / "half.pt"
    still = run(*flags, "--setting", "transductive", "--init", str(half), "--out", str(tmp_path / "still"), "--lr", "1e-6",
                "--iterations", "1", "--weight-decay", "0")
    assert still.returncode == 0, still.stderr
    middle = read_checkpoint(half)["weights"]
    assert all((tensor - middle[name]).abs().max() < 1e-5 for name, tensor in weights(tmp_path / "still").items())
    assert any(not torch.equal(tensor, middle[name]) for name, tensor in weights(tmp_path / "run").items())


def test_a_run_without_the_recovery_loss_starts_from_one_that_had_it(flags, tmp_path):
    assert run(*flags, "--iterations", "2").returncode == 0
    flags = [*flags, "--iterations", "2", "--setting", "supervised", "--w-rec", "0", "--out", str(tmp_path / "next"),
             "--init", str(tmp_path / "run/last.pt")]
    without = run(*flags)
    assert without.returncode == 0, without.stderr
    (tmp_path / "next/log.jsonl").unlink()  # and a finished run without its log still tells its result
    again = run(*flags, "--resume")
    assert again.returncode == 0 and "mIoU(U)" in again.stdout, again.stderr


@pytest.mark.parametrize("setting", ["inductive", "transductive"])
def test_accumulated_parts_compute_what_the_whole_batch_does(flags, tmp_path, setting):
    flags = [*flags, "--iterations", "3", "--dropout", "0", "--setting", setting, "--init", ""]
    for parts in ("1", "4"):
        result = run(*flags, "--out", str(tmp_path / parts), "--accumulate", parts)
        assert result.returncode == 0, result.stderr
    one, four = weights(tmp_path / "1"), weights(tmp_path / "4")
    for name, tensor in one.items():
        assert (four[name] - tensor).norm() <= 1e-5 * max(tensor.norm(), 1e-3), name
    logs = [[json.loads(line) for line in (tmp_path / parts / "log.jsonl").read_text().splitlines() if '"loss"' in line]
            for parts in ("1", "4")]
    assert [line["loss"] for line in logs[0]] == pytest.approx([line["loss"] for line in logs[1]], rel=1e-5)


def test_another_split_is_trained_and_evaluated_as_such(flags, tmp_path):
    result = run(*flags, "--iterations", "2", "--unseen", "car, person")
    assert result.returncode == 0, result.stderr
    evaluated = run(str(tmp_path / "run" / "last.pt"), "--workers", "0", program="eval.py")
    for table in (result.stdout, evaluated.stdout):
        assert re.findall(r"^\* (\w+)", table, re.M) == ["car", "person"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(flags, tmp_path, monkeypatch):
    real, calls = train.CLIPRC.losses, []

    def spy(self, *arguments):
        calls.append(1)
        return {name: loss * (float("nan") if len(calls) == 5 else 1) for name, loss in real(self, *arguments).items()}
    monkeypatch.setattr(train.CLIPRC, "losses", spy)
    assert "step 5" in refused(*flags)
    assert read_checkpoint(tmp_path / "run" / "last.pt")["step"] == 4


@pytest.mark.parametrize("slow", ["pictures", "model"])
def test_the_log_tells_how_long_the_loop_waited_for_pictures(flags, tmp_path, monkeypatch, slow):
    owner, name = (train.data.TrainSet, "__getitem__") if slow == "pictures" else (train.CLIPRC, "losses")
    real = getattr(owner, name)
    seconds = 0.1 if slow == "pictures" else 2
    monkeypatch.setattr(owner, name, lambda *arguments: (time.sleep(seconds), real(*arguments))[1])
    result = run(*flags, "--iterations", "2")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines() if '"loss"' in line]
    waited = [line["wait_per_step"] for line in lines]
    assert all(0 <= wait <= line["seconds_per_step"] for wait, line in zip(waited, lines))
    assert (min(waited) >= 4 * 0.1) == (slow == "pictures") == ("more --workers would help" in result.stdout)


@pytest.mark.slow
def test_three_pictures_are_learnt_by_heart(flags, tmp_path):
    result = run(*flags, "--iterations", "400", "--lr", "1e-3", "--initialiser", "truncated_normal", "--log-every", "20")
    assert result.returncode == 0, result.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines() if "loss" in line]
    assert losses[-1] < 0.1 * losses[0]
    evaluated = run(str(tmp_path / "run" / "last.pt"), "--split", "train", "--seen-only", program="eval.py")
    assert float(re.search(r"CLIP-RC +([\d.]+)", evaluated.stdout)[1]) > 90


def test_one_seed_gives_the_same_weights_and_another_does_not(flags, tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    for folder, seed in ((a, "3"), (b, "3"), (c, "4")):
        assert run(*flags, "--out", str(folder), "--seed", seed, "--iterations", "3").returncode == 0
    assert all(torch.equal(weights(a)[name], weights(b)[name]) for name in weights(a))
    assert any(not torch.equal(weights(a)[name], weights(c)[name]) for name in weights(a))


def test_inductive_training_knows_no_unseen_name_or_label(flags, monkeypatch):
    given = []

    def spy(self, images, labels, text, *more):
        given.append((labels, text, more))
        raise StopIteration
    monkeypatch.setattr(train.CLIPRC, "losses", spy)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    for name in (signal.SIGINT, signal.SIGTERM):
        monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(StopIteration):
        train.main()
    labels, text, (_, unseen) = given[0]
    assert len(text) == 15 and unseen == () and set(labels.unique().tolist()) <= {*range(15), 255}


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)


def test_stopped_and_resumed_run_ends_with_the_same_weights(flags, tmp_path):
    flags, whole = [*flags, "--iterations", "12", "--val-every", "12"], tmp_path / "whole"  # stopped while it trains
    assert run(*flags, "--out", str(whole)).returncode == 0
    for how, workers in ((signal.SIGTERM, "2"), (signal.SIGKILL, "0")):
        flags, broken = [*flags, "--workers", workers], tmp_path / how.name
        process = start(*flags, "--out", str(broken))
        wait_for(broken / "last.pt", process)
        os.killpg(process.pid, how)  # to workers too, as torchrun does
        out, err = process.communicate(timeout=120)
        assert process.returncode == (0 if how == signal.SIGTERM else -signal.SIGKILL), err
        stopped_at = read_checkpoint(broken / "last.pt")["step"]
        assert stopped_at < 12 and (how == signal.SIGKILL or f"stopped after step {stopped_at}" in out)
        again = run(*flags, "--out", str(broken), "--resume")
        assert again.returncode == 0 and f"from step {stopped_at}" in again.stdout, again.stderr
        assert all(torch.equal(weights(whole)[name], weights(broken)[name]) for name in weights(whole))
        steps = [[json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines() if "loss" in line]
                 for folder in (whole, broken)]
        assert steps[0] == steps[1] == list(range(1, 13))


def test_a_second_run_keeps_the_first_aside(flags, tmp_path):
    assert run(*flags, "--iterations", "2").returncode == 0
    first = weights(tmp_path / "run")
    again = run(*flags, "--iterations", "2", "--seed", "1")
    assert again.returncode == 0 and "kept as" in again.stdout
    assert all(torch.equal(first[name], tensor) for name, tensor in weights(tmp_path / "run.1").items())


def refused(*arguments: str, program: str = "train.py") -> str:
    """The one line that a refused command prints on stderr."""
    result = run(*arguments, program=program)
    assert result.returncode == 2, (result.stdout, result.stderr)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


def break_voc(voc: Path, root: Path, how: str) -> None:
    shutil.copytree(voc, root)
    mask, image = root / "SegmentationClass/1.png", root / "JPEGImages/1.jpg"
    if how == "no mask":
        mask.unlink()
    elif how == "other size":
        Image.new("L", (50, 50), 5).save(mask)
    elif how == "label 21":
        Image.new("L", (112, 80), 21).save(mask)
    elif how == "truncated":
        image.write_bytes(image.read_bytes()[:700])


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("how, culprit", [("no mask", "1.jpg"), ("other size", "1.png"), ("label 21", "1.png"),
                                          ("truncated", "1.jpg")])
def test_a_bad_picture_is_named(flags, voc, tmp_path, how, culprit, workers):
    if workers == "1" and how != "truncated":
        pytest.skip("one is enough to see an error come back from a worker")
    break_voc(voc, tmp_path / "bad", how)
    line = refused(*flags, "--data-root", str(tmp_path / "bad"), "--workers", workers)
    assert culprit in line and line == refused(*flags, "--data-root", str(tmp_path / "bad"), "--workers", "0")


def test_an_error_leaves_no_worker_behind(flags, voc, tmp_path):
    break_voc(voc, tmp_path / "bad", "truncated")
    process = start(*flags, "--data-root", str(tmp_path / "bad"), "--workers", "2")
    assert process.wait(timeout=120) == 2
    for pipe in (process.stdout, process.stderr):
        os.set_blocking(pipe.fileno(), False)
        while os.read(pipe.fileno(), 65536):  # BlockingIOError, not the end, while a worker still holds it
            pass


@pytest.mark.parametrize("workers", ["0", "2"])
def test_skipped_pictures_are_named_and_change_nothing_else(flags, voc, tmp_path, workers):
    break_voc(voc, tmp_path / "bad", "truncated")
    mend = tmp_path / "mended"  # what standing in means: the next picture in the place of the one that cannot be read
    shutil.copytree(voc, mend)
    for name in ("JPEGImages/{}.jpg", "SegmentationClass/{}.png"):
        shutil.copy(mend / name.format(2), mend / name.format(1))
    (tmp_path / "bad/ImageSets/Segmentation/val.txt").write_text("0\n")
    mended = run(*flags, "--data-root", str(mend), "--out", str(tmp_path / "mended-run"))
    skipped = run(*flags, "--data-root", str(tmp_path / "bad"), "--workers", workers, "--skip-bad")
    assert mended.returncode == skipped.returncode == 0, skipped.stderr
    assert "1 training pictures were skipped" in skipped.stdout and "1.jpg: cannot be read" in skipped.stdout
    assert len(set((tmp_path / "run/skipped.txt").read_text().splitlines())) == 1
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines() if '"loss"' in line]
    assert lines[-1]["skipped"] == 1
    expected = weights(tmp_path / "mended-run")
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(tmp_path / "run").items())


def test_a_data_set_of_bad_pictures_alone_is_one_error(flags, voc, tmp_path):
    break_voc(voc, tmp_path / "bad", "truncated")
    for n in (0, 2):
        (tmp_path / f"bad/JPEGImages/{n}.jpg").write_bytes(b"no picture")
    assert "none can be read" in refused(*flags, "--data-root", str(tmp_path / "bad"), "--skip-bad")


@pytest.mark.parametrize("extra, culprit", [
    (["--data-root", "/nowhere"], "/nowhere"), (["--clip", __file__], "test_train.py"), (["--clip", "RN50"], "ResNet"),
    (["--regions", "9"], "--regions"), (["--regions", "5"], "regions"), (["--crop-size", "70"], "--crop-size"),
    (["--iterations", "0"], "--iterations"), (["--lr", "-1"], "--lr"), (["--no-ram"], "rdl"), (["--device", "tpu"], "--device"),
    (["--unseen", "sofa, unicorn"], "unicorn"), (["--unseen", "sofa,sofa"], "twice"), (["--batch-size", "3", "--accumulate", "2"], "--batch-size")])
def test_a_bad_flag_is_named_and_nothing_is_written(flags, tmp_path, extra, culprit):
    assert culprit in refused(*flags, *extra)
    assert not (tmp_path / "run").exists()


def test_resuming_with_other_settings_or_another_model_is_refused(flags, tmp_path):
    assert run(*flags, "--iterations", "2").returncode == 0
    before = (tmp_path / "run" / "last.pt").read_bytes()
    assert "--regions" in refused(*flags, "--iterations", "2", "--regions", "16", "--resume")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    assert "other.pt" in refused(str(tmp_path / "other.pt"), program="eval.py")
    checkpoint = read_checkpoint(tmp_path / "run" / "last.pt")
    checkpoint["model"]["num_prompts"] = 5
    torch.save(checkpoint, tmp_path / "altered.pt")
    assert "altered.pt" in refused(str(tmp_path / "altered.pt"), program="eval.py")
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_nothing(flags, tmp_path):
    flags = [*flags, "--iterations", "150", "--save-every", "1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(*flags, "--out", str(whole)).returncode == 0
    rng, last = np.random.default_rng(0), broken / "last.pt"
    for kill in range(10):
        process, before = start(*flags, "--out", str(broken), "--resume"), last.exists() and last.stat().st_mtime_ns
        if kill % 2:  # while it trains and writes
            while process.poll() is None and (last.exists() and last.stat().st_mtime_ns) == before:
                time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5 if kill % 2 else 4))  # or while it imports and reads what the last one left
        assert process.poll() is None  # it is a kill indeed
        process.kill()
        process.communicate()
    assert 0 < read_checkpoint(last)["step"] < 150
    again = run(*flags, "--out", str(broken), "--resume")
    assert again.returncode == 0, again.stderr
    assert all(torch.equal(weights(whole)[name], weights(broken)[name]) for name in weights(whole))


def test_two_hosts_compute_what_one_process_does(flags, tmp_path):
    flags = [*flags, "--iterations", "3", "--dropout", "0"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hosts = [start(*flags, "--out", str(tmp_path / "several"),
                   launcher=("-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={host}", "--nproc-per-node=1",
                             "--master-addr=127.0.0.1", f"--master-port={port}")) for host in range(2)]
    errors = [host.communicate(timeout=120)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], errors
    assert run(*flags, "--out", str(tmp_path / "one")).returncode == 0
    for name, tensor in weights(tmp_path / "one").items():
        assert (weights(tmp_path / "several")[name] - tensor).norm() <= 1e-5 * max(tensor.norm(), 1e-3), name


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_compute_what_one_does(flags, tmp_path, processes):
    flags = [*flags, "--iterations", "5", "--dropout", "0"]
    one, several = tmp_path / "one", tmp_path / "several"
    alone = run(*flags, "--out", str(one))
    together = start(*flags, "--out", str(several), launcher=torchrun(processes))
    out, err = together.communicate(timeout=120)
    assert alone.returncode == 0 and together.returncode == 0, err
    for name, tensor in weights(one).items():
        assert (weights(several)[name] - tensor).norm() <= 1e-5 * max(tensor.norm(), 1e-3), name
    assert alone.stdout[alone.stdout.index("class (*"):].split("\n\n")[:2] == \
        out[out.index("class (*"):].split("\n\n")[:2]


def test_of_several_processes_the_one_with_the_bad_picture_names_it(flags, voc, tmp_path):
    break_voc(voc, tmp_path / "bad", "truncated")
    run_of_two = start(*flags, "--data-root", str(tmp_path / "bad"), "--batch-size", "2", launcher=torchrun(2))
    _, err = run_of_two.communicate(timeout=120)
    assert run_of_two.returncode != 0
    assert [line for line in err.splitlines() if line.startswith("error: ") and "1.jpg: cannot be read" in line], err
    assert len(re.findall("^error: ", err, re.M)) == 1 and "[rank" not in err, err  # how PyTorch marks its tracebacks


@pytest.mark.slow
def test_a_killed_and_restarted_process_changes_nothing(flags, tmp_path):
    kills_itself_once = tmp_path / "kills_itself_once.py"
    kills_itself_once.write_text(f"""import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train
rate = train.learning_rate

def rate_or_death(step, s):
    if (step, os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (5, "1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return rate(step, s)
train.learning_rate = rate_or_death
train.run_script(train.main)
""")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    runs = [start(*flags, "--out", str(whole), launcher=torchrun(2)),
            start(*flags, "--out", str(broken), "--resume", launcher=torchrun(2, "--max-restarts=1"),
                  program=kills_itself_once)]
    outputs = [process.communicate(timeout=120) for process in runs]
    assert [process.returncode for process in runs] == [0, 0], "\n".join(err for _, err in outputs)
    assert "from step 5" in outputs[1][0]
    assert all(torch.equal(weights(whole)[name], tensor) for name, tensor in weights(broken).items())
