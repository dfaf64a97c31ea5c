"""Sites, recording and editing, on tiny random models of eleven architectures."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lmms_mtv import Edit, applied, capture, find_sites, record, verify
from lmms_mtv.errors import DiscoveryError, GeometryError, HookError, NumericsError
from lmms_mtv.hooks import watched
from lmms_mtv.hooks.positions import last_real
from support import zoo

TEXTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def random_edit(tiny: zoo.Tiny, batch: int | None = None, seed: int = 0) -> Edit:
    rng = torch.Generator().manual_seed(seed)
    shape = (zoo.LAYERS, tiny.heads) if batch is None else (batch, zoo.LAYERS, tiny.heads)
    mask = torch.rand(shape, generator=rng) < 0.5
    return Edit.replace(torch.randn(zoo.LAYERS, tiny.heads, tiny.head_dim, generator=rng), mask)


def test_sites_are_the_decoders_output_projections(tiny):
    sites = find_sites(tiny.model)
    assert sites.shape == (zoo.LAYERS, tiny.heads, tiny.head_dim)
    assert [site.layer for site in sites] == list(tiny.layers)
    assert all(tiny.model.get_submodule(site.name) is site.module for site in sites)
    assert not any("vision" in site.name or "visual" in site.name or "perceiver" in site.name for site in sites)
    assert len(sites) == len(list(sites)) == len(sites.geometry)
    assert sites[-1] is list(sites)[-1]
    assert sites == find_sites(tiny.model)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sites.skipped = (0,)


def test_replacing_heads_by_their_own_activations_changes_nothing(tiny):
    sites, inputs = find_sites(tiny.model), tiny.inputs(TEXTS)
    verify(tiny.model, sites, inputs)
    plain = tiny.model(**inputs).logits
    with record(sites) as recording:
        tiny.model(**inputs)
    own = recording.last()
    assert own.shape == (3, *sites.shape)
    assert own.dtype == torch.float32
    everywhere = torch.ones(sites.shape[:2])
    with applied(sites, Edit(own, 1 - everywhere, everywhere)):
        replaced = tiny.model(**inputs).logits
    assert (plain - replaced).abs().max().item() == 0


def projected(module: nn.Module, x: Tensor) -> Tensor:
    """An output projection by hand, Linear or Conv1D, with its bias."""
    weight = module.weight.T if hasattr(module, "nf") else module.weight
    return functional.linear(x, weight, module.bias)


def test_edit_is_the_published_formula(tiny):
    """x' = keep * x + gain * value, head by head, at the last token alone, before the projection and its bias."""
    sites, inputs = find_sites(tiny.model), tiny.inputs([TEXTS[0]])
    rng = torch.Generator().manual_seed(1)
    layers, heads, size = sites.shape
    edit = Edit(*(torch.randn(s, generator=rng) for s in ((layers, heads, size), (layers, heads), (layers, heads))))
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    handles = [
        site.module.register_forward_pre_hook(lambda _, args, i=i: seen.__setitem__(i, (args[0], torch.empty(0))))
        for i, site in enumerate(sites)
    ]
    handles += [
        site.module.register_forward_hook(lambda _, args, out, i=i: seen.__setitem__(i, (seen[i][0], out)))
        for i, site in enumerate(sites)
    ]
    with applied(sites, edit):
        tiny.model(**inputs)
    for handle in handles:
        handle.remove()
    for i, site in enumerate(sites):
        x, out = seen[i]
        expected = x.clone()
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            expected[0, -1, part] = edit.keep[i, head] * x[0, -1, part] + edit.gain[i, head] * edit.value[i, head]
        torch.testing.assert_close(out, projected(site.module, expected), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(expected, x)


def test_bias_of_the_projection_is_kept():
    for architecture in (zoo.llama, zoo.gpt2):
        tiny = zoo.build(architecture)
        sites = find_sites(tiny.model)
        out: list[Tensor] = []
        handle = sites[0].module.register_forward_hook(lambda _, args, result, out=out: out.append(result))
        nothing = Edit.replace(torch.zeros(sites.shape), torch.ones(sites.shape[:2]))
        with applied(sites, nothing):
            tiny.model(**tiny.inputs([TEXTS[0]]))
        handle.remove()
        assert sites[0].module.bias.abs().min() > 0
        torch.testing.assert_close(out[0][0, -1], sites[0].module.bias, rtol=0, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_row_of_a_padded_batch_equals_its_own_run(tiny, side):
    sites, edit = find_sites(tiny.model), random_edit(tiny)
    batch = tiny.inputs(TEXTS, side)
    lengths = batch["attention_mask"].sum(1)
    with record(sites) as together, applied(sites, edit):
        logits = tiny.model(**batch).logits
    for row, text in enumerate(TEXTS):
        alone = tiny.inputs([text])
        with record(sites) as single, applied(sites, edit):
            expected = tiny.model(**alone).logits[0, -1]
        last = -1 if side == "left" else lengths[row] - 1
        torch.testing.assert_close(logits[row, last], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together.last()[row], single.last()[0], rtol=1e-4, atol=1e-4)


def test_a_padded_forward_without_a_mask_is_told_what_is_real():
    """Padded on the right and run without a mask: each row, edited at its own last tokens, equals its own run."""
    tiny = zoo.build(zoo.llama)
    sites, edit, tails = find_sites(tiny.model), random_edit(tiny), [3, 1, 2]
    inputs = tiny.inputs(TEXTS, "right")
    with applied(sites, edit, tail=torch.tensor(tails), real=inputs["attention_mask"]):
        batch = tiny.model(inputs["input_ids"]).logits
    for row, (text, tail) in enumerate(zip(TEXTS, tails, strict=True)):
        with applied(sites, edit, tail=tail):
            alone = tiny.model(torch.tensor([text])).logits
        torch.testing.assert_close(batch[row : row + 1, : len(text)], alone, atol=1e-5, rtol=1e-5)
    refused = pytest.raises(HookError, match=r"3 rows of 4 positions, but real= is of \(3, 5\)")
    with refused, applied(sites, edit, real=inputs["attention_mask"]):
        tiny.model(inputs["input_ids"][:, :4])
    assert zoo.hooks(tiny.model) == 0


def test_a_batch_of_masks_gives_each_row_its_own(tiny):
    sites, edits = find_sites(tiny.model), random_edit(tiny, batch=3)
    with applied(sites, edits):
        together = tiny.model(**tiny.inputs(TEXTS)).logits[:, -1]
    for row in range(3):
        with applied(sites, Edit(edits.value, edits.keep[row], edits.gain[row])):
            alone = tiny.model(**tiny.inputs(TEXTS)).logits[row, -1]
        torch.testing.assert_close(together[row], alone, rtol=1e-5, atol=1e-5)


def test_generation_is_edited_at_every_forward(tiny):
    sites, edit = find_sites(tiny.model), random_edit(tiny)
    tiny.model(**tiny.inputs(TEXTS))  # some models put hooks of their own in place when they first run
    before = zoo.hooks(tiny.model)
    inputs = tiny.inputs(TEXTS)
    with applied(tiny.model, edit) as fired:
        output = tiny.model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    new = output.shape[1] - inputs["input_ids"].shape[1]
    assert new == 6
    assert fired.count == 6, "the prompt, and each new token but the last"
    assert fired.by_site == [6] * len(sites)
    assert zoo.hooks(tiny.model) == before
    plain = tiny.model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    assert not torch.equal(plain, output)


def test_generated_tokens_are_those_of_edited_full_forwards(tiny):
    """Greedy decoding by hand: a full forward for each token, the edit at the prompt's end and at all new tokens."""
    edit, inputs = random_edit(tiny), tiny.inputs([TEXTS[0]])
    with applied(tiny.model, edit):
        output = tiny.model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    for tail in range(1, 5):
        longer = inputs | {"input_ids": output[:, : inputs["input_ids"].shape[1] + tail - 1]}
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        longer.pop("position_ids", None)
        longer |= tiny.kinds_of(longer["input_ids"])
        with applied(tiny.model, edit, tail=tail):
            logits = tiny.model(**longer).logits[0, -1]
        logits[2] = -torch.inf  # min_new_tokens forbids the end
        assert logits.argmax() == output[0, longer["input_ids"].shape[1]]


def test_hooks_are_gone_after_exceptions_and_failed_set_ups(tiny):
    sites = find_sites(tiny.model)
    tiny.model(**tiny.inputs(TEXTS))  # some models put hooks of their own in place when they first run
    before = zoo.hooks(tiny.model)
    with pytest.raises(RuntimeError, match="inside"), applied(sites, random_edit(tiny)), record(sites):
        assert zoo.hooks(tiny.model) > before
        raise RuntimeError("inside")
    assert zoo.hooks(tiny.model) == before

    layers, heads, size = sites.shape
    with (
        pytest.raises(GeometryError),
        applied(sites, Edit.replace(torch.zeros(layers, heads, size + 1), torch.ones(layers, heads))),
    ):
        pass
    assert zoo.hooks(tiny.model) == before

    # The third site's module refuses hooks: the first two must not keep theirs.
    third = sites[2]._replace(module=_Refusing())
    broken = dataclasses.replace(sites, sites=(*sites.sites[:2], third))
    with pytest.raises(RuntimeError, match="no hooks here"), applied(broken, random_edit(tiny)):
        pass
    with pytest.raises(RuntimeError, match="no hooks here"), record(broken):
        pass
    assert zoo.hooks(tiny.model) == before

    # The decoder refuses: the model must not keep the hook it was given before.
    refusing = dataclasses.replace(sites, decoder=_Refusing())
    with pytest.raises(RuntimeError, match="no hooks here"), capture(tiny.model, refusing):
        pass
    assert zoo.hooks(tiny.model) == before

    with pytest.raises(HookError, match="rows"), applied(sites, random_edit(tiny, batch=5)):
        tiny.model(**tiny.inputs(TEXTS))
    assert zoo.hooks(tiny.model) == before


class _Refusing(nn.Module):
    def register_forward_pre_hook(self, *_, **__):
        raise RuntimeError("no hooks here")


def test_watching_counts_prompts_and_their_real_tokens(tiny):
    inputs = tiny.inputs(TEXTS)
    # Some models put hooks of their own in place when they first run.
    tiny.model(**inputs)
    before = zoo.hooks(tiny.model)
    with watched(tiny.model, find_sites(tiny.model)) as watch:
        tiny.model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert watch.tokens == sum(len(tiny.row(text)) for text in TEXTS)
    assert watch.images == len(TEXTS) * tiny.image_tokens
    assert (watch.prompts, watch.forwards, watch.cached) == (3, 3, True)
    assert zoo.hooks(tiny.model) == before


def test_the_edit_is_out_of_place():
    tiny = zoo.build(zoo.llama)
    sites = find_sites(tiny.model)
    kept: list[tuple[Tensor, Tensor]] = []
    handle = sites[0].module.register_forward_pre_hook(lambda _, args: kept.append((args[0], args[0].clone())))
    with applied(sites, random_edit(tiny)):
        tiny.model(**tiny.inputs(TEXTS))
    handle.remove()
    assert torch.equal(*kept[0])


def test_values_take_the_dtype_of_the_activation():
    tiny = zoo.build(zoo.llama)
    tiny.model.to(torch.bfloat16)
    sites = find_sites(tiny.model)
    with applied(sites, random_edit(tiny)):
        assert tiny.model(**tiny.inputs(TEXTS)).logits.dtype == torch.bfloat16
    verify(tiny.model, sites, tiny.inputs(TEXTS))


def test_nan_in_an_activation_names_the_layer():
    tiny = zoo.build(zoo.llama)
    sites = find_sites(tiny.model)
    tiny.model.model.layers[1].self_attn.v_proj.weight.fill_(torch.nan)
    with record(sites) as recording:
        tiny.model(**tiny.inputs(TEXTS))
    with pytest.raises(NumericsError, match=r"layers\.1\.self_attn\.o_proj"):
        recording.last()


def test_recording_nothing_is_an_error():
    with record(find_sites(zoo.build(zoo.llama).model)) as recording:
        pass
    with pytest.raises(HookError, match="run the model"):
        recording.last()


@pytest.mark.parametrize(
    ("mask", "tail", "expected"),
    [
        ([[0, 0, 1, 1], [1, 1, 1, 1]], 1, [(0, 3), (1, 3)]),
        ([[1, 1, 0, 0], [1, 0, 0, 0]], 1, [(0, 1), (1, 0)]),
        ([[1, 1, 0, 0], [1, 1, 1, 1]], 2, [(0, 0), (0, 1), (1, 2), (1, 3)]),
        ([[0, 1, 1, 1], [1, 1, 1, 0]], torch.tensor([1, 3]), [(0, 3), (1, 0), (1, 1), (1, 2)]),
        ([[0, 0, 0, 0], [1, 1, 1, 1]], 1, [(0, 3), (1, 3)]),
    ],
)
def test_last_real_positions(mask, tail, expected):
    rows, columns = last_real(torch.tensor(mask), 2, 4, tail)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == expected


@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (2, 4), (1, 3)])
def test_a_mask_that_hides_the_padding_is_refused(shape):
    with pytest.raises(HookError, match="dynamic cache"):
        last_real(torch.ones(shape), 1, 4)


