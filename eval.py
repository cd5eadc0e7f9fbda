"""Evaluate a model (paper Sec. 4.3): pAcc, mIoU(S), mIoU(U), hIoU and mAcc, all by hand.

    python eval.py runs/voc/last.pt                            the table and every class
    torchrun --nproc-per-node=8 eval.py runs/voc/last.pt       the same, on 8 GPUs
    python eval.py --untrained --dataset voc --data-root ...   MaskCLIP: CLIP without training

With other class names than the training's it is the cross-dataset test of Table 4: the data set's
names are encoded, and nothing is lowered. By hand: docs/walkthrough.md#43-testing
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import data
from model import model_from_checkpoint
from rlb_attention import first_input
from util import draw, toy
from util.checkpoint import checkpoint_clip, read_checkpoint
from util.clip_files import TOY_CLIP, encode_text, load_clip
from util.images import IGNORE, save_image
from util.processes import (PRECISIONS, autocast, own_group, progress, rank, run_script,
                            start_processes, world_size)

LOWER = 0.1  # released code: taken off the seen classes' scores, which inductive training raises
WINDOWS = 8  # of one image in a batch


def window_corners(height: int, width: int, crop: int, stride: int) -> list[tuple[int, int]]:
    """Released code: (top, left) of the windows over an image of at least crop x crop pixels.
    The last window of a row or column is moved back to end at the image's border."""
    tops, lefts = ([min(start, size - crop) for start in range(0, size - crop + stride, stride)]
                   for size in (height, width))
    return [(top, left) for top in tops for left in lefts]


