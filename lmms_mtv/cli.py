"""The command ``lmms-mtv``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

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
    except (MtvError, OSError) as error:
        raise SystemExit(f"lmms-mtv: {type(error).__name__}: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lmms-mtv", description="Multimodal Task Vectors for lmms-eval and lm-eval.")
    parser.add_argument("--version", action="version", version=f"lmms-mtv {version('lmms-mtv')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    commands.add_parser("lm-eval", add_help=False, help="lm-eval's own command line, with the model mtv in it")
    prepare = commands.add_parser(
        "prepare",
        help="turn official archives into what a task loads",
        description="Turn the official files of a data set into what its task loads. Interrupted, it goes on where it "
        "stopped. Set LMMS_MTV_DATA to the output folder afterwards; the tasks then use it instead of the hub.",
    )
    prepare.add_argument("task", metavar="TASK", help="vizwiz, okvqa, flowers, cub, dtd, english_spanish or antonyms")
    prepare.add_argument("--source", required=True, type=Path, help="folder with the official files, packed or not")
    prepare.add_argument("--output", required=True, type=Path, help="folder of prepared data, one subfolder a task")
    prepare.add_argument("--partial", action="store_true", help="a part of the data: compare no counts or checksums")
    prepare.add_argument("--regenerate", action="store_true", help="draw episodes from the official splits")
    prepare.add_argument("--seed", type=int, default=0, help="of drawn episodes and of the split of word pairs")
    prepare.set_defaults(run=_prepare)
    return parser


def _lm_eval(_: argparse.Namespace, rest: Sequence[str]) -> None:
    from lmms_mtv.harness import lm_command

    lm_command.run(rest)


def _prepare(given: argparse.Namespace, _: Sequence[str]) -> None:
    from lmms_mtv import data

    source = data.source(given.task)
    official = data.Official(
        given.task, given.source, given.output / given.task, given.partial, given.seed, given.regenerate
    )
    rows = data.prepare(source, official)
    counts = ", ".join(f"{count:,} {split}" for split, count in rows.items())
    sys.stdout.write(f"{official.output}: {counts}. Use it with {data.FOLDER}={given.output.resolve()}\n")
    for remark in official.remarks:
        sys.stdout.write(f"note: {remark}\n")


if __name__ == "__main__":
    main()
