"""Small vectors with cards, for the tests of what keeps them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lmms_mtv import Edit, TaskVector, VectorCard
from lmms_mtv.vectors import checksum

GEOMETRY = ((0, "model.layers.0.self_attn.o_proj", 2, 4), (2, "model.layers.2.self_attn.o_proj", 2, 4))


def card(**changes: Any) -> VectorCard:
    fields: dict[str, Any] = {
        "model": "some/model",
        "revision": "abc",
        "dtype": "float32",
        "geometry": GEOMETRY,
        "task": "task",
        "split": "train",
        "examples": "e" * 64,
        "prompt": "p" * 64,
        "shots": 0,
        "seed": 0,
        "method": "mtv",
        "config": {"steps": 600, "lr": 0.1},
        "versions": {"torch": "2"},
        "losses": {"policy": [1.0, 0.5]},
        "seconds": 1.5,
        "stages": {"values": 1.0, "selection": 0.5},
    }
    return VectorCard(**fields | changes)


def vector(values: int = 0, **changes: Any) -> TaskVector:
    """A vector whose values are drawn from the seed ``values``; ``changes`` are fields of its card."""
    rng = torch.Generator().manual_seed(values)
    mask = torch.tensor([[True, False], [False, True]])
    return TaskVector({"heads": Edit.replace(torch.randn(2, 2, 4, generator=rng), mask)}, card(**changes))


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The file with its card changed, and with a checksum that still holds."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    fields = json.loads(header["__metadata__"]["card"])
    change(fields)
    text = json.dumps(fields)
    header["__metadata__"] |= {"card": text, "checksum": checksum(text, load_file(path))}
    described = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(described)) + described + raw[8 + size :])
    return path
