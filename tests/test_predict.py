"""Sec. 4.3 on photos of one's own: what is read, labelled, drawn and told, and what is refused."""

import argparse
import json
import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image, ImageDraw
from test_train import refused, run

import data
import draw
import predict
import toy
from eval import slide_inference
from model import encode_text, load_clip, model_from_checkpoint, read_checkpoint, save_checkpoint

DEFAULTS = argparse.Namespace(template=None, clip=None, crop_size=None, stride=None, lower=None, precision="float32")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A toy run of two steps: silly answers, but everything that a checkpoint has."""
    folder = tmp_path_factory.mktemp("toy")
    toy.draw_world(folder / "world", train=8, val=2)
    done = run("--data-root", str(folder / "world"), "--out", str(folder / "run"), "--iterations", "2", "--batch-size",
               "4", "--lr", "1e-3", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return folder / "run" / "last.pt"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture larger than a window, so that windows overlap."""
    return save_photo(tmp_path / "street.png", (150, 100))


def save_photo(path: Path, size: tuple[int, int], **more) -> Path:
    noise = np.random.default_rng(3).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path, **more)
    return path


def label(checkpoint: Path, *arguments, out: Path) -> dict:
    """What predict.py says as JSON; it must say nothing else."""
    done = run(*map(str, (checkpoint, *arguments, "--out", out, "--json", "--device", "cpu")), program="predict.py")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


def refuse(*arguments) -> str:
    """The one line with which predict.py refuses."""
    return refused(*map(str, arguments), program="predict.py")


def opened(checkpoint: Path, words: str | None = None, **flags) -> predict.Predictor:
    return predict.open_predictor(str(checkpoint), words and predict.read_words(words), torch.device("cpu"),
                                  argparse.Namespace(**vars(DEFAULTS) | flags))


# ------------------------------------------------------------------------------------------------------- the answer


@pytest.mark.parametrize("size", [(37, 91), (5, 3), (13, 17)])
@pytest.mark.parametrize("threshold", [None, 0.9])
def test_resizing_class_by_class_gives_the_whole_images_argmax(size, threshold):
    scores = torch.rand(23, 13, 17, generator=torch.Generator().manual_seed(0))
    scores[5] = scores[4]  # a tie goes to the first
    whole = F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0]
    best, expected = whole.max(0).values, whole.argmax(0).byte()
    if threshold:
        expected[best < threshold] = 255
        assert 0 < (expected == 255).sum() < expected.numel()
    assert np.array_equal(predict.label_map(scores, size, threshold), expected.numpy())


def test_saved_label_map_is_the_argmax_of_evaluations_scores(checkpoint, photo, tmp_path):
    label(checkpoint, photo, "--save", out=tmp_path / "out")
    state = read_checkpoint(checkpoint)
    seen = [i for i in range(20) if i not in state["unseen"]]
    image = Image.open(photo)
    model = model_from_checkpoint(state, checkpoint)
    scores = slide_inference(model, data.test_image(image, 64), state["text"], 64, 53, 0.1, seen)
    scores = F.interpolate(scores[None], size=(100, 150), mode="bilinear", align_corners=False)[0]
    saved = Image.open(tmp_path / "out" / "street_labels.png")
    assert saved.mode == "P" and saved.size == (150, 100)
    assert saved.getpalette()[:60] == draw.index_png_palette(20)[:60]
    assert np.array_equal(np.asarray(saved), scores.argmax(0).numpy())


def test_json_tells_the_shares_of_the_label_map(checkpoint, photo, tmp_path):
    told = label(checkpoint, photo, save_photo(tmp_path / "b.jpg", (90, 120)), "--save", out=tmp_path / "out")
    assert told["classes"] == list(toy.CLASS_NAMES) and len(told["unseen"]) == 5
    assert [each["size"] for each in told["photos"]] == [[150, 100], [90, 120]]
    for each in told["photos"]:
        saved = np.asarray(Image.open(each["files"][1]))
        for name, share in each["shares"].items():
            assert share == pytest.approx((saved == told["classes"].index(name)).mean())
        assert sum(each["shares"].values()) + each["unlabelled"] == pytest.approx(1)
        assert list(each["shares"].values()) == sorted(each["shares"].values(), reverse=True)


