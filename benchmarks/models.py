"""Models of real shapes with random weights, built on the device from configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Idefics2Config,
    LlamaConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
)

from lmms_mtv.errors import unknown

DTYPES: Final = ("float32", "bfloat16", "float16")


def _tiny() -> Any:
    """Return the configuration of the decoder of the bundled checkpoint: 4 layers of 8 heads of 16 dimensions."""
    return LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=32768,
    )


def _half() -> Any:
    """Return the configuration of Qwen2-0.5B."""
    return Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )


def _idefics2() -> Any:
    """Return the configuration of Idefics2-8B: the text model of Mistral-7B with a SigLIP encoder and a perceiver."""
    return Idefics2Config(
        image_token_id=32001,
        text_config={
            "model_type": "mistral",
            "vocab_size": 32003,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "sliding_window": None,
        },
        vision_config={
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 980,
            "patch_size": 14,
        },
        perceiver_config={"resampler_n_latents": 64, "resampler_depth": 3},
    )


def _qwen() -> Any:
    """Return the configuration of Qwen2.5-VL-7B."""
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={"depth": 32, "hidden_size": 1280, "out_hidden_size": 3584, "tie_word_embeddings": False},
    )


_CONFIGS: Final[dict[str, Callable[[], Any]]] = {
    "tiny": _tiny,
    "half": _half,
    "idefics2-8b": _idefics2,
    "qwen2.5-vl-7b": _qwen,
}
NAMES: Final = tuple(_CONFIGS)


def build(
    name: str, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0, layers: int | None = None
) -> nn.Module:
    """Return the model of shape ``name`` in evaluation mode.

    Args:
        name: one of :data:`NAMES`.
        device: device on which the weights are drawn.
        dtype: precision of the weights.
        seed: seed of the weights.
        layers: number of blocks instead of the number in the configuration.

    Raises:
        ArgumentError: ``name`` is none of :data:`NAMES`.
    """
    if name not in _CONFIGS:
        raise unknown("model", name, NAMES)
    config = _CONFIGS[name]()
    text = config.get_text_config()
    if layers is not None:
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:1] * layers
    loader = AutoModelForCausalLM if text is config else AutoModelForImageTextToText
    torch.manual_seed(seed)
    with torch.device(device):
        model: nn.Module = loader.from_config(config, dtype=dtype)
    return model.eval()


def vocabulary(model: nn.Module) -> int:
    """Return the size of the vocabulary of ``model``."""
    config: Any = model.config
    return int(config.get_text_config().vocab_size)
