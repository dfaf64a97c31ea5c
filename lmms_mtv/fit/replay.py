"""Losses of edits, by replaying the last token of a prompt wherever that is exact.

Each kind of edit is calibrated once for prompts of about one length: a probe, made of the prompt's own activations, is
run by full forwards, from the cache in rows, and from the cache side by side. So what is found does not depend on the
edits that are asked for first, nor on the order of calls.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Final, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lmms_mtv.errors import HookError, MtvError, NumericsError
from lmms_mtv.fit.context import Context, frozen
from lmms_mtv.fit.examples import Episode, Tokens
from lmms_mtv.fit.prefill_cache import PrefillCache
from lmms_mtv.hooks import Prefill, Sites, record
from lmms_mtv.runtime.batches import BatchSize, single_row
from lmms_mtv.vectors import Edit, Edits, by_stream, distinct, rows_of, taken

logger = logging.getLogger(__name__)

P = TypeVar("P")

Replay = Literal["side by side", "rows", "full forwards"]
"""How the losses of several edits are computed, from the fastest way to the slowest."""

Run = Callable[[nn.Module, Sites, Edits, Sequence[int]], Tensor]
"""How a prompt is run with edits: from its cache or whole."""

_PROBES: Final = 4
"""Edits of which a probe consists."""

_SIDE_BY_SIDE: Final = 32
"""How many edits, those over and over, are compared side by side."""

_PACKED: Final = 1024
"""Positions side by side at most: the attention mask grows with the square."""

_APART: Final = 1e-4
"""How much a loss may change with the edits beside it, which count for exactly nothing where they are not seen."""


class Kind(NamedTuple):
    """Edits and prompts that share a calibration.

    ``streams`` are the edited streams, each with its flags; ``length`` is the number of binary digits of the prompt's
    length in tokens.
    """

    streams: tuple[tuple[str, bool, bool, bool], ...]
    length: int

    @classmethod
    def of(cls, edits: Edits, prefill: Prefill) -> Kind:
        """Return the kind of ``edits`` of a prompt."""
        streams = ((name, edit.once, edit.renormed, edit.gate is not None) for name, edit in sorted(edits.items()))
        return cls(tuple(streams), prefill.length.bit_length())


class Replayer(Generic[P]):
    """Runs the prompts of a fit with edits, each kind of edit in the fastest way that is exact.

    ``memory`` is how many bytes the copies of one prompt's cache may take in a replay. ``way`` is one to take without
    finding out, for comparisons; None finds out.
    """

    def __init__(self, context: Context[P], prefills: PrefillCache[P], memory: int, way: Replay | None) -> None:
        self._context = context
        self._prefills = prefills
        self._memory = memory
        self._way = way
        # Fewer rows in a replay change nothing but the time it takes.
        self._rows = BatchSize(sys.maxsize, automatic=True)
        self._exact: dict[Kind, bool] = {}
        self._packs: dict[Kind, bool] = {}
        self._unedited: dict[Kind, bool] = {}
        self._lacks_cache = False

    @property
    def replays(self) -> bool | None:
        """Whether losses come from replays, but for single prompts without a cache; None before the first loss."""
        if not self._exact:
            return False if self._lacks_cache else None
        return all(self._exact.values())

    @property
    def way(self) -> Replay | None:
        """The slowest of the ways that were found; None before the first loss."""
        if self.replays is None:
            return None
        if not self.replays:
            return "full forwards"
        edited = [packs for kind, packs in self._packs.items() if kind.streams]
        return "side by side" if edited and all(edited) else "rows"

    def lean(self, prefill: Prefill) -> bool:
        """Return whether a prompt needs no more than what its replays need."""
        length = Kind.of({}, prefill).length
        decided = any(kind.length == length for kind in self._exact)
        return decided and bool(self.replays) and prefill.cache is not None

    @torch.no_grad()
    def losses(self, episode: Episode, edit: Edit | Edits, tokens: Tokens) -> Tensor:
        """Return the loss of each of K edits; see :meth:`FitSession.losses`."""
        context, edits, alike = self._context, by_stream(edit), None
        if rows_of(edits) is not None:
            edits, alike = distinct(edits)
        whole = any(each.everywhere for each in edits.values())
        prefill, target = self._ready(episode, edits, tokens, whole)
        # Of all edits, so that how they run does not depend on how many ranks there are.
        way, rows = self._run(prefill, edits, target, whole), rows_of(edits)
        if rows is None:
            return self._of_rows(prefill, edits, target, *way).cpu()
        losses = torch.zeros(rows)
        with context.ranks.raise_together():
            if rows > context.ranks.rank:
                own = taken(edits, context.ranks.shard_slice)
                losses[context.ranks.shard_slice] = self._of_rows(prefill, own, target, *way).cpu()
        return context.ranks.all_reduce(losses)[alike]

    def loss_gradient(self, episode: Episode, value: Tensor, mask: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return losses and their derivatives with respect to masks; see :meth:`FitSession.loss_gradient`."""
        context, mask = self._context, mask.detach()
        edits = by_stream(Edit.replace(value, mask))
        with torch.no_grad():
            prefill, target = self._ready(episode, edits, tokens, whole=False)
        way = self._run(prefill, edits, target, learning=True)
        losses, gradient = torch.zeros(len(mask)), torch.zeros(mask.shape)
        with context.ranks.raise_together():
            if own := range(len(mask))[context.ranks.shard_slice]:
                losses[own], gradient[own] = self._gradient_of_rows(value, mask[own], target, *way)
        return context.ranks.all_reduce(losses), context.ranks.all_reduce(gradient)

    def unedited(self, prefill: Prefill, target: list[int]) -> Run:
        """Return how a whole prompt runs without edits: from its cache where that is found to be exact.

        Each process finds out for itself, since others may be at another prompt.
        """
        if prefill.cache is None or self._way == "full forwards":
            return prefill.forward
        kind = Kind.of({}, prefill)
        if kind not in self._unedited:
            self._unedited[kind] = self._way is not None or self._is_exact(prefill, {}, target)
        return prefill.replay if self._unedited[kind] else prefill.forward

    def _ready(self, episode: Episode, edits: Edits, tokens: Tokens, whole: bool) -> tuple[Prefill, list[int]]:
        """Return the prefill of ``episode`` and the tokens that count, calibrated for ``edits``."""
        context = self._context
        with context.ranks.raise_together(), single_row():
            lean = None if whole or not context.verified.issuperset(edits) else self.lean
            prefill, prompted = self._prefills.get(episode, lean)
            target = prompted.counting(tokens)
            if prefill.tokens_only and not whole and not self._is_settled(prefill, edits, target):
                prefill, _ = self._prefills.get(episode, lean=None)
            context.verify(prefill, edits)
        if not whole:
            self._calibrate(prefill, edits, target)
        return prefill, target

    def _is_settled(self, prefill: Prefill, edits: Edits, target: list[int]) -> bool:
        """Return whether there is nothing to find out about how these edits of this prompt run."""
        kind = Kind.of(edits, prefill)
        if prefill.cache is None:
            return self._lacks_cache
        if kind not in self._exact:
            return False
        return not self._exact[kind] or kind in self._packs or not self._may_pack(prefill, edits, target)

    def _may_pack(self, prefill: Prefill, edits: Edits, target: list[int]) -> bool:
        """Return whether as many edits as are compared side by side may stand in one row of this prompt."""
        return bool(edits) and prefill.fits_one_row(self._context.model, edits, target, _compared(target))

    def _replayed(self, prefill: Prefill, edits: Edits) -> bool:
        return self._exact.get(Kind.of(edits, prefill), False) and prefill.cache is not None

    def _calibrate(self, prefill: Prefill, edits: Edits, target: list[int]) -> None:
        """Find out, once for a :class:`Kind`, how edits like these run exactly. The prompt is whole if it is new."""
        if self._is_settled(prefill, edits, target):
            return
        if prefill.cache is None:
            self._lacks_cache = True
            logger.warning("a prompt's cache cannot be replayed: its losses come from full forwards, more slowly")
            return
        kind = Kind.of(edits, prefill)
        if self._way is not None:
            self._exact[kind] = self._way != "full forwards"
            self._packs[kind] = self._way == "side by side"
            return
        with self._context.ranks.raise_together(), single_row(), torch.no_grad():
            probe = self._probe(prefill, edits)
        if kind not in self._exact:
            self._exact[kind] = self._agreed(lambda: self._is_exact(prefill, probe, target))
        if self._exact[kind] and self._may_pack(prefill, edits, target):
            self._packs[kind] = self._agreed(lambda: self._is_exact_side_by_side(prefill, probe, target))

    def _agreed(self, holds: Callable[[], bool]) -> bool:
        """Return whether every process finds that it ``holds``."""
        with self._context.ranks.raise_together(), single_row(), torch.no_grad():
            own = holds()
        return self._context.on_all_ranks(own)

    def _probe(self, prefill: Prefill, edits: Edits) -> Edits:
        """Return edits like ``edits`` that put other places' activations of this prompt into some of the places."""
        generator, probe = torch.Generator().manual_seed(0), {}
        for name, like in edits.items():
            with record(self._context.sites, name) as recording:
                # One token that would follow: what it is does not count.
                prefill.forward(self._context.model, self._context.sites, {}, [0])
            self._context.forwards += 1
            own = recording.last()[0].float().cpu()
            mask = (torch.rand(_PROBES, *own.shape[:2], generator=generator) < 0.5).float()
            mask[1] = 1 - mask[0]
            other = own.flatten(0, 1).roll(1, 0).view_as(own)
            gate = like.gate if like.gate is None or like.gate.dim() == 3 else like.gate[0]
            probe[name] = Edit(other, 1 - mask, mask, once=like.once, renormed=like.renormed, gate=gate)
        return probe

    def _is_exact(self, prefill: Prefill, probe: Edits, target: list[int]) -> bool:
        """Return whether replays equal full forwards on this model."""
        full = torch.cat(self._in_batches(prefill.forward, probe, target))
        replayed = torch.cat(self._in_batches(prefill.replay, probe, target))
        gap = (full - replayed).abs().max().item()
        if not self._near(full, gap):
            logger.warning(
                "replays differ from full forwards by %.3g on this model: losses come from full forwards, more slowly",
                gap,
            )
            return False
        return True

    def _is_exact_side_by_side(self, prefill: Prefill, probe: Edits, target: list[int]) -> bool:
        """Return whether edits side by side in one row give the losses of rows of their own on this model."""
        model, sites = self._context.model, self._context.sites
        order = [index % _PROBES for index in range(_compared(target))]

        def side_by_side(of: Sequence[int], prompt: Prefill = prefill) -> Tensor:
            return cross_entropy(prompt.replay_in_one_row(model, sites, taken(probe, of), target), target)

        own = torch.cat(self._in_batches(prefill.replay, probe, target))
        differ = (own - own[0]).abs().max().item() > 10 * _APART
        try:
            packed = side_by_side(order)
            # Every other one with the same neighbours on both sides, and with others.
            moved = side_by_side([index if place % 2 == 0 else 0 for place, index in enumerate(order)])
            halfway = side_by_side(order, prefill.halfway())
        except MtvError:
            raise
        except Exception as error:
            if _is_ours(error):
                raise
            reason = f"{type(error).__name__}: {error}"
        else:
            gap = (packed - own[order]).abs().max().item()
            seen = (packed - moved)[::2].abs().max().item()
            placed = not prefill.last_position.any() or not torch.equal(packed, halfway)
            if self._near(own, gap) and seen <= _APART and placed and differ:
                return True
            reason = f"losses differ by {gap:.3g} from rows of their own, by {seen:.3g} with other edits beside"
            if not placed:
                reason = "it does not go by the positions that it is given"
            elif not differ:
                reason = "what is put into the heads changes no loss, so that nothing can be told"
        logger.info("edits are replayed in rows of their own on this model, not side by side (%s)", reason)
        return False

    def _run(
        self, prefill: Prefill, edits: Edits, target: list[int], whole: bool = False, learning: bool = False
    ) -> tuple[Run, int]:
        """Return how a prompt is run with edits, and with how many of them at most; ``learning`` keeps gradients."""
        if whole or not self._replayed(prefill, edits):
            # With gradients, whole prompts keep all that they computed.
            return prefill.forward, 1 if learning else sys.maxsize
        rows = rows_of(edits) or 1
        # With gradients, keys are kept for each query head, which are eight for a key in many models.
        fits = rows * len(target) <= _PACKED and (not learning or 8 * prefill.bytes <= self._memory)
        settled = self._packs.get(Kind.of(edits, prefill), False)
        if settled and fits and rows > 1 and prefill.fits_one_row(self._context.model, edits, target):
            return prefill.replay_in_one_row, sys.maxsize
        # A replay copies the cache for each of its rows; with gradients, at the worst, these are as large.
        return prefill.replay, self._memory // max(prefill.bytes * (2 if learning else 1), 1)

    def _of_rows(self, prefill: Prefill, edits: Edits, target: list[int], run: Run, limit: int) -> Tensor:
        context = self._context
        try:
            parts = self._in_batches(run, edits, target, limit)
            context.forwards += len(parts)
            return _finite(torch.cat(parts))
        except NumericsError:
            # Once more, one by one, to name the layer if it is one.
            again = prefill.forward if run == prefill.forward else prefill.replay
            with record(context.sites) as recording:
                for row in range(rows_of(edits) or 1):
                    again(context.model, context.sites, taken(edits, row), target)
            recording.last()
            raise

    def _in_batches(self, run: Run, edits: Edits, target: list[int], limit: int = sys.maxsize) -> list[Tensor]:
        """Return the losses of ``edits``, as many rows at a time as the memory takes."""

        def of_rows(rows: Sequence[int]) -> Tensor:
            part = taken(edits, slice(rows[0], rows[-1] + 1))
            return cross_entropy(run(self._context.model, self._context.sites, part, target), target)

        return [losses for _, losses in self._rows.run_batches(range(rows_of(edits) or 1), of_rows, limit)]

    def _gradient_of_rows(
        self, value: Tensor, mask: Tensor, target: list[int], run: Run, limit: int
    ) -> tuple[Tensor, Tensor]:
        model, sites = self._context.model, self._context.sites

        def of_rows(rows: Sequence[int]) -> tuple[Tensor, Tensor]:
            part = mask[rows[0] : rows[-1] + 1].clone().requires_grad_()
            with torch.enable_grad(), frozen(model):
                logits = run(model, sites, by_stream(Edit.replace(value, part)), target)
                losses = _finite(cross_entropy(logits, target))
                if not losses.requires_grad:
                    raise HookError(
                        "the code of this model turns gradients off: use a method without gradients, such as method=mtv"
                    )
                (gradient,) = torch.autograd.grad(losses.sum(), part)
            return losses.detach().cpu(), gradient

        parts = [part for _, part in self._rows.run_batches(range(len(mask)), of_rows, limit)]
        self._context.forwards += len(parts)
        losses, gradients = zip(*parts, strict=True)
        return torch.cat(losses), torch.cat(gradients)

    def _near(self, losses: Tensor, gap: float) -> bool:
        """Return whether losses that differ from ``losses`` by ``gap`` are the same but for the model's precision."""
        parameter = next(self._context.model.parameters())
        tolerance = 1e-3 if parameter.dtype == torch.float32 else 5e-2
        return gap <= tolerance * (1 + losses.abs().max().item())


def _compared(target: Sequence[int]) -> int:
    """Return how many edits are compared side by side for a target of this length."""
    return min(_SIDE_BY_SIDE, max(_PACKED // len(target), _PROBES))


def cross_entropy(logits: Tensor, target: Sequence[int]) -> Tensor:
    """Return the mean cross-entropy of the T tokens of ``target`` under ``logits`` [K, T, V], float32 [K]."""
    expected = torch.tensor(target, device=logits.device).repeat(logits.shape[0])
    # Over the last dimension, which lies together: on a CPU ten times as fast as over another.
    losses = functional.cross_entropy(logits.flatten(0, 1), expected, reduction="none")
    return losses.view(logits.shape[:2]).mean(1)


def _finite(losses: Tensor) -> Tensor:
    if not losses.isfinite().all():
        raise NumericsError("NaN or infinity in the logits of an edited forward: use dtype=float32 or bfloat16")
    return losses


def _is_ours(error: BaseException) -> bool:
    """Return whether code of this package raised ``error``, and not the model's: the innermost frame tells."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("lmms_mtv.")
