"""The lines of the log about a vector: after its fit, and at the end of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lmms_mtv.harness.record import TaskRecord
from lmms_mtv.vectors import TaskVector


def fit_line(vector: TaskVector, forwards: int) -> str:
    """Return the line about a fit that took ``forwards`` forwards."""
    card = vector.card
    replay = "" if card.replay is None else f" (edits: {card.replay})"
    return (
        f"fitted {card.method} for {card.task} in {card.seconds:.1f} s: vector {vector.id}, {vector.described()}"
        f"{_reached(vector)}, {forwards} forwards{replay}"
    )


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
    kept = Path(record.source) if folder is None else folder / record.source
    return (
        f"{task}: {scored}{prompts}, with vector {vector.id} of {vector.card.method} ({vector.described()}){other}, "
        f"kept as {kept}{_reached(vector)}"
    )


def _reached(vector: TaskVector) -> str:
    """Return what the fit reached on training queries: the loss and the right answers, without and with the vector."""
    losses: Mapping[str, Sequence[float]] = vector.card.losses
    text = ""
    if "chosen" in losses:
        before, after = losses["unedited"][0], losses["chosen"][0]
        text = f", loss {before:.3f} -> {after:.3f} (without edit -> with it, on training queries)"
    if tried := vector.card.accuracy:
        text += f", right answers {tried['unedited']:.0%} -> {tried['edited']:.0%} of {tried['queries']:.0f}"
    return text
