"""The names of :mod:`lmms_mtv.fit` where methods written for version 0.1 import them."""

from lmms_mtv.fit.examples import Episode, Examples, Runner, Target, Tokens
from lmms_mtv.fit.gradients import Answer
from lmms_mtv.fit.session import FitSession

__all__ = ["Answer", "Episode", "Examples", "FitSession", "Runner", "Target", "Tokens"]
