"""Prepared folders: the rows of each split as JSON lines, the images, and a manifest that is written last."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lmms_mtv.data.official import Official, checksum, parsed
from lmms_mtv.data.source import FOLDER, Row, Source, mended_by
from lmms_mtv.errors import ArgumentError, DataError, MtvError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORM_ERRORS = (KeyError, TypeError, IndexError, AttributeError, ValueError)
"""Exceptions that show that the form of a file has changed since its publication."""

_SCHEMA = 1


def prepare(source: Source, official: Official) -> dict[str, int]:
    """Convert official files to the data of a task in ``official.output``, and return the number of rows by split.

    The same call continues an interrupted conversion.

    Args:
        source: the data source of the task.
        official: the official files, and the folder for the data.

    Raises:
        ArgumentError: ``regenerate`` is set for a task without drawn episodes.
        DataError: a file is missing or has unexpected content, or a number of rows is not the official number.
    """
    if official.regenerate and not source.regenerates:
        raise ArgumentError(
            f"--regenerate draws episodes, and task {source.task} has no drawn episodes: leave the argument out"
        )
    output = official.output
    try:
        splits = source.prepare(official)
    except MtvError:
        raise
    except FORM_ERRORS as error:
        raise DataError(
            f"the official files of {source.task} in {official.source} are not in the form they were published in "
            f"({error!r}): download them again"
        ) from error
    compared = not (official.partial or official.regenerate)
    if compared:
        for split, rows in splits.items():
            check_count(source, split, len(rows), "the official files")
    output.mkdir(parents=True, exist_ok=True)
    official.extract()
    recorded = {}
    for split, rows in splits.items():
        path = output / f"{split}.jsonl"
        _write(path, "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows))
        recorded[split] = {"rows": len(rows), "sha256": checksum(path, "sha256")}
    if official.partial:
        official.remarks.append("a part of the official data: no score on it compares with a reported one")
    manifest = {
        "schema": _SCHEMA,
        "task": source.task,
        "compared": compared,
        "remarks": official.remarks,
        "splits": recorded,
        "made_of": {Path(path).name: digest for path, digest in official.used.items()},
        "made_by": f"lmms-mtv {version('lmms-mtv')}",
    }
    _write(output / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return {split: len(rows) for split, rows in splits.items()}


def rows(source: Source, root: Path, split: str) -> list[Row]:
    """Return the rows of a split in a prepared folder.

    Args:
        source: the data source of the task.
        root: the folder with the prepared folders of all tasks.
        split: the name of the split.

    Raises:
        DataError: the folder is missing or incomplete, or a file was altered.
    """
    folder = root / source.task
    manifest = _manifest(source, folder)
    path = folder / f"{split}.jsonl"
    expected = manifest["splits"].get(split)
    if expected is None or not path.is_file():
        raise DataError(f"{path} is missing: {mended_by(source.task)}")
    if checksum(path, "sha256") != expected["sha256"]:
        raise DataError(f"{path} is not what `lmms-mtv prepare` wrote (its checksum differs): {mended_by(source.task)}")
    # Unlike splitlines, split breaks only at line feeds; JSON texts may have other line separators.
    split_rows: list[Row] = [parsed(line, path) for line in path.read_bytes().split(b"\n") if line]
    if manifest["compared"]:
        check_count(source, split, len(split_rows), str(path))
    for remark in manifest["remarks"]:
        logger.warning("%s: %s", folder, remark)
    return split_rows


def _manifest(source: Source, folder: Path) -> Mapping[str, Any]:
    """Return the manifest of a prepared folder.

    Raises:
        DataError: the manifest is missing, or has another schema or another task.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(
            f"{FOLDER}={folder.parent} has no data of task {source.task} ({path} is missing): {mended_by(source.task)}"
        )
    manifest: Mapping[str, Any] = parsed(path.read_bytes(), path)
    if manifest.get("schema") != _SCHEMA or manifest.get("task") != source.task:
        raise DataError(
            f"{path} is of schema {manifest.get('schema')} and task {manifest.get('task')}, expected {_SCHEMA} and "
            f"{source.task}: {mended_by(source.task)}"
        )
    return manifest


def check_count(source: Source, split: str, count: int, where: str) -> None:
    """Check that ``count`` is the official number of rows of a split.

    Args:
        source: the data source of the task.
        split: the name of the split.
        count: the number of rows.
        where: the place of the rows, for error messages.

    Raises:
        DataError: the number differs.
    """
    if count != source.rows[split]:
        raise DataError(
            f"split {split} of task {source.task} has {count:,} rows in {where}, expected {source.rows[split]:,}: "
            f"{mended_by(source.task)} (with --partial to work on a part of the data)"
        )


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
