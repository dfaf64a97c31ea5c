"""In-context vectors (Liu, Ye, Xing and Zou 2024, arXiv 2311.06668).

Stored: for each layer one direction, the first principal component of the differences that an answer makes to the
hidden state of the last token, over single training examples. Injected: the direction is added to the output of every
MLP, at all positions of all forwards, and the output is scaled to its former norm. Trained: nothing. Cost:
``iterations`` prompts run four times. An evaluated forward is edited at every token of the prompt.

The paper writes that hidden states are shifted. The authors' code puts the shift behind each MLP, where the shift is a
share of the layer's update. On the hidden states themselves the same strength adds up over the layers and leaves no
answer.

These choices are ours. The component is that of the uncentred differences of each layer, and points in the direction of
their mean (the authors add the mean to the component of all layers together). The component is scaled to the average
length of the outputs of the layer's MLP, so that ``strength`` is a share of these outputs, the same for all tokens (the
authors make it up to twice as strong where an output points the other way). The last token with the answer is the last
of the tokens that end an answer in the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmms_mtv.errors import ArgumentError
from lmms_mtv.fit.session import FitSession
from lmms_mtv.methods import Fitted
from lmms_mtv.runtime.settings import setting
from lmms_mtv.vectors import MLP, RESIDUAL, Edit


@dataclass(frozen=True)
class Config:
    """Settings of in-context vectors.

    ``iterations`` prompts of ``fit_shots`` demonstrations (the paper: 0) run with and without their answers.
    ``strength`` is the length of the added vector, as a share of the mean norm of the outputs of the layer's MLP.
    """

    iterations: int = setting(100, "prompts that are run with and without their answers")
    fit_shots: int = setting(0, "demonstrations in each of these prompts (0 in the paper)")
    strength: float = setting(
        0.1, "length of the added vector, as a share of the mean norm of the output of the layer's MLP"
    )

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.fit_shots < 0:
            raise ArgumentError(f"iterations={self.iterations}, fit_shots={self.fit_shots}: expected at least 1 and 0")


def fit(session: FitSession[Any], config: Config) -> Fitted:
    """Return the direction of the answers in each layer.

    Args:
        session: the fit.
        config: the settings.
    """
    prompts = session.episodes(config.iterations, config.fit_shots, "values")
    with session.stage("values"):
        before, after = session.answered_activations(prompts, RESIDUAL)
        norms = session.activations(prompts, MLP).norm(dim=-1, keepdim=True).mean(0)
    value = norms * torch.stack([_direction(layer) for layer in (after - before).squeeze(2).unbind(1)]).unsqueeze(1)
    ones = torch.ones(value.shape[:2])
    return Fitted({MLP: Edit(value, ones, config.strength * ones, everywhere=True, renormed=True)})


def _direction(differences: Tensor) -> Tensor:
    """Return the unit vector, [D], with the largest sum of squared products with ``differences``, [N, D].

    The sign of the vector is that of its product with the mean of the differences.
    """
    component: Tensor = torch.linalg.svd(differences.double(), full_matrices=False).Vh[0]
    along = differences.double().mean(0) @ component
    return (component if along >= 0 else -component).float()
