"""A task of lm-eval as a source of prompts, which the task's own code writes as in the harness."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lm_eval.api.instance import Instance
from lm_eval.api.samplers import ContextSampler
from lm_eval.api.task import ConfigurableTask
from lm_eval.api.utils import maybe_delimit

from lmms_mtv.errors import DataError
from lmms_mtv.fit.examples import Episode
from lmms_mtv.harness.lm.evaluation import Evaluation
from lmms_mtv.harness.training import Training

Doc = Mapping[str, Any]
Turns = list[dict[str, str]]


@dataclass(frozen=True)
class LmPrompt:
    """A prompt of lm-eval and the target of its query.

    Attributes:
        context: the text before the target, as in a request.
        delimiter: the text between context and target; ``delimiter + target`` is a text of a request.
        target: the target of the query.
        ending: the text that ends an answer.
        scored: True if the likelihood of the target is asked for, False if the target is generated.
    """

    context: str
    delimiter: str
    target: str
    ending: str
    scored: bool

    @property
    def continuation(self) -> str:
        """The target with the delimiter, as it follows the context."""
        return self.delimiter + self.target


class Chat(Protocol):
    """A model's chat template."""

    def apply_chat_template(self, chat_history: Turns, add_generation_prompt: bool = True) -> str:
        """Return the turns as text, ready for the next turn.

        Args:
            chat_history: the turns.
            add_generation_prompt: True ends the text with the beginning of an answer. False leaves the text ready for
                more of the last turn.
        """
        ...

    def finished(self, chat_history: Turns) -> str:
        """Return the turns as text, with the last turn ended."""
        ...


