"""Read every file of a data set once, count its classes and say what is wrong (paper Sec. 4.1).

    python -m tools.check_data --dataset voc --data-root VOCdevkit/VOC2012
    python -m tools.check_data --dataset folder --data-root mine --suggest

Exit code 2 if something must be mended. `python data.py --help` shows each data set's folders.
"""

import argparse
import contextlib
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from data import DATASETS, Dataset, open_dataset, read_pair
from util.folder import files_by_stem, read_values, value_text
from util.images import IGNORE
from util.processes import Progress, run_script

SHOWN = 20  # kinds of problems


def count(dataset: Dataset, split: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Read all pairs. Return each label's images and pixels, both (256,), and the errors."""
    def read(index: int) -> np.ndarray | str:
        try:
            return np.bincount(read_pair(dataset, index)[1].ravel(), minlength=256)  # (256,)
        except (ValueError, OSError) as error:
            return str(error)

    images, pixels, errors = np.zeros(256, int), np.zeros(256, int), []
    total = len(dataset.pairs)
    with ThreadPoolExecutor() as pool:  # threads, as Pillow decodes outside Python's lock
        for result in Progress(pool.map(read, range(total)), f"{split} images", total=total):
            if isinstance(result, str):
                errors.append(result)
            else:
                images, pixels = images + (result > 0), pixels + result
    return images, pixels, errors


def check(name: str, root: Path) -> tuple[list[str], list[str]]:
    """Print both splits' images and pixels of each class. Return the problems and warnings."""
    problems, warnings, columns = [], [], {}
    for split in ("train", "val"):
        try:
            dataset = open_dataset(name, root, split)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        images, pixels, errors = count(dataset, split)
        problems += [error.removeprefix(f"{root}/") for error in errors]
        for i, label in enumerate(dataset.class_names):
            if split == "train" and not (errors or pixels[i] or i in dataset.unseen):
                problems.append(f"class {label}: seen, but has no training pixel; mask or drop it")
            elif split == "val" and i in dataset.unseen and not (errors or pixels[i]):
                warnings.append(f"class {label}: unseen, but has no validation pixel")
        columns |= {f"{split} images": images, f"{split} pixels": pixels}
        print(f"{split}: {len(dataset.pairs):,} images", f"({dataset.note})" * bool(dataset.note))
    if columns:
        print(f"{'class (* unseen)':<24}" + "".join(f"{head:>18}" for head in columns))
        for i, class_name in [*enumerate(dataset.class_names), (IGNORE, "(ignored)")]:
            numbers = "".join(f"{column[i]:>18,}" for column in columns.values())
            print(f"{'*' * (i in dataset.unseen) + class_name:<24}{numbers}")
    return problems, warnings


def by_kind(problems: list[str]) -> list[str]:
    """Group problems "FILE: WHAT; WHAT TO DO" by what to do -> one line each, with three files."""
    kinds = {}
    for problem in dict.fromkeys(problems):  # both splits may have the same
        file, _, what = problem.partition(": ")
        kinds.setdefault(what.partition("; ")[2] or what, []).append((file, what))
    lines = [f"{len(found):,} times: " * (len(found) > 1)
             + f"{', '.join(file for file, _ in found[:3])}: {found[0][1]}"
             for found in sorted(kinds.values(), key=len, reverse=True)]
    return lines[:SHOWN] + [f"and {len(lines) - SHOWN:,} other kinds"] * (len(lines) > SHOWN)


def suggest(root: Path) -> None:
    """Print a classes.txt for the masks that are there: every value or colour, and its share."""
    masks = list(files_by_stem(root / "masks", (".png",)).values())
    size = 1 << 24 if Image.open(masks[0]).mode.startswith("RGB") else 256
    pixels = Counter()
    with contextlib.redirect_stdout(sys.stderr):  # the progress; stdout is the list
        for mask in Progress(masks, "masks"):
            values, counts = np.unique(read_values(mask, size), return_counts=True)
            pixels.update(dict(zip(values.tolist(), counts.tolist())))
    print("# For each ? write a class name, * before it if it is unseen, or - to ignore the pixels")
    for value, number in sorted(pixels.most_common(254)):
        line = f"{value_text(value, size)} = {'-' if value == IGNORE and size == 256 else '?'}"
        print(f"{line:<20}# {number / pixels.total():.2%} of the pixels")
    if len(pixels) > 254:
        print(f"# and {len(pixels) - 254:,} more colours: masks must not be smoothed, nor JPEG")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, choices=DATASETS)
    parser.add_argument("--data-root", required=True, type=Path, help="the data set's folder")
    parser.add_argument("--suggest", action="store_true", help="print a classes.txt for ROOT/masks")
    args = parser.parse_args()
    if args.suggest:
        return suggest(args.data_root)
    problems, warnings = map(by_kind, check(args.dataset, args.data_root))
    print(*(f"warning: {line}" for line in warnings), *problems or ["nothing wrong"], sep="\n")
    if problems:
        sys.exit(2)


if __name__ == "__main__":
    run_script(main)
