"""What the tests share: a small CLIP, the released code's numbers, and running a script."""

import contextlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from record_clip_files import weights
from util.clip_files import clip

ROOT = Path(__file__).resolve().parent.parent

# One thread, here and in the processes that tests start: sums in another order differ in their
# last digits, and some tests compare to the bit.
torch.set_num_threads(1)


def make_clip(width: int = 64, layers: int = 2, patch: int = 16, resolution: int = 64,
              dim: int = 32, seed: int = 0):
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


def write_clip(kind: str, folder: Path, save=torch.save, part: str = "", **change) -> dict:
    """A recorded CLIP and its config as its library writes them. Returns the record."""
    record, prefix = recorded(f"clip_{kind}"), "open_clip_" * kind.startswith("open_clip")
    folder.mkdir(exist_ok=True)
    name = "pytorch_model.bin" if save is torch.save else "model.safetensors"
    save(weights(record["shapes"]), folder / f"{prefix}{name}")
    config = record["config"] | ({part: record["config"][part] | change} if part else change)
    config = {"model_cfg": config} if prefix else config
    (folder / f"{prefix}config.json").write_text(json.dumps(config))
    return record


@pytest.fixture(scope="session",
                params=["clip_rc_inductive", "clip_rc_transductive", "zegclip_inductive"])
def golden(request) -> dict:
    """Each of the released programs' records."""
    return recorded(request.param)


def run(*arguments: str, program: str = "train.py") -> subprocess.CompletedProcess:
    """A script from its command line to its exit code, in this process, which has PyTorch."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    argv, sys.argv = sys.argv, [program, *map(str, arguments)]
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


def start(*arguments: str, launcher: tuple[str, ...] = (), program: str = "train.py"):
    """The same in a process group of its own, which can be killed. Returns its Popen."""
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / program), *map(str, arguments)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"})


def refused(*arguments: str, program: str = "train.py") -> str:
    """The one line with which a script refuses its input, exit code 2."""
    result = run(*arguments, program=program)
    assert result.returncode == 2, (result.stdout, result.stderr)
    line = result.stderr.strip().split("\n")[-1]
    assert "error: " in line and "Traceback" not in result.stderr
    return line
