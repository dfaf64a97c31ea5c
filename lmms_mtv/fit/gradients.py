"""Answers of the model to training queries, and gradients of losses of these answers by learned parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from lmms_mtv.errors import HookError, NumericsError
from lmms_mtv.fit.context import Context, counted, frozen
from lmms_mtv.fit.examples import Episode, Tokens
from lmms_mtv.fit.prefill_cache import PrefillCache
from lmms_mtv.fit.replay import Replayer
from lmms_mtv.hooks import Prefill, applied, checkpointed, record
from lmms_mtv.runtime.batches import single_row
from lmms_mtv.runtime.lru_cache import LruCache
from lmms_mtv.vectors import Edits

P = TypeVar("P")


class Answer(NamedTuple):
    """The model's prediction of a query's target of T tokens.

    Attributes:
        logits: the logits that predict ``target``, float32 [T, vocabulary].
        target: the token ids of the target, int64 [T].
        states: activations of a stream at the positions that predict the target, float32 [T, L, H, D]; None if no
            stream was asked for.
    """

    logits: Tensor
    target: Tensor
    states: Tensor | None = None


class GradientRunner(Generic[P]):
    """A runner of whole single prompts, for gradients.

    ``memory`` is the limit in bytes of the unedited answers that are kept; a session passes half of its own limit.
    """

    def __init__(self, context: Context[P], prefills: PrefillCache[P], replayer: Replayer[P], memory: int) -> None:
        self._context = context
        self._prefills = prefills
        self._replayer = replayer
        self._answers: LruCache[tuple[Episode, Tokens, str | None], Answer] = LruCache(memory)
        self._is_edited = False

    @torch.no_grad()
    @counted
    def answer(self, episode: Episode, tokens: Tokens, stream: str | None) -> Answer:
        """Return the unedited model's answer to a query.

        The answer is computed once, and kept as long as there is room.

        Args:
            episode: the query and its demonstrations.
            tokens: the tokens of the target that the answer has.
            stream: the stream whose activations are the states of the answer; None for no states.

        Raises:
            HookError: an edit is applied now, as in the function that ``loss`` of :meth:`gradients` returns.
        """
        context = self._context
        if self._is_edited:
            raise HookError("the model is edited now: ask for its own answers in loss, before it gives its function")
        cached = self._answers.get((episode, tokens, stream))
        if cached is not None:
            return cached
        with single_row():
            prefill, prompted = self._prefills.prompted(episode)
            target = prompted.counting(tokens)
            run = self._replayer.unedited(prefill, target)
            with ExitStack() as stack:
                tail = len(target)
                recording = stack.enter_context(record(context.sites, stream, tail=tail)) if stream else None
                logits = run(context.model, context.sites, {}, target)[0]
        states = recording.last() if recording else None
        answer = Answer(logits, torch.tensor(target, device=logits.device), states)
        self._answers.put((episode, tokens, stream), answer, sum(t.nbytes for t in answer if t is not None))
        return answer

    @counted
    def gradients(
        self,
        episodes: Sequence[Episode],
        parameters: Sequence[Tensor],
        edits: Callable[[int], Edits],
        loss: Callable[[int], Callable[[Answer], Tensor]],
        tokens: Tokens,
        stream: str | None,
        autocast: bool,
        checkpointing: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the losses of the edited model's answers, and the gradient of the sum of the losses.

        Each prompt runs whole and alone. No weight of the model takes a gradient.

        Args:
            episodes: N queries with their demonstrations.
            parameters: the tensors to differentiate by.
            edits: function of the index of an episode that makes the edits from ``parameters``.
            loss: function of the index of an episode that returns the loss: a function from the :class:`Answer` of the
                edited model to a number. ``loss`` asks for answers of the unedited model before it returns the
                function.
            tokens: the tokens of the target that the answers have.
            stream: the stream whose activations are the states of the answers; None for no states.
            autocast: True computes in bfloat16.
            checkpointing: True keeps only the inputs of blocks. Blocks run again when gradients are computed.

        Returns:
            The losses, float32 [N], and the derivative of their sum by each parameter, float32 in the shape of the
            parameter, all on the CPU.

        Raises:
            NumericsError: a loss or a gradient is NaN or infinite.
            HookError: the model's own code turns gradients off, or the model cannot be checkpointed.
        """
        context = self._context
        rows = torch.zeros(len(episodes), 1 + sum(parameter.numel() for parameter in parameters))
        with context.ranks.raise_together(), single_row():
            for index in context.ranks.shard(range(len(episodes))):
                prefill, prompted = self._prefills.learner(episodes[index])
                target = prompted.counting(tokens)
                loss_of = loss(index)
                with ExitStack() as stack:
                    stack.enter_context(frozen(context.model))
                    if checkpointing:
                        stack.enter_context(checkpointed(context.sites))
                    stack.enter_context(torch.enable_grad())
                    edits_now = edits(index)
                    with torch.no_grad():
                        context.verify(prefill, edits_now)
                    # The edits stay to the end: checkpointed blocks run again, edited, when gradients are computed.
                    stack.enter_context(self._edited(edits_now, len(target)))
                    value = loss_of(self._answered(prefill, target, stream, autocast))
                    if not value.requires_grad:
                        raise HookError("the code of this model turns gradients off: nothing can be learned from it")
                    if not value.isfinite():
                        raise NumericsError("a loss is NaN or infinite: use dtype=float32 or bfloat16")
                    slopes = torch.autograd.grad(value, parameters, materialize_grads=True, allow_unused=True)
                rows[index] = torch.cat([part.detach().float().flatten().cpu() for part in (value, *slopes)])
        # The sum goes in the order of the episodes, so that the split among the processes does not matter.
        rows = context.ranks.all_reduce(rows)
        if not rows.isfinite().all():
            raise NumericsError("a gradient is NaN or infinite: use dtype=float32 or bfloat16, or a smaller lr")
        parts = torch.split(rows[:, 1:].sum(0), [parameter.numel() for parameter in parameters])
        return rows[:, 0], [part.view(like.shape) for part, like in zip(parts, parameters, strict=True)]

    @contextmanager
    def _edited(self, edits: Edits, tail: int) -> Iterator[None]:
        with applied(self._context.sites, edits, tail=tail):
            self._is_edited = True
            try:
                yield
            finally:
                self._is_edited = False

    def _answered(self, prefill: Prefill, target: list[int], stream: str | None, autocast: bool) -> Answer:
        """Return the model's answer with gradients, under the edits that are applied now."""
        context = self._context
        inputs = prefill.whole(context.model, target)
        device = inputs["input_ids"].device
        with ExitStack() as stack:
            recording = None
            if stream is not None:
                recording = stack.enter_context(record(context.sites, stream, tail=len(target), attached=True))
            if autocast:
                stack.enter_context(torch.autocast(device.type, torch.bfloat16))
            logits = context.model(**inputs).logits[0, -len(target) :].float()
        return Answer(logits, torch.tensor(target, device=logits.device), recording.last() if recording else None)
