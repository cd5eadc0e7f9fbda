"""Train CLIP-RC (the paper's Sec. 4.2): one plain loop, from the settings to the paper's table.

    python train.py                                                                   a small world, on a laptop
    torchrun --nproc-per-node=8 train.py --dataset voc --data-root VOCdevkit/VOC2012  the paper's run, 8 GPUs
    torchrun --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train.py ...    two machines

Many defaults depend on the data set and the setting: `python train.py --help` lists them. A run writes to --out:
log.jsonl (a line per logged step), last.pt (its newest state), half.pt (from the middle of an inductive run, where a
transductive one starts), loss.png. Stop it as you like; the same command with --resume goes on where last.pt is, and
ends with the very weights that it would have had, on a GPU up to rounding (torchrun --max-restarts=3 ... --resume does
so by itself).
"""

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path


def flag(default, help: str, **more):
    """A field of `Settings`: its default, what --help says of it, and what argparse wants besides."""
    return field(default=default, metadata={"help": help, **more})


# Sec. 4.2 and the released configurations; Context is not in the release: K as in ZegCLIP's line of work, the rest as VOC.
PAPER = {"crop_size": 512, "scale_min": 0.5, "scale_max": 2.0, "jitter": True, "lr": 2e-4, "regions": 16, "dropout": 0.1,
         "weight_decay": 0.01, "initialiser": "released"}
PRESETS = {
    "voc": PAPER | {"prompts": 10, "w_mask": 100.0, "w_dice": 1.0, "w_rec": 2.0, "iterations": 40_000},
    "context": PAPER | {"prompts": 35, "w_mask": 100.0, "w_dice": 1.0, "w_rec": 2.0, "iterations": 40_000},
    "coco-stuff": PAPER | {"prompts": 100, "w_mask": 200.0, "w_dice": 3.0, "w_rec": 50.0, "iterations": 80_000},
}
PRESETS["context59"] = PRESETS["folder"] = PRESETS["context"]
# The small world's classes are colours and fine patterns: another hue or another scale would be another class. It has
# scenes enough to do without dropout, a third of a CPU's step. Its weights decay fast: its run is short, and what 15
# classes leave undetermined in them would be read as something by the names that training has not heard.
PRESETS["toy"] = {"crop_size": 64, "scale_min": 1.0, "scale_max": 1.0, "jitter": False, "lr": 1e-3, "weight_decay": 3.0,
                  "regions": 4, "prompts": 4, "dropout": 0.0, "initialiser": "truncated_normal", "w_mask": 100.0,
                  "w_dice": 1.0, "w_rec": 2.0, "iterations": 800}
SUPERVISED = {name: {"w_rec": 0.0} for name in ("voc", "context", "context59", "folder")}
SUPERVISED["coco-stuff"] = {"w_mask": 100.0, "w_dice": 1.5, "w_rec": 1.0}


