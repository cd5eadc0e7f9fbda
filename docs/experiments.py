"""What the small world says of the paper's claims: tables of docs/results.md, one word each:

    python docs/experiments.py mask        region tokens of a grid, random patches, all, clusters
    python docs/experiments.py baseline    Table 5 with a ZegCLIP head that does not collapse
    python docs/experiments.py recovery    does the recovery loss help where training overfits?
    python docs/experiments.py long        the same with five times the steps
    python docs/experiments.py seen        4, 8 and 12 of the 15 seen classes
    python docs/experiments.py figure2     do the regions' answers change, with M = 4 and 60 images?

Each run is train.py with parts replaced before it starts, so that the paper's files stay the
paper's. Two run at a time, one thread each, in runs/experiments; the same command continues.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import model
import rlb_attention
import train
from predict import region_classes, untrained_encoder
from util import toy
from util.checkpoint import read_checkpoint, read_log
from util.images import IGNORE
from util.processes import run_script

NO_RDL, LONG = ["--recovery-loss=none"], ["--iterations=4000"]
ZEGCLIP, RLB = ["--no-ram", "--regions=0"], ["--no-ram"]
# For each word: a row of its table, what is replaced in train.py (see below), train.py's flags.
ROWS = {
    "mask": [(f"region tokens see {kind}", [f"mask={kind}"], [])
             for kind in ("grid", "random", "all", "clusters")],
    "baseline": [("none (ZegCLIP, steady)", ["head=steady"], ZEGCLIP),
                 ("RLB", ["head=steady"], RLB),
                 ("RLB, RAM", [], NO_RDL), ("RLB, RAM, RDL", [], [])],
    "recovery": [(what + rdl, [change], flags) for what, change in (("60 images", "images=60"),
                                                                    ("8 seen classes", "seen=8"))
                 for rdl, flags in ((", RDL", []), (", no RDL", NO_RDL))],
    "long": [("4,000 steps, RDL", [], LONG), ("4,000 steps, no RDL", [], LONG + NO_RDL)],
    "seen": [(f"{n} seen classes, {name}", [f"seen={n}"] + change, flags) for n in (4, 8, 12)
             for name, change, flags in (("CLIP-RC", [], []),
                                         ("ZegCLIP, steady", ["head=steady"], ZEGCLIP))],
    "figure2": [("M = 4, 60 images", ["images=60"], ["--regions=4"])],
}


def replace_mask(kind: str) -> None:
    """Other regions than the grid's cells. A patch has the region `cell`: it reads that region's
    token, which reads it ("all": every patch), and in Eq. 4 it gets that region's R."""
    forward, original, cell = rlb_attention.Encoder.forward, rlb_attention.region_mask, {}

    def encode(encoder: rlb_attention.Encoder, images: Tensor):
        m, (h, w) = encoder.region_grid, (side // encoder.patch_size for side in images.shape[-2:])
        row, column = torch.arange(h * w) // w, torch.arange(h * w) % w
        grid = (row * m // h) * m + column * m // w  # (N): the paper's
        if kind == "random":
            grid = grid[torch.randperm(h * w, generator=torch.Generator().manual_seed(0))]
        cell["of"] = grid.expand(len(images), -1)  # (B, N)
        if kind == "clusters" and m:
            clip = untrained_encoder(encoder.visual, 0)
            with torch.no_grad():
                cell["of"] = clusters(forward(clip, images)[1], cell["of"], m * m)
        return forward(encoder, images)

    def mask(K: int, grid: tuple[int, int], m: int) -> Tensor:
        if not m:
            return original(K, grid, m)
        in_cell = cell["of"][..., None] == torch.arange(m * m)  # (B, N, M)
        i, r = 1 + K, 1 + K + grid[0] * grid[1]
        mask = original(K, grid, m).expand(len(in_cell), 1, -1, -1).clone()  # (B, 1, E, E)
        mask[:, 0, i:r, r:] = in_cell
        mask[:, 0, r:, i:r] = True if kind == "all" else in_cell.transpose(1, 2)
        return mask

    def align(ram: model.RegionAlignment, G: Tensor, I: Tensor, R: Tensor, T: Tensor, grid):
        R_up = R.gather(1, cell["of"][..., None].expand_as(I))  # (B, N, D): each patch's own region
        I_hat = torch.cat([G[:, None].expand_as(I), R_up, I], dim=-1)  # Eq. 4
        R_t = T * (G[:, None] + R)[:, :, None]  # Eq. 5-6
        R_hat = torch.cat([R_t, T.expand_as(R_t)], dim=-1)
        return ram.image_proj(I_hat), ram.descriptor_proj(R_hat).flatten(1, 2), R_hat

    rlb_attention.Encoder.forward, rlb_attention.region_mask = encode, mask
    model.RegionAlignment.forward = align


def clusters(I: Tensor, cell: Tensor, M: int) -> Tensor:
    """k-means of each image's patches I (B, N, D), from the cells (B, N): M clusters, (B, N)."""
    for _ in range(10):
        member = F.one_hot(cell, M).float()  # (B, N, M)
        centre = F.normalize(member.transpose(1, 2) @ I, dim=-1)  # (B, M, D); 0 for an empty one
        cell = (I @ centre.transpose(1, 2)).argmax(-1)
    return cell


class SteadyHead(model.ZegCLIPHead):
    """ZegCLIP's head with a LayerNorm on the patches. Ours."""
    def __init__(self, D: int, dropout: float) -> None:
        super().__init__(D, dropout)
        self.norm = nn.LayerNorm(D)

    def forward(self, G: Tensor, I: Tensor, T: Tensor) -> Tensor:
        return super().forward(G, self.norm(I), T)


def replace_head(kind: str) -> None:
    """... and whose last layer's q and k start five times larger."""
    start, model.ZegCLIPHead = train.small_start, SteadyHead

    def larger(network: model.CLIPRC) -> None:
        start(network)
        attention = network.zegclip.blocks[-1].attention
        for linear in (attention.q, attention.k):
            linear.weight.data *= 5
    train.small_start = larger


def replace_seen(number: str) -> None:
    """Only some of the seen classes have a name and masks; the unseen five stay."""
    seen = [i for i in range(20) if i not in toy.UNSEEN]
    kept = sorted([*np.random.default_rng(0).permutation(seen)[:int(number)], *toy.UNSEEN])
    data.DATASETS["toy"] |= dict(
        class_names=[toy.CLASS_NAMES[i] for i in kept], values=[i + 1 for i in kept],
        ignored=[0] + [i + 1 for i in range(20) if i not in kept])


def replace_images(number: str) -> None:
    """Fewer training images; the same test images."""
    world = toy.draw_world(toy.WORLD.with_name(f"toy_world_{number}"), train=int(number))
    toy.draw_world = lambda: world


REPLACE = dict(mask=replace_mask, head=replace_head, seen=replace_seen, images=replace_images)


def count_regions(last: Path) -> str:
    """Fig. 2: how many regions of the test scenes are named correctly, untrained and trained."""
    saved = read_checkpoint(last)
    network = model.model_from_checkpoint(saved, last)
    dataset = data.open_dataset("toy", toy.draw_world(), "val")
    m, right, scored = network.encoder.region_grid, np.zeros(2, int), 0
    for i in range(len(dataset.pairs)):
        image, label = data.read_pair(dataset, i)
        truth = np.uint8([[np.bincount(cell.ravel()).argmax() for cell in np.split(part, m, 1)]
                          for part in np.split(label, m)])  # (m, m)
        answers = [each[::64 // m, ::64 // m]  # (m, m) each
                   for each in region_classes(network, image, saved["text"], 64)]
        right += [(each == truth)[truth != IGNORE].sum() for each in answers]
        scored += (truth != IGNORE).sum()
    return f"of {scored} regions untrained CLIP names {right[0]} correctly, CLIP-RC {right[1]}"


def main() -> None:
    if sys.argv[1:2] == ["run"]:  # one run, in a process of its own
        for change in sys.argv[2].split():
            kind, value = change.split("=")
            REPLACE[kind](value)
        del sys.argv[1:3]
        return train.main()
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("word", choices=ROWS)
    parser.add_argument("--seeds", type=int, default=2, help="runs of each row (2)")
    args = parser.parse_args()

    def run(name: str, changes: list[str], flags: list[str], seed: int) -> list[float]:
        words = [word.strip("-") for word in changes + flags]
        out = Path("runs/experiments", "_".join([*words, f"seed={seed}"]))
        if not any("result" in line for line in read_log(out / "log.jsonl")):
            print(f"running {out}; its log.jsonl grows", flush=True)
            subprocess.run([sys.executable, __file__, "run", " ".join(changes), *flags, "--resume",
                            f"--seed={seed}", f"--out={out}", "--val-every=1000000"], check=True,
                           stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        result = [line["result"] for line in read_log(out / "log.jsonl") if "result" in line][-1]
        more = " " + count_regions(out / "last.pt") if args.word == "figure2" else ""
        print(f"{name}, seed {seed}: hIoU {result['hIoU']:.1f}{more}", flush=True)
        return [result[key] for key in ("hIoU", "mIoU_S", "mIoU_U")]

    pool = ThreadPoolExecutor(2)
    try:
        rows = [(name, [pool.submit(run, name, changes, flags, i) for i in range(args.seeds)])
                for name, changes, flags in ROWS[args.word]]
        rows = [(name, np.array([each.result() for each in runs]).T) for name, runs in rows]
    finally:  # after Ctrl-C no other run starts
        pool.shutdown(cancel_futures=True)
    print(f"| {args.word} | hIoU | mIoU(S) | mIoU(U) |\n|---|---|---|---|")
    for name, columns in rows:
        print(f"| {name} |", *(f"{each.mean():.1f} ± {each.std():.1f} |" for each in columns))


if __name__ == "__main__":
    run_script(main)
