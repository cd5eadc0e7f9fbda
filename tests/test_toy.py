"""The drawn world and the CLIP that is shipped for it."""

import hashlib

import numpy as np

import data
from docs import pretrain_toy_clip as pretraining
from util import toy
from util.clip_files import TOY_CLIP, load_clip


def test_a_seed_gives_the_same_pixels_on_every_machine():
    generators = [np.random.default_rng(seed) for seed in range(8)]
    scenes = [toy.draw_scene(rng, toy.one_to_three(rng, toy.RUGS)) for rng in generators]
    pixels = b"".join(array.tobytes() for arrays in zip(*scenes) for array in arrays)
    assert hashlib.sha256(pixels).hexdigest() == (
        "6fa322094cb7370730c920a626deb9e2fa6c464d8ccea45599f33b398fb88411")


def test_the_folder_holds_the_scenes_of_its_seed_and_is_drawn_once(tmp_path):
    toy.draw_world(world := tmp_path / "world", train=3, val=2, seed=3)
    toy.draw_world(world, train=1, val=1)
    for number, (split, count) in enumerate((("train", 3), ("val", 2))):
        dataset = data.open_dataset("toy", world, split)
        assert len(dataset.pairs) == count and dataset.class_names == toy.CLASS_NAMES
        for i in range(count):
            image, label = data.read_pair(dataset, i)
            classes = toy.one_to_three(rng := np.random.default_rng((3, number, i)), range(20))
            pixels, mask = toy.draw_scene(rng, [toy.CLASSES[c] for c in classes])
            assert np.array_equal(image, pixels)
            assert np.array_equal(label, np.array([255, *classes])[mask])  # the floor is ignored


def test_the_shipped_clip_recognises_new_rugs():
    assert pretraining.naming_accuracy(load_clip(TOY_CLIP), count=200, seed=100) >= 0.95
