"""Choosing one layer by its loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmms_mtv.fit.layers import best_layer
from lmms_mtv.vectors import Edit


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_the_layer_of_the_lowest_loss_is_edited_and_no_other(keep):
    value = torch.randn(4, 1, 5, generator=torch.Generator().manual_seed(0))
    asked: list[Edit] = []

    def losses(edit: Edit) -> Tensor:
        asked.append(edit)
        return torch.tensor([3.0, 2.0, 0.5, 1.0, 0.25])

    edit, found = best_layer(losses, value, keep)
    assert asked[0].batch == 5
    for row in range(4):
        assert asked[0].taken(row).heads == ((row, 0),)
    assert asked[0].taken(4).heads == ()
    assert edit.heads == ((2, 0),)
    assert torch.equal(edit.value[2], value[2])
    assert edit.value.count_nonzero() == 5
    assert (edit.keep[2, 0], edit.gain[2, 0]) == (keep, 1)
    assert found == {"layers": [3.0, 2.0, 0.5, 1.0], "unedited": [0.25], "chosen": [0.5]}
