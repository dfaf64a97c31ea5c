"""Multimodal Task Vectors (arXiv 2406.15334).

Stored: the mean activation of every head at the last token of many few-shot prompts, and the set of heads found by
REINFORCE. Injected: at those heads the mean replaces the activation, at the last prompt token and at every generated
token. Trained: one probability for each head; all weights are frozen. Cost: ``iterations`` few-shot prefills, then
``steps`` replays of the last token of ``samples`` masks each. With ``optimizer=gradient`` the probabilities are learned
from gradients through the same replays instead, in fewer steps.

The defaults are those of the authors' code. Differences from it are listed in docs/concepts.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from lmms_mtv.errors import ArgumentError
from lmms_mtv.fit import facility_location
from lmms_mtv.fit.examples import Episode, Tokens
from lmms_mtv.fit.policy import EDGE, Policy, concrete, reinforce
from lmms_mtv.fit.session import FitSession
from lmms_mtv.methods import Fitted
from lmms_mtv.runtime.settings import setting
from lmms_mtv.vectors import HEADS, Edit

_OF_GRADIENT: Final = {"steps": 30, "samples": 8, "lr": 1.0}
"""Defaults of ``gradient_steps`` and so on, chosen on training queries of shapes tasks."""


@dataclass(frozen=True)
class Config:
    """Settings of MTV.

    ``iterations`` prompts of ``fit_shots`` demonstrations are averaged (T and N of the paper). ``steps`` of
    REINFORCE sample ``samples`` masks each and use learning rate ``lr`` and starting logits ``initial_logit``, on one
    of ``examples`` training queries. ``loss`` is of the ``first`` answer token or the mean over ``all``. Of
    ``candidates`` masks drawn at the end the one with the lowest mean loss on ``candidate_examples`` further training
    queries is kept; probabilities below ``floor`` are set to 0 first (0.8 in the authors' code for Idefics2).
    ``heads``, as (layer, head), are taken as they are, and nothing is selected (heads of another task, section 4).

    What follows is not the authors'; None is their way. ``threshold`` takes the heads that are at least as likely, and
    ``top_k`` that many most likely ones, instead of choosing among candidates. ``optimizer`` ``gradient`` learns the
    probabilities from gradients through masks between 0 and 1; then ``gradient_steps`` (30) of
    ``gradient_samples`` (8) masks each and with learning rate ``gradient_lr`` (1.0) stand for ``steps``,
    ``samples`` and ``lr``. ``diverse`` training examples, those that stand best for all (facility location on
    :meth:`~lmms_mtv.fit.session.FitSession.embeddings`), are the demonstrations of the prompts that are averaged.
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
    heads: tuple[tuple[int, int], ...] | None = setting(
        None, "heads to replace, as (layer, head); nothing is selected then (section 4 of the paper)"
    )
    threshold: float | None = setting(
        None, "take all heads that are at least as likely, instead of a candidate (not the authors')"
    )
    top_k: int | None = setting(
        None, "take this many of the likeliest heads, instead of a candidate (not the authors')"
    )
    optimizer: Literal["gradient"] | None = setting(
        None, "`gradient` learns the probabilities from gradients instead of by REINFORCE (not the authors')"
    )
    gradient_steps: int | None = setting(None, "steps with `optimizer=gradient`; 30 if not given")
    gradient_samples: int | None = setting(None, "masks in such a step; 8 if not given")
    gradient_lr: float | None = setting(None, "learning rate of such a step; 1.0 if not given")
    diverse: int | None = setting(
        None, "training examples that may be demonstrations: those that stand best for all (facility location)"
    )

    def __post_init__(self) -> None:
        for name in ("iterations", "examples", "candidates", "candidate_examples"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}={getattr(self, name)}, expected at least 1")
        if self.samples < 2:
            # A single loss has no mean to be better than.
            raise ArgumentError(f"samples={self.samples}, expected at least 2: masks are compared with each other")
        if self.fit_shots < 0 or self.steps < 0 or self.lr <= 0 or not 0 <= self.floor < 1:
            raise ArgumentError("expected fit_shots and steps of at least 0, lr above 0, floor in [0, 1)")
        self._check_final()
        self._check_gradient()
        if self.diverse is not None and self.diverse < self.fit_shots + 1:
            raise ArgumentError(
                f"diverse={self.diverse}, expected at least fit_shots + 1 = {self.fit_shots + 1}: a query is never "
                "among its own demonstrations"
            )

    def _check_final(self) -> None:
        if self.threshold is not None and self.top_k is not None:
            raise ArgumentError(f"threshold={self.threshold} and top_k={self.top_k}: pass one of them")
        if self.threshold is not None and not 0 < self.threshold <= 1 - EDGE:
            raise ArgumentError(f"threshold={self.threshold}, expected above 0 and at most {1 - EDGE}")
        if self.top_k is not None and self.top_k < 1:
            raise ArgumentError(f"top_k={self.top_k}, expected at least 1")
        if self.floor and (self.threshold is not None or self.top_k is not None):
            raise ArgumentError(f"floor={self.floor} is for candidates that are drawn: leave out threshold= and top_k=")

    def _check_gradient(self) -> None:
        for name, default in _OF_GRADIENT.items():
            value = getattr(self, f"gradient_{name}")
            if self.optimizer is None and value is not None:
                raise ArgumentError(
                    f"gradient_{name}={value} is for masks learned from gradients: pass optimizer=gradient"
                )
            if self.optimizer is not None and getattr(self, name) != getattr(Config, name):
                raise ArgumentError(
                    f"{name}={getattr(self, name)} is of REINFORCE: with optimizer=gradient pass gradient_{name}="
                )
            if self.optimizer is not None and value is None:
                # Filled in, so that the card tells it and the vector's id changes if the default does.
                object.__setattr__(self, f"gradient_{name}", default)
            elif value is not None and value <= 0:
                raise ArgumentError(f"gradient_{name}={value}, expected above 0")


def fit(session: FitSession[Any], config: Config) -> Fitted:
    """Mean activations, and the heads to replace by them.

    Raises :class:`ArgumentError` for a ``top_k`` or ``diverse`` of more than there are, and a ``threshold`` that no
    head reaches.
    """
    layers, heads, _ = session.shape
    if config.top_k is not None and config.top_k > layers * heads:
        raise ArgumentError(f"top_k={config.top_k}, but the model has {layers * heads} heads")
    with session.stage("values"):
        value = session.mean_activations(
            session.episodes(config.iterations, config.fit_shots, "values", pool(session, config))
        )
    if config.heads is not None:
        return Fitted({HEADS: Edit.replace(value, _given(config.heads, session.shape[:2]))})
    with session.stage("selection"):
        mask, losses = select(session, config, value)
    return Fitted({HEADS: Edit.replace(value, mask)}, losses)


def pool(session: FitSession[Any], config: Config) -> list[int] | None:
    """Return the training examples that demonstrations are drawn from, or None for all."""
    if config.diverse is None:
        return None
    if config.diverse > session.examples:
        raise ArgumentError(f"diverse={config.diverse}, but the training split has {session.examples} examples")
    return sorted(facility_location.greedy(session.embeddings(), config.diverse))


def reselected(fitted: Fitted, mask: Tensor) -> Fitted:
    """Return a fit with the values it has at the heads of another ``mask`` [L, H], as controls need it.

    The losses of MTV's own masks are left out: they are not those of these heads.
    """
    kept = {name: fitted.losses[name] for name in ("policy", "probabilities", "unedited") if name in fitted.losses}
    return Fitted({HEADS: Edit.replace(fitted.edits[HEADS].value, mask)}, kept)


def _given(heads: Sequence[tuple[int, int]], shape: tuple[int, int]) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    for layer, head in heads:
        mask[layer, head] = True
    return mask


def select(session: FitSession[Any], config: Config, value: Tensor) -> tuple[Tensor, dict[str, list[float]]]:
    """Return the heads to replace by ``value`` [L, H, D], bool [L, H], and the losses on the way."""
    # One draw for both, so that the queries that choose the final mask are not those of the policy, if there are
    # enough of them.
    drawn = session.episodes(config.examples + config.candidate_examples, session.shots, "selection")
    queries, judges = drawn[: config.examples], drawn[config.examples :]
    policy, history = _learned(session, config, value, queries)
    candidates = _candidates(session, config, policy)
    # The empty mask comes along, to know the loss without any edit.
    judged = torch.cat([candidates, torch.zeros_like(candidates[:1])])
    losses = session.mean_losses(judges, Edit.replace(value, judged), config.loss, "Choosing the final heads")
    best = int(losses[:-1].argmin())
    return candidates[best], {
        "policy": history,
        "candidates": losses[:-1].tolist(),
        "unedited": [losses[-1].item()],
        "chosen": [losses[best].item()],
        "probabilities": policy.probabilities.flatten().tolist(),
    }


def _learned(
    session: FitSession[Any], config: Config, value: Tensor, queries: Sequence[Episode]
) -> tuple[Policy, list[float]]:
    """Return the policy, and its mean loss at each step."""
    gradient = config.optimizer is not None
    names = [f"gradient_{name}" if gradient else name for name in _OF_GRADIENT]
    steps, samples, lr = (getattr(config, name) for name in names)
    chosen = session.random_queries(queries, steps)

    def losses(step: int, masks: Tensor) -> Tensor:
        return session.losses(chosen[step], Edit.replace(value, masks), config.loss)

    def loss_gradient(step: int, masks: Tensor) -> tuple[Tensor, Tensor]:
        return session.loss_gradient(chosen[step], value, masks, config.loss)

    options: dict[str, Any] = {
        "steps": session.bar(range(steps), "Selecting heads"),
        "samples": samples,
        "lr": lr,
        "initial_logit": config.initial_logit,
        "generator": session.generator("masks"),
    }
    if gradient:
        return concrete(loss_gradient, session.shape[:2], **options)
    return reinforce(losses, session.shape[:2], **options)


def _candidates(session: FitSession[Any], config: Config, policy: Policy) -> Tensor:
    """Return the masks of which the best one is kept, bool [candidates, L, H]."""
    if config.top_k is not None:
        return policy.top(config.top_k).unsqueeze(0)
    if config.threshold is None:
        return policy.sample(config.candidates, session.generator("candidates"), config.floor)
    mask = policy.above(config.threshold)
    if not mask.any():
        raise ArgumentError(
            f"threshold={config.threshold}: no head is that likely, the likeliest has "
            f"{policy.probabilities.max().item():.3g}: pass a lower one, or top_k="
        )
    return mask.unsqueeze(0)
