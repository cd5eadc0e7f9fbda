"""The data sets (paper Sec. 4.1) and what training and testing see of an image (Sec. 4.2, 4.3).

    python data.py [--dataset D --data-root R]    draws what a training run sees of 12 images

Folders under --data-root, where {} stands for train and val:

    voc, toy       JPEGImages/*.jpg (toy: .png)  SegmentationClass/*.png
                   ImageSets/Segmentation/{}.txt
                   the augmented set: SegmentationClassAug/*.png with trainaug.txt or aug.txt
    context(59)    JPEGImages/*.jpg  SegmentationClassContext/*.png
                   ImageSets/SegmentationContext/{}.txt
    coco-stuff     images/{}2017/*.jpg  annotations/{}2017/*.png or *_labelTrainIds.png
    folder         images/*.{jpg,jpeg,png,webp}  masks/*.png  classes.txt  {}.txt

"folder" is your own data: masks of class numbers from 0, 255 where no class fits; in classes.txt a
name per line, * before an unseen one. `python -m tools.prepare FOLDER OUT` converts other forms.
"""

import argparse
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from util import draw, toy
from util.class_names import COCO_STUFF, CONTEXT, FIFTEEN_TEMPLATES, ONE_TEMPLATE, VOC
from util.images import (IGNORE, MEAN, STD, SUFFIXES, jitter, normalise, read_image, read_mask,
                         save_image)
from util.processes import run_script

# Sec. 4.1. Mask value values[i] means class i; 255 and the values in `ignored` mean no class.
DATASETS = {
    "voc": dict(  # 15 seen and 5 unseen classes; 10,582 training images, 1,449 to test
        class_names=VOC, unseen="pottedplant, sheep, sofa, train, tvmonitor",
        images="JPEGImages", masks="SegmentationClass", lists="ImageSets/Segmentation/{}.txt",
        values=range(1, 21), ignored=(0,), templates=ONE_TEMPLATE),  # 0 is background
    "context": dict(  # 50 seen, background among them, and 10 unseen; 4,996 and 5,104 images
        class_names=CONTEXT,
        unseen="cow, motorbike, sofa, cat, boat, fence, bird, tvmonitor, keyboard, aeroplane",
        images="JPEGImages", masks="SegmentationClassContext",
        lists="ImageSets/SegmentationContext/{}.txt", values=range(60)),
    "coco-stuff": dict(  # 156 seen and 15 unseen; 118,287 and 5,000 images, whole folders
        class_names=COCO_STUFF,
        unseen="cow, giraffe, suitcase, frisbee, skateboard, carrot, scissors, cardboard, clouds, "
               "grass, playingfield, river, road, tree, wall-concrete",
        images="images/{}2017", masks="annotations/{}2017", lists="",
        values=[value for value in range(182) if value not in  # no pixel of the maps has these
                (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)]),
    "folder": dict(images="images", masks="masks", lists="{}.txt", values=range(254)),
}
DATASETS["context59"] = DATASETS["context"] | dict(  # paper Table 4: without background
    class_names=CONTEXT[1:], values=range(1, 60), ignored=(0,))
DATASETS["toy"] = DATASETS["voc"] | dict(class_names=toy.CLASS_NAMES, unseen=", ".join(
    toy.CLASS_NAMES[i] for i in toy.UNSEEN), templates=(toy.TEMPLATE,))
NO_CLASS = 254  # in a mapping: a mask value that means nothing


@dataclass(frozen=True, eq=False)
class Dataset:
    """Paper Sec. 4.1: one split of a data set, as found on disk."""
    name: str
    class_names: tuple[str, ...]
    unseen: tuple[int, ...]  # indices of class_names
    templates: tuple[str, ...]
    pairs: list[tuple[Path, Path]]  # (image, mask)
    mapping: np.ndarray  # (256,) uint8: mask value -> class number, IGNORE or NO_CLASS
    note: str = ""  # what a user should know about this split
    shown: np.ndarray | None = None  # (256,) uint8: class number -> what training is told of it


def find_files(folder: Path, *suffixes: str) -> dict[str, Path]:
    """The files in a folder and below, by their path in it without the suffix."""
    files = (file for file in sorted(folder.rglob("*")) if file.suffix.lower() in suffixes)
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def read_lines(path: Path) -> list[str]:
    """A UTF-8 file's lines. Raises FileNotFoundError, ValueError."""
    try:
        return [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8; save the file in that encoding") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing; tools.get or tools.prepare makes it") from None


def read_names(path: Path) -> list[str]:
    """A list's image names, each once, without the suffix of an image."""
    return [*dict.fromkeys(line.rpartition(".")[0] if line.lower().endswith(SUFFIXES) else line
                           for line in read_lines(path))]


