"""Every data set in miniature: a few small images and masks in the folders of the real one."""

from pathlib import Path

import numpy as np
from PIL import Image


def picture(path: Path, size: tuple[int, int] = (60, 40), seed: int = 0) -> None:
    """Write a smooth random image in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)


def mask(path: Path, values: np.ndarray | list[int], size: tuple[int, int] = (60, 40)) -> None:
    """Write a palette PNG: an array as it is, a list of values as vertical stripes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(values, list):
        values = np.resize(np.take(values, np.arange(size[0]) * len(values) // size[0]), size[::-1])
    image = Image.fromarray(values.astype(np.uint8))
    image.putpalette(bytes(range(256)) * 3)
    image.save(path)


def voc(root: Path) -> Path:
    """Training images a and b, one more in the augmented set, and v to test on."""
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, names in (("train", "a b"), ("val", "v"), ("aug", "extra b")):
        (lists / f"{split}.txt").write_text(names.replace(" ", "\n"))
    for seed, stem in enumerate(("a", "b", "extra", "v")):
        picture(root / "JPEGImages" / f"{stem}.jpg", seed=seed)
        mask(root / "SegmentationClassAug" / f"{stem}.png", [0, 2])
        if stem != "extra":  # background, aeroplane, tvmonitor (unseen), ignored, sheep (unseen)
            mask(root / "SegmentationClass" / f"{stem}.png", [0, 1, 20, 255, 17])
    return root


def context(root: Path) -> Path:
    """Training image a, and v to test on."""
    (root / "ImageSets/SegmentationContext").mkdir(parents=True)
    for split, stem in (("train", "a"), ("val", "v")):
        (root / f"ImageSets/SegmentationContext/{split}.txt").write_text(stem)
        picture(root / "JPEGImages" / f"{stem}.jpg")
        mask(root / "SegmentationClassContext" / f"{stem}.png", [0, 1, 59])
    return root


def coco(root: Path, converted: bool = False) -> Path:
    """One image in each split, with every value of a mask, as published or as converted."""
    values = range(171) if converted else np.setdiff1d(
        range(182), (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90))  # no class has these
    for split in ("train2017", "val2017"):
        picture(root / "images" / split / "1.jpg")
        mask(root / "annotations" / split / f"1{'_labelTrainIds' * converted}.png",
             np.resize([*values, 255], (40, 60)))
    return root


def folder(root: Path) -> Path:
    """Your own data: three classes, the last one unseen, and images of three kinds."""
    for seed, file in enumerate(("one.jpg", "two.PNG", "seq/three v2.webp")):
        picture(root / "images" / file, seed=seed)
        mask(root / "masks" / Path(file).with_suffix(".png"), [0, 1, 2, 255])
    (root / "classes.txt").write_text("häuser\nroad\n* tree top\n", "utf-8")
    (root / "train.txt").write_text("two.PNG\none\none\n")
    (root / "val.txt").write_text("seq/three v2\n")
    return root
