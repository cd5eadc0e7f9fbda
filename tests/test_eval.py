"""Sec. 4.3: windows, confusion matrix and metrics, counted by hand and by the released code."""

import math
import re

import miniature
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_clip, recorded, run
from PIL import Image

import data
from eval import (MaskCLIP, class_iou, class_table, confusion_matrix, evaluate, label_map,
                  paper_table, slide_inference, window_corners, zero_shot_metrics)
from tools.convert import from_released
from util import toy
from util.checkpoint import TOY_MODEL


@pytest.mark.parametrize("setting, lower", [("inductive", 0.1), ("transductive", 0.0)])
def test_scores_and_labels_equal_the_released_codes_from_a_threshold_on(setting, lower):
    golden = recorded(f"clip_rc_{setting}")
    slide, c, network = golden["slide"], golden["config"], from_released(golden["state_dict"])
    scores = slide_inference(network, slide["image"], golden["text"], 64, c["stride"])
    resized = F.interpolate(scores[None], tuple(slide["ori_shape"]), mode="bilinear")
    resized[:, c["seen"]] -= lower  # the released code's are lowered
    torch.testing.assert_close(resized, slide["scores"], atol=1e-5, rtol=0)
    threshold = resized.amax(1).median().item()
    labels, best = label_map(scores, slide["ori_shape"], c["seen"], lower, threshold)
    torch.testing.assert_close(best, resized[0].amax(0))
    theirs = slide["scores"][0].argmax(0).where(best >= threshold, 255)
    assert (labels == theirs).float().mean() > 0.999
    labels, _ = label_map(scores - 2, slide["ori_shape"], c["seen"], lower)  # all are below 0
    assert (labels != slide["scores"][0].argmax(0)).float().mean() < 0.001


def test_windows_end_at_the_images_border_are_averaged_and_share_batches_of_eight():
    for size, expected in ((512, [0]), (513, [0, 1]), (938, [0, 426]), (939, [0, 426, 427])):
        assert [left for _, left in window_corners(512, size, 512, 426)] == expected
        assert [top for top, _ in window_corners(size, 512, 512, 426)] == expected
    text, sizes = torch.randn(4, 3), []
    def network(images, text):  # looks at each pixel alone, so windows must not matter
        sizes.append(len(images))
        return torch.einsum("bdhw,cd->bchw", images, text)
    for height, width in ((5, 7), (9, 40), (16, 16 + 9 * 13)):  # less than a window, and ten
        image = torch.randn(3, height, width)
        expected = torch.einsum("dhw,cd->chw", image, text).sigmoid()
        torch.testing.assert_close(slide_inference(network, image, text, 16), expected)
    assert sizes[-2:] == [8, 2]


def test_confusion_matrix_counts_label_rows_and_prediction_columns():
    label, prediction = torch.randint(5, (9, 11)), torch.randint(5, (9, 11))
    label[torch.rand(9, 11) < 0.3] = 255
    counted = [[((label == t) & (prediction == p)).sum() for p in range(5)] for t in range(5)]
    for kind in (torch.int64, torch.uint8):
        ours = confusion_matrix(prediction.to(kind), label.to(kind), 5)
        assert torch.equal(ours, torch.tensor(counted))
    with pytest.raises(ValueError, match="neither one of 5 classes"):
        confusion_matrix(torch.tensor([0, 7]), torch.tensor([1, 0]), 5)


def test_metrics_are_the_definitions_and_hiou_is_equation_12():
    # Class 3 is neither labelled nor predicted.
    confusion = torch.tensor([[50, 10, 0, 0], [0, 20, 20, 0], [5, 5, 30, 0], [0, 0, 0, 0]])
    iou = [50 / (50 + 10 + 5), 20 / (20 + 20 + 15), 30 / (30 + 10 + 20), math.nan]
    assert class_iou(confusion).tolist() == pytest.approx(iou, nan_ok=True)
    metrics = zero_shot_metrics(confusion, unseen=[2, 3])
    S, U = 100 * (iou[0] + iou[1]) / 2, 100 * iou[2]
    assert metrics == pytest.approx({
        "pAcc": 100 * 100 / 140, "mIoU_S": S, "mIoU_U": U, "hIoU": 2 * S * U / (S + U),
        "mAcc": 100 * (50 / 60 + 20 / 40 + 30 / 40) / 3})
    assert zero_shot_metrics(torch.tensor([[0, 1], [1, 0]]), unseen=[1])["hIoU"] == 0


