"""lmms-eval's own models as bases: the same answers as alone, and edited at every forward."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import MODEL_REGISTRY_V2, get_model
from lmms_eval.models.model_utils.gen_metrics import get_logged_metrics_history, reset_logged_metrics
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.tasks import get_task_dict
from transformers import AutoModelForImageTextToText, AutoProcessor

from lmms_mtv import applied
from lmms_mtv.errors import ArgumentError, HookError
from lmms_mtv.fit.examples import Episode
from lmms_mtv.fit.session import FitSession
from lmms_mtv.harness.lmms import bases, plugin
from lmms_mtv.harness.lmms.bases.wrapped import WrapperBase
from lmms_mtv.harness.lmms.task import TaskPrompts
from lmms_mtv.shapes import questions, scenes
from lmms_mtv.vectors import Edit
from support import checkpoints, evaluations, matrix
from support.evaluations import Outcome, own_tasks, task_manager

pytest.importorskip("decord", reason="pip install -e '.[bases]'")
pytest.importorskip("qwen_vl_utils", reason="pip install -e '.[bases]'")

SHORT = "iterations=3,fit_shots=2,steps=2,samples=3,examples=3,candidate_examples=2,candidates=2"
SHORT += ",initial_logit=1.0,reuse=False"
TASK = "shapes_phrase_en"
LIMIT = 6


@dataclass(frozen=True)
class Base:
    """A model of lmms-eval and how it runs on a CPU; ``batches`` are the sizes that its wrapper takes.

    ``slow``: left to the slow tests.
    """

    name: str
    arguments: str
    checkpoint: str | None = None
    simple: bool = False
    batches: tuple[int, ...] = (1, 3)
    slow: bool = True

    @property
    def label(self) -> str:
        return f"{self.name}-{'simple' if self.simple else 'default'}"


QWEN = "device_map=cpu,min_pixels=64,max_pixels=1024"
BASES = (
    Base("idefics2", "device_map=cpu,dtype=float32,attn_implementation=eager", simple=True, slow=False),
    Base("qwen2_5_vl", QWEN, slow=False),
    Base("qwen2_5_vl", QWEN, simple=True),
    Base("qwen2_vl", QWEN, simple=True),
    Base("qwen3_vl", "device_map=cpu,min_pixels=1024,max_pixels=4096"),
    Base("llava_hf", "device_map=cpu,dtype=float32", "llava", batches=(1,)),
    Base("llava_hf", "device_map=cpu,dtype=float32", "llava", simple=True, batches=(1,)),
    Base("internvl_hf", "device_map=cpu,max_patches=1", "internvl", batches=(1,)),
    Base("mistral3_vl", "device_map=cpu", "mistral3", simple=True),
    Base("glm4v", "device_map=cpu", simple=True),
    Base("gemma3", "device_map=cpu", simple=True),
    Base("llama_vision", "device_map=cpu,dtype=float32", "mllama", simple=True, batches=(1,)),
)
IDEFICS2, QWEN2_5_VL, LLAVA = BASES[0], BASES[1], next(base for base in BASES if base.name == "llava_hf")
BOTH = {"qwen2_5_vl", "llava_hf"}
"""Those with a chat wrapper and a simple one."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints that were asked for, by the name of their architecture."""

    class Built(dict):
        def __missing__(self, name: str) -> Path:
            # The wrapper of glm4v knows the dense model by this word in its path.
            self[name] = getattr(checkpoints, name)(tmp_path_factory.mktemp("bases-Flash") / name)
            return self[name]

    return Built()


def params(chosen) -> list:
    return matrix.members(chosen, *(base for base in chosen if not base.slow), label=lambda base: base.label)


@pytest.fixture(scope="module", params=params(BASES))
def base(request) -> Base:
    return request.param


def arguments_of(base: Base, folders) -> str:
    return f"pretrained={folders[base.checkpoint or base.name]},{base.arguments}"


def forced(base: Base) -> str:
    return ",force_simple=True" if base.simple and base.name in BOTH else ""


