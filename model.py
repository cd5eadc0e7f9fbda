"""CLIP-RC (paper Sec. 3.3-3.5): from CLIP's features to a score for every pixel and class.

    Sec. 3.2  Encoder (rlb_attention.py)   G (B, D), I (B, N, D), R (B, M, D)
    Sec. 3.3  RegionAlignment (RAM)        I_hat (B, N, 3D) and R_hat (B, M, C, 2D)
    Sec. 3.4  Decoder                      I_d (B, N, D) and R_d (B, M*C, D)
              RecoveryDecoder (RDL)        I_r (B, N, D) and R_r (B, M*C, 2D), in training only
    Sec. 3.5  nel_losses, CLIPRC.losses    what training minimises

    python model.py        prints the parts, their shapes, and what is trained and what is frozen

B images of H x W pixels, N = h w patches, M = m x m region tokens, C classes, D the width of the
space that images and texts share. T (C, D) holds the class names' text embeddings, rows of unit
length. Step by step, with images: docs/walkthrough.md#33-the-region-alignment-module
"""

import argparse
import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from rlb_attention import Encoder
from util.checkpoint import checkpoint_clip
from util.clip_files import clip
from util.processes import mean_over_processes, run_script, without_autocast

HEADS, DECODER_LAYERS = 8, 3  # released code, as are the layers' width 4D, ReLU and LayerNorms


