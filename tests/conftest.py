"""What the tests share: a small CLIP in OpenAI's two file formats, the recorded numbers of the released code."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model  # noqa: E402

# One thread, here and in the processes that tests start: sums in another order would differ in their last digits, and
# what is compared to the bit must not.
torch.set_num_threads(1)

GOLDEN = ("clip_rc_inductive", "clip_rc_transductive", "zegclip_inductive")


def make_clip(width: int = 64, layers: int = 2, patch: int = 16, resolution: int = 64, dim: int = 32, seed: int = 0):
    """A random CLIP of OpenAI's class, in single precision: everything real but the size."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model.clip.model.CLIP(dim, resolution, layers, width, patch, 77, 49408, 64, 1, 1).eval()


def openai_state(clip_model: torch.nn.Module) -> dict:
    """A state dict as OpenAI publishes it: half precision where its code uses it, and the three bare numbers."""
    model.clip.model.convert_weights(clip_model)
    return clip_model.state_dict() | {"input_resolution": torch.tensor(clip_model.visual.input_resolution),
                                      "context_length": torch.tensor(77), "vocab_size": torch.tensor(49408)}


@pytest.fixture(scope="session")
def clip_path(tmp_path_factory) -> Path:
    """A small CLIP's file: a plain state dict in half precision."""
    path = tmp_path_factory.mktemp("clip") / "small.pt"
    torch.save(openai_state(make_clip()), path)
    return path


@pytest.fixture(scope="session", params=GOLDEN)
def golden(request) -> dict:
    """What one of the released programs computed on small random weights."""
    return torch.load(ROOT / "tests" / "golden" / f"{request.param}.pt", weights_only=True)