class LmPrompts:
    """The prompts of one task of lm-eval, in the form of an evaluation.

    Args:
        task: the task of the harness.
        demonstrations: the split of the training examples, see :class:`Training`.
        evaluation: the evaluation, which decides the form of the prompts.
        chat: the chat template of the model.

    Raises:
        DataError: the task is a separate class without a task file.
    """

    def __init__(self, task: Any, demonstrations: str | None, evaluation: Evaluation, chat: Chat) -> None:
        if not isinstance(task, ConfigurableTask):
            raise DataError(
                f"task {task.config.task} is a class of its own ({type(task).__name__}), whose prompts cannot be "
                "written with chosen demonstrations: use method=none"
            )
        self._task: Any = task
        self._evaluation = evaluation
        self._chat = chat
        fewshot = task.fewshot_cfg
        self.training = Training(task, demonstrations, fewshot.split, fewshot.process_docs)

    @property
    def shots(self) -> int:
        """Demonstrations in every evaluated prompt: ``--num_fewshot``, or the number of the task."""
        return int(self._task.config.num_fewshot or 0)

    def same(self, other: LmPrompts) -> bool:
        """Return whether both have the same task object of the harness."""
        return self._task is other._task

    def __len__(self) -> int:
        return len(self.training.documents)

    def digest(self) -> str:
        """Return the SHA-256 of the training examples."""
        return self.training.digest()

    def prompt(self, episode: Episode) -> LmPrompt:
        """Return the prompt of a training query, with its target.

        Raises:
            DataError: the task has no target, or a target that is none of its choices, or the episode has ``answers``.
        """
        if episode.answers is not None:
            raise DataError(
                f"task {self.training.name} writes its demonstrations itself, so their answers cannot be exchanged: "
                "pass corrupted=bare"
            )
        documents = self.training.documents
        doc, shown = documents[episode.query], [documents[index] for index in episode.demonstrations]
        kind = self._task.OUTPUT_TYPE
        if kind == "loglikelihood_rolling":
            raise DataError(
                f"task {self.training.name} scores whole texts (loglikelihood_rolling): there is no target to fit on, "
                "use method=none or vector=FILE"
            )
        if kind != "generate_until":
            context, continuation = self._requests(doc, shown)[self._gold(doc)].args[:2]
            return LmPrompt(context, "", continuation, "", True)
        context, target = self._context(doc, shown), self.training.target(doc)
        delimiter = self._delimiter(doc, target)
        return LmPrompt(context, delimiter, target, self._ending(doc, shown, context, delimiter + target), False)

    def check(self, requests: Sequence[Instance]) -> None:
        """Check that the harness evaluates this task, and writes the prompts in the same way.

        Raises:
            DataError: a request differs from the request of this task in more than the demonstrations.
        """
        doc: Doc | None = None
        for request in requests:
            if request.doc is not doc:
                doc = request.doc
                expected = self._requests(doc, ())
            sent, own = request.args, expected[request.idx].args if request.idx < len(expected) else ("", "")
            if self._task.OUTPUT_TYPE == "generate_until":
                same = _is_same_context(sent[0], own[0], self.shots)
            elif self._task.OUTPUT_TYPE == "loglikelihood_rolling":
                same = sent[0] == own[0]
            else:
                same = _is_same_context(sent[0], own[0], self.shots) and sent[1] == own[1]
            if not same:
                raise DataError(
                    f"the evaluation asks {_short(sent[0])} with {self.shots} demonstrations, but task "
                    f"{self.training.name}, as mtv knows it, asks {_short(own[0])}: start it with lmms-mtv lm-eval, "
                    "or give the model the task manager and the prompt settings of this evaluation (evaluation=)"
                )

    def _requests(self, doc: Doc, demonstrations: Sequence[Doc]) -> list[Instance]:
        """Return the requests that the harness makes of a document."""
        evaluation = self._evaluation
        requests = self._task.construct_requests(
            doc=doc,
            ctx=self._context(doc, demonstrations),
            metadata=(self.training.name, None, 1),
            apply_chat_template=evaluation.apply_chat_template,
            chat_template=self._chat.apply_chat_template if evaluation.apply_chat_template else None,
        )
        return requests if isinstance(requests, list) else [requests]

    def _context(self, doc: Doc, demonstrations: Sequence[Doc], template: Callable[..., str] | None = None) -> Any:
        """Return the text before the target; for tasks whose choices are contexts, a list with a text for each."""
        task = copy.copy(self._task)
        task.sampler = _Chosen(list(demonstrations))
        evaluation = self._evaluation
        return task.fewshot_context(
            doc,
            num_fewshot=len(demonstrations),
            system_instruction=evaluation.system_instruction,
            apply_chat_template=evaluation.apply_chat_template,
            fewshot_as_multiturn=evaluation.fewshot_as_multiturn,
            chat_template=(template or self._chat.apply_chat_template) if evaluation.apply_chat_template else None,
            gen_prefix=task.doc_to_prefix(doc),
        )

    def _gold(self, doc: Doc) -> int:
        """Return the index of the request of the right answer."""
        task = self._task
        if task.OUTPUT_TYPE == "loglikelihood":
            return 0
        gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        gold = gold[0] if isinstance(gold, list) and gold else gold
        choices = task.doc_to_choice(doc)
        index = choices.index(gold) if gold in choices else gold
        if not isinstance(index, int) or not 0 <= index < len(choices):
            raise DataError(
                f"the target of a training example of task {self.training.name} is {gold!r}, which is none of its "
                f"{len(choices)} choices: correct doc_to_target in the task file, or choose other demonstrations="
            )
        return index

    def _delimiter(self, doc: Doc, target: str) -> str:
        """Return the text between the context and a generated target, as in a demonstration."""
        if prefix := self._task.doc_to_prefix(doc):
            return maybe_delimit(prefix, target)[len(prefix) :].removesuffix(target) if target else ""
        return "" if self._evaluation.apply_chat_template else str(self._task.fewshot_cfg.target_delimiter)

    def _ending(self, doc: Doc, demonstrations: Sequence[Doc], context: str, answer: str) -> str:
        """Return the text that ends an answer: the delimiter between demonstrations, or the chat template's text."""
        if not self._evaluation.apply_chat_template:
            return str(self._task.fewshot_cfg.fewshot_delimiter)

        def answered(turns: Turns, add_generation_prompt: bool = True) -> str:
            begun = turns[-1]["content"] if turns[-1]["role"] == "assistant" else ""
            before = turns[:-1] if begun else turns
            return self._chat.finished([*before, {"role": "assistant", "content": begun + answer}])

        whole = self._context(doc, demonstrations, answered)
        # A template that rewrites the answer does not show the end of the answer.
        return whole[len(context + answer) :].rstrip() if whole.startswith(context + answer) else ""


class _Chosen(ContextSampler):  # type: ignore[misc]
    """A sampler that gives chosen demonstrations, in their order."""

    def sample(self, n: int, *_: Any, **__: Any) -> Sequence[Doc]:
        chosen: Sequence[Doc] = self.df[:n]
        return chosen


def _is_same_context(context: str, own: str, shots: int) -> bool:
    """Return whether ``context`` is ``own``, or for few-shot prompts ``own`` with demonstrations in one place."""
    if shots == 0 or own == "":
        return context == own or shots > 0
    return len(context) > len(own) <= _common(context, own) + _common(context[::-1], own[::-1])


def _common(one: str, other: str) -> int:
    """Return the length of the longest common beginning."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)


def _short(text: str) -> str:
    return repr(text) if len(text) < 80 else f"{text[:40]!r}...{text[-40:]!r}"
