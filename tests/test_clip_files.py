"""CLIP's files are read in OpenAI's, Hugging Face's and OpenCLIP's form, and never run."""

import importlib.util
import json
import math
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import make_clip, openai_state, write_clip

from eval import untrained_encoder
from record_clip_files import TEXTS, weights
from util import clip_files
from util.clip_files import TOY_CLIP, clip_file, encode_text, file_sha256, load_clip, tokenize
from util.clip_formats import from_open_clip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("form", ["half precision", "single precision", "archive"])
def test_each_of_openais_formats_gives_the_same_clip(form, tmp_path, monkeypatch):
    path, original = tmp_path / "clip.pt", make_clip()
    images, tokens = torch.randn(1, 3, 64, 64), tokenize(["a photo of a dog"], 77)
    if form == "half precision":
        torch.save(openai_state(original), path)
        original.float()  # rounded to half precision
    elif form == "single precision":
        torch.save(original.state_dict(), path)
    else:
        torch.jit.trace(original, (images, tokens)).save(path)
        monkeypatch.setitem(clip_files.CLIP_FILES, "small", file_sha256(path))
    loaded = load_clip(path)
    expected = original.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected[name]), name
    torch.testing.assert_close(loaded(images, tokens), original(images, tokens))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_a_pickle_in_a_clip_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip.pt").write_bytes(b"cos\nmkdir\n(Vtrap\ntR.")  # os.mkdir("trap")
    with pytest.raises(ValueError, match="clip.pt"):
        load_clip("clip.pt")
    assert not (tmp_path / "trap").exists()


class Program(torch.nn.Module):
    """As TorchScript it would write a file while it is opened."""

    @torch.jit.export
    def __getstate__(self) -> bool:
        return self.training

    @torch.jit.export
    def __setstate__(self, training: bool) -> None:
        self.training = training
        torch.save(torch.ones(1), "trap")

    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_archive_that_is_not_openais_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.script(Program()).save("clip.pt")
    with pytest.raises(ValueError, match="clip.pt"):
        load_clip("clip.pt")
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("name, reason", [
    ("-visual.proj", "no 'visual.proj'"), ("visual.proj", "mismatch for proj"),
    ("visual.class_embedding", "visual.class_embedding holds NaN"),
    ("visual.layer1.0.conv1.weight", "ResNet"), ("visual.trunk.norm.weight", "timm's"),
    ("visual.attn_pool.query", "CoCa"), ("text.cls_emb", "CoCa"),
    ("visual.transformer.resblocks.0.ls_1.gamma", "scaled"), ("-visual.conv1.weight", "encoders"),
    ("text.transformer.encoder.layer.0.weight", "text encoder"), ("-visual.ln_pre.bias", "ln_pre"),
    ("token_embedding.weight", "3 entries"), ("visual.positional_embedding", "positional")])
def test_another_model_than_clip_is_refused_with_the_reason(name, reason, tmp_path):
    state = openai_state(make_clip())
    state[name] = torch.full((3, 3), math.nan if "NaN" in reason else 1)
    state.pop(name[1:], None)  # a name behind a minus is missing
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=f"bad.pt is no CLIP that can be used.*{reason}") as error:
        load_clip(tmp_path / "bad.pt")
    assert "\n" not in str(error.value)


def test_a_file_that_is_missing_or_no_file_of_tensors_is_refused(tmp_path, monkeypatch):
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "half.pt").write_bytes(TOY_CLIP.read_bytes()[:100_000])
    torch.save({"vision_model.post_layernorm.bias": torch.ones(3)}, tmp_path / "vision.pt")
    (tmp_path / "clip.safetensors").touch()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for name, reason in (("list.pt", "list"), ("half.pt", "no file of tensors"),
                         ("clip.safetensors", "pip install safetensors"),
                         (".", "no pytorch_model.bin, model.safetensors"),
                         ("vision.pt", "put its config.json beside it")):
        with pytest.raises(ValueError, match=f"{name} is no CLIP that can be used.*{reason}"):
            load_clip(tmp_path / name)


@pytest.fixture
def save_safetensors(monkeypatch):
    """Writes a .safetensors file. Without the package `read_tensors` stands in for its reader."""
    if importlib.util.find_spec("safetensors"):
        return importlib.import_module("safetensors.torch").save_file
    package = types.SimpleNamespace(load_file=clip_files.read_tensors)
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, package)
    return lambda state, path: torch.save(state, path)


@torch.no_grad()
def assert_features(path: Path, record: dict) -> None:
    """The image's, the patches' and the texts' features are those that the library computed."""
    clip_model, images = load_clip(path), weights({"images": (2, 3, 64, 64)})["images"]
    _, I, _ = untrained_encoder(clip_model.visual, 0)(images)
    for ours, theirs in ((clip_model.encode_image(images), record["G"]),
                         (I, F.normalize(record["I"], dim=-1)),
                         (clip_model.encode_text(tokenize(TEXTS, 77)), record["T"])):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("library", ["hugging_face", "open_clip"])
