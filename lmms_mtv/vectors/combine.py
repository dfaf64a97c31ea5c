"""Combination of vectors of one model, with weights, into a new vector."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmms_mtv.errors import ArgumentError, GeometryError
from lmms_mtv.vectors import Edit, Edits, TaskVector, VectorCard

METHOD = "combination"

_ROUNDING = 1e-6


def combined(
    vectors: Sequence[TaskVector], weights: Sequence[float] | None = None, *, task: str, any_sum: bool = False
) -> TaskVector:
    """Return the vector whose edit is the weighted sum of the edits of other vectors.

    With ``y_i = keep_i * x + gain_i * value_i`` the sum is ``(sum w_i keep_i) * x + sum w_i gain_i value_i``, for each
    head. Heads that no vector edits do not change if the weights sum to 1. Otherwise these heads are scaled by the sum
    of the weights. Sums are computed in float64.

    The new card has ``task``, the ids of ``vectors`` with their weights as ``parents``, and the fields in which all
    cards agree. Where the cards disagree, split, examples and prompt are empty and the seed is 0.

    Args:
        vectors: different vectors of one model.
        weights: a weight for each vector; None for the mean of the vectors.
        task: name of the task on the new card.
        any_sum: True to allow weights that do not sum to 1.

    Raises:
        GeometryError: the vectors differ in model, revision, dtype, geometry, streams or edited positions, or an edit
            has a gate, keeps norms or is for a batch.
        ArgumentError: there are no vectors, a vector is given twice, the weights do not fit, or the vectors differ in
            shots.
    """
    shares = _shares(vectors, weights, any_sum)
    card = _card(vectors, shares, task)
    edits = {name: _sum([vector.edits[name] for vector in vectors], shares) for name in sorted(vectors[0].edits)}
    return TaskVector(edits, card)


def summed(vectors: Sequence[TaskVector], weights: Sequence[float], *, task: str) -> TaskVector:
    """Return the vector that moves activations by the weighted sum of the changes of other vectors.

    With ``y_i = keep_i * x + gain_i * value_i`` the sum is ``x + sum w_i (y_i - x)``, for each head. Heads that no
    vector edits do not change, whatever the weights sum to, unlike in :func:`combined`. With weights that sum to 1 both
    are equal. A single vector may have any edit. The card of the result is that of :func:`combined`.

    Args:
        vectors: different vectors of one model.
        weights: a weight for each vector.
        task: name of the task on the new card.

    Raises:
        GeometryError: as in :func:`combined`.
        ArgumentError: as in :func:`combined`.
    """
    shares = _shares(vectors, weights, True)
    card = dataclasses.replace(_card(vectors, shares, task), config={"sum": "changes"})
    if len(vectors) == 1:
        share = shares[0]
        edits = {
            name: dataclasses.replace(edit, keep=1 + share * (edit.keep - 1), gain=share * edit.gain)
            for name, edit in vectors[0].edits.items()
        }
        return TaskVector(edits, card)
    unmoved = 1 - math.fsum(shares)
    total = {name: _sum([vector.edits[name] for vector in vectors], shares) for name in sorted(vectors[0].edits)}
    edits = {name: dataclasses.replace(edit, keep=edit.keep + unmoved) for name, edit in total.items()}
    return TaskVector(edits, card)


def stacked(vectors: Sequence[TaskVector | None]) -> Edits:
    """Return the edits of a batch in which row k gets the edit of vector k, for :func:`~lmms_mtv.hooks.applied`.

    Args:
        vectors: a vector of one model for each row; None leaves a row unedited.

    Raises:
        GeometryError: the vectors differ in geometry, or in the positions that a stream is edited at, or have gates.
        ArgumentError: there is no vector.
    """
    present = [vector for vector in vectors if vector is not None]
    if other := [vector for vector in present if not isinstance(vector, TaskVector)]:
        raise ArgumentError(
            f"a row is {type(other[0]).__name__}, expected a TaskVector or None: TaskVector.load reads one"
        )
    if not present:
        raise ArgumentError("no vectors to stack: give a vector for at least one row")
    if len({vector.card.geometry for vector in present}) > 1:
        raise GeometryError("vectors that differ in geometry cannot be stacked")
    streams = dict.fromkeys(name for vector in present for name in vector.edits)
    return {name: _rows([None if vector is None else vector.edits.get(name) for vector in vectors]) for name in streams}


def _rows(edits: Sequence[Edit | None]) -> Edit:
    """Return one edit with a row for each of ``edits``; a row without an edit keeps its activations."""
    first, *others = (edit for edit in edits if edit is not None)
    if any(edit.shape != first.shape or edit.batch is not None for edit in (first, *others)):
        raise GeometryError("edits of different shapes, or of batches, cannot be stacked")
    if any(edit.gate is not None for edit in (first, *others)):
        raise GeometryError("edits with a gate cannot be stacked: apply them one after the other")
    if len({(edit.everywhere, edit.once, edit.renormed) for edit in (first, *others)}) > 1:
        raise GeometryError("edits at different positions, or of which some keep norms, cannot be stacked")
    same = dataclasses.replace(first, keep=torch.ones_like(first.keep), gain=torch.zeros_like(first.gain))
    rows = [edit or same for edit in edits]
    value, keep, gain = (
        torch.stack([getattr(row, part).float() for row in rows]) for part in ("value", "keep", "gain")
    )
    return dataclasses.replace(first, value=value, keep=keep, gain=gain)


def _card(vectors: Sequence[TaskVector], shares: Sequence[float], task: str) -> VectorCard:
    """Return the card of a combination, after a check that the vectors can be combined."""
    cards = [vector.card for vector in vectors]
    # The same weights under another name are the same model.
    weights = ("revision",) if cards[0].revision is not None else ("model", "revision")
    for name in (*weights, "dtype", "geometry"):
        if len(values := {getattr(card, name) for card in cards}) > 1:
            listed = "" if name == "geometry" else f" ({', '.join(sorted(map(repr, values)))})"
            raise GeometryError(f"vectors that differ in {name}{listed} cannot be combined")
    streams = {frozenset(vector.edits) for vector in vectors}
    if len(streams) > 1 or not vectors[0].edits:
        raise GeometryError(f"vectors with edits of {[sorted(names) for names in streams]} cannot be combined")
    if len(shots := {card.shots for card in cards}) > 1:
        raise ArgumentError(f"vectors for prompts of {sorted(shots)} shots cannot be combined")
    versions = [set(card.versions.items()) for card in cards]
    return VectorCard(
        model=cards[0].model,
        revision=cards[0].revision,
        dtype=cards[0].dtype,
        geometry=cards[0].geometry,
        task=task,
        split=_agreed(cards, "split", ""),
        examples=_agreed(cards, "examples", ""),
        prompt=_agreed(cards, "prompt", ""),
        shots=cards[0].shots,
        seed=_agreed(cards, "seed", 0),
        method=METHOD,
        config={},
        parents=dict(zip([card.id for card in cards], shares, strict=True)),
        versions=dict(sorted(set.intersection(*versions))),
        weights=_agreed(cards, "weights", None),
    )


def _shares(vectors: Sequence[TaskVector], weights: Sequence[float] | None, any_sum: bool) -> list[float]:
    """Return the weights without the rounding error of their sum."""
    if not vectors:
        raise ArgumentError("no vectors to combine")
    if len({vector.id for vector in vectors}) < len(vectors):
        raise ArgumentError("a vector is given twice: give it once, with the sum of its weights")
    if weights is None:
        return [1 / len(vectors)] * len(vectors)
    if len(weights) != len(vectors) or not all(map(math.isfinite, weights)):
        raise ArgumentError(f"weights {list(weights)} for {len(vectors)} vectors: give one number for each")
    total = math.fsum(weights)
    if any_sum:
        return [float(weight) for weight in weights]
    if abs(total - 1) > _ROUNDING:
        raise ArgumentError(f"the weights {list(weights)} sum to {total:g}, not to 1; --any-sum (any_sum) allows that")
    return [weight / total for weight in weights]


def _sum(edits: Sequence[Edit], shares: Sequence[float]) -> Edit:
    if len({edit.shape for edit in edits}) > 1 or any(edit.batch is not None for edit in edits):
        raise GeometryError("edits of different shapes, or of batches, cannot be combined")
    if len({(edit.everywhere, edit.once) for edit in edits}) > 1 or any(edit.renormed for edit in edits):
        raise GeometryError("edits at different positions, or that keep norms, have no sum that is such an edit")
    if any(edit.gate is not None for edit in edits):
        raise GeometryError("edits with a gate cannot be combined: what they add depends on the query")
    device = edits[0].value.device

    def total(terms: Sequence[Tensor]) -> Tensor:
        return torch.stack([share * term for share, term in zip(shares, terms, strict=True)]).sum(0)

    doubles = [tuple(part.to(device, torch.float64) for part in (edit.value, edit.keep, edit.gain)) for edit in edits]
    value = total([gain[..., None] * value for value, _, gain in doubles])
    keep = total([keep for _, keep, _ in doubles])
    # Gains may cancel where values do not: a head has a gain if the head has a gain in any edit.
    gain = torch.stack([share * gain for share, (_, _, gain) in zip(shares, doubles, strict=True)]).ne(0).any(0)
    return dataclasses.replace(edits[0], value=value.float(), keep=keep.float(), gain=gain.float())


def _agreed(cards: Sequence[VectorCard], name: str, otherwise: Any) -> Any:
    values = {getattr(card, name) for card in cards}
    return values.pop() if len(values) == 1 else otherwise
