"""Facility location: a few points that stand for all of them."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor


def greedy(points: Tensor, count: int) -> list[int]:
    """Return the indices of ``count`` of the ``points`` [n, E]: each has the greatest gain after the points before it.

    The value of a set is the sum over all points of ``1 + cosine`` with the most similar one in it, of vectors from
    the mean of all points: without the mean, activations of one model all look alike. Gains equal to six decimals go
    to the lower index. ``count`` of n or more gives all indices. The greedy value is at least 1 - 1/e of the best one
    (Nemhauser, Wolsey and Fisher, 1978); a gain never grows as the set does, so most of them need not be worked out
    again (Minoux, 1978). Memory, and the time of each gain, grow with n, not with its square.
    """
    units = torch.nn.functional.normalize(points.double() - points.double().mean(0), dim=1)
    covered = torch.zeros(len(units), dtype=torch.float64)
    # Alone, a point gains its row sum. A little more, so that rounding leaves it a bound.
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
