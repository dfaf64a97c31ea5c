"""Prefilled prompts beyond the memory of the device: on the host, with the CPU in the place of a GPU."""

from __future__ import annotations

import torch

from lmms_mtv import Edit, Episode, FitSession, methods
from lmms_mtv.vectors import HEADS
from support import zoo
from support.sessions import session

QUERIES = [Episode(query, (1, 2)) for query in range(3, 9)]

CONFIG = {"iterations": 4, "fit_shots": 2, "steps": 20, "samples": 8, "examples": 6, "candidate_examples": 4}


def size_of_a_prompt(tiny: zoo.Tiny) -> int:
    used = session(tiny)
    losses(used, QUERIES[0])
    return used.prefilled_bytes


def losses(used: FitSession, query: Episode) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    masks = torch.rand(4, *used.shape[:2], generator=rng) < 0.4
    return used.losses(query, Edit.replace(torch.randn(used.shape, generator=rng), masks), "all")


def prefills(used: FitSession, query: Episode) -> int:
    """How many forwards the losses of a query need beside their replay."""
    before = used.forwards
    losses(used, query)
    return used.forwards - before - 1


def test_each_prompt_is_prefilled_once_and_gives_the_same_losses(tiny):
    # A replay in rows has room for its four masks.
    free, limit = session(tiny), 4 * size_of_a_prompt(tiny)
    small, dropping = session(tiny, memory=limit, host_memory=1 << 30), session(tiny, memory=limit)
    for turn in range(3):
        for query in QUERIES:
            expected = losses(free, query)
            for used in (small, dropping):
                assert torch.equal(losses(used, query), expected)
                assert used.prefilled_bytes <= limit
            if turn == 0:
                assert small.forwards == free.forwards == dropping.forwards
    assert small.forwards == free.forwards
    assert dropping.forwards == free.forwards + 2 * len(QUERIES) * bool(limit)


def test_a_fit_with_little_memory_on_the_device_is_the_same_fit():
    tiny = zoo.build(zoo.llama)
    mtv = methods.get("mtv")
    runs = []
    for options in ({}, {"memory": 2 * size_of_a_prompt(tiny), "host_memory": 1 << 30}):
        used = session(tiny, shots=2, **options)
        runs.append((mtv.fit(used, mtv.configure(CONFIG)), used.forwards))
    (free, free_forwards), (small, small_forwards) = runs
    assert torch.equal(small.edits[HEADS].value, free.edits[HEADS].value)
    assert torch.equal(small.edits[HEADS].gain, free.edits[HEADS].gain)
    assert small.losses["policy"] == free.losses["policy"]
    assert small_forwards == free_forwards


def test_the_oldest_prompts_leave_the_host_when_it_is_full():
    tiny = zoo.build(zoo.llama)
    size = size_of_a_prompt(tiny)
    # Beside its cache a prompt has the ids and the mask of its tokens.
    used = session(tiny, memory=size, host_memory=int(2.5 * size))
    for query in QUERIES[:4]:
        losses(used, query)
    assert [prefills(used, query) for query in (QUERIES[1], QUERIES[2], QUERIES[3])] == [0, 0, 0]
    assert prefills(used, QUERIES[0]) == 1


def test_a_prompt_larger_than_the_host_may_hold_is_dropped():
    tiny = zoo.build(zoo.llama)
    size = size_of_a_prompt(tiny)
    used = session(tiny, memory=size, host_memory=size // 2)
    for query in QUERIES[:2]:
        losses(used, query)
    assert [prefills(used, query) for query in (QUERIES[1], QUERIES[0])] == [0, 1]
    assert used._prefills._prefills.host_bytes == 0


def test_a_model_on_the_cpu_has_no_other_memory():
    tiny = zoo.build(zoo.llama)
    used = session(tiny, memory=size_of_a_prompt(tiny))
    for query in QUERIES[:2]:
        losses(used, query)
    assert prefills(used, QUERIES[0]) == 1
    assert used._prefills._prefills.host_bytes == 0
