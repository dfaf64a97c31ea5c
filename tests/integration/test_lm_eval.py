"""The plugin inside lm-eval: the library's own model without edits, an independent computation with them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import CompletedProcess

import lm_eval.tasks
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmms_mtv import Edit, Episode, TaskVector, VectorCard, data, find_sites, methods
from lmms_mtv.errors import ArgumentError, ContextLengthError, DataError, HookError, LeakageError
from lmms_mtv.harness.arguments import Arguments
from lmms_mtv.harness.lm import command as lm_command
from lmms_mtv.harness.lm.evaluation import Evaluation, Tasks
from lmms_mtv.harness.lm.model import LmEvalMtv
from lmms_mtv.harness.lm.runner import LmRunner
from lmms_mtv.harness.lm.task import LmPrompts
from lmms_mtv.harness.paths import LM_EVAL, tasks_folder
from lmms_mtv.models.identity import name_of, revision_of
from lmms_mtv.vectors import HEADS
from support import matrix, processes, zoo
from support.text_tasks import TASKS, run, task_file

SHORT = {
    "iterations": 8,
    "fit_shots": 2,
    "steps": 10,
    "samples": 4,
    "examples": 6,
    "candidate_examples": 4,
    "reuse": False,
}


@pytest.fixture(autouse=True)
def _short_reports(monkeypatch):
    """The library lists all installed packages in its results, which takes longer than the evaluations here."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tasks") / "own"
    for kind in TASKS:
        task_file(made, kind)
    return made


