"""Other people's CLIPs become the one form that is read here; nothing in their files is run."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TEXTS, make_clip, openai_state, refused, run, weights, write_clip
from torch.testing import assert_close

from tools.convert_clip import convert
from util.clip_files import load_clip, read_tensors, tokenize

MODEL = make_clip()
PUBLISHED = openai_state(MODEL)  # mostly in half precision
PLAIN = {name: x for name, x in PUBLISHED.items() if x.is_floating_point()}
OPEN_CLIP = dict(sorted(PLAIN.items(), key=lambda item: "attn" in item[0]))  # ln_1 stands first


def save_safetensors(state: dict, path: Path) -> None:
    """Write a file as the package safetensors does."""
    table, end = {"__metadata__": {"format": "pt"}}, 0
    for name, x in state.items():
        table[name] = dict(dtype="F32", shape=x.shape, data_offsets=[end, end := end + x.nbytes])
    header, numbers = json.dumps(table).encode(), [x.numpy().tobytes() for x in state.values()]
    path.write_bytes(b"".join([len(header).to_bytes(8, "little"), header, *numbers]))


@pytest.mark.parametrize("save", [torch.save, save_safetensors])
@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("library", ["hugging_face", "open_clip"])
@torch.no_grad()
def test_features_are_the_librarys_also_where_a_folder_has_two_forms(library, act, save, tmp_path):
    for kind in ("hugging_face_gelu", "open_clip_gelu", f"{library}_{act}"):
        record = write_clip(kind, tmp_path / "clip", save)
    if library == "hugging_face":
        (tmp_path / "clip" / "open_clip_config.json").unlink()
    convert(tmp_path / "clip", tmp_path / "out.pt")
    clip_model, layers = load_clip(tmp_path / "out.pt"), []
    clip_model.visual.transformer.register_forward_hook(lambda *hooked: layers.append(hooked[-1]))
    G = clip_model.visual(weights({"images": (2, 3, 64, 64)})["images"])
    I = clip_model.visual.ln_post(layers[0].transpose(0, 1)[:, 1:]) @ clip_model.visual.proj
    T = clip_model.encode_text(tokenize(TEXTS, 77))
    for ours, theirs in ((G, record["G"]), (I, record["I"]), (T, record["T"])):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("found, quick", [
    (PUBLISHED, 1), (OPEN_CLIP, 0), (MODEL, 1),
    ({"name": "run", "state_dict": {f"module.{name}": x for name, x in PLAIN.items()}}, 0),
    ({"model": {f"clip.{name}": x for name, x in PLAIN.items()} | {"head": torch.ones(3)}}, 1)])
def test_what_people_save_is_found_and_without_a_config_the_order_tells_the_activation(
        found, quick, tmp_path, capsys):
    torch.save(found, tmp_path / "clip.pt")
    convert(tmp_path / "clip.pt", tmp_path / "out.pt")
    state = read_tensors(tmp_path / "out.pt")
    assert state.pop("heads").tolist() + state.pop("quick_gelu").tolist() == [1, 1, quick, quick]
    assert ("config.json is missing" in capsys.readouterr().out) == (found is not PUBLISHED)
    assert_close(state, PLAIN, rtol=0, atol=0)  # halves stay halves


@pytest.mark.parametrize("name, reason", [
    ("-visual.proj", "no 'proj'"), ("visual.proj", "mismatch for proj"), ("text.cls_emb", "CoCa"),
    ("visual.class_embedding", "visual.class_embedding holds NaN"),
    ("visual.layer1.0.conv1.weight", "ResNet"), ("ema.visual.proj", "one CLIP alone; 2 are in")])
def test_another_model_than_clip_is_refused_with_the_reason(name, reason, tmp_path):
    state = PLAIN | {name: torch.full((3, 3), float("nan") if "NaN" in reason else 1)}
    state.pop(name[1:], None)  # a name behind a minus is missing
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=f"bad.pt cannot be converted: .*{reason}"):
        convert(tmp_path / "bad.pt", tmp_path / "out.pt")


@pytest.mark.parametrize("part, key, value", [
    ("text_config", "hidden_act", "gelu_new"), ("vision_config", "layer_norm_eps", 1e-6),
    ("text_config", "eos_token_id", 7), ("text_cfg", "pool_type", "last")])
def test_a_config_that_openais_class_cannot_follow_is_refused(part, key, value, tmp_path):
    library = "open_clip" if "cfg" in part else "hugging_face"
    write_clip(f"{library}_gelu", tmp_path, part=part, **{key: value})
    with pytest.raises(ValueError, match=f"cannot be converted: its config says {key}: "):
        convert(tmp_path, tmp_path / "out.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning",
                            "ignore::torch.jit.TracerWarning")
def test_archives_are_read_without_torchscript_and_nothing_in_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    original, inputs = make_clip(), (torch.randn(1, 3, 64, 64), tokenize(["a dog"], 77))
    original.register_buffer("input_resolution", torch.tensor(64))
    torch.jit.trace(original, inputs).save("traced.pt")
    Path("pickle.pt").write_bytes(b"cos\nmkdir\n(Vtrap\ntR.")  # os.mkdir("trap")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "jit", None)
        convert(Path("traced.pt"), Path("out.pt"))
        with pytest.raises(ValueError, match="pickle.pt cannot be converted"):
            convert(Path("pickle.pt"), Path("gone.pt"))
    assert not Path("trap").exists()
    assert_close(load_clip("out.pt")(*inputs), original(*inputs))


def test_no_file_is_replaced_and_the_command_says_what_comes_next(tmp_path):
    torch.save({name: x.bfloat16() for name, x in PLAIN.items()}, tmp_path / "clip.pt")
    arguments = tmp_path / "clip.pt", tmp_path / "out.pt"
    result = run(*arguments, program="tools/convert_clip.py")
    assert "patches of 16 and images of 64 pixels\nnext: python train.py --clip " in result.stdout
    assert read_tensors(arguments[1])["visual.proj"].dtype == torch.float  # was bfloat16
    arguments[1].write_text("mine")
    assert "exists already" in refused(*arguments, program="tools/convert_clip.py")
    assert arguments[1].read_text() == "mine"
