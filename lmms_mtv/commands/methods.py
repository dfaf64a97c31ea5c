"""``lmms-mtv methods``: the methods, and the settings of each."""

from __future__ import annotations

import argparse
import sys
import textwrap
from typing import TYPE_CHECKING, Any

from lmms_mtv.errors import MethodError

if TYPE_CHECKING:
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
        help="list the methods, or the settings of one method",
        description="List the methods. With NAME, list the settings of this method: name, meaning, type and "
        "default; the first line has the paper that the method and its settings are from.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="name of a method")
    parser.add_argument(
        "--markdown", action="store_true", help="write the page docs/settings.md: all methods with their settings"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from lmms_mtv import methods

    if arguments.markdown:
        sys.stdout.write(page())
    elif arguments.name:
        method = methods.get(arguments.name)
        sys.stdout.write(f"{method.name}  {method.summary}\n{''.join(_setting_lines(method))}")
    else:
        names = methods.names()
        width = max(map(len, names))
        for name in names:
            sys.stdout.write(f"{name:{width}}  {_summary(name)}\n")


def _summary(name: str) -> str:
    """Return the summary of a method, or the reason why the package of the method does not load."""
    from lmms_mtv import methods

    try:
        return methods.get(name).summary
    except MethodError as error:
        return f"cannot be used: {error}"


def page() -> str:
    """Return the methods of this package and their settings as a page in Markdown."""
    from lmms_mtv import methods

    parts = [_PAGE]
    for name in methods.own():
        method = methods.get(name)
        rows = [f"| `{s.name}` | {s.kind} | `{s.default}` | {s.meaning} |" for s in method.described()]
        head = ["| setting | type | default | meaning |", "|---|---|---|---|"]
        table = [*head, *rows] if rows else ["It has no settings."]
        parts.append("\n".join([f"## {name}", "", f"{method.summary}", "", *table]) + "\n")
    return "\n".join(parts)


def _setting_lines(method: Method) -> list[str]:
    """Return the settings of a method as lines of text: name, meaning, type and default."""
    lines = []
    for setting in method.described():
        text, indent = f"{setting.meaning} ({setting.kind}, default {setting.default})", f"  {setting.name:20} "
        lines.append(textwrap.fill(text, _WIDTH, initial_indent=indent, subsequent_indent=" " * len(indent)) + "\n")
    return lines
