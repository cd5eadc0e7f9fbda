"""Checkpoints of the authors' release, CLIP-RC's or ZegCLIP's, to ours: the same tensors under this code's names.

    python convert.py RELEASED.pth OURS.pt
    python eval.py OURS.pt --dataset voc --data-root VOCdevkit/VOC2012 --clip ViT-B/16

A released checkpoint holds the image encoder and the decoder; the text encoder in it, if any, is ignored, because
class names are encoded by `--clip` at test. Every size is read off the tensors.
"""

import argparse
import os
import pickle
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

from model import CLIPRC, save_checkpoint, torch_load, visual_from_state

# Released name -> our name, tried in this order as regular expressions at its beginning; a name that none matches is not
# used by the method.
BLOCK = [(r"multihead_attn\.proj\.", "attention.out."), (r"multihead_attn\.", "attention."), (r"linear1\.", "ffn.0."),
         (r"linear2\.", "ffn.3."), (r"norm2\.", "norm1."), (r"norm3\.", "norm2.")]
NAMES = [(r"backbone\.region_level_bridge", "encoder.regions"),
         (r"backbone\.(prompt_proj|prompt_norm)\.", r"encoder.\1."),
         (r"backbone\.(class_embedding|positional_embedding|proj|conv1\.|ln_pre\.|ln_post\.|transformer\.)",
          r"encoder.visual.\1"),
         (r"decode_head\.lateral_proj\.", "ram.image_proj."),
         (r"decode_head\.decoder_([qv])\.layers\.", r"decoder.\1_blocks."),
         (r"decode_head\.decoder_1\.layers\.", "decoder."),
         (r"decode_head\.recovery_decoder\.decouple_([qv])\.", r"recovery.decoder.\1_blocks."),
         (r"decode_head\.recovery_decoder\.linear_q_", "recovery.q_"),
         (r"decode_head\.recovery_decoder\.linear_k_", "recovery.v_")]
UNUSED = re.compile(r"\.(self_attn|norm1)\.")  # inherited from PyTorch's decoder layer; the released forward skips them


def our_name(name: str) -> str | None:
    """The name that a released tensor has here, or None where the method does not use it (text encoder, loss, ...)."""
    for pattern, replacement in NAMES:
        if re.match(pattern, name):
            ours = re.sub(f"^{pattern}", replacement, name)
            if "blocks." in ours or ours.startswith("decoder."):
                if UNUSED.search(ours):
                    return None
                for part, new in BLOCK:
                    ours, replaced = re.subn(part, new, ours)
                    if replaced:
                        break
            return ours
    return None


def from_released(state_dict: dict[str, Tensor]) -> CLIPRC:
    """The released code's weights (CLIP-RC's or ZegCLIP's) as a model of ours, in eval mode, single precision.

    state_dict: the authors' names, with or without a "state_dict" or "module." around.
    Raises ValueError where a tensor that the method needs is missing or has an unexpected shape.
    """
    try:
        released = {name.removeprefix("module."): tensor
                    for name, tensor in state_dict.get("state_dict", state_dict).items()}
        broken = [name for name, tensor in released.items() if not tensor.numel() or not tensor.isfinite().all()]
        if broken:
            raise ValueError(f"{broken[0]} is empty or holds NaN or infinite numbers")
        state = {ours: tensor.float() for name, tensor in released.items() if (ours := our_name(name))}
        prefix = "encoder.visual."
        visual = visual_from_state({name.removeprefix(prefix): tensor for name, tensor in state.items()
                                    if name.startswith(prefix)})
        first, deep = released["backbone.prompt_embeddings"], released["backbone.deep_prompt_embeddings"]
        state["encoder.prompts"] = torch.cat([first, deep]).float()  # (L, K, D_v)
        ram = "decode_head.lateral_proj.weight" in released
        descriptor = "ram.descriptor_proj" if ram else "descriptor_proj"
        for kind in ("weight", "bias"):
            state[f"{descriptor}.{kind}"] = released[f"decode_head.q_proj.{kind}"].float()
        if ram:  # the released columns of Eq. 4 stand in the order R, G, I
            R_columns, G_columns, I_columns = state["ram.image_proj.weight"].chunk(3, dim=1)
            state["ram.image_proj.weight"] = torch.cat([G_columns, R_columns, I_columns], dim=1)
        state.setdefault("encoder.regions", torch.zeros(0, first.shape[-1]))  # ZegCLIP has none
        recovery_layers = sum(bool(re.fullmatch(r"recovery\.decoder\.q_blocks\.\d+\.norm1\.weight", name)) for name in state)
        model = CLIPRC(visual, num_prompts=first.shape[1], regions=len(state["encoder.regions"]), ram=ram,
                       rdl=recovery_layers > 0, recovery_layers=recovery_layers)
        model.load_state_dict(state)
    except (KeyError, RuntimeError, AttributeError, TypeError, ValueError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"these are not the weights of CLIP-RC's or ZegCLIP's released code ({reason})") from error
    return model.eval()


def main() -> None:
    """Converts one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("released", metavar="RELEASED.pth", help="a checkpoint of the authors' CLIP-RC or ZegCLIP")
    parser.add_argument("ours", metavar="OURS.pt", help="the checkpoint to write; an existing file is not overwritten")
    args = parser.parse_args()
    if os.path.lexists(args.ours):
        raise ValueError(f"{args.ours} exists already; choose another name or move it away")
    if not Path(args.released).is_file():
        raise FileNotFoundError(f"{args.released}: no such file; correct the path")
    try:
        state_dict = torch_load(args.released)
        if not isinstance(state_dict, dict):
            raise pickle.UnpicklingError
        if "format" in state_dict:
            raise ValueError(f"{args.released} is a checkpoint of this code already; use it as it is")
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, AttributeError) as error:
        raise ValueError(f"{args.released} is not a checkpoint of tensors that can be read safely; "
                         f"fetch it again") from error
    try:
        model = from_released(state_dict)
    except ValueError as error:
        raise ValueError(f"{args.released}: {error}") from error
    save_checkpoint(args.ours, model, clip_sha256=None)
    print(f"{args.ours}: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"K = {model.encoder.prompts.shape[1]} prompts, M = {len(model.encoder.regions)} region tokens")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(print(f"error: {' '.join(str(error).split())}", file=sys.stderr) or 2)
