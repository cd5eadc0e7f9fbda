"""Train CLIP-RC (paper Sec. 4.2): settings, set-up, the loop, the end.

    python train.py                         a small drawn world: minutes on a laptop, no download
    torchrun --nproc-per-node=8 train.py --dataset voc --data-root data/VOC2012          the paper's

A run writes to --out: log.jsonl (the losses), last.pt (its newest state), half.pt (from the middle
of an inductive run, where a transductive one starts), and images. You can stop a run at any time;
the same command with --resume ends with the same weights (on a GPU, up to rounding). Two --resume
of one run at the same time are not detected. The losses: docs/walkthrough.md#35-the-loss
"""

import argparse
import functools
import hashlib
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

import data
from eval import LOWER, MaskCLIP, class_table, evaluate, paper_table, zero_shot_metrics
from model import CLIPRC, RECOVERY_LOSSES, truncated_normal
from predict import result_images
from util import toy
from util.checkpoint import (add_to_log, newest_run, read_checkpoint, require_same, save_checkpoint,
                             start_log)
from util.clip_files import TOY_CLIP, clip_digest, encode_text, load_clip
from util.images import save_image
from util.processes import (PRECISIONS, autocast, mean_over_processes, own_group, rank,
                            run_script, start_processes, world_size)

# Sec. 4.2 and the released code (its lr: docs/differences.md). Edit here what has no flag.
RELEASED = {
    "prompts": 10, "iterations": 40_000, "batch_size": 16, "crop_size": 512, "lr": 2e-4,
    "dropout": 0.1, "small_start": False,  # these have flags, those below have none
    "warmup": 1500, "weight_decay": 0.01, "scale": (0.5, 2.0), "jitter": True,
    "loss_weights": (100.0, 1.0, 2.0)}  # of the focal, the dice and the recovery loss
PRESETS = {
    "voc": RELEASED,
    "context": RELEASED | {"prompts": 35},  # not in the release: K of ZegCLIP's successors
    "folder": RELEASED | {"prompts": 35},
    "coco-stuff": RELEASED | {"prompts": 100, "iterations": 80_000,
                              "loss_weights": (200.0, 3.0, 50.0)},
    "toy": RELEASED | {  # as in the paper, except where small images force a change
        "crop_size": 64, "prompts": 4,  # a scene has 64 patches, an image of VOC 1,024
        "iterations": 800, "lr": 1e-3,  # a fiftieth of VOC's steps, so larger ones
        "batch_size": 8,  # half the time on a laptop's processor
        "dropout": 0.0,  # 800 steps do not overfit, and dropout takes a third of a CPU's step
        "scale": (1.0, 1.0), "jitter": False,  # 64 pixels are few; another hue is another class
        "small_start": True},  # from the released start hIoU ends at 0; docs/results.md
}
SUPERVISED = {"coco-stuff": (100.0, 1.5, 1.0), "toy": (100.0, 1.0, 2.0)}  # others: no recovery loss
LOG_EVERY, SAVE_EVERY = 10, 500  # steps
MAY_CHANGE = "out resume device workers compile clip data_root init val_every".split()  # --resume