def open_dataset(name: str, root: str | Path, split: str, unseen: str | None = None) -> Dataset:
    """Paper Sec. 4.1: find a split ("train" or "val") of one of DATASETS on disk.
    unseen: others than the data set's, comma-separated. Raises FileNotFoundError, ValueError."""
    entry, root, note = DATASETS[name], Path(root), ""
    class_names, chosen = entry.get("class_names"), entry.get("unseen")
    if name == "folder":
        lines = read_lines(root / "classes.txt")
        class_names = [line.removeprefix("*").strip() for line in lines]
        chosen = ",".join(line[1:] for line in lines if line[0] == "*")
    chosen = (chosen if unseen is None else unseen).split(",")
    chosen = [word.strip() for word in chosen if word.strip()]
    for word in set(chosen) - set(class_names):
        raise ValueError(f"--unseen: '{word}' is no class of {', '.join(class_names)}")
    images = find_files(root / entry["images"].format(split), *SUFFIXES)
    masks, values = find_files(root / entry["masks"].format(split), ".png"), entry["values"]
    names = read_names(root / entry["lists"].format(split)) if entry["lists"] else list(images)
    if name == "coco-stuff":  # raw maps, or maps converted for training, whichever cover more
        converted = {stem[:-14]: masks[stem] for stem in masks if stem.endswith("_labelTrainIds")}
        if len(images.keys() & converted.keys()) >= len(images.keys() & masks.keys()):
            masks, values = converted, range(171)
    if name == "voc" and split == "train":  # released code: VOC's own masks, then SBD's
        lists = [root / entry["lists"].format(file) for file in ("trainaug", "aug")]
        more = find_files(root / "SegmentationClassAug", ".png")
        added = [stem for file in lists if more and file.exists() for stem in read_names(file)]
        note = "" if added else f"no augmented set, so train.txt's {len(names):,} images alone"
        masks = more | {stem: masks[stem] for stem in names if stem in masks}
        names = [*dict.fromkeys(names + added)]
    if split == "train" and entry["lists"]:  # SBD's list has images of VOC's val.txt
        held_out = set(read_names(root / entry["lists"].format("val")))
        kept = [stem for stem in names if stem not in held_out]
        if len(kept) < len(names):
            what = "left out" if kept else "trained on, as there are no others"
            note += "; " * bool(note) + f"{len(names) - len(kept):,} images of val.txt {what}"
        names = kept or names
    missing = [stem for stem in names if stem not in images or stem not in masks]
    if missing or not names:
        raise FileNotFoundError(
            f"{root}: image or mask of {len(missing):,} of {len(names):,} {split} names missing "
            f"({', '.join(missing[:2])}); python data.py --help shows the folders"
            + ", python -m tools.prepare FOLDER OUT makes them" * (name == "folder"))
    mapping = np.full(256, NO_CLASS, np.uint8)
    mapping[list(values)[:len(class_names)]] = range(len(class_names))
    mapping[[*entry.get("ignored", ()), IGNORE]] = IGNORE
    return Dataset(name, tuple(class_names), tuple(map(class_names.index, chosen)),
                   entry.get("templates", FIFTEEN_TEMPLATES),
                   [(images[stem], masks[stem]) for stem in names], mapping, note)


def seen_classes(dataset: Dataset) -> Dataset:
    """Paper Sec. 4.3, inductive setting: only the seen classes, counted from 0. `read_pair` still
    gives the old numbers; `shown` maps them, IGNORE for unseen ones. Raises ValueError for none."""
    seen = [i for i in range(len(dataset.class_names)) if i not in dataset.unseen]
    if not seen:
        raise ValueError("every class is unseen; inductive training needs others")
    shown = np.full(256, IGNORE, np.uint8)
    shown[seen] = np.arange(len(seen))
    names = tuple(dataset.class_names[i] for i in seen)
    return replace(dataset, class_names=names, unseen=(), shown=shown)


def read_pair(dataset: Dataset, index: int) -> tuple[Image.Image, np.ndarray]:
    """Paper Sec. 4.1: an image and its whole annotation, (H, W) uint8 class numbers and IGNORE.
    Raises ValueError for a file that cannot be used."""
    image_path, mask_path = dataset.pairs[index]
    image, values = read_image(image_path, has_mask=True), read_mask(mask_path)
    if image.size != values.shape[::-1]:
        raise ValueError(f"{mask_path}: {values.shape[::-1]} pixels, its image {image.size}")
    label = dataset.mapping[values]
    if (label == NO_CLASS).any():
        raise ValueError(f"{mask_path}: {values[label == NO_CLASS][0]} is not a class's number")
    return image, label


