"""tools/prepare.py: other tools' folders become the one form that data.py reads. check_data.py."""

from functools import partial

import numpy as np
import pytest
from conftest import run
from miniature import mask, picture
from PIL import Image

import data

NAMES = "road\ncar\n*tree top\n"
COLOURS = np.uint8([(128, 64, 128), (64, 0, 128), (0, 64, 0), (9, 9, 9)])
LISTED = "128,64,128 = road\n64,0,128 = car\n0,64,0 = *tree top\n9,9,9 = -"


def stripes(i):
    """Classes 0, 1, 2 and none in four orders, so that a mask tells whose it is. (40, 60)"""
    return np.uint8(np.roll([0, 1, 2, 255], i).repeat(15)[None].repeat(40, 0))


def own_palette(values):
    """Colours by a palette in another order in every other file, as Pillow's quantize does."""
    order = np.uint8([2, 0, 3, 1] if values[0, 0] else [0, 1, 2, 3])
    image = Image.fromarray(order[np.minimum(values, 3)])
    image.putpalette(COLOURS[np.argsort(order)].tobytes())
    return image


MASKS = dict(
    grey=Image.fromarray, alpha=lambda values: Image.fromarray(values).convert("LA"),
    colours=lambda values: Image.fromarray(COLOURS[np.minimum(values, 3)]), palette=own_palette,
    deep=lambda values: Image.fromarray(values + np.uint16(400)),  # 16 bits
    two=lambda values: Image.fromarray(values // 254 * 255), none=lambda values: Image.fromarray(
        values | 255))


def write(text, file, root):
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(text, "utf-8")


def make(root, image="images/{}.png", label="masks/{}.png", names="0 1 2 3", kind="",
         classes=NAMES):
    """An image and a mask of each name, and a class list."""
    for i, name in enumerate(names.split()):
        picture(root / image.format(name), seed=i)
        mask(root / label.format(name), stripes(i))
        if kind:
            MASKS[kind](stripes(i)).save(root / label.format(name))
    write(classes, "classes.txt", root)
    return root


def prepare(root, *flags):
    """Run the tool. Returns what it printed, and {split: {name: first row of the label}} of OUT."""
    out, labels = root.with_name("out"), {}
    result = run(root, out, *flags, program="tools/prepare.py")
    assert result.returncode == 0, (result.stdout, result.stderr)
    for split in ("train", "val"):
        dataset = data.open_dataset("folder", out, split)
        rows = [data.read_pair(dataset, i)[1][0, ::15].tolist() for i in range(len(dataset.pairs))]
        labels[split] = dict(zip(data.read_names(out / f"{split}.txt"), rows))
    return result.stdout, labels


def refusal(root, *flags):
    """Run the tool, which writes nothing but its list of values. Returns all that it printed."""
    result = run(root, root.with_name("out"), *flags, program="tools/prepare.py")
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert {file.name for file in root.parent.iterdir()} <= {root.name, "out.classes.txt"}
    return result.stdout + result.stderr


@pytest.mark.parametrize("image, label", [
    ("images/{}.jpg", "masks/{}.png"), ("JPEGImages/{}.JPG", "SegmentationClass/{}.PNG"),
    ("{}.jpg", "{}.png"), ("IMG_{}.jpeg", "IMG_{}.png"), ("{}_sat.jpg", "{}_mask.png"),
    ("x/image_{}.png", "x/label_{}.png"), ("images/{}.png", "masks/{}_L.png"),
    ("leftImg8bit/u/u_{}_leftImg8bit.png", "gtFine/u/u_{}_gtFine_labelIds.png"),
    ("images/Ü{}.jpg", "masks/U\u0308{}.png"), ("{}_json/img.png", "{}_json/label.png"),
    ("images/label_{}.jpg", "labels/label_{}.png"), ("img/{}.jpg", "masks_machine/{}.jpg.png"),
    ("images/shot 10.15.3{} AM.jpg", "masks/shot 10.15.3{} AM.png"), ("imgs/{}.bmp", "gt/{}.bmp"),
    ("images/day{}/001.tif", "labels/day{}/001.tif"), ("road/{}.webp", "road_annot/{}.png"),
    ("images/training/{}.jpg", "annotations/train/{}.png"), ("photos/a/{}.jpg", "masks/{}.png"),
    ("train/{}.png", "trainannot/{}.png"), ("seg/{}.jpg", "seg/{}_mask.png"),
    ("a/b/original/{}.png", "a/b/label_images_b/{}.png")])
