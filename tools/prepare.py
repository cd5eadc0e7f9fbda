"""Your own images and masks, as other tools write them -> a folder for --dataset folder.

    python -m tools.prepare FOLDER OUT [--classes OUT.classes.txt]

Images and masks lie in folders of their own or side by side; their names differ only in words such
as "image" and "label". Splits: train.txt and val.txt, or else folders, or else a tenth is held out.
Class list: classes.txt, or what your tool wrote. A line is `fence` (values count from 0) or
`4 = fence` or `128,64,0 = fence`, with * before an unseen name and - for an ignored one. Without a
list, write names into OUT.classes.txt and start again. What you must mend or decide: exit code 2.
"""

import argparse
import os
import re
import shutil
import unicodedata
import zlib
from collections import defaultdict
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from data import read_lines
from tools.check_data import by_kind, check, each
from tools.mask_values import FORMATS, find_values, read_values
from util.images import SUFFIXES, open_image, read_image
from util.processes import run_script

PICTURE, LOSSLESS = r"\.(?:jpe?g|png|webp|bmp|tiff?|gif)", (".png", ".bmp", ".tif", ".tiff", ".gif")
WORD = re.compile(  # a word in a path that does not say which file it is
    r"(?P<mask>masks?|lbls?|label\w*|instance(train)?ids?|gt(fine|coarse)?|(ground)?truths?|"
    r"mattes?|ann(o|ot|otation)?s?|seg(mentation)?s?|segmentation(class|object)\w*)|"
    r"(?P<image>(jpeg)?(image|img|photo|picture)s?|(left|right)img8bit|sat|rgb|inputs?)|"
    r"(?P<other>ground|colou?rs?|png|jpe?g|raw|machine|human|set|data)|"
    r"(?P<train>train(ing)?\d*)|(?P<val>val(id(ation)?)?\d*)|(?P<test>test(ing)?\d*)")
CLASS_LIST = re.compile(r"(?i)_*(class|label|colou?r|objectinfo150)[a-z_ -]*\.(txt|csv|tsv|names)")


def bare(file: str) -> str:
    """A path without an image's suffix; composed and decomposed letters become the same."""
    return unicodedata.normalize("NFC", re.sub(rf"\s*({PICTURE})+$", "", file, flags=re.IGNORECASE))


@cache
def words(text: str) -> tuple[tuple[str, ...], str | None]:
    """The words of a path that say which file it is, and whether others say "mask" or "image"."""
    text = re.sub(r"\b(train|val|test)(?=annot|label|mask|im)", r"\1 ", bare(text).lower())
    kinds = [(word, (match := WORD.fullmatch(word)) and match.lastgroup)
             for word in re.split(r"[\s._/-]+", text) if word]
    return (tuple(kind or word for word, kind in kinds if kind not in ("mask", "image", "other")),
            max((kind for _, kind in kinds if kind in ("mask", "image")), default=None))


def pair(left: list[str], right: list[str], flat: bool = False) -> dict[str, str]:
    """Pair files by the words that their names share: {left: right}. Raises ValueError if more fit.
    flat: without their folders, if one side has none or there are no pairs otherwise."""
    sides, groups, pairs = (left, right), defaultdict(lambda: ([], [])), {}
    flat |= any(not any(words(os.path.dirname(file))[0] for file in files) for files in sides)
    names = {file: words(os.path.basename(file) if flat else file)[0] for file in left + right}
    # A word of all names on one side and of none on the other does not say which file it is.
    every = [set.intersection(*({*names[file]} for file in files)) for files in sides]
    ever = [set().union(*(names[file] for file in files)) for files in sides]
    extra = every[0] - ever[1] | every[1] - ever[0]
    for side, files in enumerate(sides):
        for file in files:
            groups[tuple(word for word in names[file] if word not in extra)][side].append(file)
    for a, b in groups.values():
        exact = [{os.path.basename(bare(file)): file for file in files} for files in (a, b)]
        if len(a) == len(b) == 1:
            pairs[a[0]] = b[0]
        elif a and b and exact[0].keys() == exact[1].keys() and len(a) == len(b) == len(exact[0]):
            pairs |= {exact[0][name]: exact[1][name] for name in exact[0]}
        elif a and b:
            raise ValueError(f"{', '.join((a + b)[:3])}: all have one name but for words such as "
                             "'mask'; choose with --images GLOB or --masks GLOB")
    return pairs if pairs or flat else pair(left, right, flat=True)


