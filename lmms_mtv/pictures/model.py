"""The model of the pictures: LLaVA, of Gemma 3 270M as it was published and of eyes that were trained for it."""

from __future__ import annotations

from typing import Any, Final

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Swinv2Config,
    ViTImageProcessor,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from lmms_mtv.models.gguf import located
from lmms_mtv.pictures import EYES
from lmms_mtv.pictures.drawings import SIDE

LANGUAGE_MODEL: Final = "gemma3-270m"
"""The packaged language model; see :mod:`lmms_mtv.models.gguf`."""

IMAGE_TOKEN: Final = "<unused0>"
"""The token that stands for a part of an image: one that the language model has and that no text uses."""

IMAGE_TOKENS: Final = 4
"""Tokens of an image."""

_PATCH: Final = 32
"""Pixels of the side of the part of an image that one token is for: the encoder halves a side five times."""

_VISION: Final = {
    "image_size": SIDE,
    "patch_size": 4,
    "embed_dim": 48,
    "depths": [2, 2, 4, 1],
    "num_heads": [2, 4, 8, 16],
    "window_size": 4,
    "drop_path_rate": 0.0,
}


WEIGHTS: Final = "eyes.safetensors"
"""The file of the trained weights, float16."""


def load(
    dtype: torch.dtype = torch.float32, attn_implementation: str | None = None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Return the model with its trained eyes, in evaluation mode on the CPU, and its processor.

    Args:
        dtype: the dtype of the weights.
        attn_implementation: the argument of transformers that sets the attention implementation of the language model.

    Raises:
        InstallationError: the package that carries the language model is not installed.
    """
    language, tokenizer = language_model(dtype, attn_implementation)
    llava = compose(language, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    trained = load_file(EYES / WEIGHTS)
    for name, eye in eyes(llava).items():
        begin = f"{name}."
        eye.load_state_dict({key.removeprefix(begin): value for key, value in trained.items() if key.startswith(begin)})
        eye.to(dtype)
    # From this folder a vector knows the model that it was fitted on.
    llava.config.name_or_path = llava.name_or_path = str(EYES)
    return llava.eval(), processor(tokenizer)


def language_model(dtype: torch.dtype, attn_implementation: str | None = None) -> tuple[Any, Any]:
    """Return the language model and its tokenizer; see :func:`load`."""
    folder, file = located(LANGUAGE_MODEL, None)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    options = {"gguf_file": file, "dtype": dtype, "attn_implementation": attn_implementation}
    return AutoModelForCausalLM.from_pretrained(folder, **options), tokenizer


def compose(language_model: Any, image_token_id: int) -> LlavaForConditionalGeneration:
    """Return a language model with new eyes before it, in its dtype. Nothing of the language model changes.

    Args:
        language_model: a causal language model of transformers.
        image_token_id: the id of :data:`IMAGE_TOKEN`.
    """
    text = language_model.config
    config = LlavaConfig(
        vision_config=Swinv2Config(**_VISION),
        text_config=text,
        image_token_id=image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    # All weights come from elsewhere, so those that are made here take neither time nor memory.
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.language_model = language_model.model
    model.lm_head = language_model.lm_head
    model.model.vision_tower = AutoModel.from_config(config.vision_config)
    model.model.multi_modal_projector = LlavaMultiModalProjector(config)
    model.generation_config = language_model.generation_config
    return model


def eyes(model: LlavaForConditionalGeneration) -> dict[str, torch.nn.Module]:
    """Return the parts of a model that see, by name: the vision encoder and the projector."""
    return {"vision_tower": model.model.vision_tower, "multi_modal_projector": model.model.multi_modal_projector}


def processor(tokenizer: Any) -> LlavaProcessor:
    """Return the processor, which scales an image to 64 x 64 pixels and gives it four tokens."""
    images = ViTImageProcessor(size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(
        images, tokenizer, patch_size=_PATCH, vision_feature_select_strategy="full", image_token=IMAGE_TOKEN
    )
