"""Learning edits from gradients through the frozen model: from how it answers after demonstrations, or from targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from lmms_mtv.errors import ArgumentError, DataError
from lmms_mtv.fit.examples import Episode, Tokens
from lmms_mtv.fit.gradients import Answer
from lmms_mtv.fit.session import FitSession
from lmms_mtv.runtime.settings import setting
from lmms_mtv.vectors import Edits


class TrainingQuery(NamedTuple):
    """One query of one epoch, counted within it."""

    epoch: int
    number: int
    episode: Episode

    @property
    def asked(self) -> Episode:
        """The name of ``episode`` in version 0.1."""
        return self.episode


T = TypeVar("T")

Make = Callable[[TrainingQuery | None], Edits]
"""Returns the edits learned so far: for a training query, which may seed noise, or (None) for the vector."""

Loss = Callable[[TrainingQuery], Callable[[Answer], Tensor]]
"""Returns, for a training query, the loss of what the edited model answers."""


@dataclass(frozen=True)
class Schedule:
    """What there is to learn from, and how often it is gone through: settings that several methods share.

    ``examples`` training queries are learned from, ``epochs`` times in a new order. ``accumulation`` of them make one
    step of AdamW (weight decay ``weight_decay``), whose learning rates rise over the share ``warmup`` of the steps and
    fall with a cosine. A ``loss`` is of ``all`` tokens of the target, their mean, or of the ``first`` alone. ``judges``
    further training queries tell the loss with and without the edit. ``autocast`` computes in bfloat16 what gradients
    go through, ``checkpointing`` saves memory for more time.
    """

    examples: int = setting(100, "training queries that are learned from")
    epochs: int = setting(10, "times that each query is learned from, in a new order")
    accumulation: int = setting(4, "queries in one step of AdamW")
    weight_decay: float = setting(1e-3, "weight decay of AdamW")
    warmup: float = setting(
        0.1, "share of the steps over which learning rates rise; they fall with a cosine afterwards"
    )
    loss: Tokens = setting("all", "tokens of the answer that count: `first`, or the mean over `all`")
    judges: int = setting(32, "further training queries whose loss is told with and without the edit")
    autocast: bool = setting(False, "compute in bfloat16 what gradients go through")
    checkpointing: bool = setting(False, "save memory for more time: blocks run again when gradients are computed")

    def __post_init__(self) -> None:
        for name in ("examples", "epochs", "accumulation", "judges"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}={getattr(self, name)}, expected at least 1")
        if self.weight_decay < 0 or not 0 <= self.warmup < 1:
            raise ArgumentError(
                f"weight_decay={self.weight_decay}, warmup={self.warmup}: expected at least 0, and within [0, 1)"
            )


@dataclass(frozen=True)
class Distillation(Schedule):
    """A schedule whose queries are also shown to the model after demonstrations, to learn what it makes of them then.

    Besides the settings of the schedule: prompts of ``fit_shots`` demonstrations teach. Each query has ``teachers`` of
    them, with demonstrations of their own, which take turns from epoch to epoch: so more can be learned from than one
    prompt holds.
    """

    fit_shots: int = setting(16, "demonstrations in each prompt that teaches")
    teachers: int = setting(
        1, "prompts that teach a query, with other demonstrations each; they take turns from epoch to epoch"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fit_shots < 0 or self.teachers < 1:
            raise ArgumentError(f"fit_shots={self.fit_shots}, teachers={self.teachers}: expected at least 0 and 1")


@dataclass(frozen=True)
class Weighted(Distillation):
    """A distillation into vectors that are added, each times a weight of its own.

    Besides its settings: ``vector_lr`` and ``weight_lr`` are the learning rates of vectors and weights; vectors begin
    as Gaussian noise of standard deviation ``spread``, weights at ``initial_weight``. ``supervision`` is the weight of
    the target's cross-entropy beside what is learned from demonstrations.
    """

    vector_lr: float = setting(0.03, "learning rate of the vectors")
    weight_lr: float = setting(0.03, "learning rate of the weights")
    spread: float = setting(0.01, "standard deviation of the noise that vectors begin as")
    initial_weight: float = setting(0.1, "first value of the weights")
    supervision: float = setting(0.5, "weight of the target's cross-entropy beside what demonstrations teach")


def learn(
    session: FitSession[Any],
    schedule: Schedule,
    parameters: Sequence[tuple[float, Sequence[Tensor]]],
    edits: Make,
    loss: Loss,
    *,
    stream: str | None = None,
) -> tuple[Edits, dict[str, list[float]]]:
    """Learn ``parameters``, groups of float32 tensors on the CPU with their learning rates, in place.

    Returns the edits to keep, without gradients, and losses by name: ``learning``, the mean of each step; ``unedited``
    and ``chosen``, the cross-entropy of further training queries without and with the edits. ``stream`` is one whose
    activations ``loss`` needs.

    Raises :class:`ArgumentError` for a learning rate that is not positive.
    """
    if (lowest := min(rate for rate, _ in parameters)) <= 0:
        raise ArgumentError(f"a learning rate of {lowest}, expected above 0")
    queries = session.episodes(schedule.examples, session.shots, "learning")
    judges = session.episodes(schedule.judges, session.shots, "judging", unlike=queries)
    with session.stage("judging"):
        # First, since it also settles whether answers can be replayed.
        unedited = session.mean_losses(judges, {}, schedule.loss, "Without the edit")
    with session.stage("learning"):
        history = _learned(session, schedule, queries, parameters, edits, loss, stream)
    learned = edits(None)
    with session.stage("judging"):
        chosen = session.mean_losses(judges, learned, schedule.loss, "With the edit")
    return learned, {"learning": history, "unedited": unedited.tolist(), "chosen": chosen.tolist()}


def _learned(
    session: FitSession[Any],
    schedule: Schedule,
    queries: Sequence[Episode],
    parameters: Sequence[tuple[float, Sequence[Tensor]]],
    edits: Make,
    loss: Loss,
    stream: str | None,
) -> list[float]:
    """Return the mean loss of each step that changes the parameters."""
    learned = [tensor.requires_grad_() for _, tensors in parameters for tensor in tensors]
    groups: list[dict[str, Any]] = [{"params": list(tensors), "lr": rate} for rate, tensors in parameters]
    optimizer = torch.optim.AdamW(groups, weight_decay=schedule.weight_decay)
    steps = _steps(session, schedule, queries)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda example: pace(example, len(steps), schedule.warmup))
    history = []
    for batch in session.bar(steps, "Learning"):
        losses, gradients = session.gradients(
            [example.episode for example in batch],
            learned,
            partial(_of, edits, batch),
            partial(_of, loss, batch),
            tokens=schedule.loss,
            stream=stream,
            autocast=schedule.autocast,
            checkpointing=schedule.checkpointing,
        )
        for tensor, gradient in zip(learned, gradients, strict=True):
            tensor.grad = gradient / len(batch)
        optimizer.step()
        scheduler.step()
        history.append(losses.mean().item())
    for tensor in learned:
        tensor.requires_grad_(False)
    return history


def _of(make: Callable[[TrainingQuery], T], batch: Sequence[TrainingQuery], index: int) -> T:
    """Return ``make`` of the training query with an index."""
    return make(batch[index])


def _steps(session: FitSession[Any], schedule: Schedule, queries: Sequence[Episode]) -> list[list[TrainingQuery]]:
    """Return the queries of each step."""
    order, steps = session.random("order"), []
    for epoch in range(schedule.epochs):
        batch = [
            TrainingQuery(epoch, number, episode) for number, episode in enumerate(order.sample(queries, len(queries)))
        ]
        size = schedule.accumulation
        steps += [batch[begin : begin + size] for begin in range(0, len(batch), size)]
    return steps


def teacher_answer(
    session: FitSession[Any], settings: Distillation, example: TrainingQuery, stream: str | None = None
) -> Answer:
    """Return what the unedited model makes of the query after demonstrations, with the activations of a ``stream``."""
    query, teacher = example.episode.query, example.epoch % settings.teachers
    (shown,) = session.with_other_demonstrations([example.episode], settings.fit_shots, f"teacher {teacher} of {query}")
    return session.answer(shown, settings.loss, stream)


def mean_activation_norm(session: FitSession[Any], stream: str) -> Tensor:
    """Return the root mean square of a stream's numbers at the last token of a few training queries, float32 [L, 1, 1].

    What is learned in this unit can have the same learning rate in all models and layers.
    """
    queries = session.episodes(8, session.shots, "typical")
    before, _ = session.answered_activations(queries, stream)
    return before.square().mean((0, 2, 3)).sqrt().view(-1, 1, 1)


def pace(example: int, steps: int, warmup: float) -> float:
    """Return the share of the learning rate at a step: a line up over ``warmup`` of the ``steps``, then a cosine."""
    rising = warmup * steps
    if example < rising:
        return (example + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (example - rising) / max(steps - rising, 1)))


def divergence(answer: Answer, teacher: Answer) -> Tensor:
    """Return KL(teacher || answer) of the next tokens, the mean over the tokens of the target.

    Raises :class:`DataError` if the two are of different targets.
    """
    comparable(answer, teacher)
    predicted, expected = (each.logits.log_softmax(-1) for each in (answer, teacher))
    return functional.kl_div(predicted, expected, log_target=True, reduction="batchmean")


def comparable(answer: Answer, teacher: Answer) -> None:
    """Raise :class:`DataError` unless both answers are of the same tokens."""
    if not torch.equal(answer.target, teacher.target):
        raise DataError(
            f"a target is of tokens {answer.target.tolist()}, and after demonstrations of {teacher.target.tolist()}: "
            "what comes of one cannot be learned from the other"
        )


def cross_entropy(answer: Answer) -> Tensor:
    """Return the cross-entropy of the target, the mean over its tokens."""
    return functional.cross_entropy(answer.logits, answer.target)
