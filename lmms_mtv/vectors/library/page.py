"""The page of a vector, with its description, use and origin, for a folder of a library and for the hub."""

from __future__ import annotations

import json
import re
import shlex
from typing import Final

from lmms_mtv.vectors import HEADS, Edit, TaskVector, VectorCard
from lmms_mtv.vectors.card import BUNDLED, LOCAL

_REPOSITORY: Final = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def of(vector: TaskVector, repository: str | None = None) -> str:
    """Return the Markdown page of a vector, which begins with the hub's metadata.

    Args:
        vector: the vector.
        repository: ``owner/name`` of the vector on the hub, None for a vector of a library.
    """
    card = vector.card
    wanted = f"hub:{repository}" if repository else card.id
    # Quoted, since anyone may have written the card, and readers copy the line into a shell.
    arguments = shlex.quote(_line(f"pretrained={_loaded(card)},vector={wanted}"))
    # A vector that was fitted in Python has no task of a harness.
    task = shlex.quote(_line(card.task)) if card.split else "TASK"
    table = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in facts(vector))
    heads = set(vector.edits) <= {HEADS} and not any(edit.gate is not None for edit in vector.edits.values())
    what = "Activations that stand at some attention heads" if heads else "Changes of the hidden states"
    # The paper only has vectors of heads without a gate.
    paper = "\n([Multimodal Task Vectors](https://arxiv.org/abs/2406.15334))" if heads else ""
    named = f"{repository}" if repository else "vector.safetensors"
    return f"""{_metadata(card)}
# Task vector: {_cell(card.method)} for {_cell(card.task)}

{what} of {_code(card.model)} in place of demonstrations in the prompt{paper}, made by lmms-mtv. No weight is changed.

```bash
lmms-eval --model mtv --model_args {arguments} --tasks {task}
```

```python
{_loading(card)}
vector = TaskVector.from_pretrained({json.dumps(_line(named))})
inputs = processor(text=prompt, images=images, return_tensors="pt")  # a prompt as below, without the demonstration
with vector.apply(model):
    output = model.generate(**inputs)
```

`pip install git+https://github.com/lmms-mtv/lmms-mtv` installs lmms-mtv.{_unnamed(card)} The licences of the
model and of the training data hold for the vector too.

| | |
|---|---|
{table}

{_prompt(card)}
"training examples" and "prompt" are SHA-256 digests of the ids of the examples and of the way a prompt is written.
`vector.safetensors` has all of this in its metadata, as JSON. The settings of the method:

```json
{json.dumps(dict(card.config), indent=2, sort_keys=True)}
```
"""


def _loaded(card: VectorCard) -> str:
    """Return the value of ``pretrained=`` that loads the model of a vector."""
    return "FOLDER" if card.model.startswith(LOCAL) else BUNDLED.get(card.model, card.model)


def _loading(card: VectorCard) -> str:
    """Return the lines of Python that import what is needed, and load the model of a vector and its processor."""
    bundled = BUNDLED.get(card.model)
    if bundled == "pictures":
        return """from lmms_mtv import TaskVector
from lmms_mtv.pictures.model import load

model, processor = load()"""
    source = "CHECKPOINT" if bundled == "tiny" else json.dumps(_line(_loaded(card)))
    imported = "\nfrom lmms_mtv.shapes import CHECKPOINT" if bundled == "tiny" else ""
    return f"""from transformers import AutoModelForImageTextToText, AutoProcessor  # a text model: AutoModelForCausalLM, AutoTokenizer

from lmms_mtv import TaskVector{imported}

model = AutoModelForImageTextToText.from_pretrained({source}, dtype={json.dumps(_line(card.dtype))})
processor = AutoProcessor.from_pretrained({source})"""  # noqa: E501


def _unnamed(card: VectorCard) -> str:
    """Return a sentence about a model that has no name by which others can load it."""
    if not card.model.startswith(LOCAL):
        return ""
    return f" `FOLDER` is your folder of the model, with the weights of revision {_code(card.revision or 'unknown')}."


