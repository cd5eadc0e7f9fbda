"""Sec. 4.1: the data sets, their seen and unseen classes, and what training and testing see of each picture.

    python data.py --dataset voc --data-root VOCdevkit/VOC2012             # a sheet of augmented training samples
    python data.py --dataset folder --data-root mine --check               # read every file once, list what is wrong

Layouts under --data-root (a listed picture without its mask is an error that names it):

    voc            JPEGImages/*.jpg  SegmentationClass/*.png  [SegmentationClassAug/*.png]
                   ImageSets/Segmentation/{train,val}.txt  [aug.txt or trainaug.txt]
    toy            as voc, with the class names in classes.txt
    context(59)    JPEGImages/*.jpg  SegmentationClassContext/*.png  ImageSets/SegmentationContext/{train,val}.txt
    coco-stuff     images/{train2017,val2017}/*.jpg  annotations/{train2017,val2017}/*.png (or *_labelTrainIds.png)
    folder         images/*.{jpg,jpeg,png,webp}  masks/<same name>.png  classes.txt  [train.txt  val.txt]

classes.txt is UTF-8, one name a line: line i (blank lines and lines starting with # do not count) names label i, and a
leading * marks an unseen class. A mask holds one class number per pixel, 255 where nobody knows.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler
from tqdm import tqdm

import draw

IGNORE = 255  # label of a pixel that nobody annotated
REFUSED = 254  # what `mapping` gives for a mask value that the data set does not have
DATASETS = ("toy", "voc", "context", "context59", "coco-stuff", "folder")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")  # others start programs: PostScript is one itself
# ImageNet's mean and deviation: the released code does not use CLIP's own
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

ONE_TEMPLATE = ("a photo of a {}",)
FIFTEEN_TEMPLATES = (
    "a photo of a {}.", "a photo of a small {}.", "a photo of a medium {}.", "a photo of a large {}.",
    "This is a photo of a {}.", "This is a photo of a small {}.", "This is a photo of a medium {}.",
    "This is a photo of a large {}.", "a {} in the scene.", "a photo of a {} in the scene.",
    "There is a {} in the scene.", "There is the {} in the scene.", "This is a {} in the scene.",
    "This is the {} in the scene.", "This is one {} in the scene.",
)

VOC_CLASSES = tuple("""aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person
    pottedplant sheep sofa train tvmonitor""".split())
VOC_UNSEEN = ("pottedplant", "sheep", "sofa", "train", "tvmonitor")

CONTEXT_CLASSES = tuple("""background aeroplane bag bed bedclothes bench bicycle bird boat book bottle building bus
    cabinet car cat ceiling chair cloth computer cow cup curtain dog door fence floor flower food grass ground horse
    keyboard light motorbike mountain mouse person plate platform pottedplant road rock sheep shelves sidewalk sign sky
    snow sofa table track train tree truck tvmonitor wall water window wood""".split())
CONTEXT_UNSEEN = ("cow", "motorbike", "sofa", "cat", "boat", "fence", "bird", "tvmonitor", "keyboard", "aeroplane")

# 80 things, then 91 stuff classes; several names are two words, hence the commas
COCO_STUFF_CLASSES = tuple(" ".join(name.split()) for name in """person, bicycle, car, motorcycle, airplane, bus, train,
    truck, boat, traffic light, fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow,
    elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball,
    kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife,
    spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch,
    potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster,
    sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush, banner, blanket, branch,
    bridge, building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other, ceiling-tile, cloth, clothes, clouds,
    counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile,
    floor-wood, flower, fog, food-other, fruit, furniture-other, grass, gravel, ground-other, hill, house, leaves,
    light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow, plant-other, plastic,
    platform, playingfield, railing, railroad, river, road, rock, roof, rug, salad, sand, sea, shelf, sky-other,
    skyscraper, snow, solid-other, stairs, stone, straw, structural-other, table, tent, textile-other, towel, tree,
    vegetable, wall-brick, wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other,
    waterdrops, window-blind, window-other, wood""".split(","))
COCO_STUFF_UNSEEN = ("cow", "giraffe", "suitcase", "frisbee", "skateboard", "carrot", "scissors", "cardboard", "clouds",
                     "grass", "playingfield", "river", "road", "tree", "wall-concrete")
COCO_STUFF_UNUSED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)  # numbers of 0..181 that the public maps never use


# ---------------------------------------------------------------------------------------- Sec. 4.1: the data sets


@dataclass(frozen=True, eq=False)
class Dataset:
    """One split of a data set of Sec. 4.1: where its files are and what their numbers mean.

    mapping (256,) uint8 turns a mask's raw value into a train id, IGNORE, or REFUSED where no such value may occur.
    note is one plain line about what was found, "" where there is nothing to say.
    """

    name: str
    class_names: tuple[str, ...]
    unseen: tuple[int, ...]
    templates: tuple[str, ...]
    pairs: list[tuple[Path, Path]]  # (image, mask)
    mapping: np.ndarray
    note: str = ""


def read_classes(path: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The class list of a data set the paper does not have -> (names, indices of the unseen ones).

    ValueError with file and line for a name given twice, a `*` without a name, bytes that are not UTF-8, no names.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it names the classes, one a line")
    names: dict[str, int] = {}  # name -> the line it stands on
    unseen = []
    for number, raw in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        try:
            line = " ".join(raw.decode("utf-8").split())
        except UnicodeDecodeError:
            raise ValueError(f"{path}, line {number}: not UTF-8; save the file in that encoding") from None
        if not line or line.startswith("#"):
            continue
        name = line.removeprefix("*").strip()
        if not name:
            raise ValueError(f"{path}, line {number}: a * without a class name; write the name behind it")
        if not name.isprintable():
            raise ValueError(f"{path}, line {number}: {ascii(name)} is no name; save the file as plain text in UTF-8")
        if name in names:
            raise ValueError(f"{path}, line {number}: '{name}' again, as on line {names[name]}; give it once")
        if line.startswith("*"):
            unseen.append(len(names))
        names[name] = number
        if len(names) > REFUSED:
            raise ValueError(f"{path}, line {number}: more than the {REFUSED} classes that an 8-bit mask can hold")
    if not names:
        raise ValueError(f"{path}, line 1: no class names; write one a line")
    return tuple(names), tuple(unseen)


def _files_by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """{name without suffix: path}, sorted. One listing, because asking for 118,287 files one by one takes minutes."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; `python data.py --help` shows what --data-root must hold")
    found: dict[str, Path] = {}
    for file in sorted(entry.name for entry in os.scandir(folder)):
        stem, suffix = os.path.splitext(file)
        if suffix.lower() in suffixes and not file.startswith("."):
            if stem in found:
                raise ValueError(f"{folder / file}: {found[stem].name} has the same name; keep one of the two")
            found[stem] = folder / file
    return found


