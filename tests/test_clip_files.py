"""CLIP's files are read as published or as plain tensors, and never run; class names become T."""

import importlib.util
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import make_clip, openai_state

from util import clip_files
from util.clip_files import TOY_CLIP, clip_file, encode_text, file_sha256, load_clip, tokenize


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

    def __init__(self):
        super().__init__()
        self.training = False

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


@pytest.mark.parametrize("kind, reason", [
    ("no tensor", "visual.proj"), ("another shape", "visual.proj"), ("a list", "list"),
    ("NaN", "visual.proj holds NaN"), ("ResNet", "ResNet"), ("half a file", "no file of tensors")])
def test_a_file_that_is_no_clip_is_refused_with_the_reason(kind, reason, tmp_path):
    path, state = tmp_path / "bad.pt", openai_state(make_clip())
    if kind == "no tensor":
        del state["visual.proj"]
    elif kind == "another shape":
        state["visual.proj"] = state["visual.proj"][:3]
    elif kind == "NaN":
        state["visual.proj"][0, 0] = math.nan
    elif kind == "ResNet":
        state["visual.layer1.0.conv1.weight"] = torch.ones(3)
    elif kind == "a list":
        state = [1, 2]
    torch.save(state, path)
    if kind == "half a file":
        path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=f"bad.pt.*{reason}") as error:
        load_clip(path)
    assert "\n" not in str(error.value)


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
    assert not list((home / ".cache" / "clip").iterdir())


def test_a_published_file_that_was_altered_is_refused(home):
    clip_file("ViT-B/16").write_bytes(b"something else")
    with pytest.raises(ValueError, match="ViT-B-16.pt is not OpenAI's file"):
        clip_file("ViT-B/16")


@pytest.mark.parametrize("name", ["RN50", "missing.pt"])
def test_a_clip_that_is_neither_published_nor_a_file_is_refused(name):
    with pytest.raises(ValueError, match=f"--clip {name}: no such file.*ViT-B/16"):
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
