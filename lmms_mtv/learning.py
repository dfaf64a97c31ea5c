"""The names of :mod:`lmms_mtv.fit.learning` where methods written for version 0.1 import them."""

from lmms_mtv.fit.learning import (
    Distillation,
    Moment,
    Schedule,
    Weighted,
    comparable,
    cross_entropy,
    divergence,
    learn,
    pace,
    taught,
    typical,
)

__all__ = [
    "Distillation",
    "Moment",
    "Schedule",
    "Weighted",
    "comparable",
    "cross_entropy",
    "divergence",
    "learn",
    "pace",
    "taught",
    "typical",
]
