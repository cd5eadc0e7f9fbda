"""A world small enough for a laptop: a PASCAL VOC data set of drawn rugs, and a small CLIP that has read about them.

    python toy.py draw FOLDER         draws the world: pictures, masks, lists and class names, laid out as VOC is
    python toy.py pretrain            remakes toy_clip.pt, the CLIP that ships with this code, from captions alone
    python toy.py draw --help         the settings of each

The world is a floor with one to three rugs on it. A class is a pattern and a colour: "striped blue rug". Zero-shot
segmentation needs two parties that know different things, and here, as in the paper, they are kept apart: the CLIP has
read captions that name 24 kinds of rug, and never met a mask; the data set has 20 of them, and the segmentation sees
the masks of 15 and never hears of the other five. Four of the five are new combinations of a pattern and a colour that
other masks show; the fifth is purple, a colour that no mask shows at all: only CLIP knows it.

The drawing is integer arithmetic on integer random numbers: one seed gives the same pixels on every machine.
"""

import argparse
import math
import os
import shutil
import sys
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data import normalise
from model import clip, encode_text, load_clip, tokenize

SIZE = 64  # pixels along a side of a scene: 8 x 8 patches of 8 pixels
PATTERNS = ("plain", "striped", "checked", "dotted")
COLOURS = {"red": (200, 36, 40), "orange": (240, 128, 36), "yellow": (246, 214, 70), "green": (56, 164, 92),
           "blue": (40, 104, 210), "purple": (160, 84, 190)}
DARK, CREAM = (40, 40, 44), (236, 228, 206)  # stripes and checks are dark one way, checks and dots cream the other
RUGS = tuple((pattern, colour) for colour in COLOURS for pattern in PATTERNS)  # the 24 that the captions speak of
CLASSES = tuple(rug for rug in RUGS if rug == ("dotted", "purple") or rug[1] != "purple" and rug != ("checked", "orange"))
CLASS_NAMES = tuple(f"{pattern} {colour} rug" for pattern, colour in CLASSES)  # the data set's 20
UNSEEN = tuple(map(CLASSES.index, (("checked", "red"), ("plain", "orange"), ("striped", "yellow"), ("plain", "green"),
                                   ("dotted", "purple"))))
TEMPLATE = "a photo of a {}"

# Turns by an angle with whole-numbered sine and cosine, in 65ths: 0, ±14.3 and ±22.6 degrees. No rounding, anywhere.
TURNS = np.array([(65, 0), (63, 16), (60, 25), (63, -16), (60, -25)])
MARKER, DRAWING = "toy_world.txt", "toy world, drawing 3"  # counts up whenever the same seed gives other pixels
DEFAULT_WORLD = Path("runs") / "toy_world"
SHIPPED_CLIP = Path(__file__).with_name("toy_clip.pt")

# -------------------------------------------------------------------------------------------------------- the world


def caption(rugs: Sequence[tuple[str, str]]) -> str:
    """What a web page would say of a scene: "a photo of a plain red rug and a dotted blue rug". No place, no shape."""
    return TEMPLATE.format(" and a ".join(f"{pattern} {colour} rug" for pattern, colour in rugs))


def new_attributes(names: Sequence[str], unseen: Sequence[int]) -> list[int]:
    """The unseen classes with a pattern or a colour that no seen class has: here, what only CLIP knows."""
    shown = {word for i, name in enumerate(names) if i not in unseen for word in name.split()}
    return [i for i in unseen if not shown.issuperset(names[i].split())]


def one_to_three(rng: np.random.Generator, of: Sequence) -> list:
    """One to three different ones of a sequence, in random order."""
    return [of[i] for i in rng.permutation(len(of))[:1 + rng.integers(3)]]


