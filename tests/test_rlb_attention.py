"""Sec. 3.2: who attends to whom, and what of the encoder is trained."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_clip, run
from PIL import Image

from model import CLIPRC
from rlb_attention import Encoder, first_input, masked_attention, region_mask


def drawn(rows: str) -> torch.Tensor:
    rows = [row.split()[0] for row in rows.strip().splitlines()]
    return torch.tensor([[entry == "x" for entry in row] for row in rows])


def test_mask_is_figure_5s_example_entry_by_entry():
    # Columns: cls, 2 prompts, 4 x 4 patches in raster order, 2 x 2 regions.
    expected = drawn("""
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
        .............xx..xx...x
    """)
    mask = region_mask(2, 4, 2)
    assert mask.dtype == torch.bool and torch.equal(mask, expected)


@pytest.mark.parametrize("num_prompts, grid, region_grid",
                         [(0, 4, 2), (3, 6, 3), (1, 8, 8), (10, 32, 4), (5, 4, 1), (2, 4, 0)])
def test_mask_follows_the_rules_token_by_token(num_prompts, grid, region_grid):
    places = [(y, x) for y in range(grid) for x in range(grid)]
    kinds = ["cls"] + ["prompt"] * num_prompts + places
    first_region, cell = len(kinds), grid // max(region_grid, 1)
    mask = region_mask(num_prompts, grid, region_grid)
    assert mask.shape == (first_region + region_grid**2,) * 2
    assert mask[:first_region, :first_region].all()
    for region in range(region_grid**2):
        own = [isinstance(kind, tuple) and kind[0] // cell * region_grid + kind[1] // cell == region
               for kind in kinds]
        itself = [other == region for other in range(region_grid**2)]
        assert mask[first_region + region].tolist() == own + itself
        assert mask[:, first_region + region].tolist() == own + itself


def test_cells_of_a_wide_image_are_wide():
    mask = region_mask(0, (2, 4), 2)  # a cell is one row of two patches
    cells = [row.nonzero().flatten().tolist() for row in mask[9:, 1:9]]
    assert cells == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_regions_that_do_not_divide_the_grid_are_refused():
    with pytest.raises(ValueError, match="3 x 3.*4 x 4"):
        region_mask(1, 4, 3)
    with pytest.raises(ValueError, match="5 is not a square"):
        Encoder(make_clip().visual, regions=5)


def test_masked_attention_is_equation_2_head_by_head():
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(24, 3, batch_first=True).double()
    X, mask = torch.randn(2, 23, 24, dtype=torch.float64), region_mask(2, 4, 2)
    weights = zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3))
    Q, K, V = (F.linear(X, weight, bias).view(2, 23, 3, 8) for weight, bias in weights)
    heads = torch.zeros(2, 23, 3, 8, dtype=torch.float64)
    for head in range(3):
        scores = Q[:, :, head] @ K[:, :, head].transpose(1, 2) / math.sqrt(8)
        scores = scores + torch.where(mask, 0.0, -math.inf)
        heads[:, :, head] = scores.softmax(-1) @ V[:, :, head]
    expected = attention.out_proj(heads.flatten(2))
    torch.testing.assert_close(masked_attention(X, attention, mask), expected)


def test_region_token_sees_only_its_own_cell():
    # One layer: in two, what a patch read from its neighbours would reach the region through it.
    encoder = Encoder(make_clip(layers=1).visual, num_prompts=3, regions=4).eval()
    image, other = (torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
                    for seed in (0, 1))
    G, I, R = encoder(image)
    for region in range(4):
        top, left = region // 2 * 32, region % 2 * 32
        changed = other.clone()
        changed[..., top:top + 32, left:left + 32] = image[..., top:top + 32, left:left + 32]
        G_changed, _, R_changed = encoder(changed)
        assert torch.equal(R_changed[:, region], R[:, region])
        assert all((R_changed[:, i] - R[:, i]).abs().max() > 1e-3 for i in range(4) if i != region)
        assert (G_changed - G).abs().max() > 1e-3


def test_each_layer_has_prompts_of_its_own():
    encoder = Encoder(make_clip().visual, num_prompts=3, regions=4).eval()
    image = torch.randn(1, 3, 64, 64)
    _, before, _ = encoder(image)
    for layer in range(2):
        with torch.no_grad():
            encoder.prompts[layer] += 1
        _, after, _ = encoder(image)
        assert (after - before).abs().max() > 1e-4
        before = after


def test_without_prompts_and_regions_the_encoder_is_clip_itself():
    clip_model = make_clip()
    encoder = Encoder(clip_model.visual, num_prompts=0, regions=0, class_embedding_twice=False)
    encoder.prompt_norm = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    expected = F.normalize(clip_model.encode_image(images), dim=-1)
    torch.testing.assert_close(encoder.eval()(images)[0], expected)


def test_features_have_the_papers_shapes_and_unit_length():
    encoder = Encoder(make_clip().visual, num_prompts=3, regions=16)
    for height, width in ((64, 64), (128, 192)):  # positions are resized to any grid
        features = encoder(torch.randn(2, 3, height, width))
        N = height * width // 256
        assert [tuple(f.shape) for f in features] == [(2, 32), (2, N, 32), (2, 16, 32)]
        for feature in features:
            torch.testing.assert_close(feature.norm(dim=-1), torch.ones(feature.shape[:-1]))
    with pytest.raises(ValueError, match="65 x 64.*16-pixel"):
        encoder(torch.randn(1, 3, 64, 65))


def test_clips_positions_are_stretched_over_a_grid_of_another_size():
    visual = make_clip().visual  # its own grid is 4 x 4
    images, none = torch.randn(2, 3, 96, 128), torch.empty(2, 0, 64)
    position = visual.positional_embedding[1:].T.reshape(1, 64, 4, 4)
    position = F.interpolate(position, (6, 8), mode="bilinear", align_corners=False)
    expected = visual.ln_pre((visual.conv1(images) + position).flatten(2).transpose(1, 2))
    torch.testing.assert_close(first_input(visual, images, none, none[0], True)[:, 1:], expected)


def test_prompt_dropout_differs_from_image_to_image():
    encoder = Encoder(make_clip().visual, num_prompts=3, regions=4, dropout=0.5)
    G, _, _ = encoder(torch.randn(1, 3, 64, 64).repeat(2, 1, 1, 1))
    assert (G[0] - G[1]).abs().max() > 1e-3


@pytest.mark.parametrize("update_regions", [False, True])
def test_clip_and_regions_stay_frozen_and_the_rest_trains(update_regions):
    network = CLIPRC(make_clip().visual, num_prompts=3, regions=4, update_regions=update_regions)
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    text = F.normalize(torch.randn(5, 32), dim=-1)
    labels = torch.randint(5, (2, 64, 64))
    sum(network.losses(torch.randn(2, 3, 64, 64), labels, text).values()).backward()
    optimizer.step()
    for name, parameter in network.named_parameters():
        frozen = "encoder.visual." in name or name == "encoder.region_tokens" and not update_regions
        assert parameter.requires_grad != frozen, name
        assert torch.equal(parameter, before[name]) == frozen, name


def test_prompts_and_region_tokens_start_as_published():
    encoder = Encoder(make_clip().visual, num_prompts=50, regions=4)
    bound = math.sqrt(6 / (3 * 16**2 + 64))
    assert encoder.prompts.shape == (2, 50, 64)
    assert 0.98 * bound < encoder.prompts.abs().max() <= bound
    assert encoder.prompt_proj.weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.1)
    once = encoder.visual.class_embedding + encoder.visual.positional_embedding[0]
    assert torch.equal(encoder.region_tokens, once.expand(4, -1))


def test_running_the_file_draws_the_mask(tmp_path):
    result = run("--prompts", "1", "--out", tmp_path / "mask.png", program="rlb_attention.py")
    assert result.returncode == 0 and "22 x 22 mask" in result.stdout, result.stderr
    assert Image.open(tmp_path / "mask.png").width > 100


def test_each_equation_is_found_at_one_line_of_code():
    code = []  # of the five files, without docstrings and comment lines
    for name in ("rlb_attention", "model", "data", "train", "eval"):
        text = re.sub(r'"""[\s\S]*?"""', "", (ROOT / f"{name}.py").read_text())
        code += [line for line in text.splitlines() if not line.strip().startswith("#")]
    for number in range(1, 13):
        lines = [line for line in code if re.search(rf"Eq\. {number}\b(?!-)", line)]
        assert len(lines) == 1, (number, lines)
