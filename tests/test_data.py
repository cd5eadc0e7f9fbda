"""Sec. 4.1 and 4.2: the data sets, what training and testing see, and what is said of bad files."""

import base64

import miniature
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run
from PIL import Image

import data
from util.images import IGNORE, MEAN, STD, jitter, normalise

IMAGE, TURNED = Image.new("RGB", (60, 40)), Image.Exif()
TURNED[0x0112] = 3  # orientation: upside down
GREY_2 = base64.b64decode(  # one pixel of 2 bits, which Pillow reads and does not write
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABAgAAAABwzoP0AAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
ONE, FIFTEEN = (1, "a photo of a {}"), (15, "a photo of a {}.")  # sentences, and the first


def grey_samples(root, label, crop, scale=(1, 1), colours=False):
    """Samples of one image whose grey values are 30 times its classes. 2 and 5 are unseen."""
    pair = root / "image.png", root / "mask.png"
    for path, values in zip(pair, (label * 30, label)):
        Image.fromarray(values.astype(np.uint8)).save(path)
    dataset = data.Dataset("grey", tuple("abcdefgh"), (2, 5), (), [pair], np.uint8(range(256)))
    return data.TrainSet(dataset, crop, 0, scale, colours)


@pytest.mark.parametrize("name, label, number, unseen, templates", [
    ("voc", [255, 0, 19, 255, 16], 20, [15, 16, 17, 18, 19], ONE),
    ("toy", [255, 0, 19, 255, 16], 20, [2, 4, 8, 11, 19], ONE),
    ("context", [0, 1, 59], 60, [1, 7, 8, 15, 20, 25, 32, 34, 49, 55], FIFTEEN),
    ("context59", [255, 0, 58], 59, [0, 6, 7, 14, 19, 24, 31, 33, 48, 54], FIFTEEN),
    ("coco-stuff", [0, 12, 24, 36, 48], 171,
     [19, 23, 28, 29, 36, 51, 76, 88, 94, 112, 133, 136, 137, 157, 160], FIFTEEN),
    ("folder", [0, 1, 2, 255], 3, [2], FIFTEEN)])
def test_labels_count_the_papers_classes(tmp_path, name, label, number, unseen, templates):
    kind = {"toy": "voc", "context59": "context", "coco-stuff": "coco"}.get(name, name)
    dataset = data.open_dataset(name, getattr(miniature, kind)(tmp_path), "val")
    assert len(set(dataset.class_names)) == number and sorted(dataset.unseen) == unseen
    named = dataset.class_names[{"toy": 20, "context": 1, "coco-stuff": 80}.get(name, 0):]
    assert [*named] == sorted(named) and (  # the alphabet, from there
        len({*dataset.templates}), dataset.templates[0]) == templates
    image, target, index = data.test_sample(dataset, 80, 0)
    assert target[0, ::60 // len(label)].tolist() == label and target.shape == (40, 60)
    assert (image.shape, image.dtype, index) == ((3, 80, 120), torch.float32, 0)


def test_of_raw_and_converted_coco_maps_the_kind_that_covers_more_is_read(tmp_path):
    masks, labels = tmp_path / "annotations/val2017", []
    miniature.picture(tmp_path / "images/val2017/2.jpg")
    for kind in (".png", "_labelTrainIds.png"):
        miniature.coco(tmp_path, converted=kind != ".png")
        (masks / "2.png").unlink(missing_ok=True)
        (masks / f"2{kind}").write_bytes((masks / f"1{kind}").read_bytes())
        dataset = data.open_dataset("coco-stuff", tmp_path, "val")
        assert {mask.name[1:] for _, mask in dataset.pairs} == {kind}
        labels.append(data.read_pair(dataset, 0)[1])
    assert np.array_equal(*labels) and np.unique(labels).tolist() == [*range(171), 255]


def test_voc_trains_on_added_images_with_their_masks_and_not_on_validation_images(tmp_path):
    def opened(name="", *listed):
        if name:
            (tmp_path / f"ImageSets/Segmentation/{name}.txt").write_text("\n".join(listed))
        train = data.open_dataset("voc", tmp_path, "train")
        return [mask.parent.name[17:] + image.stem for image, mask in train.pairs], train.note
    miniature.voc(tmp_path)
    assert opened() == (["a", "b", "Augextra"], "")  # its mask is in SegmentationClassAug
    pairs, note = opened("aug", "extra", "v")
    assert pairs == ["a", "b", "Augextra"] and "1 images of val.txt left out" in note
    pairs, note = opened("val", "a", "b", "extra", "v")  # then nothing else would be left
    assert pairs == ["a", "b", "Augextra", "Augv"] and "val.txt trained on" in note
    (tmp_path / "SegmentationClassAug").rename(tmp_path / "gone")
    assert "no augmented set, so train.txt's 2 images" in opened("val", "v")[1]


def test_your_own_data_is_found_by_its_lists_and_other_unseen_classes_by_name(tmp_path):
    miniature.folder(tmp_path)
    train, val = (data.open_dataset("folder", tmp_path, split) for split in ("train", "val"))
    assert train.class_names == ("häuser", "road", "tree top") and train.unseen == (2,)
    images = [image.stem for image, _ in train.pairs + val.pairs]
    assert images == ["two", "one", "three v2"] and (len(val.pairs), train.note) == (1, "")
    for unseen, numbers in (("tree top, häuser", (2, 0)), ("", ())):
        assert data.open_dataset("folder", tmp_path, "val", unseen).unseen == numbers
    with pytest.raises(ValueError, match="--unseen: 'lion' is no class of häuser, road"):
        data.open_dataset("folder", tmp_path, "val", "road, lion")


def test_a_sample_is_the_image_or_its_mirror_padded_and_unseen_classes_are_ignored(tmp_path):
    label, flips, changes = np.random.default_rng(0).integers(0, 8, (32, 48)), 0, 0
    plain, coloured = (grey_samples(tmp_path, label, 64, (0.5, 0.5), c) for c in (False, True))
    plain.dataset = coloured.dataset = data.seen_classes(plain.dataset)
    assert plain.dataset.class_names == tuple("abdegh") and plain.dataset.unseen == ()
    numbers = np.array([0, 1, 255, 2, 3, 255, 4, 5])  # the seen classes count from 0
    for epoch in range(20):
        (pixels, target), (other, same) = plain[epoch, 0], coloured[epoch, 0]
        wanted = label if np.array_equal(target[:32, :48], numbers[label]) else label[:, ::-1]
        grey = normalise(np.stack([wanted * 30] * 3, -1).astype(np.uint8))
        assert np.array_equal(target, np.pad(numbers[wanted], ((0, 32), (0, 16)),
                                             constant_values=IGNORE))
        assert torch.equal(pixels, F.pad(grey, (0, 16, 0, 32))) and torch.equal(same, target)
        flips, changes = flips + (wanted is not label), changes + (not torch.equal(other, pixels))
    assert 4 < flips < 16 and 10 < changes < 20


@pytest.mark.parametrize("width, least", [(120, 40), (640, 20)])
def test_training_images_fit_4_to_1_and_test_images_have_the_short_side(tmp_path, width, least):
    label = np.random.default_rng(0).integers(0, 8, (2, width // 40)).repeat(40, 0).repeat(40, 1)
    samples, heights = grey_samples(tmp_path, label, 80, (0.5, 2)), []
    for pixels, target in (samples[epoch, 0] for epoch in range(40)):
        error = ((pixels[0] * STD[0] + MEAN[0]) / 30 - target)[target != IGNORE].abs()
        assert error.median() < 0.1  # at borders greys mix
        heights.append((target[:, 0] != IGNORE).sum().item())
    assert least <= min(heights) < 1.2 * least and 72 < max(heights) <= 80
    image = data.test_image(Image.new("RGB", (width, 80), (255, 0, 128)), 512)
    assert image.shape == (3, 512, 512 * width // 80) and image[:, 0, 0].tolist() == pytest.approx(
        [(255 - 123.675) / 58.395, (0 - 116.28) / 57.12, (128 - 103.53) / 57.375])


def test_crops_are_retried_until_no_class_covers_75_percent_of_the_labelled_pixels(tmp_path):
    label = np.array([[0, 0, 0, 1, 1]]).repeat(4, 0)  # two crops: 75 % and 50 % of class 0
    samples = grey_samples(tmp_path, label, 4)
    assert all((samples[epoch, 0][1] == 1).sum() == 8 for epoch in range(20))
    label = np.array([[0, 2]]).repeat(100, 0).repeat(100, 1)  # 2 is unseen, and counts all the same
    label[:, ::2] = 255
    samples = grey_samples(tmp_path, label, 100, (2, 2))
    samples.dataset = data.seen_classes(samples.dataset)
    shares = [2 * (samples[epoch, 0][1] == 0).float().mean().item() for epoch in range(40)]
    assert sum(0.25 < share < 0.75 for share in shares) > 28  # one try: 7


def test_brightness_contrast_saturation_and_hue_change_within_their_ranges():
    rng, pixels = np.random.default_rng(0), np.uint8([[(100, 100, 100), (130, 70, 70)]])
    images = [jitter(Image.fromarray(pixels), rng) for _ in range(600)]
    (*_, grey), red = np.array([i.convert("HSV") for i in images])[:, 0].transpose(1, 2, 0)
    assert (100 - 32) * 0.5 <= grey.min() < 40 and 180 < grey.max() <= (100 + 32) * 1.5
    turn = ((red[0].astype(int) + 128) % 256 - 128) * 180 / 256
    assert -20 < turn.min() < -15 and 15 < turn.max() < 20  # 8 bits of a dull red are no finer
    assert red[1].min() < 60 and red[1].max() > 170  # its saturation was 118


def test_several_processes_and_resumed_runs_see_the_stream_of_one_and_its_samples(tmp_path):
    one = list(data.GlobalBatches(7, 4, 20, seed=3))
    for world, start in ((1, 9), (4, 9)):
        ranks = [data.GlobalBatches(7, 4, 20, 3, rank, world, start) for rank in range(world)]
        assert [sum(parts, []) for parts in zip(*ranks)] == one[start:] and len(ranks[0]) == 11
    epochs = [tuple(index for e, index in sum(one, []) if e == epoch) for epoch in range(11)]
    assert all(sorted(epoch) == [*range(7)] for epoch in epochs) and len({*epochs}) == 11
    dataset = data.open_dataset("voc", miniature.voc(tmp_path), "train")
    dataset.pairs[1] = dataset.pairs[0]  # one image twice
    keys = (7, 2, 1), (8, 2, 1), (7, 3, 1), (7, 2, 0), (7, 2, 1)  # seed, epoch, index
    first, *others, again = (data.TrainSet(dataset, 64, seed)[item][0] for seed, *item in keys)
    assert torch.equal(first, again) and not any(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("file, damage, words", [
    ("masks/one.png", IMAGE.save, "RGB, where a PNG of 8-bit .*tools.prepare"),
    ("masks/one.png", lambda path: path.write_bytes(GREY_2), "L;2, where .*tools.prepare"),
    ("masks/one.png", lambda path: miniature.mask(path, [0, 3]), "3 is not a class's number"),
    ("masks/one.png", lambda path: miniature.mask(path, [0], (61, 40)), "61, 40.*image .60, 40"),
    ("images/one.jpg", lambda path: IMAGE.save(path, exif=TURNED), "EXIF .* turns .*tools.prepare"),
    ("masks/one.png", lambda path: path.unlink(), "1 of 2 train names missing .one.*tools.prepare"),
    ("classes.txt", lambda path: path.write_bytes(b"h\xe4user"), "not UTF-8")])
def test_a_file_in_another_form_is_refused_in_one_line(tmp_path, file, damage, words):
    damage(miniature.folder(tmp_path) / file)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        data.read_pair(data.open_dataset("folder", tmp_path, "train"), 1)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_running_the_file_draws_a_sheet_of_training_samples(tmp_path, monkeypatch):
    monkeypatch.chdir(miniature.folder(tmp_path))
    assert "samples.png" in run("--dataset=folder", "--data-root=.", program="data.py").stdout
    assert Image.open("samples.png").width > 700


def test_a_data_set_that_is_not_there_names_what_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="train.txt: missing; tools.get or tools.prepare"):
        data.open_dataset("voc", tmp_path, "train")
