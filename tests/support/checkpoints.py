"""Tiny random models saved as real ones are: weights, configuration, tokenizer, processor, chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessor,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vImageProcessor,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    GotOcr2ImageProcessor,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2ImageProcessor,
    Idefics2Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessor,
    MllamaProcessor,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from lmms_mtv.shapes import tiny
from support import zoo

QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant\n{% endif %}"
)

TURNS_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] | capitalize }}:"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>Assistant:{% endif %}"
)


def _vision(image_size: int, patch_size: int) -> dict[str, int]:
    return {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": patch_size,
    }


def _text(tokenizer: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
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


def _save(model: PreTrainedModel, processor: Any, folder: Path) -> Path:
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


def _qwen_tokenizer() -> tuple[PreTrainedTokenizerFast, dict[str, int]]:
    """The tokenizer of words with Qwen's marks, and what a configuration calls them."""
    tokenizer = tiny.tokenizer()
    special = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return tokenizer, dict(zip(names, tokenizer.convert_tokens_to_ids(special), strict=False))


def _qwen_processor(kind: type[ProcessorMixin], tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    images = Qwen2VLImageProcessor(patch_size=4, min_pixels=64, max_pixels=1024)
    return kind(images, tokenizer, Qwen2VLVideoProcessor(patch_size=4), chat_template=QWEN_TEMPLATE)


def qwen2_vl(folder: Path) -> Path:
    """An image-text model with images of their own resolution."""
    tokenizer, ids = _qwen_tokenizer()
    processor = _qwen_processor(Qwen2VLProcessor, tokenizer)
    config = Qwen2VLConfig(
        **ids,
        text_config=_text(tokenizer, rope_scaling={"type": "mrope", "mrope_section": [2, 1, 1]}),
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
        },
    )
    return _save(Qwen2VLForConditionalGeneration(config), processor, folder)


def qwen2_5_vl(folder: Path) -> Path:
    """An image-text model with images of their own resolution and windows of attention in its encoder."""
    tokenizer, ids = _qwen_tokenizer()
    processor = _qwen_processor(Qwen2_5_VLProcessor, tokenizer)
    config = Qwen2_5_VLConfig(
        **ids,
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


def qwen3_vl(folder: Path) -> Path:
    """An image-text model with images of their own resolution, whose heads are wider than their share."""
    tokenizer, ids = _qwen_tokenizer()
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(patch_size=16, min_pixels=1024, max_pixels=4096),
        tokenizer,
        Qwen3VLVideoProcessor(patch_size=16),
        chat_template=QWEN_TEMPLATE,
    )
    rope = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4, "mrope_interleaved": True}
    config = Qwen3VLConfig(
        **ids,
        text_config=_text(tokenizer, head_dim=12, rope_parameters=rope),
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
    )
    return _save(Qwen3VLForConditionalGeneration(config), processor, folder)


def glm4v(folder: Path) -> Path:
    """GLM-4V: images of their own resolution."""
    marks = ["<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"]
    tokenizer = tiny.tokenizer()
    special = ["<|image|>", "<|video|>", "<|im_start|>", "<|im_end|>", *marks]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    template = QWEN_TEMPLATE.replace("<|vision_start|>", marks[0]).replace("<|vision_end|>", marks[1])
    size = {"shortest_edge": 512, "longest_edge": 2048}
    processor = Glm4vProcessor(
        Glm4vImageProcessor(patch_size=4, size=size),
        tokenizer,
        Glm4vVideoProcessor(patch_size=4, size=size),
        chat_template=template.replace("<|image_pad|>", "<|image|>"),
    )
    names = ("image_token_id", "video_token_id")
    spans = ("image_start_token_id", "image_end_token_id", "video_start_token_id", "video_end_token_id")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(special[:2]), strict=True))
    ids |= dict(zip(spans, tokenizer.convert_tokens_to_ids(marks), strict=True))
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    config = Glm4vConfig(
        **ids,
        text_config=_text(tokenizer, rope_parameters=rope),
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "image_size": 32,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "out_hidden_size": 32,
        },
    )
    return _save(Glm4vForConditionalGeneration(config), processor, folder)


