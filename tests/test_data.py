"""data.py: the data sets, what training and testing see of them, and what is said of bad files."""

import sys
import zlib

import miniature
import numpy as np
import pytest
import torch
from conftest import run
from PIL import Image

import data
from tools import check_data, convert_context
from util.folder import NO_CLASS, split_images
from util.images import IGNORE, MEAN, STD, fit_size, normalise, read_image, read_mask

IMAGE, TURNED = Image.new("RGB", (60, 40)), Image.Exif()
TURNED[0x0112] = 3  # orientation: upside down
ONE_SENTENCE = ("a photo of a {}",)  # of VOC, without a full stop
FIFTEEN_SENTENCES = (
    "a photo of a {}.", "a photo of a small {}.", "a photo of a medium {}.",
    "a photo of a large {}.", "This is a photo of a {}.", "This is a photo of a small {}.",
    "This is a photo of a medium {}.", "This is a photo of a large {}.", "a {} in the scene.",
    "a photo of a {} in the scene.", "There is a {} in the scene.", "There is the {} in the scene.",
    "This is a {} in the scene.", "This is the {} in the scene.", "This is one {} in the scene.")
CONTEXT_59 = """aeroplane bag bed bedclothes bench bicycle bird boat book bottle building bus
    cabinet car cat ceiling chair cloth computer cow cup curtain dog door fence floor flower food
    grass ground horse keyboard light motorbike mountain mouse person plate platform pottedplant
    road rock sheep shelves sidewalk sign sky snow sofa table track train tree truck tvmonitor wall
    water window wood""".split()


def open_miniature(name, root, split="train"):
    kind = {"toy": "voc", "context59": "context", "coco-stuff": "coco"}.get(name, name)
    return data.open_dataset(name, getattr(miniature, kind)(root), split)


def stems(dataset):
    return [image.stem for image, _ in dataset.pairs]


def grey_samples(root, label, crop, **settings):
    """Samples of one image whose grey values are 30 times its classes: each tells its own label."""
    pair = root / "image.png", root / "mask.png"
    for path, values in zip(pair, (label * 30, label)):
        Image.fromarray(values.astype(np.uint8)).save(path)
    dataset = data.Dataset("grey", tuple("abcdefgh"), (2, 5), (), [pair], np.uint8(range(256)))
    return data.TrainSet(dataset, crop, seed=0, **settings)


def classes_shown(pixels):
    return (pixels[0] * STD[0] + MEAN[0]).numpy() / 30  # (crop, crop)


@pytest.mark.parametrize("name, label, number, unseen, templates", [
    ("voc", [255, 0, 19, 255, 16], 20, {15, 16, 17, 18, 19}, ONE_SENTENCE),
    ("toy", [255, 0, 19, 255, 16], 20, {2, 4, 8, 11, 19}, ONE_SENTENCE),
    ("context", [0, 1, 59], 60, {1, 7, 8, 15, 20, 25, 32, 34, 49, 55}, FIFTEEN_SENTENCES),
    ("context59", [255, 0, 58], 59, {0, 6, 7, 14, 19, 24, 31, 33, 48, 54}, FIFTEEN_SENTENCES),
    ("coco-stuff", [0, 12, 24, 36, 48], 171,
     {19, 23, 28, 29, 36, 51, 76, 88, 94, 112, 133, 136, 137, 157, 160}, FIFTEEN_SENTENCES),
    ("ade20k", [255, 0, 149], 150, set(), FIFTEEN_SENTENCES),
    ("folder", [0, 1, 2, 255], 3, {2}, FIFTEEN_SENTENCES)])
