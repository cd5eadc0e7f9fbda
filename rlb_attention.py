"""The region-level bridge: CLIP's image encoder with region tokens (the paper's Sec. 3.2, Eq. 1-3, Fig. 4-5).

CLIP's image transformer summarises a picture in one token, [CLS]. CLIP-RC adds M = m x m more tokens like it, each of
which sees only the patches of its own cell of an m x m grid: CLIP's answer for a region, half way between an image and
a pixel. An attention mask is all it takes. The sequence that goes through the transformer is

    X = [ cls | K prompts | N = h x w patches in raster order | M regions in raster order ],   E = 1 + K + N + M tokens

    python rlb_attention.py                     draws the mask of the paper's Fig. 5 (c) to region_mask.png
    python rlb_attention.py --help              other grids, other region counts

Symbols: B images, D_v the encoder's width, D the width of the space that images and text share, L layers.
"""

import argparse
import itertools
import math
import sys
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def may_attend(q: Tensor, k: Tensor, num_prompts: int, grid: tuple[int, int], region_grid: int) -> Tensor:
    """Fig. 5: may the token at position `q` of the sequence attend to the token at position `k`?

    cls, prompts -> cls, prompts, patches      patch -> cls, prompts, patches, the region token of its own cell
    region token -> the patches of its own cell, itself

    q, k: integer tensors of any shapes that broadcast; returns a bool tensor of the broadcast shape. This is the one
    definition of the mask: everything else asks it.
    """
    h, w = grid
    first_patch = 1 + num_prompts
    first_region = first_patch + h * w

    def cell(token: Tensor) -> Tensor:  # the region a patch lies in; a region token's own index (meaningless for others)
        patch = token - first_patch
        cell_of_patch = (patch // w * region_grid // h) * region_grid + patch % w * region_grid // w
        return torch.where(token < first_region, cell_of_patch, token - first_region)

    clip_tokens = (q < first_region) & (k < first_region)  # what CLIP and its prompts do anyway: everyone sees everyone
    same_cell = (q >= first_patch) & (k >= first_patch) & (cell(q) == cell(k))
    return clip_tokens | same_cell


def region_mask(num_prompts: int, grid: int | tuple[int, int], region_grid: int) -> Tensor:
    """Fig. 5 (c): the attention mask, the same in every layer.

    num_prompts: K. grid: patches along a side, or (h, w). region_grid: m = sqrt(M), 0 for none.
    Returns a bool tensor (E, E); entry [q, k] is True where q may attend to k.
    Raises ValueError where m does not divide the grid.
    """
    h, w = (grid, grid) if isinstance(grid, int) else grid
    if region_grid and (h % region_grid or w % region_grid):
        raise ValueError(f"regions: a {region_grid}x{region_grid} grid of region tokens does not divide the {h}x{w} "
                         f"patches into equal cells; choose another --regions or --crop-size")
    position = torch.arange(1 + num_prompts + h * w + region_grid**2)
    return may_attend(position[:, None], position[None, :], num_prompts, (h, w), region_grid)


@lru_cache(maxsize=8)
def attention_mask(num_prompts: int, grid: tuple[int, int], region_grid: int, device: torch.device,
                   block_sparse: bool) -> Tensor | BlockMask:
    """Fig. 5 (c) as the attention wants it: `region_mask` on a device, or the same as blocks of 128 x 128 entries, of
    which `flex_attention` skips those that mask everything: with many regions, most."""
    mask = region_mask(num_prompts, grid, region_grid)
    if not block_sparse:
        return mask.to(device)
    return create_block_mask(lambda batch, head, q, k: may_attend(q, k, num_prompts, grid, region_grid), None, None,
                             *mask.shape, device=device)


def masked_attention(x: Tensor, attention: nn.MultiheadAttention, mask: Tensor | BlockMask | None,
                     num_regions: int = 0) -> Tensor:
    """Eq. 2: softmax(Q K^T / sqrt(d) + Mask) V over several heads, with the weights of CLIP's own attention layer.

    x: (B, E, D_v). mask: `region_mask`'s (E, E), or a BlockMask that says the same; None: no restriction. num_regions: M,
    the last tokens of the sequence. Returns (B, E, D_v).
    """
    q, k, v = (F.linear(x, attention.in_proj_weight, attention.in_proj_bias)  # (B, E, 3 D_v)
               .unflatten(-1, (3, attention.num_heads, -1))  # (B, E, 3, heads, d)
               .permute(2, 0, 3, 1, 4))  # (3, B, heads, E, d)
    if isinstance(mask, BlockMask):
        out = flex_attention(q, k, v, block_mask=mask)  # (B, heads, E, d)
    elif num_regions >= 256 and cpu_inference(q):  # with fewer regions `attend` is as quick
        out = attend_unmasked(q, k, v, mask, num_regions)  # (B, heads, E, d)
    else:
        out = attend(q, k, v, mask)  # (B, heads, E, d)
    return attention.out_proj(out.transpose(1, 2).flatten(2))  # (B, E, D_v)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Eq. 2's softmax(Q K^T / sqrt(d) + Mask) V, for heads side by side.

    q (B, heads, X, d), k and v (B, heads, Y, d); mask (X, Y), True where a row may attend to a column. dropout: of the
    softmax's values. Returns (B, heads, X, d).
    """
    if dropout or not cpu_inference(q) or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return attend_by_heads(q, k, v, mask)


def feed_forward(x: Tensor, mlp: nn.Sequential) -> Tensor:
    """Sec. 3.2: the second half of a layer of CLIP's, with the weights of CLIP's own `mlp`. x: (B, E, D_v). Returns the
    same shape.

    CLIP's activation x sigmoid(1.702 x) is SiLU(1.702 x) / 1.702: taken into the two products, its factors cost nothing,
    and one tensor of 4 D_v numbers a token is made where there would be three (two, where gradients are wanted).
    """
    up, down = mlp.c_fc, mlp.c_proj
    hidden = torch.addmm(up.bias, x.flatten(0, 1), up.weight.T, beta=1.702, alpha=1.702)  # (B E, 4 D_v)
    hidden = F.silu(hidden, inplace=not torch.is_grad_enabled())
    return torch.addmm(down.bias, hidden, down.weight.T, alpha=1 / 1.702).view_as(x)


class Encoder(nn.Module):
    """Sec. 3.2, Fig. 4: CLIP's frozen image transformer with deep prompts and the region-level bridge.

    visual: OpenAI's `clip.model.VisionTransformer`; its weights are frozen here.
    num_prompts: K, new prompt tokens in each of the L layers. regions: M, a square number; 0 leaves the bridge out.
    update_regions: train the M region tokens (Table 6's first row). dropout: of the prompts.
    class_embedding_twice: the released code adds class_embedding to the [CLS] token a second time, after its position.

    Trained: `prompts` (L, K, D_v), `prompt_proj`, `prompt_norm`, and `regions` (M, D_v) where update_regions says so.
    """

    def __init__(self, visual: nn.Module, num_prompts: int = 10, regions: int = 16, update_regions: bool = False,
                 dropout: float = 0.1, class_embedding_twice: bool = True) -> None:
        super().__init__()
        self.region_grid = math.isqrt(max(regions, 0))
        if self.region_grid**2 != regions:
            raise ValueError(f"regions: {regions} is not a square number; region tokens stand on an m x m grid")
        self.visual, self.patch_size = visual.requires_grad_(False), visual.conv1.kernel_size[0]
        self.class_embedding_twice = class_embedding_twice
        self.block_sparse = False  # see `attention_mask`; `model.compile_parts` switches it on where it pays
        width = visual.conv1.out_channels

        # Each region token starts as CLIP's own [CLS] input, so that CLIP treats a region as it would an image.
        start = visual.class_embedding + visual.positional_embedding[0]  # (D_v)
        self.regions = nn.Parameter(start.detach().repeat(regions, 1), requires_grad=update_regions)

        bound = math.sqrt(6 / (3 * self.patch_size**2 + width))  # visual prompt tuning's start
        self.prompts = nn.Parameter(torch.empty(len(visual.transformer.resblocks), num_prompts, width))
        nn.init.uniform_(self.prompts, -bound, bound)
        self.prompt_proj = nn.Linear(width, width)
        nn.init.kaiming_normal_(self.prompt_proj.weight, mode="fan_out")
        self.prompt_dropout = nn.Dropout(dropout)
        self.prompt_norm = nn.LayerNorm(width, eps=1e-6)

    def layer_prompts(self, layer: int, batch: int) -> Tensor:
        """Sec. 3.2: P^l, the prompts that stand in the sequence during one layer. Returns (B, K, D_v)."""
        return self.prompt_dropout(self.prompt_proj(self.prompts[layer]).expand(batch, -1, -1))

    def embed(self, images: Tensor) -> Tensor:
        """Eq. 1: X^0 without the prompts, [cls, patches, regions], after CLIP's first LayerNorm.

        images: (B, 3, H, W), normalised; H and W multiples of the patch size. Returns (B, 1 + N + M, D_v).
        """
        visual, batch = self.visual, len(images)
        patches = visual.conv1(images)  # (B, D_v, h, w)
        side = math.isqrt(len(visual.positional_embedding) - 1)  # CLIP was trained on side x side patches
        positions = visual.positional_embedding[1:].T.unflatten(1, (side, side))[None]  # (1, D_v, side, side)
        positions = F.interpolate(positions, size=patches.shape[-2:], mode="bilinear", align_corners=False)
        patches = (patches + positions).flatten(2).transpose(1, 2)  # (B, N, D_v)

        cls = visual.class_embedding + visual.positional_embedding[0]  # (D_v)
        if self.class_embedding_twice:
            cls = cls + visual.class_embedding
        cls, regions = cls.expand(batch, 1, -1), self.regions.expand(batch, -1, -1)
        return visual.ln_pre(torch.cat([cls, patches, regions], dim=1))  # (B, 1 + N + M, D_v)

    def run_layers(self, x: Tensor, mask: Tensor | BlockMask | None) -> Tensor:
        """Eq. 2: CLIP's L layers, each with prompts of its own. x: X^0 as `embed` makes it. Returns X^L (B, E, D_v)."""
        batch, K = len(x), self.prompts.shape[1]
        x = torch.cat([x[:, :1], self.layer_prompts(0, batch), x[:, 1:]], dim=1)  # (B, E, D_v)
        for layer, block in enumerate(self.visual.transformer.resblocks):
            if layer > 0:  # deep prompts: what the last layer made of its prompts is thrown away
                x = torch.cat([x[:, :1], self.layer_prompts(layer, batch), x[:, 1 + K:]], dim=1)
            x = x + masked_attention(block.ln_1(x), block.attn, mask, len(self.regions))
            x = x + feed_forward(block.ln_2(x), block.mlp)
        return x

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Eq. 1-3: the global, image and region features of a batch, each row of unit length.

        images: (B, 3, H, W), normalised. Returns G (B, D), I (B, N, D), R (B, M, D).
        Raises ValueError where the image does not split into patches, or the patches into regions.
        """
        K, M = self.prompts.shape[1], len(self.regions)
        if any(size % self.patch_size or size < self.patch_size for size in images.shape[-2:]):
            raise ValueError(f"crop-size: an image of {images.shape[-1]}x{images.shape[-2]} pixels is not a whole "
                             f"number of this CLIP's {self.patch_size}-pixel patches")
        grid = tuple(size // self.patch_size for size in images.shape[-2:])  # (h, w)
        mask = attention_mask(K, grid, self.region_grid, images.device, self.block_sparse) if M else None
        x = self.run_layers(self.embed(images), mask)  # (B, E, D_v)

        first_region = x.shape[1] - M
        x = torch.cat([self.prompt_norm(x[:, :first_region]), x[:, first_region:]], dim=1)  # regions stay CLIP's own
        x = torch.cat([x[:, :1], x[:, 1 + K:]], dim=1)  # (B, 1 + N + M, D_v), Eq. 3's "-": the prompts are dropped
        x = F.normalize(self.visual.ln_post(x) @ self.visual.proj, dim=-1)  # (B, 1 + N + M, D)
        G, I, R = x[:, 0], x[:, 1:-M or None], x[:, x.shape[1] - M:]
        return G, I, R


# ---------------------------------------------------------------------------------- Eq. 2 again, for inference on a CPU


def cpu_inference(x: Tensor) -> bool:
    """Is Eq. 2 computed on a CPU and without gradients, where it pays to take its sums apart?"""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def attend_by_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, own_k: Tensor | None = None,
                    own_v: Tensor | None = None) -> Tensor:
    """Eq. 2 as it reads, with the scores of one head, and of so few rows that a processor's cache holds them: for inference
    in bfloat16 on a CPU, where PyTorch's kernel is no quicker than in single precision (AMD EPYC).

    As in `attend`. own_k, own_v: (B, heads, X, d), a key and a value more for each row, which no other row reads.
    """
    bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf) if mask is not None else None  # (X, Y)
    # Taking the mean key off all keys shifts a row's scores alike, which the softmax undoes: small ones keep their digits.
    mean = k.float().mean(2, keepdim=True)  # (B, heads, 1, d)
    k = ((k - mean) / math.sqrt(q.shape[-1])).to(q.dtype)  # (B, heads, Y, d)
    own_score = None
    if own_k is not None:  # its score and value take the place of a last column of zeros
        own_score = (q * (own_k - mean)).sum(-1) / math.sqrt(q.shape[-1])  # (B, heads, X)
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))  # (B, heads, Y + 1, d)
    out = q.new_empty(q.shape)
    for at in itertools.product(range(out.shape[0]), range(out.shape[1])):  # (image, head)
        for i in range(0, q.shape[2], 512):
            part = slice(i, i + 512)
            rows = (*at, part)
            scores = q[rows] @ k[at].T  # (512, Y), (512, Y + 1) with own_k
            if bias is not None:
                scores += bias[part]
            if own_score is not None:
                scores[:, -1] = own_score[rows]
            weights = scores.softmax(-1)
            out[rows] = weights @ v[at]
            if own_score is not None:
                out[rows] += weights[:, -1:] * own_v[rows]
    return out


def attend_unmasked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, num_regions: int) -> Tensor:
    """Eq. 2 for inference on a CPU, without the scores that Fig. 5 (c) masks: a third of all with 256 regions, three
    quarters with 1,024.

    Of the region tokens a patch reads one, its own region's. So CLIP's tokens attend to each other as if there were no
    regions, and each patch weighs that one token in. A region token reads so few patches that they are gathered.

    q, k, v: (B, heads, E, d). mask: `region_mask`'s (E, E). num_regions: M. Returns (B, heads, E, d).
    """
    first_region = q.shape[2] - num_regions
    region_of_patch = mask[:first_region, first_region:].nonzero()[:, 1]  # (N)
    read_by_region = mask[first_region:].nonzero()[:, 1].unflatten(0, (num_regions, -1))  # (M, N / M + 1)
    first_patch = first_region - len(region_of_patch)
    clip_q, clip_k, clip_v = (tokens[:, :, :first_region] for tokens in (q, k, v))  # (B, heads, 1 + K + N, d)
    patch_q, region_q = q[:, :, first_patch:first_region], q[:, :, first_region:]  # (B, heads, N, d), (B, heads, M, d)
    own_k, own_v = (tokens[:, :, first_region:][:, :, region_of_patch] for tokens in (k, v))  # (B, heads, N, d)

    if q.dtype == torch.bfloat16:
        out = [F.scaled_dot_product_attention(clip_q[:, :, :first_patch], clip_k, clip_v),
               attend_by_heads(patch_q, clip_k, clip_v, None, own_k, own_v)]
    else:
        # What scaled_dot_product_attention calls on a CPU; log_sum (B, heads, 1 + K + N): of a softmax's denominator.
        clip_out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(clip_q, clip_k, clip_v)
        own_score = (patch_q * own_k).sum(-1) / math.sqrt(q.shape[-1])  # (B, heads, N)
        share = torch.sigmoid(own_score - log_sum[:, :, first_patch:])  # exp(score) / (exp(score) + the denominator)
        clip_out[:, :, first_patch:].lerp_(own_v, share[..., None])
        out = [clip_out]

    read_k, read_v = (tokens[:, :, read_by_region].flatten(1, 2) for tokens in (k, v))  # (B, heads M, N / M + 1, d)
    region_out = F.scaled_dot_product_attention(region_q.flatten(1, 2)[:, :, None], read_k, read_v)  # (B, heads M, 1, d)
    out.append(region_out.view(region_q.shape))  # (B, heads, M, d)
    return torch.cat([part.transpose(1, 2) for part in out], dim=1).transpose(1, 2)  # (B, heads, E, d), made token by token


# ------------------------------------------------------------------------------------------------------------ run alone


def draw_mask(num_prompts: int, grid: int, region_grid: int, cell: int = 14):
    """Fig. 5 (c) as a picture: one square of `cell` pixels an entry, white where attention is masked; a PIL image."""
    from PIL import Image, ImageDraw  # only drawing needs it

    kinds = [("cls", 1, (66, 133, 196)), ("prompts", num_prompts, (230, 159, 0)),
             ("patches", grid**2, (86, 180, 150)), ("regions", region_grid**2, (204, 102, 140))]
    colours = torch.tensor([colour for _, count, colour in kinds for _ in range(count)])  # (E, 3)
    mask = region_mask(num_prompts, grid, region_grid)  # (E, E)
    pixels = torch.where(mask[..., None], colours[None], 255).byte()  # (E, E, 3), each key in its kind's colour
    side, margin = len(mask) * cell, 78
    picture = Image.new("RGB", (side + margin + 12, side + margin + 12), "white")
    picture.paste(Image.fromarray(pixels.numpy()).resize((side, side), Image.NEAREST), (margin, margin))
    pen = ImageDraw.Draw(picture)
    for line in range(len(mask) + 1):
        at = margin + line * cell
        pen.line([(margin, at), (margin + side, at)], fill=(205, 205, 205))
        pen.line([(at, margin), (at, margin + side)], fill=(205, 205, 205))
    start = margin
    for name, count, colour in kinds:
        middle = start + count * cell / 2
        if count:
            pen.text((margin - 8, middle), name, fill=colour, anchor="rm", font_size=15)
            label = Image.new("RGB", (70, 20), "white")
            ImageDraw.Draw(label).text((2, 10), name, fill=colour, anchor="lm", font_size=15)
            picture.paste(label.rotate(90, expand=True), (int(middle) - 10, 4))
            pen.rectangle([start, margin, start + count * cell, margin + side], outline=(90, 90, 90))
            pen.rectangle([margin, start, margin + side, start + count * cell], outline=(90, 90, 90))
        start += count * cell
    return picture


def main() -> None:
    """Draws Fig. 5 (c)."""
    parser = argparse.ArgumentParser(description="Draw the attention mask of the region-level bridge (Fig. 5 c): "
                                                 "rows are queries, columns keys, white means masked.")
    parser.add_argument("--prompts", type=int, default=2, help="K, prompt tokens (default %(default)s)")
    parser.add_argument("--grid", type=int, default=4, help="patches along a side of the image (default %(default)s)")
    parser.add_argument("--regions", type=int, default=4, help="M, region tokens, a square number (default %(default)s)")
    parser.add_argument("--out", default="region_mask.png", help="the picture's path (default %(default)s)")
    args = parser.parse_args()
    region_grid = math.isqrt(args.regions) if args.regions >= 0 else -1
    if args.grid < 1 or args.prompts < 0 or region_grid**2 != args.regions:
        raise ValueError("--grid must be at least 1, --prompts at least 0 and --regions a square number")
    if args.grid % max(1, region_grid):
        raise ValueError(f"--regions {args.regions}: {region_grid} regions a side do not divide --grid {args.grid}")
    if 1 + args.prompts + args.grid**2 + args.regions > 500:
        raise ValueError("--grid, --prompts, --regions: more than 500 tokens are no picture to look at; choose fewer")
    import draw  # only drawing needs it

    draw.save(draw_mask(args.prompts, args.grid, region_grid), args.out)
    mask = region_mask(args.prompts, args.grid, region_grid)
    print(f"{args.out}: {len(mask)}x{len(mask)} mask, {mask.float().mean():.0%} of the entries attend")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(print(f"error: {' '.join(str(error).split())}", file=sys.stderr) or 2)
