"""CLIP's files and text encoder (paper Sec. 4.2: "We used the ViT-B/16 model from CLIP").

A CLIP is one that OpenAI published, downloaded once, or your own file. Code in a file never runs.
"""

import hashlib
import importlib.util
import math
import pickle
import re
import sys
import types
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# Importing `clip` normally also imports torchvision and pkg_resources, which we do not need.
# Registering an empty package of that name and path first lets us import only what we use.
try:
    if "clip" not in sys.modules:
        package = types.ModuleType("clip")
        package.__path__ = importlib.util.find_spec("clip").submodule_search_locations
        sys.modules["clip"] = package
    import clip.model
    import clip.simple_tokenizer
except (AttributeError, ImportError):  # AttributeError: find_spec returned None
    raise ImportError("OpenAI's CLIP is not installed: pip install openai-clip") from None

CLIP_URL = "https://openaipublic.azureedge.net/clip/models"
CLIP_FILES = {  # OpenAI's image transformers and the SHA-256 of their files
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}
TOY_CLIP = Path(__file__).with_name("toy_clip.pt")  # the toy world's small CLIP


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits. A checkpoint knows its CLIP by it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def clip_file(name_or_path: str | Path) -> Path:
    """The path of a CLIP file. A published name is downloaded once, to ~/.cache/clip.

    Raises ValueError for a name that is neither published nor a file, and for a wrong SHA-256.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.name == TOY_CLIP.name:  # a checkpoint records where the shipped file was in training
        return TOY_CLIP
    if name_or_path not in CLIP_FILES:
        raise ValueError(f"--clip {name_or_path}: no such file, nor one of {', '.join(CLIP_FILES)}")
    sha256, file_name = CLIP_FILES[name_or_path], re.sub("[/@]", "-", name_or_path) + ".pt"
    url = f"{CLIP_URL}/{sha256}/{file_name}"
    path = Path.home() / ".cache" / "clip" / file_name  # OpenAI's own package keeps it there too
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:  # PyTorch writes a temporary file, checks its SHA-256, then renames it
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256,
                                           progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:
            raise ValueError(f"--clip {name_or_path}: the download failed ({error}); fetch {url} "
                             f"elsewhere and give the file's path") from error
    elif file_sha256(path) != sha256:
        raise ValueError(f"--clip {name_or_path}: {path} is not OpenAI's file (its SHA-256 "
                         f"differs); delete it and try again")
    return path


def read_tensors(path: str | Path):
    """What a file of tensors and plain values holds, on the CPU; nothing in the file is ever run.

    Raises pickle.UnpicklingError for any other file.
    """
    with open(path, "rb") as file, warnings.catch_warnings(action="ignore"):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # PyTorch raises a dozen kinds for a damaged file
            raise pickle.UnpicklingError("it is no file of tensors") from error


def load_clip(name_or_path: str | Path) -> clip.model.CLIP:
    """Paper Sec. 4.2: CLIP's image and text encoder, frozen, on the CPU, float32, in eval mode.

    Its sizes are those of the file's tensors. Raises ValueError for a file that does not fit.
    """
    path = clip_file(name_or_path)
    try:
        state = read_openai(path)
        check(state)
        return build_clip(state)
    except Exception as error:  # PyTorch raises a dozen kinds for a file that does not fit
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{path} is no CLIP that can be used here: {reason[:200]}") from error


def read_openai(path: Path) -> dict[str, Tensor]:
    """The tensors of a file in OpenAI's format, float32: an archive as published or a state dict.

    OpenAI publishes TorchScript archives. Opening one can run code, so only OpenAI's are opened.
    """
    if file_sha256(path) in CLIP_FILES.values():
        with warnings.catch_warnings(action="ignore"):  # PyTorch calls TorchScript deprecated
            state = torch.jit.load(path, map_location="cpu").state_dict()
    else:
        state = read_tensors(path)
    sizes = ("input_resolution", "context_length", "vocab_size")  # the tensors' shapes tell them
    return {name: tensor.float() for name, tensor in state.items() if name not in sizes}


def check(state: dict[str, Tensor]) -> None:
    """Raise ValueError for a CLIP with a ResNet and for numbers that are not finite."""
    if "visual.layer1.0.conv1.weight" in state:
        raise ValueError("it holds a ResNet; CLIP-RC needs an image transformer like ViT-B/16")
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite numbers")


def build_clip(state: dict[str, Tensor]) -> clip.model.CLIP:
    """OpenAI's model around the tensors of its state dict, which become its parameters."""
    vision_width, _, patch_size, _ = state["visual.conv1.weight"].shape
    text_width, embed_dim = state["text_projection"].shape
    with torch.device("meta"):  # no memory, no initialisation
        model = clip.model.CLIP(
            embed_dim, patch_size * math.isqrt(len(state["visual.positional_embedding"]) - 1),
            count_layers(state, "visual.transformer."), vision_width, patch_size,
            len(state["positional_embedding"]), len(state["token_embedding.weight"]),
            text_width, text_width // 64, count_layers(state, "transformer."))
    model.load_state_dict(state, assign=True)
    for block in model.transformer.resblocks:  # the one tensor that a state dict does not hold
        block.attn_mask = model.build_attention_mask()
    return model.eval().requires_grad_(False)


def visual_from_state(state: dict[str, Tensor], prefix: str = "") -> clip.model.VisionTransformer:
    """OpenAI's image transformer around the tensors of `state` whose names begin with `prefix`."""
    state = {name[len(prefix):]: state[name] for name in state if name.startswith(prefix)}
    width, _, patch_size, _ = state["conv1.weight"].shape
    with torch.device("meta"):
        visual = clip.model.VisionTransformer(
            patch_size * math.isqrt(len(state["positional_embedding"]) - 1), patch_size, width,
            count_layers(state, "transformer."), width // 64, state["proj"].shape[1])
    visual.load_state_dict(state, assign=True)
    return visual


def count_layers(state: dict[str, Tensor], tower: str) -> int:
    """The number of transformer layers whose tensors' names begin with `tower`."""
    return sum(name.startswith(tower) and name.endswith(".ln_1.weight") for name in state)


def tokenize(texts: Sequence[str], context_length: int) -> Tensor:
    """CLIP's text input (len(texts), context_length), int64: start, byte pairs, end, zeros.

    Raises ValueError for a text that does not fit or contains a start or end token: the encoder
    would read only its beginning.
    """
    tokenizer = clip.simple_tokenizer.SimpleTokenizer()
    start, end = tokenizer.encoder["<|startoftext|>"], tokenizer.encoder["<|endoftext|>"]
    tokens = torch.zeros(len(texts), context_length, dtype=torch.int64)
    for row, text in zip(tokens, texts):
        ids = [start, *tokenizer.encode(text), end]
        if ids.count(start) + ids.count(end) > 2:
            raise ValueError(f"'{text}' contains <|startoftext|> or <|endoftext|>; remove it")
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
    Raises ValueError for two names that CLIP cannot tell apart, such as "car" and "Car": with two
    equal rows in T, one of the two classes would never be predicted.
    """
    texts = [template.replace("{}", name) for name in class_names for template in templates]
    tokens = tokenize(texts, clip_model.context_length)
    rows = tokens[::len(templates)].tolist()
    for i, row in enumerate(rows):
        if rows.index(row) < i:
            raise ValueError(f"the class names '{class_names[rows.index(row)]}' and "
                             f"'{class_names[i]}' are the same to CLIP; remove or rename one")
    tokens = tokens.to(clip_model.token_embedding.weight.device)
    T = torch.cat([F.normalize(clip_model.encode_text(part), dim=-1) for part in tokens.split(256)])
    T = T.unflatten(0, (len(class_names), len(templates)))  # (C, templates, D)
    return F.normalize(T.mean(1), dim=-1)  # (C, D)