def test_features_are_the_librarys(library, act, safe, tmp_path, capsys, save_safetensors):
    save = save_safetensors if safe else torch.save
    assert_features(tmp_path, write_clip(f"{library}_{act}", tmp_path, save))
    assert not capsys.readouterr().out


def test_a_clip_in_the_hubs_cache_is_found_through_its_links(tmp_path, save_safetensors):
    record = write_clip("hugging_face_gelu", tmp_path / "blobs", save_safetensors)
    for folder, name in (("snapshots/4d1", "x"), ("refs", "main")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).write_text("4d1")
    for i, file in enumerate((tmp_path / "blobs").iterdir()):
        (tmp_path / "snapshots" / "4d1" / file.name).symlink_to(f"../../blobs/{i}")
        file.rename(tmp_path / "blobs" / f"{i}")
    for path in (".", "snapshots/4d1", "snapshots/4d1/model.safetensors"):
        assert_features(tmp_path / path, record)


def test_a_clip_in_several_files_is_read_and_none_of_them_from_elsewhere(tmp_path):
    record = write_clip("hugging_face_gelu", tmp_path / "clip")
    path, index = tmp_path / "clip" / "pytorch_model.bin.index.json", {}
    for i, tensor in enumerate(weights(record["shapes"]).items()):
        index[tensor[0]] = f"{i}.bin"
        torch.save(dict([tensor]), tmp_path / "clip" / f"{i}.bin")
    path.write_text(json.dumps({"weight_map": index}))
    assert_features(path, record)
    (tmp_path / "clip" / "7.bin").rename(tmp_path / "7.bin")
    path.write_text(path.read_text().replace('"7.bin', '"../7.bin'))
    with pytest.raises(ValueError, match="index.json is no CLIP.*'../7.bin'"):
        load_clip(path)


def test_a_checkpoint_of_openclips_training_is_read(tmp_path):
    record = write_clip("open_clip_quick_gelu", tmp_path)
    state = {f"module.{name}": tensor for name, tensor in weights(record["shapes"]).items()}
    state |= {"module.logit_scale": torch.ones(1), "module.logit_bias": torch.ones(1)}
    torch.save({"epoch": 3, "name": "run", "state_dict": state}, tmp_path / "epoch_3.pt")
    assert_features(tmp_path / "epoch_3.pt", record)


def test_of_two_forms_in_a_folder_the_one_with_a_config_is_read(tmp_path):
    hugging_face = write_clip("hugging_face_gelu", tmp_path)
    assert_features(tmp_path, write_clip("open_clip_gelu", tmp_path))
    (tmp_path / "open_clip_config.json").unlink()
    assert_features(tmp_path, hugging_face)


@pytest.mark.parametrize("kind, quick_gelu", [("published", True), ("OpenAI's order", True),
                                              ("OpenCLIP's order", False), ("training", False)])
def test_without_a_config_the_kind_of_file_tells_the_activation(kind, quick_gelu, tmp_path, capsys):
    state = openai_state(make_clip())
    if kind != "published":
        state = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    if kind == "OpenCLIP's order":
        state = dict(sorted(state.items(), key=lambda item: "attn" in item[0]))
    torch.save({"state_dict": state} if kind == "training" else state, tmp_path / "clip.pt")
    clip_model = load_clip(tmp_path / "clip.pt")
    for block in (*clip_model.transformer.resblocks, *clip_model.visual.transformer.resblocks):
        assert isinstance(block.mlp.gelu, torch.nn.GELU) != quick_gelu
    line = f'config.json is missing; assumed: {{"quick_gelu": {json.dumps(quick_gelu)}}}, 1 heads'
    assert capsys.readouterr().out.count(line) == (kind != "published")


def test_without_a_config_the_heads_are_those_of_openclips_own_models(tmp_path):
    for widths, heads in (((768, 512), [12, 8]), ((1664, 1280), [16, 20])):  # ViT-B, ViT-bigG
        names = {"visual.proj": widths[0], "text_projection": widths[1], "visual.conv1.weight": 1,
                 "token_embedding.weight": 49408}
        state = {name: torch.ones(length, 1) for name, length in names.items()}
        _, encoders = from_open_clip(state, tmp_path / "open_clip_config.json")
        assert [number for number, _ in encoders] == heads


@pytest.mark.parametrize("part, key, value", [
    ("", "model_type", "siglip"), ("text_config", "hidden_act", "gelu_new"),
    ("vision_config", "layer_norm_eps", 1e-6), ("vision_config", "hidden_size", 768),
    ("text_config", "eos_token_id", 7), ("vision_cfg", "width", 768),
    ("text_cfg", "no_causal_mask", True), ("text_cfg", "embed_cls", True),
    ("text_cfg", "pool_type", "last"), ("text_cfg", "hf_tokenizer_name", "bert"),
    ("vision_cfg", "norm_kwargs", {"eps": 1e-6}), ("vision_cfg", "image_size", [16, 64])])
