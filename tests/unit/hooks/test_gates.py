"""Edits whose values the query of a head gates: against attention written out here, in every way a model runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import _len_torch_function_stack
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lmms_mtv import Edit, TaskVector, applied, capture, combined, find_sites, record
from lmms_mtv.errors import GeometryError, HookError, NumericsError, VectorFileError
from lmms_mtv.hooks import Sites, gates
from lmms_mtv.vectors import HEADS, MLP, RESIDUAL
from lmms_mtv.vectors.library import page
from support import matrix, zoo
from support.vectors import card, vector

TEXTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]


def gated(sites: Sites, size: int | None = None, batch: int | None = None, seed: int = 0, **flags: bool) -> Edit:
    """A random edit whose gates are neither open nor closed; queries are of ``size``, if not as heads."""
    rng = torch.Generator().manual_seed(seed)
    layers, heads, width = sites.shape
    leading = () if batch is None else (batch,)
    value = torch.randn(*leading, layers, heads, width, generator=rng)
    keep = 1 + 0.1 * torch.randn(layers, heads, generator=rng)
    gate = 0.5 * torch.randn(*leading, layers, heads, (size or width) + 1, generator=rng)
    gate[..., -1] += 1
    return Edit(value, keep, torch.randn(layers, heads, generator=rng), **flags, gate=gate)


def shifted(edit: Edit, bias: float) -> Edit:
    assert edit.gate is not None
    return dataclasses.replace(edit, gate=torch.cat([0 * edit.gate[..., :-1], 0 * edit.gate[..., -1:] + bias], -1))


@contextmanager
def by_hand(tiny: zoo.Tiny, edit: Edit) -> Iterator[None]:
    """The model with its attention written out and the edit in it: mu is what one more key gets of the softmax."""
    layers = {id(site.attention[1]): layer for layer, site in enumerate(find_sites(tiny.model))}

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask=None, scaling=None, **_: object
    ) -> tuple[Tensor, None]:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if attention_mask is not None:
            scores = scores + attention_mask
        heads = (scores.softmax(-1) @ value).transpose(1, 2)
        if (layer := layers.get(id(module))) is not None:
            weight, bias = edit.gate[layer, :, :-1], edit.gate[layer, :, -1:]
            new = torch.einsum("rhtq,hq->rht", query, weight) + bias
            mu = torch.cat([scores, new[..., None]], -1).softmax(-1)[..., -1].transpose(1, 2)
            changed = edit.keep[layer][:, None] * heads
            changed = changed + mu[..., None] * edit.gain[layer][:, None] * edit.value[layer]
            at = slice(None) if edit.everywhere else slice(-1, None)
            heads = torch.cat([heads[:, : 0 if edit.everywhere else -1], changed[:, at]], 1)
        return heads.contiguous(), None

    ALL_ATTENTION_FUNCTIONS["by_hand"] = attention
    ALL_MASK_ATTENTION_FUNCTIONS.register("by_hand", eager_mask)  # seen by its users only there, and never taken back
    tiny.model.set_attn_implementation("by_hand")
    try:
        yield
    finally:
        tiny.model.set_attn_implementation("sdpa")
        del ALL_ATTENTION_FUNCTIONS["by_hand"]


WITH_SDPA = [architecture for architecture in zoo.ARCHITECTURES if architecture is not zoo.gemma2]


@pytest.fixture(scope="module", params=matrix.members(WITH_SDPA, *zoo.REPRESENTATIVES, label=matrix.name))
def every(request: pytest.FixtureRequest) -> zoo.Tiny:
    """All that have ``sdpa``."""
    return zoo.build(request.param)


SEVERAL = [zoo.idefics3, zoo.mllama, zoo.gemma3, zoo.qwen3, zoo.gpt2]


@pytest.fixture(scope="module", params=matrix.members(SEVERAL, zoo.idefics3, zoo.qwen3, label=matrix.name))
def tiny(request: pytest.FixtureRequest) -> zoo.Tiny:
    return zoo.build(request.param)


@pytest.mark.parametrize("everywhere", [False, True])
@torch.no_grad()
def test_the_gate_is_what_one_more_key_gets_of_the_softmax(every, everywhere):
    tiny = every
    sites, inputs = find_sites(tiny.model), tiny.inputs([TEXTS[0]])
    edit = gated(sites, everywhere=everywhere)
    plain = tiny.model(**inputs).logits
    with by_hand(tiny, edit):
        expected = tiny.model(**inputs).logits
    with applied(sites, edit) as fired:
        found = tiny.model(**inputs).logits
    clean(tiny.model, zoo.hooks(tiny.model))
    assert fired.count == 1
    assert not torch.allclose(expected, plain, atol=1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_mu_is_that_of_queries_and_keys_after_the_rotary_embedding():
    """In the first layer of Llama, from the projections: keep 0, gain 1 and values of 1 make the heads mu itself."""
    tiny = zoo.build(zoo.llama)
    sites, inputs = find_sites(tiny.model), tiny.inputs([TEXTS[0]])
    layers, heads, size = sites.shape
    none, ones = torch.zeros(layers, heads), torch.ones(layers, heads)
    edit = Edit(torch.ones(sites.shape), none, ones, gate=gated(sites).gate)
    with applied(sites, edit), record(sites) as recording:
        tiny.model(**inputs)
    decoder = tiny.model.model
    block, states = decoder.layers[0], decoder.embed_tokens(inputs["input_ids"])
    normed, length = block.input_layernorm(states), states.shape[1]
    query, key = (
        project(normed).view(1, length, -1, size).transpose(1, 2)
        for project in (block.self_attn.q_proj, block.self_attn.k_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *decoder.rotary_emb(states, torch.arange(length)[None]))
    for head in range(heads):
        weight, bias = edit.gate[0, head, :-1], edit.gate[0, head, -1]
        z1 = (weight @ query[0, head, -1] + bias).exp()
        z2 = (key[0, head // 2] @ query[0, head, -1] * size**-0.5).exp().sum()
        expected = (z1 / (z1 + z2)).expand(size)
        torch.testing.assert_close(recording.last()[0, 0, head], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("everywhere", [False, True])
@torch.no_grad()
def test_a_closed_gate_adds_nothing_and_an_open_one_all(tiny, everywhere):
    sites, inputs = find_sites(tiny.model), tiny.inputs(TEXTS)
    edit, real = gated(sites, everywhere=everywhere), inputs["attention_mask"].bool()
    without = dataclasses.replace(edit, gate=None)
    none = dataclasses.replace(without, gain=torch.zeros_like(edit.gain))
    for bias, expected in ((1e4, without), (-1e4, none)):
        with applied(sites, shifted(edit, bias)):
            found = tiny.model(**inputs).logits
        with applied(sites, expected):
            # Where padding sees no key, any gate is open.
            assert torch.equal(found[real], tiny.model(**inputs).logits[real])


def placed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """With positions that begin at the first real token, as a generation gives them: a rotated query tells its own."""
    return inputs | {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("everywhere", [False, True])
@torch.no_grad()
def test_every_row_of_a_padded_batch_equals_its_own_run(tiny, side, everywhere):
    """Also with an edit for each row, and over several last positions."""
    sites, tails = find_sites(tiny.model), torch.tensor([3, 1, 2])
    batch = placed(tiny.inputs(TEXTS, side))
    for edit, tail in ((gated(sites, everywhere=everywhere), 1), (gated(sites, batch=3, everywhere=everywhere), tails)):
        with applied(sites, edit, tail=tail):
            logits = tiny.model(**batch).logits
        for row, text in enumerate(TEXTS):
            own = edit.taken(row) if edit.batch else edit
            with applied(sites, own, tail=tail if isinstance(tail, int) else tails[row : row + 1]):
                expected = tiny.model(**tiny.inputs([text])).logits[0, -1]
            last = -1 if side == "left" else batch["attention_mask"][row].sum() - 1
            torch.testing.assert_close(logits[row, last], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("everywhere", [False, True])
@torch.no_grad()
def test_generation_from_a_cache_gives_the_logits_of_full_forwards(tiny, everywhere):
    """Padded rows too, where one new token attends under a mask: heads that share keys are then packed together."""
    sites = find_sites(tiny.model)
    edit = gated(sites, everywhere=everywhere)
    never = [2, zoo.IMAGE, zoo.VISION_START, zoo.VISION_END]
    options = {"max_new_tokens": 3, "suppress_tokens": never, "do_sample": False, "pad_token_id": 0}
    for texts in ([TEXTS[0]], TEXTS):
        inputs = tiny.inputs(texts)
        with applied(sites, edit) as fired:
            made = tiny.model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
        assert fired.count == 3
        length = inputs["input_ids"].shape[1]
        for new in range(3):
            ids = made.sequences[:, : length + new]
            mask = torch.cat([inputs["attention_mask"], torch.ones(len(texts), new, dtype=torch.long)], 1)
            longer = placed(inputs | {"input_ids": ids, "attention_mask": mask} | tiny.kinds_of(ids))
            with applied(sites, edit, tail=new + 1):
                whole = tiny.model(**longer).logits[:, -1]
            torch.testing.assert_close(made.logits[new], whole, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_replay_of_gated_edits_is_their_full_forwards():
    tiny = zoo.build(zoo.idefics3)
    sites = find_sites(tiny.model)
    with capture(tiny.model, sites) as captured:
        tiny.model(**tiny.inputs([TEXTS[0]], padding=2))
    prefill, edits = captured.prefill(), gated(sites, batch=4)
    for target in ([5], [5, 6, 7]):
        found = prefill.replay(tiny.model, sites, edits, target)
        expected = prefill.forward(tiny.model, sites, edits, target)
        assert found.shape[:2] == (4, len(target))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found[0], found[1], atol=1e-2)


class Toy(nn.Module):
    """One block of 4 heads, whose attention to 7 given keys is computed by ``calls``."""

    def __init__(self, calls: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 32)
        self.blocks = nn.ModuleList([nn.Module()])
        self.blocks[0].attention = ToyAttention(calls)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.blocks[0].attention(self.embedding(input_ids))


class ToyAttention(nn.Module):
    def __init__(self, calls: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.calls, self.head_dim = calls, 8
        self.q_proj, self.o_proj = nn.Linear(32, 32), nn.Linear(32, 32)

    def queries(self, states: Tensor) -> Tensor:
        return self.q_proj(states).unflatten(-1, (4, 8)).transpose(1, 2)

    def forward(self, states: Tensor) -> Tensor:
        return self.o_proj(self.calls(self.queries(states)).transpose(1, 2).flatten(2))


def toy(calls: Callable[[Tensor], Tensor]) -> Toy:
    torch.manual_seed(0)
    return Toy(calls)


attend = functional.scaled_dot_product_attention
KEYS = torch.randn(2, 4, 7, 8, generator=torch.Generator().manual_seed(3))
ADDED = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(4))
TRIANGLE = torch.ones(5, 7, dtype=torch.bool).tril()
BLIND = torch.ones(2, 1, 5, 7, dtype=torch.bool)
BLIND[1, :, 2:] = False
IDS = torch.arange(10).view(2, 5)


def mu_of(model: Toy, gate: Tensor) -> Tensor:
    """mu of a gate [1, 4, Q + 1] at all positions, [rows, tokens, heads]: keep 0, gain 1, values of 1 give it."""
    sites, ones = find_sites(model), torch.ones(1, 4)
    seen: list[Tensor] = []
    handle = model.blocks[0].attention.o_proj.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    try:
        with applied(sites, Edit(torch.ones(sites.shape), 0 * ones, ones, everywhere=True, gate=gate)):
            model(IDS)
    finally:
        handle.remove()
    return seen[0].unflatten(-1, (4, 8))[..., 0]


@pytest.mark.parametrize("scores", [1 << 26, 1, 150])
@pytest.mark.parametrize(
    ("calls", "keys", "mask", "scale"),
    [
        (lambda q: attend(q, KEYS, KEYS), 4, None, 8**-0.5),
        (lambda q: attend(q, KEYS, KEYS, None, 0.0, True), 4, TRIANGLE, 8**-0.5),
        (lambda q: attend(query=q, key=KEYS, value=KEYS, is_causal=True, scale=0.7), 4, TRIANGLE, 0.7),
        (lambda q: attend(q, KEYS, KEYS, TRIANGLE), 4, TRIANGLE, 8**-0.5),
        (lambda q: attend(q, KEYS, KEYS, attn_mask=ADDED), 4, ADDED, 8**-0.5),
        (lambda q: attend(q, KEYS, KEYS, ADDED[:, :1, :1]), 4, ADDED[:, :1, :1], 8**-0.5),
        (lambda q: attend(q, KEYS[:, :2], KEYS[:, :2], ADDED, enable_gqa=True), 2, ADDED, 8**-0.5),
    ],
    ids=["plain", "positional", "causal", "bool", "float", "broadcast", "grouped"],
)
def test_every_way_to_call_attention_is_understood(calls, keys, mask, scale, scores, monkeypatch):
    """A causal mask begins at the first key, also where there are more keys; scores are summed in parts, too."""
    monkeypatch.setattr(gates, "_SCORES", scores)
    model = toy(calls)
    gate = gated(find_sites(model)).gate.requires_grad_()
    found = mu_of(model, gate)
    query = model.blocks[0].attention.queries(model.embedding(IDS))
    products = query @ KEYS[:, :keys].repeat_interleave(4 // keys, 1).transpose(-2, -1) * scale
    seen = torch.zeros(5, 7) if mask is None else mask.log() if mask.dtype == torch.bool else mask
    z2 = (products + seen).exp().sum(-1)
    z1 = (torch.einsum("rhtq,hq->rht", query, gate[0, :, :-1]) + gate[0, :, -1:]).exp()
    expected = (z1 / (z1 + z2)).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    wanted = (gate, model.blocks[0].attention.q_proj.weight)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(5))
    gradients = [torch.autograd.grad((mu * weights).sum(), wanted) for mu in (found, expected)]
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "mask", [BLIND, BLIND.float().log(), BLIND.float().sub(1) * 3e38], ids=["bool", "inf", "float"]
)
def test_positions_that_see_no_key_have_finite_numbers_and_gradients(mask):
    model = toy(lambda q: attend(q, KEYS, KEYS, mask))
    gate = gated(find_sites(model)).gate.requires_grad_()
    mu = mu_of(model, gate)
    assert mu.isfinite().all()
    wanted = (gate, model.blocks[0].attention.q_proj.weight)
    gradients = torch.autograd.grad(mu.sum(), wanted)
    # What others give, and only that: nothing comes from positions that see nothing.
    keys = torch.autograd.grad(mu_of(toy(lambda q: attend(q, KEYS, KEYS)), gate)[BLIND[:, 0, :, 0]].sum(), gate)
    assert all(gradient.isfinite().all() for gradient in gradients)
    torch.testing.assert_close(gradients[0], keys[0], rtol=1e-4, atol=1e-6)


def test_attention_that_cannot_be_followed_is_refused():
    """No call, two calls, and queries that the gate is not for; a call outside of a site's attention does not count."""
    for calls, message in (
        (lambda q: q, r"blocks\.0\.attention computed its heads without .*attn_implementation=sdpa"),
        (lambda q: attend(attend(q, KEYS, KEYS), KEYS, KEYS), "2 times, expected once"),
        (lambda q: attend(q[:, :2], KEYS[:, :2], KEYS[:, :2]).repeat(1, 2, 1, 1), r"\(2, 2, 5, 8\).*\(2, 4, 5, 8\)"),
    ):
        model = toy(calls)
        with pytest.raises(HookError, match=message):
            mu_of(model, gated(find_sites(model)).gate)
        clean(model)
    model = toy(lambda q: attend(q, KEYS, KEYS))
    with pytest.raises(HookError, match=r"queries \(2, 4, 5, 8\), the gate of the edit expects.*\(2, 4, 5, 12\)"):
        mu_of(model, gated(find_sites(model), 12).gate)
    model.embedding.register_forward_hook(lambda _, args, out: (attend(out, out, out), None)[1])
    expected = mu_of(toy(lambda q: attend(q, KEYS, KEYS)), gated(find_sites(model)).gate)
    assert torch.equal(mu_of(model, gated(find_sites(model)).gate), expected)


