"""``lmms-mtv fit``: task vectors into the library, without an evaluation."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from lmms_mtv.commands.compare import pairs
from lmms_mtv.experiments.plan import Plan


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
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    from lmms_mtv.harness.lmms.evaluation import PlanRunner

    plan = Plan("fit", given.model_args, given.tasks, {"fit": {}}, given.seeds, given.batch_size)
    runner = PlanRunner(plan, given.library)
    for key in runner.cell_keys():
        vector = runner.fit(key)
        if runner.leads:
            edited = vector.described() if vector.edits else "nothing to fit"
            sys.stdout.write(f"{key.task}, seed {key.seed}: {vector.card.method} {vector.id}, {edited}\n")
