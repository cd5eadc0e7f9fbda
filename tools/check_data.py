"""Read every file of a data set once, count its classes and say what is wrong (paper Sec. 4.1).

    python -m tools.check_data --dataset voc --data-root VOCdevkit/VOC2012

Exit code 2 if anything is wrong. `python data.py --help` shows the folders of each data set.
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data import DATASETS, Dataset, open_dataset, read_pair
from util.images import IGNORE
from util.processes import Progress, run_script

SHOWN = 20  # problems: one cause can spoil every file


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


def check(name: str, root: Path) -> list[str]:
    """Print both splits' images and pixels of each class. Return the problems, each once."""
    problems, columns = [], {}
    for split in ("train", "val"):
        try:
            dataset = open_dataset(name, root, split)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        images, pixels, errors = count(dataset, split)
        if split == "train" and not errors:
            errors = [f"{root}: no training pixel of the seen class '{class_name}'"
                      for i, class_name in enumerate(dataset.class_names)
                      if i not in dataset.unseen and not pixels[i]]
        problems += errors
        columns |= {f"{split} images": images, f"{split} pixels": pixels}
        print(f"{split}: {len(dataset.pairs):,} images", f"({dataset.note})" * bool(dataset.note))
    if columns:
        print(f"{'class (* unseen)':<24}" + "".join(f"{head:>18}" for head in columns))
        for i, class_name in [*enumerate(dataset.class_names), (IGNORE, "(ignored)")]:
            numbers = "".join(f"{column[i]:>18,}" for column in columns.values())
            print(f"{'*' * (i in dataset.unseen) + class_name:<24}{numbers}")
    return list(dict.fromkeys(problems))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, choices=DATASETS)
    parser.add_argument("--data-root", required=True, type=Path, help="the data set's folder")
    args = parser.parse_args()
    problems = check(args.dataset, args.data_root)
    print(*problems[:SHOWN] or ["nothing wrong"], sep="\n")
    if len(problems) > SHOWN:
        print(f"and {len(problems) - SHOWN:,} more")
    if problems:
        sys.exit(2)


if __name__ == "__main__":
    run_script(main)
