"""No edit: the model as it is, for zero-shot and few-shot baselines (in-context learning, arXiv 2005.14165).

Stored, Injected and Trained: nothing. Cost: only that of the demonstrations in a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lmms_mtv.fit.session import FitSession
from lmms_mtv.methods import Fitted


@dataclass(frozen=True)
class Config:
    """No settings."""


def fit(session: FitSession[Any], config: Config) -> Fitted:
    """Return no edit."""
    return Fitted()
