"""The names of :mod:`lmms_mtv.fit.learning` where methods written for version 0.1 import them."""

from lmms_mtv.fit.learning import (
    Distillation,
    Schedule,
    Weighted,
    comparable,
    cross_entropy,
    divergence,
    learn,
    pace,
)
from lmms_mtv.fit.learning import TrainingQuery as Moment
from lmms_mtv.fit.learning import mean_activation_norm as typical
from lmms_mtv.fit.learning import teacher_answer as taught

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
