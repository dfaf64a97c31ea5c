"""What holds for every registered method, from its module's docstring to an evaluation in both harnesses."""

from __future__ import annotations

import copy
import dataclasses
import random
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sklearn.cluster  # noqa: F401  # STV imports it, and its first import draws from Python's generator
import torch
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from torch import Tensor

from lmms_mtv import TaskVector, applied, methods
from lmms_mtv.errors import GeometryError
from lmms_mtv.fit.episodes import EpisodeSampler
from lmms_mtv.harness.lm import edited as of_lm_eval
from lmms_mtv.harness.lmms import model as of_lmms_eval
from lmms_mtv.harness.lmms import task_evaluation
from support import matrix, zoo
from support.sessions import session
from support.shape_tasks import task_file
from support.text_tasks import run
from support.text_tasks import task_file as text_task
from support.vectors import card

QUICK = {
    "iterations": 4,
    "fit_shots": 2,
    "steps": 3,
    "epochs": 1,
    "samples": 3,
    "examples": 3,
    "candidates": 2,
    "candidate_examples": 2,
    "effect_examples": 2,
    "top": 3,
    "clusters": 2,
    "judges": 2,
    "batch": 2,
    "drop": 0.5,
}
"""Settings that make a fit quick; each method is given those that it has."""

TEXTS = [[5, 6, 7], [8, 9]]
SOURCE = re.compile(r"arXiv \d{4}\.\d{4,5}|\b(NeurIPS|ICLR|ICML|ACL|EMNLP|NAACL|CVPR|ICCV|ECCV|AAAI|COLM|TMLR) \d{4}")


