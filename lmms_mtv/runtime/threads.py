"""The number of threads of a model on a CPU."""

from __future__ import annotations

import os
from typing import Final

import torch
from torch import nn

_SET_BY: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables by which a user sets the number of threads."""

_SMALL: Final = 10_000_000
"""Parameters below which the operations of a model are too short to share."""


def limit_threads(model: nn.Module) -> str | None:
    """Let a small model on a CPU compute with one thread, unless the user has set a number of threads.

    The threads of an operation wait for each other. For a small model this takes as long as it saves, and many times
    longer while another job uses the cores.

    Args:
        model: the model, on its device.

    Returns:
        A line about the change; None if nothing changed.
    """
    parameters = list(model.parameters())
    size = sum(parameter.numel() for parameter in parameters)
    on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
    if not on_cpu or size >= _SMALL or torch.get_num_threads() == 1 or any(map(os.environ.get, _SET_BY)):
        return None
    torch.set_num_threads(1)
    return (
        f"a model of {size / 1e6:.1f} million parameters computes as fast with one thread: set OMP_NUM_THREADS for more"
    )
