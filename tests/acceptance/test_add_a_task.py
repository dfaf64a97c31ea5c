"""The task of docs/add-a-task.md: its images are drawn, and lmms-eval evaluates it with a fitted vector."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.shape_tasks import SHORT, evaluate

PAGE = (Path(__file__).parents[2] / "docs" / "add-a-task.md").read_text(encoding="utf-8")


def block(name: str) -> str:
    """Return the code between the marks ``name`` on the page."""
    match = re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```\n<!-- /{name} -->", PAGE, re.DOTALL)
    assert match, name
    return match[1]


@pytest.mark.slow
def test_the_task_of_the_page_is_evaluated(tmp_path, monkeypatch):
    """Four demonstrations tell the bundled model the task; a fit on the 24 training images finds heads."""
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-c", block("draw")], check=True, timeout=100)
    tasks = tmp_path / "my_tasks"
    tasks.mkdir()
    (tasks / "signs.yaml").write_text(block("task"), encoding="utf-8")
    few_shot = evaluate("pretrained=tiny,method=none,shots=4", ["signs"], tasks, limit=12)
    assert few_shot["results"]["signs"]["exact_match,none"] == 1
    evaluate(f"pretrained=tiny,{SHORT}", ["signs"], tasks, limit=2)
