"""The record of a run of lmms-eval: its name and place, and what it and the harness's results hold."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lmms_eval.api.task import Task
from lmms_eval.loggers import EvaluationTracker
from loguru import logger

from lmms_mtv import TaskVector
from support.shape_tasks import SHORT, Arguments, evaluate

TASK, DATE = "shapes_color_en", "20260102_03:04:05"


@dataclass(frozen=True)
class Run:
    """A run as the harness's command line makes it, and what it left."""

    folder: Path
    results: dict[str, Any]
    lines: list[str]

    @property
    def samples(self) -> list[dict[str, Any]]:
        (path,) = self.folder.rglob("*_samples_*.jsonl")
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    @property
    def record(self) -> dict[str, Any]:
        (path,) = self.folder.rglob("*_mtv.json")
        return dict(json.loads(path.read_text(encoding="utf-8")))


def made(folder: Path, model_args: str, **options: Any) -> Run:
    """What :func:`lmms_eval.__main__.cli_evaluate_single` does, without reading all task files of the harness."""
    tracker, lines = EvaluationTracker(output_path=str(folder)), list[str]()
    sink = logger.add(lambda message: lines.append(message.record["message"]), level="INFO")
    results = evaluate(
        model_args,
        [TASK],
        cli_args=Arguments(folder),
        evaluation_tracker=tracker,
        datetime_str=DATE,
        **options,
    )
    logger.remove(sink)
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples, datetime_str=DATE)
    tracker.save_results_samples(task_name=TASK, samples=samples[TASK])
    return Run(folder, results, lines)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run with a fitted vector and ``shots=`` in the model arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Task, "args", None, raising=False)
        yield made(tmp_path_factory.mktemp("fitted"), f"pretrained=tiny,{SHORT},shots=2")


def test_results_samples_and_record_have_one_name_and_one_folder(fitted):
    stem = DATE.replace(":", "-")
    names = [f"{stem}_mtv.json", f"{stem}_results.json", f"{stem}_samples_{TASK}.jsonl"]
    assert sorted(path.name for path in (fitted.folder / "tiny").iterdir() if path.is_file()) == names
    assert {path.parent.name for path in fitted.folder.rglob("*.json*")} == {"tiny"}
    saved = TaskVector.load(fitted.folder / "tiny" / fitted.record["tasks"][TASK]["source"])
    assert saved.id == fitted.record["tasks"][TASK]["vector"]


def test_the_record_has_scores_and_arguments_and_is_in_the_results(fitted):
    """Also in those that simple_evaluate returns."""
    record = fitted.record
    assert record["model_args"] == f"pretrained=tiny,{SHORT},shots=2"
    figures = fitted.results["results"][TASK]
    assert record["tasks"][TASK]["scores"]["exact_match,none"] == figures["exact_match,none"]
    assert "exact_match_stderr,none" in record["tasks"][TASK]["scores"]
    assert "samples" not in record["tasks"][TASK]["scores"]
    (stored,) = fitted.folder.rglob("*_results.json")
    for results in (fitted.results, json.loads(stored.read_text(encoding="utf-8"))):
        assert json.loads(json.dumps(results["config"]["mtv"])) == record
        assert results["config"]["batch_sizes"] == [1]


def test_a_list_of_numbers_is_one_line_of_the_record(fitted):
    (path,) = fitted.folder.rglob("*_mtv.json")
    text, heads = path.read_text(encoding="utf-8"), fitted.record["tasks"][TASK]["heads"]
    assert f'"heads": {json.dumps(heads)},\n' in text
    assert len(heads) > 1


def test_n_shot_is_the_number_that_was_used(fitted, tmp_path):
    assert fitted.results["n-shot"] == {TASK: 2}
    (stored,) = fitted.folder.rglob("*_results.json")
    assert json.loads(stored.read_text(encoding="utf-8"))["n-shot"] == {TASK: 2}
    none = "pretrained=tiny,method=none"
    assert made(tmp_path / "flag", none, num_fewshot=4, limit=1).results["n-shot"] == {TASK: 4}
    assert made(tmp_path / "both", f"{none},shots=1", num_fewshot=4, limit=1).results["n-shot"] == {TASK: 1}


def test_samples_hold_the_whole_prompt_and_the_vector(fitted, tmp_path):
    vector = fitted.record["tasks"][TASK]["vector"]
    assert len(fitted.samples) == 3
    for sample in fitted.samples:
        assert sample["vector"] == vector
        assert sample["input"].count("<image>") == sample["input"].count("What is it? Answer:") == 3
        assert sample["input"].endswith("What is it? Answer:")
    plain = made(tmp_path, "pretrained=tiny,method=none,prompt_style=chat", limit=1)
    (sample,) = plain.samples
    assert sample["vector"] is None
    assert sample["input"].count("What is it? Answer:") == 1


def test_the_last_lines_say_what_was_fitted_where_it_is_and_what_it_gained(fitted):
    record, card = fitted.record["tasks"][TASK], TaskVector.load(next(fitted.folder.rglob("*.safetensors"))).card
    line, path = fitted.lines[-2:]
    assert line.startswith(f"{TASK}: exact_match {record['scores']['exact_match,none']:.3f} 2-shot, with vector ")
    assert f"vector {record['vector']} of mtv ({len(record['heads'])} of 32 heads), kept as {fitted.folder}" in line
    assert f"loss {card.losses['unedited'][0]:.3f} -> {card.losses['chosen'][0]:.3f} (without edit -> with" in line
    assert f"right answers {card.accuracy['unedited']:.0%} -> {card.accuracy['edited']:.0%} of 16" in line
    assert path.endswith("_mtv.json")


@pytest.mark.slow
def test_the_fit_is_in_the_run_that_wandb_args_opened_and_in_no_other(tmp_path, monkeypatch):
    logged: list[dict[str, Any]] = []
    fake = SimpleNamespace(run=object(), log=logged.append, define_metric=lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    made(tmp_path / "without", f"pretrained=tiny,{SHORT}", limit=1)
    assert logged == []
    monkeypatch.setattr(Arguments, "wandb_args", "project=x", raising=False)
    run = made(tmp_path / "with", f"pretrained=tiny,{SHORT}", limit=1)
    assert [entry[f"fit/{TASK}/step"] for entry in logged[:-1]] == list(range(1, 11))
    assert logged[-1][f"fit/{TASK}/heads"] == len(run.record["tasks"][TASK]["heads"])


def test_secrets_are_not_in_the_record():
    """The harness leaves them out of its results too."""
    from lmms_mtv.harness.record import ModelRecord, RunRecord

    model = ModelRecord("name", None, "float32", [], {}, {})
    text = RunRecord(model, "pretrained=x,hf_token=abc,api_key=d,seed=1", {}).as_json()["model_args"]
    assert text == "pretrained=x,hf_token=[REDACTED],api_key=[REDACTED],seed=1"
