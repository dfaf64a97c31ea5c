"""The arguments of the base ``hf``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lmms_mtv.errors import ArgumentError, unknown
from lmms_mtv.models import prompts as writing

_DTYPES: Final = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class HfConfig:
    """Arguments of the base.

    Attributes:
        pretrained: a name on the hub, a folder, a GGUF file, ``tiny``, or the name of a small model that an extra of
            this package installs (``smollm2``, ``gemma3-270m``, ``pictures``).
        gguf_file: the name of a GGUF file in the folder or on the hub; its weights are dequantised.
        peft: a PEFT adapter for the model, a folder or a name on the hub.
        revision: the revision on the hub.
        device: the device; by default the GPU if there is one, and its own GPU for each of several processes.
        device_map: the argument of transformers that spreads a model over devices.
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
        attn_implementation: the argument of transformers that sets the attention implementation.
        trust_remote_code: the argument of transformers that permits code of the checkpoint.
        prompt_style: ``raw`` writes only the task's text, as the MTV authors do; ``chat`` uses the chat template.
        fewshot_as_multiturn: True writes demonstrations of a chat as separate turns; False writes them in the turn of
            the query, in the form of a raw prompt.
        do_image_splitting: True cuts large images into crops if the processor can (Idefics 2 and 3, SmolVLM). The
            default is False, as in the MTV authors' code, so that few-shot prompts fit; None keeps the setting of the
            checkpoint.
        min_pixels: the smallest size of an image, for processors that keep its resolution (Qwen-VL).
        max_pixels: the largest size of an image, for processors that keep its resolution (Qwen-VL).
        image_placeholder: the text for an image in a raw prompt, if the processor does not show this text.
        batch_size: rows of a forward, or ``auto``: 16, halved each time the memory runs out.
    """

    pretrained: str = "HuggingFaceM4/idefics2-8b"
    gguf_file: str | None = None
    peft: str | None = None
    revision: str | None = None
    device: str | None = None
    device_map: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    prompt_style: str = "raw"
    fewshot_as_multiturn: bool = True
    do_image_splitting: bool | None = False
    min_pixels: int | None = None
    max_pixels: int | None = None
    image_placeholder: str | None = None
    batch_size: int | str = 1

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise unknown("dtype", str(self.dtype), _DTYPES)
        if self.prompt_style not in writing.STYLES:
            raise unknown("prompt_style", str(self.prompt_style), writing.STYLES)
        if not isinstance(self.fewshot_as_multiturn, bool):
            raise ArgumentError(f"fewshot_as_multiturn={self.fewshot_as_multiturn!r}, expected True or False")
        if self.batch_size != "auto" and (not str(self.batch_size).isdigit() or int(self.batch_size) < 1):
            raise ArgumentError(f"batch_size={self.batch_size!r}, expected a number, 1 or more, or auto")