def test_masks_that_are_ready_for_the_attention_need_a_model_that_tells_the_padding():
    """Gemma 3 hands its decoder a dict of masks: padding is known from the model's own mask, or not at all."""
    tiny = zoo.build(zoo.gemma3)
    sites, edit, inputs = find_sites(tiny.model), random_edit(tiny), tiny.inputs(TEXTS)
    assert sites.model is tiny.model
    assert sites.decoder is not tiny.model
    refused = pytest.raises(HookError, match=r"type dict.*cache_implementation")
    with refused, applied(sites, edit):
        tiny.model.generate(**inputs, max_new_tokens=2, cache_implementation="static", do_sample=False, pad_token_id=0)
    with record(sites):
        tiny.model(**inputs)
        with pytest.raises(HookError, match="type dict"):
            tiny.model.model(**inputs)  # past the model that was given to find_sites
    with record(find_sites(tiny.model.model)) as inner:
        tiny.model.model(**inputs)
    with record(sites) as outer:
        tiny.model(**inputs)
    assert torch.equal(inner.last(), outer.last())
    assert zoo.hooks(tiny.model) == 0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = _Attention()


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj, self.head_dim = nn.Linear(8, 8), nn.Linear(8, 8), 4


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.left = nn.ModuleList([Block()])
        self.right = nn.ModuleList([Block(), Block()])


