"""The tokenizer and the chat templates of a wrapper of lmms-eval."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from lmms_eval.api.model import lmms

from lmms_mtv.errors import ArgumentError
from lmms_mtv.models.prompts import Message

Template = Callable[[list[Message], bool], str]
"""Function that writes messages as text; with True as the second argument, the beginning of an answer follows."""

QUESTION: Final[list[Message]] = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
"""Shortest conversation that a template can write."""


def tokenizer_of(wrapper: lmms, name: str) -> Any:
    """Return the tokenizer of the model ``name``.

    Args:
        wrapper: the wrapper of the model.
        name: the name of the base, for the error message.

    Raises:
        ArgumentError: the wrapper has no tokenizer of transformers.
    """
    for holder in reversed(list(_holders(wrapper))):
        tokenizer = getattr(holder, "tokenizer", holder)
        if hasattr(tokenizer, "convert_ids_to_tokens"):
            return tokenizer
    raise ArgumentError(f"base={name} has no tokenizer of transformers, which the tokens of targets come from: use hf")


def templates_of(wrapper: lmms) -> Iterator[Template]:
    """Yield the chat templates of a wrapper. Each template takes either lists of parts or plain texts."""
    for holder in _holders(wrapper):
        if not getattr(holder, "chat_template", None):
            continue
        for flat in (False, True):
            template = _template(holder, flat)
            try:
                text = template(QUESTION, True)
            except Exception:
                # A template may raise anything on messages of the other form.
                continue
            if "?" in text and "'type'" not in text:
                yield template


def _holders(wrapper: lmms) -> Iterator[Any]:
    """Yield the attributes that may have a tokenizer or a chat template, processors before tokenizers."""
    for name in ("processor", "_processor", "_image_processor", "tokenizer", "_tokenizer"):
        if (holder := getattr(wrapper, name, None)) is not None:
            yield holder


def _template(holder: Any, flat: bool) -> Template:
    def write(messages: list[Message], add_generation_prompt: bool) -> str:
        if flat:
            texts = ("".join(part["text"] for part in message["content"]) for message in messages)
            messages = [{**message, "content": text} for message, text in zip(messages, texts, strict=True)]
        text: str = holder.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        return text

    return write
