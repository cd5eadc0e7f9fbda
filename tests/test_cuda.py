"""The GPU path: without a card its devices are checked on tensors without numbers, with one all."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_clip, recorded, run, start
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from eval import confusion_matrix, slide_inference
from model import CLIPRC
from tools.convert import from_released
from util import processes
from util.checkpoint import read_checkpoint

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PARTS = [{}, {"regions": 16, "recompute": True}, {"ram": False, "rdl": False, "regions": 0},
         {"recovery_layers": 0}, {"recovery_loss": "kd", "align": "R"}]


@pytest.mark.parametrize("settings", PARTS)
def test_a_training_step_never_takes_a_number_to_the_host(settings):
    with torch.device("meta"):  # where .item() and .cpu() raise, as there are no numbers
        settings = {"num_prompts": 3, "regions": 4} | settings
        network = CLIPRC(make_clip().visual.to("meta"), **settings)
        optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad])
        images, text = torch.empty(2, 3, 64, 64), torch.empty(5, 32)
        labels = torch.zeros(2, 64, 64, dtype=torch.int64)
        for unseen in ((), (3, 4)):
            losses = network.losses(images, labels, text, unseen=unseen)
            sum(losses.values()).backward()
            processes.average_gradients([*network.parameters()])
            optimizer.step()


class Indexing(TorchFunctionMode):
    """What PyTorch's CPU build cannot do by itself on fake CUDA tensors: x[...], interpolation."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.interpolate:
            return args[0].new_empty(*args[0].shape[:2], *kwargs["size"])
        if func is torch.Tensor.__getitem__:
            return self.view(*args)
        if func is torch.Tensor.__setitem__:
            target, value = self.view(*args[:2]), args[2]
            if not torch.is_tensor(value):
                return target.fill_(value)
            return target.logical_or_(value) if target.dtype == torch.bool else target.add_(value)
        return func(*args, **kwargs or {})

    def view(self, x, index):
        dim = 0
        for part in index if isinstance(index, tuple) else (index,):
            if part is None:
                x = x.unsqueeze(dim)
            elif isinstance(part, int):
                x, dim = x.select(dim, part), dim - 1
            elif isinstance(part, slice):
                first, end, _ = part.indices(x.shape[dim])
                x = x.narrow(dim, first, end - first)
            else:  # a list of rows: their number is enough here
                x = x.narrow(dim, 0, len(part))
            dim += 1
        return x


@pytest.mark.parametrize("precision", ["tf32", "float32"])  # autocast needs a real GPU
def test_windows_and_prediction_stay_on_the_gpu(precision):
    mode, network = FakeTensorMode(), CLIPRC(make_clip().visual, num_prompts=3, regions=4).eval()

    def on_gpu(*shape: int) -> torch.Tensor:  # mixing it with a tensor elsewhere raises
        return FakeTensor(mode, torch.empty(*shape, device="meta"), torch.device("cuda"))

    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = torch.nn.Parameter(on_gpu(*parameter.shape), False)
    image, text = on_gpu(3, 64, 100), on_gpu(5, 32)
    with mode, Indexing(), torch.no_grad():
        with processes.autocast(text.device, precision):
            scores = slide_inference(network, image, text, 64, 53, 0.1, [0, 1])
        prediction = scores.argmax(0)
        assert prediction.device.type == "cuda" and prediction.shape == (64, 100)
        assert scores.dtype == torch.float32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def test_precision_is_set_in_one_place():
    for precision in processes.PRECISIONS:
        with processes.autocast(torch.device("cpu"), precision):
            product = torch.ones(2, 2) @ torch.ones(2, 2)
            assert product.dtype == (torch.bfloat16 if precision == "bfloat16" else torch.float32)
            with processes.without_autocast(torch.device("cpu")):
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert not torch.backends.cuda.matmul.allow_tf32  # tf32 means float32 on a CPU


def test_a_device_without_bfloat16_says_so_and_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(processes, "slow_bfloat16", lambda device: True)
    assert processes.start_processes("cpu", "bfloat16").type == "cpu"
    assert "float32 is faster here" in capsys.readouterr().out


def test_the_segmentation_keeps_its_digits_in_bfloat16():
    torch.manual_seed(0)
    network = CLIPRC(make_clip().visual, num_prompts=3, regions=4).eval()
    images, text = torch.randn(1, 3, 64, 64), F.normalize(torch.randn(5, 32), dim=-1)
    with torch.no_grad(), processes.autocast(torch.device("cpu"), "bfloat16"):
        logits, _, I_d, _, R_d = network.features(images, text)
    maps = R_d.double().unflatten(1, (4, 5)).mean(1) @ I_d.double().transpose(1, 2)
    exact = F.interpolate(maps.unflatten(-1, (4, 4)), (64, 64), mode="bilinear")
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)


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
def test_confusion_matrix_on_a_gpu_is_the_cpus():
    label, prediction = torch.randint(5, (90, 110)), torch.randint(5, (90, 110))
    label[:9] = 255
    ours = confusion_matrix(prediction.cuda(), label.cuda(), 5).cpu()
    assert torch.equal(ours, confusion_matrix(prediction, label, 5))


@needs_gpu
@pytest.mark.parametrize("cards", [1, torch.cuda.device_count()])
def test_a_run_on_gpus_resumes_to_the_bit_and_is_evaluated_and_predicts(cards, tmp_path):
    script = tmp_path / "deterministic.py"
    script.write_text(f"""import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train
torch.use_deterministic_algorithms(True)
train.run_script(lambda: train.train(train.parse_settings()))
""")

    def train(out: str, *more: str, kill: bool = False) -> None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what PyTorch asks for
        process = start("--iterations", "20", "--val-every", "20", "--save-every", "5", "--out",
                        tmp_path / out, *more, program=script, launcher=(
                            "-m", "torch.distributed.run", "--standalone",
                            f"--nproc-per-node={cards}"))
        while kill and process.poll() is None and not (tmp_path / out / "last.pt").exists():
            time.sleep(0.01)
        if kill:
            os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=600)
        assert kill or process.returncode == 0, errors

    train("whole")
    train("broken", kill=True)
    train("broken", "--resume")
    whole, broken = (read_checkpoint(tmp_path / out / "last.pt") for out in ("whole", "broken"))
    for name, tensor in whole["weights"].items():
        assert torch.equal(tensor, broken["weights"][name]), name
    last, world = tmp_path / "whole" / "last.pt", Path(whole["run"]["data_root"])
    assert run(last, "--workers", "0", program="eval.py").returncode == 0
    image = world / "JPEGImages" / "val_00000.png"
    assert run(last, image, "--out", tmp_path, program="predict.py").returncode == 0
