"""Work for the next batch by another thread: the same results and errors, and no thread after the block."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from lmms_mtv import Episode, FitSession, Sites, find_sites
from lmms_mtv.errors import DataError, MemoryLimitError
from lmms_mtv.models.examples import ExampleList
from lmms_mtv.models.runner import PromptRunner
from lmms_mtv.runtime.ahead import computed_ahead
from lmms_mtv.runtime.batches import BatchSize
from lmms_mtv.shapes import CHECKPOINT
from lmms_mtv.shapes.scenes import draw, sample
from support import zoo
from support.sessions import TokenExamples, TokenPrompt, TokenRunner

EPISODES = [Episode(query, (1, 2)) for query in range(3, 10)]


class PreparingRunner(TokenRunner):
    """Tells which thread prepares which prompts, and when they run."""

    def __init__(self, tiny: zoo.Tiny) -> None:
        super().__init__(tiny)
        self.prepared_by: list[tuple[str, int]] = []
        self.ran: list[int] = []

    def prepared(self, prompts: Sequence[TokenPrompt]):
        self.prepared_by.append((threading.current_thread().name, len(prompts)))

        def run() -> None:
            self.ran.append(len(prompts))
            self.run(prompts)

        return run


class BrokenExamples(TokenExamples):
    """Examples of which one cannot be shown."""

    def prompt(self, episode: Episode) -> TokenPrompt:
        if episode.query == 8:
            raise DataError("example 8 is broken")
        return super().prompt(episode)


def session(runner, examples=None, **options) -> FitSession:
    sites: Sites = find_sites(runner.model)
    return FitSession(runner, sites, examples or TokenExamples(), seed=0, progress=False, **options)


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lmms_mtv")]


def test_activations_are_the_same_and_prompts_are_prepared_by_one_thread_in_order():
    plain, ahead = PreparingRunner(zoo.build(zoo.llama)), PreparingRunner(zoo.build(zoo.llama))
    expected = session(plain, batch_size=3)
    found = session(ahead, batch_size=3, ahead=True)
    assert torch.equal(found.mean_activations(EPISODES), expected.mean_activations(EPISODES))
    assert torch.equal(found.activations(EPISODES), expected.activations(EPISODES))
    sizes = [3, 3, 1] * 2
    assert plain.ran == ahead.ran == [size for _, size in plain.prepared_by] == sizes
    assert {name for name, _ in plain.prepared_by} == {threading.current_thread().name}
    assert [size for _, size in ahead.prepared_by] == sizes
    assert all(name.startswith("lmms_mtv-ahead") for name, _ in ahead.prepared_by)


def test_on_a_cpu_nothing_is_prepared_ahead():
    runner = PreparingRunner(zoo.build(zoo.llama))
    session(runner).mean_activations(EPISODES)
    assert {name for name, _ in runner.prepared_by} == {threading.current_thread().name}


def test_a_runner_that_cannot_prepare_runs_as_before():
    tiny = zoo.build(zoo.llama)
    expected = session(TokenRunner(tiny)).mean_activations(EPISODES)
    assert torch.equal(session(TokenRunner(tiny), ahead=True).mean_activations(EPISODES), expected)


@pytest.mark.parametrize("ahead", [False, True])
def test_an_error_comes_up_as_itself_once_its_batch_is_due(ahead):
    runner = PreparingRunner(zoo.build(zoo.llama))
    with pytest.raises(DataError, match=r"^example 8 is broken$"):
        session(runner, BrokenExamples(), ahead=ahead).mean_activations(EPISODES)
    assert runner.ran == [1] * 5, "all prompts before the broken one"


def test_smaller_batches_after_a_lack_of_memory_are_prepared_anew():
    tiny = zoo.build(zoo.llama)
    expected = session(TokenRunner(tiny), batch_size=2).activations(EPISODES)
    runner = PreparingRunner(tiny)

    def too_large(_, args, kwargs) -> None:
        if kwargs["input_ids"].shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = tiny.model.register_forward_pre_hook(too_large, with_kwargs=True)
    found = session(runner, batch_size=BatchSize(4, automatic=True), ahead=True).activations(EPISODES)
    assert torch.equal(found, expected)
    assert runner.ran == [4, 2, 2, 2, 1]
    with pytest.raises(MemoryLimitError, match="batch_size=auto"):
        session(runner, batch_size=4, ahead=True).activations(EPISODES)
    handle.remove()


def test_what_ends_a_program_in_the_thread_ends_the_block():
    def leaves(batch: Sequence[int]) -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit, match="3"), computed_ahead(leaves, 4) as ahead:
        ahead(range(1))


def test_prompts_with_images_and_without_give_the_same():
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT).eval()
    processor = AutoProcessor.from_pretrained(CHECKPOINT, do_image_splitting=False)
    rng = random.Random(0)
    rows = [("What is it?", [draw(sample(rng))] if number % 3 else [], "red") for number in range(8)]
    runner = PromptRunner(model, processor, "tiny")
    examples = ExampleList(rows)
    episodes = [Episode(query, ()) for query in range(7)]
    found = [session(runner, examples, batch_size=3, ahead=ahead).activations(episodes) for ahead in (False, True)]
    assert torch.equal(*found)
