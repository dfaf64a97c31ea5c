"""The harness's results of a run, which get the record of the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loguru import logger

from lmms_mtv.harness.record import RunRecord
from lmms_mtv.harness.summary import result_line
from lmms_mtv.vectors import TaskVector


def finish(
    run: RunRecord, results: dict[str, Any], vectors: Mapping[str, TaskVector], folder: Path | None
) -> RunRecord:
    """Return the record of a run with its scores, and put into the harness's results what only this package knows.

    The results get the record (``config: mtv:``), the number of demonstrations that were used (``n-shot``), and in each
    sample the id of the vector (``vector``, None without a vector). The log gets a line about each task.

    Args:
        run: the record of the run.
        results: the results, which are changed.
        vectors: the vector of each task.
        folder: the folder of the results; None if nothing is written.
    """
    run = run.scored(results["results"])
    results["config"]["mtv"] = run.as_json()
    for name, task in run.tasks.items():
        vector = vectors[name]
        if name in results["n-shot"]:
            results["n-shot"][name] = task.shots
        for sample in results.get("samples", {}).get(name, ()):
            sample["vector"] = vector.id if vector.edits else None
        logger.info(result_line(name, vector, task, folder))
    return run
