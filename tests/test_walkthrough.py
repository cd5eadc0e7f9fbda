"""docs/walkthrough.md and .ipynb are built from today's source, and their numbers are right."""

import hashlib
import json
import re

import pytest
import torch

from conftest import ROOT
from tools import make_docs
from util.checkpoint import TOY_MODEL, read_checkpoint

PAGE, NOTEBOOK = ROOT / "docs" / "walkthrough.md", ROOT / "docs" / "walkthrough.ipynb"
REBUILD = "run  python -m tools.make_docs"


def test_page_and_notebook_are_built_from_todays_source():
    sha256 = hashlib.sha256(make_docs.SOURCE.read_bytes()).hexdigest()
    assert sha256 in PAGE.read_text("utf-8").splitlines()[0], REBUILD
    assert sha256 == json.loads(NOTEBOOK.read_text("utf-8"))["metadata"]["sha256"], REBUILD


def test_excerpts_are_todays_code():
    page, cells = PAGE.read_text("utf-8"), json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    notebook = "\n".join(cell["source"] for cell in cells)
    excerpts = re.findall(r"\{\{ (excerpt\(.*\)) \}\}", make_docs.SOURCE.read_text("utf-8"))
    assert len(excerpts) > 10
    for call in excerpts:
        code = eval(call, {"excerpt": make_docs.excerpt})
        assert code in page and code in notebook, f"{call}: {REBUILD}"


def test_images_of_the_page_are_there_and_small():
    names = re.findall(r"\]\((walkthrough/.*)\)", PAGE.read_text("utf-8"))
    images = sorted((ROOT / "docs" / "walkthrough").iterdir())
    assert sorted(ROOT / "docs" / name for name in names) == images
    assert max(image.stat().st_size for image in images) < 300_000


def test_shipped_checkpoint_holds_half_precision_and_no_path():
    checkpoint = read_checkpoint(TOY_MODEL)
    assert {tensor.dtype for tensor in checkpoint["weights"].values()} == {torch.float16}
    assert "optimizer" not in checkpoint and "/" not in str(list(checkpoint["run"].values()))


@pytest.mark.slow
def test_numbers_of_page_and_notebook_come_out_again(tmp_path):
    make_docs.build(tmp_path)
    for file in (PAGE, NOTEBOOK):
        text, again = (re.sub(r'"image/png": ".*"', "", path.read_text("utf-8"))
                       for path in (file, tmp_path / file.name))
        number = r"\d+(?:,\d{3})*(?:\.\d+)?"
        assert re.sub(number, "0", text) == re.sub(number, "0", again)
        for old, new in zip(re.findall(number, text), re.findall(number, again)):
            digits = len(old.partition(".")[2])  # one more or less in the last is rounding
            assert abs(float(old.replace(",", "")) - float(new.replace(",", ""))) < 1.5 / 10**digits
