"""Tables 5-8: train every row over several seeds and print the means beside the paper's figures.

    python -m tools.ablate --seeds 2 --tables 5 7        rows of Tables 5 and 7 on the toy world
    python -m tools.ablate --jobs 4 --iterations 400     all rows, four runs at a time

All other flags are train.py's. The runs stay in OUT/ablate; the same command continues them.
"""

import argparse
import math
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

import train
from util import toy
from util.checkpoint import read_checkpoint
from util.clip_files import clip_file, load_clip
from util.processes import run_script
from util.run import read_log

# For each table: row, settings of its own, the paper's hIoU, mIoU(S) and mIoU(U) on VOC 2012.
ABLATIONS = {
    "5": [("none (ZegCLIP)", {"regions": 0, "ram": False, "rdl": False}, 84.3, 91.9, 77.8),
          ("RLB", {"ram": False, "rdl": False}, 85.4, 91.5, 80.0),
          ("RLB, RAM", {"rdl": False}, 87.4, 92.5, 82.9), ("all", {}, 88.4, 92.8, 84.4)],
    "6": [("update", {"update_regions": True}, 87.9, 93.3, 83.1),
          ("M=1", {"regions": 1}, 86.9, 92.5, 82.0), ("M=4", {"regions": 4}, 87.3, 92.6, 82.6),
          ("M=16", {"regions": 16}, 88.4, 92.8, 84.4), ("M=64", {"regions": 64}, 89.1, 93.0, 85.6),
          ("M=256", {"regions": 256}, 89.2, 92.7, 86.0)],
    "7": [("neither", {"align": ""}, 85.6, 91.5, 80.5), ("[CLS]", {"align": "G"}, 86.6, 92.1, 82.0),
          ("RLB", {"align": "R"}, 87.0, 92.9, 81.8), ("both", {"align": "GR"}, 88.4, 92.8, 84.4)],
    "8": [("L1, 1 layer", {}, 88.4, 92.8, 84.4), ("L2", {"recovery_loss": "l2"}, 86.7, 91.8, 81.9),
          ("KD", {"recovery_loss": "kd"}, 86.4, 92.2, 81.2),
          ("no layer", {"recovery_layers": 0}, 86.6, 91.3, 82.1),
          ("2 layers", {"recovery_layers": 2}, 87.1, 92.4, 82.4),
          ("3 layers", {"recovery_layers": 3}, 87.0, 91.6, 82.8)],
    "initialiser": [
        ("released", {"initialiser": "released"}), ("normal", {"initialiser": "truncated_normal"}),
        ("scale 1", {"descriptor_scale": 1.0}), ("scale 0.01", {"descriptor_scale": 0.01})],
}


def command(s: train.Settings) -> list[str]:
    """The command line of a run."""
    flags = {name.replace("_", "-"): value for name, value in asdict(s).items()}
    return [sys.executable, train.__file__] + [
        f"--{'no-' * (not value)}{name}" if isinstance(value, bool) else f"--{name}={value}"
        for name, value in flags.items() if value is not None]


def place(s: train.Settings, folder: Path, n: int = 1) -> train.Settings:
    """A run's settings with its folder; FOLDER.2 and so on where runs of other settings are."""
    last = folder.with_name(folder.name + f".{n}" * (n > 1)) / "last.pt"
    there = read_checkpoint(last)["run"] if last.exists() else asdict(s)
    free = train.MAY_CHANGE - {"clip", "data_root"}
    if all(there.get(name) == value for name, value in asdict(s).items() if name not in free):
        return replace(s, out=str(last.parent))
    return place(s, folder, n + 1)


def result(s: train.Settings) -> list[float]:
    """A run's hIoU, mIoU(S), mIoU(U) in percent (NaN: no value); [] if it is not finished."""
    results = [line["result"] for line in read_log(Path(s.out, "log.jsonl")) if "result" in line]
    return [np.float64(results[-1][name]) for name in ("hIoU", "mIoU_S", "mIoU_U") if results]


def run_all(runs: dict[str, train.Settings], jobs: int) -> None:
    """Train each run in a process of its own, `jobs` at a time. A line tells how each ended."""
    processes = []

    def run(s: train.Settings) -> str:
        processes.append(process := subprocess.Popen(
            command(s), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True, process_group=0, env=os.environ | {"OMP_NUM_THREADS": "1"}))
        errors = process.communicate()[1].strip().split("\n")
        return f"failed: {errors[-1]}" if process.returncode else f"hIoU {result(s)[0]:.1f}"

    with ThreadPoolExecutor(jobs) as pool:
        try:
            names = {pool.submit(run, s): name for name, s in runs.items()}
            for n, ended in enumerate(as_completed(names), 1):
                print(f"{n} of {len(runs)}: {names[ended]}: {ended.result()}", flush=True)
        finally:  # Ctrl-C comes to this process alone, and from here to the runs
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()


def main() -> None:
    """Run what is not finished, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=ABLATIONS, default=ABLATIONS, help="(all)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row (3)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each one thread (1)")
    args, flags = parser.parse_known_args()
    base = replace(train.parse_settings(flags), resume=True, val_every=10**9)  # tested at the end
    base.data_root = base.data_root or str(toy.default_world())
    side = base.crop_size // load_clip(clip_file(base.clip)).visual.conv1.kernel_size[0]  # patches
    runs, lines = {}, []
    for table, row, changes, *paper in [(t, *row) for t in args.tables for row in ABLATIONS[t]]:
        s, names = replace(base, **changes), []
        changed = [f"{key}={new}" for key, new in changes.items() if getattr(base, key) != new]
        m = math.isqrt(s.regions)
        if not m or side % m == 0 and side // m >= 2:
            for seed in range(base.seed, base.seed + args.seeds):
                names.append(f"{'-'.join(changed) or 'default'}-seed={seed}")
                runs[names[-1]] = place(replace(s, seed=seed), Path(base.out, "ablate", names[-1]))
        lines.append((f"{table:<13}{row:<19}", names, paper))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops the runs, as Ctrl-C does
    run_all({name: s for name, s in runs.items() if not result(s)}, args.jobs)

    print(f"mean ± standard deviation of {args.seeds} seeds on {base.dataset}; the paper's on VOC")
    print(" " * 32 + "  hIoU         mIoU(S)       mIoU(U)           hIoU  mIoU(S)  mIoU(U)")
    for line, names, paper in lines:
        results = np.array([result(runs[name]) for name in names if result(runs[name])])
        ours = "".join(f"{column.mean():6.1f} ±{column.std():5.1f} " for column in results.T)
        none = "no run finished" if names else "a region would be smaller than 2x2 patches"
        print(f"{line}{ours or none:<42}" + "".join(f"{value:>9.1f}" for value in paper))


if __name__ == "__main__":
    run_script(main)
