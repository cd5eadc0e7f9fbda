"""What every program does with a broken or hostile input: one line that names the culprit, exit code 2, nothing written."""

import copy
import functools
import hashlib
import io
import os
import pickle
import shlex
import shutil
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import EpsImagePlugin, Image
from test_data import mask, picture
from test_train import run

import convert
import data
import model

# A program's own good command line, in a folder that holds all it names; a row's flags come behind it and win.
GOOD = {
    "rlb_attention.py": "", "model.py": "", "bench.py": "", "toy.py": "",
    "data.py": "--dataset folder --data-root mine --out sheet.png --crop-size 32",
    "train.py": "--dataset folder --data-root mine --clip clip.pt --out out --crop-size 32 --regions 4 --batch-size 2 "
                "--iterations 1 --workers 0 --device cpu",
    "eval.py": "last.pt --data-root mine --clip clip.pt --workers 0 --device cpu",
    "predict.py": "last.pt photo.png --clip clip.pt --out out --device cpu",
    "convert.py": "released.pth ours.pt",
}


@pytest.fixture(scope="module")
def good(tmp_path_factory, clip_path) -> Path:
    """A data set of one's own, a CLIP, a run of one step, a released checkpoint, a photo: nothing wrong with any."""
    root = tmp_path_factory.mktemp("good")
    for seed, stem in enumerate("ab"):
        picture(root / "mine" / "images" / f"{stem}.jpg", (48, 32), seed)
        mask(root / "mine" / "masks" / f"{stem}.png", [0, 1, 2, 255], (48, 32))
    (root / "mine" / "classes.txt").write_text("road\nhäuser\n*tree top\n", "utf-8")
    for split in ("train", "val"):
        (root / "mine" / f"{split}.txt").write_text("a\nb\n")
    picture(root / "photo.png", (40, 30))
    shutil.copy(clip_path, root / "clip.pt")
    released = torch.load(ROOT / "tests" / "golden" / "clip_rc_inductive.pt", weights_only=True)["state_dict"]
    torch.save({"state_dict": released}, root / "released.pth")
    before = Path.cwd()
    os.chdir(root)
    trained = run(*shlex.split(GOOD["train.py"]))
    os.chdir(before)
    assert trained.returncode == 0, trained.stderr
    shutil.move(root / "out" / "last.pt", root)
    shutil.rmtree(root / "out")
    return root


