"""Generation that is not the whole prompt and then one token at a time, and models that run in other ways."""

from __future__ import annotations

import copy
import dataclasses
import threading

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from lmms_mtv import Edit, applied, capture, find_sites, record
from lmms_mtv.errors import HookError
from lmms_mtv.runtime.compat import cache_name, returned_cache, unwrapped
from support import matrix, zoo

TEXT = [[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]]


def random_edit(tiny: zoo.Tiny, **flags: bool) -> Edit:
    torch.manual_seed(1)
    shape = find_sites(tiny.model).shape
    edit = Edit.replace(torch.randn(shape), torch.rand(shape[:2]) < 0.5)
    return Edit(edit.value, edit.keep, edit.gain, **flags)


def generated(tiny: zoo.Tiny, **options: object) -> Tensor:
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": zoo.PAD, "eos_token_id": None}
    output: Tensor = tiny.model.generate(**tiny.inputs(TEXT), **settings | options)
    return output


@pytest.fixture
def llama() -> zoo.Tiny:
    return zoo.build(zoo.llama)


OTHERS = {
    "without a cache": ({"use_cache": False}, "use_cache=True"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "one token at a time"),
    "a prompt in chunks": ({"prefill_chunk_size": 4}, "one token at a time"),
    "an assistant": ({"assistant_model": None}, "one token at a time"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_of_generation_are_refused_with_the_reason(llama, name):
    options, reason = OTHERS[name]
    if "assistant_model" in options:
        options = {"assistant_model": LlamaForCausalLM(llama.model.config).eval()}
    generated(llama, **options)
    edit = random_edit(llama)
    with pytest.raises(HookError, match=reason), applied(llama.model, edit):
        generated(llama, **options)
    assert zoo.hooks(llama.model) == 0
    with applied(llama.model, edit) as fired:
        generated(llama)
    assert fired.count == 6


def test_an_edit_at_all_positions_is_exact_in_every_kind_of_generation(llama):
    edit = random_edit(llama, everywhere=True)
    with applied(llama.model, edit):
        expected = generated(llama)
        for name in ("without a cache", "prompt lookup", "a prompt in chunks"):
            assert torch.equal(generated(llama, **OTHERS[name][0]), expected), name


def test_prompts_of_which_one_begins_as_the_other_are_no_generation(llama):
    with torch.no_grad(), applied(llama.model, random_edit(llama)) as fired:
        for length in (3, 4, 5):
            llama.model(input_ids=torch.tensor([TEXT[0][:length]]))
    assert fired.count == 3


def test_several_tokens_after_a_cache_go_with_an_edit_of_as_many(llama):
    edit = random_edit(llama)
    whole, name = torch.tensor(TEXT), cache_name(llama.model)
    with torch.no_grad(), applied(llama.model, edit, tail=3):
        cache = returned_cache(llama.model(input_ids=whole[:, :-3], use_cache=True))
        llama.model(input_ids=whole[:, -3:], **{name: cache})
    with torch.no_grad():
        cache = returned_cache(llama.model(input_ids=whole[:, :-3], use_cache=True))
        with applied(llama.model, edit) as fired:
            llama.model(input_ids=whole[:, -3:], **{name: cache})
    assert fired.count == 1, "a prompt may go on from a cache that was made before"


@pytest.mark.slow
@pytest.mark.parametrize(
    "which", matrix.members(["the model", "its decoder", "a block", "a wrapper"], "the model", "a wrapper")
)
@torch.no_grad()
def test_a_model_that_was_compiled_before_is_edited_and_recorded(llama, which):
    inputs, model = llama.inputs(TEXT), llama.model
    sites, edit = find_sites(model), random_edit(llama)
    with applied(sites, edit), record(sites) as recording:
        expected = model(**inputs).logits
    if which == "a wrapper":
        model = torch.compile(model, backend="eager")
    else:
        part = {"the model": model, "its decoder": sites.decoder, "a block": sites[1].block[1]}[which]
        part.compile(backend="eager")
    plain = model(**inputs).logits
    sites = find_sites(model)
    with applied(sites, edit), record(sites) as compiled:
        torch.testing.assert_close(model(**inputs).logits, expected)
    torch.testing.assert_close(compiled.last(), recording.last())
    with capture(model, sites) as captured:
        model(**inputs)
    assert captured.prefill().cache is not None
    assert torch.equal(model(**inputs).logits, plain)
    if which != "a wrapper":
        assert part._compiled_call_impl is not None, "compiled again after the block"


@torch.no_grad()
def test_a_model_that_runs_past_the_edit_is_an_error_on_leaving(llama):
    sites = find_sites(llama.model)
    other = torch.nn.Linear(32, 32)
    elsewhere = dataclasses.replace(sites, sites=tuple(site._replace(module=other) for site in sites))
    with (
        pytest.raises(HookError, match="1 forwards inside the block and the edit 0"),
        applied(elsewhere, random_edit(llama)),
    ):
        llama.model(**llama.inputs(TEXT))
    with pytest.raises(ZeroDivisionError), applied(elsewhere, random_edit(llama)):
        llama.model(**llama.inputs(TEXT))
        raise ZeroDivisionError


@torch.no_grad()
def test_a_copy_made_inside_the_block_is_not_edited(llama):
    inputs = llama.inputs(TEXT)
    plain = llama.model(**inputs).logits
    with applied(llama.model, random_edit(llama)):
        copied = copy.deepcopy(llama.model)
        assert not torch.equal(llama.model(**inputs).logits, plain)
        assert torch.equal(copied(**inputs).logits, plain)
    assert torch.equal(copied(**inputs).logits, plain)


@torch.no_grad()
def test_another_thread_runs_the_plain_model_meanwhile(llama):
    inputs, sites = llama.inputs(TEXT), find_sites(llama.model)
    plain, edit = llama.model(**inputs).logits, random_edit(llama)
    with applied(sites, edit):
        expected = llama.model(**inputs).logits
    seen: list[Tensor] = []

    def serve() -> None:
        with torch.no_grad():
            seen.extend(llama.model(**inputs).logits for _ in range(20))

    threads = [threading.Thread(target=serve) for _ in range(2)]
    with applied(sites, edit) as fired:
        for thread in threads:
            thread.start()
        own = [llama.model(**inputs).logits for _ in range(20)]
        for thread in threads:
            thread.join()
    assert fired.count == 20
    assert all(torch.equal(logits, expected) for logits in own)
    assert len(seen) == 40
    assert all(torch.equal(logits, plain) for logits in seen)


def test_adapters_are_part_of_the_model_inside(llama):
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = get_peft_model(copy.deepcopy(llama.model), lora)
    assert unwrapped(wrapped) is wrapped.get_base_model()
    assert unwrapped(llama.model) is llama.model
    prompts = get_peft_model(copy.deepcopy(llama.model), PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2))
    assert unwrapped(prompts) is prompts