def _prompt(card: VectorCard) -> str:
    """Return a prompt of the fit as a code block, so that others can write the same; empty if the card has none."""
    if not card.prompt_text:
        return ""
    before, delimiter, target, *after = (*card.prompt_text, "", "", "")
    shown = "".join((before, delimiter, target, *after))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0))
    marks = json.dumps([delimiter, target, "".join(after)], ensure_ascii=False)
    return f"""A prompt of the fit: one demonstration, then a query with its answer. Delimiter, answer and end of the
query: `{_line(marks)}`.

{fence}text
{shown.replace(chr(0), "")}
{fence}

"""


def facts(vector: TaskVector) -> list[tuple[str, str]]:
    """Return the facts of a vector as pairs of name and value, for a reader."""
    card = vector.card
    return [
        ("id", card.id),
        ("model", card.model),
        ("revision", card.revision or "not known"),
        ("dtype", card.dtype),
        ("task", card.task),
        ("split", card.split or "-"),
        ("shots in the prompt", str(card.shots)),
        ("seed", str(card.seed)),
        ("method", card.method),
        *([("edited heads", _heads(vector))] if HEADS in vector.edits or not vector.edits else []),
        *((f"edited {name}", _layers(vector, edit)) for name, edit in vector.edits.items() if name != HEADS),
        *((f"parent {name}", f"weight {weight:g}") for name, weight in card.parents.items()),
        *((f"loss, {name}", f"{losses[0]:.4f}") for name, losses in card.losses.items() if len(losses) == 1),
        *_accuracy(card),
        *([("fitted in", f"{card.seconds:.1f} s")] if card.seconds else []),
        ("versions", ", ".join(f"{name} {version}" for name, version in card.versions.items()) or "-"),
        ("training examples", card.examples or "-"),
        ("prompt", card.prompt or "-"),
    ]


def _metadata(card: VectorCard) -> str:
    """Return the YAML front matter. JSON texts in it are YAML texts too."""
    lines = ["library_name: lmms-mtv"]
    if _REPOSITORY.fullmatch(card.model) and card.model not in BUNDLED and not card.model.startswith(LOCAL):
        lines.append(f"base_model: {json.dumps(card.model)}")
    lines += ["tags:", "- task-vector", "- multimodal-task-vectors", f"- {json.dumps(card.method)}"]
    return "\n".join(("---", *lines, "---"))


def _heads(vector: TaskVector) -> str:
    layers: dict[int, list[int]] = {}
    for layer, head in vector.heads:
        layers.setdefault(vector.card.geometry[layer][0], []).append(head)
    listed = "; ".join(f"layer {layer}: {', '.join(map(str, heads))}" for layer, heads in layers.items())
    total = sum(heads for _, _, heads, _ in vector.card.geometry)
    gated = HEADS in vector.edits and vector.edits[HEADS].gate is not None
    return f"{len(vector.heads)} of {total}" + (f" ({listed})" if listed else "") + ", gated by the query" * gated


def _layers(vector: TaskVector, edit: Edit) -> str:
    layers = [vector.card.geometry[layer][0] for layer, _ in edit.heads]
    listed = f" (layers {', '.join(map(str, layers))})" if layers else ""
    ways = ", at all positions" * edit.everywhere + ", at the prompt alone" * edit.once + ", norm kept" * edit.renormed
    return f"{len(layers)} of {len(vector.card.geometry)} layers{listed}{ways}"


def _accuracy(card: VectorCard) -> list[tuple[str, str]]:
    if not (tried := card.accuracy):
        return []
    right = f"{tried['unedited']:.0%} without the vector, {tried['edited']:.0%} with it"
    return [("right answers", f"{right}, of {tried['queries']:.0f} training queries")]


def _line(text: str) -> str:
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{_line(text).replace('`', chr(39))}`"