def _read_list(path: Path) -> list[str]:
    """The stems a split's list names, in its order, each once."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such list; it names the split's pictures, one a line, without suffix")
    try:
        stems = list(dict.fromkeys(line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()))
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8; save the list in that encoding") from None
    if not stems:
        raise ValueError(f"{path}: names no pictures; write one a line, without suffix")
    return stems


def open_dataset(name: str, root: str | Path, split: str, problems: list[str] | None = None) -> Dataset:
    """Sec. 4.1's data sets by name (one of DATASETS), their "train" or "val" split.

    Raises FileNotFoundError for a missing folder, list, picture or mask, ValueError for an empty or malformed list.
    With `problems`, missing pictures and masks are written there and left out of the pairs instead.
    """
    if name not in DATASETS:
        raise ValueError(f"--dataset {name}: unknown; choose one of {', '.join(DATASETS)}")
    if split not in ("train", "val"):
        raise ValueError(f"split '{split}': unknown; choose train or val")
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; give the data set's own with --data-root")
    note = ""
    if name in ("voc", "toy"):
        lists, masks = root / "ImageSets" / "Segmentation", _files_by_stem(root / "SegmentationClass", (".png",))
        images, stems = _files_by_stem(root / "JPEGImages", IMAGE_SUFFIXES), _read_list(lists / f"{split}.txt")
        class_names, unseen = VOC_CLASSES, tuple(map(VOC_CLASSES.index, VOC_UNSEEN))
        if name == "toy":
            class_names, unseen = read_classes(root / "classes.txt")
        augmented = root / "SegmentationClassAug"
        extra = _files_by_stem(augmented, (".png",)) if name == "voc" and augmented.is_dir() else {}
        # where both folders have a mask, val keeps the published one: it marks object outlines as ignored
        masks = extra | masks if split == "val" else masks | extra
        if name == "voc" and split == "train":
            longer = next((lists / file for file in ("trainaug.txt", "aug.txt") if (lists / file).is_file()), None)
            union = list(dict.fromkeys(stems + (_read_list(longer) if longer else [])))
            if longer and (extra or masks.keys() >= set(union)):
                stems = union
            else:
                lacking = "SegmentationClassAug" if longer else "aug.txt or trainaug.txt"
                note = f"no {lacking}: training on train.txt alone ({len(stems):,} images)"
        mapping = _mapping(range(1, len(class_names) + 1), ignore=(0,))
        templates = ONE_TEMPLATE
    elif name in ("context", "context59"):
        stems = _read_list(root / "ImageSets" / "SegmentationContext" / f"{split}.txt")
        images = _files_by_stem(root / "JPEGImages", IMAGE_SUFFIXES)
        masks = _files_by_stem(root / "SegmentationClassContext", (".png",))
        without = int(name == "context59")  # "Context59" of Table 4 leaves background out
        class_names = CONTEXT_CLASSES[without:]
        unseen = tuple(map(class_names.index, CONTEXT_UNSEEN))
        mapping = _mapping(range(without, 60), ignore=range(without))
        templates = FIFTEEN_TEMPLATES
    elif name == "coco-stuff":
        images = _files_by_stem(root / "images" / f"{split}2017", IMAGE_SUFFIXES)
        stems = list(images)
        maps = _files_by_stem(root / "annotations" / f"{split}2017", (".png",))
        ending = "_labelTrainIds"
        converted = {stem.removesuffix(ending): path for stem, path in maps.items() if stem.endswith(ending)}
        class_names, unseen = COCO_STUFF_CLASSES, tuple(map(COCO_STUFF_CLASSES.index, COCO_STUFF_UNSEEN))
        # a conversion that stopped half-way is passed over: the raw maps say the same
        if converted and (converted.keys() >= images.keys() or len(converted) == len(maps)):
            masks, mapping = converted, _mapping(range(171))
        else:
            masks, mapping = maps, _mapping([i for i in range(182) if i not in COCO_STUFF_UNUSED])
        templates = FIFTEEN_TEMPLATES
    else:
        images = _files_by_stem(root / "images", IMAGE_SUFFIXES)
        masks = _files_by_stem(root / "masks", (".png",))
        listed = [file for file in ("train.txt", "val.txt") if (root / file).is_file()]
        stems = _read_list(root / f"{split}.txt") if listed else list(images)
        if not listed:
            note = "no train.txt and val.txt: every image is in both splits"
        class_names, unseen = read_classes(root / "classes.txt")
        mapping = _mapping(range(len(class_names)))
        templates = FIFTEEN_TEMPLATES

    missing = [f"{root}: no image {stem}, which the {split} list names" for stem in stems if stem not in images]
    missing += [f"{images[s]}: no mask {s}.png for this image" for s in stems if s in images and s not in masks]
    if problems is not None:
        problems += missing
    elif missing:
        more = f" ({len(missing) - 1:,} more like it; --check lists them)" if len(missing) > 1 else ""
        raise FileNotFoundError(f"{missing[0]}; add it or take it off the list{more}")
    pairs = [(images[stem], masks[stem]) for stem in stems if stem in images and stem in masks]
    if not pairs and not missing:
        raise ValueError(f"{root}: the {split} split has no images; are they where `python data.py --help` says?")
    return Dataset(name, class_names, unseen, templates, pairs, mapping, note)


def _mapping(raw_ids: Sequence[int], ignore: Sequence[int] = ()) -> np.ndarray:
    """(256,) uint8: the j-th of raw_ids becomes train id j, 255 stays IGNORE, what is not named is REFUSED."""
    table = np.full(256, REFUSED, np.uint8)
    table[raw_ids] = np.arange(len(raw_ids))
    table[[*ignore, IGNORE]] = IGNORE
    return table


def with_unseen(dataset: Dataset, names: str) -> Dataset:
    """Another split than Sec. 4.1's: the same data set with these unseen classes, comma-separated, "" for none.

    Raises ValueError for a name that is no class of the data set, or that stands there twice.
    """
    listed = [" ".join(name.split()) for name in names.split(",") if name.strip()]
    for name in listed:
        if name not in dataset.class_names:
            raise ValueError(f"--unseen: '{name}' is no class of {dataset.name}; "
                             f"its classes are {', '.join(dataset.class_names)}")
        if listed.count(name) > 1:
            raise ValueError(f"--unseen: '{name}' stands there twice")
    return replace(dataset, unseen=tuple(map(dataset.class_names.index, listed)))


def seen_classes(dataset: Dataset) -> Dataset:
    """Sec. 4.3's inductive setting: the same pictures as if the unseen classes had never been named or annotated.

    Their pixels become IGNORE as the mask is read; the labels count the seen names. ValueError if none is seen.
    """
    seen = [i for i in range(len(dataset.class_names)) if i not in dataset.unseen]
    if not seen:
        raise ValueError(f"data set {dataset.name}: every class is unseen; inductive training needs others")
    table = np.full(256, IGNORE, np.uint8)
    table[seen] = np.arange(len(seen))
    table[REFUSED] = REFUSED  # what is wrong stays wrong
    return replace(dataset, class_names=tuple(dataset.class_names[i] for i in seen), unseen=(),
                   mapping=table[dataset.mapping])


# --------------------------------------------------------------------------------------------------- reading files


def _open(path: Path) -> Image.Image:
    if not path.is_file():  # opening a pipe would wait for ever
        raise FileNotFoundError(f"{path}: no file of that name; put the picture there")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata does not matter here; a picture too large to be meant well does
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return image
    except PermissionError:
        raise ValueError(f"{path}: may not be read; change its permissions") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"{path}: more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller first") from None
    except Exception as error:  # Pillow and its codecs raise a dozen kinds on damaged files
        reason = " ".join(str(error).replace(f" {str(path)!r}", "").replace(str(path), "").split()) or type(error).__name__
        raise ValueError(f"{path}: cannot be read as a picture ({reason}); save it anew as JPEG or PNG") from None


def read_image(path: str | Path) -> Image.Image:
    """Any picture as upright 8-bit RGB: 16 bits keep their upper eight, what is transparent lies on white.

    ValueError naming the file where it is damaged, no picture, or of more than 89 megapixels.
    """
    image = _open(Path(path))
    if image.mode == "F":
        raise ValueError(f"{path}: cannot be read as a picture (floating-point pixels have no agreed range); "
                         f"save it anew as JPEG or PNG")
    if image.mode.startswith("I"):  # Pillow's own conversion would clip 16 bits to white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def read_label(path: str | Path, mapping: np.ndarray) -> np.ndarray:
    """A mask of Sec. 4.1 as (H, W) uint8 train ids and IGNORE. ValueError names the file, and the value it refuses."""
    mask = _open(Path(path))
    if mask.mode not in ("P", "L", "I", "I;16") or mask.format == "JPEG":  # whose compression makes other numbers of them
        raise ValueError(f"{path}: mode {mask.mode} ({mask.format}), not a mask; save a class number per pixel (grey or "
                         f"palette PNG)")
    raw = np.asarray(mask)  # (H, W)
    if raw.dtype != np.uint8:
        if raw.max() > 255 or raw.min() < 0:
            raise ValueError(f"{path}: value {raw.max() if raw.max() > 255 else raw.min()} is outside 0..255; "
                             f"save a class number per pixel")
        raw = raw.astype(np.uint8)
    label = mapping[raw]
    refused = label == REFUSED
    if refused.any():
        raise ValueError(f"{path}: value {raw[refused][0]} is no class here; correct the mask or the class list")
    return label


def read_pair(dataset: Dataset, index: int) -> tuple[Image.Image, np.ndarray]:
    """Sec. 4.1: the index-th picture of a split and its (H, W) uint8 label; ValueError where their sizes differ."""
    image_path, mask_path = dataset.pairs[index]
    image, label = read_image(image_path), read_label(mask_path, dataset.mapping)
    if image.size != label.shape[::-1]:
        raise ValueError(f"{mask_path}: {label.shape[1]}x{label.shape[0]} pixels, but {image_path.name} has "
                         f"{image.width}x{image.height}; they must be the same")
    return image, label


# ---------------------------------------------------------------------------- Sec. 4.2: what training sees of them


def normalise(image: np.ndarray) -> torch.Tensor:
    """The input of Sec. 4.2's models: (H, W, 3) uint8 -> (3, H, W) float32, less MEAN, over STD."""
    tensor = torch.from_numpy(image).permute(2, 0, 1).contiguous().float()  # (3, H, W)
    return tensor.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None])


