"""The command line of lm-eval with the model ``mtv`` and this package's text tasks."""

from __future__ import annotations

import functools
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm_eval._cli import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.utils import sanitize_model_name, setup_logging

from lmms_mtv.errors import ArgumentError, DataError
from lmms_mtv.harness.arguments import with_text_restored
from lmms_mtv.harness.lm.arguments import split_lm_eval_arguments
from lmms_mtv.harness.lm.evaluation import Evaluation, evaluating
from lmms_mtv.harness.lm.model import NAME
from lmms_mtv.harness.paths import LM_EVAL, tasks_folder
from lmms_mtv.runtime.devices import check_cuda


def run(arguments: Sequence[str]) -> None:
    """Run ``lm-eval`` with ``arguments``."""
    setup_logging()
    harness = HarnessCLI()
    with _command_line(arguments):
        options = harness.parse_args()
    if isinstance(getattr(options, "model_args", None), Mapping):
        texts = (argument.removeprefix("--model_args=") for argument in arguments if "{" not in argument)
        options.model_args = with_text_restored(options.model_args, ",".join(text for text in texts if "=" in text))
    if hasattr(options, "include_path"):
        options.include_path = _folders(options)
    if options.command == "run" and _model(options) == NAME:
        with evaluating(_evaluation(options)):
            harness.execute(options)
    else:
        harness.execute(options)


@contextmanager
def _command_line(arguments: Sequence[str]) -> Iterator[None]:
    """Put ``arguments`` into ``sys.argv``, the only place where lm-eval reads its arguments."""
    before, sys.argv = sys.argv, ["lm-eval", *arguments]
    try:
        yield
    finally:
        sys.argv = before


def _configured(options: Namespace) -> Mapping[str, Any]:
    """Return the contents of ``--config``."""
    path = getattr(options, "config", None)
    return EvaluatorConfig.load_yaml_config(path) if path else {}


def _model(options: Namespace) -> Any:
    return options.model or _configured(options).get("model")


def _folders(options: Namespace) -> list[str]:
    """Return the folder of this package's text tasks, then the folders of ``--include_path``, whose tasks win.

    lm-eval documents several folders with colons between them, but takes the whole text as one name.
    """
    folders = options.include_path or _configured(options).get("include_path") or ()
    if isinstance(folders, str):
        folders = [folders] if Path(folders).exists() else folders.split(os.pathsep)
    if missing := [folder for folder in folders if not Path(folder).is_dir()]:
        raise ArgumentError(f"--include_path {', '.join(map(str, missing))}: there is no such folder")
    return [str(tasks_folder() / LM_EVAL), *map(str, folders)]


def _evaluation(options: Namespace) -> Evaluation:
    config = EvaluatorConfig.from_cli(options)
    # An error shows before lm-eval reads all of its task files.
    split_lm_eval_arguments(config.model_args)
    # lm-eval's own default is cuda:0, for which it takes the CPU on a machine without a GPU.
    check_cuda(config.model_args.get("device", options.device or _configured(options).get("device")))
    return Evaluation(
        task=_tasks(config),
        system_instruction=config.system_instruction,
        apply_chat_template=bool(config.apply_chat_template),
        fewshot_as_multiturn=bool(config.fewshot_as_multiturn),
        folder=_results(config),
        trackers=[name for name in ("wandb", "trackio") if getattr(config, f"{name}_args", None)],
    )


def _tasks(config: Any) -> Callable[[str], Any]:
    """Return a function that returns the task of a name, loaded and set up as in lm-eval.

    The first call loads the tasks: lm-eval does not pass its loaded tasks to a model.
    """

    @functools.cache
    def loaded() -> Mapping[str, Any]:
        manager = config.process_tasks(config.metadata)
        tasks: Mapping[str, Any] = manager.load(config.tasks)["tasks"]
        for task in tasks.values():
            # A task with 0 demonstrations keeps this number.
            if task.config.num_fewshot != 0 and config.num_fewshot is not None:
                task.set_config(key="num_fewshot", value=config.num_fewshot)
        return tasks

    def of(name: str) -> Any:
        if name not in loaded():
            raise DataError(f"task {name} is none of those of the command line: {', '.join(loaded())}")
        return loaded()[name]

    return of


def _results(config: Any) -> Path | None:
    """Return the folder into which lm-eval writes the results."""
    if not config.output_path:
        return None
    path = Path(config.output_path)
    if path.suffix == ".json":
        return path.parent
    named = (config.model_args[key] for key in ("peft", "delta", "pretrained") if key in config.model_args)
    return path / str(sanitize_model_name(str(next(named, ""))))
