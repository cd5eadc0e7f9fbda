"""Train CLIP-RC (paper Sec. 4.2): one plain loop, from the settings to the paper's table.

    python train.py                         a small drawn world: minutes on a laptop, no download
    torchrun --nproc-per-node=8 train.py --dataset voc --data-root VOCdevkit/VOC2012     the paper's

A run writes to --out: log.jsonl (the losses), last.pt (its newest state), half.pt (from the middle
of an inductive run, where a transductive one starts), and images. You can stop a run at any time;
the same command with --resume ends with the same weights (on a GPU, up to rounding).
Where the losses look: docs/walkthrough.md#35-the-loss
"""

import hashlib
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read when torch is imported: see docs/results.md

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import data
from eval import (LOWER, MaskCLIP, class_table, evaluate, method_name, mistakes_line,
                  paper_table, result_images, untrained_encoder, zero_shot_metrics)
from model import CLIPRC, RECOVERY_LOSSES, count_pairs, pseudo_labels
from util import flags, toy
from util.checkpoint import checkpoint_clip, read_checkpoint, require_same, save_checkpoint
from util.clip_files import (CLIP_FILES, TOY_CLIP, clip_digest, clip_file, encode_text,
                             load_clip)
from util.flags import COUNT, POSITIVE, REAL, flag
from util.images import save_image
from util.processes import (PRECISIONS, Progress, any_process, autocast, average_gradients, cores,
                            from_first, mean_over_processes, rank, run_script, start_processes,
                            world_size)
from util.run import Speed, StopSignals, add_to_log, claim_folder, cut_log

# Sec. 4.2 and the released code; Context is not in it and has the K of ZegCLIP's successors.
PAPER = {"crop_size": 512, "scale_min": 0.5, "scale_max": 2.0, "jitter": True, "lr": 2e-4,
         "weight_decay": 0.01, "regions": 16, "dropout": 0.1, "initialiser": "released",
         "descriptor_scale": 1.0, "w_mask": 100.0, "w_dice": 1.0, "w_rec": 2.0}
PRESETS = {
    "voc": PAPER | {"prompts": 10, "iterations": 40_000},
    "context": PAPER | {"prompts": 35, "iterations": 40_000},
    "coco-stuff": PAPER | {"prompts": 100, "iterations": 80_000,
                           "w_mask": 200.0, "w_dice": 3.0, "w_rec": 50.0},
}
PRESETS["context59"] = PRESETS["folder"] = PRESETS["context"]
PRESETS["toy"] = PAPER | {  # the paper's setting but for what smallness forces
    "crop_size": 64, "prompts": 4,  # a scene has 64 patches, an image of VOC 1,024
    "iterations": 800, "lr": 1e-3,  # a fiftieth of VOC's steps, so larger ones
    "dropout": 0.0,  # 800 steps do not overfit, and dropout takes a third of a CPU's step
    "scale_min": 1.0, "scale_max": 1.0, "jitter": False,  # another hue or scale: another class
    "initialiser": "truncated_normal",  # from the released one hIoU ends at 0, at lr 2e-4 at 68
    "descriptor_scale": 0.01,  # makes runs steadier: see docs/differences.md
}
SUPERVISED = dict.fromkeys(("voc", "context", "context59", "folder"), {"w_rec": 0.0})
SUPERVISED["coco-stuff"] = {"w_mask": 100.0, "w_dice": 1.5, "w_rec": 1.0}
SETTINGS = ("inductive", "transductive", "supervised")
INITIALISERS = ("released", "truncated_normal")
MAY_CHANGE = {"out", "resume", "device", "workers", "recompute", "compile", "accumulate", "clip",
              "data_root", "log_every", "val_every", "save_every"}  # when a run is resumed


