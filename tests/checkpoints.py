"""Tiny random models saved as real ones are: weights, configuration, tokenizer, processor, chat template."""

from __future__ import annotations

from pathlib import Path

import torch
import zoo
from transformers import (
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2ImageProcessor,
    Idefics2Processor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from lmms_mtv.shapes import tiny

QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant\n{% endif %}"
)


def _text(tokenizer: PreTrainedTokenizerFast, **more) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        **more,
    }


def _save(model: PreTrainedModel, processor, folder: Path) -> Path:
    # Wide random weights, so that answers differ from one prompt to the next.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.5, generator=generator)
    tokenizer = getattr(processor, "tokenizer", processor)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def idefics2(folder: Path) -> Path:
    """An image-text model whose images take 3 tokens."""
    tokenizer = tiny.tokenizer()
    images = Idefics2ImageProcessor(do_image_splitting=False, size={"longest_edge": 32, "shortest_edge": 16})
    processor = Idefics2Processor(images, tokenizer, image_seq_len=3, chat_template=tiny.CHAT_TEMPLATE)
    config = Idefics2Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        text_config={"model_type": "mistral", **_text(tokenizer)},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        perceiver_config=zoo.PERCEIVER,
    )
    return _save(Idefics2ForConditionalGeneration(config), processor, folder)


def qwen2_5_vl(folder: Path) -> Path:
    """An image-text model with images of their own resolution."""
    tokenizer = tiny.tokenizer()
    special = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    ids = dict(zip(special, tokenizer.convert_tokens_to_ids(special), strict=True))
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(patch_size=4, min_pixels=64, max_pixels=1024),
        tokenizer,
        Qwen2VLVideoProcessor(patch_size=4),
        chat_template=QWEN_TEMPLATE,
    )
    config = Qwen2_5_VLConfig(
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        text_config=_text(tokenizer, rope_scaling={"type": "mrope", "mrope_section": [2, 1, 1]}),
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
    )
    return _save(Qwen2_5_VLForConditionalGeneration(config), processor, folder)
