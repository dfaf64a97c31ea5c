"""``lmms-mtv prepare``: conversion of official archives to the data of a task."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "prepare",
        help="convert official archives to the data of a task",
        description="Convert the official files of a data set to the data that its task loads. The same command "
        "continues an interrupted conversion. Afterwards set LMMS_MTV_DATA to the output folder: the tasks then load "
        "their data from this folder instead of the hub.",
    )
    parser.add_argument(
        "task",
        metavar="TASK",
        help="vizwiz, okvqa, flowers, cub, dtd, english_spanish, antonyms, or words (all tasks with word pairs)",
    )
    parser.add_argument(
        "--source", required=True, type=Path, help="folder with the official files, as archives or unpacked"
    )
    parser.add_argument(
        "--output", required=True, type=Path, help="folder of prepared data, with a subfolder for each task"
    )
    parser.add_argument(
        "--partial",
        action="store_true",
        help="accept a part of the official data: skip the checks of counts and checksums",
    )
    parser.add_argument("--regenerate", action="store_true", help="draw new episodes from the official splits")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of drawn episodes and of the split of word pairs (default: 0)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from lmms_mtv import data

    for source in data.sources(arguments.task):
        task = source.task
        official = data.Official(
            task, arguments.source, arguments.output / task, arguments.partial, arguments.seed, arguments.regenerate
        )
        rows = data.prepare(source, official)
        counts = ", ".join(f"{count:,} {split}" for split, count in rows.items())
        sys.stdout.write(f"{official.output}: {counts}. Use it with {data.FOLDER}={arguments.output.resolve()}\n")
        for remark in official.remarks:
            sys.stdout.write(f"note: {remark}\n")
