"""Other people's CLIPs in the one form that train.py reads (paper Sec. 4.2).

    python -m tools.convert_clip FILE_OR_FOLDER OUT.pt

Reads Hugging Face's, OpenCLIP's and fine-tuned CLIPs and OpenAI's archives; runs nothing in them.
"""

import json
import pickle
import re
import sys
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from util.clip_files import build_clip, read_tensors
from util.processes import run_script

HUGGING_FACE = {  # parts of Hugging Face's names and of OpenAI's, replaced in this order
    "text_model.": "", "vision_model.": "visual.", "embeddings.": "", "patch_embedding.": "conv1.",
    "position_embedding.weight": "positional_embedding", "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection", "encoder.layers.": "transformer.resblocks.",
    "pre_layrnorm.": "ln_pre.", "post_layernorm.": "ln_post.", "final_layer_norm.": "ln_final.",
    "layer_norm": "ln_", "self_attn.": "attn.", "fc1.": "c_fc.", "fc2.": "c_proj."}
UNUSED = "input_resolution context_length vocab_size logit_bias attn_mask position_ids".split()
UNFIT = {  # how a name begins that OpenAI's class does not have
    r"heads$": "train.py reads it as it is",
    r"visual\.layer1\.": "it holds a ResNet; CLIP-RC needs an image transformer like ViT-B/16",
    r"visual\.(trunk|head|attn_pool)|cls_emb|.*\.ls_1\.gamma":
        "it is another kind of model (SigLIP, EVA, MobileCLIP, CoCa, ...)",
    r"transformer\.(?!resblocks\.)": "its text encoder is not CLIP's"}