def find_pairs(files: list[str], args, notes: list[str]) -> dict[str, str]:
    """Tell masks from images by their folders, or else by names, or else by suffixes; pair them."""
    def is_mask(*texts):  # the first text that says something counts
        return next(filter(None, (words(text)[1] for text in texts)), None) == "mask"

    lossless = {file for file in files if file.lower().endswith(LOSSLESS)}
    lossy = {bare(file) for file in files if file not in lossless}
    marked = next((kind for kind in (
        {file for file in files if is_mask(*file.split("/")[-2::-1])},
        {file for file in files if is_mask(os.path.basename(file))},
        {file for file in lossless if bare(file) in lossy}) if 0 < len(kind) < len(files)), set())
    masks = {file for file in files if fnmatch(file, args.masks)} if args.masks else marked
    images = [file for file in files if file not in masks and (
        fnmatch(file, args.images) if args.images else file not in marked)]
    usable = sorted(masks & lossless)
    if not (pairs := pair(images, usable) if images and usable else {}):
        raise ValueError("no image and mask belong together by their names; say which are which "
                         "with --images GLOB --masks GLOB (JPEG and WebP cannot hold masks)")
    notes += [f"{file}: left out, " + (
        "an image without a mask" if file in images else "not chosen" if file not in masks else
        "a mask without an image" if file in usable else "JPEG and WebP cannot hold masks")
        for file in sorted({*files} - {*pairs} - {*pairs.values()})]
    return pairs


def only(folder: Path, files: list[str], flag: str) -> Path | None:
    """The one file of a kind, or None. Raises ValueError for several that differ."""
    files = [*{(folder / file).read_bytes(): file for file in files}.values()]
    if len(files) > 1:
        raise ValueError(f"{files[0]} and {files[1]} differ; choose with {flag}")
    return folder / files[0] if files else None


def out_name(image: str) -> str:
    """An image's name in OUT: its path without the folder for images."""
    *folders, name = bare(image).split("/")
    role = [folder for folder in folders if words(folder) == ((), "image")][:1]
    return "/".join([folder for folder in folders if folder not in role] + [name])


def read_list(file: Path, images: list[str]) -> list[str]:
    """The images that a list names. A line may have other folders above, and a mask beside it."""
    lines = [out_name(re.sub(rf"(.+?{PICTURE})[\s,;]+\S.*", r"\1", line.replace("\\", "/")))
             for line in read_lines(file)]
    by_name = {out_name(image): image for image in images}
    if others := [line for line in dict.fromkeys(lines) if line not in by_name]:
        by_name |= pair(others, images)
    if bad := [line for line in lines if line not in by_name]:
        raise ValueError(f"{file}: {len(bad):,} lines lack an image or mask ('{bad[0]}'); fix them")
    return [*dict.fromkeys(by_name[line] for line in lines)]


def split_pairs(folder: Path, pairs, lists, choice, notes) -> dict[str, list[str]]:
    """Choose each split's images by lists, or else by folders, or else by a hash of each name."""
    splits = {"train": [], "val": [], "test": [], "other": []}
    splits |= {split: read_list(file, [*pairs]) for split, file in lists.items() if file}
    for image in pairs.keys() - set().union(*splits.values()):
        folders = {own[0] for file in (image, pairs[image]) for part in file.split("/")[:-1] if len(
            own := words(part)[0]) == 1 and own[0] in splits and not any(lists.values())}
        splits[folders.pop() if len(folders) == 1 else "other"].append(image)
    if not splits["train"] and not splits["val"]:
        splits["train"], splits["other"] = splits["other"], []
    train, val, rest = splits["train"], splits["val"], sorted(splits["test"] + splits["other"])
    if choice == "test":
        val, rest = rest, val
    elif choice or not val:
        if rest and not choice:
            raise ValueError(f"{rest[0]} and {len(rest) - 1:,} more: are they for validation? --val"
                             " test: yes; --val tenth: no, a tenth of the training images is")
        train, rest = (train, rest + val) if train else (rest, [])
        numbers = {image: zlib.crc32(os.fsencode(out_name(image))) for image in train}
        val = [image for image in train if not numbers[image] % 10] or [min(train, key=numbers.get)]
        train = [image for image in train if image not in val] or train
        notes += [f"{image}: held out for validation, one of ten" for image in val]
    content = {image: hash((folder / image).read_bytes()) for image in {*train, *val}}
    held_out = {content[image] for image in val}
    kept = [image for image in train if content[image] not in held_out]
    notes += [f"{image}: in both splits, {'left out of training' if kept else 'as all others'}"
              for image in train if content[image] in held_out]
    notes += [f"{image}: left out, neither for training nor for validation" for image in rest]
    return {"train": sorted(kept or train or val), "val": sorted(val)}


