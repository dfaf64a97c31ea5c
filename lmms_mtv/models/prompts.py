"""Prompts: demonstrations and a query, each with images and text, written raw or with a chat template."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from PIL import Image

from lmms_mtv.errors import ArgumentError

Message = dict[str, Any]
"""A chat message of lmms-eval: ``role``, and ``content``, a list of parts with a ``type``."""

Style = Literal["raw", "chat"]
STYLES: tuple[Style, ...] = ("raw", "chat")


class Reply(NamedTuple):
    """The answer of a model. ``ended`` is True if the answer ended before it was cut off."""

    text: str
    ended: bool


@dataclass(frozen=True)
class Demonstration:
    """A training example in the form of the task's questions, and its target."""

    messages: Sequence[Message]
    target: str


@dataclass(frozen=True)
class Prompt:
    """A query after demonstrations.

    Attributes:
        query: the messages of the query.
        demonstrations: the demonstrations, in their order.
        target: the target of the query; empty if unknown.
        description: the description of the task, at the beginning of the prompt.
        target_delimiter: the task's text before a target, used in raw prompts.
        fewshot_delimiter: the task's text after a target, used in raw prompts.
    """

    query: Sequence[Message]
    demonstrations: Sequence[Demonstration] = ()
    target: str = ""
    description: str = ""
    target_delimiter: str = " "
    fewshot_delimiter: str = "\n\n"

    def images(self) -> list[Image.Image]:
        """Return all images, in the order of the prompt."""
        shown = [demonstration.messages for demonstration in self.demonstrations]
        return [
            part["url"]
            for messages in (*shown, self.query)
            for message in messages
            for part in message["content"]
            if part["type"] == "image"
        ]

    def digest(self) -> str:
        """Return 8 hexadecimal digits that change with any text, answer or pixel of the prompt."""
        texts = [self.raw("\0"), self.target_delimiter, self.fewshot_delimiter, json.dumps(self.chat())]
        digest = hashlib.sha256(json.dumps(texts).encode())
        for image in self.images():
            digest.update(f"{image.mode} {image.size}".encode() + image.tobytes())
        return digest.hexdigest()[:8]

    def raw(self, placeholder: str) -> str:
        """Return the prompt as one text that ends where the target begins, with ``placeholder`` for each image."""
        shown = (
            _flat(d.messages, placeholder) + self.target_delimiter + d.target + self.fewshot_delimiter
            for d in self.demonstrations
        )
        return self.description + "".join(shown) + _flat(self.query, placeholder)

    def chat(self) -> list[Message]:
        """Return the prompt as turns: each demonstration a user turn and an assistant turn, the query a user turn.

        Image parts are only ``{"type": "image"}``, in the order of :meth:`images`.
        """
        turns: list[Message] = []
        for demonstration in self.demonstrations:
            turns += _turns(demonstration.messages)
            turns.append(_assistant(demonstration.target))
        turns += _turns(self.query)
        if self.description:
            first = next(turn for turn in turns if turn["role"] == "user")
            first["content"].insert(0, {"type": "text", "text": self.description})
        return turns

    def chat_with_images(self) -> list[Message]:
        """Return :meth:`chat` with the images in the parts, as lmms-eval passes messages to its models."""
        turns, images = self.chat(), iter(self.images())
        for turn in turns:
            for part in turn["content"]:
                if part["type"] == "image":
                    part["url"] = next(images)
        return turns

    def images_come_first(self) -> bool:
        """Return whether all images stand before all text except the description, so that no image needs a mark."""
        kinds = [part["type"] for message in self.query for part in message["content"]]
        return not self.demonstrations and kinds == sorted(kinds, key=lambda kind: kind != "image")

    def inline(self) -> Prompt:
        """Return the prompt with the demonstrations inside the query's first turn, between the task's delimiters."""
        shown: list[dict[str, Any]] = []
        for demonstration in self.demonstrations:
            shown += [part for message in demonstration.messages for part in message["content"]]
            answer = self.target_delimiter + demonstration.target + self.fewshot_delimiter
            shown.append({"type": "text", "text": answer})
        first, *others = self.query
        query = [{**first, "content": [*shown, *first["content"]]}, *others]
        return dataclasses.replace(self, query=query, demonstrations=())

    def answered_chat(self) -> list[Message]:
        """Return :meth:`chat` with the query's target as the last turn."""
        return [*self.chat(), _assistant(self.target)]


def blanks(ids: Sequence[int], decode: Callable[[list[int]], str]) -> int:
    """Return the number of blank tokens at the beginning of a target. These tokens are the same before every answer.

    Many tokenizers write a space before digits as a separate token. The number is 0 if all tokens are blank.

    Args:
        ids: the token ids of the target.
        decode: function that returns the text of token ids.
    """
    return next((index for index, token in enumerate(ids) if decode([token]).strip()), 0)


def following_ids(before: str, text: str, encode: Callable[[str], list[int]]) -> list[int]:
    """Return the token ids of ``text`` after ``before``, or of ``text`` alone if the two texts share a token.

    Args:
        before: the text before.
        text: the text to encode.
        encode: function that returns the token ids of a text.
    """
    before_ids, all_ids = encode(before), encode(before + text)
    return all_ids[len(before_ids) :] if all_ids[: len(before_ids)] == before_ids else encode(text)


def continuation(prompt: Prompt, template: Callable[[list[Message], bool], str]) -> str | None:
    """Return the text that a chat template writes after the prompt for the target, up to the end of the turn.

    The text is None if the answered conversation does not begin with the unanswered conversation, as with templates
    that drop thoughts.

    Args:
        prompt: the prompt with its target.
        template: function of messages and ``add_generation_prompt`` that returns the rendered text.
    """
    before, after = template(prompt.chat(), True), template(prompt.answered_chat(), False)
    return after[len(before) :] if after.startswith(before) else None


def placeholder(template: Callable[[list[Message], bool], str] | None, token: str | None) -> str:
    """Return the text that stands for an image: the text that the chat template writes, or the processor's image token.

    Args:
        template: function of messages and ``add_generation_prompt`` that renders the chat template, or None.
        token: the image token of the processor, or None.

    Raises:
        ArgumentError: neither the template nor the processor has a text for an image.
    """
    if template is not None:
        mark = "\u2063"
        text = {"type": "text", "text": mark}
        without = template([{"role": "user", "content": [text]}], False)
        with_image = template([{"role": "user", "content": [{"type": "image"}, text]}], False)
        head, tail = without.split(mark)[0], with_image.split(mark)[0]
        common = next(
            (i for i, (a, b) in enumerate(zip(head, tail, strict=False)) if a != b), min(len(head), len(tail))
        )
        if text_for_image := tail[common:].strip():
            return text_for_image
    if token:
        return token
    raise ArgumentError(
        "neither the chat template nor the processor says what stands for an image in a text: pass image_placeholder="
    )


def _flat(messages: Sequence[Message], placeholder: str) -> str:
    parts = (part for message in messages for part in message["content"])
    return "".join(placeholder if part["type"] == "image" else part["text"] for part in parts)


def _turns(messages: Sequence[Message]) -> list[Message]:
    def bare(part: dict[str, Any]) -> dict[str, Any]:
        return {"type": "image"} if part["type"] == "image" else dict(part)

    return [{"role": message["role"], "content": [bare(part) for part in message["content"]]} for message in messages]


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}
