"""The versions around the package: bounds, the tested set, and what is said where they do not fit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import lmms_mtv
from lmms_mtv.errors import InstallationError
from lmms_mtv.harness.lmms.plugin import names_model
from lmms_mtv.runtime import environment
from lmms_mtv.runtime.environment import RequiredLibrary, newer, problem
from support import processes

ROOT = Path(__file__).resolve().parents[3]


def library(
    installed: str | None, supported: str = "", tested: str = "", name: str = "transformers"
) -> RequiredLibrary:
    version = None if installed is None else Version(installed)
    return RequiredLibrary(name, version, SpecifierSet(supported), SpecifierSet(tested))


def pinned() -> list[Requirement]:
    """All lines of constraints.txt, for whichever Python and system they are."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_this_environment_is_supported():
    found = environment.libraries()
    assert {"filelock", "lm-eval", "lmms-eval", "torch", "transformers"} <= {each.name for each in found}
    assert problem(found) is None
    environment.check()


@pytest.mark.parametrize(
    ("installed", "supported", "fits"),
    [
        ("5.24.0", ">=5.18", True),
        ("5.18.0", ">=5.18", True),
        ("5.17.0", ">=5.18", False),
        ("4.57.1", ">=5.18", False),
        ("4.2.12", ">=3.20,<4.3", True),
        ("4.3.0", ">=3.20,<4.3", False),
        ("2.14.1+cpu", ">=2.7", True),
        ("2.15.0a0+git1", ">=2.7", True),
        (None, ">=5.18", False),
    ],
)
def test_an_unsupported_version_is_one_line_with_the_command_that_mends_it(installed, supported, fits):
    line = problem([library("1.0", name="other"), library(installed, supported)])
    assert (line is None) == fits
    if line is not None:
        assert f"transformers {installed or 'is missing'} (supported: " in line
        assert f"python -m pip install 'transformers{SpecifierSet(supported)}'" in line
        assert "other" not in line
        assert "\n" not in line


@pytest.mark.parametrize(
    ("installed", "tested", "warns"),
    [
        ("5.24.0", "==5.24.0", False),
        ("5.24.1", "==5.24.0", True),
        ("5.23.0", "==5.24.0", False),
        ("2.15.3+cu130", "<2.16", False),
        ("2.16.1", "<2.16", True),
        ("5.24.0", "", False),
        (None, "==1.0", False),
    ],
)
def test_a_version_newer_than_the_tested_ones_is_one_warning(installed, tested, warns):
    line = newer([library(installed, tested=tested)])
    assert (line is not None) == warns
    if line is not None:
        assert f"transformers {installed} (tested: {SpecifierSet(tested)})" in line
    assert newer([library(installed, tested=tested, name="tqdm")]) is None, "nothing of its insides is used"


def test_the_tested_versions_are_within_the_bounds():
    bounds = {each.name: each.supported for each in environment.libraries()}
    for requirement in pinned():
        if requirement.name in ("torch", "torchvision"):
            assert not any(bound.operator in ("==", "===", ">=") for bound in requirement.specifier), "any build fits"
            continue
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        assert bounds.get(requirement.name, SpecifierSet()).contains(pin.version), requirement
    names = {requirement.name for requirement in pinned()}
    assert bounds.keys() - {name.replace("_", "-") for name in bounds if "_" in name} <= names
    assert not [name for name in names if name.startswith(("nvidia-", "cuda-")) or name == "triton"]


def test_every_library_has_a_lowest_version():
    for each in environment.libraries():
        assert any(bound.operator == ">=" for bound in each.supported), each.name


def test_a_command_line_asks_for_the_model_by_name_or_in_a_file(tmp_path):
    assert names_model(["--model", "mtv", "--tasks", "shapes"])
    assert names_model(["eval", "--tasks", "shapes", "--model=mtv"])
    assert not names_model(["--model", "qwen2_5_vl", "--tasks", "vizwiz", "--model_args", "model=mtv"])
    assert not names_model([])
    config = tmp_path / "evaluations.yaml"
    for entries, asked in (
        ({"model": "mtv"}, True),
        ([{"model": "other"}, {"model": "mtv", "tasks": "shapes"}], True),
        ([{"model": "other"}], False),
        ("mtv", False),
        (None, False),
    ):
        config.write_text(yaml.safe_dump(entries), encoding="utf-8")
        assert names_model(["--config", str(config)]) is asked
    config.write_text("model: [mtv", encoding="utf-8")
    assert not names_model([f"--config={config}"])
    assert not names_model(["--config", str(tmp_path)])


