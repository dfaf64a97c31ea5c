"""The page of a vector: what it is, how to use it, and what it was made of, for a folder and for the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Final

from lmms_mtv.vector import TaskVector, VectorCard

_REPOSITORY: Final = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def of(vector: TaskVector, repository: str | None = None) -> str:
    """A Markdown page with the hub's metadata on top. ``repository``: where on the hub the vector is."""
    card = vector.card
    wanted = f"hub:{repository}" if repository else card.id
    rows = [
        ("model", _code(card.model)),
        ("revision", _code(card.revision or "not known")),
        ("dtype", _code(card.dtype)),
        ("task", _code(card.task)),
        ("split", _code(card.split) if card.split else "-"),
        ("shots in the prompt", str(card.shots)),
        ("seed", str(card.seed)),
        ("method", _code(card.method)),
        ("id", _code(card.id)),
        ("edited heads", _heads(vector)),
        *((f"parent {_code(name)}", f"weight {weight:g}") for name, weight in card.parents.items()),
        *((f"loss, {name}", _loss(losses)) for name, losses in card.losses.items() if losses),
        ("fitted in", f"{card.seconds:.1f} s"),
        ("versions", ", ".join(f"{name} {version}" for name, version in card.versions.items()) or "-"),
        ("training examples", _code(card.examples) if card.examples else "-"),
        ("prompt", _code(card.prompt) if card.prompt else "-"),
    ]
    table = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows)
    return f"""{_metadata(card)}
# Task vector: {_cell(card.method)} for {_cell(card.task)}

Activations that stand at some attention heads of {_code(card.model)} in place of demonstrations in the prompt, made by
[lmms-mtv](https://arxiv.org/abs/2406.15334). No weight is changed.

```bash
lmms-eval --model mtv --model_args {_line(f"pretrained={card.model},vector={wanted}")} --tasks {_line(card.task)}
```

| | |
|---|---|
{table}

"training examples" and "prompt" are SHA-256 digests of the ids of the examples and of the way a prompt is written.
`vector.safetensors` has all of this in its metadata, as JSON. The settings of the method:

```json
{json.dumps(dict(card.config), indent=2, sort_keys=True)}
```
"""


def _metadata(card: VectorCard) -> str:
    """YAML front matter; a JSON text is a YAML text."""
    lines = ["library_name: lmms-mtv"]
    if _REPOSITORY.fullmatch(card.model):
        lines.append(f"base_model: {json.dumps(card.model)}")
    lines += ["tags:", "- task-vector", "- multimodal-task-vectors", f"- {json.dumps(card.method)}"]
    return "\n".join(("---", *lines, "---"))


def _heads(vector: TaskVector) -> str:
    layers: dict[int, list[int]] = {}
    for layer, head in vector.heads:
        layers.setdefault(vector.card.geometry[layer][0], []).append(head)
    listed = "; ".join(f"layer {layer}: {', '.join(map(str, heads))}" for layer, heads in layers.items())
    total = sum(heads for _, _, heads, _ in vector.card.geometry)
    return f"{len(vector.heads)} of {total}" + (f" ({listed})" if listed else "")


def _loss(losses: Sequence[float]) -> str:
    return f"{losses[0]:.4f}" if len(losses) == 1 else f"{losses[0]:.4f} -> {losses[-1]:.4f} ({len(losses)} values)"


def _line(text: str) -> str:
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{_line(text).replace('`', chr(39))}`"
