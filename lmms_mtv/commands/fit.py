"""``lmms-mtv fit``: task vectors into the library, without an evaluation."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Final

import yaml

from lmms_mtv.commands.compare import add_include_path, pairs
from lmms_mtv.errors import ArgumentError
from lmms_mtv.experiments.plan import SEEDS, are_seeds, check_include_path

_INSTEAD: Final = {
    "seed": "pass --seeds",
    "batch_size": "pass --batch_size",
    "library": "pass --library",
    "limit": "leave it out, nothing is evaluated",
    "reuse": "leave it out, a vector in the library is not fitted again",
}
"""Model arguments that do not belong in ``--model_args``, with the advice that the error message gives."""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "fit",
        help="fit task vectors without evaluating",
        description="Fit a vector for each task and seed and keep it in the library. One that is there is not fitted "
        "again. Use it with lmms-eval --model mtv and the same arguments, or with vector=ID.",
    )
    parser.add_argument("--model_args", type=pairs, required=True, metavar="KEY=VALUE,...", help="as for lmms-eval")
    parser.add_argument("--tasks", type=lambda text: text.split(","), required=True, metavar="TASK,...")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED")
    parser.add_argument("--batch_size", type=yaml.safe_load, default=1, metavar="ROWS", help="a number, or auto")
    parser.add_argument("--library", type=Path, metavar="FOLDER", help="instead of the default one")
    add_include_path(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    for name, instead in _INSTEAD.items():
        if name in options.model_args:
            raise ArgumentError(f"--model_args has {name}=: {instead}")
    if not are_seeds(options.seeds):
        raise ArgumentError(f"--seeds {' '.join(map(str, options.seeds))}: expected {SEEDS}")

    from lmms_mtv.harness.arms import check_early

    check_include_path(options.include_path)
    check_early(options.model_args, {})

    from lmms_mtv.harness.lmms.fitting import fit_vectors
    from lmms_mtv.runtime import distributed

    for task, seed, vector in fit_vectors(
        options.model_args,
        options.tasks,
        options.seeds,
        batch_size=options.batch_size,
        library=options.library,
        include_path=options.include_path,
    ):
        if distributed.current().rank == 0:
            edited = vector.described() if vector.edits else "nothing to fit"
            sys.stdout.write(f"{task}, seed {seed}: {vector.card.method} {vector.id}, {edited}\n")
