"""Tasks over the scenes of shapes, and evaluations of them with lmms-eval."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from lmms_eval.evaluator import simple_evaluate

from support.evaluations import own_tasks, task_manager
from support.processes import run

SHORT = "iterations=8,fit_shots=2,steps=10,samples=4,examples=6,candidate_examples=4,candidates=3,reuse=False"


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The harness's own command in a process of its own, away from the repository."""
    return run(
        [sys.executable, "-m", "lmms_eval", *arguments],
        cwd=environment.pop("cwd", "/"),
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        timeout=500,
    )


def evaluate(model_args: str, tasks: list[str], include: Path | None = None, **options: Any) -> Any:
    """An evaluation in this process; errors come as they are raised."""
    manager = own_tasks(include) if include else task_manager()
    return simple_evaluate(
        "mtv", model_args, tasks=tasks, task_manager=manager, limit=options.pop("limit", 3), **options
    )


def task_file(folder: Path, name: str = "custom", **changes: Any) -> Path:
    """A task of our own making over the scenes of shapes; a change to None takes a key away."""
    from lmms_mtv.harness.lmms.plugin import tasks_folder

    shapes = tasks_folder() / "shapes"
    folder.mkdir(exist_ok=True)
    shutil.copytree(shapes / "data", folder / "data", dirs_exist_ok=True)
    (folder / "utils.py").write_text(
        (shapes / "utils.py").read_text(encoding="utf-8")
        + "\n\ndef broken(doc):\n    return [Image.open(__file__)]\n\n\ndef truncated(doc):\n"
        "    import io\n    data = io.BytesIO()\n    draw(doc)[0].save(data, 'PNG')\n"
        "    return [Image.open(io.BytesIO(data.getvalue()[:20]))]\n",
        encoding="utf-8",
    )
    text = (shapes / "_shapes").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if "!function" not in line]
    fields = yaml.safe_load("\n".join(lines)) | {"task": name} | changes
    fields["dataset_kwargs"] = {
        "data_files": {split: str(folder / "data" / f"{split}.jsonl") for split in ("train", "test")}
    }
    functions = {"doc_to_visual": "draw", "doc_to_text": "question", "doc_to_target": "color_en"}
    functions |= {key: fields.pop(key) for key in (*functions, "process_results") if key in fields}
    body = yaml.safe_dump({key: value for key, value in fields.items() if value is not None})
    body += "".join(f"{key}: !function utils.{value}\n" for key, value in functions.items() if value)
    (folder / f"{name}.yaml").write_text(body, encoding="utf-8")
    return folder


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.rglob("*_mtv.json"))]


class Arguments:
    """What the harness's command line leaves on a task."""

    def __init__(self, output_path: Path) -> None:
        self.output_path = str(output_path)
        self.process_with_media = False
        self.reasoning_tags = None
