"""Processes and devices (paper Sec. 4.2: "8 GPUs"): joining them, averaging over them, and what a
script prints of its progress and its errors. Without torchrun there is one process.
"""

import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm


def start_processes(device: str, precision: str = "tf32") -> torch.device:
    """Join the processes that torchrun started, if it did. Return this process's device.
    device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N". Raises ValueError for a
    device that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: PyTorch finds no GPU here; try --device cpu")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.zeros(1, device=device).device
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"--device {device}: not usable; give auto, cpu or cuda") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        store, number, world = next(rendezvous("env://"))
        # After torchrun --max-restarts the store still holds the dead processes' addresses
        # (PyTorch 2.13), so each restart gets a prefix of its own. Several machines count their
        # restarts separately, so they keep the plain store.
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        cuda = device.type == "cuda"
        # Half an hour: the first process also draws images while the others wait.
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=number,
                                world_size=world, device_id=device if cuda else None,
                                timeout=timedelta(minutes=30))
    if precision == "bfloat16" and slow_bfloat16(device) and rank() == 0:
        print(f"{device.type} has no instructions for bfloat16: float32 is faster here")
    return device


def rank() -> int:
    """This process's number, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until all processes have come here."""
    if dist.is_initialized():
        dist.barrier()


def cores() -> int:
    """How many processor cores each of this machine's processes may use."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, mine // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def from_first(compute: Callable[[], Tensor], *shape: int, device: torch.device) -> Tensor:
    """What `compute` returns on the first process, sent to all of them."""
    value = compute() if rank() == 0 else torch.empty(shape, device=device)
    if dist.is_initialized():
        dist.broadcast(value, 0)
    return value


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a tensor over the processes; the tensor itself without torchrun."""
    if dist.is_initialized():
        value = value.detach().clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, in one all-reduce."""
    if not dist.is_initialized():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    mean = mean_over_processes(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(part.view_as(gradient))


def any_process(flag: bool, device: torch.device) -> bool:
    """True on every process if `flag` is true on one, so that all leave a loop together."""
    return bool(mean_over_processes(torch.tensor(float(flag), device=device)))


PRECISIONS = ("tf32", "float32", "bfloat16")
# Matrix products of NVIDIA's cards at best, in 10^12 multiplications and additions a second:
# in tf32 and in bfloat16, without sparsity, by NVIDIA's data sheets.
PEAKS = {"A100": (156, 312), "H100 PCIe": (378, 756), "H100": (494, 989), "H200": (494, 989),
         "L40S": (183, 362), "RTX 3090": (35.6, 71), "RTX 4090": (82.6, 165)}


def autocast(device: torch.device, precision: str):
    """A context manager in which matrix products have a precision; the one place that sets it.
    tf32 keeps 10 bits of a factor's fraction (on a CPU it is float32); the released code's
    PyTorch 1.10 had it on. bfloat16 keeps 7."""
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
    flags = Path("/proc/cpuinfo")  # Linux on x86; elsewhere we cannot tell
    return flags.exists() and "flags" in (text := flags.read_text()) and "avx512_bf16" not in text


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The card's best rate in floating-point operations a second; None for a card not in PEAKS."""
    if device.type == "cuda" and precision != "float32":
        name = torch.cuda.get_device_name(device)
        for card, peaks in PEAKS.items():
            if card in name:
                return 1e12 * peaks[precision == "bfloat16"]
    return None


class Progress(tqdm):
    """tqdm on the first process; where no bar can be shown (a file, Slurm), a line every 10 s."""

    def __init__(self, iterable=None, desc: str = "", **more) -> None:
        self.lines, self.next_line = not sys.stderr.isatty(), time.monotonic() + 10
        if self.lines:
            more |= {"file": sys.stdout, "mininterval": 1, "miniters": 1, "leave": False,
                     "bar_format": "{desc}: {n_fmt} of {total_fmt}{postfix}, {remaining} left"}
        super().__init__(iterable, desc, disable=rank() > 0, **more)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Show the bar; without a terminal print a line, at most every ten seconds."""
        if not self.lines:
            super().display(msg, pos)
        elif time.monotonic() > self.next_line and msg is None:
            self.next_line = time.monotonic() + 10
            print(self, flush=True)

    def clear(self, nolock: bool = False) -> None:
        """Remove the bar for a moment; a printed line stays."""
        if not self.lines:
            super().clear(nolock)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`. Unusable input ends it with one line on stderr and exit code 2.
    Of several processes, the one that found the fault reports it; the others end with code 1."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        # From a DataLoader's worker comes its traceback, whose last line begins with the type.
        line = str(error).strip().split("\n")[-1].removeprefix(f"{type(error).__name__}: ")
        if isinstance(error, (ValueError, OSError)):
            sys.exit(print(f"error: {line}", file=sys.stderr) or 2)
        if not dist.is_initialized() or not (isinstance(error, dist.DistError) or "gloo" in line):
            raise
        sys.exit(f"process {dist.get_rank()} stopped: it has lost another process ({line})")
    finally:
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.destroy_process_group()
