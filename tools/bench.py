"""What CLIP-RC costs: arithmetic beside the paper's figures, memory, and time on this machine.

    python -m tools.bench gflops     Table 6: multiply-adds of a forward pass
    python -m tools.bench memory     a training step's memory, planned: which batch fits on a GPU
    python -m tools.bench speed      time and memory of a forward pass and of a training step
    python -m tools.bench all        all three, and with --out FILE.json what a report needs

The weights are random and of ViT-B/16's size, the images have 512 x 512 pixels. A forward pass has
20 classes, a training step the 15 seen ones. Other programs running meanwhile spoil the figures.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from model import CLIPRC
from util.clip_files import clip
from util.processes import PRECISIONS, autocast, peak_flops, run_script, start_processes

PAPER_GFLOPS = {1: 119.8, 4: 121.2, 16: 126.7, 64: 148.9, 256: 238.2, 1024: 609.2}  # Table 6


def vit_b16(regions: int, **settings) -> CLIPRC:
    """CLIP-RC on an image transformer of ViT-B/16's size, with random weights."""
    visual = clip.model.VisionTransformer(224, 16, 768, 12, 12, 512)
    return CLIPRC(visual, regions=regions, **settings)


def forward_pass(network: CLIPRC, images: int, precision: str, device: torch.device,
                 size: int = 512, classes: int = 20) -> Callable[[], None]:
    """A function that computes the logits of a batch of `images` windows of size x size pixels."""
    network.eval().requires_grad_(False)
    x = torch.randn(images, 3, size, size, device=device)
    T = F.normalize(torch.randn(classes, network.encoder.visual.output_dim, device=device), dim=1)

    def work() -> None:
        with torch.no_grad(), autocast(device, precision):
            network(x, T)
    return work


def training_step(network: CLIPRC, images: int, precision: str, device: torch.device,
                  size: int = 512, classes: int = 15) -> Callable[[], None]:
    """A function that takes one step of the optimiser on a batch of `images` images (Sec. 4.2)."""
    network.train()
    x = torch.randn(images, 3, size, size, device=device)
    labels = torch.randint(classes, (images, size, size), device=device)
    T = F.normalize(torch.randn(classes, network.encoder.visual.output_dim, device=device), dim=1)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4)

    def work() -> None:
        optimizer.zero_grad()
        with autocast(device, precision):
            losses = network.losses(x, labels, T)
        sum(losses.values()).backward()
        optimizer.step()
    return work


def multiply_adds(case: Callable, regions: int, images: int = 1, size: int = 512) -> float:
    """10^9 multiply-adds of a case, attention included: Table 6's GFLOPs for a forward pass.
    On the meta device PyTorch computes shapes only, and attention as two matrix products. Entries
    that the mask hides count. A training step counts its backward pass, but nothing twice."""
    meta = torch.device("meta")
    with meta:
        work = case(vit_b16(regions, recompute=False), images, "float32", meta, size)
        with FlopCounterMode(display=False) as counter:
            work()
    return counter.get_total_flops() / 2 / 1e9  # the counter counts a multiply-add as two


class LiveMemory(TorchDispatchMode):
    """Adds up the tensors that are alive on the meta device; `peak` is their most, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.known, self.now, self.peak = WeakIdKeyDictionary(), 0, 0

    def add(self, size: int) -> None:
        """Change the sum."""
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(out)):
            storage = tensor.untyped_storage()  # shared by views
            if storage not in self.known:
                size = storage.nbytes()
                self.known[storage] = weakref.ref(storage, lambda _, size=size: self.add(-size))
                self.add(size)
        return out


def planned_memory(regions: int, images: int, classes: int, device: str = "cuda") -> float:
    """Peak GB of a training step's tensors in float32, computed on the meta device: nothing runs.
    device: "cpu" keeps the scores of attention with dropout, as PyTorch does there."""
    original = F.scaled_dot_product_attention

    def attention(q, k, v, attn_mask=None, dropout_p=0.0):
        if dropout_p and device == "cpu":
            return original(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p)
        # A kernel that never has the scores in memory, as a GPU's.
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]

    meta = torch.device("meta")
    with meta, patch.object(F, "scaled_dot_product_attention", attention), LiveMemory() as live:
        step = training_step(vit_b16(regions), images, "float32", meta, classes=classes)
        step()
        step()  # now with AdamW's state
    return live.peak / 1e9


def seconds(work: Callable, device: torch.device) -> float:
    """The time of one call."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(case: Callable, regions: int, images: int, precision: str, compile: bool, device: str,
            rounds: int, side: int = 2048) -> dict:
    """Run a case 1 + `rounds` times, the first to warm up. For a process of its own.
    Returns the times in seconds; the peak memory in GB (on a GPU that of the tensors, on a CPU
    what the process took beyond PyTorch itself); and the best rate in floating-point operations
    a second: a card's from its data sheet, a CPU's from a product of side x side matrices."""
    device = torch.device(device)
    tiny = CLIPRC(clip.model.VisionTransformer(64, 16, 64, 2, 1, 512), regions=4).to(device)
    case(tiny, 1, precision, device, size=64)()  # loads what PyTorch loads on first use
    own, network = resident(), vit_b16(regions).to(device)
    for part in network.children() if compile else ():
        part.compile()
    work = case(network, images, precision, device)
    times = [seconds(work, device) for _ in range(1 + rounds)]
    cuda = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resident() - own
    best = peak_flops(device, precision)
    if not best:
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        a, b = torch.randn(2, side, side, device=device, dtype=dtype)
        best = 2 * side**3 / min(seconds(lambda: a @ b, device) for _ in range(5))
    return {"seconds": times[1:] or times, "GB": peak / 1e9, "best_rate": best}


