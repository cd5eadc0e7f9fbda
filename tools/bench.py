"""What CLIP-RC costs with ViT-B/16's size, random weights and images of 512 x 512 pixels.

    python -m tools.bench gflops     Table 6: 10^9 multiply-adds of a forward pass
    python -m tools.bench memory     GB of a training step, planned, and the batch that should fit
    python -m tools.bench speed      measured seconds, GB and losses; `all` prints all three tables
"""

import argparse
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from model import CLIPRC
from util.clip_files import clip
from util.processes import autocast, run_script, start_processes

PAPER_GFLOPS = {1: 119.8, 4: 121.2, 16: 126.7, 64: 148.9, 256: 238.2, 1024: 609.2}  # Table 6


def vit_b16(regions: int, **more) -> CLIPRC:
    return CLIPRC(clip.model.VisionTransformer(224, 16, 768, 12, 12, 512), regions=regions, **more)


def forward_pass(network: CLIPRC, images: int, precision="float32") -> Callable:
    """A function that computes the logits of a batch for 20 classes."""
    x, T = torch.randn(images, 3, 512, 512), torch.randn(20, network.encoder.visual.output_dim)
    network.eval().requires_grad_(False)

    def work() -> torch.Tensor:
        with torch.no_grad(), autocast(x.device, precision):
            return network(x, F.normalize(T)).mean()
    return work


def training_step(network: CLIPRC, images: int, precision="float32", classes=15) -> Callable:
    """A function that takes a step of Sec. 4.2 with a batch."""
    x, labels = torch.randn(images, 3, 512, 512), torch.randint(classes, (images, 512, 512))
    T = F.normalize(torch.randn(classes, network.encoder.visual.output_dim))
    trained = [p for p in network.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=x.device.type != "meta")

    def work() -> torch.Tensor:
        optimizer.zero_grad()
        with autocast(x.device, precision):
            loss = sum(network.losses(x, labels, T).values())
        loss.backward()
        with torch.device("cpu"):  # AdamW counts its steps there
            optimizer.step()
        return loss.detach()
    return work


def multiply_adds(case: Callable, regions: int, images: int = 1) -> float:
    """10^9 multiply-adds of a case: of all pairs of tokens, also of those that the mask hides."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:  # shapes, no numbers
        case(vit_b16(regions, recompute=False), images)()
    return counter.get_total_flops() / 2 / 1e9  # the counter counts a multiply-add as two


class LiveMemory(TorchDispatchMode):
    """Adds up the tensors that are alive; `peak` is their most, in bytes."""
    now = peak = 0

    def add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(out)):
            storage = tensor.untyped_storage()  # shared by views
            if not hasattr(storage, "counted"):
                self.add(storage.nbytes())
                storage.counted = weakref.finalize(storage, self.add, -storage.nbytes())
        return out


def planned_memory(regions: int, images: int, classes: int = 15) -> float:
    """Peak GB of a training step in float32 on a GPU, computed without one."""
    def attention(q, k, v, **_):  # a kernel that never has all the scores, as a GPU's
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]

    replaced = patch.object(F, "scaled_dot_product_attention", attention)
    with torch.device("meta"), replaced, LiveMemory() as live:
        step = training_step(vit_b16(regions), images, classes=classes)
        step()
        step()  # now with AdamW's state
    return live.peak / 1e9


def measure(case: Callable, regions: int, images: int, precision: str, device: torch.device,
            rounds: int) -> tuple[float, float, float]:
    """A case's last loss, its mean time in seconds and the most GB of its tensors."""
    def run(times: int) -> tuple[float, float]:
        start, losses = time.perf_counter(), [work() for _ in range(times)]
        return losses[-1].item(), (time.perf_counter() - start) / times  # item() waits for a GPU

    cuda = torch.cuda if device.type == "cuda" else None
    if cuda:
        cuda.reset_peak_memory_stats()
    torch.manual_seed(0)  # each precision starts with the same weights and images
    with nullcontext() if cuda else LiveMemory() as live:
        with device:
            network = vit_b16(regions)
            for part in network.children() if precision == "compiled" else ():
                part.compile()
            work = case(network, images, precision.replace("compiled", "bfloat16"))
        run(2)  # warms up
    return *run(rounds), (cuda.max_memory_allocated() if cuda else live.peak) / 1e9


def gflops(device: torch.device) -> Iterator[dict]:
    for regions, paper in PAPER_GFLOPS.items():
        yield {"M": regions, "paper": paper, "ours": multiply_adds(forward_pass, regions)}


def memory(device: torch.device) -> Iterator[dict]:
    for classes in (15, 156):  # VOC's and COCO-Stuff's seen ones
        for regions in PAPER_GFLOPS:
            one, two = (planned_memory(regions, images, classes) for images in (1, 2))
            yield {"classes": classes, "M": regions, "GB": one, "each more": two - one} | {
                f"in {card} GB": max(0, int(1 + (0.92 * card - one) / (two - one)))
                for card in (24, 40, 80)}  # 8 % are for the driver and PyTorch's allocator


def speed(device: torch.device) -> Iterator[dict]:
    cuda = device.type == "cuda"
    for case, regions, images in ((forward_pass, 16, 1), (training_step, 16, 16 if cuda else 2),
                                  (training_step, 256, 4 if cuda else 1), (training_step, 1024, 1)):
        for precision in ("float32", *("tf32", "bfloat16", "compiled")[:3 * cuda]):
            loss, mean, GB = measure(case, regions, images, precision, device, 28 if cuda else 3)
            yield {"case": case.__name__, "M": regions, "batch": images, "precision": precision,
                   "seconds": mean, "images/s": images / mean, "value": loss, "GB": GB, "planned":
                   planned_memory(regions, images) if case is training_step else "-",
                   "TFLOP/s": 2e-3 * multiply_adds(case, regions, images) / mean}


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("table", choices=("gflops", "memory", "speed", "all"))
    args, device = parser.parse_args(), start_processes("auto")
    for table in (gflops, memory, speed):
        for i, row in enumerate(table(device) if args.table in (table.__name__, "all") else ()):
            for cells in (row.values(),) if i else (row, row.values()):  # the names come first
                print("".join(f"{cell:>14.3f}" if isinstance(cell, float) else f"{cell!s:>14}"
                              for cell in cells), flush=True)


if __name__ == "__main__":
    run_script(main)