def clean(model: nn.Module, hooks: int = 0) -> None:
    """No hook of ours, and no mode."""
    assert zoo.hooks(model) == hooks
    assert _len_torch_function_stack() == 0


@torch.no_grad()
def test_a_model_without_sdpa_is_told_how_to_be_loaded():
    """Llama loaded with eager attention, and Gemma 2, which caps its scores and so has no other."""
    for architecture in (zoo.llama, zoo.gemma2):
        tiny = zoo.build(architecture)
        tiny.model.set_attn_implementation("eager")
        edit = gated(find_sites(tiny.model))
        refused = pytest.raises(HookError, match=r"layers\.0\.self_attn .*load the model with attn_implementation=sdpa")
        with refused, applied(tiny.model, edit):
            tiny.model(**tiny.inputs(TEXTS))
        clean(tiny.model)
        with applied(tiny.model, dataclasses.replace(edit, gate=None)):
            tiny.model(**tiny.inputs(TEXTS))


@torch.no_grad()
def test_nothing_is_left_after_the_block_or_an_exception():
    tiny = zoo.build(zoo.llama)
    sites, inputs = find_sites(tiny.model), tiny.inputs(TEXTS)
    edit = gated(sites)
    with applied(sites, edit) as fired:
        first = tiny.model(**inputs).logits
        handle = sites[1].block[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tiny.model(**inputs)
        handle.remove()
        # The forward that broke off has left nothing to this one.
        assert torch.equal(tiny.model(**inputs).logits, first)
    assert fired.by_site == [3, 3, 2]
    clean(tiny.model)
    with pytest.raises(RuntimeError, match="inside"), applied(sites, edit):
        raise RuntimeError("inside")
    clean(tiny.model)
    # An interruption inside an attention, of which hooks do not learn.
    handle = sites[1].attention[1].q_proj.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), applied(sites, edit):
        tiny.model(**inputs)
    handle.remove()
    clean(tiny.model)


