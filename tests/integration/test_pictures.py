"""The tasks of pictures, and their model in the harness."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import get_task_dict

from lmms_mtv import TaskVector
from lmms_mtv.errors import ArgumentError
from lmms_mtv.fit.examples import Episode
from lmms_mtv.harness.lmms.bases.hf import HfBase, HfConfig
from lmms_mtv.harness.lmms.task import TaskPrompts
from lmms_mtv.pictures import model, names
from support import tiny_gemma
from support.evaluations import task_manager

THINGS = ("english", "spanish", "german", "category", "plural")
FLAGS = ("country", "capital", "currency")
DATA = Path(__file__).parents[2] / "tasks" / "pictures" / "data"


@cache
def prompts(task: str) -> TaskPrompts:
    return TaskPrompts(get_task_dict([task], task_manager(), "chat")[task], None)


@pytest.fixture
def small(monkeypatch):
    """The picture model with a small language model in place of Gemma."""
    monkeypatch.setattr(
        model, "language_model", lambda *_: (tiny_gemma.language_model(hidden=640), tiny_gemma.tokenizer())
    )


def shown(field: str) -> dict[str, str]:
    return {each.code: getattr(each, field) for each in (*names.things(), *names.countries()) if hasattr(each, field)}


@pytest.mark.parametrize("field", THINGS + FLAGS)
def test_a_prompt_is_pictures_and_answers_alone(field):
    made = prompts(f"pictures_{field}")
    prompt = made.prompt(Episode(0, (1, 2)))
    group = "things" if field in THINGS else "flags"
    rows = [json.loads(line) for line in (DATA / f"{group}_train.jsonl").read_text().splitlines()]
    answers = [answer for row in rows if (answer := shown(field)[row["code"]])][:200]
    assert prompt.raw("<image>") == (
        f"<image>\nAnswer: {answers[1]}\n\n<image>\nAnswer: {answers[2]}\n\n<image>\nAnswer:"
    )
    assert (prompt.target, len(prompt.images())) == (answers[0], 3)


@pytest.mark.parametrize("field", [*THINGS, *FLAGS])
def test_two_hundred_documents_for_evaluation_of_every_picture_alike(field):
    (task,) = get_task_dict([f"pictures_{field}"], task_manager(), "chat").values()
    documents = list(task.test_docs()["code"])
    assert len(documents) == 200
    codes = set(documents)
    assert not codes & set(task.training_docs()["code"])
    assert max(map(documents.count, codes)) <= 200 // len(codes) + 1


def test_an_episode_is_its_own_prompt():
    made = prompts("pictures_labels")
    row = json.loads((DATA / "episodes_train.jsonl").read_text().splitlines()[0])
    prompt = made.prompt(Episode(0, ()))
    first, second = row["labels"]
    assert prompt.raw("<image>") == (f"<image>\nAnswer: {first}\n\n<image>\nAnswer: {second}\n\n<image>\nAnswer:")
    assert (prompt.target, len(prompt.images())) == (row["answer"], 3)


def test_the_model_runs_in_the_harness_with_and_without_a_vector(small, tmp_path):
    for arguments in ("method=none,shots=2", "iterations=2,fit_shots=1,steps=2,samples=2,examples=2,candidates=2"):
        results = simple_evaluate(
            model="mtv",
            model_args=f"pretrained=pictures,library={tmp_path},seed=0,{arguments}",
            tasks=["pictures_category", "pictures_labels"],
            limit=3,
            batch_size=2,
            task_manager=task_manager(),
        )
        scores = {task: row["exact_match,none"] for task, row in results["results"].items()}
        assert scores.keys() == {"pictures_category", "pictures_labels"}
    vectors = list(tmp_path.rglob("vector.safetensors"))
    assert {TaskVector.load(path).card.model for path in vectors} == {"lmms-mtv/pictures"}
    assert len(vectors) == 2


def test_the_model_of_the_harness_is_that_of_python(small):
    base = HfBase(HfConfig(pretrained="pictures", device="cpu"))
    loaded, _ = model.load()
    assert base.dtype == "float32"
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in base.model.state_dict().items())


def test_arguments_of_other_models_are_refused():
    with pytest.raises(ArgumentError, match="pretrained=pictures takes no revision, min_pixels: leave it out"):
        HfBase(HfConfig(pretrained="pictures", revision="main", min_pixels=4))
