"""What CLIP-RC costs: arithmetic, time, memory and the data pipeline, beside the paper's or a plain version's figures.

    python bench.py gflops         Table 6's column: multiply-adds of a forward pass, for 1 to 1,024 region tokens
    python bench.py speed          seconds of a forward pass and of a training step, beside the equations as written
    python bench.py memory         peak memory of a training step, up to the 1,024 tokens at which the paper ran out of it
    python bench.py data           samples a second from JPEG files, and the confusion matrices of VOC's validation images

Random weights of ViT-B/16's size, 512x512 pixels, 20 classes (15 in training). "As written" is this code with attention,
region alignment, output and losses replaced by the literal equations below, which the tests hold the fast forms against.
Each table is also written as JSON. Other programs running at the same time spoil the figures.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import model
import rlb_attention
from eval import autocast, confusion_matrix, run_script, start_processes
from model import CLIPRC, RegionAlignment

PAPER_GFLOPS = {1: 119.8, 4: 121.2, 16: 126.7, 64: 148.9, 256: 238.2, 1024: 609.2}  # Table 6, by region tokens


# --------------------------------------------------------------------------------------- the equations, as written


def attention_as_written(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """Eq. 2: softmax(Q K^T / sqrt(d) + Mask) V, every score in memory. Shapes as in scaled_dot_product_attention."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if attn_mask is not None:
        scores = scores + torch.zeros_like(attn_mask, dtype=scores.dtype).masked_fill(~attn_mask, -math.inf)
    return F.dropout(scores.softmax(-1), dropout_p) @ v


def alignment_as_written(self: RegionAlignment, G: Tensor, I: Tensor, R: Tensor, T: Tensor,
                         grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 4-6: upsampled and concatenated first, one linear layer afterwards. Arguments and results as in RAM."""
    M = R.shape[1]
    cells = R.transpose(1, 2).unflatten(-1, (math.isqrt(M), math.isqrt(M)))  # (B, D, m, m)
    upsampled = F.interpolate(cells, size=grid, mode="bilinear", align_corners=False)  # (B, D, h, w)
    features = {"G": G[:, None].expand(-1, I.shape[1], -1), "R": upsampled.flatten(2).transpose(1, 2)}  # (B, N, D) each
    v = self.image_proj(torch.cat([features[name] for name in self.align] + [I], dim=-1))  # (B, N, D)
    R_t = T * (R + G[:, None])[:, :, None]  # (B, M, C, D)
    R_hat = torch.cat([R_t, T.expand_as(R_t)], dim=-1)  # (B, M, C, 2 D)
    return self.descriptor_proj(R_hat).flatten(1, 2), v, R_t.flatten(1, 2)  # (B, M C, D), (B, N, D), (B, M C, D)


def decode_as_written(self: CLIPRC, G: Tensor, I: Tensor, R: Tensor, T: Tensor,
                      grid: tuple[int, int]) -> tuple[Tensor, dict]:
    """Eq. 4-8: a map for each region and class, then their mean. Arguments and results as in `CLIPRC.decode`."""
    q, v, R_t = self.ram(G, I, R, T, grid)
    q_d, v_d = self.decoder(q, v)
    maps = (q_d @ v_d.transpose(1, 2)).view(len(G), -1, len(T), *grid)  # (B, M, C, h, w)
    return maps.mean(1), {"q": q, "q_d": q_d, "v_d": v_d, "R_t": R_t, "I": I, "T": T}


def losses_as_written(logits: Tensor, labels: Tensor, pairs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sec. 3.5: focal and dice loss with one-hot targets. Arguments and results as in `segmentation_losses`."""
    t = torch.stack([labels == c for c in range(logits.shape[1])], dim=1).to(logits)  # (B, C, H, W)
    p = logits.sigmoid()
    p_t = p * t + (1 - p) * (1 - t)
    focal = (0.25 * t + 0.75 * (1 - t)) * (1 - p_t) ** 2 * F.binary_cross_entropy_with_logits(logits, t, reduction="none")
    p, t = p.flatten(2), t.flatten(2)  # (B, C, H W)
    present = t.sum(-1) > 0  # (B, C)
    dice = 1 - (2 * (p * t).sum(-1) + 1) / (p.sum(-1) + t.sum(-1) + 1)
    P = present.sum().clamp(min=1) if pairs is None else pairs
    return focal.mean((2, 3)).sum() / P, (dice * present).sum() / P


@contextmanager
def as_written():
    """While it lasts, CLIP-RC (with RAM) is computed by the literal equations above."""
    with ExitStack() as stack:
        for where, name, literal in ((F, "scaled_dot_product_attention", attention_as_written),
                                     (rlb_attention, "attend_unmasked",
                                      lambda q, k, v, mask, num_regions: attention_as_written(q, k, v, mask)),
                                     (rlb_attention, "feed_forward", lambda x, mlp: mlp(x)),
                                     (RegionAlignment, "forward", alignment_as_written),
                                     (CLIPRC, "decode", decode_as_written),
                                     (model, "segmentation_losses", losses_as_written)):
            stack.enter_context(patch.object(where, name, literal))
        yield


# ------------------------------------------------------------------------------------------------ arithmetic and time


def vit_b16(regions: int, **settings) -> CLIPRC:
    """CLIP-RC on an image transformer of ViT-B/16's size, weights random."""
    return CLIPRC(model.clip.model.VisionTransformer(224, 16, 768, 12, 12, 512), regions=regions, **settings)


def forward_case(network: CLIPRC, batch: int, precision: str, device: torch.device, size: int, classes: int = 20):
    """Sec. 4.3's work: a function that computes the logits of `batch` windows."""
    network.eval().requires_grad_(False)
    images, text = torch.randn(batch, 3, size, size, device=device), unit_rows(classes, network, device)

    def forward() -> None:
        with torch.no_grad(), autocast(device, precision):
            network(images, text)
    return forward


def training_case(network: CLIPRC, batch: int, precision: str, device: torch.device, size: int, classes: int = 15):
    """Sec. 4.2's work: a function that takes one step of the optimiser, losses and gradients included."""
    network.train()
    images, text = torch.randn(batch, 3, size, size, device=device), unit_rows(classes, network, device)
    labels = torch.randint(classes, (batch, size, size), device=device)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4)
    for p in trained:  # as in the middle of a run: AdamW's moments are there
        p.grad = torch.zeros_like(p)
    optimizer.step()

    def step() -> None:
        optimizer.zero_grad()
        with autocast(device, precision):
            losses = network.losses(images, labels, text)
        sum(losses.values()).backward()
        optimizer.step()
    return step


