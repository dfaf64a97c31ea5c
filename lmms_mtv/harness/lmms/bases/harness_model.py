"""A model of lmms-eval in this process: its wrapper, and the torch module that the wrapper runs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from lmms_eval.api.instance import GenerationResult, Instance, unwrap_generation_output
from lmms_eval.api.model import CacheHook, lmms
from loguru import logger

from lmms_mtv.errors import ArgumentError, HookError, MtvError
from lmms_mtv.harness.lmms.bases.wrapper_class import module_of, parameters, wrapper_class
from lmms_mtv.hooks import Sites, Watch, find_sites, watched
from lmms_mtv.models.identity import Identity, name_of, revision_of, text_files_of
from lmms_mtv.models.text import one_line
from lmms_mtv.runtime.attention import check_attention
from lmms_mtv.runtime.threads import limit_threads

# The harness writes these attributes onto its model, and the wrappers read their own attributes.
_SHARED: Final = ("task_dict", "_rank", "_world_size", "accelerator")


@dataclass(frozen=True)
class WrappedConfig:
    """Arguments of a base that is a model of lmms-eval.

    Attributes:
        name: the name in ``--model``.
        force_simple: True takes the simple wrapper of a model that has a chat wrapper too, as ``--force_simple`` does.
        fewshot_as_multiturn: True writes the demonstrations of a chat wrapper as separate turns, False writes them in
            the turn of the query.
        image_placeholder: the mark of an image in the text of a simple wrapper's few-shot prompt, with ``{n}`` for the
            number of the image.
        arguments: the arguments of the wrapper, verbatim.
    """

    name: str
    force_simple: bool = False
    fewshot_as_multiturn: bool = True
    image_placeholder: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("force_simple", "fewshot_as_multiturn"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentError(f"{name}={getattr(self, name)!r}, expected True or False")


class HarnessModel:
    """A loaded model of lmms-eval, which answers the harness's own requests.

    Attributes:
        wrapper: the harness's object.
        model: the torch module that the wrapper runs.
        sites: the sites of the module.
        is_simple: True if the wrapper takes text and images, not messages.
        batch_size: the number of rows that the wrapper was made for.

    Raises:
        ArgumentError: the wrapper cannot be constructed, or has no torch module.
        DiscoveryError: the heads of the module are not found.
    """

    def __init__(self, config: WrappedConfig, decoder: str | None = None) -> None:
        self.config = config
        kind = wrapper_class(config.name, config.force_simple)
        self.is_simple: bool = kind.is_simple
        try:
            self.wrapper = kind(**config.arguments)
        except Exception as error:
            raise ArgumentError(
                f"base={config.name} cannot be constructed with {dict(config.arguments)}: {type(error).__name__}: "
                f"{one_line(error)}"
            ) from error
        self.model = module_of(self.wrapper, config.name)
        check_attention(self.model)
        if (line := limit_threads(self.model)) is not None:
            logger.info(line)
        self.sites: Sites = find_sites(self.model, decoder)
        self.identity = self._identity(parameters(kind))
        self.batch_size = _batch_size(self.wrapper)

    def _identity(self, known: Mapping[str, inspect.Parameter]) -> Identity:
        """Return the identity of the checkpoint, for a wrapper with the parameters ``known``."""
        config = getattr(self.model, "config", None)
        default = known["pretrained"].default if "pretrained" in known else None
        passed = self.config.arguments.get("pretrained")
        source = str(passed or default or getattr(config, "_name_or_path", None) or self.config.name)
        revision = revision_of(source, getattr(config, "_commit_hash", None))
        return Identity(name_of(source, revision), revision, text_files_of(source))

    def share(self, harness: lmms) -> None:
        """Copy the attributes that the harness wrote onto its model to the wrapper, and the others to the model."""
        for name in _SHARED:
            if hasattr(harness, name):
                setattr(self.wrapper, name, getattr(harness, name))
            elif hasattr(self.wrapper, name):
                setattr(harness, name, getattr(self.wrapper, name))

    @torch.no_grad()
    def run(self, requests: Sequence[Instance]) -> None:
        """Answer requests only for their forwards.

        Raises:
            HookError: the model failed, or did not run once for every request.
        """
        with watched(self.model, self.sites) as watch:
            self._generate(requests, CacheHook(None), watch)
        self._check(watch, len(requests), strict=True)

    @torch.no_grad()
    def answers(
        self, requests: Sequence[Instance], hook: CacheHook, edited: bool
    ) -> tuple[list[GenerationResult], int]:
        """Return the answers to unchanged requests, and the number of tokens in the prompts.

        Args:
            requests: the requests, with documents that the wrapper finds in its ``task_dict``.
            hook: the harness's cache of answers.
            edited: True if an edit is applied. Then an answer of the wrapper is an error if its model failed or did not
                run. Without an edit such an answer is kept, with a warning.

        Raises:
            HookError: see ``edited``, or the wrapper generates without a cache.
        """
        with watched(self.model, self.sites) as watch:
            results = self._generate(requests, hook, watch)
        self._check(watch, len(requests), strict=edited)
        if edited and not watch.cached:
            raise HookError(
                f"base={self.config.name} generates without a cache, so that the edit of earlier answer tokens is lost "
                "at each new one: pass use_cache=True"
            )
        return results, watch.tokens

    def _generate(self, requests: Sequence[Instance], hook: CacheHook, watch: Watch) -> list[GenerationResult]:
        self.wrapper.cache_hook = hook
        try:
            outputs = self.wrapper.generate_until(list(requests))
        except Exception as error:
            if isinstance(watch.error, MtvError):
                raise watch.error from error
            if isinstance(error, AssertionError):
                raise ArgumentError(f"base={self.config.name} refuses: {one_line(error)}") from error
            if absent := _absent_imports(self.wrapper, error):
                raise ArgumentError(
                    f"base={self.config.name} failed: {one_line(error)}; it did without {', '.join(absent)}, which did "
                    "not import: pip install lmms-mtv[bases]"
                ) from error
            raise
        if len(outputs) != len(requests):
            raise HookError(f"base={self.config.name} gave {len(outputs)} answers to {len(requests)} requests")
        return [GenerationResult(*unwrap_generation_output(output)) for output in outputs]

    def _check(self, watch: Watch, prompts: int, strict: bool) -> None:
        """Raise or log an error that the wrapper hides: a failed forward, or a missing forward.

        The error is raised if ``strict``, and logged otherwise. An error of this package's own hooks is always raised.
        """
        if isinstance(watch.error, MtvError):
            raise watch.error
        if watch.error is not None:
            failure = f"its model failed ({type(watch.error).__name__}: {one_line(watch.error)})"
        elif watch.prompts < prompts:
            failure = f"its model saw {watch.prompts} of {prompts} prompts"
        else:
            return
        message = f"base={self.config.name} answered although {failure}; its own log may say why"
        if strict:
            raise HookError(message) from watch.error
        logger.warning(message)


def _batch_size(wrapper: lmms) -> int:
    try:
        return max(1, int(getattr(wrapper, "batch_size", 1)))
    except (TypeError, ValueError):
        return 1


def _absent_imports(wrapper: lmms, error: Exception) -> list[str]:
    """Return the names in the wrapper's generation that are None because an optional import failed."""
    if not isinstance(error, TypeError) or "NoneType" not in str(error):
        return []
    function = type(wrapper).generate_until
    module = vars(sys.modules[function.__module__])
    return [name for name in function.__code__.co_names if name in module and module[name] is None]
