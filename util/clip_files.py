"""CLIP's file and text encoder (paper Sec. 4.2: "We used the ViT-B/16 model from CLIP").

A CLIP's file holds tensors under OpenAI's names and, as `heads` and `quick_gelu`, two numbers each,
of the image and of the text encoder (OpenAI's own: heads of width 64, QuickGELU).
tools.convert_clip makes it of other CLIPs. Nothing in a file is ever run.
"""

import hashlib
import importlib.util
import math
import os
import pickle
import re
import sys
import types
import warnings
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.processes import rank

# `import clip` also imports torchvision and pkg_resources, which setuptools 82 lacks. An empty
# package of that name and path, registered first, lets us import only what we use.
try:
    if "clip" not in sys.modules:
        package = types.ModuleType("clip")
        package.__path__ = importlib.util.find_spec("clip").submodule_search_locations
        sys.modules["clip"] = package
    import clip.model
    import clip.simple_tokenizer
except (AttributeError, ImportError):  # AttributeError: find_spec returned None
    raise ImportError("OpenAI's CLIP is not installed: pip install openai-clip") from None

NAMES = ("ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px")  # OpenAI's image transformers
TOY_CLIP = Path(__file__).with_name("toy_clip.pt")  # the toy world's small CLIP


def clip_file(name_or_path: str | Path) -> Path:
    """The path of a CLIP's file. Published ones are in ~/.cache/clip-rc, also if a checkpoint says
    where another machine had them. Raises FileNotFoundError."""
    names = {re.sub("[/@]", "-", name) + ".pt": name for name in NAMES}
    path, last = Path(name_or_path).expanduser(), PureWindowsPath(name_or_path).name  # any system's
    file = {name: file for file, name in names.items()}.get(str(name_or_path), last)
    for place in (path, TOY_CLIP, Path(os.path.expanduser("~/.cache/clip-rc"), file)):
        if place.exists() and place.name == file:
            return place
    raise FileNotFoundError(f"--clip {name_or_path}: not here; run  python -m tools.get clip "
                            f"{names.get(file, '')}".rstrip() + ", or give a file")


def read_tensors(path: str | Path):
    """What a file of tensors and plain values holds, on the CPU; nothing in the file is ever run.
    Raises pickle.UnpicklingError for any other file."""
    with open(path, "rb") as file, warnings.catch_warnings(action="ignore"):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # PyTorch raises a dozen kinds for a damaged file
            raise pickle.UnpicklingError("it is no file of tensors") from error


def load_clip(name_or_path: str | Path) -> clip.model.CLIP:
    """Paper Sec. 4.2: CLIP's image and text encoder, frozen, on the CPU, float32, in eval mode.
    Raises ValueError for a file in another form."""
    path = clip_file(name_or_path)
    try:
        state = read_tensors(path)
        if not ({"heads", "quick_gelu"} <= state.keys() or "input_resolution" in state):
            raise KeyError("heads and quick_gelu")
        for name in ("input_resolution", "context_length", "vocab_size"):  # in OpenAI's own files
            state.pop(name, None)
        widths = torch.tensor([len(state["visual.proj"]), len(state["text_projection"])])
        heads = state.pop("heads", widths // 64).tolist()
        return build_clip(state, heads, state.pop("quick_gelu", torch.ones(2)).tolist())
    except Exception as error:  # a file that does not fit makes a dozen kinds
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path} is no CLIP in the form that is read here ({reason}); run  "
                         f"python -m tools.convert_clip {path} OUT.pt") from error


