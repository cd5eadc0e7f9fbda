"""The GPU path: without a card its devices are checked on tensors without numbers, with one all."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import make_clip, recorded, run, start

from eval import label_map, slide_inference
from model import CLIPRC
from tools.convert import from_released
from train import average_gradients
from util import processes
from util.checkpoint import read_checkpoint

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("settings", [
    {"regions": 16, "recompute": True, "recovery_loss": "kd"}, {"recovery_layers": 0, "align": "R"},
    {"ram": False, "rdl": False, "regions": 0}])
def test_training_steps_and_windows_stay_on_the_device_and_take_no_number_to_the_host(settings):
    device = torch.device("meta")  # no numbers: .item(), .cpu() and a tensor elsewhere raise
    with device:
        network = CLIPRC(make_clip(layers=1).visual.to(device),
                         **{"num_prompts": 3, "regions": 4} | settings)
        images, text = torch.empty(2, 3, 64, 64), torch.empty(5, 32)
        labels = torch.zeros(2, 64, 64, dtype=torch.int64)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad])
    for unseen in ((), (3, 4)):
        losses = network.losses(images, labels, text, unseen=unseen)
        sum(losses.values()).backward()
        average_gradients([*network.parameters()])
        optimizer.step()
    scores = slide_inference(network.eval(), torch.empty(3, 64, 100), text, 64)
    labels, best = label_map(scores, (80, 120), [0, 1], 0.1, 0.5)
    assert scores.device == labels.device == best.device == device
    assert (labels.shape, labels.dtype, scores.dtype) == ((80, 120), torch.uint8, torch.float32)


def test_a_device_without_bfloat16_says_so_and_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(processes, "slow_bfloat16", lambda device: True)
    assert processes.start_processes("cpu", "bfloat16").type == "cpu"
    assert "float32 is faster here" in capsys.readouterr().out


def test_the_segmentation_keeps_its_digits_in_bfloat16():
    torch.manual_seed(0)
    network = CLIPRC(make_clip().visual, num_prompts=3, regions=4).eval()
    images, text = torch.randn(1, 3, 64, 64), F.normalize(torch.randn(5, 32), dim=-1)
    with torch.no_grad(), processes.autocast(torch.device("cpu"), "bfloat16"):
        f = network.features(images, text)
    maps = f.R_d.double().unflatten(1, (4, 5)).mean(1) @ f.I_d.double().transpose(1, 2)
    exact = F.interpolate(maps.unflatten(-1, (4, 4)), (64, 64), mode="bilinear")
    torch.testing.assert_close(f.logits.double(), exact, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------ with a card


@needs_gpu
@pytest.mark.parametrize("precision, tolerance",
                         [("float32", 1e-4), ("tf32", 2e-2), ("bfloat16", 2e-1)])
@pytest.mark.parametrize("name", ["clip_rc_inductive", "zegclip_inductive"])
def test_logits_on_a_gpu_equal_the_released_codes(name, precision, tolerance):
    golden, device = recorded(name), torch.device("cuda")
    network = from_released(golden["state_dict"]).to(device)
    with torch.no_grad(), processes.autocast(device, precision):
        logits = network(golden["images"].to(device), golden["text"].to(device))
    torch.testing.assert_close(logits.cpu(), golden["logits"], atol=tolerance, rtol=0)


@needs_gpu
@pytest.mark.parametrize("cards", sorted({1, torch.cuda.device_count() or 1}))
def test_a_run_on_gpus_resumes_to_the_bit_and_is_evaluated(cards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what PyTorch asks for
    Path("script.py").write_text("""import os, torch, train
train.SAVE_EVERY, rate = 5, train.learning_rate
train.learning_rate = lambda step, s: (
    os.kill(os.getpid(), 9) if (step, s.out, s.resume) == (7, "broken", False) else rate(step, s))
torch.use_deterministic_algorithms(True)
train.run_script(train.main)""")
    for out, *resume in (["whole"], ["broken"], ["broken", "--resume"]):
        process = start("--iterations", "20", "--val-every", "20", "--out", out, *resume,
                        program=Path("script.py").resolve(), launcher=(
                            "-m", "torch.distributed.run", "--standalone",
                            f"--nproc-per-node={cards}"))
        _, errors = process.communicate(timeout=600)
        assert (process.returncode == 0) == (out == "whole" or bool(resume)), errors
    whole, broken = (read_checkpoint(f"{out}/last.pt") for out in ("whole", "broken"))
    for name, tensor in whole["weights"].items():
        assert torch.equal(tensor, broken["weights"][name]), name
    assert run("whole/last.pt", "--workers", "0", program="eval.py").returncode == 0