def interrupt(*_: object) -> None:
    assert _len_torch_function_stack() == 1
    raise KeyboardInterrupt


def test_what_does_not_fit_is_refused_before_a_hook_is_registered():
    tiny = zoo.build(zoo.llama)
    sites = find_sites(tiny.model)
    edit = gated(sites)
    layers, heads, _ = sites.shape
    for wrong, message in (
        (torch.zeros(layers, heads + 1, 9), "disagree in layers, heads or batch"),
        (torch.zeros(layers, heads), r"gate \[L, H, Q \+ 1\] or none"),
        (torch.zeros(layers, heads, 1), "one more"),
        (torch.zeros(layers, heads, 9, dtype=torch.long), "floating point"),
    ):
        with pytest.raises(GeometryError, match=message):
            dataclasses.replace(edit, gate=wrong)
    with pytest.raises(GeometryError, match="batch"):
        dataclasses.replace(gated(sites, batch=2), gate=gated(sites, batch=3).gate)
    ones = torch.ones(layers, 1)
    wide = Edit(torch.zeros(layers, 1, 32), ones, ones, gate=torch.zeros(layers, 1, 9))
    for stream in (MLP, RESIDUAL):
        refused = pytest.raises(GeometryError, match=f"edits of {stream} have a gate, expected one in heads alone")
        with refused, applied(sites, {HEADS: edit, stream: wide}):
            pass
    clean(tiny.model)


