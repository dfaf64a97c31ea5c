"""A language model of the architecture of Gemma 3 with random weights, and a tokenizer of single characters."""

from __future__ import annotations

import string

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from lmms_mtv.pictures.model import IMAGE_TOKEN


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer for which each character of a text is a token."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", IMAGE_TOKEN, *string.printable]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=[IMAGE_TOKEN],
    )


def language_model(hidden: int = 32) -> Gemma3ForCausalLM:
    """Return the model, in evaluation mode; the weights are the same in each call.

    Args:
        hidden: the size of the hidden state.
    """
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer()),
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gemma3ForCausalLM(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()