class TrainSet(torch.utils.data.Dataset):
    """Paper Sec. 4.2: inputs of 512 x 512 (crop x crop). Released code: how they are made.

    dataset: `seen_classes(...)` for the inductive setting. Item (epoch, index) -> (3, crop, crop)
    float32 image, (crop, crop) int64 label, random by (seed, epoch, index) alone, so that workers,
    processes and resumed runs agree."""
    def __init__(self, dataset: Dataset, crop: int, seed: int,
                 scale: tuple[float, float] = (0.5, 2), colours: bool = True):
        self.dataset, self.crop, self.seed = dataset, crop, seed
        self.scale, self.colours = scale, colours

    def __len__(self) -> int:
        return len(self.dataset.pairs)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = item
        rng, crop = np.random.default_rng((self.seed, epoch, index)), self.crop
        image, label = read_pair(self.dataset, index)
        # Scale: as large as fits into 4 crop x crop (2048 x 512), times a factor.
        factor = rng.uniform(*self.scale)
        ratio = min(int(4 * crop * factor) / max(image.size), int(crop * factor) / min(image.size))
        width, height = (max(1, int(side * ratio + 0.5)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        label = Image.fromarray(label).resize((width, height), Image.Resampling.NEAREST)
        # Crop: retry up to 10 times until no class covers 75 % of the labelled pixels. This counts
        # the whole annotation; what training is not told is hidden after it.
        for _ in range(1 + 10):
            x, y = rng.integers(max(width - crop, 0) + 1), rng.integers(max(height - crop, 0) + 1)
            box = (x, y, min(x + crop, width), min(y + crop, height))
            counts = label.crop(box).histogram()[:IGNORE]
            if max(counts) < 0.75 * sum(counts):
                break
        image, label = image.crop(box), label.crop(box)
        if self.dataset.shown is not None:
            label = label.point(self.dataset.shown.tolist())
        if rng.random() < 0.5:
            image, label = ImageOps.mirror(image), ImageOps.mirror(label)
        if self.colours:
            image = jitter(image, rng)
        # Normalise, then pad at the right and below.
        padding = (0, crop - image.width, 0, crop - image.height)
        pixels, label = normalise(np.array(image)), torch.from_numpy(np.array(label)).long()
        return F.pad(pixels, padding), F.pad(label, padding, value=IGNORE)


class GlobalBatches(torch.utils.data.Sampler):
    """Paper Sec. 4.2: batches of 16 images. Batch sampler: yields this process's share of each.

    Image j of batch t is number t * batch_size + j in a stream of shuffled epochs, for any number
    of processes and after a resume."""
    def __init__(self, length: int, batch_size: int, iterations: int, seed: int, rank: int = 0,
                 world: int = 1, start: int = 0):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.steps = range(start, iterations)
        self.places = range(rank * batch_size // world, (rank + 1) * batch_size // world)

    def __len__(self) -> int:
        return len(self.steps)

    @functools.lru_cache(maxsize=1)
    def order(self, epoch: int) -> np.ndarray:
        """An epoch's shuffled images. Its seed ends in 1: NumPy ignores zeros at a seed's end."""
        return np.random.default_rng((self.seed, epoch, self.length, 1)).permutation(self.length)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for t in self.steps:
            numbers = [divmod(t * self.batch_size + j, self.length) for j in self.places]
            yield [(epoch, int(self.order(epoch)[place])) for epoch, place in numbers]


def test_image(image: Image.Image, short_side: int) -> Tensor:
    """Released code: an image whose shorter side is scaled to short_side, (3, h, w) float32."""
    scale = short_side / min(image.size)
    size = [int(side * scale + 0.5) for side in image.size]
    return normalise(np.array(image.resize(size, Image.Resampling.BILINEAR)))


def test_sample(dataset: Dataset, short_side: int, index: int) -> tuple[Tensor, Tensor, int]:
    """Released code: a test image, its (H, W) uint8 label at full size, and the index."""
    image, label = read_pair(dataset, index)
    return test_image(image, short_side), torch.from_numpy(label), index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="toy", choices=DATASETS, help="default: toy")
    parser.add_argument("--data-root", help="the data set's folder")
    args = parser.parse_args()
    dataset = seen_classes(open_dataset(args.dataset, args.data_root or toy.draw_world(), "train"))
    samples = (TrainSet(dataset, 512, 0) if args.dataset != "toy" else  # as in train.py:
               TrainSet(dataset, toy.SIZE, 0, scale=(1, 1), colours=False))
    tiles = []
    for pixels, label in (samples[divmod(number, len(samples))] for number in range(12)):
        pixels = pixels.permute(1, 2, 0) * torch.tensor(STD) + torch.tensor(MEAN)  # (crop, crop, 3)
        tiles.append(draw.label_image(Image.fromarray(pixels.round().byte().numpy()),
                                      label.byte().numpy(), dataset.class_names, ()))
    save_image(draw.grid([tiles[:4], tiles[4:8], tiles[8:]]), "samples.png")
    print("samples.png: what inductive training sees; pixels without a colour have no label")


if __name__ == "__main__":
    run_script(main)
