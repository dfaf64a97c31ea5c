"""The command ``lmms-mtv compare``: its table, going on after an interruption, and tasks of other folders."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from lmms_eval.tasks import TaskManager

from lmms_mtv import cli
from lmms_mtv.experiments import cell as cells
from lmms_mtv.experiments import plan
from lmms_mtv.experiments.cell import Cell
from lmms_mtv.experiments.plan import CellKey, Plan
from lmms_mtv.harness.lmms import loaded_run, plan_runner
from support.shape_tasks import task_file

MODEL = {"name": "m", "revision": None, "dtype": "float32"}
FLAGS = ["--model_args", "pretrained=tiny,steps=3", "--tasks", "a", "--arm", "zero-shot", "--arm", "MTV"]


def measured(key: CellKey, arguments: Mapping[str, Any]) -> Cell:
    return Cell(
        plan="out",
        task=key.task,
        arm=key.arm,
        seed=key.seed,
        arguments=arguments,
        model=MODEL,
        method=arguments["method"],
        shots=0,
        settings={},
        metric="exact_match",
        score=0.5,
        stderr=None,
        n=2,
        higher_is_better=True,
        samples={"documents": [0, 1], "scores": [1, 0], "answers": ["a", "b"], "prompts": ["1a", "2b"]},
        tokens={"prompt": 4.0, "image": None, "text": None},
        seconds={"fit": None, "evaluation": 0.1},
        memory={"fit": None, "evaluation": 3},
        vector=None,
        versions={"torch": "2", "transformers": "5", "lmms-eval": "0", "lmms-mtv": "0"},
        hardware={"machine": "x", "cores": 2, "device": "cpu", "processes": 1},
    )


class FakeRunner:
    """A runner that measures nothing, and is interrupted before the cell of number ``stop``."""

    groups: Mapping[str, list[str]] = {}
    leads = True
    model = MODEL
    stop = 99

    def __init__(self, requested: Plan, library: Path, reuse: bool = True) -> None:
        self._plan, self._count = requested, 0

    def run(self, key: CellKey) -> tuple[Cell, dict[str, Any]]:
        if self._count == self.stop:
            raise KeyboardInterrupt
        self._count += 1
        return measured(key, self._plan.arms[key.arm]), {}


@pytest.fixture
def runner(monkeypatch) -> type[FakeRunner]:
    made = type("Runner", (FakeRunner,), {})
    monkeypatch.setattr(plan_runner, "PlanRunner", made)
    return made


@pytest.mark.usefixtures("runner")
def test_the_table_of_the_report_is_printed(tmp_path, capsys):
    output = str(tmp_path / "out")
    cli.main(["compare", *FLAGS, "--output", output])
    said = capsys.readouterr().out
    assert f"2 cells run: {output}" in said
    cli.main(["report", output])
    report = capsys.readouterr().out
    assert "| MTV |" in report
    assert said.startswith(report)
    cli.main(["compare", *FLAGS, "--output", output])
    again = capsys.readouterr().out
    assert again.startswith(report)
    assert "nothing to do" in again


def test_interrupted_it_says_how_to_go_on_and_goes_on(runner, tmp_path, capsys):
    output = tmp_path / "my out"
    runner.stop = 1
    with pytest.raises(SystemExit) as caught:
        cli.main(["compare", *FLAGS, "--output", str(output), "--seeds", "0", "3"])
    assert caught.value.code == 130
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lmms-mtv:")]
    assert line == f"lmms-mtv: interrupted, 1 cells are in {output}: go on with lmms-mtv compare '{output}'"
    runner.stop = 99
    cli.main(["compare", str(output)])
    assert "2 cells run" in capsys.readouterr().out
    assert [(cell.arm, cell.seed) for cell in cells.read_all(output)] == [("MTV", 0), ("MTV", 3), ("zero-shot", 0)]


def test_interrupted_before_the_first_cell(runner, tmp_path, capsys):
    runner.__init__ = lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(SystemExit):
        cli.main(["compare", *FLAGS, "--output", str(tmp_path / "out")])
    assert "interrupted, nothing was measured: run the same command again" in capsys.readouterr().err


@pytest.mark.usefixtures("runner")
def test_an_arm_is_added_that_lacks_a_setting_of_the_stored_arms(tmp_path):
    cli.main(["compare", *FLAGS, "--output", str(tmp_path)])
    cli.main(["compare", str(tmp_path), "--arm", "1-shot"])
    assert {cell.arm for cell in cells.read_all(tmp_path)} == {"zero-shot", "MTV", "1-shot"}
    with pytest.raises(SystemExit, match=r"unknown model argument 'steps'.* nor the method of any arm \(zero-shot\)"):
        cli.main(["compare", *FLAGS[:-2], "--output", str(tmp_path / "other")])


@pytest.mark.usefixtures("runner")
def test_an_added_arm_leaves_the_baseline_as_it_is(tmp_path):
    file, output = tmp_path / "words.yaml", tmp_path / "words"
    file.write_text("model: {pretrained: tiny}\ntasks: [a]\nbaseline: MTV\narms: {MTV: {method: mtv}}\n")
    cli.main(["compare", str(file), "--output", str(output)])
    cli.main(["compare", str(output), "--arm", "1-shot"])
    assert set(plan.read(output).arms) == {"MTV", "1-shot"}
    assert plan.read(output).baseline == "MTV"


def test_without_a_folder_the_output_is_missing(tmp_path):
    (tmp_path / "plan.yaml").write_text("model: {}\ntasks: [a]\narms: {b: {}}\n")
    for arguments in (FLAGS, [str(tmp_path / "plan.yaml")]):
        with pytest.raises(SystemExit, match="--output is missing"):
            cli.main(["compare", *arguments])


def test_a_plan_that_does_not_exist_is_told_before_the_output(tmp_path):
    with pytest.raises(SystemExit, match="nofolder does not exist: PLAN is a YAML file, or a folder"):
        cli.main(["compare", str(tmp_path / "nofolder")])


class TestFoldersOfTasks:
    @pytest.fixture
    def folder(self, tmp_path, monkeypatch) -> Path:
        """A folder with the task ``custom``, and none of the harness's own tasks, which take long to read."""

        def manager(*args: Any, **options: Any) -> TaskManager:
            return TaskManager(*args, **options, include_defaults=False)

        monkeypatch.setattr(loaded_run, "TaskManager", manager)
        return task_file(tmp_path / "tasks")

    @pytest.mark.slow
    def test_they_are_in_the_plan_and_found_again(self, folder, tmp_path, capsys, monkeypatch):
        output = tmp_path / "out"
        monkeypatch.chdir(tmp_path)
        flags = ["--model_args", "pretrained=tiny", "--limit", "2", "--output", str(output)]
        flags += ["--arm", "zero-shot", "--tasks", "custom"]
        cli.main(["compare", *flags, "--include_path", "tasks"])
        assert plan.read(output).include_path == [str(folder)]
        cli.main(["compare", str(output), "--arm", "1-shot"])
        assert {cell.arm for cell in cells.read_all(output)} == {"zero-shot", "1-shot"}
        assert plan.read(output).include_path == [str(folder)]
        cli.main(["check", str(output)])
        said = capsys.readouterr().out
        assert "2 run again and the same (scores within 0.02, values of vectors within 0.001 of the largest" in said
        assert said.endswith("; no README.md has tables of them\n")

        moved = Path(shutil.move(folder, tmp_path / "moved"))
        (task,) = moved.glob("*.yaml")
        task.write_text(task.read_text().replace(str(folder), str(moved)))
        for command in (["compare", str(output), "--arm", "2-shot"], ["check", str(output)]):
            with pytest.raises(SystemExit, match=f"no folder {folder} of task files .* pass --include_path"):
                cli.main(command)
        cli.main(["check", str(output), "--include_path", str(moved)])
        cli.main(["compare", str(output), "--arm", "2-shot", "--include_path", str(moved)])
        assert plan.read(output).include_path == [str(moved)]

    def test_fit_takes_them(self, folder, tmp_path, capsys):
        flags = ["--model_args", "pretrained=tiny,method=none", "--tasks", "custom"]
        cli.main(["fit", *flags, "--include_path", str(folder), "--library", str(tmp_path / "library")])
        assert "custom, seed 0: none" in capsys.readouterr().out
        with pytest.raises(SystemExit, match=r"no folder .*nowhere of task files"):
            cli.main(["fit", *flags, "--include_path", str(tmp_path / "nowhere")])

    def test_in_a_plan_file_they_are_relative_to_it(self, folder):
        content = {"model": {}, "tasks": ["custom"], "arms": {"a": {}}, "include_path": "tasks"}
        (folder.parent / "p.yaml").write_text(yaml.safe_dump(content))
        assert plan.read(folder.parent / "p.yaml").include_path == [str(folder)]


@pytest.mark.slow
def test_settings_for_all_arms_reach_the_arms_that_have_them(tmp_path, monkeypatch):
    monkeypatch.setattr(
        loaded_run,
        "TaskManager",
        lambda *_, **options: TaskManager("ERROR", include_path=options["include_path"], include_defaults=False),
    )
    folder, output = task_file(tmp_path / "tasks"), tmp_path / "out"
    short = "pretrained=tiny,iterations=2,fit_shots=1,steps=3,samples=2,examples=2,candidates=2,candidate_examples=2"
    flags = ["--tasks", "custom", "--include_path", str(folder), "--limit", "2", "--output", str(output)]
    cli.main(["compare", "--model_args", short, *flags, "--arm", "zero-shot", "--arm", "MTV:steps=4"])
    zero, mtv = (cells.read(output, CellKey("custom", arm, 0)) for arm in ("zero-shot", "MTV"))
    assert zero is not None
    assert zero.settings == {}
    assert mtv is not None
    assert (mtv.settings["iterations"], mtv.settings["steps"], mtv.arguments) == (2, 4, {"steps": 4})
