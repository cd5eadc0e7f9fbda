"""CLIP-RC (the paper's Sec. 3.3-3.5, Eq. 4-11): from CLIP's features to a score for every pixel and class name.

    encoder (rlb_attention.py)      G (B, D)  I (B, N, D)  R (B, M, D)      a frozen CLIP with prompts and region tokens
    region alignment, RAM           q (B, M C, D) descriptors of classes    v (B, N, D) patches
    decoder                         three layers in which q and v read each other; q . v is the segmentation
    recovery decoder, RDL           training only: from q and v back to what they were made of

    python model.py                 prints the parts, their shapes, and what is trained and what is frozen

Symbols: B images of H x W pixels, N = h w patches, M = m x m region tokens, C class names, D the width of the space
that images and text share, T (C, D) the names' text embeddings, rows of unit length.
"""

import argparse
import hashlib
import importlib.util
import math
import os
import pickle
import sys
import types
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from rlb_attention import Encoder, attend

# The one place where OpenAI's package is imported. Its __init__ pulls in torchvision and pkg_resources, for picture
# preprocessing that is not used here; an empty package of the same name and path lets its two useful modules in alone.
if "clip" not in sys.modules:
    clip_package = types.ModuleType("clip")
    clip_package.__path__ = importlib.util.find_spec("clip").submodule_search_locations
    sys.modules["clip"] = clip_package
import clip.model  # noqa: E402
import clip.simple_tokenizer  # noqa: E402

CLIP_URL = "https://openaipublic.azureedge.net/clip/models"
CLIP_FILES = {  # name: (SHA-256, file); the image transformers that OpenAI published
    "ViT-B/32": ("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt"),
    "ViT-B/16": ("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16.pt"),
    "ViT-L/14": ("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14.pt"),
    "ViT-L/14@336px": ("3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", "ViT-L-14-336px.pt"),
}
IGNORE = 255  # the label of a pixel that has none
DECODER_HEADS, DECODER_LAYERS = 8, 3
INITIALISERS = ("released", "truncated_normal")


