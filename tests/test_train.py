"""Sec. 4.2: settings, the schedule, and a run from start to table, stopped and resumed."""

import copy
import multiprocessing
import os
import re
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import conftest
import miniature
import numpy as np
import pytest
import torch
from conftest import make_clip, openai_state, run, start
from PIL import Image
from torch import nn

import data
import eval
import train
from model import CLIPRC
from util.checkpoint import read_checkpoint, read_log
from util.class_names import VOC
from util.clip_files import load_clip


@pytest.fixture
def flags(clip_path, tmp_path, monkeypatch) -> list[str]:
    """A run small enough for a test, in an empty folder: 4 steps of 4 images of 64 x 64. Each step
    has its line in the log, each second one a checkpoint; no images are drawn at the end."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"LOG_EVERY": 1, "SAVE_EVERY": 2, "result_images": lambda *_: {}}.items():
        monkeypatch.setattr(train, name, value)
    return ["--dataset", "voc", "--data-root", str(miniature.voc(Path("VOC"))), "--clip",
            str(clip_path), "--device", "cpu", "--crop-size", "64", "--batch-size", "4",
            "--iterations", "4", "--regions", "4", "--prompts", "3", "--workers", "0",
            "--val-every", "99"]


def train_here() -> None:
    train.run_script(train.main)


refused = partial(conftest.refused, program=train_here)


def succeeds(*arguments: str, program=train_here) -> str:
    result = run(*arguments, program=program)
    assert result.returncode == 0, result.stderr
    return result.stdout


def evaluated(folder: str, *more: str) -> str:
    return succeeds(f"{folder}/last.pt", "--workers", "0", *more, program="eval.py")


def script(death: str = "False") -> Path:
    """train.py for `start`, as `flags` has it; it tells its dropout's seeds and dies where told."""
    path = Path("script.py").resolve()
    path.write_text(f"""import os, torch, train
train.LOG_EVERY, train.SAVE_EVERY, rate = 1, 2, train.learning_rate
train.learning_rate = lambda step, s: (os.write(1, b"dropout %d\\n" % torch.initial_seed()),
                                       os.kill(os.getpid(), 9 * ({death})), rate(step, s))[2]
train.run_script(train.main)""")
    return path


def weights(folder: str) -> dict[str, torch.Tensor]:
    return read_checkpoint(f"{folder}/last.pt")["weights"]


def difference(a: str, b: str) -> float:
    """Of two runs' weights, relative to their norm; 0 if all are equal to the bit. Without key
    biases: their true gradient is 0, and Adam turns rounding into steps."""
    ours, theirs = weights(a), weights(b)
    return max(float((theirs[name] - tensor).norm() / tensor.norm().clamp(min=1e-3))
               for name, tensor in ours.items() if not name.endswith(".k.bias"))


def logged(folder: str) -> list[int]:
    return [line["step"] for line in read_log(Path(folder, "log.jsonl")) if "loss" in line]


def spy(monkeypatch, owner, name: str, note, real=None) -> list:
    """What `note` says of each call of a function, which is still called, or `real` instead."""
    notes, real = [], real or getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments: (
        notes.append(note(*arguments)), real(*arguments))[1])
    return notes


@pytest.fixture
def steps(monkeypatch) -> list[SimpleNamespace]:
    """What a run passes to `CLIPRC.losses` in each step, and the state in which it does."""
    return spy(monkeypatch, CLIPRC, "losses", lambda model, images, labels, text, weights, unseen:
               SimpleNamespace(
                   **locals(), seed=torch.initial_seed(), training=model.training,
                   bfloat16=torch.is_autocast_enabled("cpu"),
                   start={name: p.clone() for name, p in model.named_parameters()}))


# ---------------------------------------------------------------------------------- the settings


