"""The paper's Sec. 4.3: sliding windows, the confusion matrix, and pAcc, mIoU(S), mIoU(U), hIoU, mAcc, all by hand.

    python eval.py runs/voc/last.pt --dataset voc --data-root VOCdevkit/VOC2012        the paper's row and every class
    torchrun --nproc-per-node=8 eval.py runs/voc/last.pt --dataset voc --data-root ... the same, images shared out

Another data set than the checkpoint's is the cross-data-set test of Table 4: its names are encoded, nothing is lowered.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import data
import draw
import toy
from model import CLIPRC, encode_names, model_from_checkpoint, read_checkpoint
from rlb_attention import Encoder

LOWER = 0.1  # taken off the seen classes' scores after inductive training, which has only ever seen those
WINDOWS_AT_ONCE, IMAGES_IN_BLOCK = 8, 32


# ---------------------------------------------------------------------------------------------------- inference


def window_corners(height: int, width: int, crop: int, stride: int) -> list[tuple[int, int]]:
    """Sec. 4.3: (top, left) of the windows that cover an image at least `crop` a side; the last ones end at its border."""
    tops, lefts = ([min(start, size - crop) for start in range(0, size - crop + stride, stride)]
                   for size in (height, width))
    return [(top, left) for top in tops for left in lefts]


@torch.no_grad()
def slide_images(model: CLIPRC, images: Iterable[Tensor], text: Tensor, crop: int, stride: int, lower: float = LOWER,
                 seen: Sequence[int] = ()) -> Iterator[Tensor]:
    """Sec. 4.3: `slide_inference` over many images; windows of several images share a batch. Yields them in order."""
    waiting: list[tuple[Tensor, int, int, list]] = []  # (window, top, left, its image's state)
    unfinished: list[list] = []  # per image: [scores summed, times summed, windows still to come, (height, width)]
    penalty = torch.zeros(len(text), device=text.device)
    penalty[list(seen)] = lower

    def run_batch() -> None:
        batch, waiting[:] = waiting[:WINDOWS_AT_ONCE], waiting[WINDOWS_AT_ONCE:]
        scores = model(torch.stack([window for window, *_ in batch]), text).sigmoid_()  # (windows, C, crop, crop)
        for score, (_, top, left, state) in zip(scores, batch):
            state[0][:, top:top + crop, left:left + crop] += score
            state[1][top:top + crop, left:left + crop] += 1
            state[2] -= 1

    def finished() -> Iterator[Tensor]:
        while unfinished and unfinished[0][2] == 0:
            total, times, _, (height, width) = unfinished.pop(0)
            yield total.div_(times).sub_(penalty[:, None, None])[:, :height, :width]

    for image in images:
        image = image.to(text.device)
        height, width = image.shape[-2:]
        image = F.pad(image, (0, max(crop - width, 0), 0, max(crop - height, 0)))  # as training pads a small picture
        padded = image.shape[-2:]
        corners = window_corners(*padded, crop, stride)
        state = [torch.zeros(len(text), *padded, device=text.device), torch.zeros(padded, device=text.device),
                 len(corners), (height, width)]
        unfinished.append(state)
        waiting += [(image[:, top:top + crop, left:left + crop], top, left, state) for top, left in corners]
        while len(waiting) >= WINDOWS_AT_ONCE:
            run_batch()
        yield from finished()
    while waiting:
        run_batch()
    yield from finished()


def slide_inference(model: CLIPRC, image: Tensor, text: Tensor, crop: int, stride: int, lower: float = LOWER,
                    seen: Sequence[int] = ()) -> Tensor:
    """Sec. 4.3: the score of every class at every pixel of an image of any size.

    Sigmoid scores of crop x crop windows every `stride` pixels, averaged where windows overlap; those of the classes
    `seen` (rows of text) are lowered by `lower`. image (3, H, W) or (1, 3, H, W), normalised; text (C, D).
    Returns (C, H, W), float32. The model should be in eval mode.
    """
    return next(slide_images(model, [image.reshape(image.shape[-3:])], text, crop, stride, lower, seen))


class UntrainedClip(torch.nn.Module):
    """Fig. 2 (left) and the floor of the small world's table: CLIP as it is, patch features (and region tokens) against
    the names.

    visual: OpenAI's `clip.model.VisionTransformer`. Called as `CLIPRC` is; its logits are cosines.
    """

    def __init__(self, visual: torch.nn.Module, regions: int = 0) -> None:
        super().__init__()
        self.encoder = Encoder(visual, num_prompts=0, regions=regions, class_embedding_twice=False)
        self.encoder.prompt_norm = torch.nn.Identity()

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """images (B, 3, H, W), text (C, D) to logits (B, C, H, W)."""
        _, I, _ = self.encoder(images)
        logits = (text @ I.transpose(1, 2)).unflatten(-1, (images.shape[-2] // self.encoder.patch_size, -1))  # (B, C, h, w)
        return F.interpolate(logits.float(), size=images.shape[-2:], mode="bilinear", align_corners=False)


# ------------------------------------------------------------------------------------------------------ metrics


def confusion_matrix(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Sec. 4.3: how many pixels of each class were given each class; pixels labelled 255 are left out.

    prediction, label: integers of one shape. Returns (C, C), int64: row = label, column = prediction.
    Raises ValueError for a label that is neither a class nor 255.
    """
    # One count over all pairs, label 255 in a row of its own: no pixel has to be picked out first.
    pairs = label.flatten().to(torch.int32) * num_classes + prediction.flatten().to(torch.int32)
    if label.numel() and label.min() < 0:
        raise ValueError(f"a label is negative; it must be one of {num_classes} classes or 255")
    counts = torch.bincount(pairs, minlength=256 * num_classes).unflatten(0, (-1, num_classes))  # (256, C)
    if counts[num_classes:255].any():
        raise ValueError(f"a label is neither one of {num_classes} classes nor 255")
    return counts[:num_classes].clone()


