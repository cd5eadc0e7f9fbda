"""The data sets (paper Sec. 4.1) and what training and testing see of an image (Sec. 4.2, 4.3).

    python data.py                              draws a sheet of training samples of the toy world
    python data.py --dataset D --data-root R    of another data set (tools.check_data reads it all)

Folders under --data-root:

    voc, toy       JPEGImages/*.jpg  SegmentationClass/*.png  [SegmentationClassAug/*.png]
                   ImageSets/Segmentation/{train,val}.txt  [trainaug.txt or aug.txt]
    context(59)    JPEGImages/*.jpg  SegmentationClassContext/*.png
                   ImageSets/SegmentationContext/{train,val}.txt
    coco-stuff     images/{train2017,val2017}/*.jpg
                   annotations/{train2017,val2017}/*.png or *_labelTrainIds.png
    ade20k         images/{training,validation}/*.jpg  annotations/{training,validation}/*.png
    folder         images/*.{jpg,jpeg,png,webp}  masks/*.png  classes.txt  [train.txt  val.txt]

"folder" is your own data (see docs/data.md). A line of classes.txt is a class name, the first for
mask value 0, or "4 = fence", or "128,64,128 = fence"; * before a name marks an unseen class.
Training takes pixels of 255 as examples of what no class looks like; evaluation leaves them out.

What each setting sees of a mask: docs/walkthrough.md#the-three-settings
"""

import argparse
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from util import draw, folder, toy
from util.class_names import ADE20K, COCO_STUFF, CONTEXT, FIFTEEN_TEMPLATES, ONE_TEMPLATE, VOC
from util.images import IGNORE, MEAN, STD, fit_size, normalise, read_image, save_image
from util.processes import run_script

# ------------------------------------------------------------------- paper Sec. 4.1: the data sets

# In paths, {0} is the split, train or val, and {1} its long name. Mask value values[i] means class
# i; 255 and the values in `ignored` mean no class. more_names (one of the two) and more_masks are
# the augmented set's. util/class_names.py has the class names and which of them are unseen.
DATASETS = {
    "voc": VOC | dict(
        images="JPEGImages", masks="SegmentationClass", names="ImageSets/Segmentation/{0}.txt",
        values=range(1, 21), ignored=(0,), templates=ONE_TEMPLATE,  # 0 is background
        more_names=("ImageSets/Segmentation/trainaug.txt", "ImageSets/Segmentation/aug.txt"),
        more_masks="SegmentationClassAug"),
    "context": CONTEXT | dict(
        images="JPEGImages", masks="SegmentationClassContext",
        names="ImageSets/SegmentationContext/{0}.txt",
        values=range(60), ignored=(), templates=FIFTEEN_TEMPLATES),
    "coco-stuff": COCO_STUFF | dict(  # its values are in util/class_names.py, too
        images="images/{0}2017", masks="annotations/{0}2017", names=None,  # a whole folder
        ignored=(), templates=FIFTEEN_TEMPLATES),
    "ade20k": ADE20K | dict(  # not in the paper: for models that were trained on another data set
        images="images/{1}", masks="annotations/{1}", names=None,
        unseen=(), values=range(1, 151), ignored=(0,), templates=FIFTEEN_TEMPLATES),
    "folder": dict(images="images", masks="masks", names="{0}.txt", templates=FIFTEEN_TEMPLATES),
}
DATASETS["toy"] = DATASETS["voc"] | dict(
    class_names=toy.CLASS_NAMES, unseen=tuple(toy.CLASS_NAMES[i] for i in toy.UNSEEN),
    templates=(toy.TEMPLATE,), more_names=None)
DATASETS["context59"] = DATASETS["context"] | dict(  # paper Table 4: without background
    class_names=CONTEXT["class_names"][1:], values=range(1, 60), ignored=(0,))


@dataclass(frozen=True, eq=False)
class Dataset:
    """Paper Sec. 4.1: one split of a data set, as found on disk."""

    name: str
    class_names: tuple[str, ...]
    unseen: tuple[int, ...]  # indices of class_names
    templates: tuple[str, ...]
    pairs: list[tuple[Path, Path]]  # (image, mask)
    mapping: np.ndarray  # uint8: mask value (or colour) -> class number, IGNORE or NO_CLASS
    note: str = ""  # what a user should know about this split
    shown: np.ndarray = field(default_factory=lambda: np.arange(256, dtype=np.uint8))  # in training