def unit_rows(count: int, network: CLIPRC, device: torch.device) -> Tensor:
    """Something in the place of T (count, D)."""
    return F.normalize(torch.randn(count, network.encoder.visual.proj.shape[1], device=device), dim=-1)


def seconds(work, device: torch.device) -> float:
    """The time of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def product_rate(device: torch.device, precision: str, side: int = 2048) -> float:
    """What the machine reaches at best: 10^9 multiply-adds a second in a large product of matrices."""
    a, b = (torch.randn(side, side, device=device, dtype=getattr(torch, precision)) for _ in range(2))
    return side**3 / 1e9 / min(seconds(lambda: a @ b, device) for _ in range(10))


def multiply_adds(case, regions: int, images: int = 1, size: int = 512) -> float:
    """10^9 multiply-adds of a case at ViT-B/16's size, attention included; a forward pass is Table 6's GFLOPs column.

    Counted on the meta device, which computes shapes only: there attention is spelled out as matrix products, and masked
    scores count, also where `attend_unmasked` saves them. A training step has its backward pass in it, but for the gradients
    of frozen weights, which nobody computes.
    """
    with torch.device("meta"):
        work = case(vit_b16(regions, recompute=False), images, "float32", torch.device("meta"), size)
        with FlopCounterMode(display=False) as counter:
            work()
    return counter.get_total_flops() / 2 / 1e9  # the counter counts a multiply-add as two


def times_in_turn(case, regions: int, images: int, device: str, size: int, rounds: int, compiled: bool) -> list[list[float]]:
    """Seconds of a case as written in single precision, as computed here, and so in bfloat16, in turn, `rounds` times."""
    device = torch.device(device)
    plain, ours = vit_b16(regions, recompute=False).to(device), vit_b16(regions).to(device)
    if compiled:
        model.compile_parts(ours)
    works = [case(plain, images, "float32", device, size), case(ours, images, "float32", device, size),
             case(ours, images, "bfloat16", device, size)]
    times = []
    for _ in tqdm(range(rounds + 1), f"M = {regions}", leave=False, disable=None):
        with as_written():
            first = seconds(works[0], device)
        times.append([first, *(seconds(work, device) for work in works[1:])])
    return times[1:]  # the first round warms up


def speed(device: torch.device, rounds: int, compiled: bool, size: int = 512) -> list[dict]:
    """Seconds of each case as written in single precision and as this code computes it, in turn, `rounds` times.

    The ratios are medians over the rounds: a machine whose speed drifts spoils seconds, not ratios. Each case has a process
    of its own: in memory that an earlier one gave back, the equations as written run up to twice as fast.
    """
    best = {precision: product_rate(device, precision) for precision in ("float32", "bfloat16")}
    print(f"large products: {best['float32']:,.0f} G multiply-adds a second in float32, {best['bfloat16']:,.0f} in bfloat16")
    print(f"{'seconds':<36}{'as written':>11}{'float32':>9}{'ratio':>7}{'of best':>9}"
          f"{'bfloat16':>10}{'ratio':>7}{'of best':>9}")
    batch, table = 16 if device.type == "cuda" else 2, []
    cases = [("forward pass, 1 image", forward_case, 16, 1), ("forward pass, 1 image", forward_case, 256, 1),
             (f"training step, {batch} images", training_case, 16, batch), ("training step, 1 image", training_case, 256, 1)]
    for name, case, regions, images in cases:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            times = np.array(pool.submit(times_in_turn, case, regions, images, str(device), size, rounds, compiled).result())
        row = {"case": name, "regions": regions, "G multiply-adds": multiply_adds(case, regions, images, size),
               "as written": np.median(times[:, 0]), "rounds": times.tolist()}
        line = f"{f'{name}, M = {regions}':<36}{row['as written']:>11.3f}"
        for i, precision in ((1, "float32"), (2, "bfloat16")):
            row[precision] = {"seconds": np.median(times[:, i]), "ratio": np.median(times[:, 0] / times[:, i])}
            row[precision]["of best"] = row["G multiply-adds"] / row[precision]["seconds"] / best[precision]
            line += "{seconds:>{w}.3f}{ratio:>6.2f}x{of best:>9.0%}".format(**row[precision], w=8 + i)
        table.append(row)
        print(line)
    return table


# --------------------------------------------------------------------------------------------------------- memory


def peak_memory(device: str, size: int, regions: int, images: int, precision: str, literal: bool) -> dict:
    """Runs a training step in this process and tells its peak, in GB, all included (a GPU: of PyTorch's tensors)."""
    device = torch.device(device)
    network = vit_b16(regions, recompute=False if literal else None).to(device)
    step = training_case(network, images, precision, device, size)
    with as_written() if literal else ExitStack():
        took = seconds(step, device)
    used = torch.cuda.max_memory_allocated() if device.type == "cuda" else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"GB": used / 1e9, "seconds": took}


