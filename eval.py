"""Evaluate a model (paper Sec. 4.3): pAcc, mIoU(S), mIoU(U), hIoU and mAcc, all by hand.

    python eval.py runs/voc/last.pt                            the table and every class
    torchrun --nproc-per-node=8 eval.py runs/voc/last.pt       the same, on 8 GPUs
    python eval.py --untrained --dataset voc --data-root ...   MaskCLIP: CLIP without training

With another --dataset than the checkpoint's it is the cross-dataset test of Table 4: that data
set's class names are encoded, and nothing is lowered.
Windows, the 0.1 and hIoU by hand: docs/walkthrough.md#43-testing
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import data
from model import CLIPRC, model_from_checkpoint
from rlb_attention import Encoder, first_input
from util import draw, toy
from util.checkpoint import encode_names, read_checkpoint
from util.clip_files import TOY_CLIP, encode_text, load_clip
from util.flags import COUNT, POSITIVE, REAL
from util.images import IGNORE, normalise, save_image
from util.processes import (PRECISIONS, Progress, autocast, rank, run_script, start_processes,
                            world_size)

LOWER = 0.1  # released code: inductive training knows the seen classes only, and is biased to them
WINDOWS = 8  # of one image in a batch
# Images leave a pixel without a label where its best score is below this. The toy world's floor has
# no name. Elsewhere every pixel has a label, and no table but --background's knows a threshold.
THRESHOLDS = {"toy": 0.1}


def window_corners(height: int, width: int, crop: int, stride: int) -> list[tuple[int, int]]:
    """Released code: (top, left) of the windows over an image of at least crop x crop pixels.
    The last window of a row or column is moved back to end at the image's border."""
    tops, lefts = ([min(start, size - crop) for start in range(0, size - crop + stride, stride)]
                   for size in (height, width))
    return [(top, left) for top in tops for left in lefts]


@torch.no_grad()
def slide_inference(model: nn.Module, image: Tensor, text: Tensor, crop: int, stride: int,
                    lower: float = LOWER, seen: Sequence[int] = ()) -> Tensor:
    """Released code: the score of every class at every pixel of an image of any size.
    The sigmoid scores of crop x crop windows every `stride` pixels, averaged where windows
    overlap; those of the classes `seen` (rows of text) are lowered by `lower`.
    image: (3, H, W) or (1, 3, H, W), normalised. text: T (C, D). Returns (C, H, W), float32."""
    height, width = image.shape[-2:]
    image = image.reshape(3, height, width).to(text.device)
    image = F.pad(image, (0, max(crop - width, 0), 0, max(crop - height, 0)))  # as in training
    corners = window_corners(*image.shape[-2:], crop, stride)
    windows = torch.stack([image[:, y:y + crop, x:x + crop] for y, x in corners])
    total = torch.zeros(len(text), *image.shape[-2:], device=text.device)  # (C, H, W)
    times = torch.zeros_like(total[0])  # (H, W): how many windows cover a pixel
    scores = (score for batch in windows.split(WINDOWS) for score in model(batch, text).sigmoid())
    for (y, x), score in zip(corners, scores):
        total[:, y:y + crop, x:x + crop] += score
        times[y:y + crop, x:x + crop] += 1
    mean = total / times
    mean[list(seen)] -= lower
    return mean[:, :height, :width]


