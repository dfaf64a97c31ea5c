"""The parts of a harness that a fit needs: a model, the prompts of a task, and a logger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import torch

from lmms_mtv.fit.examples import Examples
from lmms_mtv.harness.training import Training
from lmms_mtv.models.trial import AnsweringRunner

P_co = TypeVar("P_co", covariant=True)
P_contra = TypeVar("P_contra", contravariant=True)


class Logger(Protocol):
    """The harness's own logger, whose messages are shown at the harness's command line."""

    def info(self, message: str, /) -> Any: ...

    def warning(self, message: str, /) -> Any: ...


class Model(AnsweringRunner[P_contra], Protocol[P_contra]):
    """A runner that answers, with a name and settings."""

    @property
    def name(self) -> str: ...

    @property
    def revision(self) -> str | None: ...

    @property
    def dtype(self) -> str: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The settings that differ from the default and change what the model computes from the same text."""
        ...

    def text_parts(self, prompt: P_contra) -> list[str]:
        """Return the whole text of a prompt with its target, in parts."""
        ...


class Prompts(Examples[P_co], Protocol[P_co]):
    """The training examples of one task of a harness."""

    @property
    def training(self) -> Training: ...

    def digest(self) -> str:
        """Return the SHA-256 of the training examples in the form that the prompts show."""
        ...
