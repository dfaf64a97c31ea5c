"""Replays side by side with shapes that come again, which a GPU runs as CUDA graphs.

In a replay of a large model Python launches some thousand kernels, which takes longer than the kernels. A CUDA graph
launches all of them at once. A replay is captured when its shape comes for the second time. Each new graph is compared
with the replay that it takes the place of.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lmms_mtv.errors import MtvError
from lmms_mtv.fit.context import Context
from lmms_mtv.fit.losses import MAX_PACKED, LossRunner, Run, within_precision
from lmms_mtv.hooks import Prefill, Sites
from lmms_mtv.hooks.static import StaticReplay, StaticShape
from lmms_mtv.runtime.cuda_graphs import GraphPool
from lmms_mtv.runtime.devices import only_device
from lmms_mtv.runtime.lru_cache import LruCache
from lmms_mtv.vectors import Edits, rows_of

logger = logging.getLogger(__name__)


class _Ready(NamedTuple):
    """A replay in memory that stays where it is, and the function that runs the replay."""

    replay: StaticReplay
    run: Callable[[], Tensor]


class GraphReplays:
    """The replays of one fit that run as CUDA graphs.

    Args:
        context: the model, the examples and the processes of the fit.
        runner: the computation of losses.
        memory: limit in bytes of the buffers and the logits of all shapes.
        wanted: None takes graphs on a GPU, and False never. True also runs the same operations on a CPU, for tests.
    """

    def __init__(self, context: Context[Any], runner: LossRunner, memory: int, wanted: bool | None) -> None:
        self._context = context
        self._runner = runner
        self._wanted = wanted
        self._ready: LruCache[StaticShape, _Ready] = LruCache(memory)
        self._came: set[StaticShape] = set()
        self._failed = False

    @property
    def count(self) -> int:
        """Number of shapes that are ready."""
        return len(self._ready)

    def fits(self, prefill: Prefill, edits: Edits, target: Sequence[int], rows: int | None = None) -> bool:
        """Return whether edits may run as a graph; for the arguments see :meth:`Prefill.fits_one_row`."""
        model = self._context.model
        if self._failed or self._device is None or not prefill.fits_one_row(model, edits, target, rows):
            return False
        if any(edit.batch is None for edit in edits.values()):
            # The hooks leave out layers in which an edit of all rows changes nothing, which a graph would repeat.
            return False
        shape = StaticShape.of(prefill, edits, target, rows)
        return shape.tokens <= MAX_PACKED and shape.fits(model, prefill)

    def way(self, prefill: Prefill) -> Run:
        """Return the way to run edits that :meth:`fits`. The next run overwrites the logits of a run."""
        return partial(self._replayed, prefill)

    def prepare(self, prefill: Prefill, edits: Edits, target: Sequence[int]) -> bool:
        """Prepare the graph for edits that :meth:`fits`, and return whether there is one."""
        shape = StaticShape.of(prefill, edits, target)
        if self._ready.get(shape) is None and not self._failed:
            self._capture(shape, prefill, edits, target)
        return self._ready.get(shape) is not None

    def _replayed(
        self, prefill: Prefill, model: nn.Module, sites: Sites, edits: Edits, target: Sequence[int]
    ) -> Tensor:
        shape = StaticShape.of(prefill, edits, target)
        is_new = shape not in self._came
        self._came.add(shape)
        if (self._ready.get(shape) is None and is_new) or not self.prepare(prefill, edits, target):
            return prefill.replay_in_one_row(model, sites, edits, target)
        return self._run(shape, prefill, edits, target)

    def _run(self, shape: StaticShape, prefill: Prefill, edits: Edits, target: Sequence[int]) -> Tensor:
        ready = self._ready.get(shape)
        assert ready is not None
        ready.replay.load(prefill, edits, target)
        logits = ready.run()
        if self._pool is not None:
            # No hook sees the forward of a graph.
            self._context.counter.count += 1
        return logits[: rows_of(edits) or 1, : len(target)]

    def _capture(self, shape: StaticShape, prefill: Prefill, edits: Edits, target: Sequence[int]) -> None:
        """Make a shape ready, unless its operations cannot be captured or give other losses."""
        context = self._context
        assert self._device is not None
        try:
            replay = StaticReplay(context.model, context.sites, shape, self._device, prefill, edits, target)
            run = replay.run if self._pool is None else self._pool.captured(replay.run)
            logits = run()
        except MtvError:
            raise
        except Exception as error:
            # The traceback names the line of the model that a graph cannot hold.
            logger.debug("the replay cannot be captured", exc_info=True)
            self._give_up(f"{type(error).__name__}: {error}")
            return
        self._ready.put(shape, _Ready(replay, run), replay.bytes + logits.nbytes)

        def again(model: nn.Module, sites: Sites, edits: Edits, target: Sequence[int]) -> Tensor:
            return self._run(shape, prefill, edits, target)

        expected = self._runner.losses(prefill.replay_in_one_row, edits, target)
        gap = (self._runner.losses(again, edits, target) - expected).abs().max().item()
        if not within_precision(context.model, expected, gap):
            self._give_up(f"losses differ by {gap:.3g} from those of the same replay without a graph")

    def _give_up(self, reason: str) -> None:
        self._failed = True
        self._ready.clear()
        logger.warning("replays do not run as CUDA graphs on this model, so that a selection takes longer: %s", reason)

    @cached_property
    def _device(self) -> torch.device | None:
        """The device of all weights, if replays on it run as graphs."""
        device = only_device(self._context.model)
        if self._wanted is False or device is None or (self._wanted is None and device.type != "cuda"):
            return None
        return device

    @cached_property
    def _pool(self) -> GraphPool | None:
        """The memory of graphs; None if the operations run without a graph."""
        return GraphPool(self._device) if self._device is not None and self._device.type == "cuda" else None