def test_a_config_that_openais_class_cannot_follow_is_refused(part, key, value, tmp_path):
    kind = "open_clip" if "cfg" in part else "hugging_face"
    write_clip(f"{kind}_gelu", tmp_path, part=part, **{key: value})
    with pytest.raises(ValueError, match="model.bin is no CLIP.*its config says " + re.escape(
            f"{key}: {value}, where")):
        load_clip(tmp_path)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home folder, and a server that has ViT-B/16's file, which holds `weights`."""
    monkeypatch.setattr(clip_files.Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(clip_files, "CLIP_URL", (tmp_path / "server").as_uri())
    (tmp_path / "weights").write_bytes(b"weights")
    sha256 = file_sha256(tmp_path / "weights")
    monkeypatch.setitem(clip_files.CLIP_FILES, "ViT-B/16", sha256)
    (tmp_path / "server" / sha256).mkdir(parents=True)
    (tmp_path / "weights").rename(tmp_path / "server" / sha256 / "ViT-B-16.pt")
    return tmp_path / "home"


def test_a_published_clip_is_downloaded_once(home, monkeypatch):
    file = clip_file("ViT-B/16")
    assert file == home / ".cache" / "clip" / "ViT-B-16.pt" and file.read_bytes() == b"weights"
    monkeypatch.setattr(clip_files, "CLIP_URL", "file:///nowhere")
    assert clip_file("ViT-B/16") == file


def test_a_download_with_another_sha256_is_refused_and_not_kept(home, monkeypatch):
    served = home.parent / "server" / clip_files.CLIP_FILES["ViT-B/16"] / "ViT-B-16.pt"
    served.write_bytes(b"weight")
    with pytest.raises(ValueError, match="ViT-B/16: the download failed"):
        clip_file("ViT-B/16")
    assert [file.suffix for file in (home / ".cache" / "clip").iterdir()] == [".lock"]


def test_a_published_file_that_was_altered_is_refused(home):
    clip_file("ViT-B/16").write_bytes(b"something else")
    with pytest.raises(ValueError, match="ViT-B-16.pt is not OpenAI's file"):
        clip_file("ViT-B/16")


@pytest.mark.parametrize("name", ["RN50", "missing.pt"])
def test_a_clip_that_is_neither_published_nor_a_file_is_refused(name):
    with pytest.raises(FileNotFoundError, match=f"--clip {name}: no such file.*ViT-B/16"):
        clip_file(name)


def test_the_shipped_clip_is_found_after_the_code_has_moved(tmp_path):
    assert clip_file(tmp_path / "gone" / "toy_clip.pt") == TOY_CLIP and TOY_CLIP.is_file()
    (tmp_path / "toy_clip.pt").touch()
    assert clip_file(tmp_path / "toy_clip.pt") == tmp_path / "toy_clip.pt"


def test_without_openais_package_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "clip")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    spec = importlib.util.spec_from_file_location("clip_files", clip_files.__file__)
    with pytest.raises(ImportError, match="^[^\n]*pip install openai-clip$"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_tokens_are_openais():
    tokens = tokenize(["a photo of a dog"], 77)
    assert tokens.shape == (1, 77)
    assert tokens[0, :8].tolist() == [49406, 320, 1125, 539, 320, 1929, 49407, 0]


@pytest.mark.parametrize("text, reason", [
    ("word " * 76, "too long"), ("a <|endoftext|> b", "remove it"),
    ("&lt;|StartOfText|&gt;", "remove it")])
def test_a_text_of_which_clip_would_read_only_a_part_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        tokenize([text], 77)


def test_embeddings_of_several_templates_are_averaged_at_unit_length(clip_path):
    clip_model = load_clip(clip_path)
    T = encode_text(clip_model, ["dog", "tram"], ["a photo of a {}.", "one {} in the scene."])
    tokens = tokenize(["a photo of a tram.", "one tram in the scene."], 77)
    expected = F.normalize(F.normalize(clip_model.encode_text(tokens), dim=1).mean(0), dim=0)
    assert T.shape == (2, 32)
    torch.testing.assert_close(T[1], expected)


@pytest.mark.parametrize("names", [("car", "Car"), ("caf\u00e9", "cafe\u0301"),
                                   ("a & b", "a &amp; b"), ("car", "car")])
def test_two_names_that_clip_cannot_tell_apart_are_refused(names, clip_path):
    with pytest.raises(ValueError, match=f"'{names[0]}' and '{names[1]}'"):
        encode_text(load_clip(clip_path), ("dog", *names), ["a {}", "the {}"])


def test_two_words_that_the_toy_clip_has_never_seen_are_accepted():
    T = encode_text(load_clip(TOY_CLIP), ["zebra", "tram"], ["a photo of a {}"])
    assert T.shape == (2, 128)
