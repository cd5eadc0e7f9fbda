"""CLIP's files and text encoder (paper Sec. 4.2: "We used the ViT-B/16 model from CLIP").

A CLIP is one that OpenAI published, downloaded once, or your own file or folder (OpenAI's form,
Hugging Face's or OpenCLIP's). Code in a file never runs.
"""

import fcntl
import hashlib
import importlib.util
import json
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
from torch import Tensor, nn

from util import clip_formats

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
    """SHA-256 of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def clip_file(name_or_path: str | Path, download: bool = True) -> Path:
    """The path of a CLIP's file or folder. A published name is downloaded once, to ~/.cache/clip.
    download: False for what a checkpoint says, which may be where another machine has the file.
    Raises FileNotFoundError for a name that is neither published nor a file, ValueError for a wrong
    SHA-256."""
    path = Path(name_or_path)
    if path.exists():
        return path
    if path.name == TOY_CLIP.name:  # a checkpoint records where the shipped file was in training
        return TOY_CLIP
    file_names = {re.sub("[/@]", "-", name) + ".pt": name for name in CLIP_FILES}
    if not download:
        name_or_path = file_names.get(path.name, name_or_path)
    if name_or_path not in CLIP_FILES:
        raise FileNotFoundError(f"--clip {name_or_path}: no such file, nor one of "
                                f"{', '.join(CLIP_FILES)}")
    sha256, file_name = CLIP_FILES[name_or_path], re.sub("[/@]", "-", name_or_path) + ".pt"
    url = f"{CLIP_URL}/{sha256}/{file_name}"
    path = Path.home() / ".cache" / "clip" / file_name  # OpenAI's own package keeps it there too
    if not path.exists():
        if not download:
            raise FileNotFoundError(f"{path}: no such file")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:  # PyTorch writes a temporary file, checks its SHA-256, then renames it
            with open(path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes one downloads
                if not path.exists():
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
    Raises pickle.UnpicklingError for any other file."""
    with open(path, "rb") as file, warnings.catch_warnings(action="ignore"):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # PyTorch raises a dozen kinds for a damaged file
            raise pickle.UnpicklingError("it is no file of tensors") from error


def load_clip(name_or_path: str | Path) -> clip.model.CLIP:
    """Paper Sec. 4.2: CLIP's image and text encoder, frozen, on the CPU, float32, in eval mode.
    Sizes, heads and activation are the file's. Raises ValueError for a file that does not fit."""
    path = clip_file(name_or_path)
    try:
        path = clip_formats.weights_file(path)
        return build_clip(*clip_formats.openai_form(read_weights(path), path))
    except Exception as error:  # PyTorch raises a dozen kinds for a file that does not fit
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{path} is no CLIP that can be used here: {reason[:200]}") from error


def read_weights(path: Path) -> dict:
    """What a file of weights holds, or all the files that an index lists. To open a TorchScript
    archive, as OpenAI publishes, can run code. Only OpenAI's own are opened."""
    if path.suffix == ".json":  # `with_name` refuses what lies outside the folder
        files = set(json.loads(path.read_text())["weight_map"].values())
        return {k: v for file in files for k, v in read_weights(path.with_name(file)).items()}
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ValueError("pip install safetensors, which reads it") from None
        return load_file(path)
    try:
        return read_tensors(path)
    except pickle.UnpicklingError:
        if file_sha256(path) not in CLIP_FILES.values():
            raise
        with warnings.catch_warnings(action="ignore"):  # PyTorch calls TorchScript deprecated
            return torch.jit.load(path, map_location="cpu").state_dict()


def build_clip(state: dict[str, Tensor], encoders: list[tuple[int, bool]]) -> clip.model.CLIP:
    """OpenAI's model around the tensors of its state dict, which become its parameters.
    encoders: of image and text the number of heads and whether there is QuickGELU."""
    text_width, embed_dim = state["text_projection"].shape
    with torch.device("meta"):  # no memory, no initialisation; both transformers are replaced
        model = clip.model.CLIP(embed_dim, 1, 1, 64, 1, len(state["positional_embedding"]),
                                len(state["token_embedding.weight"]), text_width, 1, 1)
    model.visual = visual_from_state(state, "visual.", *encoders[0])
    mask = model.build_attention_mask()  # the one tensor that a state dict does not hold
    model.transformer = empty_transformer(state, "transformer.", *encoders[1], mask)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def visual_from_state(state: dict[str, Tensor], prefix: str = "", heads: int | None = None,
                      quick_gelu: bool = True) -> clip.model.VisionTransformer:
    """OpenAI's image transformer around the tensors of `state` whose names begin with `prefix`."""
    state = {name[len(prefix):]: state[name] for name in state if name.startswith(prefix)}
    width, _, patch_size, _ = state["conv1.weight"].shape
    side = patch_size * math.isqrt(len(state["positional_embedding"]) - 1)
    with torch.device("meta"):
        visual = clip.model.VisionTransformer(side, patch_size, width, 1, 1, state["proj"].shape[1])
    visual.transformer = empty_transformer(state, "transformer.", heads or width // 64, quick_gelu)
    visual.load_state_dict(state, assign=True)
    return visual


def empty_transformer(state: dict[str, Tensor], prefix: str, heads: int, quick_gelu: bool,
                      mask: Tensor | None = None) -> clip.model.Transformer:
    """OpenAI's transformer with the layers and the MLPs' width of `state`, which is not loaded."""
    layers = sum(name.startswith(prefix) and name.endswith(".ln_1.weight") for name in state)
    hidden, width = state[f"{prefix}resblocks.0.mlp.c_fc.weight"].shape
    with torch.device("meta"):
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
    """CLIP's text input (len(texts), context_length), int64: start, byte pairs, end, zeros.
    Raises ValueError for a text that does not fit or contains a start or end token: the encoder
    would read only its beginning."""
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
    Raises ValueError for two names that CLIP cannot tell apart, such as "car" and "Car": one of two
    classes with equal rows in T would never be predicted."""
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
