"""The authors' released checkpoints, CLIP-RC's or ZegCLIP's, as checkpoints of this code.

    python -m tools.convert RELEASED.pth OURS.pt

A released file holds the image encoder and the decoder; eval.py encodes the class names with CLIP.
"""

import argparse
import os
import pickle

import torch
from torch import Tensor

from model import CLIPRC
from util.checkpoint import save_checkpoint
from util.clip_files import read_tensors, visual_from_state
from util.processes import run_script

NAMES = {  # how a released name begins, and how ours does
    **{f"backbone.{part}": f"encoder.visual.{part}" for part in (
        "class_embedding", "positional_embedding", "proj",
        "conv1.", "ln_pre.", "transformer.", "ln_post.")},
    "backbone.region_level_bridge": "encoder.region_tokens",
    "backbone.prompt_proj.": "encoder.prompt_proj.",
    "backbone.prompt_norm.": "encoder.prompt_norm.",
    "decode_head.lateral_proj.": "ram.image_proj.",
    "decode_head.decoder_q.layers.": "decoder.descriptor_blocks.",
    "decode_head.decoder_v.layers.": "decoder.image_blocks.",
    "decode_head.decoder_1.layers.": "zegclip.blocks.",
    "decode_head.recovery_decoder.decouple_q.": "recovery.decoder.descriptor_blocks.",
    "decode_head.recovery_decoder.decouple_v.": "recovery.decoder.image_blocks.",
    "decode_head.recovery_decoder.linear_q_": "recovery.descriptor_",
    "decode_head.recovery_decoder.linear_k_": "recovery.image_",
}
BLOCK = {  # the same inside a decoder's block; the first entry that a name contains counts
    ".multihead_attn.proj.": ".attention.out.",
    ".multihead_attn.": ".attention.",
    ".linear1.": ".ffn.0.",
    ".linear2.": ".ffn.3.",
    ".self_attn.": None,  # inherited from PyTorch's decoder layer; the released code never uses it
    ".norm1.": None,  # the self-attention's
    ".norm2.": ".norm1.",
    ".norm3.": ".norm2.",
}


def our_name(name: str) -> str | None:
    """What a released tensor is called here; None if it is unused or more than its name changes."""
    for released, ours in NAMES.items():
        if name.startswith(released):
            name = ours + name.removeprefix(released)
            for part, new in BLOCK.items():
                if part in name:
                    return new and name.replace(part, new)
            return name
    return None


def from_released(state_dict: dict[str, Tensor]) -> CLIPRC:
    """Released code: the model that its weights (CLIP-RC's or ZegCLIP's) belong to, in eval mode.
    state_dict: tensors under the authors' names, or a training checkpoint that contains them.
    Raises ValueError if a tensor that the method needs is missing or has another shape."""
    try:
        released = state_dict.get("state_dict", state_dict)
        state = {our_name(name): tensor.float()
                 for name, tensor in released.items() if our_name(name)}
        prompts = torch.cat([released["backbone.prompt_embeddings"],
                             released["backbone.deep_prompt_embeddings"]]).float()  # (L, K, D_v)
        state["encoder.prompts"] = prompts
        regions = state.setdefault("encoder.region_tokens", prompts[0, :0])  # ZegCLIP: (0, D_v)
        ram = "ram.image_proj.weight" in state
        linear = f"{'ram' if ram else 'zegclip'}.descriptor_proj"
        for kind in ("weight", "bias"):
            state[f"{linear}.{kind}"] = released[f"decode_head.q_proj.{kind}"].float()
        if ram:  # the released code concatenates R, G and I in Eq. 4, the paper G, R and I
            r, g, i = state["ram.image_proj.weight"].chunk(3, dim=1)
            state["ram.image_proj.weight"] = torch.cat([g, r, i], dim=1)
        recovery = {name.split(".")[3] for name in state if name.startswith("recovery.decoder.")}
        model = CLIPRC(visual_from_state(state, "encoder.visual."), num_prompts=prompts.shape[1],
                       regions=len(regions), ram=ram, rdl=bool(recovery),
                       recovery_layers=len(recovery))
        model.load_state_dict(state)
    except (KeyError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise ValueError("these are not the weights of CLIP-RC's or ZegCLIP's released code "
                         f"({' '.join(str(error).split())[:200]})") from error
    return model.eval()


def main() -> None:
    """Convert one file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("released", metavar="RELEASED.pth", help="the authors' checkpoint")
    parser.add_argument("ours", metavar="OURS.pt", help="the file to write; must not exist yet")
    args = parser.parse_args()
    if os.path.lexists(args.ours):
        raise ValueError(f"{args.ours} exists already; choose another name or move it away")
    try:
        model = from_released(read_tensors(args.released))
    except (pickle.UnpicklingError, ValueError) as error:
        raise ValueError(f"{args.released}: {error}") from error
    save_checkpoint(args.ours, model.settings, model.state_dict(), clip_digest=None)
    print(f"next: python eval.py {args.ours} --dataset voc --data-root VOCdevkit/VOC2012\n"
          "Expect hIoU 88.4 for CLIP-RC and 84.3 for ZegCLIP, both inductive on VOC.")


if __name__ == "__main__":
    run_script(main)
