"""A fit with its card: the method, the trial of the vector, and a line that sums it up."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from lmms_mtv.fit.examples import Episode, Examples
from lmms_mtv.fit.session import FitSession
from lmms_mtv.hooks.fingerprint import fingerprint
from lmms_mtv.methods import Method
from lmms_mtv.models.trial import AnsweringRunner, doubts, run_trial
from lmms_mtv.runtime.environment import versions
from lmms_mtv.runtime.memory import peak
from lmms_mtv.vectors import TaskVector, VectorCard

P = TypeVar("P")
P_contra = TypeVar("P_contra", contravariant=True)


class DescribedRunner(AnsweringRunner[P_contra], Protocol[P_contra]):
    """A runner that says what its results depend on."""

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The settings that differ from the default and change what the model computes from the same text."""
        ...

    def text_parts(self, prompt: P_contra) -> list[str]:
        """Return the whole text of a prompt with its target, in parts."""
        ...


@dataclass(frozen=True)
class FittedVector:
    """A fitted vector.

    Attributes:
        vector: the vector.
        remarks: a line for each repeated use of training examples, see :attr:`FitSession.remarks`.
        warnings: a line for each reason to doubt the vector.
        summary: a line about the fit.
    """

    vector: TaskVector
    remarks: Sequence[str]
    warnings: Sequence[str]
    summary: str


def fit_with_card(
    session: FitSession[P],
    method: Method,
    config: Any,
    recipe: VectorCard,
    runner: DescribedRunner[P],
    examples: Examples[P],
    *,
    device: torch.device,
    stops: Sequence[str] = (),
) -> FittedVector:
    """Fit a vector, try it on some training queries, and write its card.

    Args:
        session: the session of the fit.
        method: the method that fits.
        config: the settings of the method.
        recipe: the card before the fit.
        runner: the model.
        examples: the training examples.
        device: the device whose memory is measured.
        stops: texts that end an answer.
    """
    began = time.perf_counter()
    with peak(device) as memory:
        fitted = method.fit(session, config)
    card = dataclasses.replace(
        recipe,
        versions=versions(),
        # More digits would be noise, and would be most of the file.
        losses={name: [float(f"{loss:.6g}") for loss in losses] for name, losses in fitted.losses.items()},
        seconds=time.perf_counter() - began,
        stages={name: round(seconds, 3) for name, seconds in session.stages.items()},
        memory=memory.bytes,
        replay=session.replay,
        used=session.used,
        weights=fingerprint(session.sites),
        prompt_text=tuple(example_text(runner, examples)) if method.settings() else (),
    )
    trial = run_trial(session, runner, session.sites, examples, fitted.edits, stops)
    vector = TaskVector(dict(fitted.edits), dataclasses.replace(card, accuracy=trial.accuracy))
    warnings = doubts(trial, vector.card, method.control)
    return FittedVector(vector, session.remarks, warnings, summary(vector, session.forwards))


def prompt_digest(runner: DescribedRunner[P], examples: Examples[P]) -> str:
    """Return the SHA-256 of one prompt with its target, which changes with everything that shapes a prompt."""
    example = _example(examples)
    parts: list[Any] = list(runner.text_parts(example))
    if recipe := dict(runner.recipe):
        parts.append(recipe)
    if lead := runner.lead_ids(example):
        # loss=first once ended at the leading blanks: its older vectors differ.
        parts.append({"lead": lead})
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def example_text(runner: DescribedRunner[P], examples: Examples[P]) -> list[str]:
    """Return the text of one prompt with its target, in the parts of :meth:`DescribedRunner.text_parts`."""
    return runner.text_parts(_example(examples))


def _example(examples: Examples[P]) -> P:
    """Return the prompt of the first example, after the second as a demonstration if there is one."""
    return examples.prompt(Episode(0, (1,) if len(examples) > 1 else ()))


def summary(vector: TaskVector, forwards: int) -> str:
    """Return a line about a fit that took ``forwards`` forwards."""
    card = vector.card
    replay = "" if card.replay is None else f" (edits: {card.replay})"
    return (
        f"fitted {card.method} for {card.task} in {card.seconds:.1f} s: vector {vector.id}, {vector.described()}"
        f"{reached(vector)}, {forwards} forwards{replay}"
    )


def reached(vector: TaskVector) -> str:
    """Return what a fit reached on training queries: the loss and the right answers, without and with the vector."""
    losses: Mapping[str, Sequence[float]] = vector.card.losses
    text = ""
    if "chosen" in losses:
        before, after = losses["unedited"][0], losses["chosen"][0]
        text = f", loss {before:.3f} -> {after:.3f} (without edit -> with it, on training queries)"
    if tried := vector.card.accuracy:
        text += f", right answers {tried['unedited']:.0%} -> {tried['edited']:.0%} of {tried['queries']:.0f}"
    return text
