"""Your photo, your words (paper Fig. 6 and Fig. 2): label any photo with any class names.

    python predict.py                                a scene of the toy world, in ten seconds
    python predict.py runs/voc/last.pt street.jpg --classes "car, road, traffic light"

This writes predictions/street.png, the photo beside its labels. The same from Python:

    from predict import Segmenter
    segmenter = Segmenter("runs/voc/last.pt", ["car", "road", "traffic light"])
    segmenter.segment("street.jpg").draw().show()
"""

import argparse
import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import data
from eval import LOWER, THRESHOLDS, region_classes, slide_inference, untrained_encoder
from model import model_from_checkpoint
from util import draw, toy
from util.checkpoint import TOY_MODEL, encode_names, read_checkpoint
from util.clip_files import TOY_CLIP
from util.images import IGNORE, SUFFIXES, on_white, read_image, save_image
from util.processes import PRECISIONS, Progress, autocast, run_script, start_processes

AnyImage = str | Path | Image.Image | np.ndarray  # an array is (H, W, 3) or (H, W), uint8


@dataclass
class Result:
    """What `Segmenter.segment` finds in an image of W x H pixels."""

    image: Image.Image
    labels: np.ndarray  # (H, W) uint8: rows of names, 255 below the threshold
    best: np.ndarray  # (H, W): the highest score of each pixel
    scores: Tensor  # (C, h, w): every class's score, 0 to 1, at the size that the model saw
    names: list[str]
    unseen: set[int]  # the names without masks in training

    def draw(self) -> Image.Image:
        """Paper Fig. 6: the image beside its labels, or above them if it is wide."""
        wide, no_room = self.image.width > 1.6 * self.image.height, set()
        side = 1560 if wide else 780
        tiles = [draw.fit(self.image, side),
                 draw.label_image(self.image, self.labels, self.names, self.unseen, side, no_room)]
        counts = np.bincount(self.labels.ravel(), minlength=256)
        legend = [(draw.fills(self.names)[i], self.names[i] + "*" * (i in self.unseen))
                  for i in sorted(no_room) if counts[i] > 0.002 * self.labels.size]  # no specks
        note = draw.NOTE if any(counts[i] for i in self.unseen) else ""
        return draw.grid([[tile] for tile in tiles] if wide else [tiles], (), legend, note)

    def table(self) -> str:
        """Each word's share of the image, its mean score there, and its highest score anywhere.
        The word with the largest share comes first."""
        lines = [f"  {'word (* unseen)':<28}{'share':>8}{'mean':>8}{'highest':>9}"]
        shares = np.bincount(self.labels.ravel(), minlength=256) / self.labels.size
        for i in np.argsort(-shares[:len(self.names)], kind="stable"):
            mean = f"{self.best[self.labels == i].mean():.2f}" if shares[i] else "-"
            row = f"{self.names[i]:<28}{shares[i]:>8.1%}{mean:>8}{self.scores[i].max():>9.2f}"
            lines.append(f"{'* ' if i in self.unseen else '  '}{row}")
        if shares[IGNORE]:
            lines.append(f"  {'(no label)':<28}{shares[IGNORE]:>8.1%}")
        return "\n".join(lines)


