"""Comparisons on the tiny model: each cell once, the same numbers as a run of its own, and a check that tells."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import get_task_dict

from lmms_mtv import cli
from lmms_mtv.errors import ArgumentError, DataError, LibraryError
from lmms_mtv.experiments import cell as cells
from lmms_mtv.experiments import check, compare, plan
from lmms_mtv.experiments.cell import Cell
from lmms_mtv.experiments.plan import CellKey, Plan
from lmms_mtv.experiments.report import results as results_of
from lmms_mtv.experiments.report import tables
from lmms_mtv.fit.examples import Episode
from lmms_mtv.fit.session import FitSession
from lmms_mtv.harness.lmms import loaded_run
from lmms_mtv.harness.lmms.fitting import fit_vectors
from lmms_mtv.harness.lmms.plan_runner import PlanRunner
from lmms_mtv.harness.lmms.plugin import register_tasks
from lmms_mtv.harness.lmms.task import TaskPrompts
from lmms_mtv.vectors import HEADS, Edit, TaskVector
from lmms_mtv.vectors.library import Library
from support import evaluations, processes
from support.evaluations import task_manager

SHORT = {"iterations": 4, "fit_shots": 2, "steps": 12, "samples": 5, "examples": 6, "candidate_examples": 4}
ENGLISH, SPANISH = "shapes_color_en", "shapes_color_es"
ARMS = {
    "zero-shot": {"method": "none"},
    "2-shot": {"method": "none", "shots": 2},
    "MTV": {"method": "mtv", **SHORT},
    "its heads": {"method": "mtv", **SHORT, "heads": f"{ENGLISH}/mtv"},
    "its vector": {"vector": f"{ENGLISH}/mtv"},
    "degraded": {"method": "degraded", **SHORT, "drop": 0.5, "add": 0.25},
}
PLAN = Plan("p", {"pretrained": "tiny"}, [ENGLISH, SPANISH], ARMS, seeds=(0, 1), batch_size=8, limit=8)


def anew(plan, root):
    return PlanRunner(plan, root, reuse=False)


def fitted(library: Path, **options: Any) -> TaskVector:
    """The vector of the arm MTV for the English task."""
    arguments = {**PLAN.model, **ARMS["MTV"]}
    ((_, _, vector),) = fit_vectors(arguments, [ENGLISH], batch_size=PLAN.batch_size, library=library, **options)
    return vector


def load(plan: Plan, library: Path) -> PlanRunner:
    return PlanRunner(plan, library)


def refused(plan: Plan, library: Path) -> PlanRunner:
    raise AssertionError("nothing had to be loaded")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "p"
    assert compare.run(PLAN, folder, load) == PLAN.cell_keys()
    return folder


@pytest.fixture
def copy(results, tmp_path) -> Path:
    return Path(shutil.copytree(results, tmp_path / "p"))


def cell(folder: Path, arm: str, task: str = ENGLISH, seed: int = 0) -> Cell:
    found = cells.read(folder, CellKey(task, arm, seed))
    assert found is not None
    return found


def figures(folder: Path) -> dict[CellKey, tuple]:
    """What must not depend on when or how often a comparison was interrupted."""
    return {
        found.key: (found.score, found.samples, found.tokens, found.vector and found.vector["checksum"])
        for found in cells.read_all(folder)
    }


@pytest.mark.slow
class TestCells:
    def test_a_cell_is_what_the_harness_measures(self, results):
        for arm in ("zero-shot", "2-shot", "MTV"):
            arguments = ",".join(f"{key}={value}" for key, value in {**ARMS[arm], **PLAN.model, "seed": 1}.items())
            seed = 0 if arm == "zero-shot" else 1
            found = simple_evaluate("mtv", f"{arguments},reuse=False,batch_size=8", tasks=[ENGLISH], limit=8)
            kept = cell(results, arm, seed=seed)
            assert kept.score == found["results"][ENGLISH]["exact_match,none"]
            samples = sorted(found["samples"][ENGLISH], key=lambda sample: sample["doc_id"])
            assert kept.samples["answers"] == [sample["filtered_resps"][0] for sample in samples]
            assert kept.samples["scores"] == [sample["exact_match"] for sample in samples]
            assert kept.samples["documents"] == list(range(8))
            assert kept.n == 8

    def test_what_it_cost(self, results):
        zero, two, mtv = (cell(results, arm) for arm in ("zero-shot", "2-shot", "MTV"))
        assert zero.tokens == mtv.tokens
        # An image of the tiny model is four tokens.
        assert (zero.tokens["image"], two.tokens["image"]) == (4, 12)
        assert two.tokens["prompt"] == two.tokens["image"] + two.tokens["text"]
        assert zero.seconds["fit"] is two.seconds["fit"] is None
        assert mtv.seconds["fit"] > 0 < mtv.seconds["evaluation"]
        assert mtv.seconds["fit/values"] > 0 < mtv.seconds["fit/selection"]
        if sys.platform == "linux":
            assert mtv.memory["evaluation"] > 50e6

    def test_its_vector(self, results):
        kept = cell(results, "MTV")
        vector = TaskVector.load(Library(results / "vectors").resolve(kept.vector["id"]).path)
        assert kept.vector["checksum"] == vector.checksum
        assert [tuple(head) for head in kept.vector["heads"]] == list(vector.heads)
        assert kept.vector["shape"] == [4, 8, 16]
        assert kept.vector["examples"] == SHORT["iterations"] * SHORT["fit_shots"]
        assert kept.vector["used"] == vector.card.used > 0
        assert len(kept.vector["policy"]) == SHORT["steps"]
        assert len(kept.vector["probabilities"]) == 32

    def test_prompts_differ_with_the_seed_where_it_draws_them(self, results):
        assert cell(results, "2-shot").samples["prompts"] != cell(results, "2-shot", seed=1).samples["prompts"]
        assert cell(results, "MTV").samples["prompts"] == cell(results, "zero-shot").samples["prompts"]


class TestReuse:
    @pytest.mark.slow
    def test_heads_of_another_task_with_values_of_this_one(self, results):
        library = Library(results / "vectors")
        parent, own, child = (
            TaskVector.load(library.resolve(cell(results, arm, task).vector["id"]).path)
            for arm, task in (("MTV", ENGLISH), ("MTV", SPANISH), ("its heads", SPANISH))
        )
        assert child.heads == parent.heads
        assert child.card.parents == {parent.id: 1.0}
        # Values are means over the same prompts, whichever heads they are inserted at.
        assert child.edits[HEADS].value.equal(own.edits[HEADS].value)
        assert not child.edits[HEADS].value.equal(parent.edits[HEADS].value)

    @pytest.mark.slow
    def test_a_vector_of_another_task(self, results):
        for seed in (0, 1):
            parent, used = cell(results, "MTV", seed=seed), cell(results, "its vector", SPANISH, seed)
            assert used.vector["id"] == parent.vector["id"]
            assert used.vector["task"] == ENGLISH
            assert used.score == 0

    @pytest.mark.slow
    def test_a_degraded_selection(self, results):
        for seed in (0, 1):
            chosen = {tuple(head) for head in cell(results, "MTV", seed=seed).vector["heads"]}
            degraded = {tuple(head) for head in cell(results, "degraded", seed=seed).vector["heads"]}
            assert len(chosen - degraded) == round(0.5 * len(chosen))
            assert len(degraded - chosen) == round(0.25 * len(chosen))

    @pytest.mark.slow
    def test_a_vector_of_the_same_recipe_is_reused_and_the_same_run_without_it_fits(self, tmp_path):
        first = fitted(tmp_path)
        again = fitted(tmp_path)
        assert again.card.seconds == first.card.seconds
        anew = fitted(tmp_path, reuse=False)
        assert anew.id == first.id
        assert anew.card.seconds != first.card.seconds
        assert anew.checksum == first.checksum

    @pytest.mark.slow
    def test_a_damaged_vector_is_fitted_again(self, tmp_path, caplog):
        first = fitted(tmp_path)
        (path,) = tmp_path.rglob("vector.safetensors")
        path.write_bytes(path.read_bytes()[:-3])
        again = fitted(tmp_path)
        assert again.checksum == first.checksum
        assert TaskVector.load(path).checksum == first.checksum

    @pytest.mark.slow
    def test_a_library_that_cannot_be_written_is_told_before_the_fit(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("no folder")
        monkeypatch.setattr(FitSession, "mean_activations", lambda *_: pytest.fail("it fits"))
        with pytest.raises(LibraryError, match=r"the library .*file/library cannot be written to .*library="):
            fitted(tmp_path / "file" / "library")

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            pytest.param(
                {"heads": "nothing/mtv", "method": "mtv"},
                "no vector 'nothing/mtv' in the library",
                marks=pytest.mark.slow,
            ),
            pytest.param(
                {"heads": "0123", "method": "none"},
                "heads=0123 is for methods that choose heads.*method=none",
                marks=pytest.mark.slow,
            ),
            pytest.param({"heads": "0123", "vector": "0123"}, "does not go with vector=0123", marks=pytest.mark.slow),
            ({"batch_size": 3}, "batch_size= stands under arm"),
            pytest.param({"dtype": "float16"}, "dtype: one model is loaded for all arms", marks=pytest.mark.slow),
            pytest.param({"wrong": 1.5}, "wrong=1.5", marks=pytest.mark.slow),
            pytest.param({"stepps": 3}, "'stepps'. Did you mean 'steps'", marks=pytest.mark.slow),
        ],
    )
    def test_arguments_that_do_not_fit(self, tmp_path, arguments, match):
        with pytest.raises(ArgumentError, match=match):
            compare.run(
                dataclasses.replace(PLAN, arms={"zero-shot": {"method": "none"}, "a": arguments}), tmp_path, load
            )
        if "nothing" not in match:
            assert not (tmp_path / "cells").exists()


def test_an_unknown_task_is_told_with_the_near_ones_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(loaded_run, "TaskManager", lambda *_, **__: task_manager())
    monkeypatch.setattr(loaded_run, "LmmsEvalMtv", lambda **_: pytest.fail("it loads a model"))
    with pytest.raises(ArgumentError) as caught:
        compare.run(dataclasses.replace(PLAN, tasks=["shape_color_en"]), tmp_path, load)
    told = str(caught.value)
    assert told.startswith("unknown task 'shape_color_en'. Near it: shapes_color_en, ")
    assert "`lmms-eval --tasks list` lists all" in told
    assert len(told) < 300


class TestWrong:
    @pytest.fixture
    def task(self) -> Any:
        register_tasks()
        return get_task_dict([ENGLISH], task_manager(), "chat")[ENGLISH]

    def shown(self, prompts: TaskPrompts, shots: int) -> list[Any]:
        return [prompts.evaluation(number, "test", shots, seed=0) for number in range(10)]

    def test_a_share_of_the_demonstrations_shows_another_answer(self, task):
        right, wrong = TaskPrompts(task, None), TaskPrompts(task, None, wrong=0.4, seed=3)
        pairs = [
            (one.target, other.target)
            for before, after in zip(self.shown(right, 8), self.shown(wrong, 8), strict=True)
            for one, other in zip(before.demonstrations, after.demonstrations, strict=True)
        ]
        differing = sum(one != other for one, other in pairs)
        assert 0.2 < differing / len(pairs) < 0.6
        answers = {right.training.target(doc) for doc in right.training.documents}
        assert {other for _, other in pairs} <= answers

    def test_all_of_them_and_none(self, task):
        right, every, none = (TaskPrompts(task, None, wrong=share) for share in (0.0, 1.0, 0.0))
        for before, after, same in zip(*(self.shown(p, 2) for p in (right, every, none)), strict=True):
            assert before == same
            assert before.query == after.query
            assert all(a.target != b.target for a, b in zip(before.demonstrations, after.demonstrations, strict=True))

    def test_an_episode_may_exchange_its_answers(self, task):
        prompts = TaskPrompts(task, None)
        plain, other = (prompts.prompt(Episode(5, (0, 1, 2), answers)) for answers in (None, (1, 2, 0)))
        assert [d.messages for d in plain.demonstrations] == [d.messages for d in other.demonstrations]
        first, second, third = (d.target for d in plain.demonstrations)
        assert [d.target for d in other.demonstrations] == [second, third, first]
        assert (plain.query, plain.target) == (other.query, other.target)

    def test_the_recipe_says_so(self, task):
        digests = {TaskPrompts(task, None, wrong=w, seed=s).digest() for w, s in ((0, 0), (0.2, 0), (0.4, 0), (0.4, 1))}
        assert len(digests) == 4
        assert TaskPrompts(task, None, wrong=0.0, seed=1).digest() == TaskPrompts(task, None).digest()


class TestResuming:
    @pytest.mark.slow
    def test_a_finished_comparison_loads_nothing(self, results):
        before = figures(results)
        assert compare.run(PLAN, results, refused) == []
        assert figures(results) == before

    @pytest.mark.slow
    def test_interrupted_and_started_again_it_is_the_same(self, results, copy, monkeypatch):
        shutil.rmtree(copy / "cells")
        shutil.rmtree(copy / "vectors")
        real, left = PlanRunner.run, iter([5, 0, 3, 99])

        def interrupted(runner: PlanRunner, key: CellKey) -> Any:
            runner.count = getattr(runner, "count", next(left) if not hasattr(runner, "count") else 0) - 1
            if runner.count < 0:
                raise KeyboardInterrupt
            return real(runner, key)

        monkeypatch.setattr(PlanRunner, "run", interrupted)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                compare.run(PLAN, copy, load)
        done = len(figures(copy))
        assert done == 8
        assert len(compare.run(PLAN, copy, load)) == len(PLAN.cell_keys()) - done
        assert figures(copy) == figures(results)

    @pytest.mark.slow
    def test_another_seed_is_added_to_what_is_there(self, copy):
        arms = {name: ARMS[name] for name in ("zero-shot", "2-shot")}
        ran = compare.run(dataclasses.replace(PLAN, arms=arms, seeds=(0, 7)), copy, load)
        assert ran == [CellKey(ENGLISH, "2-shot", 7), CellKey(SPANISH, "2-shot", 7)]
        assert set(check.plan.read(copy).arms) == set(ARMS)
        assert tuple(check.plan.read(copy).seeds) == (0, 1, 7)

    @pytest.mark.slow
    def test_an_arm_runs_with_some_of_the_seeds(self, tmp_path):
        path = tmp_path / "plan.yaml"
        path.write_text(
            "name: few\nmodel: {pretrained: tiny}\ntasks: [shapes_color_en]\nseeds: [0, 1]\nlimit: 2\n"
            "arms: {2-shot: {method: none, shots: 2}, 1-shot: {method: none, shots: 1}, zero: {method: none}}\n"
            "seeds_of: {1-shot: [1]}\n"
        )
        found = plan.read(path)
        assert [(key.arm, key.seed) for key in found.cell_keys()] == [
            *(("2-shot", 0), ("zero", 0)),
            *(("2-shot", 1), ("1-shot", 1)),
        ]
        folder = tmp_path / "out"
        cli.main(["compare", str(path), "--output", str(folder), "--seeds", "0"])
        cli.main(["compare", str(path), "--output", str(folder), "--arm", "1-shot"])
        kept = plan.read(folder)
        assert kept.seeds_of == {"1-shot": [1]}
        cli.main(["compare", str(folder), "--output", str(folder)])
        assert {cell.key for cell in cells.read_all(folder)} == set(found.cell_keys())
        table = tables.overview(results_of.read(folder)).notes
        assert "1-shot: seed 1 alone." in table

    @pytest.mark.parametrize("seeds_of", [{"2-shot": [3]}, {"other": [0]}])
    def test_seeds_of_an_arm_are_some_of_the_plan(self, seeds_of):
        with pytest.raises(ArgumentError, match="expected an arm of the plan and some of its seeds"):
            plan.Plan("few", {}, ["shapes"], {"2-shot": {"method": "none"}}, seeds=(0, 1), seeds_of=seeds_of)

    @pytest.mark.slow
    def test_a_plan_that_contradicts_is_refused(self, copy):
        changed = {**ARMS, "MTV": {"method": "mtv", **SHORT, "steps": 13}}
        for changes, match in (
            ({"arms": changed}, "arm 'MTV' with .*'steps': 12.*'steps': 13"),
            ({"model": {"pretrained": "other"}}, "model .*tiny.*other"),
            ({"limit": 9}, "limit 8, this plan has 9"),
        ):
            with pytest.raises(ArgumentError, match=match):
                compare.run(dataclasses.replace(PLAN, **changes), copy, refused)

    @pytest.mark.slow
    def test_a_damaged_cell_is_told_before_anything_runs(self, copy):
        path = cells.path(copy, CellKey(ENGLISH, "MTV", 0))
        path.write_text(path.read_text()[:-40])
        with pytest.raises(DataError, match=r"MTV-seed0\.json is not a cell"):
            compare.run(PLAN, copy, refused)


def resealed(path: Path, change: Any) -> None:
    """Alter a cell as one would who knows how it is sealed."""
    content = json.loads(path.read_text())
    change(content["mtv"])
    content["seal"] = cells.seal(content)
    path.write_text(json.dumps(content))


def checked(folder: Path, *flags: str) -> None:
    cli.main(["check", str(folder), *flags])


@pytest.mark.slow
class TestCheck:
    def test_results_that_hold(self, results, capsys):
        checked(results, "--stored")
        assert "22 cells as they were measured" in capsys.readouterr().out
        checked(results, "--cells", "6")
        assert "6 run again" in capsys.readouterr().out

    @pytest.mark.parametrize("text", ['"score": ', '"prompts": ["', '"checksum": "'])
    def test_an_altered_file_is_named(self, copy, capsys, text):
        path = cells.path(copy, CellKey(SPANISH, "MTV", 1))
        content = path.read_text()
        where = content.index(text) + len(text)
        path.write_text(content[:where] + ("1" if content[where] == "0" else "0") + content[where + 1 :])
        with pytest.raises(SystemExit, match="1 differences"):
            checked(copy, "--stored")
        assert "| shapes_color_es, MTV, seed 1 | cell |" in capsys.readouterr().out

    def test_a_missing_and_a_foreign_cell(self, copy, capsys):
        path = cells.path(copy, CellKey(ENGLISH, "2-shot", 0))
        path.rename(path.with_name("3-shot-seed0.json"))
        with pytest.raises(SystemExit, match="2 differences"):
            checked(copy, "--stored")
        told = capsys.readouterr().out
        assert "| shapes_color_en, 2-shot, seed 0 | cell | a cell of the plan | no file |" in told
        assert "3-shot-seed0.json | cell | no cell of the plan | a file |" in told

    def test_a_vector_of_other_values(self, copy, capsys):
        kept = cell(copy, "MTV")
        library = Library(copy / "vectors")
        vector = TaskVector.load(library.resolve(kept.vector["id"]).path)
        edit = vector.edits[HEADS]
        library.add(TaskVector({HEADS: Edit(edit.value + 1e-3, edit.keep, edit.gain)}, vector.card))
        with pytest.raises(SystemExit, match="differences"):
            checked(copy, "--stored")
        told = capsys.readouterr().out
        assert f"| shapes_color_en, MTV, seed 0 | vector {vector.id} |" in told
        # The cells that use it on other tasks are told too.
        assert "shapes_color_es, its vector, seed 0" in told

    def test_a_vector_that_is_gone(self, copy, capsys):
        library = Library(copy / "vectors")
        kept = cell(copy, "degraded", SPANISH, 1)
        library.remove(library.resolve(kept.vector["id"]))
        with pytest.raises(SystemExit, match="1 differences"):
            checked(copy, "--stored")
        assert f"| shapes_color_es, degraded, seed 1 | vector {kept.vector['id']} |" in capsys.readouterr().out

    def test_a_table_that_says_something_else(self, copy, capsys):
        page = copy.parent / "README.md"
        page.write_text("# Results\n\n<!-- lmms-mtv report p -->\n<!-- /lmms-mtv report -->\n")
        with pytest.raises(SystemExit, match="1 differences"):
            checked(copy, "--stored")
        cli.main(["report", str(copy), "--insert", str(page)])
        checked(copy, "--stored")
        text = page.read_text()
        row = next(line for line in text.splitlines() if line.startswith("| MTV |"))
        page.write_text(text.replace(row, row.replace("±", "+-")))
        capsys.readouterr()
        with pytest.raises(SystemExit, match="1 differences"):
            checked(copy, "--stored")
        assert "README.md | table |" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            (lambda cell: cell.update(score=cell["score"] + 0.5), "| exact_match |"),
            pytest.param(
                lambda cell: cell["samples"]["prompts"].__setitem__(3, "00000000"),
                "document 3 | prompt | 00000000 |",
                marks=pytest.mark.slow,
            ),
            pytest.param(lambda cell: cell["vector"].update(id="0123456789abcdef"), "| vector", marks=pytest.mark.slow),
            pytest.param(lambda cell: cell["settings"].update(lr=0.2), "| settings |", marks=pytest.mark.slow),
        ],
    )
    def test_what_runs_again_differs_from_what_was_forged(self, copy, capsys, change, told):
        """Without the stored vectors, which alone would tell of some of it."""
        shutil.rmtree(copy / "vectors")
        key = CellKey(SPANISH, "MTV", 1)
        resealed(cells.path(copy, key), change)
        # Another prompt than that of the arms beside it is told without running anything.
        assert {difference.what for difference in check.stored(copy)} == ({"one table"} if "prompt" in told else set())
        found = check.rerun(
            copy, [key], copy.parent / "scratch", lambda plan, root: PlanRunner(plan, root, reuse=False)
        )
        assert found
        assert all(difference.where.startswith(str(key)) for difference in found)
        assert told in check.table(found)

    def test_answers_that_changed_are_shown(self, copy, caplog):
        key = CellKey(ENGLISH, "2-shot", 0)

        def forged(found: Mapping[str, Any]) -> None:
            found["samples"]["answers"][:] = ["x"] * 8
            found["samples"]["scores"][:] = [0] * 8
            found["score"] = 0.0

        resealed(cells.path(copy, key), forged)
        found = check.rerun(
            copy, [key], copy.parent / "scratch", lambda plan, root: PlanRunner(plan, root, reuse=False)
        )
        shown = [difference for difference in found if difference.what == "answer"]
        assert len(shown) == check.SHOWN
        assert shown[0].stored == "'x' (0)"
        assert any("3 more documents differ" in difference.found for difference in found)
        # Hours may pass before the table.
        assert f"{key} differs: exact_match, answer, answers" in caplog.messages

    def test_the_cells_that_are_drawn(self):
        drawn = check.sampled_keys(PLAN, 5, seed=0)
        assert len(drawn) == 5 == len(set(drawn))
        assert drawn == check.sampled_keys(PLAN, 5, seed=0) != check.sampled_keys(PLAN, 5, seed=1)
        assert [key for key in PLAN.cell_keys() if key in drawn] == drawn
        assert check.sampled_keys(PLAN, None, seed=0) == check.sampled_keys(PLAN, 999, seed=0) == PLAN.cell_keys()


def command(*arguments: str, ranks: int = 1) -> str:
    done = processes.run(
        [*evaluations.launcher(ranks), "lmms_mtv", *arguments],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_command_with_two_processes(tmp_path):
    """Flags instead of a plan; as many processes as one likes; and vectors that lmms-mtv fit has made are used."""
    short = ",".join(f"{key}={value}" for key, value in SHORT.items())
    flags = [
        "--model_args",
        "pretrained=tiny",
        "--tasks",
        ENGLISH,
        "--arm",
        "2-shot",
        "--arm",
        f"MTV:method=mtv,{short}",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    assert "2 cells run" in command("compare", *flags, "--limit", "5", "--output", str(one))
    command("compare", *flags, "--limit", "5", "--output", str(two), ranks=2)
    assert figures(two).keys() == figures(one).keys()
    for arm in ("2-shot", "MTV"):
        alone, shared = cell(one, arm), cell(two, arm)
        assert (shared.score, shared.samples, shared.tokens) == (alone.score, alone.samples, alone.tokens)
        assert shared.hardware["processes"] == 2
    assert cell(two, "MTV").vector["heads"] == cell(one, "MTV").vector["heads"]
    assert "nothing to do" in command("compare", *flags, "--limit", "5", "--output", str(one))

    library = tmp_path / "library"
    fitted = command("fit", "--model_args", f"pretrained=tiny,{short}", "--tasks", ENGLISH, "--library", str(library))
    assert cell(one, "MTV").vector["id"] in fitted
    assert [entry.id for entry in Library(library).entries()] == [cell(one, "MTV").vector["id"]]
