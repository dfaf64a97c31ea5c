"""``lmms-mtv compare``: tasks x arms x seeds on one loaded model."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any, Final

import yaml

from lmms_mtv.errors import ArgumentError
from lmms_mtv.experiments.plan import Plan, read

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
"""The arms of a comparison that says nothing else."""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="run tasks x arms x seeds",
        description="Run every arm on every task with every seed, on one loaded model, and keep each cell in OUTPUT. "
        "A cell that is there is not run again, so an interrupted comparison goes on where it stopped.",
    )
    parser.add_argument("plan", nargs="?", type=Path, metavar="PLAN", help="a YAML file, or a folder of results")
    parser.add_argument("--output", required=True, type=Path, help="folder of results")
    parser.add_argument("--model_args", type=pairs, default={}, metavar="KEY=VALUE,...", help="of all arms")
    parser.add_argument("--tasks", type=lambda text: text.split(","), metavar="TASK,...", help="tasks or groups")
    parser.add_argument(
        "--arm",
        action="append",
        dest="arms",
        metavar="NAME[:KEY=VALUE,...]",
        help=f"an arm with its model arguments, or one of the plan's, or of {', '.join(ARMS)}; may be repeated",
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED")
    parser.add_argument("--batch_size", type=yaml.safe_load, metavar="ROWS", help="a number, or auto")
    parser.add_argument("--limit", type=int, metavar="N", help="documents of each task")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    from lmms_mtv.experiments import compare

    asked = planned(given, given.output.resolve().name)

    def load(plan: Plan, library: Path) -> compare.CellRunner:
        from lmms_mtv.harness.lmms.plan_runner import PlanRunner

        return PlanRunner(plan, library)

    ran = compare.run(asked, given.output, load)
    if not ran:
        sys.stdout.write(f"nothing to do: all cells are in {given.output}\n")
    else:
        sys.stdout.write(f"{len(ran)} cells run: {given.output}. See them with lmms-mtv report {given.output}\n")


def planned(given: argparse.Namespace, name: str) -> Plan:
    """Return the plan of a command line: that of its file, changed by its flags.

    Raises :class:`ArgumentError` if tasks are missing, or an arm is neither described nor known.
    """
    changes: dict[str, Any] = {
        key: getattr(given, key)
        for key in ("tasks", "seeds", "batch_size", "limit")
        if getattr(given, key, None) is not None
    }
    if given.plan is not None:
        found = read(given.plan)
        changes["model"] = {**found.model, **given.model_args}
        if given.arms:
            changes["arms"] = _arms(given.arms, {**ARMS, **found.arms})
            if found.baseline not in changes["arms"]:
                changes["baseline"] = None
        arms, seeds = changes.get("arms", found.arms), changes.get("seeds", found.seeds)
        changes["seeds_of"] = {a: [s for s in own if s in seeds] for a, own in found.seeds_of.items() if a in arms}
        return dataclasses.replace(found, **changes)
    if not given.tasks:
        raise ArgumentError("there is nothing to run: give a plan, or --tasks")
    arms = _arms(given.arms, ARMS) if given.arms else ARMS
    return Plan(**{"name": name, "model": given.model_args, "arms": arms, **changes})


def pairs(text: str) -> dict[str, Any]:
    """Model arguments ``key=value,key=value``. Raises :class:`argparse.ArgumentTypeError` on anything else."""
    found = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"{part!r} is no KEY=VALUE")
        found[key.strip()] = yaml.safe_load(value)
    return found


def _arms(given: list[str], known: dict[str, Any]) -> dict[str, dict[str, Any]]:
    arms = {}
    for text in given:
        name, colon, arguments = text.partition(":")
        if not colon and name not in known:
            raise ArgumentError(f"there is no arm {name!r}, only {', '.join(known)}: describe it, {name}:method=...")
        arms[name] = pairs(arguments) if colon else known[name]
    return arms
