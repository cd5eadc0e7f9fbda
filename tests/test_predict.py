"""Sec. 4.3 on one's own photos: what is read, labelled, written and refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused, run
from PIL import Image

import data
from eval import LOWER, slide_inference
from model import CLIPRC
from predict import Segmenter
from util.checkpoint import save_checkpoint
from util.clip_files import clip_digest, encode_text, load_clip

NAMES, TEMPLATES = ("car", "traffic light", "cow"), ("a photo of a {}",)  # the last one is unseen
WORDS = ["bus", "sheep", "tree", "road", "sky"]  # the untrained model finds three of them


def trained(folder: Path, clip_path: Path, model: dict = {}, **more) -> Path:
    """A checkpoint of a small model, as train.py writes it."""
    torch.manual_seed(0)
    clip_model = load_clip(clip_path)
    settings = {"num_prompts": 2, "regions": 4, "initialiser": "truncated_normal"} | model
    model = CLIPRC(clip_model.visual, **settings)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    text = encode_text(clip_model, NAMES, TEMPLATES)
    own = {"run": {"setting": "inductive", "crop_size": 64, "precision": "float32"},
           "class_names": list(NAMES), "unseen": [2], "templates": list(TEMPLATES), "text": text}
    save_checkpoint(folder / "last.pt", model.settings, weights, clip_digest(clip_model),
                    clip=str(clip_path), **own | more)
    return folder / "last.pt"


def converted(folder: Path, clip_path: Path) -> Path:
    """A checkpoint of a small model, as tools/convert.py writes it: no class names, all weights."""
    model = CLIPRC(load_clip(clip_path).visual, num_prompts=2, regions=4)
    save_checkpoint(folder / "converted.pt", model.settings, model.state_dict(), None)
    return folder / "converted.pt"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, clip_path) -> Path:
    return trained(tmp_path_factory.mktemp("run"), clip_path)


@pytest.fixture
def photo(tmp_path) -> Path:
    return save_photo(tmp_path / "street.png")


def save_photo(path: Path, size: tuple[int, int] = (150, 100)) -> Path:
    path.parent.mkdir(exist_ok=True)
    noise = np.random.default_rng(3).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def predict(*arguments) -> str:
    done = run(*arguments, "--device", "cpu", program="predict.py")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_labels_are_the_best_scores_at_the_photos_size(checkpoint, photo):
    segmenter = Segmenter(checkpoint, WORDS, device="cpu")
    result = segmenter.segment(photo)
    scores = slide_inference(segmenter.model, data.test_image(Image.open(photo), 64),
                             segmenter.text, crop=64, stride=53)
    assert torch.equal(result.scores, scores) and result.names == WORDS
    best, labels = F.interpolate(scores[None], (100, 150), mode="bilinear")[0].max(0)
    assert (result.labels == labels.numpy()).all() and np.allclose(result.best, best)
    assert len(labels.unique()) == 3


def test_pixels_below_the_threshold_have_no_label_and_stay_as_photographed(checkpoint, photo):
    segmenter = Segmenter(checkpoint, WORDS, device="cpu")
    everywhere = segmenter.segment(photo)
    segmenter.threshold = float(np.median(everywhere.best))
    result, below = segmenter.segment(photo), everywhere.best < segmenter.threshold
    assert 0 < below.mean() < 1 and (result.labels[below] == 255).all()
    assert (result.labels[~below] == everywhere.labels[~below]).all()
    segmenter.threshold = 1.0
    nothing = segmenter.segment(photo)
    rows = [row.split()[-3:] for row in nothing.table().split("\n")[1:-1]]
    assert rows == [["0.0%", "-", f"{score.max():.2f}"] for score in nothing.scores]
    pixels = np.asarray(nothing.draw())[12:-12]
    assert (pixels[:, 12:792] == pixels[:, 804:1584]).all()


def test_a_path_an_image_and_an_array_are_the_same_photo(checkpoint, photo):
    segmenter, image = Segmenter(checkpoint, device="cpu"), Image.open(photo)
    grey = image.convert("L")
    transparent = Image.new("RGBA", image.size, (0, 0, 0, 0))
    for same in ((photo, str(photo), image, np.asarray(image), image.convert("RGBA")),
                 (grey, np.asarray(grey), grey.convert("P"), grey.convert("RGB")),
                 (transparent, Image.new("RGB", image.size, "white"))):
        first, *others = (segmenter.segment(each).scores for each in same)
        assert all(torch.equal(first, other) for other in others)
    with pytest.raises(ValueError, match="uint8"):
        segmenter.segment(np.zeros((100, 150, 3)))


def test_words_with_masks_are_lowered_only_beside_others_and_after_inductive_training(
        checkpoint, photo, tmp_path, clip_path):
    segmenter = Segmenter(checkpoint, ["sheep", "car"], device="cpu")
    lowered = segmenter.segment(photo).scores
    segmenter.lower = 0.0
    by = segmenter.segment(photo).scores - lowered  # (2, 64, 96)
    assert torch.allclose(by, torch.tensor([0, LOWER])[:, None, None].expand_as(by), atol=1e-6)
    for words, lower in ((None, LOWER), (["car", "sheep"], LOWER), (["car"], 0), (["sheep"], 0)):
        assert Segmenter(checkpoint, words, device="cpu").lower == lower
    for setting, unseen in (("transductive", {2}), ("supervised", set())):
        other = trained(tmp_path, clip_path, run={"setting": setting, "crop_size": 64})
        segmenter = Segmenter(other, device="cpu")
        assert (segmenter.lower, segmenter.unseen) == (0, unseen)


def test_the_training_says_which_words_had_masks_whatever_their_case_and_stars(checkpoint):
    segmenter = Segmenter(checkpoint, "*Car; COW , traffic  light,bus", device="cpu")
    assert segmenter.names == ["Car", "COW", "traffic light", "bus"] and segmenter.unseen == {1, 3}


def test_a_converted_checkpoint_needs_words_and_takes_stars(tmp_path, clip_path):
    path = converted(tmp_path, clip_path)
    segmenter = Segmenter(path, ["car", "*bus"], clip=str(clip_path), device="cpu")
    assert (segmenter.unseen, segmenter.lower, segmenter.crop) == ({1}, LOWER, 512)
    with pytest.raises(ValueError, match="0 words"):
        Segmenter(path, clip=str(clip_path), device="cpu")


def test_a_words_row_does_not_depend_on_who_encoded_it(checkpoint):
    own, other, turned = (Segmenter(checkpoint, words, device="cpu").text
                          for words in (None, ["cow", "bus"], NAMES[::-1]))
    assert torch.allclose(own[2], other[0], atol=1e-6)
    assert torch.allclose(own.flip(0), turned, atol=1e-6)


def test_a_wide_photo_stands_above_its_labels(checkpoint, photo, tmp_path):
    segmenter = Segmenter(checkpoint, device="cpu")
    for size, stacked in (((150, 100), False), ((180, 100), True)):
        drawn = segmenter.segment(save_photo(tmp_path / "photo.png", size)).draw()
        assert 1580 < drawn.width < 1600 and (drawn.height > drawn.width) == stacked


def test_every_photo_gets_its_images_and_a_table(checkpoint, photo, tmp_path):
    printed = predict(checkpoint, photo, "--save", "--regions", "--out", tmp_path / "out",
                      "--classes", "bus; sheep, tree, road, sky")
    result = Segmenter(checkpoint, WORDS, device="cpu").segment(photo)
    labels = Image.open(tmp_path / "out" / "street_labels.png")
    assert labels.mode == "P" and (np.asarray(labels) == result.labels).all()
    assert Image.open(tmp_path / "out" / "street.png").size == result.draw().size
    assert Image.open(tmp_path / "out" / "street_regions.png").width > 1500
    sky, highest = result.labels == 4, result.scores[4].max()
    row = f"* sky  {sky.mean():>31.1%}{result.best[sky].mean():>8.2f}{highest:>9.2f}\n"
    assert row in printed
    assert "street.png, 150 x 100: " in printed


def test_nothing_is_overwritten(checkpoint, photo, tmp_path):
    save_photo(tmp_path / "other" / "street.jpg", (40, 60))
    out = tmp_path / "out"
    predict(checkpoint, photo, "--save", "--out", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    predict(checkpoint, photo, tmp_path / "other", "--out", out)  # two of one name
    assert sorted(path.name for path in out.iterdir()) == [
        "street-2.png", "street-3.png", "street.png", "street_labels.png"]
    assert all((out / name).read_bytes() == content for name, content in before.items())


def test_a_photo_given_twice_is_labelled_once(checkpoint, photo, tmp_path):
    again = photo.parent / ".." / photo.parent.name / photo.name
    predict(checkpoint, photo, tmp_path, again, "--out", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["street.png"]


def test_a_damaged_photo_does_not_stop_the_others(checkpoint, photo, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8 no photo")
    line = refused(checkpoint, tmp_path, "--out", tmp_path / "out", program="predict.py")
    assert "a.jpg" in line and [p.name for p in (tmp_path / "out").iterdir()] == ["street.png"]


def test_the_toy_clip_comes_with_a_warning(checkpoint, photo, tmp_path, clip_path):
    toy_clip = shutil.copy(clip_path, tmp_path / "toy_clip.pt")
    words = ("--classes", "plain red rug, dotted blue rug", "--out", tmp_path / "out")
    assert "knows only rugs" in predict(checkpoint, photo, *words, "--clip", toy_clip)
    assert "knows only rugs" not in predict(checkpoint, photo, *words)


@pytest.mark.parametrize("arguments, message", [
    (["--classes", "car, CAR"], "same"), (["--classes", " ,"], "0 words"),
    (["--threshold", "50"], "from 0 to 1"), (["none.jpg"], "none.jpg: no photo")])
def test_what_cannot_be_used_is_refused_before_anything_is_written(
        checkpoint, photo, tmp_path, arguments, message):
    out = tmp_path / "out"
    assert message in refused(checkpoint, photo, *arguments, "--out", out, program="predict.py")
    assert not out.exists()


def test_regions_need_region_tokens(photo, tmp_path, clip_path):
    path = trained(tmp_path, clip_path, {"regions": 0, "ram": False, "rdl": False})
    assert "no region tokens" in refused(path, photo, "--regions", program="predict.py")


def test_without_arguments_a_scene_of_the_toy_world_is_labelled(tmp_path):
    result = run("--out", tmp_path, program="predict.py")
    assert result.returncode == 0, result.stderr
    assert "striped blue rug" in result.stdout and "* plain green rug" in result.stdout
    assert (tmp_path / "toy_scene.png").exists()
    scene = tmp_path / "photos" / "toy_scene.png"
    again = run(scene, "--out", tmp_path / "again", program="predict.py")
    assert "score less than 0.1 have no label" in again.stdout  # one rule for scene and file
    drawn = [(tmp_path / out / "toy_scene.png").read_bytes() for out in ("", "again")]
    assert drawn[0] == drawn[1]