def memory(device: torch.device, size: int = 512) -> list[dict]:
    """Peak memory of a training step, each case in a process of its own. The literal one stops at M = 256: at 1,024 it
    takes some 20 GB, and the paper's ran out of memory on a card of 24."""
    print(f"{'training step':<26}{'precision':<11}{'as written':>20}{'ours':>20}")
    table = []
    batch = 16 if device.type == "cuda" else 2
    cases = [(regions, images, precision) for regions, images in ((16, batch), (256, 1), (1024, 1))
             for precision in ("float32", "bfloat16")]
    if device.type == "cuda":
        cases.append((1024, 2, "bfloat16"))  # two images a card, as the paper's 16 on eight
    for regions, images, precision in cases:
        row = {"regions": regions, "images": images, "precision": precision}
        for name, literal in (("as written", True), ("ours", False)):
            if literal and (regions > 256 or precision == "bfloat16"):
                continue
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                row[name] = pool.submit(peak_memory, str(device), size, regions, images, precision, literal).result()
        cells = ("{GB:>9.2f} GB {seconds:>6.1f} s".format(**row[name]) if name in row else "-"
                 for name in ("as written", "ours"))
        label = f"M = {regions}, {images} image" + "s" * (images > 1)
        print(f"{label:<26}{precision:<11}" + "".join(f"{cell:>20}" for cell in cells))
        table.append(row)
    return table


# ---------------------------------------------------------------------------------------------------- data pipeline