@dataclass
class Settings:
    """Sec. 4.2: everything that defines a run. None: the data set's and setting's own value (PRESETS)."""

    # what to train on
    dataset: str = flag("toy", "the data set", choices=tuple(PRESETS))
    data_root: str | None = flag(None, "its folder (toy: drawn on first use)")
    clip: str | None = flag(None, "CLIP's file or published name (ViT-B/16; toy: the one that ships with this code)")
    setting: str = flag("inductive", "inductive: unseen classes have neither mask nor name in training; transductive: "
                                        "their names are known; supervised: their masks too",
                           choices=("inductive", "transductive", "supervised"))
    unseen: str | None = flag(None, "the unseen classes, comma-separated, '' for none (the data set's own)")
    init: str | None = flag(None, "checkpoint whose trained weights the run starts from, '' for none (transductive: the "
                                  "inductive run's middle, runs/DATASET/half.pt)")
    out: str | None = flag(None, "folder of the run (runs/DATASET, with -SETTING unless inductive)")
    seed: int = flag(0, "fixes the weights' start, the data's order and the dropout")
    # the method; a row of Tables 5-8 is one of these
    prompts: int | None = flag(None, "K, prompt tokens in each layer")
    regions: int | None = flag(None, "M, region tokens, a square number; 0: no region-level bridge (Tables 5, 6)")
    update_regions: bool = flag(False, "train the region tokens (Table 6)")
    ram: bool = flag(True, "region alignment and the two-branch decoder; without: ZegCLIP's decoder (Table 5)")
    align: str = flag("GR", "which of G and R enter Eq. 4, may be empty (Table 7)", choices=("GR", "G", "R", ""))
    rdl: bool = flag(True, "the recovery loss (Table 5)")
    recovery_layers: int = flag(1, "layers of the recovery decoder, 0: none (Table 8)")
    recovery_loss: str = flag("l1", "its distance (Table 8)", choices=("l1", "l2", "kd"))
    initialiser: str | None = flag(None, "the decoder's start: the released code's, or the initialiser that it defines and "
                                         "never calls", choices=("released", "truncated_normal"))
    dropout: float | None = flag(None, "on prompts, attention weights and the decoder's layers")
    # the optimisation
    iterations: int | None = flag(None, "steps of the optimiser")
    batch_size: int = flag(16, "images a step, over all processes")
    accumulate: int = flag(1, "parts that a process's share of the batch is computed in, one after the other, to save "
                              "memory")
    crop_size: int | None = flag(None, "side of a training picture, in pixels")
    scale_min: float | None = flag(None, "least and ...")
    scale_max: float | None = flag(None, "... largest factor by which a training picture is scaled at random")
    jitter: bool | None = flag(None, "change brightness, contrast, saturation and hue at random")
    lr: float | None = flag(None, "peak learning rate of AdamW")
    warmup: int | None = flag(None, "steps of linear warm-up (1,500, but at most a tenth of the run)")
    weight_decay: float | None = flag(None, "AdamW's, on every trained tensor")
    w_mask: float | None = flag(None, "weight of the focal loss (Eq. 11)")
    w_dice: float | None = flag(None, "weight of the dice loss (Eq. 11)")
    w_rec: float | None = flag(None, "weight of the recovery loss (Eq. 11)")
    # the machine
    device: str = flag("auto", "auto, cpu or cuda")
    precision: str = flag("float32", "of the large products", choices=("float32", "bfloat16"))
    recompute: bool | None = flag(None, "compute the decoder's layers twice instead of keeping what they computed: a "
                                        "fraction of the memory (from 256 regions on)")
    compile: bool = flag(False, "translate the model with torch.compile: minutes once, quicker steps on a GPU")
    workers: int | None = flag(None, "processes that prepare pictures, for each training process (up to 8; toy: 0)")
    skip_bad: bool = flag(False, "do without training pictures that cannot be read or do not fit their masks: others "
                                 "stand in for them, OUT/skipped.txt names them; without this flag the first one ends "
                                 "the run")
    # what to note, and when
    log_every: int = flag(10, "steps between lines of log.jsonl")
    val_every: int | None = flag(None, "steps between evaluations (a fifth of the run)")
    save_every: int = flag(1000, "steps between checkpoints")
    resume: bool = flag(False, "go on from OUT/last.pt if there is one")
    ablate: int = flag(0, "instead of one run all those of Tables 5-8, with so many seeds each (3 where no number is "
                          "given), and a table beside the paper's", nargs="?", const=3)


