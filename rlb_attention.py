"""The region-level bridge (RLB): CLIP's encoder with region tokens (paper Sec. 3.2, Fig. 4-5).

CLIP's image transformer summarises an image in one token, [CLS]. CLIP-RC adds M = m x m tokens
like it. Each attends only to itself and the patches in its own cell of an m x m grid: it sums up a
region. (After the first layer these patches have read the whole image, and so some of it reaches
the region token, too.) This needs no new layers, only an attention mask.

    python rlb_attention.py            draws the mask of Fig. 5 (c)    (--help: other grids)

    paper             here               what it is
    G, P, I, R        the same           the [CLS] token, K prompts, N patches, M region tokens
    X^l               X (B, E, D_v)      the sequence after layer l, E = 1 + K + N + M tokens
    Mask              mask (E, E)        Fig. 5; here True means "may attend", not a number to add
    D (Eq. 1)         D_v                width of the encoder's tokens (768 in ViT-B/16)
    d_v (Eq. 2)       d_v                width of one attention head, D_v / heads (64)
    D (from Eq. 4)    D                  width of the space that images and texts share (512)
    sqrt(N), sqrt(M)  h x w, m x m       grid of patches (need not be square), grid of regions

B images, L layers. Step by step: docs/walkthrough.md#32-the-region-level-bridge
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util import draw
from util.images import save_image
from util.processes import run_script


def first_input(visual: nn.Module, images: Tensor, P: Tensor, region_tokens: Tensor,
                twice: bool) -> Tensor:
    """Eq. 1: the input of the first layer, X^0 = [G^0, P^0, I^0, R^0].
    visual: OpenAI's `VisionTransformer`. images: (B, 3, H, W), normalised; H and W are multiples
    of the patch size. P: the first layer's prompts (B, K, D_v). region_tokens: (M, D_v).
    twice: class_embedding is added to [CLS] a second time. Returns (B, E, D_v)."""
    B = len(images)
    position = visual.positional_embedding  # (1 + side^2, D_v): of [CLS], then of the patches
    side = math.isqrt(len(position) - 1)  # CLIP was trained on side x side patches
    G = visual.class_embedding + position[0]  # (D_v)
    if twice:  # released code; neither CLIP's own [CLS] nor a region token has it twice
        G = G + visual.class_embedding

    I = visual.conv1(images)  # (B, D_v, h, w)
    grid_position = position[1:].T.unflatten(1, (side, side))[None]  # (1, D_v, side, side)
    I = I + F.interpolate(grid_position, I.shape[-2:], mode="bilinear", align_corners=False)
    I = I.flatten(2).transpose(1, 2)  # (B, N, D_v)
    G, R = G.expand(B, 1, -1), region_tokens.expand(B, -1, -1)  # (B, 1, D_v), (B, M, D_v)

    # CLIP's first LayerNorm. Released code: P goes in without it.
    G, I, R = visual.ln_pre(G), visual.ln_pre(I), visual.ln_pre(R)
    return torch.cat([G, P, I, R], dim=1)  # Eq. 1


def region_mask(num_prompts: int, grid: int | tuple[int, int], region_grid: int) -> Tensor:
    """Fig. 5 (c): the attention mask, the same in every layer.
    num_prompts: K. grid: (h, w) patches, or one number for a square. region_grid: m, 0 for none.
    Returns a bool tensor (E, E): row q, column k is True where token q may attend to token k.
    Raises ValueError where m does not divide the grid."""
    h, w = (grid, grid) if isinstance(grid, int) else grid
    m, N, M = region_grid, h * w, region_grid**2
    if m and (h % m or w % m):
        raise ValueError(f"regions: {m} x {m} regions do not divide {h} x {w} patches into equal "
                         f"cells; choose another --regions or --crop-size")
    i, r = 1 + num_prompts, 1 + num_prompts + N  # where I and R start in the sequence
    row, column = torch.arange(N) // w, torch.arange(N) % w  # (N): where each patch lies
    cell = (row * m // h) * m + column * m // w  # (N): the region that contains it (Fig. 5 a)
    in_cell = cell[:, None] == torch.arange(M)  # (N, M)

    mask = torch.zeros(r + M, r + M, dtype=torch.bool)
    mask[:r, :r] = True  # [CLS], prompts and patches attend to each other, as in CLIP (Fig. 5 b)
    mask[i:r, r:] = in_cell  # a patch also attends to the one region token of its cell
    mask[r:, i:r] = in_cell.T  # a region token attends to the patches of its cell ...
    mask[r:, r:] = torch.eye(M, dtype=torch.bool)  # ... and to itself, and to nothing else
    return mask


def masked_attention(X: Tensor, attention: nn.MultiheadAttention, mask: Tensor) -> Tensor:
    """Eq. 2: masked multi-head self-attention with the weights of CLIP's own attention layer.
    X: (B, E, D_v), after the layer's first LayerNorm. mask: (E, E). Returns (B, E, D_v)."""
    QKV = F.linear(X, attention.in_proj_weight, attention.in_proj_bias)  # (B, E, 3 D_v)
    Q, K, V = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
               for part in QKV.chunk(3, dim=-1))  # (B, heads, E, d_v) each
    # PyTorch computes these four lines in one call, without keeping the scores (a test compares):
    #     scores = Q @ K.transpose(-2, -1) / math.sqrt(d_v)      (B, heads, E, E)
    #     scores = scores.masked_fill(~mask, -math.inf)          the paper's "+ Mask"
    #     weights = scores.softmax(dim=-1)
    #     heads = weights @ V                                    (B, heads, E, d_v)
    heads = F.scaled_dot_product_attention(Q, K, V, attn_mask=mask)  # Eq. 2
    return attention.out_proj(heads.transpose(1, 2).flatten(2))  # (B, E, D_v)


