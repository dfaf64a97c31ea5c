"""Function vectors (Todd, Li, Sharma, Mueller, Wallace and Bau 2024, arXiv 2310.15213).

Stored: one vector, the sum over the ``top`` heads of the part that the mean activation of the head over few-shot
prompts adds to the hidden state. This part is the output projection of the head's slice, without the bias. The heads
have the largest average indirect effect: the increase of the probability of the first answer token when the head's mean
replaces its activation, in prompts whose demonstrations do not show the task. Injected: the vector is added to the
hidden state after one block, at the last prompt token and at every generated token. Trained: nothing. Cost:
``iterations`` few-shot prefills; for each of ``effect_examples`` prompts a replay of the last token with a row for each
head of the model; for each of ``examples`` queries a replay with a row for each layer.

These choices are ours. The layer has the lowest loss among all layers, on training queries that the vector does not
come from (about a third of the depth in the paper). The prompts may be without demonstrations instead of with shuffled
answers, for tasks whose answers alone show the task. Where a norm stands between attention and the hidden state (Gemma
2 and 3), the heads of a layer add the difference that they make to the norm of the mean output of all heads of the
layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lmms_mtv.errors import ArgumentError
from lmms_mtv.fit.examples import Episode, Tokens
from lmms_mtv.fit.layers import best_layer
from lmms_mtv.fit.session import FitSession
from lmms_mtv.methods import Fitted
from lmms_mtv.runtime.settings import setting
from lmms_mtv.vectors import RESIDUAL, Edit


@dataclass(frozen=True)
class Config:
    """Settings of function vectors.

    The means are over ``iterations`` prompts of ``fit_shots`` demonstrations. Effects are averaged over
    ``effect_examples`` prompts: prompts of as many demonstrations that show each other's answers (``corrupted``
    ``shuffled``), or queries alone (``bare``). ``top`` heads make the vector. ``examples`` training queries choose the
    layer by ``loss``: the loss of the ``first`` answer token, or the mean over ``all`` tokens.
    """

    iterations: int = setting(100, "prompts whose activations are averaged")
    fit_shots: int = setting(10, "demonstrations in each of these prompts")
    effect_examples: int = setting(25, "prompts over which the effect of a head is averaged")
    corrupted: Literal["shuffled", "bare"] = setting(
        "shuffled", "prompts that do not tell the task: demonstrations with `shuffled` answers, or `bare` queries"
    )
    top: int = setting(10, "heads that make the vector, those with the largest effect")
    examples: int = setting(32, "training queries that choose the layer")
    loss: Tokens = setting("all", "tokens of the answer that count: `first`, or the mean over `all`")

    def __post_init__(self) -> None:
        for name in ("iterations", "effect_examples", "top", "examples"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}={getattr(self, name)}, expected at least 1")
        if self.fit_shots < (2 if self.corrupted == "shuffled" else 0):
            raise ArgumentError(
                f"fit_shots={self.fit_shots}: shuffled answers need at least 2 demonstrations; pass corrupted=bare for "
                "prompts without any"
            )


def fit(session: FitSession[Any], config: Config) -> Fitted:
    """Return the sum of the parts that the heads with the largest effect add, and the layer for this sum.

    Args:
        session: the fit.
        config: the settings.
    """
    prompts = session.episodes(config.iterations, config.fit_shots, "values")
    with session.stage("values"):
        means = session.mean_activations(prompts)
    corrupted = _corrupted(session, config)
    with session.stage("effects"):
        effects = _effects(session, means, corrupted)
    # A model may have fewer heads than ``top``.
    chosen = torch.zeros(effects.numel())
    chosen[effects.flatten().topk(min(config.top, effects.numel())).indices] = 1
    vector = session.head_contributions(means, chosen.view_as(effects)).sum(0)
    queries = session.episodes(config.examples, session.shots, "selection", unlike=(*prompts, *corrupted))
    with session.stage("layer"):
        edit, losses = best_layer(
            lambda edits: session.mean_losses(queries, {RESIDUAL: edits}, config.loss, "Choosing the layer"),
            vector.expand(len(session.sites), 1, -1),
            keep=1,
        )
    return Fitted({RESIDUAL: edit}, losses | {"effects": effects.flatten().tolist()})


def _corrupted(session: FitSession[Any], config: Config) -> list[Episode]:
    """Return prompts that do not show the task."""
    if config.corrupted == "bare":
        return session.episodes(config.effect_examples, 0, "effects")
    rng = session.random("shuffled answers")
    drawn = session.episodes(config.effect_examples, config.fit_shots, "effects")
    return [episode._replace(answers=tuple(rng.sample(episode.demonstrations, config.fit_shots))) for episode in drawn]


def _effects(session: FitSession[Any], means: Tensor, episodes: Sequence[Episode]) -> Tensor:
    """Return the increase of the probability of the first answer token by each head's mean, float32 [L, H]."""
    layers, heads, _ = session.shape
    each = torch.eye(layers * heads).view(-1, layers, heads)
    # The last mask is empty and gives the probability without any edit.
    edit = Edit.replace(means, torch.cat([each, torch.zeros_like(each[:1])]))
    bar = session.bar(episodes, "Measuring the effects of heads")
    likely = torch.stack([(-session.losses(episode, edit)).exp() for episode in bar]).mean(0)
    return (likely[:-1] - likely[-1]).view(layers, heads)