def convert(image: Path, mask: Path, out: Path, name: str, colours: bool, mapping: dict, exif):
    """Write an image and its mask into OUT, upright. exif: "upright" or "as-stored" masks."""
    keys, numbers = map(np.array, zip(*sorted(mapping.items())))
    label = Image.fromarray(np.uint8(numbers)[np.searchsorted(keys, read_values(mask, colours)[0])])
    picture, _ = open_image(image, FORMATS)
    upright = read_image(picture)
    turn = picture.getexif().get(ExifTags.Base.Orientation)
    turned, fits = turn in range(2, 9), [label.size == picture.size, label.size == upright.size]
    if not any(fits):
        raise ValueError(f"{mask}: {label.width}x{label.height} pixels, but its image has "
                         f"{upright.width}x{upright.height}; make them equal")
    if turned and all(fits) and not exif:
        raise ValueError(f"{image}: EXIF turns it; must its mask turn, too? choose with --exif "
                         "as-stored (yes, masks lie as the image is stored) or --exif upright (no)")
    if turned and fits[0] and (not fits[1] or exif == "as-stored"):
        label.getexif()[ExifTags.Base.Orientation] = turn
        label = ImageOps.exif_transpose(label)
    target, label_target = (f"{out}/{folder}/{name}" for folder in ("images", "masks"))
    for file in (target, label_target):
        os.makedirs(os.path.dirname(file), exist_ok=True)
    label.save(f"{label_target}.png")
    if turned or image.suffix.lower() not in SUFFIXES or picture.format in ("BMP", "TIFF", "GIF"):
        target += ".jpg" if picture.format in ("JPEG", "MPO") else ".png"
        return (picture if picture.mode == "I;16" else upright).save(target, quality=95)
    try:
        os.link(os.path.realpath(image), target + image.suffix)
    except OSError:  # another file system
        shutil.copyfile(image, target + image.suffix)


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--classes", type=lambda text: Path(text).expanduser(), metavar="FILE")
    parser.add_argument("--column", metavar="NAME", help="a class table's column that masks hold")
    parser.add_argument("--unseen", default="", metavar="NAMES", help='unseen classes: "a, b"')
    parser.add_argument("--images", metavar="GLOB", help="which files are images: 'photos/*'")
    parser.add_argument("--masks", metavar="GLOB", help="which files are masks: '*_labelIds.png'")
    parser.add_argument("--lists", metavar="DIR", help="where in FOLDER train.txt and val.txt lie")
    parser.add_argument("--val", choices=("test", "tenth"), help="what to validate on")
    parser.add_argument("--exif", choices=("upright", "as-stored"), help="how turned masks lie")
    args = parser.parse_args()
    folder, out, notes, errors = args.folder.expanduser(), args.out.expanduser(), [], []
    if not folder.is_dir() or out.exists() or folder.resolve() in out.resolve().parents:
        raise ValueError(f"{folder} must exist; {out} must not, nor lie inside it")
    files = sorted(os.path.relpath(os.path.join(place, file), folder).replace(os.sep, "/")
                   for place, _, names in os.walk(folder, followlinks=True) for file in names)
    files = [file for file in files if not re.search(r"(^|/)(\.|__MACOSX/)", file)]
    pictures = [file for file in files if re.search(PICTURE + "$", file, re.IGNORECASE)]
    texts = {file: words(os.path.basename(file).removesuffix(".txt"))[0]
             for file in sorted({*files} - {*pictures})}
    lists = {split: only(folder, [file for file in texts if texts[file] == (split,)
                                  and args.lists in (None, os.path.dirname(file))], "--lists DIR")
             for split in ("train", "val", "test")}
    class_lists = ["classes.txt"] if "classes.txt" in texts else [
        file for file in texts if CLASS_LIST.fullmatch(os.path.basename(file))]
    class_list = args.classes or only(folder, class_lists, "--classes FILE")
    pairs = find_pairs(pictures, args, notes)
    splits = split_pairs(folder, pairs, lists, args.val, notes)
    notes += [f"{file}: not read, {Path(file).suffix or 'no suffix'}" for file in texts
              if file not in class_lists and folder / file not in lists.values()]
    print(f"{len(pairs):,} images with masks, such as {' and '.join(next(iter(pairs.items())))}; "
          f"class list: {class_list or 'none'}", *by_kind(notes), sep="\n")
    images = {image: out_name(image) for image in splits["train"] + splits["val"]}
    names, unseen, meanings = find_values(folder, [pairs[image] for image in images], class_list,
                                          args.column, out.with_name(f"{out.name}.classes.txt"))
    unseen += [name for name in map(str.strip, args.unseen.split(",")) if name]
    if wrong := {*unseen} - {*names}:
        raise ValueError(f"--unseen: '{wrong.pop()}' is no class; choose from {', '.join(names)}")
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        list(each(lambda image: convert(folder / image, folder / pairs[image], unfinished,
                                        images[image], *meanings, args.exif),
                  images, "images", errors))
        lines = {split: [images[image] for image in splits[split]] for split in splits} | {
            "classes": ["*" * (name in unseen) + name for name in names]}
        for file in () if errors else lines:
            (unfinished / f"{file}.txt").write_text("\n".join(lines[file]) + "\n", "utf-8")
        problems, warnings = ([], []) if errors else check("folder", unfinished)
        for problem in problems:  # a class without a pixel may have some in another folder
            (warnings if "no training pixel" in problem else errors).append(problem)
        verdict = by_kind(errors) or ["nothing wrong"]
        print(*(f"warning: {line}" for line in by_kind(warnings)), *verdict, sep="\n")
        if errors:
            raise SystemExit(2)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"{out} is complete. Next: python train.py --dataset folder --data-root {out}")


if __name__ == "__main__":
    run_script(main)
