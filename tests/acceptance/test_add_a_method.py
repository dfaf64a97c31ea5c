"""Methods of other packages: the one of docs/add-a-method.md, installed and run, and packages that are broken."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from lmms_eval.tasks import TaskManager
from loguru import logger

from lmms_mtv import methods
from lmms_mtv.errors import MethodError, MtvError
from lmms_mtv.harness.lmms.model import LmmsEvalMtv
from lmms_mtv.methods import mtv
from support import processes, zoo
from support.sessions import session
from support.shape_tasks import task_file
from support.text_tasks import task_file as text_task

TESTS = Path(__file__).resolve().parents[1]
PAGE = (TESTS.parent / "docs" / "add-a-method.md").read_text(encoding="utf-8")
QUICK = "iterations=4,fit_shots=2,examples=3,reuse=False"


def block(name: str) -> str:
    """The code between the marks ``name`` on the page."""
    found = re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```\n<!-- /{name} -->", PAGE, re.DOTALL)
    assert found, name
    return found[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which pip installed the page's package."""
    package, site = tmp_path_factory.mktemp("package"), tmp_path_factory.mktemp("site")
    (package / "pyproject.toml").write_text(block("pyproject"), encoding="utf-8")
    (package / "difference_vector.py").write_text(block("method"), encoding="utf-8")
    (package / "test_difference_vector.py").write_text(block("test"), encoding="utf-8")
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(site)]
    command = [sys.executable, "-m", "pip", "install", *options, str(package)]
    done = processes.run(command, timeout=300)
    assert done.returncode == 0, done.stderr
    (site / "test_difference_vector.py").write_text(block("test"), encoding="utf-8")
    return site


@pytest.fixture
def beside(monkeypatch) -> Iterator[Callable[[Path], None]]:
    """Puts a folder of packages on the path of this process, for one test."""
    before = set(sys.modules)
    yield lambda folder: monkeypatch.syspath_prepend(str(folder))
    for name in set(sys.modules) - before:
        if name.startswith(("difference_vector", "test_difference_vector", "others_")):
            del sys.modules[name]


def command(site: Path, *arguments: str) -> CompletedProcess[str]:
    """A module run in a process of its own that knows the packages of ``site``."""
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    return processes.run(
        [sys.executable, "-m", *arguments],
        cwd=site,
        env=os.environ | {"PYTHONPATH": path},
        timeout=500,
    )


def test_the_method_is_short():
    assert len(block("method").splitlines()) < 60


def test_the_package_of_the_page_is_a_method_and_its_test_passes(installed, beside):
    assert "difference" not in methods.names()
    beside(installed)
    assert "difference" in methods.names()
    method = methods.get("difference")
    assert method.settings() == ("iterations", "fit_shots", "strength", "examples", "loss")
    fitted = method.fit(session(zoo.build(zoo.idefics3)), method.configure({"iterations": 4, "examples": 3}))
    assert set(fitted.edits) == {"residual"}
    importlib.import_module(
        "test_difference_vector"
    ).test_the_vector_is_the_mean_difference_at_the_layer_of_the_lowest_loss()


