"""The protocol of a base: a loaded model that answers the prompts of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lmms_eval.api.instance import GenerationResult

from lmms_mtv.harness.lmms.bases.harness_model import HarnessModel
from lmms_mtv.harness.protocols import Model
from lmms_mtv.hooks import Sites
from lmms_mtv.models.prompts import Prompt


class Base(Model[Prompt], Protocol):
    """A loaded model that answers the prompts of a task.

    ``config`` is a dataclass, and ``sites`` are the sites of ``model``. ``harness_model`` is the model of lmms-eval
    that answers, which takes the harness's own requests too. ``harness_model`` is None for a base of this package.
    """

    @property
    def config(self) -> Any: ...

    @property
    def sites(self) -> Sites: ...

    @property
    def harness_model(self) -> HarnessModel | None: ...

    def rendered(self, prompt: Prompt) -> str:
        """Return the prompt as text, with a mark for each image."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], settings: Mapping[str, Any], edited: bool
    ) -> tuple[list[GenerationResult], int]:
        """Return the answers to a batch of prompts, and the number of tokens in the prompts.

        Args:
            prompts: the batch.
            settings: the harness's generation settings, among them ``until``.
            edited: True if an edit is applied.
        """
        ...