def parse_settings(arguments: list[str] | None = None) -> Settings:
    """Sec. 4.2: the command line, each absent flag filled in from the data set's and setting's own values.

    Raises ValueError naming the flag whose value cannot be used.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Settings):
        more = dict(f.metadata)
        help = more.pop("help")
        of_data_set = {name: preset[f.name] for name, preset in PRESETS.items() if f.name in preset}
        if of_data_set:
            help += f" ({', '.join(f'{name} {value}' for name, value in of_data_set.items() if name != 'context59')})"
        elif f.default not in (None, False):
            help += f" ({f.default})"
        kind = {"action": argparse.BooleanOptionalAction} if "bool" in str(f.type) else {
            "type": next(t for t in (int, float, str) if t.__name__ in str(f.type)), **more}
        parser.add_argument(f"--{f.name.replace('_', '-')}", default=f.default, help=help.replace("%", "%%"), **kind)
    s = Settings(**vars(parser.parse_args(arguments)))

    preset = PRESETS[s.dataset] | (SUPERVISED.get(s.dataset, {}) if s.setting == "supervised" else {})
    if s.setting == "transductive":
        preset = preset | {"iterations": preset["iterations"] // 2}
    for name, value in preset.items():
        if getattr(s, name) is None:
            setattr(s, name, value)
    s.clip = s.clip or (str(Path(__file__).with_name("toy_clip.pt")) if s.dataset == "toy" else "ViT-B/16")
    s.out = s.out or f"runs/{s.dataset}" + f"-{s.setting}" * (s.setting != "inductive")
    if s.init is None and s.setting == "transductive":
        s.init = f"runs/{s.dataset}/half.pt"
        if not Path(s.init).exists() and not (s.resume and Path(s.out, "last.pt").exists()):
            raise ValueError(f"--init: the transductive setting starts from an inductive run's middle, and {s.init} is not "
                             f"there; give its half.pt, or --init '' to start from nothing")
    s.warmup = min(1500, s.iterations // 10) if s.warmup is None else s.warmup
    s.val_every = max(1, s.iterations // 5) if s.val_every is None else s.val_every
    s.workers = (0 if s.dataset == "toy" else min(8, os.cpu_count())) if s.workers is None else s.workers
    for name in ("iterations", "batch_size", "accumulate", "crop_size", "log_every", "save_every", "val_every"):
        if getattr(s, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(s, name)}: must be at least 1")
    for name in ("prompts", "regions", "recovery_layers", "warmup", "workers", "seed", "w_mask", "w_dice", "w_rec",
                 "weight_decay", "ablate"):
        if not 0 <= getattr(s, name) < 2**63:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(s, name)}: must be a number from 0 on")
    for name, most in {"prompts": 10_000, "regions": 10_000, "recovery_layers": 100, "workers": 256, "crop_size": 4096,
                       "batch_size": 100_000}.items():
        if getattr(s, name) > most:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(s, name)}: must be at most {most}")
    if not 0 < s.lr < 1 or not 0 <= s.dropout < 1:
        raise ValueError("--lr must be above 0 and --dropout at least 0, both below 1")
    if not 0.01 <= s.scale_min <= s.scale_max <= 100:
        raise ValueError(f"--scale-min {s.scale_min} and --scale-max {s.scale_max}: must rise, between 0.01 and 100")
    if s.data_root is None and s.dataset != "toy":
        raise ValueError(f"--data-root: where is {s.dataset}? Give its folder")
    return s


if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv}:
    parse_settings()  # it prints and leaves; what follows takes PyTorch two seconds

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import draw
import toy
from eval import (LOWER, UntrainedClip, autocast, class_table, evaluate, paper_table, result_pictures, run_script,
                  start_processes, zero_shot_metrics)
from model import (CLIPRC, clip_file, compile_parts, encode_text, file_sha256, load_clip, present_pairs, pseudo_labels,
                   read_checkpoint, save_checkpoint)


def learning_rate(step: int, s: Settings) -> float:
    """Sec. 4.2 and the released schedule: poly with power 0.9 down to 1e-6, times a linear warm-up from 1e-6.

    step: 0 for the first. Returns the rate of that step.
    """
    poly = (s.lr - 1e-6) * (1 - step / s.iterations) ** 0.9 + 1e-6
    return poly * (1 - (1 - step / s.warmup) * (1 - 1e-6)) if step < s.warmup else poly


def backward(model: CLIPRC, images: Tensor, labels: Tensor, text: Tensor, s: Settings,
             unseen: tuple[int, ...]) -> dict[str, Tensor]:
    """Eq. 11: adds the gradients of a batch's losses to the parameters', in `s.accumulate` parts; returns the losses.

    images (B, 3, H, W), labels (B, H, W), text (C, D) as `CLIPRC.losses` takes them.
    """
    weights, parts = (s.w_mask, s.w_dice, s.w_rec), s.accumulate
    if parts == 1:
        with autocast(images.device, s.precision):
            losses = model.losses(images, labels, text, weights, unseen)
        sum(losses.values()).backward()
        return losses
    batches = list(zip(images.chunk(parts), labels.chunk(parts)))
    first_seed = torch.initial_seed()
    if unseen:  # the loss divides by the pairs in the whole batch, so the parts' pseudo labels must be known beforehand
        with torch.no_grad(), autocast(images.device, s.precision):
            for n, (image, label) in enumerate(batches):
                torch.manual_seed(first_seed + n)  # with the very dropout that the part will meet again below
                label.copy_(pseudo_labels(model(image, text), label, unseen))
    pairs = present_pairs(labels, len(text)) / parts
    total = {}
    for n, (image, label) in enumerate(batches):
        torch.manual_seed(first_seed + n)
        with autocast(images.device, s.precision):
            losses = model.losses(image, label, text, weights, (), pairs)
        sum(losses.values()).div(parts).backward()
        total = {name: total.get(name, 0) + loss.detach() / parts for name, loss in losses.items()}
    return total


def load_trained(model: CLIPRC, checkpoint: dict, path: str | Path, clip_sha256: str) -> None:
    """Puts a checkpoint's trained tensors into a model of the same settings on the same CLIP.

    Raises ValueError naming the file where they belong to another model or another CLIP.
    """
    if checkpoint["clip_sha256"] not in (None, clip_sha256):
        raise ValueError(f"{path} was trained on another CLIP file than --clip names (their SHA-256 differ)")
    may_differ = {"initialiser", "dropout", "recovery_loss"}  # they do not change what a tensor means
    if model.recovery is None:  # without a recovery decoder one starts from what was trained with one
        may_differ |= {"rdl", "recovery_layers"}
    for name, value in model.settings.items():
        if name not in may_differ and checkpoint["model"].get(name) != value:
            raise ValueError(f"{path} holds another model's weights: its {name} is {checkpoint['model'].get(name)!r}, "
                             f"not {value!r}")
    state, weights = model.state_dict(), checkpoint["weights"]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in trained | (weights.keys() & state.keys()):
        if name not in weights or weights[name].shape != state[name].shape:
            raise ValueError(f"{path} holds another model's weights: {name} is not there or of another shape")
        if not weights[name].isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinite numbers; start from an earlier checkpoint")
        if name not in trained and not torch.allclose(weights[name], state[name].cpu(), atol=1e-3):
            raise ValueError(f"{path} was trained on another CLIP than --clip names: {name} differs")
    model.load_state_dict({name: weights[name] for name in trained}, strict=False)


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Sec. 4.2's several GPUs: the mean of the processes' gradients, in one message."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    message = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(message)
    message /= dist.get_world_size()
    for gradient, mean in zip(gradients, message.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(mean.view_as(gradient))


def claim_folder(s: Settings) -> dict | None:
    """The run's folder, and the checkpoint to go on from, if any. A finished or abandoned run in it is kept aside."""
    out = Path(s.out)
    checkpoint = None
    if s.resume and (out / "last.pt").exists():
        checkpoint = read_checkpoint(out / "last.pt")
        if not {"run", "optimizer", "step", "class_names", "unseen", "templates"} <= checkpoint.keys():
            raise ValueError(f"--resume: {out}/last.pt is no checkpoint of train.py; start from it with --init instead")
        may_differ = {"out", "resume", "ablate", "device", "workers", "recompute", "skip_bad", "log_every", "val_every",
                      "save_every", "data_root", "clip"}
        for name, now in asdict(s).items():
            then = checkpoint["run"].get(name, now)
            if now != then and name not in may_differ:
                raise ValueError(f"--{name.replace('_', '-')} {now}: {out}/last.pt was trained with {then}; "
                                 f"use that, or another --out for a new run")
    elif (out / "log.jsonl").exists() or (out / "last.pt").exists():
        kept = next(path for n in range(1, 10**6) if not (path := Path(f"{out}.{n}")).exists())
        os.rename(out, kept)
        print(f"the run in {out} is kept as {kept} (--resume would have gone on with it)")
    out.mkdir(parents=True, exist_ok=True)
    return checkpoint


