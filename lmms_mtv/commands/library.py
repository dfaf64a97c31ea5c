"""``lmms-mtv library``: the commands on the vector library."""

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

REFERENCE = "a path, the first four or more digits of an id, task/method, or hub:owner/name"


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "library",
        help="list, check, share and combine task vectors",
        description="Commands on the vector library. The library is the folder in LMMS_MTV_LIBRARY, or "
        "lmms-mtv/library in the cache folder of the user.",
    )
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def verb(name: str, run: Any, about: str) -> argparse.ArgumentParser:
        verb_parser: argparse.ArgumentParser = verbs.add_parser(
            name, help=about, description=about[0].upper() + about[1:] + "."
        )
        verb_parser.add_argument("--library", metavar="ROOT", type=Path, help="folder of the library")
        verb_parser.set_defaults(run=run)
        return verb_parser

    command = verb("ls", list_, "list the vectors")
    for name in ("model", "task", "method"):
        command.add_argument(f"--{name}", help=f"only vectors of this {name}")
    _json(command)
    command = verb("show", show, "print the card and the facts of a vector")
    _reference(command)
    _json(command)
    command = verb("rm", remove, "remove a vector")
    _reference(command)
    command.add_argument("--yes", action="store_true", help="remove without a question")
    command = verb("gc", collect, "list the vectors that no result names, and remove them with --yes")
    command.add_argument("results", metavar="RESULTS", nargs="+", type=Path, help="folder of results")
    command.add_argument("--yes", action="store_true", help="remove the vectors, instead of listing them")
    command = verb("verify", verify, "read every file, and check its checksum, its card and its path")
    _json(command)
    command = verb("push", push, "upload a vector to the Hugging Face hub")
    _reference(command)
    command.add_argument(
        "repository", metavar="OWNER/NAME", help="name of the repository, created if it does not exist"
    )
    command.add_argument("--private", action="store_true", help="create a private repository")
    command = verb("pull", pull, "download a vector from the Hugging Face hub")
    command.add_argument("repository", metavar="OWNER/NAME[@REVISION]", help="name of a repository with a vector")
    command = verb("combine", combine, "combine vectors of one model: their mean, or their weighted sum")
    command.add_argument("references", metavar="REF", nargs="+", help=REFERENCE)
    command.add_argument(
        "--weights",
        metavar="W",
        nargs="+",
        type=float,
        help="weight of each vector; the weights sum to 1 (default: the mean)",
    )
    command.add_argument("--any-sum", action="store_true", help="accept weights with another sum than 1")
    command.add_argument("--task", metavar="NAME", required=True, help="name of the task on the new card")
    _narrowing(command)


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _reference(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", metavar="REF", help=REFERENCE)
    _narrowing(parser)


def _narrowing(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that select one of several vectors with the same reference."""
    parser.add_argument("--model", help="if REF names several vectors: the vector of this model")
    parser.add_argument("--seed", type=int, help="if REF names several vectors: the vector of this seed")
    parser.add_argument(
        "--shots", type=int, help="if REF names several vectors: the vector for prompts with this number of shots"
    )
    parser.add_argument("--latest", action="store_true", help="if REF names several vectors: the newest of them")


# Commands


def list_(arguments: argparse.Namespace) -> None:
    wanted = {
        name: getattr(arguments, name) for name in ("model", "task", "method") if getattr(arguments, name) is not None
    }
    library = _library(arguments)
    entries = [
        entry
        for entry in library.entries()
        if all(getattr(entry.card, name) == value for name, value in wanted.items())
    ]
    if arguments.json:
        _write(_json_of([_entry_fields(entry) for entry in entries]))
        return
    if not entries:
        _write(f"no such vector in {library.root}" if wanted else f"no vector in {library.root}")
        return
    _write(_listing(entries))


def show(arguments: argparse.Namespace) -> None:
    from lmms_mtv.vectors import TaskVector
    from lmms_mtv.vectors.library import page

    entry = _resolve(arguments, arguments.reference)
    vector = TaskVector.load(entry.path)
    if arguments.json:
        _write(_json_of(_entry_fields(entry) | {"heads": [list(head) for head in vector.heads]}))
        return
    rows = [("file", str(entry.path)), ("size", _size(entry.bytes)), *page.facts(vector)]
    rows += [(f"setting {name}", json.dumps(value)) for name, value in sorted(entry.card.config.items())]
    if entry.card.prompt_text:
        rows.append(("a prompt of the fit", json.dumps("".join(entry.card.prompt_text), ensure_ascii=False)))
    width = max(len(name) for name, _ in rows)
    _write("\n".join(f"{_plain(name):<{width}}  {_plain(value)}" for name, value in rows))


def remove(arguments: argparse.Namespace) -> None:
    from lmms_mtv.errors import ArgumentError

    library = _library(arguments)
    entry = _resolve(arguments, arguments.reference)
    named = f"{entry.id} ({_plain(f'{entry.card.method} for {entry.card.task} of {entry.card.model}')}) in {entry.path}"
    if not arguments.yes:
        sys.stdout.write(f"remove {named}? [y/N] ")
        sys.stdout.flush()
        answer = sys.stdin.readline()
        if not answer:
            raise ArgumentError("there is no answer, so nothing is removed: pass --yes")
        if answer.strip().lower() not in ("y", "yes"):
            _write("nothing is removed")
            return
    library.remove(entry)
    _write(f"removed {named}")


def collect(arguments: argparse.Namespace) -> None:
    from lmms_mtv.vectors.library.unused import unused

    library = _library(arguments)
    entries = library.entries()
    found = unused(entries, arguments.results)
    counted = f"{len(found)} of {len(entries)} vectors in {library.root} ({_size(sum(e.bytes for e in found))})"
    if not found:
        _write(f"every vector in {library.root} is named by a result")
    elif not arguments.yes:
        own = sum(not entry.card.split for entry in found)
        from_python = f", {own} of them fitted in Python or combined, which no result can name" if own else ""
        _write(
            f"{_listing(found)}\n{counted} are named by no result{from_python}. Nothing is removed: pass --yes to "
            "remove them"
        )
    else:
        for entry in found:
            library.remove(entry)
        _write(f"removed {counted}")


def verify(arguments: argparse.Namespace) -> None:
    library = _library(arguments)
    problems = library.verify()
    if arguments.json:
        _write(_json_of([{"path": str(problem.path), "problem": problem.what} for problem in problems]))
    else:
        for problem in problems:
            named = "" if problem.what.startswith(str(problem.path)) else f"{problem.path} "
            _write(_plain(f"{named}{problem.what}"))
        count = len(library.entries())
        _write(f"{library.root}: {count} vectors, {len(problems)} problems")
    if problems:
        raise SystemExit(1)


def push(arguments: argparse.Namespace) -> None:
    from lmms_mtv.vectors.library import hub, reference

    entry = _resolve(arguments, arguments.reference)
    address = hub.pushed(entry.path, arguments.repository, private=arguments.private)
    _write(f"pushed {entry.id} to {address}. Use it with vector={reference.PREFIX}{arguments.repository}")


def pull(arguments: argparse.Namespace) -> None:
    entry = _library(arguments).pull(arguments.repository)
    _write(f"pulled {entry.id} into {entry.path}")


def combine(arguments: argparse.Namespace) -> None:
    from lmms_mtv.vectors import TaskVector
    from lmms_mtv.vectors.combine import combined

    vectors = [TaskVector.load(_resolve(arguments, reference).path) for reference in arguments.references]
    vector = combined(vectors, arguments.weights, task=arguments.task, any_sum=arguments.any_sum)
    path = _library(arguments).add(vector)
    _write(f"combined {', '.join(part.id for part in vectors)} into {vector.id}: {path}")


# Helpers


def _library(arguments: argparse.Namespace) -> Library:
    from lmms_mtv.vectors.library import Library

    return Library(arguments.library)


def _resolve(arguments: argparse.Namespace, reference: str) -> Entry:
    return _library(arguments).resolve(
        reference, model=arguments.model, seed=arguments.seed, shots=arguments.shots, latest=arguments.latest
    )


def _entry_fields(entry: Entry) -> dict[str, Any]:
    return {"id": entry.id, "path": str(entry.path), "bytes": entry.bytes, "card": dataclasses.asdict(entry.card)}


def _json_of(content: Any) -> str:
    return json.dumps(content, indent=2)


def _listing(entries: Sequence[Entry]) -> str:
    """Return the table of entries. Columns of what is known of no entry are left out."""
    from lmms_mtv.vectors.library.differences import differences

    settings = differences(entries)
    columns = {
        "id": [entry.id for entry in entries],
        "task": [entry.card.task for entry in entries],
        "method": [entry.card.method for entry in entries],
        "shots": [str(entry.card.shots) for entry in entries],
        "seed": [str(entry.card.seed) for entry in entries],
        "settings": [settings[entry.path] or "-" for entry in entries],
        "date": [entry.date for entry in entries],
        "loss": [_loss(entry) for entry in entries],
        "accuracy": [_accuracy(entry) for entry in entries],
        "size": [_size(entry.bytes) for entry in entries],
        "model": [entry.card.model for entry in entries],
    }
    columns = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    return table([list(columns), *zip(*columns.values(), strict=True)], width)


def _accuracy(entry: Entry) -> str:
    """Return the share of right answers to training queries without the vector and with the vector."""
    accuracy = entry.card.accuracy
    return (
        f"{accuracy['unedited']:.2f} -> {accuracy['edited']:.2f}" if accuracy.keys() >= {"unedited", "edited"} else "-"
    )


def _loss(entry: Entry) -> str:
    """Return the loss on training queries without the edit and with the edit."""
    losses = entry.card.losses
    if not (losses.get("unedited") and losses.get("chosen")):
        return "-"
    return f"{losses['unedited'][0]:.3f} -> {losses['chosen'][0]:.3f}"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def table(rows: Sequence[Sequence[str]], width: int | None) -> str:
    """Return the rows as text with aligned columns.

    Args:
        rows: the rows; the first row is the heading.
        width: the largest width of a line, to which all columns but the first are cut; None cuts nothing.
    """
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
    """Return the text without characters that move the cursor of a terminal or change its colours."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