def vector_file(path: Path, model: Path, edit: Edit | None = None) -> Path:
    """A vector for the tiny text model, as if it had been fitted."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    sites = find_sites(loaded)
    rng = torch.Generator().manual_seed(3)
    if edit is None:
        mask = torch.rand(sites.shape[:2], generator=rng) < 0.6
        edit = Edit.replace(2 * torch.randn(sites.shape, generator=rng), mask)
    revision = revision_of(str(model), None)
    name = name_of(str(model), revision)
    card = VectorCard(name, revision, "float32", sites.geometry, "own_arc", "train", "", "", 0, 0, "mtv", {})
    return TaskVector({HEADS: edit}, card).save(path)


@pytest.fixture(scope="module")
def vector(text_model, tmp_path_factory) -> Path:
    return vector_file(tmp_path_factory.mktemp("vector") / "vector.safetensors", text_model)


def identity(folder: Path, model: Path) -> Path:
    """A vector that is applied everywhere and changes nothing."""
    shape = find_sites(AutoModelForCausalLM.from_pretrained(model)).shape
    edit = Edit(torch.zeros(shape), torch.ones(shape[:2]), torch.zeros(shape[:2]))
    return vector_file(folder / "identity.safetensors", model, edit)


@contextmanager
def by_hand(model: torch.nn.Module, vector: Path, first: int) -> Iterator[None]:
    """The edit written anew: heads are replaced from position ``first`` on, in a forward of one row."""
    edit = TaskVector.load(vector).edits[HEADS]

    def hook(layer: int):
        def replace(_, args):
            heads = args[0].clone().unflatten(-1, edit.value.shape[-2:])
            for head in range(edit.value.shape[1]):
                if edit.gain[layer, head]:
                    heads[0, first:, head] = edit.value[layer, head]
            return (heads.flatten(-2),)

        return replace

    with ExitStack() as stack:
        for layer, block in enumerate(model.model.layers):
            stack.callback(block.self_attn.o_proj.register_forward_pre_hook(hook(layer)).remove)
        yield


class Reference:
    """Log-likelihoods and answers one at a time, without padding, batches or the harness."""

    def __init__(self, model: Path, vector: Path, max_length: int = 256) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self._vector, self._limit = vector, max_length

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    @torch.no_grad()
    def scored(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        tokens = (context + continuation)[-(self._limit + 1) :][:-1]
        with by_hand(self.model, self._vector, len(tokens) - len(continuation)):
            logits = self.model(torch.tensor([tokens])).logits[0, -len(continuation) :]
        target = torch.tensor(continuation)
        total = logits.log_softmax(-1).gather(1, target[:, None]).sum().item()
        return total, bool((logits.argmax(-1) == target).all())

    def loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        before = self.ids(context.rstrip()) or [self.tokenizer.eos_token_id]
        whole = self.ids(context + continuation)
        return self.scored(before, whole[len(self.ids(context.rstrip())) :])

    def rolling(self, text: str) -> float:
        tokens, limit, total, done = self.ids(text), self._limit, 0.0, 0
        while done < len(tokens):
            part = tokens[done : done + limit]
            if done == 0:
                context = [self.tokenizer.eos_token_id]
            else:  # a full window that ends where the part does
                window = tokens[max(0, done + len(part) - limit - 1) : done + len(part)]
                context = window[: len(window) - len(part)]
            total += self.scored(context, part)[0]
            done += len(part)
        return total

    @torch.no_grad()
    def generated(self, context: str, limit: int) -> str:
        tokens = self.ids(context)
        begin = len(tokens)
        for _ in range(limit):
            # Without a cache: every position from the last of the prompt on is edited, as it was when it was new.
            with by_hand(self.model, self._vector, begin - 1):
                tokens.append(int(self.model(torch.tensor([tokens])).logits[0, -1].argmax()))
            if "\n" in self.tokenizer.decode(tokens[begin:]) or tokens[-1] == self.tokenizer.eos_token_id:
                break
        return self.tokenizer.decode(tokens[begin:], skip_special_tokens=True).split("\n")[0]


class TestWithoutEdits:
    @pytest.mark.parametrize("shots", matrix.members([0, 2], 2))
    def test_method_none_is_the_librarys_model(self, text_model, folder, shots):
        kinds = ("answers", "arc", "copa", "winogrande", "splits")
        own = run(text_model, folder, kinds, {"num_fewshot": shots}, method="none", batch_size=3)[1]
        assert own == run(text_model, folder, kinds, {"num_fewshot": shots}, library=True, batch_size=3)[1]
        assert len({str(response) for _, response in own["own_arc"]}) > 1

    def test_an_edit_that_changes_nothing_is_the_librarys_model_to_the_last_bit(self, text_model, folder, tmp_path):
        """Task by task: the library alone would fill its batches from several."""
        vector, kinds = str(identity(tmp_path, text_model)), ("answers", "arc", "copa", "winogrande", "texts")
        for kind, (size, limit) in zip(kinds, itertools.cycle(((4, 256), (1, 24))), strict=False):
            options = {"batch_size": size, "max_length": limit}
            own = run(text_model, folder, [kind], vector=vector, **options)[1]
            assert own == run(text_model, folder, [kind], library=True, **options)[1]

    def test_any_model_that_the_library_scores(self, text_model, folder):
        """Without edits nothing is looked for in the model, and no task is needed."""
        lm = LmEvalMtv(pretrained=str(text_model), device="cpu", method="none")
        tasks = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
        results = simple_evaluate(lm, tasks=["own_arc"], task_manager=tasks, limit=2)
        assert results["config"]["mtv"]["tasks"]["own_arc"]["method"] == "none"
        assert results["config"]["mtv"]["skipped"] is None


class TestEdited:
    @pytest.mark.parametrize(
        ("size", "limit"),
        [
            pytest.param(1, 256, marks=pytest.mark.slow),
            pytest.param(4, 256, marks=pytest.mark.slow),
            (4, 9),
        ],
    )
    def test_loglikelihoods_are_those_computed_by_hand(self, text_model, folder, vector, size, limit):
        """Continuations of one and several tokens, split in several ways, in batches, and the beginning cut off."""
        reference = Reference(text_model, vector, limit)
        kinds = ("arc", "copa", "winogrande", "splits")
        lm, own = run(text_model, folder, kinds, vector=str(vector), batch_size=size, max_length=limit)
        plain = run(text_model, folder, kinds, library=True, batch_size=size, max_length=limit)[1]
        lengths, cut, changed = set(), 0, 0
        for name, samples in own.items():
            for (arguments, responses), (_, unedited) in zip(samples, plain[name], strict=True):
                for (context, continuation), (answer,), (other,) in zip(arguments, responses, unedited, strict=True):
                    expected, greedy = reference.loglikelihood(context, continuation)
                    assert answer[0] == pytest.approx(expected, abs=2e-4)
                    assert answer[1] == greedy
                    tokens = reference.ids(context + continuation)
                    lengths.add(len(tokens) - len(reference.ids(context)))
                    cut += len(tokens) > limit + 1
                    changed += abs(answer[0] - other[0]) > 1e-2
        assert {1, 2, 3} <= lengths
        assert (cut > 0) == (limit == 9)
        assert changed > 20
        assert zoo.hooks(lm.model) == 0

    @pytest.mark.parametrize(
        ("size", "limit"),
        [
            pytest.param(1, 256, marks=pytest.mark.slow),
            pytest.param(4, 256, marks=pytest.mark.slow),
            (4, 16),
        ],
    )
    def test_rolling_loglikelihoods_are_those_computed_by_hand(self, text_model, folder, vector, size, limit):
        reference = Reference(text_model, vector, limit)
        _, own = run(text_model, folder, ["texts"], vector=str(vector), batch_size=size, max_length=limit)
        for ((text,),), ((answer,),) in own["own_texts"]:
            assert answer == pytest.approx(reference.rolling(text), abs=2e-3)

    @pytest.mark.parametrize("size", matrix.members([1, 4], 4))
    def test_answers_are_those_computed_by_hand(self, text_model, folder, vector, size):
        reference = Reference(text_model, vector)
        lm, own = run(text_model, folder, ["answers"], vector=str(vector), batch_size=size)
        assert own != run(text_model, folder, ["answers"], library=True, batch_size=size)[1]
        for ((context, settings),), ((answer,),) in own["own_answers"]:
            assert answer == reference.generated(context, settings["max_gen_toks"])
        assert zoo.hooks(lm.model) == 0

    @pytest.mark.slow
    def test_the_order_of_requests_is_kept_and_each_task_has_its_own_vector(self, text_model, folder, caplog):
        lm, both = run(text_model, folder, ["arc", "copa"], **SHORT)
        _, other = run(text_model, folder, ["copa", "arc"], **SHORT)
        assert both == other
        with caplog.at_level(logging.INFO, logger="lm_eval"):
            logging.getLogger("lm_eval").propagate = True
            used = lm.get_model_info()["mtv"]["tasks"]
        for name, line in zip(("own_arc", "own_copa"), caplog.messages[-2:], strict=True):
            assert line.startswith(f"{name}: zero-shot, with vector {used[name]['vector']} of mtv (")
            assert f"kept as {used[name]['source']}" in line
        assert used["own_arc"]["vector"] != used["own_copa"]["vector"]
        assert used["own_arc"]["settings"]["steps"] == 10
        assert used["own_arc"]["fit_seconds"] > 0

    @pytest.mark.slow
    def test_the_results_say_which_blocks_are_left_alone(self, text_model, hybrid_text_model, folder):
        for model, skipped in ((text_model, []), (hybrid_text_model, [0])):
            lm, _ = run(model, folder, ["arc"], **SHORT)
            assert lm.get_model_info()["mtv"]["skipped"] == skipped

    def test_an_exception_leaves_no_hook(self, text_model, folder, vector):
        tasks = Tasks(include_path=str(folder), include_defaults=False)
        lm = LmEvalMtv(Evaluation(tasks.of), pretrained=str(text_model), device="cpu", vector=str(vector))
        before = zoo.hooks(lm.model)

        def fail(*_):
            raise RuntimeError("on the way")

        for kind in ("arc", "answers", "texts"):
            handle = lm.model.model.norm.register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="on the way"):
                simple_evaluate(lm, tasks=[f"own_{kind}"], task_manager=tasks, limit=2)
            handle.remove()
            assert zoo.hooks(lm.model) == before
        # And the next call is edited again.
        assert simple_evaluate(lm, tasks=["own_arc"], task_manager=tasks, limit=2)

    def test_a_forward_that_mtv_did_not_expect_is_refused(self, text_model, folder, vector):
        tasks = Tasks(include_path=str(folder), include_defaults=False)
        lm = LmEvalMtv(Evaluation(tasks.of), pretrained=str(text_model), device="cpu", vector=str(vector))
        with lm.editing(TaskVector.load(vector)), pytest.raises(HookError, match="in the order that mtv knows"):
            lm._model_call(torch.tensor([[5, 6]]))


class TestFits:
    @pytest.mark.parametrize("kind", ["answers", "arc", "winogrande"])
    @pytest.mark.slow
    def test_same_seed_same_heads_whatever_the_batch_size(self, text_model, folder, kind):
        settings = SHORT | {"samples": 32}
        used = [
            run(text_model, folder, [kind], **settings, batch_size=size, seed=seed)[0].records[f"own_{kind}"]
            for size, seed in ((1, 1), (4, 1), (4, 2))
        ]
        assert used[0].vector == used[1].vector != used[2].vector
        assert used[0].heads == used[1].heads
        assert 0 < len(used[0].heads) < 8

    @pytest.mark.slow
    def test_one_fit_serves_all_requests_of_a_task(self, text_model, folder, tmp_path, caplog):
        """The library asks for likelihoods and for answers in calls of their own."""
        tasks = Tasks(include_path=str(folder), include_defaults=False)
        lm = LmEvalMtv(Evaluation(tasks.of, folder=tmp_path), pretrained=str(text_model), device="cpu", **SHORT)
        with caplog.at_level(logging.INFO, logger="lm_eval"):
            logging.getLogger("lm_eval").propagate = True
            task = tasks.load("own_arc")["tasks"]["own_arc"]
            task.set_config("num_fewshot", 0)
            task.build_all_requests()
            half = len(task.instances) // 2
            parts = lm.loglikelihood(task.instances[:half]) + lm.loglikelihood(task.instances[half:])
        assert sum("fitted mtv for own_arc" in record.message for record in caplog.records) == 1
        assert len(parts) == len(task.instances)
        (saved,) = tmp_path.rglob("vector.safetensors")
        assert saved.relative_to(tmp_path).parts[0] == "own_arc"
        again = LmEvalMtv(Evaluation(tasks.of), pretrained=str(text_model), device="cpu", vector=str(saved))
        assert again.loglikelihood(task.instances) == LmEvalMtv(
            Evaluation(tasks.of), pretrained=str(text_model), device="cpu", **SHORT
        ).loglikelihood(task.instances)

    @pytest.mark.parametrize("chat", [False, True])
    @pytest.mark.parametrize("kind", ["answers", "arc", "copa", "winogrande"])
    def test_fit_prompts_are_what_the_harness_writes(self, text_model, tmp_path, kind, chat):
        """The library is made to evaluate the training split with its first documents as demonstrations."""
        task_file(tmp_path, kind, description="red circle.\n")
        task_file(
            tmp_path,
            kind,
            task="mirror",
            description="red circle.\n",
            test_split="train",
            fewshot_config={"sampler": "first_n"},
        )
        tasks = Tasks(include_path=str(tmp_path), include_defaults=False)
        found = tasks.load([f"own_{kind}", "mirror"])["tasks"]
        form = {"system_instruction": "green ring." if chat else None, "apply_chat_template": chat}
        evaluation = Evaluation(tasks.of, fewshot_as_multiturn=chat, **form)
        lm = LmEvalMtv(evaluation, pretrained=str(text_model), device="cpu")
        mirror, shots = found["mirror"], 2
        mirror.set_config("num_fewshot", shots)
        mirror.build_all_requests(
            fewshot_as_multiturn=chat, chat_template=lm.apply_chat_template if chat else None, **form
        )
        prompts, runner = LmPrompts(found[f"own_{kind}"], None, evaluation, lm), LmRunner(lm, lm.hf_arguments)
        for number in range(shots, 8):
            asked = [instance for instance in mirror.instances if instance.doc_id == number]
            doc = asked[0].doc
            prompt = prompts.prompt(Episode(number, (0, 1)))
            if kind == "answers":
                assert prompt.context == asked[0].args[0]
                assert prompt.target == doc["answer"]
                # The answer stands there as it does in a demonstration.
                following = prompts.prompt(Episode(0, (1, number))).context
                assert prompt.continuation + prompt.ending in following
                assert prompt.ending == ("<end_of_utterance>" if chat else "\n")
                assert runner.target_ids(prompt) == lm.tok_encode(prompt.continuation + prompt.ending)
            else:
                gold = {"arc": "ABC".find(doc.get("answerKey", "?")), "copa": doc.get("label")}.get(
                    kind, "12".find(doc.get("answer", "?"))
                )
                context, continuation = asked[gold].args
                assert (prompt.context, prompt.continuation) == (context, continuation)
                assert runner.target_ids(prompt) == lm._encode_pair(context, continuation)[1]

    def test_a_fit_is_the_same_in_both_harnesses(self, text_model, tmp_path):
        """Same task file, settings and seed: the same vector of the same recipe, and the same prompts."""
        from lmms_eval.evaluator import simple_evaluate as lmms_evaluate
        from lmms_eval.tasks import TaskManager as LmmsTasks

        from lmms_mtv.harness.lmms.model import LmmsEvalMtv
        from lmms_mtv.harness.lmms.task import TaskPrompts

        settings = SHORT | {"loss": "all", "seed": 5}
        # Without a line break at its end, which lmms-eval's templates drop and lm-eval's keep.
        folder = task_file(tmp_path, "answers", description="red circle. ")
        lm, _ = run(text_model, folder, ["answers"], **settings)
        manager = LmmsTasks("ERROR", include_path=str(folder), include_defaults=False, model_name="mtv")
        other = LmmsEvalMtv(pretrained=str(text_model), **settings)
        base, records = other.base, other.records
        lmms_evaluate(other, tasks=["own_answers"], task_manager=manager, limit=2)
        ours, theirs = lm.records["own_answers"], records["own_answers"]
        for key in ("vector", "heads", "settings", "split", "examples", "prompt", "shots"):
            assert getattr(ours, key) == getattr(theirs, key), key

        tasks = Tasks(include_path=str(folder), include_defaults=False)
        evaluation = Evaluation(tasks.of)
        text = LmPrompts(tasks.load("own_answers")["tasks"]["own_answers"], None, evaluation, lm)
        loaded = manager.load_task_or_group(["own_answers"], task_type="chat")["own_answers"]
        messages, runner = TaskPrompts(loaded, None), LmRunner(lm, lm.hf_arguments)
        for episode in (Episode(0, ()), Episode(3, (1, 2)), Episode(5, (11, 0, 7))):
            one, two = text.prompt(episode), messages.prompt(episode)
            assert one.context == base.rendered(two)
            assert runner.target_ids(one) == base.target_ids(two)
            assert runner.lead_ids(one) == base.lead_ids(two) == []
            one, two = dataclasses.replace(one, delimiter="\n"), dataclasses.replace(two, target_delimiter="\n")
            assert runner.lead_ids(one) == base.lead_ids(two) == lm.tok_encode("\n")
            assert runner.target_ids(one) == base.target_ids(two)
        with pytest.raises(DataError, match="corrupted=bare"):
            text.prompt(Episode(3, (1, 2), (2, 1)))

    @pytest.mark.parametrize(
        "settings",
        [
            pytest.param(
                {"method": "function_vector", "corrupted": "bare", "effect_examples": 2, "top": 2},
                id="function_vector",
                marks=pytest.mark.slow,
            ),
            pytest.param({"method": "task_vector"}, id="task_vector", marks=pytest.mark.slow),
            pytest.param({"method": "icv"}, id="icv", marks=pytest.mark.slow),
        ],
    )
    def test_methods_of_other_streams_change_answers_and_likelihoods(self, text_model, folder, settings):
        fitting = {name: SHORT[name] for name in ("iterations", "fit_shots", "reuse")} | settings
        if settings["method"] != "icv":
            fitting["examples"] = 3
        lm, answers = run(text_model, folder, ["answers", "arc"], **fitting)
        _, plain = run(text_model, folder, ["answers", "arc"], method="none")
        for name in ("own_answers", "own_arc"):
            assert lm.records[name].heads == []
            assert lm.records[name].method == settings["method"]
            assert answers[name] != plain[name]

    @pytest.mark.slow
    def test_few_shot_prompts_are_counted(self, text_model, folder):
        lm, _ = run(text_model, folder, ["arc"], {"num_fewshot": 2}, **SHORT)
        assert lm.records["own_arc"].shots == 2

    @pytest.mark.slow
    def test_an_evaluation_in_another_form_than_the_model_was_told_is_refused(self, text_model, folder):
        tasks = Tasks(include_path=str(folder), include_defaults=False)
        lm = LmEvalMtv(Evaluation(tasks.of), pretrained=str(text_model), device="cpu", **SHORT)
        evaluated = {"tasks": ["own_arc"], "task_manager": tasks, "limit": 2}
        with pytest.raises(DataError, match=r"as mtv knows it, asks .*lmms-mtv lm-eval"):
            simple_evaluate(lm, apply_chat_template=True, **evaluated)
        with pytest.raises(DataError, match="as mtv knows it, asks"):
            simple_evaluate(lm, system_instruction="blue", **evaluated)
        assert simple_evaluate(lm, num_fewshot=1, **evaluated)

    def test_two_tasks_of_one_name_are_not_confused(self, text_model, folder, tmp_path):
        known = Tasks(include_path=str(folder), include_defaults=False)
        known.load("own_arc")
        other = Tasks(include_path=str(task_file(tmp_path, "arc", doc_to_text="{{question}}")), include_defaults=False)
        lm = LmEvalMtv(Evaluation(known.of), pretrained=str(text_model), device="cpu", **SHORT)
        with pytest.raises(DataError, match="as mtv knows it, asks"):
            simple_evaluate(lm, tasks=["own_arc"], task_manager=other, limit=2)

    @pytest.mark.slow
    def test_chat_templates(self, text_model, folder):
        form = {"apply_chat_template": True, "system_instruction": "blue ring.", "num_fewshot": 2}
        lm, _ = run(text_model, folder, ["arc"], form | {"fewshot_as_multiturn": True}, **SHORT)
        plain, _ = run(text_model, folder, ["arc"], {"num_fewshot": 2}, **SHORT)
        assert lm.records["own_arc"].prompt != plain.records["own_arc"].prompt

    @pytest.mark.slow
    def test_the_tasks_own_settings_are_used_and_arguments_win(self, text_model, tmp_path):
        declared = {"version": 1, "mtv": {"demonstrations": "train", "mtv": {"iterations": 3, "steps": 4}}}
        folder = task_file(tmp_path, "arc", metadata=declared, training_split=None, fewshot_split=None)
        lm, _ = run(text_model, folder, ["arc"], **(SHORT | {"steps": 5}))
        settings = lm.records["own_arc"].settings
        assert (settings["iterations"], settings["steps"]) == (8, 5)
        lm, _ = run(
            text_model, folder, ["arc"], **{key: SHORT[key] for key in SHORT if key not in ("steps", "iterations")}
        )
        assert lm.records["own_arc"].settings["steps"] == 4
        assert lm.records["own_arc"].declared == {"iterations": 3, "steps": 4}

    @pytest.mark.slow
    def test_settings_of_one_method_are_no_defaults_of_another(self, text_model, tmp_path):
        declared = {"version": 1, "mtv": {"mtv": {"iterations": 3, "steps": 4}, "icv": {"strength": 0.2}}}
        folder = task_file(tmp_path, "arc", metadata=declared)
        quick = {"examples": 4, "candidate_examples": 2, "candidates": 2, "samples": 2, "fit_shots": 1, "reuse": False}
        for name, expected in {"icv": {"iterations": 100, "strength": 0.2}, "random": {"iterations": 3}}.items():
            settings = {k: v for k, v in quick.items() if k in (*methods.get(name).settings(), "reuse")}
            lm, _ = run(text_model, folder, ["arc"], method=name, **settings)
            assert expected.items() <= lm.records["own_arc"].settings.items(), name

    @pytest.mark.slow
    def test_caches_keep_working_and_never_mix_tasks(self, text_model, folder, tmp_path):
        tasks = Tasks(include_path=str(folder), include_defaults=False)
        lm = LmEvalMtv(Evaluation(tasks.of), pretrained=str(text_model), device="cpu", **SHORT)
        cache, score = str(tmp_path / "cache"), []
        for _ in range(2):
            results = simple_evaluate(lm, tasks=["own_arc"], task_manager=tasks, use_cache=cache)
            score.append([sample["resps"] for sample in results["samples"]["own_arc"]])
        assert json.dumps(score[0]) == json.dumps(score[1])
        for other in (SHORT | {"seed": 1}, SHORT | {"steps": 4}, {"method": "none"}, SHORT | {"add_bos_token": True}):
            another = LmEvalMtv(Evaluation(tasks.of), pretrained=str(text_model), device="cpu", **other)
            with pytest.raises(ArgumentError, match="answers of another model, method, seed or vector"):
                simple_evaluate(another, tasks=["own_arc"], task_manager=tasks, use_cache=cache)
        task_file(tmp_path / "more", "arc")
        task_file(tmp_path / "more", "arc", task="own_arc_again")
        twice = Tasks(include_path=str(tmp_path / "more"), include_defaults=False)
        lm = LmEvalMtv(Evaluation(twice.of), pretrained=str(text_model), device="cpu", **SHORT)
        with pytest.raises(ArgumentError, match="ask the same, and --use_cache"):
            simple_evaluate(
                lm, tasks=["own_arc", "own_arc_again"], task_manager=twice, use_cache=str(tmp_path / "other")
            )


class TestTextTasks:
    """The project's own text tasks, on small data in the official layout."""

    NAMES = ("english_spanish", "english_spanish_colon", "antonyms", "antonyms_colon", "words_capitalize")

    @pytest.fixture(autouse=True)
    def _small_data(self, prepared_data, monkeypatch):
        monkeypatch.setenv(data.FOLDER, str(prepared_data))

    @pytest.mark.parametrize("shots", matrix.members([0, 2], 2))
    def test_method_none_is_the_librarys_model(self, text_model, shots):
        options = {"evaluation": {"num_fewshot": shots}, "prefix": "", "batch_size": 4}
        own, answers = run(text_model, tasks_folder() / LM_EVAL, self.NAMES, method="none", **options)
        library, expected = run(text_model, tasks_folder() / LM_EVAL, self.NAMES, library=True, **options)
        assert answers == expected
        for name in self.NAMES:
            form = (
                ("{input}:", "{input}:{output}, ")
                if "colon" in name
                else ("Q: {input}\nA:", "Q: {input}\nA: {output}\n\n")
            )
            shown = {form[1].format(**row) for row in data.documents(name.removesuffix("_colon"), "train")}
            requests = []
            for index, row in enumerate(data.documents(name.removesuffix("_colon"), "test")):
                context = answers[name][index][0][0][0]
                # The form of lmms-eval's prompts; each harness draws demonstrations of its own.
                asked = form[0].format(**row)
                assert context.endswith(asked)
                assert sum(context.startswith(one) for one in shown) == (shots > 0)
                assert context.count(form[0].format(input="")[-2:]) == shots + 1
                arguments = (context, f" {row['output']}")
                requests.append(Instance("loglikelihood", row, arguments, 0, (name, index, 1)))
            mine, theirs = own.loglikelihood(requests), library.loglikelihood(requests)
            assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]
            assert [score for score, _ in mine] == pytest.approx([score for score, _ in theirs], abs=1e-5)

    @pytest.mark.slow
    def test_the_command(self, text_model, tmp_path):
        settings = ",".join(f"{key}={value}" for key, value in SHORT.items())
        scores = {}
        for model, arguments in (("hf", ""), ("mtv", ",method=none"), ("mtv", f",{settings}")):
            output = tmp_path / f"{model}{len(arguments)}"
            done = command(
                *("--model", model, "--model_args", f"pretrained={text_model}{arguments}", "--device", "cpu"),
                *("--tasks", ",".join(self.NAMES), "--num_fewshot", "2", "--output_path", str(output)),
                cwd=tmp_path,
            )
            assert done.returncode == 0, done.stderr[-3000:]
            (path,) = output.rglob("results_*.json")
            results = json.loads(path.read_text())["results"]
            assert results.keys() == set(self.NAMES)
            scores[model + arguments] = {name: results[name]["exact_match,none"] for name in self.NAMES}
        assert scores["hf"] == scores["mtv,method=none"]