def class_iou(confusion: Tensor) -> Tensor:
    """Sec. 4.3: intersection over union of each class, (C,), float64; NaN for one in neither labels nor predictions."""
    confusion = confusion.double()
    hit = confusion.diagonal()
    return hit / (confusion.sum(0) + confusion.sum(1) - hit)


def zero_shot_metrics(confusion: Tensor, unseen: Sequence[int]) -> dict[str, float]:
    """Sec. 4.3, Eq. 12: the columns of Tables 1-8, in percent.

    confusion (C, C), rows = labels. unseen: the classes without a mask in training. A mean over no class is NaN.
    """
    iou, hit, labelled = class_iou(confusion), confusion.diagonal().double(), confusion.sum(1).double()
    is_unseen = torch.zeros(len(iou), dtype=torch.bool)
    is_unseen[list(unseen)] = True
    mIoU_S, mIoU_U = (iou[rows].nanmean().item() for rows in (~is_unseen, is_unseen))
    hIoU = 2 * mIoU_S * mIoU_U / (mIoU_S + mIoU_U) if mIoU_S + mIoU_U != 0 else 0.0  # Eq. 12
    metrics = {"pAcc": (hit.sum() / labelled.sum()).item(), "mIoU_S": mIoU_S, "mIoU_U": mIoU_U, "hIoU": hIoU,
               "mAcc": (hit / labelled).nanmean().item()}
    return {name: 100 * value for name, value in metrics.items()}


def evaluate(model: CLIPRC, dataset: data.Dataset, text: Tensor, crop: int, stride: int, lower: float,
             seen: Sequence[int], workers: int = 0, precision: str = "float32", save: Path | None = None) -> Tensor:
    """Sec. 4.3: the confusion matrix (C, C) of a data set, on the CPU; processes share the images, each counted once.

    text (C, D), on the model's device. save: a folder for the predictions, as palette PNGs of class numbers.
    The model is put in eval mode and left in the mode it was in.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    samples = data.TestSet(dataset, crop)
    # Images are dealt out in blocks, and only those of a block share batches of windows: so the batches, and every last
    # digit of the scores, are the same however many processes there are.
    mine = [i for i in range(len(samples)) if i // IMAGES_IN_BLOCK % world == rank]
    loader = DataLoader(Subset(samples, mine), batch_size=None, num_workers=workers, worker_init_fn=data.leave_signals)
    under_way = []  # (label, index) of the images whose windows are still being computed

    def images() -> Iterator[Tensor]:
        for image, label, index in tqdm(loader, "evaluating", leave=False, disable=True if rank else None):
            under_way.append((label, index))
            yield image

    confusion = torch.zeros(len(text), len(text), dtype=torch.int64)
    was_training = model.training
    model.eval()
    source = images()
    blocks = (itertools.islice(source, IMAGES_IN_BLOCK) for _ in range(0, len(mine), IMAGES_IN_BLOCK))
    with autocast(text.device, precision):
        for scores in itertools.chain.from_iterable(
                slide_images(model, block, text, crop, stride, lower, seen) for block in blocks):
            label, index = under_way.pop(0)
            if scores.shape[-2:] != label.shape:
                scores = F.interpolate(scores[None], size=label.shape, mode="bilinear", align_corners=False)[0]
            prediction = scores.argmax(0).cpu()
            confusion += confusion_matrix(prediction, label, len(text))
            if save:
                picture = Image.fromarray(prediction.byte().numpy())
                picture.putpalette(draw.index_png_palette(len(text)))
                draw.save(picture, save / f"{dataset.pairs[index][0].stem}.png")
    model.train(was_training)
    if dist.is_initialized():
        confusion = confusion.to(text.device)  # NCCL moves tensors of the GPU only
        dist.all_reduce(confusion)
    return confusion.cpu()


# ------------------------------------------------------------------------------------------------------- tables


def paper_table(rows: dict[str, dict[str, float]]) -> str:
    """Table 1's columns, a line a method; "-" where there is nothing to average."""
    lines = [f"{'':<24}{'pAcc':>8}{'hIoU':>8}{'mIoU(S)':>9}{'mIoU(U)':>9}"]
    for name, metrics in rows.items():
        pAcc, hIoU, mIoU_S, mIoU_U = ("-" if metrics[key] != metrics[key] else f"{metrics[key]:.1f}"
                                      for key in ("pAcc", "hIoU", "mIoU_S", "mIoU_U"))
        lines.append(f"{name:<24}{pAcc:>8}{hIoU:>8}{mIoU_S:>9}{mIoU_U:>9}")
    return "\n".join(lines)