def fit_size(size: tuple[int, int], long_side: int, short_side: int) -> tuple[int, int]:
    """The benchmark's resizing: (width, height) scaled, proportions kept, to just fit long_side x short_side."""
    scale = min(long_side / max(size), short_side / min(size))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The benchmark's colours: brightness ±32, contrast and saturation x[0.5, 1.5], hue ±18 of 180, each half the time.

    Contrast comes before or after saturation and hue. All of it is look-up tables, in RGB and in HSV, on 8-bit values.
    """
    levels = np.arange(256.0)

    def look_up(picture: Image.Image, *tables: np.ndarray) -> Image.Image:
        return picture.point(np.rint(np.concatenate(tables)).clip(0, 255).astype(int).tolist())

    brightness, contrast, late, saturation, hue = rng.random(5) < 0.5
    shift, gain, purity, turn = rng.uniform((-32, 0.5, 0.5, -18), (32, 1.5, 1.5, 18))
    table = np.clip(levels + shift, 0, 255) if brightness else levels
    if contrast and not late:
        table = table * gain
    if table is not levels:
        image = look_up(image, table, table, table)
    if saturation or hue:
        h = (levels + turn * 256 / 180).round() % 256 if hue else levels
        image = look_up(image.convert("HSV"), h, levels * purity if saturation else levels, levels).convert("RGB")
    if contrast and late:
        image = look_up(image, levels * gain, levels * gain, levels * gain)
    return image


def augment(image: Image.Image, label: np.ndarray, crop: int, rng: np.random.Generator,
            scale: tuple[float, float] = (0.5, 2), colours: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Sec. 4.2's 512x512 inputs: random scale, crop, flip and colours -> (3, crop, crop) float32, (crop, crop) int64.

    label: (H, W) uint8. The picture fits 4·crop x crop times a factor out of `scale`; what the crop lacks is filled with 0
    (after normalisation) and IGNORE. colours: jitter them. The crop is chosen first, on the source's own pixels, and
    nothing else is resized.
    """
    factor = rng.uniform(*scale)
    width, height = fit_size(image.size, int(4 * crop * factor), int(crop * factor))
    w, h = min(width, crop), min(height, crop)
    mask = Image.fromarray(label)
    # a picture of one class has no better crop, so nothing is gained by looking for it
    for _ in range(11 if np.count_nonzero(mask.histogram()[:IGNORE]) > 1 else 1):
        x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
        left, right = x * image.width / width, (x + w) * image.width / width
        top, bottom = y * image.height / height, (y + h) * image.height / height
        # the whole source pixels that bilinear interpolation of this box reads when it enlarges
        outer = (max(int(left) - 1, 0), max(int(top) - 1, 0),
                 min(int(right) + 2, image.width), min(int(bottom) + 2, image.height))
        counts = mask.crop(outer).histogram()[:IGNORE]
        if 0 < max(counts) <= 0.75 * sum(counts):
            break
    target = mask.resize((w, h), Image.Resampling.NEAREST, (left, top, right, bottom))
    if width > image.width:  # colours cost by the pixel, so they change where the pixels are fewer
        image = jitter(image.crop(outer), rng) if colours else image.crop(outer)
        left, top, right, bottom = left - outer[0], top - outer[1], right - outer[0], bottom - outer[1]
        piece = image.resize((w, h), Image.Resampling.BILINEAR, (left, top, right, bottom))
    else:
        piece = image.resize((w, h), Image.Resampling.BILINEAR, (left, top, right, bottom))
        piece = jitter(piece, rng) if colours else piece
    if rng.random() < 0.5:
        piece, target = ImageOps.mirror(piece), ImageOps.mirror(target)
    pixels, target = normalise(np.array(piece)), torch.from_numpy(np.array(target)).long()  # (3, h, w), (h, w)
    if (w, h) != (crop, crop):
        padding = (0, crop - w, 0, crop - h)
        pixels, target = (torch.nn.functional.pad(pixels, padding),
                          torch.nn.functional.pad(target, padding, value=IGNORE))
    return pixels, target


