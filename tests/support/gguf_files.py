"""A small GGUF file of a random Llama, with a tokenizer of single characters."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

CHARACTERS = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
"""Of byte-level BPE: Ġ is the space, Ċ the line break."""

TOKENS = ["<unk>", "<s>", "</s>", *CHARACTERS, "ab"]


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.5,
        tie_word_embeddings=False,
    )


def build(path: Path, seed: int = 0) -> Path:
    """Write the file, with weights in float32."""
    torch.manual_seed(seed)
    made = config()
    model = LlamaForCausalLM(made)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(made.num_hidden_layers)
    writer.add_context_length(made.max_position_embeddings)
    writer.add_embedding_length(made.hidden_size)
    writer.add_feed_forward_length(made.intermediate_size)
    writer.add_head_count(made.num_attention_heads)
    writer.add_head_count_kv(made.num_key_value_heads)
    writer.add_rope_dimension_count(made.hidden_size // made.num_attention_heads)
    writer.add_layer_norm_rms_eps(made.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * (len(TOKENS) - 3)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, made.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = made.num_attention_heads if "q_proj" in name else made.num_key_value_heads
            # GGUF has the halves of a rotated pair side by side.
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        stored_name = names.get_name(name, try_suffixes=(".weight",))
        assert stored_name is not None, name
        writer.add_tensor(stored_name, np.ascontiguousarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
