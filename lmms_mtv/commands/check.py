"""``lmms-mtv check``: whether stored results still hold."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from lmms_mtv.errors import ResultsError


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "check",
        help="whether stored results still hold",
        description="Check that the files of RESULTS are as they were measured, that the tables made of them say what "
        "they say, and run the cells again, their vectors fitted anew. Exit status 1, with a table of what differs, if "
        "a number left its tolerance, or a prompt, a vector or a table changed.",
    )
    parser.add_argument("results", type=Path, metavar="RESULTS", help="a folder that lmms-mtv compare has written")
    parser.add_argument("--stored", action="store_true", help="the files alone: run nothing")
    parser.add_argument("--cells", type=int, metavar="N", help="run N cells again, drawn by --seed, instead of all")
    parser.add_argument("--seed", type=int, default=0, help="of the cells that --cells draws")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    from lmms_mtv.experiments import check, compare, plan

    asked = plan.read(given.results)
    differences = check.stored(given.results)
    pages: list[Path] = []
    if not differences:
        pages = check.pages(given.results)
        differences += check.tables(given.results, pages)
    cell_keys = [] if given.stored or differences else check.sampled_keys(asked, given.cells, given.seed)

    def load(asked: plan.Plan, library: Path) -> compare.CellRunner:
        from lmms_mtv.harness.lmms.plan_runner import PlanRunner

        return PlanRunner(asked, library, reuse=False)

    if cell_keys:
        with tempfile.TemporaryDirectory() as scratch:
            differences += check.rerun(given.results, cell_keys, Path(scratch), load)
    if differences:
        sys.stdout.write(check.table(differences) + "\n")
        raise ResultsError(f"{given.results}: {len(differences)} differences, see the table")
    tables = ", ".join(map(str, pages)) or "no page has tables of them"
    again = f", {len(cell_keys)} run again and the same within {dict(asked.tolerance)}" if cell_keys else ""
    sys.stdout.write(
        f"{given.results}: {len(asked.cell_keys())} cells as they were measured{again}; tables: {tables}\n"
    )
