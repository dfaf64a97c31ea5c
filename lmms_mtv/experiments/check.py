"""Checks of stored results: unaltered files, tables that match the cells, and equal results of new runs."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Final

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
"""Number of changed samples of a cell that are listed one by one."""


@dataclass(frozen=True)
class CellDifference:
    """A difference between stored results and checked results.

    Attributes:
        where: the cell, document, file or page.
        what: the quantity that differs.
        stored: the stored value, as text.
        found: the value that the check found, as text.
    """

    where: str
    what: str
    stored: str
    found: str


def stored(folder: Path) -> list[CellDifference]:
    """Check the files of a results folder without running anything: the plan, the cells and the vectors.

    Raises:
        ArgumentError: the folder has no plan.
    """
    stored_plan, library = plan.read(folder), Library(folder / VECTORS)
    vectors = _vector_paths(library)
    differences: list[CellDifference] = []
    intact: list[Cell] = []
    for key in stored_plan.cell_keys():
        where, arguments = str(key), stored_plan.arms[key.arm]
        try:
            cell = cells.read(folder, key)
        except DataError as error:
            differences.append(CellDifference(where, "cell", "as it was measured", str(error)))
            continue
        if cell is None:
            differences.append(CellDifference(where, "cell", "a cell of the plan", "no file"))
            continue
        intact.append(cell)
        if dict(cell.arguments) != dict(arguments):
            differences.append(CellDifference(where, "arguments", str(arguments), str(dict(cell.arguments))))
        if library.root.is_dir() and cell.vector is not None:
            differences += _vector_file_differences(cell, vectors)
    for line in cells.contradictions(intact):
        one_table = "one model, and the same documents and prompts"
        differences.append(CellDifference(str(folder), "one table", one_table, line))
    planned_files = {cells.path(folder, key) for key in stored_plan.cell_keys()}
    for path in sorted(set(folder.glob(f"{cells.FOLDER}/*/*.json")) - planned_files):
        differences.append(CellDifference(str(path.relative_to(folder)), "cell", "no cell of the plan", "a file"))
    return differences


def tables(folder: Path, pages: Sequence[Path]) -> list[CellDifference]:
    """Return the first difference of each page between its tables and the tables of the cells.

    Args:
        folder: the results folder.
        pages: the files with tables of these results.

    Raises:
        DataError: the folder has no intact cells.
    """
    folder_results = [results.read(folder)]
    differences = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for stored_line, line in zip_longest(
            text.splitlines(), marks.inserted(text, page.parent, folder_results).splitlines(), fillvalue=""
        ):
            if stored_line != line:
                differences.append(CellDifference(str(page), "table", line, stored_line))
                break
    return differences


def pages(folder: Path) -> list[Path]:
    """Return the README.md files with tables of these results, in the folder and in the two folders above."""
    folder_results = [results.read(folder)]
    candidates = [path / "README.md" for path in (folder, *folder.resolve().parents[:2])]
    return [
        page
        for page in candidates
        if page.is_file() and marks.count(page.read_text("utf-8"), page.parent, folder_results)
    ]


def _vector_file_differences(cell: Cell, vectors: Mapping[str, Path]) -> list[CellDifference]:
    """Return the difference between the vector that a cell names and the vector in the library, if there is one."""
    vector = cell.vector or {}
    try:
        loaded = _load_vector(cell, vectors)
    except MtvError as error:
        return [CellDifference(str(cell.key), f"vector {vector['id']}", "as it was fitted", str(error))]
    if loaded.checksum != vector["checksum"]:
        return [CellDifference(str(cell.key), f"vector {vector['id']}", vector["checksum"][:16], loaded.checksum[:16])]
    return []


def _vector_paths(library: Library) -> dict[str, Path]:
    """Return the paths of the vectors in a library, by id."""
    return {entry.id: entry.path for entry in library.entries()}


def _load_vector(cell: Cell, vectors: Mapping[str, Path]) -> TaskVector:
    """Return the vector of a cell.

    Raises:
        DataError: no readable vector has the id; or an error of :meth:`TaskVector.load`.
    """
    vector_id = (cell.vector or {}).get("id", "")
    if vector_id not in vectors:
        raise DataError(f"the library has no readable vector {vector_id}: run lmms-mtv library verify")
    return TaskVector.load(vectors[vector_id])


def sampled_keys(stored_plan: Plan, count: int | None, seed: int) -> list[CellKey]:
    """Return the cells to run again, in the order of the plan: all, or ``count`` cells drawn with ``seed``."""
    cell_keys = stored_plan.cell_keys()
    if count is None or count >= len(cell_keys):
        return cell_keys
    sample = set(random.Random(seed).sample(cell_keys, count))
    return [key for key in cell_keys if key in sample]


def rerun(
    folder: Path, cell_keys: Sequence[CellKey], scratch: Path, load: Callable[[Plan, Path], CellRunner]
) -> list[CellDifference]:
    """Run cells again, fit their vectors again, and return the differences to the stored cells.

    A warning names each cell that differs, as soon as it was run.

    Args:
        folder: the results folder.
        cell_keys: the cells to run.
        scratch: an empty folder for the vectors of the new run.
        load: function of the plan and of the folder of vectors that loads the model, without reuse of vectors.

    Raises:
        ArgumentError: the plan has no cell with one of the keys.
    """
    stored_plan = plan.read(folder)
    if unknown := [key for key in cell_keys if key not in stored_plan.cell_keys()]:
        raise ArgumentError(f"the results in {folder} have no cell {unknown[0]}")
    library = Library(folder / VECTORS)
    vectors = _vector_paths(library)
    if library.root.is_dir():
        # An arm may name the vector of another arm. The vectors that an arm fits are fitted again.
        shutil.copytree(library.root, scratch, dirs_exist_ok=True)
    refitted = Library(scratch)
    runner = load(stored_plan, scratch)
    differences: list[CellDifference] = []
    bar = tqdm(
        cell_keys, desc=f"Checking {stored_plan.name}", unit="cell", dynamic_ncols=True, disable=not runner.leads
    )
    for key in bar:
        result = runner.run(key)
        before = cells.read(folder, key)
        if result is not None and before is not None:
            now = result[0]
            found = _cell_differences(before, now, stored_plan)
            if before.vector is not None and library.root.is_dir():
                tolerance = stored_plan.tolerance.get("values", 0.0)
                found += _vector_differences(before, now, vectors, refitted, tolerance)
            if found:
                # A check of all cells can take an hour, and the table comes at its end.
                logger.warning("%s differs: %s", key, ", ".join(dict.fromkeys(difference.what for difference in found)))
            differences += found
    return differences


def _cell_differences(before: Cell, now: Cell, stored_plan: Plan) -> list[CellDifference]:
    """Return the differences between a stored cell and the same cell of a new run."""
    where = str(before.key)
    differences: list[CellDifference] = []

    def compare(what: str, old: object, new: object) -> None:
        if old != new:
            differences.append(CellDifference(where, what, str(old), str(new)))

    tolerance = stored_plan.tolerance.get("score", 0.0)
    if abs(before.score - now.score) > tolerance:
        stored_score = f"{before.score:.4f} ± {tolerance}"
        differences.append(CellDifference(where, before.metric, stored_score, f"{now.score:.4f}"))
    for name in ("metric", "n", "method", "shots"):
        compare(name, getattr(before, name), getattr(now, name))
    compare("model", dict(before.model), dict(now.model))
    compare("settings", _set_settings(before), _set_settings(now))
    compare("documents", list(before.samples["documents"]), list(now.samples["documents"]))
    if before.vector is not None or now.vector is not None:
        compare("vector", (before.vector or {}).get("id"), (now.vector or {}).get("id"))
    prompts = zip(before.samples["documents"], before.samples["prompts"], now.samples["prompts"], strict=False)
    for number, old, new in prompts:
        if old != new:
            differences.append(CellDifference(f"{where}, document {number}", "prompt", old, new))
    return differences + (_sample_differences(before, now) if differences else [])


def _sample_differences(before: Cell, now: Cell) -> list[CellDifference]:
    """Return the documents whose answers changed; the first :data:`SHOWN` documents one by one."""
    columns = [cell.samples[name] for cell in (before, now) for name in ("scores", "answers")]
    changed = [
        CellDifference(f"{before.key}, document {number}", "answer", f"{old!r} ({score:g})", f"{new!r} ({rescored:g})")
        for number, score, old, rescored, new in zip(before.samples["documents"], *columns, strict=False)
        if (score, old) != (rescored, new)
    ]
    more = len(changed) - SHOWN
    rest = [CellDifference(str(before.key), "answers", "", f"{more} more documents differ")] if more > 0 else []
    return changed[:SHOWN] + rest


def _vector_differences(
    before: Cell, now: Cell, vectors: Mapping[str, Path], refitted: Library, tolerance: float
) -> list[CellDifference]:
    """Return the differences between the stored vector of a cell and the vector that was fitted again.

    ``tolerance`` is the largest accepted difference of a value, relative to the largest value of the stored vector.
    """
    where = str(before.key)
    try:
        old, new = _load_vector(before, vectors), _load_vector(now, _vector_paths(refitted))
    except MtvError as error:
        return [CellDifference(where, "vector", "a vector that loads", str(error))]
    if old.edits.keys() != new.edits.keys():
        return [CellDifference(where, f"streams of vector {old.id}", ", ".join(old.edits), ", ".join(new.edits))]
    differences = []
    # The selected heads depend on the last bits of the losses, and the last bits depend on the build of torch.
    torch_before, torch_now = before.versions.get("torch"), now.versions.get("torch")
    if old.heads != new.heads and torch_before != torch_now:
        logger.warning(
            "%s: other heads, not counted: measured with torch %s, this is %s", before.key, torch_before, torch_now
        )
    elif old.heads != new.heads:
        common = len(set(old.heads) & set(new.heads))
        heads = f"{len(new.heads)} heads, {common} in common"
        differences.append(CellDifference(where, f"heads of vector {old.id}", f"{len(old.heads)} heads", heads))
    for stream, edit in old.edits.items():
        gap = (edit.value - new.edits[stream].value).abs().max().item()
        scale = edit.value.abs().max().item()
        if gap > tolerance * scale:
            what = f"values of vector {old.id}" + ("" if stream == HEADS else f" in {stream}")
            off = f"{gap / scale:.3g} off" if scale else "not all 0"
            differences.append(CellDifference(where, what, f"within {tolerance:g} of the largest", off))
    return differences


def _set_settings(cell: Cell) -> object:
    """Return the settings of a cell without the settings that are None.

    A later version of a method may have a new setting, whose None means the behaviour of the earlier version.
    """
    return plan.plain({name: value for name, value in cell.settings.items() if value is not None})


def table(differences: Sequence[CellDifference]) -> str:
    """Return the differences as a Markdown table."""
    lines = ["| where | what | stored | found |", "|---|---|---|---|"]
    lines += [f"| {d.where} | {d.what} | {_cut(d.stored)} | {_cut(d.found)} |" for d in differences]
    return "\n".join(lines)


def _cut(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= 200 else f"{text[:197]}..."
