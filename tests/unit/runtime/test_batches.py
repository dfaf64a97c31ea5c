"""Batches that do not fit the memory: halved where that is wanted, else a clear error, never a wrong number."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmms_mtv import Edit, methods
from lmms_mtv.errors import MemoryLimitError
from lmms_mtv.runtime.batches import BatchSize, out_of_memory
from lmms_mtv.vectors import HEADS
from support import sessions, zoo


@given(st.integers(0, 40), st.integers(1, 20), st.integers(1, 20), st.one_of(st.none(), st.integers(0, 9)))
def test_everything_is_run_once_and_in_order(total, rows, fitting, at_most):
    size, done = BatchSize(rows, automatic=True), []

    def run(batch):
        if len(batch) > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.extend(batch)
        return len(batch)

    batches = list(size.run_batches(range(total), run, at_most))
    assert done == list(range(total)) == [item for batch, _ in batches for item in batch]
    assert all(len(batch) == result <= fitting for batch, result in batches)
    assert size.rows <= rows
    assert all(len(batch) <= max(at_most or (1 if at_most == 0 else rows), 1) for batch, _ in batches)


def test_halving_is_said_and_remembered(caplog):
    size, seen = BatchSize(8, automatic=True), []

    def run(batch):
        seen.append(len(batch))
        if len(batch) > 2:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
        return batch

    assert [list(batch) for batch, _ in size.run_batches(range(5), run)] == [[0, 1], [2, 3], [4]]
    assert seen == [5, 2, 2, 1]
    assert "out of memory with 5 rows in a forward: going on with 2" in caplog.text
    assert size.copy() == size


def test_without_auto_and_with_one_row_it_is_an_error_that_says_what_to_do():
    def run(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(MemoryLimitError, match=r"4 rows .* smaller batch_size=, or batch_size=auto"):
        list(BatchSize(4).run_batches(range(4), run))
    with pytest.raises(MemoryLimitError, match=r"one prompt alone .*dtype=bfloat16, device_map=auto"):
        list(BatchSize(4, automatic=True).run_batches(range(1), run))


def test_other_errors_are_not_mistaken_for_it():
    def run(_):
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        list(BatchSize(4, automatic=True).run_batches(range(4), run))
    assert not out_of_memory(RuntimeError("size mismatch"))
    assert out_of_memory(MemoryError())


class Failing(torch.nn.Module):
    """A hook's worth of a model that runs out of memory now and then, the more likely the more rows it gets."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random, self.failures = random.Random(seed), 0

    def __call__(self, module, args, kwargs):
        rows = next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value)).shape[0]
        if rows > 1 and self.random.random() < 0.5:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.slow
def test_a_fit_that_runs_out_of_memory_at_random_gives_the_same(seed):
    tiny = zoo.build(zoo.llama)
    method = methods.get("mtv")
    config = method.configure(
        {"iterations": 6, "fit_shots": 2, "steps": 8, "samples": 8, "examples": 3, "candidate_examples": 3}
    )
    expected = method.fit(sessions.session(tiny, batch_size=BatchSize(4, automatic=True)), config).edits[HEADS]
    hooks = zoo_hooks(tiny)
    failing = Failing(seed)
    last = tiny.model.model.layers[-1]
    handle = last.register_forward_pre_hook(failing, with_kwargs=True)
    found = method.fit(sessions.session(tiny, batch_size=BatchSize(4, automatic=True)), config).edits[HEADS]
    handle.remove()
    assert failing.failures > 0
    torch.testing.assert_close(found.value, expected.value, rtol=1e-5, atol=1e-6)
    assert found.heads == expected.heads
    assert zoo_hooks(tiny) == hooks


def test_a_fit_without_memory_fails_and_leaves_no_hook():
    tiny = zoo.build(zoo.llama)
    hooks = zoo_hooks(tiny)

    def never(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = tiny.model.model.layers[-1].register_forward_pre_hook(never)
    session = sessions.session(tiny, batch_size=4)
    with pytest.raises(MemoryLimitError, match="batch_size=auto"):
        session.mean_activations(session.episodes(4, 1, "values"))
    with pytest.raises(MemoryLimitError, match="one prompt alone"):
        value = torch.zeros(session.shape)
        session.losses(session.episodes(1, 0, "selection")[0], Edit.replace(value, torch.ones(2, *session.shape[:2])))
    handle.remove()
    assert zoo_hooks(tiny) == hooks


def zoo_hooks(tiny: zoo.Tiny) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in tiny.model.modules())