class TrainSet(TorchDataset):
    """Sec. 4.2's training samples. Item (epoch, index) -> (3, crop, crop) float32, (crop, crop) int64 of labels.

    Its randomness is drawn from (seed, epoch, index) alone, so workers, ranks and resumed runs agree on it.
    Its labels are the data set's: for the inductive setting give it `seen_classes(dataset)`. skipped: a file to which a
    picture that cannot be read is added, a line each time, while the next one in the data set stands in for it; without
    one it is an error.
    """

    def __init__(self, dataset: Dataset, crop: int, seed: int, scale: tuple[float, float] = (0.5, 2),
                 colours: bool = True, skipped: Path | None = None):
        self.dataset, self.crop, self.seed, self.scale, self.colours = dataset, crop, seed, scale, colours
        self.skipped = skipped

    def __len__(self) -> int:
        return len(self.dataset.pairs)

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, index = item
        rng = np.random.default_rng((self.seed, epoch, index))
        for place in range(index, index + len(self)):
            try:
                image, label = read_pair(self.dataset, place % len(self))
            except (ValueError, OSError) as error:
                if self.skipped is None:
                    raise
                with open(self.skipped, "a", encoding="utf-8") as file:  # from any worker, process or earlier try
                    file.write(f"{error}\n")
            else:
                return augment(image, label, self.crop, rng, self.scale, self.colours)
        raise ValueError(f"{self.skipped}: lists every training picture; none can be read, see what is wrong with them")


