"""Tables 5-8: train every row with several seeds and print the means beside the paper's figures.

    python -m tools.ablate --seeds 2 --jobs 4 --tables 5 7    two tables, four runs at a time

All other flags are train.py's. OUT/ablate/NAME.txt has what a run prints. Run again, it goes on.
"""

import argparse
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import train
from util.checkpoint import read_checkpoint, read_log, require_same
from util.clip_files import load_clip
from util.processes import run_script

# For each table: a row's name, its flags, and the paper's hIoU, mIoU(S) and mIoU(U) on VOC 2012.
ROWS = {
    "5": [("none (ZegCLIP)", "--regions=0 --no-ram", 84.3, 91.9, 77.8),
          ("RLB", "--no-ram", 85.4, 91.5, 80.0),
          ("RLB, RAM", "--recovery-loss=none", 87.4, 92.5, 82.9), ("all", "", 88.4, 92.8, 84.4)],
    "6": [("update", "--update-regions", 87.9, 93.3, 83.1),
          ("M=1", "--regions=1", 86.9, 92.5, 82.0), ("M=4", "--regions=4", 87.3, 92.6, 82.6),
          ("M=16", "--regions=16", 88.4, 92.8, 84.4), ("M=64", "--regions=64", 89.1, 93.0, 85.6),
          ("M=256", "--regions=256", 89.2, 92.7, 86.0)],
    "7": [("neither", "--align=", 85.6, 91.5, 80.5), ("[CLS]", "--align=G", 86.6, 92.1, 82.0),
          ("RLB", "--align=R", 87.0, 92.9, 81.8), ("both", "--align=GR", 88.4, 92.8, 84.4)],
    "8": [("L1, 1 layer", "", 88.4, 92.8, 84.4), ("L2", "--recovery-loss=l2", 86.7, 91.8, 81.9),
          ("KD", "--recovery-loss=kd", 86.4, 92.2, 81.2),
          ("no layer", "--recovery-layers=0", 86.6, 91.3, 82.1),
          ("2 layers", "--recovery-layers=2", 87.1, 92.4, 82.4),
          ("3 layers", "--recovery-layers=3", 87.0, 91.6, 82.8)],
}


def result(out: Path) -> list[float]:
    """A run's hIoU, mIoU(S), mIoU(U) in percent (NaN: no value); [] if it is not finished."""
    results = [line["result"] for line in read_log(out / "log.jsonl") if "result" in line]
    return [np.float64(results[-1][name]) for name in ("hIoU", "mIoU_S", "mIoU_U") if results]


def run_all(runs: dict[Path, list[str]], jobs: int) -> None:
    """Run train.py for each folder with its flags, `jobs` processes at a time, one thread each."""
    waiting, running, ended = [*runs], {}, 0
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                out = waiting.pop(0)
                with open(f"{out}.txt", "w") as printed:
                    running[out] = subprocess.Popen(
                        [sys.executable, train.__file__, *runs[out]], stdin=subprocess.DEVNULL,
                        stdout=printed, stderr=printed, env=os.environ | {"OMP_NUM_THREADS": "1"})
            time.sleep(0.1)
            for out in [out for out in running if running[out].poll() is not None]:
                failed, ended = running.pop(out).returncode, ended + 1
                last = Path(f"{out}.txt").read_text().strip().split("\n")[-1]
                told = f"failed: {last}" if failed else f"hIoU {result(out)[0]:.1f}"
                print(f"{ended} of {len(runs)}: {out.name}: {told}", flush=True)
    finally:
        for process in running.values():
            process.terminate()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("--tables", nargs="+", choices=ROWS, default=ROWS, help="(all)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row (3)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--out", type=lambda text: Path(text).expanduser(), default="runs")
    args, flags = parser.parse_known_args()
    flags += ["--resume", "--val-every=1000000", f"--out={args.out}"]  # tested at the end alone
    base = train.parse_settings(flags)
    side = base.crop_size // load_clip(base.clip).visual.conv1.kernel_size[0]  # patches
    runs, lines, free = {}, [], {*train.MAY_CHANGE} - {"clip", "data_root", "init"}
    for table, row, more, *paper in [(t, *row) for t in args.tables for row in ROWS[t]]:
        outs, settings = [], vars(train.parse_settings([*flags, *more.split()]))
        changed = [f"{key}={new}" for key, new in settings.items() if vars(base)[key] != new]
        m = math.isqrt(settings["regions"])
        if not m or side % m == 0 and side // m >= 2:
            for seed in range(base.seed, base.seed + args.seeds):
                name = "-".join([base.dataset, *changed, f"seed={seed}"])
                outs.append(out := args.out / "ablate" / name)
                runs[out] = [*flags, *more.split(), f"--seed={seed}", f"--out={out}"]
                if (out / "last.pt").exists():  # finished or not, it must be this run
                    now = vars(train.parse_settings(runs[out]))
                    require_same(out, read_checkpoint(out / "last.pt")["run"],
                                 {name: now[name] for name in now if name not in free})
        lines.append((f"{table:<13}{row:<19}", outs, paper))
    (args.out / "ablate").mkdir(parents=True, exist_ok=True)
    run_all({out: command for out, command in runs.items() if not result(out)}, args.jobs)

    print(f"mean (standard deviation) of {args.seeds} seeds on {base.dataset}; the paper's on VOC")
    print(" " * 32 + "  hIoU         mIoU(S)       mIoU(U)           hIoU  mIoU(S)  mIoU(U)")
    for line, outs, paper in lines:
        results = np.array([result(out) for out in outs if result(out)])
        ours = "".join(f"{f'{x.mean():.1f} ({x.std():.1f})':>13} " for x in results.T)
        none = "no run finished" if outs else "a region would be smaller than 2x2 patches"
        print(f"{line}{ours or none:<42}" + "".join(f"{value:>9.1f}" for value in paper))


if __name__ == "__main__":
    run_script(main)