def build_clip(state: dict[str, Tensor], heads: Sequence[int],
               quick_gelu: Sequence[int]) -> clip.model.CLIP:
    """OpenAI's model with the tensors of `state`. heads, quick_gelu: of image and text encoder."""
    (width, D), context = state["text_projection"].shape, len(state["positional_embedding"])
    model = clip.model.CLIP(D, 32, 1, 64, 32, context, len(state["token_embedding.weight"]), width,
                            1, 1)  # the next lines replace the transformers
    model.visual = build_visual(state, "visual.", heads[0], quick_gelu[0])
    model.transformer = build_transformer(state, "transformer.", heads[1], quick_gelu[1],
                                          model.build_attention_mask())
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def build_visual(state: dict[str, Tensor], prefix: str, heads: int,
                 quick_gelu: int = 1) -> clip.model.VisionTransformer:
    """OpenAI's image transformer with those tensors of `state` whose names begin with prefix."""
    state = {name[len(prefix):]: state[name] for name in state if name.startswith(prefix)}
    width, _, patch_size, _ = state["conv1.weight"].shape
    side = patch_size * math.isqrt(len(state["positional_embedding"]) - 1)
    visual = clip.model.VisionTransformer(side, patch_size, width, 1, heads, state["proj"].shape[1])
    visual.transformer = build_transformer(state, "transformer.", heads, quick_gelu)
    visual.load_state_dict(state)
    return visual


def build_transformer(state: dict[str, Tensor], prefix: str, heads: int, quick_gelu: int,
                      mask: Tensor | None = None) -> clip.model.Transformer:
    """OpenAI's transformer with the layers and the MLPs' width of `state`, which is not loaded."""
    layers = sum(name.startswith(prefix) and name.endswith(".ln_1.weight") for name in state)
    hidden, width = state[f"{prefix}resblocks.0.mlp.c_fc.weight"].shape
    transformer = clip.model.Transformer(width, layers, heads, mask)
    for block in transformer.resblocks:
        block.mlp.c_fc, block.mlp.c_proj = nn.Linear(width, hidden), nn.Linear(hidden, width)
        block.mlp.gelu = clip.model.QuickGELU() if quick_gelu else nn.GELU()
    return transformer


def clip_digest(clip_model: clip.model.CLIP) -> str:
    """SHA-256 of a CLIP's tensors, heads and activations, the same for every form of its file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(clip_model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy())
    for transformer in (clip_model.visual.transformer, clip_model.transformer):
        block = transformer.resblocks[0]
        digest.update(f"{block.attn.num_heads} {type(block.mlp.gelu).__name__}".encode())
    return digest.hexdigest()


def tokenize(texts: Sequence[str], context_length: int) -> Tensor:
    """CLIP's text input (len(texts), context_length), int64: start, byte pairs, end, zeros. Raises
    ValueError for a text that is too long for the encoder."""
    tokenizer = clip.simple_tokenizer.SimpleTokenizer()
    start, end = tokenizer.encoder["<|startoftext|>"], tokenizer.encoder["<|endoftext|>"]
    tokens = torch.zeros(len(texts), context_length, dtype=torch.int64)
    for row, text in zip(tokens, texts):
        ids = [start, *tokenizer.encode(text), end]
        if len(ids) > context_length:
            raise ValueError(f"'{text}' is too long for the text encoder: {len(ids)} tokens of "
                             f"{context_length}; shorten it")
        row[:len(ids)] = torch.tensor(ids)
    return tokens


@torch.no_grad()
def encode_text(clip_model: clip.model.CLIP, class_names: Sequence[str],
                templates: Sequence[str]) -> Tensor:
    """Paper Sec. 3.3: T (C, D), the text embeddings of the class names, rows of unit length.
    templates: sentences with one {} for the name. A name's unit-length embeddings are averaged.
    Raises ValueError for two names that CLIP cannot tell apart, such as "car" and "Car"."""
    texts = [template.replace("{}", name) for name in class_names for template in templates]
    tokens = tokenize(texts, clip_model.context_length)
    rows = tokens[::len(templates)].tolist()
    for i, row in enumerate(rows):
        if rows.index(row) < i:
            raise ValueError(f"the class names '{class_names[rows.index(row)]}' and "
                             f"'{class_names[i]}' are the same to CLIP; remove or rename one")
    if rank() == 0 and (foreign := [name for name in class_names if not name.isascii()]):
        print(f"note: CLIP was trained on English; {foreign[0]} may mean nothing to it")
    tokens = tokens.to(clip_model.token_embedding.weight.device)
    T = torch.cat([F.normalize(clip_model.encode_text(part), dim=-1) for part in tokens.split(256)])
    T = T.unflatten(0, (len(class_names), len(templates)))  # (C, templates, D)
    return F.normalize(T.mean(1), dim=-1)  # (C, D)
