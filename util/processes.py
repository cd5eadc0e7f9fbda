"""Processes and devices (paper Sec. 4.2: "8 GPUs"), and what a script prints."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

PRECISIONS = ("tf32", "float32", "bfloat16")


def start_processes(device: str, precision: str = "tf32") -> torch.device:
    """Join the processes that torchrun started, if it did. Returns this process's device. device:
    "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N". Raises ValueError for another."""
    if device.startswith("mps"):
        raise ValueError("--device mps: PyTorch's masked attention can give NaN there; give cpu")
    if "RANK" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        raise ValueError("RANK is set, but not by torchrun; use torchrun, or  unset RANK")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device
    try:
        device = torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device}: not usable here; give auto or cpu") from error
    if cuda := device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        # After torchrun --max-restarts the store still holds the dead processes' addresses, so each
        # restart gets a prefix. Several machines count restarts separately and have none.
        store, number, world = next(rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=number,
                                world_size=world, device_id=device if cuda else None,
                                timeout=timedelta(minutes=30))  # while the first one draws images
    if precision == "bfloat16" and slow_bfloat16(device) and rank() == 0:
        print(f"{device.type} has no instructions for bfloat16: float32 is faster here")
    return device


def rank() -> int:
    """This process's number, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a tensor over the processes; the tensor itself without torchrun."""
    if dist.is_initialized():
        value = value.detach().clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def autocast(device: torch.device, precision: str):
    """A context manager in which matrix products have a precision; the one place that sets it.
    tf32 keeps 10 bits of a factor's fraction (on a CPU it is float32), bfloat16 7. The released
    code's PyTorch 1.10 had tf32 on."""
    tf32 = device.type == "cuda" and precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def without_autocast(device: torch.device):
    """A context manager inside `autocast` in which matrix products stay in float32."""
    known = torch.amp.is_autocast_available(device.type)  # not on the meta device
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def slow_bfloat16(device: torch.device) -> bool:
    """Whether a device has no instructions for bfloat16, so that it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) < (8, 0)
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "flags" in text and "avx512_bf16" not in text  # Linux on x86; elsewhere we cannot tell


def own_group(worker: int) -> None:
    """A DataLoader's worker_init_fn: Ctrl-C reaches the main process alone, which ends them."""
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


def progress(items: Iterable, what: str, total: int | None = None) -> Iterator:
    """Yield the items and show how many are done: a bar in a terminal, else a line every 10 s."""
    if sys.stderr.isatty() or rank():
        yield from tqdm(items, what, total, leave=False, disable=rank() > 0)
        return
    total, told = total or len(items), time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() > told + 10:
            told = time.monotonic()
            print(f"{what}: {done:,} of {total:,}", flush=True)
        yield item


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`. Unusable input ends it with one line on stderr and exit code 2, Ctrl-C
    with 130, SIGTERM with 143. Of several processes the one that found the fault reports it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        # From a DataLoader's worker comes its traceback, whose last line begins with the type.
        line = str(error).strip().split("\n")[-1].removeprefix(f"{type(error).__name__}: ")
        if "DataLoader worker (pid" in str(error) or "shared memory" in line:
            error = ValueError(line := line + "; a container needs --shm-size 8g, or --workers 0")
        if isinstance(error, (ValueError, OSError)):
            sys.exit(print(f"error: {line}", file=sys.stderr) or 2)
        if not (isinstance(error, dist.DistError) or "gloo" in line):
            raise
        sys.exit(f"process {rank()} stopped: it has lost another process ({line})")
    finally:
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.destroy_process_group()
