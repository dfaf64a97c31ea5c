"""Fits in the run of an experiment tracker, which the harness opened: wandb, or trackio."""

from __future__ import annotations

import sys
from typing import Any, Final

from lmms_mtv.vectors import TaskVector

_HISTORIES: Final = ("policy", "learning")
"""The names of the losses over the steps of a fit."""


def log_fit(tracker: str, task: str, vector: TaskVector) -> None:
    """Log the fit of a vector: the loss of each step, the number of edited heads, and the seconds.

    The harness has imported the tracker and opened its run. Without both, nothing is logged and nothing is imported.

    Args:
        tracker: ``wandb`` or ``trackio``.
        task: the name of the evaluated task.
        vector: the vector; one without edits has no fit.
    """
    module: Any = sys.modules.get(tracker)
    if module is None or not vector.edits or (tracker == "wandb" and module.run is None):
        return
    card, prefix = vector.card, f"fit/{task}"
    losses = next((card.losses[name] for name in _HISTORIES if card.losses.get(name)), ())
    if tracker == "wandb":
        # The steps of a fit are not the steps of the run, which only grow.
        module.define_metric(f"{prefix}/loss", step_metric=f"{prefix}/step")
    for step, loss in enumerate(losses, start=1):
        module.log({f"{prefix}/step": step, f"{prefix}/loss": loss})
    figures = {"heads": len(vector.heads), "seconds": card.seconds}
    figures |= {f"loss_{name}": card.losses[name][0] for name in ("unedited", "chosen") if card.losses.get(name)}
    module.log({f"{prefix}/{name}": value for name, value in figures.items()})
