"""MimIC: each head mimics in-context learning (Jiang et al., CVPR 2025).

Stored: for every head a vector, and a linear function of the head's query that determines the factor of the vector.
Injected: inside each head, before the output projection, at all positions of all forwards, ``mu(q) * v`` is added to
the output of the head, with ``mu = Z1 / (Z1 + Z2)``. Z2 is the sum of the exponentials of the head's attention scores,
and ``log Z1 = w . q + b``, as if the demonstrations were keys beside the keys of the prompt. Trained: vectors and
functions, so that the hidden states without demonstrations equal the hidden states after demonstrations; all weights of
the model are frozen. Cost: for each of ``examples`` queries ``teachers`` few-shot prompts, run once, and ``epochs``
forwards and backward passes of a prompt without demonstrations. Every edited forward computes the attention scores
twice. The model has to compute its attention by ``scaled_dot_product_attention``.

The losses and initial vectors are those of the authors' code. These choices are ours. States are compared at the
positions that predict the target, by their distance as a share of the length of the state, the mean over layers.
Vectors are learned in the unit of the outputs of the heads (``mean_activation_norm``), with a learning rate that was
chosen on training queries of shapes tasks (the authors' rate is 0.005). Functions begin as torch's linear layers do.
The numbers of queries (the authors': 1,000) and of demonstrations are ours too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmms_mtv.fit.gradients import Answer
from lmms_mtv.fit.learning import (
    Distillation,
    TrainingQuery,
    comparable,
    cross_entropy,
    learn,
    mean_activation_norm,
    teacher_answer,
)
from lmms_mtv.fit.session import FitSession
from lmms_mtv.methods import Fitted
from lmms_mtv.runtime.settings import setting
from lmms_mtv.vectors import HEADS, RESIDUAL, Edit

_TINY = 1e-12


@dataclass(frozen=True)
class Config(Distillation):
    """Settings of MimIC, besides the settings of the distillation.

    ``vector_lr`` and ``gate_lr`` are the learning rates of vectors and of the functions of queries. Vectors begin as
    Gaussian noise of standard deviation ``spread``. ``supervision`` is the weight of the target's cross-entropy in the
    loss; the other part of the loss is the distance of the hidden states.
    """

    vector_lr: float = setting(0.03, "learning rate of the vectors")
    gate_lr: float = setting(0.03, "learning rate of the functions of queries")
    spread: float = setting(0.001, "standard deviation of the noise that vectors begin as")
    supervision: float = setting(0.5, "weight of the target's cross-entropy beside the distance of the hidden states")


def fit(session: FitSession[Any], config: Config) -> Fitted:
    """Return vectors and gates that were learned from the hidden states of few-shot prompts.

    Args:
        session: the fit.
        config: the settings.

    Raises:
        HookError: queries cannot be read, or have another size than the outputs of the heads.
    """
    generator, (layers, heads, size) = session.generator("vectors"), session.shape
    value = torch.randn(session.shape, generator=generator) * config.spread
    gate = (2 * torch.rand(layers, heads, size + 1, generator=generator) - 1) / size**0.5
    unit, ones = mean_activation_norm(session, HEADS), torch.ones(layers, heads)

    def edits(_: TrainingQuery | None) -> dict[str, Edit]:
        return {HEADS: Edit(unit * value, ones, ones, everywhere=True, gate=gate)}

    def loss(example: TrainingQuery) -> Callable[[Answer], Tensor]:
        teacher = teacher_answer(session, config, example, RESIDUAL)
        return lambda answer: distance(answer, teacher) + config.supervision * cross_entropy(answer)

    parameters = [(config.vector_lr, [value]), (config.gate_lr, [gate])]
    return Fitted(*learn(session, config, parameters, edits, loss, stream=RESIDUAL))


def distance(answer: Answer, teacher: Answer) -> Tensor:
    """Return the Euclidean distance of the states as a share of the length of the teacher's state.

    The result is the mean over tokens and layers.

    Args:
        answer: the answer of the edited model.
        teacher: the answer of the unedited model after demonstrations.

    Raises:
        ValueError: the answers have no states.
        DataError: the answers have different targets.
    """
    comparable(answer, teacher)
    if answer.states is None or teacher.states is None:
        raise ValueError("answers without states have no distance: ask for a stream")
    # The square root has no finite slope at a distance of 0.
    away = ((answer.states - teacher.states).square().sum(-1) + _TINY).sqrt()
    shares: Tensor = away / teacher.states.norm(dim=-1)
    return shares.mean()
