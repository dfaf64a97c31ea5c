"""``lmms-mtv check``: checks of stored results."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

from lmms_mtv.commands.compare import add_include_path
from lmms_mtv.errors import ResultsError


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "check",
        help="check stored results, and run their cells again",
        description="Check that the files of RESULTS are unaltered and that the tables in README.md match the cells. "
        "Then run the cells again, fit their vectors again, and compare. The exit status is 1, with a table of the "
        "differences, if a number left its tolerance, or if a prompt, a vector or a table changed.",
    )
    parser.add_argument("results", type=Path, metavar="RESULTS", help="results folder that lmms-mtv compare wrote")
    parser.add_argument("--stored", action="store_true", help="check only the files, and run nothing")
    parser.add_argument("--cells", type=int, metavar="N", help="run only N cells again, drawn with --seed")
    parser.add_argument("--seed", type=int, default=0, help="seed of the cells that --cells draws (default: 0)")
    add_include_path(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from lmms_mtv.experiments import check, compare, plan

    stored_plan = plan.read(arguments.results)
    differences = check.stored(arguments.results)
    pages: list[Path] = []
    if not differences:
        pages = check.pages(arguments.results)
        differences += check.tables(arguments.results, pages)
    cell_keys = (
        [] if arguments.stored or differences else check.sampled_keys(stored_plan, arguments.cells, arguments.seed)
    )

    include_path = arguments.include_path or stored_plan.include_path
    if cell_keys:
        plan.check_include_path(include_path)

    def load(requested: plan.Plan, library: Path) -> compare.CellRunner:
        from lmms_mtv.harness import plan_runners

        return plan_runners.load(dataclasses.replace(requested, include_path=include_path), library, reuse=False)

    if cell_keys:
        with tempfile.TemporaryDirectory() as scratch:
            differences += check.rerun(arguments.results, cell_keys, Path(scratch), load)
    if differences:
        sys.stdout.write(check.table(differences) + "\n")
        raise ResultsError(f"{arguments.results}: {len(differences)} differences, see the table above")
    score, values = (stored_plan.tolerance.get(name, 0.0) for name in ("score", "values"))
    limits = f"scores within {score:g}, values of vectors within {values:g} of the largest value"
    again = f", {len(cell_keys)} run again and the same ({limits})" if cell_keys else ""
    tables = f"the tables in {', '.join(map(str, pages))} match them" if pages else "no README.md has tables of them"
    sys.stdout.write(
        f"{arguments.results}: {len(stored_plan.cell_keys())} cells as they were measured{again}; {tables}\n"
    )
