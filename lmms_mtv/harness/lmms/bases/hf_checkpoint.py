"""A checkpoint loaded by the Auto classes of transformers: the model, its processor and its identity."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from lmms_mtv.errors import ArgumentError, MtvError
from lmms_mtv.harness.arguments import near_argument
from lmms_mtv.harness.hf_config import HfConfig
from lmms_mtv.models import gguf
from lmms_mtv.models.identity import Identity, adapter_of, identity
from lmms_mtv.models.text import one_line
from lmms_mtv.pictures import EYES
from lmms_mtv.runtime.compat import unwrapped
from lmms_mtv.shapes import CHECKPOINT

TINY: Final = "tiny"
"""Name of the bundled checkpoint in ``pretrained=``."""

PICTURES: Final = "pictures"
"""Name of the model of the pictures in ``pretrained=``; see :mod:`lmms_mtv.pictures.model`."""

IMAGE_SETTINGS: Final = ("do_image_splitting", "min_pixels", "max_pixels")
"""Arguments of the base that are settings of an image processor."""


@dataclass(frozen=True)
class HfCheckpoint:
    """A loaded checkpoint.

    Attributes:
        model: the model.
        processor: the processor of a multimodal model, or the tokenizer of a text model.
        identity: the identity of the checkpoint.
        adapter: the digest of the adapter; None without an adapter.
    """

    model: nn.Module
    processor: Any
    identity: Identity
    adapter: str | None = None


def load(config: HfConfig) -> HfCheckpoint:
    """Load the checkpoint that a configuration names, and return it on its device, ready to run.

    Raises:
        ArgumentError: the checkpoint or the adapter cannot be loaded, or the image processor has no such setting.
    """
    loaded = _pictures(config) if config.pretrained == PICTURES else _checkpoint(config)
    model = loaded.model if config.peft is None else _adapted(loaded.model, config.peft)
    if config.device_map is None:
        model.to(_device(config.device))
    return replace(loaded, model=model.eval(), adapter=None if config.peft is None else adapter_of(config.peft))


def _pictures(config: HfConfig) -> HfCheckpoint:
    """Return the model of the pictures, in float32 unless a dtype is given.

    Raises:
        ArgumentError: an argument is given that only other models take.
    """
    others = ("gguf_file", "revision", "device_map", "min_pixels", "max_pixels")
    if given := [name for name in others if getattr(config, name) is not None]:
        raise ArgumentError(f"pretrained={PICTURES} takes no {', '.join(given)}: leave it out")
    # The modules of its architecture would be loaded for every other model.
    from lmms_mtv.pictures import model as pictures

    dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    model, processor = pictures.load(dtype, config.attn_implementation)
    return HfCheckpoint(model, processor, identity(str(EYES), None))


def _checkpoint(config: HfConfig) -> HfCheckpoint:
    """Return the checkpoint of files or of the hub; see :func:`load`."""
    source, file = gguf.located(str(CHECKPOINT) if config.pretrained == TINY else config.pretrained, config.gguf_file)
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    if file is not None:
        options["gguf_file"] = file
    try:
        settings = AutoConfig.from_pretrained(source, **options)
        multimodal = type(settings) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        if multimodal:
            processor = _processor(source, config, options)
        else:
            processor = AutoTokenizer.from_pretrained(source, **options)
        loader = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
        model = loader.from_pretrained(
            source,
            dtype=config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
            attn_implementation=config.attn_implementation,
            device_map=config.device_map,
            # The configuration is passed on, so that a GGUF file is read once less.
            **({} if file is None else {"config": settings}),
            **options,
        )
    except MtvError:
        raise
    except (OSError, ValueError, KeyError) as error:
        hint = near_argument(config.pretrained, (TINY, PICTURES, *gguf.PACKAGED))
        raise ArgumentError(
            f"pretrained={config.pretrained} cannot be loaded:{hint} {one_line(error)} (give the name of a model on "
            f"the hub, a folder, {TINY!r} or {PICTURES!r}; without network, the model has to be in the local cache)"
        ) from error
    # A branch or a tag can move; a commit cannot.
    known = identity(source, getattr(settings, "_commit_hash", None), file)
    return HfCheckpoint(model, processor, known._replace(revision=known.revision or config.revision))


def image_settings_of(image_processor: Any) -> Mapping[str, Any]:
    """Return the settings that an image processor knows, by name."""
    settings: Mapping[str, Any] = getattr(getattr(image_processor, "valid_kwargs", None), "__annotations__", {})
    return settings


def _device(name: str | None) -> torch.device:
    """Return the device ``name``, or the GPU if there is one. Each of several processes has its own GPU."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device


def _processor(source: str, config: HfConfig, options: Mapping[str, Any]) -> Any:
    """Return the processor with the image settings of the configuration.

    Raises:
        ArgumentError: the processor has no such setting.
    """
    wanted = {name: getattr(config, name) for name in IMAGE_SETTINGS if getattr(config, name) is not None}
    image_processor = getattr(AutoProcessor.from_pretrained(source, **options), "image_processor", None)
    known = image_settings_of(image_processor)
    # A processor that cannot cut images into crops already behaves as do_image_splitting=False demands.
    settings = {name: value for name, value in wanted.items() if name in known or value is not False}
    if lacking := sorted(settings.keys() - set(known)):
        raise ArgumentError(
            f"{', '.join(lacking)}: the image processor of {config.pretrained} ({type(image_processor).__name__}) has "
            "no such setting, leave it out"
        )
    return AutoProcessor.from_pretrained(source, **options, **settings)


def _adapted(model: Any, source: str) -> nn.Module:
    """Return the model with a PEFT adapter.

    Raises:
        ArgumentError: the adapter does not fit the model, or is a learned prompt.
    """
    import peft

    try:
        adapted = peft.PeftModel.from_pretrained(model, source)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ArgumentError(f"peft={source} cannot be put on the model: {one_line(error)}") from error
    inner = unwrapped(adapted)
    if inner is adapted:
        raise ArgumentError(f"peft={source} is a learned prompt, whose positions a vector does not know: leave it out")
    return inner