def test_presets_are_the_papers():
    released = dict(batch_size=16, crop_size=512, lr=2e-4, weight_decay=0.01, warmup=1500,
                    dropout=0.1, scale=(0.5, 2), jitter=True, small_start=False, regions=16)
    for flags, prompts, loss_weights, iterations in (
            ("voc", 10, (100, 1, 2), 40_000), ("context", 35, (100, 1, 2), 40_000),
            ("coco-stuff", 100, (200, 3, 50), 80_000),
            ("voc --setting transductive", 10, (100, 1, 2), 20_000),
            ("voc --setting supervised", 10, (100, 1, 0), 40_000),
            ("coco-stuff --setting supervised", 100, (100, 1.5, 1), 80_000)):
        s = vars(train.parse_settings(["--data-root", ".", "--dataset", *flags.split()]))
        assert s == s | released | {
            "prompts": prompts, "loss_weights": loss_weights, "iterations": iterations}
    toy = ["--data-root", ".", "--setting", "transductive"]
    assert train.parse_settings(toy).lr == 2e-4  # from trained weights
    assert train.parse_settings(toy).small_start and train.parse_settings([*toy, "--lr=3"]).lr == 3


def test_schedule_warms_up_and_falls_like_a_polynomial():
    s = train.parse_settings(["--dataset", "voc", "--data-root", "."])
    rates = [train.learning_rate(step, s) for step in range(40_000)]
    assert rates.index(max(rates)) == 1500
    assert rates[0] == pytest.approx(2e-4 * 1e-6, rel=1e-3)
    assert rates[750] == pytest.approx((2e-4 * (1 - 750 / 40_000)**0.9) / 2, rel=1e-4)
    assert rates[20_000] == pytest.approx((2e-4 - 1e-6) * 0.5**0.9 + 1e-6)
    assert rates[-1] == pytest.approx(1e-6, rel=0.05)


def test_a_small_start_shrinks_the_weights_of_the_head():
    released = CLIPRC(make_clip().visual, num_prompts=3, regions=4)
    train.small_start(small := copy.deepcopy(released))
    for name, linear in small.named_modules():
        if isinstance(linear, nn.Linear) and name.startswith(("ram", "decoder")):
            zero = name.startswith("decoder.image_blocks") and name.endswith("ffn.3")
            std = 0 if zero else 0.0002 if name == "ram.descriptor_proj" else 0.02
            assert linear.weight.std().item() == pytest.approx(std, rel=0.1), name
            assert not linear.bias.any()
    for name in ("encoder", "recovery"):
        old, new = (getattr(model, name).parameters() for model in (released, small))
        assert all(map(torch.equal, old, new))


def test_a_bad_flag_is_named_and_nothing_is_written(flags):
    for bad in ("--data-root=/nowhere", "--clip=RN50", "--device=tpu", "--regions=9", "--seeds=3",
                "--regions=5", "--unseen=unicorn", "--batch-size=3", "--init=none.pt"):
        line = refused(*flags, "--accumulate", "2", bad)
        assert any(word in line for word in bad.split("=")) and not Path("runs").exists()


def test_every_setting_reaches_the_step_that_it_is_about(flags, clip_path, steps, monkeypatch):
    compiled = spy(monkeypatch, nn.Module, "compile", lambda part: type(part).__name__, str)
    groups = spy(monkeypatch, torch.optim.AdamW, "step", lambda self, *_: self.param_groups[0] | {})
    tested = spy(monkeypatch, eval, "slide_inference", lambda *_: torch.is_autocast_enabled("cpu"))
    lowered = spy(monkeypatch, eval, "label_map", lambda _, __, seen, by, *___: (len(seen), by))
    monkeypatch.setitem(train.PRESETS, "voc", train.RELEASED | {
        "weight_decay": 0.02, "loss_weights": (90, 3, 5), "scale": (0.7, 1.4), "jitter": False})
    flags = [*flags, "--seed", "3", "--lr", "3e-4", "--dropout", "0.3", "--precision", "bfloat16",
             "--update-regions", "--align", "R", "--recovery-loss", "kd", "--recovery-layers", "2",
             "--val-every", "2", "--compile"]
    succeeds(*flags)
    wanted = {"num_prompts": 3, "regions": 4, "update_regions": True, "ram": True, "align": "R",
              "rdl": True, "recovery_layers": 2, "recovery_loss": "kd", "dropout": 0.3}
    visual = load_clip(clip_path).visual
    torch.manual_seed(3)
    started = CLIPRC(visual, **wanted).named_parameters()
    assert all(torch.equal(steps[0].start[name], p) for name, p in started)
    seen = data.seen_classes(data.open_dataset("voc", "VOC", "train"))
    samples = data.TrainSet(seen, 64, 3, (0.7, 1.4), False)
    for step, batch in zip(steps, data.GlobalBatches(3, 4, 4, 3), strict=True):
        assert torch.equal(step.images, torch.stack([samples[item][0] for item in batch]))
        assert step.model.settings == wanted | {"class_embedding_twice": True}
        assert step.weights == (90, 3, 5) and step.bfloat16
        assert step.training  # also after the evaluation in the middle
    s = train.parse_settings(flags)
    assert [(group["lr"], group["weight_decay"], group["betas"]) for group in groups] == [
        (train.learning_rate(i, s), 0.02, (0.9, 0.999)) for i in range(4)]
    assert len({step.seed for step in steps}) == 4  # of dropout
    assert compiled == ["Encoder", "RegionAlignment", "Decoder", "RecoveryDecoder"]
    assert all(tested) and lowered == [(15, 0.1)] * 2 + [(0, 0)]  # the middle, the end, MaskCLIP