def parse_settings(arguments: list[str] | None = None) -> argparse.Namespace:
    """Paper Sec. 4.2: the command line, with the data set's preset for what was not given."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, flag, path = parser.add_argument, argparse.BooleanOptionalAction, os.path.expanduser
    add("--dataset", default="toy", choices=PRESETS, help="the data set (toy)")
    add("--data-root", type=path, help="its folder; the toy world is drawn on first use")
    add("--clip", type=path, help="CLIP's file or name (ViT-B/16; toy: the one that ships here)")
    add("--setting", default="inductive", choices=("inductive", "transductive", "supervised"),
        help="what training knows of the unseen classes: nothing, names, or names and masks")
    add("--unseen", help="the unseen classes, comma-separated, '' for none (the data set's)")
    add("--init", type=path, help="start from this checkpoint (transductive: the newest half.pt)")
    add("--out", type=path, help="the run's folder (runs/DATASET, or the next free DATASET-2 ...)")
    add("--seed", type=int, default=0, help="fixes weights, order of the data and dropout (0)")
    add("--regions", type=int, default=16, metavar="M", help="region tokens, a square, or 0 (16)")
    add("--update-regions", action=flag, default=False, help="train the region tokens (Table 6)")
    add("--ram", action=flag, default=True, help="RAM and RDL; without: ZegCLIP's head (Table 5)")
    add("--align", default="GR", choices=("GR", "G", "R", ""), help="beside I in Eq. 4 (Table 7)")
    add("--recovery-loss", default="l1", choices=(*RECOVERY_LOSSES, "none"), help="Table 8 (l1)")
    add("--recovery-layers", type=int, default=1, help="of the recovery decoder (Table 8)")
    add("--small-start", action=flag, help="small initial weights of the head (toy: yes)")
    add("--prompts", type=int, metavar="K", help="in each layer (10; context 35, coco-stuff 100)")
    add("--dropout", type=float, help="on prompts, attention weights, decoder layers (0.1; toy 0)")
    add("--iterations", type=int, help="steps (40,000; coco-stuff double, transductive half)")
    add("--batch-size", type=int, help="images in a step, over all processes (16; toy 8)")
    add("--accumulate", type=int, default=1, metavar="N", help="parts of a batch, to save memory; "
        "each divides its losses by its own (image, class) pairs, so results differ a little (1)")
    add("--crop-size", type=int, help="side of a training image in pixels (512; toy 64)")
    add("--lr", type=float, help="peak learning rate of AdamW (2e-4; toy 1e-3, transductive 2e-4)")
    add("--device", default="auto", help="auto, cpu or cuda (auto)")
    add("--precision", default="tf32", choices=PRECISIONS, help="on a CPU tf32 is float32 (tf32)")
    add("--compile", action=flag, default=False, help="torch.compile: minutes once, faster steps")
    add("--workers", type=int, help="processes that prepare images (up to 8 each; toy 0)")
    add("--val-every", type=int, help="steps between evaluations (a fifth of the run)")
    add("--resume", action="store_true", help="continue --out, or the newest run of its kind")
    args = parser.parse_args(arguments)
    preset = dict(PRESETS[args.dataset])
    if args.setting == "transductive":
        preset |= {"iterations": preset["iterations"] // 2, "lr": 2e-4}  # from trained weights
    if args.setting == "supervised":
        preset["loss_weights"] = SUPERVISED.get(args.dataset, (100.0, 1.0, 0.0))
    vars(args).update({k: v for k, v in preset.items() if getattr(args, k, None) is None})
    args.warmup = min(args.warmup, args.iterations // 10)
    args.val_every = args.val_every or max(1, args.iterations // 5)
    args.clip = args.clip or (str(TOY_CLIP) if args.dataset == "toy" else "ViT-B/16")
    if args.workers is None:
        cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.workers = 0 if args.dataset == "toy" else min(8, max(1, cores))
    if args.data_root is None and args.dataset != "toy":
        raise ValueError(f"--data-root: where is {args.dataset}?")
    args.data_root = str(Path(args.data_root or toy.draw_world()).resolve())
    place = f"runs/{Path(args.data_root).name if args.dataset == 'folder' else args.dataset}"
    if args.init is None and args.setting == "transductive":
        args.init = f"{newest_run(place)}/half.pt"
    place += f"-{args.setting}" * (args.setting != "inductive")
    args.out = args.out or newest_run(place, or_next=not args.resume)
    return args


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Released schedule from step 0: poly, power 0.9, down to 1e-6, times a linear warm-up."""
    poly = (args.lr - 1e-6) * (1 - step / args.iterations) ** 0.9 + 1e-6
    return poly * (1 - (1 - step / args.warmup) * (1 - 1e-6)) if step < args.warmup else poly


def small_start(model: CLIPRC) -> None:
    """Ours: start the head as the released code's uncalled initialiser would, and the layer on the
    descriptors a hundred times smaller. See docs/differences.md."""
    truncated_normal(model.zegclip or nn.ModuleList([model.ram, model.decoder]))
    if model.ram:
        for block in model.decoder.image_blocks:  # so does that initialiser
            nn.init.zeros_(block.ffn[3].weight)
        model.ram.descriptor_proj.weight.data *= 0.01


