"""Read and save images and masks: the one way in and out for all image files."""

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
AnyImage = str | Path | Image.Image | np.ndarray  # an array is (H, W, 3) or (H, W), uint8


def open_image(path: Path, formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP")) -> tuple:
    """A file's Pillow image and its pixels' layout there, such as "L;4". Raises ValueError."""
    try:
        # Some other formats are unsafe: Pillow opens PostScript by running Ghostscript.
        with Image.open(path, formats=formats) as image:
            layout = str(image.tile[0].args) if image.tile else ""
            image.load()
            return image, layout
    except Exception as error:  # Pillow and its codecs raise a dozen types for damaged files
        reason = getattr(error, "strerror", None) or str(error).replace("\n", " ") or "damaged"
        raise ValueError(f"{path}: cannot be read as {' or '.join(formats)} ({reason}); "
                         "save it again as a PNG or JPEG of fewer than "
                         f"{2 * Image.MAX_IMAGE_PIXELS:,} pixels") from None


def read_image(image: AnyImage, has_mask: bool = False) -> Image.Image:
    """A file, a Pillow image or an array as an upright 8-bit RGB image, white where transparent.
    has_mask: refuse an image that its EXIF data turns, as its mask would not. Raises ValueError."""
    name = "image"
    if isinstance(image, (str, Path)):
        name, image = image, open_image(Path(image))[0]
    elif isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if has_mask and image.getexif().get(ExifTags.Base.Orientation, 1) > 1:
        raise ValueError(f"{name}: its EXIF orientation turns the image but not its mask; "
                         "python -m tools.prepare FOLDER OUT turns both")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def read_mask(path: str | Path) -> np.ndarray:
    """An 8-bit grey or palette PNG's values, (H, W) uint8. Raises ValueError for another file."""
    mask, layout = open_image(Path(path), ("PNG",))
    if mask.mode not in ("L", "P") or layout in ("L;2", "L;4"):  # Pillow spreads those over 0..255
        raise ValueError(f"{path}: {layout or mask.mode}, where a PNG of 8-bit class numbers is "
                         "read; python -m tools.prepare FOLDER OUT makes such masks of others")
    return np.array(mask)  # (H, W)


def normalise(image: np.ndarray) -> torch.Tensor:
    """Released code: subtract MEAN, divide by STD. (H, W, 3) uint8 -> (3, H, W) float32."""
    pixels = torch.from_numpy(image).permute(2, 0, 1).contiguous()  # (3, H, W)
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Released code: change brightness, contrast, saturation and hue, each half the time."""
    low, high, otherwise = np.array([(-32, 32, 0), (0.5, 1.5, 1), (0.5, 1.5, 1), (-18, 18, 0)]).T
    brightness, contrast, saturation, hue = np.where(
        rng.random(4) < 0.5, rng.uniform(low, high), otherwise)  # hue: of 180 for a full turn
    contrast_first = rng.random() < 0.5
    image = image.point(lambda value: value + brightness)  # Pillow rounds and clips to 0..255
    if contrast_first:
        image = image.point(lambda value: value * contrast)
    if saturation != 1 or hue:
        h, s, v = image.convert("HSV").split()
        h = h.point(lambda value: round(value + hue * 256 / 180) % 256)
        s = s.point(lambda value: value * saturation)
        image = Image.merge("HSV", (h, s, v)).convert("RGB")
    return image if contrast_first else image.point(lambda value: value * contrast)


def save_image(image: Image.Image, path: str | Path) -> None:
    """Save a PNG under a temporary name, then rename: an old file is replaced whole or not at all.
    Creates the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        image.save(unfinished, "PNG")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
