"""The rows of the forwards in which lm-eval scores tokens: their order, and their edited positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import lm_eval

from lmms_mtv.errors import HookError

Request = tuple[Any, list[int], list[int]]
"""A request for a score: the strings, the tokens of the context, the tokens of the continuation."""


class Row(NamedTuple):
    """A row of a forward: its input tokens, and the number of its last tokens that predict a scored token."""

    tokens: list[int]
    scored: int


def rounds_of_distinct_inputs(requests: Sequence[Request]) -> list[list[int]]:
    """Return indices of requests in rounds. In a round, equal inputs have equal numbers of scored tokens.

    lm-eval runs requests with the same input once. For edited requests this is right only if the same positions are
    edited. Nearly always the positions are the same, and there is one round.
    """
    by_input: dict[tuple[int, ...], dict[int, list[int]]] = {}
    for index, (_, context, continuation) in enumerate(requests):
        lengths = by_input.setdefault((*context, *continuation[:-1]), {})
        lengths.setdefault(len(continuation), []).append(index)
    rounds: list[list[int]] = []
    for lengths in by_input.values():
        for turn, length in enumerate(sorted(lengths, reverse=True)):
            if turn == len(rounds):
                rounds.append([])
            rounds[turn] += lengths[length]
    return [sorted(indices) for indices in rounds]


def rows_of(requests: Sequence[Request], limit: int, once: bool) -> list[Row]:
    """Return the rows that lm-eval makes of requests, in its order: the longest row first.

    Args:
        requests: the requests of one round.
        limit: the largest number of input tokens.
        once: True if lm-eval runs equal inputs once.
    """
    firsts: dict[Any, Request] = {}
    for index, request in enumerate(requests):
        firsts.setdefault((*request[1], *request[2][:-1]) if once else index, request)
    whole = [(context + continuation, len(continuation)) for _, context, continuation in firsts.values()]
    whole.sort(key=lambda row: (-len(row[0]), row[0]))
    return [Row(tokens[-(limit + 1) :][:-1], scored) for tokens, scored in whole]


def reordered() -> HookError:
    """Return the error for rows in another order than the order of :func:`rows_of`."""
    return HookError(
        f"lm-eval {lm_eval.__version__} did not run its requests in the order that mtv knows, so that the positions to "
        "edit are not certain: install lm-eval 0.4.13, with which this is tested"
    )
