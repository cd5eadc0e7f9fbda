"""The authors' released checkpoints, CLIP-RC's or ZegCLIP's, in the form that train.py writes.

    python -m tools.convert RELEASED.pth OURS.pt [--dataset coco-stuff --setting transductive ...]

A released file does not say what it was trained on, so you do. Its frozen image encoder must be
that of --clip, which also reads the class names; what training changed goes to OURS.pt.
"""

import argparse
import math
import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import DATASETS
from eval import LOWER
from model import CLIPRC
from tools.convert_clip import Inert
from util.checkpoint import save_checkpoint
from util.class_names import FIFTEEN_TEMPLATES
from util.clip_files import build_visual, clip_digest, encode_text, load_clip, read_tensors
from util.processes import run_script

SETTINGS = ("inductive", "transductive", "supervised")
PAPER = {  # where a data set lies, and the paper's hIoU in each setting
    "voc": ("data/VOC2012", "88.4 (ZegCLIP: 84.3)", 93.0, 93.7),
    "context": ("data/VOC2010", 51.9, 55.1, 56.7),
    "coco-stuff": ("data/coco_stuff164k", 41.2, 49.7, 51.4)}
NAMES = {  # parts of the released names and of ours, replaced in this order
    "backbone.region_level_bridge": "encoder.region_tokens", "backbone.prompt_": "encoder.prompt_",
    "backbone.": "encoder.visual.", "decode_head.": "", "lateral_proj.": "ram.image_proj.",
    "decoder_q.layers.": "decoder.descriptor_blocks.", "decoder_v.layers.": "decoder.image_blocks.",
    "decoder_1.layers.": "zegclip.blocks.", "recovery_decoder.": "recovery.",
    "decouple_q.": "decoder.descriptor_blocks.", "decouple_v.": "decoder.image_blocks.",
    "linear_q_": "descriptor_", "linear_k_": "image_",
    ".multihead_attn.proj.": ".attention.out.", ".multihead_attn.": ".attention.",
    ".linear1.": ".ffn.0.", ".linear2.": ".ffn.3.", ".norm2.": ".norm1.", ".norm3.": ".norm2."}
UNUSED = ".self_attn.", ".norm1.", "_embeddings"  # two are never called, from_released joins one
OURS = ("encoder.", "ram.", "decoder.", "recovery.", "zegclip.")


def our_name(name: str) -> str | None:
    """What a released tensor is called here; None if it is unused or more than its name changes."""
    if any(part in name for part in UNUSED):
        return None
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name if name.startswith(OURS) else None


def from_released(state_dict: dict[str, Tensor]) -> CLIPRC:
    """Released code: the model that its weights (CLIP-RC's or ZegCLIP's) belong to, in eval mode.
    state_dict: tensors under the authors' names, or a checkpoint of them. ValueError for others."""
    try:
        released = state_dict.get("state_dict", state_dict)
        state = {our_name(name): released[name] for name in released if our_name(name)}
        state["encoder.prompts"] = prompts = torch.cat([  # (L, K, D_v)
            released["backbone.prompt_embeddings"], released["backbone.deep_prompt_embeddings"]])
        regions = state.setdefault("encoder.region_tokens", prompts[0, :0])  # ZegCLIP: (0, D_v)
        head = "ram" if "ram.image_proj.weight" in state else "zegclip"
        for kind in ("weight", "bias"):
            state[f"{head}.descriptor_proj.{kind}"] = released[f"decode_head.q_proj.{kind}"]
        if head == "ram":  # the released code concatenates R, G and I in Eq. 4, the paper G, R, I
            r, g, i = state["ram.image_proj.weight"].chunk(3, dim=1)
            state["ram.image_proj.weight"] = torch.cat([g, r, i], dim=1)
        layers = len({name.split(".")[3] for name in state if name.startswith("recovery.decoder.")})
        visual = build_visual(state, "encoder.visual.", heads=prompts.shape[2] // 64)
        model = CLIPRC(visual, num_prompts=prompts.shape[1], regions=len(regions),
                       ram=head == "ram", rdl=layers > 0, recovery_layers=layers)
        model.load_state_dict(state)
    except Exception as error:  # what does not fit makes a dozen kinds
        raise ValueError("these are not the weights of CLIP-RC's or ZegCLIP's released code "
                         f"({' '.join(str(error).split())[:200]})") from error
    return model.eval()


def read_released(path: Path) -> dict:
    """What a released file holds. Nothing in it is run: inert objects stand for its notes'."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with torch.serialization.safe_globals([(Inert, name) for name in names]):
        return read_tensors(path)


def trained_weights(released: CLIPRC, visual: nn.Module) -> dict[str, Tensor]:
    """What training changed in a released model. Raises ValueError if all else is not that of a
    CLIP's image encoder, within half precision."""
    theirs, model = released.state_dict(), CLIPRC(visual, **released.settings)
    ours = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    # The release stores the positional embedding at the size of its training images.
    position = ours[at := "encoder.visual.positional_embedding"]
    here, there = (math.isqrt(len(p) - 1) for p in (position, theirs[at]))
    grid = F.interpolate(position[1:].T.unflatten(1, (here, here))[None], (there, there),
                         mode="bilinear", align_corners=False)[0]  # (D_v, there, there)
    ours[at] = torch.cat([position[:1], grid.flatten(1).T])
    for name, p in ours.items():
        q = theirs.get(name, p[:0])
        if q.shape != p.shape or (q - p).norm() > 1e-3 * p.norm():
            raise ValueError(f"its {name} is not that of this CLIP; give the CLIP of its training")
    return {name: theirs[name] for name in theirs if name not in ours}


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("released", metavar="RELEASED.pth", type=Path, help="the authors' file")
    parser.add_argument("ours", metavar="OURS.pt", type=Path, help="a new file")
    parser.add_argument("--dataset", default="voc", choices=PAPER, help="(voc)")
    parser.add_argument("--setting", default="inductive", choices=SETTINGS, help="(inductive)")
    parser.add_argument("--clip", default="ViT-B/16", help="CLIP's file or name (ViT-B/16)")
    args = parser.parse_args()
    if args.ours.exists():
        raise ValueError(f"{args.ours} exists already; choose another name")
    clip_model, entry = load_clip(args.clip), DATASETS[args.dataset]
    try:
        model = from_released(read_released(args.released))
        weights = trained_weights(model, clip_model.visual)
    except (pickle.UnpicklingError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{args.released}: {error}") from error
    names, templates = entry["class_names"], entry.get("templates", FIFTEEN_TEMPLATES)
    save_checkpoint(
        args.ours, model.settings, weights, clip_digest(clip_model), clip=args.clip, step=0,
        run={"dataset": args.dataset, "setting": args.setting, "crop_size": 512,
             "precision": "tf32", "data_root": None},
        class_names=list(names), unseen=[names.index(n) for n in entry["unseen"].split(", ")],
        templates=list(templates), text=encode_text(clip_model, names, templates))
    root, *hIoU = PAPER[args.dataset]
    print("{}: K = {num_prompts} prompts, M = {regions} region tokens, {recovery_layers} recovery "
          "layers".format(model.name, **model.settings))
    print(f"next: python eval.py {args.ours} --data-root {root}\nThe paper's hIoU is "
          f"{hIoU[SETTINGS.index(args.setting)]}. After {args.setting} training the seen classes' "
          f"scores are lowered by {LOWER * (args.setting == 'inductive'):g}.")


if __name__ == "__main__":
    run_script(main)