def open_dataset(name: str, root: str | Path, split: str) -> Dataset:
    """Paper Sec. 4.1: find a split ("train" or "val") of one of DATASETS on disk.
    Raises FileNotFoundError for a missing folder, list, image or mask, and ValueError for a class
    list or a list of images that cannot be used."""
    entry, root, notes = DATASETS[name], Path(root), []
    splits = split, {"train": "training", "val": "validation"}[split]
    images = folder.files_by_stem(root / entry["images"].format(*splits))
    masks = folder.find_masks(root / entry["masks"].format(*splits), images)
    names, lists, values = list(images), entry["names"], entry.get("values")
    if name == "coco-stuff":  # raw maps, or maps converted for training, whichever cover more
        end = "_labelTrainIds"
        files = folder.files_by_stem(root / entry["masks"].format(*splits), (".png",))
        converted = {stem.removesuffix(end): files[stem] for stem in files if stem.endswith(end)}
        masks = max(converted, files, key=lambda kind: len(images.keys() & kind.keys()))
        values = range(171) if masks is converted else values
    if name == "folder" and not (root / "train.txt").exists() and not (root / "val.txt").exists():
        names, lists = folder.split_images(names, split), None
        notes.append(f"no train.txt and val.txt: {len(names)} of {len(images)} images, by name")
    if lists:
        names = folder.read_list(root / lists.format(split))
    if split == "train" and entry.get("more_names"):
        more = [root / file for file in entry["more_names"] if (root / file).exists()]
        if more and (root / entry["more_masks"]).exists():
            more_masks = folder.files_by_stem(root / entry["more_masks"], (".png",))
            added = [stem for stem in folder.read_list(more[0]) if stem not in names]
            names = names + added  # those of train.txt keep VOC's own masks
            masks |= {stem: more_masks[stem] for stem in added if stem in more_masks}
        else:
            notes.append(f"no {entry['more_masks'] if more else 'trainaug.txt or aug.txt'}: "
                         f"training on train.txt alone ({len(names):,} images)")
    if split == "train" and lists:  # SBD's lists, for example, contain validation images of VOC
        validation = set(folder.read_list(root / lists.format("val")))
        kept = [stem for stem in names if stem not in validation]
        if len(kept) < len(names):
            notes.append(f"{len(names) - len(kept):,} validation images left out of training"
                         if kept else "all training images are validation images too")
        names = kept or names
    for kind, files in (("images", images), ("masks", masks)):
        missing = [stem for stem in names if stem not in files]
        if missing:
            raise FileNotFoundError(
                f"{root / entry[kind].format(*splits)}: no file for '{missing[0]}', but "
                f"{next(iter(files.values()))} ({len(missing):,} of {len(names):,} are missing)")
    if name == "folder":
        class_names, unseen, mapping = folder.read_classes(root / "classes.txt")
    else:
        class_names = entry["class_names"]
        unseen = tuple(map(class_names.index, entry["unseen"]))
        mapping = np.full(256, folder.NO_CLASS, np.uint8)
        mapping[list(values)] = range(len(values))
        mapping[[*entry["ignored"], IGNORE]] = IGNORE
    pairs = [(images[stem], masks[stem]) for stem in names]
    return Dataset(name, class_names, unseen, entry["templates"], pairs, mapping, "; ".join(notes))


def with_unseen(dataset: Dataset, names: str) -> Dataset:
    """Another choice of unseen classes than paper Sec. 4.1's: comma-separated names, "" for none.
    Raises ValueError for a name that is not a class of the data set."""
    listed = [" ".join(name.split()) for name in names.split(",") if name.strip()]
    for name in listed:
        if name not in dataset.class_names:
            raise ValueError(f"--unseen: '{name}' is not a class of {dataset.name}; choose from "
                             f"{', '.join(dataset.class_names)}")
    return replace(dataset, unseen=tuple(map(dataset.class_names.index, dict.fromkeys(listed))))


