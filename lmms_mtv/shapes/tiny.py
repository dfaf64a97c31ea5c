"""The tiny model: the Idefics3 (SmolVLM) architecture with 1.3 million parameters.

The model has a processor, a tokenizer and a chat template, so the Auto classes load its checkpoint as any other
checkpoint.
"""

from __future__ import annotations

from typing import Final

import torch
from tokenizers import Regex, Tokenizer
from tokenizers import models as tokenizer_models
from tokenizers import pre_tokenizers as split
from torch import nn
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)

from lmms_mtv.shapes import questions, words

IMAGE_SIDE: Final = 32
PATCH: Final = 8
PIXEL_SHUFFLE: Final = 2
IMAGE_TOKENS: Final = (IMAGE_SIDE // PATCH // PIXEL_SHUFFLE) ** 2
CONTEXT: Final = 1024

END_OF_TURN: Final = "<end_of_utterance>"
_SPECIAL: Final = ("<unk>", "<pad>", "<eos>", "<image>", "<fake_token_around_image>", "<global-img>", END_OF_TURN)
_TURN: Final = "<|im_start|>"

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message['role'] | capitalize }}:"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>Assistant:{% endif %}"
)


def _vocabulary() -> list[str]:
    """Return all tokens: the special tokens, then the words of the questions and answers."""
    texts = [questions.QUESTION, "User Assistant System \n . , ; ! \" '"]
    texts += [questions.named_question(a, lang) for a in words.ATTRIBUTES for lang in words.LANGUAGES]
    texts += [words.name(a, v, lang) for a in words.ATTRIBUTES for v in words.values(a) for lang in words.LANGUAGES]
    texts += [label for labels in words.LABELS.values() for label in labels]
    splitter = _splitter()
    tokens = dict.fromkeys(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
    return [*_SPECIAL, _TURN, *tokens]


def _splitter() -> split.PreTokenizer:
    """Return the pre-tokenizer that splits a text into words, punctuation marks and line breaks."""
    return split.Sequence(
        [
            split.Split(Regex(r"\n"), "isolated"),
            split.Split(Regex(r"[^\S\n]+"), "removed"),
            split.Split(Regex(r"[^\w\s]"), "isolated"),
        ]
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer: each word, punctuation mark or line break is one token."""
    model = tokenizer_models.WordLevel({word: i for i, word in enumerate(_vocabulary())}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = _splitter()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=[*_SPECIAL[3:], _TURN],
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def processor() -> Idefics3Processor:
    """Return the processor of the tiny model: every image is scaled to 32 x 32 pixels and takes 4 image tokens."""
    images = Idefics3ImageProcessor(
        do_image_splitting=False, size={"longest_edge": IMAGE_SIDE}, max_image_size={"longest_edge": IMAGE_SIDE}
    )
    return Idefics3Processor(images, tokenizer(), image_seq_len=IMAGE_TOKENS, chat_template=CHAT_TEMPLATE)


def config(vocabulary: PreTrainedTokenizerFast) -> Idefics3Config:
    """Return the configuration of the tiny model.

    The decoder has 4 layers of 8 heads of 16 dimensions, and 4 heads for keys and values.
    """
    ids = {"pad_token_id": vocabulary.pad_token_id, "eos_token_id": vocabulary.eos_token_id, "bos_token_id": None}
    return Idefics3Config(
        image_token_id=vocabulary.convert_tokens_to_ids("<image>"),
        scale_factor=PIXEL_SHUFFLE,
        text_config={
            "model_type": "llama",
            "vocab_size": len(vocabulary),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": CONTEXT,
            **ids,
        },
        vision_config={
            "image_size": IMAGE_SIDE,
            "patch_size": PATCH,
            "hidden_size": 96,
            "intermediate_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
        },
        **ids,
    )


def untrained(vocabulary: PreTrainedTokenizerFast, seed: int) -> Idefics3ForConditionalGeneration:
    """Return the model before training, in float32.

    Every matrix starts from a normal distribution with variance ``1 / fan_in``; with the default of
    transformers (0.02 for all matrices), a model of this size barely learns to see.

    Args:
        vocabulary: the tokenizer of the model.
        seed: the seed of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    model = Idefics3ForConditionalGeneration(config(vocabulary)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                parameter.normal_(0.0, fan_in**-0.5, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    model.generation_config.eos_token_id = [
        vocabulary.eos_token_id,
        vocabulary.convert_tokens_to_ids(END_OF_TURN),
    ]
    model.generation_config.pad_token_id = vocabulary.pad_token_id
    return model
