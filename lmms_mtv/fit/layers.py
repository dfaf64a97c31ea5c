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
    layer_masks = torch.cat([torch.eye(layers), torch.zeros(1, layers)]).unsqueeze(-1)
    layer_losses = losses(Edit(value, 1 - (1 - keep) * layer_masks, layer_masks, once=once))
    best = int(layer_losses[:-1].argmin())
    chosen = layer_masks[best]
    edit = Edit(value * chosen.unsqueeze(-1), 1 - (1 - keep) * chosen, chosen.clone(), once=once)
    return edit, {
        "layers": layer_losses[:-1].tolist(),
        "unedited": [layer_losses[-1].item()],
        "chosen": [layer_losses[best].item()],
    }