def train(s: Settings) -> dict | None:
    """One run (Sec. 4.2), from top to bottom. Returns Table 1's columns in percent, or None where it was stopped."""
    # processes, data, CLIP; everything that can be wrong with the input is found before anything is written
    device = start_processes(s.device)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    toy_world = s.dataset == "toy" and s.data_root is None

    def fetch(get, *arguments) -> None:  # one process for all, then one a machine
        for turn in (rank == 0, os.environ.get("LOCAL_RANK", "0") == "0"):
            if turn:
                get(*arguments)
            if world > 1:
                dist.barrier()

    if toy_world:
        fetch(toy.default_world)
        s.data_root = str(toy.DEFAULT_WORLD)
    train_data, val_data = (data.open_dataset(s.dataset, s.data_root, split) for split in ("train", "val"))
    if s.unseen is not None:
        train_data, val_data = (data.with_unseen(split, s.unseen) for split in (train_data, val_data))
    names, unseen = train_data.class_names, train_data.unseen
    seen = [i for i in range(len(names)) if i not in unseen]
    if s.setting == "inductive":
        train_data = data.seen_classes(train_data)  # from here on training knows no other name, mask or number
    if s.batch_size % (world * s.accumulate):
        raise ValueError(f"--batch-size {s.batch_size}: {world} processes in {s.accumulate} parts cannot share it evenly")
    fetch(clip_file, s.clip)
    clip_path = clip_file(s.clip)
    clip_sha256, clip_model = file_sha256(clip_path), load_clip(clip_path)
    text = encode_text(clip_model, names, train_data.templates).to(device)  # T of all names, for testing
    train_text = text[seen] if s.setting == "inductive" else text

    # model and optimiser
    torch.manual_seed(s.seed)
    model = CLIPRC(clip_model.visual, num_prompts=s.prompts, regions=s.regions, update_regions=s.update_regions, ram=s.ram,
                   align=s.align, rdl=s.rdl and s.w_rec > 0, recovery_layers=s.recovery_layers,
                   recovery_loss=s.recovery_loss, initialiser=s.initialiser, dropout=s.dropout,
                   recompute=s.recompute).to(device)
    patch_size = model.encoder.patch_size
    cells = s.crop_size / patch_size / max(1, model.encoder.region_grid)
    if s.crop_size % patch_size or cells != int(cells):
        raise ValueError(f"--crop-size {s.crop_size} and --regions {s.regions}: {s.crop_size / patch_size:g} patches of "
                         f"{patch_size} pixels a side cannot be shared by {model.encoder.region_grid} regions a side")
    if s.compile:
        compile_parts(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=s.lr, weight_decay=s.weight_decay)
    lower, stride = LOWER if s.setting == "inductive" else 0.0, s.crop_size * 426 // 512
    transductive_unseen = unseen if s.setting == "transductive" else ()

    starts_over = not (s.resume and Path(s.out, "last.pt").exists())
    if s.init and starts_over:
        load_trained(model, read_checkpoint(s.init), s.init, clip_sha256)

    # the run's folder; a run that goes on takes up weights, optimiser and place
    out, start, checkpoint = Path(s.out), 0, None
    if rank == 0:
        checkpoint = claim_folder(s)
    if world > 1:
        dist.barrier()
        checkpoint = read_checkpoint(out / "last.pt") if not starts_over else None
    if checkpoint:
        for what, now in (("class_names", names), ("unseen", unseen), ("templates", train_data.templates)):
            if list(now) != checkpoint[what]:
                raise ValueError(f"--data-root {s.data_root}: its {what.replace('_', ' ')} are not those that {out}/last.pt "
                                 f"was trained with")
        load_trained(model, checkpoint, out / "last.pt", clip_sha256)
        try:
            optimizer.load_state_dict(checkpoint["optimizer"])
            start = int(checkpoint["step"])
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(f"{out}/last.pt: its optimiser's state or step makes no sense; "
                             f"start from it with --init") from None
    if world > 1:
        starts = torch.tensor([start, -start], device=device)
        dist.all_reduce(starts, dist.ReduceOp.MAX)
        if starts[0] != -starts[1]:
            raise ValueError(f"--out {s.out}: some processes find a checkpoint there and some do not; "
                             f"all machines must share it")

    def save(name: str, step: int) -> None:
        save_checkpoint(out / name, model, clip_sha256, run=asdict(s), clip=str(clip_path), class_names=list(names),
                        unseen=list(unseen), templates=list(train_data.templates), text=text.cpu(), step=step,
                        optimizer=optimizer.state_dict())

    def note(line: dict) -> None:
        with open(out / "log.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")

    def numbers(metrics: dict) -> dict:  # JSON has no NaN: what has no value is null
        return {name: value if math.isfinite(value) else None for name, value in metrics.items()}

    if rank == 0:
        lines = read_log(out / "log.jsonl")
        write_text(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in lines
                                              if line["step"] <= start and "result" not in line))
        print(f"{s.dataset}, {s.setting}: {len(train_data.pairs):,} images, {len(seen)} seen and {len(unseen)} unseen "
              f"classes" + (f"; {train_data.note}" if train_data.note else ""))
        print(f"{sum(p.numel() for p in trained):,} trained parameters, {s.iterations:,} steps of {s.batch_size} images on "
              f"{world} x {device.type}" + (f", from step {start:,}" if start else ""))

    stop_asked, usual = [], {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}

    def listen(on: bool) -> None:
        """In the loop, SIGINT and SIGTERM mean: finish the step, keep it, go. Elsewhere last.pt is up to date anyway."""
        for name, handler in usual.items():
            signal.signal(name, (lambda *_: stop_asked.append(True)) if on else handler)

    # the loop
    skipped = out / "skipped.txt"
    samples = data.TrainSet(train_data, s.crop_size, s.seed, (s.scale_min, s.scale_max), s.jitter,
                            skipped if s.skip_bad else None)
    batches = data.GlobalBatches(len(samples), s.batch_size, s.iterations, s.seed, rank, world, start)
    loader = DataLoader(samples, batch_sampler=batches, num_workers=s.workers, pin_memory=device.type == "cuda",
                        worker_init_fn=data.leave_signals)
    bar = tqdm(total=s.iterations, initial=start, desc="training", disable=True if rank else None)
    model.train()
    confusion, stopping = None, False
    listen(True)
    logged_at = asked_at = time.perf_counter()
    logged_step, waited, all_seconds, all_waited = start, 0.0, 0.0, 0.0  # waited: for pictures, since logged_at
    for step, (images, labels) in enumerate(loader, start=start):
        waited += time.perf_counter() - asked_at
        # Dropout's numbers depend on seed, step and process alone, so a resumed run draws what it would have drawn.
        torch.manual_seed(int(np.random.SeedSequence((s.seed, step, rank)).generate_state(1)[0]))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, s)
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        optimizer.zero_grad()
        losses = backward(model, images, labels, train_text, s, transductive_unseen)
        if world > 1:
            average_gradients(trained)
        optimizer.step()
        bar.update()

        done = step + 1
        stopping = any_process(bool(stop_asked), device)
        halfway = done == s.iterations // 2 and s.setting == "inductive"
        validating = (done % s.val_every == 0 or done == s.iterations) and not stopping
        saving = done % s.save_every == 0 or validating or stopping
        if done % s.log_every == 0 or saving or halfway:
            values = {name: loss.detach() for name, loss in losses.items()}
            for value in values.values():
                if world > 1:
                    dist.all_reduce(value)
            values = {name: value.item() / world for name, value in values.items()}
            total = sum(values.values())
            if not math.isfinite(total):
                raise ValueError(f"step {done}: the loss is {total}; what {out}/last.pt holds is from an earlier step. "
                                 f"Lower --lr, or look at the pictures with data.py --check")
            if rank == 0:
                seconds, steps = time.perf_counter() - logged_at, done - logged_step
                all_seconds, all_waited = all_seconds + seconds, all_waited + waited
                note({"step": done, "loss": total, **values, "lr": learning_rate(step, s),
                      "seconds_per_step": round(seconds / steps, 4), "wait_per_step": round(waited / steps, 4)}
                     | ({"skipped": len(read_lines(skipped))} if s.skip_bad else {}))
                bar.set_postfix(loss=f"{total:.3f}")
            logged_at, logged_step, waited = time.perf_counter(), done, 0.0
        if rank == 0 and halfway:  # before last.pt: a run that goes on from there does not come by here again
            save("half.pt", done)
        if rank == 0 and saving:
            save("last.pt", done)
        if stopping:
            break
        if validating:
            listen(False)
            confusion = evaluate(model, val_data, text, s.crop_size, stride, lower, seen, s.workers, s.precision)
            metrics = zero_shot_metrics(confusion, unseen)
            if rank == 0:
                note({"step": done, "val": numbers(metrics)})
                bar.write(f"step {done:,}: pAcc {metrics['pAcc']:.1f}  hIoU {metrics['hIoU']:.1f}  "
                          f"mIoU(S) {metrics['mIoU_S']:.1f}  mIoU(U) {metrics['mIoU_U']:.1f}")
            listen(True)
            logged_at = time.perf_counter()
        asked_at = time.perf_counter()
    listen(False)
    bar.close()
    if rank == 0 and all_waited > 0.1 * all_seconds:
        print(f"the loop waited {all_waited / all_seconds:.0%} of its time for pictures; more --workers would help")
    if rank == 0 and s.skip_bad and (bad := read_lines(skipped)):
        print(f"{len(bad):,} training pictures were skipped, {skipped} names them:\n  " + "\n  ".join(bad[:5]))

    # what came out
    metrics = None
    if stopping:
        if rank == 0:
            print(f"stopped after step {done:,}; the same command with --resume goes on from there")
    else:
        if confusion is None:  # the run was finished already
            confusion = evaluate(model, val_data, text, s.crop_size, stride, lower, seen, s.workers, s.precision)
        metrics = zero_shot_metrics(confusion, unseen)
        rows, untrained = {"CLIP-RC": metrics}, UntrainedClip(clip_model.visual, s.regions).to(device)
        if s.dataset == "toy":
            floor = evaluate(UntrainedClip(clip_model.visual).to(device), val_data, text, s.crop_size, stride, 0.0, ())
            rows = {"CLIP, untrained": zero_shot_metrics(floor, unseen)} | rows
        if rank == 0:
            lines = [line for line in read_log(out / "log.jsonl") if "loss" in line]
            parts = [name for name in ("loss", "mask", "dice", "recovery_q", "recovery_v") if lines and name in lines[-1]]
            draw.save(draw.line_chart({name: [(line["step"], line[name]) for line in lines] for name in parts},
                                      f"{s.dataset}, {s.setting}: training losses", log_y=True), out / "loss.png")
            pictures = result_pictures(model.eval(), untrained, val_data, text, s.crop_size, stride, lower, seen)
            for name, picture in pictures.items():
                draw.save(picture, out / name)
            note({"step": s.iterations, "result": numbers(metrics)})
            new = toy.new_attributes(names, unseen) if s.dataset == "toy" else ()
            print(class_table(confusion, names, unseen, new) + "\n")
            print(paper_table(rows))
            print(f"\nin {out}: " + ", ".join(sorted(path.name for path in out.iterdir() if path.is_file())))
    return metrics


