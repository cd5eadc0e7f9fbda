"""Your photo, your words (the paper's Fig. 6 and Fig. 2): labels any photograph with any class names.

    python predict.py runs/toy/last.pt runs/toy_world/JPEGImages/val_00000.png          the names of the training
    python predict.py runs/voc/last.pt street.jpg --classes "car, road, traffic light"  words of your own
    python predict.py runs/voc/last.pt photos/ --save --json > shares.json              a folder, label maps, numbers

For photos/street.jpg it writes predictions/street.png, the photo under its labels with a legend of the classes that are
in it, the largest first; names without a mask in the training are red and bear a *. It prints each class's share of the
picture. A photo is used upright, as its EXIF orientation asks; what is transparent in it becomes white.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import data
import draw
from eval import LOWER, UntrainedClip, autocast, cell_answers, run_script, slide_inference, start_processes
from model import CLIPRC, encode_names, model_from_checkpoint, read_checkpoint


def find_photos(paths: Sequence[str]) -> list[Path]:
    """The files among `paths`, and the pictures (JPEG, PNG, WebP) lying in the folders among them, sorted by name.

    FileNotFoundError for what is not there, ValueError for a folder without pictures.
    """
    photos = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in data.IMAGE_SUFFIXES
                            and not file.name.startswith(".") and file.is_file())
            if not inside:
                raise ValueError(f"{path}: no pictures in this folder; they end in {', '.join(data.IMAGE_SUFFIXES)}")
            photos += inside
        elif path.is_file():
            photos.append(path)
        else:
            raise FileNotFoundError(f"{path}: no such picture or folder; correct the path")
    return photos


def read_words(classes: str) -> tuple[list[str], set[int]]:
    """--classes: "car, traffic light" or "@classes.txt" (`data.read_classes`) -> (names, indices of those with a *).

    ValueError for an empty word, one given twice (upper and lower case are one to CLIP), more than 254.
    """
    if classes.startswith("@"):
        names, starred = data.read_classes(Path(classes[1:]))
    else:
        words = [" ".join(word.split()) for word in classes.split(",")]
        names = [word.removeprefix("*").strip() for word in words]
        starred = {i for i, word in enumerate(words) if word.startswith("*")}
    for i, name in enumerate(names):
        if not name or not name.isprintable():
            raise ValueError(f"--classes: {ascii(name)} is no word; give some with commas between, such as 'car, bus'")
        if name.casefold() in (earlier.casefold() for earlier in names[:i]):
            raise ValueError(f"--classes: '{name}' is there twice; give each word once")
    if len(names) > data.REFUSED:
        raise ValueError(f"--classes: {len(names)} words; a label map can hold {data.REFUSED} at most")
    return list(names), set(starred)


@dataclass
class Predictor:
    """Sec. 4.3: a checkpoint that is ready for photos, with the words it shall find."""
    model: CLIPRC
    text: Tensor  # T (C, D), on the model's device
    names: list[str]
    unseen: set[int]  # rows of text that had no mask in the training
    crop: int
    stride: int
    lower: float
    precision: str


def open_predictor(path: str, words: tuple[list[str], set[int]] | None, device: torch.device,
                   args: argparse.Namespace) -> Predictor:
    """Sec. 4.3: a checkpoint's model with the embeddings of `words` (`read_words`), None for the training's own names.

    args: the command line. ValueError where checkpoint, CLIP file and flags do not go together.
    """
    checkpoint = read_checkpoint(path)
    try:
        run, own, text = checkpoint.get("run", {}), list(checkpoint.get("class_names", ())), checkpoint.get("text")
        names, unseen = words or (own, set())
        if own:  # the checkpoint knows better than a *
            trained = {name.casefold() for i, name in enumerate(own)
                       if i not in checkpoint["unseen"] or run.get("setting") == "supervised"}
            unseen = {i for i, name in enumerate(names) if name.casefold() not in trained}
            if text.ndim != 2 or len(text) != len(own) or not text.isfinite().all():
                raise TypeError
        crop = int(run.get("crop_size", 512) if args.crop_size is None else args.crop_size)
        templates = [str(template) for template in args.template or checkpoint.get("templates", data.ONE_TEMPLATE)]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: what it says of its training makes no sense; train again or convert again") from None
    if not names:
        raise ValueError(f"{path} knows no class names, as it was converted; give --classes")

    if names != own or args.template:  # before the model is loaded: a whole CLIP and it would be twice the memory
        text = encode_names(checkpoint, path, names, templates, args.clip)
    model = model_from_checkpoint(checkpoint, path, args.clip)
    stride = max(1, crop * 426 // 512) if args.stride is None else args.stride
    unit = model.encoder.patch_size * max(1, model.encoder.region_grid)  # so that every region has a whole number of patches
    if not 0 < crop <= 2048 or crop % unit:
        raise ValueError(f"--crop-size {crop}: {path} needs a multiple of {unit} pixels, 2048 at most")
    if not 0 < stride <= crop:
        raise ValueError(f"--stride {stride}: must be at least 1 and at most the window's side, {crop}")
    # lowering weighs seen against unseen: where only one kind is asked for, there is nothing to weigh
    weigh = run.get("setting", "inductive") == "inductive" and 0 < len(unseen) < len(names)
    lower = LOWER * weigh if args.lower is None else args.lower
    return Predictor(model.to(device), text.to(device), names, unseen, crop, stride, lower,
                     args.precision or run.get("precision", "float32"))


def label_map(scores: Tensor, size: tuple[int, int], threshold: float | None = None) -> np.ndarray:
    """Sec. 4.3: scores (C, h, w) resized bilinearly to `size` (H, W), argmax -> (H, W) uint8.

    threshold: a pixel whose best score is below it becomes 255. One class is resized at a time, which gives the same
    map: C x H x W scores of a large photo would take gigabytes.
    """
    best = torch.full(size, float("-inf"), device=scores.device)
    label = torch.zeros(size, dtype=torch.uint8, device=scores.device)
    for c, score in enumerate(scores):
        score = F.interpolate(score[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]  # (H, W)
        label[score > best] = c
        torch.maximum(best, score, out=best)
    if threshold is not None:
        label[best < threshold] = data.IGNORE
    return label.cpu().numpy()


def predict(p: Predictor, photo: Image.Image, threshold: float | None = None) -> np.ndarray:
    """Sec. 4.3: the label of every pixel of a photo, (H, W) uint8: rows of p.text, or 255 below the threshold."""
    seen = [i for i in range(len(p.names)) if i not in p.unseen]
    with autocast(p.text.device, p.precision):
        scores = slide_inference(p.model, data.test_image(photo, p.crop), p.text, p.crop, p.stride, p.lower, seen)
    return label_map(scores, photo.size[::-1], threshold)


@torch.no_grad()
def predict_regions(p: Predictor, photo: Image.Image) -> tuple[list[list[str]], Image.Image]:
    """Fig. 2: the names closest to the region tokens R, m rows of m; a picture of them beside untrained CLIP's."""
    m = p.model.encoder.region_grid
    square = data.normalise(np.array(photo.resize((p.crop, p.crop), Image.Resampling.BILINEAR))).to(p.text.device)
    tile = draw.fit_to_look_at(photo, 800, (110 * m, 60 * m))  # room for words in every cell
    encoders = UntrainedClip(p.model.encoder.visual, m * m).to(p.text.device).eval().encoder, p.model.encoder
    answers = [cell_answers(encoder, square, p.text).tolist() for encoder in encoders]
    tiles = [draw.region_names(tile, each, p.names, p.unseen) for each in answers]
    return [[p.names[i] for i in row] for row in answers[1]], draw.grid([tiles], ["CLIP", "CLIP-RC"])