@torch.no_grad()
def slide_inference(model: nn.Module, image: Tensor, text: Tensor, crop: int,
                    stride: int | None = None) -> Tensor:
    """Released code: the score of every class at every pixel of an image of any size.
    The sigmoid scores of crop x crop windows every `stride` pixels (by default 426 for 512),
    averaged where windows overlap. image: (3, H, W) or (1, 3, H, W), normalised. text: T (C, D).
    Returns (C, H, W), float32."""
    height, width = image.shape[-2:]
    image = image.reshape(3, height, width).to(text.device)
    image = F.pad(image, (0, max(crop - width, 0), 0, max(crop - height, 0)))  # as in training
    corners = window_corners(*image.shape[-2:], crop, stride or crop * 426 // 512)
    windows = torch.stack([image[:, y:y + crop, x:x + crop] for y, x in corners])
    total = torch.zeros(len(text), *image.shape[-2:], device=text.device)  # (C, H, W)
    times = torch.zeros_like(total[0])  # (H, W): how many windows cover a pixel
    scores = (score for batch in windows.split(WINDOWS) for score in model(batch, text).sigmoid())
    for (y, x), score in zip(corners, scores):
        total[:, y:y + crop, x:x + crop] += score
        times[y:y + crop, x:x + crop] += 1
    return (total / times)[:, :height, :width]


def label_map(scores: Tensor, size: Sequence[int], seen: Sequence[int] = (), lower: float = 0.0,
              threshold: float = 0.0) -> tuple[Tensor, Tensor]:
    """Released code: each pixel's class, the one with the highest score at the image's size, after
    `lower` is subtracted from the classes `seen`. scores (C, h, w); size (H, W). Returns labels
    (H, W) uint8, 255 where the highest score is below the threshold, and the highest scores."""
    size = tuple(size)
    best = torch.full(size, -torch.inf, device=scores.device)
    labels = torch.zeros(size, dtype=torch.uint8, device=scores.device)
    for c, score in enumerate(scores):  # one by one: all of a large image would take gigabytes
        score = F.interpolate(score[None, None], size, mode="bilinear")[0, 0]  # (H, W)
        score = score - lower if c in seen else score
        labels[score > best] = c
        best = torch.maximum(best, score)
    if threshold:  # 0 is no threshold: a lowered score may be below 0
        labels[best < threshold] = IGNORE
    return labels, best


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
    """Sec. 4.3, Eq. 12: the columns of Tables 1-3 and 5-8 and Table 4's mAcc, in percent; a mean
    over no class is NaN. confusion: (C, C), rows are labels. unseen: classes without a mask."""
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


def evaluate(model: nn.Module, dataset: data.Dataset, text: Tensor, crop: int, stride: int | None,
             lower: float, seen: Sequence[int], workers: int = 0, precision: str = "float32",
             save: Path | None = None, background: float | None = None) -> Tensor:
    """Sec. 4.3: the confusion matrix (C, C) of a data set, on the CPU. Processes share the images.
    text: T (C, D), on the model's device. save: a folder for the predicted labels. background: if
    given, T is (C - 1, D), and a pixel whose best score is below it is of class C - 1."""
    loader = DataLoader(range(rank(), len(dataset.pairs), world_size()), batch_size=None,
                        collate_fn=partial(data.test_sample, dataset, crop), num_workers=workers,
                        worker_init_fn=own_group)
    C, common = len(dataset.class_names), os.path.commonpath([i.parent for i, _ in dataset.pairs])
    confusion = torch.zeros(C, C, dtype=torch.int64, device=text.device)
    was_training = model.training
    model.eval()
    for image, label, index in progress(loader, "evaluating"):
        with autocast(text.device, precision):
            scores = slide_inference(model, image, text, crop, stride)
        prediction, _ = label_map(scores, label.shape, seen, lower, background or 0.0)  # (H, W)
        if background is not None:
            prediction[prediction == IGNORE] = C - 1
        confusion += confusion_matrix(prediction, label.to(text.device), C)
        if save:
            place = save / os.path.relpath(dataset.pairs[index][0], common)  # with its sub-folder
            labels = draw.palette_png(prediction.cpu().numpy(), dataset.class_names)
            save_image(labels, place.with_suffix(".png"))
    model.train(was_training)
    if dist.is_initialized():
        dist.all_reduce(confusion)
    return confusion.cpu()


def paper_table(rows: dict[str, dict[str, float]]) -> str:
    """Table 1's columns, one line for each method; "-" for a mean over no class."""
    lines = [f"{'':<24}{'pAcc':>8}{'hIoU':>8}{'mIoU(S)':>9}{'mIoU(U)':>9}"]
    for name, metrics in rows.items():
        cells = (f"{metrics[key]:.1f}".replace("nan", "-")
                 for key in ("pAcc", "hIoU", "mIoU_S", "mIoU_U"))
        lines.append("{:<24}{:>8}{:>8}{:>9}{:>9}".format(name, *cells))
    return "\n".join(lines)


def class_table(confusion: Tensor, names: Sequence[str], unseen: Sequence[int]) -> str:
    """Sec. 4.3: each class's IoU, accuracy and share of the labelled pixels, in percent, and the
    three confusions that cost the most pixels."""
    labelled = confusion.sum(1).double()
    lines = [f"{'class (* unseen)':<28}{'IoU':>8}{'Acc':>8}{'pixels':>9}"]
    columns = names, class_iou(confusion), confusion.diagonal() / labelled
    for i, (name, *figures) in enumerate(zip(*columns)):
        IoU, Acc = ("-" if figure.isnan() else f"{100 * figure:.1f}" for figure in figures)
        share, star = labelled[i] / labelled.sum(), "* " if i in unseen else "  "
        name = f"{i} " * (draw.plain(names, i) == str(i)) + name  # figures show the number
        lines.append(f"{star}{name:<26}{IoU:>8}{Acc:>8}{share:>9.1%}")
    wrong = confusion.double().fill_diagonal_(0).flatten() / confusion.sum()
    return "\n".join(lines) + "\nmost often mistaken, in shares of all pixels: " + ", ".join(
        f"{names[i // len(names)]} is called {names[i % len(names)]} {wrong[i]:.1%}"
        for i in wrong.argsort(descending=True)[:3])


class MaskCLIP(nn.Module):
    """A baseline without training (Zhou et al. 2022): CLIP's patches against the class names.

    CLIP's last attention layer mixes the whole image into each token. MaskCLIP skips that mixing:
    each patch keeps only its own value vector, so its features stay local. Called as `CLIPRC` is;
    its logits are cosines."""
    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual, self.patch_size = visual, visual.conv1.kernel_size[0]

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """images (B, 3, H, W), text T (C, D). Returns logits (B, C, H, W)."""
        visual, B = self.visual, len(images)
        grid = tuple(side // self.patch_size for side in images.shape[-2:])  # (h, w)
        none = images.new_zeros(B, 0, visual.conv1.out_channels)
        X = first_input(visual, images, none, none[0], twice=False)  # (B, 1 + N, D_v)
        *blocks, last = visual.transformer.resblocks
        for block in blocks:
            X = block(X.transpose(0, 1)).transpose(0, 1)  # OpenAI's blocks take (E, B, D_v)
        QKV = F.linear(last.ln_1(X), last.attn.in_proj_weight, last.attn.in_proj_bias)
        I = last.attn.out_proj(QKV.chunk(3, dim=-1)[2])[:, 1:]  # (B, N, D_v)
        I = F.normalize(visual.ln_post(I) @ visual.proj, dim=-1)  # (B, N, D)
        logits = (text @ I.transpose(1, 2)).unflatten(-1, grid).float()  # (B, C, h, w)
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", nargs="?", help="a file that train.py or tools.convert wrote")
    add("--untrained", action="store_true", help="MaskCLIP instead of a checkpoint")
    add("--dataset", choices=data.DATASETS, help="default: the training's")
    add("--data-root", type=os.path.expanduser, help="its folder; default: the training's")
    add("--clip", type=os.path.expanduser, help="CLIP's file or name; default: the training's")
    add("--lower", type=float, help="from the seen classes' scores (0.1 after inductive training)")
    add("--unseen-names", choices=("own", "permuted", "random"), default="own", help="a model that "
        "finds the unseen classes by their names must fail with each other's or random embeddings")
    add("--background", type=float, help="one more class, counted among the seen: where the best "
        "score is below this, after lowering; VOC then has its 21 classes")
    add("--save", type=Path, help="a new folder for the predicted labels, palette PNGs")
    add("--device", default="auto", help="auto, cpu or cuda; default: auto")
    add("--precision", choices=PRECISIONS, help="default: the training's")
    add("--workers", type=int, default=2, help="processes that read images; default: 2")
    args = parser.parse_args()
    if bool(args.checkpoint) == args.untrained or args.save and args.save.exists():
        parser.error("give a checkpoint or --untrained; --save needs a new folder")
    device = start_processes(args.device, args.precision or "tf32")
    checkpoint = {} if args.untrained else read_checkpoint(args.checkpoint)
    run = checkpoint.get("run", {})
    name = args.dataset or run.get("dataset", "toy")
    root = args.data_root or (toy.draw_world() if name == "toy" else
                              run.get("data_root") if name == run.get("dataset") else None)
    if not root:
        raise ValueError(f"--data-root: where is {name}?")
    dataset = data.open_dataset(name, root, "val")
    names, unseen = dataset.class_names, list(dataset.unseen)
    lower, why = 0.0, "no training" if args.untrained else "other class names than in training"
    if args.untrained:
        clip_model = load_clip(args.clip or (TOY_CLIP if name == "toy" else "ViT-B/16"))
        model = MaskCLIP(clip_model.visual)
    else:
        clip_model = checkpoint_clip(checkpoint, args.checkpoint, args.clip)
        model = model_from_checkpoint(checkpoint, args.checkpoint, args.clip)
    known, wanted = ([*map(str.casefold, n)] for n in (checkpoint.get("class_names", ()), names))
    if sorted(known) == sorted(wanted):  # the training's classes, in any order
        order = [known.index(each) for each in wanted]
        text = checkpoint["text"][order]
        unseen = [i for i, k in enumerate(order) if k in checkpoint["unseen"]]
        lower, why = LOWER * (run["setting"] == "inductive"), f"{run['setting']} training"
    else:
        text = encode_text(clip_model, names, dataset.templates)
    if args.lower is not None:
        lower, why = args.lower, "--lower"
    if args.unseen_names == "permuted":
        text[unseen] = text[unseen].roll(1, dims=0)
    elif args.unseen_names == "random":
        random = torch.Generator().manual_seed(0)
        text[unseen] = F.normalize(torch.randn(text[unseen].shape, generator=random), dim=-1)
    if args.background is not None:
        mapping = dataset.mapping.copy()
        mapping[:IGNORE][mapping[:IGNORE] == IGNORE] = len(names)
        dataset = replace(dataset, class_names=(*names, "background"), mapping=mapping)
    crop = run.get("crop_size") or (toy.SIZE if name == "toy" else 512)
    seen = [i for i in range(len(names)) if i not in unseen]
    confusion = evaluate(model.to(device), dataset, text.to(device), crop, None, lower, seen,
                         args.workers, args.precision or run.get("precision", "tf32"), args.save,
                         args.background)
    if rank() == 0:
        metrics = zero_shot_metrics(confusion, unseen)
        print(f"{class_table(confusion, dataset.class_names, unseen)}\n\n{name}, "
              f"{len(dataset.pairs):,} images; seen classes lowered by {lower:g} ({why})"
              f"; unseen names: {args.unseen_names}\n"
              + paper_table({"MaskCLIP, untrained" if args.untrained else model.name: metrics})
              + f"\nTable 4: mIoU {100 * class_iou(confusion).nanmean():.1f}, mAcc "
              f"{metrics['mAcc']:.1f}")


if __name__ == "__main__":
    run_script(main)
