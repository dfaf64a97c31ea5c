"""``lmms-mtv report``: tables, plots and an HTML page of results."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from lmms_mtv.errors import ArgumentError
from lmms_mtv.runtime import files


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="write tables, plots and an HTML page of results",
        description="Write tables, plots and an HTML page of the results of lmms-mtv compare. Without options, write "
        "the tables as Markdown to standard output.",
    )
    parser.add_argument(
        "results", metavar="RESULTS", nargs="+", type=Path, help="results folder that lmms-mtv compare wrote"
    )
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write the tables as Markdown to FILE")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a self-contained HTML page to FILE")
    parser.add_argument("--plots", metavar="FOLDER", type=Path, help="write each plot as PNG and SVG into FOLDER")
    parser.add_argument(
        "--insert",
        metavar="FILE",
        nargs="+",
        type=Path,
        default=[],
        help="write the tables between the marks <!-- lmms-mtv report PATH --> and <!-- /lmms-mtv report --> of FILE",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from lmms_mtv.experiments.report import marks, results, tables

    if (arguments.html or arguments.plots) and importlib.util.find_spec("matplotlib") is None:
        raise ArgumentError("--html and --plots need matplotlib: python -m pip install 'lmms-mtv[report]'")
    for option in ("markdown", "html", "plots"):
        if (path := getattr(arguments, option)) is not None:
            _check_writable(option, path)
    for path in arguments.insert:
        if not path.is_file():
            raise ArgumentError(f"there is no file {path} with marks: choose another --insert")
    sections = [results.read(folder) for folder in arguments.results]
    for path in arguments.insert:
        text = path.read_text(encoding="utf-8")
        if not marks.count(text, path.parent, sections):
            names = ", ".join(map(str, arguments.results))
            raise ArgumentError(
                f"{path} has no mark <!-- lmms-mtv report PATH --> with PATH one of {names}: add the mark"
            )
        _write(path, marks.inserted(text, path.parent, sections))
    if arguments.markdown:
        _write(arguments.markdown, tables.markdown(sections))
    if arguments.html:
        from lmms_mtv.experiments.report.page import page

        _write(arguments.html, page(sections))
    if arguments.plots:
        from lmms_mtv.experiments.report.plots import plots

        for section in sections:
            folder = arguments.plots if len(sections) == 1 else arguments.plots / section.plan.name
            for plot in plots(section):
                for path in plot.save(folder):
                    sys.stdout.write(f"{path}\n")
    if not (arguments.markdown or arguments.html or arguments.plots or arguments.insert):
        sys.stdout.write(tables.markdown(sections))


def _check_writable(option: str, path: Path) -> None:
    """Check that an option names a folder, or a file in a folder, in which something can be written.

    Raises:
        ArgumentError: nothing can be written there.
    """
    is_folder = option == "plots"
    reason = files.obstacle(path if is_folder else path.parent)
    if not is_folder and path.is_dir():
        reason = "a folder of this name exists"
    if reason is not None:
        what = "plots cannot be written to" if is_folder else "the report cannot be written to"
        raise ArgumentError(f"{what} {path} ({reason}): choose another --{option}")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    sys.stdout.write(f"{path}\n")