def class_table(confusion: Tensor, names: Sequence[str], unseen: Sequence[int], new: Sequence[int] = ()) -> str:
    """Sec. 4.3: each class's IoU and accuracy in percent and its share of the labelled pixels; unseen classes marked with *.

    new: those of the unseen that have a look which no training mask shows in any class, marked with **.
    """
    labelled = confusion.sum(1).double()
    lines = [f"{'class (* unseen)':<28}{'IoU':>8}{'Acc':>8}{'pixels':>9}"]
    for i, (name, iou, acc) in enumerate(zip(names, class_iou(confusion), confusion.diagonal() / labelled)):
        IoU, Acc = ("-" if value.isnan() else f"{100 * value:.1f}" for value in (iou, acc))
        mark = "**" if i in new else "* " if i in unseen else "  "
        lines.append(f"{mark + name:<28}{IoU:>8}{Acc:>8}{labelled[i] / labelled.sum():>9.1%}")
    if new:
        lines.append("** unseen, and of a colour or pattern that no training mask shows in any class")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------- pictures


def cell_answers(encoder: Encoder, image: Tensor, text: Tensor) -> Tensor:
    """Fig. 2: the class that each region token is closest to. image (3, H, W), text (C, D). Returns (m, m), int64."""
    _, _, R = encoder(image[None])
    return (R[0] @ text.T).argmax(1).unflatten(0, (encoder.region_grid, -1))


@torch.no_grad()
def result_pictures(model: CLIPRC, untrained: UntrainedClip, dataset: data.Dataset, text: Tensor, crop: int, stride: int,
                    lower: float, seen: Sequence[int], count: int = 6, side: int = 224) -> dict[str, Image.Image]:
    """Fig. 6 and Fig. 2 for the first images that show an unseen class: file names and pictures.

    results.png: image, untrained CLIP's patches against the names, ours, the truth; faint where there is no truth.
    regions.png: the region tokens against the names, the untrained CLIP's beside ours.
    """
    names, unseen, colours = dataset.class_names, set(dataset.unseen), draw.palette(len(dataset.class_names))
    samples = data.TestSet(dataset, crop)
    chosen = [*itertools.islice((i for i in range(min(len(samples), 200)) if not unseen or unseen & {*np.unique(
        data.read_label(dataset.pairs[i][1], dataset.mapping)).tolist()}), count)]
    rows, regions, shown = [], [], set()
    for i in (chosen or range(len(samples)))[:count]:
        image, label, _ = samples[i]
        predictions = []
        for network, penalty in ((untrained, 0.0), (model, lower)):
            scores = slide_inference(network, image, text, crop, stride, penalty, seen)[None]
            scores = F.interpolate(scores, size=label.shape, mode="bilinear", align_corners=False)[0]
            predictions.append(scores.argmax(0).byte().cpu())
        picture = data.read_image(dataset.pairs[i][0])
        size = (side, round(side * picture.height / picture.width))
        picture = picture.resize(size, Image.Resampling.BICUBIC)
        labels = [np.array(Image.fromarray(each.numpy()).resize(size, Image.Resampling.NEAREST))
                  for each in (*predictions, label)]
        row = [picture]
        counted = Image.fromarray(labels[-1] != data.IGNORE)
        for each in labels:  # in full only where there is a truth to compare with
            full = draw.overlay(np.array(picture), each, colours, 0.75)
            row.append(Image.composite(full, Image.blend(picture, full, 0.3), counted))
        rows.append(row)
        shown |= set(np.unique(labels).tolist()) - {data.IGNORE}
        if model.encoder.region_grid:
            square = F.interpolate(image[None], size=(crop, crop), mode="bilinear", align_corners=False)[0].to(text.device)
            regions.append([draw.region_names(picture, cell_answers(network.encoder, square, text).tolist(), names, unseen)
                            for network in (untrained, model)])
    ids = sorted(shown)
    results = draw.grid(rows, ["image", "CLIP, untrained", "CLIP-RC", "truth"])
    legend = draw.legend([names[i] for i in ids], colours[ids], {ids.index(i) for i in unseen & shown}, results.width)
    pictures = {"results.png": draw.grid([[results], [legend]])}
    if regions:
        pictures["regions.png"] = draw.grid(regions, ["CLIP's regions", "CLIP-RC's regions"])
    return pictures


