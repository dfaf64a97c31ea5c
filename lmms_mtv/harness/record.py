"""What a run used, written beside the harness's results: method, vector, heads and settings of each task."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lmms_mtv.runtime import files
from lmms_mtv.vectors import TaskVector
from lmms_mtv.vectors.library.place import FILE, folder_name

PACKAGES = ("lmms-mtv", "lmms-eval", "lm-eval", "torch", "transformers")


def versions() -> dict[str, str]:
    """Return the versions that a number depends on."""
    return {package: version(package) for package in PACKAGES}


def vector_path(folder: Path, vector: TaskVector) -> Path:
    """Return where a run keeps a vector beside its results: ``<task>/<method>-<id>/vector.safetensors``."""
    return folder / folder_name(vector.card.task) / f"{folder_name(vector.card.method)}-{vector.id}" / FILE


def unwritable(folder: Path) -> str | None:
    """Return why nothing can be written into ``folder``, in one line, or None if it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = files.temporary(folder / "probe")
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        return f"results cannot be written to {folder} ({error.strerror or error}): choose another --output_path"
    return None


def of_task(vector: TaskVector, source: str, seed: int, shots: int, reused: bool) -> dict[str, Any]:
    """Return the entry of one task.

    ``source`` is the file of the vector, or how it came about; ``shots`` are evaluated.

    ``reused`` says that the vector is from an earlier run; ``fit_seconds``, ``fit_stages`` and ``fit_bytes`` then are
    of that one. The layers of ``heads`` count sites: blocks that the record's ``skipped`` names have none and are not
    counted.
    """
    card = dataclasses.asdict(vector.card)
    return {
        "method": card["method"],
        "vector": vector.id,
        "source": source,
        "reused": reused,
        "heads": [list(head) for head in vector.heads],
        "shots": shots,
        "seed": seed,
        "settings": dict(card["config"]),
        "fit_seconds": card["seconds"],
        "fit_stages": card["stages"],
        "fit_bytes": card["memory"],
        "fit_replay": card["replay"],
        "fit_accuracy": dict(card["accuracy"]),
        "loss": {name: card["losses"][name][0] for name in ("unedited", "chosen") if name in card["losses"]},
        "split": card["split"],
        "examples": card["examples"],
        "prompt": card["prompt"],
    }


def write(folder: Path, model: Mapping[str, Any], tasks: Mapping[str, Any]) -> Path:
    """Write ``<time>_mtv.json`` into ``folder``, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{time.strftime('%Y%m%d_%H%M%S')}_mtv.json"
    content = {"model": dict(model), "versions": versions(), "tasks": dict(tasks)}
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
    return path
