"""The control of MTV (arXiv 2406.15334): the same values, at as many random heads of each layer as MTV chose there.

Stored, Injected, Trained and Cost: as ``mtv``. The control shows if the choice of heads matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

from lmms_mtv.fit.session import FitSession
from lmms_mtv.methods import Fitted, mtv
from lmms_mtv.vectors import HEADS

CONTROL: Final = True
"""A vector of this method may be worse than no vector."""


@dataclass(frozen=True)
class Config(mtv.Config):
    """Settings of the MTV fit whose number of heads in each layer is matched."""


def fit(session: FitSession[Any], config: Config) -> Fitted:
    """Return MTV's fit with the chosen heads of each layer drawn anew, uniformly, by the session's seed.

    Args:
        session: the fit.
        config: the settings.
    """
    fitted = mtv.fit(session, config)
    edit, generator = fitted.edits[HEADS], session.generator("random heads")
    drawn = torch.stack([layer[torch.randperm(len(layer), generator=generator)] for layer in edit.gain])
    return mtv.reselected(fitted, drawn)
