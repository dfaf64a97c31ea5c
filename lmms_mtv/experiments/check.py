"""Whether stored results still hold: the files are as they were measured, and what runs again gives the same."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from lmms_mtv.errors import ArgumentError, DataError, MtvError
from lmms_mtv.experiments import cell as cells
from lmms_mtv.experiments import plan
from lmms_mtv.experiments.cell import Cell
from lmms_mtv.experiments.compare import VECTORS, CellRunner
from lmms_mtv.experiments.plan import CellKey, Plan
from lmms_mtv.experiments.report import marks, results
from lmms_mtv.vectors import HEADS, TaskVector
from lmms_mtv.vectors.library import Library

logger = logging.getLogger(__name__)

SHOWN: Final = 5
"""Samples of a cell that are shown one by one."""


@dataclass(frozen=True)
class CellDifference:
    """What does not hold: where, what was stored, what was found."""

    where: str
    what: str
    stored: str
    found: str


def stored(folder: Path) -> list[CellDifference]:
    """Differences between the files of a folder of results: plan, cells, vectors. Nothing is run.

    Raises :class:`ArgumentError` if there is no plan.
    """
    asked, library = plan.read(folder), Library(folder / VECTORS)
    vectors = _paths(library)
    found: list[CellDifference] = []
    intact: list[Cell] = []
    for key in asked.cell_keys():
        try:
            cell = cells.read(folder, key)
        except DataError as error:
            found.append(CellDifference(str(key), "cell", "as it was measured", str(error)))
            continue
        if cell is None:
            found.append(CellDifference(str(key), "cell", "a cell of the plan", "no file"))
            continue
        intact.append(cell)
        if dict(cell.arguments) != dict(asked.arms[key.arm]):
            found.append(CellDifference(str(key), "arguments", str(asked.arms[key.arm]), str(dict(cell.arguments))))
        if library.root.is_dir() and cell.vector is not None:
            found += _of_vector(cell, vectors)
    for line in cells.contradictions(intact):
        found.append(CellDifference(str(folder), "one table", "one model, and the same documents and prompts", line))
    known = {cells.path(folder, key) for key in asked.cell_keys()}
    for path in sorted(set(folder.glob(f"{cells.FOLDER}/*/*.json")) - known):
        found.append(CellDifference(str(path.relative_to(folder)), "cell", "no cell of the plan", "a file"))
    return found


def tables(folder: Path, pages: Sequence[Path]) -> list[CellDifference]:
    """Return tables in ``pages`` that are not what the cells say.

    Raises :class:`DataError` if there are no intact cells.
    """
    found = [results.read(folder)]
    differences = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for stored_line, line in zip_longest(
            text.splitlines(), marks.inserted(text, page.parent, found).splitlines(), fillvalue=""
        ):
            if stored_line != line:
                differences.append(CellDifference(str(page), "table", line, stored_line))
                break
    return differences


def pages(folder: Path) -> list[Path]:
    """Return the pages in the folder and in the two above it that have tables of these results."""
    found = [results.read(folder)]
    near = [key / "README.md" for key in (folder, *folder.resolve().parents[:2])]
    return [page for page in near if page.is_file() and marks.count(page.read_text("utf-8"), page.parent, found)]


def _of_vector(cell: Cell, vectors: Mapping[str, Path]) -> list[CellDifference]:
    vector = cell.vector or {}
    try:
        loaded = _loaded(cell, vectors)
    except MtvError as error:
        return [CellDifference(str(cell.key), f"vector {vector['id']}", "as it was fitted", str(error))]
    if loaded.checksum != vector["checksum"]:
        return [CellDifference(str(cell.key), f"vector {vector['id']}", vector["checksum"][:16], loaded.checksum[:16])]
    return []


def _paths(library: Library) -> dict[str, Path]:
    """Return the files of a library by the ids of their vectors."""
    return {entry.id: entry.path for entry in library.entries()}


def _loaded(cell: Cell, vectors: Mapping[str, Path]) -> TaskVector:
    """Return the stored vector of a cell.

    Raises :class:`DataError` if there is none, else as :meth:`TaskVector.load`.
    """
    identity = (cell.vector or {}).get("id", "")
    if identity not in vectors:
        raise DataError(f"no vector {identity} that can be read: run lmms-mtv library verify")
    return TaskVector.load(vectors[identity])


def chosen(asked: Plan, count: int | None, seed: int) -> list[CellKey]:
    """Return the cells to run again: all, or ``count`` drawn by ``seed``, in the order in which they run."""
    cell_keys = asked.cell_keys()
    if count is None or count >= len(cell_keys):
        return cell_keys
    drawn = set(random.Random(seed).sample(cell_keys, count))
    return [key for key in cell_keys if key in drawn]


def rerun(
    folder: Path, cell_keys: Sequence[CellKey], scratch: Path, load: Callable[[Plan, Path], CellRunner]
) -> list[CellDifference]:
    """Differences between stored cells and the same cells run again, their vectors fitted again.

    ``load(plan, library)`` gives a bench that fits anew. ``scratch`` is for its vectors.
    """
    asked = plan.read(folder)
    if unknown := [key for key in cell_keys if key not in asked.cell_keys()]:
        raise ArgumentError(f"the results in {folder} have no cell {unknown[0]}")
    library = Library(folder / VECTORS)
    vectors = _paths(library)
    if library.root.is_dir():
        # Arms may name vectors of other arms; what they fit themselves is fitted again.
        shutil.copytree(library.root, scratch, dirs_exist_ok=True)
    again = Library(scratch)
    bench = load(asked, scratch)
    found: list[CellDifference] = []
    for key in tqdm(cell_keys, desc=f"Checking {asked.name}", unit="cell", dynamic_ncols=True, disable=not bench.leads):
        made = bench.run(key)
        kept = cells.read(folder, key)
        if made is not None and kept is not None:
            found += _between(kept, made[0], asked)
            if kept.vector is not None and library.root.is_dir():
                found += _values(kept, made[0], vectors, again, asked.tolerance.get("values", 0.0))
    return found


def _between(kept: Cell, made: Cell, asked: Plan) -> list[CellDifference]:
    """Differences between a stored cell and the same cell run again."""
    where, found = str(kept.key), []

    def differs(what: str, before: object, now: object) -> None:
        if before != now:
            found.append(CellDifference(where, what, str(before), str(now)))

    tolerance = asked.tolerance.get("score", 0.0)
    if abs(kept.score - made.score) > tolerance:
        found.append(CellDifference(where, kept.metric, f"{kept.score:.4f} ± {tolerance}", f"{made.score:.4f}"))
    for name in ("metric", "n", "method", "shots"):
        differs(name, getattr(kept, name), getattr(made, name))
    differs("model", dict(kept.model), dict(made.model))
    differs("settings", *(_given(cell.settings) for cell in (kept, made)))
    differs("documents", *(list(cell.samples["documents"]) for cell in (kept, made)))
    if kept.vector is not None or made.vector is not None:
        differs("vector", (kept.vector or {}).get("id"), (made.vector or {}).get("id"))
    for number, before, now in zip(
        kept.samples["documents"], kept.samples["prompts"], made.samples["prompts"], strict=False
    ):
        if before != now:
            found.append(CellDifference(f"{where}, document {number}", "prompt", before, now))
    return found + (_samples(kept, made) if found else [])


def _samples(kept: Cell, made: Cell) -> list[CellDifference]:
    """Return the documents whose answers changed, at most :data:`SHOWN` of them one by one."""
    before, now = ([cell.samples[name] for name in ("scores", "answers")] for cell in (kept, made))
    rows = zip(kept.samples["documents"], *before, *now, strict=False)
    changed = [
        CellDifference(f"{kept.key}, document {number}", "answer", f"{old!r} ({score:g})", f"{new!r} ({rescored:g})")
        for number, score, old, rescored, new in rows
        if (score, old) != (rescored, new)
    ]
    more = len(changed) - SHOWN
    rest = [CellDifference(str(kept.key), "answers", "", f"{more} more documents differ")] if more > 0 else []
    return changed[:SHOWN] + rest


def _values(
    kept: Cell, made: Cell, vectors: Mapping[str, Path], again: Library, tolerance: float
) -> list[CellDifference]:
    """Return whether the vector that was fitted again has the values and heads of the stored one."""
    try:
        before, now = _loaded(kept, vectors), _loaded(made, _paths(again))
    except MtvError as error:
        return [CellDifference(str(kept.key), "vector", "a vector that loads", str(error))]
    if before.edits.keys() != now.edits.keys():
        what = f"streams of vector {before.id}"
        return [CellDifference(str(kept.key), what, ", ".join(before.edits), ", ".join(now.edits))]
    found = []
    # Which heads a selection ends at follows the last bits of its losses, and these follow the build of torch.
    same_torch = kept.versions.get("torch") == made.versions.get("torch")
    if before.heads != now.heads and not same_torch:
        logger.warning(
            "%s: other heads, not counted: measured with torch %s, this is %s",
            *(kept.key, kept.versions.get("torch"), made.versions.get("torch")),
        )
    elif before.heads != now.heads:
        both = len(set(before.heads) & set(now.heads))
        stored_heads, found_heads = f"{len(before.heads)} heads", f"{len(now.heads)} heads, {both} in common"
        found.append(CellDifference(str(kept.key), f"heads of vector {before.id}", stored_heads, found_heads))
    for stream, edit in before.edits.items():
        gap = (edit.value - now.edits[stream].value).abs().max().item()
        scale = edit.value.abs().max().item()
        if gap > tolerance * scale:
            what = f"values of vector {before.id}" + ("" if stream == HEADS else f" in {stream}")
            off = f"{gap / scale:.3g} off" if scale else "not all 0"
            found.append(CellDifference(str(kept.key), what, f"within {tolerance:g} of the largest", off))
    return found


def _given(settings: Mapping[str, Any]) -> object:
    """Return the settings but for those that are None, as a method may get another one later."""
    return plan.plain({name: value for name, value in settings.items() if value is not None})


def table(differences: Sequence[CellDifference]) -> str:
    """Return the differences as a Markdown table."""
    lines = ["| where | what | stored | found |", "|---|---|---|---|"]
    lines += [f"| {d.where} | {d.what} | {_cut(d.stored)} | {_cut(d.found)} |" for d in differences]
    return "\n".join(lines)


def _cut(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= 200 else f"{text[:197]}..."
