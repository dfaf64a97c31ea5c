"""Images of random pixels, as the processors of the models in :mod:`benchmarks.models` would hand them over."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_GRID = (36, 48)
"""Patches of an image where their number is free: of 504 x 672 pixels with patches of 14."""


@dataclass(frozen=True)
class Images:
    """What stands for one image among the token ids of a prompt, and what the model is given beside them."""

    ids: tuple[int, ...]
    inputs: Callable[[Tensor, int], dict[str, Tensor]]
    """Of the token ids [rows, n] of prompts with so many images each."""


def of(model: nn.Module) -> Images | None:
    """The images that ``model`` sees; None if it sees none."""
    config: Any = model.config
    makers = {"idefics2": _idefics2, "qwen2_5_vl": _qwen}
    return makers[config.model_type](config, next(model.parameters())) if config.model_type in makers else None


def _idefics2(config: Any, weights: Tensor) -> Images:
    """Three by four, the longer side as long as the encoder's; its resampler makes a fixed number of tokens."""
    patch, longer = config.vision_config.patch_size, config.vision_config.image_size
    shorter = max(longer * 3 // 4 // patch, 1) * patch
    pixels = _noise(weights, 3, longer, shorter)

    def inputs(ids: Tensor, count: int) -> dict[str, Tensor]:
        return {"pixel_values": pixels.expand(ids.shape[0], count, -1, -1, -1)}

    return Images((config.image_token_id,) * config.perceiver_config.resampler_n_latents, inputs)


def _qwen(config: Any, weights: Tensor) -> Images:
    """As many tokens as groups of patches, between two that mark an image's beginning and end."""
    vision = config.vision_config
    grid = torch.tensor([(1, *_GRID)], device=weights.device)
    pixels = _noise(weights, math.prod(_GRID), 3 * vision.temporal_patch_size * vision.patch_size**2)
    tokens = math.prod(_GRID) // vision.spatial_merge_size**2

    def inputs(ids: Tensor, count: int) -> dict[str, Tensor]:
        images = ids.shape[0] * count
        return {
            "pixel_values": pixels.repeat(images, 1),
            "image_grid_thw": grid.repeat(images, 1),
            "mm_token_type_ids": (ids == config.image_token_id).int(),
        }

    return Images((config.vision_start_token_id, *[config.image_token_id] * tokens, config.vision_end_token_id), inputs)


def _noise(weights: Tensor, *shape: int) -> Tensor:
    generator = torch.Generator(weights.device).manual_seed(0)
    return torch.randn(*shape, generator=generator, device=weights.device, dtype=weights.dtype)
