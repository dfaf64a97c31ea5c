"""Evaluations by the harness's own command, in processes of their own, and what they leave in a folder."""

from __future__ import annotations

import functools
import json
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lmms_eval.tasks import TaskManager

from lmms_mtv.harness.paths import LM_EVAL, tasks_folder
from support.processes import run


@functools.cache
def task_manager(model: str = "mtv") -> TaskManager:
    """The tasks of this package alone: to read the thousands of the harness takes many seconds."""
    folders = [str(path) for path in tasks_folder().iterdir() if path.name != LM_EVAL]
    return TaskManager("ERROR", include_path=folders, include_defaults=False, model_name=model)


def own_tasks(folder: Path, model: str = "mtv") -> TaskManager:
    """The tasks of one folder alone."""
    return TaskManager("ERROR", include_path=str(folder), include_defaults=False, model_name=model)


@dataclass(frozen=True)
class Outcome:
    """What one evaluation left: ``answers`` by document; ``record`` of the task, None without the model ``mtv``."""

    answers: Mapping[int, str]
    record: Mapping[str, Any] | None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launcher(processes: int) -> list[str]:
    """The beginning of a command that runs a module, alone or in several processes started by accelerate."""
    start = [sys.executable, "-m"]
    if processes > 1:
        # With --cpu, accelerate starts a single process, whatever --num_processes says.
        start += ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        start += ["--main_process_port", str(free_port()), "-m"]
    return start


def command(*arguments: str, folder: Path, processes: int = 1) -> str:
    """``lmms-eval ARGUMENTS`` in ``folder``, alone or started by accelerate; what it wrote, once it went well."""
    done = run(
        [*launcher(processes), "lmms_eval", *arguments],
        merged=True,
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    for rank in range(processes):
        assert f"Running on rank {rank} " in done.stdout, f"no process of rank {rank}"
    return done.stdout


def evaluate(wanted: Mapping[str, Mapping[str, Any]], folder: Path, processes: int = 1) -> dict[str, Outcome]:
    """Evaluations one after the other by one command, since starting it takes longer than they do.

    ``wanted``: flags of the command by the name of an evaluation; each has one task.
    """
    folder.mkdir(parents=True, exist_ok=True)
    common = {"log_samples": True, "device": "cpu"}
    entries = [{**flags} | common | {"output_path": str(folder / name)} for name, flags in wanted.items()]
    (folder / "evaluations.yaml").write_text(yaml.safe_dump(entries))
    written = command("--config", "evaluations.yaml", folder=folder, processes=processes)
    lacking = [name for name in wanted if not list(folder.glob(f"{name}/**/*_results.json"))]
    # The command goes on after an evaluation that failed.
    assert not lacking, f"{lacking} failed: {written[-3000:]}"
    return {name: outcome(folder / name) for name in wanted}


def outcome(folder: Path) -> Outcome:
    """What the evaluation of one task left in ``folder``."""
    (path,) = folder.rglob("*_samples_*.jsonl")
    samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    # The harness leaves out a response that its filters did not change.
    answers = {sample["doc_id"]: sample.get("resps", sample["filtered_resps"]) for sample in samples}
    return Outcome(answers, record(folder))


def record(folder: Path) -> dict[str, Any] | None:
    """The entry of the one task in the file ``*_mtv.json``, if there is one."""
    for path in folder.rglob("*_mtv.json"):
        (entry,) = json.loads(path.read_text(encoding="utf-8"))["tasks"].values()
        return dict(entry)
    return None
