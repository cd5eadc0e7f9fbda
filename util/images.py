"""Read, scale and save images and masks: the one way in and out for all image files."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

IGNORE = 255  # label of a pixel without annotation
# Released code: ImageNet's mean and standard deviation, not CLIP's own.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def _open(path: Path, formats: tuple[str, ...]) -> tuple[Image.Image, str]:
    """Return a file's Pillow image and the layout of its pixels in the file, such as "L;4"."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        # Some other formats are unsafe: Pillow opens PostScript by running Ghostscript.
        with Image.open(path, formats=formats) as image:
            layout = str(image.tile[0].args) if image.tile else ""
            image.load()
            return image, layout
    except Exception as error:  # Pillow and its codecs raise a dozen types for damaged files
        reason = getattr(error, "strerror", None) or str(error).replace("\n", " ") or "damaged"
        raise ValueError(f"{path}: cannot be read as {' or '.join(formats)} ({reason}); "
                         "save it again in that format") from None


def read_image(path: str | Path, has_mask: bool = False) -> Image.Image:
    """Read a JPEG, PNG or WebP file as an upright 8-bit RGB image. Transparent pixels become white.

    has_mask: refuse an image that its EXIF data turns, since the mask would not turn with it.
    Raises FileNotFoundError; ValueError for a damaged file or 16 bits with 12 or fewer in use.
    """
    image, layout = _open(Path(path), ("JPEG", "PNG", "WEBP"))
    if has_mask and image.getexif().get(ExifTags.Base.Orientation) in range(2, 9):
        raise ValueError(f"{path}: its EXIF orientation turns the image but not its mask; "
                         "save the image upright and without EXIF data")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    # Pillow itself drops the low byte of 16-bit colours, so the values cannot be scaled here.
    if "16" in layout and image.convert("L").getextrema()[1] < 16:
        raise ValueError(f"{path}: a 16-bit image that uses 12 bits or less would become black; "
                         "scale its values to 8 bits and save it again")
    return on_white(image)


def on_white(image: Image.Image) -> Image.Image:
    """An image in RGB; transparent pixels become white."""
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def read_mask(path: str | Path) -> np.ndarray:
    """Read a grey or palette PNG as (H, W) uint8: the values as they are in the file.
    Raises FileNotFoundError; ValueError for colours, a value above 255 or a damaged file."""
    mask, layout = _open(Path(path), ("PNG",))
    if mask.mode not in ("1", "L", "P", "I", "I;16"):
        raise ValueError(f"{path}: holds colours ({mask.mode}), not class numbers; write them into "
                         "classes.txt (`python -m tools.check_data --dataset folder --data-root "
                         "FOLDER --suggest` prints them) or save a PNG whose palette index is the "
                         "class number (quantize() makes up its own)")
    values = np.asarray(mask)  # (H, W)
    if values.max() > IGNORE:
        raise ValueError(f"{path}: value {values.max()} is above 255; save one class number per "
                         "pixel, and 255 for pixels of no class")
    # Pillow spreads the values of 2-bit and 4-bit grey over 0..255; this undoes it.
    return values.astype(np.uint8) // {"L;2": 85, "L;4": 17}.get(layout, 1)


def normalise(image: np.ndarray) -> torch.Tensor:
    """Released code: subtract MEAN, divide by STD. (H, W, 3) uint8 -> (3, H, W) float32."""
    pixels = torch.from_numpy(image).permute(2, 0, 1).contiguous()  # (3, H, W)
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def fit_size(size: tuple[int, int], long_side: int, short_side: int) -> tuple[int, int]:
    """Released code: scale (width, height) in proportion to just fit long_side x short_side."""
    scale = min(long_side / max(size), short_side / min(size))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def save_image(image: Image.Image, path: str | Path) -> None:
    """Save under a temporary name, then rename: an old file is replaced whole or not at all.
    Creates the folder. Raises ValueError for a suffix that Pillow cannot write."""
    path = Path(path)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"{path}: images cannot be saved with this suffix; use .png or .jpg")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        image.save(unfinished, kind)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
