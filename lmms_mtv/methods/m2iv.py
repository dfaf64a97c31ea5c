"""M2IV: learned vectors in place of demonstrations (arXiv 2504.04633).

Stored: for every layer a vector and a weight for its attention, and as many for its MLP. Injected: each vector times
its weight is added to the output of attention or MLP, at all positions of all forwards,
``h' = h + (a + alpha * v_a) + (m + beta * v_m)``. Trained: vectors and weights, so that the model without
demonstrations answers as it does after demonstrations; all weights of the model are frozen. Cost: for each of
``examples`` queries ``teachers`` few-shot prompts, run once, and ``epochs`` forwards and backward passes of a prompt
without demonstrations.

Three losses are added up: mimicry, the divergence of the next tokens at the answer from the next tokens after
demonstrations; synergy, which draws the two vectors of a layer together and the vectors of different layers apart;
supervision, the cross-entropy of the target. Several ``teachers`` use more demonstrations than the context window
holds: each teacher shows other demonstrations.

The paper's text was not available to us. Losses and injection follow the descriptions in later papers. These choices
are ours. Vectors are learned in the unit of the activations that they are added to (``mean_activation_norm``), with
learning rates that were chosen on training queries of shapes tasks. The initial values and the kind of schedule are
those of LIVE. Queries are drawn at random instead of by clusters of their features. No copy of a prompt with its
demonstrations in another order is added. The synergy is of the cosines between layers, ``M = Z_a Z_m^T`` with rows of
length 1: a cosine divided by the number of rows cannot reach its target of 1. Where a block normalises the output of
attention (Gemma 2 and 3), the vector is added before this norm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lmms_mtv.fit.gradients import Answer
from lmms_mtv.fit.learning import (
    TrainingQuery,
    Weighted,
    cross_entropy,
    divergence,
    learn,
    mean_activation_norm,
    teacher_answer,
)
from lmms_mtv.fit.session import FitSession
from lmms_mtv.hooks import shape
from lmms_mtv.methods import Fitted
from lmms_mtv.runtime.settings import setting
from lmms_mtv.vectors import ATTENTION, MLP, Edit

_FAR = 1e-3
"""Weight, in the synergy, of the cosines between different layers."""


@dataclass(frozen=True)
class Config(Weighted):
    """Settings of M2IV, besides the settings of a distillation into weighted vectors.

    ``mimicry`` and ``synergy`` are the weights of the other losses.
    """

    mimicry: float = setting(1.0, "weight of the divergence from the answers after demonstrations")
    synergy: float = setting(1.0, "weight of the loss that draws a layer's two vectors together, and layers apart")


def fit(session: FitSession[Any], config: Config) -> Fitted:
    """Return vectors and weights that were learned from few-shot prompts.

    Args:
        session: the fit.
        config: the settings.
    """
    generator = session.generator("vectors")
    streams = (ATTENTION, MLP)
    values = [torch.randn(shape(session.sites, name), generator=generator) * config.spread for name in streams]
    units = [mean_activation_norm(session, name) for name in streams]
    gains = [torch.full(value.shape[:2], config.initial_weight) for value in values]

    def edits(_: TrainingQuery | None) -> dict[str, Edit]:
        parts = zip(streams, units, values, gains, strict=True)
        return {
            name: Edit(unit * value, torch.ones_like(gain), gain, everywhere=True) for name, unit, value, gain in parts
        }

    def loss(example: TrainingQuery) -> Callable[[Answer], Tensor]:
        teacher = teacher_answer(session, config, example)
        return lambda answer: (
            config.mimicry * divergence(answer, teacher)
            + config.synergy * synergy(*(value.squeeze(1) for value in values))
            + config.supervision * cross_entropy(answer)
        )

    return Fitted(*learn(session, config, [(config.vector_lr, values), (config.weight_lr, gains)], edits, loss))


def synergy(attention: Tensor, mlp: Tensor) -> Tensor:
    """Return ``sum_i (M_ii - 1)^2 + 0.001 sum_{i != j} M_ij^2`` of the cosines M between rows of two vectors.

    Args:
        attention: the vectors of attention, [L, width].
        mlp: the vectors of the MLPs, [L, width].
    """
    cosines = functional.normalize(attention, dim=-1) @ functional.normalize(mlp, dim=-1).T
    same = cosines.diagonal()
    return (same - 1).square().sum() + _FAR * (cosines.square().sum() - same.square().sum())
