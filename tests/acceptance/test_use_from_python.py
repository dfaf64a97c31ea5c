"""The code of the page on Python, and of the notebook, runs as it stands."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMMS_MTV_LIBRARY", str(tmp_path / "library"))


@pytest.mark.slow
def test_the_page_runs(tmp_path):
    text = (DOCS / "use-from-python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {"__name__": "page"}
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        for block in blocks:
            exec(compile(block, "use-from-python.md", "exec"), names)
    plain, edited, share, rows = shown.getvalue().strip().splitlines()[-4:]
    right = names["right"][:4]
    assert ast.literal_eval(edited) == right != ast.literal_eval(plain)
    assert float(share) >= 0.9
    assert ast.literal_eval(rows)[0] == right[0]
    assert len(set(ast.literal_eval(rows))) == 3
    assert names["same"].checksum == names["vector"].checksum
    assert (tmp_path / "colors.safetensors").exists()


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_it_showed():
    import matplotlib

    matplotlib.use("Agg")
    notebook = json.loads((DOCS / "notebooks" / "quickstart.ipynb").read_text(encoding="utf-8"))
    names: dict = {"__name__": "notebook"}
    pictures = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
        kinds = [output["output_type"] for output in cell["outputs"]]
        assert ("stream" in kinds) == bool(shown.getvalue())
        pictures += kinds.count("display_data")
    assert pictures == 3
    assert names["scores"][0] == 0
    assert names["scores"][-2] >= 0.95
    assert names["same"].checksum == names["vector"].checksum
