"""I2CL: implicit in-context learning (arXiv 2405.14660).

Stored: for every layer the mean output of attention at the last token of demonstrations, each demonstration run alone
with its answer; as much for the MLP; and two scalars for each of these means. Injected: at all positions of all
forwards, ``s1 * out + s0 * v`` replaces the output of attention or MLP. Trained: the four scalars of each layer, by the
cross-entropy of training queries without demonstrations; all weights of the model are frozen. Cost: ``iterations``
prompts of one demonstration run twice, and ``epochs`` forwards and backward passes for each of ``examples`` queries.

The defaults are those of the authors' code. These choices are ours: the queries are further training examples, not the
demonstrations again; the number of queries; and the noise, drawn anew for each forward, is Gaussian and scaled to a
share of the length of the vector that it is added to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmms_mtv.errors import ArgumentError
from lmms_mtv.fit.learning import Schedule, TrainingQuery, cross_entropy, learn
from lmms_mtv.fit.session import FitSession
from lmms_mtv.methods import Fitted
from lmms_mtv.runtime.settings import setting
from lmms_mtv.vectors import ATTENTION, MLP, Edit


@dataclass(frozen=True)
class Config(Schedule):
    """Settings of I2CL, besides the settings of the schedule.

    The schedule has other defaults of ``examples``, ``epochs`` and ``accumulation``. Outputs are averaged over
    ``iterations`` demonstrations. The scalars begin at ``initial_weight`` (s0) and 1 (s1), and are learned with the
    rate ``weight_lr``. ``noise`` is the length of the noise, as a share of the length of each vector.
    """

    examples: int = setting(10, "training queries that are learned from")
    epochs: int = setting(100, "times that each query is learned from")
    accumulation: int = setting(2, "queries in one step")
    iterations: int = setting(100, "demonstrations over which outputs are averaged")
    initial_weight: float = setting(0.1, "first value of the scalars that weigh the mean of the demonstrations")
    weight_lr: float = setting(0.01, "learning rate of the scalars")
    noise: float = setting(1e-3, "length of the noise, as a share of each vector's length")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1 or self.noise < 0:
            raise ArgumentError(f"iterations={self.iterations}, noise={self.noise}: expected at least 1 and 0")


def fit(session: FitSession[Any], config: Config) -> Fitted:
    """Return mean outputs of attention and MLP, and the scalars that mix them in.

    Args:
        session: the fit.
        config: the settings.
    """
    streams = (ATTENTION, MLP)
    shown = session.episodes(config.iterations, 0, "values")
    with session.stage("values"):
        values = [session.answered_activations(shown, name)[1].mean(0) for name in streams]
    gains = [torch.full(value.shape[:2], config.initial_weight) for value in values]
    keeps = [torch.ones_like(gain) for gain in gains]

    def edits(example: TrainingQuery | None) -> dict[str, Edit]:
        vectors = values
        if example is not None:
            generator = session.generator(f"noise {example.epoch} {example.number}")
            vectors = [_noisy(value, config.noise, generator) for value in values]
        parts = zip(streams, vectors, keeps, gains, strict=True)
        return {name: Edit(value, keep, gain, everywhere=True) for name, value, keep, gain in parts}

    return Fitted(*learn(session, config, [(config.weight_lr, [*gains, *keeps])], edits, lambda _: cross_entropy))


def _noisy(value: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Return ``value``, [L, 1, width], plus noise in each row of ``share`` of the length of the row."""
    noise = torch.randn(value.shape, generator=generator)
    longer: Tensor = value.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    return value + share * longer * noise
