"""Sec. 4.3: windows, confusion, metrics, against counting by hand and against the released code."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import convert
import data
import eval
from eval import (class_iou, class_table, confusion_matrix, paper_table, slide_images, slide_inference, window_corners,
                  zero_shot_metrics)


def lowering(golden: dict) -> tuple[float, list[int]]:
    return (0.0 if golden["config"].get("self_training") else 0.1), golden["config"]["seen"]


def test_scores_equal_the_released_codes(golden):
    network = convert.from_released(golden["state_dict"])
    for image, expected in zip(golden["images"], golden["scores"]):
        scores = slide_inference(network, image, golden["text"], 64, 53, *lowering(golden))
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


def test_sliding_window_scores_equal_the_released_codes(golden):
    if "slide" not in golden:
        pytest.skip("not recorded for ZegCLIP")
    scores = slide_inference(convert.from_released(golden["state_dict"]), golden["slide"]["image"], golden["text"],
                             64, golden["config"]["stride"], *lowering(golden))
    scores = F.interpolate(scores[None], size=tuple(golden["slide"]["ori_shape"]), mode="bilinear", align_corners=False)
    torch.testing.assert_close(scores, golden["slide"]["scores"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("size, crop, stride, expected", [(512, 512, 426, [0]), (513, 512, 426, [0, 1]),
                                                          (938, 512, 426, [0, 426]), (939, 512, 426, [0, 426, 427]),
                                                          (10, 4, 3, [0, 3, 6]), (11, 4, 3, [0, 3, 6, 7])])
def test_windows_cover_the_image_and_end_at_its_border(size, crop, stride, expected):
    assert [left for _, left in window_corners(crop, size, crop, stride)] == expected
    assert [top for top, _ in window_corners(size, crop, crop, stride)] == expected


class PixelModel:
    """In the network's place: logits that are functions of the pixel alone, so that windows must not matter."""

    def __call__(self, images: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bdhw,cd->bchw", images, text)


def test_overlapping_windows_are_averaged_and_seen_scores_lowered():
    text = torch.randn(4, 3)
    for height, width in ((20, 31), (16, 16), (9, 40), (5, 7)):  # also smaller than a window
        image = torch.randn(3, height, width)
        expected = torch.einsum("dhw,cd->chw", image, text).sigmoid()
        expected[[1, 3]] -= 0.25
        scores = slide_inference(PixelModel(), image, text, 16, 13, 0.25, (1, 3))
        torch.testing.assert_close(scores, expected)


def test_windows_of_several_images_share_batches_and_come_back_in_order():
    text, images = torch.randn(2, 3), [torch.randn(3, 16 + 5 * i, 60 - 7 * i) for i in range(7)]
    together = list(slide_images(PixelModel(), images, text, 16, 13))
    assert len(together) == 7
    for scores, image in zip(together, images):
        torch.testing.assert_close(scores, slide_inference(PixelModel(), image, text, 16, 13))


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
    label[0, 0] = 7
    with pytest.raises(ValueError, match="neither one of 5 classes nor 255"):
        confusion_matrix(prediction, label, 5)


def test_metrics_are_the_definitions():
    #                          predicted 0   1   2   3          class 3: neither labelled nor predicted
    confusion = torch.tensor([[50, 10, 0, 0], [0, 20, 20, 0], [5, 5, 30, 0], [0, 0, 0, 0]])
    iou = [50 / (50 + 10 + 5), 20 / (20 + 20 + 15), 30 / (30 + 10 + 20), math.nan]
    torch.testing.assert_close(class_iou(confusion), torch.tensor(iou, dtype=torch.float64), equal_nan=True)
    metrics = zero_shot_metrics(confusion, unseen=[2, 3])
    S, U = 100 * (iou[0] + iou[1]) / 2, 100 * iou[2]
    expected = {"pAcc": 100 * 100 / 140, "mIoU_S": S, "mIoU_U": U, "hIoU": 2 * S * U / (S + U),
                "mAcc": 100 * (50 / 60 + 20 / 40 + 30 / 40) / 3}
    assert metrics == pytest.approx(expected)


def test_a_mean_over_no_class_is_nan_and_printed_as_a_dash():
    metrics = zero_shot_metrics(torch.eye(3, dtype=torch.int64), unseen=[])
    assert math.isnan(metrics["mIoU_U"]) and math.isnan(metrics["hIoU"]) and metrics["mIoU_S"] == 100
    assert paper_table({"x": metrics}).splitlines()[1].split() == ["x", "100.0", "-", "100.0", "-"]
    assert zero_shot_metrics(torch.tensor([[0, 1], [1, 0]]), unseen=[1])["hIoU"] == 0


def test_class_table_marks_unseen_classes():
    table = class_table(torch.tensor([[3, 1], [0, 0]]), ["cat", "sofa"], unseen=[1]).splitlines()
    assert table[1].split() == ["cat", "75.0", "75.0", "100.0%"] and table[2].split() == ["*", "sofa", "0.0", "-", "0.0%"]
    marked = class_table(torch.eye(3), ["red mat", "blue mat", "green rug"], unseen=[1, 2], new=[2]).splitlines()
    assert [line[:2] for line in marked[1:]] == ["  ", "* ", "**", "**"] and "no training mask" in marked[-1]


def test_the_result_pictures_outline_what_was_predicted_not_the_truth(tmp_path, monkeypatch):
    label = np.full((64, 64), 255, np.uint8)
    label[16:48, 16:48] = 1
    Image.new("RGB", (64, 64), (90, 90, 90)).save(tmp_path / "a.png")
    Image.fromarray(label).save(tmp_path / "a_mask.png")
    dataset = data.Dataset("folder", ("floor", "rug"), (1,), (), [(tmp_path / "a.png", tmp_path / "a_mask.png")],
                           np.arange(256, dtype=np.uint8))
    everywhere_a_rug = torch.tensor([0.0, 1.0])[:, None, None].expand(2, 64, 64)
    monkeypatch.setattr(eval, "slide_inference", lambda *_: everywhere_a_rug)
    model = SimpleNamespace(encoder=SimpleNamespace(region_grid=0))
    sheet = np.asarray(eval.result_pictures(model, None, dataset, torch.eye(2), 64, 53, 0.1, [0])["results.png"])
    top = next(y for y in range(len(sheet)) if tuple(sheet[y, 20]) == (90, 90, 90))  # under the captions
    colours = [len(np.unique(sheet[top:top + 224, x:x + 224].reshape(-1, 3), axis=0)) for x in range(12, 900, 230)]
    assert colours[:3] == [1, 2, 2]  # the picture; a rug, in full and faint, and no line between
    assert colours[3] > 2  # the truth's rug has its outline
