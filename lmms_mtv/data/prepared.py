"""A prepared folder: rows of each split as JSON lines, images, and a manifest that is written last."""

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
"""What reading a file raises that is not in the form it was published in."""

_SCHEMA = 1


def prepare(source: Source, official: Official) -> dict[str, int]:
    """Turn official files into what the task loads, in ``official.output``; returns the number of rows of each split.

    A run that was interrupted goes on where it stopped. Raises :class:`DataError` if a file is missing or another
    than expected, or if a count differs from the official one.
    """
    if official.regenerate and not source.regenerates:
        raise ArgumentError(f"--regenerate draws episodes, and task {source.task} has none: leave it out")
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
        "made_of": {Path(path).name: found for path, found in official.used.items()},
        "made_by": f"lmms-mtv {version('lmms-mtv')}",
    }
    _write(output / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return {split: len(rows) for split, rows in splits.items()}


def rows(source: Source, root: Path, split: str) -> list[Row]:
    """Return the rows of a split in a prepared folder.

    Raises :class:`DataError` if the folder is not there, not whole, or not what was written.
    """
    folder = root / source.task
    manifest = _manifest(source, folder)
    path = folder / f"{split}.jsonl"
    expected = manifest["splits"].get(split)
    if expected is None or not path.is_file():
        raise DataError(f"{path} is missing: {mended_by(source.task)}")
    if checksum(path, "sha256") != expected["sha256"]:
        raise DataError(f"{path} is not what `lmms-mtv prepare` wrote (its checksum differs): {mended_by(source.task)}")
    # Not splitlines, which also breaks at characters that JSON leaves inside a text.
    found: list[Row] = [parsed(line, path) for line in path.read_bytes().split(b"\n") if line]
    if manifest["compared"]:
        check_count(source, split, len(found), str(path))
    for remark in manifest["remarks"]:
        logger.warning("%s: %s", folder, remark)
    return found


def _manifest(source: Source, folder: Path) -> Mapping[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(
            f"{FOLDER}={folder.parent} has no data of task {source.task} ({path} is missing): {mended_by(source.task)}"
        )
    found: Mapping[str, Any] = parsed(path.read_bytes(), path)
    if found.get("schema") != _SCHEMA or found.get("task") != source.task:
        raise DataError(
            f"{path} is of schema {found.get('schema')} and task {found.get('task')}, expected {_SCHEMA} and "
            f"{source.task}: {mended_by(source.task)}"
        )
    return found


def check_count(source: Source, split: str, found: int, where: str) -> None:
    """Raise :class:`DataError` unless ``found`` is the official number of rows."""
    if found != source.rows[split]:
        raise DataError(
            f"split {split} of task {source.task} has {found:,} rows in {where}, expected {source.rows[split]:,}: "
            f"{mended_by(source.task)} (with --partial to work on a part of the data)"
        )


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
