"""Read every file of a data set once, count its classes and say what is wrong (paper Sec. 4.1).

    python -m tools.check_data --dataset voc --data-root data/VOC2012

Exit code 2 if something must be mended. `python data.py --help` shows each data set's folders.
"""

import argparse
import sys
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data import DATASETS, open_dataset, read_pair
from util.images import IGNORE
from util.processes import progress, run_script


def each(work: Callable, items: Collection, what: str, errors: list[str]) -> Iterator:
    """Yield what some work makes of each item, in threads. What cannot be used goes to `errors`."""
    def attempt(item):
        try:
            return work(item)
        except (ValueError, OSError) as error:
            return error

    with ThreadPoolExecutor() as pool:  # threads, as Pillow decodes outside Python's lock
        for result in progress(pool.map(attempt, items), what, total=len(items)):
            if isinstance(result, Exception):
                errors.append(str(result))
            else:
                yield result


def count(label: np.ndarray) -> np.ndarray:
    """(H, W) -> (2, 256): each class's pixels, and those with only their own class around them."""
    inner = label[1:-1, 1:-1]
    alone = np.ones(inner.shape, bool)
    for y, x in np.ndindex(3, 3):
        alone &= label[y:y + inner.shape[0], x:x + inner.shape[1]] == inner
    return np.stack([np.bincount(part, minlength=256) for part in (label.ravel(), inner[alone])])


def check(name: str, root: Path) -> tuple[list[str], list[str]]:
    """Print both splits' images and pixels of each class. Return the problems and warnings."""
    problems, warnings, columns, both = [], [], {}, np.zeros((2, 256), int)
    for split in ("train", "val"):
        try:
            dataset = open_dataset(name, root, split)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        errors, images, pixels = [], np.zeros(256, int), np.zeros(256, int)
        for counts in each(lambda index: count(read_pair(dataset, index)[1]),
                           range(len(dataset.pairs)), f"{split} images", errors):
            images, pixels, both = images + (counts[0] > 0), pixels + counts[0], both + counts
        problems += [error.removeprefix(f"{root}/") for error in errors]
        for i, label in enumerate(() if errors else dataset.class_names):
            if split == "train" and not (pixels[i] or i in dataset.unseen):
                problems.append(f"class {label}: seen, but has no training pixel; mask or drop it")
            elif split == "val" and i in dataset.unseen and not pixels[i]:
                warnings.append(f"class {label}: unseen, but has no validation pixel")
        if split == "val" and not errors and not pixels[:IGNORE].any():
            problems.append("validation masks: hold only 255, nothing to score; choose others")
        columns |= {f"{split} images": images, f"{split} pixels": pixels}
        print(f"{split}: {len(dataset.pairs):,} images", f"({dataset.note})" * bool(dataset.note))
    if columns:
        print(f"{'class (* unseen)':<24}" + "".join(f"{head:>18}" for head in columns))
        for i, label in [*enumerate(dataset.class_names), (IGNORE, "(ignored)")]:
            numbers = "".join(f"{column[i]:>18,}" for column in columns.values())
            print(f"{'*' * (i in dataset.unseen) + label:<24}{numbers}")
            if i != IGNORE and both[0, i] and not both[1, i]:
                warnings.append(f"class {label}: only lines of 1 or 2 pixels' width, like the edges"
                                " of masks that were resized with smoothing")
        if len(dataset.class_names) == 1:
            problems.append(f"class {dataset.class_names[0]}: the only one, so any model scores "
                            "100; make what surrounds it a class, too")
    return problems, warnings


def by_kind(problems: list[str]) -> list[str]:
    """Group problems "FILE: WHAT; WHAT TO DO" by what to do -> one line each, with three files."""
    kinds = {}
    for problem in dict.fromkeys(problems):  # both splits may have the same
        file, _, what = problem.partition(": ")
        kinds.setdefault(what.partition("; ")[2] or what, []).append((file, what))
    return [f"{len(found):,} times: " * (len(found) > 1)
            + f"{', '.join(file for file, _ in found[:3])}: {found[0][1]}"
            for found in sorted(kinds.values(), key=len, reverse=True)]


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--dataset", required=True, choices=DATASETS)
    parser.add_argument("--data-root", required=True, type=Path, help="the data set's folder")
    args = parser.parse_args()
    problems, warnings = map(by_kind, check(args.dataset, args.data_root.expanduser()))
    print(*(f"warning: {line}" for line in warnings), *problems or ["nothing wrong"], sep="\n")
    sys.exit(2 if problems else 0)


if __name__ == "__main__":
    run_script(main)
