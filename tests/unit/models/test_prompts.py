"""Prompts as they are written: golden texts, and what stands for an image."""

from __future__ import annotations

import pytest
from PIL import Image

from lmms_mtv.errors import ArgumentError
from lmms_mtv.models.prompts import Demonstration, Prompt, continuation, placeholder


def asked(text: str, color: str = "red") -> list[dict]:
    image = {"type": "image", "url": Image.new("RGB", (2, 2), color)}
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


PROMPT = Prompt(
    asked("Third? Answer:", "blue"),
    [Demonstration(asked("First? Answer:"), "one"), Demonstration(asked("Second? Answer:", "green"), "two")],
    "three",
    description="Look. \n",
    fewshot_delimiter="\n",
)


def template(messages: list[dict], add_generation_prompt: bool) -> str:
    written = ""
    for message in messages:
        parts = ("<img>\n" if part["type"] == "image" else part["text"] for part in message["content"])
        written += f"[{message['role']}]" + "".join(parts) + "[end]\n"
    return written + ("[assistant]" if add_generation_prompt else "")


def test_a_raw_prompt():
    assert PROMPT.raw("<image>") == (
        "Look. \n<image>First? Answer: one\n<image>Second? Answer: two\n<image>Third? Answer:"
    )


def test_delimiters_are_the_tasks_own():
    """OK-VQA in the MTV authors' code: no space before an answer, no line break after it."""
    tight = Prompt(asked("B? Answer:"), [Demonstration(asked("A? Answer:"), "a")], "b", "", "", "")
    assert tight.raw("<image>") == "<image>A? Answer:a<image>B? Answer:"


def test_a_chat_prompt_has_a_turn_for_each_part():
    assert template(PROMPT.chat(), True) == (
        "[user]Look. \n<img>\nFirst? Answer:[end]\n[assistant]one[end]\n"
        "[user]<img>\nSecond? Answer:[end]\n[assistant]two[end]\n"
        "[user]<img>\nThird? Answer:[end]\n[assistant]"
    )


def test_images_come_in_the_order_of_the_prompt():
    assert [image.getpixel((0, 0)) for image in PROMPT.images()] == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]


def test_writing_a_prompt_does_not_change_it():
    before = template(PROMPT.chat(), True)
    PROMPT.answered_chat()
    assert template(PROMPT.chat(), True) == before
    assert len(PROMPT.query[0]["content"]) == 2


def test_the_continuation_of_a_chat_ends_its_turn():
    assert continuation(PROMPT, template) == "three[end]\n"

    def forgetful(messages: list[dict], add_generation_prompt: bool) -> str:
        return template(messages[-1:], add_generation_prompt)

    assert continuation(PROMPT, forgetful) is None


def test_what_stands_for_an_image_is_read_from_the_template():
    assert placeholder(template, "<other>") == "<img>"
    assert placeholder(None, "<image>") == "<image>"
    assert (
        placeholder(lambda messages, _: template([{**m, "content": m["content"][-1:]} for m in messages], _), "<i>")
        == "<i>"
    )
    with pytest.raises(ArgumentError, match="image_placeholder="):
        placeholder(None, None)
