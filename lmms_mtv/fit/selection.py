"""Selection of the heads whose mean activations are inserted: settings and steps that several methods share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from lmms_mtv.errors import ArgumentError
from lmms_mtv.fit import facility_location
from lmms_mtv.fit.examples import Episode, Tokens
from lmms_mtv.fit.policy import EDGE, Policy
from lmms_mtv.fit.session import FitSession
from lmms_mtv.runtime.settings import setting
from lmms_mtv.vectors import Edit

LIKELY: Final = 0.5
"""Least probability of a head that is likely."""

LearnPolicy = Callable[[Sequence[Episode]], tuple[Policy, list[float]]]
"""Function that learns a policy from training queries, and returns the policy and the mean loss of each step."""


@dataclass(frozen=True)
class Selection:
    """Settings of a selection of heads.

    ``iterations`` prompts of ``fit_shots`` demonstrations are averaged (T and N of the MTV paper). ``steps`` steps
    learn a policy, a probability for each head, which begins at ``initial_logit``. Each step draws ``samples`` masks,
    takes one of ``examples`` training queries, and has the learning rate ``lr``. ``loss`` says which answer tokens
    count: the ``first`` token, or the mean over ``all``. At the end, ``candidates`` masks are drawn. The result is the
    mask with the lowest mean loss on ``candidate_examples`` further training queries. Probabilities below ``floor`` are
    set to 0 before the draw (0.8 in the authors' code for Idefics2).

    The following settings are not in the authors' code; None is the behaviour of the authors' code. ``threshold`` takes
    the heads whose probability is at least as large, and ``top_k`` takes this number of most likely heads, instead of
    candidates. ``diverse`` is the number of training examples that are the demonstrations of the averaged prompts;
    facility location on :meth:`~lmms_mtv.fit.session.FitSession.embeddings` chooses examples that represent all
    examples.
    """

    iterations: int = setting(100, "prompts whose activations are averaged (T in the paper)")
    fit_shots: int = setting(4, "demonstrations in each of these prompts (N in the paper)")
    steps: int = setting(600, "steps of REINFORCE")
    samples: int = setting(32, "masks that are sampled in a step")
    lr: float = setting(0.1, "learning rate of Adam on the logits of the policy")
    initial_logit: float = setting(-1.0, "logit of each head's probability before the first step")
    examples: int = setting(100, "training queries that the steps use")
    loss: Tokens = setting(
        "all", "tokens of the answer that count: `first` (the authors' code), or the mean over `all`"
    )
    candidates: int = setting(10, "masks that are drawn from the policy at the end; the best is kept")
    candidate_examples: int = setting(50, "further training queries by whose mean loss the best mask is found")
    floor: float = setting(
        0.0, "probabilities below it are set to 0 before candidates are drawn (0.8 in the authors' code for Idefics2)"
    )
    threshold: float | None = setting(
        None, "take all heads that are at least as likely, instead of a candidate (not the authors')"
    )
    top_k: int | None = setting(
        None, "take this many of the likeliest heads, instead of a candidate (not the authors')"
    )
    diverse: int | None = setting(
        None, "training examples that may be demonstrations: those that stand best for all (facility location)"
    )

    def __post_init__(self) -> None:
        for name in ("iterations", "steps", "samples", "examples", "candidates", "candidate_examples"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}={getattr(self, name)}, expected at least 1")
        if self.fit_shots < 0 or self.lr <= 0 or not 0 <= self.floor < 1:
            raise ArgumentError(
                f"fit_shots={self.fit_shots}, lr={self.lr}, floor={self.floor}: expected fit_shots of at least 0, lr "
                "above 0, floor in [0, 1)"
            )
        self._check_final()
        if self.diverse is not None and self.diverse < self.fit_shots + 1:
            raise ArgumentError(
                f"diverse={self.diverse}, expected at least fit_shots + 1 = {self.fit_shots + 1}: a query is never "
                "among its own demonstrations"
            )

    def _check_final(self) -> None:
        """Check the settings that derive the final mask from the policy."""
        if self.threshold is not None and self.top_k is not None:
            raise ArgumentError(f"threshold={self.threshold} and top_k={self.top_k}: pass one of them")
        if self.threshold is not None and not 0 < self.threshold <= 1 - EDGE:
            raise ArgumentError(f"threshold={self.threshold}, expected above 0 and at most {1 - EDGE}")
        if self.top_k is not None and self.top_k < 1:
            raise ArgumentError(f"top_k={self.top_k}, expected at least 1")
        if self.floor and (self.threshold is not None or self.top_k is not None):
            raise ArgumentError(f"floor={self.floor} is for candidates that are drawn: leave out threshold= and top_k=")


def mean_values(session: FitSession[Any], settings: Selection) -> Tensor:
    """Return the mean activation of each head over few-shot prompts, float32 [L, H, D] on the CPU.

    Args:
        session: the fit.
        settings: the number and the length of the prompts.

    Raises:
        ArgumentError: ``top_k`` is more than the number of heads, or ``diverse`` more than the number of examples.
    """
    layers, heads, _ = session.shape
    if settings.top_k is not None and settings.top_k > layers * heads:
        raise ArgumentError(f"top_k={settings.top_k}, but the model has {layers * heads} heads")
    with session.stage("values"):
        pool = demonstration_pool(session, settings)
        return session.mean_activations(session.episodes(settings.iterations, settings.fit_shots, "values", pool))


def demonstration_pool(session: FitSession[Any], settings: Selection) -> list[int] | None:
    """Return the indices of the training examples that may be demonstrations, or None for all examples.

    Args:
        session: the fit.
        settings: the number of examples, ``diverse``.

    Raises:
        ArgumentError: ``diverse`` is more than the number of training examples.
    """
    if settings.diverse is None:
        return None
    if settings.diverse > session.examples:
        raise ArgumentError(f"diverse={settings.diverse}, but the training split has {session.examples} examples")
    return sorted(facility_location.greedy(session.embeddings(), settings.diverse))


def select(
    session: FitSession[Any], settings: Selection, value: Tensor, learn: LearnPolicy
) -> tuple[Tensor, dict[str, list[float]]]:
    """Return the heads to replace, and the losses of the selection.

    Args:
        session: the fit.
        settings: the numbers of queries, and the way to derive the final mask from the policy.
        value: the activations to insert, float32 [L, H, D].
        learn: learns the policy from the training queries. If it ends before all steps, the likely heads are a further
            candidate beside the candidates that are drawn.

    Returns:
        The mask, bool [L, H], and losses by name.

    Raises:
        ArgumentError: no head reaches the ``threshold``.
    """
    with session.stage("selection"):
        # One draw serves both, so that the final mask is chosen by other queries than the queries of the policy, if
        # there are enough queries.
        episodes = session.episodes(settings.examples + settings.candidate_examples, session.shots, "selection")
        queries, judges = episodes[: settings.examples], episodes[settings.examples :]
        policy, history = learn(queries)
        candidates = _candidates(session, settings, policy, ended_early=len(history) < settings.steps)
        # The last mask is empty and gives the loss without any edit.
        masks = torch.cat([candidates, torch.zeros_like(candidates[:1])])
        losses = session.mean_losses(judges, Edit.replace(value, masks), settings.loss, "Choosing the final heads")
    best = int(losses[:-1].argmin())
    return candidates[best], {
        "policy": history,
        "candidates": losses[:-1].tolist(),
        "unedited": [losses[-1].item()],
        "chosen": [losses[best].item()],
        "probabilities": policy.probabilities.flatten().tolist(),
    }


def _candidates(session: FitSession[Any], settings: Selection, policy: Policy, ended_early: bool) -> Tensor:
    """Return the candidate masks, bool [candidates, L, H]; the best candidate is the result."""
    if settings.top_k is not None:
        return policy.top(settings.top_k).unsqueeze(0)
    if settings.threshold is None:
        drawn = policy.sample(settings.candidates, session.generator("candidates"), settings.floor)
        # Each draw from an uncertain policy has unlikely heads, so that the likely heads alone are often better.
        return torch.cat([drawn, policy.above(LIKELY).unsqueeze(0)]) if ended_early else drawn
    mask = policy.above(settings.threshold)
    if not mask.any():
        raise ArgumentError(
            f"threshold={settings.threshold}: no head is that likely, the likeliest has "
            f"{policy.probabilities.max().item():.3g}: pass a lower one, or top_k="
        )
    return mask.unsqueeze(0)