def llava(folder: Path) -> Path:
    """LLaVA 1.5: images of one size, 4 tokens each."""
    tokenizer = tiny.tokenizer()
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TURNS_TEMPLATE,
    )
    config = LlavaConfig(
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        text_config={"model_type": "llama", **_text(tokenizer)},
        vision_config={"model_type": "clip_vision_model", **_vision(16, 8), "projection_dim": 16},
    )
    return _save(LlavaForConditionalGeneration(config), processor, folder)


def internvl(folder: Path) -> Path:
    """InternVL in transformers: images of one size, 4 tokens each."""
    special = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special.values())})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens=special,
    )
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size={"height": 32, "width": 32}, crop_to_patches=False),
        tokenizer,
        InternVLVideoProcessor(size={"height": 32, "width": 32}),
        image_seq_length=4,
        chat_template=TURNS_TEMPLATE.replace("<image>", "<IMG_CONTEXT>"),
    )
    config = InternVLConfig(
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
        text_config={"model_type": "qwen2", **_text(tokenizer)},
        vision_config=_vision(32, 8) | {"image_size": [32, 32], "patch_size": [8, 8]},
    )
    return _save(InternVLForConditionalGeneration(config), processor, folder)


def mistral3(folder: Path) -> Path:
    """Mistral 3: images of their own resolution, a mark at the end of each row of patches."""
    tokenizer = tiny.tokenizer()
    special = ["[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]", "<s>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    processor = PixtralProcessor(
        PixtralImageProcessor(patch_size=8, size={"longest_edge": 32}),
        tokenizer,
        patch_size=8,
        spatial_merge_size=2,
        chat_template="{% for message in messages %}{% if message['role'] == 'user' %}[INST]"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}[IMG]{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}[/INST]"
        "{% else %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{{ message['content'][0]['text'] }}{% endif %}<eos>{% endif %}{% endfor %}",
    )
    config = Mistral3Config(
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        text_config={"model_type": "mistral", **_text(tokenizer)},
        vision_config={"model_type": "pixtral", **_vision(32, 8), "head_dim": 8},
    )
    return _save(Mistral3ForConditionalGeneration(config), processor, folder)


def gemma3(folder: Path) -> Path:
    """Gemma 3: images of one size, 4 tokens each, sliding and full attention in turns."""
    special = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special.values())})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens=special,
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": 32, "width": 32}),
        tokenizer,
        image_seq_length=4,
        chat_template=TURNS_TEMPLATE.replace("<image>", "<start_of_image>"),
    )
    ids = dict(zip(special, tokenizer.convert_tokens_to_ids(list(special.values())), strict=True))
    config = Gemma3Config(
        image_token_index=ids["image_token"],
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
        mm_tokens_per_image=4,
        text_config=_text(
            tokenizer, head_dim=8, sliding_window=512, layer_types=["sliding_attention", "full_attention"]
        ),
        vision_config=_vision(32, 8),
        tie_word_embeddings=False,
    )
    return _save(Gemma3ForConditionalGeneration(config), processor, folder)


def mllama(folder: Path) -> Path:
    """Llama 3.2 Vision: images of up to 2 tiles of 17 keys, which the second block alone attends to."""
    special = {"image_token": "<|image|>"}
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*special.values(), "<|python_tag|>"]})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens=special,
    )
    processor = MllamaProcessor(
        MllamaImageProcessor(size={"height": 16, "width": 16}, max_image_tiles=2),
        tokenizer,
        chat_template=TURNS_TEMPLATE.replace("<image>", "<|image|>"),
    )
    config = MllamaConfig(
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
        text_config=_text(
            tokenizer, num_hidden_layers=3, cross_attention_layers=[1], bos_token_id=tokenizer.bos_token_id
        ),
        vision_config={
            **_vision(16, 4),
            "attention_heads": 2,
            "num_global_layers": 1,
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            "intermediate_layers_indices": [0],
            "vision_output_dim": 32,
        },
    )
    model = MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "_gate" in name:  # else zero, and closed
            torch.nn.init.constant_(parameter, 0.7)
    return _save(model, processor, folder)