def test_every_layout_gives_each_image_its_own_label(tmp_path, image, label):
    root = make(tmp_path / "in", image, label)
    labels = prepare(root)[1]
    pixels = [np.array(Image.open(root / image.format(i)).convert("RGB")) for i in range(4)]
    for name, row in (labels["train"] | labels["val"]).items():
        (out,) = (tmp_path / "out/images").glob(f"{name}.*")
        (i,) = (i for i in range(4) if np.array_equal(Image.open(out).convert("RGB"), pixels[i]))
        assert row == stripes(i)[0, ::15].tolist()
        assert image[-3:] in ("bmp", "tif") or out.samefile(root / image.format(i))  # a hard link


@pytest.mark.parametrize("kind, classes", [("grey", classes) for classes in (
    NAMES, "\ufeff" + NAMES, "# my\n\nroad\ncar # red\n* tree top",
    "0 = road\n1=car\n2= *tree top\n9 = -\n7 = car",
    *(f"0{mark}road\n1{mark}car\n2{mark}*tree top" for mark in (": ", ", ", ",", " ", "\t")),
    "road,0\ncar,1\n*tree top,2", "id,name\n0,road\n1,car\n2,*tree top", "__ignore__\n" + NAMES,
    "Pixel Value, Class\n0, road\n1, car\n2, *tree top", "name;Index\nroad;0\ncar;1\n*tree top;2",
    "Idx\tRatio\tTrain\tName\n0\t0.1\t11\troad, way\n1\t.2\t9\tcar;auto\n2\t.3\t8\t*tree top",
    "# name   id   ignoreInEval   color\n Label( 'road' , 0 , False , (1, 2, 3) ),\n"
    " 'car' , 1 , False , (1, 2, 4) ),\n '*tree top' , 2 , False , (1, 1, 1) ),\n"
    " 'none' , 9 , True , (0, 0, 0) ),")] + [("colours", classes) for classes in (
        LISTED, LISTED.replace(",", " ").replace(" =", "\t"), "name,r,g,b\nroad,128,64,128\n"
        "car,64,0,128\n*tree top,0,64,0\n-,9,9,9", "road:128,64,128::\ncar:64,0,128::\n"
        "*tree top:0,64,0::\n-:9,9,9::", "# label:color_rgb:parts:actions\nroad:128,64,128::\n"
        "car:64,0,128:a,b,c:\n*tree top:0,64,0::\n-:9,9,9::",
        "#804080 = road\n#400080 = car\n#004000 = *tree top\n#090909 = -")] + [
    ("palette", LISTED), ("alpha", NAMES), ("deep", "400 = road\n401=car\n402=*tree top\n655 = -")])
def test_any_kind_of_mask_and_any_form_of_class_list_give_the_same_labels(tmp_path, kind, classes):
    labels = prepare(make(tmp_path / "in", kind=kind, classes=classes))[1]
    assert labels["train"] | labels["val"] == {str(i): [*stripes(i)[0, ::15]] for i in range(4)}
    assert (tmp_path / "out/classes.txt").read_text() == NAMES


