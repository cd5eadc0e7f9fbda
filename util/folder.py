"""A data set's files: class lists, lists of images, the contents of folders, values of masks."""

import os
import re
import zlib
from pathlib import Path

import numpy as np

from util.images import IGNORE, SUFFIXES, read_image, read_mask

NO_CLASS = 254  # what a mapping gives for a mask value that means nothing
# value or colour and =, *, name, comment
CLASS_LINE = re.compile(r"(?:(\d+|\d+[\s,]+\d+[\s,]+\d+)\s*=)?\s*(\*?)\s*(.*?)(?:\s*(?<!\S)#.*)?")


def _read_lines(path: Path, content: str) -> list[str]:
    """Return a UTF-8 file's lines, stripped. `content` says in the error what the file holds."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it holds {content}, one per line")
    try:
        return [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8; save the file in that encoding") from None


def read_classes(path: Path) -> tuple[tuple[str, ...], tuple[int, ...], np.ndarray]:
    """Read a class list -> (class names, indices of the unseen classes, mapping of mask values).
    Lines are all "fence" (the first is value 0), all "4 = fence" or all "128,64,128 = fence"; a *
    before the name: unseen; a - instead: ignored; # begins a comment. A name on several lines is
    one class. Raises FileNotFoundError, and ValueError, with the line, for what has no meaning."""
    names, unseen, kinds, classes = [], set(), set(), {}
    for number, line in enumerate(_read_lines(path, "the class names"), start=1):
        written, star, name = CLASS_LINE.fullmatch(line).groups()
        if not (written or star or name):
            continue
        name, parts = " ".join(name.split()), [int(n) for n in re.findall(r"\d+", written or "")]
        value = sum(part << 8 * i for i, part in enumerate(parts[::-1])) if parts else len(classes)
        kinds.add(len(parts))
        for wrong, what in (
                ("=" in name or max([0, *parts]) > 255, "write `4 = fence` or `128,64,0 = fence`"),
                (len(kinds) > 1, "give every line a value, or none"),
                (name in ("", "?"), "no class name; write one, or - to ignore these pixels"),
                (value in classes or name in names and not parts, f"'{written or name}' again"),
                (parts == [IGNORE] and name != "-", "255 means no class; 255,255,255 may be one")):
            if wrong:
                raise ValueError(f"{path}, line {number}: {what}")
        if name not in ("-", *names):
            names.append(name)
        classes[value] = IGNORE if name == "-" else names.index(name)
        unseen |= {classes[value]} if star else set()
    if not 1 <= len(names) <= 254:
        raise ValueError(f"{path}: {len(names)} class names; write 1 to 254, one per line")
    classes |= {IGNORE: IGNORE} if kinds != {3} else {}
    mapping = np.full(1 << 24 if kinds == {3} else 256, NO_CLASS, np.uint8)
    mapping[list(classes)] = list(classes.values())
    return tuple(names), tuple(sorted(unseen)), mapping


def read_list(path: Path) -> list[str]:
    """Read a split's list -> image names without suffix, each once, in the list's order.
    Raises FileNotFoundError, and ValueError for an empty list or two files on one line."""
    stems = {}  # a dictionary, since it keeps the order
    for line in filter(None, _read_lines(path, "the split's image names")):
        if re.search(r"\.\w+\s+\S+\.png$", line):
            raise ValueError(f"{path}: '{line}': write the image alone, as it is called in images/")
        stem, suffix = os.path.splitext(line)
        stems[stem if suffix.lower() in SUFFIXES else line] = None
    if not stems:
        raise ValueError(f"{path}: empty; write the split's image names, one per line")
    return list(stems)


def files_by_stem(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> dict[str, Path]:
    """List the files in a folder and below -> {path inside it, without suffix: path}, sorted.
    Raises FileNotFoundError for none, ValueError for two files that differ only in their suffix."""
    found = {}
    for place, _, files in os.walk(folder, followlinks=True):
        for file in sorted(files):
            stem, suffix = os.path.splitext(os.path.join(place, file)[len(f"{folder}/"):])
            if suffix.lower() in suffixes and not file.startswith("."):
                if stem in found:
                    raise ValueError(f"{place}/{file}: {found[stem].name} has the same name")
                found[stem] = Path(place, file)
    if not found:
        kind = "images" if len(suffixes) > 1 else "PNG masks; JPEG changes class numbers"
        raise FileNotFoundError(f"{folder}: no {kind if folder.is_dir() else 'such folder'}")
    return dict(sorted(found.items()))


def find_masks(folder: Path, images: dict[str, Path]) -> dict[str, Path]:
    """List the masks of `images`, without the suffix (such as _L) that all masks may add."""
    masks = files_by_stem(folder, (".png",))
    if images.keys() & masks.keys():
        return masks
    added = {mask[n:] for mask in masks for n in range(1, len(mask)) if mask[:n] in images}
    shared = [end for end in added if all(mask.endswith(end) for mask in masks)]
    return {mask.removesuffix(min(shared, key=len, default="")): masks[mask] for mask in masks}


def split_images(names: list[str], split: str) -> list[str]:
    """Choose a split without lists: what lies in train/ or val/, else by a hash of each name."""
    if {"train", "val"} <= {name.split("/")[0] for name in names}:
        return [name for name in names if name.startswith(f"{split}/")]
    numbers = {name: zlib.crc32(os.fsencode(name)) for name in names}
    held_out = {name for name in names if numbers[name] % 10 == 0} or {min(names, key=numbers.get)}
    return [name for name in names if (name in held_out) == (split == "val")] or names


def read_values(path: Path, size: int) -> np.ndarray:
    """Read a mask's (H, W) values: below 256, or where the mapping's size is 2²⁴, 0xRRGGBB."""
    if size == 256:
        return read_mask(path)
    return np.asarray(read_image(path, has_mask=True), np.int32) @ np.int32([1 << 16, 1 << 8, 1])


def value_text(value: int, size: int) -> str:
    """Write such a value as classes.txt does: 4 or 128,64,128."""
    return ",".join(map(str, int(value).to_bytes(1 if size == 256 else 3, "big")))