# ------------------------------------------------------------------------------------- whole runs


def test_a_run_ends_with_the_table_that_eval_prints_again(flags, monkeypatch):
    printed = succeeds(*flags, "--iterations", "8", "--lr", "1e-3", "--seed", "3",
                       "--val-every", "1", program="train.py")
    for line in read_log(Path("runs/voc/log.jsonl"))[:-1:2]:
        parts = ("mask", "dice", "recovery_q", "recovery_v")
        assert line["loss"] == pytest.approx(sum(map(line.get, parts))) and line["images/s"] > 0
    assert logged("runs/voc") == [*range(1, 9)]
    assert read_checkpoint("runs/voc/half.pt")["step"] == 4
    assert not any("encoder.visual" in name for name in weights("runs/voc"))
    assert all(Image.open(f"runs/voc/{name}.png").width > 200 for name in ("results", "regions"))
    table = printed[printed.index("class (* unseen)"):].split("\n\n")[0]
    row = re.search("CLIP-RC .*", printed)[0]
    assert re.search(r"^\* sheep ", table, re.M) and re.search(r"^  person ", table, re.M)
    assert "MaskCLIP, untrained" in printed and float(row.split()[1]) > 5
    again = evaluated("runs/voc")
    assert table in again and row in again and "lowered by 0.1" in again
    # The same classes in another order and in capitals are the same data set.
    capitals = tuple(name.upper() for name in VOC[::-1])
    monkeypatch.setitem(data.DATASETS, "voc", data.DATASETS["voc"] | {
        "class_names": capitals, "values": range(20, 0, -1), "unseen": ",".join(capitals[:5])})
    other = evaluated("runs/voc").casefold()
    assert all(line in other for line in [row.casefold(), *table.casefold().split("\n")[:-1]])
    assert "lowered by 0.1" in other


@pytest.mark.parametrize("name, make, more, head", [
    ("context", miniature.context, "--no-ram --regions=0 --small-start", "ZegCLIP"),
    ("coco-stuff", miniature.coco, "", "CLIP-RC"), ("folder", miniature.folder, "", "CLIP-RC")])
def test_every_data_set_trains_and_is_evaluated(flags, name, make, more, head, steps):
    printed = succeeds(*flags, "--dataset", name, "--data-root", make(Path(name)), "--iterations",
                       "2", "--crop-size", "32", "--batch-size", "2", *more.split())
    again = evaluated(f"runs/{name}")
    assert re.search(f"{head} .*", printed)[0] in again and "lowered by 0.1" in again
    if head == "ZegCLIP":
        assert 0.015 < steps[0].start["zegclip.descriptor_proj.weight"].std() < 0.025
    if name == "coco-stuff":  # Table 4: another data set's class names, nothing lowered
        root = miniature.context(Path("context"))
        crossed = evaluated(f"runs/{name}", "--dataset", "context59", "--data-root", root)
        assert "lowered by 0 (other class names" in crossed and "mAcc" in crossed