@pytest.mark.parametrize("classes, words", [
    ("road\ntree*", "write `*tree`"), ("0: road\ncar", "`car` is not understood; write `VALUE = c"),
    ("road 3", "write `3 = road`"), ("0 = ?  # 3 %", "write `0 = NAME`"), ("0 - road", "`0 = road"),
    ("*4 = road", "write `4 = *road`"), ("1,2,300 = a", "write `1,2,300 = a`"), ("a\na", "`a` is"),
    ("0 = a, b\n1 = c,2", "`1 = c,2` is"),
    ("names:\n0: a", "write `names`"), ("[0] road", "write `0 = road`"), ("name\na", "`name` is"),
    ("0,road,vehicle", "write `0 = road vehicle`"), ("4 = cat\n4 = dog", "`4 = dog` gives a value"),
    ("id,trainId,name\n0,1,road", "choose with --column")])
def test_a_line_with_another_meaning_is_refused_with_the_line_to_write(tmp_path, classes, words):
    assert words in refusal(make(tmp_path / "in", classes=classes))


def again(**how):
    return lambda root: make(root, **how)


@pytest.mark.parametrize("damage, words", [
    (lambda root: (root / "masks").rename(root / "ink"), "--images GLOB --masks GLOB"),
    (again(label="masks/{}_color.png"), "choose with --images GLOB or --masks GLOB"),
    (lambda root: [file.rename(file.with_suffix(".jpg")) for file in (root / "masks").iterdir()],
     "JPEG and WebP cannot hold masks"),
    (lambda root: mask(root / "masks/1.png", [0], (61, 40)), "61x40 pixels, but its image has 60x"),
    (partial(write, "", "masks/1.png"), "masks/1.png: cannot be read"),
    (partial(write, "", "images/1.png"), "images/1.png: cannot be read"),
    (lambda root: mask(root / "masks/1.png", [0, 1, 2, 7]), "no name for 1 of 5 values"),
    (again(kind="colours"), "holds colours; they are listed as `128,64,0"),
    (again(kind="palette"), "has another colour in other masks' palettes"),
    (again(kind="two"), "no name for 1 of 2 values"), (again(kind="none"), "nothing to score"),
    (again(classes="0 = road\n1 = -\n2 = -"), "the only one, so any model scores 100"),
    (partial(write, "0\nghost", "val.txt"), "1 lines lack an image or mask ('ghost'); fix"),
    (partial(write, "0\n1", "train.txt"), "for validation? --val test: yes; --val tenth: no"),
    (again(image="images/test/{}.png", label="masks/test/{}.png"), "--val test: yes; --val tenth"),
    (lambda root: [write(i, f"{i}/val.txt", root) for i in "01"], "choose with --lists DIR"),
    (lambda root: picture(root / "images/1.jpg"), "images/1.jpg, images/1.png, masks/1.png: all")])
def test_what_would_be_wrong_is_refused_and_nothing_is_written(tmp_path, damage, words):
    root = make(tmp_path / "in")
    damage(root)
    assert words in refusal(root)


def test_without_a_class_list_one_is_written_that_lacks_only_names(tmp_path):
    root, listed = make(tmp_path / "in"), tmp_path / "out.classes.txt"
    (root / "classes.txt").unlink()
    assert f"start again with --classes {listed}" in refusal(root)
    text = listed.read_text()
    assert "\n1 = ?                   # 25.00% of the pixels, colour (3, 4, 5), masks/0.png" in text
    assert "\n2 = ?" in text and "\n255 = -" in text
    assert "out.classes.txt: `0 = ?" in refusal(root, "--classes", listed)
    listed.write_text(text.replace("0 = ?", "0 = a").replace("1 = ?", "1 = b").replace("?", "-"))
    labels = prepare(root, "--classes", listed, "--unseen", "b")[1]
    assert labels["train"]["0"] == [0, 1, 255, 255]
    assert (tmp_path / "out/classes.txt").read_text() == "a\n*b\n"


@pytest.mark.parametrize("size, flags, turns", [
    ((60, 40), (), True), ((40, 60), (), False), ((40, 40), ("--exif", "upright"), False),
    ((40, 40), ("--exif", "as-stored"), True)])