def test_pixels_below_the_threshold_stay_unlabelled(checkpoint, photo, tmp_path):
    told = label(checkpoint, photo, "--save", "--threshold", 1, out=tmp_path / "all")["photos"][0]
    assert told["unlabelled"] == 1 and told["shares"] == {}
    assert (np.asarray(Image.open(told["files"][1])) == 255).all()
    p = opened(checkpoint)
    image = Image.open(photo)
    whole, part = predict.predict(p, image), predict.predict(p, image, 0.3)
    assert np.array_equal(part[part != 255], whole[part != 255])


def test_words_without_a_mask_in_training_are_unseen_and_red(checkpoint, photo, tmp_path):
    words = f"Plain Red Rug, {toy.CLASS_NAMES[toy.UNSEEN[0]]}, *traffic light"
    p = opened(checkpoint, words)
    assert p.names[0] == "Plain Red Rug" and p.unseen == {1, 2}
    for word, red in (("plain red rug", False), ("traffic light", True)):
        out = tmp_path / word
        done = run(str(checkpoint), str(photo), "--classes", word, "--out", str(out), program="predict.py")
        assert done.returncode == 0 and (f"* {word}" in done.stdout) == red and f"{word} " in done.stdout
        assert (np.asarray(Image.open(out / "street.png")) == draw.RED).all(-1).any() == red


def test_a_star_marks_a_word_where_the_checkpoint_does_not_know_its_own(checkpoint, tmp_path):
    model = model_from_checkpoint(read_checkpoint(checkpoint), checkpoint)
    converted = tmp_path / "converted.pt"
    save_checkpoint(converted, model, clip_sha256=None)
    flags = {"clip": toy.SHIPPED_CLIP, "crop_size": 64}
    p = opened(converted, "car, *bus", **flags)
    assert p.names == ["car", "bus"] and p.unseen == {1} and p.lower == 0.1
    assert opened(converted, "car, bus", **flags).unseen == set()
    assert "--classes" in refuse(str(converted), __file__, "--out", str(tmp_path / "out"))


def test_seen_words_are_lowered_only_beside_unseen_ones(checkpoint):
    assert opened(checkpoint).lower == 0.1
    assert opened(checkpoint, "plain red rug, zebra").lower == 0.1
    assert opened(checkpoint, "plain red rug, dotted red rug").lower == opened(checkpoint, "zebra, car").lower == 0
    assert opened(checkpoint, "zebra, car", lower=0.3).lower == 0.3


def test_templates_are_averaged_and_a_class_file_is_read(checkpoint, tmp_path):
    (tmp_path / "words.txt").write_text("# mine\nplain red rug\n*traffic light, green\n", "utf-8")
    p = opened(checkpoint, f"@{tmp_path / 'words.txt'}", template=["a {}", "a photo of a {}"])
    assert p.names == ["plain red rug", "traffic light, green"]
    expected = encode_text(load_clip(toy.SHIPPED_CLIP), p.names, ["a {}", "a photo of a {}"])
    torch.testing.assert_close(p.text, expected)


def test_regions_are_named_by_the_cosine_of_their_tokens(checkpoint, photo, tmp_path):
    told = label(checkpoint, photo, "--regions", out=tmp_path / "out")["photos"][0]
    p = opened(checkpoint)
    square = Image.open(photo).resize((64, 64), Image.Resampling.BILINEAR)
    with torch.no_grad():
        R = p.model.encoder(data.normalise(np.array(square))[None])[2][0]
    nearest = [p.names[max(range(20), key=lambda i: F.cosine_similarity(r, p.text[i], dim=0))] for r in R]
    assert told["regions"] == [nearest[:2], nearest[2:]]
    assert Image.open(tmp_path / "out" / "street_regions.png").width > 2 * 300


