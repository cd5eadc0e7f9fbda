"""A small drawn world in the layout of PASCAL VOC, for trying the method on a laptop.

A scene is a floor with one to three rugs. CLIP has read captions of 24 kinds of rug, patterns and
colours (docs/pretrain_toy_clip.py). The data set has 20 of them, 15 with masks. For four of the
five unseen ones, masks show pattern and colour, though not together; the fifth is purple.
"""

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from util.processes import progress

SIZE = 64  # pixels along a side of a scene: 8 x 8 patches of 8 pixels
PATTERNS = ("plain", "striped", "checked", "dotted")
COLOURS = {"red": (200, 36, 40), "orange": (240, 128, 36), "yellow": (246, 214, 70),
           "green": (56, 164, 92), "blue": (40, 104, 210), "purple": (160, 84, 190)}
DARK, CREAM = (40, 40, 44), (236, 228, 206)
RUGS = tuple((pattern, colour) for colour in COLOURS for pattern in PATTERNS)  # in the captions
CLASSES = tuple(rug for rug in RUGS if rug == ("dotted", "purple")
                or rug[1] != "purple" and rug != ("checked", "orange"))  # in the data set
CLASS_NAMES = tuple(f"{pattern} {colour} rug" for pattern, colour in CLASSES)
UNSEEN = tuple(map(CLASSES.index, (("checked", "red"), ("plain", "orange"), ("striped", "yellow"),
                                   ("plain", "green"), ("dotted", "purple"))))
TEMPLATE = "a photo of a {}"

TURNS = np.array([(65, 0), (63, 16), (60, 25), (63, -16), (60, -25)])  # 65 cos, 65 sin: integers
WORLD = Path(__file__).resolve().parent.parent / "runs" / "toy_world"


def one_to_three(rng: np.random.Generator, items: Sequence) -> list:
    """One to three different items of a sequence, in random order."""
    return [items[i] for i in rng.permutation(len(items))[:1 + rng.integers(3)]]


def _marks(pattern: str, u: np.ndarray, v: np.ndarray, step: int) -> np.ndarray:
    """0 where a pattern has the rug's colour, 1 where it is dark, 2 where it is cream.
    u, v: coordinates along the rug's own axes, in the unit of `step`. The period is 2 step."""
    period = 2 * step
    dot = (u % period - step)**2 + (v % period - step)**2 <= step**2 // 2
    check = np.where(3 * v // period % 3 == 1, 2, 3 * u // period % 3 == 1)
    return {"plain": 0 * u, "striped": u // step % 2, "checked": check, "dotted": 2 * dot}[pattern]


def texture(pattern: str, colour: str) -> np.ndarray:
    """One period of a rug without noise, (12, 12, 3) uint8: a tile to paint its class with."""
    v, u = 2 * np.mgrid[:12, :12] + 1  # in half pixels: a dot's centre lies between pixels
    return np.array((COLOURS[colour], DARK, CREAM), np.uint8)[_marks(pattern, u, v, step=12)]


def draw_scene(rng: np.random.Generator,
               rugs: Sequence[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """A scene in which each rug shows 100 pixels or more; integers alone, so the same everywhere.
    Returns the image (64, 64, 3) and the mask (64, 64), uint8: 0 the floor, i + 1 the i-th rug."""
    Y, X = np.mgrid[:SIZE, :SIZE]  # int64
    while True:  # until every rug has found a place
        floor = rng.integers(96, 168) + rng.integers(-16, 17, 3)
        image = floor + rng.integers(-18, 19, (16, 16, 1)).repeat(4, 0).repeat(4, 1)  # (64, 64, 3)
        label = np.zeros((SIZE, SIZE), np.uint8)
        for i, (pattern, colour) in enumerate(rugs):
            for _ in range(20):
                w, h = rng.integers(10, 18, 2)  # half the rug's sides
                centre_x, centre_y = rng.integers(8, SIZE - 8, 2)
                cos, sin = TURNS[rng.integers(len(TURNS))]
                x, y = X - centre_x, Y - centre_y
                u, v = cos * x + sin * y, cos * y - sin * x  # in 65ths of a pixel
                if rng.integers(2):  # round or rectangular; captions do not say which
                    rug = (u * h)**2 + (v * w)**2 <= (65 * w * h)**2
                else:
                    rug = (abs(u) <= 58 * w) & (abs(v) <= 58 * h)
                if 8 * np.count_nonzero(label[rug]) <= np.count_nonzero(rug):  # covers little
                    break
            else:
                break
            step = 65 * rng.integers(6, 10) // 2  # 3 to 4.5 pixels
            u, v = u + rng.integers(4 * step), v + rng.integers(4 * step)
            marks = _marks(pattern, u, v, step)
            image[rug] = COLOURS[colour] + rng.integers(-14, 15, 3)
            image[rug & (marks == 1)] = DARK + rng.integers(-10, 11, 3)
            image[rug & (marks == 2)] = CREAM + rng.integers(-10, 11, 3)
            label[rug] = i + 1
        if all(np.count_nonzero(label == i + 1) >= 100 for i in range(len(rugs))):
            break
    image += rng.integers(-14, 15, image.shape)  # the camera's noise
    return image.clip(0, 255).astype(np.uint8), label


def draw_world(folder: Path = WORLD, train: int = 1500, val: int = 200, seed: int = 0) -> Path:
    """Draw `train` and `val` scenes for `data.open_dataset("toy", folder, ...)`, if they are not
    there yet. Returns the folder."""
    if (folder / "ImageSets").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    palette = np.array([(0, 0, 0)] + [texture(*rug).mean((0, 1)) for rug in CLASSES], np.uint8)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as temporary:
        new = Path(temporary, "new")
        for place in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
            (new / place).mkdir(parents=True)
        for number, (split, count) in enumerate((("train", train), ("val", val))):
            names = [f"{split}_{i:05d}" for i in range(count)]
            for i, name in enumerate(progress(names, f"drawing {split}")):
                rng = np.random.default_rng((seed, number, i))
                classes = one_to_three(rng, range(len(CLASSES)))
                image, label = draw_scene(rng, [CLASSES[c] for c in classes])
                Image.fromarray(image).save(new / f"JPEGImages/{name}.png")  # JPEG libraries differ
                mask = Image.fromarray(np.array([0] + [c + 1 for c in classes], np.uint8)[label])
                mask.putpalette(palette.tobytes())
                mask.save(new / f"SegmentationClass/{name}.png")
            (new / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n")
        with contextlib.suppress(OSError):  # another process has drawn the same world meanwhile
            os.rename(new, folder)
    return folder