def test_tables_print_a_dash_for_no_class_a_star_for_unseen_and_the_costliest_mistakes():
    row = paper_table({"x": zero_shot_metrics(torch.eye(3), unseen=[])}).splitlines()[1]
    table = class_table(torch.tensor([[80, 5, 0], [0, 0, 0], [3, 0, 12]]), "abc", unseen=[1])
    assert [line.split() for line in (row, *table.splitlines()[1:4])] == [
        ["x", "100.0", "-", "100.0", "-"], ["a", "90.9", "94.1", "85.0%"],
        ["*", "b", "0.0", "-", "0.0%"], ["c", "80.0", "80.0", "15.0%"]]
    assert "a is called b 5.0%, c is called a 3.0%" in table


def test_maskclip_is_clip_whose_last_layer_keeps_each_patchs_own_value():
    visual, images = make_clip().visual, torch.randn(2, 3, 64, 64)
    text, taken = F.normalize(torch.randn(5, 32), dim=-1), []
    block = visual.transformer.resblocks[-1]
    block.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    visual(images)
    X = block.ln_1(taken[0].transpose(0, 1))  # (B, 1 + N, D_v): what enters the last layer
    V = X @ block.attn.in_proj_weight[2 * 64:].T + block.attn.in_proj_bias[2 * 64:]
    I = visual.ln_post(block.attn.out_proj(V)[:, 1:]) @ visual.proj
    cosines = F.cosine_similarity(text[None, :, None], I[:, None], dim=-1)  # (B, C, N)
    expected = F.interpolate(cosines.unflatten(-1, (4, 4)), (64, 64), mode="bilinear")
    torch.testing.assert_close(MaskCLIP(visual)(images, text), expected)


def test_every_labelled_pixel_counts_and_each_image_has_a_file(tmp_path):
    miniature.folder(tmp_path)
    for seed, file in enumerate(("b.png", "seq/b.png")):
        miniature.picture(tmp_path / "images" / file, seed=seed)
        miniature.mask(tmp_path / "masks" / file, [0, 1, 2, 255])
    (tmp_path / "val.txt").write_text("b\nseq/b")
    dataset = data.open_dataset("folder", tmp_path, "val")
    network, text, total = MaskCLIP(make_clip().visual).train(), torch.randn(3, 32), 0
    confusion = evaluate(network, dataset, text, 64, 53, 0.1, [0], save=tmp_path)
    for index, file in enumerate(("b.png", "seq/b.png")):
        image, label, _ = data.test_sample(dataset, 64, index)
        labels, _ = label_map(slide_inference(network, image, text, 64, 53), (40, 60), [0], 0.1)
        assert np.array_equal(Image.open(tmp_path / file), labels)
        total += confusion_matrix(labels, label, 3)
    assert torch.equal(confusion, total) and confusion.sum() == 2 * 40 * 45 and network.training


def test_the_shipped_model_finds_unseen_classes_by_their_names_in_any_order(tmp_path):
    def evaluated(*flags):
        return run(TOY_MODEL, "--data-root", tmp_path, "--workers", "0", *flags,
                   program="eval.py").stdout
    toy.draw_world(tmp_path, train=1, val=30)
    for names, least, most in (("permuted", 0, 5), ("random", 0, 5), ("own", 60, 100)):
        output = evaluated("--unseen-names", names)
        mIoU_U = re.search(r"^CLIP-RC .* ([\d.]+)$", output, re.M)[1]
        assert least <= float(mIoU_U) < most, output
    (tmp_path / "JPEGImages").rename(tmp_path / "images")
    (tmp_path / "ImageSets/Segmentation/val.txt").rename(tmp_path / "val.txt")
    (tmp_path / "masks").mkdir()
    for file in (tmp_path / "SegmentationClass").iterdir():
        mask = 20 - np.array(Image.open(file))  # the classes backwards; the floor is 20
        Image.fromarray(np.where(mask == 20, 255, mask)).save(tmp_path / "masks" / file.name)
    names = "\n".join(toy.CLASS_NAMES[::-1])
    (tmp_path / "classes.txt").write_text(names.upper())
    turned = evaluated("--dataset", "folder").split("\n\n")[1]
    assert turned == output.split("\n\n")[1].replace("toy, 30 images", "folder, 30 images")
    (tmp_path / "classes.txt").write_text(names.replace("plain", "plane"))
    assert "lowered by 0 (other class names" in evaluated("--dataset", "folder")


def test_background_is_where_no_class_scores_enough_and_counts_as_seen(tmp_path, clip_path):
    flags = ["--untrained", "--dataset", "voc", "--data-root", miniature.voc(tmp_path), "--clip",
             clip_path, "--workers", "0"]
    every, none = (run(*flags, "--background", threshold, program="eval.py").stdout
                   for threshold in ("1.0", "0.0"))
    iou, accuracy, share = re.search(r"^  background +(\S+) +(\S+) +(\S+)%", every, re.M).groups()
    assert float(iou) > 10 and (accuracy, share) == ("100.0", "25.0")  # one of 4 labelled stripes
    assert "MaskCLIP, untrained" in none and "lowered by 0 (no training)" in none
