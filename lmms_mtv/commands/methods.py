"""``lmms-mtv methods``: the methods, and the settings of each."""

from __future__ import annotations

import argparse
import sys
import textwrap
from typing import Any

from lmms_mtv import methods
from lmms_mtv.methods import Method

_WIDTH = 100

_PAGE = """# Settings of the methods

Written by `lmms-mtv methods --markdown`; `lmms-mtv methods NAME` prints the settings of one method. Each setting is a
model argument: `--model_args method=NAME,SETTING=VALUE`. A task may declare others for a method, and an argument wins
over what a task declares ([arguments](arguments.md)).
"""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "methods",
        help="list the methods, or the settings of one",
        description="List the methods, or the settings of one with type, default and meaning.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="a method")
    parser.add_argument(
        "--markdown", action="store_true", help="all methods and settings, as docs/settings.md has them"
    )
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    if given.markdown:
        sys.stdout.write(page())
        return
    chosen = [methods.get(name) for name in ([given.name] if given.name else methods.names())]
    width = max(len(method.name) for method in chosen)
    for method in chosen:
        sys.stdout.write(f"{method.name:{width}}  {method.summary}\n")
        if given.name:
            sys.stdout.write("".join(_listed(method)))


def page() -> str:
    """Return the methods of this package and their settings as a page in Markdown."""
    parts = [_PAGE]
    for name in methods.own():
        method = methods.get(name)
        rows = [f"| `{s.name}` | {s.kind} | `{s.default}` | {s.meaning} |" for s in method.described()]
        head = ["| setting | type | default | meaning |", "|---|---|---|---|"]
        table = [*head, *rows] if rows else ["It has no settings."]
        parts.append("\n".join([f"## {name}", "", f"{method.summary}", "", *table]) + "\n")
    return "\n".join(parts)


def _listed(method: Method) -> list[str]:
    lines = []
    for setting in method.described():
        text, indent = f"{setting.meaning} ({setting.kind}; {setting.default})", f"  {setting.name:20} "
        lines.append(textwrap.fill(text, _WIDTH, initial_indent=indent, subsequent_indent=" " * len(indent)) + "\n")
    return lines
