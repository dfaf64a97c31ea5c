"""The names of a forward's arguments, which differ between versions of transformers and between models."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from lmms_mtv import Edit, Prefill, applied, capture, find_sites, verify
from lmms_mtv.errors import HookError
from lmms_mtv.hooks import watched
from lmms_mtv.hooks.caches import tensors_in, without_last
from lmms_mtv.runtime.compat import CACHE_NAMES, cache_name, given_cache, naming, of_the_prompt, returned_cache
from support import zoo

TEXTS = [[5, 6, 7, 8], [9, 10, 11]]


class Around(nn.Module):
    """A model whose forward names none of its arguments."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Older(LlamaForCausalLM):
    """A model like remote code that keeps the name of the cache that transformers had before 5.24."""

    def forward(self, *args, past_key_values=None, **kwargs):
        taken = inspect.signature(LlamaForCausalLM.forward).parameters
        # As generate of the newer transformers would call it.
        cache = kwargs.pop("cache", past_key_values)
        return super().forward(*args, **{next(name for name in CACHE_NAMES if name in taken): cache}, **kwargs)


def older() -> zoo.Tiny:
    tiny = zoo.build(zoo.llama)
    model = Older(tiny.model.config).eval()
    model.load_state_dict(tiny.model.state_dict())
    return zoo.Tiny("older", model)


def accepted(model: nn.Module) -> list[str]:
    """The names under which a model of this transformers takes a cache: a renamed one is taken under both."""
    newest = cache_name(model)
    return list(CACHE_NAMES) if newest == CACHE_NAMES[0] else [newest]


def test_the_name_of_the_cache_is_that_of_the_forward(tiny):
    name = cache_name(tiny.model)
    assert name in inspect.signature(tiny.model.forward).parameters
    assert cache_name(Around(tiny.model)) == name
    assert cache_name(nn.Linear(2, 2)) == CACHE_NAMES[-1]


def test_a_model_that_keeps_the_older_name_is_replayed():
    tiny, plain = older(), zoo.build(zoo.llama)
    assert cache_name(tiny.model) == "past_key_values"
    edit = random_edit(plain)
    logits = []
    for each in (tiny, plain):
        sites = find_sites(each.model)
        with capture(each.model, sites) as captured:
            each.model(**each.inputs(TEXTS[:1]))
        prefill = captured.prefill()
        assert prefill.cache is not None
        logits.append(prefill.replay(each.model, sites, edit, [4, 5]))
        torch.testing.assert_close(logits[-1], prefill.forward(each.model, sites, edit, [4, 5]))
    torch.testing.assert_close(*logits)


def random_edit(tiny: zoo.Tiny) -> Edit:
    torch.manual_seed(1)
    shape = find_sites(tiny.model).shape
    return Edit.replace(torch.randn(shape), torch.rand(3, *shape[:2]) < 0.5)


def test_a_forward_that_goes_on_from_a_cache_is_known_under_every_name_and_by_position():
    tiny = zoo.build(zoo.llama)
    sites, inputs = find_sites(tiny.model), tiny.inputs(TEXTS[:1])
    for name in accepted(tiny.model):
        cache = returned_cache(tiny.model(**inputs, use_cache=True))
        with watched(tiny.model, sites) as watch:
            tiny.model(**inputs)
            tiny.model(input_ids=torch.tensor([[7]]), **{name: cache})
        assert (watch.forwards, watch.prompts) == (2, 1)
    order = list(inspect.signature(tiny.model.forward).parameters)
    named = naming(tiny.model)(tuple(range(order.index(cache_name(tiny.model)) + 1)), {})
    assert given_cache(named) == order.index(cache_name(tiny.model))


def test_the_output_of_a_forward_has_the_cache_under_either_name():
    class Output:
        def __init__(self, **fields: object) -> None:
            vars(self).update(fields)

    cache = DynamicCache()
    for name in CACHE_NAMES:
        assert returned_cache(Output(logits=1, **{name: cache})) is cache
    assert returned_cache(Output(another=cache)) is cache, "a cache is known by what it is, too"
    assert returned_cache((torch.ones(1), None)) is None
    assert returned_cache(zoo.build(zoo.llama).model(torch.tensor([[5]]), use_cache=False)) is None


def test_what_belongs_to_one_call_is_no_input_of_the_prompt():
    given = {"input_ids": 1, "attention_mask": None, "use_cache": True, "another_state": DynamicCache()}
    given |= {name: DynamicCache() for name in CACHE_NAMES}
    assert of_the_prompt(given) == {"input_ids": 1}


