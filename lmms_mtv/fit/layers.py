"""One layer among all: the one at which an edit makes the losses smallest."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lmms_mtv.vectors import Edit


def best_layer(
    losses: Callable[[Edit], Tensor], value: Tensor, keep: float, once: bool = False
) -> tuple[Edit, dict[str, list[float]]]:
    """Return the edit ``keep * x + value``, ``once`` or not, of the layer where its loss is smallest.

    ``value`` is float32 [L, 1, D]. ``losses`` gives the float [K] losses of a batch of K = L + 1 edits: of each layer
    alone, and of none. Returns the edit, whose values elsewhere are 0, and the losses by name: ``layers``,
    ``unedited`` and ``chosen``.
    """
    layers = len(value)
    single_row = torch.cat([torch.eye(layers), torch.zeros(1, layers)]).unsqueeze(-1)
    found = losses(Edit(value, 1 - (1 - keep) * single_row, single_row, once=once))
    best = int(found[:-1].argmin())
    chosen = single_row[best]
    edit = Edit(value * chosen.unsqueeze(-1), 1 - (1 - keep) * chosen, chosen.clone(), once=once)
    return edit, {
        "layers": found[:-1].tolist(),
        "unedited": [found[-1].item()],
        "chosen": [found[best].item()],
    }