# ---------------------------------------------------------------------------------------------------- run alone


def autocast(device: torch.device, precision: str):
    """Large products in bfloat16, the rest in float32, where precision says "bfloat16"; a context manager."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def start_processes(device: str) -> torch.device:
    """Sec. 4.2's several GPUs: joins the processes that torchrun started, if it did; this process's device.

    device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N". Raises ValueError for what is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: no GPU that PyTorch can use was found; try --device cpu")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.zeros(1, device=device).item()
        device = torch.device(device)
    except (RuntimeError, NotImplementedError) as error:  # no such device, or one that holds no numbers
        raise ValueError(f"--device {device}: nothing can be computed there; give auto, cpu or cuda") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        store, rank, world = next(rendezvous("env://"))
        # Started anew by torchrun --max-restarts, the processes would look for each other where the dead ones were: the
        # store keeps the old addresses in PyTorch 2.13. Several machines count their restarts apart, so for them this
        # does not help; torchrun itself may there be given TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    return device


def run_script(main: Callable[[], None], interrupted: str = "stopped") -> None:
    """Runs a script's `main`: input that cannot be used ends it with one line on stderr and exit code 2, no traceback.

    Of several processes only the one that found the fault names it; those that lose it thereby end with code 1.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(interrupted)
    except (ValueError, OSError, RuntimeError) as error:
        # from a worker of a DataLoader comes its whole traceback, which ends in a line that says the type first
        line = str(error).strip().split("\n")[-1].removeprefix(f"{type(error).__name__}: ")
        if isinstance(error, OSError) and error.filename and line.startswith("[Errno"):
            line = f"{error.filename}: {error.strerror}; name another place, or see to its permissions"
        if isinstance(error, (ValueError, OSError)):
            sys.exit(print(f"error: {line}", file=sys.stderr) or 2)
        if not dist.is_initialized() or not (isinstance(error, dist.DistError) or "gloo" in line):
            raise
        sys.exit(f"process {dist.get_rank()} stopped: another one has ended or cannot be reached ({line})")


def main() -> None:
    """Evaluates a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a file that train.py or convert.py wrote")
    parser.add_argument("--dataset", choices=data.DATASETS, help="default: the one of the training")
    parser.add_argument("--data-root", help="the data set's folder; default: the one of the training")
    parser.add_argument("--split", choices=("train", "val"), default="val", help="default %(default)s")
    parser.add_argument("--clip", help="CLIP's file or published name; default: the one of the training, else ViT-B/16")
    parser.add_argument("--crop-size", type=int, help="side of a window, in pixels; default: the training's, else 512")
    parser.add_argument("--stride", type=int,
                        help="pixels from window to window; default: 426 for windows of 512, in proportion")
    parser.add_argument("--lower", type=float, help="taken off the seen classes' scores; default: 0.1 after inductive "
                                                    "training and for a converted checkpoint, 0 else and for another data "
                                                    "set")
    parser.add_argument("--seen-only", action="store_true", help="give the seen names only and leave other pixels out: "
                                                                 "with --split train, the training accuracy")
    parser.add_argument("--unseen-names", choices=("own", "permuted", "random"), default="own",
                        help="what stands in for the unseen classes' names: their own; each other's, none its own; random "
                             "unit vectors. If the names are what finds these classes, they are lost with the last two")
    parser.add_argument("--save", type=Path, help="folder for the predictions, palette PNGs of class numbers; a new one")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default %(default)s)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="default: the training's")
    parser.add_argument("--workers", type=int, default=2, help="processes that read pictures (default %(default)s)")
    args = parser.parse_args()

    checkpoint = read_checkpoint(args.checkpoint)
    run = checkpoint.get("run", {})  # train.py's settings; a converted checkpoint has none
    name, root = args.dataset or run.get("dataset"), args.data_root
    if root is None and name == run.get("dataset"):
        root = run.get("data_root")
    if name and not root:
        raise ValueError(f"--data-root: where is {name}? Give its folder")
    if not name:
        raise ValueError(f"{args.checkpoint} does not say what it was trained on; give --dataset and --data-root")
    dataset = data.open_dataset(name, root, args.split)
    same_names = tuple(checkpoint.get("class_names", ())) == dataset.class_names
    if same_names:
        dataset = replace(dataset, unseen=tuple(checkpoint["unseen"]))  # the split that it was trained with
    crop = run.get("crop_size", 512) if args.crop_size is None else args.crop_size
    if args.lower is not None and not 0 <= args.lower <= 1:
        raise ValueError(f"--lower {args.lower}: must be from 0 to 1")
    if not 0 <= args.workers <= 256:
        raise ValueError(f"--workers {args.workers}: must be from 0 to 256")
    if args.seen_only and args.unseen_names != "own":
        raise ValueError("--unseen-names: with --seen-only no unseen name is given; leave one of the two out")
    if args.unseen_names == "permuted" and len(dataset.unseen) < 2:
        raise ValueError("--unseen-names permuted: there must be two unseen classes at least to give each other's names")
    if args.save and os.path.lexists(args.save):
        raise ValueError(f"--save {args.save}: exists already; name a new folder")

    device = start_processes(args.device)
    rank = dist.get_rank() if dist.is_initialized() else 0
    model = model_from_checkpoint(checkpoint, args.checkpoint, args.clip).to(device)
    unit = model.encoder.patch_size * max(1, model.encoder.region_grid)
    if not 0 < crop <= 2048 or crop % unit:
        raise ValueError(f"--crop-size {crop}: {args.checkpoint} needs a multiple of {unit} pixels, 2048 at most")
    stride = max(1, crop * 426 // 512) if args.stride is None else args.stride
    if not 0 < stride <= crop:
        raise ValueError(f"--stride {stride}: must be at least 1 and at most the window's side, {crop}")
    if same_names:
        text = checkpoint["text"]
    else:
        text = encode_names(checkpoint, args.checkpoint, dataset.class_names, dataset.templates, args.clip)
    lower = args.lower
    if lower is None:
        lower = LOWER if run.get("setting", "inductive") == "inductive" and (same_names or not run) else 0.0
    seen = [i for i in range(len(dataset.class_names)) if i not in dataset.unseen]
    if args.seen_only:
        dataset, text, seen, lower = data.seen_classes(dataset), text[seen], list(range(len(seen))), 0.0

    unseen = list(dataset.unseen)
    if args.unseen_names == "permuted":
        text[unseen] = text[unseen].roll(1, dims=0)
    elif args.unseen_names == "random":
        generator = torch.Generator().manual_seed(0)
        text[unseen] = F.normalize(torch.randn(len(unseen), text.shape[1], generator=generator), dim=-1)
    if args.save:  # not before everything else is known to be right
        args.save.mkdir(parents=True, exist_ok=True)
    confusion = evaluate(model, dataset, text.to(device), crop, stride, lower, seen, args.workers,
                         args.precision or run.get("precision", "float32"), args.save)
    if rank == 0:
        metrics = zero_shot_metrics(confusion, dataset.unseen)
        print(class_table(confusion, dataset.class_names, dataset.unseen,
                          toy.new_attributes(dataset.class_names, dataset.unseen) if name == "toy" else ()))
        print(f"\n{name} {args.split}, {len(dataset.pairs):,} images, seen classes lowered by {lower:g}"
              + (f"; unseen names {args.unseen_names}" if args.unseen_names != "own" else "")
              + (f"; {dataset.note}" if dataset.note else ""))
        print(paper_table({"CLIP-RC" if model.settings["ram"] else "ZegCLIP": metrics}))
        print(f"mIoU {100 * class_iou(confusion).nanmean():.1f}   mAcc {metrics['mAcc']:.1f}   (Table 4's columns)")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
