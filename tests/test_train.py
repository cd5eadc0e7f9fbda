"""Sec. 4.2: settings, the schedule, and a run from start to table, stopped and resumed."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import miniature
import numpy as np
import pytest
import torch
from conftest import ROOT, refused, run, start
from PIL import Image

import data
import eval
import model
import train
from util.checkpoint import read_checkpoint
from util.run import read_log

PARTS = [(5, (200, 60, 40)), (7, (60, 200, 60)), (15, (60, 80, 220)), (18, (220, 220, 60))]


@pytest.fixture(scope="session")
def voc(tmp_path_factory) -> Path:
    """Images of coloured quarters in VOC's layout: bottle, car, person, and sofa (unseen)."""
    root, rng = tmp_path_factory.mktemp("voc"), np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for n in range(6):
        image, label = np.zeros((80, 112, 3)), np.zeros((80, 112), np.uint8)
        for i, (number, colour) in enumerate(rng.permutation(np.array(PARTS, dtype=object))):
            part = np.s_[i // 2 * 40:i // 2 * 40 + 40, i % 2 * 56:i % 2 * 56 + 56]
            image[part], label[part] = colour, number
        label[38:42] = 255
        image = (image + rng.normal(0, 12, image.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(image).save(root / f"JPEGImages/{n}.jpg", quality=95)
        Image.fromarray(label).save(root / f"SegmentationClass/{n}.png")
    (root / "ImageSets/Segmentation/train.txt").write_text("0\n1\n2\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("3\n4\n5\n")
    return root


@pytest.fixture
def flags(voc, clip_path, tmp_path) -> list[str]:
    """A run small enough for a test: 8 steps of 4 images of 64 x 64."""
    return ["--dataset", "voc", "--data-root", str(voc), "--clip", str(clip_path),
            "--out", str(tmp_path / "run"), "--crop-size", "64", "--batch-size", "4",
            "--iterations", "8", "--regions", "4", "--prompts", "3", "--workers", "0",
            "--save-every", "2", "--log-every", "1", "--device", "cpu"]


def succeeds(*arguments: str, program: str = "train.py") -> str:
    result = run(*arguments, program=program)
    assert result.returncode == 0, result.stderr
    return result.stdout


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(folder / "last.pt")["weights"]


def same(a: Path, b: Path) -> bool:
    ours, theirs = weights(a), weights(b)
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def close(a: Path, b: Path) -> bool:
    """But for key biases: their true gradient is 0, and Adam turns rounding into steps."""
    ours, theirs = weights(a), weights(b)
    return all((theirs[name] - tensor).norm() <= 1e-5 * max(tensor.norm(), 1e-3)
               for name, tensor in ours.items() if not name.endswith(".k.bias"))


def losses(folder: Path) -> list[dict]:
    return [line for line in read_log(folder / "log.jsonl") if "loss" in line]


# ---------------------------------------------------------------------------------- the settings


def settings(*arguments: str) -> train.Settings:
    return train.parse_settings([*arguments, "--data-root", "."])


def test_schedule_warms_up_and_falls_like_a_polynomial():
    s = settings("--dataset", "voc")
    rates = [train.learning_rate(step, s) for step in range(s.iterations)]
    assert (s.warmup, s.iterations) == (1500, 40_000) and rates.index(max(rates)) in (1499, 1500)
    assert rates[0] == pytest.approx(2e-4 * 1e-6, rel=1e-3)
    assert rates[20_000] == pytest.approx((2e-4 - 1e-6) * 0.5**0.9 + 1e-6)
    assert rates[-1] == pytest.approx(1e-6, rel=0.05)


def test_presets_are_the_papers():
    def preset(*arguments: str) -> tuple:
        s = settings("--dataset", *arguments)
        assert (s.batch_size, s.crop_size, s.regions, s.lr, s.weight_decay, s.dropout) == (
            16, 512, 16, 2e-4, 0.01, 0.1)
        assert (s.initialiser, s.descriptor_scale) == ("released", 1)
        return s.prompts, s.w_mask, s.w_dice, s.w_rec, s.iterations
    assert preset("voc") == (10, 100, 1, 2, 40_000)
    assert preset("context") == preset("folder") == (35, 100, 1, 2, 40_000)
    assert preset("coco-stuff") == (100, 200, 3, 50, 80_000)
    assert preset("coco-stuff", "--setting", "transductive") == (100, 200, 3, 50, 40_000)
    assert preset("voc", "--setting", "supervised") == (10, 100, 1, 0, 40_000)
    assert settings("--setting", "transductive").lr == 2e-4 != settings("--dataset", "toy").lr
    assert preset("coco-stuff", "--setting", "supervised") == (100, 100, 1.5, 1, 80_000)
    assert preset("coco-stuff", "--w-rec", "7")[3] == 7


@pytest.mark.parametrize("extra, culprit", [
    (["--data-root", "/nowhere"], "/nowhere"), (["--clip", __file__], "test_train.py"),
    (["--clip", "RN50"], "RN50"), (["--regions", "9"], "--regions"), (["--regions", "5"], "square"),
    (["--iterations", "0"], "--iterations"), (["--lr", "-1"], "--lr"), (["--no-ram"], "--no-rdl"),
    (["--device", "tpu"], "--device"), (["--unseen", "unicorn"], "unicorn"),
    (["--batch-size", "3", "--accumulate", "2"], "--batch-size"),
    (["--setting", "transductive", "--init", "none.pt"], "none.pt")])
def test_a_bad_flag_is_named_and_nothing_is_written(flags, tmp_path, extra, culprit):
    assert culprit in refused(*flags, *extra)
    assert not list(tmp_path.glob("run/*"))


# ------------------------------------------------------------------------------------- whole runs


def test_run_ends_with_the_table_that_eval_prints_again(flags, tmp_path):
    printed, folder = succeeds(*flags), tmp_path / "run"
    assert [line["step"] for line in losses(folder)] == list(range(1, 9))
    parts = ("mask", "dice", "recovery_q", "recovery_v")
    assert all(line["loss"] == pytest.approx(sum(map(line.get, parts))) for line in losses(folder))
    assert read_checkpoint(folder / "half.pt")["step"] == 4
    assert "train.txt alone" in printed  # what is missing is said
    table = printed[printed.index("class (* unseen)"):]
    evaluated = succeeds(folder / "last.pt", "--workers", "0", program="eval.py")
    assert table.split("\n\n")[0] in evaluated
    assert re.search("CLIP-RC .*", table)[0] in evaluated and "lowered by 0.1" in evaluated
    assert re.search(r"^\* sofa ", table, re.M) and re.search(r"^  person ", table, re.M)
    assert "MaskCLIP, untrained" in table
    assert Image.open(folder / "results.png").width > 200
    assert not any("encoder.visual" in name for name in weights(folder))


@pytest.mark.parametrize("name", ["context", "coco-stuff", "folder"])
def test_every_data_set_trains_and_is_evaluated(name, clip_path, tmp_path):
    maker = {"context": miniature.context, "coco-stuff": miniature.coco, "folder": miniature.folder}
    root, out = maker[name](tmp_path / "data"), tmp_path / "run"
    printed = succeeds("--dataset", name, "--data-root", root, "--clip", clip_path, "--out", out,
                       "--crop-size", "32", "--regions", "4", "--batch-size", "2", "--iterations",
                       "2", "--workers", "0", "--device", "cpu", "--prompts", "3")
    saved = tmp_path / "saved"
    evaluated = succeeds(out / "last.pt", "--workers", "0", "--save", saved, program="eval.py")
    assert re.search("CLIP-RC .*", printed)[0] in evaluated
    assert all(Image.open(file).size == (60, 40) for file in saved.iterdir())
    if name == "coco-stuff":  # Table 4: another data set's class names, nothing lowered
        miniature.context(tmp_path / "context")
        crossed = succeeds(out / "last.pt", "--dataset", "context59", "--data-root",
                           tmp_path / "context", "--workers", "0", program="eval.py")
        assert "lowered by 0 (other class names" in crossed and "mAcc" in crossed
        assert len(crossed.split("\n\n")[0].splitlines()) == 1 + 59


class Spy:
    """Records what a run passes to `CLIPRC.losses` and to AdamW in each step."""

    def __init__(self, monkeypatch) -> None:
        self.losses, self.steps = [], []
        real_losses, real_step = model.CLIPRC.losses, torch.optim.AdamW.step

        def spy_losses(network, images, labels, text, weights, unseen=(), num_pairs=None):
            self.losses.append({
                "images": images, "labels": labels.clone(), "text": text, "weights": weights,
                "unseen": unseen, "training": network.training,
                "update_regions": network.encoder.region_tokens.requires_grad,
                "dropout": {network.encoder.prompt_dropout.p,
                            network.decoder.image_blocks[0].dropout.p},
                "dropout_seed": torch.initial_seed(),
                "bfloat16": torch.is_autocast_enabled("cpu")})
            return real_losses(network, images, labels, text, weights, unseen, num_pairs)

        def spy_step(optimizer, *more):
            group = optimizer.param_groups[0]
            self.steps.append({key: group[key] for key in ("lr", "weight_decay", "betas")})
            return real_step(optimizer, *more)
        monkeypatch.setattr(model.CLIPRC, "losses", spy_losses)
        monkeypatch.setattr(torch.optim.AdamW, "step", spy_step)


def test_every_setting_reaches_the_step_that_it_is_about(flags, monkeypatch):
    spy = Spy(monkeypatch)
    flags = [*flags, "--w-mask", "90", "--w-dice", "3", "--w-rec", "5", "--iterations", "4",
             "--lr", "3e-4", "--weight-decay", "0.02", "--val-every", "2", "--dropout", "0.3",
             "--precision", "bfloat16", "--update-regions"]
    succeeds(*flags)
    s = train.parse_settings(flags)
    assert [step["lr"] for step in spy.steps] == [train.learning_rate(i, s) for i in range(4)]
    assert all(step["weight_decay"] == 0.02 and step["betas"] == (0.9, 0.999) for step in spy.steps)
    for given in spy.losses:
        assert given["weights"] == (90, 3, 5)
        assert given["training"]  # also after the evaluation in the middle
        assert given["dropout"] == {0.3} and given["bfloat16"] and given["update_regions"]
    assert len({given["dropout_seed"] for given in spy.losses}) == 4


def test_a_step_sees_the_samples_with_scale_and_colours_as_set(flags, voc, monkeypatch):
    spy = Spy(monkeypatch)
    succeeds(*flags, "--iterations", "1", "--scale-min", "0.7", "--scale-max", "1.4", "--jitter")
    samples = data.TrainSet(data.seen_classes(data.open_dataset("voc", voc, "train")), 64, 0,
                            (0.7, 1.4), True)
    (batch,) = data.GlobalBatches(3, 4, 1, 0)
    assert torch.equal(spy.losses[0]["images"], torch.stack([samples[item][0] for item in batch]))


def test_inductive_training_knows_no_unseen_name_or_label(flags, monkeypatch):
    spy = Spy(monkeypatch)
    succeeds(*flags, "--iterations", "2")
    for given in spy.losses:
        assert len(given["text"]) == 15 and given["unseen"] == ()
        assert set(given["labels"].unique().tolist()) <= {*range(15), 255}


def test_transductive_training_knows_names_and_supervised_training_masks_too(
        flags, tmp_path, monkeypatch):
    succeeds(*flags)
    spy = Spy(monkeypatch)
    for setting in ("transductive", "supervised"):
        out, init = tmp_path / setting, tmp_path / "run" / "half.pt"
        printed = succeeds(*flags, "--setting", setting, "--out", out, "--iterations", "2",
                           "--init", init if setting == "transductive" else "")
        evaluated = succeeds(out / "last.pt", "--workers", "0", program="eval.py")
        assert f"lowered by 0 ({setting} training" in evaluated
        assert re.search("CLIP-RC .*", printed)[0] in evaluated
    assert "not be zero-shot" in refused(*flags, "--no-rdl", "--init", out / "last.pt")
    assert [given["unseen"] for given in spy.losses] == [(15, 16, 17, 18, 19)] * 2 + [()] * 2
    assert all(len(given["text"]) == 20 and 17 in given["labels"] for given in spy.losses)


def test_a_transductive_run_starts_from_the_middle_of_an_inductive_one(flags, tmp_path):
    succeeds(*flags)
    half = tmp_path / "run" / "half.pt"
    succeeds(*flags, "--setting", "transductive", "--init", half, "--out", tmp_path / "still",
             "--lr", "1e-6", "--iterations", "1", "--weight-decay", "0")
    middle = read_checkpoint(half)["weights"]
    for name, tensor in weights(tmp_path / "still").items():
        assert (tensor - middle[name]).abs().max() < 1e-5
    # A run that calls other classes unseen would know masks of its unseen classes.
    line = refused(*flags, "--setting", "transductive", "--init", half, "--unseen", "car")
    assert "car" in line and "not be zero-shot" in line


@pytest.mark.parametrize("setting", ["inductive", "transductive"])
def test_gradient_accumulation_computes_what_the_whole_batch_does(flags, tmp_path, setting):
    for parts in ("1", "4"):
        succeeds(*flags, "--iterations", "3", "--dropout", "0", "--setting", setting, "--init", "",
                 "--out", tmp_path / parts, "--accumulate", parts)
    assert close(tmp_path / "1", tmp_path / "4")
    logged = [[line["loss"] for line in losses(tmp_path / parts)] for parts in ("1", "4")]
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)


def test_compile_reaches_every_part(flags, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda part: compiled.append(type(part)))
    succeeds(*flags, "--iterations", "2", "--compile")
    assert compiled == [train.CLIPRC.__init__.__globals__["Encoder"], model.RegionAlignment,
                        model.Decoder, model.RecoveryDecoder]


def test_one_seed_gives_the_same_weights_and_another_does_not(flags, tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    for folder, seed in ((a, "3"), (b, "3"), (c, "4")):
        succeeds(*flags, "--out", folder, "--seed", seed, "--iterations", "3")
    assert same(a, b) and not same(a, c)


def test_scores_are_lowered_and_precision_kept_in_evaluation(flags, monkeypatch):
    given, real = [], eval.slide_inference

    def spy(network, image, text, crop, stride, lower, seen):
        given.append((lower, len(seen), torch.is_autocast_enabled("cpu")))
        return real(network, image, text, crop, stride, lower, seen)
    monkeypatch.setattr(eval, "slide_inference", spy)
    succeeds(*flags, "--iterations", "1", "--precision", "bfloat16")
    evaluations = given[:6]  # three images of the model, then of MaskCLIP
    assert evaluations == [(0.1, 15, True)] * 3 + [(0.0, 15, True)] * 3


# --------------------------------------------------------------------------- stopped and resumed


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)


@pytest.mark.parametrize("how, workers", [("SIGTERM", "2"), ("SIGINT", "0"), ("SIGKILL", "0")])
def test_stopped_and_resumed_run_ends_with_the_same_weights(flags, tmp_path, how, workers):
    flags = [*flags, "--iterations", "12", "--val-every", "12"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    succeeds(*flags, "--out", whole)
    process = start(*flags, "--workers", workers, "--out", broken)
    wait_for(broken / "last.pt", process)
    number = getattr(signal, how)
    os.killpg(process.pid, number)  # the workers get it too, as from a terminal
    out, err = process.communicate(timeout=120)
    assert process.returncode == (-number if how == "SIGKILL" else 128 + number), err
    stopped_at = read_checkpoint(broken / "last.pt")["step"]
    assert stopped_at < 12
    if how != "SIGKILL":
        assert f"stopped after step {stopped_at}" in out and "finishing this step" in err
    assert f"steps {stopped_at} to 12" in succeeds(*flags, "--out", broken, "--resume")
    assert same(whole, broken)
    assert [line["step"] for line in losses(broken)] == list(range(1, 13))


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_nothing(flags, tmp_path):
    flags = [*flags, "--iterations", "150", "--save-every", "1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    succeeds(*flags, "--out", whole)
    rng, last = np.random.default_rng(0), broken / "last.pt"
    for kill in range(10):
        before = last.exists() and last.stat().st_mtime_ns
        process = start(*flags, "--out", broken, "--resume")
        if kill % 2:  # while it trains and writes, else while it imports and reads
            while process.poll() is None and (last.exists() and last.stat().st_mtime_ns) == before:
                time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5 if kill % 2 else 4))
        assert process.poll() is None
        process.kill()
        process.communicate()
    assert 0 < read_checkpoint(last)["step"] < 150
    succeeds(*flags, "--out", broken, "--resume")
    assert same(whole, broken)


def test_a_second_run_keeps_the_first_aside_and_a_third_beside_it_is_refused(flags, tmp_path):
    folder, flags = tmp_path / "run", [*flags, "--iterations", "2"]
    succeeds(*flags)
    first = weights(folder)
    assert "kept as" in succeeds(*flags, "--seed", "1")
    kept = weights(tmp_path / "run.1")
    assert all(torch.equal(first[name], tensor) for name, tensor in kept.items())
    with train.claim_folder(folder, resume=True):  # as a run that is under way
        assert "another run" in refused(*flags, "--seed", "1", "--resume")


def test_resuming_with_other_settings_or_other_images_is_refused(flags, voc, tmp_path):
    succeeds(*flags)
    assert "regions" in refused(*flags, "--regions", "16", "--resume")
    assert "another seed" in refused(*flags, "--seed", "1", "--resume")
    other = tmp_path / "other"
    subprocess.run(["cp", "-r", voc, other], check=True)
    (other / "ImageSets/Segmentation/train.txt").write_text("0\n1\n")
    assert "images" in refused(*flags, "--data-root", other, "--resume")
    assert "mIoU(U)" in succeeds(*flags, "--resume", "--accumulate", "2")  # finished: its table


def test_a_loss_or_weight_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
        flags, tmp_path, monkeypatch):
    real, calls = model.CLIPRC.losses, []

    def broken_loss(self, *arguments):
        calls.append(1)
        factor = float("nan") if len(calls) == 5 else 1
        return {name: loss * factor for name, loss in real(self, *arguments).items()}
    monkeypatch.setattr(model.CLIPRC, "losses", broken_loss)
    assert "step 5" in refused(*flags)
    assert read_checkpoint(tmp_path / "run" / "last.pt")["step"] == 4
    monkeypatch.setattr(model.CLIPRC, "losses", lambda self, *arguments: {  # its gradient is not
        name: loss + (loss - loss.detach()).sqrt()
        for name, loss in real(self, *arguments).items()})
    assert "NaN" in refused(*flags, "--out", tmp_path / "second")


# ----------------------------------------------------------------------------- several processes


def torchrun(processes: int, *more: str) -> tuple[str, ...]:
    return "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *more


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_compute_what_one_does(flags, tmp_path, processes):
    flags = [*flags, "--iterations", "5", "--dropout", "0"]
    one, several = tmp_path / "one", tmp_path / "several"
    together = start(*flags, "--out", several, launcher=torchrun(processes))
    alone = succeeds(*flags, "--out", one)
    out, err = together.communicate(timeout=120)
    assert together.returncode == 0, err
    assert close(one, several)
    assert alone[alone.index("class (*"):].split("\n\n")[0] in out


def test_each_process_has_dropout_of_its_own(flags, tmp_path):
    script = tmp_path / "spy.py"
    script.write_text(f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train
real = train.backward
def spy(*arguments):
    os.write(1, f"dropout seed {{torch.initial_seed()}}\\n".encode())  # whole, beside the other
    return real(*arguments)
train.backward = spy
train.run_script(lambda: train.train(train.parse_settings()))
""")
    out, err = start(*flags, "--iterations", "2", launcher=torchrun(2),
                     program=script).communicate(timeout=120)
    assert len(set(re.findall(r"dropout seed (\d+)", out))) == 4, err


def test_of_several_processes_the_one_with_the_bad_image_names_it(flags, voc, tmp_path):
    bad = tmp_path / "bad"
    subprocess.run(["cp", "-r", voc, bad], check=True)
    (bad / "JPEGImages/1.jpg").write_bytes((voc / "JPEGImages/1.jpg").read_bytes()[:700])
    process = start(*flags, "--data-root", bad, "--seed", "1", launcher=torchrun(2))
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert len(re.findall("^error: .*1.jpg", err, re.M)) == 1, err


@pytest.mark.slow
def test_a_killed_and_restarted_process_changes_nothing(flags, tmp_path):
    script = tmp_path / "kills_itself_once.py"
    script.write_text(f"""import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train
rate = train.learning_rate
def rate_or_death(step, s):
    restarts = os.environ["TORCHELASTIC_RESTART_COUNT"]
    if (step, os.environ["RANK"], restarts) == (5, "1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return rate(step, s)
train.learning_rate = rate_or_death
train.run_script(lambda: train.train(train.parse_settings()))
""")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    runs = [start(*flags, "--out", whole, launcher=torchrun(2)),
            start(*flags, "--out", broken, "--resume", launcher=torchrun(2, "--max-restarts=1"),
                  program=script)]
    outputs = [process.communicate(timeout=120) for process in runs]
    assert [process.returncode for process in runs] == [0, 0], outputs
    assert same(whole, broken)
