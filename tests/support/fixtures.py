"""Fixtures of all tests: prepared data and tiny models, each built once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, MiniMaxForCausalLM, PreTrainedModel

from lmms_mtv import data
from lmms_mtv.shapes import tiny as words
from support import official_files, zoo


@pytest.fixture(scope="session", autouse=True)
def library_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test touches the user's library."""
    root = tmp_path_factory.mktemp("library")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_MTV_LIBRARY", str(root))
        yield root


@pytest.fixture(scope="session")
def prepared_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small data of all tasks, built as the official archives are and prepared from them."""
    root = tmp_path_factory.mktemp("prepared")
    for task in official_files.TASKS:
        source = official_files.build(task, root / "official" / task)
        data.prepare(data.source(task), data.Official(task, source, root / task, partial=True, progress=False))
    return root


@pytest.fixture(scope="module", params=zoo.PARAMETERS)
def tiny(request: pytest.FixtureRequest) -> zoo.Tiny:
    return zoo.build(request.param)


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama of words, saved as any text model is; token 0 is the unknown word."""
    return _save_text_model(tmp_path_factory.mktemp("models") / "text-model", LlamaForCausalLM)


@pytest.fixture(scope="session")
def hybrid_text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random text model whose first block has linear attention."""
    kinds = ["linear_attention", "full_attention", "full_attention"]
    folder = tmp_path_factory.mktemp("models") / "hybrid-text-model"
    return _save_text_model(
        folder, MiniMaxForCausalLM, num_hidden_layers=3, layer_types=kinds, num_local_experts=2, num_experts_per_tok=1
    )


def _save_text_model(folder: Path, kind: type[PreTrainedModel], **more: Any) -> Path:
    tokenizer = words.tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] | capitalize }}: {{ message['content'] }}"
        "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>Assistant: {% endif %}"
    )
    options = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    model = kind(kind.config_class(**options | more))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