@dataclass
class Settings:
    """Everything that defines a run. None stands for the default of data set and setting."""

    # data
    dataset: str = flag("toy", "the data set", choices=tuple(PRESETS))
    data_root: str | None = flag(None, "its folder; the toy world is drawn on first use")
    clip: str | None = flag(None, "CLIP's file, folder or name (ViT-B/16; toy: the shipped one)")
    setting: str = flag("inductive", "what training knows of the unseen classes: nothing, their "
                        "names, or names and masks", choices=SETTINGS)
    unseen: str | None = flag(None, "the unseen classes, comma-separated; '' for none")
    init: str | None = flag(None, "checkpoint to start from, '' for none (transductive: the middle "
                            "of the inductive run, runs/DATASET/half.pt)")
    out: str | None = flag(None, "folder of the run (runs/DATASET, runs/DATASET-SETTING)")
    seed: int = flag(0, "fixes initial weights, order of the data and dropout", **COUNT)
    # the method: each row of Tables 5-8 is one of these
    prompts: int | None = flag(None, "K, prompt tokens in each layer", **COUNT)
    regions: int | None = flag(None, "M, region tokens, a square number; 0 for none", **COUNT)
    update_regions: bool = flag(False, "train the region tokens (Table 6)")
    ram: bool = flag(True, "RAM and the two-branch decoder; without: ZegCLIP's head (Table 5)")
    align: str = flag("GR", "which of G and R join I (Table 7)", choices=("GR", "G", "R", ""))
    rdl: bool = flag(True, "the recovery loss (Table 5)")
    recovery_layers: int = flag(1, "layers of the recovery decoder (Table 8)", **COUNT)
    recovery_loss: str = flag("l1", "its distance (Table 8)", choices=tuple(RECOVERY_LOSSES))
    initialiser: str | None = flag(None, "of the decoder", choices=INITIALISERS)
    descriptor_scale: float | None = flag(None, "factor on the initial weights of "
                                          "ram.descriptor_proj", **REAL)
    dropout: float | None = flag(None, "on prompts, attention weights, decoder layers", **REAL)
    # optimisation
    iterations: int | None = flag(None, "optimiser steps; transductive: half", **POSITIVE)
    batch_size: int = flag(16, "images in a step, over all processes", **POSITIVE)
    accumulate: int = flag(1, "parts in which a process computes its share of a batch", **POSITIVE)
    crop_size: int | None = flag(None, "side of a training image in pixels", **POSITIVE)
    scale_min: float | None = flag(None, "smallest random scale", **REAL)
    scale_max: float | None = flag(None, "largest random scale", **REAL)
    jitter: bool | None = flag(None, "random brightness, contrast, saturation and hue")
    lr: float | None = flag(None, "peak learning rate of AdamW; transductive: 2e-4", **REAL)
    warmup: int | None = flag(None, "warm-up steps (1500, at most a tenth of the run)", **COUNT)
    weight_decay: float | None = flag(None, "of AdamW, on every trained tensor", **REAL)
    w_mask: float | None = flag(None, "weight of the focal loss; coco-stuff supervised: 100",
                                **REAL)
    w_dice: float | None = flag(None, "of the dice loss; coco-stuff supervised: 1.5", **REAL)
    w_rec: float | None = flag(None, "of the recovery loss; supervised: 0, coco-stuff 1, toy 2",
                               **REAL)
    # machine
    device: str = flag("auto", "auto, cpu or cuda")
    precision: str = flag("tf32", "of matrix products; on a CPU tf32 is float32",
                          choices=PRECISIONS)
    recompute: bool | None = flag(None, "activation checkpointing in the decoder: less memory, "
                                  "slower (on from 256 regions)")
    compile: bool = flag(False, "torch.compile: minutes once, then faster steps on a GPU")
    workers: int | None = flag(None, "processes that prepare images, for each training process "
                               "(up to 8; toy: 0)", **COUNT)
    log_every: int = flag(10, "steps between lines of log.jsonl", **POSITIVE)
    val_every: int | None = flag(None, "steps between evaluations (a fifth of the run)", **POSITIVE)
    save_every: int = flag(1000, "steps between checkpoints", **POSITIVE)
    resume: bool = flag(False, "continue from OUT/last.pt if there is one")


