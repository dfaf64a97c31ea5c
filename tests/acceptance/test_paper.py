"""Reported numbers as data: their schema, and that the docs print the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lmms_mtv.experiments import published

ROOT = Path(__file__).resolve().parents[2]
DOCS = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
FILES = sorted((ROOT / "results" / "paper").glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_file_has_the_schema(path):
    table = json.loads(path.read_text(encoding="utf-8"))
    assert set(table) == {"table", "source", "read", "unit", "remarks", "entries"}
    assert set(table["source"]) == {"title", "arxiv", "venue", "place"}
    assert table["source"]["title"]
    assert table["source"]["place"]
    assert table["read"] in {"paper", "second-hand"}
    assert table["remarks"]
    for entry in table["entries"]:
        required, optional = {"model", "task", "arm", "value"}, {"std", "seeds", "unit", "quantity", "remarks"}
        assert required <= set(entry) <= required | optional, entry
        assert isinstance(entry["value"], float)
        if entry.get("quantity", "score") == "score":
            assert 0 <= entry["value"] <= 100
            assert entry["model"]
            assert entry["task"]


def test_a_score_is_reported_once_in_a_paper():
    scores = [(e.title, e.task, e.arm, e.model) for e in published.entries() if e.quantity == "score"]
    assert len(scores) == len(set(scores)) > 150


def test_reported_finds_the_number_and_its_source():
    found = published.published_result("vizwiz", "MTV", "Idefics2-8B")
    assert found is not None
    assert (found.value, found.unit, found.read) == (52.5, "percent", "paper")
    assert "2406.15334" in found.source
    assert published.published_result("okvqa", "MTV", "Qwen-VL-7B").value == 62.0
    assert published.published_result("okvqa", "MTV", "Qwen-VL-7B", arxiv="2511.08246").value == 60.51
    assert published.published_result("vizwiz", "MTV", "Blip3") is None
    assert published.published_result("shapes_color_en", "MTV", "Idefics2-8B") is None


def rows(heading: str, header: str) -> list[list[str]]:
    """The rows of the table of the docs that begins with ``header`` under ``heading``."""
    section = DOCS.split(f"## {heading}")[1].split("\n## ")[0]
    lines = section[section.index(header) :].splitlines()
    body = lines[2:]
    end = next((index for index, line in enumerate(body) if not line.startswith("|")), len(body))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body[:end]]


def check(text: str, task: str, arm: str, model: str) -> None:
    found = published.published_result(task, arm, model)
    if text == "-":
        assert found is None, (task, arm, model)
    else:
        assert found is not None, (task, arm, model)
        assert found.value == float(text), (task, arm, model)


def test_the_docs_print_the_main_results():
    table = rows("VizWiz and OK-VQA", "| model |")
    columns = [(task, arm) for task in ("vizwiz", "okvqa") for arm in ("zero-shot", "4-shot", "8-shot", "MTV")]
    assert len(table) == 6
    for model, *cells in table:
        for (task, arm), cell in zip(columns, cells, strict=True):
            check(cell, task, arm, model)


def test_the_docs_print_the_classification_and_text_results():
    table = rows("Flowers and CUB, 2-way 1-shot", "| model |")
    columns = [(task, arm) for task in ("flowers", "cub") for arm in ("1-shot", "MTV + 1-shot")]
    assert len(table) == 9
    for model, *cells in table:
        for (task, arm), cell in zip(columns, cells, strict=True):
            check(cell, task, arm, model)
    for arm, _, *cells in rows("English-Spanish and antonyms, LLaMA-3-8B", "| column |"):
        for task, cell in zip(("english_spanish", "antonyms"), cells, strict=True):
            check(cell, task, arm, "LLaMA-3-8B")


def test_the_docs_print_the_ablation_and_the_efficiency():
    seeds = {(e.arm, e.value, e.std) for e in published.entries() if e.task == "vizwiz" and e.model == "Qwen-VL-7B"}
    section = DOCS.split("## Shots and iterations")[1].split("\n## ")[0]
    printed = re.findall(r"(\d+\.\d) \((\d\.\d)\)", section)
    assert len(printed) == 6
    spread = {(value, std) for _, value, std in seeds if std is not None}
    assert {(float(value), float(std)) for value, std in printed} == spread
    (icl, *_) = rows("Shots and iterations, Qwen-VL on VizWiz", "| shots |")
    for shots, cell in zip((0, 4, 8, 16, 20, 25), icl[1:], strict=True):
        check(cell, "vizwiz", f"{shots}-shot" if shots else "zero-shot", "Qwen-VL-7B")
    for name, *cells in rows("Efficiency, VILA on VizWiz", "| |"):
        quantity = {"memory": "peak memory", "time": "time"}[name]
        values = [e.value for e in published.entries() if e.quantity == quantity]
        assert values == [float(cell) for cell in cells]


def test_the_docs_print_what_cannot_be_run_yet():
    section = DOCS.split("## What cannot be run yet")[1].split("\n## ")[0]
    parts = ("generalisation", "methods", "robustness", "documents")
    files = [path for path in FILES if path.stem in {f"mtv-{part}" for part in parts}]
    values = {entry["value"] for path in files for entry in json.loads(path.read_text(encoding="utf-8"))["entries"]}
    reported = "\n".join(line.split("|")[2] for line in section.splitlines() if line.startswith("|"))
    assert {float(number) for number in re.findall(r"-?\d+\.\d", reported)} == values
