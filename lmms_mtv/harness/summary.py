"""The line of the log about a task at the end of a run."""

from __future__ import annotations

from pathlib import Path

from lmms_mtv.harness.record import TaskRecord
from lmms_mtv.models.fitting import reached
from lmms_mtv.vectors import TaskVector


def result_line(task: str, vector: TaskVector, record: TaskRecord, folder: Path | None) -> str:
    """Return the line about a task at the end of a run: its scores, its vector, and what the fit reached.

    Args:
        task: the name of the task.
        vector: the vector of the task.
        record: the record of the task.
        folder: the folder of the results, to which the source in the record may be relative.
    """
    scores = [f"{name.split(',')[0]} {value:.3f}" for name, value in record.scores.items() if "_stderr" not in name]
    scored = f"{', '.join(scores)} " if scores else ""
    prompts = "zero-shot" if record.shots == 0 else f"{record.shots}-shot"
    if not vector.edits:
        return f"{task}: {scored}{prompts}, without a vector"
    other = "" if vector.card.task == task else f" fitted on {vector.card.task}"
    # A vector of this run is in the folder; any other is where vector= says.
    kept = record.source if folder is None or not (folder / record.source).exists() else folder / record.source
    return (
        f"{task}: {scored}{prompts}, with vector {vector.id} of {vector.card.method} ({vector.described()}){other}, "
        f"{'from' if record.reused else 'kept as'} {kept}{reached(vector)}"
    )
