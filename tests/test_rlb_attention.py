"""Sec. 3.2: who attends to whom, Eq. 1-3, and what of the encoder is trained."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_clip, run
from PIL import Image

from model import CLIPRC
from rlb_attention import Encoder, first_input, masked_attention, region_mask


def test_mask_is_figure_5s_example_entry_by_entry_and_cells_of_a_wide_image_are_wide():
    drawing = """  columns: cls, 2 prompts, 4 x 4 patches in raster order, 2 x 2 regions
        xxxxxxxxxxxxxxxxxxx....   cls
        xxxxxxxxxxxxxxxxxxx....   prompt
        xxxxxxxxxxxxxxxxxxx....   prompt
        xxxxxxxxxxxxxxxxxxxx...   patch, row 0, column 0: region 0
        xxxxxxxxxxxxxxxxxxxx...
        xxxxxxxxxxxxxxxxxxx.x..
        xxxxxxxxxxxxxxxxxxx.x..
        xxxxxxxxxxxxxxxxxxxx...   patch, row 1
        xxxxxxxxxxxxxxxxxxxx...
        xxxxxxxxxxxxxxxxxxx.x..
        xxxxxxxxxxxxxxxxxxx.x..
        xxxxxxxxxxxxxxxxxxx..x.   patch, row 2
        xxxxxxxxxxxxxxxxxxx..x.
        xxxxxxxxxxxxxxxxxxx...x
        xxxxxxxxxxxxxxxxxxx...x
        xxxxxxxxxxxxxxxxxxx..x.   patch, row 3
        xxxxxxxxxxxxxxxxxxx..x.
        xxxxxxxxxxxxxxxxxxx...x
        xxxxxxxxxxxxxxxxxxx...x
        ...xx..xx..........x...   region 0: the upper left 2 x 2 patches and itself
        .....xx..xx.........x..
        ...........xx..xx....x.
        .............xx..xx...x"""
    expected = [[entry == "x" for entry in row.split()[0]] for row in drawing.split("\n")[1:]]
    mask = region_mask(num_prompts=2, grid=4, region_grid=2)
    assert mask.dtype == torch.bool and mask.tolist() == expected
    cells = region_mask(0, (2, 4), 2)[9:, 1:9]  # a cell is one row of two patches
    assert [cell.nonzero()[:, 0].tolist() for cell in cells] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_images_that_do_not_split_into_equal_cells_are_refused():
    for regions, width, reason in ((9, 96, "3 x 3 regions do not divide 4 x 6"),
                                   (5, 64, "5 is not a square"), (4, 65, "65 x 64.*16-pixel")):
        with pytest.raises(ValueError, match=reason):
            Encoder(make_clip().visual, regions=regions)(torch.randn(1, 3, 64, width))


@pytest.mark.parametrize("twice", [False, True])
def test_first_input_is_equation_1_on_a_grid_of_any_size(twice):
    visual = make_clip().visual  # its own positions are a grid of 4 x 4
    images, P, R = torch.randn(2, 3, 96, 128), torch.randn(2, 3, 64), torch.randn(4, 64)
    first, grid = visual.positional_embedding[0], visual.positional_embedding[1:]
    position = F.interpolate(grid.T.reshape(1, 64, 4, 4), (6, 8), mode="bilinear")
    G = visual.ln_pre((1 + twice) * visual.class_embedding + first).expand(2, 1, -1)
    I = visual.ln_pre((visual.conv1(images) + position).flatten(2).transpose(1, 2))
    X = torch.cat([G, P, I, visual.ln_pre(R).expand(2, -1, -1)], dim=1)
    torch.testing.assert_close(first_input(visual, images, P, R, twice), X)


def test_masked_attention_is_equation_2_head_by_head():
    attention = torch.nn.MultiheadAttention(24, 3, batch_first=True).double()
    X, mask = torch.randn(2, 23, 24, dtype=torch.float64), region_mask(2, 4, 2)
    weights = zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3))
    Q, K, V = (F.linear(X, weight, bias).chunk(3, dim=-1) for weight, bias in weights)
    heads = []
    for q, k, v in zip(Q, K, V):
        scores = q @ k.transpose(1, 2) / math.sqrt(8) + torch.where(mask, 0.0, -math.inf)
        heads.append(scores.softmax(-1) @ v)
    expected = attention.out_proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(masked_attention(X, attention, mask), expected)


@torch.no_grad()
def test_features_are_the_last_layers_tokens_without_the_prompts_as_in_equation_3():
    encoder, X = Encoder(make_clip().visual, num_prompts=3, regions=4).eval(), []
    visual, norm = encoder.visual, encoder.prompt_norm
    norm.weight *= torch.randn(64)
    last = visual.transformer.resblocks[-1]  # ends with X + mlp(ln_2(X))
    last.ln_2.register_forward_hook(lambda _, inputs, out: X.append(inputs[0]))
    last.mlp.register_forward_hook(lambda _, inputs, out: X.append(X.pop() + out))
    features, (X,) = encoder(torch.randn(2, 3, 64, 96)), X  # 4 x 6 patches
    for ours, tokens in zip(features, (norm(X[:, 0]), norm(X[:, 4:28]), X[:, 28:]), strict=True):
        tokens = visual.ln_post(tokens) @ visual.proj
        torch.testing.assert_close(ours, tokens / tokens.norm(dim=-1, keepdim=True))


def test_prompts_region_tokens_and_layers_start_as_published():
    network = CLIPRC(make_clip().visual, num_prompts=50, regions=4)
    encoder, bound = network.encoder, math.sqrt(6 / (3 * 16**2 + 64))
    assert 0.98 * bound < encoder.prompts.abs().max() <= bound
    assert encoder.prompt_proj.weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.1)
    G = encoder.visual.class_embedding + encoder.visual.positional_embedding[0]
    assert torch.equal(encoder.region_tokens, G.expand(4, -1))
    assert not encoder.region_tokens.requires_grad
    assert Encoder(make_clip().visual, update_regions=True).region_tokens.requires_grad
    for branch in (network.decoder.descriptor_blocks, network.decoder.image_blocks):
        assert len({block.ffn[0].weight.sum().item() for block in branch}) == 1 and len(branch) == 3
    assert network.recovery.image_in.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_running_the_files_of_the_method_draws_the_mask_and_prints_the_parts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "22 tokens; 74% of" in run("--prompts", "1", program="rlb_attention.py").stdout
    assert Image.open("region_mask.png").width > 1000
    assert "(1, 16, 20, 1024)" in run(program="model.py").stdout


def test_each_equation_is_found_at_one_line_of_code():
    files = (ROOT / f"{name}.py" for name in ("rlb_attention", "model", "train", "eval"))
    code = "\n".join(file.read_text() for file in files)
    found = re.findall(r"^ *[^ #].*# Eq\. (\d+)", code, re.M)
    assert sorted(map(int, found)) == [*range(1, 13)]