def evaluated(model: str, model_args: str, include: Path | None = None, **options) -> list[str]:
    manager = own_tasks(include, model) if include else task_manager(model)
    options = {"limit": LIMIT} | options
    results = simple_evaluate(
        model, model_args, tasks=[TASK], task_manager=manager, bootstrap_iters=0, device="cpu", **options
    )
    samples = sorted(results["samples"][TASK], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in samples]


def here(wanted: Mapping[str, Mapping[str, Any]], folder: Path) -> dict[str, Outcome]:
    """What :func:`evaluations.evaluate` does, within this process."""
    from lmms_eval.api.task import Task

    from support.shape_tasks import Arguments

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Task, "args", None, raising=False)
        for name, flags in wanted.items():
            options = {key: flags[key] for key in flags.keys() - {"tasks", "model"}}
            answers = evaluated(flags["model"], **options, cli_args=Arguments(folder / name))
            found[name] = Outcome(dict(enumerate(answers)), evaluations.record(folder / name))
    return found


def flags(model: str, model_args: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "model_args": model_args, "tasks": TASK, "limit": LIMIT, "batch_size": 1} | more


def ways() -> list:
    """Each base within this process, and one of either kind with the harness's command."""
    within = [(base, here) for base in BASES]
    by_command = [(base, evaluations.evaluate) for base in (IDEFICS2, QWEN2_5_VL)]
    return matrix.members(
        [*within, *by_command],
        label=lambda way: f"{way[0].label}-{'here' if way[1] is here else 'command'}",
    )


@dataclass(frozen=True)
class Runs:
    """The evaluations of one base, by name."""

    base: Base
    outcomes: Mapping[str, Outcome]


@pytest.fixture(scope="module", params=ways())
def runs(request, folders, tmp_path_factory) -> Runs:
    base, way = request.param
    arguments = arguments_of(base, folders)
    through = f"base={base.name},{arguments}{forced(base)}"
    wanted = {}
    for size in base.batches:
        wanted[f"alone-{size}"] = flags(base.name, arguments, batch_size=size, force_simple=base.simple)
        wanted[f"none-{size}"] = flags("mtv", f"{through},method=none", batch_size=size)
    for shots in (2, 4):
        wanted[f"shots-{shots}"] = flags("mtv", f"{through},method=none,shots={shots}", batch_size=base.batches[-1])
    wanted["mtv"] = flags("mtv", f"{through},{SHORT}", batch_size=base.batches[-1])
    return Runs(base, way(wanted, tmp_path_factory.mktemp(base.label)))


def test_without_a_method_it_answers_as_it_does_alone(runs):
    for size in runs.base.batches:
        alone = runs.outcomes[f"alone-{size}"].answers
        assert runs.outcomes[f"none-{size}"].answers == alone
        assert sorted(alone) == list(range(LIMIT))
        assert len(set(alone.values())) > 1


def test_each_demonstration_is_as_long_as_another(runs):
    size = runs.base.batches[-1]
    grown = [
        runs.outcomes[name].record["evaluation"]["input_tokens"] for name in (f"none-{size}", "shots-2", "shots-4")
    ]
    # But for the words of their answers.
    assert grown[2] - grown[1] == pytest.approx(grown[1] - grown[0], rel=0.15)
    assert grown[1] > 1.5 * grown[0]


def test_a_fitted_vector_is_in_what_it_answers(runs):
    """An edit that misses a forward is an error of the evaluation."""
    size = runs.base.batches[-1]
    fitted, plain = runs.outcomes["mtv"], runs.outcomes[f"none-{size}"]
    assert fitted.record["settings"]["iterations"] == 3
    assert fitted.record["heads"]
    assert fitted.record["loss"]["chosen"] != fitted.record["loss"]["unedited"]
    for key in ("requests", "input_tokens"):
        assert fitted.record["evaluation"][key] == plain.record["evaluation"][key]
    assert fitted.answers.keys() == plain.answers.keys()
    assert fitted.answers != plain.answers


