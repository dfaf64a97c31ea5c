"""Facility location: the choice of a few points that represent all points."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor


def greedy(points: Tensor, count: int) -> list[int]:
    """Return the indices of points that represent all points, by greedy facility location.

    Each chosen point has the greatest gain after the points before it. The value of a set is the sum over all points of
    ``1 + cosine`` with the most similar point of the set. Cosines are of vectors from the mean of all points: without
    the subtraction of the mean, all activations of one model look alike. Of gains that are equal to six decimals, the
    gain of the lower index counts as greater. The greedy value is at least 1 - 1/e of the best value (Nemhauser, Wolsey
    and Fisher, 1978). A gain never grows when the set grows, so that most gains need no second computation (Minoux,
    1978). The memory and the time of one gain grow linearly with n.

    Args:
        points: the points, float [n, E].
        count: the number of points to choose; a ``count`` of n or more gives all indices.
    """
    units = torch.nn.functional.normalize(points.double() - points.double().mean(0), dim=1)
    covered = torch.zeros(len(units), dtype=torch.float64)
    # The gain of the first point is its row sum. The bound is a little larger, because of rounding.
    row_sums = len(units) * (1 + 1e-6) + units @ units.sum(0)
    bounds = [(-gain, index) for index, gain in enumerate(row_sums.tolist())]
    heapq.heapify(bounds)
    chosen: list[int] = []
    while bounds and len(chosen) < count:
        _, index = heapq.heappop(bounds)
        similar = 1 + units @ units[index]
        bound = (-round((similar - covered).clamp(min=0).sum().item(), 6), index)
        if bounds and bound > bounds[0]:
            heapq.heappush(bounds, bound)
            continue
        chosen.append(index)
        covered = torch.maximum(covered, similar)
    return chosen
