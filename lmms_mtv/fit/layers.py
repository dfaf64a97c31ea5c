"""The choice of one layer: the layer at which an edit makes the losses smallest."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lmms_mtv.vectors import Edit


def best_layer(
    losses: Callable[[Edit], Tensor], value: Tensor, keep: float, once: bool = False
) -> tuple[Edit, dict[str, list[float]]]:
    """Return the edit ``keep * x + value`` of the layer where the loss of the edit is smallest.

    Args:
        losses: function that returns the losses, float [K], of a batch of K = L + 1 edits: an edit of each layer alone,
            and no edit.
        value: the values to add, float32 [L, 1, D].
        keep: the factor of the activation.
        once: True edits only the last token of the prompt.

    Returns:
        The edit, whose values in all other layers are 0, and the losses by name: ``layers``, ``unedited`` and
        ``chosen``.
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
