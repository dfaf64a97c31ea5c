"""The edit: the only change of a model, for its attention heads and for the other streams of its blocks.

The primitive is ``x' = keep * x + gain * value``, for each attention head. MTV is ``keep`` 0 and ``gain`` 1 at the
chosen heads. Learned and scaled edits are other choices of the three tensors. The edits of a block's other streams have
the same form, as if a stream were one head of the model's width. With a gate, the query of a head determines how much
of the head's value is added.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from lmms_mtv.errors import GeometryError

HEADS: Final = "heads"
"""Stream of the attention heads: the input of each block's attention output projection."""

ATTENTION: Final = "attention"
"""Stream of the term that self-attention adds to the hidden state: the output of the self-attention module."""

MLP: Final = "mlp"
"""Stream of the term that the MLP adds to the hidden state: the output of the MLP module."""

RESIDUAL: Final = "residual"
"""Stream of the hidden state after each block."""

STREAMS: Final = (HEADS, ATTENTION, MLP, RESIDUAL)
"""The streams that can be edited, which are the names of the edits in :attr:`TaskVector.edits`."""


@dataclass(frozen=True, eq=False)
class Edit:
    """The change ``x' = keep * x + gain * value`` of the heads of all layers, or of another stream of all layers.

    There are L layers, H heads and D numbers in a head. In a stream other than the heads, H is 1 and D is the model's
    width. Each of the tensors may have a leading dimension K. Then row k of a batch of K rows gets edit k.

    The edit is at the last real position of each row by default.

    With a gate the edit is ``x' = keep * x + mu * gain * value``, with ``mu = Z1 / (Z1 + Z2)`` at each position and
    head. ``log Z1 = w . q + b`` for the head's query q, with the first Q numbers of the gate as w and the last number
    as b. Z2 is the sum of the exponentials of the head's attention scores (MimIC, CVPR 2025). Only heads have queries.

    Attributes:
        value: floating point, usually float32, [L, H, D].
        keep: floating point, usually float32, [L, H].
        gain: floating point, usually float32, [L, H].
        everywhere: True for an edit at all positions.
        once: True for an edit at the last token of the prompt and not at the tokens after the prompt.
        renormed: True to scale x' to the Euclidean norm of x, for each head (ICV, arXiv 2311.06668; LIVE, arXiv
            2406.13185).
        gate: floating point, usually float32, [L, H, Q + 1] for queries of Q numbers; None for no gate.

    Raises:
        GeometryError: the shapes do not fit each other, a tensor is not floating point, or the edit is both everywhere
            and once.
    """

    value: Tensor
    keep: Tensor
    gain: Tensor
    everywhere: bool = False
    once: bool = False
    renormed: bool = False
    gate: Tensor | None = None

    def __post_init__(self) -> None:
        wide = [self.value] if self.gate is None else [self.value, self.gate]
        tensors = [self.value, self.keep, self.gain, *wide[1:]]
        shapes = [tuple(t.shape) for t in tensors]
        if any(t.dim() not in (3, 4) for t in wide) or any(t.dim() not in (2, 3) for t in (self.keep, self.gain)):
            raise GeometryError(
                f"an edit needs value [L, H, D], keep [L, H], gain [L, H], gate [L, H, Q + 1] or none, found {shapes}"
            )
        heads = {tuple(t.shape[-3:-1]) for t in wide} | {tuple(t.shape[-2:]) for t in (self.keep, self.gain)}
        if len(heads) > 1 or len(set(self._leading)) > 1:
            raise GeometryError(f"value, keep, gain and gate of an edit disagree in layers, heads or batch: {shapes}")
        if self.gate is not None and self.gate.shape[-1] < 2:
            raise GeometryError(f"a gate has a number for each of a query and one more, found {shapes[-1]}")
        if not all(t.is_floating_point() for t in tensors):
            raise GeometryError("value, keep, gain and gate of an edit must be floating point")
        if self.everywhere and self.once:
            raise GeometryError("an edit is everywhere, or once, not both")

    @classmethod
    def replace(cls, value: Tensor, mask: Tensor) -> Edit:
        """Return the edit that replaces heads by values.

        Args:
            value: values of all heads, [L, H, D].
            mask: True or 1 for a head to replace, [L, H] or [K, L, H].
        """
        gain = mask.to(torch.float32)
        return cls(value.to(torch.float32), 1 - gain, gain)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of layers, heads of a layer, size of a head."""
        layers, heads, size = self.value.shape[-3:]
        return layers, heads, size

    @property
    def batch(self) -> int | None:
        """Number K of edits in a batch, None for an edit that is the same for every row."""
        return next(iter(self._leading), None)

    @property
    def of_rows(self) -> list[Tensor]:
        """The tensors with a leading dimension K, in which the edits of a batch may differ."""
        plain = ((self.value, 3), (self.keep, 2), (self.gain, 2), (self.gate, 3))
        return [t for t, dimensions in plain if t is not None and t.dim() > dimensions]

    @property
    def _leading(self) -> list[int]:
        """The K of each tensor with a leading dimension K."""
        return [len(tensor) for tensor in self.of_rows]

    def taken(self, index: int | slice | Sequence[int]) -> Edit:
        """Return some edits of a batch of K edits, or one edit. An edit without a batch does not change."""
        return dataclasses.replace(
            self,
            value=self.value[index] if self.value.dim() > 3 else self.value,
            keep=self.keep[index] if self.keep.dim() > 2 else self.keep,
            gain=self.gain[index] if self.gain.dim() > 2 else self.gain,
            gate=self.gate[index] if self.gate is not None and self.gate.dim() > 3 else self.gate,
        )

    @property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """The (layer, head) pairs that the edit changes."""
        touched = (self.gain != 0) | (self.keep != 1)
        while touched.dim() > 2:
            touched = touched.any(0)
        return tuple((layer, head) for layer, head in touched.nonzero().tolist())


Edits = Mapping[str, Edit]
"""Edits by the name of their stream."""


def by_stream(edits: Edit | Edits) -> Edits:
    """Return edits by the name of their stream. A single edit is an edit of the heads.

    Raises:
        GeometryError: a stream does not exist, a stream other than the heads has a gate, or the edits are for batches
            of different sizes.
    """
    by_name = {HEADS: edits} if isinstance(edits, Edit) else edits
    if unknown := sorted(by_name.keys() - set(STREAMS)):
        raise GeometryError(f"edits of {', '.join(unknown)}, expected streams among {', '.join(STREAMS)}")
    if gated := sorted(name for name, edit in by_name.items() if edit.gate is not None and name != HEADS):
        raise GeometryError(
            f"edits of {', '.join(gated)} have a gate, expected one in {HEADS} alone: these have queries"
        )
    if len(batches := {edit.batch for edit in by_name.values()} - {None}) > 1:
        raise GeometryError(f"edits of several streams are for batches of {sorted(filter(None, batches))} rows")
    return by_name


def rows_of(edits: Edits) -> int | None:
    """Return the number K of edits in a batch, or None for edits that are the same for every row."""
    return next((edit.batch for edit in edits.values() if edit.batch is not None), None)


def taken(edits: Edits, index: int | slice | Sequence[int]) -> Edits:
    """Return some edits of a batch of K edits, or one edit, in every stream."""
    return {name: edit.taken(index) for name, edit in edits.items()}


def first_equal(edits: Edits) -> Tensor:
    """Return for each edit of a batch of K edits the index of the first equal edit, int64 [K].

    The indices are on the device of the edits, which nothing waits for.
    """
    rows = torch.cat([tensor.flatten(1) for edit in edits.values() for tensor in edit.of_rows], 1)
    # Of equal largest numbers, argmax may return any: a smaller weight for each later row leaves one largest number.
    later = torch.arange(len(rows), 0, -1, device=rows.device)
    equal = torch.stack([(rows == row).all(1) for row in rows])
    return (equal * later).argmax(1)


def distinct(edits: Edits) -> tuple[Edits, list[int]]:
    """Return the distinct edits of a batch, and the index of each row's edit among the distinct edits.

    Args:
        edits: a batch of K edits, by stream.

    Returns:
        The M distinct edits in the order of their first rows, and K indices below M.
    """
    rows = torch.cat([tensor.flatten(1) for edit in edits.values() for tensor in edit.of_rows], 1)
    _, alike = torch.unique(rows, dim=0, return_inverse=True)
    order: dict[int, int] = {}
    which = [order.setdefault(row, len(order)) for row in alike.tolist()]
    first = [which.index(index) for index in range(len(order))]
    return (edits, which) if len(first) == len(which) else (taken(edits, first), which)
