"""An evaluation by lmms-eval with ``mtv`` around a model, against the same model alone.

*alone* is lmms-eval's own wrapper ``--base``, *none* is ``mtv`` with ``base=`` that wrapper and ``method=none``,
*vector* the same with a ready vector. Each evaluates ``--limit`` documents of ``--task``, from requests to scores;
models are loaded and tasks built before, once. All run in turn. The vector adds to every head a number too small to
change it: all of its work is done and the answers are the same, which is made sure of, so that no side generates more
tokens than another.

``ratio`` is the time of *vector* over that of *alone*, ``none_ratio`` that of *none*. This benchmark needs lmms-eval,
but no network: the default is the bundled checkpoint in a wrapper that takes it.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager, get_task_dict

from benchmarks import measure
from lmms_mtv import Edit, TaskVector, VectorCard, find_sites
from lmms_mtv.harness.lmms.model import LmmsEvalMtv
from lmms_mtv.harness.lmms.plugin import register_tasks
from lmms_mtv.shapes import CHECKPOINT

TINY: Final = "tiny"

NOTHING: Final = 1e-30
"""A number that no activation is changed by."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--base", default="lfm2_5_vl", help="a model of lmms-eval (default: lfm2_5_vl)")
    parser.add_argument("--pretrained", default=TINY, help="its checkpoint, or tiny for the bundled one (default)")
    parser.add_argument("--arguments", default="", help="further arguments of the model, as NAME=VALUE,...")
    parser.add_argument("--task", default="shapes_color_en", help="default: shapes_color_en")
    parser.add_argument("--limit", type=int, default=64, help="documents (default: 64)")
    parser.add_argument("--batch", type=int, default=8, help="rows (default: 8)")
    measure.add_common(parser)
    given = parser.parse_args(argv)
    device = measure.device_of(given)
    answers: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        runs = evaluations(given, device, Path(folder), answers)
        repetitions = measure.interleaved(runs, given.repetitions, device, not given.quiet)
    same = all(found == answers["alone"] for found in answers.values())
    medians = measure.medians(repetitions)
    figures = {
        "ratio": measure.ratio(repetitions, "vector", "alone"),
        "none_ratio": measure.ratio(repetitions, "none", "alone"),
        "medians": medians,
        "repetitions": repetitions,
    }
    lines = (
        f"{given.base}, {given.task}, {given.limit} documents: {medians[name]:.4g} s {name}, "
        f"{measure.ratio(repetitions, name, 'alone'):.3f} times the time alone"
        for name in medians
    )
    measure.finish(given, device, figures, lines)
    if not same:
        sys.stderr.write("answers differ from those of the model alone: no comparison of their times\n")
    return 0 if same else 1


def evaluations(
    given: argparse.Namespace, device: torch.device, folder: Path, answers: dict[str, list[str]]
) -> dict[str, Callable[[], None]]:
    """The three evaluations, by name; each leaves its answers in ``answers``."""
    register_tasks()
    pretrained = str(CHECKPOINT) if given.pretrained == TINY else given.pretrained
    dtype = str(measure.dtype_of(given, device)).removeprefix("torch.")
    arguments = ",".join(filter(None, (f"pretrained={pretrained},dtype={dtype},device={device}", given.arguments)))
    alone = get_model(given.base).create_from_arg_string(arguments, {"batch_size": given.batch})
    around = LmmsEvalMtv.create_from_arg_string(
        f"base={given.base},{arguments}", {"batch_size": given.batch, "device": str(device)}
    )
    ready = unchanging(around).save(folder / "vector.safetensors")
    manager = TaskManager("ERROR")
    task = get_task_dict([given.task], manager, "simple" if alone.is_simple else "chat")[given.task]

    # The harness empties a model when all answers are there.
    models: dict[str, Callable[[], Any]] = {
        "alone": lambda: copy.copy(alone),
        "none": lambda: around.arm({"method": "none"}),
        "vector": lambda: around.arm({"vector": str(ready)}),
    }

    def evaluated(name: str) -> Callable[[], None]:
        def run() -> None:
            found = simple_evaluate(
                models[name](),
                tasks=[task],
                limit=given.limit,
                task_manager=manager,
                bootstrap_iters=0,
                verbosity="ERROR",
            )
            samples = sorted(found["samples"][given.task], key=lambda sample: sample["doc_id"])
            answers[name] = [sample["resps"][0][0] for sample in samples]

        return run

    return {name: evaluated(name) for name in models}


def unchanging(model: LmmsEvalMtv) -> TaskVector:
    """A vector of the geometry of ``model`` that edits every head and changes no answer."""
    base = model.base
    sites = find_sites(base.model)
    layers, heads, size = sites.shape
    card = VectorCard(
        model=base.name,
        revision=base.revision,
        dtype=base.dtype,
        geometry=sites.geometry,
        task="none",
        split="none",
        examples="",
        prompt="",
        shots=0,
        seed=0,
        method="mtv",
        config={},
    )
    ones = torch.ones(layers, heads)
    edit = Edit(torch.full((layers, heads, size), NOTHING), ones, ones)
    return TaskVector({"heads": edit}, card)


if __name__ == "__main__":
    sys.exit(main())
