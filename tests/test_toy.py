"""The drawn world and the CLIP that is shipped for it."""

import hashlib

import numpy as np
import pytest
import torch
from conftest import make_clip

import data
from tools import pretrain_toy_clip as pretraining
from util import toy
from util.clip_files import TOY_CLIP, clip, load_clip, tokenize

SCENES_SHA256 = "6fa322094cb7370730c920a626deb9e2fa6c464d8ccea45599f33b398fb88411"


def test_a_seed_gives_the_same_pixels_on_every_machine():
    generators = [np.random.default_rng(seed) for seed in range(8)]
    scenes = [toy.draw_scene(rng, toy.one_to_three(rng, toy.RUGS)) for rng in generators]
    pixels = b"".join(image.tobytes() for image, _ in scenes)
    masks = b"".join(label.tobytes() for _, label in scenes)
    assert hashlib.sha256(pixels + masks).hexdigest() == SCENES_SHA256


def test_a_caption_mentions_exactly_the_rugs_that_show():
    rng = np.random.default_rng(0)
    for _ in range(40):
        rugs = toy.one_to_three(rng, toy.RUGS)
        _, label = toy.draw_scene(rng, rugs)
        assert {rug for rug in toy.RUGS if " ".join(rug) in toy.caption(rugs)} == {*rugs}
        assert len(rugs) == label.max() and min(np.bincount(label.ravel())[1:]) >= 100


@pytest.mark.parametrize("pattern, dark_share, cream_share", [
    ("plain", (0, 0), (0, 0)), ("striped", (0.3, 0.7), (0, 0)),
    ("checked", (0.1, 0.4), (0.2, 0.5)), ("dotted", (0, 0), (0.2, 0.6))])
def test_rugs_and_their_textures_look_as_their_names_say(pattern, dark_share, cream_share):
    for colour, level in toy.COLOURS.items():
        image, label = toy.draw_scene(np.random.default_rng(0), [(pattern, colour)])
        for pixels in (image[label == 1].astype(int), toy.texture(pattern, colour).reshape(-1, 3)):
            ground, dark, cream = ((abs(pixels - np.array(c)) <= 28).all(1)
                                   for c in (level, toy.DARK, toy.CREAM))
            assert (ground | dark | cream).all() and ground.any()
            assert dark_share[0] <= dark.mean() <= dark_share[1]
            assert cream_share[0] <= cream.mean() <= cream_share[1]


def test_the_folder_holds_the_scenes_of_its_seed(tmp_path):
    toy.draw_world(tmp_path, train=6, val=3, seed=3)
    for number, (split, count) in enumerate((("train", 6), ("val", 3))):
        dataset = data.open_dataset("toy", tmp_path, split)
        assert dataset.class_names == toy.CLASS_NAMES and dataset.unseen == toy.UNSEEN
        for i in range(count):
            image, label = data.read_pair(dataset, i)
            rng = np.random.default_rng((3, number, i))
            classes = toy.one_to_three(rng, range(20))
            pixels, mask = toy.draw_scene(rng, [toy.CLASSES[c] for c in classes])
            assert np.array_equal(np.asarray(image), pixels)
            assert np.array_equal(label, np.array([255, *classes])[mask])  # the floor is ignored


def test_one_of_five_unseen_classes_has_a_colour_that_no_mask_shows():
    assert len(set(toy.CLASS_NAMES)) == 20 and len(set(toy.UNSEEN)) == 5
    new = toy.new_attributes(toy.CLASS_NAMES, toy.UNSEEN)
    assert [toy.CLASS_NAMES[i] for i in new] == ["dotted purple rug"]


def test_only_a_toy_world_is_replaced_and_never_one_that_another_process_has_just_drawn(
        tmp_path, monkeypatch):
    world, draw, inodes = tmp_path / "world", toy._draw_files, []

    def draw_slowly(*arguments):
        monkeypatch.setattr(toy, "_draw_files", draw)
        toy.draw_world(world, train=2, val=1)  # the other process
        inodes.append(world.stat().st_ino)
        draw(*arguments)

    toy.draw_world(world, train=1, val=1)
    monkeypatch.setattr(toy, "_draw_files", draw_slowly)
    toy.draw_world(world, train=2, val=1)
    assert inodes == [world.stat().st_ino] and len([*(world / "JPEGImages").iterdir()]) == 3
    with pytest.raises(ValueError, match="something other than a toy world"):
        toy.draw_world(tmp_path, train=1, val=1)
    assert [*tmp_path.iterdir()] == [world]


def test_the_shipped_clip_is_small_and_recognises_new_rugs():
    assert TOY_CLIP.stat().st_size < 8_000_000
    clip.model.build_model(torch.load(TOY_CLIP, weights_only=True))  # OpenAI's own reader
    assert pretraining.naming_accuracy(load_clip(TOY_CLIP), count=200, seed=100) >= 0.95


def test_the_contrastive_loss_is_clips_on_scenes_with_different_captions():
    images, scenes = pretraining.scene_batch(np.random.default_rng(0), 200)
    assert len({frozenset(rugs) for rugs in scenes}) == 200
    clip_model, tokens = make_clip(), tokenize([toy.caption(rugs) for rugs in scenes], 77)
    G, T = clip_model.encode_image(images), clip_model.encode_text(tokens)
    logits = clip_model.logit_scale.exp() * (G @ T.T) / (G.norm(dim=1)[:, None] * T.norm(dim=1))
    loss = -(logits.softmax(1).diag().log() + logits.softmax(0).diag().log()).mean() / 2
    assert torch.allclose(pretraining.contrastive_loss(clip_model, images, tokens), loss, atol=1e-5)


def test_pretraining_is_repeatable(tmp_path):
    for name in "ab":
        pretraining.pretrain(tmp_path / name, steps=2, batch_size=4)
    a, b = (load_clip(tmp_path / name).state_dict() for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
