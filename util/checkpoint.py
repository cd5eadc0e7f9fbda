"""A run's files: its folder, its log, and checkpoints, dictionaries of tensors and plain values."""

import contextlib
import json
import os
import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from util import clip_files
from util.processes import rank

FORMAT = "clip-rc 2"
TOY_MODEL = Path(__file__).with_name("toy.pt")  # trained on the toy world by `python train.py`


def newest_run(place: str, or_next: bool = False) -> str:
    """Of the folders PLACE, PLACE-2, PLACE-3 ... the one with the highest number, or the next."""
    numbers = [int(number) for path in Path(place).parent.glob(f"{Path(place).name}-*")
               if (number := path.name.removeprefix(f"{Path(place).name}-")).isdigit()]
    number = max([int(Path(place).exists()), *numbers]) + or_next
    return f"{place}-{number}" if number > 1 else place


def read_log(path: Path) -> list[dict]:
    """The lines of a log.jsonl, without one that a kill cut short."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def start_log(path: Path, step: int, resume: bool) -> None:
    """On the first process: create a run's folder and log.jsonl, or cut what a resumed run computes
    again from `step`. Raises ValueError if a new run's folder holds another run."""
    if rank() == 0:
        if path.exists() and not resume:
            raise ValueError(f"--out {path.parent} holds a run; add --resume or name another")
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [json.dumps(line) + "\n" for line in read_log(path)
                if line["step"] <= step and "result" not in line]
        path.write_text("".join(kept))


def add_to_log(path: Path, line: dict, show: bool = False) -> None:
    """On the first process: append a line, and print it. JSON has no NaN."""
    if rank() == 0:
        with open(path, "a") as log:
            log.write(json.dumps(line).replace("NaN", "null") + "\n")
        if show:
            figures = line.get("val", line).items()
            print(f"step {line['step']:,}: " + ", ".join(
                f"{name} {value:.3g}" for name, value in figures if name != "step"), flush=True)


def save_checkpoint(path: str | Path, settings: dict, weights: dict[str, Tensor],
                    clip_digest: str | None, **more) -> None:
    """On the first process: write a checkpoint, and rename it into place, so that a failure keeps
    the old one. settings: the model's. Raises ValueError for weights that are not finite."""
    if rank() > 0:
        return
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path} is left as it was: {name} holds NaN or infinite numbers; "
                             "lower --lr")
    partial = Path(f"{path}.partial")
    try:
        torch.save({"format": FORMAT, "model": settings, "clip_digest": clip_digest, "weights": {
            name: tensor.detach() for name, tensor in weights.items()}, **more}, partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # PyTorch reports a full disk as a RuntimeError
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} is left as it was: writing failed, is the disk full? "
                      f"({' '.join(str(error).split())[:120]})") from error


def read_checkpoint(path: str | Path) -> dict:
    """What `save_checkpoint` wrote, on the CPU. Raises FileNotFoundError, ValueError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; train.py writes them")
    try:
        checkpoint = clip_files.read_tensors(path)
        for name in ("initialiser", "descriptor_scale"):  # how older runs say that they started
            checkpoint["model"].pop(name, None)
        assert checkpoint["format"] == FORMAT
    except (pickle.UnpicklingError, LookupError, TypeError, AssertionError) as error:
        raise ValueError(f"{path} is no checkpoint of this code; for one of the authors': "
                         f"python -m tools.convert {path} OURS.pt") from error
    return checkpoint


def checkpoint_clip(checkpoint: dict, path: str | Path,
                    clip_name_or_path: str | Path | None = None) -> nn.Module:
    """The CLIP that a checkpoint was trained on. Raises FileNotFoundError, ValueError."""
    try:
        clip_model = clip_files.load_clip(clip_name_or_path or checkpoint["clip"])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} needs its CLIP: {error}") from None
    if checkpoint["clip_digest"] not in (None, clip_files.clip_digest(clip_model)):
        raise ValueError(f"{path} was trained on another CLIP; give that one: --clip")
    return clip_model


def require_same(path: str | Path, then: dict, now: dict) -> None:
    """Raise ValueError unless what a checkpoint says is what is asked for today."""
    for name, value in now.items():
        if then.get(name, value) != value:
            values = f": {then[name]!r}, not {value!r}" if len(str(value)) < 40 else ""
            name = name.replace("_", " ")
            raise ValueError(f"{path} was trained with another {name}{values}; start a new run")