def test_images_are_turned_upright_and_masks_if_size_or_flag_says_so(tmp_path, size, flags, turns):
    root, exif = make(tmp_path / "in", "images/{}.jpg"), Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    stored = Image.open(root / "images/2.jpg").resize((40, 40) if flags else (60, 40))
    stored.save(root / "images/1.jpg", exif=exif, quality=95)
    values = np.random.default_rng(0).integers(0, 3, size[::-1])
    mask(root / "masks/1.png", values)
    assert not flags or "choose with --exif as-stored" in refusal(root)
    prepare(root, *flags)
    written, label = (np.float32(Image.open(tmp_path / "out" / file))
                      for file in ("images/1.jpg", "masks/1.png"))
    assert np.abs(written - np.rot90(stored, -1)).mean() < 8
    assert np.array_equal(label, np.rot90(values, -1) if turns else values)


@pytest.mark.parametrize("names, lists, flags, train, val", [
    ("train/a Train/b valid/c test/d", {}, (), "train/a Train/b", "valid/c"),
    ("x/training/a x/Validation/c x/testing/d", {}, (), "x/training/a", "x/Validation/c"),
    ("train2017/a test/b", {}, ("--val", "test"), "train2017/a", "test/b"),
    ("train/a train/b test/c", {}, ("--val", "tenth"), "train/b", "train/a"),
    ("val/a", {}, (), "val/a", "val/a"), ("3 5 6 29 val", {}, (), "3 5 val", "6 29"),
    ("test/a test/b", {}, ("--val", "tenth"), "test/b", "test/a"),
    ("img_1 photo_1 a-b a_b", {}, (), "img_1 photo_1 a-b", "a_b"),
    ("a seq/b c seq/v_1.5 x", {"train": "a.png\nseq\\b\n/data/images/c.png /data/masks/c.png\nx",
                               "valid": "seq/v_1.5.png\nx"}, (), "a seq/b c", "seq/v_1.5 x")])
def test_splits_are_lists_folders_or_a_tenth_by_a_hash(tmp_path, names, lists, flags, train, val):
    root = make(tmp_path / "in", names=names)
    for split, lines in lists.items():
        write(lines, f"lists/{split}.txt", root)
    printed, labels = prepare(root, *flags)
    assert {split: {*labels[split]} for split in labels} == {
        "train": {*train.split()}, "val": {*val.split()}}
    left = {*names.split()} - {*train.split(), *val.split()}
    assert not left or "left out, neither for training nor for validation" in printed


def test_what_is_left_out_and_what_looks_wrong_is_said(tmp_path):
    root = make(tmp_path / "in", names="train/a train/b val/c",
                classes="road\ncar\n*tree\n*sky\nsea")
    (root / "images/val/c.png").write_bytes((root / "images/train/a.png").read_bytes())
    rows = np.repeat([0, 1, 1, 2], [2, 18, 18, 2])[:, None].repeat(60, 1)  # 2 rows of road and tree
    mask(root / "masks/train/b.png", rows), mask(root / "masks/val/c.png", rows)
    write("", "images/a.heic", root), write("", "b.json", root), write("", "images/.hidden", root)
    picture(root / "images/train/lone.jpg"), mask(root / "masks/val/left.png", [0])
    picture(root / "masks/val/c.jpg")
    printed, labels = prepare(root)
    assert [*labels["train"]] == ["train/b"] and [*labels["val"]] == ["val/c"]
    for words in ("images/train/lone.jpg: left out, an image without a mask", "b.json: not read",
                  "masks/val/left.png: left out, a mask without an image", "a.heic: not read, .he",
                  "masks/val/c.jpg: left out, JPEG and WebP cannot hold masks", "--data-root",
                  "images/train/a.png: in both splits, left out of training", "2 pixels' width",
                  "class road, class tree: only lines", "class sky: unseen, but has no validation",
                  "warning: class sea: seen, but has no training pixel"):
        assert words in printed
