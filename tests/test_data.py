"""What data.py promises: the classes and splits of Sec. 4.1, the samples of Sec. 4.2, and a plain word on bad files."""

import dataclasses
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import draw


def picture(path: Path, size: tuple[int, int] = (60, 40), seed: int = 0) -> Path:
    """A smooth random picture, of whatever format the suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def mask(path: Path, values: np.ndarray | list[int], size: tuple[int, int] = (60, 40)) -> Path:
    """A palette PNG: an array as it is, a list of values as vertical stripes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(values, list):
        values = np.broadcast_to(np.array(values)[np.arange(size[0]) * len(values) // size[0]], size[::-1])
    image = Image.fromarray(np.ascontiguousarray(values, dtype=np.uint8))
    image.putpalette(draw.index_png_palette(20))
    image.save(path)
    return path


def listing(path: Path, stems: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(stem + "\n" for stem in stems))


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Two training pictures, one more in the augmented set, one to test on."""
    root = tmp_path / "VOC2012"
    for seed, stem in enumerate(("a", "b", "extra", "v")):
        picture(root / "JPEGImages" / f"{stem}.jpg", seed=seed)
    for stem in ("a", "b", "v"):
        mask(root / "SegmentationClass" / f"{stem}.png", [0, 1, 20, 255, 17])
    for stem in ("b", "extra", "v"):
        mask(root / "SegmentationClassAug" / f"{stem}.png", [0, 2])
    for name, stems in (("train", ["a", "b"]), ("val", ["v"]), ("aug", ["extra", "b"])):
        listing(root / "ImageSets" / "Segmentation" / f"{name}.txt", stems)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's own data: three classes, the last one unseen, pictures of three kinds."""
    root = tmp_path / "mine"
    for seed, file in enumerate(("one.jpg", "two.PNG", "three v2.webp")):
        picture(root / "images" / file, seed=seed)
        mask(root / "masks" / f"{Path(file).stem}.png", [0, 1, 2, 255])
    (root / "classes.txt").write_text("# my classes\n\nhäuser\nroad\n*tree top\n", "utf-8")
    return root


def context(root: Path) -> Path:
    picture(root / "JPEGImages" / "a.jpg")
    mask(root / "SegmentationClassContext" / "a.png", [0, 1, 59])
    for split in ("train", "val"):
        listing(root / "ImageSets" / "SegmentationContext" / f"{split}.txt", ["a"])
    return root


def coco(root: Path, converted: bool) -> Path:
    """One picture whose mask holds every class once, as published or as converted."""
    ids = [i for i in range(182) if i not in data.COCO_STUFF_UNUSED] + [255]
    values = np.array([*range(171), 255] if converted else ids)[np.arange(60 * 40) % 172].reshape(40, 60)
    for split in ("train2017", "val2017"):
        picture(root / "images" / split / "000000000001.jpg")
        mask(root / "annotations" / split / f"000000000001{'_labelTrainIds' * converted}.png", values)
    return root


# ------------------------------------------------------------------------------------------------------- Sec. 4.1


def counts(dataset: data.Dataset) -> tuple[int, int, int]:
    assert len(set(dataset.class_names)) == len(dataset.class_names)
    return len(dataset.class_names), len(dataset.class_names) - len(dataset.unseen), len(dataset.unseen)


def unseen_names(dataset: data.Dataset) -> set[str]:
    return {dataset.class_names[i] for i in dataset.unseen}


def test_voc_has_15_seen_and_5_unseen_classes(voc: Path):
    dataset = data.open_dataset("voc", voc, "train")
    assert counts(dataset) == (20, 15, 5)
    assert unseen_names(dataset) == {"pottedplant", "sheep", "sofa", "train", "tvmonitor"}
    assert dataset.templates == ("a photo of a {}",)


def test_context_has_50_seen_and_10_unseen_classes_and_context59_leaves_background_out(tmp_path: Path):
    root = context(tmp_path)
    whole, without = (data.open_dataset(name, root, "val") for name in ("context", "context59"))
    assert counts(whole) == (60, 50, 10) and counts(without) == (59, 49, 10)
    assert whole.class_names[0] == "background" and whole.class_names[1:] == without.class_names
    assert unseen_names(whole) == unseen_names(without) == {
        "cow", "motorbike", "sofa", "cat", "boat", "fence", "bird", "tvmonitor", "keyboard", "aeroplane"}
    stripes = [np.unique(data.read_pair(d, 0)[1]).tolist() for d in (whole, without)]
    assert stripes == [[0, 1, 59], [0, 58, 255]]


def test_coco_stuff_has_156_seen_and_15_unseen_classes_under_the_benchmarks_numbers(tmp_path: Path):
    dataset = data.open_dataset("coco-stuff", coco(tmp_path, converted=False), "train")
    assert counts(dataset) == (171, 156, 15)
    assert {i: dataset.class_names[i] for i in dataset.unseen} == {
        19: "cow", 23: "giraffe", 28: "suitcase", 29: "frisbee", 36: "skateboard", 51: "carrot", 76: "scissors",
        88: "cardboard", 94: "clouds", 112: "grass", 133: "playingfield", 136: "river", 137: "road", 157: "tree",
        160: "wall-concrete"}
    assert dataset.class_names[79:81] == ("toothbrush", "banner") and dataset.class_names[170] == "wood"


def test_every_template_has_one_place_for_the_name(tmp_path: Path):
    templates = data.open_dataset("context", context(tmp_path), "train").templates
    assert len(set(templates)) == 15
    assert all(template.format("NAME").count("NAME") == 1 for template in templates)


def test_raw_and_converted_coco_maps_give_the_same_labels(tmp_path: Path):
    raw, converted = (data.read_pair(data.open_dataset("coco-stuff", coco(tmp_path / str(kind), kind), "val"), 0)[1]
                      for kind in (False, True))
    assert np.array_equal(raw, converted)
    assert np.unique(raw).tolist() == [*range(171), 255]


def test_a_half_finished_coco_conversion_is_passed_over(tmp_path: Path):
    root = coco(tmp_path, converted=False)
    picture(root / "images" / "train2017" / "2.jpg")
    mask(root / "annotations" / "train2017" / "2.png", [181])
    mask(root / "annotations" / "train2017" / "2_labelTrainIds.png", [170])
    dataset = data.open_dataset("coco-stuff", root, "train")
    assert [path.name for _, path in dataset.pairs] == ["000000000001.png", "2.png"]
    assert np.unique(data.read_pair(dataset, 1)[1]).tolist() == [170]


def test_an_unused_number_in_a_raw_coco_map_is_refused(tmp_path: Path):
    root = coco(tmp_path, converted=False)
    path = mask(root / "annotations" / "val2017" / "000000000001.png", [0, 25])
    with pytest.raises(ValueError, match=f"{path.name}: value 25 "):
        data.read_pair(data.open_dataset("coco-stuff", root, "val"), 0)


def test_voc_trains_on_train_and_augmented_pictures_each_once(voc: Path):
    dataset = data.open_dataset("voc", voc, "train")
    assert [image.stem for image, _ in dataset.pairs] == ["a", "b", "extra"] and dataset.note == ""
    assert [path.parent.name for _, path in dataset.pairs] == [
        "SegmentationClass", "SegmentationClassAug", "SegmentationClassAug"]
    lists = voc / "ImageSets" / "Segmentation"
    (lists / "aug.txt").rename(lists / "trainaug.txt")
    assert data.open_dataset("voc", voc, "train").pairs == dataset.pairs


def test_voc_is_tested_with_the_published_masks(voc: Path):
    assert [path.parent.name for _, path in data.open_dataset("voc", voc, "val").pairs] == ["SegmentationClass"]


@pytest.mark.parametrize("gone", ["ImageSets/Segmentation/aug.txt", "SegmentationClassAug"])
def test_voc_without_its_augmented_part_trains_on_train_alone_and_says_so(voc: Path, gone: str):
    (voc / gone).rename(voc / "elsewhere")
    dataset = data.open_dataset("voc", voc, "train")
    assert [image.stem for image, _ in dataset.pairs] == ["a", "b"]
    assert "train.txt alone (2 images)" in dataset.note


def test_voc_ignores_background_and_counts_from_the_first_object(voc: Path):
    _, label = data.read_pair(data.open_dataset("voc", voc, "val"), 0)
    assert label[0, ::12].tolist() == [255, 0, 19, 255, 16]


def test_toy_has_vocs_layout_and_its_own_names(voc: Path):
    (voc / "classes.txt").write_text("red disc\n*blue disc\n" + "".join(f"shape {i}\n" for i in range(18)))
    dataset = data.open_dataset("toy", voc, "train")
    assert (dataset.class_names[:2], dataset.unseen, dataset.note) == (("red disc", "blue disc"), (1,), "")
    assert np.unique(data.read_pair(dataset, 0)[1]).tolist() == [0, 16, 19, 255]


def test_a_folder_of_ones_own_is_whole_in_both_splits_unless_lists_say_otherwise(folder: Path):
    train, val = (data.open_dataset("folder", folder, split) for split in ("train", "val"))
    assert train.class_names == ("häuser", "road", "tree top") and train.unseen == (2,)
    assert train.pairs == val.pairs and len(train.pairs) == 3 and "every image is in both" in train.note
    listing(folder / "train.txt", ["two", "one"])
    listing(folder / "val.txt", ["three v2"])
    train, val = (data.open_dataset("folder", folder, split) for split in ("train", "val"))
    assert [image.name for image, _ in train.pairs + val.pairs] == ["two.PNG", "one.jpg", "three v2.webp"]
    assert train.note == ""


# ------------------------------------------------------------------------------------------------ Sec. 4.2 and 4.3


def test_resizing_only_the_crop_equals_resizing_all_and_cropping(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The literal order of the benchmark, with the same random numbers, against the fast one."""
    monkeypatch.setattr(data, "jitter", lambda image, rng: image)
    image = data.read_image(picture(tmp_path / "a.png", (151, 101)))  # primes: few ties between two pixels
    label = np.random.default_rng(1).integers(0, 7, (11, 16), dtype=np.uint8).repeat(10, 0).repeat(10, 1)[:101, :151]
    enlarged = 0
    for seed in range(20):
        pixels, target = data.augment(image, label, 96, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        factor = rng.uniform(0.5, 2)
        scale = min(int(4 * 96 * factor) / 151, int(96 * factor) / 101)
        size = int(151 * scale + 0.5), int(101 * scale + 0.5)
        enlarged += scale > 1
        w, h = min(size[0], 96), min(size[1], 96)
        x, y = rng.integers(size[0] - w + 1), rng.integers(size[1] - h + 1)  # seven classes: never a second try
        flip = -1 if rng.random() < 0.5 else 1
        whole = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
        wanted = data.normalise(np.ascontiguousarray(whole[y:y + h, x:x + w][:, ::flip]))
        assert (pixels[:, :h, :w] - wanted).abs().max() < 2.5 / min(data.STD)  # 8-bit rounding of the two passes
        whole = np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))
        assert (target[:h, :w].numpy() != whole[y:y + h, x:x + w][:, ::flip]).mean() < 0.01
        assert (pixels[:, h:] == 0).all() and (pixels[:, :, w:] == 0).all()
        assert (target[h:] == 255).all() and (target[:, w:] == 255).all()
    assert 0 < enlarged < 20


def test_label_and_picture_stay_together_through_scale_crop_and_flip(monkeypatch: pytest.MonkeyPatch):
    """The picture's grey values are its labels, so a sample must spell its own label."""
    monkeypatch.setattr(data, "jitter", lambda image, rng: image)
    label = np.random.default_rng(0).integers(0, 8, (6, 9), dtype=np.uint8).repeat(20, 0).repeat(20, 1)
    image = Image.fromarray(label * 30).convert("RGB")
    for seed in range(20):
        pixels, target = data.augment(image, label, 128, np.random.default_rng(seed))
        grey = pixels * torch.tensor(data.STD)[:, None, None] + torch.tensor(data.MEAN)[:, None, None]
        valid = target != data.IGNORE
        agree = ((grey[0] / 30 - target).abs() < 0.1)[valid]
        assert agree.float().mean() > 0.75, f"seed {seed}"  # the rest lies on the borders, where colours mix


def test_scales_lie_between_half_and_twice_the_fitting_size():
    assert data.fit_size((500, 375), 2048, 512) == (683, 512)
    assert data.fit_size((375, 500), 2048, 512) == (512, 683)
    assert data.fit_size((3000, 100), 2048, 512) == (2048, 68)  # so long that the long side decides
    label = np.zeros((375, 500), np.uint8)
    label[:, ::2] = 1
    filled = []
    for seed in range(30):
        _, target = data.augment(Image.new("RGB", (500, 375)), label, 64, np.random.default_rng(seed))
        filled.append(int((target[:, 0] != 255).sum()))
    assert 32 <= min(filled) < 40 and max(filled) == 64


def test_crops_of_one_class_are_tried_again():
    """A tenth of the width is class 1: at twice the size, a blind crop rarely holds a quarter of it."""
    label = np.zeros((100, 200), np.uint8)
    label[:, 90:110] = 1
    image = Image.new("RGB", (200, 100))
    mixed = [np.bincount(target[target != 255]).max() <= 0.75 * (target != 255).sum().item() for target in
             (data.augment(image, label, 100, np.random.default_rng(seed))[1] for seed in range(60))]
    large = [np.random.default_rng(seed).uniform(0.5, 2) > 1.7 for seed in range(60)]
    kept = np.mean([m for m, is_large in zip(mixed, large) if is_large])
    assert kept > 0.9  # blind crops manage 0.15


def test_jitter_stays_within_its_ranges_and_does_nothing_a_sixteenth_of_the_time():
    grey = Image.new("RGB", (1, 1), (100, 100, 100))  # has no hue or saturation to change
    values = [data.jitter(grey, np.random.default_rng(seed)).getpixel((0, 0))[0] for seed in range(400)]
    assert (100 - 32) * 0.5 <= min(values) < 45 and 170 < max(values) <= (100 + 32) * 1.5 + 1
    assert 0.17 < np.mean(np.array(values) == 100) < 0.36  # neither brightness nor contrast: a quarter
    colour = Image.new("RGB", (1, 1), (200, 60, 60))
    same = np.mean([data.jitter(colour, np.random.default_rng(seed)) == colour for seed in range(800)])
    assert 0.04 < same < 0.09  # 1/16


def test_hue_turns_by_no_more_than_18_of_180():
    red = Image.new("RGB", (1, 1), (130, 70, 70))  # so dull that no other change clips it, which would turn it further
    hues = [data.jitter(red, np.random.default_rng(seed)).convert("HSV").getpixel((0, 0))[0] for seed in range(300)]
    turns = [((hue + 128) % 256 - 128) * 180 / 256 for hue in hues]
    assert -20 < min(turns) < -15 and 15 < max(turns) < 20  # 8 bits of a dull colour resolve no finer


def test_a_sample_depends_on_seed_epoch_and_index_alone(voc: Path):
    dataset = data.open_dataset("voc", voc, "train")
    dataset = dataclasses.replace(dataset, pairs=dataset.pairs[:1] * 2)  # one picture twice: only the draw can differ

    def fingerprint(seed: int, epoch: int, index: int) -> str:
        pixels, target = data.TrainSet(dataset, 64, seed)[epoch, index]
        assert (pixels.dtype, target.dtype) == (torch.float32, torch.int64)
        assert (pixels.shape, target.shape) == ((3, 64, 64), (64, 64))
        return hashlib.sha256(pixels.numpy().tobytes() + target.numpy().tobytes()).hexdigest()

    first = fingerprint(7, 2, 1)
    np.random.seed(99), torch.manual_seed(99)
    fingerprint(7, 0, 0)
    assert fingerprint(7, 2, 1) == first
    assert len({first, fingerprint(8, 2, 1), fingerprint(7, 3, 1), fingerprint(7, 2, 0)}) == 4


def test_workers_deliver_what_one_process_does(voc: Path):
    samples = data.TrainSet(data.open_dataset("voc", voc, "train"), 32, 0)
    one, two = (list(torch.utils.data.DataLoader(samples, num_workers=workers,
                                                 batch_sampler=data.GlobalBatches(3, 2, 3, 0))) for workers in (0, 2))
    assert len(one) == 3
    assert all(torch.equal(a, b) for first, second in zip(one, two) for a, b in zip(first, second))


def test_unseen_labels_never_reach_an_inductive_run(voc: Path):
    """Stripes of background, aeroplane 0, tvmonitor 19 (unseen), ignored, sheep 16 (unseen)."""
    dataset = data.open_dataset("voc", voc, "val")
    everything, seen = (data.TrainSet(d, 64, 0) for d in (dataset, data.seen_classes(dataset)))
    assert len(seen.dataset.class_names) == 15 and not set(seen.dataset.class_names) & unseen_names(dataset)
    found = {name: set().union(*(samples[epoch, 0][1].unique().tolist() for epoch in range(8)))
             for name, samples in (("all", everything), ("seen", seen))}
    assert found == {"all": {0, 16, 19, 255}, "seen": {0, 255}}


def test_seen_labels_count_the_rows_of_the_seen_names(tmp_path: Path):
    root = context(tmp_path)
    mask(root / "SegmentationClassContext" / "a.png", [0, 3, 58])  # background, bed, window
    samples = data.TrainSet(data.seen_classes(data.open_dataset("context", root, "train")), 64, 0)
    rows = set().union(*(samples[epoch, 0][1].unique().tolist() for epoch in range(8))) - {255}
    assert {samples.dataset.class_names[row] for row in rows} == {"background", "bed", "window"}


def test_several_ranks_together_see_what_one_would():
    one = list(data.GlobalBatches(10, 4, 13, seed=3))
    for world in (2, 4):
        ranks = [list(data.GlobalBatches(10, 4, 13, 3, rank, world)) for rank in range(world)]
        assert [sum(parts, []) for parts in zip(*ranks)] == one


def test_a_resumed_run_sees_the_batches_it_would_have_seen():
    whole = list(data.GlobalBatches(7, 4, 20, seed=0))
    for start in (1, 9, 20):
        resumed = data.GlobalBatches(7, 4, 20, seed=0, start=start)
        assert list(resumed) == whole[start:] and len(resumed) == 20 - start


def test_every_epoch_is_a_permutation_and_no_two_are_alike():
    stream = sum(data.GlobalBatches(10, 4, 10, seed=0), [])  # 40 places: four epochs, with batches across their ends
    epochs = [[index for epoch, index in stream if epoch == e] for e in range(4)]
    assert [epoch for epoch, _ in stream] == sorted(epoch for epoch, _ in stream)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_batch_may_be_larger_than_the_data_set():
    assert [len(batch) for batch in data.GlobalBatches(3, 8, 2, seed=0)] == [8, 8]


def test_a_batch_that_the_processes_cannot_share_is_refused():
    with pytest.raises(ValueError, match="batch of 16 .* 3 processes"):
        data.GlobalBatches(100, 16, 10, 0, rank=0, world=3)


def test_a_test_sample_is_scaled_and_its_label_is_not(voc: Path):
    pixels, label, index = data.TestSet(data.open_dataset("voc", voc, "val"), 80)[0]
    assert pixels.shape == (3, 80, 120) and pixels.dtype == torch.float32
    assert label.shape == (40, 60) and label.dtype == torch.uint8 and index == 0


def test_normalise_is_the_benchmarks_mean_and_deviation_in_rgb_order():
    image = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    wanted = (image - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    assert np.abs(data.normalise(image).permute(1, 2, 0).numpy() - wanted).max() < 1e-5


def test_a_photo_taken_with_a_turned_camera_is_read_upright(tmp_path: Path):
    image = Image.new("RGB", (30, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees to view
    image.save(tmp_path / "a.jpg", exif=exif)
    assert data.read_image(tmp_path / "a.jpg").size == (20, 30)


# -------------------------------------------------------------------------------------------------------- bad input


def refusal(error: type[Exception], *args) -> str:
    """The message of open_dataset, or of reading every pair; it must be one line."""
    with pytest.raises(error) as caught:
        dataset = data.open_dataset(*args)
        for index in range(len(dataset.pairs)):
            data.read_pair(dataset, index)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("gone", ["JPEGImages", "SegmentationClass", "ImageSets/Segmentation/train.txt"])
def test_a_missing_folder_or_list_is_named(voc: Path, gone: str):
    (voc / gone).rename(voc / "elsewhere")
    assert str(voc / gone) in refusal(FileNotFoundError, "voc", voc, "train")


def test_a_missing_root_is_named(tmp_path: Path):
    assert "nowhere" in refusal(FileNotFoundError, "coco-stuff", tmp_path / "nowhere", "train")


def test_an_empty_list_is_named(voc: Path):
    (voc / "ImageSets/Segmentation/val.txt").write_text("\n \n")
    assert "val.txt" in refusal(ValueError, "voc", voc, "val")


def test_a_folder_without_pictures_is_named(folder: Path):
    for file in (folder / "images").iterdir():
        file.unlink()
    assert str(folder) in refusal(ValueError, "folder", folder, "train")


@pytest.mark.parametrize("gone", ["SegmentationClass/a.png", "JPEGImages/a.jpg"])
def test_a_listed_picture_without_file_or_mask_is_named(voc: Path, gone: str):
    (voc / gone).unlink()
    message = refusal(FileNotFoundError, "voc", voc, "train")
    assert ("a.jpg: no mask" if gone.endswith("png") else "no image a,") in message


def test_sizes_that_differ_are_both_given(voc: Path):
    path = mask(voc / "SegmentationClass/v.png", [0, 1], size=(61, 40))
    message = refusal(ValueError, "voc", voc, "val")
    assert str(path) in message and "61x40" in message and "60x40" in message


def test_label_21_is_refused_in_voc(voc: Path):
    path = mask(voc / "SegmentationClass/v.png", [0, 21])
    assert f"{path}: value 21 " in refusal(ValueError, "voc", voc, "val")
    with pytest.raises(ValueError, match="value 21 "):  # not mistaken for an unseen class either
        data.read_pair(data.seen_classes(data.open_dataset("voc", voc, "val")), 0)


def test_masks_are_palette_grey_or_16_bit_pictures_of_small_numbers(folder: Path):
    stripes = np.arange(60) // 20 + np.zeros((40, 1), int)
    path = folder / "masks" / "one.png"
    for image in (Image.fromarray(stripes.astype(np.uint8)), Image.fromarray(stripes.astype(np.uint16))):
        image.save(path)
        assert np.array_equal(data.read_label(path, data.open_dataset("folder", folder, "val").mapping), stripes)
    Image.fromarray((stripes + 300).astype(np.uint16)).save(path)
    assert "one.png: value 302" in refusal(ValueError, "folder", folder, "val")
    Image.fromarray(stripes.astype(np.uint8)).convert("RGB").save(path)
    assert "one.png: mode RGB" in refusal(ValueError, "folder", folder, "val")


@pytest.mark.parametrize("damage", [lambda raw: raw[:len(raw) // 2], lambda raw: b"", lambda raw: b"not a picture"])
@pytest.mark.parametrize("file", ["JPEGImages/v.jpg", "SegmentationClass/v.png"])
def test_a_damaged_file_is_named(voc: Path, file: str, damage):
    (voc / file).write_bytes(damage((voc / file).read_bytes()))
    assert str(voc / file) in refusal(ValueError, "voc", voc, "val")


@pytest.mark.parametrize("content, line", [
    (b"cat\n\ndog\n cat\n", 4), (b"cat\n*\n", 2), ("cat\nhäuser\n".encode("latin-1"), 2), (b"# nothing\n", 1), (b"", 1),
    (b"\n".join(b"class %d" % i for i in range(255)), 255)])
def test_a_bad_class_list_is_refused_with_its_line(folder: Path, content: bytes, line: int):
    (folder / "classes.txt").write_bytes(content)
    assert f"classes.txt, line {line}:" in refusal(ValueError, "folder", folder, "train")


def test_two_pictures_of_one_name_are_refused(folder: Path):
    picture(folder / "images" / "one.png")
    message = refusal(ValueError, "folder", folder, "train")
    assert "one.png" in message and "one.jpg" in message


def test_an_inductive_run_needs_a_seen_class(folder: Path):
    (folder / "classes.txt").write_text("*a\n*b\n*c\n")
    with pytest.raises(ValueError, match="every class is unseen"):
        data.seen_classes(data.open_dataset("folder", folder, "train"))


# -------------------------------------------------------------------------------------------------- the command line


def run(*flags: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, data.__file__, *map(str, flags)], capture_output=True, text=True)


def test_the_command_line_says_in_one_line_what_is_wrong(tmp_path: Path):
    done = run("--dataset", "voc", "--data-root", tmp_path / "nowhere", "--out", tmp_path / "sheet.png")
    assert done.returncode == 2 and not (tmp_path / "sheet.png").exists()
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "nowhere" in done.stderr


def test_the_command_line_draws_a_sheet(folder: Path):
    done = run("--dataset", "folder", "--data-root", folder, "--out", folder / "sheet.png", "--crop-size", 64)
    assert done.returncode == 0, done.stderr
    assert Image.open(folder / "sheet.png").width > 1000
    assert [path.name for path in folder.iterdir() if "sheet" in path.name] == ["sheet.png"]


def test_check_passes_a_clean_folder_and_counts_its_pixels(folder: Path, capsys: pytest.CaptureFixture):
    assert data.check("folder", folder) == []
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("*tree top"))
    assert row.split()[2:] == ["3", "1,800", "3", "1,800"]  # a quarter of 60x40, in three pictures


def test_check_lists_every_problem_and_exits_with_2(folder: Path):
    listing(folder / "train.txt", ["one", "ghost"])
    listing(folder / "val.txt", ["two", "three v2"])
    (folder / "images" / "one.jpg").write_bytes(b"")
    (folder / "masks" / "two.png").unlink()
    mask(folder / "masks" / "three v2.png", [0, 9])
    done = run("--dataset", "folder", "--data-root", folder, "--check")
    assert done.returncode == 2 and done.stderr == ""
    problems = done.stdout.split("(ignored)")[1].splitlines()[1:]
    assert len(problems) == 4
    for fragment in ("no image ghost", "one.jpg: cannot be read", "two.PNG: no mask", "three v2.png: value 9 "):
        assert sum(fragment in problem for problem in problems) == 1, fragment


# ---------------------------------------------------------------------------------------------------------- draw.py


def test_classes_keep_their_colours_whatever_their_number():
    colours = draw.palette(255)
    assert np.array_equal(draw.palette(20), colours[:20])
    assert len({tuple(colour) for colour in colours}) == 255
    assert draw.index_png_palette(20)[255 * 3:] == [255, 255, 255]


def test_an_overlay_leaves_unlabelled_pixels_alone():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    label = np.full((20, 30), 255, np.uint8)
    label[5:10, 5:25] = 3
    drawn = np.asarray(draw.overlay(image, label, draw.palette(4), 1.0))
    assert np.array_equal(drawn[label == 255], image[label == 255])
    assert (drawn[7, 15] == draw.palette(4)[3]).all()


def test_legends_and_charts_take_any_name_and_any_number():
    names = ["ordinary", "猫 🐱", "x" * 500, "", "two\nlines"]
    assert draw.legend(names, draw.palette(5), {1}, 300).width == 300
    assert draw.legend([], draw.palette(0), set(), 300).width == 300
    for log_y in (False, True):
        series = {"a": [(0, 1.0), (1, float("nan")), (2, 0.0), (3, -1.0)], "b": [], "flat": [(0, 5.0), (9, 5.0)]}
        assert draw.line_chart(series, "title", (200, 150), log_y).size == (200, 150)


def test_a_figure_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path):
    (tmp_path / "a.png").write_text("old")
    with pytest.raises(ValueError, match="a.xyz"):
        draw.save(Image.new("RGB", (2, 2)), tmp_path / "a.xyz")
    with pytest.raises(OSError):  # a mode that PNG does not have
        draw.save(Image.new("F", (2, 2)), tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"] and (tmp_path / "a.png").read_text() == "old"