def quick(name: str, **more: Any) -> dict[str, Any]:
    return {key: value for key, value in (QUICK | more).items() if key in methods.get(name).settings()}


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fit of a method: its vector, and the purposes it drew something random for."""

    vector: TaskVector
    drawn: tuple[str, ...]


def fit(name: str, tiny: zoo.Tiny, **options: Any) -> Fit:
    method, used, drawn = methods.get(name), session(tiny, **options), []
    original, config = EpisodeSampler.random, method.configure(quick(name))

    def noted(sampler: EpisodeSampler, purpose: str) -> random.Random:
        drawn.append(purpose)
        return original(sampler, purpose)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EpisodeSampler, "random", noted)
        fitted = method.fit(used, config)
    described = card(
        method=name,
        config=dataclasses.asdict(config),
        geometry=used.sites.geometry,
        losses={loss: list(found) for loss, found in fitted.losses.items()},
        seed=used.seed,
    )
    return Fit(TaskVector(dict(fitted.edits), described), tuple(drawn))


def state(tiny: zoo.Tiny) -> dict[str, Any]:
    """All that a fit must leave as it was."""
    return {
        "weights": copy.deepcopy(tiny.model.state_dict()),
        "learning": [(name, weight.requires_grad) for name, weight in tiny.model.named_parameters()],
        "gradients": [name for name, weight in tiny.model.named_parameters() if weight.grad is not None],
        "modes": [module.training for module in tiny.model.modules()],
        "attributes": [sorted(vars(module)) for module in tiny.model.modules()],
        "hooks": zoo.hooks(tiny.model),
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "grad": torch.is_grad_enabled(),
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


@pytest.fixture(scope="module", params=matrix.members([zoo.llama, zoo.idefics3], zoo.llama, label=matrix.name))
def tiny(request: pytest.FixtureRequest) -> zoo.Tiny:
    """A text model and an image-text one; of their weights every second takes a gradient."""
    built = zoo.build(request.param)
    for weight in list(built.model.parameters())[::2]:
        weight.requires_grad_(False)
    return built


by_a_representative = pytest.mark.parametrize(
    "name", matrix.members(methods.names(), "mtv"), indirect=True, scope="module"
)


@pytest.fixture(scope="module", params=methods.names())
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def fitted(name: str, tiny: zoo.Tiny) -> Fit:
    return fit(name, tiny)


@torch.no_grad()
def logits(tiny: zoo.Tiny, vector: TaskVector | None = None) -> Tensor:
    """After two prompts of different lengths, and after one more token, which goes on from an unedited cache.

    An edit that is once is at no token that a forward of its own begins with, so then the first part is all.
    """
    edits = vector.edits if vector is not None else {}
    inputs = tiny.inputs(TEXTS)
    with applied(tiny.model, edits):
        prompt = tiny.model(**inputs).logits[:, -1]
    if edits and all(edit.once for edit in edits.values()):
        return prompt.unsqueeze(0)
    cache = tiny.model(**inputs, use_cache=True).past_key_values
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    with applied(tiny.model, edits):
        following = tiny.model(input_ids=torch.tensor([[7], [6]]), attention_mask=mask, past_key_values=cache).logits[
            :, -1
        ]
    return torch.stack([prompt, following])


def test_a_fit_leaves_the_model_and_the_generators_of_others_as_they_were(name, tiny):
    before = state(tiny)
    fit(name, tiny)
    after = state(tiny)
    assert [part for part in before if not same(before[part], after[part])] == []
    assert before["gradients"] == []


def test_a_vector_is_plain_numbers_and_the_same_from_a_file(fitted, tiny, tmp_path):
    for edit in fitted.vector.edits.values():
        for part in (edit.value, edit.keep, edit.gain):
            assert part.device.type == "cpu"
            assert part.dtype == torch.float32
            assert not part.requires_grad
            assert part.isfinite().all()
        assert edit.batch is None
    back = TaskVector.load(fitted.vector.save(tmp_path / "vector.safetensors"))
    assert back.checksum == fitted.vector.checksum
    assert back.id == fitted.vector.id
    assert back.card == fitted.vector.card
    assert torch.equal(logits(tiny, back), logits(tiny, fitted.vector))


def test_a_vector_changes_the_logits_at_every_token(fitted, name, tiny):
    plain, edited = logits(tiny), logits(tiny, fitted.vector)
    if name == "none":
        assert fitted.vector.edits == {}
        assert torch.equal(edited, plain)
        return
    # For both rows and at both tokens.
    assert (edited - plain[: len(edited)]).abs().amax(-1).min() > 1e-4
    hooks = zoo.hooks(tiny.model)
    with torch.no_grad(), applied(tiny.model, fitted.vector) as fired:
        tiny.model.generate(**tiny.inputs(TEXTS), max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert fired.count == 3
    assert zoo.hooks(tiny.model) == hooks


@by_a_representative
def test_the_seed_and_nothing_else_decides(fitted, name, tiny):
    with torch.random.fork_rng():
        torch.manual_seed(123)
        python = random.getstate()
        random.seed(123)
        again = fit(name, tiny)
        random.setstate(python)
    assert again.vector.checksum == fitted.vector.checksum
    assert again.drawn == fitted.drawn
    # Padding moves the last bits of an activation, and no more.
    batched = fit(name, tiny, batch_size=3).vector
    assert batched.edits.keys() == fitted.vector.edits.keys()
    for stream, edit in fitted.vector.edits.items():
        other = batched.edits[stream]
        assert other.heads == edit.heads
        for part in ("value", "keep", "gain"):
            torch.testing.assert_close(getattr(other, part), getattr(edit, part), rtol=1e-3, atol=1e-4)
    another = fit(name, tiny, seed=1).vector
    assert (another.checksum == fitted.vector.checksum) == (not fitted.drawn)


def test_a_foreign_model_is_refused(fitted):
    foreign = zoo.build(zoo.gpt2).model
    with pytest.raises(GeometryError, match="fit a vector for this model"), applied(foreign, fitted.vector):
        pass


def test_the_settings_are_frozen_and_told(name):
    config, made = methods.get(name).config, methods.get(name).configure(quick(name))
    assert dataclasses.is_dataclass(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.anything = 1
    told = "".join(kind.__doc__ for kind in config.__mro__[:-1])
    untold = [field.name for field in dataclasses.fields(config) if not field.metadata.get("help")]
    assert [name for name in untold if f"``{name}``" not in told] == []
    assert methods.get(name).configure(dataclasses.asdict(made)) == made


def test_the_module_says_what_it_stores_injects_trains_costs_and_where_it_is_from(name):
    module = sys.modules[methods.get(name).fit.__module__]
    told = module.__doc__
    assert [word for word in ("Stored", "Injected", "Trained", "Cost") if word not in told] == []
    assert SOURCE.search(told)
    assert methods.get(name).fit.__doc__


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of lmms-eval: ``seen`` with images, ``read`` without; of lm-eval, apart: answers and choices."""
    folder = tmp_path_factory.mktemp("tasks")
    task_file(folder / "lmms_eval", "seen")
    task_file(folder / "lmms_eval", "read", doc_to_visual=None)
    for kind in ("answers", "arc"):
        text_task(folder / "lm_eval", kind)
    return folder


