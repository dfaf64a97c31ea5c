"""``lmms-mtv library``: what is in the vector library, and what is done with it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmms_mtv.vectors.library import Entry, Library

REFERENCE = "a path, four or more digits of an id, task/method, or hub:owner/name"


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "library",
        help="list, check, share and combine vectors",
        description="The vector library: the folder in LMMS_MTV_LIBRARY, or lmms-mtv/library in the user's cache.",
    )
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def verb(name: str, run: Any, about: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = verbs.add_parser(
            name, help=about, description=about[0].upper() + about[1:] + "."
        )
        made.add_argument("--library", metavar="ROOT", type=Path, help="folder of the library")
        made.set_defaults(run=run)
        return made

    chosen = verb("ls", list_, "list the vectors")
    for name in ("model", "task", "method"):
        chosen.add_argument(f"--{name}", help=f"only vectors of this {name}")
    _json(chosen)
    chosen = verb("show", show, "print what is known of a vector")
    _reference(chosen)
    _json(chosen)
    chosen = verb("rm", remove, "remove a vector")
    _reference(chosen)
    chosen.add_argument("--yes", action="store_true", help="do not ask")
    chosen = verb("verify", verify, "read every file and compare it with its checksum, its card and its place")
    _json(chosen)
    chosen = verb("push", push, "upload a vector to the Hugging Face hub")
    _reference(chosen)
    chosen.add_argument("repository", metavar="OWNER/NAME", help="repository, made if there is none")
    chosen.add_argument("--private", action="store_true", help="make a private repository")
    chosen = verb("pull", pull, "download a vector from the Hugging Face hub")
    chosen.add_argument("repository", metavar="OWNER/NAME[@REVISION]", help="repository that a vector was pushed to")
    chosen = verb("combine", combine, "make a vector of several of one model: their mean, or their weighted sum")
    chosen.add_argument("references", metavar="REF", nargs="+", help=REFERENCE)
    chosen.add_argument("--weights", metavar="W", nargs="+", type=float, help="one for each; together 1")
    chosen.add_argument("--any-sum", action="store_true", help="the weights need not sum to 1")
    chosen.add_argument("--task", metavar="NAME", required=True, help="task that the new vector is listed under")
    _narrowing(chosen)


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs")


def _reference(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", metavar="REF", help=REFERENCE)
    _narrowing(parser)


def _narrowing(parser: argparse.ArgumentParser) -> None:
    """What tells several vectors apart that a reference names."""
    parser.add_argument("--model", help="if REF names several: the one of this model")
    parser.add_argument("--seed", type=int, help="if REF names several: the one of this seed")
    parser.add_argument("--shots", type=int, help="if REF names several: the one for prompts of so many shots")


# Commands


def list_(given: argparse.Namespace) -> None:
    wanted = {name: getattr(given, name) for name in ("model", "task", "method") if getattr(given, name) is not None}
    library = _library(given)
    found = [
        entry
        for entry in library.entries()
        if all(getattr(entry.card, name) == value for name, value in wanted.items())
    ]
    if given.json:
        _write(_json_of([_described(entry) for entry in found]))
        return
    if not found:
        _write(f"no such vector in {library.root}" if wanted else f"no vector in {library.root}")
        return
    heading = ("id", "task", "method", "shots", "seed", "loss", "size", "model")
    rows = [
        (card.id, card.task, card.method, str(card.shots), str(card.seed), _loss(entry), _size(entry.bytes), card.model)
        for entry in found
        for card in (entry.card,)
    ]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    _write(table([heading, *rows], width))


def show(given: argparse.Namespace) -> None:
    from lmms_mtv.vectors import TaskVector
    from lmms_mtv.vectors.library import page

    entry = _resolved(given, given.reference)
    vector = TaskVector.load(entry.path)
    if given.json:
        _write(_json_of(_described(entry) | {"heads": [list(head) for head in vector.heads]}))
        return
    rows = [("file", str(entry.path)), ("size", _size(entry.bytes)), *page.facts(vector)]
    rows += [(f"setting {name}", json.dumps(value)) for name, value in sorted(entry.card.config.items())]
    width = max(len(name) for name, _ in rows)
    _write("\n".join(f"{_plain(name):<{width}}  {_plain(value)}" for name, value in rows))


def remove(given: argparse.Namespace) -> None:
    from lmms_mtv.errors import ArgumentError

    library = _library(given)
    entry = _resolved(given, given.reference)
    named = f"{entry.id} ({_plain(f'{entry.card.method} for {entry.card.task} of {entry.card.model}')}) in {entry.path}"
    if not given.yes:
        sys.stdout.write(f"remove {named}? [y/N] ")
        sys.stdout.flush()
        answer = sys.stdin.readline()
        if not answer:
            raise ArgumentError("nobody answers, nothing is removed: pass --yes")
        if answer.strip().lower() not in ("y", "yes"):
            _write("nothing is removed")
            return
    library.remove(entry)
    _write(f"removed {named}")


def verify(given: argparse.Namespace) -> None:
    library = _library(given)
    problems = library.verify()
    if given.json:
        _write(_json_of([{"path": str(problem.path), "problem": problem.what} for problem in problems]))
    else:
        for problem in problems:
            named = "" if problem.what.startswith(str(problem.path)) else f"{problem.path} "
            _write(_plain(f"{named}{problem.what}"))
        count = len(library.entries())
        _write(f"{library.root}: {count} vectors, {len(problems)} problems")
    if problems:
        raise SystemExit(1)


def push(given: argparse.Namespace) -> None:
    from lmms_mtv.vectors.library import hub

    entry = _resolved(given, given.reference)
    address = hub.pushed(entry.path, given.repository, private=given.private)
    _write(f"pushed {entry.id} to {address}. Use it with vector={hub.PREFIX}{given.repository}")


def pull(given: argparse.Namespace) -> None:
    entry = _library(given).pull(given.repository)
    _write(f"pulled {entry.id} into {entry.path}")


def combine(given: argparse.Namespace) -> None:
    from lmms_mtv.vectors import TaskVector
    from lmms_mtv.vectors.combine import combined

    vectors = [TaskVector.load(_resolved(given, reference).path) for reference in given.references]
    made = combined(vectors, given.weights, task=given.task, any_sum=given.any_sum)
    path = _library(given).add(made)
    _write(f"combined {', '.join(vector.id for vector in vectors)} into {made.id}: {path}")


# What they share


def _library(given: argparse.Namespace) -> Library:
    from lmms_mtv.vectors.library import Library

    return Library(given.library)


def _resolved(given: argparse.Namespace, reference: str) -> Entry:
    return _library(given).resolve(reference, model=given.model, seed=given.seed, shots=given.shots)


def _described(entry: Entry) -> dict[str, Any]:
    return {"id": entry.id, "path": str(entry.path), "bytes": entry.bytes, "card": dataclasses.asdict(entry.card)}


def _json_of(content: Any) -> str:
    return json.dumps(content, indent=2)


def _loss(entry: Entry) -> str:
    """On training queries, without the edit and with it."""
    losses = entry.card.losses
    if not (losses.get("unedited") and losses.get("chosen")):
        return "-"
    return f"{losses['unedited'][0]:.3f} -> {losses['chosen'][0]:.3f}"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def table(rows: Sequence[Sequence[str]], width: int | None) -> str:
    """Aligned columns, the first row as heading. Given a ``width``, the widest but the first are cut to fit."""
    cells = [[_plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    while width is not None and sum(widths) + 2 * (len(widths) - 1) > width and max(widths[1:]) > 4:
        widths[widths.index(max(widths[1:]), 1)] -= 1
    lines = [
        "  ".join(_cut(cell, size).ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join(lines)


def _cut(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size - 1] + "\u2026"


def _plain(text: str) -> str:
    """Return a text of a card as a terminal may have it: without what would move its cursor or change its colours."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