class TestBadInput:
    def test_arguments(self, text_model):
        model = str(text_model)
        with pytest.raises(ArgumentError, match=r"'stepz'. Did you mean 'steps'\?.*seed.*iterations.*add_bos_token"):
            LmEvalMtv(pretrained=model, stepz=3)
        with pytest.raises(ArgumentError, match=r"shots=2 is no argument.*--num_fewshot"):
            LmEvalMtv(pretrained=model, shots=2)
        with pytest.raises(ArgumentError, match=r"base=hf is no argument.*lm-eval's model hf"):
            LmEvalMtv(pretrained=model, base="hf")
        with pytest.raises(ArgumentError, match="pretrained= is missing"):
            LmEvalMtv(method="none")
        with pytest.raises(ArgumentError, match="no/such-model cannot be loaded"):
            LmEvalMtv(pretrained="no/such-model")
        with pytest.raises(ArgumentError, match=r"cannot be loaded: Did you mean 'smollm2'\?"):
            LmEvalMtv(pretrained="smollm")
        assert {"shots", "base"} <= set(Arguments.__dataclass_fields__)

    @pytest.mark.parametrize(
        ("flags", "told"),
        [
            (["--model_args", "pretrained=x,device=cuda"], "device=cuda: torch .*: pass device=cpu"),
            (["--model_args", "pretrained=x", "--device", "cuda:0"], "device=cuda:0: torch .*: pass device=cpu"),
            (["--model_args", "pretrained=x,seed=-1"], "seed=-1.*, expected an integer, 0 or more"),
        ],
    )
    def test_errors_of_the_command_before_tasks_and_model(self, flags, told, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr("lm_eval.tasks.TaskManager.__init__", lambda *_: pytest.fail("it reads tasks"))
        with pytest.raises(ArgumentError, match=told):
            lm_command.run(["run", "--model", "mtv", "--tasks", "lambada", *flags])

    def test_encoder_decoder_models(self, tmp_path, text_model):
        from transformers import T5Config, T5ForConditionalGeneration

        tokenizer = AutoTokenizer.from_pretrained(text_model)
        config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4)
        T5ForConditionalGeneration(config).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(ArgumentError, match=r"encoder-decoder model.*method=none"):
            LmEvalMtv(pretrained=str(tmp_path), device="cpu")
        assert LmEvalMtv(pretrained=str(tmp_path), device="cpu", method="none").backend == "seq2seq"

    def test_a_model_that_was_not_told_the_tasks(self, text_model, folder):
        tasks = Tasks(include_path=str(folder), include_defaults=False)
        lm = LmEvalMtv(pretrained=str(text_model), device="cpu", **SHORT)
        with pytest.raises(ArgumentError, match="start the evaluation with lmms-mtv lm-eval"):
            simple_evaluate(lm, tasks=["own_arc"], task_manager=tasks, limit=1)

    def test_data(self, text_model, folder, tmp_path):
        with pytest.raises(LeakageError, match="demonstrations=test is the split"):
            run(text_model, folder, ["arc"], **SHORT, demonstrations="test")
        with pytest.raises(DataError, match=r"no split 'dev', only"):
            run(text_model, folder, ["arc"], **SHORT, demonstrations="dev")
        with pytest.raises(DataError, match=r"at least 13.*fit_shots="):
            run(text_model, folder, ["arc"], **(SHORT | {"fit_shots": 12}))
        with pytest.raises(DataError, match=r"no target to fit on.*method=none or vector="):
            run(text_model, folder, ["texts"], **SHORT)
        with pytest.raises(ContextLengthError, match=r"does not fit the 30 tokens.*fit_shots="):
            run(text_model, folder, ["arc"], **SHORT, max_length=30)
        bare = task_file(tmp_path, "arc", training_split=None, fewshot_split=None)
        with pytest.raises(DataError, match=r"no training split.*demonstrations="):
            run(text_model, bare, ["arc"], **SHORT)

    def test_a_vector_of_another_model_is_used_with_a_warning(self, text_model, vector, tmp_path, caplog):
        copy = tmp_path / "copy"
        model = AutoModelForCausalLM.from_pretrained(text_model)
        with torch.no_grad():
            next(model.parameters()).add_(1)
        model.save_pretrained(copy)
        AutoTokenizer.from_pretrained(text_model).save_pretrained(copy)
        with caplog.at_level(logging.WARNING, logger="lm_eval"):
            LmEvalMtv(pretrained=str(text_model), device="cpu", vector=str(vector))
            assert not [message for message in caplog.messages if "was fitted for" in message]
            LmEvalMtv(pretrained=str(copy), device="cpu", vector=str(vector))
        assert any("its values are those of another" in message for message in caplog.messages)