@pytest.fixture(scope="module")
def loaded(text_model) -> dict[str, of_lmms_eval.LmmsEvalMtv]:
    """The models of the tasks of lmms-eval, loaded once."""
    return {
        "seen": of_lmms_eval.LmmsEvalMtv(pretrained="tiny", reuse=False),
        "read": of_lmms_eval.LmmsEvalMtv(pretrained=str(text_model), reuse=False),
    }


@pytest.fixture
def counted(monkeypatch) -> dict[str, int]:
    """Forwards of the decoder while a harness evaluates under a vector, and those of them that it edited."""
    counts = {"run": 0, "edited": 0}

    @contextmanager
    def counting(sites: Any, vector: Any, **options: Any) -> Iterator[Any]:
        def forward(*_: Any) -> None:
            counts["run"] += 1

        handle = sites.decoder.register_forward_hook(forward)
        try:
            with applied(sites, vector, **options) as fired:
                yield fired
        finally:
            handle.remove()
        counts["edited"] += fired.count

    for module in (task_evaluation, of_lm_eval):
        monkeypatch.setattr(module, "applied", counting)
    return counts


@pytest.mark.parametrize("task", matrix.members(["seen", "read"], "seen"))
@by_a_representative
@pytest.mark.slow
def test_lmms_eval_evaluates_with_it(name, task, tasks, loaded, counted, monkeypatch):
    # It frees the model by a full collection of garbage, which takes longer than all of this; and others need it.
    monkeypatch.setattr(of_lmms_eval.LmmsEvalMtv, "clean", lambda model: None)
    manager = TaskManager("ERROR", include_path=str(tasks / "lmms_eval"), include_defaults=False, model_name="mtv")
    arm = loaded[task].arm({"method": name, **quick(name)})
    task_records = arm.records
    results = simple_evaluate(arm, tasks=[task], task_manager=manager, limit=3, verbosity="ERROR")
    assert len(results["samples"][task]) == 3
    assert task_records[task].method == name
    assert task_records[task].settings == dataclasses.asdict(methods.get(name).configure(task_records[task].settings))
    assert quick(name).items() <= task_records[task].settings.items()
    assert counted["edited"] == counted["run"]
    assert (counted["run"] > 0) == (name != "none")


@by_a_representative
@pytest.mark.slow
def test_lm_eval_evaluates_with_it(name, text_model, tasks, counted, monkeypatch):
    # The library lists all installed packages in its results.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    # Its tasks write their demonstrations themselves, so that answers cannot be shuffled.
    settings = quick(name, corrupted="bare")
    form = {"limit": 3}
    lm, answers = run(text_model, tasks / "lm_eval", ["answers", "arc"], form, method=name, reuse=False, **settings)
    for task in ("own_answers", "own_arc"):
        assert lm.records[task].method == name
        assert len(answers[task]) == 3
        if name != "none":
            assert settings.items() <= lm.records[task].settings.items()
    assert counted["edited"] == counted["run"]
    assert (counted["run"] > 0) == (name != "none")
    assert zoo.hooks(lm.model) == 0