def test_comparison_stands_between_photo_and_prediction(checkpoint, photo, tmp_path):
    other_model, altered = tmp_path / "altered.pt", read_checkpoint(checkpoint)
    altered["weights"]["decoder.q_blocks.2.norm2.weight"] *= -1  # the best class becomes the worst
    torch.save(altered, other_model)
    alone = label(checkpoint, photo, out=tmp_path / "alone")["photos"][0]
    one = label(checkpoint, photo, "--compare", other_model, out=tmp_path / "one")["photos"][0]
    other = label(other_model, photo, "--compare", checkpoint, out=tmp_path / "other")["photos"][0]
    assert alone["shares"] == one["shares"] != other["shares"]

    bare = np.asarray(draw.fit_to_look_at(Image.open(photo), 800))
    height, width = bare.shape[:2]

    def tiles(told: dict) -> list[np.ndarray]:  # below the captions, with gaps between
        picture = np.asarray(Image.open(told["files"][0]))
        return [picture[40:40 + height, x:x + width] for x in range(12, 12 + 3 * (width + 6), width + 6)]

    (first, second, third), (_, second_of_other, third_of_other) = tiles(one), tiles(other)
    assert np.array_equal(first, bare)
    assert np.array_equal(second, third_of_other) and np.array_equal(third, second_of_other)


# -------------------------------------------------------------------------------------------------- what can be read


def bits16(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256 + 77)


@pytest.mark.parametrize("suffix, change, back", [
    (".png", bits16, lambda im: im.convert("L")), (".tif", bits16, lambda im: im.convert("L")),
    (".tif", lambda im: im.convert("CMYK"), None), (".png", lambda im: im.convert("1"), None),
    (".webp", lambda im: im, None), (".JPG", lambda im: im, None), (".gif", lambda im: im.convert("P"), None)])
def test_any_mode_becomes_the_same_rgb(tmp_path, suffix, change, back):
    image = Image.open(save_photo(tmp_path / "plain.png", (40, 30)))
    changed = change(image)
    changed.save(tmp_path / f"odd{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    expected = (back or (lambda _: changed))(image).convert("RGB")
    read = data.read_image(tmp_path / f"odd{suffix}")
    assert read.mode == "RGB"
    assert np.abs(np.asarray(read).astype(int) - np.asarray(expected)).mean() < (8 if suffix == ".JPG" else 0.01)


def test_what_is_transparent_becomes_white(tmp_path):
    solid = Image.new("RGBA", (4, 4), (10, 20, 30, 255))
    solid.putpixel((1, 2), (10, 20, 30, 0))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 2), 1)
    solid.save(tmp_path / "rgba.png")
    solid.convert("LA").save(tmp_path / "la.png")
    palette.save(tmp_path / "p.png", transparency=1)
    for name in ("rgba", "la", "p"):
        read = data.read_image(tmp_path / f"{name}.png")
        assert read.getpixel((1, 2)) == (255, 255, 255) and read.getpixel((0, 0)) != (255, 255, 255)