def parse_settings(arguments: list[str] | None = None) -> Settings:
    """Paper Sec. 4.2: the command line, with PRESETS for every flag that was not given."""
    shown = {name: preset for name, preset in PRESETS.items() if name != "context59"}
    s = flags.parse(Settings, shown, __doc__, arguments)
    preset = dict(PRESETS[s.dataset])
    if s.setting == "supervised":
        preset |= SUPERVISED.get(s.dataset, {})
    if s.setting == "transductive":
        preset["iterations"] //= 2
        preset["lr"] = min(preset["lr"], 2e-4)  # it starts from trained weights, also in the toy
    s.clip = s.clip or (str(TOY_CLIP) if s.dataset == "toy" else "ViT-B/16")
    if Path(s.clip).name == TOY_CLIP.name:  # to try one's own data with: that CLIP's own size
        preset["crop_size"] = toy.SIZE
    for name, value in preset.items():
        if getattr(s, name) is None:
            setattr(s, name, value)
    own = s.dataset == "folder" and s.data_root
    place = f"runs/{Path(s.data_root).resolve().name if own else s.dataset}"
    s.out = s.out or place + f"-{s.setting}" * (s.setting != "inductive")
    if s.init is None and s.setting == "transductive":
        s.init = f"{place}/half.pt"
    s.warmup = min(1500, s.iterations // 10) if s.warmup is None else s.warmup
    s.val_every = s.val_every or max(1, s.iterations // 5)
    if s.workers is None:
        s.workers = 0 if s.dataset == "toy" else min(8, cores())
    parts = int(os.environ.get("WORLD_SIZE", 1)) * s.accumulate
    if s.batch_size % parts:
        raise ValueError(f"--batch-size {s.batch_size}: must be a multiple of {parts}, processes "
                         f"times --accumulate")
    if s.data_root is None and s.dataset != "toy":
        raise ValueError(f"--data-root: where is the data set ({s.dataset})?")
    return s


def learning_rate(step: int, s: Settings) -> float:
    """Released schedule from step 0: poly, power 0.9, down to 1e-6, times a linear warm-up."""
    poly = (s.lr - 1e-6) * (1 - step / s.iterations) ** 0.9 + 1e-6
    return poly * (1 - (1 - step / s.warmup) * (1 - 1e-6)) if step < s.warmup else poly


def backward(model: CLIPRC, images: Tensor, labels: Tensor, text: Tensor, s: Settings,
             unseen: tuple[int, ...]) -> dict[str, Tensor]:
    """Sec. 3.5: the gradients of a batch's losses, in `s.accumulate` parts. Returns the losses.
    images (B, 3, H, W), labels (B, H, W), text (C, D) as `CLIPRC.losses` takes them."""
    weights, n, seed = (s.w_mask, s.w_dice, s.w_rec), s.accumulate, torch.initial_seed()
    parts, num_pairs, total = list(zip(images.chunk(n), labels.chunk(n))), None, {}
    if n > 1:  # the losses divide by the pairs of the whole batch, pseudo labels included
        if unseen:
            with torch.no_grad(), autocast(images.device, s.precision):
                for i, (image, label) in enumerate(parts):
                    torch.manual_seed(seed + i)  # the dropout that this part will have below
                    label.copy_(pseudo_labels(model(image, text), label, unseen))  # in labels
        num_pairs, unseen = count_pairs(labels, len(text)) / n, ()  # / n, as the sum is below
    for i, (image, label) in enumerate(parts):
        torch.manual_seed(seed + i)
        with autocast(images.device, s.precision):
            losses = model.losses(image, label, text, weights, unseen, num_pairs)
        sum(losses.values()).div(n).backward()
        total = {name: total.get(name, 0) + loss.detach() / n for name, loss in losses.items()}
    return total


def open_data(s: Settings) -> list[data.Dataset]:
    """Sec. 4.1: the training and the validation split; the toy world by default."""
    s.data_root = str(Path(s.data_root or toy.default_world()).resolve())
    splits = [data.open_dataset(s.dataset, s.data_root, split) for split in ("train", "val")]
    return [split if s.unseen is None else data.with_unseen(split, s.unseen) for split in splits]


def build_model(s: Settings, visual: nn.Module) -> CLIPRC:
    """Sec. 3: the model that the settings describe, its initial weights fixed by the seed."""
    torch.manual_seed(s.seed)
    same = ("regions", "update_regions", "ram", "align", "recovery_layers", "recovery_loss",
            "initialiser", "descriptor_scale", "dropout", "recompute")
    model = CLIPRC(visual, num_prompts=s.prompts, rdl=s.rdl and s.w_rec > 0,
                   **{name: getattr(s, name) for name in same})
    unit = model.encoder.patch_size * max(1, model.encoder.region_grid)
    if s.crop_size % unit:
        raise ValueError(f"--crop-size {s.crop_size}: not a multiple of {unit}, which --regions "
                         f"{s.regions} and CLIP's patches need")
    return model


def starting_point(s: Settings, model: CLIPRC, optimizer: torch.optim.Optimizer,
                   origin: dict) -> int:
    """Load the weights that the run starts from, if any. Returns the step that it starts at.
    origin: class names, unseen classes and so on, which a resumed run must share with last.pt."""
    last = Path(s.out, "last.pt")
    resumed = s.resume and last.exists()
    if not (resumed or s.init):
        return 0
    path = last if resumed else s.init
    checkpoint = read_checkpoint(path)
    checkpoint_clip(checkpoint, path, s.clip)  # raises ValueError for another CLIP
    if resumed:
        then = checkpoint["run"] | checkpoint
        if "bfloat16" not in (then["precision"], s.precision):  # tf32 and float32 may alternate
            then["precision"] = s.precision
        require_same(path, then, asdict(s) | origin, MAY_CHANGE)
        optimizer.load_state_dict(checkpoint["optimizer"])
    else:
        free = {"initialiser", "descriptor_scale", "dropout", "recovery_loss"}
        if model.recovery is None:  # a run without RDL may start from one with it
            free |= {"rdl", "recovery_layers"}
        require_same(path, checkpoint["model"], model.settings, free)
        saw = {name for i, name in enumerate(checkpoint.get("class_names", ()))
               if i not in checkpoint["unseen"] or checkpoint["run"]["setting"] == "supervised"}
        leaked = saw & {origin["class_names"][i] for i in origin["unseen"]}
        if leaked and s.setting != "supervised":
            raise ValueError(f"--init {path}: its training saw masks of {min(leaked)}, which is "
                             f"unseen here, so the result would not be zero-shot")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    weights = {name: checkpoint["weights"][name] for name in trained}
    model.load_state_dict(weights, strict=False)
    return checkpoint["step"] if resumed else 0


def train(s: Settings) -> dict | None:
    """Sec. 4.2: one run. Returns Table 1's columns in percent, None if it was stopped."""
    (train_data, val_data), out = open_data(s), Path(s.out)
    names, unseen = train_data.class_names, train_data.unseen
    seen = [i for i in range(len(names)) if i not in unseen]
    clip_path = clip_file(s.clip)  # downloads it, if need be, before processes wait for each other
    device = start_processes(s.device, s.precision)
    clip_model = load_clip(clip_path).to(device)
    text = train_text = from_first(lambda: encode_text(clip_model, names, train_data.templates),
                                   len(names), clip_model.text_projection.shape[1], device=device)
    lower = 0.0
    if s.setting == "inductive":  # training knows no other class name and no other mask
        train_data, train_text, lower = data.seen_classes(train_data), text[seen], LOWER
    model = build_model(s, clip_model.visual).to(device)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=s.lr, weight_decay=s.weight_decay,
                                  fused=True)
    image_names = str([image.parts[-2:] for image, _ in train_data.pairs])
    origin = {"class_names": list(names), "unseen": list(unseen),
              "templates": list(train_data.templates), "clip_digest": clip_digest(clip_model),
              "images": hashlib.sha256(image_names.encode()).hexdigest()}
    stride, right = s.crop_size * 426 // 512, {}  # right: each image's share of right pixels

    def save(name: str, step: int) -> None:
        weights = {name: parameter.detach() for name, parameter in trained.items()}
        save_checkpoint(out / name, model.settings, weights, run=asdict(s),
                        clip=s.clip if s.clip in CLIP_FILES else str(clip_path),
                        text=text.cpu(), step=step, optimizer=optimizer.state_dict(), **origin)

    def test(network: nn.Module, lower: float = lower) -> Tensor:
        return evaluate(network, val_data, text, s.crop_size, stride, lower, seen, s.workers,
                        s.precision, right=right if network is model else None)

    start = starting_point(s, model, optimizer, origin)
    with claim_folder(out, s.resume):
        if rank() == 0:
            cut_log(out / "log.jsonl", start)
            print(f"{s.dataset}, {s.setting}: {len(train_data.pairs):,} images, {len(seen)} seen "
                  f"and {len(unseen)} unseen classes; steps {start:,} to {s.iterations:,} of "
                  f"{s.batch_size} images on {world_size()} x {device.type}"
                  + f"; {train_data.note}" * bool(train_data.note), flush=True)
        confusion = loop(s, model, optimizer, train_data, train_text, unseen, start, save, test)
        if confusion is None:
            return None
        metrics = zero_shot_metrics(confusion, unseen)
        untrained = MaskCLIP(clip_model.visual)
        floor = zero_shot_metrics(test(untrained, 0.0), unseen)
        if rank() == 0:
            add_to_log(out / "log.jsonl", {"step": s.iterations, "result": metrics})
            both = untrained, untrained_encoder(clip_model.visual, s.regions)
            figures = partial(result_images, model, both, val_data, text, s.crop_size, stride,
                              lower, seen)
            images = figures()
            images["worst.png"] = figures(sorted(right, key=right.get)[:6])["results.png"]
            for name, image in images.items():
                save_image(image, out / name)
            print(class_table(confusion, names, unseen), end="\n\n")
            print(paper_table({"MaskCLIP, untrained": floor, method_name(model): metrics}) + "\n")
            print(mistakes_line(confusion, names))
            print(f"in {out}: " + ", ".join(sorted(path.name for path in out.iterdir())))
            print(f"next: python predict.py {out}/last.pt IMAGE labels an image of yours; eval.py "
                  f"{out}/last.pt --unseen-names permuted is a control; your data: docs/data.md")
    return metrics


def loop(s: Settings, model: CLIPRC, optimizer: torch.optim.Optimizer, train_data: data.Dataset,
         text: Tensor, unseen: tuple[int, ...], start: int, save: Callable[[str, int], None],
         test: Callable[[CLIPRC], Tensor]) -> Tensor | None:
    """Sec. 4.2: the steps from `start`. Returns the confusion matrix at the end, None if stopped.

    text: T of the class names that training knows."""
    device, log, signals = text.device, Path(s.out, "log.jsonl"), StopSignals()
    trained = optimizer.param_groups[0]["params"]
    samples = data.TrainSet(train_data, s.crop_size, s.seed, (s.scale_min, s.scale_max), s.jitter)
    batches = data.GlobalBatches(len(samples), s.batch_size, s.iterations, s.seed, rank(),
                                 world_size(), start)
    loader = DataLoader(samples, batch_sampler=batches, num_workers=s.workers,
                        pin_memory=device.type == "cuda", worker_init_fn=data.leave_signals)
    bar = Progress(total=s.iterations, initial=start, desc="training")
    speed, stopping, confusion = Speed(device, s.precision, s.batch_size, start), False, None
    pseudo = unseen if s.setting == "transductive" else ()
    model.train()
    signals.hold()
    for step, (images, labels) in enumerate(loader, start):
        # Dropout depends on seed, step and process only, so a resumed run repeats it.
        dropout_seed = np.random.SeedSequence((s.seed, step, rank())).generate_state(1)[0]
        torch.manual_seed(int(dropout_seed))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, s)
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        if step == start:
            speed.count(lambda: backward(model, images, labels, text, s, pseudo))
            for part in model.children() if s.compile else ():
                part.compile()
        optimizer.zero_grad()
        losses = backward(model, images, labels, text, s, pseudo)
        average_gradients(trained)
        optimizer.step()

        done = step + 1
        logging = done % s.log_every == 0
        stopping = bool(signals.received)
        if world_size() > 1:  # all of them stop together
            stopping = logging and any_process(stopping, device)
        testing = (done % s.val_every == 0 or done == s.iterations) and not stopping
        saving = done % s.save_every == 0 or testing or stopping
        halfway = done == s.iterations // 2 and s.setting == "inductive"
        if logging or saving:
            values = {name: mean_over_processes(loss).item() for name, loss in losses.items()}
            values = {"loss": sum(values.values())} | values
            if not math.isfinite(values["loss"]):
                raise ValueError(f"step {done}: the loss is {values['loss']}; {s.out}/last.pt is "
                                 f"from an earlier step; lower --lr")
            figures = speed.read(done)
            bar.set_postfix(values | figures, refresh=False)
            if rank() == 0:
                lr = learning_rate(step, s)
                add_to_log(log, {"step": done, **values, "lr": lr, **figures})
        bar.update()
        if rank() == 0 and halfway:  # before last.pt, or a run resumed from that never writes it
            save("half.pt", done)
        if rank() == 0 and saving:
            save("last.pt", done)
        if stopping:
            break
        if testing:
            signals.release()  # last.pt is up to date
            confusion = test(model)
            metrics = zero_shot_metrics(confusion, unseen)
            if rank() == 0:
                add_to_log(log, {"step": done, "val": metrics})
                bar.write(f"step {done:,}: pAcc {metrics['pAcc']:.1f}  hIoU {metrics['hIoU']:.1f}  "
                          f"mIoU(S) {metrics['mIoU_S']:.1f}  mIoU(U) {metrics['mIoU_U']:.1f}")
            signals.hold()
            speed.restart(done)
    signals.release()
    bar.close()
    if not stopping:
        return test(model) if confusion is None else confusion  # None: it was finished already
    if rank() == 0:
        print(f"stopped after step {done:,}; the same command with --resume continues from there")
    if world_size() == 1:
        sys.exit(128 + signals.received)  # as a program that the signal ended
    return None


if __name__ == "__main__":
    run_script(lambda: train(parse_settings()))