def any_process(flag: bool, device: torch.device) -> bool:
    """True on every process as soon as it is on one: they must leave the loop together."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor([int(flag)], device=device)
    dist.all_reduce(flags)
    return bool(flags.item())


def read_log(path: Path) -> list[dict]:
    """The lines of log.jsonl; a last line that a kill cut short is left out."""
    lines = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line.decode()))
        except json.JSONDecodeError:
            break
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not UTF-8, so no log of a run; move it away") from None
        if not isinstance(lines[-1], dict) or not isinstance(lines[-1].get("step"), int):
            raise ValueError(f"{path}: a line is none of a run's log; move the file away")
    return lines


def read_lines(path: Path) -> list[str]:
    """The different lines of a file, in their order; none where there is no file."""
    return list(dict.fromkeys(path.read_text("utf-8").splitlines())) if path.exists() else []


def write_text(path: Path, text: str) -> None:
    """A small file, whole or not at all."""
    partial = Path(f"{path}.partial")
    partial.write_text(text)
    os.replace(partial, path)


# ------------------------------------------------------------------------------------------------ Tables 5 to 8

# (table, row, settings that differ from the default, the paper's pAcc, hIoU, mIoU(S), mIoU(U) on VOC 2012)
ABLATIONS = [
    ("Table 5", "none (ZegCLIP)", {"regions": 0, "ram": False, "rdl": False}, (94.6, 84.3, 91.9, 77.8)),
    ("Table 5", "RLB", {"ram": False, "rdl": False}, (95.2, 85.4, 91.5, 80.0)),
    ("Table 5", "RLB + RAM", {"rdl": False}, (95.4, 87.4, 92.5, 82.9)),
    ("Table 5", "RLB + RAM + RDL", {}, (95.8, 88.4, 92.8, 84.4)),
    ("Table 6", "region tokens trained", {"update_regions": True}, (95.8, 87.9, 93.3, 83.1)),
    ("Table 6", "M = 1", {"regions": 1}, (95.3, 86.9, 92.5, 82.0)),
    ("Table 6", "M = 4", {"regions": 4}, (95.6, 87.3, 92.6, 82.6)),
    ("Table 6", "M = 16", {"regions": 16}, (95.8, 88.4, 92.8, 84.4)),
    ("Table 6", "M = 64", {"regions": 64}, (96.0, 89.1, 93.0, 85.6)),
    ("Table 6", "M = 256", {"regions": 256}, (96.0, 89.2, 92.7, 86.0)),
    ("Table 7", "neither", {"align": ""}, (94.9, 85.6, 91.5, 80.5)),
    ("Table 7", "[CLS]", {"align": "G"}, (95.4, 86.6, 92.1, 82.0)),
    ("Table 7", "RLB", {"align": "R"}, (95.7, 87.0, 92.9, 81.8)),
    ("Table 7", "[CLS] + RLB", {}, (95.8, 88.4, 92.8, 84.4)),
    ("Table 8", "L1, 1 layer", {}, (95.8, 88.4, 92.8, 84.4)),
    ("Table 8", "L2, 1 layer", {"recovery_loss": "l2"}, (95.2, 86.7, 91.8, 81.9)),
    ("Table 8", "KD, 1 layer", {"recovery_loss": "kd"}, (95.4, 86.4, 92.2, 81.2)),
    ("Table 8", "L1, no layer", {"recovery_layers": 0}, (95.0, 86.6, 91.3, 82.1)),
    ("Table 8", "L1, 2 layers", {"recovery_layers": 2}, (95.4, 87.1, 92.4, 82.4)),
    ("Table 8", "L1, 3 layers", {"recovery_layers": 3}, (95.3, 87.0, 91.6, 82.8)),
    ("start", "truncated normal", {"initialiser": "truncated_normal"}, None),
    ("start", "as released", {"initialiser": "released"}, None),
]


def ablate(s: Settings) -> None:
    """Tables 5-8: every row over `s.ablate` seeds, mean and standard deviation beside the paper's VOC 2012 figures.

    A run is kept in OUT/ablate and never repeated: started again, the command goes on where it was. A row whose regions
    would be smaller than 2x2 patches is left out, and said.
    """
    side = s.crop_size // load_clip(clip_file(s.clip)).visual.conv1.kernel_size[0]  # patches
    seeds, finished = range(s.seed, s.seed + s.ablate), {}
    rows = [(table, row, replace(s, **changes), paper) for table, row, changes, paper in ABLATIONS]
    for table, row, settings, _ in tqdm(rows, "ablations", disable=None):
        m = math.isqrt(settings.regions)
        if m and (side % m or side // m < 2):
            continue
        changed = {f.name: getattr(settings, f.name) for f in fields(s) if getattr(settings, f.name) != getattr(s, f.name)}
        name = "-".join(f"{key}={value}" for key, value in changed.items()) or "default"
        finished[table + row] = []
        for seed in seeds:
            out = Path(s.out) / "ablate" / f"{name}-seed={seed}"
            results = [line["result"] for line in read_log(out / "log.jsonl") if "result" in line]
            if not results:
                with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                    results = [train(replace(settings, seed=seed, out=str(out), resume=True, val_every=s.iterations))]
            if results[-1] is None:
                print("stopped; the same command goes on from there")
                return
            finished[table + row].append(results[-1])
    print(f"{s.dataset}, {s.setting}, {s.iterations} steps, {len(seeds)} seeds: mean ± standard deviation"
          f"{'':>6}the paper's, VOC 2012")
    print(f"{'':<32}{'hIoU':>12}{'mIoU(S)':>13}{'mIoU(U)':>13}{'hIoU':>10}{'mIoU(S)':>9}{'mIoU(U)':>9}")
    for table, row, _, paper in rows:
        runs = finished.get(table + row)
        columns = [torch.tensor([math.nan if run[key] is None else run[key] for run in runs])
                   for key in ("hIoU", "mIoU_S", "mIoU_U")] if runs else []
        ours = "".join(f"{column.mean():>8.1f} ±{column.std(correction=0):4.1f}" for column in columns)
        print(f"{table:<9}{row:<22}{ours or 'a region would be smaller than 2x2 patches':<41}"
              + ("".join(f"{value:>9.1f}" for value in paper[1:]) if paper else ""))


def main() -> None:
    """One run, or all those of Tables 5-8."""
    s = parse_settings()
    if s.ablate and "RANK" in os.environ:
        raise ValueError("--ablate: its runs follow each other in one process; start it without torchrun")
    ablate(s) if s.ablate else train(s)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main, "stopped; the same command with --resume goes on from the last checkpoint")
