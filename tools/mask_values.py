"""What the values in masks mean: masks and class lists as labelling tools write them. A list has
the lines that tools/prepare.py names, `4: fence`, `fence,128,64,0`, hex colours, or is a table."""

import csv
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from data import read_lines
from tools.check_data import by_kind, each
from util.images import IGNORE, open_image, read_image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
NAMES = ("name", "classname", "labelname", "label", "class", "category")  # a table's columns
NUMBERS = ("id", "idx", "index", "value", "pixelvalue", "number", "classid", "labelid", "trainid")
COLOURS = ("r", "g", "b", "red", "green", "blue", "color", "colour", "rgb", "colorrgb")
NUMBER = r"(\d+(?:[\s,;]+\d+)*)"
LINE = re.compile(  # 4 = *fence, or *fence, 4
    rf"(?:{NUMBER}(?:\s*[=:,;]\s*|\s+))?(\*?)\s*(-|(?=.*[^\W\d_])[^=*:;,\t-][^=*:;\t]*?)\s*"
    rf"(?:(?:[=:,;\t]\s*{NUMBER}|(?<=\s)(\d+[\s,]+\d+[\s,]+\d+))[\s:,;]*)?")


def plain_lines(path: Path, column: str | None) -> list[str]:
    """A list's lines without comments, a table's rows as `4 = fence, 128, 64, 0`."""
    lines = [re.sub(r"#([0-9a-fA-F]{6})\b", lambda code: ",".join(map(str, bytes.fromhex(code[1]))),
                    re.sub(r"\s\s+|\t", "\t", line.strip("\ufeff"))) for line in read_lines(path)]
    first = "".join(lines[:1]).lstrip("# \t")
    mark = next((mark for mark in "\t;:," if mark in first), ",")
    head = [re.sub("[^a-z]", "", cell.lower()) for cell in first.split(mark)]
    title = next((cell for cell in NAMES if cell in head), None)
    numbers = [cell for cell in head if cell in NUMBERS and cell != title
               and (column or cell).lower() == cell]
    colours = [cell for cell in head if cell in COLOURS]
    if not title or not numbers + colours:
        return [text for line in lines if (text := re.sub(r"\s*(?<!\S)#.*", "", line))]
    if len(numbers) > 1:
        raise ValueError(f"{path}: the masks may hold {' or '.join(numbers)}; choose with --column")
    rows = []
    for line in lines[1:]:
        python = mark == "\t" and line.count(",") >= len(head)  # Cityscapes' labels.py
        cells = next(csv.reader([line.removeprefix("Label(")], delimiter="," if python else mark,
                                skipinitialspace=True))
        row = defaultdict(str, zip(head, cells[:len(head) - 1] + [" ".join(cells[len(head) - 1:])]))
        name = re.split("[,;]", row[title])[0].strip("\"' \t")
        name = "-" if "true" in row["ignoreineval"].lower() else name
        colour = re.findall(r"\d+", " ".join(row[cell] for cell in colours))
        rows.append(", ".join([" = ".join([*(row[cell] for cell in numbers), name]), *colour]))
    return [row for row in rows if not row.startswith("-1")]  # Cityscapes: masks have no such value


def read_classes(path: Path | None, colours: bool, column: str | None) -> tuple:
    """Read a list -> names, unseen ones, {value or colour 0xRRGGBB: class number or IGNORE}, which
    is empty if the list has none of that kind. Raises ValueError with the line to write."""
    names, unseen, mapping, kinds = [], [], {}, set()
    for line in plain_lines(path, column) if path else ():
        if line == "__ignore__":
            continue  # labelme's -1, which is 255 in a mask
        front, star, name, *back = match.groups() if (match := LINE.fullmatch(line)) else [""] * 5
        name = " ".join(name.split()).strip("\"' ").replace("_background_", "background")
        found = [[*map(int, re.findall(r"\d+", part))] for part in (front, *back) if part]
        kinds.add(tuple(sorted(map(len, found))))
        if (not name or len(kinds) > 1 or not kinds <= {(), (1,), (3,), (1, 3)}
                or any(len(part) == 3 and max(part) > 255 for part in found)
                or "," in name and found and "=" not in line or re.search(r"\d\s*,|,\s*\d|,$", name)
                or not found and name != "-" and (name in names or name.lower() in NAMES
                                                  or re.search(r"(?<![\w-])\d+(?!\w)", name))):
            digits, letters = re.findall(r"\d+", line), " ".join(re.findall(r"[^\W\d_]+", line))
            value = ",".join(digits[-3:] if len(digits) > 2 else digits[:1] or ["VALUE"])
            raise ValueError(f"{path}: `{line}` is not understood; write `" + f"{value} = " * (
                len(kinds) > 1 or bool(digits)) + f"{'*' * ('*' in line)}{letters or 'NAME'}`")
        key = next((sum(n << 8 * i for i, n in enumerate(part[::-1])) for part in found
                    if len(part) == 1 + 2 * colours), None if found or colours else len(mapping))
        if key is not None:
            names += [name] * (name not in ("-", *names))
            meaning = IGNORE if name == "-" else names.index(name)
            if mapping.setdefault(key, meaning) != meaning:
                raise ValueError(f"{path}: `{line}` gives a value again; write one line for it")
            unseen += [name] * bool(star)
    return names, unseen, mapping