def run(folder: Path, *command: str, forced: str) -> CompletedProcess[str]:
    """A command in a process of its own that finds ``forced``, as ``name==version``, to be installed."""
    name, version = forced.split("==")
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    return processes.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize("forced", ["filelock==4.3.1", "transformers==4.57.1", "lmms-eval==0.7.2"])
def test_lmms_eval_ends_with_one_line_before_anything_runs(forced, tmp_path):
    arguments = ("--model", "mtv", "--model_args", "pretrained=tiny", "--tasks", "shapes", "--output_path", "out")
    done = run(tmp_path, "lmms_eval", *arguments, forced=forced)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("lmms-mtv")]
    assert forced.replace("==", " ") in line
    assert "python -m pip install" in line
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_another_model_of_lmms_eval_runs_on_with_a_warning(tmp_path):
    done = run(tmp_path, "lmms_eval", "--model", "nothing", "--tasks", "list", forced="transformers==4.57.1")
    assert done.returncode == 0
    assert "lmms-mtv cannot work with transformers 4.57.1" in done.stdout + done.stderr
    assert "shapes_color_en" in done.stdout


@pytest.mark.slow
def test_the_commands_of_the_package_end_with_one_line_and_the_doctor_tells_all(tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    done = run(folder, "lmms_mtv", "library", "ls", forced="transformers==4.57.1")
    assert done.returncode == 1
    assert done.stderr.startswith("lmms-mtv: InstallationError: lmms-mtv cannot work with transformers 4.57.1")
    assert len(done.stderr.splitlines()) == 1
    folder = tmp_path / "other"
    folder.mkdir()
    done = run(folder, "lmms_mtv", "doctor", forced="transformers==4.57.1")
    assert done.returncode == 1
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("  transformers ")]
    assert "4.57.1" in row
    assert "not supported" in row
    assert done.stderr.splitlines()[-1].startswith("lmms-mtv: lmms-mtv cannot work with transformers 4.57.1")


@pytest.mark.slow
def test_the_doctor_shows_versions_device_folders_and_bases(tmp_path):
    done = run(tmp_path, "lmms_mtv", "doctor", forced="nothing==1.0")
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()
    for title in ("libraries", "device", "folders", "bases"):
        assert title in rows
    assert [row for row in rows if row.startswith("  filelock ") and "supported <4.3" in row]
    assert [row for row in rows if " cores, " in row]
    (bases,) = [row for row in rows if " import: " in row and row.strip()[0].isdigit()]
    assert "hf" in bases
    assert [row for row in rows if "does not import: No module named" in row]


def test_a_missing_library_is_an_error_of_the_package(monkeypatch):
    monkeypatch.setattr(environment, "libraries", lambda: [library(None, ">=5.18")])
    with pytest.raises(InstallationError, match="transformers is missing"):
        environment.check()


@pytest.mark.parametrize("words", [["--help"], ["compare", "--help"], ["compare", "nofolder"]])
def test_what_needs_no_model_does_not_wait_for_torch(words, tmp_path):
    """The libraries of models take seconds to import."""
    code = f"""
import sys
from lmms_mtv import cli
try:
    cli.main({words})
except SystemExit as error:
    print(error, file=sys.stderr)
assert not {{"torch", "transformers", "lmms_eval", "lm_eval"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout or "nofolder does not exist" in done.stderr


def test_public_names_are_those_of_their_modules():
    for name in lmms_mtv.__all__:
        assert getattr(lmms_mtv, name).__module__.startswith("lmms_mtv.")
    assert set(lmms_mtv.__all__) <= set(dir(lmms_mtv))
    with pytest.raises(AttributeError, match="has no attribute 'Vectr'"):
        lmms_mtv.Vectr  # noqa: B018