def test_labels_count_the_papers_classes(tmp_path, name, label, number, unseen, templates):
    dataset = open_miniature(name, tmp_path, "val")
    assert len(set(dataset.class_names)) == number and set(dataset.unseen) == unseen
    assert dataset.templates == templates
    image, target, index = data.TestSet(dataset, 80)[0]
    assert target[0, ::60 // len(label)].tolist() == label and target.shape == (40, 60)
    assert (image.shape, image.dtype, index) == ((3, 80, 120), torch.float32, 0)


def test_raw_and_converted_coco_maps_give_the_same_labels(tmp_path):
    roots = miniature.coco(tmp_path / "raw"), miniature.coco(tmp_path / "ids", converted=True)
    pairs = [data.read_pair(data.open_dataset("coco-stuff", root, "val"), 0) for root in roots]
    assert np.array_equal(pairs[0][1], pairs[1][1])
    assert np.unique(pairs[0][1]).tolist() == [*range(171), 255]


def test_of_raw_and_converted_coco_maps_side_by_side_the_kind_that_covers_more_is_read(tmp_path):
    for converted in (False, True):
        miniature.coco(tmp_path, converted)
    masks, label = tmp_path / "annotations/val2017", []
    for only in (None, "2.png", "2_labelTrainIds.png"):  # a second image that has only this map
        if only:
            miniature.picture(tmp_path / "images/val2017/2.jpg")
            for file in masks.glob("2*"):
                file.unlink()
            (masks / only).write_bytes((masks / f"1{only[1:]}").read_bytes())
        dataset = data.open_dataset("coco-stuff", tmp_path, "val")
        assert {mask.name[1:] for _, mask in dataset.pairs} == {(only or "1_labelTrainIds.png")[1:]}
        label.append(data.read_pair(dataset, 0)[1])
    assert np.array_equal(label[0], label[1]) and np.array_equal(label[0], label[2])


def test_contexts_matlab_files_are_reduced_to_59_classes_and_background(tmp_path, monkeypatch):
    assert data.DATASETS["context"]["class_names"] == ("background", *CONTEXT_59)
    names = ["thing", *CONTEXT_59[::-1]]  # numbers 1 to 60
    (tmp_path / "labels.txt").write_text("".join(f"{i}: {a}\n" for i, a in enumerate(names, 1)))
    # scipy.io.savemat: LabelMap = [[1, 2, 459, 2], [300, 3, 1, 60], [60, 1, 2, 400]], compressed
    (tmp_path / "a.mat").write_bytes(bytes(128) + bytes.fromhex(
        "0f00000042000000789ce36360600800623620e600626e06086085f2998198058819a17c9fc4a4d41cdfc402"
        "909804585c87d1868109a88e91e134232390c5c460c330811100b1aa05bd"))
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    for split in ("train", "val"):
        (tmp_path / f"ImageSets/Main/{split}.txt").write_text("a\nb\n")
    monkeypatch.setattr(sys, "argv", ["", tmp_path, tmp_path / "labels.txt", tmp_path])
    convert_context.main()
    assert read_mask(tmp_path / "SegmentationClassContext/a.png").tolist() == [
        [0, 59, 0, 59], [0, 58, 0, 1], [1, 0, 59, 0]]
    assert (tmp_path / "ImageSets/SegmentationContext/val.txt").read_text() == "a"


def test_voc_trains_on_added_images_with_their_masks_and_on_the_others_with_its_own(tmp_path):
    train, val = open_miniature("voc", tmp_path), data.open_dataset("voc", tmp_path, "val")
    assert stems(train) == ["a", "b", "extra"] and train.note == ""
    assert [mask.parent.name[17:] for _, mask in train.pairs + val.pairs] == ["", "", "Aug", ""]
    lists = tmp_path / "ImageSets" / "Segmentation"
    (lists / "aug.txt").rename(lists / "trainaug.txt")
    assert data.open_dataset("voc", tmp_path, "train").pairs == train.pairs
    for gone in (tmp_path / "SegmentationClassAug", lists / "trainaug.txt"):
        gone.rename(tmp_path / "gone")
        train = data.open_dataset("voc", tmp_path, "train")
        assert stems(train) == ["a", "b"] and "train.txt alone (2 images)" in train.note
        (tmp_path / "gone").rename(gone)


@pytest.mark.parametrize("name, file, held_out", [
    ("voc", "ImageSets/Segmentation/aug.txt", "v"), ("folder", "train.txt", "three v2"),
    ("context", "ImageSets/SegmentationContext/train.txt", "v")])
def test_validation_images_on_the_training_list_are_left_out(tmp_path, name, file, held_out):
    names = [stem for stem in stems(open_miniature(name, tmp_path)) if stem != held_out]
    (tmp_path / file).with_name("val.txt").write_text(held_out)
    (tmp_path / file).write_text("\n".join([*names, held_out]))
    dataset = data.open_dataset(name, tmp_path, "train")
    assert stems(dataset) == names and "1 validation images left out" in dataset.note
    (tmp_path / file).with_name("val.txt").write_text((tmp_path / file).read_text())
    dataset = data.open_dataset(name, tmp_path, "train")
    assert len(dataset.pairs) > len(names) and "are validation images too" in dataset.note


def test_your_own_data_is_split_by_lists_of_names_with_or_without_suffix(tmp_path):
    open_miniature("folder", tmp_path)
    (tmp_path / "val.txt").write_text("three v2\n")
    (tmp_path / "train.txt").write_text("two.PNG\none\none\n")  # with a suffix, as `ls` writes it
    train, val = (data.open_dataset("folder", tmp_path, split) for split in ("train", "val"))
    assert train.class_names == ("häuser", "road", "tree top")
    assert (stems(train), stems(val), train.note) == (["two", "one"], ["three v2"], "")


def test_without_lists_a_tenth_is_held_out_and_stays_so_when_images_are_added(tmp_path):
    names = [f"IMG_{i:04d}" for i in range(1000)]
    train, val = (split_images(names, split) for split in ("train", "val"))
    assert sorted(train + val) == names and 70 < len(val) < 130
    assert split_images(names[:500], "val") == [name for name in val if name < names[500]]
    for few in range(2, 10):
        train, val = (split_images(names[:few], split) for split in ("train", "val"))
        assert train and val and sorted(train + val) == names[:few]
    assert split_images(["a"], "train") == split_images(["a"], "val") == ["a"]
    folders = ["test/a", "train/a", "train/b", "val/c"]
    assert [split_images(folders, split) for split in ("train", "val")] == [folders[1:3], ["val/c"]]
    train, val = open_miniature("folder", tmp_path), data.open_dataset("folder", tmp_path, "val")
    assert len(train.pairs) == 2 and len(val.pairs) == 1 and "1 of 3 images, by name" in val.note


def test_masks_in_colours_and_sub_folders_with_a_suffix_that_all_share(tmp_path):
    miniature.street(tmp_path)
    (tmp_path / "train.txt").write_text("a\nseq/b.png"), (tmp_path / "val.txt").write_text("seq/c")
    dataset = data.open_dataset("folder", tmp_path, "train")
    assert dataset.class_names == ("road", "car", "walker") and dataset.unseen == (2,)
    assert data.read_pair(dataset, 1)[1][0, ::15].tolist() == [255, 0, 1, 2]
    assert data.seen_classes(dataset).shown[[255, 0, 1, 2]].tolist() == [255, 0, 1, 255]
    miniature.picture(tmp_path / "images/a_L.png"), (tmp_path / "masks/seq").rename(tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="no file for 'a', but .*a_L.png .2 of 2 "):
        data.open_dataset("folder", tmp_path, "train")


def test_class_list_says_what_each_value_becomes(tmp_path):
    miniature.folder(tmp_path)
    (tmp_path / "classes.txt").write_text("2 = *fence\n0 = road\n1=road # both\n11 = -\n255 = -")
    dataset = data.open_dataset("folder", tmp_path, "train")
    assert dataset.class_names == ("fence", "road") and dataset.unseen == (0,)
    assert dataset.mapping[[0, 1, 2, 3, 11, 255]].tolist() == [1, 1, 0, NO_CLASS, 255, 255]
    miniature.mask(dataset.pairs[0][1], [0, 3])
    with pytest.raises(ValueError, match="3 .50.00% of the pixels. is not in classes.txt"):
        data.TrainSet(data.seen_classes(dataset), 64, seed=0)[0, 0]  # inductive training, too


def test_other_unseen_classes_are_chosen_by_name(tmp_path):
    dataset = open_miniature("voc", tmp_path)
    assert [data.with_unseen(dataset, names).unseen for names in ("bus, cat", "")] == [(5, 7), ()]
    with pytest.raises(ValueError, match="'lion' is not a class of voc"):
        data.with_unseen(dataset, "cat, lion")


def test_pixels_of_unseen_classes_are_ignored_and_the_seen_classes_count_from_0(tmp_path):
    label = np.random.default_rng(0).integers(0, 8, (64, 64))
    samples = grey_samples(tmp_path, label, 64, scale=(1, 1), colours=False)
    samples.dataset = data.seen_classes(samples.dataset)
    assert samples.dataset.class_names == tuple("abdegh") and samples.dataset.unseen == ()
    pixels, target = samples[0, 0]
    label, target = classes_shown(pixels).round(), target.numpy()  # flipped alike
    was_unseen = np.isin(label, (2, 5))
    assert was_unseen.any() and (target[was_unseen] == 255).all()
    assert np.array_equal(np.array([0, 1, 3, 4, 6, 7])[target[~was_unseen]], label[~was_unseen])


def test_a_sample_is_the_image_or_its_mirror_in_other_colours_padded_at_its_end(tmp_path):
    label, flips, changes = np.random.default_rng(0).integers(0, 8, (32, 48)), 0, 0
    plain, coloured = (grey_samples(tmp_path, label, 64, scale=(0.5, 0.5), colours=colours)
                       for colours in (False, True))
    for epoch in range(20):
        pixels, target = plain[epoch, 0]
        flipped = not np.array_equal(target[:32, :48], label)
        wanted = label[:, ::-1] if flipped else label
        grey = normalise(np.stack([wanted * 30] * 3, -1).astype(np.uint8))
        assert np.array_equal(target, np.pad(wanted, ((0, 32), (0, 16)), constant_values=IGNORE))
        assert torch.equal(pixels, torch.nn.functional.pad(grey, (0, 16, 0, 32)))
        assert torch.equal(coloured[epoch, 0][1], target)
        flips, changes = flips + flipped, changes + (not torch.equal(coloured[epoch, 0][0], pixels))
    assert 4 < flips < 16 and 10 < changes < 20


def test_image_and_label_are_scaled_together_by_half_to_two_from_the_size_that_fits(tmp_path):
    assert [fit_size((width, 375), 2048, 512) for width in (500, 3000)] == [(683, 512), (2048, 256)]
    label, heights = np.random.default_rng(0).integers(0, 8, (4, 6)).repeat(20, 0).repeat(20, 1), []
    samples = grey_samples(tmp_path, label, 80, colours=False)
    for pixels, target in (samples[epoch, 0] for epoch in range(40)):
        error = np.abs(classes_shown(pixels) - target.numpy())[target != IGNORE]
        assert (error < 0.1).mean() > 0.75  # the rest are borders, where greys mix
        heights.append((target[:, 0] != IGNORE).sum().item())
    assert 40 <= min(heights) < 44 and max(heights) == 80


def test_a_test_image_has_the_short_side_asked_for_however_long_it_is():
    for size in ((500, 120), (120, 500), (100, 100)):
        assert min(data.test_image(Image.new("RGB", size), 512).shape[1:]) == 512
    assert data.test_image(Image.new("RGB", (500, 120)), 512).shape == (3, 512, 2133)


def test_crops_are_retried_until_no_class_covers_75_percent_of_the_labelled_pixels(tmp_path):
    label = np.zeros((100, 200))
    label[:, 90:110], label[:, ::2] = 1, 255
    samples = grey_samples(tmp_path, label, 100, scale=(2, 2))
    counts = [torch.bincount(samples[epoch, 0][1].flatten())[:255] for epoch in range(40)]
    assert sum(c.max().item() < 0.75 * c.sum().item() for c in counts) > 36  # one try: 12
    label = np.array([[0, 0, 0, 1, 1]]).repeat(4, 0)  # two crops: 75 % and 50 % of class 0
    samples = grey_samples(tmp_path, label, 4, scale=(1, 1))
    assert all((samples[epoch, 0][1] == 1).sum() == 8 for epoch in range(20))


def test_the_crop_rule_counts_unseen_pixels_which_are_hidden_after_it(tmp_path):
    label = np.full((100, 200), 2)  # class 2 is unseen; class 0 covers the left half
    label[:, :100] = 0
    samples = grey_samples(tmp_path, label, 100, scale=(2, 2))
    samples.dataset = data.seen_classes(samples.dataset)
    targets = [samples[epoch, 0][1] for epoch in range(40)]
    shares = [(target == 0).float().mean().item() for target in targets]
    assert all(set(target.unique().tolist()) <= {0, 255} for target in targets)
    assert sum(0.25 < share < 0.75 for share in shares) > 28  # one try: 7


def test_brightness_contrast_saturation_and_hue_change_half_the_time_within_their_ranges():
    def jittered(*colour):
        rng, image = np.random.default_rng(0), Image.new("RGB", (1, 1), colour)
        images = [data.jitter(image, rng) for _ in range(1500)]
        hsv = np.array([changed.convert("HSV").getpixel((0, 0)) for changed in images])
        return np.mean([changed == image for changed in images]), *hsv.T

    same, _, _, value = jittered(100, 100, 100)  # has no hue or saturation
    assert (100 - 32) * 0.5 <= value.min() < 40 and 185 < value.max() <= (100 + 32) * 1.5
    assert 0.22 < same < 0.3  # neither brightness nor contrast, or too little to see
    same, hue, saturation, _ = jittered(130, 70, 70)
    turn = ((hue + 128) % 256 - 128) * 180 / 256
    assert -20 < turn.min() < -15 and 15 < turn.max() < 20  # 8 bits of a dull red are no finer
    assert saturation.min() < 60 and saturation.max() > 170 and 0.05 < same < 0.08  # was 118


def test_a_sample_depends_on_seed_epoch_and_index_alone(tmp_path):
    dataset = open_miniature("voc", tmp_path)
    dataset.pairs[1] = dataset.pairs[0]  # one image twice
    keys = (7, 2, 1), (8, 2, 1), (7, 3, 1), (7, 2, 0), (7, 2, 1)
    first, *others, again = (data.TrainSet(dataset, 64, seed)[item][0] for seed, *item in keys)
    assert torch.equal(first, again) and not any(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("world, start", [(1, 9), (2, 0), (4, 9)])
def test_several_processes_and_resumed_runs_see_the_stream_of_one(world, start):
    one = list(data.GlobalBatches(7, 4, 20, seed=3))
    ranks = [data.GlobalBatches(7, 4, 20, 3, rank, world, start) for rank in range(world)]
    assert [sum(parts, []) for parts in zip(*ranks)] == one[start:] and len(ranks[0]) == 20 - start
    stream = sum(one, [])  # every epoch is a permutation, and another one
    epochs = [tuple(index for e, index in stream if e == epoch) for epoch in range(11)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len(set(epochs)) == 11


def write(file, text):
    return lambda root: (root / file).write_text(text)


@pytest.mark.parametrize("damage, words", [
    (lambda root: (root / "masks").rename(root / "labels"), "masks: no such folder"),
    (write("classes.txt", "cat\n\n cat"), "line 3: 'cat' again"),
    (write("classes.txt", "4 = cat\n4 = dog"), "line 2: '4' again"),
    (write("classes.txt", "4 = cat\ndog"), "line 2: give every line a value"),
    (write("classes.txt", "cat = 4"), "line 1: write `4 = fence`"),
    (write("classes.txt", "4 = cat\n1,2,300 = dog"), "line 2: write `4 = fence`"),
    (write("classes.txt", "0 = ?  # 3 %"), "line 1: no class name"),
    (write("classes.txt", "255 = border"), "255 means no class"),
    (lambda root: (root / "classes.txt").write_bytes(b"h\xe4user"), "classes.txt: not UTF-8"),
    (write("val.txt", "\n"), "val.txt: empty"),
    (write("val.txt", "ghost"), "no file for 'ghost', but"),
    (write("train.txt", "/v/train/one.png /v/trainannot/one.png"), "write the image alone"),
    (lambda root: (root / "masks/one.png").unlink(), "masks: no file for 'one', but"),
    (lambda root: [file.rename(file.with_suffix(".jpg")) for file in (root / "masks").iterdir()],
     "masks: no PNG masks; JPEG changes class numbers"),
    (lambda root: miniature.picture(root / "images/one.png"), "one.jpg has the same name"),
    (lambda root: (root / "images/one.jpg").write_bytes(b"\xff\xd8"), "one.jpg: cannot be read"),
    (lambda root: IMAGE.save(root / "images/one.jpg", exif=TURNED), "EXIF orientation turns"),
    (lambda root: IMAGE.save(root / "masks/one.png"), "index is the class number"),
    (lambda root: Image.new("I;16", (60, 40), 300).save(root / "masks/one.png"), "above 255"),
    (lambda root: miniature.mask(root / "masks/one.png", [0, 1, 2, 9]), "one.png: 9 (25.00% of"),
    (lambda root: miniature.mask(root / "masks/one.png", [0], (61, 40)), "its image has 60x40"),
    (lambda root: [miniature.mask(root / f"masks/{stem}.png", [0, 2]) for stem in ("one", "two")],
     "class road: seen, but has no training pixel")])
def test_check_data_says_each_thing_that_is_wrong_once(tmp_path, damage, words):
    root = miniature.folder(tmp_path)
    (root / "train.txt").write_text("one\ntwo"), (root / "val.txt").write_text("three v2")
    damage(root)
    (problem,) = check_data.by_kind(check_data.check("folder", root)[0])
    assert words in problem and "\n" not in problem


def checked(root, *flags):
    return run("--dataset=folder", "--data-root", root, *flags, program="tools/check_data.py")


def test_check_data_counts_pixels_and_warns_of_an_unseen_class_that_is_never_tested(tmp_path):
    result = checked(miniature.folder(tmp_path))
    assert "*tree top 2 1,200 1 600" in " ".join(result.stdout.split())
    assert result.stdout.endswith("nothing wrong\n") and result.returncode == 0
    for file in (tmp_path / "masks").iterdir():
        miniature.mask(file, [0, 1])
    result = checked(tmp_path)
    assert "warning: class tree top: unseen, but" in result.stdout and result.returncode == 0


def test_check_data_groups_problems_by_what_to_do_about_them(tmp_path):
    miniature.street(tmp_path)
    (tmp_path / "classes.txt").write_text("128,64,128 = road\n64,0,128 = car\n64,64,0 = walker")
    result = checked(tmp_path)
    assert "3 times: masks/a_L.png, masks/seq/" in result.stdout and result.returncode == 2
    assert result.stdout.count("0,0,0 (25.00% of the pixels)") == 1


def test_check_data_suggests_a_class_list_that_needs_only_names(tmp_path):
    suggested = checked(miniature.street(tmp_path), "--suggest").stdout
    assert suggested.count("25.00% of the pixels") == 4 and "64,0,128 = ?" in suggested
    (tmp_path / "classes.txt").write_text(suggested.replace("?", "a"))
    assert checked(tmp_path).returncode == 0
    assert "\n255 = -  " in checked(miniature.folder(tmp_path / "grey"), "--suggest").stdout


def test_data_py_draws_a_sheet_of_training_samples(tmp_path, monkeypatch):
    monkeypatch.chdir(miniature.folder(tmp_path))
    monkeypatch.setattr(sys, "argv", ["", "--dataset=folder", "--data-root=."])
    data.main()
    assert Image.open("samples.png").width > 1000


def test_images_are_normalised_as_imagenets_are_in_the_order_red_green_blue():
    red, green, blue = normalise(np.uint8([[[255, 0, 128]]])).flatten().tolist()
    assert red == pytest.approx((255 - 123.675) / 58.395)
    assert (green, blue) == pytest.approx(((0 - 116.28) / 57.12, (128 - 103.53) / 57.375))


def test_images_are_read_upright_on_white_and_in_8_bits(tmp_path):
    Image.fromarray(np.uint8([[0, 255]])).save(tmp_path / "a.png", exif=TURNED)
    Image.new("LA", (1, 1), (0, 0)).save(tmp_path / "b.png")
    assert {read_image(tmp_path / a).getpixel((0, 0)) for a in ("a.png", "b.png")} == {(255,) * 3}
    grey = np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27
    Image.fromarray(grey).save(tmp_path / "16.png")
    assert np.array_equal(np.array(read_image(tmp_path / "16.png"))[..., 1], grey >> 8)
    Image.fromarray(grey >> 4).save(tmp_path / "12.png")
    with pytest.raises(ValueError, match="12 bits"):
        read_image(tmp_path / "12.png")


def test_grey_masks_of_1_2_and_4_bits_keep_their_values(tmp_path):
    for bits in (1, 2, 4):
        image = Image.fromarray(np.arange(2 ** bits, dtype=np.uint8)[None])
        image.putpalette(bytes(768))
        image.save(tmp_path / "a.png", bits=bits)
        png = bytearray((tmp_path / "a.png").read_bytes())
        png[25] = 0  # in the header: grey, no longer palette
        png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
        (tmp_path / "a.png").write_bytes(png)
        assert read_mask(tmp_path / "a.png").tolist() == [[*range(2 ** bits)]]