def confusion_matrix(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Sec. 4.3: how many pixels of each class were given each class; label 255 does not count.
    prediction, label: integers of one shape. Returns (C, C), int64: row = label, column =
    prediction. Raises ValueError for a number that is not a class."""
    counted = label != IGNORE
    label, prediction = label[counted].long(), prediction[counted].long()
    for numbers in (label, prediction):
        if numbers.numel() and not 0 <= numbers.min() <= numbers.max() < num_classes:
            raise ValueError(f"a label or prediction is neither one of {num_classes} classes "
                             f"nor {IGNORE}")
    pairs = label * num_classes + prediction
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)  # (C, C)


def class_iou(confusion: Tensor) -> Tensor:
    """Sec. 4.3: intersection over union of each class, (C,); NaN for a class that never occurs."""
    confusion = confusion.double()
    intersection = confusion.diagonal()
    return intersection / (confusion.sum(0) + confusion.sum(1) - intersection)


def zero_shot_metrics(confusion: Tensor, unseen: Sequence[int]) -> dict[str, float]:
    """Sec. 4.3, Eq. 12: the columns of Tables 1-8, in percent; a mean over no class is NaN.
    confusion: (C, C), rows are labels. unseen: the classes without a mask in training."""
    correct, labelled = confusion.diagonal().double(), confusion.sum(1).double()  # (C)
    iou = 100 * class_iou(confusion)  # (C)
    is_unseen = torch.zeros(len(iou), dtype=torch.bool)
    is_unseen[list(unseen)] = True
    mIoU_S, mIoU_U = iou[~is_unseen].nanmean().item(), iou[is_unseen].nanmean().item()
    hIoU = 0.0
    if mIoU_S + mIoU_U != 0:
        hIoU = 2 * mIoU_S * mIoU_U / (mIoU_S + mIoU_U)  # Eq. 12
    return {"pAcc": (100 * correct.sum() / labelled.sum()).item(), "mIoU_S": mIoU_S,
            "mIoU_U": mIoU_U, "hIoU": hIoU, "mAcc": (100 * correct / labelled).nanmean().item()}


def evaluate(model: nn.Module, dataset: data.Dataset, text: Tensor, crop: int, stride: int,
             lower: float, seen: Sequence[int], workers: int = 0, precision: str = "float32",
             save: Path | None = None, background: float | None = None,
             right: dict[int, float] | None = None) -> Tensor:
    """Sec. 4.3: the confusion matrix (C, C) of a data set, on the CPU. Processes share the images.
    text: T (C, D), on the model's device. save: a folder for the predicted labels, palette PNGs.
    background: where the best score is below it, the prediction is the class after text's.
    right: where to put each image's share of right pixels."""
    samples = data.TestSet(dataset, crop)
    mine = range(rank(), len(samples), world_size())
    loader = DataLoader(Subset(samples, mine), batch_size=None, num_workers=workers,
                        worker_init_fn=data.leave_signals)
    C, common = len(dataset.class_names), os.path.commonpath([i.parent for i, _ in dataset.pairs])
    confusion = torch.zeros(C, C, dtype=torch.int64, device=text.device)
    was_training = model.training
    model.eval()
    for image, label, index in Progress(loader, "evaluating", leave=False):
        with autocast(text.device, precision):
            scores = slide_inference(model, image, text, crop, stride, lower, seen)
        scores = F.interpolate(scores[None], label.shape, mode="bilinear", align_corners=False)[0]
        best, prediction = scores.max(0)  # (H, W) each
        if background is not None:
            prediction[best < background] = C - 1
        this = confusion_matrix(prediction, label.to(text.device), C)
        confusion += this
        if right is not None:
            right[index] = (this.diagonal().sum() / this.sum()).nan_to_num(1.0).item()
        if save:
            image = Image.fromarray(prediction.byte().cpu().numpy())
            image.putpalette(draw.index_png_palette(dataset.class_names))
            place = os.path.relpath(dataset.pairs[index][0], common)  # with its sub-folder
            save_image(image, (save / place).with_suffix(".png"))
    model.train(was_training)
    if dist.is_initialized():
        dist.all_reduce(confusion)
    return confusion.cpu()


def paper_table(rows: dict[str, dict[str, float]]) -> str:
    """Table 1's columns, one line for each method; "-" for a mean over no class."""
    lines = [f"{'':<24}{'pAcc':>8}{'hIoU':>8}{'mIoU(S)':>9}{'mIoU(U)':>9}"]
    for name, metrics in rows.items():
        cells = ("-" if np.isnan(metrics[key]) else f"{metrics[key]:.1f}"
                 for key in ("pAcc", "hIoU", "mIoU_S", "mIoU_U"))
        lines.append("{:<24}{:>8}{:>8}{:>9}{:>9}".format(name, *cells))
    return "\n".join(lines)


def method_name(model: CLIPRC) -> str:
    """Table 5: what a model is called, with or without RAM and region tokens."""
    return "CLIP-RC" if model.ram else "ZegCLIP" + " with RLB" * bool(model.encoder.region_grid)


def class_table(confusion: Tensor, names: Sequence[str], unseen: Sequence[int]) -> str:
    """Sec. 4.3: each class's IoU, accuracy and share of the labelled pixels, in percent."""
    labelled = confusion.sum(1).double()
    new = toy.new_attributes(names, unseen) if set(names) <= set(toy.CLASS_NAMES) else ()
    lines = [f"{'class (* unseen)':<28}{'IoU':>8}{'Acc':>8}{'pixels':>9}"]
    for i, (name, *figures) in enumerate(zip(
            names, class_iou(confusion), confusion.diagonal() / labelled)):
        IoU, Acc = ("-" if figure.isnan() else f"{100 * figure:.1f}" for figure in figures)
        mark = "**" if i in new else "* " if i in unseen else "  "
        lines.append(f"{mark + name:<28}{IoU:>8}{Acc:>8}{labelled[i] / labelled.sum():>9.1%}")
    if new:
        lines.append("** unseen, and of a colour or pattern that no training mask shows")
    return "\n".join(lines)


def mistakes_line(confusion: Tensor, names: Sequence[str]) -> str:
    """The three confusions that cost the most pixels, by name."""
    shares = confusion.double().fill_diagonal_(0).flatten() / confusion.sum()
    return "most often mistaken, in shares of all pixels: " + ", ".join(
        f"{names[i // len(names)]} for {names[i % len(names)]} {shares[i]:.1%}"
        for i in shares.argsort(descending=True)[:3])


class MaskCLIP(nn.Module):
    """The untrained baseline (Zhou et al. 2022): CLIP's patches against the class names.

    CLIP's last attention layer gathers the whole image in each token. MaskCLIP leaves the
    gathering out: each patch keeps its own value, so it still knows what it shows itself.
    visual: OpenAI's `VisionTransformer`. Called as `CLIPRC` is; its logits are cosines."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual, self.patch_size = visual, visual.conv1.kernel_size[0]

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """images (B, 3, H, W), text T (C, D). Returns logits (B, C, H, W)."""
        visual, B = self.visual, len(images)
        grid = tuple(side // self.patch_size for side in images.shape[-2:])  # (h, w)
        D_v = visual.conv1.out_channels
        no_tokens = images.new_zeros(B, 0, D_v)
        X = first_input(visual, images, no_tokens, no_tokens[0], twice=False)  # (B, 1 + N, D_v)
        *blocks, last = visual.transformer.resblocks
        for block in blocks:
            X = block(X.transpose(0, 1)).transpose(0, 1)  # OpenAI's blocks take (E, B, D_v)
        attention, X = last.attn, last.ln_1(X)
        QKV = F.linear(X, attention.in_proj_weight, attention.in_proj_bias)  # (B, 1 + N, 3 D_v)
        I = attention.out_proj(QKV.chunk(3, dim=-1)[2])[:, 1:]  # (B, N, D_v)
        I = F.normalize(visual.ln_post(I) @ visual.proj, dim=-1)  # (B, N, D)
        logits = (text @ I.transpose(1, 2)).unflatten(-1, grid).float()  # (B, C, h, w)
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)


def untrained_encoder(visual: nn.Module, regions: int) -> Encoder:
    """Fig. 2: CLIP without training, but with region tokens."""
    encoder = Encoder(visual, num_prompts=0, regions=regions, class_embedding_twice=False)
    encoder.prompt_norm = nn.Identity()
    return encoder.eval()


@torch.no_grad()
def region_classes(encoder: Encoder, image: Image.Image, text: Tensor, crop: int) -> np.ndarray:
    """Paper Fig. 2: the class that each region token is closest to, (m, m) rows of text (C, D)."""
    square = np.array(image.resize((crop, crop), Image.Resampling.BILINEAR))
    _, _, R = encoder(normalise(square)[None].to(text.device))  # (1, M, D)
    return (R[0] @ text.T).argmax(1).unflatten(0, (encoder.region_grid, -1)).cpu().numpy()  # (m, m)


def result_images(model: CLIPRC, untrained: tuple[MaskCLIP, Encoder | None], dataset: data.Dataset,
                  text: Tensor, crop: int, stride: int, lower: float, seen: Sequence[int],
                  worst: Sequence[int] = (), count: int = 6) -> dict[str, Image.Image]:
    """Paper Fig. 6 and Fig. 2, drawn for those of the first 60 images that show an unseen class.
    untrained: MaskCLIP, and CLIP with region tokens or None. worst: images to draw instead.
    Returns results.png: the first `count` images, every pixel that scores at least the data set's
    THRESHOLD under its class's colour, and which labelled pixels are right without a threshold;
    regions.png: the first two images where a region of untrained CLIP is wrong. A region should
    find the most frequent label of its cell."""
    names, unseen, side = dataset.class_names, set(dataset.unseen), 316
    threshold = THRESHOLDS.get(dataset.name, 0.0)
    pairs = [data.read_pair(dataset, i) for i in worst or range(min(60, len(dataset.pairs)))]
    if not worst:
        pairs = [pair for pair in pairs if np.isin(pair[1], [*unseen]).any()] or pairs
    model.eval()
    rows, written, not_written = [], set(), set()
    for image, label in pairs[:count]:
        labels = [label]
        for network, penalty, least in ((untrained[0], 0.0, 0.0), (model, lower, threshold)):
            scores = slide_inference(network, data.test_image(image, crop), text, crop, stride,
                                     penalty, seen)
            best, prediction = F.interpolate(scores[None], label.shape, mode="bilinear")[0].max(0)
            prediction = prediction.cpu().numpy().astype(np.uint8)  # (H, W)
            none = (best < least).cpu().numpy() if least else False  # 0: lowered scores may be less
            labels.append(np.where(none, np.uint8(IGNORE), prediction))
        row = [draw.fit(image, side)]
        for shown in labels:
            no_room = set()
            row.append(draw.label_image(image, shown, names, unseen, side, no_room))
            written |= set(np.unique(shown).tolist()) - no_room
            not_written |= no_room
        rows.append([*row, draw.right_and_wrong(image, prediction, label, side)])
    verdicts = [*zip(draw.VERDICTS, ("right", "wrong"))]
    legend = [(draw.fills(names)[i], names[i] + "*" * (i in unseen))
              for i in sorted(not_written - written)]
    method = method_name(model)
    headers = ["image", "ground truth", "MaskCLIP", method, "right or wrong"]
    note = draw.NOTE
    if threshold:
        headers[3] += f" above {threshold}"
        note += f"; pixels that score less than {threshold} are left as they are"
    images = {"results.png": draw.grid(rows, headers, verdicts + legend, note)}

    rows, right, m = [], [], model.encoder.region_grid  # right: of the regions that are shown
    for image, label in pairs if m and not worst else ():
        cells = [np.array_split(part, m, axis=1) for part in np.array_split(label, m)]
        truth = np.array([[np.bincount(cell.ravel()).argmax() for cell in row] for row in cells])
        both = [region_classes(each, image, text, crop) for each in (untrained[1], model.encoder)]
        verdict = [(answers == truth)[truth != IGNORE] for answers in both]
        if not verdict[0].all() and len(rows) < 2:
            right.append(verdict)
            rows.append([draw.region_names(image, answers, names, unseen, 780, truth)
                         for answers in both])
    if rows:
        shown = [np.concatenate(each) for each in zip(*right)]
        headers = [f"regions of {name}: {each.sum()} of {len(each)} right here"
                   for name, each in zip(("untrained CLIP", method), shown)]
        images["regions.png"] = draw.grid(rows, headers, verdicts, draw.NOTE)
    return images


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", nargs="?", help="a file that train.py or tools.convert wrote")
    add("--untrained", action="store_true", help="MaskCLIP instead of a checkpoint")
    add("--dataset", choices=data.DATASETS, help="default: the training's")
    add("--data-root", help="the data set's folder; default: the training's")
    add("--split", choices=("train", "val"), default="val", help="default: %(default)s")
    add("--clip", help="CLIP's file, folder or name; default: the training's, or ViT-B/16")
    add("--crop-size", **POSITIVE, help="side of a window, and the short side to which an image is "
        "scaled, in pixels; default: the training's, or 512")
    add("--stride", **POSITIVE, help="pixels from window to window; default: 426 of 512")
    add("--lower", **REAL, help="how much the seen classes' scores are lowered; default: 0.1 "
        "after inductive training and for a converted checkpoint, else 0")
    add("--unseen-names", choices=("own", "permuted", "random"), default="own",
        help="replace the unseen classes' text embeddings by each other's, or by random unit "
             "vectors: a model that finds these classes by their names must then fail")
    add("--background", **REAL, help="a pixel whose best score, after the lowering, is below "
        "this is background: one class more, counted among the seen; VOC then has its 21 classes")
    add("--save", type=Path, help="a new folder for the predicted labels, palette PNGs")
    add("--device", default="auto", help="auto, cpu or cuda; default: %(default)s")
    add("--precision", choices=PRECISIONS, help="default: the training's")
    add("--workers", **COUNT, default=2, help="processes that read images (%(default)s)")
    args = parser.parse_args()
    if bool(args.checkpoint) == args.untrained:
        parser.error("give a checkpoint or --untrained")
    if args.save and os.path.lexists(args.save):
        parser.error(f"--save {args.save} exists already; give a new folder")
    return args


def main() -> None:
    """Evaluate a checkpoint, or MaskCLIP."""
    args = parse_arguments()
    device = start_processes(args.device, args.precision or "tf32")
    checkpoint = {} if args.untrained else read_checkpoint(args.checkpoint)
    run = checkpoint.get("run", {})  # train.Settings; a converted checkpoint has none
    name, root = args.dataset or run.get("dataset"), args.data_root
    if root is None and name == run.get("dataset"):
        root = run.get("data_root")
    if name == "toy" and (root is None or not Path(root).exists()):
        root = toy.default_world()
    if not name or not root:
        raise ValueError("--dataset, --data-root: say which data set to evaluate and where it is")
    dataset = data.open_dataset(name, root, args.split)
    same_names = tuple(checkpoint.get("class_names", ())) == dataset.class_names
    if same_names:
        dataset = replace(dataset, unseen=tuple(checkpoint["unseen"]))  # --unseen in training
    unseen = list(dataset.unseen)
    seen = [i for i in range(len(dataset.class_names)) if i not in unseen]

    lower, why = 0.0, "no training"
    if args.untrained:
        clip_model = load_clip(args.clip or (TOY_CLIP if name == "toy" else "ViT-B/16"))
        text = encode_text(clip_model, dataset.class_names, dataset.templates)
        model = MaskCLIP(clip_model.visual)
    else:
        model = model_from_checkpoint(checkpoint, args.checkpoint, args.clip)
        if same_names:
            text, why = checkpoint["text"], f"{run['setting']} training on these class names"
        else:
            text = encode_names(checkpoint, args.checkpoint, dataset.class_names,
                                dataset.templates, args.clip)
            why = "other class names than in training" if run else "converted checkpoint"
        if run.get("setting", "inductive") == "inductive" and (same_names or not run):
            lower = LOWER
    if args.lower is not None:
        lower, why = args.lower, "--lower"
    if args.unseen_names == "permuted":
        text[unseen] = text[unseen].roll(1, dims=0)
    elif args.unseen_names == "random":
        generator = torch.Generator().manual_seed(0)
        text[unseen] = F.normalize(torch.randn(text[unseen].shape, generator=generator), dim=-1)

    if args.background is not None:
        mapping = dataset.mapping.copy()
        mapping[:IGNORE][mapping[:IGNORE] == IGNORE] = len(dataset.class_names)
        dataset = replace(dataset, class_names=(*dataset.class_names, "background"),
                          mapping=mapping)
    crop = args.crop_size or run.get("crop_size") or (toy.SIZE if name == "toy" else 512)
    stride = args.stride or crop * 426 // 512
    if stride > crop:
        raise ValueError(f"--stride {stride}: windows of {crop} pixels would leave gaps")
    confusion = evaluate(model.to(device), dataset, text.to(device), crop, stride, lower, seen,
                         args.workers, args.precision or run.get("precision", "tf32"), args.save,
                         args.background)
    if rank() == 0:
        metrics = zero_shot_metrics(confusion, unseen)
        print(class_table(confusion, dataset.class_names, unseen), end="\n\n")
        print(f"{name} {args.split}, {len(dataset.pairs):,} images; seen classes lowered by "
              f"{lower:g} ({why})" + f"; {dataset.note}" * bool(dataset.note)
              + f"; unseen names {args.unseen_names}" * (args.unseen_names != "own"))
        method = "MaskCLIP, untrained" if args.untrained else method_name(model)
        print(paper_table({method: metrics}))
        print(f"mIoU {100 * class_iou(confusion).nanmean():.1f}   mAcc {metrics['mAcc']:.1f}   "
              f"(Table 4's columns)\n{mistakes_line(confusion, dataset.class_names)}")


if __name__ == "__main__":
    run_script(main)