def test_generation_leaves_no_cache_among_the_inputs(tiny):
    sites = find_sites(tiny.model)
    with capture(tiny.model, sites) as captured:
        tiny.model.generate(**tiny.inputs(TEXTS[:1]), max_new_tokens=2, do_sample=False, pad_token_id=zoo.PAD)
    inputs = captured.prefill().inputs
    assert not [name for name, value in inputs.items() if name in CACHE_NAMES or hasattr(value, "get_seq_length")]
    verify(tiny.model, sites, inputs)


def test_a_static_cache_is_not_cut():
    """It is cropped in place, by a length that its copies share, so that a cut copy would cut the original."""
    tiny = zoo.build(zoo.llama)
    sites, inputs = find_sites(tiny.model), tiny.inputs(TEXTS[:1])
    cache = StaticCache(tiny.model.config, max_cache_len=16)
    with capture(tiny.model, sites) as captured:
        tiny.model(**inputs, **{cache_name(tiny.model): cache})
    length = inputs["input_ids"].shape[1]
    assert captured.prefill().cache is None
    assert without_last(cache, length, ()) is None
    assert int(cache.get_seq_length()) == length


def test_a_layer_that_stands_in_for_one_without_keys_does_not_hinder_replays():
    tiny = zoo.build(zoo.llama)
    cache = returned_cache(tiny.model(**tiny.inputs(TEXTS[:1]), use_cache=True))

    class Placeholder:
        is_compileable = is_croppable = is_initialized = True
        keys = values = None

    class State(Placeholder):
        def __init__(self) -> None:
            self.states = {0: torch.ones(1)}

    cache.layers.append(Placeholder())
    assert without_last(cache, 4, ()) is not None
    cache.layers[-1] = State()
    assert without_last(cache, 4, ()) is None, "a state that a token has changed cannot be cut"


def test_inputs_within_inputs_are_moved_and_counted():
    from transformers.modeling_outputs import BaseModelOutput

    ids, states, mask = torch.zeros(1, 3, dtype=torch.long), torch.ones(2, 4), torch.ones(5)
    encoded = {"image": BaseModelOutput(last_hidden_state=states), "others": [mask, (None, "text")]}
    prefill = Prefill({"input_ids": ids, "mm_encoder_outputs": encoded}, None, None)
    assert prefill.held == sum(tensor.numel() * tensor.element_size() for tensor in (ids, states, mask))
    moved = prefill.to(torch.device("meta")).inputs["mm_encoder_outputs"]
    assert isinstance(moved["image"], BaseModelOutput)
    assert moved["image"].last_hidden_state.device.type == "meta"
    assert moved["others"][0].device.type == "meta"
    assert moved["others"][1] == (None, "text")
    assert {tensor.device.type for tensor in tensors_in(prefill.inputs)} == {"cpu"}, "the original is as it was"


@torch.no_grad()
def test_inputs_that_a_forward_changes_are_named_and_not_the_decoder_blamed():
    tiny = zoo.build(zoo.llama)
    sites, name = find_sites(tiny.model), cache_name(tiny.model)
    cache = returned_cache(tiny.model(**tiny.inputs(TEXTS[:1]), use_cache=True))
    inputs: dict[str, Any] = {"input_ids": torch.tensor([[7, 8]]), name: cache}
    with pytest.raises(HookError, match=f"same forward twice .* holds a state that a forward changes.*: {name}$"):
        verify(tiny.model, sites, inputs)
    assert zoo.hooks(tiny.model) == 0


def test_a_model_in_training_is_told_from_wrong_sites():
    tiny = zoo.build(zoo.gpt2)
    tiny.model.train()
    assert any(isinstance(module, nn.Dropout) and module.p > 0 for module in tiny.model.modules())
    with pytest.raises(HookError, match=r"model\.eval\(\)"):
        verify(tiny.model, find_sites(tiny.model), tiny.inputs(TEXTS))


def test_an_edit_that_is_once_lets_what_follows_a_cache_pass_under_every_name():
    tiny = zoo.build(zoo.llama)
    sites, inputs = find_sites(tiny.model), tiny.inputs(TEXTS[:1])
    edit = random_edit(tiny).taken(0)
    once = Edit(edit.value, edit.keep, edit.gain, once=True)

    def following(name: str, edited: bool) -> Tensor:
        with torch.no_grad(), applied(sites, once) as fired:
            cache = returned_cache(tiny.model(**inputs, use_cache=True))
            after = {"input_ids": torch.tensor([[7]]), name: cache}
            inside = tiny.model(**after).logits if edited else None
        assert fired.count > 0
        return inside if inside is not None else tiny.model(**after).logits

    for name in accepted(tiny.model):
        torch.testing.assert_close(following(name, True), following(name, False))
