"""What the tests share: a small CLIP, the released code's numbers, and running a script."""

import contextlib
import io
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from util.clip_files import clip

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ["a photo of a dog", "tram", "the small traffic light in the scene."]  # of clip_*.pt
torch.set_num_threads(1)  # also in `start`: a sum in another order has other last digits


def make_clip(width=64, layers=2, patch=16, resolution=64, dim=32, seed=0) -> torch.nn.Module:
    """A random CLIP of OpenAI's class in single precision: everything is real but the size."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return clip.model.CLIP(dim, resolution, layers, width, patch, 77, 49408, 64, 1, 1).eval()


def openai_state(clip_model: torch.nn.Module) -> dict:
    """A state dict as OpenAI publishes it: mostly in half precision, with three bare numbers."""
    clip.model.convert_weights(clip_model)
    return clip_model.state_dict() | {
        "input_resolution": torch.tensor(clip_model.visual.input_resolution),
        "context_length": torch.tensor(77), "vocab_size": torch.tensor(49408)}


@pytest.fixture(scope="session")
def clip_path(tmp_path_factory) -> Path:
    """A small CLIP's file: a plain state dict in half precision."""
    path = tmp_path_factory.mktemp("clip") / "small.pt"
    torch.save(openai_state(make_clip()), path)
    return path


def recorded(name: str) -> dict:
    """What a released program computed on small random weights."""
    return torch.load(ROOT / "tests" / "golden" / f"{name}.pt", weights_only=True)


def weights(shapes: dict[str, tuple]) -> dict[str, torch.Tensor]:
    """Random tensors of these shapes that depend on their names only, on every machine."""
    tensors = {}
    for name, shape in shapes.items():  # NumPy promises that this generator never changes
        x = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        x = x * 1.5 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else x / 3
        tensors[name] = torch.tensor(x + (".weight" in name and len(shape) == 1)).float()
    return tensors


def write_clip(kind: str, folder: Path, save=torch.save, part: str = "", **change) -> dict:
    """A recorded CLIP and its config as its library writes them. Returns the record."""
    record, prefix = recorded(f"clip_{kind}"), "open_clip_" * kind.startswith("open_clip")
    folder.mkdir(exist_ok=True)
    name = "pytorch_model.bin" if save is torch.save else "model.safetensors"
    save(weights(record["shapes"]), folder / f"{prefix}{name}")
    config = record["config"] | ({part: record["config"][part] | change} if part else change)
    text = json.dumps({"model_cfg": config} if prefix else config)
    (folder / f"{prefix}config.json").write_text(text)
    return record


@pytest.fixture(params=["clip_rc_inductive", "clip_rc_transductive", "zegclip_inductive"])
def golden(request) -> dict:
    """Each of the released programs' records."""
    return recorded(request.param)


def run(*arguments: str, program="train.py") -> subprocess.CompletedProcess:
    """A script from its command line to its exit code, in this process, which has PyTorch."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # `nohup pytest &` ignores Ctrl-C
    try:
        with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
              mock.patch.object(sys, "argv", [str(program), *map(str, arguments)])):
            program() if callable(program) else runpy.run_path(str(ROOT / program), {}, "__main__")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def start(*arguments: str, launcher: tuple[str, ...] = (), program: str = "train.py"):
    """The same in a process group of its own, which can be killed. Returns its Popen."""
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / program), *map(str, arguments)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def refused(*arguments: str, program="train.py") -> str:
    """The one line with which a script refuses its input, exit code 2."""
    result = run(*arguments, program=program)
    line = result.stderr.strip().split("\n")[-1]
    assert result.returncode == 2 and "error: " in line and "Traceback" not in result.stderr, result
    return line
