"""lm-eval's own command line, with the model ``mtv`` and this package's text tasks in it."""

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
from lmms_mtv.harness.lm import model
from lmms_mtv.harness.lm.evaluation import Evaluation, evaluating
from lmms_mtv.harness.paths import LM_EVAL, tasks_folder


def run(arguments: Sequence[str]) -> None:
    """Do what ``lm-eval`` does with ``arguments``."""
    setup_logging()
    harness = HarnessCLI()
    with _command_line(arguments):
        given = harness.parse_args()
    if isinstance(getattr(given, "model_args", None), Mapping):
        written = (argument.removeprefix("--model_args=") for argument in arguments if "{" not in argument)
        given.model_args = with_text_restored(given.model_args, ",".join(text for text in written if "=" in text))
    if hasattr(given, "include_path"):
        given.include_path = _folders(given)
    if given.command == "run" and _model(given) == model.NAME:
        with evaluating(_evaluation(given)):
            harness.execute(given)
    else:
        harness.execute(given)


@contextmanager
def _command_line(arguments: Sequence[str]) -> Iterator[None]:
    """lm-eval reads its arguments, and puts ``run`` before them, in ``sys.argv`` alone."""
    before, sys.argv = sys.argv, ["lm-eval", *arguments]
    try:
        yield
    finally:
        sys.argv = before


def _configured(given: Namespace) -> Mapping[str, Any]:
    """Return the contents of ``--config``."""
    path = getattr(given, "config", None)
    return EvaluatorConfig.load_yaml_config(path) if path else {}


def _model(given: Namespace) -> Any:
    return given.model or _configured(given).get("model")


def _folders(given: Namespace) -> list[str]:
    """This package's text tasks, then the folders of ``--include_path``, which win over them.

    lm-eval describes several folders with colons between them but takes the whole for one name.
    """
    asked = given.include_path or _configured(given).get("include_path") or ()
    if isinstance(asked, str):
        asked = [asked] if Path(asked).exists() else asked.split(os.pathsep)
    if missing := [folder for folder in asked if not Path(folder).is_dir()]:
        raise ArgumentError(f"--include_path {', '.join(map(str, missing))}: there is no such folder")
    return [str(tasks_folder() / LM_EVAL), *map(str, asked)]


def _evaluation(given: Namespace) -> Evaluation:
    config = EvaluatorConfig.from_cli(given)
    # Better known before lm-eval has read all of its task files.
    model.split_lm_eval_arguments(config.model_args)
    return Evaluation(
        task=_tasks(config),
        system_instruction=config.system_instruction,
        apply_chat_template=bool(config.apply_chat_template),
        fewshot_as_multiturn=bool(config.fewshot_as_multiturn),
        folder=_results(config),
    )


def _tasks(config: Any) -> Callable[[str], Any]:
    """Return the tasks of an evaluation by name, found, loaded and set up as lm-eval does, when one is first asked for.

    lm-eval does not hand a model the tasks it loaded itself.
    """

    @functools.cache
    def loaded() -> Mapping[str, Any]:
        manager = config.process_tasks(config.metadata)
        found: Mapping[str, Any] = manager.load(config.tasks)["tasks"]
        for task in found.values():
            # A task that says 0 keeps it.
            if task.config.num_fewshot != 0 and config.num_fewshot is not None:
                task.set_config(key="num_fewshot", value=config.num_fewshot)
        return found

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
