"""Remake util/toy_clip.pt, the small CLIP of the toy world, from images and captions alone.

    python docs/pretrain_toy_clip.py --out new_clip.pt        minutes on a laptop

The training is CLIP's own (Radford et al. 2021). It never sees a mask. Its captions are of all 24
kinds of rug, also of those that the data set leaves out.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from util import toy
from util.clip_files import clip, encode_text, load_clip, tokenize
from util.images import normalise
from util.processes import progress, run_script


def caption(rugs: Sequence[tuple[str, str]]) -> str:
    """The caption of a scene: "a photo of a plain red rug and a dotted blue rug"."""
    return toy.TEMPLATE.format(" and a ".join(f"{' '.join(rug)} rug" for rug in rugs))


def scene_batch(rng: np.random.Generator, size: int) -> tuple[Tensor, list[tuple]]:
    """New scenes (size, 3, 64, 64) and the rugs in each.
    No two scenes have the same set of rugs: the loss would separate an image from another's
    caption that is just as true of it."""
    scenes: dict[frozenset, tuple] = {}
    while len(scenes) < size:
        rugs = tuple(toy.one_to_three(rng, toy.RUGS))
        scenes.setdefault(frozenset(rugs), rugs)
    images = [normalise(toy.draw_scene(rng, rugs)[0]) for rugs in scenes.values()]
    return torch.stack(images), list(scenes.values())


def contrastive_loss(clip_model: torch.nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
    """CLIP's loss (Radford et al. 2021, Fig. 3): images find their captions, and the reverse.
    images (B, 3, 64, 64), tokens (B, context_length)."""
    per_image, per_text = clip_model(images, tokens)  # logits, (B, B) each
    target = torch.arange(len(images))
    return (F.cross_entropy(per_image, target) + F.cross_entropy(per_text, target)) / 2


@torch.no_grad()
def naming_accuracy(clip_model: torch.nn.Module, count: int, seed: int) -> float:
    """The share of `count` new scenes of a single rug to which CLIP gives the right class name."""
    rng = np.random.default_rng((seed, 1))
    truth = torch.arange(count) % len(toy.CLASSES)
    images = torch.stack([normalise(toy.draw_scene(rng, [toy.CLASSES[c]])[0]) for c in truth])
    G = F.normalize(torch.cat([clip_model.encode_image(x) for x in images.split(100)]), dim=1)
    T = encode_text(clip_model, toy.CLASS_NAMES, [toy.TEMPLATE])  # (C, D); G is (count, D)
    return ((G @ T.T).argmax(1) == truth).float().mean().item()


def pretrain(out: Path, seed: int = 0, steps: int = 700, batch_size: int = 64) -> None:
    """Train a small CLIP on scenes that are each drawn for one step, and write it to `out`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # OpenAI's constructor uses the global generator
        clip_model = clip.model.CLIP(
            embed_dim=128, image_resolution=toy.SIZE, vision_layers=3, vision_width=128,
            vision_patch_size=8, context_length=32, vocab_size=49408, transformer_width=64,
            transformer_heads=1, transformer_layers=2)
    captions = {rugs: caption(rugs) for n in (1, 2, 3) for rugs in permutations(toy.RUGS, n)}
    rows = tokenize(list(captions.values()), clip_model.context_length)  # (12720, 32)
    tokens = dict(zip(captions, rows))
    # OpenAI's tokenizer has 49,408 tokens, our captions use 20: zero rows make the file small.
    used = torch.zeros(49408, 1).index_fill_(0, rows.unique()[1:], 1)  # [1:]: not the padding
    clip_model.token_embedding.weight.data *= used

    optimizer = torch.optim.AdamW(clip_model.parameters(), lr=1e-3, betas=(0.9, 0.98),
                                  weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / 100, (1 + math.cos(math.pi * step / steps)) / 2))
    rng = np.random.default_rng((seed, 0))
    for _ in progress(range(steps), "pretraining"):
        images, scenes = scene_batch(rng, batch_size)
        loss = contrastive_loss(clip_model, images, torch.stack([tokens[rugs] for rugs in scenes]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        clip_model.logit_scale.data.clamp_(max=math.log(100))  # as OpenAI did, for stability

    clip.model.convert_weights(clip_model)
    clip_model.token_embedding.half()  # convert_weights leaves it, and it is most of the file
    more = {"heads": torch.tensor([2, 1]), "quick_gelu": torch.ones(2, dtype=torch.int64)}
    torch.save(clip_model.state_dict() | more, out)  # heads: of width 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the new file")
    parser.add_argument("--seed", type=int, default=0, help="fixes weights and scenes (0)")
    args = parser.parse_args()
    if args.out.exists() or not args.out.parent.is_dir():
        raise ValueError(f"--out {args.out}: name a new file in a folder that is there")
    pretrain(args.out, args.seed)
    accuracy = naming_accuracy(load_clip(args.out), 1000, args.seed)
    print(f"{args.out}: gives {accuracy:.1%} of 1,000 new single rugs the right class name")


if __name__ == "__main__":
    run_script(main)
