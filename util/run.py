"""A training run on disk and in the terminal: its folder, its log, and how it is stopped."""

import fcntl
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from util.processes import barrier, peak_flops, rank


@contextmanager
def claim_folder(out: Path, resume: bool):
    """While this lasts the run's folder is locked. An earlier run in it is moved aside unless
    resumed. Raises ValueError if another run is using the folder."""
    folder = lock_folder(out, resume) if rank() == 0 else None
    barrier()
    try:
        yield
    finally:
        if folder is not None:
            os.close(folder)


def lock_folder(out: Path, resume: bool) -> int:
    """Create, lock and open the folder; see `claim_folder`."""
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise ValueError(f"--out {out}: another run is writing there; choose another") from None
    last = (out / "last.pt").exists()
    if (last or (out / "log.jsonl").exists()) and not (resume and last):
        kept = next(path for n in range(1, 10**6) if not (path := Path(f"{out}.{n}")).exists())
        os.rename(out, kept)
        os.close(folder)
        print(f"{out} is kept as {kept}" + " (--resume continues a run)" * (not resume))
        return lock_folder(out, resume)
    return folder


def read_log(path: Path) -> list[dict]:
    """The lines of a log.jsonl, without any that a kill cut short."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def cut_log(path: Path, step: int) -> None:
    """Drop what a log says after `step`: a resumed run computes it again."""
    lines = [line for line in read_log(path) if line["step"] <= step and "result" not in line]
    partial = Path(f"{path}.partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(partial, path)


def add_to_log(path: Path, line: dict) -> None:
    """Append a line. JSON has no NaN, so a figure without a value becomes null."""
    with open(path, "a") as log:
        log.write(json.dumps(line | {
            name: {key: value if math.isfinite(value) else None for key, value in figures.items()}
            for name, figures in line.items() if isinstance(figures, dict)}) + "\n")


class Speed:
    """Images a second, and on a known GPU the share of its peak, since `read` was last called."""

    def __init__(self, device: torch.device, precision: str, batch_size: int, step: int) -> None:
        self.batch_size, self.step, self.since = batch_size, step, time.perf_counter()
        self.peak, self.flops = peak_flops(device, precision), 0  # flops: of a step

    def count(self, work: Callable[[], object]) -> None:
        """Count the floating-point operations of a step by doing its work once."""
        if self.peak:
            with FlopCounterMode(display=False) as counter:
                work()
            self.flops = counter.get_total_flops()

    def read(self, step: int) -> dict[str, float]:
        """The figures of the steps up to `step`."""
        steps, seconds = step - self.step, time.perf_counter() - self.since
        self.restart(step)
        figures = {"images_per_second": round(steps * self.batch_size / seconds, 2)}
        if self.flops:
            figures["of_peak"] = round(steps * self.flops / seconds / self.peak, 3)
        return figures

    def restart(self, step: int) -> None:
        """Leave out what happened since `read`: an evaluation."""
        self.step, self.since = step, time.perf_counter()


class StopSignals:
    """Ctrl-C and SIGTERM let a training step finish: `received` says which one came.

    The second one ends the program at once. Under torchrun it does not, because there each
    process gets Ctrl-C from the terminal and SIGTERM from torchrun."""

    def __init__(self) -> None:
        self.received = 0
        self.usual = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def catch(self, number: int, frame) -> None:
        """The handler."""
        self.received = number
        if "RANK" not in os.environ:
            self.release()
            print("\nfinishing this step, then saving; once more to stop at once", file=sys.stderr)

    def hold(self) -> None:
        """From here a signal waits for the end of the step."""
        for number in self.usual:
            signal.signal(number, self.catch)

    def release(self) -> None:
        """From here a signal does what it usually does."""
        for number, handler in self.usual.items():
            signal.signal(number, handler)
