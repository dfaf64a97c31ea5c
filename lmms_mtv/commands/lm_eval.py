"""``lmms-mtv lm-eval``: lm-eval's own command line, with the model ``mtv`` in it."""

from __future__ import annotations

import argparse
from typing import Any

NAME = "lm-eval"


def add(commands: Any) -> None:
    parser = commands.add_parser(NAME, add_help=False, help="lm-eval's own command line, with the model mtv in it")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    from lmms_mtv.harness import lm_command

    lm_command.run(given.rest)
