"""``lmms-mtv report``: results as tables, plots and a page."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="make tables, plots and a page of results",
        description="Make tables, plots and a page of what lmms-mtv compare wrote. Without an option, the tables as "
        "Markdown on standard output.",
    )
    parser.add_argument("results", metavar="RESULTS", nargs="+", type=Path, help="a folder of lmms-mtv compare")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write the tables as Markdown")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write one page that needs nothing but itself")
    parser.add_argument("--plots", metavar="FOLDER", type=Path, help="write each plot as PNG and as SVG")
    parser.add_argument(
        "--insert",
        metavar="FILE",
        nargs="+",
        type=Path,
        default=[],
        help="write tables between the marks <!-- lmms-mtv report PATH --> and <!-- /lmms-mtv report --> of a file",
    )
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    from lmms_mtv.errors import ArgumentError
    from lmms_mtv.experiments.report import marks, results, tables

    if (given.html or given.plots) and importlib.util.find_spec("matplotlib") is None:
        raise ArgumentError("--html and --plots need matplotlib: python -m pip install 'lmms-mtv[report]'")
    found = [results.read(folder) for folder in given.results]
    for path in given.insert:
        text = path.read_text(encoding="utf-8")
        if not marks.count(text, path.parent, found):
            names = ", ".join(map(str, given.results))
            raise ArgumentError(f"{path} has no mark <!-- lmms-mtv report PATH --> with PATH one of {names}")
        _write(path, marks.inserted(text, path.parent, found))
    if given.markdown:
        _write(given.markdown, tables.markdown(found))
    if given.html:
        from lmms_mtv.experiments.report.page import page

        _write(given.html, page(found))
    if given.plots:
        from lmms_mtv.experiments.report.plots import plots

        for one in found:
            folder = given.plots if len(found) == 1 else given.plots / one.plan.name
            for plot in plots(one):
                for path in plot.save(folder):
                    sys.stdout.write(f"{path}\n")
    if not (given.markdown or given.html or given.plots or given.insert):
        sys.stdout.write(tables.markdown(found))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    sys.stdout.write(f"{path}\n")
