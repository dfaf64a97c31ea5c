"""Tasks over made-up texts, and evaluations of them with lm-eval."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from lmms_mtv.harness.lm.evaluation import Evaluation, Tasks
from lmms_mtv.harness.lm.model import LmEvalMtv

LIBRARY = Path(lm_eval.tasks.__file__).parent


WORDS = ("red", "green", "blue", "circle", "square", "ring", "left", "top", "rojo", "verde", "azul", "anillo")


def phrases(rng: random.Random, least: int = 1, most: int = 4) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, most)))


def rows(kind: str, seed: int, count: int = 12) -> list[dict[str, Any]]:
    """Documents in the form that each of the library's tasks has them; every third has words nobody knows."""
    rng = random.Random(f"{kind}/{seed}")
    documents: list[dict[str, Any]] = []
    for index in range(count):
        ask, strange = phrases(rng, 2, 9), " zyx" if index % 3 == 0 else ""
        one, two, three = (phrases(rng) for _ in range(3))
        forms: dict[str, dict[str, Any]] = {
            "arc": {
                "question": ask + strange,
                "choices": {"text": [one + strange, two, f"{one}{strange} zyx"], "label": ["A", "B", "C"]},
                "answerKey": "ABC"[index % 3],
            },
            "copa": {
                "premise": f"{ask}.",
                "question": "cause" if index % 2 else "effect",
                "choice1": WORDS[index % 5],
                "choice2": WORDS[5 + index % 5],
                "label": index % 2,
            },
            "winogrande": {
                "sentence": f"{ask} _ {two}",
                "option1": one,
                "option2": f"{three} top",
                "answer": "12"[index % 2],
            },
            "answers": {"ask": f"{ask}{strange}", "answer": one},
            # Two ways to split the same words, and a question without words.
            "splits": {
                "ask": ["red circle", "red circle left", "red", "", "zyx"][index % 5],
                "answer": [" left top", " top", " circle left top", "blue ring zyx", " zyx"][index % 5],
            },
            "texts": {"ask": "", "answer": phrases(rng, 1, 60)},
        }
        documents.append(forms[kind])
    return documents


OWN: dict[str, Any] = {
    "doc_to_text": "{{ask}}",
    "doc_to_target": "{{answer}}",
    "fewshot_delimiter": "\n",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


TASKS: dict[str, dict[str, Any]] = {
    "arc": {"include": str(LIBRARY / "arc" / "arc_easy.yaml")},
    "copa": {"include": str(LIBRARY / "super_glue" / "copa" / "default.yaml")},
    "winogrande": {"include": str(LIBRARY / "winogrande" / "default.yaml")},
    "answers": OWN
    | {
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "splits": OWN | {"output_type": "loglikelihood"},
    "texts": OWN
    | {
        "output_type": "loglikelihood_rolling",
        "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
    },
}


def task_file(folder: Path, kind: str, **changes: Any) -> Path:
    """A task over local documents; of the library's tasks everything but the data is the library's own."""
    folder.mkdir(exist_ok=True)
    files = {}
    for seed, split in enumerate(("train", "test")):
        files[split] = str(folder / f"{kind}-{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(doc) + "\n" for doc in rows(kind, seed)), encoding="utf-8")
    fields = TASKS[kind] | {
        "task": f"own_{kind}",
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "training_split": "train",
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": "train",
    }
    if "include" not in fields:
        fields = {key: value for key, value in fields.items() if value is not None}
    path = folder / f"{changes.get('task', fields['task'])}.yaml"
    path.write_text(yaml.safe_dump(fields | changes), encoding="utf-8")
    return folder


def run(
    model: Path,
    folder: Path,
    kinds: Iterable[str],
    evaluation: dict[str, Any] | None = None,
    library: bool = False,
    prefix: str = "own_",
    **given: Any,
) -> tuple[Any, dict[str, list[Any]]]:
    """An evaluation in this process. Gives the model, and the answers of each task."""
    tasks = Tasks(include_path=str(folder), include_defaults=False)
    evaluation = evaluation or {}
    form = {key: evaluation[key] for key in evaluation.keys() & {"system_instruction", "apply_chat_template"}}
    given = {"pretrained": str(model), "device": "cpu"} | given
    lm = HFLM(**given) if library else LmEvalMtv(Evaluation(tasks.of, fewshot_as_multiturn=True, **form), **given)
    names = [kind if kind.startswith(prefix) else f"{prefix}{kind}" for kind in kinds]
    results = simple_evaluate(lm, tasks=names, task_manager=tasks, bootstrap_iters=0, **evaluation)
    answers = {
        name: [(sample["arguments"], sample["resps"]) for sample in results["samples"][name]]
        for name in results["samples"]
    }
    return lm, answers
