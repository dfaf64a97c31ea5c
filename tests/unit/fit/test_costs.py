"""What a fit costs in forwards, tokens and bytes of cache: figures that do not depend on the machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from lmms_mtv import Edit, Episode, FitSession, methods
from support import zoo
from support.sessions import TokenExamples, session

LAYERS_CHECKED = 3
"""Forwards that make sure of the sites: plain, with the heads' own activations in their places, with zeros."""

PROBED = 1
"""Forwards that give a probe its activations."""

COMPARED = 4
"""Edits of a probe, which are also run in full."""

SIDE_BY_SIDE = 32
"""Positions that these take in one row: as they are, with other neighbours, and at another position."""


@dataclass
class Work:
    """Rows and tokens of each forward of a model."""

    forwards: list[tuple[int, int]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(rows * length for rows, length in self.forwards)


@contextmanager
def counted(model: nn.Module) -> Iterator[Work]:
    work = Work()

    def entered(_: nn.Module, args: tuple, kwargs: dict) -> None:
        work.forwards.append(tuple(kwargs.get("input_ids", args[0] if args else None).shape))

    handle = model.register_forward_pre_hook(entered, with_kwargs=True)
    try:
        yield work
    finally:
        handle.remove()


def drawn(used: FitSession, count: int, steps: int) -> int:
    """How many different queries the steps of a selection ask."""
    order = used.random("order")
    return len({order.randrange(count) for _ in range(steps)})


@contextmanager
def masks_of_calls(used: FitSession) -> Iterator[list[int]]:
    """How many different masks each call for losses is about."""
    counts, losses = [], used.losses

    def counting(episode, edit, tokens="first"):
        counts.append(len({tuple(mask.flatten().tolist()) for mask in edit.gain}))
        return losses(episode, edit, tokens)

    used.losses = counting
    try:
        yield counts
    finally:
        del used.losses


@pytest.mark.parametrize("samples", [4, 32])
@pytest.mark.parametrize("batch", [1, 4])
def test_mtv_runs_each_prompt_once_and_then_last_tokens_alone(samples, batch):
    tiny = zoo.build(zoo.llama)
    examples = TokenExamples(answer=1)
    used = session(tiny, examples=examples, batch_size=batch)
    config = methods.get("mtv").configure(
        {"iterations": 8, "fit_shots": 3, "steps": 20, "samples": samples, "examples": 6}
        | {"candidates": 5, "candidate_examples": 4}
    )
    with counted(tiny.model) as work, masks_of_calls(used) as masks:
        methods.get("mtv").fit(used, config)
    queries = drawn(used, 6, 20)
    few, zero = 3 * 2 + 1, 1
    steps, judged = masks[:20], masks[20:]
    assert (len(steps), len(judged)) == (20, 4)
    assert max(steps) <= samples
    forwards = 8 // batch + LAYERS_CHECKED + (PROBED + COMPARED + 1 + 1 + 3) + (queries + 20) + (4 + 4)
    compared = PROBED * zero + 3 * COMPARED * zero + 3 * SIDE_BY_SIDE
    tokens = 8 * few + LAYERS_CHECKED * zero + compared + (queries * zero + sum(steps)) + (4 * zero + sum(judged))
    assert len(work.forwards) == forwards == used.forwards
    assert work.tokens == tokens
    ran = [length for _, length in work.forwards if length in steps]
    assert all(ran.count(count) >= steps.count(count) for count in steps), "all masks of a step in one row"


def test_equal_masks_of_a_step_run_once():
    tiny = zoo.build(zoo.llama)
    used = session(tiny, examples=TokenExamples(answer=2))
    rng = torch.Generator().manual_seed(0)
    value = torch.randn(used.shape, generator=rng)
    first, second = torch.rand(2, *used.shape[:2], generator=rng) < 0.5
    three = torch.stack([first, second, first])
    with torch.no_grad():
        expected = used.losses(Episode(3, ()), Edit.replace(value, three), "all")
        with counted(tiny.model) as work:
            many = used.losses(Episode(3, ()), Edit.replace(value, three[[0, 1, 0, 0, 1] * 6]), "all")
    assert work.forwards == [(1, 2 * 2)]
    assert expected[0] == expected[2] != expected[1]
    assert torch.equal(many, expected[[0, 1, 0, 0, 1] * 6])


def test_the_cache_of_a_fit_is_that_of_its_queries():
    tiny = zoo.build(zoo.llama)
    used = session(tiny, examples=TokenExamples(answer=2), shots=3)
    config = methods.get("mtv").configure(
        {"iterations": 4, "fit_shots": 3, "steps": 12, "examples": 5, "candidate_examples": 3, "candidates": 2}
    )
    methods.get("mtv").fit(used, config)
    text = tiny.model.config.get_text_config()
    kept = drawn(used, 5, 12) + 3
    width = text.num_key_value_heads * text.head_dim
    # Three demonstrations of a question and two tokens of an answer, and the query's question without its last token.
    assert used.prefilled_bytes == kept * 2 * text.num_hidden_layers * width * 4 * 9


def test_learning_runs_a_query_once_an_epoch_and_its_teacher_once():
    tiny = zoo.build(zoo.llama)
    used = session(tiny, examples=TokenExamples(answer=1))
    config = methods.get("m2iv").configure(
        {"examples": 6, "epochs": 5, "accumulation": 2, "fit_shots": 2, "judges": 3, "loss": "first"}
    )
    with counted(tiny.model) as work:
        methods.get("m2iv").fit(used, config)
    few, zero = 2 * 2 + 1, 1
    typical = 2 * 8 * 2 + 8 + 2 * LAYERS_CHECKED
    # The first of the judges also tells that replays are exact; the others' prompts run again, as wholes.
    unedited, edited = 3 + 3 + 2, 3 + 2
    # And the first of the teachers, whose prompts are longer.
    unedited += 2
    assert len(work.forwards) == typical + unedited + 6 * (1 + 5) + 6 * 2 + edited == used.forwards
    assert max(length for _, length in work.forwards) == few
    assert [length for _, length in work.forwards].count(few) == 6 + 1, "each teacher once; it is replayed"
    assert all(rows == 1 for rows, _ in work.forwards)
    assert zero in {length for _, length in work.forwards}