class TestGradients:
    """Of a loss with respect to gate and value, through a frozen model."""

    @staticmethod
    def loss(tiny: zoo.Tiny, edit: Edit) -> Tensor:
        inputs = tiny.inputs(TEXTS)
        with applied(tiny.model, edit):
            logits = tiny.model(**inputs, use_cache=False).logits
        return functional.cross_entropy(logits[:, -1].double(), torch.tensor([5, 6, 7]))

    @staticmethod
    def trained(sites: Sites, dtype: torch.dtype = torch.float32, **flags: bool) -> Edit:
        edit = gated(sites, **flags)
        parts = (edit.value, edit.keep, edit.gain, edit.gate)
        value, keep, gain, gate = (part.to(dtype) for part in parts)
        value.requires_grad_()
        gate.requires_grad_()
        return dataclasses.replace(edit, value=value, keep=keep, gain=gain, gate=gate)

    @pytest.mark.parametrize("everywhere", [False, True])
    def test_agree_with_finite_differences(self, everywhere):
        tiny = zoo.build(zoo.gpt2)  # no part of which is in float32 whatever the weights are
        tiny.model.double().requires_grad_(False)
        edit = self.trained(find_sites(tiny.model), torch.float64, everywhere=everywhere)
        gradients = torch.autograd.grad(self.loss(tiny, edit), (edit.value, edit.gate))
        rng = torch.Generator().manual_seed(1)
        for name, gradient in zip(("value", "gate"), gradients, strict=True):
            assert (gradient.flatten(2).norm(dim=-1) > 0).all(), "every head has one"
            for _ in range(3):
                step = torch.randn(gradient.shape, generator=rng, dtype=torch.float64)
                with torch.no_grad():
                    after, before = (
                        self.loss(tiny, dataclasses.replace(edit, **{name: getattr(edit, name) + sign * 1e-5 * step}))
                        for sign in (1, -1)
                    )
                expected = (after - before) / 2e-5
                torch.testing.assert_close((gradient * step).sum(), expected, rtol=1e-5, atol=1e-9)

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_are_the_same_where_blocks_run_again_in_the_backward_pass(self, reentrant, dtype):
        tiny = zoo.build(zoo.llama)
        tiny.model.to(dtype).requires_grad_(False)
        sites, inputs = find_sites(tiny.model), tiny.inputs(TEXTS) | {"use_cache": False}
        edit, found = self.trained(sites, everywhere=True), []
        for again in (False, True):
            if again:
                tiny.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                tiny.model.enable_input_require_grads()  # else reentrant blocks have no gradient to give
                tiny.model.train()
            hooks = zoo.hooks(tiny.model)
            with applied(sites, edit) as fired:
                logits = tiny.model(**inputs).logits
                loss = functional.cross_entropy(logits[:, -1].float(), torch.tensor([5, 6, 7]))
                loss.backward()
            assert fired.by_site == [2 if again else 1] * len(sites)
            found.append((loss.detach(), edit.value.grad, edit.gate.grad))
            edit.value.grad = edit.gate.grad = None
            clean(tiny.model, hooks)
        for plain, again in zip(*found, strict=True):
            assert plain.dtype == torch.float32
            assert plain.abs().max() > 0
            assert torch.equal(plain, again)


