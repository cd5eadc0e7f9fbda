"""Table 6's arithmetic, and that the benchmarks measure what they say."""

import pytest
import torch.nn.functional as F
from conftest import make_clip

import bench
import data
import model


@pytest.mark.parametrize("regions, paper", bench.PAPER_GFLOPS.items())
def test_multiply_adds_are_table_6s_less_what_is_saved(regions, paper):
    assert 0.97 * paper < bench.multiply_adds(bench.forward_case, regions) < paper


def test_a_training_step_computes_no_gradient_of_frozen_weights():
    forward, step = (bench.multiply_adds(case, 16, size=128) for case in (bench.forward_case, bench.training_case))
    assert 2 < step / forward < 2.7  # three times as much if every weight were trained


def test_what_is_replaced_by_the_equations_as_written_comes_back():
    before = F.scaled_dot_product_attention, model.RegionAlignment.forward, model.CLIPRC.decode, model.segmentation_losses
    with pytest.raises(ZeroDivisionError), bench.as_written():
        assert F.scaled_dot_product_attention is bench.attention_as_written
        1 / 0
    assert before == (F.scaled_dot_product_attention, model.RegionAlignment.forward, model.CLIPRC.decode,
                      model.segmentation_losses)


@pytest.mark.parametrize("case", [bench.forward_case, bench.training_case])
def test_times_are_taken_of_each_form_in_each_round(case, monkeypatch):
    small = make_clip().visual
    monkeypatch.setattr(bench, "vit_b16", lambda regions, **settings: model.CLIPRC(small, regions=regions, **settings))
    literal = []

    def seconds(work, device) -> int:
        literal.append(F.scaled_dot_product_attention is bench.attention_as_written)
        work()
        return len(literal)

    monkeypatch.setattr(bench, "seconds", seconds)
    assert bench.times_in_turn(case, 4, 1, "cpu", 64, 2, False) == [[4, 5, 6], [7, 8, 9]]  # the first round is left out
    assert literal == [True, False, False] * 3


def test_made_up_photographs_are_read_as_vocs_are(tmp_path):
    bench.write_photos(tmp_path / "voc", 2)
    image, label = data.read_pair(data.open_dataset("voc", tmp_path / "voc", "train"), 1)
    assert image.size == (500, 375) and len(set(label.ravel().tolist())) > 2
    assert 60_000 < (tmp_path / "voc/JPEGImages/1.jpg").stat().st_size < 120_000