def test_exif_orientation_is_honoured_and_broken_exif_ignored(checkpoint, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    save_photo(tmp_path / "turned.png", (90, 60), exif=exif)
    told = label(checkpoint, tmp_path / "turned.png", "--save", out=tmp_path / "out")["photos"][0]
    assert told["size"] == [60, 90] and Image.open(told["files"][1]).size == (60, 90)
    for i, broken in enumerate((b"garbage", b"II*\0\xff\xff\xff\xff", b"MM\0*",
                                b"II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0\x01")):
        save_photo(tmp_path / f"{i}.jpg", (90, 60), exif=b"Exif\0\0" + broken)
        assert data.read_image(tmp_path / f"{i}.jpg").size == (90, 60)


def test_odd_names_and_sizes_are_labelled(checkpoint, tmp_path):
    folder = tmp_path / "my phötos 猫"
    folder.mkdir()
    for name, size in (("a b.jpg", (70, 50)), ("é.tar.PNG", (1, 1)), ("wide.png", (700, 1)),
                       ("line\nfeed.png", (1, 300))):
        save_photo(folder / name, size)
    save_photo(Path(os.fsdecode(os.fsencode(folder) + b"/\xff.png")), (20, 20))  # a name that is no text
    (folder / "link.png").symlink_to(folder / "a b.jpg")
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_text("no picture")
    told = label(checkpoint, folder, "--regions", out=tmp_path / "out")
    assert all(max(Image.open(file).size) < 6000 for each in told["photos"] for file in each["files"])
    assert len(told["photos"]) == 6 and (tmp_path / "out" / "é.tar.png").exists()
    plain = run(str(checkpoint), str(folder), "--out", str(tmp_path / "again"), program="predict.py")
    assert plain.returncode == 0 and plain.stdout.count("class (* unseen)") == 6


# ----------------------------------------------------------------------------------------------------- what cannot


def png(width: int, height: int) -> bytes:
    """A PNG's head that promises width x height pixels, with hardly any behind it."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


def bad_photo(how: str, photo: Path, path: Path) -> None:
    if how == "floating point":
        Image.fromarray(np.ones((9, 9), np.float32)).save(path, "TIFF")
    elif how == "link to nothing":
        path.symlink_to("nowhere")
    elif how == "link to itself":
        path.symlink_to(path)
    elif how == "pipe":
        os.mkfifo(path)
    elif how != "missing":
        whole = photo.read_bytes()
        path.write_bytes({"empty": b"", "text": b"a photo of a car\n" * 50, "truncated": whole[:len(whole) // 2],
                          "head only": whole[:20], "bomb": png(60_000, 60_000), "small bomb": png(10_000, 9_500),
                          "no pixels": png(0, 0), "flipped bytes": whole[:60] + bytes(b ^ 85 for b in whole[60:]),
                          "checksum": whole[:45] + b"\xff" + whole[46:], "script": b"#!/bin/sh\nexit 1\n",
                          "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"}[how])


@pytest.mark.parametrize("how", ["empty", "text", "truncated", "head only", "bomb", "small bomb", "no pixels",
                                 "flipped bytes", "checksum", "script", "svg", "floating point", "link to nothing",
                                 "link to itself", "pipe", "missing"])
def test_a_bad_photo_is_named(checkpoint, photo, tmp_path, how):
    bad_photo(how, photo, tmp_path / "bad one.png")
    line = refuse(str(checkpoint), str(tmp_path / "bad one.png"), "--out", str(tmp_path / "out"))
    assert "bad one.png" in line and ("pixels; make it smaller" in line) == ("bomb" in how)
    assert not (tmp_path / "out").exists()


def test_one_damaged_photo_does_not_cost_the_others_theirs(checkpoint, photo, tmp_path):
    for name in ("a.jpg", "z.jpg"):
        (tmp_path / name).write_bytes(b"")
    done = run(str(checkpoint), str(tmp_path), "--out", str(tmp_path / "out"), "--json", program="predict.py")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "a.jpg" in done.stderr and "z.jpg" in done.stderr
    assert [Path(each["photo"]).name for each in json.loads(done.stdout)["photos"]] == ["street.png"]
    assert os.listdir(tmp_path / "out") == ["street.png"]


class Code:
    """Pickled, it would create a file on being read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def bad_checkpoint(how: str, checkpoint: Path, path: Path, trap: Path) -> None:
    state, whole = read_checkpoint(checkpoint), checkpoint.read_bytes()
    files = {"empty": b"", "text": b"not a checkpoint", "truncated": whole[:len(whole) // 2],
             "zip": b"PK\5\6" + bytes(18), "pickle that runs code": pickle.dumps(Code(trap), protocol=2)}
    weights = {name: tensor.clone() for name, tensor in state["weights"].items()}
    next(iter(weights.values())).view(-1)[0] = float("inf" if how == "infinite" else "nan")
    changes = {"zip that runs code": {"optimizer": Code(trap)}, "NaN": {"weights": weights},
               "infinite": {"weights": weights}, "weights missing": {"weights": {}},
               "NaN text": {"text": state["text"] * float("nan")},
               "text of others": {"text": torch.ones(3, 64)}, "no text": {"text": None},
               "names are numbers": {"class_names": [1] * 20}, "names are one number": {"class_names": 7},
               "run is text": {"run": "x"}, "odd crop": {"run": {"crop_size": "wide"}},
               "templates are a number": {"templates": 3}, "odd settings": {"model": {"magic": 1}},
               "other sizes": {"model": state["model"] | {"num_prompts": 9}}, "other CLIP": {"clip_sha256": "0" * 64},
               "other format": {"format": "clip-rc 0"}}
    if how == "folder":
        path.mkdir()
    elif how in files:
        path.write_bytes(files[how])
    elif how != "missing":
        torch.save(state | changes[how], path)


@pytest.mark.parametrize("how", [
    "missing", "folder", "empty", "text", "truncated", "zip", "pickle that runs code", "zip that runs code", "NaN",
    "infinite", "weights missing", "NaN text", "text of others", "no text", "names are numbers", "names are one number",
    "run is text", "odd crop", "templates are a number", "odd settings", "other sizes", "other CLIP", "other format"])
def test_a_bad_checkpoint_is_refused_and_never_run(checkpoint, photo, tmp_path, how):
    bad_checkpoint(how, checkpoint, tmp_path / "bad.pt", tmp_path / "trap")
    assert "bad.pt" in refuse(tmp_path / "bad.pt", photo, "--out", tmp_path / "out")
    if how in ("missing", "pickle that runs code", "NaN"):
        assert "bad.pt" in refuse(checkpoint, photo, "--compare", tmp_path / "bad.pt", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "trap").exists()


@pytest.mark.parametrize("how", ["missing", "folder", "empty", "text", "truncated", "pickle that runs code",
                                 "zip that runs code", "other format"])
def test_a_bad_clip_file_is_refused_and_never_run(checkpoint, photo, tmp_path, how):
    bad_checkpoint(how, checkpoint, tmp_path / "bad.pt", tmp_path / "trap")
    words = ("--classes", "car", "--out", tmp_path / "out")
    assert "bad.pt" in refuse(checkpoint, photo, "--clip", tmp_path / "bad.pt", *words)
    converted = tmp_path / "converted.pt"  # whose CLIP is anyone's guess, so that the file is opened
    save_checkpoint(converted, model_from_checkpoint(read_checkpoint(checkpoint), checkpoint), clip_sha256=None)
    assert "bad.pt" in refuse(converted, photo, "--crop-size", 64, "--clip", tmp_path / "bad.pt", *words)
    assert not (tmp_path / "out").exists() and not (tmp_path / "trap").exists()


@pytest.mark.parametrize("culprit, flags", [
    *(("no word", ["--classes", text]) for text in ("", "car,,bus", "car, bus,", "*", "a\0b", "\udcff", "car\u200b\a")),
    ("'Car'", ["--classes", "car, bus, Car"]), ("'car'", ["--classes", "car, bus,  car "]),
    ("too long", ["--classes", "very " * 40 + "long"]), ("nowhere.txt", ["--classes", "@nowhere.txt"]),
    ("no such file", ["--classes", "@"]), ("300", ["--classes", ",".join(map(str, range(300)))]),
    *((f"--template '{text}'", ["--template", text]) for text in ("", "a {0}", "{} or {}", "{0.__class__} {}", "{}}")),
    *(("--threshold", ["--threshold", value]) for value in ("1.5", "-1", "nan")),
    *(("--lower", ["--lower", value]) for value in ("-0.1", "inf")),
    *(("--crop-size", ["--crop-size", value]) for value in ("0", "-64", "70", "1000000000")),
    *(("--stride", ["--stride", value]) for value in ("0", "-1", "65")),
    *(("--device", ["--device", value]) for value in ("tpu", "meta", "cuda:99", "")),
    ("ResNet", ["--clip", "RN50", "--classes", "car"]), ("ViT-Z/16", ["--clip", "ViT-Z/16", "--classes", "car"])])
def test_a_bad_flag_is_named_and_nothing_is_written(checkpoint, photo, tmp_path, culprit, flags):
    assert culprit in refuse(checkpoint, photo, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_bytes_of_a_class_file_that_are_no_text_are_refused(checkpoint, photo, tmp_path):
    for content in (b"\xff\xfec\0a\0r\0", b"car\ncar\n", b"", b"\0\n", b"car\n*\n"):
        (tmp_path / "words.txt").write_bytes(content)
        line = refuse(checkpoint, photo, "--classes", f"@{tmp_path / 'words.txt'}", "--out", tmp_path / "out")
        assert "words.txt" in line or "--classes" in line


def test_nothing_is_ever_overwritten(checkpoint, photo, tmp_path):
    out = tmp_path / "out"
    label(checkpoint, photo, out=out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert "street.png exists already" in refuse(checkpoint, photo, "--out", out)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert "street.png exists already" in refuse(checkpoint, photo, "--out", tmp_path)  # the photo itself
    (out / "b_labels.png").symlink_to("nowhere")
    b = save_photo(tmp_path / "b.jpg", (20, 20))
    assert "b_labels.png exists already" in refuse(checkpoint, b, "--out", out, "--save")
    assert not (out / "b.png").exists()
    twin = save_photo(tmp_path / "b_labels.jpg", (20, 20))
    assert "another --out" in refuse(checkpoint, b, twin, "--save", "--out", tmp_path / "new")
    assert "another --out" in refuse(checkpoint, b, b, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_output_place_that_is_no_folder_is_refused(checkpoint, photo, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    for place in ("file", "file/below", "dangling", "dangling/below"):
        assert "--out" in refuse(checkpoint, photo, "--out", tmp_path / place)
    assert "cannot be written" in refuse(checkpoint, photo, "--out", "/proc/self/fdinfo")
    long = save_photo(tmp_path / f"{'x' * 247}.jpg", (20, 20))
    assert "cannot be written" in refuse(checkpoint, long, "--out", tmp_path / "out")
    assert (tmp_path / "file").read_text() == "mine"


def test_empty_folders_are_refused(checkpoint, tmp_path):
    (tmp_path / "none").mkdir()
    assert "no pictures" in refuse(checkpoint, tmp_path / "none", "--out", tmp_path / "out")


@pytest.mark.slow
def test_a_photo_of_twelve_megapixels_stays_under_two_gigabytes(checkpoint, tmp_path):
    save_photo(tmp_path / "large.jpg", (4000, 3000))
    program = ("import resource, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__');"
               "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    (tmp_path / "171.txt").write_text("\n".join(data.COCO_STUFF_CLASSES))  # 8.2 GB, were they all of the photo's size
    arguments = [checkpoint, tmp_path / "large.jpg", "--classes", f"@{tmp_path / '171.txt'}", "--out", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-c", program, ROOT / "predict.py", *arguments], capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) * 1024 < 2e9


# ------------------------------------------------------------------------------------------------------- the drawing


@pytest.mark.parametrize("eye", [None, *draw.EYES])
def test_twenty_colours_stay_apart_for_every_eye(eye):
    points = draw.lab(draw.palette(20), eye)
    distance = np.linalg.norm(points[:, None] - points, axis=-1) + 1e3 * np.eye(20)
    assert distance.min() > 12  # a just noticeable difference is about 2


@pytest.mark.parametrize("names", [data.VOC_CLASSES, data.COCO_STUFF_CLASSES])
@pytest.mark.parametrize("width", [260, 500, 1600])
def test_legends_hold_every_swatch_and_stay_within_their_width(names, width):
    colours = draw.palette(len(names))
    picture = draw.legend(list(names), colours, {3, 19}, width)
    drawn = {tuple(colour) for colour in np.asarray(picture).reshape(-1, 3).tolist()}
    assert {tuple(colour) for colour in colours.tolist()} <= drawn and draw.RED in drawn
    border = np.asarray(picture)[:, [0, 1, -2, -1]]
    assert picture.width == width and (border == 255).all()


def test_a_label_figures_legend_has_what_is_in_the_picture_and_hides_nothing():
    photo = Image.new("RGB", (300, 200), (9, 9, 9))
    mask = np.full((200, 300), 255, np.uint8)
    mask[:50] = 2
    for size in ((300, 200), (200, 300)):
        picture = draw.label_figure(photo.resize(size), {"x": mask.reshape(size[::-1])}, ["a", "b", "c"], set())
        pixels = {tuple(colour) for colour in np.asarray(picture).reshape(-1, 3).tolist()}
        shown = [tuple(colour) in pixels for colour in draw.palette(3).tolist()]
        assert shown == [False, False, True]
        tile = draw.fit_to_look_at(photo.resize(size), 1600)
        inside = np.asarray(picture)[6:6 + tile.height, 6:6 + tile.width]
        assert (inside == 9).all(-1).mean() > 0.74 and (picture.width > 1.5 * tile.width) == (size[0] < size[1])


def test_region_names_are_written_in_every_cell_and_fit():
    for m in (1, 2, 4, 8):
        image = Image.new("RGB", (110 * m, 60 * m), (9, 9, 9))
        names = ["a very long name with many words, which cannot fit", "Donaudampfschifffahrtsgesellschaft", "sofa"]
        picture = draw.region_names(image, [[(r + c) % 3 for c in range(m)] for r in range(m)], names, {2})
        cells = np.asarray(picture).reshape(m, 60, m, 110, 3).transpose(0, 2, 1, 3, 4)
        assert np.isin(cells[:, :, :, -5:], (9, 255)).all() and np.isin(cells[:, :, -3:], (9, 255)).all()  # no letter
        for r in range(m):
            for c in range(m):
                assert (cells[r, c] == 255).all(-1).sum() > 300
                red = cells[r, c, ..., 0].astype(int) - cells[r, c, ..., 1] > 60
                assert red.any() == ((r + c) % 3 == 2)


def test_in_the_methods_figure_no_text_meets_an_edge_an_arrow_or_another_text(monkeypatch):
    texts, boxes, lines = [], [], []

    class Pen(ImageDraw.ImageDraw):
        def text(self, xy, text, fill, font, anchor, stroke_width):
            super().text(xy, text, fill, font, anchor, stroke_width=stroke_width)
            if text.strip():
                texts.append((text, self.textbbox(xy, text, font, anchor, stroke_width=stroke_width)))

        def rounded_rectangle(self, xy, *style):
            super().rounded_rectangle(xy, *style)
            boxes.append(xy)

        def rectangle(self, xy, *style):
            super().rectangle(xy, *style)
            lines.append(xy)

        def line(self, xy, *style):
            super().line(xy, *style)
            x, y = sorted(xy[::2]), sorted(xy[1::2])
            lines.append((x[0] - 2, y[0] - 2, x[1] + 2, y[1] + 2))

    def apart(a, b, slack=0):
        return max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3]) >= -slack

    def inside(a, b):
        return b[0] <= a[0] and b[1] <= a[1] and a[2] <= b[2] and a[3] <= b[3]

    monkeypatch.setattr(draw.ImageDraw, "Draw", Pen)
    picture = draw.method_figure(Image.new("RGB", (90, 50), (9, 9, 9)), Image.new("L", (5, 7)))
    assert len(texts) > 100 and len(boxes) > 15 and len(lines) > 20
    for i, (text, place) in enumerate(texts):
        assert inside(place, (0, 0, *picture.size)), text
        assert all(apart(place, (left, top, right, bottom)) or inside(place, (left + 6, top + 6, right - 6, bottom - 6))
                   for left, top, right, bottom in boxes), text
        assert all(apart(place, line) for line in lines), text
        assert all(apart(place, other, slack=2) or "^" in (text, name) for name, other in texts[:i]), text
    for line in lines:  # an arrow may leave a box, or enter it, but never cross it
        for box in boxes:
            assert apart(line, box) or all(line[i] > box[i] or line[i + 2] < box[i + 2] for i in (0, 1)), (line, box)