@pytest.mark.slow
@pytest.mark.parametrize("way", [here, evaluations.evaluate])
def test_hf_answers_as_a_loop_of_transformers_does(way, folders, tmp_path):
    folder = folders["idefics2"]
    processor = AutoProcessor.from_pretrained(folder, do_image_splitting=False)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    question = [{"type": "image"}, {"type": "text", "text": questions.QUESTION}]
    chat = processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    lines = (plugin.tasks_folder() / "shapes" / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    pictures = [scenes.draw(scenes.from_mapping(json.loads(line))) for line in lines[:LIMIT]]

    def answer(prompt: str, picture) -> str:
        inputs = processor(text=prompt, images=[picture], return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).split("\n")[0]

    prompts = {"raw": f"<image>{questions.QUESTION}", "chat": chat}
    wanted = {
        f"{style}-{size}": flags("mtv", f"method=none,prompt_style={style},pretrained={folder}", batch_size=size)
        for style in prompts
        for size in (1, 3)
    }
    given = way(wanted, tmp_path)
    for style, prompt in prompts.items():
        expected = {number: answer(prompt, picture) for number, picture in enumerate(pictures)}
        assert len(set(expected.values())) > 1
        for size in (1, 3):
            assert given[f"{style}-{size}"].answers == expected


@pytest.mark.slow
def test_two_processes_answer_as_one_does(folders, tmp_path):
    """With an odd number of documents, and with one: then a process has none of its own."""
    wanted = {}
    for base in (IDEFICS2, QWEN2_5_VL):
        arguments = f"base={base.name},{arguments_of(base, folders)}"
        wanted[f"{base.name}-none"] = flags("mtv", f"{arguments},method=none", limit=5)
        for limit in (5, 1):
            wanted[f"{base.name}-mtv-{limit}"] = flags("mtv", f"{arguments},{SHORT}", limit=limit)
    one = here(wanted, tmp_path / "one")
    two = evaluations.evaluate(wanted, tmp_path / "two", processes=2)
    for name in wanted:
        assert two[name].answers == one[name].answers, name
        assert two[name].record["heads"] == one[name].record["heads"], name


@pytest.mark.slow
def test_the_prompts_that_a_task_keeps_for_a_model_are_asked_of_it_as_a_base(folders, tmp_path):
    from support.shape_tasks import task_file

    kept = {"default": {"tail": "What is it?"}, "idefics2": {"tail": "red or green?"}, "qwen2_5_vl": {"tail": "blue?"}}
    folder = task_file(tmp_path / "task", TASK, doc_to_text="tailed", lmms_eval_specific_kwargs=kept)
    with (folder / "utils.py").open("a") as file:
        file.write("\n\ndef tailed(doc, kept):\n    return kept['tail']\n")
    for base in (BASES[0], BASES[1]):
        arguments = arguments_of(base, folders)
        own = evaluated(base.name, arguments, include=folder)
        assert evaluated("mtv", f"base={base.name},method=none,{arguments}", include=folder) == own
        assert own != evaluated("mtv", f"base=hf,method=none,prompt_style=chat,pretrained={folders[base.name]}")


def built(base: Base, folders, **more) -> WrapperBase:
    given = dict(pair.split("=") for pair in base.arguments.split(","))
    given |= {"pretrained": str(folders[base.checkpoint or base.name]), "device": "cpu"}
    for name in ("min_pixels", "max_pixels", "max_patches"):
        if name in given:
            given[name] = int(given[name])
    own = {"force_simple": True} if base.simple and base.name in BOTH else {}
    return bases.build(base.name, given | own | more)


def prompts(simple: bool, task: str = TASK) -> TaskPrompts:
    made = get_task_dict([task], task_manager(), "simple" if simple else "chat")[task]
    return TaskPrompts(made, None, as_sent=True)


@pytest.mark.slow
def test_the_model_gets_the_images_of_the_demonstrations(base, folders):
    wrapping, made = built(base, folders), prompts(base.simple)
    seen: list[int] = []
    token = getattr(wrapping.model.config, "image_token_id", None)
    assert token is not None
    watch = wrapping.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(int((kwargs["input_ids"] == token).sum())), with_kwargs=True
    )
    for shots in (0, 1, 3):
        wrapping.run([made.evaluation(0, "test", shots, seed=0)])
    watch.remove()
    one = seen[0]
    assert one > 0
    assert seen == [one, 2 * one, 4 * one]