def load_start(source: str | Path, model: CLIPRC, settings: dict, resumed: bool) -> dict:
    """The checkpoint that a run starts from; its weights are loaded. settings: what a resumed run
    must share with it. Raises ValueError for a checkpoint that this run cannot start from."""
    then = read_checkpoint(source)
    if resumed:
        require_same(source, then["run"] | then, settings)
    else:
        free = ["dropout", "recovery_loss"] + ["rdl", "recovery_layers"] * (model.recovery is None)
        same = {k: v for k, v in model.settings.items() if k not in free}  # has no weights: free
        require_same(source, then["model"] | then, same | {"clip_digest": settings["clip_digest"]})
        saw = {name.casefold() for i, name in enumerate(then["class_names"])
               if i not in then["unseen"] or then["run"]["setting"] == "supervised"}
        leaked = saw & {settings["class_names"][i].casefold() for i in settings["unseen"]}
        if leaked and settings["setting"] != "supervised":
            raise ValueError(f"--init {source}: its training saw masks of {min(leaked)}, which is "
                             "unseen here, so the result would not be zero-shot")
        then = {"step": 0, "weights": then["weights"]}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    model.load_state_dict({name: then["weights"][name] for name in trained}, strict=False)
    return then


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, in one all-reduce."""
    if world_size() > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        mean = mean_over_processes(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients])):
            gradient.copy_(part.view_as(gradient))


def main() -> None:
    # -------------------------------------------------------------------------------- set-up
    args = parse_settings()
    device, parts = start_processes(args.device, args.precision), args.accumulate
    train_data, val_data = (data.open_dataset(args.dataset, args.data_root, split, args.unseen)
                            for split in ("train", "val"))
    names, unseen = train_data.class_names, train_data.unseen
    seen = [i for i in range(len(names)) if i not in unseen]
    clip_model = load_clip(args.clip).to(device)
    text = train_text = encode_text(clip_model, names, train_data.templates)  # T (C, D)
    pseudo = unseen if args.setting == "transductive" else ()  # their pixels get pseudo labels
    lower = LOWER if args.setting == "inductive" else 0.0
    if args.setting == "inductive":  # the model is given the seen classes' names and masks alone
        train_data, train_text = data.seen_classes(train_data), text[seen]  # (seen C, D)

    torch.manual_seed(args.seed)
    rdl = args.ram and args.recovery_loss != "none" and args.loss_weights[2] > 0
    model = CLIPRC(clip_model.visual, num_prompts=args.prompts, regions=args.regions, ram=args.ram,
                   update_regions=args.update_regions, align=args.align, dropout=args.dropout,
                   rdl=rdl, recovery_layers=args.recovery_layers,
                   recovery_loss=args.recovery_loss if rdl else "l1")
    if args.small_start:
        small_start(model)
    model.to(device).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=args.weight_decay, fused=True)
    unit, share = model.encoder.patch_size * max(1, model.encoder.region_grid), world_size() * parts
    if args.crop_size % unit or args.batch_size % share:
        raise ValueError(f"--crop-size must be a multiple of {unit} (--regions, CLIP's patches), "
                         f"--batch-size of {share} (processes, --accumulate)")

    out, log, start = Path(args.out), Path(args.out, "log.jsonl"), 0
    files = str([image.parts[-2:] for image, _ in train_data.pairs])
    origin = {"class_names": list(names), "unseen": list(unseen),
              "templates": list(train_data.templates), "clip_digest": clip_digest(clip_model),
              "images": hashlib.sha256(files.encode()).hexdigest()}
    resumed = args.resume and (out / "last.pt").exists()
    source = out / "last.pt" if resumed else args.init
    if source:
        settings = {k: v for k, v in (vars(args) | origin).items() if k not in MAY_CHANGE}
        then = load_start(source, model, settings, resumed)
        start = then["step"]
        optimizer.load_state_dict(then.get("optimizer", optimizer.state_dict()))
    samples = data.TrainSet(train_data, args.crop_size, args.seed, args.scale, args.jitter)
    loader = DataLoader(samples, batch_sampler=data.GlobalBatches(
        len(samples), args.batch_size, args.iterations, args.seed, rank(), world_size(), start),
        num_workers=args.workers, pin_memory=device.type == "cuda", worker_init_fn=own_group)
    test = functools.partial(evaluate, dataset=val_data, text=text, crop=args.crop_size,
                             stride=None, workers=args.workers, precision=args.precision)
    for part in model.children() if args.compile else ():
        part.compile()
    start_log(log, start, args.resume)
    if rank() == 0:
        print(f"{args.dataset}, {args.setting}: {len(samples):,} images, {len(seen)} seen and "
              f"{len(unseen)} unseen classes; steps {start:,} to {args.iterations:,} in {out}"
              + f", from {source}" * bool(source) + f"; {train_data.note}" * bool(train_data.note))

    # ------------------------------------------------------------------------------ the loop
    saved, logged, logged_at, shown_at = start, start, time.monotonic(), -math.inf
    try:
        for step, (images, labels) in enumerate(loader, start):
            # Dropout depends on seed, step and process alone, so a resumed run repeats it.
            numbers = np.random.SeedSequence((args.seed, step, rank())).generate_state(1)
            torch.manual_seed(int(numbers[0]))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            images, labels = (x.to(device, non_blocking=True) for x in (images, labels))
            optimizer.zero_grad()
            means = {}
            for x, y in zip(images.chunk(parts), labels.chunk(parts)):
                with autocast(device, args.precision):
                    losses = model.losses(x, y, train_text, args.loss_weights, pseudo)
                (sum(losses.values()) / parts).backward()  # Eq. 11
                means = {k: means.get(k, 0) + loss.detach() / parts for k, loss in losses.items()}
            average_gradients([*trained.values()])
            optimizer.step()

            done = step + 1
            testing = done % args.val_every == 0 and done < args.iterations
            saving = testing or done % SAVE_EVERY == 0 or done == args.iterations
            halfway = done == args.iterations // 2 and args.setting == "inductive"
            if saving or done % LOG_EVERY == 0:
                values = {name: mean_over_processes(loss).item() for name, loss in means.items()}
                values = {"loss": sum(values.values())} | values
                if not math.isfinite(values["loss"]):
                    raise ValueError(f"step {done}: the loss is {values['loss']}; lower --lr; the "
                                     f"newest checkpoint is of step {saved:,}")
                speed = (done - logged) * args.batch_size / (time.monotonic() - logged_at)
                logged, logged_at = done, time.monotonic()
                line = {"step": done, **values, "lr": learning_rate(step, args), "images/s": speed}
                add_to_log(log, line, show=logged_at > shown_at + 10)
                shown_at = logged_at if logged_at > shown_at + 10 else shown_at
            for name in ["half.pt"] * halfway + ["last.pt"] * saving:
                save_checkpoint(out / name, model.settings, trained, run=vars(args), clip=args.clip,
                                text=text, step=done, optimizer=optimizer.state_dict(), **origin)
            saved = done if saving else saved
            if testing:
                metrics = zero_shot_metrics(test(model, lower=lower, seen=seen), unseen)
                add_to_log(log, {"step": done, "val": metrics}, show=True)
                logged_at = time.monotonic()
    except (KeyboardInterrupt, SystemExit):
        if rank() == 0:
            print(f"--resume continues from step {saved:,}" if saved else "nothing is saved yet")
        raise

    # ------------------------------------------------------------------------------- the end
    confusion, baseline = test(model, lower=lower, seen=seen), MaskCLIP(clip_model.visual)
    metrics = zero_shot_metrics(confusion, unseen)
    untrained = zero_shot_metrics(test(baseline, lower=0.0, seen=()), unseen)
    add_to_log(log, {"step": args.iterations, "result": metrics})
    if rank() == 0:
        figures = result_images(model, val_data, text, args.crop_size, lower, seen)
        for name, figure in figures.items():
            save_image(figure, out / name)
        print(class_table(confusion, names, unseen), end="\n\n")
        print(paper_table({"MaskCLIP, untrained": untrained, model.name: metrics}))
        print(f"\nin {out}: {', '.join(sorted(path.name for path in out.iterdir()))}\nnext: python "
              f"predict.py {out}/last.pt IMAGE; docs/data.md is about your own data")


if __name__ == "__main__":
    run_script(main)
