"""Comparisons by lm-eval: cells are the harness's own numbers, and a check runs them again."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from lmms_mtv import cli
from lmms_mtv.errors import ArgumentError, DataError
from lmms_mtv.experiments import cell as cells
from lmms_mtv.experiments import plan
from lmms_mtv.experiments.cell import Cell
from lmms_mtv.experiments.plan import CellKey, Plan
from lmms_mtv.harness import plan_runners
from lmms_mtv.harness.lm import plan_runner
from lmms_mtv.harness.lm.evaluation import Evaluation, Tasks
from lmms_mtv.harness.lm.model import LmEvalMtv
from support.text_tasks import task_file

SHORT = {"iterations": 8, "fit_shots": 2, "steps": 10, "samples": 4, "examples": 6, "candidate_examples": 4}
CHOICES, ANSWERS = "own_arc", "own_answers"
ARMS = {
    "zero-shot": {"method": "none"},
    "2-shot": {"method": "none", "shots": 2},
    "MTV": {"method": "mtv", **SHORT},
    "MTV + 1-shot": {"method": "mtv", "shots": 1, **SHORT},
    "its vector": {"vector": f"{CHOICES}/mtv"},
}


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    """Without the report on all installed packages, and without the harness's thousands of task files."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        patched.setattr(plan_runner, "Tasks", functools.partial(Tasks, include_defaults=False))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("tasks") / "own"
    for kind in ("arc", "answers", "texts"):
        task_file(made, kind)
    task_file(made, "answers", task="own_fixed", num_fewshot=0)
    return made


@pytest.fixture(scope="module")
def requested(text_model, folder) -> Plan:
    return Plan(
        "words",
        {"pretrained": str(text_model), "device": "cpu"},
        [CHOICES, ANSWERS],
        ARMS,
        seeds=(0, 1),
        batch_size=4,
        limit=10,
        include_path=[str(folder)],
        harness="lm-eval",
    )


@pytest.fixture(scope="module")
def results(requested, tmp_path_factory) -> Path:
    """The results of the command with a plan file."""
    file = tmp_path_factory.mktemp("plans") / "words.yaml"
    requested.write(file.parent)
    (file.parent / plan.FILE).rename(file)
    output = tmp_path_factory.mktemp("results") / "words"
    cli.main(["compare", str(file), "--output", str(output)])
    return output


def cell(folder: Path, task: str, arm: str, seed: int = 0) -> Cell:
    found = cells.read(folder, CellKey(task, arm, seed))
    assert found is not None
    return found


@pytest.mark.parametrize("task", [CHOICES, ANSWERS])
def test_unedited_cells_are_the_librarys_numbers(results, requested, text_model, folder, task):
    for arm, shots, seed in (("zero-shot", 0, 0), ("2-shot", 2, 1)):
        of_library = simple_evaluate(
            HFLM(pretrained=str(text_model), device="cpu", batch_size=4),
            tasks=[task],
            task_manager=Tasks(include_path=str(folder), include_defaults=False),
            num_fewshot=shots,
            fewshot_random_seed=seed,
            fewshot_as_multiturn=False,
            limit=10,
        )
        stored = cell(results, task, arm, seed)
        metric = "acc" if task == CHOICES else "exact_match"
        assert stored.metric == metric
        assert stored.score == of_library["results"][task][f"{metric},none"]
        assert stored.stderr == of_library["results"][task][f"{metric}_stderr,none"]
        assert stored.samples["scores"] == [sample[metric] for sample in of_library["samples"][task]]
        assert stored.shots == shots


def test_edited_cells_are_a_run_of_their_own(results, text_model, folder):
    tasks = Tasks(include_path=str(folder), include_defaults=False)
    model = LmEvalMtv(
        Evaluation(tasks.of), pretrained=str(text_model), device="cpu", batch_size=4, seed=1, reuse=False, **SHORT
    )
    alone = simple_evaluate(model, tasks=[CHOICES], task_manager=tasks, limit=10)
    stored = cell(results, CHOICES, "MTV", 1)
    assert stored.vector is not None
    assert stored.vector["id"] == alone["config"]["mtv"]["tasks"][CHOICES]["vector"]
    assert stored.score == alone["results"][CHOICES]["acc,none"]
    likelihoods = [
        " ".join(f"{likelihood:.4f}" for (likelihood, _) in sample["filtered_resps"])
        for sample in alone["samples"][CHOICES]
    ]
    assert stored.samples["answers"] == likelihoods
    assert stored.samples["answers"] != cell(results, CHOICES, "zero-shot").samples["answers"]