def test_only_transductive_training_knows_unseen_names_and_only_supervised_their_masks(
        flags, steps):
    flags = [*flags, "--recovery-loss", "none", "--init"]
    for setting, names, labels, unseen, lower in (
            ("inductive", 15, {0, 1, 255}, (), 0.1),
            ("transductive", 20, {0, 1, 16, 19, 255}, (15, 16, 17, 18, 19), 0),
            ("supervised", 20, {0, 1, 16, 19, 255}, (), 0)):
        steps.clear()
        printed = succeeds(*flags, "", "--setting", setting, "--out", setting)
        text = read_checkpoint(f"{setting}/last.pt")["text"]
        for step in steps:
            assert torch.equal(step.text, text[:names]) and step.unseen == unseen
            assert {255} < {*step.labels.unique().tolist()} <= labels
        assert {*torch.cat([step.labels for step in steps]).unique().tolist()} == labels
        assert not step.model.recovery and "recovery" not in Path(setting, "log.jsonl").read_text()
        again = evaluated(setting)
        assert f"lowered by {lower} ({setting} training" in again
        assert re.search("CLIP-RC .*", printed)[0] in again
    for setting in ("inductive", "transductive"):
        assert "not be zero-shot" in refused(*flags, "supervised/last.pt", "--setting", setting)


def test_parts_of_a_batch_that_show_as_many_classes_add_up_to_it(flags, monkeypatch, steps):
    monkeypatch.setitem(train.PRESETS, "voc", train.RELEASED | {"scale": (1, 1)})
    for out, parts in (("whole", 1), ("parts", 4)):
        steps.clear()
        succeeds(*flags, "--dropout", "0", "--out", out, "--accumulate", str(parts))
        assert [len(step.images) for step in steps] == [4 // parts] * 4 * parts
    assert difference("whole", "parts") <= 1e-5
    whole, in_parts = ([line["loss"] for line in read_log(Path(out, "log.jsonl"))[:4]]
                       for out in ("whole", "parts"))
    assert whole == pytest.approx(in_parts, rel=1e-5)


# --------------------------------------------------------------------------- stopped and resumed


def test_a_run_that_is_stopped_or_killed_resumes_to_the_same_weights(flags):
    flags, real = [*flags, "--iterations", "10"], train.learning_rate
    succeeds(*flags, "--out", "whole")
    flags += ["--out", "broken", "--resume"]

    def stopped(number: int, at: int):
        def rate(step: int, s) -> float:
            if step == at:  # Ctrl-C and `kill -- -PID` reach the whole group
                for process in multiprocessing.active_children():
                    if os.getpgid(process.pid) == os.getpgrp():
                        process.kill()
                time.sleep(0.1)
                os.kill(os.getpid(), number)
            return real(step, s)
        with mock.patch.object(train, "learning_rate", rate):
            result = run(*flags, "--workers", "1", program=train_here)
        return result.returncode, result.stdout.strip().split("\n")[-1]
    assert stopped(signal.SIGINT, at=1) == (130, "nothing is saved yet")
    process = start(*flags, program=script("step == 5"))
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL and logged("broken") == [1, 2, 3, 4, 5]
    assert stopped(signal.SIGTERM, at=7) == (143, "--resume continues from step 6")
    assert "steps 6 to 10 in broken, from broken/last.pt" in succeeds(*flags)
    assert difference("whole", "broken") == 0 and logged("broken") == [*range(1, 11)]


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_nothing(flags):
    flags, last = [*flags, "--iterations", "150"], Path("broken/last.pt")
    succeeds(*flags, "--out", "whole")
    rng, program = np.random.default_rng(0), script()
    for kill in range(10):
        before = last.exists() and last.stat().st_mtime_ns
        process = start(*flags, "--out", "broken", "--resume", program=program)
        # Each second time while it trains and writes, else while it imports and reads.
        while kill % 2 and (last.exists() and last.stat().st_mtime_ns) == before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3 if kill % 2 else 3))
        assert process.poll() is None
        process.kill()
        process.communicate()
    assert 0 < read_checkpoint(last)["step"] < 150
    succeeds(*flags, "--out", "broken", "--resume")
    assert difference("whole", "broken") == 0 and logged("broken") == [*range(1, 151)]