class Segmenter:
    """Paper Fig. 6 for your own images: a trained model and the class names to look for.

    class_names: any words, or "car, road"; None for the training's. A converted checkpoint does not
    know which had masks in training: put a * before those that had none. After inductive training
    the scores of words with masks are lowered by 0.1, as in evaluation, if there are both kinds.
    clip, precision: None for the training's. threshold: a pixel whose best score is below it gets
    no label; 0 for none; by default 0.1 for the toy world, whose floor has no name, else 0.
    Raises ValueError or FileNotFoundError if these do not fit together."""

    def __init__(self, checkpoint: str | Path, class_names: Sequence[str] | None = None, *,
                 clip: str | None = None, device: str = "auto", precision: str | None = None,
                 threshold: float | None = None) -> None:
        saved = read_checkpoint(checkpoint)
        run, own = saved.get("run", {}), list(saved.get("class_names", ()))
        words = own if class_names is None else class_names
        if isinstance(words, str):
            words = [word for word in re.split("[,;]", words) if word.strip()]
        if not 0 < len(words) < IGNORE:
            raise ValueError(f"--classes: {len(words)} words for {checkpoint}; give 1 to 254")
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"--threshold {threshold}: give a number from 0 to 1")
        self.names = [" ".join(word.replace("*", "").split()) for word in words]
        self.unseen = {i for i, word in enumerate(words) if "*" in word}
        if own:  # the checkpoint knows
            masks = {name.casefold() for i, name in enumerate(own)
                     if i not in saved["unseen"] or run["setting"] == "supervised"}
            self.unseen = {i for i, name in enumerate(self.names) if name.casefold() not in masks}
        self.seen = [i for i in range(len(words)) if i not in self.unseen]
        inductive = run.get("setting", "inductive") == "inductive"
        self.lower = LOWER if inductive and self.seen and self.unseen else 0.0
        self.crop = run.get("crop_size", 512)
        default = THRESHOLDS.get(run.get("dataset"), 0.0)
        self.threshold = default if threshold is None else threshold
        self.precision = precision or run.get("precision", "tf32")
        self.toy_clip = Path(clip or saved.get("clip", "")).name == TOY_CLIP.name

        self.device = start_processes(device, self.precision)
        text = saved["text"] if self.names == own else encode_names(
            saved, checkpoint, self.names, saved.get("templates", data.ONE_TEMPLATE), clip)
        self.text = text.to(self.device)  # T (C, D)
        self.model = model_from_checkpoint(saved, checkpoint, clip).to(self.device)

    def segment(self, image: AnyImage) -> Result:
        """Label an image: a path, a PIL image or an array."""
        image = rgb_image(image)
        with autocast(self.device, self.precision):
            scores = slide_inference(self.model, data.test_image(image, self.crop), self.text,
                                     self.crop, self.crop * 426 // 512, self.lower, self.seen)
        labels, best = label_map(scores, image.size[::-1], self.threshold)
        return Result(image, labels, best, scores.cpu(), self.names, self.unseen)

    def draw_regions(self, image: AnyImage) -> Image.Image:
        """Paper Fig. 2: each region token's class, untrained and trained; ValueError if M = 0."""
        image, m = rgb_image(image), self.model.encoder.region_grid
        if not m:
            raise ValueError("--regions: this model has no region tokens")
        untrained = untrained_encoder(self.model.encoder.visual, m * m).to(self.device)
        tiles = [draw.region_names(image, region_classes(encoder, image, self.text, self.crop),
                                   self.names, self.unseen, side=max(780, 110 * m))
                 for encoder in (untrained, self.model.encoder)]
        headers = ("regions of untrained CLIP", "regions of CLIP-RC")
        return draw.grid([tiles], headers, note=draw.NOTE if self.unseen else "")


def rgb_image(image: AnyImage) -> Image.Image:
    """Any image in RGB, transparent pixels on white. Raises ValueError for other arrays."""
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim < 2 or image.shape[2:] not in ((), (3,)):
            raise ValueError(f"{image.dtype} {image.shape}: give uint8, (H, W, 3) or (H, W)")
        image = Image.fromarray(image)
    return on_white(image)


def label_map(scores: Tensor, size: tuple[int, int],
              threshold: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """The best class of each pixel, 255 below the threshold, and its score: both (H, W).

    Resizes the scores (C, h, w) one by one: together those of a large image would take gigabytes.
    """
    best = torch.full(size, -torch.inf, device=scores.device)
    labels = torch.zeros(size, dtype=torch.uint8, device=scores.device)
    for c, score in enumerate(scores):
        score = F.interpolate(score[None, None], size, mode="bilinear")[0, 0]  # (H, W)
        labels[score > best] = c
        best = torch.maximum(best, score)
    if threshold:  # lowered scores may be below 0
        labels[best < threshold] = IGNORE
    return labels.cpu().numpy(), best.cpu().numpy()


def find_photos(paths: Sequence[Path]) -> list[Path]:
    """The photos among `paths` and in the folders among them, each once."""
    photos = {}
    for path in paths:
        inside = [path] if path.is_file() else sorted(
            file for file in path.glob("[!.]*") if file.suffix.lower() in SUFFIXES)
        if not inside:
            raise FileNotFoundError(f"{path}: no photo, and no folder with photos in it; their "
                                    f"names end in {', '.join(SUFFIXES)}")
        photos |= {file.resolve(): file for file in inside}
    return list(photos.values())


def new_name(out: Path, stem: str) -> str:
    """The stem, or the first of stem-2, stem-3 ... under which `out` has no file yet."""
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not any(
        os.path.lexists(out / f"{name}{end}.png") for end in ("", "_labels", "_regions")))


def main() -> None:
    """Label photos."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", metavar="FILE", nargs="*", type=Path, help="a checkpoint, if the first ends in "
        ".pt (default: the toy world's), then photos or folders of photos (default: a toy scene)")
    add("--classes", metavar="WORDS", help='"car, traffic light"; default: those of the training. '
        "For a converted checkpoint, put a * before a word that had no mask in training")
    add("--out", type=Path, default=Path("predictions"), help="folder of the images (%(default)s); "
        "nothing is overwritten: a second street.png becomes street-2.png")
    add("--save", action="store_true", help="also write NAME_labels.png: numbers from 0, 255 none")
    add("--regions", action="store_true", help="also write NAME_regions.png (Fig. 2)")
    add("--threshold", type=float, help="leave pixels unlabelled that score less (0 to 1; default: "
        "0.1 for a model of the toy world, whose floor has no name, else 0)")
    add("--clip", metavar="FILE", help="CLIP's file, folder or name; default: the training's")
    add("--device", default="auto", help="auto, cpu or cuda (%(default)s)")
    add("--precision", choices=PRECISIONS, help="default: the training's")
    args = parser.parse_args()
    given = bool(args.files) and args.files[0].suffix == ".pt"
    checkpoint = args.files.pop(0) if given else TOY_MODEL
    own = bool(args.files or args.classes)
    if not args.files:
        scene, _ = toy.draw_scene(np.random.default_rng(4), [toy.CLASSES[i] for i in (11, 16, 4)])
        args.files = [args.out / "photos" / "toy_scene.png"]
        save_image(Image.fromarray(scene), args.files[0])
    photos, failed = find_photos(args.files), []
    segmenter = Segmenter(checkpoint, args.classes, clip=args.clip, device=args.device,
                          precision=args.precision, threshold=args.threshold)
    if segmenter.toy_clip and own:
        print("note: the toy world's CLIP knows only rugs, such as 'striped blue rug'; what it "
              "says of anything else means nothing")
    if segmenter.threshold:
        print(f"pixels that score less than {segmenter.threshold:g} have no label (--threshold)")
    for path in Progress(photos, "labelling") if len(photos) > 1 else photos:
        try:
            image = read_image(path)
        except ValueError as error:  # told at the end; the other photos are still labelled
            failed.append(str(error))
            continue
        result, name = segmenter.segment(image), new_name(args.out, path.stem)
        files = {args.out / f"{name}.png": result.draw()}
        if args.save:
            labels = files[args.out / f"{name}_labels.png"] = Image.fromarray(result.labels)
            labels.putpalette(draw.index_png_palette(result.names))
        if args.regions:
            files[args.out / f"{name}_regions.png"] = segmenter.draw_regions(image)
        for file, drawn in files.items():
            save_image(drawn, file)
        Progress.write(f"{path}, {image.width} x {image.height}: {', '.join(map(str, files))}\n"
                       f"{result.table()}\n")
    if failed:
        raise ValueError("; ".join(failed))


if __name__ == "__main__":
    run_script(main)
