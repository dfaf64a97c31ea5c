"""The package as it is installed: a wheel that works away from the repository, and the main job with its figures."""

from __future__ import annotations

import ast
import json
import os
import re
import statistics
import sys
import zipfile
from pathlib import Path

import pytest

from lmms_mtv.experiments import cell as cells
from lmms_mtv.experiments import check
from support import matrix, processes

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
STORED = sorted(path.parent.name for path in RESULTS.glob("*/plan.yaml"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    done = processes.run(command)
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.mark.slow
def test_the_wheel_has_tasks_and_checkpoint_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"lmms_mtv/tasks/{path.relative_to(ROOT / 'tasks')}" for path in tracked("tasks")} <= names
    assert {str(path.relative_to(ROOT)) for path in tracked("lmms_mtv")} <= names
    assert {f"lmms_mtv/paper_results/{path.name}" for path in tracked("results/paper")} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "results/"))]
    assert wheel.stat().st_size < 18e6


def tracked(folder: str) -> list[Path]:
    listed = processes.run(["git", "ls-files", "--cached", folder], cwd=ROOT, timeout=60)
    assert listed.returncode == 0, listed.stderr
    return [ROOT / line for line in listed.stdout.splitlines()]


@pytest.mark.slow
def test_the_installed_wheel_runs_the_main_job(wheel, tmp_path):
    """Two tasks of the benchmark in short, from a wheel and away from the repository."""
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    done = processes.run(command)
    assert done.returncode == 0, done.stderr
    environment = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    where = [sys.executable, "-c", "import lmms_mtv; print(lmms_mtv.__file__)"]
    found = processes.run(where, cwd=tmp_path, env=environment)
    assert found.stdout.startswith(str(site))

    done = processes.run(
        [
            *(sys.executable, "-m", "lmms_eval", "--model", "mtv", "--tasks", "shapes_color_es,shapes_phrase_en"),
            *("--model_args", "pretrained=tiny,steps=150", "--limit", "66", "--batch_size", "16"),
            *("--output_path", str(tmp_path / "out")),
        ],
        cwd=tmp_path,
        env=environment,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (json.loads(path.read_text())["results"] for path in tmp_path.rglob("*_results.json"))
    assert min(results[task]["exact_match,none"] for task in ("shapes_color_es", "shapes_phrase_en")) >= 0.9


@pytest.mark.parametrize("name", matrix.members(STORED, "words"))
def test_stored_results_hold(name):
    """All cells are there and as they were measured, the vectors too, and the tables say what they say."""
    folder = RESULTS / name
    assert check.stored(folder) == []
    pages = check.pages(folder)
    assert RESULTS / "README.md" in pages
    assert check.tables(folder, pages) == []


def test_the_reference_run_shows_what_the_method_is_for():
    """The figures of the project's promise, over all stored seeds."""
    found = cells.read_all(RESULTS / "shapes")
    mean = {
        arm: statistics.mean(cell.score for cell in found if cell.arm == arm) for arm in {cell.arm for cell in found}
    }
    assert {cell.seed for cell in found} == {0, 1, 2, 3, 4}
    assert len({cell.task for cell in found}) == 9
    assert mean["zero-shot"] <= 0.25
    assert mean["4-shot"] >= 0.97
    assert mean["MTV"] >= 0.97
    assert mean["random heads"] <= mean["MTV"] - 0.30


def test_files_and_classes_stay_small_and_public_names_apart():
    """A method's file has a class Config by design."""
    places: dict[str, list[Path]] = {}
    for path in (*ROOT.glob("lmms_mtv/**/*.py"), *ROOT.glob("benchmarks/**/*.py")):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                assert node.end_lineno - node.lineno < 250, (path, node.name)
                places.setdefault(node.name, []).append(path)
    twice = {name for name, paths in places.items() if len(paths) > 1 and not name.startswith("_")}
    assert twice == {"Config"}


def test_the_repository_names_no_machine():
    """No absolute path of a home or work folder in what is tracked."""
    pattern = re.compile(rb"(?<![\w.])/(home|root|work|Users)/\w")
    for path in (path for folder in (".", "results", "tasks", "docs") for path in tracked(folder)):
        if path.suffix in {".py", ".md", ".yaml", ".json", ".jsonl", ".toml", ".log", ""} and path.is_file():
            assert not pattern.search(path.read_bytes()), path
