"""``lmms-mtv lm-eval``: lm-eval's own command line, with the model ``mtv`` in it."""

from __future__ import annotations

import argparse
from importlib.metadata import version
from typing import Any

from lmms_mtv.errors import InstallationError

NAME = "lm-eval"


def add(commands: Any) -> None:
    parser = commands.add_parser(NAME, add_help=False, help="lm-eval's own command line, with the model mtv in it")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    try:
        from lmms_mtv.harness.lm import command
    except ImportError as error:
        # The command line of lm-eval is not part of its public interface.
        raise InstallationError(
            f"lm-eval {version('lm-eval')} is not built as lmms-mtv expects ({error}): python -m pip install "
            "'lm-eval>=0.4.12,<0.4.14'"
        ) from error
    command.run(given.rest)
