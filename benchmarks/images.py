"""Images of random pixels, in the form that the processors of the models in :mod:`benchmarks.models` return."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_GRID = (36, 48)
"""Patches of an image, for models that take any number of patches: 504 x 672 pixels in patches of 14."""


@dataclass(frozen=True)
class Images:
    """The token ids of one image in a prompt, and the other inputs that the model needs for images."""

    ids: tuple[int, ...]
    inputs: Callable[[Tensor, int], dict[str, Tensor]]
    """Function of the token ids [rows, n] of prompts and the number of images in each prompt."""


def of(model: nn.Module) -> Images | None:
    """Return the images for ``model``; None if the model takes no images."""
    config: Any = model.config
    makers = {"idefics2": _idefics2, "qwen2_5_vl": _qwen}
    return makers[config.model_type](config, next(model.parameters())) if config.model_type in makers else None


def _idefics2(config: Any, weights: Tensor) -> Images:
    """Return images of three by four, as wide as the encoder takes; the resampler makes a fixed number of tokens."""
    patch, longer = config.vision_config.patch_size, config.vision_config.image_size
    shorter = max(longer * 3 // 4 // patch, 1) * patch
    pixels = _noise(weights, 3, longer, shorter)

    def inputs(ids: Tensor, count: int) -> dict[str, Tensor]:
        return {"pixel_values": pixels.expand(ids.shape[0], count, -1, -1, -1)}

    return Images((config.image_token_id,) * config.perceiver_config.resampler_n_latents, inputs)


def _qwen(config: Any, weights: Tensor) -> Images:
    """Return images with one token for each group of patches, between a token for the start and one for the end."""
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
