"""The command ``lmms-mtv``."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from lmms_mtv.commands import check, compare, doctor, fit, library, lm_eval, methods, prepare, report
from lmms_mtv.errors import MtvError
from lmms_mtv.runtime import environment

COMMANDS = (prepare, methods, fit, library, compare, report, check, lm_eval, doctor)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error of this package is one line and exit status 1."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    if given[:1] == [lm_eval.NAME]:
        # What follows is lm-eval's, its --help and its flags too.
        chosen = parser.parse_args(given[:1])
        chosen.rest = given[1:]
    else:
        chosen = parser.parse_args(given)
    if not hasattr(chosen, "run"):
        parser.print_help()
        return
    for stream in (sys.stdout, sys.stderr):
        # Where a log or a pipe is not UTF-8, a sign that it lacks is a question mark and no end of the command.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        if chosen.run is not doctor.run:
            environment.check()
        chosen.run(chosen)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has seen enough, as head does. Python would complain of what is left in the buffer.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (MtvError, OSError) as error:
        raise SystemExit(f"lmms-mtv: {type(error).__name__}: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lmms-mtv", description="Multimodal Task Vectors for lmms-eval and lm-eval.")
    parser.add_argument("--version", action="version", version=f"lmms-mtv {version('lmms-mtv')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
