"""Tiny random models of real architectures, built from configurations, with inputs of images and text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from support import matrix

VOCABULARY, PAD, IMAGE, VISION_START, VISION_END = 120, 0, 100, 101, 102
LAYERS, HEADS, HEAD_DIM = 3, 4, 8


@dataclass(frozen=True)
class Tiny:
    """A model in float32, how many tokens an image takes, and the inputs that go with images.

    ``framed``: images stand between two marks; ``absolute``: positions have to be given where there is padding;
    ``kinds``: the input that tells tokens of images from those of text; ``tiles``: of each image, with the input
    ``cross_attention_mask`` that shows all tokens but padding the first of them; ``layers``: the blocks with heads.
    """

    name: str
    model: nn.Module
    image_tokens: int = 0
    media: Callable[[list[int]], dict[str, Tensor]] | None = None
    heads: int = HEADS
    head_dim: int = HEAD_DIM
    framed: bool = False
    absolute: bool = False
    kinds: str | None = None
    tiles: int = 0
    layers: tuple[int, ...] = tuple(range(LAYERS))

    def row(self, text: list[int]) -> list[int]:
        """Token ids of one prompt: an image, where the model takes one, and ``text``."""
        image = [IMAGE] * self.image_tokens
        return [*([VISION_START, *image, VISION_END] if self.framed else image), *text]

    def inputs(self, texts: list[list[int]], side: str = "left", padding: int = 0) -> dict[str, Tensor]:
        """A padded batch of prompts with one image each, which depends on the first token of the text.

        ``padding`` is how much the longest row has of it.
        """
        rows = [self.row(text) for text in texts]
        longest = max(map(len, rows)) + padding
        ids, mask = [], []
        for row in rows:
            pad = [PAD] * (longest - len(row))
            ids.append([*pad, *row] if side == "left" else [*row, *pad])
            ones = [1] * len(row)
            mask.append([*([0] * len(pad)), *ones] if side == "left" else [*ones, *([0] * len(pad))])
        made = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        if self.media is not None:
            made |= self.media([text[0] for text in texts])
        if self.absolute:
            made["position_ids"] = (made["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return made | self.kinds_of(made["input_ids"])

    def kinds_of(self, ids: Tensor) -> dict[str, Tensor]:
        """What a model asks for of each token: 1 for one of an image and 0 for any other; the tiles that it sees."""
        made = {self.kinds: (ids == IMAGE).long()} if self.kinds else {}
        if self.tiles:
            first = (torch.arange(self.tiles) == 0).long()
            made["cross_attention_mask"] = (ids != PAD).long()[..., None, None] * first
        return made


def _text(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HEADS * HEAD_DIM,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def _vision(patch_size: int) -> dict[str, int]:
    return {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": patch_size,
    }


def _noise(seeds: list[int], *shape: int) -> Tensor:
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def llama() -> Tiny:
    return Tiny("llama", transformers.LlamaForCausalLM(transformers.LlamaConfig(**_text(attention_bias=True))))


def qwen3() -> Tiny:
    return Tiny("qwen3", transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_text(head_dim=12))), head_dim=12)


def gpt2() -> Tiny:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=256, n_embd=32, n_layer=LAYERS, n_head=HEADS, bos_token_id=1, eos_token_id=2
    )
    return Tiny("gpt2", transformers.GPT2LMHeadModel(config), absolute=True)


def gemma2(window: int = 64) -> Tiny:
    return Tiny(
        "gemma2",
        transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**_text(head_dim=12, sliding_window=window))),
        head_dim=12,
    )


def gemma3(window: int = 64) -> Tiny:
    """With images, and layers of sliding and full attention; its decoder is handed a dict of masks."""
    config = transformers.Gemma3Config(
        text_config=_text(
            head_dim=12,
            sliding_window=window,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        vision_config={"model_type": "siglip_vision_model", **_vision(patch_size=4)},
        mm_tokens_per_image=4,
        image_token_id=IMAGE,
    )
    media = lambda seeds: {"pixel_values": _noise(seeds, 3, 16, 16)}  # noqa: E731
    return Tiny(
        "gemma3", transformers.Gemma3ForConditionalGeneration(config), 4, media, head_dim=12, kinds="token_type_ids"
    )


PERCEIVER = {
    "resampler_n_latents": 3,
    "resampler_depth": 1,
    "resampler_n_heads": 2,
    "resampler_head_dim": 8,
    "num_key_value_heads": 1,
    "hidden_size": 32,
}
"""A resampler that makes three tokens of an image."""


def idefics2() -> Tiny:
    config = transformers.Idefics2Config(
        image_token_id=IMAGE,
        text_config={"model_type": "mistral", **_text()},
        vision_config=_vision(patch_size=8),
        perceiver_config=PERCEIVER,
    )
    media = lambda seeds: {"pixel_values": _noise(seeds, 1, 3, 16, 16)}  # noqa: E731
    return Tiny("idefics2", transformers.Idefics2ForConditionalGeneration(config), 3, media)


def idefics3() -> Tiny:
    config = transformers.Idefics3Config(
        image_token_id=IMAGE,
        scale_factor=2,
        text_config={"model_type": "llama", **_text()},
        vision_config=_vision(patch_size=4),
    )
    media = lambda seeds: {"pixel_values": _noise(seeds, 1, 3, 16, 16)}  # noqa: E731
    return Tiny("idefics3", transformers.Idefics3ForConditionalGeneration(config), 4, media)


def llava() -> Tiny:
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**_text()),
        image_token_index=IMAGE,
        image_seq_length=4,
    )
    return Tiny(
        "llava",
        transformers.LlavaForConditionalGeneration(config),
        4,
        lambda seeds: {"pixel_values": _noise(seeds, 3, 16, 16)},
    )


def mllama() -> Tiny:
    """Its second block attends to the image alone: 2 tiles of 17 keys, the second of which is padding."""
    config = transformers.MllamaConfig(
        text_config=_text(num_hidden_layers=LAYERS + 1, cross_attention_layers=[1]),
        vision_config={
            **_vision(patch_size=4),
            "attention_heads": 2,
            "num_global_layers": 1,
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2]],
            "intermediate_layers_indices": [0],
            "vision_output_dim": 32,
        },
        image_token_index=IMAGE,
    )
    model = transformers.MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "_gate" in name:  # else zero, and closed
            torch.nn.init.constant_(parameter, 0.7)
    media = lambda seeds: {  # noqa: E731
        "pixel_values": _noise(seeds, 1, 2, 3, 16, 16),
        "aspect_ratio_ids": torch.ones(len(seeds), 1, dtype=torch.long),
        "aspect_ratio_mask": torch.tensor([[[1, 0]]] * len(seeds)),
    }
    return Tiny("mllama", model, 1, media, tiles=2, layers=(0, 2, 3))


def _patches(seeds: list[int], patch: int) -> dict[str, Tensor]:
    # 4 x 4 patches an image, 2 frames each, merged to 2 x 2 tokens.
    return {
        "pixel_values": _noise(seeds, 16, 3 * 2 * patch * patch).flatten(0, 1),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * len(seeds)),
    }


_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def qwen2_5_vl() -> Tiny:
    config = transformers.Qwen2_5_VLConfig(
        text_config=_text(rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}),
        vision_config={**_QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
        image_token_id=IMAGE,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    return Tiny("qwen2_5_vl", model, 4, lambda seeds: _patches(seeds, 4), framed=True, kinds="mm_token_type_ids")


def qwen3_vl() -> Tiny:
    config = transformers.Qwen3VLConfig(
        text_config=_text(
            head_dim=12,
            rope_parameters={
                "rope_type": "default",
                "mrope_section": [2, 2, 2],
                "rope_theta": 1e4,
                "mrope_interleaved": True,
            },
        ),
        vision_config={**_QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        image_token_id=IMAGE,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    model = transformers.Qwen3VLForConditionalGeneration(config)
    media = lambda seeds: _patches(seeds, 4)  # noqa: E731
    return Tiny("qwen3_vl", model, 4, media, head_dim=12, framed=True, kinds="mm_token_type_ids")


ARCHITECTURES = (idefics2, idefics3, llava, qwen2_5_vl, qwen3_vl, mllama, gemma3, gemma2, qwen3, llama, gpt2)
REPRESENTATIVES = (idefics3, llama)
"""An image-text model and a text model."""
PARAMETERS = matrix.members(ARCHITECTURES, *REPRESENTATIVES, label=matrix.name)


def build(architecture: Callable[[], Tiny]) -> Tiny:
    """The model with random weights large enough that every part matters, and non-zero biases."""
    torch.manual_seed(0)
    tiny = architecture()
    with torch.no_grad():
        for name, parameter in tiny.model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    tiny.model.eval()
    return tiny


def hooks(model: nn.Module) -> int:
    """Number of hooks of any kind in a model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