def seen_classes(dataset: Dataset) -> Dataset:
    """Paper Sec. 4.3, inductive setting: the data set without its unseen classes. To training
    their pixels are IGNORE, and the others count from 0. Raises ValueError if there are none."""
    seen = [i for i in range(len(dataset.class_names)) if i not in dataset.unseen]
    if not seen:
        raise ValueError(f"{dataset.name}: every class is unseen; inductive training needs others")
    shown = np.full(256, IGNORE, np.uint8)
    shown[seen] = np.arange(len(seen))
    return replace(dataset, class_names=tuple(dataset.class_names[i] for i in seen), unseen=(),
                   shown=shown)


def read_pair(dataset: Dataset, index: int) -> tuple[Image.Image, np.ndarray]:
    """Paper Sec. 4.1: an image and its whole annotation, (H, W) uint8 class numbers and IGNORE.
    Raises ValueError for a file that cannot be used, sizes that differ, or a value of no class."""
    image_path, mask_path = dataset.pairs[index]
    image = read_image(image_path, has_mask=True)
    values = folder.read_values(mask_path, len(dataset.mapping))
    if image.size != values.shape[::-1]:
        raise ValueError(f"{mask_path}: {values.shape[1]}x{values.shape[0]} pixels, but its image "
                         f"has {image.width}x{image.height}; make them equal")
    label = dataset.mapping[values]
    unknown, counts = np.unique(values[label == folder.NO_CLASS], return_counts=True)
    if len(unknown):
        value = folder.value_text(unknown[counts.argmax()], len(dataset.mapping))
        what = (f"in classes.txt; give every line there its value, as in `0 = road`, and add "
                f"`{value} = NAME`, or `{value} = -` to ignore it"
                if dataset.name == "folder" else
                f"a class of {dataset.name}; correct the mask (255 where no class fits)")
        raise ValueError(f"{mask_path}: {value} ({counts.max() / values.size:.2%} of the pixels) "
                         f"is not {what}")
    return image, label


# ----------------------------------------------------------- paper Sec. 4.2: the training samples


def jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Released code: change brightness, contrast, saturation and hue, each half the time."""
    def sometimes(low: float, high: float, otherwise: float) -> float:
        return rng.uniform(low, high) if rng.random() < 0.5 else otherwise

    brightness, contrast = sometimes(-32, 32, 0), sometimes(0.5, 1.5, 1)
    saturation, hue = sometimes(0.5, 1.5, 1), sometimes(-18, 18, 0)  # hue: of 180 for a full turn
    contrast_first = rng.random() < 0.5
    image = image.point(lambda value: value + brightness)  # Pillow rounds and clips to 0..255
    if contrast_first:
        image = image.point(lambda value: value * contrast)
    if saturation != 1 or hue:
        h, s, v = image.convert("HSV").split()
        h = h.point(lambda value: round(value + hue * 256 / 180) % 256)
        s = s.point(lambda value: value * saturation)
        image = Image.merge("HSV", (h, s, v)).convert("RGB")
    if not contrast_first:
        image = image.point(lambda value: value * contrast)
    return image


class TrainSet(torch.utils.data.Dataset):
    """Paper Sec. 4.2: inputs of 512 x 512 (crop x crop). Released code: how they are made.

    Item (epoch, index) -> (3, crop, crop) float32 image, (crop, crop) int64 label. Its random
    numbers depend only on (seed, epoch, index), so workers, processes and resumed runs agree.
    For the inductive setting give `seen_classes(dataset)`."""

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
        # Scale: fit 2048 x 512 times a factor.
        factor = rng.uniform(*self.scale)
        width, height = fit_size(image.size, int(4 * crop * factor), int(crop * factor))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        label = Image.fromarray(label).resize((width, height), Image.Resampling.NEAREST)
        # Crop: retry up to 10 times until no class covers 75 % of the labelled pixels. The rule
        # counts the whole annotation; what training is not told is hidden after it.
        for _ in range(1 + 10):
            x, y = rng.integers(max(width - crop, 0) + 1), rng.integers(max(height - crop, 0) + 1)
            box = (x, y, min(x + crop, width), min(y + crop, height))
            counts = label.crop(box).histogram()[:IGNORE]
            if max(counts) < 0.75 * sum(counts):
                break
        image = image.crop(box)
        label = Image.fromarray(self.dataset.shown[np.array(label.crop(box))])
        # Flip.
        if rng.random() < 0.5:
            image, label = ImageOps.mirror(image), ImageOps.mirror(label)
        # Colours.
        if self.colours:
            image = jitter(image, rng)
        # Normalise, then pad at the right and below.
        padding = (0, crop - image.width, 0, crop - image.height)
        pixels, label = normalise(np.array(image)), torch.from_numpy(np.array(label)).long()
        return F.pad(pixels, padding), F.pad(label, padding, value=IGNORE)


class GlobalBatches(torch.utils.data.Sampler):
    """Paper Sec. 4.2: batches of 16 images. A batch_sampler of this process's part of each.

    Image j of batch t is number t·batch_size + j in a stream of shuffled epochs, for any number of
    processes and after a resume. PyTorch's DistributedSampler pads each epoch to a multiple of the
    processes and cannot start inside one. Raises ValueError for a batch that cannot be shared."""

    def __init__(self, length: int, batch_size: int, iterations: int, seed: int, rank: int = 0,
                 world: int = 1, start: int = 0):
        if batch_size % world:
            raise ValueError(f"--batch-size {batch_size}: {world} processes cannot share it "
                             "equally; give a multiple of their number")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.steps = range(start, iterations)
        self.places = range(rank * batch_size // world, (rank + 1) * batch_size // world)

    def __len__(self) -> int:
        return len(self.steps)

    @functools.lru_cache(maxsize=1)
    def order(self, epoch: int) -> np.ndarray:
        """The shuffled images of an epoch. (seed, epoch) alone would be the stream of sample 0."""
        return np.random.default_rng((self.seed, epoch, self.length, 1)).permutation(self.length)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for t in self.steps:
            numbers = [divmod(t * self.batch_size + j, self.length) for j in self.places]
            yield [(epoch, int(self.order(epoch)[place])) for epoch, place in numbers]


def leave_signals(worker: int) -> None:
    """A worker_init_fn: puts the worker into a process group of its own, so that Ctrl-C and
    SIGTERM reach only the training process, which ends its step first."""
    os.setpgrp()


# --------------------------------------------------------------- paper Sec. 4.3: the test samples


def test_image(image: Image.Image, short_side: int) -> Tensor:
    """Released code: an image whose shorter side is scaled to short_side, (3, h, w) float32."""
    scale = short_side / min(image.size)
    size = [int(side * scale + 0.5) for side in image.size]
    return normalise(np.array(image.resize(size, Image.Resampling.BILINEAR)))


class TestSet(torch.utils.data.Dataset):
    """Released code: item i is (`test_image`, (H, W) uint8 label in the annotation's size, i)."""

    def __init__(self, dataset: Dataset, short_side: int):
        self.dataset, self.short_side = dataset, short_side

    def __len__(self) -> int:
        return len(self.dataset.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        image, label = read_pair(self.dataset, index)
        return test_image(image, self.short_side), torch.from_numpy(label), index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="toy", choices=DATASETS, help="default: toy")
    parser.add_argument("--data-root", type=Path, help="the data set's folder")
    parser.add_argument("--out", default="samples.png", type=Path, help="default: samples.png")
    args = parser.parse_args()
    if args.dataset != "toy" and not args.data_root:
        raise ValueError(f"--data-root: give the folder of {args.dataset}")
    dataset = open_dataset(args.dataset, args.data_root or toy.default_world(), "train")
    dataset = seen_classes(dataset)
    samples = (TrainSet(dataset, toy.SIZE, 0, scale=(1, 1), colours=False)  # train.py's preset
               if args.dataset == "toy" else TrainSet(dataset, 512, 0))
    (batch,) = GlobalBatches(len(samples), batch_size=12, iterations=1, seed=0)
    tiles = []
    for pixels, label in map(samples.__getitem__, batch):
        pixels = pixels.permute(1, 2, 0) * torch.tensor(STD) + torch.tensor(MEAN)  # (crop, crop, 3)
        tiles.append(draw.label_image(Image.fromarray(pixels.round().byte().numpy()),
                                      label.byte().numpy(), dataset.class_names, dataset.unseen))
    save_image(draw.grid([tiles[:4], tiles[4:8], tiles[8:]]), args.out)
    print(f"{args.out}: what inductive training sees of 12 of {len(samples):,} images; pixels of "
          f"unseen classes are left as they are", dataset.note)


if __name__ == "__main__":
    run_script(main)