# -------------------------------------------------------------------------------------------------------- run alone


def plan_outputs(photos: list[Path], out: Path, endings: list[str]) -> list[dict[str, Path]]:
    """For every photo the files it will give, {ending: path}; ValueError where one is there already or given twice."""
    base = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
    if not base.is_dir() or not os.access(base, os.W_OK | os.X_OK):
        raise ValueError(f"--out {out}: {base} is no folder that can be written to; name another")
    plan = [{ending: out / f"{photo.stem}{ending}" for ending in endings} for photo in photos]
    source = {}
    for photo, path in ((photo, path) for photo, files in zip(photos, plan) for path in files.values()):
        if os.path.lexists(path):
            raise ValueError(f"{path} exists already; move it away or name another folder with --out")
        if path in source:
            raise ValueError(f"{photo}: {path} would also be {source[path]}'s; give one of them another --out")
        source[path] = photo
    return plan


def main() -> None:
    """Labels photographs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a file that train.py or convert.py wrote")
    add("photos", metavar="PHOTO", nargs="+", help="a picture, or a folder of JPEG, PNG and WebP files")
    add("--classes", help='"car, traffic light", or @FILE, a word a line as in data.py\'s classes.txt; default: the '
        "training's. For a converted checkpoint, which does not know its training's, * before a word marks it unseen")
    add("--template", action="append", help='such as "a photo of a {}"; several are averaged; default: the training\'s')
    add("--out", type=Path, default=Path("predictions"), help="folder for the results, NAME.png for NAME.jpg (default "
        "%(default)s); a file that is there is never overwritten: it is refused before work begins")
    add("--save", action="store_true", help="write NAME_labels.png too, the photo's size: 0 the first class, 255 none")
    add("--compare", metavar="OTHER.pt", help="another checkpoint's labels between the photo and this one's (Fig. 6)")
    add("--regions", action="store_true", help="write NAME_regions.png too: what each region token is called (Fig. 2)")
    add("--json", action="store_true", help="print the shares as JSON, and nothing else")
    add("--threshold", type=float, help="leave a pixel unlabelled whose best score (0 to 1, less --lower) is below it")
    add("--lower", type=float, help="taken off the trained classes' scores; default: 0.1 after inductive training (or "
        "none known) if trained and unseen words are asked for together, else 0")
    add("--clip", help="CLIP's file or published name; default: the one of the training, else ViT-B/16")
    add("--crop-size", type=int, help="side of a window, in pixels; default: the training's, else 512")
    add("--stride", type=int, help="pixels from window to window; default: 426 for windows of 512, in proportion")
    add("--device", default="auto", help="auto, cpu or cuda (default %(default)s)")
    add("--precision", choices=("float32", "bfloat16"), help="default: the training's")
    args = parser.parse_args()

    # everything that can be wrong is found before anything is written
    for flag, value in (("threshold", args.threshold), ("lower", args.lower)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"--{flag} {value}: must be from 0 to 1")
    for template in args.template or ():
        if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
            raise ValueError(f"--template '{template}': must have one {{}}, where the word goes, and no other brace")
    words = None if args.classes is None else read_words(args.classes)
    photos = find_photos(args.photos)
    plan = plan_outputs(photos, args.out, [".png"] + ["_labels.png"] * args.save + ["_regions.png"] * args.regions)
    device = start_processes(args.device)
    p = open_predictor(args.checkpoint, words, device, args)
    if args.regions and not p.model.encoder.region_grid:
        raise ValueError(f"--regions: {args.checkpoint} has no region tokens; leave the flag out")
    other = {args.compare: open_predictor(args.compare, (p.names, p.unseen), device, args)} if args.compare else {}

    results, failed = [], []
    for path, files in zip(tqdm(photos, "labelling", disable=True if len(photos) == 1 else None), plan):
        try:
            photo = data.read_image(path)
        except ValueError as error:  # one damaged photo does not cost the others theirs; it is told at the end
            failed.append(str(error))
            continue
        result = {"photo": str(path), "size": photo.size, "files": [*map(str, files.values())]}
        maps = {name: predict(each, photo, args.threshold) for name, each in (other | {args.checkpoint: p}).items()}
        label = maps[args.checkpoint]
        draw.save(draw.label_figure(photo, maps, p.names, p.unseen), files[".png"])
        if args.save:
            coloured = Image.fromarray(label)
            coloured.putpalette(draw.index_png_palette(len(p.names)))
            draw.save(coloured, files["_labels.png"])
        if args.regions:
            result["regions"], picture = predict_regions(p, photo)
            draw.save(picture, files["_regions.png"])

        counts = (np.bincount(label.ravel(), minlength=256) / label.size).tolist()
        rest = counts[data.IGNORE]
        order = sorted({*np.unique(label).tolist()} - {data.IGNORE}, key=lambda i: -counts[i])
        results.append(result | {"shares": {p.names[i]: counts[i] for i in order}, "unlabelled": rest})
        if not args.json:
            rows = [("* " if i in p.unseen else "  ") + f"{p.names[i]:<26}{counts[i]:>8.1%}" for i in order]
            rows += [f"  {'(unlabelled)':<26}{rest:>8.1%}"] if rest else []
            text = "\n".join([f"{path} ({photo.width}x{photo.height}): {', '.join(result['files'])}",
                              f"{'class (* unseen)':<28}{'share':>8}", *rows, ""])
            tqdm.write(text.encode("utf-8", "replace").decode())  # a file's name may be no text
    if args.json and results:
        print(json.dumps({"checkpoint": args.checkpoint, "classes": p.names,
                          "unseen": [p.names[i] for i in sorted(p.unseen)], "photos": results}, indent=1))
    if failed:
        raise ValueError("; ".join(failed))


if __name__ == "__main__":
    run_script(main)