def leave_signals(worker: int) -> None:
    """For DataLoader's worker_init_fn: Ctrl-C and torchrun's SIGTERM reach a whole process group, but what to do of them
    is the training's affair, which needs its workers to finish the step that it is in. So a worker leaves the group.

    A SIGTERM to the worker alone, from its loader, ends it as ever, and it ends by itself when the training is gone.
    """
    os.setpgrp()


class GlobalBatches(Sampler):
    """Sec. 4.2's global batch of 16, as a batch_sampler: per iteration, this rank's list of (epoch, index).

    Position t·batch_size + j of an endless stream of shuffled epochs belongs to place j of batch t, whoever asks.
    PyTorch's DistributedSampler would not do: it pads each epoch until the ranks divide it and cannot start inside one,
    so neither another number of ranks nor a resumed run would see the same stream.
    """

    def __init__(self, length: int, batch_size: int, iterations: int, seed: int, rank: int = 0, world: int = 1,
                 start: int = 0):
        if length < 1 or batch_size < 1 or batch_size % world:
            raise ValueError(f"a batch of {batch_size} from {length} images cannot be shared by {world} processes; "
                             "choose a batch size that their number divides")
        self.length, self.batch_size, self.iterations, self.seed = length, batch_size, iterations, seed
        self.places = range(rank * batch_size // world, (rank + 1) * batch_size // world)
        self.start = start

    def __len__(self) -> int:
        return max(0, self.iterations - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        shuffled = -1  # the epoch that `order` belongs to
        for t in range(self.start, self.iterations):
            batch = []
            for j in self.places:
                epoch, place = divmod(t * self.batch_size + j, self.length)
                if epoch != shuffled:
                    # not (seed, epoch), which numpy takes for (seed, epoch, 0), the stream of a sample's augmentation
                    rng = np.random.default_rng((self.seed, epoch, self.length, 1))
                    order, shuffled = rng.permutation(self.length), epoch
                batch.append((epoch, int(order[place])))
            yield batch


# ------------------------------------------------------------------------------ Sec. 4.3: what testing sees of them


def test_image(image: Image.Image, short_side: int) -> torch.Tensor:
    """Sec. 4.3: a picture scaled to fit 4·short_side x short_side -> (3, h, w) float32, normalised."""
    size = fit_size(image.size, 4 * short_side, short_side)
    return normalise(np.array(image.resize(size, Image.Resampling.BILINEAR)))


class TestSet(TorchDataset):
    """Sec. 4.3: item i -> (3, h, w) float32 at short_side, (H, W) uint8 label at the annotation's own size, i."""

    def __init__(self, dataset: Dataset, short_side: int):
        self.dataset, self.short_side = dataset, short_side

    def __len__(self) -> int:
        return len(self.dataset.pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        image, label = read_pair(self.dataset, index)
        return test_image(image, self.short_side), torch.from_numpy(label), index


# -------------------------------------------------------------------------------------------------- run by itself


def contact_sheet(dataset: Dataset, crop: int, rows: int = 3, columns: int = 4) -> Image.Image:
    """What training sees: rows x columns augmented samples under their labels, and the names (unseen ones in red)."""
    colours = draw.palette(len(dataset.class_names))
    samples = TrainSet(dataset, crop, seed=0)
    tiles, present = [], set()
    for epoch, index in sum(GlobalBatches(len(samples), rows * columns, 1, seed=0), []):
        pixels, label = samples[epoch, index]
        restored = pixels * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]  # (3, crop, crop)
        image = restored.permute(1, 2, 0).round().byte().numpy()  # (crop, crop, 3)
        present |= set(label.unique().tolist()) - {IGNORE}
        tile = draw.overlay(image, label.byte().numpy(), colours, 0.5)
        tiles.append(tile.resize((256, 256), Image.Resampling.LANCZOS))
    sheet = draw.grid([tiles[r * columns:(r + 1) * columns] for r in range(rows)])
    ids = sorted(present)
    legend = draw.legend([dataset.class_names[i] for i in ids], colours[ids],
                         {ids.index(i) for i in dataset.unseen if i in present}, sheet.width)
    return draw.grid([[sheet], [legend]])


def check(name: str, root: str | Path) -> list[str]:
    """Reads every file of both splits once, prints a table of what Sec. 4.1's classes hold, returns what is wrong."""
    problems: list[str] = []
    table, sizes = [], []
    for split in ("train", "val"):
        dataset = open_dataset(name, root, split, problems)
        images, pixels = np.zeros(256, np.int64), np.zeros(256, np.int64)

        def inspect(index: int) -> np.ndarray | str:
            try:
                return np.bincount(read_pair(dataset, index)[1].ravel(), minlength=256)
            except (ValueError, OSError) as error:
                return str(error)

        with ThreadPoolExecutor() as pool:  # threads are enough: Pillow decodes outside the interpreter's lock
            for result in tqdm(pool.map(inspect, range(len(dataset.pairs))), f"{split} files", len(dataset.pairs),
                               disable=None):
                if isinstance(result, str):
                    problems.append(result)
                else:
                    images, pixels = images + (result > 0), pixels + result
        table += [images, pixels]
        sizes.append(f"{split}: {len(dataset.pairs):,} images" + (f" ({dataset.note})" if dataset.note else ""))
    print("; ".join(sizes))
    print(f"{'class':<24}{'train images':>14}{'train pixels':>16}{'val images':>14}{'val pixels':>16}")
    for i, label in [*enumerate(dataset.class_names), (IGNORE, "(ignored)")]:
        counts = "".join(f"{column[i]:>{width},}" for column, width in zip(table, (14, 16, 14, 16)))
        print(f"{('*' if i in dataset.unseen else '') + label:<24}{counts}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, choices=DATASETS)
    parser.add_argument("--data-root", required=True, type=Path, help="the data set's folder")
    parser.add_argument("--split", default="train", choices=("train", "val"))
    parser.add_argument("--out", default=Path("samples.png"), type=Path, help="the sheet's file (samples.png)")
    parser.add_argument("--crop-size", default=512, type=int, help="side of a training sample in pixels (512)")
    parser.add_argument("--check", action="store_true", help="read every file once instead; exit code 2 with problems")
    args = parser.parse_args()
    if args.check:
        problems = check(args.dataset, args.data_root)
        print("\n".join(problems) or "nothing wrong")
        return 2 if problems else 0
    if not 16 <= args.crop_size <= 4096:
        raise ValueError(f"--crop-size {args.crop_size}: must be from 16 to 4096")
    dataset = open_dataset(args.dataset, args.data_root, args.split)
    draw.save(contact_sheet(dataset, args.crop_size), args.out)
    print(f"{len(dataset.pairs):,} images, {len(dataset.class_names)} classes of which {len(dataset.unseen)} unseen"
          + (f" ({dataset.note})" if dataset.note else "") + f"; sheet in {args.out}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