# ---------------------------------------------------------------------------------------------- CLIP and its text


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits: what tells one CLIP file from another."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def clip_file(name_or_path: str | Path) -> Path:
    """Sec. 4.2 (ViT-B/16): the path of a CLIP file; a published name is downloaded once, to ~/.cache/clip.

    Raises ValueError for a name that is neither published nor a file, for a ResNet, and for a wrong SHA-256.
    """
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    if str(name_or_path).startswith("RN"):
        raise ValueError(f"--clip {name_or_path} is a ResNet; CLIP-RC needs one of the transformers {', '.join(CLIP_FILES)}")
    if name_or_path not in CLIP_FILES:
        raise ValueError(f"--clip {name_or_path}: no such file, and not one of {', '.join(CLIP_FILES)}")
    sha256, file_name = CLIP_FILES[name_or_path]
    path = Path.home() / ".cache" / "clip" / file_name  # where OpenAI's own package keeps it too
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:  # written under a temporary name, checked, then renamed
            torch.hub.download_url_to_file(f"{CLIP_URL}/{sha256}/{file_name}", str(path), hash_prefix=sha256,
                                           progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:
            raise ValueError(f"--clip {name_or_path}: the download failed ({error}); fetch "
                             f"{CLIP_URL}/{sha256}/{file_name} elsewhere and give its path") from error
    elif file_sha256(path) != sha256:
        raise ValueError(f"--clip {name_or_path}: {path} is not OpenAI's file (its SHA-256 differs); "
                         f"delete it and try again")
    return path


def torch_load(path: str | Path):
    """A file of tensors and plain values, on the CPU. Nothing in a file is ever run: what would need that raises."""
    with open(path, "rb") as file, warnings.catch_warnings():  # of odd pickles: the error that follows says enough
        warnings.simplefilter("ignore")
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged files make PyTorch raise a dozen kinds
            raise pickle.UnpicklingError(f"{path} is no file of tensors") from error


def load_clip(name_or_path: str | Path) -> clip.model.CLIP:
    """Sec. 4.2's CLIP as OpenAI publishes it: image and text encoder in single precision on the CPU, in eval mode.

    name_or_path: a published name, such as "ViT-B/16", or a file: a TorchScript archive (as published) or a plain
    state dict, in half or single precision. Every size is read off the tensors.
    Raises ValueError for a file that is no CLIP, and for a ResNet.
    """
    path = clip_file(name_or_path)
    try:
        # As published it is a TorchScript archive. Reading one can run what is in it, so it is done for OpenAI's own only.
        if file_sha256(path) in {sha256 for sha256, _ in CLIP_FILES.values()}:
            with warnings.catch_warnings():  # PyTorch would rather see newer archives; these are the published ones
                warnings.simplefilter("ignore", DeprecationWarning)
                state = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            state = torch_load(path)
        state = {name: tensor.float() for name, tensor in state.items()
                 if name not in ("input_resolution", "context_length", "vocab_size")}  # numbers that the shapes tell too
    except PermissionError:
        raise
    except Exception as error:  # damaged files make zipfile and PyTorch raise a dozen kinds
        raise ValueError(f"{path} is not a CLIP file: neither one that OpenAI published nor a state dict "
                         f"of tensors") from error
    if "visual.layer1.0.conv1.weight" in state:
        raise ValueError(f"{path} is a CLIP with a ResNet; CLIP-RC needs one of the transformers, such as ViT-B/16")
    try:
        depth = {tower: sum(name.startswith(tower) and name.endswith(".ln_1.weight") for name in state)
                 for tower in ("visual.transformer.", "transformer.")}
        vision_width, _, patch_size, _ = state["visual.conv1.weight"].shape
        positions = len(state["visual.positional_embedding"]) - 1
        text_width, embed_dim = state["text_projection"].shape
        with torch.device("meta"):  # no memory and no random start: the tensors of the file become the parameters
            model = clip.model.CLIP(embed_dim, math.isqrt(positions) * patch_size, depth["visual.transformer."],
                                    vision_width, patch_size, *state["positional_embedding"].shape[:1],
                                    *state["token_embedding.weight"].shape[:1], text_width, text_width // 64,
                                    depth["transformer."])
        model.load_state_dict(state, assign=True)
    except (KeyError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a CLIP file: a tensor of OpenAI's format is missing or has another "
                         f"shape") from error
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{path}: {broken[0]} holds NaN or infinite numbers; the file is damaged")
    causal = model.build_attention_mask()  # the one tensor that is not a parameter
    for block in model.transformer.resblocks:
        block.attn_mask = causal
    return model.eval().requires_grad_(False)


def tokenize(texts: Sequence[str], context_length: int) -> Tensor:
    """CLIP's text input: start token, byte pairs, end token, zeros. Returns (len(texts), context_length), int64.

    Raises ValueError for a text that does not fit: the encoder would see only its beginning.
    """
    tokenizer = clip.simple_tokenizer.SimpleTokenizer()
    start, end = tokenizer.encoder["<|startoftext|>"], tokenizer.encoder["<|endoftext|>"]
    tokens = torch.zeros(len(texts), context_length, dtype=torch.int64)
    for row, text in zip(tokens, texts):
        ids = [start, *tokenizer.encode(text), end]
        if len(ids) > context_length:
            raise ValueError(f"'{text}' is too long for the text encoder: {len(ids)} tokens of {context_length}; shorten it")
        row[:len(ids)] = torch.tensor(ids)
    return tokens


@torch.no_grad()
def encode_text(clip_model: clip.model.CLIP, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Sec. 3.3's T: class names to text embeddings; several templates a name are averaged on the unit sphere.

    templates: sentences with one {} for the name. Returns (C, D), float32, rows of unit length.
    """
    texts = [template.replace("{}", name) for name in class_names for template in templates]
    device = clip_model.token_embedding.weight.device
    tokens = tokenize(texts, clip_model.context_length).to(device)
    embeddings = torch.cat([F.normalize(clip_model.encode_text(part), dim=-1) for part in tokens.split(256)])
    return F.normalize(embeddings.unflatten(0, (len(class_names), len(templates))).mean(1), dim=-1)  # (C, D)


# ------------------------------------------------------------------------------------------------- the method


class RegionAlignment(nn.Module):
    """Sec. 3.3, Fig. 3 (b): the region alignment module, RAM.

    align: which features enter Eq. 4 beside the patches: "GR", "G", "R" or "" (Table 7).
    """

    def __init__(self, dim: int, align: str = "GR") -> None:
        super().__init__()
        self.align = align
        self.image_proj = nn.Linear((len(align) + 1) * dim, dim)  # Eq. 4's Î; columns in the order G, R, I
        self.descriptor_proj = nn.Linear(2 * dim, dim)  # Eq. 6's descriptors; columns in the order T * R_a, T

    def forward(self, G: Tensor, I: Tensor, R: Tensor, T: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Eq. 4-6. G (B, D), I (B, N, D), R (B, M, D), T (C, D), grid (h, w).

        Returns the descriptors q (B, M C, D) and patches v (B, N, D), projected for the decoder, and the product
        T * R_a (B, M C, D), the first half of R̂, which the recovery loss wants.
        """
        # Eq. 4: Linear([Up(G), Up(R), I]) is the sum of three linears, and a linear and an upsampling commute: so G is
        # projected once an image and R once a region, not once a patch.
        *columns, I_columns = self.image_proj.weight.split(I.shape[-1], dim=1)  # each (D, D)
        v = F.linear(I, I_columns, self.image_proj.bias)  # (B, N, D)
        for feature, weight in zip(self.align, columns):
            if feature == "G":
                v = v + F.linear(G, weight)[:, None]
            else:
                m = math.isqrt(R.shape[1])
                cells = F.linear(R, weight).transpose(1, 2).unflatten(-1, (m, m))  # (B, D, m, m)
                upsampled = F.interpolate(cells, size=grid, mode="bilinear", align_corners=False)  # (B, D, h, w)
                v = v + upsampled.flatten(2).transpose(1, 2)  # (B, N, D)

        R_a = R + G[:, None]  # (B, M, D), Eq. 5
        R_t = (T * R_a[:, :, None]).flatten(1, 2)  # (B, M C, D), Eq. 6's first half
        # Eq. 6's second half is T whatever the image and the region: it is projected once a class.
        R_t_columns, T_columns = self.descriptor_proj.weight.chunk(2, dim=1)  # each (D, D)
        projected_T = F.linear(T, T_columns, self.descriptor_proj.bias)  # (C, D)
        q = F.linear(R_t, R_t_columns) + projected_T.repeat(R_a.shape[1], 1)  # (B, M C, D)
        return q, v, R_t


class CrossAttention(nn.Module):
    """Sec. 3.4's MHCA, Fig. 3 (c): multi-head attention in which x reads another sequence."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x (B, X, D) reads memory (B, Y, D). Returns (B, X, D)."""
        # A key's bias moves all scores of a row alike, which the softmax undoes: its gradient is 0 but for rounding, and
        # Adam would blow that up to full steps in random directions. Times 0, the gradient is what it should be.
        keys = F.linear(memory, self.k.weight, 0 * self.k.bias)  # (B, Y, D)
        q, k, v = (tokens.unflatten(-1, (DECODER_HEADS, -1)).transpose(1, 2)  # (B, heads, X or Y, d)
                   for tokens in (self.q(x), keys, self.v(memory)))
        out = attend(q, k, v, dropout=self.dropout if self.training else 0.0)  # (B, heads, X, d)
        return self.out(out.transpose(1, 2).flatten(2))  # (B, X, D)

    def mean_scores(self, x: Tensor, memory: Tensor) -> Tensor:
        """Table 5 without RAM, ZegCLIP's mask: the scores before the softmax, scaled, averaged over the heads (B, X, Y).

        The heads' dot products over d features each add up to one dot product over all D.
        """
        q, k = self.q(x), self.k(memory)
        return q @ k.transpose(1, 2) / (DECODER_HEADS * math.sqrt(q.shape[-1] / DECODER_HEADS))


class CrossBlock(nn.Module):
    """Fig. 3 (c): one layer of one branch: cross-attention, then a feed-forward network, each with a LayerNorm after it."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.attention = CrossAttention(dim, dropout)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(inplace=True), nn.Dropout(dropout),
                                 nn.Linear(4 * dim, dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x (B, X, D) reads memory (B, Y, D). Returns (B, X, D)."""
        x = self.norm1(x + self.dropout(self.attention(x, memory)))
        return self.norm2(x + self.ffn(x))


class TwoWayDecoder(nn.Module):
    """Eq. 7, Fig. 3 (c): layers of two branches, each reading what the other had before the layer.

    recompute: keep only the layers' inputs for the backward pass and compute the rest again there. With M C descriptors
    it is the decoder, not CLIP, that fills the memory: this is what lets 1,024 region tokens fit.
    """

    def __init__(self, dim: int, layers: int, dropout: float, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.q_blocks = nn.ModuleList(CrossBlock(dim, dropout) for _ in range(layers))
        self.v_blocks = nn.ModuleList(CrossBlock(dim, dropout) for _ in range(layers))

    def forward(self, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q: descriptors (B, M C, D), v: patches (B, N, D). Returns both, of the same shapes."""
        for q_block, v_block in zip(self.q_blocks, self.v_blocks):
            if self.recompute and torch.is_grad_enabled():  # with the same dropout: its random state is kept too
                q, v = (torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False)
                        for block, *inputs in ((q_block, q, v), (v_block, v, q)))
            else:
                q, v = q_block(q, v), v_block(v, q)
        return q, v


class RecoveryDecoder(nn.Module):
    """Eq. 9: from the decoder's q and v back to the descriptors R̂ and the patches I. Used in training only."""

    def __init__(self, dim: int, layers: int, dropout: float, recompute: bool = False) -> None:
        super().__init__()
        self.q_in, self.v_in = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.decoder = TwoWayDecoder(dim, layers, dropout, recompute)
        self.q_out, self.v_out = nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, M C, D), v (B, N, D). Returns (B, M C, 2 D) and (B, N, D)."""
        q, v = self.decoder(self.q_in(q), self.v_in(v))
        return self.q_out(q), self.v_out(v)


def truncated_normal(part: nn.Module) -> None:
    """Linear weights truncated normal with std 0.02, biases 0, LayerNorms 1 and 0: the released code's initialiser."""
    for module in part.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class CLIPRC(nn.Module):
    """Sec. 3, Fig. 3: the whole of CLIP-RC, and with parts left out every row of Tables 5-8, down to ZegCLIP.

    visual: OpenAI's `clip.model.VisionTransformer` (`load_clip(...).visual`); frozen here.
    num_prompts: K (Sec. 3.2). regions: M (Table 6); 0: no region-level bridge. update_regions: train them (Table 6).
    ram: Eq. 4-8; without it ZegCLIP's head, whose descriptor is [T * G, T] and whose mask is attention (Table 5).
    align: which of G and R enter Eq. 4: "GR", "G", "R" or "" (Table 7).
    rdl: the recovery loss (Table 5), with `recovery_layers` layers, 0 for no decoder, and `recovery_loss` "l1", "l2"
    or "kd" (Table 8).
    initialiser: the decoder's start: "released" is PyTorch's default, the layers of a branch copies of each other, which is
    what trained the paper's models; "truncated_normal" is the initialiser that the released code defines, never called.
    dropout: of prompts, and of the decoders' attention weights and layers. class_embedding_twice: see
    `rlb_attention.Encoder`. recompute: see `TwoWayDecoder`; None: from 256 regions on. It changes what a training step
    costs, not what it computes.
    Raises ValueError for settings that do not go together.
    """

    def __init__(self, visual: nn.Module, *, num_prompts: int = 10, regions: int = 16, update_regions: bool = False,
                 ram: bool = True, align: str = "GR", rdl: bool = True, recovery_layers: int = 1,
                 recovery_loss: str = "l1", initialiser: str = "released", dropout: float = 0.1,
                 class_embedding_twice: bool = True, recompute: bool | None = None) -> None:
        super().__init__()
        self.settings = {"num_prompts": num_prompts, "regions": regions, "update_regions": update_regions, "ram": ram,
                         "align": align, "rdl": rdl, "recovery_layers": recovery_layers, "recovery_loss": recovery_loss,
                         "initialiser": initialiser, "dropout": dropout, "class_embedding_twice": class_embedding_twice}
        if ram and not regions:
            raise ValueError("ram: region alignment needs region tokens; give --regions or leave RAM out too")
        if rdl and not ram:
            raise ValueError("rdl: the recovery decoder needs RAM's two branches; leave RDL out too")
        for name, value, known in (("align", align, ("GR", "G", "R", "")), ("recovery_loss", recovery_loss, RECOVERY_LOSSES),
                                   ("initialiser", initialiser, INITIALISERS)):
            if value not in known:
                raise ValueError(f"{name}: '{value}' is not one of {', '.join(repr(choice) for choice in known)}")
        dim = visual.proj.shape[1]  # D
        if dim % DECODER_HEADS:
            raise ValueError(f"the CLIP's joint space has {dim} dimensions, which {DECODER_HEADS} heads do not divide")
        recompute = regions >= 256 if recompute is None else recompute
        self.encoder = Encoder(visual, num_prompts, regions, update_regions, dropout, class_embedding_twice)
        if ram:
            self.ram = RegionAlignment(dim, align)
            self.decoder = TwoWayDecoder(dim, DECODER_LAYERS, dropout, recompute)
        else:
            self.descriptor_proj = nn.Linear(2 * dim, dim)
            self.decoder = nn.ModuleList(CrossBlock(dim, dropout) for _ in range(DECODER_LAYERS))
        branches = (self.decoder.q_blocks, self.decoder.v_blocks) if ram else (self.decoder,)
        if initialiser == "released":
            for first, *others in branches:
                for block in others:
                    block.load_state_dict(first.state_dict())
        else:
            for part in ([self.ram, self.decoder] if ram else [self.descriptor_proj, self.decoder]):
                truncated_normal(part)
            for block in (self.decoder.v_blocks if ram else ()):
                nn.init.zeros_(block.ffn[3].weight)
        self.rdl, self.recovery_loss = rdl, recovery_loss
        if rdl and recovery_layers:
            self.recovery = RecoveryDecoder(dim, recovery_layers, dropout, recompute)
            truncated_normal(self.recovery)  # whichever way the rest starts
        else:
            self.recovery = None

    def decode(self, G: Tensor, I: Tensor, R: Tensor, T: Tensor, grid: tuple[int, int]) -> tuple[Tensor, dict | None]:
        """Eq. 4-8: features and text to logits (B, C, h, w), and what the recovery loss starts from (None without RAM)."""
        if not hasattr(self, "ram"):
            return self.decode_zegclip(G, I, T).unflatten(-1, grid), None
        q, v, R_t = self.ram(G, I, R, T, grid)
        q_d, v_d = self.decoder(q, v)
        # Eq. 8 averages M maps q v^T; the mean over the regions can be taken first: the same value, M times less memory.
        mean_q = q_d.unflatten(1, (R.shape[1], len(T))).mean(1)  # (B, C, D)
        logits = (mean_q @ v_d.transpose(1, 2)).unflatten(-1, grid)  # (B, C, h, w)
        return logits, {"q": q, "q_d": q_d, "v_d": v_d, "R_t": R_t, "I": I, "T": T}

    def decode_zegclip(self, G: Tensor, I: Tensor, T: Tensor) -> Tensor:
        """Table 5 without RAM: ZegCLIP's decoder; the last layer's attention is the segmentation. Returns (B, C, N)."""
        q = self.descriptor_proj(torch.cat([T * G[:, None], T.expand(len(G), -1, -1)], dim=-1))  # (B, C, D)
        *blocks, last = self.decoder
        for block in blocks:
            q = block(q, I)
        return last.attention.mean_scores(q, I)

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """Fig. 3 (a): logits (B, C, H, W) at the images' size, before the sigmoid.

        images: (B, 3, H, W), normalised. text: T (C, D), rows of unit length.
        """
        logits, _ = self.logits_and_parts(images, text)
        return logits

    def logits_and_parts(self, images: Tensor, text: Tensor) -> tuple[Tensor, dict | None]:
        """Fig. 3 (a): `forward`, and what the recovery loss starts from."""
        grid = tuple(size // self.encoder.patch_size for size in images.shape[-2:])  # (h, w)
        logits, parts = self.decode(*self.encoder(images), text, grid)
        return F.interpolate(logits.float(), size=images.shape[-2:], mode="bilinear", align_corners=False), parts

    def losses(self, images: Tensor, labels: Tensor, text: Tensor, weights: tuple[float, float, float] = (100, 1, 2),
               unseen: Sequence[int] = (), pairs: Tensor | None = None) -> dict[str, Tensor]:
        """Sec. 3.5, Eq. 11: the training losses, each already times its weight; their sum is the total.

        images (B, 3, H, W); labels (B, H, W), integers: rows of text, or 255 for ignored; text T (C, D).
        weights: w_mask, w_dice, w_rec. unseen: rows of text whose labelled pixels get a pseudo label instead (the
        transductive setting). pairs: P, where this is a part of a batch whose P is known (`present_pairs`).
        Returns "mask" and "dice", and with RDL "recovery_q" and "recovery_v".
        """
        logits, parts = self.logits_and_parts(images, text)
        if unseen:
            labels = pseudo_labels(logits, labels, unseen)
        mask, dice = segmentation_losses(logits, labels, pairs)
        losses = {"mask": weights[0] * mask, "dice": weights[1] * dice}
        if self.rdl:
            for name, loss in self.recovery_losses(**parts).items():
                losses[name] = weights[2] * loss
        return losses

    def recovery_losses(self, q: Tensor, q_d: Tensor, v_d: Tensor, R_t: Tensor, I: Tensor, T: Tensor) -> dict[str, Tensor]:
        """Eq. 9-10: how far the decoder's features are from giving back what they were made of.

        The targets, R̂ = [T * R_a, T] and I, are constants here: the loss does not move the encoder.
        """
        distance = RECOVERY_LOSSES[self.recovery_loss]
        if self.recovery is None:  # Table 8's n = 0: the decoder's own outputs against its inputs
            return {"recovery_q": distance(q_d, q.detach()), "recovery_v": distance(v_d, I.detach())}
        q_r, v_r = self.recovery(q_d, v_d)
        every_T = T.repeat(R_t.shape[1] // len(T), 1).expand(len(R_t), -1, -1)  # (B, M C, D)
        R_hat = torch.cat([R_t.detach(), every_T], dim=-1)  # (B, M C, 2 D)
        return {"recovery_q": distance(q_r, R_hat), "recovery_v": distance(v_r, I.detach())}


def compile_parts(network: CLIPRC) -> None:
    """Fig. 3: has torch.compile translate the encoder and the decoders when they first run: minutes once, then quicker
    steps.

    On a GPU the encoder's attention then skips the blocks of the mask that nobody attends to (Fig. 5).
    """
    network.encoder.block_sparse = next(network.parameters()).device.type == "cuda"
    network.encoder.run_layers = torch.compile(network.encoder.run_layers)
    decoders = [network.decoder] if hasattr(network, "ram") else [*network.decoder]
    for part in decoders + ([network.recovery.decoder] if network.recovery else []):
        part.compile()


# ------------------------------------------------------------------------------------------------------ losses


def kd_loss(recovered: Tensor, target: Tensor) -> Tensor:
    """Table 8's KD: KL divergence of the softmaxes over the feature axis, at temperature 1, averaged over the tokens."""
    divergence = F.kl_div(recovered.float().log_softmax(-1), target.float().log_softmax(-1), log_target=True,
                          reduction="none")
    return divergence.sum(-1).mean()


RECOVERY_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "kd": kd_loss}


def pseudo_labels(logits: Tensor, labels: Tensor, unseen: Sequence[int]) -> Tensor:
    """Sec. 4.2-4.3, transductive: each pixel of an unseen class is named after the unseen class that now scores highest.

    logits (B, C, H, W), labels (B, H, W), unseen: rows of the text. Other pixels, ignored ones among them, keep theirs.
    """
    unseen = torch.tensor(unseen, device=labels.device)
    best = unseen[logits.detach()[:, unseen].argmax(1)]  # (B, H, W)
    return torch.where(torch.isin(labels, unseen), best.to(labels.dtype), labels)


def present_pairs(labels: Tensor, num_classes: int) -> Tensor:
    """Sec. 3.5 as released, P, a scalar: the (image, class) pairs present in a batch, averaged over the processes, at
    least 1."""
    sizes = torch.zeros(len(labels), num_classes + 1, device=labels.device)
    index = torch.where(labels == IGNORE, num_classes, labels).long().flatten(1)  # (B, H W)
    P = sizes.scatter_(1, index, 1.0)[:, :num_classes].sum()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(P)
        P /= dist.get_world_size()
    return P.clamp(min=1)


def segmentation_losses(logits: Tensor, labels: Tensor, pairs: Tensor | None = None,
                        alpha: float = 0.25) -> tuple[Tensor, Tensor]:
    """Sec. 3.5's L_NEL: sigmoid focal loss (gamma 2) and dice loss, both per class, both over P.

    logits (B, C, H, W), float32; labels (B, H, W), integers below C, or 255. pairs: P; None: `present_pairs` of these.
    focal: mean over pixels, sum over images and classes, over P; ignored pixels are negatives of every class.
    dice: 1 - (2 sum pt + 1) / (sum p + sum t + 1), summed over the present pairs, over P; ignored pixels are in sum p.

    No one-hot target (B, C, H, W) is made: a pixel is positive in at most one class, so the sums are taken as if it
    were negative everywhere, with the sign of that one logit flipped, and put right by what that one class adds.
    """
    P = present_pairs(labels, logits.shape[1]) if pairs is None else pairs
    labelled = labels != IGNORE  # (B, H, W)
    target = torch.where(labelled, labels, 0).long()[:, None]  # (B, 1, H, W)
    x_t = logits.gather(1, target)  # (B, 1, H, W), the logit of each pixel's own class
    z = logits.scatter(1, target, torch.where(labelled[:, None], -x_t, x_t))  # the larger, the worse
    wrong = z.sigmoid()  # p where the target is 0, 1 - p where it is 1

    def focal_terms(z: Tensor, wrong: Tensor) -> Tensor:
        return wrong.square() * F.softplus(z)

    x_t, target, labelled = x_t.flatten(1), target.flatten(1), labelled.flatten(1).to(logits.dtype)  # (B, H W)
    p_t = x_t.sigmoid()
    focal = (1 - alpha) * focal_terms(z, wrong).sum() + (2 * alpha - 1) * (labelled * focal_terms(-x_t, 1 - p_t)).sum()
    focal = focal / labelled.shape[1]

    def per_class(values: Tensor) -> Tensor:  # sum of a per-pixel value over the pixels of each class: (B, C)
        sums = logits.new_zeros(logits.shape[:2], dtype=torch.float64)  # added one by one, they would lose digits in float32
        return sums.scatter_add(1, target, (labelled * values).double()).to(logits.dtype)

    sum_t, sum_pt = per_class(torch.ones_like(p_t)), per_class(p_t)
    sum_p = wrong.flatten(2).sum(-1) + per_class(2 * p_t - 1)  # at its own class a pixel was counted as 1 - p
    present = sum_t > 0  # (B, C)
    dice = ((1 - (2 * sum_pt + 1) / (sum_p + sum_t + 1)) * present).sum()

    return focal / P, dice / P


# ------------------------------------------------------------------------------------------------ checkpoints


def visual_from_state(state: dict[str, Tensor]) -> nn.Module:
    """OpenAI's image transformer in the sizes of a state dict (its names, "conv1.weight", ...), loaded with it."""
    width, _, patch_size, _ = state["conv1.weight"].shape
    side = math.isqrt(len(state["positional_embedding"]) - 1)
    layers = sum(name.endswith(".ln_1.weight") for name in state)
    visual = clip.model.VisionTransformer(side * patch_size, patch_size, width, layers, width // 64, state["proj"].shape[1])
    visual.load_state_dict(state)
    return visual


def save_checkpoint(path: str | Path, model: CLIPRC, clip_sha256: str | None, **more) -> None:
    """A run's state (Sec. 4.2) as a file of tensors and plain values, written under a temporary name and renamed.

    clip_sha256: of the CLIP file, whose frozen weights are then left out; None: they go into the file.
    more: whatever else belongs to the run (class names, optimiser, ...), under its own name.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = {name: tensor for name, tensor in model.state_dict().items() if clip_sha256 is None or name in trained}
    partial = Path(f"{path}.partial")
    try:
        torch.save({"format": "clip-rc 1", "model": model.settings, "weights": weights, "clip_sha256": clip_sha256, **more},
                   partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({' '.join(str(error).split())[:120]}); "
                      f"what was there before is whole") from error


def read_checkpoint(path: str | Path) -> dict:
    """What `save_checkpoint` wrote, on the CPU. Raises ValueError for any other file; nothing in a file is ever run."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; train.py and convert.py write them")
    try:
        checkpoint = torch_load(path)
        weights, run, names = checkpoint["weights"], checkpoint.get("run", {}), checkpoint.get("class_names", [])
        D = next(len(tensor) for name, tensor in weights.items() if name.endswith("descriptor_proj.bias"))
        text = checkpoint.get("text", torch.empty(0, D))
        if not (checkpoint["format"] == "clip-rc 1" and isinstance(checkpoint["model"], dict)
                and isinstance(checkpoint.get("clip", ""), str) and isinstance(checkpoint["clip_sha256"], str | None)
                and all(map(torch.is_tensor, weights.values())) and all(isinstance(name, str) for name in names)
                and text.shape == (len(names), D) and text.isfinite().all()
                and set(checkpoint.get("unseen", [])) <= set(range(len(names)))
                and all(isinstance(run.get(key, usual), type(usual)) for key, usual in
                        {"crop_size": 512, "dataset": "", "data_root": "", "setting": "", "precision": ""}.items())):
            raise KeyError
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(f"{path} is not a checkpoint of this code; train.py and convert.py write such files") from error
    return checkpoint


def encode_names(checkpoint: dict, path: str | Path, class_names: Sequence[str], templates: Sequence[str],
                 clip_name_or_path: str | Path | None = None) -> Tensor:
    """Sec. 3.3's T (C, D) for other names than the training's, by the CLIP that a checkpoint was trained on.

    clip_name_or_path: where that CLIP is now; default: where it was, ViT-B/16 for a converted checkpoint. Raises
    ValueError for another CLIP file.
    """
    file = clip_file(clip_name_or_path or checkpoint.get("clip", "ViT-B/16"))
    if checkpoint["clip_sha256"] not in (None, file_sha256(file)):
        raise ValueError(f"--clip {file} is another CLIP file than {path} was trained on (their SHA-256 differ)")
    text = encode_text(load_clip(file), class_names, templates)
    dim = next(len(tensor) for name, tensor in checkpoint["weights"].items() if name.endswith("descriptor_proj.bias"))
    if text.shape[1] != dim:
        raise ValueError(f"--clip {file}: its texts have {text.shape[1]} dimensions, {path} wants {dim}; "
                         f"give the CLIP that it was trained on")
    return text


def model_from_checkpoint(checkpoint: dict, path: str | Path, clip_name_or_path: str | Path | None = None) -> CLIPRC:
    """The model of a checkpoint (`read_checkpoint(path)`), on the CPU, in eval mode.

    clip_name_or_path: the CLIP file that it was trained on; default: where it lay then. Not needed where the
    checkpoint holds the frozen weights too. Raises ValueError for another CLIP file and for weights that do not fit.
    """
    weights = checkpoint["weights"]
    if checkpoint["clip_sha256"] is not None:
        file = clip_file(clip_name_or_path or checkpoint.get("clip", "ViT-B/16"))
        if file_sha256(file) != checkpoint["clip_sha256"]:
            raise ValueError(f"{path} was trained on another CLIP file than {file} (their SHA-256 differ); give --clip")
        visual = load_clip(file).visual
    try:
        if checkpoint["clip_sha256"] is None:
            prefix = "encoder.visual."
            visual = visual_from_state({name.removeprefix(prefix): tensor for name, tensor in weights.items()
                                        if name.startswith(prefix)})
        model = CLIPRC(visual, **checkpoint["model"])
        missing, unexpected = model.load_state_dict(weights, strict=False)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if unexpected or trained & set(missing):
            raise KeyError((unexpected or sorted(trained & set(missing)))[0])
    except (KeyError, RuntimeError, TypeError, ValueError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path}: the checkpoint's weights are another model's than its settings say ({reason})") from error
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{path}: {broken[0]} holds NaN or infinite numbers")
    return model.eval()


# ------------------------------------------------------------------------------------------------- run alone


def describe(model: CLIPRC, images: Tensor, text: Tensor) -> str:
    """Fig. 3 as a table: each part, the shapes that it returns, its trained and its frozen parameters."""
    shapes = {}

    def note_shape(name: str):
        def hook(module: nn.Module, inputs: tuple, output) -> None:
            shapes[name] = ", ".join(str(tuple(t.shape)) for t in (output if isinstance(output, tuple) else (output,)))
        return hook

    names = {"encoder": "CLIP encoder + RLB (3.2): G, I, R", "ram": "region alignment, RAM (3.3): q, v, T*R_a",
             "descriptor_proj": "descriptors (ZegCLIP)", "decoder": "decoder (Eq. 7): q, v",
             "recovery": "recovery decoder, RDL (3.4): q, v"}
    parts = {name: part for name, part in model.named_children() if name in names}
    hooks = [part.register_forward_hook(note_shape(name)) for name, part in parts.items()]
    model.losses(images, torch.zeros(len(images), *images.shape[-2:], dtype=torch.int64, device=images.device), text)
    for hook in hooks:
        hook.remove()
    rows = [("part", "trained", "frozen", "returns")]
    for name, part in parts.items():
        trained, frozen = (sum(p.numel() for p in part.parameters() if p.requires_grad is flag) for flag in (True, False))
        rows.append((names[name], f"{trained:,}", f"{frozen:,}", shapes.get(name, "")))
    trained, frozen = (sum(p.numel() for p in model.parameters() if p.requires_grad is flag) for flag in (True, False))
    rows.append(("all", f"{trained:,}", f"{frozen:,}", f"logits {(len(images), len(text), *images.shape[-2:])}"))
    return "\n".join(f"{part:<42}{trained:>12}{frozen:>13}   {returns}" for part, trained, frozen, returns in rows)


def main() -> None:
    """Prints the parts of the model."""
    parser = argparse.ArgumentParser(description="Print CLIP-RC's parts: shapes, trained and frozen parameters.")
    parser.add_argument("--clip", help="a CLIP file or a published name (default: ViT-B/16's sizes, no weights needed)")
    parser.add_argument("--regions", type=int, default=16, help="M, a square number (default %(default)s)")
    parser.add_argument("--crop-size", type=int, default=512, help="pixels along a side (default %(default)s)")
    parser.add_argument("--classes", type=int, default=20, help="C (default %(default)s)")
    args = parser.parse_args()
    if not 1 <= args.crop_size <= 8192 or not 1 <= args.classes <= 10_000 or args.regions > 10_000:
        raise ValueError("--crop-size must be from 1 to 8192, --classes from 1 to 10,000, --regions at most 10,000")
    visual = load_clip(args.clip).visual if args.clip else None
    with torch.device("meta"):  # shapes without numbers
        visual = visual or clip.model.VisionTransformer(224, 16, 768, 12, 12, 512)
        model = CLIPRC(visual.to("meta"), regions=args.regions)
        images = torch.empty(1, 3, args.crop_size, args.crop_size)
        print(describe(model, images, torch.empty(args.classes, visual.proj.shape[1])))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(print(f"error: {' '.join(str(error).split())}", file=sys.stderr) or 2)
