"""Your photo, your words (paper Fig. 6 and Fig. 2): label any photo with any class names.

    python predict.py                                a scene of the toy world, in ten seconds
    python predict.py runs/voc/last.pt street.jpg --classes "car, road, traffic light"

This writes predictions/street.png, the photo beside its labels. The same from Python:

    segmenter = predict.Segmenter("runs/voc/last.pt", ["car", "road", "traffic light"])
    segmenter.segment("street.jpg").draw().show()
"""

import argparse
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import data
from eval import LOWER, MaskCLIP, label_map, slide_inference
from model import CLIPRC, model_from_checkpoint
from rlb_attention import Encoder
from util import draw, toy
from util.checkpoint import TOY_MODEL, checkpoint_clip, read_checkpoint
from util.clip_files import TOY_CLIP, encode_text
from util.images import IGNORE, SUFFIXES, AnyImage, normalise, read_image, save_image
from util.processes import PRECISIONS, autocast, progress, run_script, start_processes

# A pixel has no label where its best score is below this. The toy world's floor has no name.
THRESHOLDS = {"toy": 0.1}
REGIONS = ("image", "regions, untrained", "regions, trained", "right or wrong")  # Fig. 2


@dataclass
class Result:
    """What `Segmenter.segment` finds in an image of W x H pixels."""
    image: Image.Image
    labels: np.ndarray  # (H, W) uint8: rows of names, 255 below the threshold
    best: np.ndarray  # (H, W): the highest score of each pixel after lowering
    scores: Tensor  # (C, h, w): every class's score, 0 to 1, at the size that the model saw
    names: list[str]
    unseen: set[int]  # the names without masks in training
    lower: float  # what is taken off the scores of the others

    def draw(self) -> Image.Image:
        """Paper Fig. 6: the image beside its labels, or above them if it is wide."""
        return draw.figure([(self.image, [self.labels], None)], (), self.names, self.unseen)

    def table(self) -> str:
        """Each word's share of the image, mean score there and highest score anywhere, all after
        lowering. A number is how the figure writes a word that its font lacks."""
        lines = [f"  {'word (* unseen)':<28}{'share':>8}{'mean':>8}{'highest':>9}"]
        shares = np.bincount(self.labels.ravel(), minlength=256) / self.labels.size
        for i in np.argsort(-shares[:len(self.names)], kind="stable"):
            mean = f"{self.best[self.labels == i].mean():.2f}" if shares[i] else "-"
            highest = self.scores[i].max() - self.lower * (i not in self.unseen)
            word = f"{i} " * (draw.plain(self.names, i) == str(i)) + self.names[i]
            lines.append(f"{'* ' if i in self.unseen else '  '}{word:<28}{shares[i]:>8.1%}"
                         f"{mean:>8}{highest:>9.2f}")
        return "\n".join([*lines, f"  {'(no label)':<28}{shares[IGNORE]:>8.1%}"])