class TestFiles:
    @staticmethod
    def made(sites: Sites, **flags: bool) -> TaskVector:
        return TaskVector({HEADS: gated(sites, **flags)}, card(geometry=sites.geometry))

    @torch.no_grad()
    def test_a_vector_with_a_gate_comes_back_to_the_bit(self, tmp_path):
        tiny = zoo.build(zoo.qwen3)
        sites, inputs = find_sites(tiny.model), tiny.inputs(TEXTS)
        made = self.made(sites, everywhere=True)
        path = made.save(tmp_path / "v.safetensors")
        back = TaskVector.load(path)
        assert sorted(load_file(path)) == ["heads.everywhere", "heads.gain", "heads.gate", "heads.keep", "heads.value"]
        assert (back.id, back.checksum) == (made.id, made.checksum)
        logits = []
        for each in (made, back):
            with applied(tiny.model, each):
                logits.append(tiny.model(**inputs).logits)
        assert torch.equal(*logits)
        ungated = TaskVector({HEADS: dataclasses.replace(made.edits[HEADS], gate=None)}, made.card)
        assert ungated.id == made.id, "the recipe says it, not the tensors"
        assert ungated.checksum != made.checksum

    def test_nan_and_gates_that_do_not_fit_are_neither_written_nor_read(self, tmp_path, monkeypatch):
        sites = find_sites(zoo.build(zoo.llama).model)
        made = self.made(sites)
        made.edits[HEADS].gate[0, 0, 0] = torch.nan
        with pytest.raises(NumericsError, match=r"heads\.gate .* not saved"):
            made.save(tmp_path / "v.safetensors")
        for gate, message in ((made.edits[HEADS].gate, "NaN"), (torch.zeros(2, 2, 9), "do not fit")):
            tensors = made.tensors() | {"heads.gate": gate}
            with monkeypatch.context() as patch:
                patch.setattr(TaskVector, "tensors", lambda _, tensors=tensors: tensors)
                patch.setattr(Tensor, "isfinite", lambda self: torch.ones_like(self, dtype=torch.bool))
                path = made.save(tmp_path / "v.safetensors")
            with pytest.raises(VectorFileError, match=message):
                TaskVector.load(path)

    def test_they_are_told_and_not_combined(self):
        sites = find_sites(zoo.build(zoo.llama).model)
        made = self.made(sites)
        assert made.described() == "12 of 12 heads (gated)"
        assert dict(page.facts(made))["edited heads"].endswith("layer 2: 0, 1, 2, 3), gated by the query")
        assert "gated" not in dict(page.facts(vector()))["edited heads"]
        other = TaskVector(made.edits, dataclasses.replace(made.card, seed=1))
        with pytest.raises(GeometryError, match="edits with a gate cannot be combined"):
            combined([made, other], task="task")
