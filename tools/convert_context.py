"""Reduce PASCAL Context's published annotations to the 59 classes and background (paper Sec. 4.1).

    python -m tools.convert_context trainval labels.txt VOCdevkit/VOC2010

trainval is the folder in trainval.tar.gz: a Matlab file for each image. labels.txt says what their
459 numbers mean. Writes SegmentationClassContext and ImageSets/SegmentationContext.
"""

import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from util.class_names import CONTEXT
from util.images import save_image
from util.processes import Progress, run_script

COMPRESSED, TYPES = 15, {1: "i1", 2: "u1", 3: "<i2", 4: "<u2"}


def elements(data: bytes):
    """Yield (type, content) of the elements of a Matlab file, version 5, of one large array."""
    while data:
        kind, size = struct.unpack("<II", data[:8])
        if kind == COMPRESSED:
            yield from elements(zlib.decompress(data[8:8 + size]))
        else:
            yield kind, data[8:8 + size]
        data = data[8 + size + -size % 8:]


def main() -> None:
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    annotations, label_list, voc = map(Path, sys.argv[1:])
    lines = [line.partition(":") for line in label_list.read_text().splitlines()]
    labels = {"".join(name.split()): int(number) for number, _, name in lines if name}
    if unknown := set(CONTEXT["class_names"][1:]) - set(labels):
        raise ValueError(f"{label_list}: lacks {', '.join(unknown)}; is it Context's labels.txt?")
    mapping = np.zeros(1 << 16, np.uint8)  # all other values are background
    mapping[[labels[name] for name in CONTEXT["class_names"][1:]]] = range(1, 60)
    masks, lists = voc / "SegmentationClassContext", voc / "ImageSets/SegmentationContext"
    masks.mkdir(), lists.mkdir()  # FileExistsError instead of replacing masks
    for split in ("train", "val"):
        names = [name for name in (voc / f"ImageSets/Main/{split}.txt").read_text().split()
                 if (annotations / f"{name}.mat").exists()]
        for name in Progress(names, split):
            (_, array), = elements((annotations / f"{name}.mat").read_bytes()[128:])
            _, (_, size), _, (kind, values) = elements(array)  # flags, size, name, values
            label = np.frombuffer(values, TYPES[kind]).reshape(np.frombuffer(size, "<i4")[::-1]).T
            save_image(Image.fromarray(mapping[label]), masks / f"{name}.png")
        (lists / f"{split}.txt").write_text("\n".join(names))
        print(f"{split}: {len(names):,} masks")


if __name__ == "__main__":
    run_script(main)
