"""An evaluation by lmms-eval with ``mtv`` around a model, compared with an evaluation of the same model alone.

*alone* is the wrapper ``--base`` of lmms-eval; *none* is ``mtv`` with this wrapper as ``base=`` and ``method=none``;
*vector* is the same with a stored vector. Each evaluation runs ``--limit`` documents of ``--task``, from requests to
scores. The models are loaded and the tasks are built once, before. The evaluations run in turn. The vector adds to
every head a number that is too small to change the activation. So the edit does all its work and the answers stay the
same, and no evaluation generates more tokens than another. The benchmark checks that the answers are the same.

``ratio`` is the time of *vector* divided by the time of *alone*, ``none_ratio`` the time of *none* divided by the time
of *alone*. This benchmark needs lmms-eval, but no network: the default is the bundled checkpoint in a wrapper of
lmms-eval that loads the checkpoint.
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
"""A number that is too small to change an activation."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--base", default="lfm2_5_vl", help="name of a model of lmms-eval (default: lfm2_5_vl)")
    parser.add_argument(
        "--pretrained", default=TINY, help="checkpoint of the model, or tiny for the bundled checkpoint (default: tiny)"
    )
    parser.add_argument("--arguments", default="", help="more arguments of the model, as NAME=VALUE,...")
    parser.add_argument("--task", default="shapes_color_en", help="task (default: shapes_color_en)")
    parser.add_argument("--limit", type=int, default=64, help="documents (default: 64)")
    parser.add_argument("--batch", type=int, default=8, help="batch size (default: 8)")
    measure.add_common(parser)
    arguments = parser.parse_args(argv)
    device = measure.device_of(arguments)
    answers: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        runs = evaluations(arguments, device, Path(folder), answers)
        repetitions = measure.interleaved(runs, arguments.repetitions, device, not arguments.quiet)
    same = all(of_model == answers["alone"] for of_model in answers.values())
    medians = measure.medians(repetitions)
    figures = {
        "ratio": measure.ratio(repetitions, "vector", "alone"),
        "none_ratio": measure.ratio(repetitions, "none", "alone"),
        "medians": medians,
        "repetitions": repetitions,
    }
    lines = (
        f"{arguments.base}, {arguments.task}, {arguments.limit} documents: {medians[name]:.4g} s {name}, "
        f"{measure.ratio(repetitions, name, 'alone'):.3f} times the time alone"
        for name in medians
    )
    measure.finish(arguments, device, figures, lines)
    if not same:
        sys.stderr.write("the answers differ from the answers of the model alone: the times cannot be compared\n")
    return 0 if same else 1


def evaluations(
    arguments: argparse.Namespace, device: torch.device, folder: Path, answers: dict[str, list[str]]
) -> dict[str, Callable[[], None]]:
    """Return the three evaluations by name; each stores its answers in ``answers``."""
    register_tasks()
    pretrained = str(CHECKPOINT) if arguments.pretrained == TINY else arguments.pretrained
    dtype = str(measure.dtype_of(arguments, device)).removeprefix("torch.")
    model_arguments = ",".join(
        filter(None, (f"pretrained={pretrained},dtype={dtype},device={device}", arguments.arguments))
    )
    alone = get_model(arguments.base).create_from_arg_string(model_arguments, {"batch_size": arguments.batch})
    wrapped = LmmsEvalMtv.create_from_arg_string(
        f"base={arguments.base},{model_arguments}", {"batch_size": arguments.batch, "device": str(device)}
    )
    stored = unchanging(wrapped).save(folder / "vector.safetensors")
    manager = TaskManager("ERROR")
    task = get_task_dict([arguments.task], manager, "simple" if alone.is_simple else "chat")[arguments.task]

    # The harness removes the weights from a model object after the evaluation, so each run gets a copy.
    models: dict[str, Callable[[], Any]] = {
        "alone": lambda: copy.copy(alone),
        "none": lambda: wrapped.arm({"method": "none"}),
        "vector": lambda: wrapped.arm({"vector": str(stored)}),
    }

    def evaluated(name: str) -> Callable[[], None]:
        def run() -> None:
            evaluation = simple_evaluate(
                models[name](),
                tasks=[task],
                limit=arguments.limit,
                task_manager=manager,
                bootstrap_iters=0,
                verbosity="ERROR",
            )
            samples = sorted(evaluation["samples"][arguments.task], key=lambda sample: sample["doc_id"])
            answers[name] = [sample["resps"][0][0] for sample in samples]

        return run

    return {name: evaluated(name) for name in models}


def unchanging(model: LmmsEvalMtv) -> TaskVector:
    """Return a vector of the geometry of ``model`` that edits every head and changes no answer."""
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
