"""``lmms-mtv prepare``: official archives into what a task loads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "prepare",
        help="turn official archives into what a task loads",
        description="Turn the official files of a data set into what its task loads. Interrupted, it goes on where it "
        "stopped. Set LMMS_MTV_DATA to the output folder afterwards; the tasks then use it instead of the hub.",
    )
    parser.add_argument(
        "task",
        metavar="TASK",
        help="vizwiz, okvqa, flowers, cub, dtd, english_spanish, antonyms, or words (all pairs of words)",
    )
    parser.add_argument("--source", required=True, type=Path, help="folder with the official files, packed or not")
    parser.add_argument("--output", required=True, type=Path, help="folder of prepared data, one subfolder a task")
    parser.add_argument("--partial", action="store_true", help="a part of the data: compare no counts or checksums")
    parser.add_argument("--regenerate", action="store_true", help="draw episodes from the official splits")
    parser.add_argument("--seed", type=int, default=0, help="of drawn episodes and of the split of word pairs")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    from lmms_mtv import data

    for source in data.sources(given.task):
        task = source.task
        official = data.Official(task, given.source, given.output / task, given.partial, given.seed, given.regenerate)
        rows = data.prepare(source, official)
        counts = ", ".join(f"{count:,} {split}" for split, count in rows.items())
        sys.stdout.write(f"{official.output}: {counts}. Use it with {data.FOLDER}={given.output.resolve()}\n")
        for remark in official.remarks:
            sys.stdout.write(f"note: {remark}\n")