@pytest.fixture
def here(good, tmp_path, monkeypatch) -> Path:
    """A folder of the same to break: small files as copies, the others as links to what `snapshot` watches too."""
    shutil.copytree(good / "mine", tmp_path / "mine")
    shutil.copy(good / "photo.png", tmp_path)
    for name in ("clip.pt", "last.pt", "released.pth"):
        (tmp_path / name).symlink_to(good / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def snapshot(*roots: Path) -> dict[str, object]:
    """Every file, folder and link below, and what is in it; large files by size and time."""
    seen: dict[str, object] = {}
    for path in (Path(folder, name) for root in roots for folder, *inside in os.walk(root) for name in sum(inside, [])):
        stat = path.lstat()
        if path.is_symlink():
            seen[str(path)] = os.readlink(path)
        elif path.is_file() and stat.st_size < 1e6 and os.access(path, os.R_OK):
            seen[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            seen[str(path)] = (stat.st_mode, path.is_file() and (stat.st_size, stat.st_mtime_ns))
    return seen


# ------------------------------------------------------------------------------------------------------ the damage


class Code:
    """Pickled, it would make a folder on being read."""

    def __reduce__(self):
        return os.mkdir, ("trap",)


def saved(thing) -> bytes:
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


@functools.cache
def loaded(whole: bytes) -> dict:
    return torch.load(io.BytesIO(whole), weights_only=True)


def altered(change: Callable) -> Callable[[bytes], bytes]:
    """A file of tensors with something in it changed."""
    def damage(whole: bytes) -> bytes:
        state = copy.deepcopy(loaded(whole))
        change(state)
        return saved(state)
    return damage


def weight(value: float) -> Callable[[bytes], bytes]:
    """One number of the first tensor that can hold it becomes `value`."""
    def change(state: dict) -> None:
        tensors = state.get("weights", state.get("state_dict", state)).values()
        next(tensor for tensor in tensors if tensor.is_floating_point()).data.view(-1)[0] = value
    return altered(change)


def entry(name: str, value) -> Callable[[bytes], bytes]:
    return altered(lambda state: state.update({name: value}))


def png(width: int, height: int) -> bytes:
    """A PNG that promises width x height grey pixels, with hardly any behind it."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


def image(array, kind: str = "PNG") -> Callable[[bytes], bytes]:
    def damage(_: bytes) -> bytes:
        file = io.BytesIO()
        Image.fromarray(np.asarray(array)).save(file, kind)
        return file.getvalue()
    return damage


def text(content: str, encoding: str = "utf-8") -> Callable[[bytes], bytes]:
    return lambda _: content.encode(encoding)


GREY = np.zeros((32, 48), np.uint8)
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "file": lambda whole: b"mine",
    "empty": lambda whole: b"",
    "cut": lambda whole: whole[:len(whole) // 2],
    "text": text("this is not what its name says\n" * 20),
    "zip": lambda whole: b"PK\5\6" + bytes(18),
    "a photo": image(GREY, "JPEG"),
    "code": lambda whole: pickle.dumps(Code(), protocol=2),
    "code in a zip": entry("more", Code()),
    "NaN": weight(float("nan")), "infinity": weight(float("inf")),
    "list": lambda whole: saved([torch.ones(2)]),
    "bomb": lambda whole: png(60_000, 60_000),
    "small bomb": lambda whole: png(10_000, 9_500),
    "JPEG bomb": lambda whole: whole.replace(b"\0\x20\0\x30\x03", b"\xff\xdc\xff\xdc\x03", 1),  # 32x48, three channels
    "RGB": image(np.zeros((32, 48, 3), np.uint8)),
    "RGBA": image(np.zeros((32, 48, 4), np.uint8)),
    "black and white": image(GREY > 0),
    "floating point": image(GREY.astype(np.float32), "TIFF"),
    "16 bits": image(np.full((32, 48), 300, np.uint16)),
    "label 7": image(GREY + 7),
    "other size": image(GREY[:, :40]),
    "latin-1": text("road\nhäuser\n*tree top\n", "latin-1"),
    "utf-16": text("road\nhäuser\n*tree top\n", "utf-16"),
    "utf-16 without mark": text("road\nhouse\n*tree top\n", "utf-16-le"),
    "escapes": text("road\n\x1b[2J\n*tree top\n"),
    "twice": text("road\nroad\n*tree top\n"),
    "star": text("road\n*\n"),
    "stems elsewhere": text("../../../etc/passwd\n"),
    "JSON": text('{"classes": ["road", "häuser"]}', "utf-16"),
    "CSV": text("name;number\nhäuser;1\n", "latin-1"),
}


def damage(path: Path, how: str | Callable) -> None:
    whole = path.read_bytes() if path.is_file() else b""
    path.unlink(missing_ok=True)  # not through a link
    if how in ("folder", "read-only"):
        path.mkdir(0o500 if how == "read-only" else 0o700)
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "link to itself":
        path.symlink_to(path.name)
    elif how == "unreadable":
        path.touch(0)
    elif how != "gone":
        path.write_bytes(how(whole) if callable(how) else DAMAGE[how](whole))
    if how in ("unreadable", "read-only") and os.access(path, os.R_OK if how == "unreadable" else os.W_OK):
        pytest.skip("this user may read and write everything")


# --------------------------------------------------------------------------------------------------------- the rows

CLIP_FILES = ["gone", "empty", "cut", "text", "zip", "a photo", "code", "code in a zip", "list", "NaN", "infinity", "folder"]
PICTURES = ["empty", "cut", "text", "bomb", "small bomb", "JPEG bomb", "floating point", "folder", "link to itself", "pipe"]
MASKS = ["empty", "cut", "a photo", "bomb", "RGB", "RGBA", "black and white", "16 bits", "label 7", "other size", "folder"]
CLASS_FILES = ["gone", "empty", "latin-1", "utf-16", "utf-16 without mark", "escapes", "twice", "star", "JSON", "CSV", "folder"]
LISTS = ["empty", "latin-1", "utf-16", "stems elsewhere"]
HUGE = "1000000000000"

# (program and flags, {file: what is wrong with it}, what the line must name)
ROWS: list[tuple[str, dict[str, object], str]] = [
    # rlb_attention.py
    *((f"rlb_attention.py {flags}", {}, culprit) for flags, culprit in [
        ("--grid 0", "--grid"), ("--grid -4", "--grid"), ("--grid four", "--grid"), ("--prompts -1", "--prompts"),
        ("--regions 5", "--regions"), ("--regions -4", "--regions"), ("--regions 9", "--regions"),
        (f"--grid {HUGE}", "--grid"), (f"--regions {HUGE}", "--regions"), (f"--prompts {HUGE}", "--prompts"),
        ("--out mask.xyz", "mask.xyz"), ("--out /proc/mask.png", "/proc/mask.png")]),
    ("rlb_attention.py --out file/mask.png", {"file": "file"}, "file/mask.png"),
    ("rlb_attention.py --out taken.png", {"taken.png": "folder"}, "taken.png"),
    ("rlb_attention.py --out closed/mask.png", {"closed": "read-only"}, "closed"),
    # model.py
    *((f"model.py {flags}", {}, culprit) for flags, culprit in [
        ("--regions 5", "regions"), ("--regions -1", "regions"), ("--regions 9", "regions"), ("--crop-size 0", "--crop-size"),
        ("--crop-size 70", "crop-size"), (f"--crop-size {HUGE}", "--crop-size"), ("--classes 0", "--classes"),
        ("--classes x", "--classes"), (f"--classes {HUGE}", "--classes"), (f"--regions {HUGE}", "regions"), ("--clip RN50", "RN50"),
        ("--clip ViT-Z/16", "ViT-Z/16")]),
    *(("model.py --clip clip.pt", {"clip.pt": how}, "clip.pt") for how in CLIP_FILES),
    # data.py
    *(("data.py", {"mine/images/a.jpg": how}, "a.jpg") for how in PICTURES),
    *(("data.py", {"mine/masks/a.png": how}, "a.png") for how in MASKS),
    *(("data.py", {"mine/classes.txt": how}, "classes.txt") for how in CLASS_FILES),
    *(("data.py", {"mine/train.txt": how}, culprit) for how, culprit in zip(LISTS, ["train.txt"] * 3 + ["etc/passwd"])),
    *((f"data.py {flags}", {}, culprit) for flags, culprit in [
        ("--data-root nowhere", "nowhere"), ("--data-root photo.png", "photo.png"), ("--dataset imagenet", "--dataset"),
        ("--dataset voc", "SegmentationClass"), ("--dataset context", "SegmentationContext"), ("--dataset coco-stuff", "train2017"),
        ("--dataset toy", "SegmentationClass"), ("--crop-size 3", "--crop-size"), ("--crop-size -1", "--crop-size"),
        (f"--crop-size {HUGE}", "--crop-size"), ("--out sheet", "sheet"), ("--out sheet.xyz", "sheet.xyz"),
        ("--out /proc/sheet.png", "/proc/sheet.png"), ("--data-root 'no\nwhere'", "where"),
        (f"--data-root {'x' * 300}", "xxx"), ("--data-root ''", "--data-root")]),
    ("data.py --out file/sheet.png", {"file": "file"}, "file/sheet.png"),
    ("data.py --out taken.png", {"taken.png": "folder"}, "taken.png"),
    ("data.py --out closed/sheet.png", {"closed": "read-only"}, "closed"),
    ("data.py", {"mine/masks/a.png": "unreadable"}, "a.png"),
    ("data.py", {"mine/masks/a.png": "gone"}, "a.jpg"),
    ("data.py", {"mine/images/a.webp": "a photo"}, "a.webp"),
    ("data.py --check", {"mine/classes.txt": "utf-16"}, "classes.txt"),
    ("data.py --check", {"mine/val.txt": "empty"}, "val.txt"),
    ("data.py --check", {"mine/images/a.png": "folder"}, "a.png"),
    ("data.py --check --data-root nowhere", {}, "nowhere"),
    # train.py
    *(("train.py", {"clip.pt": how}, "clip.pt") for how in ("gone", "empty", "code", "code in a zip", "NaN", "unreadable")),
    *(("train.py", {"mine/classes.txt": how}, "classes.txt") for how in ("latin-1", "twice")),
    *(("train.py", {"mine/masks/a.png": how}, "a.png") for how in ("RGB", "bomb", "label 7")),
    *(("train.py", {"mine/images/a.jpg": how}, "a.jpg") for how in ("cut", "JPEG bomb")),
    *(("train.py --init last.pt", {"last.pt": how}, "last.pt") for how in (
        "gone", "empty", "cut", "code", "code in a zip", "list", "NaN", "infinity", entry("format", 3), entry("model", 7),
        entry("clip_sha256", "0" * 64))),
    *(("train.py --resume --out .", {"last.pt": how}, "last.pt") for how in (
        "cut", "code", "NaN", entry("run", 7), entry("optimizer", 7), entry("step", "x"), entry("class_names", None))),
    ("train.py --resume --out .", {"log.jsonl": "JSON"}, "log.jsonl"),
    *((f"train.py {flags}", {}, culprit) for flags, culprit in [
        ("--iterations 0", "--iterations"), ("--batch-size 0", "--batch-size"), ("--batch-size x", "--batch-size"),
        ("--lr nan", "--lr"), ("--lr 0", "--lr"), ("--dropout 1", "--dropout"), ("--w-mask inf", "--w-mask"),
        ("--w-rec nan", "--w-rec"), ("--seed -1", "--seed"), ("--scale-min 3 --scale-max 2", "--scale-min"),
        ("--workers -1", "--workers"), ("--regions 5", "regions"), ("--regions 9", "--regions"), ("--crop-size 40", "--crop-size"),
        (f"--prompts {HUGE}", "--prompts"), (f"--regions {HUGE}", "--regions"), (f"--crop-size {HUGE}", "--crop-size"),
        (f"--batch-size {HUGE}", "--batch-size"), (f"--recovery-layers {HUGE}", "--recovery-layers"),
        (f"--workers {HUGE}", "--workers"), (f"--seed {2**63}", "--seed"), ("--setting magic", "--setting"), ("--align X", "--align"),
        ("--recovery-loss l7", "--recovery-loss"), ("--unseen unicorn", "unicorn"), ("--device tpu", "--device"),
        ("--device cuda:99", "--device"), ("--out /proc/out", "/proc/out"), ("--out photo.png", "photo.png"),
        ("--out photo.png/run", "photo.png")]),
    ("train.py --out closed/run", {"closed": "read-only"}, "closed"),
    # eval.py
    *(("eval.py", {"last.pt": how}, "last.pt") for how in (
        "gone", "empty", "cut", "text", "zip", "a photo", "code", "code in a zip", "list", "NaN", "infinity", "folder", "unreadable",
        entry("format", "clip-rc 0"), entry("weights", {}), entry("weights", 7), entry("model", 7), entry("model", {"magic": 1}),
        altered(lambda s: s["model"].update(initialiser="magic")), altered(lambda s: s["model"].update(regions=5)), entry("clip", 7),
        entry("clip_sha256", "0" * 64), entry("run", "x"), entry("run", {"dataset": "folder", "crop_size": "wide"}),
        entry("class_names", 7), entry("unseen", [99]),
        entry("unseen", None), entry("text", None), entry("text", torch.ones(9, 9)), entry("text", torch.full((3, 32), torch.nan)))),
    *(("eval.py", {"clip.pt": how}, "clip.pt") for how in ("gone", "empty", "cut", "code", "NaN")),
    *(("eval.py", {"mine/masks/b.png": how}, "b.png") for how in ("RGB", "16 bits", "cut", "bomb", "label 7")),
    ("eval.py", {"mine/images/b.jpg": "JPEG bomb"}, "b.jpg"),
    ("eval.py", {"mine/classes.txt": "utf-16 without mark"}, "classes.txt"),
    ("eval.py", {"mine/val.txt": "latin-1"}, "val.txt"),
    ("eval.py --save taken", {"taken": "folder"}, "taken"),
    ("eval.py --save taken", {"taken": "link to itself"}, "taken"),
    ("eval.py --save taken/below", {"taken": "file"}, "taken"),
    ("eval.py --save closed/below", {"closed": "read-only"}, "closed"),
    *((f"eval.py {flags}", {}, culprit) for flags, culprit in [
        ("--crop-size 0", "--crop-size"), ("--crop-size 40 --save new", "crop-size"), (f"--crop-size {HUGE}", "--crop-size"),
        ("--stride 0", "--stride"), ("--stride 33", "--stride"), ("--stride x", "--stride"), ("--lower 2", "--lower"),
        ("--lower nan", "--lower"), ("--workers -1", "--workers"), (f"--workers {HUGE}", "--workers"),
        ("--unseen-names permuted", "--unseen-names"), ("--unseen-names swapped", "--unseen-names"), ("--split test", "--split"),
        ("--seen-only --unseen-names random", "--seen-only"),
        ("--device tpu", "--device"), ("--data-root nowhere", "nowhere"), ("--save /proc/new", "/proc/new"),
        ("--precision float7", "--precision")]),
    # predict.py (more of it in test_predict.py)
    *(("predict.py", {"photo.png": how}, "photo.png") for how in (
        "empty", "cut", "code", "bomb", "JSON", "floating point", "unreadable", "gone")),
    ("predict.py --classes car", {"last.pt": entry("weights", {})}, "last.pt"),
    *(("predict.py --classes car", {"clip.pt": how}, "clip.pt") for how in ("cut", "NaN", "code in a zip")),
    *(("predict.py", {"last.pt": how}, "last.pt") for how in ("cut", "code", "infinity", "a photo")),
    *((f"predict.py --classes @{name}", {name: how}, name) for name, how in (
        ("words.json", "JSON"), ("words.csv", "CSV"), ("words.txt", "utf-16 without mark"), ("words.txt", "twice"), ("words", "folder"))),
    ("predict.py --json", {"out": "file"}, "--out"),
    ("predict.py --out closed", {"closed": "read-only"}, "closed"),
    *((f"predict.py {flags}", {}, culprit) for flags, culprit in [
        ("--threshold 2", "--threshold"), ("--stride 0", "--stride"), ("--crop-size 3", "--crop-size"), ("--classes ''", "--classes"),
        ("--template car", "--template"), ("--device tpu", "--device"), ("--compare nowhere.pt", "nowhere.pt"), ("mine", "mine")]),
    # toy.py
    *((f"toy.py {flags}", {}, culprit) for flags, culprit in [
        ("draw new --train 0", "--train"), ("draw new --val -1", "--val"), ("draw new --seed -1", "--seed"),
        (f"draw new --train {HUGE}", "--train"), ("draw new --seed x", "--seed"), ("draw mine", "mine"), ("draw .", "no toy world"),
        ("draw photo.png", "photo.png"), ("draw photo.png/world", "photo.png"), ("draw /proc/world", "/proc/world"),
        ("draw", "folder"), ("paint", "paint"), ("pretrain --steps 0", "--steps"), ("pretrain --seed -1", "--seed"),
        (f"pretrain --out new.pt --seed {2**64}", "--seed"), ("pretrain --out nowhere/clip.pt", "nowhere"), ("pretrain --out mine", "mine"),
        ("pretrain --out photo.png/clip.pt", "photo.png"), ("pretrain --out /proc/clip.pt", "/proc/clip.pt")]),
    ("toy.py draw taken", {"taken": "link to itself"}, "taken"),
    ("toy.py draw closed/world", {"closed": "read-only"}, "closed"),
    ("toy.py pretrain --out closed/clip.pt", {"closed": "read-only"}, "closed"),
    # convert.py
    *(("convert.py", {"released.pth": how}, "released.pth") for how in (
        "gone", "empty", "cut", "text", "zip", "a photo", "code", "code in a zip", "list", "NaN", "infinity", "folder", "unreadable",
        entry("state_dict", 7), entry("state_dict", {}), entry("state_dict", {"layer": 1}), entry("state_dict", {7: torch.ones(1)}),
        entry("state_dict", {"backbone.proj": "x"}), entry("format", "clip-rc 1"),
        altered(lambda s: s["state_dict"].update({"backbone.conv1.weight": torch.ones(4, 3, 0, 0)})),
        altered(lambda s: s["state_dict"].update({"backbone.proj": torch.ones(1).expand(10**6, 10**6)})),
        altered(lambda s: s["state_dict"].update({"backbone.prompt_embeddings": torch.ones(3)})),
        altered(lambda s: s["state_dict"].update({"decode_head.q_proj.weight": None})),
        altered(lambda s: s["state_dict"].pop("backbone.prompt_proj.weight")))),
    ("convert.py", {"ours.pt": "file"}, "ours.pt"),
    ("convert.py", {"ours.pt": "link to itself"}, "ours.pt"),
    ("convert.py", {"ours.pt": "folder"}, "ours.pt"),
    ("convert.py released.pth nowhere/ours.pt", {}, "nowhere/ours.pt"),
    ("convert.py released.pth /proc/ours.pt", {}, "/proc/ours.pt"),
    ("convert.py released.pth released.pth", {}, "released.pth"),
    ("convert.py released.pth closed/ours.pt", {"closed": "read-only"}, "closed"),
    # bench.py
    ("bench.py", {}, "table"), ("bench.py nonsense", {}, "nonsense"), ("bench.py gflops --magic", {}, "--magic"),
]


def name_of(row: tuple[str, dict[str, object], str]) -> str:
    command, files, _ = row
    return " | ".join([command[:60].replace("\n", "\\n"), *(f"{file}: {how if isinstance(how, str) else 'altered'}" for file, how in files.items())])


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_a_bad_input_costs_one_line_and_nothing_else(row, good, here, capfd, recwarn):
    command, files, culprit = row
    program, *flags = shlex.split(command)
    for name, how in files.items():
        damage(here / name, how)
    before = snapshot(here, good)
    shipped = (ROOT / "toy_clip.pt").stat()
    base = [] if program == "convert.py" and flags else shlex.split(GOOD[program])
    done = run(*base, *flags, program=program)
    stderr, stdout = done.stderr, done.stdout
    assert done.returncode == 2, (stdout, stderr)
    lines = stderr.splitlines()
    if lines[0].startswith("usage: "):  # argparse's own way: how it is used, then the line
        assert f"{program}: error: " in stderr or f"{program} draw: error: " in stderr or f"{program} pretrain: error" in stderr
    else:
        assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    assert culprit in lines[-1], stderr
    assert "Traceback" not in stderr + stdout
    assert capfd.readouterr() == ("", "") and not [str(w.message) for w in recwarn.list], [str(w.message) for w in recwarn.list]  # libraries are quiet too
    # a picture is first read when a run has begun: its new folder may stay
    begun = here / "out" if program == "train.py" and any("." in name[4:] for name in files if "mine/" in name) else here / "nothing"
    after = {path: what for path, what in snapshot(here, good).items() if not path.startswith(str(begun))}
    assert after == before and (ROOT / "toy_clip.pt").stat() == shipped


def test_checking_a_folder_names_each_of_twelve_kinds_of_damage_once(here):
    kinds = {"images/no_mask.jpg": "a photo", "images/empty.jpg": "empty", "images/cut.jpg": "cut", "images/text.png": "text",
             "images/bomb.png": "bomb", "images/folder.png": "folder", "images/loop.png": "link to itself",
             "masks/rgb.png": "RGB", "masks/number.png": "label 7", "masks/deep.png": "16 bits", "masks/size.png": "other size"}
    stems = [Path(file).stem for file in kinds]
    for stem in stems:
        for part, suffix in (("images", ".jpg"), ("masks", ".png")):
            shutil.copy(here / "mine" / part / f"a{suffix}", here / "mine" / part / f"{stem}{suffix}")
    for file, how in kinds.items():
        damage(here / "mine" / file, how)
        if Path(file).suffix == ".png" and "images" in file:
            (here / "mine" / file).with_suffix(".jpg").unlink()
    (here / "mine" / "masks" / "no_mask.png").unlink()
    (here / "mine" / "train.txt").write_text("\n".join(["a", "ghost", *stems]))
    before = snapshot(here)
    done = run(*shlex.split(GOOD["data.py"]), "--check", program="data.py")
    assert (done.returncode, done.stderr) == (2, "") and snapshot(here) == before
    problems = done.stdout.split("(ignored)")[1].splitlines()[1:]
    assert len(problems) == len(stems) + 1
    for stem in ["ghost", *stems]:
        assert sum(stem in problem.split(": ")[0] or f"no image {stem}," in problem for problem in problems) == 1, (stem, problems)


def test_a_picture_that_is_a_program_starts_no_other(here, monkeypatch):
    (here / "bin").mkdir()
    (here / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {here}/trap\n")  # what Pillow gives PostScript to
    (here / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{here / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    (here / "photo.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) print\n%%EOF\n")
    with pytest.raises(ValueError, match="photo.png: cannot be read as a picture"):
        data.read_image(here / "photo.png")
    assert not (here / "trap").exists()


class Program(torch.nn.Module):
    """As TorchScript it would write a file on being read."""

    def __init__(self):
        super().__init__()
        self.training = False

    @torch.jit.export
    def __getstate__(self) -> bool:
        return self.training

    @torch.jit.export
    def __setstate__(self, training: bool) -> None:
        self.training = training
        torch.save(torch.ones(1), "trap")

    def forward(self, x):
        return x


def test_a_torchscript_file_that_is_a_program_is_never_run(here):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Program()).save("program.pt")
    with pytest.raises((ValueError, OSError), match="program.pt"):
        model.load_clip("program.pt")
    assert not (here / "trap").exists()


# ------------------------------------------------------------------------------------------------ odd, but not broken

ODD = ["späces and 猫", "link", "-100% {} 'quoted'"]


@pytest.mark.parametrize("name", ODD)
def test_an_odd_path_is_as_good_as_any(name, here):
    """Every program, with every path that it takes in a folder of that name."""
    if name == "link":
        (here / "real").mkdir()
        (here / name).symlink_to("real")
    at = here / name
    at.mkdir(exist_ok=True)
    for file in ("mine", "clip.pt", "last.pt", "released.pth", "photo.png"):
        (at / file).symlink_to(here / file)
    own = {flag: f"--{flag}={at / file}" for flag, file in (("data-root", "mine"), ("clip", "clip.pt"))}
    small = ["--workers", "0", "--device", "cpu"]
    train = [*shlex.split(GOOD["train.py"]), *own.values(), f"--out={at / 'run'}"]
    for program, flags, written in (
            ("rlb_attention.py", [f"--out={at / 'mask.png'}"], "mask.png"),
            ("model.py", [own["clip"], "--crop-size", "64"], "clip.pt"),
            ("data.py", [*shlex.split(GOOD["data.py"]), own["data-root"], f"--out={at / 'sheet.png'}"], "sheet.png"),
            ("data.py", ["--dataset", "folder", own["data-root"], "--check"], "mine"),
            ("train.py", train, "run/last.pt"), ("train.py", [*train, "--resume"], "run/results.png"),
            ("eval.py", [str(at / "last.pt"), *own.values(), f"--save={at / 'saved'}", *small], "saved/a.png"),
            ("predict.py", [str(at / "last.pt"), str(at / "photo.png"), own["clip"], f"--out={at / 'out'}", *small[2:]],
             "out/photo.png"),
            ("toy.py", ["draw", str(at / "world"), "--train", "1", "--val", "1"], "world/classes.txt"),
            ("convert.py", [str(at / "released.pth"), str(at / "ours.pt")], "ours.pt")):
        done = run(*flags, program=program)
        assert (done.returncode, done.stderr) == (0, ""), (program, done.stderr)
        assert (at / written).exists(), program
    assert sorted(path.name for path in (here / "mine").iterdir()) == ["classes.txt", "images", "masks", "train.txt", "val.txt"]


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfa\nb\n", b"a\r\nb", b"\n\n  a \n\nb"])
def test_lists_and_class_files_of_any_editor_are_read(content, here):
    (here / "mine" / "train.txt").write_bytes(content)
    (here / "mine" / "classes.txt").write_bytes(content)
    dataset = data.open_dataset("folder", here / "mine", "train")
    assert [image.stem for image, _ in dataset.pairs] == ["a", "b"]


def test_a_link_to_a_toy_world_stays_one(here):
    for seed in ("0", "1"):
        assert run("draw", "world", "--train", "1", "--val", "1", "--seed", seed, program="toy.py").returncode == 0
        if seed == "0":
            (here / "world").rename(here / "real")
            (here / "world").symlink_to("real")
    assert (here / "world").is_symlink() and "seed 1" in (here / "real" / "toy_world.txt").read_text()


# --------------------------------------------------------------------------------------------------------- the fuzz


def mutated(whole: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes flipped, a piece cut out, put in, doubled or cut off: near the ends, where the structure is, or anywhere."""
    content = bytearray(whole)
    for _ in range(rng.integers(1, 5)):
        near = min(len(content), 600)
        at = int(rng.choice([rng.integers(near + 1), len(content) - rng.integers(near + 1), rng.integers(len(content) + 1)]))
        piece = rng.integers(256, size=rng.integers(1, 9), dtype=np.uint8).tobytes()
        kind = rng.integers(5)
        if kind == 0:
            content[at:at + len(piece)] = piece
        elif kind == 1:
            content[at:at] = piece
        elif kind == 2:
            del content[at:at + int(rng.integers(1, 60))]
        elif kind == 3:
            content[at:at] = content[at // 2:at // 2 + 40]
        elif rng.random() < 0.3:
            del content[at:]
    return bytes(content)


def load_everything(path: Path) -> None:
    state = model.read_checkpoint(path)
    model.model_from_checkpoint(state, path)


def convert_file(path: Path) -> None:
    done = run(str(path), str(path.with_suffix(".ours")), program="convert.py")
    path.with_suffix(".ours").unlink(missing_ok=True)
    if done.returncode:
        assert done.returncode == 2 and done.stderr.startswith("error: ")
        raise ValueError(done.stderr.removeprefix("error: ").removesuffix("\n"))


def small_clip(seed: int = 0) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model.clip.model.CLIP(16, 16, 1, 64, 8, 77, 64, 64, 1, 1).eval()


def own_checkpoint(path: Path) -> None:
    network = model.CLIPRC(small_clip().visual, num_prompts=1, regions=4)
    model.save_checkpoint(path, network, None, class_names=["a", "b"], unseen=[1], text=torch.ones(2, 16), run={"seed": 0})


READERS = {  # kind: (how many, how a good one is made, what reads it)
    "mask.png": (200, lambda path: mask(path, [0, 1, 2, 255], (48, 32)), lambda path: data.read_label(path, np.arange(256, dtype=np.uint8))),
    "image.jpg": (200, lambda path: picture(path, (48, 32)), data.read_image),
    "image.webp": (100, lambda path: picture(path, (48, 32)), data.read_image),
    "image.tif": (100, lambda path: picture(path, (48, 32)), data.read_image),
    "image.gif": (100, lambda path: picture(path, (48, 32)), data.read_image),
    "classes.txt": (200, lambda path: path.write_text("road\nhäuser\n*tree top\n# more\n", "utf-8"), data.read_classes),
    "list.txt": (200, lambda path: path.write_text("a\nhäuser\n", "utf-8"), data._read_list),
    "last.pt": (100, own_checkpoint, load_everything),
    "clip.pt": (100, lambda path: torch.save(small_clip().state_dict(), path), model.load_clip),
    "released.pth": (25, lambda path: torch.save(torch.load(ROOT / "tests/golden/zegclip_inductive.pt", weights_only=True)["state_dict"],
                                                path), convert_file),
}


@pytest.mark.parametrize("kind", READERS)
def test_readers_take_any_bytes_or_refuse_them_in_a_line_that_names_the_file(kind, tmp_path, capfd):
    count, make, read = READERS[kind]
    make(tmp_path / kind)
    whole, rng, refused = (tmp_path / kind).read_bytes(), np.random.default_rng(7), 0
    read(tmp_path / kind)
    for _ in range(count):
        (tmp_path / kind).write_bytes(mutated(whole, rng))
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                read(tmp_path / kind)
            except (ValueError, OSError) as error:
                refused += 1
                assert kind in str(error) and "\n" not in str(error), repr(error)
        assert not warned, str(warned[0].message)
    assert refused > count // 10  # or the damage is none
    assert capfd.readouterr() == ("", "") and os.listdir(tmp_path) == [kind]
