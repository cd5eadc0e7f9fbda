"""Sec. 4.3: windows, confusion matrix and metrics, counted by hand and by the released code."""

import math
import re

import miniature
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_clip, recorded, refused, run
from PIL import Image

import data
import eval
from eval import (MaskCLIP, class_iou, class_table, confusion_matrix, evaluate, method_name,
                  mistakes_line, paper_table, slide_inference, untrained_encoder, window_corners,
                  zero_shot_metrics)
from model import CLIPRC
from tools.convert import from_released
from util import draw, toy
from util.checkpoint import TOY_MODEL
from util.clip_files import TOY_CLIP


def lowering(golden: dict) -> tuple[float, list[int]]:
    return (0.0 if golden["config"].get("self_training") else 0.1), golden["config"]["seen"]


def test_scores_equal_the_released_codes(golden):
    network = from_released(golden["state_dict"])
    for image, expected in zip(golden["images"], golden["scores"]):
        scores = slide_inference(network, image, golden["text"], 64, 53, *lowering(golden))
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("setting", ["inductive", "transductive"])
def test_sliding_window_scores_equal_the_released_codes(setting):
    golden = recorded(f"clip_rc_{setting}")
    slide, network = golden["slide"], from_released(golden["state_dict"])
    scores = slide_inference(network, slide["image"], golden["text"], 64,
                             golden["config"]["stride"], *lowering(golden))
    scores = F.interpolate(scores[None], tuple(slide["ori_shape"]), mode="bilinear")
    torch.testing.assert_close(scores, slide["scores"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("size, crop, stride, expected", [
    (512, 512, 426, [0]), (513, 512, 426, [0, 1]), (938, 512, 426, [0, 426]),
    (939, 512, 426, [0, 426, 427]), (10, 4, 3, [0, 3, 6]), (11, 4, 3, [0, 3, 6, 7])])
def test_windows_cover_the_image_and_end_at_its_border(size, crop, stride, expected):
    assert [left for _, left in window_corners(crop, size, crop, stride)] == expected
    assert [top for top, _ in window_corners(size, crop, crop, stride)] == expected


class PixelModel:
    """Logits that depend on the pixel alone, so that windows must not matter."""

    batches: list[int] = []

    def __call__(self, images: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(images))
        return torch.einsum("bdhw,cd->bchw", images, text)


def test_overlapping_windows_are_averaged_and_seen_scores_lowered():
    text = torch.randn(4, 3)
    for height, width in ((20, 31), (16, 16), (9, 40), (5, 7)):  # also smaller than a window
        image = torch.randn(3, height, width)
        expected = torch.einsum("dhw,cd->chw", image, text).sigmoid()
        expected[[1, 3]] -= 0.25
        scores = slide_inference(PixelModel(), image, text, 16, 13, 0.25, (1, 3))
        torch.testing.assert_close(scores, expected)


def test_the_windows_of_an_image_share_batches():
    model = PixelModel()
    model.batches = []
    slide_inference(model, torch.randn(3, 16, 16 + 9 * 13), torch.randn(4, 3), 16, 13)
    assert model.batches == [8, 2]  # ten windows


def test_confusion_matrix_counts_label_rows_and_prediction_columns():
    torch.manual_seed(0)
    label, prediction = torch.randint(5, (9, 11)), torch.randint(5, (9, 11))
    label[torch.rand(9, 11) < 0.3] = 255
    counted = torch.zeros(5, 5, dtype=torch.int64)
    for t, p in zip(label.flatten().tolist(), prediction.flatten().tolist()):
        if t != 255:
            counted[t, p] += 1
    assert torch.equal(confusion_matrix(prediction, label, 5), counted)
    assert torch.equal(confusion_matrix(prediction, label.to(torch.uint8), 5), counted)


@pytest.mark.parametrize("label, prediction", [(7, 0), (300, 0), (-1, 0), (0, 7)])
def test_a_number_that_is_no_class_is_refused_not_counted(label, prediction):
    with pytest.raises(ValueError, match="neither one of 5 classes"):
        confusion_matrix(torch.tensor([0, prediction]), torch.tensor([1, label]), 5)


def test_metrics_are_the_definitions():
    # Class 3 is neither labelled nor predicted.
    confusion = torch.tensor([[50, 10, 0, 0], [0, 20, 20, 0], [5, 5, 30, 0], [0, 0, 0, 0]])
    iou = [50 / (50 + 10 + 5), 20 / (20 + 20 + 15), 30 / (30 + 10 + 20), math.nan]
    expected = torch.tensor(iou, dtype=torch.float64)
    torch.testing.assert_close(class_iou(confusion), expected, equal_nan=True)
    metrics = zero_shot_metrics(confusion, unseen=[2, 3])
    S, U = 100 * (iou[0] + iou[1]) / 2, 100 * iou[2]
    assert metrics == pytest.approx({
        "pAcc": 100 * 100 / 140, "mIoU_S": S, "mIoU_U": U, "hIoU": 2 * S * U / (S + U),
        "mAcc": 100 * (50 / 60 + 20 / 40 + 30 / 40) / 3})


def test_a_mean_over_no_class_is_nan_and_printed_as_a_dash():
    metrics = zero_shot_metrics(torch.eye(3, dtype=torch.int64), unseen=[])
    assert math.isnan(metrics["mIoU_U"]) and math.isnan(metrics["hIoU"])
    row = paper_table({"x": metrics}).splitlines()[1].split()
    assert row == ["x", "100.0", "-", "100.0", "-"]
    assert zero_shot_metrics(torch.tensor([[0, 1], [1, 0]]), unseen=[1])["hIoU"] == 0


def test_class_table_marks_unseen_classes_and_those_with_a_new_look():
    table = class_table(torch.tensor([[3, 1], [0, 0]]), ["cat", "sofa"], unseen=[1]).splitlines()
    assert table[1].split() == ["cat", "75.0", "75.0", "100.0%"]
    assert table[2].split() == ["*", "sofa", "0.0", "-", "0.0%"]
    rugs = ["plain red rug", "plain green rug", "dotted purple rug"]
    marked = class_table(torch.eye(3), rugs, unseen=[1, 2]).splitlines()
    assert [line[:2] for line in marked[1:4]] == ["  ", "**", "**"]


def test_maskclip_is_clip_whose_last_layer_keeps_each_patchs_own_value():
    clip_model = make_clip()
    visual, images = clip_model.visual, torch.randn(2, 3, 64, 64)
    text = F.normalize(torch.randn(5, 32), dim=-1)
    block, taken = visual.transformer.resblocks[-1], []
    hook = block.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    visual(images)
    hook.remove()
    X = block.ln_1(taken[0].transpose(0, 1))  # (B, 1 + N, D_v): what enters the last layer
    D_v = X.shape[-1]
    V = X @ block.attn.in_proj_weight[2 * D_v:].T + block.attn.in_proj_bias[2 * D_v:]
    I = visual.ln_post(block.attn.out_proj(V)[:, 1:]) @ visual.proj
    cosines = F.cosine_similarity(text[None, :, None], I[:, None], dim=-1)  # (B, C, N)
    expected = F.interpolate(cosines.unflatten(-1, (4, 4)), (64, 64), mode="bilinear")
    torch.testing.assert_close(MaskCLIP(visual)(images, text), expected)


def test_a_region_over_the_whole_image_is_clips_own_answer_in_one_layer():
    visual = make_clip(layers=1).visual
    G, _, R = untrained_encoder(visual, 1)(torch.randn(1, 3, 64, 64))
    assert R.shape == (1, 1, 32)
    assert F.cosine_similarity(G, R[:, 0]) > 0.8  # it lacks nothing but the [CLS] token


def test_untrained_evaluation_needs_no_checkpoint():
    result = run("--untrained", "--dataset", "toy", "--workers", "0", program="eval.py")
    assert result.returncode == 0, result.stderr
    row = re.search(r"MaskCLIP, untrained +([\d.]+) +([\d.]+)", result.stdout)
    assert float(row[2]) > 20 and "lowered by 0 (no training)" in result.stdout


def test_every_labelled_pixel_of_every_image_counts(tmp_path):
    for index in range(11):
        miniature.picture(tmp_path / "images" / f"{index:02}.png", seed=index)
        miniature.mask(tmp_path / "masks" / f"{index:02}.png", [0, 1, 255])
    (tmp_path / "classes.txt").write_text("0 = road\n1 = car\n")
    for split in ("train", "val"):
        (tmp_path / f"{split}.txt").write_text("\n".join(f"{index:02}" for index in range(11)))
    dataset = data.open_dataset("folder", tmp_path, "val")
    labels = np.stack([data.read_pair(dataset, index)[1] for index in range(11)])
    confusion = evaluate(MaskCLIP(make_clip().visual), dataset, torch.randn(2, 32), 64, 53, 0.0, [])
    assert confusion.sum(1).tolist() == [(labels == c).sum() for c in (0, 1)]


def test_labels_are_the_best_of_the_resized_scores_and_each_image_has_a_file(tmp_path):
    torch.manual_seed(0)
    for seed, file in enumerate(("b.png", "seq/b.png")):
        miniature.picture(tmp_path / "images" / file, seed=seed)
        miniature.mask(tmp_path / "masks" / file, [0, 1, 2])
    (tmp_path / "classes.txt").write_text("road\ncar\ntree")
    (tmp_path / "val.txt").write_text("b\nseq/b")
    dataset = data.open_dataset("folder", tmp_path, "val")
    network, text = MaskCLIP(make_clip().visual), torch.randn(3, 32)
    evaluate(network, dataset, text, 64, 53, 0.0, [], save=tmp_path / "saved")
    for image, label, index in data.TestSet(dataset, 64):
        scores = slide_inference(network, image, text, 64, 53)
        labels = F.interpolate(scores[None], label.shape, mode="bilinear")[0].argmax(0)
        saved = Image.open(tmp_path / "saved" / ("b.png", "seq/b.png")[index])
        assert np.array_equal(saved, labels)


def test_the_shipped_model_finds_unseen_classes_by_their_names(tmp_path):
    toy.draw_world(tmp_path / "world", train=1, val=30)
    for names, least, most in (("own", 60, 100), ("permuted", 0, 5), ("random", 0, 5)):
        result = run(TOY_MODEL, "--data-root", tmp_path / "world", "--workers", "0",
                     "--unseen-names", names, program="eval.py")
        mIoU_U = re.search(r"^CLIP-RC .* ([\d.]+)$", result.stdout, re.M)[1]
        assert least <= float(mIoU_U) < most, result.stdout


def test_windows_that_leave_gaps_are_refused():
    flags = ("--untrained", "--dataset", "toy", "--stride", "65")
    assert "--stride 65" in refused(*flags, program="eval.py")


@pytest.mark.parametrize("name, none", [("toy", 255), ("voc", 0)])
def test_images_show_every_pixels_class_from_a_threshold_that_they_name(
        name, none, tmp_path, monkeypatch):
    miniature.picture(tmp_path / "a.png")
    miniature.mask(tmp_path / "a_mask.png", [255, 0, 0, 255])
    dataset = data.Dataset(name, ("road", "car"), (), ("a {}",), [
        (tmp_path / "a.png", tmp_path / "a_mask.png")], np.arange(256, dtype=np.uint8))
    scores = torch.tensor([[0.5, 0.5, 0.05, 0.05], [0.4, 0.4, 0.01, 0.01]])  # road wins everywhere
    scores = scores.repeat_interleave(15, 1)[:, None].expand(2, 40, 60)
    painted, headers, scored = [], [], []
    monkeypatch.setattr(eval, "slide_inference", lambda *_: scores)
    monkeypatch.setattr(draw, "label_image", lambda _, label, *more: painted.append(label))
    monkeypatch.setattr(draw, "right_and_wrong", lambda _, *found: scored.append(found))
    monkeypatch.setattr(draw, "grid", lambda rows, names, *_: headers.append(names))
    network = CLIPRC(make_clip().visual, regions=0, ram=False, rdl=False)
    eval.result_images(network, (MaskCLIP(network.encoder.visual), None), dataset,
                       torch.randn(2, 32), 64, 53, 0.0, ())
    truth, baseline, ours = (label[0, ::15].tolist() for label in painted)
    assert truth == [255, 0, 0, 255] and baseline == [0] * 4 and ours == [0, 0, none, none]
    assert headers[0][3] == "ZegCLIP" + " above 0.1" * (name == "toy")
    assert [array[0, ::15].tolist() for array in scored[0][:2]] == [[0] * 4, truth]


@pytest.mark.parametrize("regions, ram, name", [
    (1, True, "CLIP-RC"), (0, False, "ZegCLIP"), (1, False, "ZegCLIP with RLB")])
def test_a_model_is_called_what_table_5_calls_it(regions, ram, name):
    assert method_name(CLIPRC(make_clip().visual, regions=regions, ram=ram, rdl=False)) == name


def test_background_is_where_no_class_scores_enough_and_counts_among_the_seen(tmp_path):
    root = miniature.voc(tmp_path)
    flags = ["--untrained", "--dataset", "voc", "--data-root", root, "--clip", TOY_CLIP,
             "--crop-size", "64", "--workers", "0"]
    every, none = (run(*flags, "--background", threshold, program="eval.py").stdout
                   for threshold in ("1.0", "0.0"))
    assert len(every.split("\n\n")[0].splitlines()) >= 1 + 21
    background = re.search(r"^  background +([\d.]+) +([\d.]+) +([\d.]+)", every, re.M)
    assert background[2] == "100.0" and float(background[1]) > 10
    assert background[3] == "25.0"  # of five stripes, one without a label
    assert re.search(r"^  background +0.0 +0.0", none, re.M)


def test_the_most_frequent_mistakes_are_named():
    line = mistakes_line(torch.tensor([[80, 5, 0], [0, 9, 1], [3, 0, 2]]), ["a", "b", "c"])
    assert line.endswith(": a for b 5.0%, c for a 3.0%, b for c 1.0%")