def test_doubtful_discovery_names_the_argument_that_settles_it():
    with pytest.raises(DiscoveryError, match=r"left, right.*decoder="):
        find_sites(TwoTowers())
    with pytest.raises(DiscoveryError, match="decoder='nowhere'"):
        find_sites(TwoTowers(), decoder="nowhere")
    with pytest.raises(DiscoveryError, match="decoder="):
        find_sites(nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8)))
    nested = nn.Module()
    nested.inner = TwoTowers()
    nested.inner.left = None
    assert find_sites(nested, decoder="inner").shape == (2, 2, 4)


def test_heads_that_do_not_divide_the_projection_are_refused():
    towers = TwoTowers()
    towers.left = None
    towers.right[1].attention.head_dim = 3
    with pytest.raises(DiscoveryError, match=r"right\.1\.attention\.o_proj"):
        find_sites(towers)


def test_sites_off_the_path_are_refused():
    tiny = zoo.build(zoo.llama)
    sites = find_sites(tiny.model)
    elsewhere = dataclasses.replace(sites, sites=tuple(site._replace(module=nn.Linear(32, 32)) for site in sites))
    with pytest.raises((DiscoveryError, HookError)):
        verify(tiny.model, elsewhere, tiny.inputs(TEXTS))


def test_a_configuration_on_the_meta_device_is_enough():
    with torch.device("meta"):
        model = zoo.llama().model
    assert find_sites(model).shape == (zoo.LAYERS, zoo.HEADS, zoo.HEAD_DIM)
