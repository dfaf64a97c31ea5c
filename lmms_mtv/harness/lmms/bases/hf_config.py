"""The arguments of the base ``hf``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lmms_mtv.errors import ArgumentError, unknown
from lmms_mtv.harness import prompts as writing

_DTYPES: Final = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class HfConfig:
    """Arguments of the base.

    ``pretrained``: name on the hub, folder, GGUF file, ``tiny``, or the name of a small model that an extra of this
    package installs (``smollm2``, ``gemma3-270m``); ``gguf_file``: the name of a GGUF file in the folder or on the hub,
    whose weights are made whole again; ``revision``: of the hub. ``peft``: an adapter of PEFT that is
    put on the model, a folder or a name on the hub. ``device``: default is the GPU if there is one, with several
    processes each its own; ``device_map``: passed to transformers, to spread a model over
    devices. ``dtype``: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``. ``prompt_style``:
    ``raw`` writes the task's text alone, as the MTV authors do, ``chat`` uses the model's chat template; there,
    demonstrations are turns of their own (``fewshot_as_multiturn``), or stand in the query's turn, written as in a
    raw prompt. ``image_placeholder``: the text for an image in a raw prompt, where it cannot be told from the
    processor.

    ``batch_size``: rows of a forward, or ``auto``: 16, halved each time the memory runs out.

    An image costs what its processor makes of it. ``do_image_splitting`` cuts large images into crops where the
    processor can (Idefics 2 and 3, SmolVLM); it is off, as in the MTV authors' code, so that few-shot prompts fit;
    None leaves it to the checkpoint. ``min_pixels`` and ``max_pixels`` bound an image's size where the processor
    keeps its resolution (Qwen-VL).
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