class Encoder(nn.Module):
    """Sec. 3.2, Fig. 4: CLIP's frozen image transformer with deep prompts and region tokens.

    visual: OpenAI's `VisionTransformer`; its weights are frozen here.
    num_prompts: K, new prompts in each of the L layers. regions: M, a square number; 0 for none.
    update_regions: train the M region tokens (Table 6's "update" row).
    dropout: on the prompts.
    class_embedding_twice: True computes what the released code computes; False follows the paper.

    Trained: `prompts` (L, K, D_v) and, as in the released code, `prompt_proj` and `prompt_norm`;
    with update_regions also `region_tokens` (M, D_v)."""
    def __init__(self, visual: nn.Module, num_prompts: int = 10, regions: int = 16,
                 update_regions: bool = False, dropout: float = 0.1,
                 class_embedding_twice: bool = True) -> None:
        super().__init__()
        self.visual = visual.requires_grad_(False)
        self.patch_size = visual.conv1.kernel_size[0]
        self.region_grid = math.isqrt(regions)
        if self.region_grid**2 != regions:
            raise ValueError(f"regions: {regions} is not a square number (1, 4, 16, 64, ...)")
        self.class_embedding_twice = class_embedding_twice
        D_v = visual.conv1.out_channels
        # "Each token in R^0 adopts the weights of G^0" (released code: class_embedding only once).
        # "To ensure the generalizability of the RLB for unseen classes, its gradient is not
        # updated": training on the seen classes cannot bend these tokens towards them.
        R = visual.class_embedding + visual.positional_embedding[0]  # (D_v)
        self.region_tokens = nn.Parameter(R.detach().repeat(regions, 1), update_regions)
        L = len(visual.transformer.resblocks)
        self.prompts = nn.Parameter(torch.empty(L, num_prompts, D_v))
        bound = math.sqrt(6 / (3 * self.patch_size**2 + D_v))  # as visual prompt tuning has it
        nn.init.uniform_(self.prompts, -bound, bound)
        # Released code: one linear layer and dropout for the prompts of all layers, and a LayerNorm
        # after the last layer. The paper's Eq. 1-3 have none of them.
        self.prompt_proj = nn.Linear(D_v, D_v)
        nn.init.kaiming_normal_(self.prompt_proj.weight, mode="fan_out")
        self.prompt_dropout = nn.Dropout(dropout)
        self.prompt_norm = nn.LayerNorm(D_v, eps=1e-6)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fig. 4: the global, image and region features of a batch, each row of unit length.
        images: (B, 3, H, W), normalised. Returns G (B, D), I (B, N, D), R (B, M, D).
        Raises ValueError if the image does not split into patches, or the patches into regions."""
        if any(side % self.patch_size or not side for side in images.shape[-2:]):
            raise ValueError(f"crop-size: {images.shape[-1]} x {images.shape[-2]} pixels is not a "
                             f"whole number of this CLIP's {self.patch_size}-pixel patches")
        grid = tuple(side // self.patch_size for side in images.shape[-2:])  # (h, w)
        K, N, M = self.prompts.shape[1], grid[0] * grid[1], len(self.region_tokens)
        P = [self.prompt_dropout(self.prompt_proj(prompts).expand(len(images), -1, -1))
             for prompts in self.prompts]  # L times (B, K, D_v)
        with images.device:  # a GPU makes the mask itself: a copy would make it wait
            mask = region_mask(K, grid, self.region_grid)  # (E, E)

        X = first_input(self.visual, images, P[0], self.region_tokens,
                        self.class_embedding_twice)  # (B, E, D_v)
        for l, block in enumerate(self.visual.transformer.resblocks):
            if l > 0:  # deep prompts: P[l] replaces what the previous layer made of P[l - 1]
                X = torch.cat([X[:, :1], P[l], X[:, 1 + K :]], dim=1)
            # Eq. 2 leaves out what every transformer layer has: the LayerNorms, the two residual
            # connections and the feed-forward network.
            X = X + masked_attention(block.ln_1(X), block.attn, mask)
            X = X + block.mlp(block.ln_2(X))

        G, _, I, R = X.split([1, K, N, M], dim=1)  # Eq. 3
        # Released code: a trained LayerNorm over all but the regions, then CLIP's last LayerNorm
        # and projection over all, each token scaled to unit length.
        G, I = self.prompt_norm(G), self.prompt_norm(I)
        G, I, R = (self.visual.ln_post(tokens) @ self.visual.proj for tokens in (G, I, R))
        G, I, R = (F.normalize(tokens.float(), dim=-1) for tokens in (G, I, R))
        return G[:, 0], I, R  # (B, D), (B, N, D), (B, M, D)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw the mask of Fig. 5 (c): each row's token attends to coloured columns.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--prompts", type=int, default=2, metavar="K", help="prompt tokens")
    parser.add_argument("--grid", type=int, default=4, help="patches along a side of the image")
    parser.add_argument("--regions", type=int, default=4, metavar="M", help="region tokens")
    args = parser.parse_args()
    m = math.isqrt(args.regions)
    mask = region_mask(args.prompts, args.grid, m)
    groups = [("cls", 1), ("prompts", args.prompts), ("patches", args.grid**2), ("regions", m * m)]
    save_image(draw.mask_image(mask, groups), "region_mask.png")
    print(f"region_mask.png: {len(mask)} tokens; {mask.float().mean():.0%} of the pairs may attend")


if __name__ == "__main__":
    run_script(main)
