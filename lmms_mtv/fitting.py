"""The names of :mod:`lmms_mtv.fit.session` where methods written for version 0.1 import them."""

from lmms_mtv.fit.session import Answer, Episode, Examples, FitSession, Runner, Target, Tokens

__all__ = [
    "Answer",
    "Episode",
    "Examples",
    "FitSession",
    "Runner",
    "Target",
    "Tokens",
]
