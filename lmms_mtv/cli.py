"""The command ``lmms-mtv``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from lmms_mtv.errors import MtvError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error of this package is one line and exit status 1."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["lm-eval"]:
        # Not through the parser: what follows is lm-eval's, its --help too.
        chosen, rest = argparse.Namespace(run=_lm_eval), given[1:]
    else:
        parser = _parser()
        chosen, rest = parser.parse_args(given), []
        if not hasattr(chosen, "run"):
            parser.print_help()
            return
    try:
        chosen.run(chosen, rest)
    except MtvError as error:
        raise SystemExit(f"lmms-mtv: {type(error).__name__}: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lmms-mtv", description="Multimodal Task Vectors for lmms-eval and lm-eval.")
    parser.add_argument("--version", action="version", version=f"lmms-mtv {version('lmms-mtv')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    commands.add_parser("lm-eval", add_help=False, help="lm-eval's own command line, with the model mtv in it")
    return parser


def _lm_eval(_: argparse.Namespace, rest: Sequence[str]) -> None:
    from lmms_mtv.harness import lm_command

    lm_command.run(rest)


if __name__ == "__main__":
    main()
