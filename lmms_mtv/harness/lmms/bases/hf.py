"""The base ``hf``: any image-text or text model that the Auto classes of transformers load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from lmms_eval.api.instance import GenerationResult, TokenCounts
from loguru import logger

from lmms_mtv.harness.hf_config import HfConfig
from lmms_mtv.harness.lmms.bases.hf_checkpoint import IMAGE_SETTINGS, image_settings_of, load
from lmms_mtv.models.generation import attention_of
from lmms_mtv.models.prompts import Prompt
from lmms_mtv.models.runner import FIXED, SAMPLING, PromptRunner
from lmms_mtv.runtime.batches import AUTO, BatchSize
from lmms_mtv.runtime.threads import limit_threads

# Generation settings of tasks that are not settings of transformers.
_OF_TASKS: Final = ("until", "max_new_tokens", "max_gen_toks", "do_sample", "image_aspect_ratio")


class HfBase(PromptRunner):
    """A model that transformers loads, as a base of lmms-eval.

    Args:
        config: the arguments of the base.
        decoder: see :func:`~lmms_mtv.hooks.find_sites`.
    """

    harness_model: Final = None

    def __init__(self, config: HfConfig, decoder: str | None = None) -> None:
        self.config = config
        automatic = config.batch_size == "auto"
        checkpoint = load(config)
        if (line := limit_threads(checkpoint.model)) is not None:
            logger.info(line)
        name, self.revision, self._text_files = checkpoint.identity
        super().__init__(
            checkpoint.model,
            checkpoint.processor,
            name,
            prompt_style=config.prompt_style,
            fewshot_as_multiturn=config.fewshot_as_multiturn,
            image_placeholder=config.image_placeholder,
            batch_size=BatchSize(AUTO if automatic else int(config.batch_size), automatic),
            decoder=decoder,
        )
        self._adapter = checkpoint.adapter
        self._warned: set[str] = set()

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The settings that differ from the default and change the tokens of a text, or the results for these tokens.

        The weights, the precision and the text of a prompt are elsewhere on a card.
        """
        known = image_settings_of(getattr(self._processor, "image_processor", None))
        settings = {name: getattr(self.config, name) for name in IMAGE_SETTINGS if name in known}
        changes: dict[str, Any] = {name: value for name, value in settings.items() if value != getattr(HfConfig, name)}
        changes |= attention_of(self.model)
        if self._adapter is not None:
            changes["peft"] = self._adapter
        if type(self.model).__module__.startswith("transformers_modules"):
            changes["code"] = type(self.model).__name__
        if self._text_files is not None:
            changes["files"] = self._text_files
        return changes

    def generate(
        self, prompts: Sequence[Prompt], settings: Mapping[str, Any], edited: bool = False
    ) -> tuple[list[GenerationResult], int]:
        """Return the answers to a batch of prompts, and the number of tokens in the prompts.

        Args:
            prompts: the batch.
            settings: the harness's generation settings, among them ``until``.
            edited: True if an edit is applied; nothing here depends on it.
        """
        answers = self.answers(prompts, settings, self._passed_on(settings))
        results = [GenerationResult(text, TokenCounts(input_tokens=i, output_tokens=o)) for text, i, o in answers]
        return results, sum(answer.input_tokens for answer in answers)

    def _passed_on(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the generation arguments of a task that belong to transformers, and warn of unknown arguments."""
        others = {k: v for k, v in settings.items() if k not in (*_OF_TASKS, *SAMPLING) and v is not None}
        known = {k: v for k, v in others.items() if hasattr(self.model.generation_config, k) and k not in FIXED}
        if (unknown := sorted(others.keys() - known.keys())) and not self._warned.issuperset(unknown):
            self._warned |= set(unknown)
            logger.warning(f"generation arguments that base=hf does not know change nothing: {', '.join(unknown)}")
        return known