class Segmenter:
    """Paper Fig. 6 for your own images: a trained model and the class names to look for.

    class_names: any words, "car, road" or a .txt file of them. After inductive training the scores
    of words with masks are lowered by 0.1, as in evaluation, if there are both kinds. threshold: a
    pixel that scores less has no label; 0.1 for the toy world, else 0. Raises ValueError."""
    def __init__(self, checkpoint: str | Path, class_names: Sequence[str] | None = None, *,
                 clip: str | None = None, device: str = "auto", precision: str | None = None,
                 threshold: float | None = None) -> None:
        saved = read_checkpoint(checkpoint)
        run, own = saved["run"], saved["class_names"]
        words = class_names or own
        if isinstance(words, str):
            if words.endswith((".txt", ".csv")):
                words = Path(words).expanduser().read_text("utf-8-sig")
            words = [word for word in re.split("[,;\n]", words) if word.strip("* ")]
        if not 0 < len(words) < IGNORE:
            raise ValueError(f"--classes: {len(words)} words; give 1 to 254")
        self.names = [" ".join(word.strip("* ").split()) for word in words]
        masks = {name.casefold() for i, name in enumerate(own)
                 if i not in saved["unseen"] or run["setting"] == "supervised"}
        self.unseen = {i for i, name in enumerate(self.names) if name.casefold() not in masks}
        self.seen = [i for i in range(len(words)) if i not in self.unseen]
        both = self.seen and self.unseen and run["setting"] == "inductive"
        self.lower = LOWER if both else 0.0
        self.threshold = THRESHOLDS.get(run["dataset"], 0.0) if threshold is None else threshold
        self.crop, self.precision = run["crop_size"], precision or run["precision"]
        self.toy_clip = PureWindowsPath(clip or saved["clip"]).name == TOY_CLIP.name
        self.device = start_processes(device, self.precision)
        text = saved["text"] if self.names == own else encode_text(
            checkpoint_clip(saved, checkpoint, clip), self.names, saved["templates"])
        self.text = text.to(self.device)  # T (C, D)
        self.model = model_from_checkpoint(saved, checkpoint, clip).to(self.device)

    def segment(self, image: AnyImage, short_side: int | None = None) -> Result:
        """Label a path, a PIL image or an array. short_side: as the model sees it (the crop)."""
        image = read_image(image)
        x = data.test_image(image, short_side or self.crop)
        with autocast(self.device, self.precision):
            scores = slide_inference(self.model, x, self.text, self.crop)
        found = label_map(scores, image.size[::-1], self.seen, self.lower, self.threshold)
        labels, best = (each.cpu().numpy() for each in found)
        return Result(image, labels, best, scores.cpu(), self.names, self.unseen, self.lower)

    def draw_regions(self, image: AnyImage) -> Image.Image:
        """Paper Fig. 2: each region token's class, untrained and trained. Raises ValueError."""
        if not self.model.encoder.region_grid:
            raise ValueError("--regions: this model has no region tokens")
        answers = region_classes(self.model, image := read_image(image), self.text, self.crop)
        return draw.figure([(image, answers, None)], REGIONS[:3], self.names, self.unseen)


def untrained_encoder(visual: nn.Module, regions: int) -> Encoder:
    """Fig. 2: CLIP without training, but with region tokens."""
    encoder = Encoder(visual, num_prompts=0, regions=regions, class_embedding_twice=False)
    encoder.prompt_norm = nn.Identity()
    return encoder.eval()


