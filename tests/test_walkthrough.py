"""docs/walkthrough.md and .ipynb are built from today's source, and their numbers are right."""

import hashlib
import json
import re

import pytest
import torch
from conftest import ROOT
from docs import make_docs

PAGE, NOTEBOOK = ROOT / "docs" / "walkthrough.md", ROOT / "docs" / "walkthrough.ipynb"
REBUILD = "run  python docs/make_docs.py"


def test_page_and_notebook_are_built_from_todays_source_and_the_images_are_there():
    sha256 = hashlib.sha256(make_docs.SOURCE.read_bytes()).hexdigest()
    assert sha256 in PAGE.read_text("utf-8").splitlines()[0], REBUILD
    assert sha256 == json.loads(NOTEBOOK.read_text("utf-8"))["metadata"]["sha256"], REBUILD
    names = re.findall(r"\]\((walkthrough/.*)\)", PAGE.read_text("utf-8"))
    assert {ROOT / "docs" / name for name in names} == {*(ROOT / "docs/walkthrough").iterdir()}


def test_excerpts_are_todays_code():
    page, cells = PAGE.read_text("utf-8"), json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    notebook = "\n".join(cell["source"] for cell in cells)
    for call in re.findall(r"\{\{ (excerpt\(.*\)) \}\}", make_docs.SOURCE.read_text("utf-8")):
        code = eval(call, {"excerpt": make_docs.excerpt})
        assert code in page and code in notebook, f"{call}: {REBUILD}"


@pytest.mark.slow
def test_numbers_of_page_and_notebook_come_out_again(tmp_path):
    with torch.enable_grad():  # the page turns gradients off; other tests need them
        make_docs.build(tmp_path)
    for file in (PAGE, NOTEBOOK):
        text, again = (re.sub(r'"image/png": ".*"', "", path.read_text("utf-8"))
                       for path in (file, tmp_path / file.name))
        number = r"\d+(?:,\d{3})*(?:\.\d+)?"
        assert re.sub(number, "0", text) == re.sub(number, "0", again)
        for old, new in zip(re.findall(number, text), re.findall(number, again)):
            digits = len(old.partition(".")[2])  # one more or less in the last is rounding
            assert abs(float(old.replace(",", "")) - float(new.replace(",", ""))) < 1.5 / 10**digits


@pytest.mark.slow
def test_the_code_that_the_page_shows_runs_in_order_without_that_of_the_figures(monkeypatch):
    monkeypatch.chdir(ROOT / "docs")
    blocks = re.findall(r"(?s)(From \[[^\n]*\n\n)?```python\n(.*?)\n```", PAGE.read_text("utf-8"))
    shown, namespace = [code for excerpt, code in blocks if not excerpt], {}
    with torch.enable_grad():  # as above
        for code in shown:
            exec(code, namespace)
    assert len(shown) > 15 and namespace["hIoU"]["region tokens read all patches"] < 50
