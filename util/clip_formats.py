"""Hugging Face's and OpenCLIP's files of a CLIP, brought to OpenAI's form (paper Sec. 4.2).

The tensors only have other names. Activation and heads stand in a JSON file beside them.
"""

import functools
import json
import re
from pathlib import Path

import torch
from torch import Tensor

from util.processes import rank

HUGGING_FACE = {  # parts of Hugging Face's names and of OpenAI's, replaced in this order
    "text_model.embeddings.": "", "vision_model.embeddings.": "visual.",
    "position_embedding.weight": "positional_embedding", "patch_embedding.": "conv1.",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",  # their spelling
    "vision_model.post_layernorm.": "visual.ln_post.", "text_model.final_layer_norm.": "ln_final.",
    "visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection",
    ".layer_norm": ".ln_", ".self_attn.": ".attn.", ".fc1.": ".c_fc.", ".fc2.": ".c_proj.",
}
UNUSED = "input_resolution context_length vocab_size logit_bias attn_mask position_ids".split()
UNFIT = {  # how a name begins that OpenAI's class does not have
    r"visual\.layer1\.": "it holds a ResNet; CLIP-RC needs an image transformer like ViT-B/16",
    r"visual\.(trunk|head)\.": "its image encoder is one of timm's (SigLIP, EVA, MobileCLIP, ...)",
    r"visual\.attn_pool|cls_emb": "it is a CoCa, whose features are pooled in another way",
    r".*\.ls_1\.gamma": "its layers are scaled, which OpenAI's class cannot compute",
    r"transformer\.(?!resblocks\.)": "its text encoder is not CLIP's",
}
OPEN_CLIP_WORDS = (False, "tok", "argmax", "linear", "learnable")  # for OpenAI's own way
VOCABULARY = 49408  # entries of OpenAI's tokenizer; the last one ends a text
print_once = functools.cache(print)


def weights_file(path: Path) -> Path:
    """The file in a folder that holds its CLIP. Links are not followed: in the hub's cache they
    lead to nameless files that have no config beside them."""
    if path.is_file():
        return path
    if (main := path / "refs" / "main").is_file():  # a model's folder in the hub's cache
        path = path / "snapshots" / main.read_text().strip()
    open_clip = (path / "open_clip_config.json").is_file()  # a folder may hold a CLIP in two forms
    files = [file for file in sorted(path.iterdir(), reverse=True) if re.fullmatch(
        r"(open_clip_)?(pytorch_)?model\.(bin|safetensors)(\.index\.json)?", file.name)]
    if not files:
        raise ValueError("the folder has no pytorch_model.bin, model.safetensors or open_clip_...")
    return max(files, key=lambda file: file.name.startswith("open_clip_") == open_clip)


def openai_form(state: dict, path: Path) -> tuple[dict[str, Tensor], list[tuple[int, bool]]]:
    """What the file at `path` holds under OpenAI's names in float32; of the image and of the text
    encoder the number of heads and whether it has QuickGELU. ValueError for unfit models."""
    if any(name.startswith(("text_model.", "vision_model.")) for name in state.keys()):
        state, encoders = from_hugging_face(state, path.with_name("config.json"))
    else:
        state, encoders = from_open_clip(state, path.with_name("open_clip_config.json"))
    return {name: tensor.float() for name, tensor in state.items()}, encoders


def from_hugging_face(state: dict, file: Path) -> tuple[dict, list[tuple[int, bool]]]:
    """The same for a CLIPModel. What its config does not say has Hugging Face's default."""
    if not file.is_file():
        raise ValueError(f"put its {file.name} beside it, which tells activation and heads")
    config, renamed, encoders = json.loads(file.read_text("utf-8")), {}, []
    require(config, model_type=("clip",))
    for name, tensor in state.items():
        for theirs, openais in HUGGING_FACE.items():
            name = name.replace(theirs, openais)
        linear = name in ("visual.proj", "text_projection")  # (D, W), OpenAI's is (W, D)
        renamed[name] = tensor.T.contiguous() if linear else tensor
    for name in [name for name in renamed if ".q_proj." in name]:
        parts = [renamed.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        renamed[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    renamed = check(renamed)
    for kind, proj, heads in (("vision", "visual.proj", 12), ("text", "text_projection", 8)):
        part = config.get(f"{kind}_config_dict")  # where it is given, it replaces the other wholly
        part = (config.get(f"{kind}_config") or {}) if part is None else part
        require(part, hidden_act=("quick_gelu", "gelu"), layer_norm_eps=(1e-5,),
                hidden_size=(len(renamed[proj]),))
        encoders.append((part.get("num_attention_heads", heads), part.get("hidden_act") != "gelu"))
    require(part, eos_token_id=(VOCABULARY - 1, 2))  # 2 is an old error that means the same
    return renamed, encoders


def from_open_clip(state: dict, file: Path) -> tuple[dict, list[tuple[int, bool]]]:
    """The same for OpenCLIP's and OpenAI's files. Without a config the kind of file decides, with
    the heads of OpenCLIP's own models, and a line is printed."""
    published, training = "input_resolution" in state, "state_dict" in state
    state = check({name.removeprefix("module.").removeprefix("text."): tensor
                   for name, tensor in state.get("state_dict", state).items()})
    widths = len(state["visual.proj"]), len(state["text_projection"])
    if published:  # by OpenAI
        return state, [(width // 64, True) for width in widths]
    # A block of OpenAI's class begins with its attention, one of OpenCLIP's with ln_1.
    block = next((name for name in state if ".resblocks.0." in name), "")
    config = {"quick_gelu": block.endswith("attn.in_proj_weight") and not training}
    heads = [min(widths[0] // 64, 16), widths[1] // 64]
    if file.is_file():
        config = json.loads(file.read_text("utf-8"))
        config = config.get("model_cfg", config)
    elif rank() == 0:
        print_once(f"{file} is missing; assumed: {json.dumps(config)}, {heads[0]} heads (image), "
                   f"{heads[1]} heads (text)", flush=True)
    for i, part in enumerate((config.get("vision_cfg", {}), config.get("text_cfg", {}))):
        words = [key for key, value in part.items() if isinstance(value, (bool, str, dict))
                 or isinstance(value, list) and value[0] != value[1]]  # image_size: height, width
        require(part, width=(widths[i],), **dict.fromkeys(words, OPEN_CLIP_WORDS))
        if part:
            heads[i] = part.get("heads", 8) if i else widths[0] // part.get("head_width", 64)
    return state, [(number, config.get("quick_gelu", False)) for number in heads]


def check(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that OpenAI's class has. Raises ValueError where they are another model's."""
    state = {name: tensor for name, tensor in state.items() if name.split(".")[-1] not in UNUSED}
    for name, tensor in state.items():
        for beginning, reason in UNFIT.items():
            if re.match(beginning, name):
                raise ValueError(reason)
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite numbers")
    if not {"visual.conv1.weight", "token_embedding.weight"} <= state.keys():
        raise ValueError("it does not hold CLIP's two encoders, image and text")
    if (entries := len(state["token_embedding.weight"])) != VOCABULARY:
        raise ValueError(f"its vocabulary is not OpenAI's: {entries} entries, not {VOCABULARY}")
    return state


def require(config: dict, **allowed: tuple) -> None:
    """Raise ValueError for a value in a config that OpenAI's class cannot compute with."""
    for key, values in allowed.items():
        if config.get(key, values[0]) not in values:
            raise ValueError(f"its config says {key}: {config[key]}, where {values[0]} would fit")
