"""The names of :mod:`lmms_mtv.fit.policy` where methods written for version 0.1 import them."""

from lmms_mtv.fit.policy import EDGE, TEMPERATURE, Categorical, Policy, concrete, improved, reinforce

__all__ = [
    "EDGE",
    "TEMPERATURE",
    "Categorical",
    "Policy",
    "concrete",
    "improved",
    "reinforce",
]
