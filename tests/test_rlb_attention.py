"""Sec. 3.2: who attends to whom, and what of the encoder is trained."""

import math

import pytest
import torch
from conftest import make_clip

import bench
import rlb_attention
from model import CLIPRC
from rlb_attention import Encoder, attend, attend_unmasked, draw_mask, masked_attention, region_mask


def drawn(rows: str) -> torch.Tensor:
    return torch.tensor([[entry == "x" for entry in row.split()[0]] for row in rows.strip().splitlines()])


def test_mask_is_figure_5s_example_entry_by_entry():
    # 4x4 patches, 2x2 regions, two prompts; columns: cls, 2 prompts, 16 patches in raster order, 4 regions
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
        ...xx..xx..........x...   region 0: the upper left 2x2 patches and itself
        .....xx..xx.........x..
        ...........xx..xx....x.
        .............xx..xx...x
    """)
    mask = region_mask(2, 4, 2)
    assert mask.dtype == torch.bool and torch.equal(mask, expected)


@pytest.mark.parametrize("num_prompts, grid, region_grid", [(0, 4, 2), (3, 6, 3), (1, 8, 8), (10, 32, 4), (5, 4, 1)])
def test_mask_says_the_same_as_the_rules_token_by_token(num_prompts, grid, region_grid):
    kinds = ["cls"] + ["prompt"] * num_prompts + [(y, x) for y in range(grid) for x in range(grid)]
    first_region, cell = len(kinds), grid // region_grid
    mask = region_mask(num_prompts, grid, region_grid)
    assert mask.shape == (first_region + region_grid**2,) * 2
    assert mask[:first_region, :first_region].all()
    for region in range(region_grid**2):
        own = [isinstance(kind, tuple) and kind[0] // cell * region_grid + kind[1] // cell == region for kind in kinds]
        itself = [other == region for other in range(region_grid**2)]
        assert mask[first_region + region].tolist() == own + itself
        assert mask[:, first_region + region].tolist() == own + itself


def test_mask_of_a_wide_image_has_wide_cells():
    mask = region_mask(0, (2, 4), 2)  # one row of two patches a cell
    assert [row.nonzero().flatten().tolist() for row in mask[9:, 1:9]] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_regions_that_do_not_divide_the_grid_are_refused():
    with pytest.raises(ValueError, match="3x3.*4x4"):
        region_mask(1, 4, 3)
    with pytest.raises(ValueError, match="5 is not a square"):
        Encoder(make_clip().visual, regions=5)


def test_masked_attention_is_equation_2():
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(24, 3, batch_first=True).double()
    x, mask = torch.randn(2, 23, 24, dtype=torch.float64), region_mask(2, 4, 2)
    q, k, v = (torch.nn.functional.linear(x, weight, bias).view(2, 23, 3, 8) for weight, bias in
               zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)))
    out = torch.zeros(2, 23, 3, 8, dtype=torch.float64)
    for head in range(3):
        scores = q[:, :, head] @ k[:, :, head].transpose(1, 2) / math.sqrt(8)
        scores = scores + torch.where(mask, 0.0, -math.inf)
        out[:, :, head] = scores.softmax(-1) @ v[:, :, head]
    torch.testing.assert_close(masked_attention(x, attention, mask), attention.out_proj(out.flatten(2)))


@pytest.mark.parametrize("masked", [True, False])
def test_attention_in_bfloat16_without_gradients_is_equation_2(masked, monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 16) for length in (1030, 600, 600))  # three parts of rows, the last not full
    k += 10 * torch.randn(16)  # what all keys share moves all scores of a row, which means nothing, but costs digits
    mask = torch.rand(1030, 600) < 0.3 if masked else None
    q, k, v = (heads.bfloat16() for heads in (q, k, v))
    expected = bench.attention_as_written(q.float(), k.float(), v.float(), mask)
    by_pytorch = attend(q, k, v, mask)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)  # not asked
    with torch.no_grad():
        by_heads = attend(q, k, v, mask)
    for ours in (by_pytorch, by_heads):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("num_prompts, grid, region_grid", [(2, 4, 2), (0, 4, 4), (5, (4, 6), 2), (1, (2, 3), 1), (3, 24, 12)])
@pytest.mark.parametrize("dtype, spread, tolerance", [
    (torch.float32, 1, 1e-6), (torch.bfloat16, 1, 0.005),
    (torch.float32, 30, 1e-6), (torch.bfloat16, 30, 0.03)])  # a region token may get all of a patch's attention, or none
def test_attention_without_the_masked_scores_is_equation_2(num_prompts, grid, region_grid, dtype, spread, tolerance):
    torch.manual_seed(0)
    mask = region_mask(num_prompts, grid, region_grid)
    q, k, v = (torch.randn(2, len(mask), 3, 16).transpose(1, 2) for _ in range(3))
    q, k, v = q.to(dtype), (spread * k).to(dtype), v.to(dtype)
    expected = bench.attention_as_written(q.double(), k.double(), v.double(), mask)
    with torch.no_grad():
        ours = attend_unmasked(q, k, v, mask, region_grid**2)
    assert ours.dtype == dtype and ours.shape == q.shape
    assert (ours - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_many_regions_give_the_same_features_with_gradients_without_and_as_written(dtype, tolerance, monkeypatch):
    encoder = Encoder(make_clip().visual, num_prompts=3, regions=256).eval()
    images = torch.randn(2, 3, 256, 256)
    expected = encoder(images)
    calls = []
    monkeypatch.setattr(rlb_attention, "attend_unmasked", lambda *args: calls.append(1) or attend_unmasked(*args))
    with torch.no_grad(), bench.as_written():
        as_written = encoder(images)
    assert not calls
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours = encoder(images)
    assert len(calls) == len(encoder.prompts)  # once a layer
    for ours_, literal, right in zip(ours, as_written, expected):
        assert (ours_ - right).norm() < tolerance * right.norm()
        torch.testing.assert_close(literal, right)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_by_blocks_is_attention_under_the_mask():
    encoder = Encoder(make_clip().visual, num_prompts=3, regions=4).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        dense = encoder(images)
        encoder.block_sparse = True  # its gradient exists on GPUs only
        by_blocks = encoder(images)
    for ours, expected in zip(by_blocks, dense):
        torch.testing.assert_close(ours, expected)


def test_region_token_sees_only_its_own_cell():
    # one layer: in two, what a patch read from its neighbours would reach the region through it
    encoder = Encoder(make_clip(layers=1).visual, num_prompts=3, regions=4).eval()
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    other = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    G, I, R = encoder(image)
    for region in range(4):
        top, left = region // 2 * 32, region % 2 * 32
        changed = other.clone()
        changed[..., top:top + 32, left:left + 32] = image[..., top:top + 32, left:left + 32]
        G_changed, _, R_changed = encoder(changed)
        assert torch.equal(R_changed[:, region], R[:, region])
        assert all((R_changed[:, i] - R[:, i]).abs().max() > 1e-3 for i in range(4) if i != region)
        assert (G_changed - G).abs().max() > 1e-3


def test_without_prompts_and_regions_the_encoder_is_clip_itself():
    clip_model = make_clip()
    encoder = Encoder(clip_model.visual, num_prompts=0, regions=0, class_embedding_twice=False).eval()
    encoder.prompt_norm = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    expected = torch.nn.functional.normalize(clip_model.encode_image(images), dim=-1)
    torch.testing.assert_close(encoder(images)[0], expected)


def test_features_have_the_papers_shapes_and_unit_length():
    encoder = Encoder(make_clip().visual, num_prompts=3, regions=16)
    for height, width in ((64, 64), (128, 192)):  # positions are resized to other grids, square or not
        features = encoder(torch.randn(2, 3, height, width))
        assert [tuple(f.shape) for f in features] == [(2, 32), (2, height * width // 256, 32), (2, 16, 32)]
        for feature in features:
            torch.testing.assert_close(feature.norm(dim=-1), torch.ones(feature.shape[:-1]))
    with pytest.raises(ValueError, match="65x64.*16-pixel patches"):
        encoder(torch.randn(1, 3, 64, 65))


@pytest.mark.parametrize("update_regions", [False, True])
def test_clip_and_regions_stay_frozen_and_the_rest_trains(update_regions):
    network = CLIPRC(make_clip().visual, num_prompts=3, regions=4, update_regions=update_regions)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    text = torch.nn.functional.normalize(torch.randn(5, 32), dim=-1)
    sum(network.losses(torch.randn(2, 3, 64, 64), torch.randint(5, (2, 64, 64)), text).values()).backward()
    optimizer.step()
    for name, parameter in network.named_parameters():
        frozen = name.startswith("encoder.visual.") or name == "encoder.regions" and not update_regions
        assert (name not in trained) == frozen
        if frozen:
            assert parameter.grad is None and torch.equal(parameter, before[name])
        elif name.endswith("attention.k.bias"):
            assert not parameter.grad.any(), name  # the softmax undoes a shift of all its scores
        else:
            assert parameter.grad.any() and not torch.equal(parameter, before[name]), name


def test_prompts_start_as_published():
    encoder = Encoder(make_clip().visual, num_prompts=50, regions=4)
    bound = math.sqrt(6 / (3 * 16**2 + 64))
    assert encoder.prompts.shape == (2, 50, 64)
    assert 0.98 * bound < encoder.prompts.abs().max() <= bound
    assert encoder.prompt_proj.weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.1)
    clip_start = encoder.visual.class_embedding + encoder.visual.positional_embedding[0]
    assert torch.equal(encoder.regions, clip_start.expand(4, -1))


def test_drawing_shows_the_mask():
    picture = draw_mask(2, 4, 2, cell=10)
    assert picture.getpixel((78 + 5, 78 + 5)) != (255, 255, 255)  # cls attends to itself
    assert picture.getpixel((78 + 225, 78 + 5)) == (255, 255, 255)  # cls does not attend to the last region
