"""Results folders as ``lmms-mtv compare`` writes them, with seeded random numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmms_mtv.commands.compare import ARMS
from lmms_mtv.experiments import cell as cells
from lmms_mtv.experiments.cell import Cell
from lmms_mtv.experiments.plan import CellKey, Plan

CHANCE = {"zero-shot": 0.12, "random heads": 0.09, "1-shot": 0.80, "2-shot": 0.88, "4-shot": 0.94, "8-shot": 0.96}
TASKS = [*(f"shapes_{what}_{of}" for what in ("background", "color", "position", "shape") for of in ("en", "es"))]
TASKS += ["shapes_phrase_en"]
VERSIONS = {"lmms-mtv": "0.1.0", "lmms-eval": "0.7.3", "torch": "2.15.0", "transformers": "5.23.0"}
HARDWARE = {"machine": "x86_64", "cores": 2, "device": "cpu", "processes": 1}


def plan(**changes: Any) -> Plan:
    return Plan(
        **{"name": "grid", "model": {"pretrained": "tiny"}, "tasks": TASKS, "arms": ARMS, "seeds": [0, 1, 2]} | changes
    )


def cell(planned: Plan, key: CellKey, n: int = 40, steps: int = 60, shape: Sequence[int] = (4, 8, 12)) -> Cell:
    """A cell with plausible numbers, which depend on its key alone."""
    random = np.random.default_rng([*f"{key.task}/{key.arm}".encode(), key.seed])
    arguments = {**planned.model, **planned.arms[key.arm]}
    method, shots = arguments.get("method", "mtv"), arguments.get("shots", 0)
    # Documents are hard or easy whatever the seed is, as real ones are.
    hard = np.random.default_rng([*key.task.encode()]).normal(0, 0.25, n)
    right = (CHANCE.get(key.arm, 0.93) + hard * 0.4 > random.uniform(0, 1, n)).astype(float)
    image = 4.0 * (1 + shots)
    text = 9.0 + 11.0 * shots
    vector = None
    if method != "none":
        vector = _vector(planned, key, method, arguments, steps, shape)
    return Cell(
        plan=planned.name,
        task=key.task,
        arm=key.arm,
        seed=key.seed,
        arguments=planned.arms[key.arm],
        model={"name": arguments["pretrained"], "revision": "sha256:0", "dtype": "float32"},
        method=method,
        shots=shots,
        settings={},
        metric="exact_match",
        score=float(right.mean()),
        stderr=float(right.std(ddof=1) / np.sqrt(n)),
        n=n,
        higher_is_better=True,
        samples={
            "documents": list(range(n)),
            "scores": right.tolist(),
            "answers": ["red" if value else "blue" for value in right],
            "prompts": [f"{index:08x}" for index in range(n)],
        },
        tokens={"prompt": image + text, "image": image, "text": text},
        seconds={
            "fit": float(random.normal(5, 0.3)) if vector else None,
            "evaluation": float(n * (0.01 + 0.004 * shots) * random.normal(1, 0.05)),
        },
        memory={
            "fit": 734003200 if vector else None,
            "evaluation": int(7e8 + 3e7 * shots + random.integers(0, 9_000_000)),
        },
        vector=vector,
        versions=VERSIONS,
        hardware=HARDWARE,
    )


def _vector(
    planned: Plan, key: CellKey, method: str, arguments: Mapping[str, Any], steps: int, shape: Sequence[int]
) -> dict[str, Any]:
    """The same for arms that differ in shots alone, as MTV's values and heads then are."""
    random = np.random.default_rng([*f"{key.task}/{method}".encode(), key.seed])
    logits = np.random.default_rng([*key.task.encode()]).normal(-1.5, 2.0, shape[:2])
    probabilities = 1 / (1 + np.exp(-logits - random.normal(0, 0.5, shape[:2])))
    chosen = random.uniform(0, 1, shape[:2]) < probabilities
    loss = 0.2 + 1.2 * np.exp(-np.arange(steps) / (steps / 6)) + random.normal(0, 0.12, steps) ** 2
    searched = method == "mtv"
    return {
        "id": f"{method}-{key.task}-{key.seed}",
        "heads": [[int(layer), int(head)] for layer, head in np.argwhere(chosen)],
        "shape": list(shape),
        "probabilities": probabilities.ravel().tolist() if searched else None,
        "policy": loss.tolist() if searched else [],
        "loss": {"unedited": 1.295, "chosen": 0.23} if searched else {},
        "examples": arguments.get("iterations", 100) * arguments.get("fit_shots", 4),
        "checksum": "0" * 64,
    }


def write(
    folder: Path,
    planned: Plan,
    change: Callable[[CellKey, Cell], Cell | None] = lambda key, found: found,
    **options: Any,
) -> Path:
    """A results folder of ``planned``; ``change`` may alter a cell, or leave it out by None."""
    planned.write(folder)
    for key in planned.cell_keys():
        found = change(key, cell(planned, key, **options))
        if found is not None:
            cells.write(folder, found, {"results": {key.task: {f"{found.metric},none": found.score}}})
    return folder
