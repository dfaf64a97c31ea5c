"""LIVE: learnable in-context vectors (arXiv 2406.13185).

Stored: a vector and a weight for every layer. Injected: the vector times its weight is added to the hidden state after
every block, at all positions of all forwards, and the state is scaled to its former norm. Trained: vectors and weights,
so that the model without demonstrations answers as it does after demonstrations; all weights of the model are frozen.
Cost: for each of ``examples`` queries ``teachers`` few-shot prompts, run once, and ``epochs`` forwards and backward
passes of a prompt without demonstrations.

The initial values, the losses and the kind of schedule are those of the authors' code. These choices are ours: the
numbers of queries, of demonstrations and of queries in a step; vectors that are learned in the unit of the hidden
states (``mean_activation_norm``); and learning rates that were chosen on training queries of shapes tasks (the authors'
rates are 0.001 and 0.01, for many more steps).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
from lmms_mtv.vectors import RESIDUAL, Edit


@dataclass(frozen=True)
class Config(Weighted):
    """Settings of LIVE: the settings of a distillation into weighted vectors."""


def fit(session: FitSession[Any], config: Config) -> Fitted:
    """Return vectors and weights that were learned from few-shot prompts.

    Args:
        session: the fit.
        config: the settings.
    """
    value = torch.randn(shape(session.sites, RESIDUAL), generator=session.generator("vectors")) * config.spread
    unit = mean_activation_norm(session, RESIDUAL)
    gain = torch.full(value.shape[:2], config.initial_weight)

    def edits(_: TrainingQuery | None) -> dict[str, Edit]:
        return {RESIDUAL: Edit(unit * value, torch.ones_like(gain), gain, everywhere=True, renormed=True)}

    def loss(example: TrainingQuery) -> Callable[[Answer], Tensor]:
        teacher = teacher_answer(session, config, example)
        return lambda answer: divergence(answer, teacher) + config.supervision * cross_entropy(answer)

    return Fitted(*learn(session, config, [(config.vector_lr, [value]), (config.weight_lr, [gain])], edits, loss))
