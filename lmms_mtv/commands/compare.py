"""``lmms-mtv compare``: tasks x arms x seeds on one loaded model."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any, Final

import yaml

from lmms_mtv.errors import ArgumentError
from lmms_mtv.experiments.cell import FOLDER
from lmms_mtv.experiments.plan import FILE, HARNESSES, Plan, read

ARMS: Final = {
    "zero-shot": {"method": "none"},
    "1-shot": {"method": "none", "shots": 1},
    "2-shot": {"method": "none", "shots": 2},
    "4-shot": {"method": "none", "shots": 4},
    "8-shot": {"method": "none", "shots": 8},
    "random heads": {"method": "random"},
    "MTV": {"method": "mtv"},
    "MTV + 1-shot": {"method": "mtv", "shots": 1},
}
"""The arms of a comparison without a plan and without ``--arm``."""

INTERRUPTED: Final = 130
"""Exit status after Ctrl-C, as shells give it."""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="run tasks x arms x seeds and store the results",
        description="Run every arm on every task with every seed, on one loaded model, and store each cell in the "
        "results folder. Stored cells do not run again, so the same command continues an interrupted comparison.",
    )
    parser.add_argument("plan", nargs="?", type=Path, metavar="PLAN", help="YAML file of a plan, or a results folder")
    parser.add_argument(
        "--output", type=Path, help="results folder; can be left out if PLAN is a results folder, to go on in it"
    )
    parser.add_argument(
        "--model_args",
        type=pairs,
        default={},
        metavar="KEY=VALUE,...",
        help="model arguments of all arms; a setting of a method applies to the arms whose method has it",
    )
    parser.add_argument(
        "--harness", choices=HARNESSES, help=f"the harness of the tasks (default: that of the plan, or {HARNESSES[0]})"
    )
    parser.add_argument("--tasks", type=lambda text: text.split(","), metavar="TASK,...", help="tasks or task groups")
    parser.add_argument(
        "--arm",
        action="append",
        dest="arms",
        metavar="NAME[:KEY=VALUE,...]",
        help="an arm with its model arguments, or the name of an arm of the plan, or one of "
        f"{', '.join(ARMS)}; may be repeated",
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="seeds (default: those of the plan, or 0)")
    parser.add_argument(
        "--batch_size", type=yaml.safe_load, metavar="ROWS", help="rows of a forward: a number, or auto"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="number of documents of each task (default: all)")
    add_include_path(parser)
    parser.set_defaults(run=run)


def add_include_path(parser: argparse.ArgumentParser) -> None:
    """Add the argument for folders of further task files, as absolute paths."""
    parser.add_argument(
        "--include_path",
        action="append",
        type=lambda text: str(Path(text).resolve()),
        default=[],
        metavar="FOLDER",
        help="folder of further task files, as for lmms-eval; may be repeated",
    )


def run(arguments: argparse.Namespace) -> None:
    output = arguments.output
    if output is None:
        if arguments.plan is None or not arguments.plan.is_dir():
            if arguments.plan is not None and not arguments.plan.exists():
                raise ArgumentError(
                    f"{arguments.plan} does not exist: PLAN is a YAML file, or a folder that lmms-mtv compare wrote"
                )
            raise ArgumentError("--output is missing: pass a folder for the results")
        output = arguments.plan
    requested = planned(arguments, output.resolve().name)

    from lmms_mtv.experiments import compare
    from lmms_mtv.harness import plan_runners
    from lmms_mtv.runtime import distributed

    try:
        cell_keys = compare.run(requested, output, plan_runners.load)
    except KeyboardInterrupt:
        if distributed.current().rank == 0:
            sys.stderr.write(f"\nlmms-mtv: interrupted, {_how_to_go_on(output)}\n")
        raise SystemExit(INTERRUPTED) from None
    from lmms_mtv.experiments.report import results, tables

    ranks = distributed.current()
    # All processes end together: one that ends early may be aborted while the first one makes the tables.
    with ranks.raise_together():
        if ranks.rank == 0:
            done = f"{len(cell_keys)} cells run:" if cell_keys else "nothing to do: all cells are in"
            sys.stdout.write(f"{tables.markdown([results.read(output)])}\n{done} {output}\n")


def _how_to_go_on(output: Path) -> str:
    """Return in words how an interrupted comparison goes on."""
    if not (output / FILE).is_file():
        return "nothing was measured: run the same command again"
    count = len(list(output.glob(f"{FOLDER}/*/*.json")))
    return f"{count} cells are in {output}: go on with lmms-mtv compare {shlex.quote(str(output))}"


def planned(arguments: argparse.Namespace, name: str) -> Plan:
    """Return the plan of a command line: the plan of the file, changed by the other arguments.

    Args:
        arguments: the parsed command line.
        name: name of the plan if there is no file.

    Raises:
        ArgumentError: there are no tasks, or an arm is neither described nor known.
    """
    changes: dict[str, Any] = {
        key: getattr(arguments, key)
        for key in ("harness", "tasks", "seeds", "batch_size", "limit")
        if getattr(arguments, key, None) is not None
    }
    if arguments.include_path:
        changes["include_path"] = arguments.include_path
    if arguments.plan is not None:
        stored_plan = read(arguments.plan)
        changes["model"] = {**stored_plan.model, **arguments.model_args}
        if arguments.arms:
            changes["arms"] = _arms(arguments.arms, {**ARMS, **stored_plan.arms})
            if stored_plan.baseline not in changes["arms"]:
                changes["baseline"] = None
        arms, seeds = changes.get("arms", stored_plan.arms), changes.get("seeds", stored_plan.seeds)
        changes["seeds_of"] = {
            a: [s for s in own if s in seeds] for a, own in stored_plan.seeds_of.items() if a in arms
        }
        return dataclasses.replace(stored_plan, **changes)
    if not arguments.tasks:
        raise ArgumentError("there is nothing to run: pass a plan, or --tasks")
    arms = _arms(arguments.arms, ARMS) if arguments.arms else ARMS
    return Plan(**{"name": name, "model": arguments.model_args, "arms": arms, **changes})


def pairs(text: str) -> dict[str, Any]:
    """Return the model arguments in ``key=value,key=value``, with values read as YAML.

    Raises:
        argparse.ArgumentTypeError: a part is not KEY=VALUE.
    """
    values = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"{part!r} is not KEY=VALUE")
        values[key.strip()] = yaml.safe_load(value)
    return values


def _arms(descriptions: list[str], known: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the model arguments of each arm: those in its description, else those of the known arm."""
    arms = {}
    for text in descriptions:
        name, colon, settings = text.partition(":")
        if not colon and name not in known:
            raise ArgumentError(
                f"arm {name!r} is unknown, expected one of {', '.join(known)}: describe it as --arm '{name}:method=...'"
            )
        arms[name] = pairs(settings) if colon else known[name]
    return arms