class RegionAlignment(nn.Module):
    """Sec. 3.3, Fig. 3 (b): RAM aligns the global, the region and the image features.

    align: which features Eq. 4 puts beside I: "GR", "G", "R" or "" (Table 7)."""
    def __init__(self, D: int, align: str) -> None:
        super().__init__()
        self.align = align
        self.image_proj = nn.Linear((len(align) + 1) * D, D)
        self.descriptor_proj = nn.Linear(2 * D, D)

    def forward(self, G: Tensor, I: Tensor, R: Tensor, T: Tensor,
                grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Eq. 4-6. G (B, D), I (B, N, D), R (B, M, D), T (C, D); grid (h, w). Returns the aligned
        image features (B, N, D), the descriptors (B, M*C, D) and, for the recovery loss, R_hat
        (B, M, C, 2D), the descriptors before their linear layer."""
        m, G_up = math.isqrt(R.shape[1]), G[:, None].expand_as(I)  # G_up (B, N, D)
        R_up = R.transpose(1, 2).unflatten(-1, (m, m))  # (B, D, m, m)
        R_up = F.interpolate(R_up, grid, mode="bilinear", align_corners=False)  # (B, D, h, w)
        R_up = R_up.flatten(2).transpose(1, 2)  # (B, N, D)
        beside = [G_up] * ("G" in self.align) + [R_up] * ("R" in self.align)  # Table 7
        I_hat = torch.cat([*beside, I], dim=-1)  # Eq. 4, (B, N, 3D)

        R_a = G[:, None] + R  # Eq. 5, (B, M, D)
        R_t = T * R_a[:, :, None]  # (B, M, C, D)
        R_hat = torch.cat([R_t, T.expand_as(R_t)], dim=-1)  # Eq. 6, (B, M, C, 2D)

        # Sec. 3.4: both "pass through a linear layer, aligning them in dimension D".
        return self.image_proj(I_hat), self.descriptor_proj(R_hat).flatten(1, 2), R_hat


class CrossAttention(nn.Module):
    """Fig. 3 (c): multi-head cross-attention (MHCA); x asks, memory answers."""
    def __init__(self, D: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x (B, n, D), memory (B, k, D). Returns (B, n, D)."""
        q, k, v = (tokens.unflatten(-1, (HEADS, -1)).transpose(1, 2)
                   for tokens in (self.q(x), self.k(memory), self.v(memory)))
        # q (B, heads, n, D / heads); k and v (B, heads, k, D / heads)
        dropout = self.dropout if self.training else 0.0
        heads = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.out(heads.transpose(1, 2).flatten(2))  # (B, n, D)


class CrossBlock(nn.Module):
    """Fig. 3 (c): one layer of one branch. There is no self-attention in it."""
    def __init__(self, D: int, dropout: float) -> None:
        super().__init__()
        self.attention = CrossAttention(D, dropout)
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.dropout = nn.Dropout(dropout)
        self.ffn = nn.Sequential(nn.Linear(D, 4 * D), nn.ReLU(), nn.Dropout(dropout),
                                 nn.Linear(4 * D, D), nn.Dropout(dropout))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x (B, n, D) attends to memory (B, k, D). Returns (B, n, D)."""
        x = self.norm1(x + self.dropout(self.attention(x, memory)))
        return self.norm2(x + self.ffn(x))


def branch(D: int, layers: int, dropout: float) -> nn.ModuleList:
    """Fig. 3 (c): the layers of one branch. Released code: they start as copies of one layer."""
    block = CrossBlock(D, dropout)
    return nn.ModuleList(copy.deepcopy(block) for _ in range(layers))


class Decoder(nn.Module):
    """Sec. 3.4, Fig. 3 (c): two branches of layers, one for the image, one for the descriptors."""
    def __init__(self, D: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.descriptor_blocks = branch(D, layers, dropout)
        self.image_blocks = branch(D, layers, dropout)

    def forward(self, I_hat: Tensor, R_hat: Tensor) -> tuple[Tensor, Tensor]:
        """Sec. 3.4. I_hat (B, N, D), R_hat (B, M*C, D). Returns I_d and R_d of the same shapes."""
        for image_block, descriptor_block in zip(self.image_blocks, self.descriptor_blocks):
            # Both branches read the other's input to this layer, not its output.
            I_hat, R_hat = image_block(I_hat, R_hat), descriptor_block(R_hat, I_hat)  # Eq. 7
        return I_hat, R_hat


def segmentation_map(I_d: Tensor, R_d: Tensor, num_regions: int) -> Tensor:
    """Eq. 8: the mean of the M regions' maps, logits.
    I_d (B, N, D); R_d (B, M*C, D), all classes of the first region first. Returns (B, C, N)."""
    # Averaging over the regions first gives the same value and needs an M-th of the memory.
    R_mean = R_d.float().unflatten(1, (num_regions, -1)).mean(dim=1)  # (B, C, D)
    with without_autocast(I_d.device):  # a bfloat16 logit would have 8 significant bits
        return R_mean @ I_d.float().transpose(1, 2)  # Eq. 8, (B, C, N)


def truncated_normal(part: nn.Module) -> None:
    """Released code: an initialiser that it defines, and calls for the recovery decoder alone."""
    for module in part.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


class RecoveryDecoder(nn.Module):
    """Sec. 3.4: from the decoder's outputs back to the encoder's I and the descriptors R_hat.

    The paper calls it "completely identical" to the decoder; Table 8's best has one layer.
    Released code: a linear layer before and after each branch, and other initial weights."""
    def __init__(self, D: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.descriptor_in, self.image_in = nn.Linear(D, D), nn.Linear(D, D)
        self.decoder = Decoder(D, layers, dropout)
        self.descriptor_out, self.image_out = nn.Linear(D, 2 * D), nn.Linear(D, D)
        truncated_normal(self)

    def forward(self, I_d: Tensor, R_d: Tensor) -> tuple[Tensor, Tensor]:
        """I_d (B, N, D), R_d (B, M*C, D). Returns I_r (B, N, D) and R_r (B, M*C, 2D)."""
        I_r, R_r = self.decoder(self.image_in(I_d), self.descriptor_in(R_d))  # Eq. 9
        return self.image_out(I_r), self.descriptor_out(R_r)


def kd_loss(recovered: Tensor, target: Tensor) -> Tensor:
    """Table 8's KD. Our reading, since neither the paper nor the released code defines it: the KL
    divergence of softmaxes over the features, averaged over the tokens."""
    recovered, target = recovered.flatten(0, -2), target.flatten(0, -2)  # (tokens, D or 2D)
    return F.kl_div(recovered.log_softmax(-1), target.softmax(-1), reduction="batchmean")


RECOVERY_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "kd": kd_loss}


def recovery_losses(I_r: Tensor, I: Tensor, R_r: Tensor, R_hat: Tensor,
                    distance: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Eq. 10's two terms. Released code: means instead of the paper's sums.
    I_r and I (B, N, D), R_r and R_hat (B, M*C, 2D). The targets I and R_hat are constants; the
    recovered side is not, and its gradient reaches the decoder and the prompts."""
    return distance(I_r, I.detach()), distance(R_r, R_hat.detach())  # Eq. 10


def nel_losses(logits: Tensor, labels: Tensor, focal_alpha: float = 0.25) -> tuple[Tensor, Tensor]:
    """Sec. 3.5: the Non-mutually Exclusive Loss, a binary problem for each class.
    The paper writes sigmoid and binary cross entropy. The released code takes the sigmoid focal
    loss and the dice loss, and divides both by the number of (image, class) pairs.
    logits (B, C, H, W); labels (B, H, W), below C or 255. Returns the focal and the dice loss."""
    classes = torch.arange(logits.shape[1], device=labels.device)
    t = labels[:, None] == classes[:, None, None]  # (B, C, H, W), bool; a 255 is in no class
    p = logits.sigmoid()
    # Focal: mean over pixels, sum over images and classes. An ignored pixel has t = 0 in every
    # class, so it is a negative of all of them.
    p_t = torch.where(t, p, 1 - p)
    alpha_t = torch.where(t, focal_alpha, 1 - focal_alpha)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, t.to(p), reduction="none")
    focal = (alpha_t * (1 - p_t) ** 2 * cross_entropy).mean((2, 3)).sum()
    # Dice: over the classes that are present in the image. Ignored pixels are in the sum of p.
    p, t = p.flatten(2), t.flatten(2)  # (B, C, H W)
    dice = 1 - (2 * (p * t).sum(-1) + 1) / (p.sum(-1) + t.sum(-1) + 1)  # (B, C)
    dice = (dice * t.any(-1)).sum()
    # The pairs of a class and an image that shows it: mean over the processes, at least 1.
    pairs = mean_over_processes(t.any(-1).sum().float()).clamp(min=1)
    return focal / pairs, dice / pairs


