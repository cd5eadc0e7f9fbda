"""Sec. 4.3 on one's own photos: what is read, labelled, written and refused."""

import miniature
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_clip, refused, run
from PIL import Image

import data
from eval import slide_inference
from model import CLIPRC
from predict import Segmenter, result_images
from util import toy
from util.checkpoint import TOY_MODEL, read_checkpoint

WORDS = ["plain green rug", "striped blue rug", "plain red rug"]  # had no masks; had; had


@pytest.fixture
def photo(tmp_path):
    scene, _ = toy.draw_scene(np.random.default_rng(4), [word.split()[:2] for word in WORDS[:2]])
    Image.fromarray(scene).resize((150, 100)).save(tmp_path / "street.png")
    return tmp_path / "street.png"


def test_labels_are_the_best_lowered_scores_at_the_photos_size(photo):
    segmenter = Segmenter(TOY_MODEL, WORDS, threshold=0)
    result, image = segmenter.segment(photo), data.test_image(Image.open(photo), 64)
    assert torch.equal(result.scores, slide_inference(segmenter.model, image, segmenter.text, 64))
    scores = F.interpolate(result.scores[None], (100, 150), mode="bilinear")[0]
    scores[1:] -= 0.1
    best, labels = scores.max(0)
    assert np.array_equal(result.labels, labels) and np.allclose(result.best, best)
    for i, start in enumerate(("* plain green rug ", "  striped blue rug")):
        share, mean = (labels == i).float().mean(), best[labels == i].mean()
        assert f"{start}{share:>20.1%}{mean:>8.2f}" in result.table()


def test_pixels_below_the_threshold_have_no_label_and_stay_as_photographed(photo):
    result = (segmenter := Segmenter(TOY_MODEL, WORDS)).segment(photo)
    below = result.best < 0.1  # in the toy world, whose floor has no name
    labels = np.where(below, 255, Segmenter(TOY_MODEL, WORDS, threshold=0).segment(photo).labels)
    assert 0.1 < below.mean() < 0.9 and np.array_equal(result.labels, labels)
    segmenter.threshold = 1.0
    pixels = np.asarray(segmenter.segment(photo).draw())[:500]
    assert (pixels[:, :780] == pixels[:, 802:1582]).all()


def test_a_path_an_image_and_an_array_are_the_same_photo(photo):
    segmenter, image, exif = Segmenter(TOY_MODEL), Image.open(photo), Image.Exif()
    grey, exif[0x0112] = image.convert("L"), 3  # orientation: upside down
    image.save(turned := photo.with_name("turned.png"), exif=exif)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) << 8)  # 16 bits
    deep.save(path := photo.with_name("deep.png"))
    for same in ((photo, str(photo), image, np.asarray(image), image.convert("RGBA")),
                 (grey, np.asarray(grey), grey.convert("P"), path, Image.open(path), deep),
                 (turned, Image.open(turned), image.rotate(180))):
        first, *others = (segmenter.segment(each).scores for each in same)
        assert all(torch.equal(first, other) for other in others)


def test_words_with_masks_are_lowered_beside_others_after_inductive_training(tmp_path):
    for words, names, unseen, lower in (
            (None, list(toy.CLASS_NAMES), set(toy.UNSEEN), 0.1),
            ("a cat; Plain  GREEN rug", ["a cat", "Plain GREEN rug"], {0, 1}, 0),
            ("* a cat\nPlain RED rug", ["a cat", "Plain RED rug"], {0}, 0.1)):
        segmenter = Segmenter(TOY_MODEL, words)
        assert (segmenter.names, segmenter.unseen, segmenter.lower) == (names, unseen, lower)
    saved = read_checkpoint(TOY_MODEL)
    for setting, unseen in (("transductive", set(toy.UNSEEN)), ("supervised", set())):
        torch.save(saved | {"run": saved["run"] | {"setting": setting}}, tmp_path / "last.pt")
        segmenter = Segmenter(tmp_path / "last.pt")
        assert (segmenter.lower, segmenter.unseen) == (0, unseen)


def test_every_photo_gets_its_images_and_nothing_is_overwritten(photo, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8 no photo")
    miniature.picture(tmp_path / "more/street.jpg")
    out, words = tmp_path / "out", ("--classes", ", ".join(WORDS), "--out", tmp_path / "out")
    assert "no photo" in refused(TOY_MODEL, photo, "none.jpg", *words, program="predict.py")
    assert not out.exists()
    printed = run(TOY_MODEL, photo, tmp_path / "more/../street.png", *words, "--save", "--regions",
                  program="predict.py").stdout
    result = Segmenter(TOY_MODEL, WORDS).segment(photo)
    assert f"street.png, 150 x 100: {out}/street.png, " in printed and result.table() in printed
    assert np.array_equal(Image.open(out / "street_labels.png"), result.labels)
    assert np.array_equal(Image.open(out / "street.png"), result.draw())
    before = {path: path.read_bytes() for path in out.iterdir()}
    line = refused(TOY_MODEL, tmp_path, tmp_path / "more", *words, program="predict.py")
    assert "a.jpg: cannot be read" in line and len(before) == 3  # the others are labelled
    assert {*out.iterdir()} == {*before, out / "street-2.png", out / "street-3.png"}
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_toy_scene_is_labelled_alike_from_a_file_which_the_toy_clip_warns_of(tmp_path):
    scene = run("--out", tmp_path, program="predict.py").stdout
    assert "  striped blue rug" in scene and "* plain green rug" in scene
    file = run(TOY_MODEL, tmp_path / "photos", "--out", tmp_path / "b", program="predict.py").stdout
    assert ["knows only rugs" in printed for printed in (scene, file)] == [False, True]
    assert len({(tmp_path / out / "toy_scene.png").read_bytes() for out in (".", "b")}) == 1


@pytest.mark.parametrize("name, none", [("toy", 255), ("voc", 1)])
def test_images_show_each_pixels_class_above_a_named_threshold(name, none, tmp_path, monkeypatch):
    pairs, figures = [(tmp_path / f"{i}.jpg", tmp_path / f"{i}.png") for i in (0, 1)], []
    for (image, mask), values in zip(pairs, ([255, 0, 0, 255], [255, 0, 1, 1])):
        miniature.picture(image), miniature.mask(mask, values)
    dataset = data.Dataset(name, ("road", "car"), (1,), (), pairs, np.uint8(range(256)))
    scores = torch.tensor([[[0.5, 0.5, 0.05, 0.05]], [[0.45, 0.45, 0.01, 0.01]]])  # (2, 1, 4)
    monkeypatch.setattr("predict.slide_inference", lambda *_: scores)
    monkeypatch.setattr("util.draw.figure", lambda rows, h, *_: figures.extend([h[3], *rows]))
    network = CLIPRC(make_clip().visual, num_prompts=2, regions=4)
    result_images(network, dataset, torch.randn(2, 32), 64, 0.1, [0])
    header, (_, labels, truth), _, (_, _, cells) = figures  # of the image with the unseen class
    assert header == "CLIP-RC" + " above 0.1" * (name == "toy")
    shown = [label[0, [0, 20, 40, 59]].tolist() for label in (truth, *labels)]
    assert shown[:2] == [[255, 0, 1, 1]] * 2 and cells[0, ::32].tolist() == [0, 1]  # most frequent
    assert shown[2:] == [[0] * 4, [1, 1, none, none], [1] * 4]  # MaskCLIP; ours; right or wrong
