"""CLIP's file, which is found, read in one form and never run, and its text encoder."""

import pytest
import torch
import torch.nn.functional as F
from conftest import make_clip, openai_state

from util.clip_files import TOY_CLIP, clip_digest, clip_file, encode_text, load_clip, tokenize


def test_openais_own_file_and_one_with_heads_and_activations_give_the_same_clip(tmp_path):
    original, path, images = make_clip(), tmp_path / "clip.pt", torch.randn(1, 3, 64, 64)
    torch.save(openai_state(original), path)
    openais, tokens, digests = load_clip(path), tokenize(["a photo of a dog"], 77), []
    for numbers in ([1, 1, 1, 1], [4, 1, 1, 1], [1, 2, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0]):
        heads, quick_gelu = torch.tensor(numbers).view(2, 2)  # of image and text encoder
        torch.save(original.float().state_dict() | {"heads": heads, "quick_gelu": quick_gelu}, path)
        loaded = load_clip(path)
        digests.append(clip_digest(loaded))
        for encoder, *expected in zip((loaded.visual, loaded), heads, quick_gelu):
            block = encoder.transformer.resblocks[-1]
            assert [block.attn.num_heads, "Quick" in str(block.mlp.gelu)] == expected
    torch.testing.assert_close(openais(images, tokens), original(images, tokens))
    assert digests[0] == clip_digest(openais)
    assert not (loaded.training or loaded.visual.proj.requires_grad)
    openais.visual.proj[0, 0] += 1
    assert len({*digests, clip_digest(openais)}) == 6


def test_another_form_is_refused_with_its_door_and_no_code_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip.pt").write_bytes(b"cos\nmkdir\n(Vtrap\ntR.")  # a pickle: os.mkdir("trap")
    state = make_clip().state_dict()  # without heads or OpenAI's three numbers: whose is it?
    for found, reason in ((None, "no file of tensors"), (state, "heads")):
        if found:
            torch.save(found, "clip.pt")
        with pytest.raises(ValueError, match=rf"^clip.pt is no CLIP in the form .*{reason}.*; run  "
                           "python -m tools.convert_clip clip.pt OUT.pt$"):
            load_clip("clip.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["clip.pt"]


def test_a_published_clip_is_found_by_its_name_and_by_another_machines_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = "ViT-B/16", "/home/al/.cache/clip/ViT-B-16.pt", "C:\\Users\\al\\ViT-B-16.pt"
    with pytest.raises(FileNotFoundError, match="run  python -m tools.get clip ViT-B/16, or give"):
        clip_file("ViT-B/16")
    (cached := tmp_path / ".cache/clip-rc/ViT-B-16.pt").parent.mkdir(parents=True)
    cached.touch(), (toy := tmp_path / "toy_clip.pt").touch()
    assert [clip_file(name) for name in (*names, cached)] == [cached] * 4
    assert clip_file(toy) == toy and clip_file("/gone/toy_clip.pt") == TOY_CLIP  # code has moved


def test_tokens_are_openais_and_a_text_that_would_be_read_in_part_is_refused():
    tokens = tokenize(["a photo of a dog", "word " * 75], 77)
    assert tokens[0, :8].tolist() == [49406, 320, 1125, 539, 320, 1929, 49407, 0]
    assert tokens.shape == (2, 77) and tokens[1, 76] == 49407
    with pytest.raises(ValueError, match="too long.* 78 tokens"):
        tokenize(["word " * 76], 77)


def test_templates_are_averaged_at_unit_length_and_names_that_clip_reads_alike_refused(clip_path):
    clip_model = load_clip(clip_path)
    T = encode_text(clip_model, ["dog", "tram"], ["a photo of a {}.", "one {} in the scene."])
    E = clip_model.encode_text(tokenize(["a photo of a tram.", "one tram in the scene."], 77))
    torch.testing.assert_close(T[1], F.normalize(F.normalize(E, dim=1).mean(0), dim=0))
    with pytest.raises(ValueError, match="'car' and 'Car'"):
        encode_text(clip_model, ("dog", "car", "Car"), ["a {}", "the {}"])