def write_photos(root: Path, count: int) -> None:
    """A VOC folder of `count` made-up photographs: 500x375 JPEG of about the detail and bytes of VOC's, five classes."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        picture = sum(np.asarray(Image.fromarray(rng.integers(0, 256, (375 // cell + 1, 500 // cell + 1, 3), np.uint8))
                                 .resize((500, 375), Image.Resampling.BICUBIC), np.float32) * share
                      for cell, share in ((100, 0.45), (25, 0.25), (6, 0.18), (2, 0.12)))  # large shapes to fine grain
        Image.fromarray(picture.astype(np.uint8)).save(root / "JPEGImages" / f"{i}.jpg", quality=95)
        mask = Image.fromarray(rng.integers(0, 6, (4, 5), np.uint8)).resize((500, 375), Image.Resampling.NEAREST)
        mask.save(root / "SegmentationClass" / f"{i}.png")
    for split in ("train", "val"):
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("".join(f"{i}\n" for i in range(count)))


def pipeline(workers: int, size: int = 512) -> list[dict]:
    """Sec. 4.2's samples a second on one core and with workers; Sec. 4.3's confusion matrices of 1,449 label maps."""
    torch.set_num_threads(1)
    table = []

    def note(what: str, value: float, unit: str, setting: str) -> None:
        print(f"{what:<44}{value:>10.1f} {unit:<16}{setting}")
        table.append({"what": what, "value": value, "unit": unit, "setting": setting})

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "voc")
        write_photos(root, 64)
        kilobytes = sum(path.stat().st_size for path in (root / "JPEGImages").iterdir()) / 64e3
        photos = f"500x375 JPEG, {kilobytes:.0f} kB each, mean of 64"
        samples = data.TrainSet(data.seen_classes(data.open_dataset("voc", root, "train")), size, seed=0)
        for i in range(8):
            samples[0, i]
        start = time.process_time()
        for epoch in range(1, 5):
            for i in range(64):
                samples[epoch, i]
        note(f"augmented {size}x{size} samples, one core", 4 * 64 / (time.process_time() - start), "a CPU second", photos)
        batches = data.GlobalBatches(len(samples), 16, 60, seed=0)
        loader = iter(DataLoader(samples, batch_sampler=batches, num_workers=workers, worker_init_fn=data.leave_signals))
        for _ in range(10):
            next(loader)
        start = time.perf_counter()
        delivered = sum(len(images) for images, _ in loader)
        note(f"the same, {workers} workers, batches of 16", delivered / (time.perf_counter() - start), "a second",
             f"{os.cpu_count()} cores")

    rng = np.random.default_rng(0)
    maps = [torch.from_numpy(rng.integers(0, 21, (375, 500), np.uint8)) for _ in range(32)]
    for label in maps[:16]:
        label[label == 20] = data.IGNORE
    start = time.process_time()
    for i in range(1449):
        confusion_matrix(maps[16 + i % 16].clamp(max=19).long(), maps[i % 16], 20)
    note("confusion matrix of 1,449 maps, one core", time.process_time() - start, "CPU seconds", "500x375, 20 classes")
    return table


def main() -> None:
    """Prints the table that was asked for, and keeps it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("gflops", "speed", "memory", "data"), help="which table")
    parser.add_argument("--device", default="auto", help="speed, memory: auto, cpu or cuda (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="speed: times each case is measured (default %(default)s)")
    parser.add_argument("--compile", action="store_true", help="speed: ours through torch.compile")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count()),
                        help="data: loader processes (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs", "bench"), help="folder of the JSON (default %(default)s)")
    args = parser.parse_args()
    if args.rounds < 1 or args.workers < 1:
        raise ValueError("--rounds and --workers must be at least 1")
    device = start_processes(args.device)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else \
        f"{os.cpu_count()} cores {platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{date.today()}, {machine}, PyTorch {torch.__version__}; 512x512 pixels, ViT-B/16's size\n")
    if args.table == "gflops":
        print("region tokens   paper   ours   ratio      (10^9 multiply-adds, 20 classes)")
        table = []
        for regions, paper in PAPER_GFLOPS.items():
            table.append({"regions": regions, "paper": paper, "ours": multiply_adds(forward_case, regions)})
            print(f"{regions:>13}{paper:>8.1f}{table[-1]['ours']:>7.1f}{table[-1]['ours'] / paper:>8.3f}")
    elif args.table == "speed":
        table = speed(device, args.rounds, args.compile)
    elif args.table == "memory":
        table = memory(device)
    else:
        table = pipeline(args.workers)
    args.out.mkdir(parents=True, exist_ok=True)
    partial = args.out / f"{args.table}.json.partial"
    partial.write_text(json.dumps({"date": str(date.today()), "machine": machine, "torch": torch.__version__,
                                   "settings": {k: str(v) for k, v in vars(args).items()}, "table": table}, indent=1))
    os.replace(partial, args.out / f"{args.table}.json")


if __name__ == "__main__":
    run_script(main)