def read_values(path: Path, colours: bool) -> tuple[np.ndarray, list | None]:
    """Read a mask's (H, W) values, numbers or colours 0xRRGGBB, and its palette if it has one.
    Raises ValueError for colours where numbers are asked for."""
    image, layout = open_image(path, FORMATS)
    if colours:
        return np.asarray(read_image(image), np.int64) @ [1 << 16, 1 << 8, 1], None
    palette = image.getpalette("RGB") if image.mode == "P" else None
    values = np.asarray(image)
    if values.ndim == 3:  # grey with alpha, or grey saved as RGB
        if values.shape[2] > 2 and (values[..., :3] != values[..., :1]).any():
            raise ValueError(f"{path}: holds colours; they are listed as `128,64,0 = NAME`")
        values = values[..., 0]
    # Pillow spreads the values of 2-bit and 4-bit grey over 0..255; this undoes it.
    return values.astype(np.int64) // {"L;2": 85, "L;4": 17}.get(layout, 1), palette


def find_values(folder: Path, masks: list[str], class_list: Path | None, column: str | None,
                target: Path) -> tuple[list[str], list[str], tuple[bool, dict[int, int]]]:
    """Read the masks -> class names, the unseen ones, and whether the masks hold colours with
    {value: class number}. Ends with code 2 if the list lacks a value; `target` then has all."""
    def look(mask):
        values, palette = read_values(folder / mask, colours)
        return mask, palette, *np.unique(values, return_counts=True)

    wrong = []
    for colours in (False, True):
        names, unseen, mapping = read_classes(class_list, colours, column)
        if class_list and not mapping and not colours:
            continue  # a list of colours
        pixels, files, shown, indices = Counter(), *(defaultdict(set) for _ in range(3))
        for mask, palette, values, counts in each(look, masks, "masks", errors := []):
            pixels.update(dict(zip(values.tolist(), counts.tolist())))
            for value in values.tolist():
                files[value].add(mask)
                if palette:
                    shown[value].add(colour := tuple(palette[3 * value:3 * value + 3]))
                    indices[colour].add(value)
        errors += [f"{min(files[value])}: {value} has another colour in other masks' palettes, so "
                   "its numbers were changed; list the colours as `128,64,0 = NAME`"
                   for value, found in shown.items()
                   if len(found) > 1 and any(len(indices[colour]) > 1 for colour in found)]
        wrong += errors
        if not errors:
            break
    print(*by_kind(wrong), sep="\n", end="\n" * bool(wrong))
    if errors:
        sys.exit(2)
    if not colours and {*pixels} != {0, IGNORE}:
        mapping.setdefault(IGNORE, IGNORE)
    if missing := [value for value in pixels if value not in mapping]:
        lines = ["# Write a name for each ?, * before an unseen one, or - to ignore the pixels"]
        for value, number in sorted(pixels.most_common(254)):
            text = ",".join(map(str, value.to_bytes(3, "big"))) if colours else value
            name = {None: "?", IGNORE: "-"}.get(mapping.get(value)) or names[mapping[value]]
            about = [*(f"colour {colour}" for colour in shown[value]), *sorted(files[value])[:3]]
            lines.append(f"{f'{text} = {name}':<24}# {number / pixels.total():.2%} of the pixels, "
                         + ", ".join(about))
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("\n".join(lines) + "\n", "utf-8")
        many = ", which were smoothed or JPEGs once" * (len(pixels) > 254)
        raise ValueError(f"{class_list or 'no class list'}: no name for {len(missing):,} of "
                         f"{len(pixels):,} values of the masks{many}; write names into {target} "
                         f"and start again with --classes {target}")
    return names, unseen, (colours, mapping)