VOCABULARY = 49408  # entries of OpenAI's tokenizer; the last one ends a text
KNOWN = {  # what a .safetensors file or an archive may name
    "F32": torch.float, "F16": torch.half, "BF16": torch.bfloat16, "I64": torch.long,
    "torch.FloatStorage": torch.float, "torch.HalfStorage": torch.half,
    "torch.LongStorage": torch.long, "torch.IntStorage": torch.int,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_tensor_v2": lambda x, at, size, step, *_: x.as_strided(size, step, at)}
Inert = type("Inert", (dict,), {  # stands for all else: it keeps attributes and computes nothing
    "__init__": lambda *_: None,
    "__setstate__": lambda self, state: self.update(state if isinstance(state, dict) else {})})


def tensors(found: dict, start: str = ""):
    """Yield the names and tensors in a dictionary and in those inside it, or in a whole model."""
    for name, value in found.items():
        if isinstance(value, dict):
            yield from tensors(value, f"{start}{name}.")
        elif isinstance(value, Tensor):
            yield re.sub(r"_(modules|parameters|buffers)\.", "", f"{start}{name}"), value


def read_archive(path: Path) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive under their names. None of its code is run."""
    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            return KNOWN.get(f"{module}.{name}", Inert)

        def persistent_load(self, pid):
            return torch.frombuffer(bytearray(archive.read(f"{data}/{pid[2]}")), dtype=pid[1])

    with zipfile.ZipFile(path) as archive:
        data = archive.namelist()[0].partition("/")[0] + "/data"
        return dict(tensors(Reader(archive.open(f"{data}.pkl")).load()))


def read_clip(path: Path) -> tuple[dict, Path]:
    """What the file at `path` or in that folder holds, and the file; links are not followed."""
    if path.is_dir():
        if (main := path / "refs" / "main").is_file():  # a model's folder in the hub's cache
            path = path / "snapshots" / main.read_text().strip()
        files = [file for file in sorted(path.iterdir(), reverse=True) if re.fullmatch(
            r"(open_clip_)?(pytorch_)?model\.(bin|safetensors)", file.name)]
        if not files:
            raise ValueError("it has no pytorch_model.bin, model.safetensors or open_clip_...")
        path = max(files, key=lambda file: file.name.startswith("open_clip_") ==
                   (path / "open_clip_config.json").is_file())  # there may be a CLIP in two forms
    if path.suffix == ".safetensors":  # a table's length, the table in JSON, the numbers
        data = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
        start = 8 + int.from_bytes(data[:8].tolist(), "little")
        return {name: data[start:][slice(*part["data_offsets"])].clone().view(
                KNOWN[part["dtype"]]).reshape(part["shape"]) for name, part in
                json.loads(bytes(data[8:start].tolist())).items() if "dtype" in part}, path
    try:
        return read_tensors(path), path
    except pickle.UnpicklingError:
        if zipfile.is_zipfile(path):
            return read_archive(path), path
        raise


def rename(found: dict) -> tuple[dict[str, Tensor], str]:
    """The one CLIP in a dictionary under OpenAI's names, and its form. ValueError for others."""
    places = {match.groups() for name, _ in tensors(found)
              if (match := re.match(r"(|.*?\.)(visual|vision_model)\.", name))}
    if len(places) != 1:
        raise ValueError(f"save one CLIP alone; {len(places)} are in {', '.join(map(str, found))}")
    (start, encoder), = places  # such as "state_dict.module."
    state, form = {}, ("Hugging Face's" if encoder == "vision_model" else
                       "OpenCLIP's" if {"name", "state_dict"} <= {*found} else "OpenAI/OpenCLIP's")
    for name, tensor in tensors(found):
        new = name.removeprefix(start).removeprefix("text.")
        for theirs, openais in HUGGING_FACE.items():
            new = new.replace(theirs, openais)
        form = "OpenAI's" if new == "input_resolution" else form
        if name.startswith(start) and new.split(".")[-1] not in UNUSED:
            reasons = [UNFIT[beginning] for beginning in UNFIT if re.match(beginning, new)]
            if reasons or not tensor.isfinite().all():
                raise ValueError([*reasons, f"{name} holds NaN or infinite numbers"][0])
            tensor = tensor if tensor.dtype == torch.half else tensor.float()
            state[new] = tensor.T if name.endswith("_projection.weight") else tensor  # (W, D)
    for name in [name for name in state if ".q_proj." in name]:
        parts = [state.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        state[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    if (entries := len(state["token_embedding.weight"])) != VOCABULARY:
        raise ValueError(f"its vocabulary is not OpenAI's: {entries} entries, not {VOCABULARY}")
    return state, form


def encoders(state: dict[str, Tensor], form: str, path: Path) -> tuple[list[int], list[bool]]:
    """The numbers of heads of image and text encoder, and whether they have QuickGELU."""
    widths = len(state["visual.conv1.weight"]), state["token_embedding.weight"].shape[1]
    heads = [min(widths[0] // 64, 16), widths[1] // 64]  # of OpenAI's and OpenCLIP's own models
    hugging_face = form == "Hugging Face's"
    file = path.with_name("config.json" if hugging_face else "open_clip_config.json")
    if hugging_face and not file.is_file():
        raise ValueError("put its config.json beside it, which tells activation and heads")
    if form == "OpenAI's":
        return heads, [True, True]
    if not file.is_file():
        print(f"{file} is missing; heads and activation are assumed")
        # In OpenAI's class a block begins with its attention. A .safetensors file is sorted.
        block = next((name for name in state if ".resblocks.0." in name), "")
        openais = ".attn." in block and form != "OpenCLIP's" and path.suffix != ".safetensors"
        return heads, [openais, openais]
    config = json.loads(file.read_text("utf-8"))
    config = config.get("model_cfg", config)
    quick_gelu = [config.get("quick_gelu", False)] * 2
    for i, kind in enumerate(("vision", "text")):
        part = next((config[key] for key in (f"{kind}_cfg", f"{kind}_config_dict", f"{kind}_config")
                     if config.get(key) is not None), {})
        fits = {"width": (widths[i],), "hidden_size": (widths[i],), "layer_norm_eps": (1e-5,),
                "hidden_act": ("quick_gelu", "gelu"), "model_type": ("clip", f"clip_{kind}_model"),
                "eos_token_id": (VOCABULARY - 1, 2, None)}  # 2 is an old error, None the image's
        if hugging_face:
            heads[i] = part.get("num_attention_heads", (12, 8)[i])
            quick_gelu[i] = part.get("hidden_act") != "gelu"
        elif part:
            heads[i] = part.get("heads", 8) if i else widths[0] // part.get("head_width", 64)
            fits |= {key: (False, "tok", "argmax", "linear", "learnable")  # OpenAI's way
                     for key, value in part.items() if isinstance(value, (bool, str, dict))
                     or isinstance(value, list) and value[0] != value[1]}  # height and width
        for key, fit in fits.items():
            if (value := (config | part).get(key, fit[0])) not in fit:
                raise ValueError(f"its config says {key}: {value}, where {fit[0]} would fit")
    return heads, quick_gelu


@torch.no_grad()
def convert(source: Path, out: Path) -> None:
    """Write the CLIP in a file or folder to `out`, a new file. A ValueError says why it cannot."""
    path, partial = source, out.with_name(f"{out.name}.partial")
    if out.suffix != ".pt" or out.exists():
        raise ValueError(f"{out} exists already or does not end in .pt; choose another name")
    try:
        found, path = read_clip(source)
        state, form = rename(found)
        heads, quick_gelu = encoders(state, form, path)
        visual = build_clip(state, heads, quick_gelu).visual
        state |= {"heads": torch.tensor(heads), "quick_gelu": torch.tensor(quick_gelu).long()}
        torch.save(state, partial)
        partial.replace(out)
    except Exception as error:  # PyTorch raises a dozen kinds for a file that does not fit
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{path} cannot be converted: {reason[:200]}") from error
    print(f"read {path}: {form} form; image and text encoder: heads {heads}, QuickGELU "
          f"{quick_gelu}; patches of {visual.conv1.kernel_size[0]} and images of "
          f"{visual.input_resolution} pixels\nnext: python train.py --clip {out}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(print(__doc__) if "--help" in sys.argv else __doc__)
    run_script(lambda: convert(Path(sys.argv[1]), Path(sys.argv[2])))
