"""Checkpoints: a model's settings and weights, and what else belongs to a run, in one file.

Nothing here knows a model: a checkpoint is a dictionary of tensors and plain values.
"""

import os
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from util import clip_files

FORMATS = ("clip-rc 1", "clip-rc 2")  # both are read, the second is written
TOY_MODEL = Path(__file__).with_name("toy.pt")  # trained on the toy world by `python train.py`
RENAMED = {  # how the name of a parameter began in "clip-rc 1", and how it begins today
    "encoder.regions": "encoder.region_tokens",
    "decoder.q_blocks.": "decoder.descriptor_blocks.",
    "decoder.v_blocks.": "decoder.image_blocks.",
    "recovery.decoder.q_blocks.": "recovery.decoder.descriptor_blocks.",
    "recovery.decoder.v_blocks.": "recovery.decoder.image_blocks.",
    "recovery.q_in.": "recovery.descriptor_in.",
    "recovery.v_in.": "recovery.image_in.",
    "recovery.q_out.": "recovery.descriptor_out.",
    "recovery.v_out.": "recovery.image_out.",
    "descriptor_proj.": "zegclip.descriptor_proj.",
    "decoder.0.": "zegclip.blocks.0.",
    "decoder.1.": "zegclip.blocks.1.",
    "decoder.2.": "zegclip.blocks.2.",
}


def save_checkpoint(path: str | Path, settings: dict, weights: dict[str, Tensor],
                    clip_digest: str | None, **more) -> None:
    """Write a checkpoint under a temporary name, then rename it: a failure keeps the old one whole.
    settings: the model's. weights: the trained tensors; with clip_digest None also the frozen ones.
    clip_digest: of the CLIP that the model was built on. more: what else belongs to the run.
    Raises ValueError for weights that are not finite, OSError for a file that cannot be written."""
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path} is left as it was: {name} holds NaN or infinite numbers; "
                             "lower --lr")
    partial = Path(f"{path}.partial")
    try:
        torch.save({"format": FORMATS[-1], "model": settings, "weights": weights,
                    "clip_digest": clip_digest, **more}, partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # PyTorch reports a full disk as a RuntimeError
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} is left as it was: writing failed, is the disk full? "
                      f"({' '.join(str(error).split())[:120]})") from error


def read_checkpoint(path: str | Path) -> dict:
    """What `save_checkpoint` wrote, on the CPU, its weights under today's parameter names.
    A checkpoint of train.py holds the trained weights. A converted one, which knows no CLIP, holds
    the image encoder's frozen weights too. Raises ValueError for any other file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; train.py writes them")
    try:
        checkpoint = clip_files.read_tensors(path)
        if checkpoint["format"] not in FORMATS:
            raise KeyError("format")
        checkpoint["weights"] = {todays_name(name): tensor
                                 for name, tensor in checkpoint["weights"].items()}
    except (pickle.UnpicklingError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a checkpoint of this code; train.py and tools/convert.py "
                         "write them") from error
    return checkpoint


def todays_name(name: str) -> str:
    """What a parameter is called today; most names have never changed."""
    for old, new in RENAMED.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def checkpoint_clip(checkpoint: dict, path: str | Path,
                    clip_name_or_path: str | Path | None = None) -> nn.Module:
    """The CLIP that a checkpoint was trained on: clip_name_or_path, or the one that it records, if
    this machine has it (nothing is downloaded then). Raises ValueError for another CLIP. Older
    checkpoints know it by its file's SHA-256. A converted one does not know it (in the paper
    ViT-B/16), so the patch convolutions are compared."""
    recorded = checkpoint.get("clip", "ViT-B/16")
    try:
        file = clip_files.clip_file(clip_name_or_path or recorded, download=bool(clip_name_or_path))
    except FileNotFoundError:
        if clip_name_or_path:
            raise
        raise FileNotFoundError(
            f"{path} was trained on the CLIP {recorded}, which this machine does not have; give "
            "its file, --clip FILE (--clip ViT-B/16 downloads OpenAI's)") from None
    clip_model = clip_files.load_clip(file)
    if checkpoint.get("clip_digest"):
        same = checkpoint["clip_digest"] == clip_files.clip_digest(clip_model)
    elif checkpoint.get("clip_sha256"):
        same = file.is_file() and checkpoint["clip_sha256"] == clip_files.file_sha256(file)
        blocks = clip_model.visual.transformer.resblocks[0], clip_model.transformer.resblocks[0]
        if same and any(isinstance(block.mlp.gelu, nn.GELU) or
                        block.attn.num_heads != block.attn.embed_dim // 64 for block in blocks):
            raise ValueError(f"{path} is of an earlier version, which read {file} wrongly "
                             "(QuickGELU, heads of width 64); train again")
    else:
        ours = checkpoint["weights"]["encoder.visual.conv1.weight"]
        theirs = clip_model.visual.conv1.weight
        same = ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=0, atol=1e-3)
    if not same:
        raise ValueError(f"{path} was trained on another CLIP than {file}; give that one: --clip")
    return clip_model


def frozen_visual(checkpoint: dict, path: str | Path,
                  clip_name_or_path: str | Path | None = None) -> nn.Module:
    """The frozen image encoder of a checkpoint: a converted one holds it, others only its CLIP."""
    if "encoder.visual.conv1.weight" in checkpoint["weights"]:
        return clip_files.visual_from_state(checkpoint["weights"], "encoder.visual.")
    return checkpoint_clip(checkpoint, path, clip_name_or_path).visual


def encode_names(checkpoint: dict, path: str | Path, class_names: Sequence[str],
                 templates: Sequence[str], clip_name_or_path: str | Path | None = None) -> Tensor:
    """Paper Sec. 3.3: T (C, D) for names other than the training's, by the checkpoint's own CLIP.
    Raises ValueError for another CLIP, and for two names that CLIP cannot tell apart."""
    clip_model = checkpoint_clip(checkpoint, path, clip_name_or_path)
    return clip_files.encode_text(clip_model, class_names, templates)


def require_same(path: str | Path, then: dict, now: dict, free: set[str]) -> None:
    """Raise ValueError unless a checkpoint's settings are today's, but for the names in `free`."""
    for name, value in now.items():
        if name not in free and then.get(name, value) != value:
            values = f": {then[name]!r}, not {value!r}" if len(str(value)) < 40 else ""
            raise ValueError(f"{path} was trained with another {name.replace('_', ' ')}{values}; "
                             f"use the same, or start a new run")
