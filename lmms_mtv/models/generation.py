"""The settings of a generation by transformers that both harnesses use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch import nn

GREEDY: Final[dict[str, Any]] = {"temperature": None, "top_p": None, "top_k": None}
"""Settings of a greedy generation; the checkpoint's own sampling settings would only cause warnings."""


def samples(settings: Mapping[str, Any]) -> bool:
    """Return whether a generation with the settings of a task draws its tokens at random."""
    temperature = settings.get("temperature")
    return bool(settings.get("do_sample", (temperature or 0) > 0)) and temperature != 0


def attention_of(model: nn.Module) -> dict[str, str]:
    """Return the attention implementation of a model, or an empty mapping for the default of transformers."""
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    default = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
    return {} if implementation in (None, default) else {"attn_implementation": str(implementation)}
