"""Windows and macOS without having them: the scripts run without what these systems lack."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, refused

from util.processes import start_processes

# Read by every Python that starts, DataLoader's workers included.
OTHER_SYSTEM = """
import multiprocessing, os, subprocess, sys
for name in ("fcntl", "resource", "pwd", "termios"):
    sys.modules[name] = None  # to import it is an ImportError
for name in ("sched_getaffinity", "setpgrp", "fork"):
    vars(os).pop(name, None)
start = subprocess.Popen.__init__
def without_process_group(self, *args, process_group=-1, **kwargs):
    assert process_group == -1
    start(self, *args, **kwargs)
subprocess.Popen.__init__ = without_process_group
multiprocessing.set_start_method("spawn")
"""
# One process, since to import PyTorch takes seconds.
SCRIPTS = """
import os, runpy, sys
def run(script, *arguments):
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, (sys.argv, stop.code)
if __name__ == "__main__":
    root, out = sys.argv[1:]
    sys.path.insert(0, root)
    for folder in ("", "tools"):
        for name in sorted(os.listdir(os.path.join(root, folder))):
            script = os.path.join(root, folder, name)
            if name.endswith(".py") and "__main__" in open(script, encoding="utf-8").read():
                run(script, "--help")
    run(os.path.join(root, "train.py"), "--iterations=5", "--workers=1", "--out=" + out)
    run(os.path.join(root, "predict.py"), out + "/last.pt")
    run(os.path.join(root, "eval.py"), out + "/last.pt", "--workers=1")
"""


def test_all_scripts_start_and_the_default_run_trains_with_spawned_workers(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(OTHER_SYSTEM)
    (tmp_path / "scripts.py").write_text(SCRIPTS)
    result = subprocess.run(
        [sys.executable, "scripts.py", ROOT, "run"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONUTF8": "0", "LC_ALL": "C"})
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert result.stdout.count("usage:") >= 10 and "CLIP-RC" in result.stdout
    assert Path(tmp_path, "run/results.png").exists()


def test_apples_gpu_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="mps: .* can give NaN there; give cpu"):
        start_processes("mps")


def test_a_clusters_variables_without_torchrun_end_in_one_line(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert "RANK is set, but not by torchrun" in refused(program="predict.py")