@pytest.mark.slow
def test_the_package_of_the_page_runs_in_both_harnesses(installed, text_model, tmp_path):
    done = command(
        installed,
        *("lmms_eval", "--model", "mtv", "--model_args", f"pretrained=tiny,method=difference,{QUICK}"),
        *("--tasks", "shapes_color_en", "--limit", "3", "--output_path", str(tmp_path / "lmms")),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "fitted difference for shapes_color_en" in done.stdout + done.stderr
    (path,) = (tmp_path / "lmms").rglob("*_mtv.json")
    assert json.loads(path.read_text())["tasks"]["shapes_color_en"]["method"] == "difference"

    done = command(
        installed,
        *("lmms_mtv", "lm-eval", "--model", "mtv", "--device", "cpu", "--tasks", "own_answers", "--limit", "3"),
        *("--include_path", str(text_task(tmp_path / "tasks", "answers"))),
        *("--model_args", f"pretrained={text_model},method=difference,{QUICK}"),
        *("--output_path", str(tmp_path / "lm")),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "lm").rglob("results_*.json")
    assert json.loads(path.read_text())["config"]["mtv"]["tasks"]["own_answers"]["method"] == "difference"


@pytest.mark.slow
def test_a_method_that_is_installed_is_held_to_what_holds_for_every_one(installed):
    every = str(TESTS / "unit" / "methods" / "test_every_method.py")
    done = command(
        installed, "pytest", "-q", every, "-k", "difference", "-m", "slow or not slow", "-p", "no:cacheprovider"
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "15 passed" in done.stdout


def package(folder: Path, name: str, point: str, code: str | None, distribution: str = "others") -> Path:
    """A package as an installer leaves it: a module, unless ``code`` is None, and a method ``name`` at ``point``."""
    folder.mkdir(exist_ok=True)
    if code is not None:
        (folder / f"{point.partition(':')[0]}.py").write_text(code, encoding="utf-8")
    about = folder / f"{distribution}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n", encoding="utf-8")
    (about / "entry_points.txt").write_text(f"[{methods.GROUP}]\n{name} = {point}\n", encoding="utf-8")
    return folder


CONFIG = "from dataclasses import dataclass\n\n\n@dataclass(frozen=True)\nclass Config:\n    size: int = 1\n\n\n"
FIT = "def fit(session, config):\n    raise AssertionError\n"
BROKEN = {
    "absent": (None, r"cannot be loaded \(ModuleNotFoundError: No module named 'others_absent'\)"),
    "needy": ("import no_such_library\n", r"cannot be loaded \(ModuleNotFoundError: No module named 'no_such_library'"),
    "wrong": ("def fit(:\n", r"cannot be loaded \(SyntaxError: "),
    "raising": ("raise ValueError('one\\n  two')\n", r"cannot be loaded \(ValueError: one two\)"),
    "aimless": (CONFIG, r"others_aimless lacks a function fit\(session, config\)"),
    "bare": (FIT, r"others_bare lacks a frozen dataclass Config"),
    "thawed": (CONFIG.replace("frozen=True", "frozen=False") + FIT, r"others_thawed lacks a frozen dataclass Config"),
    "empty": ("", r"others_empty lacks a frozen dataclass Config and a function fit\(session, config\)"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_package_is_one_line_that_names_it_and_what_is_missing(kind, beside, tmp_path):
    code, told = BROKEN[kind]
    beside(package(tmp_path / "site", kind, f"others_{kind}", code))
    assert kind in methods.names()
    with pytest.raises(MethodError, match=rf"^method {kind} of package others.*{told}.*: install .*uninstall") as error:
        methods.get(kind)
    assert isinstance(error.value, MtvError)
    assert "\n" not in str(error.value)
    assert methods.get("mtv").fit is mtv.fit


@pytest.mark.slow
def test_a_broken_package_stops_no_other_method(beside, tmp_path):
    beside(package(tmp_path / "site", "aimless", "others_aimless", CONFIG))
    declared = {"demonstrations": "train", "mtv": {"iterations": 3}, "aimless": {"strength": 0.5}}
    include = str(task_file(tmp_path / "task", "custom", metadata={"version": 1.0, "mtv": declared}))
    manager = TaskManager("ERROR", include_path=include, include_defaults=False, model_name="mtv")
    task = manager.load_task_or_group(["custom"], task_type="chat")["custom"]
    said: list[str] = []
    sink = logger.add(lambda message: said.append(str(message)), level="WARNING")
    try:
        model = LmmsEvalMtv(pretrained="tiny", reuse=False)
        quick = {"iterations": 4, "steps": 2, "samples": 2, "examples": 2, "candidates": 2, "candidate_examples": 2}
        assert model.arm(quick).fit(task).card.method == "mtv"
    finally:
        logger.remove(sink)
    (warning,) = (message for message in said if "aimless" in message)
    assert "package others" in warning
    assert "lacks a function fit" in warning
    with pytest.raises(MethodError, match="lacks a function fit"):
        model.arm({"method": "aimless"})


def test_a_name_of_this_package_stays_its_own_with_a_warning(beside, tmp_path, caplog):
    beside(package(tmp_path / "site", "mtv", "others_mtv", CONFIG + FIT))
    assert methods.names().count("mtv") == 1
    assert methods.get("mtv").fit is mtv.fit
    (warning,) = (record.getMessage() for record in caplog.records)
    assert "method mtv" in warning
    assert "package others" in warning
    caplog.clear()
    methods.get("icv")
    assert not caplog.records


def test_a_name_that_two_packages_have_is_refused(beside, tmp_path):
    for name in ("ones", "twos"):
        beside(package(tmp_path / name, "shared", f"others_{name}", CONFIG + FIT, name))
    assert methods.names().count("shared") == 1
    with pytest.raises(MethodError, match="method shared comes from package ones and package twos: uninstall all but"):
        methods.get("shared")


def test_a_method_of_another_package_has_its_settings_checked(beside, tmp_path):
    beside(package(tmp_path / "site", "fine", "others_fine", CONFIG + FIT))
    assert methods.get("fine").configure({"size": 3}).size == 3
    with pytest.raises(MtvError, match="size='x' of method fine: expected int"):
        methods.get("fine").configure({"size": "x"})