def test_a_new_run_takes_a_free_folder_and_the_newest_is_resumed_or_continued_transductively(flags):
    for name in ("runs/voc", "runs/voc-2"):
        assert f"steps 0 to 4 in {name}" in succeeds(*flags)
    before = {path: path.read_bytes() for path in Path("runs").glob("*/*")}
    assert "--out runs/voc holds a run" in refused(*flags, "--seed", "1", "--out", "runs/voc")
    assert before == {path: path.read_bytes() for path in Path("runs").glob("*/*")}
    assert "steps 4 to 4 in runs/voc-2, from runs/voc-2/last.pt" in succeeds(*flags, "--resume")
    flags += ["--setting", "transductive", "--lr", "1e-9"]
    assert "in runs/voc-transductive, from runs/voc-2/half.pt" in succeeds(*flags)
    middle = read_checkpoint("runs/voc-2/half.pt")["weights"]
    for name, tensor in weights("runs/voc-transductive").items():
        torch.testing.assert_close(tensor, middle[name], atol=1e-5, rtol=0)
    # A run that calls other classes unseen would know masks of its unseen classes.
    assert "saw masks of aeroplane" in refused(*flags, "--unseen", "aeroplane")
    assert "another regions" in refused(*flags, "--regions", "16")
    assert not Path("runs/voc-transductive/half.pt").exists()


def test_resuming_with_other_settings_images_or_clip_is_refused(flags):
    succeeds(*flags)
    torch.save(openai_state(make_clip(seed=1)), "other.pt")
    for change, name in (("--seed 1", "seed"), ("--lr 1", "lr"), ("--regions 16", "regions"),
                         ("--unseen car", "unseen"), ("--clip other.pt", "clip digest")):
        assert f"another {name}" in refused(*flags, *change.split(), "--resume")
    Path("VOC").rename("moved")
    flags += ["--data-root", "moved", "--resume"]
    assert "mIoU(U)" in succeeds(*flags)
    with mock.patch.dict(train.PRESETS, voc=train.RELEASED | {"loss_weights": (1.0, 1.0, 1.0)}):
        assert "another loss weights" in refused(*flags)
    Path("moved/ImageSets/Segmentation/train.txt").write_text("a")
    assert "another images" in refused(*flags)


def test_a_loss_that_is_not_a_number_ends_the_run_and_keeps_the_checkpoint(flags):
    with mock.patch.object(train, "learning_rate", lambda step, s: 1e30 * (step == 2)):
        assert re.search("step 4: the loss is (nan|inf).*checkpoint is of step 2", refused(*flags))
    assert read_checkpoint("runs/voc/last.pt")["step"] == 2


def test_a_loader_without_shared_memory_says_what_to_do(monkeypatch):
    died = "raise RuntimeError('DataLoader worker (pid 3)')"
    monkeypatch.setattr(train, "main", lambda: exec(died))
    assert "worker (pid 3); a container needs --shm-size 8g, or --workers 0" in refused()


# ----------------------------------------------------------------------------- several processes


def torchrun(processes: int, *more: str) -> tuple[str, ...]:
    return "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *more


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_compute_what_one_does_each_with_dropout_of_its_own(flags, processes):
    # Of 8 images there are more (image, class) pairs than processes: at least 1 each, Sec. 3.5.
    flags = [*flags, "--dropout", "0", "--batch-size", "8"]
    several = start(*flags, "--out", "several", launcher=torchrun(processes), program=script())
    alone = succeeds(*flags, "--out", "one")
    out, err = several.communicate(timeout=120)
    assert several.returncode == 0, err
    assert difference("one", "several") <= 1e-5 and logged("several") == [1, 2, 3, 4]
    assert alone[alone.index("class (*"):].split("\n\n")[0] in out
    assert len(set(re.findall(r"dropout (\d+)", out))) == 4 * processes


def test_of_several_processes_the_one_with_the_bad_image_names_it(flags):
    bad = Path("VOC/JPEGImages/b.jpg")
    bad.write_bytes(bad.read_bytes()[:700])
    process = start(*flags, "--batch-size", "2", "--seed", "1", "--workers", "1",
                    launcher=torchrun(2))
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and len(re.findall("^error: .*b.jpg", err, re.M)) == 1, err


@pytest.mark.slow
def test_a_killed_and_restarted_process_changes_nothing(flags):
    program = script("""(step, os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (
        3, "1", "0")""")
    runs = [start(*flags, "--out", "whole", launcher=torchrun(2)),
            start(*flags, "--out", "broken", "--resume", program=program,
                  launcher=torchrun(2, "--max-restarts=1"))]
    outputs = [process.communicate(timeout=120) for process in runs]
    assert [process.returncode for process in runs] == [0, 0], outputs
    assert "steps 2 to 4 in broken" in outputs[1][0]
    assert difference("whole", "broken") == 0 and logged("broken") == [1, 2, 3, 4]