@torch.no_grad()
def region_classes(model: CLIPRC, image: Image.Image, text: Tensor, crop: int) -> list[np.ndarray]:
    """Paper Fig. 2: the class (row of text) that each region token is closest to, as a label map of
    crop x crop pixels, by untrained CLIP and by the trained encoder."""
    square = np.array(image.resize((crop, crop), Image.Resampling.BILINEAR))
    x, m = normalise(square)[None].to(text.device), model.encoder.region_grid
    encoders = untrained_encoder(model.encoder.visual, m * m).to(text.device), model.encoder
    R = [encoder(x)[2][0] for encoder in encoders]  # (M, D) each
    labels = [(each @ text.T).argmax(1).byte().view(m, m).cpu().numpy() for each in R]
    return [label.repeat(crop // m, 0).repeat(crop // m, 1) for label in labels]


def result_images(model: CLIPRC, dataset: data.Dataset, text: Tensor, crop: int, lower: float,
                  seen: Sequence[int]) -> dict[str, Image.Image]:
    """Paper Fig. 6, results.png, for the first six test images that show an unseen class; and
    Fig. 2, regions.png, for four: a region should find the most frequent label of its cell."""
    names, unseen, visual = dataset.class_names, dataset.unseen, model.encoder.visual
    pairs = [data.read_pair(dataset, i) for i in range(min(60, len(dataset.pairs)))]
    pairs = [pair for pair in pairs if np.isin(pair[1], unseen).any()] or pairs
    least, m, rows = THRESHOLDS.get(dataset.name, 0.0), model.encoder.region_grid, []
    rules = (MaskCLIP(visual),), (model.eval(), seen, lower, least), (model, seen, lower)
    for image, truth in pairs[:6]:
        maps, x = [], data.test_image(image, crop)
        for network, *rule in rules:
            labels, _ = label_map(slide_inference(network, x, text, crop), truth.shape, *rule)
            maps.append(labels.cpu().numpy())
        rows.append((image, [truth, *maps], truth))
    shown = model.name + f" above {least}" * bool(least)
    headers = "image", "ground truth", "MaskCLIP", shown, "right or wrong"
    images, rows = {"results.png": draw.figure(rows, headers, names, unseen)}, []
    for image, truth in pairs[:4] if m else ():
        cells = [np.array_split(part, m, axis=1) for part in np.array_split(truth, m)]
        truth = np.uint8([[np.bincount(cell.ravel()).argmax() for cell in row] for row in cells])
        truth = truth.repeat(crop // m, 0).repeat(crop // m, 1)
        untrained, trained = region_classes(model, image, text, crop)
        rows.append((image, [untrained, trained, trained], truth))
    if rows:
        images["regions.png"] = draw.figure(rows, REGIONS, names, unseen)
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, path = parser.add_argument, lambda text: Path(text).expanduser()
    add("files", metavar="FILE", nargs="*", type=path, help="a checkpoint, if the first ends in "
        ".pt (default: the toy world's), then photos or folders of photos (default: a toy scene)")
    add("--classes", metavar="WORDS", help='"car, tree" or NAMES.txt; default: the training\'s')
    add("--out", type=path, default=Path("predictions"), help="folder of the images (%(default)s); "
        "nothing is overwritten: a second street.png becomes street-2.png")
    add("--save", action="store_true", help="also write NAME_labels.png: numbers from 0, 255 none")
    add("--regions", action="store_true", help="also write NAME_regions.png (Fig. 2)")
    add("--short-side", type=int, help="pixels that the model sees; default: the training's crop")
    add("--threshold", type=float, help="pixels that score less have no label (toy 0.1, else 0)")
    add("--clip", metavar="FILE", help="CLIP's file or name; default: the training's")
    add("--device", default="auto", help="auto, cpu or cuda (%(default)s)")
    add("--precision", choices=PRECISIONS, help="default: the training's")
    args = parser.parse_args()
    given = args.files and args.files[0].suffix in (".pt", ".pth")
    checkpoint, own = args.files.pop(0) if given else TOY_MODEL, args.files or args.classes
    if not args.files:
        scene, _ = toy.draw_scene(np.random.default_rng(4), [toy.CLASSES[i] for i in (11, 16, 4)])
        args.files = [args.out / "photos" / "toy_scene.png"]
        save_image(Image.fromarray(scene), args.files[0])
    photos, failed = {}, []  # each photo once
    for path in args.files:
        inside = [path] if path.is_file() else [
            file for file in sorted(path.glob("[!.]*")) if file.suffix.lower() in SUFFIXES]
        if not inside:
            raise FileNotFoundError(f"{path}: no photo ({', '.join(SUFFIXES)}) or folder of them")
        photos |= {file.resolve(): file for file in inside}
    segmenter = Segmenter(checkpoint, args.classes, clip=args.clip, device=args.device,
                          precision=args.precision, threshold=args.threshold)
    if segmenter.toy_clip and own:
        print("note: the toy world's CLIP knows only rugs; its word on anything else means nothing")
    for path in progress([*photos.values()], "labelling"):
        try:
            image = read_image(path)
        except ValueError as error:  # told at the end; the other photos are still labelled
            failed.append(str(error))
            continue
        result = segmenter.segment(image, args.short_side)
        if (times := min(image.size) / (args.short_side or segmenter.crop)) > 4:
            print(f"{path} is reduced {times:.0f} times; --short-side keeps more of it")
        images = {"": result.draw()}
        if args.save:
            images["_labels"] = draw.palette_png(result.labels, result.names)
        if args.regions:
            images["_regions"] = segmenter.draw_regions(image)
        name, number = path.stem, itertools.count(2)
        while any((args.out / f"{name}{end}.png").exists() for end in ("", "_labels", "_regions")):
            name = f"{path.stem}-{next(number)}"
        for end, drawn in images.items():
            save_image(drawn, args.out / f"{name}{end}.png")
        written = ", ".join(f"{args.out / name}{end}.png" for end in images)
        print(f"{path}, {image.width} x {image.height}: {written}\n{result.table()}\n")
    if failed:
        raise ValueError("; ".join(failed))


if __name__ == "__main__":
    run_script(main)
