"""Files of a data set on disk: class lists, lists of images, the contents of a folder."""

import os
from pathlib import Path

from util.images import SUFFIXES


def _read_lines(path: Path, content: str) -> list[str]:
    """Return a UTF-8 file's lines, stripped. `content` says in the error what the file holds."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it holds {content}, one per line")
    try:
        return [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8; save the file in that encoding") from None


def read_classes(path: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Read a class list -> (class names, indices of the unseen classes).

    A leading * marks an unseen class; blank lines and lines starting with # do not count.
    Raises FileNotFoundError; ValueError, with the line, for a name that is there twice or missing
    after a *; ValueError for no names or more than 254 (an 8-bit mask has no room for more).
    """
    names, unseen = [], []
    for number, line in enumerate(_read_lines(path, "the class names"), start=1):
        if not line or line.startswith("#"):
            continue
        name = " ".join(line.removeprefix("*").split())
        if not name:
            raise ValueError(f"{path}, line {number}: a * without a class name; add the name")
        if name in names:
            raise ValueError(f"{path}, line {number}: '{name}' again; give each name once")
        if line.startswith("*"):
            unseen.append(len(names))
        names.append(name)
    if not 1 <= len(names) <= 254:
        raise ValueError(f"{path}: {len(names)} class names; write 1 to 254, one per line")
    return tuple(names), tuple(unseen)


def read_list(path: Path) -> list[str]:
    """Read a split's list -> image names without suffix, each once, in the list's order.

    Raises FileNotFoundError, and ValueError for an empty list.
    """
    stems = {}  # a dictionary, since it keeps the order
    for line in filter(None, _read_lines(path, "the split's image names")):
        stem, suffix = os.path.splitext(line)
        stems[stem if suffix.lower() in SUFFIXES else line] = None
    if not stems:
        raise ValueError(f"{path}: empty; write the split's image names, one per line")
    return list(stems)


def files_by_stem(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> dict[str, Path]:
    """List the files of a folder, not of its sub-folders -> {name without suffix: path}, sorted.

    Raises FileNotFoundError, and ValueError for two files that differ only in their suffix.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; `python data.py --help` shows which "
                                "folders a data set has")
    found = {}
    for file in sorted(os.listdir(folder)):
        stem, suffix = os.path.splitext(file)
        if suffix.lower() in suffixes and not file.startswith("."):
            if stem in found:
                raise ValueError(f"{folder / file}: {found[stem].name} has the same name; "
                                 "keep one of the two")
            found[stem] = folder / file
    return found