def test_a_zero_shot_prompt_of_a_fit_is_what_the_harness_sends(base, folders):
    """The tokens of a prompt made for a fit, against those of the harness's own request for the same document."""
    wrapping, made = built(base, folders), prompts(base.simple)
    task = made._task
    task.build_all_requests(limit=2, rank=0, world_size=1)
    wrapping.harness_model.wrapper.task_dict[TASK] = task.dataset
    seen: list[torch.Tensor] = []
    watch = wrapping.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]) if kwargs["input_ids"].shape[1] > 1 else None,
        with_kwargs=True,
    )
    request = task.instances[1]
    wrapping.harness_model.answers([request], wrapping.harness_model.wrapper.cache_hook, edited=False)
    wrapping.run([made.evaluation(request.args[3], "test", 0, seed=0)])
    watch.remove()
    assert len(seen) == 2
    assert torch.equal(*seen)


def test_losses_are_those_of_replays_and_the_edit_fires_at_every_forward(base, folders):
    wrapping, made = built(base, folders), prompts(base.simple)
    session = FitSession(wrapping, wrapping.sites, made, seed=0, shots=1, progress=False)
    value = session.mean_activations(session.episodes(2, 2, "test"))
    masks = torch.stack([torch.zeros(session.shape[:2]), torch.ones(session.shape[:2])])
    losses = session.losses(Episode(0, (1,)), Edit.replace(value, masks), "all")
    assert session.replays
    assert losses[0] != losses[1]
    forwards: list[int] = []
    counting = wrapping.sites.decoder.register_forward_hook(lambda *_: forwards.append(1))
    settings = {"until": ["\n"], "max_new_tokens": 4, "do_sample": False, "temperature": 0}
    with applied(wrapping.sites, Edit.replace(value, masks[1])) as fired:
        given, tokens = wrapping.generate([made.evaluation(0, "test", 1, seed=0)], settings, edited=True)
    counting.remove()
    assert fired.count == len(forwards) > 1
    assert len(given) == 1
    assert tokens > 0


def test_the_target_ends_the_turn_that_the_wrapper_opens(base, folders):
    """All tiny checkpoints have a chat template, and their wrappers write with it."""
    wrapping, made = built(base, folders), prompts(base.simple)
    prompt = made.prompt(Episode(3, (1,)))
    tokenizer = AutoProcessor.from_pretrained(folders[base.checkpoint or base.name]).tokenizer
    text = tokenizer.decode(wrapping.target_ids(prompt))
    assert prompt.target in text
    assert wrapping.chat_template(prompt) is not None
    assert text.strip() != prompt.target
    blank = tokenizer.decode(wrapping.lead_ids(prompt))
    assert not blank.strip()
    assert tokenizer.decode(wrapping._answer_ids(prompt)) == blank + text


SETTINGS = {"until": ["\n"], "max_new_tokens": 3, "do_sample": False, "temperature": 0}


class Longer(get_model("idefics2")):
    """A wrapper that generates as much as it likes, whatever it is asked."""

    def generate_until(self, requests):
        for request in requests:
            request.args[1]["max_new_tokens"] = 5
            request.args[1]["min_new_tokens"] = 5
        return super().generate_until(requests)


@pytest.fixture
def register(monkeypatch):
    """Adds models to lmms-eval's registry for one test: ``register(name, class path)``."""
    registry = MODEL_REGISTRY_V2
    monkeypatch.setattr(registry, "_manifests", dict(registry._manifests))
    monkeypatch.setattr(registry, "_alias_to_model_id", dict(registry._alias_to_model_id))
    return lambda name, path: registry.register_manifest(ModelManifest(name, simple_class_path=path))