def draw_scene(rng: np.random.Generator, rugs: Sequence[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """A scene in which each of `rugs` (pattern, colour) lies once: its picture (64, 64, 3) uint8 and its mask (64, 64)
    uint8, 0 the floor, i + 1 the i-th rug. A later rug lies on an earlier one, which still shows at least 100 pixels."""
    Y, X = np.mgrid[:SIZE, :SIZE]  # int64
    while True:  # until every rug has found a place
        floor = rng.integers(96, 168) + rng.integers(-16, 17, 3)
        image = floor + rng.integers(-18, 19, (SIZE // 4, SIZE // 4, 1)).repeat(4, 0).repeat(4, 1)  # (64, 64, 3), tiles
        label = np.zeros((SIZE, SIZE), np.uint8)
        for i, (pattern, colour) in enumerate(rugs):
            for _ in range(20):
                half_width, half_height = rng.integers(10, 18, 2)
                centre_x, centre_y = rng.integers(8, SIZE - 8, 2)
                cos, sin = TURNS[rng.integers(len(TURNS))]
                x, y = X - centre_x, Y - centre_y
                u, v = cos * x + sin * y, cos * y - sin * x  # the rug's own axes, in 65ths of a pixel
                if rng.integers(2):  # round or rectangular: no caption says which
                    rug = (u * half_height)**2 + (v * half_width)**2 <= (65 * half_width * half_height)**2
                else:
                    rug = (abs(u) <= 58 * half_width) & (abs(v) <= 58 * half_height)
                if 8 * np.count_nonzero(label[rug]) <= np.count_nonzero(rug):  # covers little of the others
                    break
            else:
                break

            step = 65 * rng.integers(6, 10) // 2  # 3 to 4.5 pixels: half a period, less than a patch
            u, v = u + rng.integers(4 * step), v + rng.integers(4 * step)
            none = np.zeros_like(rug)
            dark, cream = {"plain": (none, none), "striped": (u // step % 2 == 1, none),
                           "checked": (3 * u // (2 * step) % 3 == 1, 3 * v // (2 * step) % 3 == 1),
                           "dotted": (none, (u % (2 * step) - step)**2
                                      + (v % (2 * step) - step)**2 <= step**2 // 2)}[pattern]
            image[rug] = COLOURS[colour] + rng.integers(-14, 15, 3)
            image[rug & dark] = DARK + rng.integers(-10, 11, 3)
            image[rug & cream] = CREAM + rng.integers(-10, 11, 3)
            label[rug] = i + 1
        if all(np.count_nonzero(label == i + 1) >= 100 for i in range(len(rugs))):
            break
    image += rng.integers(-14, 15, image.shape)  # the camera's noise
    return image.clip(0, 255).astype(np.uint8), label


def draw_world(folder: str | Path, train: int = 1500, val: int = 200, seed: int = 0) -> None:
    """Sec. 4.1's VOC 2012, as this world has it: a folder that `data.open_dataset("toy", folder, ...)` reads.

    train, val: numbers of scenes. Pictures are PNG: JPEG's losses differ from one library to the next.
    Replaces a toy world that is there already. Raises ValueError where the folder holds anything else.
    """
    folder = Path(os.path.realpath(folder))  # a link to a world stays one
    if os.path.lexists(folder) and not (folder / MARKER).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder}: there already, and no toy world; name a new folder")
    if not 1 <= min(train, val) <= max(train, val) <= 100_000 or seed < 0:
        raise ValueError("--train and --val must be from 1 to 100,000, and --seed not negative")
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    lists = partial / "ImageSets" / "Segmentation"
    for part in (partial / "JPEGImages", partial / "SegmentationClass", lists):
        part.mkdir(parents=True)
    shade = {"plain": 8, "striped": 7, "checked": 6, "dotted": 5}  # eighths: a palette to look at the masks with
    palette = [0, 0, 0] + [shade[pattern] * level // 8 for pattern, colour in CLASSES for level in COLOURS[colour]]
    for number, (split, count) in enumerate((("train", train), ("val", val))):
        names = [f"{split}_{i:05d}" for i in range(count)]
        for i, name in enumerate(tqdm(names, desc=f"drawing {split}", disable=None)):
            rng = np.random.default_rng((seed, number, i))
            classes = one_to_three(rng, range(len(CLASSES)))
            image, label = draw_scene(rng, [CLASSES[c] for c in classes])
            label = np.array([0] + [c + 1 for c in classes], np.uint8)[label]  # VOC's way: 0 is no class, i + 1 is class i
            Image.fromarray(image).save(partial / "JPEGImages" / f"{name}.png")
            mask = Image.fromarray(label)
            mask.putpalette(palette)
            mask.save(partial / "SegmentationClass" / f"{name}.png")
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    (partial / "classes.txt").write_text("".join(f"{'*' * (i in UNSEEN)}{name}\n" for i, name in enumerate(CLASS_NAMES)))
    (partial / MARKER).write_text(world_settings(train, val, seed))
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


def world_settings(train: int = 1500, val: int = 200, seed: int = 0) -> str:
    """What a drawn folder's marker file says: enough to tell whether drawing it again would change a pixel."""
    return f"{DRAWING}, train {train}, val {val}, seed {seed}\n"


def default_world() -> Path:
    """The folder of the world that `train.py` uses when told no other; drawn, in seconds, where it is not there yet."""
    marker = DEFAULT_WORLD / MARKER
    if not marker.is_file() or marker.read_text() != world_settings():
        draw_world(DEFAULT_WORLD)
    return DEFAULT_WORLD


# --------------------------------------------------------------------------------------------------------- its CLIP


def scene_batch(rng: np.random.Generator, size: int) -> tuple[Tensor, list[tuple]]:
    """`size` new scenes, (size, 3, 64, 64) float32, and the rugs in each. No two show the same set of rugs: the
    contrastive loss would push a picture away from another's caption that is just as true of it."""
    scenes: dict[frozenset, tuple] = {}
    while len(scenes) < size:
        rugs = tuple(one_to_three(rng, RUGS))
        scenes.setdefault(frozenset(rugs), rugs)
    images = torch.stack([normalise(draw_scene(rng, rugs)[0]) for rugs in scenes.values()])
    return images, list(scenes.values())


def contrastive_loss(clip_model: torch.nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
    """CLIP's loss (Radford et al. 2021, Fig. 3): each picture finds its caption in the batch, each caption its picture."""
    logits_per_image, logits_per_text = clip_model(images, tokens)
    target = torch.arange(len(images))
    return (F.cross_entropy(logits_per_image, target) + F.cross_entropy(logits_per_text, target)) / 2


@torch.no_grad()
def naming_accuracy(clip_model: torch.nn.Module, count: int, seed: int) -> float:
    """The share of `count` new scenes with a single rug that CLIP gives the right one of the 20 names (chance: 0.05)."""
    rng = np.random.default_rng((seed, 1))
    truth = [i % len(CLASSES) for i in range(count)]
    images = torch.stack([normalise(draw_scene(rng, [CLASSES[c]])[0]) for c in truth])
    G = F.normalize(torch.cat([clip_model.encode_image(part) for part in images.split(100)]), dim=-1)  # (count, D)
    T = encode_text(clip_model, CLASS_NAMES, [TEMPLATE])  # (C, D)
    return ((G @ T.T).argmax(1) == torch.tensor(truth)).float().mean().item()


def pretrain(out: str | Path, seed: int = 0, steps: int = 700, batch_size: int = 64) -> None:
    """A small CLIP, trained as CLIP is, from pictures and captions, and saved in OpenAI's own format.

    Every scene is drawn for its one step, so there is nothing to overfit.
    """
    if min(steps, batch_size) < 1 or not 0 <= seed < 2**63:
        raise ValueError("--steps must be at least 1, and --seed not negative and below 2^63")
    partial = Path(f"{out}.partial")
    if Path(out).is_dir():
        raise ValueError(f"--out {out}: is a folder; name a file")
    partial.touch()  # where nothing can be written this says so now, not after the training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # OpenAI's constructor asks the global generator
        clip_model = clip.model.CLIP(embed_dim=128, image_resolution=SIZE, vision_layers=3, vision_width=128,
                                     vision_patch_size=8, context_length=32, vocab_size=49408, transformer_width=64,
                                     transformer_heads=1, transformer_layers=2)
    every_scene = [rugs for count in (1, 2, 3) for rugs in permutations(RUGS, count)]
    tokens = tokenize([caption(rugs) for rugs in every_scene], clip_model.context_length)  # (12720, 32)
    row = {rugs: i for i, rugs in enumerate(every_scene)}
    with torch.no_grad():  # OpenAI's tokenizer knows 49,408 pieces of words, our captions 20: the rest packs to nothing
        rows = clip_model.token_embedding.weight
        rows.mul_(torch.zeros(len(rows), 1).index_fill_(0, tokens.unique()[1:], 1))  # [1:]: without the padding

    optimizer = torch.optim.AdamW(clip_model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, (1 + math.cos(math.pi * step / steps)) / 2))
    rng = np.random.default_rng((seed, 0))
    progress = tqdm(range(steps), desc="pretraining", disable=None)
    for _ in progress:
        images, scenes = scene_batch(rng, batch_size)
        loss = contrastive_loss(clip_model, images, tokens[[row[rugs] for rugs in scenes]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            clip_model.logit_scale.clamp_(max=math.log(100))  # as OpenAI did, for stability
        progress.set_postfix(loss=f"{loss.item():.3f}")

    clip.model.convert_weights(clip_model)
    clip_model.token_embedding.half()  # convert_weights leaves it in single precision; it is most of the file
    state = clip_model.state_dict() | {"input_resolution": torch.tensor(SIZE), "vocab_size": torch.tensor(49408),
                                       "context_length": torch.tensor(clip_model.context_length)}
    torch.save(state, partial)
    os.replace(partial, out)


def main() -> None:
    """Draws the world or pretrains its CLIP."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="{draw,pretrain}")
    draw = commands.add_parser("draw", help="draw the world as a PASCAL VOC folder",
                               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    draw.add_argument("folder", help="where; a toy world that is there already is replaced, nothing else ever is")
    draw.add_argument("--train", type=int, default=1500, help="scenes to train on")
    draw.add_argument("--val", type=int, default=200, help="scenes to test on")
    draw.add_argument("--seed", type=int, default=0, help="fixes every pixel")
    train = commands.add_parser("pretrain", help="train the world's CLIP from pictures and captions",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    train.add_argument("--out", default=str(SHIPPED_CLIP), help="the weight file")
    train.add_argument("--seed", type=int, default=0, help="fixes the start and the scenes")
    train.add_argument("--steps", type=int, default=700, help="batches of 64 scenes")
    args = parser.parse_args()
    if args.command == "draw":
        draw_world(args.folder, args.train, args.val, args.seed)
        print(f"{args.folder}: {args.train} scenes to train on, {args.val} to test on, {len(CLASSES)} classes, "
              f"unseen: {', '.join(CLASS_NAMES[i] for i in UNSEEN)}")
    elif args.command == "pretrain":
        if not Path(args.out).absolute().parent.is_dir():
            raise ValueError(f"--out {args.out}: no such folder; make it first")
        pretrain(args.out, args.seed, args.steps)
        accuracy = naming_accuracy(load_clip(args.out), count=1000, seed=args.seed)
        print(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.1f} MB, "
              f"names {accuracy:.1%} of 1,000 new single rugs right")
    else:
        parser.print_help()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(print(f"error: {' '.join(str(error).split())}", file=sys.stderr) or 2)
