"""Learning of edits by gradients through the frozen model, from its answers after demonstrations or from targets."""

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
    """A query of one epoch.

    Attributes:
        epoch: the number of the epoch.
        number: the number of the query in the epoch.
        episode: the query and its demonstrations.
    """

    epoch: int
    number: int
    episode: Episode

    @property
    def asked(self) -> Episode:
        """Name of ``episode`` in version 0.1."""
        return self.episode


T = TypeVar("T")

Make = Callable[[TrainingQuery | None], Edits]
"""Function that returns the edits so far: for a training query, which may seed noise, or (None) for the vector."""

Loss = Callable[[TrainingQuery], Callable[[Answer], Tensor]]
"""Function of a training query that returns the loss, a function of the edited model's answer."""


@dataclass(frozen=True)
class Schedule:
    """Settings of learning that several methods share: the queries, and the steps of the optimiser.

    ``examples`` training queries are learned from, ``epochs`` times in a new order. ``accumulation`` queries make one
    step of AdamW with weight decay ``weight_decay``. The learning rates rise over the share ``warmup`` of the steps and
    fall with a cosine afterwards. ``loss`` says which tokens of the target count: the mean over ``all`` tokens, or the
    ``first`` token alone. The loss with and without the edit is measured on ``judges`` further training queries.
    ``autocast`` computes in bfloat16 where gradients flow. ``checkpointing`` saves memory and takes more time.
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
    """A schedule of distillation: the model without demonstrations learns its own answers after demonstrations.

    Besides the settings of the schedule, prompts of ``fit_shots`` demonstrations teach. Each query has ``teachers``
    such prompts, each with other demonstrations. The teachers take turns from epoch to epoch, so that a query is
    learned from more demonstrations than one prompt holds.
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
    """A distillation into vectors that are added, each times a learned weight.

    Besides the settings of the distillation, ``vector_lr`` and ``weight_lr`` are the learning rates of vectors and
    weights. Vectors begin as Gaussian noise of standard deviation ``spread``. Weights begin at ``initial_weight``.
    ``supervision`` is the weight of the target's cross-entropy in the loss.
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
    """Learn ``parameters`` in place, and measure the loss with and without the edits.

    Args:
        session: the fit.
        schedule: the queries and the steps.
        parameters: groups of float32 tensors on the CPU, each group with its learning rate.
        edits: makes the edits from the parameters.
        loss: makes the loss of an answer.
        stream: the stream whose activations ``loss`` needs, or None.

    Returns:
        The edits to keep, without gradients, and losses by name: ``learning``, the mean of each step; ``unedited`` and
        ``chosen``, the cross-entropy of further training queries without and with the edits.

    Raises:
        ArgumentError: a learning rate is not positive.
    """
    if (lowest := min(rate for rate, _ in parameters)) <= 0:
        raise ArgumentError(f"a learning rate of {lowest}, expected above 0")
    queries = session.episodes(schedule.examples, session.shots, "learning")
    judges = session.episodes(schedule.judges, session.shots, "judging", unlike=queries)
    with session.stage("judging"):
        # This comes first, since it also settles whether answers can be replayed.
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
    """Change the parameters in place, and return the mean loss of each step."""
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
    """Return the result of ``make`` for the training query with an index."""
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
    """Return the unedited model's answer to the query after demonstrations.

    Args:
        session: the fit.
        settings: the settings of the teaching prompts.
        example: the training query; its epoch chooses the teacher.
        stream: the stream whose activations are the states of the answer; None for no states.
    """
    query, teacher = example.episode.query, example.epoch % settings.teachers
    (shown,) = session.with_other_demonstrations([example.episode], settings.fit_shots, f"teacher {teacher} of {query}")
    return session.answer(shown, settings.loss, stream)


def mean_activation_norm(session: FitSession[Any], stream: str) -> Tensor:
    """Return the root mean square of a stream's numbers at the last token of 8 training queries.

    A parameter in this unit can have the same learning rate in all models and layers.

    Args:
        session: the fit.
        stream: the stream to measure.

    Returns:
        float32 [L, 1, 1], on the CPU.
    """
    queries = session.episodes(8, session.shots, "typical")
    before, _ = session.answered_activations(queries, stream)
    return before.square().mean((0, 2, 3)).sqrt().view(-1, 1, 1)


def pace(example: int, steps: int, warmup: float) -> float:
    """Return the factor of the learning rate at a step.

    The factor rises linearly over the share ``warmup`` of the ``steps``, and then falls with a cosine.

    Args:
        example: the number of the step, from 0.
        steps: the number of all steps.
        warmup: the share of the steps with a rising factor.
    """
    rising = warmup * steps
    if example < rising:
        return (example + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (example - rising) / max(steps - rising, 1)))


def divergence(answer: Answer, teacher: Answer) -> Tensor:
    """Return KL(teacher || answer) of the next tokens, the mean over the tokens of the target.

    Args:
        answer: the answer of the edited model.
        teacher: the answer of the unedited model after demonstrations.

    Raises:
        DataError: the two answers have different targets.
    """
    comparable(answer, teacher)
    predicted, expected = (each.logits.log_softmax(-1) for each in (answer, teacher))
    return functional.kl_div(predicted, expected, log_target=True, reduction="batchmean")


def comparable(answer: Answer, teacher: Answer) -> None:
    """Check that two answers have the same target.

    Args:
        answer: the answer of the edited model.
        teacher: the answer of the unedited model after demonstrations.

    Raises:
        DataError: the two answers have different targets.
    """
    if not torch.equal(answer.target, teacher.target):
        raise DataError(
            f"a target is of tokens {answer.target.tolist()}, and after demonstrations of {teacher.target.tolist()}: "
            "what comes of one cannot be learned from the other"
        )


def cross_entropy(answer: Answer) -> Tensor:
    """Return the cross-entropy of the target, the mean over the tokens."""
    return functional.cross_entropy(answer.logits, answer.target)
