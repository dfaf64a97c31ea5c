"""Calibration of replays: probes find the fastest way to run edits that equals full forwards.

Each case of edits is calibrated once for prompts of about the same length. The probe consists of activations of the
prompt. The probe runs by full forwards, from the cache in rows, and from the cache side by side. So the result depends
neither on the edits whose losses are computed first, nor on the order of calls. On a GPU the probe also runs as a CUDA
graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor

from lmms_mtv.errors import MtvError
from lmms_mtv.fit.context import Context
from lmms_mtv.fit.graphs import GraphReplays
from lmms_mtv.fit.losses import MAX_PACKED, LossRunner, within_precision
from lmms_mtv.hooks import Prefill, record
from lmms_mtv.runtime.batches import single_row
from lmms_mtv.vectors import Edit, Edits, taken

logger = logging.getLogger(__name__)

Replay = Literal["side by side", "rows", "full forwards"]
"""A way to compute the losses of several edits, from the fastest way to the slowest."""

_PROBES: Final = 4
"""Number of edits in a probe."""

_SIDE_BY_SIDE: Final = 32
"""Number of edits that are compared side by side; the edits of the probe are repeated."""

_APART: Final = 1e-4
"""Largest accepted change of a loss with the neighbours, which an exact attention mask hides completely."""


class ReplayCase(NamedTuple):
    """Edits and prompts that share a calibration.

    Attributes:
        streams: the edited streams, each with the flags ``once`` and ``renormed`` and with the presence of a gate.
        length: the number of binary digits of the prompt's length in tokens.
    """

    streams: tuple[tuple[str, bool, bool, bool], ...]
    length: int

    @classmethod
    def of(cls, edits: Edits, prefill: Prefill) -> ReplayCase:
        """Return the case of ``edits`` of a prompt."""
        streams = ((name, edit.once, edit.renormed, edit.gate is not None) for name, edit in sorted(edits.items()))
        return cls(tuple(streams), prefill.length.bit_length())


class Calibration:
    """The ways to run edits that were found exact on this model.

    Args:
        context: the model, the examples and the processes of the fit.
        runner: the computation of losses.
        graphs: the replays as CUDA graphs.
        way: the way to take without a probe, for comparisons; None lets probes decide.
    """

    def __init__(self, context: Context[Any], runner: LossRunner, graphs: GraphReplays, way: Replay | None) -> None:
        self._context = context
        self._runner = runner
        self._graphs = graphs
        self._fixed = way
        self._exact: dict[ReplayCase, bool] = {}
        self._exact_side_by_side: dict[ReplayCase, bool] = {}
        self._exact_graphs: dict[ReplayCase, bool] = {}
        self._exact_unedited: dict[ReplayCase, bool] = {}
        self._lacks_cache = False

    @property
    def replays(self) -> bool | None:
        """True if losses come from replays, except for prompts without a cache; None before the first loss."""
        if not self._exact:
            return False if self._lacks_cache else None
        return all(self._exact.values())

    @property
    def way(self) -> Replay | None:
        """Slowest way of all cases; None before the first loss."""
        if self.replays is None:
            return None
        if not self.replays:
            return "full forwards"
        edited = [exact for case, exact in self._exact_side_by_side.items() if case.streams]
        return "side by side" if edited and all(edited) else "rows"

    def lean(self, prefill: Prefill) -> bool:
        """Return whether a prompt needs only the inputs of its replays."""
        length = ReplayCase.of({}, prefill).length
        is_known = any(case.length == length for case in self._exact)
        return is_known and bool(self.replays) and prefill.cache is not None

    def replays_case(self, case: ReplayCase, prefill: Prefill) -> bool:
        """Return whether replays of this prompt equal full forwards."""
        return self._exact.get(case, False) and prefill.cache is not None

    def packs_case(self, case: ReplayCase) -> bool:
        """Return whether edits side by side in one row equal edits in rows."""
        return self._exact_side_by_side.get(case, False)

    def graphs_case(self, case: ReplayCase) -> bool:
        """Return whether edits side by side may run as a CUDA graph."""
        return self._exact_graphs.get(case, False)

    def replays_unedited(self, prefill: Prefill, target: list[int]) -> bool:
        """Return whether a prompt without edits runs exactly from its cache.

        Each process decides for itself, since other processes may be at another prompt.

        Args:
            prefill: the prefilled prompt.
            target: the token ids that follow the prompt.
        """
        if prefill.cache is None or self._fixed == "full forwards":
            return False
        case = ReplayCase.of({}, prefill)
        if case not in self._exact_unedited:
            self._exact_unedited[case] = self._fixed is not None or self._is_exact(prefill, {}, target)
        return self._exact_unedited[case]

    def is_settled(self, case: ReplayCase, prefill: Prefill, edits: Edits, target: list[int]) -> bool:
        """Return whether :meth:`calibrate` has nothing to do for these edits of this prompt."""
        if prefill.cache is None:
            return self._lacks_cache
        if case not in self._exact:
            return False
        if not self._exact[case] or not self._may_pack(prefill, edits, target):
            return True
        if case not in self._exact_side_by_side:
            return False
        return not self._exact_side_by_side[case] or self._knows_graphs(case, prefill, edits, target)

    def calibrate(self, case: ReplayCase, prefill: Prefill, edits: Edits, target: list[int]) -> None:
        """Find, once for each case, the exact ways to run edits.

        Args:
            case: the case of the edits.
            prefill: the prefilled prompt; a prompt with all inputs if the case is new.
            edits: the edits to calibrate.
            target: the token ids that follow the prompt.
        """
        if self.is_settled(case, prefill, edits, target):
            return
        if prefill.cache is None:
            self._lacks_cache = True
            logger.warning("a prompt's cache cannot be replayed: its losses come from full forwards, more slowly")
            return
        if self._fixed is not None:
            self._exact[case] = self._fixed != "full forwards"
            self._exact_side_by_side[case] = self._exact_graphs[case] = self._fixed == "side by side"
            return
        with self._context.ranks.raise_together(), single_row(), torch.no_grad():
            probe = self._probe(prefill, edits)
        if case not in self._exact:
            self._exact[case] = self._on_all_ranks(lambda: self._is_exact(prefill, probe, target))
        if not self._exact[case] or not self._may_pack(prefill, edits, target):
            return
        if case not in self._exact_side_by_side:
            self._exact_side_by_side[case] = self._on_all_ranks(
                lambda: self._is_exact_side_by_side(prefill, probe, target)
            )
        if self._exact_side_by_side[case] and not self._knows_graphs(case, prefill, edits, target):
            self._exact_graphs[case] = self._on_all_ranks(lambda: self._is_exact_as_graph(prefill, probe, target))

    def _may_pack(self, prefill: Prefill, edits: Edits, target: list[int]) -> bool:
        """Return whether the edits that are compared side by side may stand in one row of this prompt."""
        return bool(edits) and prefill.fits_one_row(self._context.model, edits, target, _number_compared(target))

    def _knows_graphs(self, case: ReplayCase, prefill: Prefill, edits: Edits, target: list[int]) -> bool:
        """Return whether graphs were calibrated for this case, or cannot run for this prompt."""
        return case in self._exact_graphs or not self._graphs.fits(prefill, edits, target, _number_compared(target))

    def _on_all_ranks(self, holds: Callable[[], bool]) -> bool:
        """Return whether the condition ``holds`` is true in every process."""
        with self._context.ranks.raise_together(), single_row(), torch.no_grad():
            here = holds()
        return self._context.on_all_ranks(here)

    def _probe(self, prefill: Prefill, edits: Edits) -> Edits:
        """Return edits like ``edits`` whose values are activations of this prompt, each at another head."""
        generator, probe = torch.Generator().manual_seed(0), {}
        for name, like in edits.items():
            with record(self._context.sites, name) as recording:
                # The prompt and one more token run; any token serves.
                prefill.forward(self._context.model, self._context.sites, {}, [0])
            activations = recording.last()[0].float().cpu()
            mask = (torch.rand(_PROBES, *activations.shape[:2], generator=generator) < 0.5).float()
            mask[1] = 1 - mask[0]
            moved = activations.flatten(0, 1).roll(1, 0).view_as(activations)
            gate = like.gate if like.gate is None or like.gate.dim() == 3 else like.gate[0]
            probe[name] = Edit(moved, 1 - mask, mask, once=like.once, renormed=like.renormed, gate=gate)
        return probe

    def _is_exact(self, prefill: Prefill, probe: Edits, target: list[int]) -> bool:
        """Return whether replays equal full forwards on this model, within the precision of the model."""
        full = self._runner.losses(prefill.forward, probe, target, in_blocks=False)
        replayed = self._runner.losses(prefill.replay, probe, target)
        gap = (full - replayed).abs().max().item()
        if not within_precision(self._context.model, full, gap):
            logger.warning(
                "replays differ from full forwards by %.3g on this model: losses come from full forwards, more slowly",
                gap,
            )
            return False
        return True

    def _is_exact_side_by_side(self, prefill: Prefill, probe: Edits, target: list[int]) -> bool:
        """Return whether edits side by side in one row give the losses of edits in rows on this model."""
        order = [index % _PROBES for index in range(_number_compared(target))]

        def side_by_side(order: Sequence[int], prompt: Prefill = prefill) -> Tensor:
            return self._runner.losses(prompt.replay_in_one_row, taken(probe, order), target)

        in_rows = self._runner.losses(prefill.replay, probe, target)
        differ = (in_rows - in_rows[0]).abs().max().item() > 10 * _APART
        try:
            packed = side_by_side(order)
            # Every second edit is the same as in ``packed``, with other neighbours.
            moved = side_by_side([index if place % 2 == 0 else 0 for place, index in enumerate(order)])
            halfway = side_by_side(order, prefill.halfway())
        except MtvError:
            raise
        except Exception as error:
            if _is_of_this_package(error):
                raise
            reason = f"{type(error).__name__}: {error}"
        else:
            gap = (packed - in_rows[order]).abs().max().item()
            leak = (packed - moved)[::2].abs().max().item()
            follows_positions = not prefill.last_position.any() or not torch.equal(packed, halfway)
            if within_precision(self._context.model, in_rows, gap) and leak <= _APART and follows_positions and differ:
                return True
            reason = f"losses differ by {gap:.3g} from those in rows, by {leak:.3g} with other neighbours"
            if not follows_positions:
                reason = "the model does not use the positions that it is given"
            elif not differ:
                reason = "no edit of the heads changes a loss, so that nothing can be compared"
        logger.info("edits are replayed in rows on this model, not side by side (%s)", reason)
        return False

    def _is_exact_as_graph(self, prefill: Prefill, probe: Edits, target: list[int]) -> bool:
        """Return whether edits side by side as a CUDA graph give the losses of full forwards on this model."""
        order = [index % _PROBES for index in range(_number_compared(target))]
        many = taken(probe, order)
        if not self._graphs.prepare(prefill, many, target):
            return False
        full = self._runner.losses(prefill.forward, probe, target)[order]
        gap = (self._runner.losses(self._graphs.way(prefill), many, target) - full).abs().max().item()
        if not within_precision(self._context.model, full, gap):
            logger.warning("CUDA graphs differ from full forwards by %.3g on this model: replays run without", gap)
            return False
        return True


def _number_compared(target: Sequence[int]) -> int:
    """Return the number of edits that are compared side by side for a target of this length."""
    return min(_SIDE_BY_SIDE, max(MAX_PACKED // len(target), _PROBES))


def _is_of_this_package(error: BaseException) -> bool:
    """Return whether code of this package raised ``error``, and not the model's code, by the innermost frame."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("lmms_mtv.")
