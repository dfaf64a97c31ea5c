"""Multimodal Task Vectors (arXiv 2406.15334).

Stored: the mean activation of every head at the last token of many few-shot prompts, and the set of heads found by
REINFORCE. Injected: at those heads the mean replaces the activation, at the last prompt token and at every generated
token. Trained: one probability for each head; all weights are frozen. Cost: ``iterations`` few-shot prefills, then
``steps`` replays of the last token of ``samples`` masks each.

The defaults are those of the authors' code. Differences from it are listed in docs/concepts.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmms_mtv.errors import ArgumentError
from lmms_mtv.fitting import FitSession, Tokens
from lmms_mtv.methods import Fitted
from lmms_mtv.policy import reinforce
from lmms_mtv.vector import HEADS, Edit


@dataclass(frozen=True)
class Config:
    """Settings of MTV.

    ``iterations`` prompts of ``fit_shots`` demonstrations are averaged (T and N of the paper). ``steps`` of
    REINFORCE sample ``samples`` masks each and use learning rate ``lr`` and starting logits ``initial_logit``, on one
    of ``examples`` training queries. ``loss`` is of the ``first`` answer token or the mean over ``all``. Of
    ``candidates`` masks drawn at the end the one with the lowest mean loss on ``candidate_examples`` further training
    queries is kept; probabilities below ``floor`` are set to 0 first (0.8 in the authors' code for Idefics2).
    ``heads``, as (layer, head), are taken as they are, and nothing is selected (heads of another task, section 4).
    """

    iterations: int = 100
    fit_shots: int = 4
    steps: int = 600
    samples: int = 32
    lr: float = 0.1
    initial_logit: float = -1.0
    examples: int = 100
    loss: Tokens = "first"
    candidates: int = 10
    candidate_examples: int = 50
    floor: float = 0.0
    heads: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        for name in ("iterations", "examples", "candidates", "candidate_examples"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}={getattr(self, name)}, expected at least 1")
        if self.samples < 2:
            # A single loss has no mean to be better than.
            raise ArgumentError(f"samples={self.samples}, expected at least 2: masks are compared with each other")
        if self.fit_shots < 0 or self.steps < 0 or self.lr <= 0 or not 0 <= self.floor < 1:
            raise ArgumentError("expected fit_shots and steps of at least 0, lr above 0, floor in [0, 1)")


def fit(session: FitSession[Any], config: Config) -> Fitted:
    """Mean activations, and the heads to replace by them."""
    value = session.mean_activations(session.episodes(config.iterations, config.fit_shots, "values"))
    if config.heads is not None:
        return Fitted({HEADS: Edit.replace(value, _given(config.heads, session.shape[:2]))})
    mask, losses = select(session, config, value)
    return Fitted({HEADS: Edit.replace(value, mask)}, losses)


def _given(heads: Sequence[tuple[int, int]], shape: tuple[int, int]) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    for layer, head in heads:
        mask[layer, head] = True
    return mask


def select(session: FitSession[Any], config: Config, value: Tensor) -> tuple[Tensor, dict[str, list[float]]]:
    """The heads to replace by ``value`` [L, H, D], bool [L, H], and the losses on the way."""
    # One draw for both, so that the queries that choose the final mask are not those of the policy, if there are
    # enough of them.
    drawn = session.episodes(config.examples + config.candidate_examples, session.shots, "selection")
    queries, judges = drawn[: config.examples], drawn[config.examples :]
    order = session.random("order")
    chosen = [order.randrange(len(queries)) for _ in range(config.steps)]

    policy, history = reinforce(
        lambda step, masks: session.losses(queries[chosen[step]], Edit.replace(value, masks), config.loss),
        session.shape[:2],
        steps=session.bar(range(config.steps), "Selecting heads"),
        samples=config.samples,
        lr=config.lr,
        initial_logit=config.initial_logit,
        generator=session.generator("masks"),
    )
    candidates = policy.sample(config.candidates, session.generator("candidates"), config.floor)
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