def everywhere(sites) -> Edit:
    layers, heads, size = sites.shape
    return Edit.replace(torch.zeros(layers, heads, size), torch.ones(layers, heads))


class TestWrappers:
    """What wrappers do beside generating."""

    def test_one_that_generates_too_much_is_fitted_as_any_other(self, folders, register):
        register("longer", "test_bases.Longer")
        made = prompts(simple=True)
        means, losses = [], []
        for base in (IDEFICS2, Base("longer", IDEFICS2.arguments, "idefics2", simple=True)):
            wrapping = built(base, folders)
            session = FitSession(wrapping, wrapping.sites, made, seed=0, shots=1, progress=False)
            means.append(session.mean_activations(session.episodes(3, 2, "test")))
            losses.append(session.losses(Episode(0, (1,)), Edit.replace(means[0], torch.ones(means[0].shape[:2]))))
            assert session.replays
        assert torch.equal(*means)
        assert torch.equal(*losses)

    def test_a_failure_that_it_keeps_back_is_an_error_or_without_an_edit_a_warning(self, folders):
        wrapping, made = built(LLAVA, folders), prompts(simple=False)
        asked = [made.evaluation(index, "test", 0, seed=0) for index in range(3)]
        calls: list[int] = []

        def fail(*_):
            calls.append(1)
            if len(calls) == 4:
                raise RuntimeError("out of something")

        hook = wrapping.model.register_forward_pre_hook(fail)
        failed = pytest.raises(HookError, match=r"llava_hf answered although its model failed \(RuntimeError: out of")
        with failed, applied(wrapping.sites, everywhere(wrapping.sites)):
            wrapping.generate(asked, SETTINGS, edited=True)
        calls.clear()
        given, _ = wrapping.generate(asked, SETTINGS, edited=False)
        assert [answer.text for answer in given].count("") == 1
        hook.remove()
        hook = wrapping.model.register_forward_pre_hook(lambda *_: 1 // 0)
        with pytest.raises(HookError, match=r"answered although .*ZeroDivisionError"):
            wrapping.run(asked[:1])
        hook.remove()

    def test_an_error_of_our_own_hooks_that_it_keeps_back_is_raised(self, folders):
        wrapping, made = built(LLAVA, folders), prompts(simple=False)
        edit = everywhere(wrapping.sites)
        three = Edit(edit.value, edit.keep.expand(3, -1, -1), edit.gain.expand(3, -1, -1))
        asked = [made.evaluation(0, "test", 0, seed=0)]
        with pytest.raises(HookError, match="an edit of 3 rows met a batch of 1 rows"), applied(wrapping.sites, three):
            wrapping.generate(asked, SETTINGS, edited=True)

    def test_one_that_keeps_no_cache_is_not_edited(self, folders):
        wrapping, made = built(QWEN2_5_VL, folders, use_cache=False), prompts(simple=False)
        asked = [made.evaluation(0, "test", 0, seed=0)]
        wrapping.generate(asked, SETTINGS, edited=False)
        with pytest.raises(HookError, match="use_cache=True"), applied(wrapping.sites, everywhere(wrapping.sites)):
            wrapping.generate(asked, SETTINGS, edited=True)

    def test_what_the_harness_writes_onto_the_model_reaches_it(self, folders):
        base = QWEN2_5_VL
        model = get_model("mtv").create_from_arg_string(
            f"base={base.name},method=none,{arguments_of(base, folders)}", {"batch_size": 2, "device": "cpu"}
        )
        wrapper = model.base.harness_model.wrapper
        assert not model.is_simple
        assert wrapper.batch_size == model.base.batch_size.rows == 2
        assert model.accelerator is wrapper.accelerator
        assert model.task_dict is wrapper.task_dict
        model._rank, model._world_size = 1, 2
        model.base.harness_model.share(model)
        assert (wrapper.rank, wrapper.world_size) == (1, 2)

    def test_a_fit_is_no_part_of_the_throughput(self, folders):
        wrapping, made = built(QWEN2_5_VL, folders), prompts(simple=False)
        asked = [made.evaluation(0, "test", 1, 0)]
        reset_logged_metrics()
        wrapping.run(asked)
        assert get_logged_metrics_history() == []
        wrapping.generate(asked, SETTINGS, edited=False)
        (figures,) = get_logged_metrics_history()
        wrapping.run(asked)
        assert get_logged_metrics_history() == [figures]
        reset_logged_metrics()

    def test_demonstrations_in_the_turn_of_the_query(self, folders):
        made = prompts(simple=False)
        turns, inline = (
            built(QWEN2_5_VL, folders, fewshot_as_multiturn=choice).document(made.evaluation(0, "test", 2, 0)).messages
            for choice in (True, False)
        )
        assert [turn["role"] for turn in turns] == ["user", "assistant", "user", "assistant", "user"]
        assert [turn["role"] for turn in inline] == ["user"]
        assert [part["type"] for part in inline[0]["content"]] == ["image", "text", "text"] * 2 + ["image", "text"]

    def test_places_of_images_in_a_text(self, folders):
        made = prompts(simple=True)
        prompt = made.evaluation(0, "test", 1, 0)
        (target,) = (shown.target for shown in prompt.demonstrations)
        for more, first, second in (
            ({}, "<image>", "<image>"),
            ({"interleave_visuals": True}, "<image 1>", "<image 2>"),
            ({"image_placeholder": "[{n}]"}, "[1]", "[2]"),
        ):
            doc = built(BASES[2], folders, **more).document(prompt)
            question = "What is it? Answer:"
            assert doc.text == f"{first}{question} {target}\n{second}{question}"
            assert len(doc.images) == 2


class TestBadInput:
    """One clear error that names the fix."""

    def refused(self, match: str, model_args: str, **flags) -> None:
        with pytest.raises(ArgumentError, match=match) as caught:
            get_model("mtv").create_from_arg_string(model_args, {"device": "cpu"} | flags)
        assert "\n" not in str(caught.value)

    def test_an_unknown_argument_lists_ours_and_the_wrappers(self):
        self.refused(
            "'do_image_spliting'.*Did you mean 'do_image_splitting'.*shots.*steps.*do_image_splitting",
            "base=idefics2,do_image_spliting=True",
        )
        self.refused("'prompt_style'.*fewshot_as_multiturn", "base=qwen2_5_vl,prompt_style=raw")

    def test_a_package_that_is_missing(self, tmp_path, monkeypatch, register):
        monkeypatch.syspath_prepend(tmp_path)
        for module, match in (("decord", r"install decord, or .*lmms-mtv\[bases\]"), ("not_there", "has not_there")):
            path = tmp_path / f"wrapper_with_{module}.py"
            path.write_text(f"raise ModuleNotFoundError('no {module}', name='{module}')")
            register(f"with_{module}", f"wrapper_with_{module}.Model")
            self.refused(f"base=with_{module} does not import.*{match}", f"base=with_{module},method=none")

    def test_a_wrapper_that_cannot_be_constructed(self, folders):
        self.refused("base=idefics2 cannot be constructed.*pretrained.*no/such", "base=idefics2,pretrained=no/such")
        self.refused("Batch size should be 1", "base=internvl_hf,pretrained=x", batch_size=2)

    def test_a_batch_size_that_it_refuses_when_it_runs(self, folders):
        wrapping, made = built(LLAVA, folders, batch_size=2), prompts(simple=False)
        with pytest.raises(ArgumentError, match=r"base=llava_hf refuses: Do not support batch_size_per_gpu > 1"):
            wrapping.run([made.evaluation(0, "test", 0, seed=0)])

    def test_values_of_our_own(self):
        self.refused("fewshot_as_multiturn=3", "base=idefics2,fewshot_as_multiturn=3")