def test_each_cell_tells_its_cost_and_its_prompts(results):
    for stored in cells.read_all(results):
        assert stored.seconds["evaluation"] > 0
        assert stored.memory["evaluation"] > 0
        assert (stored.seconds["fit"] is None) == (stored.vector is None)
        assert stored.tokens["prompt"] == stored.tokens["text"] > 0
    zero, one, two = (cell(results, ANSWERS, arm) for arm in ("zero-shot", "MTV + 1-shot", "2-shot"))
    assert zero.tokens["prompt"] < one.tokens["prompt"] < two.tokens["prompt"]
    assert zero.samples["prompts"] == cell(results, ANSWERS, "MTV").samples["prompts"] != two.samples["prompts"]
    assert cells.contradictions(cells.read_all(results)) == []
    assert cell(results, ANSWERS, "its vector").vector["id"] == cell(results, CHOICES, "MTV").vector["id"]


def test_check_runs_the_cells_again(results, capsys):
    cli.main(["check", str(results), "--cells", "3"])
    assert "18 cells as they were measured, 3 run again and the same" in capsys.readouterr().out


@pytest.mark.slow
def test_the_same_command_goes_on_among_all_tasks_of_the_harness(results, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan_runner, "Tasks", Tasks)
    copy = Path(shutil.copytree(results, tmp_path / "words"))
    cells.path(copy, CellKey(ANSWERS, "2-shot", 1)).unlink()
    cli.main(["compare", str(copy)])
    said = capsys.readouterr().out
    assert "1 cells run" in said
    assert "| MTV + 1-shot |" in said


def test_another_harness_is_another_comparison(results, tmp_path):
    file = tmp_path / "words.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load((results / plan.FILE).read_text()) | {"harness": "lmms-eval"}))
    with pytest.raises(SystemExit, match="harness 'lm-eval', this plan has 'lmms-eval'"):
        cli.main(["compare", str(file), "--output", str(results)])


class TestRefused:
    def load(self, requested: Plan, folder: Path, **changes):
        return plan_runners.load(dataclasses.replace(requested, **changes), folder)

    def test_a_harness_that_there_is_not(self, requested):
        with pytest.raises(ArgumentError, match=r"unknown harness 'lm_eval'\. Did you mean 'lm-eval'\?"):
            self.load(requested, Path(), harness="lm_eval")

    def test_a_task_that_there_is_not(self, requested, tmp_path):
        with pytest.raises(ArgumentError, match=r"unknown task 'own_ark'\. Near it: own_arc.* ls tasks` lists all"):
            self.load(requested, tmp_path, tasks=["own_ark"])

    @pytest.mark.parametrize("name", ["wrong", "base"])
    def test_arguments_of_the_other_harness(self, requested, tmp_path, name):
        with pytest.raises(ArgumentError, match=f"{name}=1 is no argument of mtv in lm-eval"):
            self.load(requested, tmp_path, arms={"an arm": {"method": "none", name: 1}})

    def test_shots_of_a_task_that_fixes_them(self, requested, tmp_path):
        runner = self.load(requested, tmp_path, tasks=["own_fixed"])
        with pytest.raises(
            DataError, match=r"own_fixed has num_fewshot: 0 in its file.* leave shots= out of arm '2-sho"
        ):
            runner.run(CellKey("own_fixed", "2-shot", 0))

    def test_a_metric_that_is_no_number(self, requested, tmp_path):
        runner = self.load(requested, tmp_path, tasks=["own_texts"])
        with pytest.raises(DataError, match="word_perplexity of task own_texts is tuple"):
            runner.run(CellKey("own_texts", "zero-shot", 0))
