"""Masks in Matlab files of version 5, as SBD and PASCAL Context publish them (paper Sec. 4.1)."""

import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

COMPRESSED, TYPES = 15, {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4"}
NUMBERS = np.arange(256)[:, None]  # give their bits to red, green and blue in turn, lowest first
VOC_COLOURS = sum((NUMBERS >> (3 * bit + np.arange(3)) & 1) << (7 - bit) for bit in range(3))


def elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (type, content) of the elements of a file or of an element."""
    while data:
        kind, size = np.frombuffer(data, "<u4", 2).tolist()
        short = kind >> 16  # up to four bytes, which stand in the tag itself
        yield kind & 0xFFFF, data[4:4 + short] if short else data[8:8 + size]
        data = data[8 if short else 8 + size + -size % 8:]


def matlab_mask(data: bytes, mapping: np.ndarray, field: bytes = b"") -> Image.Image:
    """The (H, W) array that a file holds, or this field of its struct, as a mask in VOC's colours.
    mapping: of its values to ours. Raises ValueError for another file."""
    try:
        data = zlib.decompress(data[136:]) if data[128] == COMPRESSED else data[128:]
        (_, array), = elements(data)
        _, (_, size), _, *rest = elements(array)  # flags, size, name
        if field:
            (_, width), (_, names), *arrays = rest  # bytes per name, all names, an array for each
            _, array = arrays[names.index(field) // int.from_bytes(width, "little")]
            _, (_, size), _, *rest = elements(array)
        (kind, values), = rest
        array = np.frombuffer(values, TYPES[kind]).reshape(np.frombuffer(size, "<i4")[::-1]).T
        mask = Image.fromarray(mapping[array])
    except (zlib.error, LookupError, ValueError) as error:
        raise ValueError(f"no mask in a Matlab file of version 5 ({error})") from error
    mask.putpalette(VOC_COLOURS.ravel().tolist())
    return mask
