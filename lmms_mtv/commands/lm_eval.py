"""``lmms-mtv lm-eval``: the command line of lm-eval with the model ``mtv``."""

from __future__ import annotations

import argparse
from importlib.metadata import version
from typing import Any

from lmms_mtv.errors import InstallationError

NAME = "lm-eval"


def add(commands: Any) -> None:
    parser = commands.add_parser(NAME, add_help=False, help="run the command line of lm-eval with the model mtv")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    try:
        from lmms_mtv.harness.lm import command
    except ImportError as error:
        # The command line is not part of the public interface of lm-eval, so a new version may change it.
        raise InstallationError(
            f"lm-eval {version('lm-eval')} has another command line than lmms-mtv expects ({error}): "
            "python -m pip install 'lm-eval>=0.4.12,<0.4.14'"
        ) from error
    command.run(arguments.rest)