def command(*arguments: str, cwd: Path) -> CompletedProcess[str]:
    """The installed command in a process of its own, away from the repository."""
    return processes.run(
        [sys.executable, "-c", "from lmms_mtv.cli import main; main()", "lm-eval", *arguments],
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        timeout=300,
    )


class TestCommandLine:
    @pytest.mark.slow
    def test_a_run_with_shots_and_the_users_own_tasks(self, text_model, folder, tmp_path):
        settings = ",".join(f"{key}={value}" for key, value in SHORT.items())
        done = command(
            *("--model", "mtv", "--model_args", f"pretrained={text_model},{settings}", "--device", "cpu"),
            *("--tasks", "own_arc,own_answers", "--num_fewshot", "1", "--include_path", str(folder)),
            *("--limit", "3", "--batch_size", "2", "--output_path", str(tmp_path / "out")),
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "|own_arc" in done.stdout
        assert done.stderr.count("fitted mtv for own_") == 2
        (path,) = (tmp_path / "out").rglob("results_*.json")
        used = json.loads(path.read_text())["config"]["mtv"]["tasks"]
        assert used["own_arc"]["shots"] == 1
        for task in ("own_arc", "own_answers"):
            saved = TaskVector.load(path.parent / used[task]["source"])
            assert saved.id == used[task]["vector"]
            assert [list(head) for head in saved.heads] == used[task]["heads"]

    @pytest.mark.slow
    def test_an_error_is_one_line_and_a_status(self, text_model, folder, tmp_path):
        done = command(
            *("--model", "mtv", "--model_args", f"pretrained={text_model},stepz=3", "--tasks", "own_arc"),
            *("--include_path", str(folder)),
            cwd=tmp_path,
        )
        assert done.returncode == 1
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("lmms-mtv:")]
        assert "unknown model argument 'stepz'. Did you mean 'steps'?" in line
        assert "Traceback" not in done.stderr