def resident() -> int:
    """The most memory that this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)  # kilobytes on Linux


def in_new_process(function: Callable, *arguments) -> dict:
    """Call a function in a fresh process: memory that earlier cases used would spoil the figure."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def gflops(args: argparse.Namespace) -> list[dict]:
    """Table 6's column GFLOPs, for each number of region tokens."""
    print(f"{'M':>5}{'paper':>9}{'ours':>9}{'ratio':>8}      10^9 multiply-adds")
    rows = []
    for regions, paper in PAPER_GFLOPS.items():
        ours = multiply_adds(forward_pass, regions)
        rows.append({"regions": regions, "paper": paper, "ours": ours})
        print(f"{regions:>5}{paper:>9.1f}{ours:>9.1f}{ours / paper:>8.3f}")
    return rows


def memory(args: argparse.Namespace) -> list[dict]:
    """A training step's memory on a GPU, planned without one: GB by batch, and what should fit.
    A card of 24 GB is counted as 22, for what its driver and PyTorch's allocator take."""
    print(f"{'data set':<12}{'M':>5}{'1 image':>10}{'each more':>11}    images that fit in "
          f"24, 40, 80 GB (float32 or tf32)")
    rows = []
    for name, classes in (("VOC", 15), ("COCO-Stuff", 156)):
        for regions in (1, 4, 16, 64, 256, 1024):
            one, two = (planned_memory(regions, images, classes) for images in (1, 2))
            fit = [max(0, int(1 + (0.92 * card - one) / (two - one))) for card in (24, 40, 80)]
            rows.append({"data_set": name, "regions": regions, "GB": [one, two], "fit": fit})
            print(f"{name:<12}{regions:>5}{one:>7.2f} GB{two - one:>8.2f} GB    "
                  + ", ".join(map(str, fit)), flush=True)
    return rows


def speed(args: argparse.Namespace) -> list[dict]:
    """Median time, images a second, share of the best rate and memory of each case."""
    cuda = args.device.type == "cuda"
    cases = [(forward_pass, 16, 1), (training_step, 16, 16 if cuda else 2),
             (training_step, 256, 4 if cuda else 1), (training_step, 1024, 1)]
    ways = [(precision, False) for precision in PRECISIONS if cuda or precision != "tf32"]
    ways += [("bfloat16", True)] * cuda
    print(f"{'case':<15}{'M':>5}{'batch':>6}  {'precision':<18}{'seconds':>8}{'images/s':>9}"
          f"{'of best':>8}{'GB':>7}  40,000 steps")
    rows = []
    for case, regions, images in cases if cuda or args.large else cases[:3]:
        name, work = case.__name__.replace("_", " "), multiply_adds(case, regions, images)
        for precision, compile in ways:
            row = in_new_process(measure, case, regions, images, precision, compile,
                                 str(args.device), args.rounds)
            median = statistics.median(row["seconds"])
            row |= {"case": name, "regions": regions, "images": images, "precision": precision,
                    "compile": compile, "of_best": 2e9 * work / median / row["best_rate"]}
            rows.append(row)
            way = precision + ", compiled" * compile
            hours = f"{40_000 * median / 3600:.1f} h" if case is training_step else ""
            print(f"{name:<15}{regions:>5}{images:>6}  {way:<18}{median:>8.3f}"
                  f"{images / median:>9.2f}{row['of_best']:>8.0%}{row['GB']:>7.2f}  {hours}",
                  flush=True)
    return rows


def all(args: argparse.Namespace) -> dict[str, list[dict]]:
    """The three tables above: everything that a report needs, in one file."""
    return {table.__name__: table(args) for table in (gflops, memory, speed)}


def main() -> None:
    """Print a table and keep it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = parser.add_subparsers(dest="table", metavar="{gflops,memory,speed,all}", required=True)
    for table in (gflops, memory, speed, all):
        sub = tables.add_parser(table.__name__, help=table.__doc__.split("\n")[0],
                                description=table.__doc__)
        sub.set_defaults(function=table, device="cpu")
        sub.add_argument("--out", type=Path, metavar="FILE", help="write the table here as JSON")
        if table in (speed, all):
            sub.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
            sub.add_argument("--rounds", type=int, default=5, help="times each case is run (5)")
            sub.add_argument("--large", action="store_true", help="M = 1,024 on a CPU too")
    args = parser.parse_args()
    if args.out and args.out.exists():
        raise ValueError(f"--out {args.out} exists already; give a new name")
    args.device = start_processes(args.device)
    machine = f"{os.cpu_count()} cores {platform.machine()}, {torch.get_num_threads()} threads"
    if args.device.type == "cuda":
        machine = torch.cuda.get_device_name(args.device)
    about = {"date": str(date.today()), "machine": machine, "torch": torch.__version__}
    print(", ".join(about.values()) + "\n")
    about |= {"table": args.table, "rows": args.function(args)}
    if args.out:
        args.out.write_text(json.dumps(about, indent=1))


if __name__ == "__main__":
    run_script(main)
