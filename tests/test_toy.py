"""The drawn world and the CLIP that ships with it."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import model
import toy

SCENE_SHA256 = "6fa322094cb7370730c920a626deb9e2fa6c464d8ccea45599f33b398fb88411"  # of eight scenes' pixels and masks


def scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return toy.draw_scene(rng, toy.one_to_three(rng, toy.RUGS))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "world"
    toy.draw_world(folder, train=12, val=5, seed=3)
    return folder


@pytest.fixture(scope="module")
def shipped() -> dict:
    return torch.load(toy.SHIPPED_CLIP, weights_only=True)


# ------------------------------------------------------------------------------------------------------ the world


def test_a_seed_gives_the_same_pixels_on_every_machine():
    image, label = np.concatenate([scene(seed)[0] for seed in range(8)]), np.concatenate([scene(seed)[1] for seed in range(8)])
    assert hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest() == SCENE_SHA256


def test_another_seed_gives_another_world(world, tmp_path):
    pictures = {}
    for seed in (3, 4):
        toy.draw_world(tmp_path / str(seed), train=2, val=1, seed=seed)
        pictures[seed] = [file.read_bytes() for file in sorted((tmp_path / str(seed) / "JPEGImages").iterdir())]
    assert pictures[3][0] == (world / "JPEGImages" / "train_00000.png").read_bytes()
    assert len(set(pictures[3]) | set(pictures[4])) == 6  # no scene twice, neither across seeds nor across splits


def test_a_caption_names_exactly_the_rugs_that_show():
    rng = np.random.default_rng(0)
    for _ in range(40):
        rugs = toy.one_to_three(rng, toy.RUGS)
        _, label = toy.draw_scene(rng, rugs)
        text = toy.caption(rugs)
        assert {rug for rug in toy.RUGS if f"{rug[0]} {rug[1]} rug" in text} == set(rugs)
        assert text.count(" a ") == len(rugs) == label.max() and min(np.bincount(label.ravel())[1:]) >= 100


def test_a_pattern_and_a_colour_mean_what_the_name_says():
    for i, (pattern, colour) in enumerate(toy.RUGS):
        image, label = toy.draw_scene(np.random.default_rng(i), [(pattern, colour)])
        rug = image[label == 1].astype(int)
        ground, dark, cream = (abs(rug - np.array(c)).max(1) <= 28 for c in (toy.COLOURS[colour], toy.DARK, toy.CREAM))
        assert (ground | dark | cream).all()
        dark_range, cream_range = {"plain": ((0, 0), (0, 0)), "striped": ((0.3, 0.7), (0, 0)), "checked": ((0.1, 0.4), (0.2, 0.5)),
                                   "dotted": ((0, 0), (0.2, 0.6))}[pattern]
        assert dark_range[0] <= dark.mean() <= dark_range[1], (pattern, colour, dark.mean())
        assert cream_range[0] <= cream.mean() <= cream_range[1], (pattern, colour, cream.mean())


def test_the_folder_reads_as_the_lists_say(world):
    for split, count in (("train", 12), ("val", 5)):
        dataset = data.open_dataset("toy", world, split)
        assert len(dataset.pairs) == count and dataset.class_names == toy.CLASS_NAMES and dataset.unseen == toy.UNSEEN
        for i in range(count):
            image, label = data.read_pair(dataset, i)
            rng = np.random.default_rng((3, split == "val", i))
            classes = toy.one_to_three(rng, range(20))
            pixels, mask = toy.draw_scene(rng, [toy.CLASSES[c] for c in classes])
            assert np.array_equal(np.asarray(image), pixels)
            assert np.array_equal(label, np.array([255, *classes])[mask])  # VOC's background is nobody's
    assert {len(list((world / part).iterdir())) for part in ("JPEGImages", "SegmentationClass")} == {17}
    assert Image.open(world / "SegmentationClass" / "val_00000.png").mode == "P"


def test_five_classes_are_unseen_and_one_of_them_has_a_colour_that_no_mask_shows():
    assert len(toy.CLASS_NAMES) == len(set(toy.CLASS_NAMES)) == 20 and len(set(toy.UNSEEN)) == 5
    seen = [toy.CLASSES[i] for i in range(20) if i not in toy.UNSEEN]
    new = toy.new_attributes(toy.CLASS_NAMES, toy.UNSEEN)
    assert [toy.CLASS_NAMES[i] for i in new] == ["dotted purple rug"]
    assert "purple" not in {colour for _, colour in seen}
    for i in set(toy.UNSEEN) - set(new):  # the others are new combinations of what masks do show
        assert toy.CLASSES[i][0] in {p for p, _ in seen} and toy.CLASSES[i][1] in {c for _, c in seen}


def test_only_a_toy_world_is_ever_replaced(world, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="no toy world"):
        toy.draw_world(tmp_path, train=1, val=1)
    assert (tmp_path / "thesis.txt").read_text() == "years of work" and len(list(tmp_path.iterdir())) == 1
    toy.draw_world(world, train=12, val=5, seed=3)
    assert [entry.name for entry in world.parent.iterdir()] == ["world"]  # and nothing half-written is left beside it


def test_the_default_world_is_drawn_once(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "draw_world", lambda folder: (
        drawn.append(folder), folder.mkdir(parents=True), (folder / toy.MARKER).write_text(toy.world_settings())))
    assert toy.default_world() == toy.default_world() == toy.DEFAULT_WORLD and len(drawn) == 1


def test_a_mistake_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="--train"):
        toy.draw_world(tmp_path / "new", train=0)
    with pytest.raises(ValueError, match="--steps"):
        toy.pretrain(tmp_path / "clip.pt", steps=0)
    assert not any(tmp_path.iterdir())
    (tmp_path / "mine.txt").touch()
    run = subprocess.run([sys.executable, toy.__file__, "draw", str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr


# ------------------------------------------------------------------------------------------------------- its CLIP


def test_the_shipped_clip_is_small_and_in_openais_format(shipped):
    assert os.path.getsize(toy.SHIPPED_CLIP) <= 8_000_000
    built = model.clip.model.build_model(dict(shipped))  # OpenAI's own loader: it knows every name and every shape
    assert {name: built.state_dict()[name].dtype for name in built.state_dict() if name != "token_embedding.weight"} == \
        {name: shipped[name].dtype for name in built.state_dict() if name != "token_embedding.weight"}
    assert shipped["token_embedding.weight"].dtype == torch.float16
    assert [int(shipped[name]) for name in ("input_resolution", "context_length", "vocab_size")] == [64, 32, 49408]


def test_only_the_words_of_the_captions_have_an_embedding(shipped):
    known = shipped["token_embedding.weight"].abs().sum(1).nonzero().flatten().tolist()
    captions = [toy.caption([rug]) for rug in toy.RUGS] + [toy.caption(toy.RUGS[:2])]
    assert known == model.tokenize(captions, 32).unique()[1:].tolist()  # all but 0, which fills the row after the end


def test_the_shipped_clip_names_new_rugs():
    assert toy.naming_accuracy(model.load_clip(toy.SHIPPED_CLIP), count=200, seed=100) >= 0.95


def test_no_two_scenes_of_a_batch_share_a_caption():
    images, scenes = toy.scene_batch(np.random.default_rng(0), 64)
    assert images.shape == (64, 3, 64, 64) and len({frozenset(classes) for classes in scenes}) == 64
    assert {len(classes) for classes in scenes} == {1, 2, 3}


def test_the_contrastive_loss_is_clips(clip_path):
    clip_model = model.load_clip(clip_path)
    images, tokens = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)), model.tokenize("abc", 77)
    G, T = (x / x.norm(dim=1, keepdim=True) for x in (clip_model.encode_image(images), clip_model.encode_text(tokens)))
    p = (clip_model.logit_scale.exp() * G @ T.T).exp()
    literal = -sum((p[i, i] / p[i].sum()).log() + (p[i, i] / p[:, i].sum()).log() for i in range(3)) / 6
    assert torch.allclose(toy.contrastive_loss(clip_model, images, tokens), literal, atol=1e-5)


def test_pretraining_is_repeatable_and_leaves_a_loadable_file(tmp_path):
    state = torch.random.get_rng_state()
    for i, seed in enumerate((0, 0, 1)):
        toy.pretrain(tmp_path / f"{i}.pt", seed=seed, steps=3, batch_size=8)
    first, again, other = (torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in range(3))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["visual.proj"], other["visual.proj"])
    assert model.load_clip(tmp_path / "0.pt").visual.input_resolution == 64
    assert torch.equal(state, torch.random.get_rng_state())  # no global random state was touched
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0.pt", "1.pt", "2.pt"]
