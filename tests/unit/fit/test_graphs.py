"""Replays in memory that stays where it is, run on the CPU without a CUDA graph: the same operations."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from lmms_mtv import Edit, Episode, methods
from lmms_mtv.hooks.static import StaticReplay, StaticShape
from lmms_mtv.runtime.compat import given_cache
from lmms_mtv.vectors import HEADS, RESIDUAL, first_equal
from support import zoo
from support.sessions import TokenExamples, session

EPISODES = [Episode(3, (1, 2)), Episode(4, ()), Episode(5, (6, 7, 8, 9)), Episode(3, (1, 2))]
PLAIN_ONLY = ("gemma2", "gemma3", "mllama")
"""Tiny models whose windows of attention are too short for 64 keys and 32 tokens, or which hold keys of images."""

CONFIG = {"iterations": 4, "steps": 12, "samples": 8, "examples": 4, "candidate_examples": 3}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def edits(shape: tuple[int, int, int], count: int, seed: int = 0) -> Edit:
    rng = torch.Generator().manual_seed(seed)
    return Edit.replace(torch.randn(shape, generator=rng), torch.rand(count, *shape[:2], generator=rng) < 0.4)


@pytest.mark.parametrize("tokens", ["first", "all"])
def test_losses_in_static_memory_are_those_of_plain_replays(tiny, tokens):
    examples = TokenExamples(answer=3)
    plain, static = session(tiny, examples=examples), session(tiny, examples=examples, graphs=True)
    for turn, count in enumerate((4, 32, 11, 33, 2)):
        for episode in EPISODES:
            edit = edits(plain.shape, count, turn)
            torch.testing.assert_close(
                static.losses(episode, edit, tokens), plain.losses(episode, edit, tokens), rtol=1e-5, atol=1e-5
            )
    assert plain.graphs == 0
    if tiny.name in PLAIN_ONLY or static.replay != "side by side":
        assert static.graphs == 0
    else:
        assert static.graphs == 2, "of 32 rows and of 64 rows"


def test_edits_of_one_token_and_of_other_streams_run_in_static_memory():
    tiny = zoo.build(zoo.llama)
    examples = TokenExamples(answer=4)
    plain, static = session(tiny, examples=examples), session(tiny, examples=examples, graphs=True)
    rng = torch.Generator().manual_seed(1)
    width = plain.sites.width
    heads, layers = edits(plain.shape, 5), len(plain.sites)
    values = torch.randn(5, layers, 1, width, generator=rng)
    residual = Edit(values, torch.ones(5, layers, 1), torch.full((5, layers, 1), 0.3), once=True, renormed=True)
    for edit in ({HEADS: heads, RESIDUAL: residual}, {RESIDUAL: residual}):
        for episode in EPISODES:
            expected = plain.losses(episode, edit, "all")
            torch.testing.assert_close(static.losses(episode, edit, "all"), expected, rtol=1e-5, atol=1e-5)
    assert static.graphs == 4, "two of probes too, whose rows have the same values"


def test_equal_edits_have_equal_losses_in_static_memory():
    used = session(zoo.build(zoo.llama), graphs=True)
    edit = edits(used.shape, 3).taken([0, 1, 0, 2, 1, 1])
    for _ in range(3):
        losses = used.losses(Episode(3, (1, 2)), edit, "all")
        assert torch.equal(losses[[0, 1, 1]], losses[[2, 4, 5]])
        assert len(set(losses.tolist())) == 3
    assert used.graphs == 1
    assert first_equal({HEADS: edit}).tolist() == [0, 1, 0, 3, 1, 1]


def test_losses_that_nobody_waits_for_are_the_same():
    used = session(zoo.build(zoo.llama))
    edit = edits(used.shape, 6)
    assert used.device == torch.device("cpu")
    expected = used.losses(Episode(3, (1, 2)), edit, "all")
    assert torch.equal(used.losses(Episode(3, (1, 2)), edit, "all", wait=False), expected)
    infinite = Edit.replace(torch.full(used.shape, torch.inf), edit.gain)
    assert not used.losses(Episode(3, (1, 2)), infinite, wait=False).isfinite().all()


def test_a_fit_in_static_memory_finds_the_same_heads():
    tiny = zoo.build(zoo.llama)
    method = methods.get("mtv")
    plain, static = (
        method.fit(session(tiny, graphs=graphs), method.configure(CONFIG | {"fit_shots": 2})) for graphs in (None, True)
    )
    assert torch.equal(static.edits[HEADS].gain, plain.edits[HEADS].gain)
    torch.testing.assert_close(static.losses["policy"], plain.losses["policy"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fault", ["raises", "differs"])
def test_a_replay_that_cannot_be_captured_runs_as_before_and_says_so(fault, monkeypatch, caplog):
    tiny = zoo.build(zoo.llama)
    plain, static = session(tiny), session(tiny, graphs=True)
    run = StaticReplay.run

    def wrong(replay: StaticReplay) -> torch.Tensor:
        if fault == "raises":
            raise RuntimeError("operation not permitted when stream is capturing")
        return run(replay).roll(1, -1)

    monkeypatch.setattr(StaticReplay, "run", wrong)
    with caplog.at_level(logging.WARNING):
        for seed in range(3):
            edit = edits(plain.shape, 8, seed)
            assert torch.equal(static.losses(EPISODES[0], edit), plain.losses(EPISODES[0], edit))
    (message,) = [record.getMessage() for record in caplog.records]
    assert "CUDA graph" in message
    assert ("not permitted when stream is capturing" in message) == (fault == "raises")
    assert static.graphs == 0
    assert static.replay == "side by side"


class CountsKeys(LlamaForCausalLM):
    """A model whose logits depend on the number of keys in the cache, which static memory changes."""

    def forward(self, *args, **kwargs):
        cache = given_cache(kwargs)
        keys = cache.get_seq_length() if cache is not None else 0
        output = super().forward(*args, **kwargs)
        if keys > 0:
            output.logits = output.logits.roll(int(keys > 20), -1)
        return output


def test_a_model_that_counts_its_keys_is_not_replayed_in_static_memory(caplog):
    tiny = zoo.build(zoo.llama)
    tiny.model.__class__ = CountsKeys
    plain, static = session(tiny), session(tiny, graphs=True)
    with caplog.at_level(logging.WARNING):
        for seed in range(3):
            edit = edits(plain.shape, 8, seed)
            assert torch.equal(static.losses(EPISODES[0], edit), plain.losses(EPISODES[0], edit))
    assert static.graphs == 0
    assert len(caplog.records) == 1


def test_static_memory_stays_within_the_window_of_attention():
    window = 100
    tiny = zoo.Tiny("mistral", MistralForCausalLM(MistralConfig(**zoo._text(sliding_window=window))))
    plain, static = session(tiny), session(tiny, graphs=True)
    edit = edits(plain.shape, 4)
    for _ in range(3):
        expected = plain.losses(EPISODES[0], edit, "all")
        assert torch.equal(static.losses(EPISODES[0], edit, "all"), expected)
    assert static.replay == "side by side"
    assert static.graphs == 0, "64 keys and 32 rows of two tokens are more than the window"
    assert (static.losses(EPISODES[0], edit) - plain.losses(EPISODES[0], edit)).abs().max() < 1e-5


def test_shapes_are_few_and_leave_a_key_free():
    prefill, _ = session(zoo.build(zoo.llama))._prefills.prompted(EPISODES[0])
    like = edits((2, 4, 8), 4)
    shapes = [StaticShape.of(prefill, {HEADS: like}, [1] * steps, rows) for steps in range(1, 33) for rows in (1, 32)]
    assert {shape.rows for shape in shapes} == {32}
    assert sorted({shape.steps for shape in shapes}) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert {shape.keys for shape in shapes} == {64}
    assert prefill.length - 1 < 64


def test_few_shapes_stay_within_the_memory():
    tiny = zoo.build(zoo.llama)
    used = session(tiny, examples=TokenExamples(answer=6), graphs=True, memory=1)
    for tokens in ("first", "all", "first", "all"):
        for _ in range(2):
            used.losses(EPISODES[0], edits(used.shape, 4), tokens)
    assert used.graphs == 1