def pseudo_labels(logits: Tensor, labels: Tensor, unseen: Sequence[int]) -> Tensor:
    """Released code, transductive setting: relabel the pixels of unseen classes at every step.
    Each of them takes the unseen class with the highest current score; all other pixels, ignored
    ones included, keep their label. logits (B, C, H, W), labels (B, H, W)."""
    unseen = torch.tensor(unseen, device=labels.device)
    best = unseen[logits.detach()[:, unseen].argmax(1)]  # (B, H, W)
    return torch.where(torch.isin(labels, unseen), best.to(labels.dtype), labels)


class Features(NamedTuple):
    """Fig. 3 (a): the logits (B, C, H, W) and what the recovery loss compares, None without RAM."""
    logits: Tensor
    I: Tensor  # (B, N, D), the encoder's patches
    R_hat: Tensor | None  # (B, M, C, 2D), the descriptors
    I_d: Tensor | None  # (B, N, D), the decoder's patches
    R_d: Tensor | None  # (B, M*C, D), the decoder's descriptors


class CLIPRC(nn.Module):
    """Sec. 3, Fig. 3 (a): all of CLIP-RC and, with parts left out, every row of Tables 5-8.

    visual: OpenAI's `VisionTransformer` (`load_clip(...).visual`); frozen here.
    num_prompts: K. regions: M; 0 leaves the region-level bridge out (Table 5).
    update_regions: train the region tokens (Table 6).
    ram: without it ZegCLIP's head takes the place of RAM and the decoder (Table 5).
    align: which of G and R enter Eq. 4: "GR", "G", "R" or "" (Table 7).
    rdl: the recovery loss (Table 5). recovery_layers, recovery_loss: Table 8.
    dropout: on prompts, attention weights and the decoders' layers.
    recompute: run the decoders' layers again in the backward pass instead of keeping what they
    computed; by default from M = 1,024, to save memory. Same results."""
    def __init__(self, visual: nn.Module, *, num_prompts: int = 10, regions: int = 16,
                 update_regions: bool = False, ram: bool = True, align: str = "GR",
                 rdl: bool = True, recovery_layers: int = 1, recovery_loss: str = "l1",
                 dropout: float = 0.1, class_embedding_twice: bool = True,
                 recompute: bool | None = None) -> None:
        settings, others = dict(locals()), ("self", "visual", "recompute", "__class__")
        super().__init__()
        self.settings = {k: v for k, v in settings.items() if k not in others}  # in a checkpoint
        if ram and not regions or rdl and not ram:
            raise ValueError("--regions 0 needs --no-ram, and --no-ram has no recovery loss")
        D = visual.proj.shape[1]
        self.encoder = Encoder(visual, num_prompts, regions, update_regions, dropout,
                               class_embedding_twice)
        self.name = "CLIP-RC" if ram else "ZegCLIP" + " with RLB" * bool(regions)  # in tables
        self.ram = self.decoder = self.recovery = self.zegclip = None
        if ram:
            self.ram = RegionAlignment(D, align)
            self.decoder = Decoder(D, DECODER_LAYERS, dropout)
        else:
            self.zegclip = ZegCLIPHead(D, dropout)
        self.rdl, self.distance = rdl, RECOVERY_LOSSES[recovery_loss]
        if rdl and recovery_layers:
            self.recovery = RecoveryDecoder(D, recovery_layers, dropout)
        if recompute or recompute is None and regions >= 1024:
            for block in [part for part in self.modules() if isinstance(part, CrossBlock)]:
                block.forward = partial(recompute_in_backward, block.forward, use_reentrant=False)

    def features(self, images: Tensor, T: Tensor) -> Features:
        """Fig. 3 (a): the forward pass. images (B, 3, H, W), T (C, D)."""
        grid = tuple(side // self.encoder.patch_size for side in images.shape[-2:])  # (h, w)
        G, I, R = self.encoder(images)
        R_hat = I_d = R_d = None
        if self.ram:
            I_aligned, descriptors, R_hat = self.ram(G, I, R, T, grid)
            I_d, R_d = self.decoder(I_aligned, descriptors)  # (B, N, D), (B, M*C, D)
            logits = segmentation_map(I_d, R_d, R.shape[1])  # (B, C, N)
        else:
            logits = self.zegclip(G, I, T)
        logits = logits.float().unflatten(-1, grid)  # (B, C, h, w); released code: then bilinear
        logits = F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)
        return Features(logits, I, R_hat, I_d, R_d)

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """Fig. 3 (a): images (B, 3, H, W), text T (C, D) to logits (B, C, H, W)."""
        return self.features(images, text).logits

    def losses(self, images: Tensor, labels: Tensor, text: Tensor,
               weights: tuple[float, float, float] = (100, 1, 2),
               unseen: Sequence[int] = ()) -> dict[str, Tensor]:
        """Eq. 11: the terms of the training loss, each times its weight; their sum is the loss.
        images (B, 3, H, W); labels (B, H, W), rows of text or 255; text T (C, D).
        weights: of the focal and the dice loss (released code: the paper's alpha in two parts) and
        beta, by default VOC's. unseen: rows of text whose pixels take pseudo labels. Returns "mask"
        (focal) and "dice"; with RDL also "recovery_v" (of I) and "recovery_q" (of R_hat)."""
        f, (alpha_focal, alpha_dice, beta) = self.features(images, text), weights
        labels = pseudo_labels(f.logits, labels, unseen) if unseen else labels
        focal, dice = nel_losses(f.logits, labels)
        losses = {"mask": alpha_focal * focal, "dice": alpha_dice * dice}
        if self.rdl:
            if self.recovery:
                I_r, R_r, R_hat = *self.recovery(f.I_d, f.R_d), f.R_hat
            else:
                # Table 8, 0 layers. Our reading: the decoder's outputs against I and the projected
                # R_hat. The released code keeps its linear layers and compares with the 2D R_hat.
                I_r, R_r, R_hat = f.I_d, f.R_d, self.ram.descriptor_proj(f.R_hat)
            of_I, of_R = recovery_losses(I_r, f.I, R_r, R_hat.flatten(1, 2), self.distance)
            losses |= {"recovery_v": beta * of_I, "recovery_q": beta * of_R}
        return losses


