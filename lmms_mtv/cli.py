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
    """Run the command line; an error of this package ends with one line and exit status 1."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    if words[:1] == [lm_eval.NAME]:
        # All other words belong to lm-eval, among them --help.
        parsed = parser.parse_args(words[:1])
        parsed.rest = words[1:]
    else:
        parsed = parser.parse_args(words)
    if not hasattr(parsed, "run"):
        parser.print_help()
        return
    for stream in (sys.stdout, sys.stderr):
        # In a log or a pipe without UTF-8, write a question mark for a missing character instead of an error.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        if parsed.run is not doctor.run:
            environment.check()
        parsed.run(parsed)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output, such as head, has closed the pipe. Python would report the rest of the buffer.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.stderr.write("\nlmms-mtv: interrupted\n")
        raise SystemExit(compare.INTERRUPTED) from None
    except (MtvError, OSError) as error:
        raise SystemExit(f"lmms-mtv: {type(error).__name__}: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lmms-mtv", description="Fit, evaluate and compare Multimodal Task Vectors with lmms-eval and lm-eval."
    )
    parser.add_argument("--version", action="version", version=f"lmms-mtv {version('lmms-mtv')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
