"""Run docs/walkthrough.py and build docs/walkthrough.md, .ipynb and their images from it.

    python docs/make_docs.py
    python docs/make_docs.py --toy-checkpoint runs/toy/last.pt    util/toy.pt, which they need

In the source "# %%" begins a cell of code, "# %% [markdown]" one of prose with {{ numbers }} from
the run, "# %% NAME.png: CAPTION" one that draws an image (only the notebook shows its code), and
"# %% fold: SUMMARY; TEXT" one whose output and text appear when the reader clicks on the summary.
A line that ends in a backslash goes on in the next one.
"""

import argparse
import ast
import base64
import contextlib
import hashlib
import inspect
import io
import json
import pkgutil
import re
import sys
import textwrap
import unittest.mock
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository

from util import toy
from util.checkpoint import TOY_MODEL, checkpoint_clip, read_checkpoint, save_checkpoint
from util.clip_files import TOY_CLIP, clip_digest
from util.images import save_image
from util.processes import run_script

SOURCE = Path(__file__).resolve().with_name("walkthrough.py")
FOLD = "<details><summary>{}</summary>\n\n{}\n\n</details>"


def excerpt(name: str, first: str = "", last: str = r"\Z") -> str:
    """Today's code of "module.function" for a page, from a line with `first` to one with `last`."""
    module, path = name.split(".", 1)
    source = textwrap.dedent(inspect.getsource(pkgutil.resolve_name(f"{module}:{path}")))
    docstring, lines = ast.parse(source).body[0].body[0], source.splitlines()
    del lines[docstring.lineno - 1:docstring.end_lineno]
    part = re.search(rf"(?ms)^[^\n]*{first}.*?{last}[^\n]*", "\n".join(lines))[0]
    code = f"```python\n{textwrap.dedent(part)}\n```"
    return f"From [{module}.py](../{module}.py), `{path}`:\n\n{code}"


def run(code: str, namespace: dict) -> tuple[str, object]:
    """Run a cell as a notebook does. Returns what it prints, and the value of its last line."""
    values, statements = [None], ast.Interactive(ast.parse(code).body)
    shown = unittest.mock.patch("sys.displayhook", values.append)
    with contextlib.redirect_stdout(io.StringIO()) as printed, shown:
        exec(compile(statements, SOURCE.name, "single"), namespace)
    return printed.getvalue(), values[-1]


def fill_in(prose: str, namespace: dict) -> str:
    """Prose for a page: the values of {{ }}, and blank lines around all that is no plain text."""
    prose = re.sub(r"(?m)^# ?", "", prose)
    alone = r"#.*|\$\$.*|\{\{ excerpt.*|(?:\|.*\n)+|(?=\*\*Why)|```.*\n[^`]*```"
    prose = re.sub(r"\n\n+", "\n\n", re.sub(rf"(?m)^({alone})", r"\n\1\n", prose)).strip()
    return re.sub(r"\{\{ *(.+?) *\}\}", lambda it: eval(f'f"""{{{it[1]}}}"""', namespace), prose)


def build(out: Path) -> None:
    """Write walkthrough.md, walkthrough.ipynb and walkthrough/*.png to the folder `out`."""
    print("running docs/walkthrough.py takes half a minute", flush=True)
    toy.draw_world()  # drawn before the first cell, which would show the progress
    source = SOURCE.read_text("utf-8").replace(" \\\n# ", " ")
    parts = re.split(r"(?m)^# %% ?(.*)\n", source)[1:]
    namespace = {"excerpt": excerpt}
    cells = [(head, text.strip(), *run("0" if head == "[markdown]" else text, namespace))
             for head, text in zip(parts[::2], parts[1::2])]
    sha256 = hashlib.sha256(SOURCE.read_bytes()).hexdigest()
    page, notebook = [f"<!-- docs/make_docs.py: from walkthrough.py, SHA-256 {sha256} -->"], []
    for head, text, printed, image in cells:
        if head == "[markdown]":  # filled in now: prose may tell what is computed further down
            page.append(fill_in(text, namespace))
            notebook.append({"cell_type": "markdown", "metadata": {}, "source": page[-1]})
            continue
        outputs, (kind, _, caption), note = [], head.partition(": "), ""
        if printed:
            outputs = [{"output_type": "stream", "name": "stdout", "text": printed}]
            printed = f"\n\n```text\n{printed}```"
        if kind.endswith(".png"):
            file, note = out / "walkthrough" / kind, f"*{caption}*"
            save_image(image, file)
            png = {"image/png": base64.b64encode(file.read_bytes()).decode()}
            outputs = [{"output_type": "display_data", "metadata": {}, "data": png}]
            page.append(f"![{kind}](walkthrough/{kind})\n\n{note}")
        else:
            if kind == "fold":
                summary, _, more = caption.partition("; ")
                printed = "\n\n" + FOLD.format(summary, f"{printed}\n\n{more}".strip())
                note = FOLD.format("What that means", more) if more else ""
            page.append(f"```python\n{text}\n```{printed}")
        notebook.append({"cell_type": "code", "source": text, "execution_count": None,
                         "metadata": {"collapsed": kind == "fold"}, "outputs": outputs})
        if note:
            notebook.append({"cell_type": "markdown", "metadata": {}, "source": note})
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python"}, "sha256": sha256}
    document = {"nbformat": 4, "nbformat_minor": 4, "metadata": metadata, "cells": notebook}
    (out / "walkthrough.ipynb").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    (out / "walkthrough.md").write_text("\n\n".join(page) + "\n", "utf-8")


def ship(path: Path) -> None:
    """Write util/toy.pt: a run's trained tensors in half precision, without the optimiser."""
    saved = read_checkpoint(path)
    weights = {name: tensor.half() for name, tensor in saved["weights"].items()}
    saved["run"] |= dict.fromkeys(("data_root", "clip", "out", "init"))  # one machine's paths
    kept = ("run", "class_names", "unseen", "templates", "text", "step")
    save_checkpoint(TOY_MODEL, saved["model"], weights, clip_digest(checkpoint_clip(saved, path)),
                    clip=TOY_CLIP.name, **{name: saved[name] for name in kept})


def main() -> None:
    parser = argparse.ArgumentParser(description="Build docs/walkthrough.md and its notebook.")
    parser.add_argument("--toy-checkpoint", type=Path, help="instead make util/toy.pt from this")
    path = parser.parse_args().toy_checkpoint
    ship(path) if path else build(SOURCE.parent)


if __name__ == "__main__":
    run_script(main)