def model_from_checkpoint(checkpoint: dict, path: str | Path,
                          clip_name_or_path: str | Path | None = None) -> CLIPRC:
    """The trained model in `read_checkpoint(path)`, in eval mode, on the CPU.
    clip_name_or_path: the CLIP it was trained with, if that file has moved. Raises ValueError."""
    visual = checkpoint_clip(checkpoint, path, clip_name_or_path).visual
    model, weights = CLIPRC(visual, **checkpoint["model"]), checkpoint["weights"]
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    model.load_state_dict(frozen | weights)
    return model.eval()


# -------------------------------------------------------------------------- a baseline, not CLIP-RC


class ZegCLIPHead(nn.Module):
    """Table 5, "none" and "RLB": the head of ZegCLIP (Zhou et al. 2023), without RAM and RDL.
    Our reading, as the paper does not spell these rows out."""
    def __init__(self, D: int, dropout: float) -> None:
        super().__init__()
        self.descriptor_proj = nn.Linear(2 * D, D)
        self.blocks = branch(D, DECODER_LAYERS, dropout)

    def forward(self, G: Tensor, I: Tensor, T: Tensor) -> Tensor:
        """G (B, D), I (B, N, D), T (C, D). Returns logits (B, C, N)."""
        descriptors = torch.cat([T * G[:, None], T.expand(len(G), -1, -1)], dim=-1)  # (B, C, 2D)
        x = self.descriptor_proj(descriptors)  # (B, C, D)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, I)
        # The segmentation is the last layer's attention scores, before the softmax, averaged over
        # the heads. The heads' dot products add up to one dot product over all D features.
        q, k = last.attention.q(x), last.attention.k(I)  # (B, C, D), (B, N, D)
        return q @ k.transpose(1, 2) / math.sqrt(q.shape[-1] / HEADS) / HEADS


def main() -> None:
    argparse.ArgumentParser(description="Print CLIP-RC's parts in ViT-B/16's size.").parse_args()
    shapes = {}
    with torch.device("meta"):  # shapes without numbers
        model = CLIPRC(clip.model.VisionTransformer(224, 16, 768, 12, 12, 512))
        for name, part in model.named_children():
            part.register_forward_hook(lambda _, __, out, name=name: shapes.update({name: out}))
        labels = torch.zeros(1, 512, 512, dtype=torch.int64)
        model.losses(torch.empty(1, 3, 512, 512), labels, torch.empty(20, 512))
    for name, outputs in shapes.items():
        trained, frozen = (sum(p.numel() for p in model.get_submodule(name).parameters()
                               if p.requires_grad == kind) for kind in (True, False))
        print(f"{name:<9}{trained:>11,} trained {frozen:>11,} frozen, returns",
              *(tuple(out.shape) for out in outputs))


if __name__ == "__main__":
    run_script(main)
