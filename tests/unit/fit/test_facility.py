"""Facility location, against a greedy that works every gain out from the definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lmms_mtv.fit import facility_location


def similarities(points: torch.Tensor) -> list[list[float]]:
    centred = points.double() - points.double().mean(0)
    return (1 + torch.nn.functional.cosine_similarity(centred[:, None], centred[None], dim=2)).tolist()


def value(similar: list[list[float]], chosen: tuple[int, ...]) -> float:
    return sum(max(row[index] for index in chosen) for row in similar)


def naive(similar: list[list[float]], count: int) -> list[int]:
    chosen: list[int] = []
    for _ in range(count):
        left = [index for index in range(len(similar)) if index not in chosen]
        before = value(similar, tuple(chosen)) if chosen else 0
        chosen.append(max(left, key=lambda index: round(value(similar, (*chosen, index)) - before, 6)))
    return chosen


@pytest.mark.parametrize("seed", range(6))
def test_greedy_equals_the_definition_and_is_near_the_best_set(seed):
    points = torch.randn(11, 3, generator=torch.Generator().manual_seed(seed)) + 5
    similar = similarities(points)
    chosen = facility_location.greedy(points, 4)
    assert chosen == naive(similar, 4)
    assert chosen[0] == max(range(11), key=lambda index: value(similar, (index,)))
    best = max(value(similar, some) for some in itertools.combinations(range(11), 4))
    assert value(similar, tuple(chosen)) >= (1 - 1 / math.e) * best
    assert facility_location.greedy(points, 4) == chosen


def test_one_of_each_cluster_comes_first():
    centres = torch.tensor([[9.0, 0, 0], [0, 9.0, 0], [0, 0, 9.0], [-9.0, -9, -9]])
    noise = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) * 0.1
    points = centres.repeat(10, 1) + noise
    assert {index % 4 for index in facility_location.greedy(points, 4)} == {0, 1, 2, 3}


def test_small_and_equal_sets():
    assert sorted(facility_location.greedy(torch.randn(3, 2), 7)) == [0, 1, 2]
    assert facility_location.greedy(torch.ones(4, 2), 2) == [0, 1]
