"""lmms-eval's own models as bases: the same answers as alone, and edited at every forward."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import checkpoints
import pytest
import torch
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager, get_task_dict

from lmms_mtv import applied
from lmms_mtv.fitting import Episode, FitSession
from lmms_mtv.harness import bases
from lmms_mtv.harness.task import TaskPrompts
from lmms_mtv.harness.wrapped import Wrapped
from lmms_mtv.vector import Edit

pytest.importorskip("decord", reason="pip install -e '.[bases]'")
pytest.importorskip("qwen_vl_utils", reason="pip install -e '.[bases]'")

SHORT = "iterations=3,fit_shots=2,steps=2,samples=3,examples=3,candidate_examples=2,candidates=2"
TASK = "shapes_phrase_en"
LIMIT = 6


@dataclass(frozen=True)
class Base:
    """A model of lmms-eval and how it runs on a CPU; ``batches`` are the sizes that its wrapper takes."""

    name: str
    arguments: str
    checkpoint: str | None = None
    simple: bool = False
    batches: tuple[int, ...] = (1, 3)

    @property
    def label(self) -> str:
        return f"{self.name}-{'simple' if self.simple else 'default'}"


QWEN = "device_map=cpu,min_pixels=64,max_pixels=1024"
BASES = (
    Base("idefics2", "device_map=cpu,dtype=float32,attn_implementation=eager", simple=True),
    Base("qwen2_5_vl", QWEN),
    Base("qwen2_5_vl", QWEN, simple=True),
    Base("qwen2_vl", QWEN, simple=True),
    Base("qwen3_vl", "device_map=cpu,min_pixels=1024,max_pixels=4096"),
    Base("llava_hf", "device_map=cpu,dtype=float32", "llava", batches=(1,)),
    Base("llava_hf", "device_map=cpu,dtype=float32", "llava", simple=True, batches=(1,)),
    Base("internvl_hf", "device_map=cpu,max_patches=1", "internvl", batches=(1,)),
    Base("mistral3_vl", "device_map=cpu", "mistral3", simple=True),
    Base("gemma3", "device_map=cpu", simple=True),
)
BOTH = {"qwen2_5_vl", "llava_hf"}
"""Those with a chat wrapper and a simple one."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints that were asked for, by the name of their architecture."""

    class Built(dict):
        def __missing__(self, name: str) -> Path:
            self[name] = getattr(checkpoints, name)(tmp_path_factory.mktemp("bases") / name)
            return self[name]

    return Built()


@pytest.fixture(scope="module", params=BASES, ids=lambda base: base.label)
def base(request) -> Base:
    return request.param


@pytest.fixture(scope="module")
def arguments(base, folders) -> str:
    return f"pretrained={folders[base.checkpoint or base.name]},{base.arguments}"


def forced(base: Base) -> str:
    return ",force_simple=True" if base.simple and base.name in BOTH else ""


def evaluated(model: str, model_args: str, **options) -> list[str]:
    manager = TaskManager("ERROR", model_name=model)
    results = simple_evaluate(
        model, model_args, tasks=[TASK], task_manager=manager, limit=LIMIT, bootstrap_iters=0, device="cpu", **options
    )
    samples = sorted(results["samples"][TASK], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in samples]


def built(base: Base, folders, **more) -> Wrapped:
    given = dict(pair.split("=") for pair in base.arguments.split(","))
    given |= {"pretrained": str(folders[base.checkpoint or base.name]), "device": "cpu"}
    for name in ("min_pixels", "max_pixels", "max_patches"):
        if name in given:
            given[name] = int(given[name])
    own = {"force_simple": True} if base.simple and base.name in BOTH else {}
    wrapping, _ = bases.build(base.name, given | own | more)
    return wrapping


def prompts(simple: bool, task: str = TASK) -> TaskPrompts:
    manager = TaskManager("ERROR", model_name="mtv")
    made = get_task_dict([task], manager, "simple" if simple else "chat")[task]
    return TaskPrompts(made, None, as_sent=True)


def test_without_a_method_it_answers_as_it_does_alone(base, arguments):
    for size in base.batches:
        alone = evaluated(base.name, arguments, batch_size=size, force_simple=base.simple)
        through = evaluated("mtv", f"base={base.name},method=none,{arguments}{forced(base)}", batch_size=size)
        assert through == alone
        assert len(set(alone)) > 1


def test_a_fit_and_an_evaluation_run_with_it(base, arguments, tmp_path, monkeypatch):
    from lmms_eval.api.task import Task
    from test_harness import Arguments, records

    monkeypatch.setattr(Task, "args", None, raising=False)
    size = base.batches[-1]
    for number, more in enumerate((SHORT, "method=none,shots=2", "method=none,shots=4")):
        evaluated(
            "mtv",
            f"base={base.name},{arguments}{forced(base)},{more}",
            batch_size=size,
            cli_args=Arguments(tmp_path / str(number)),
        )
    fitted, two, four = (records(tmp_path / str(number))[0]["tasks"][TASK] for number in range(3))
    assert fitted["settings"]["iterations"] == 3
    assert fitted["evaluation"]["requests"] == two["evaluation"]["requests"] == LIMIT
    grown = [run["evaluation"]["input_tokens"] for run in (fitted, two, four)]
    # Demonstrations are all of one length but for the words of their answers.
    assert grown[2] - grown[1] == pytest.approx(grown[1] - grown[0], rel=0.1)
    assert grown[1] > 1.5 * grown[0]


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
    wrapping.wrapper.task_dict[TASK] = task.dataset
    seen: list[torch.Tensor] = []
    watch = wrapping.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]) if kwargs["input_ids"].shape[1] > 1 else None,
        with_kwargs=True,
    )
    request = task.instances[1]
    wrapping.answers([request], wrapping.wrapper.cache_hook, edited=False)
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
    text = wrapping.wrapper.tokenizer.decode(wrapping.target_ids(prompt))
    assert prompt.target in text
    assert wrapping._found
    assert text.strip() != prompt.target
