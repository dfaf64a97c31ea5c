"""Streams other than the heads: where they run, reading them, changing them, and vectors that hold them."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lmms_mtv import Edit, Episode, TaskVector, applied, combined, find_sites, record, verify
from lmms_mtv.errors import DiscoveryError, GeometryError, HookError, VectorFileError
from lmms_mtv.hooks import ReplayError, attention_outputs, capture, hook_points, receivers, shape
from lmms_mtv.vectors import ATTENTION, HEADS, MLP, RESIDUAL, STREAMS, checksum
from lmms_mtv.vectors.library import page
from support import zoo
from support.sessions import session
from support.vectors import card, vector

TEXTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
OTHERS = (ATTENTION, MLP, RESIDUAL)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def random_edit(form: tuple[int, int, int], seed: int = 0, batch: int | None = None, **flags: bool) -> Edit:
    rng = torch.Generator().manual_seed(seed)
    leading = () if batch is None else (batch,)
    keep, gain = (torch.randn(*leading, *form[:2], generator=rng) for _ in range(2))
    return Edit(torch.randn(form, generator=rng), keep, gain, **flags)


def first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def test_places_are_the_parts_of_the_blocks_that_have_sites(tiny):
    sites = find_sites(tiny.model)
    for site, attention, mlp, block in zip(sites, *(hook_points(sites, stream) for stream in OTHERS), strict=True):
        assert site.name.startswith(attention.name + ".")
        assert attention.name.startswith(block.name + ".")
        assert mlp.name == block.name + ".mlp"
        assert all(tiny.model.get_submodule(point.name) is point.module for point in (attention, mlp, block))
    for stream in OTHERS:
        assert shape(sites, stream) == (zoo.LAYERS, 1, zoo.HEADS * zoo.HEAD_DIM)


@pytest.mark.parametrize("stream", OTHERS)
def test_an_identity_edit_changes_nothing_and_zeros_change_something(tiny, stream):
    sites, inputs = find_sites(tiny.model), tiny.inputs(TEXTS)
    plain = tiny.model(**inputs).logits
    verify(tiny.model, sites, inputs, stream)
    layers, heads, size = shape(sites, stream)
    for everywhere in (False, True):
        for renormed in (False, True):
            nothing = Edit(
                torch.randn(layers, heads, size),
                torch.ones(layers, heads),
                torch.zeros(layers, heads),
                everywhere=everywhere,
                renormed=renormed,
            )
            with applied(sites, {stream: nothing}) as fired:
                same = tiny.model(**inputs).logits
            assert (plain - same).abs().max().item() == 0
            assert fired.by_site == [1] * layers


@pytest.mark.parametrize("everywhere", [False, True])
def test_edits_of_all_streams_are_those_of_hand_written_hooks(tiny, everywhere):
    """keep * x + gain * value at every part of a block at once, without padding, by hooks written out here."""
    sites, inputs = find_sites(tiny.model), tiny.inputs([TEXTS[0]])
    edits = {s: random_edit(shape(sites, s), seed, everywhere=everywhere) for seed, s in enumerate(STREAMS)}
    at = slice(None) if everywhere else slice(-1, None)

    def changed(x: Tensor, edit: Edit, layer: int) -> Tensor:
        x = x.clone()
        keep, gain = (t[layer].repeat_interleave(edit.shape[2]) for t in (edit.keep, edit.gain))
        x[:, at] = keep * x[:, at] + gain * edit.value[layer].flatten()
        return x

    handles = []
    for layer, site in enumerate(sites):
        attention, block = site.attention[1], site.block[1]

        def at_heads(_: nn.Module, args, layer=layer):
            return (changed(args[0], edits[HEADS], layer), *args[1:])

        def after(stream: str, layer: int):
            def hook(_: nn.Module, args, output):
                new = changed(first(output), edits[stream], layer)
                return (new, *output[1:]) if isinstance(output, tuple) else new

            return hook

        handles.append(site.module.register_forward_pre_hook(at_heads))
        for module, stream in ((attention, ATTENTION), (block.mlp, MLP), (block, RESIDUAL)):
            handles.append(module.register_forward_hook(after(stream, layer)))
    expected = tiny.model(**inputs).logits
    for handle in handles:
        handle.remove()
    with applied(sites, edits) as fired:
        found = tiny.model(**inputs).logits
    assert fired.by_site == [1] * (len(STREAMS) * zoo.LAYERS)
    assert not torch.allclose(expected, tiny.model(**inputs).logits, atol=1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stream", OTHERS)
def test_recorded_activations_are_what_the_modules_gave(tiny, stream):
    sites, inputs = find_sites(tiny.model), tiny.inputs(TEXTS, "right")
    tiny.model(**inputs)  # some models put hooks of their own in place when they first run
    before = zoo.hooks(tiny.model)
    seen: list[Tensor] = []
    handles = [
        point.module.register_forward_hook(lambda _, args, output: seen.append(first(output).clone()))
        for point in hook_points(sites, stream)
    ]
    with record(sites, stream) as recording:
        tiny.model(**inputs)
    for handle in handles:
        handle.remove()
    last = inputs["attention_mask"].sum(1) - 1
    expected = torch.stack([x[torch.arange(3), last] for x in seen], 1).unsqueeze(2)
    assert torch.equal(recording.last(), expected)
    assert zoo.hooks(tiny.model) == before


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_every_row_of_a_padded_batch_equals_its_own_run(tiny, side, everywhere):
    sites = find_sites(tiny.model)
    edits = {s: random_edit(shape(sites, s), everywhere=everywhere, renormed=s == RESIDUAL) for s in STREAMS}
    batch = tiny.inputs(TEXTS, side)
    lengths = batch["attention_mask"].sum(1)
    with applied(sites, edits):
        logits = tiny.model(**batch).logits
    for row, text in enumerate(TEXTS):
        with applied(sites, edits):
            expected = tiny.model(**tiny.inputs([text])).logits[0, -1]
        last = -1 if side == "left" else lengths[row] - 1
        torch.testing.assert_close(logits[row, last], expected, rtol=1e-3, atol=1e-3)


def test_generation_is_edited_at_every_forward_in_every_stream(tiny):
    sites, inputs = find_sites(tiny.model), tiny.inputs(TEXTS)
    edits = {stream: random_edit(shape(sites, stream)) for stream in STREAMS}
    tiny.model(**inputs)  # some models put hooks of their own in place when they first run
    before = zoo.hooks(tiny.model)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with applied(tiny.model, edits) as fired:
        output = tiny.model.generate(**inputs, **options)
    assert fired.by_site == [4] * (len(STREAMS) * zoo.LAYERS)
    assert zoo.hooks(tiny.model) == before
    assert not torch.equal(output, tiny.model.generate(**inputs, **options))


def test_a_batch_of_edits_gives_each_row_its_own():
    tiny = zoo.build(zoo.llama)
    sites, inputs = find_sites(tiny.model), tiny.inputs(TEXTS)
    for everywhere in (False, True):
        edits = random_edit(shape(sites, RESIDUAL), batch=3, everywhere=everywhere)
        with applied(sites, {RESIDUAL: edits}):
            together = tiny.model(**inputs).logits[:, -1]
        for row in range(3):
            with applied(sites, {RESIDUAL: edits.taken(row)}):
                alone = tiny.model(**inputs).logits[row, -1]
            torch.testing.assert_close(together[row], alone, rtol=1e-5, atol=1e-5)


def test_an_edit_that_is_once_is_at_the_end_of_the_prompt_alone(tiny):
    """Generated tokens are those of a full forward that is edited at the last prompt token and nowhere else."""
    sites, inputs = find_sites(tiny.model), tiny.inputs([TEXTS[0]])
    edits = {RESIDUAL: random_edit(shape(sites, RESIDUAL), once=True)}
    never = [2, zoo.IMAGE, zoo.VISION_START, zoo.VISION_END]
    options = {"max_new_tokens": 4, "suppress_tokens": never, "do_sample": False, "pad_token_id": 0}
    with applied(sites, edits) as fired:
        output = tiny.model.generate(**inputs, **options)
    assert fired.count == 4
    length = inputs["input_ids"].shape[1]
    for new in range(1, 5):
        longer = inputs | {"input_ids": output[:, : length + new - 1]}
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        longer.pop("position_ids", None)
        longer |= tiny.kinds_of(longer["input_ids"])
        expected = []
        for point, layer in zip(hook_points(sites, RESIDUAL), range(zoo.LAYERS), strict=True):

            def write(_, args, output, layer=layer):
                state, edit = first(output).clone(), edits[RESIDUAL]
                at = state[:, length - 1]
                state[:, length - 1] = edit.keep[layer] * at + edit.gain[layer] * edit.value[layer]
                return (state, *output[1:]) if isinstance(output, tuple) else state

            expected.append(point.module.register_forward_hook(write))
        by_hand = tiny.model(**longer).logits[0, -1]
        for handle in expected:
            handle.remove()
        with applied(sites, edits, tail=new):
            scored = tiny.model(**longer).logits[0, -1]
        torch.testing.assert_close(scored, by_hand, rtol=1e-4, atol=1e-4)
        by_hand[never] = -torch.inf
        assert by_hand.argmax() == output[0, length + new - 1]


def test_the_end_of_a_prompt_is_found_in_tails_of_several_lengths():
    tiny = zoo.build(zoo.llama)
    sites, inputs = find_sites(tiny.model), tiny.inputs(TEXTS, "right")
    edits = {MLP: random_edit(shape(sites, MLP), once=True)}
    with applied(sites, edits, tail=torch.tensor([3, 1, 2])):
        together = tiny.model(**inputs).logits
    for row, (text, tail) in enumerate(zip(TEXTS, (3, 1, 2), strict=True)):
        with applied(sites, edits, tail=tail):
            alone = tiny.model(**tiny.inputs([text])).logits[0]
        torch.testing.assert_close(together[row, : len(text)], alone, rtol=1e-4, atol=1e-5)


def test_a_prompt_that_goes_on_from_a_cache_does_not_tell_where_it_ends():
    tiny = zoo.build(zoo.llama)
    sites = find_sites(tiny.model)
    cache = tiny.model(input_ids=torch.tensor([[5, 6, 7]])).past_key_values
    edits = {MLP: random_edit(shape(sites, MLP), once=True)}
    with pytest.raises(HookError, match="run prompts whole"), applied(sites, edits):
        tiny.model(input_ids=torch.tensor([[8]]), past_key_values=cache)
    assert zoo.hooks(tiny.model) == 0
    with pytest.raises(GeometryError, match="not both"):
        random_edit((3, 1, 32), once=True, everywhere=True)


@pytest.mark.parametrize("stream", [HEADS, RESIDUAL])
def test_a_renormed_edit_turns_and_keeps_the_norm(stream):
    """LIVE, arXiv 2406.13185: h' = (h + alpha v) ||h|| / ||h + alpha v||, for each head where it is one of heads."""
    tiny = zoo.build(zoo.llama)
    sites = find_sites(tiny.model)
    layers, heads, size = shape(sites, stream)
    value = torch.randn(layers, heads, size, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(layers, heads)
    with record(sites, stream) as plain:
        tiny.model(**tiny.inputs(TEXTS))
    # Layer 0 alone: what the others see is changed by it.
    only = torch.zeros_like(ones)
    only[0] = 3
    with applied(sites, {stream: Edit(value, ones, only, renormed=True)}), record(sites, stream) as turned:
        tiny.model(**tiny.inputs(TEXTS))
    before, after = plain.last()[:, 0], turned.last()[:, 0]
    expected = before + 3 * value[0]
    expected = expected * before.norm(dim=-1, keepdim=True) / expected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1), rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused_before_a_hook_is_registered():
    tiny = zoo.build(zoo.llama)
    sites = find_sites(tiny.model)
    fitting, wide = random_edit(shape(sites, MLP)), random_edit((zoo.LAYERS, 1, 33))
    for edits, message in (
        ({MLP: fitting, RESIDUAL: wide}, r"residual of \(layers, heads, size\) \(3, 1, 33\).*\(3, 1, 32\)"),
        ({"logits": fitting}, "edits of logits, expected streams among heads, attention, mlp, residual"),
        (
            {MLP: random_edit(shape(sites, MLP), batch=2), RESIDUAL: random_edit(shape(sites, RESIDUAL), batch=3)},
            r"batches of \[2, 3\] rows",
        ),
    ):
        with pytest.raises(GeometryError, match=message), applied(sites, edits):
            pass
        assert zoo.hooks(tiny.model) == 0
    with pytest.raises(RuntimeError, match="inside"), applied(sites, {MLP: fitting}):
        assert zoo.hooks(tiny.model) > 0
        raise RuntimeError("inside")
    assert zoo.hooks(tiny.model) == 0


def test_parallel_blocks_have_all_streams():
    """GPT-NeoX and Falcon add attention and MLP to the same state; Falcon sums them in place, in the MLP's output."""
    common = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    for model in (
        transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**common, intermediate_size=40)),
        transformers.FalconForCausalLM(transformers.FalconConfig(**common, parallel_attn=True)),
    ):
        sites, inputs = find_sites(model.eval()), {"input_ids": torch.tensor([TEXTS[0]])}
        for stream in OTHERS:
            verify(model, sites, inputs, stream)


def test_a_block_without_an_mlp_of_its_own_has_the_other_streams():
    config = transformers.OPTConfig(
        vocab_size=120, hidden_size=32, word_embed_proj_dim=32, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.OPTForCausalLM(config).eval()
    sites, inputs = find_sites(model), {"input_ids": torch.tensor([TEXTS[0]])}
    with pytest.raises(DiscoveryError, match=r"layers\.0 has no single module.*layers\.0\.fc1.*layers\.0\.fc2"):
        hook_points(sites, MLP)
    for stream in (ATTENTION, RESIDUAL):
        verify(model, sites, inputs, stream)
    tied = zoo.build(zoo.llama)
    for block in tied.model.model.layers:
        block.mlp = tied.model.model.layers[0].mlp
    with pytest.raises(DiscoveryError, match="share the module of their mlp"):
        hook_points(find_sites(tied.model), MLP)


def test_what_heads_write_is_their_projection_without_the_bias(tiny):
    sites = find_sites(tiny.model)
    heads = torch.randn(sites.shape, generator=torch.Generator().manual_seed(0))
    expected = []
    for site, value in zip(sites, heads, strict=True):
        weight = site.module.weight.T if hasattr(site.module, "nf") else site.module.weight
        expected.append(weight @ value.flatten())
    torch.testing.assert_close(
        attention_outputs(sites, heads), torch.stack(expected).unsqueeze(1), rtol=1e-4, atol=1e-5
    )


def test_what_heads_write_goes_through_the_norm_that_receives_attention():
    """Gemma 3 normalises what attention adds: without the norm a function vector has no scale of the hidden state."""
    tiny = zoo.build(zoo.gemma3)
    sites, inputs, added = find_sites(tiny.model), tiny.inputs(TEXTS[:1]), []
    norms = [site.block[1].post_attention_layernorm for site in sites]
    handles = [norm.register_forward_hook(lambda _, __, output: added.append(output[0, -1].float())) for norm in norms]
    with record(sites) as recording, receivers(sites) as found, torch.no_grad():
        tiny.model(**inputs)
    for handle in handles:
        handle.remove()
    assert [list(modules) for modules in found] == [[norm] for norm in norms]
    heads = recording.last()[0].float().cpu()
    whole = attention_outputs(sites, heads, heads, found)
    torch.testing.assert_close(whole, torch.stack(added).unsqueeze(1), rtol=1e-4, atol=1e-5)
    chosen = torch.zeros(sites.shape[:2])
    chosen[:, 0] = 1
    with torch.no_grad():
        rest = [
            norm(site.module((value * (1 - mask).unsqueeze(-1)).flatten()))
            for norm, site, value, mask in zip(norms, sites, heads, chosen, strict=True)
        ]
    part = attention_outputs(sites, heads * chosen.unsqueeze(-1), heads, found)
    torch.testing.assert_close(part, whole - torch.stack(rest).unsqueeze(1), rtol=1e-4, atol=1e-5)


def test_nothing_receives_attention_in_most_models():
    tiny = zoo.build(zoo.llama)
    sites = find_sites(tiny.model)
    with receivers(sites) as found, torch.no_grad():
        tiny.model(**tiny.inputs(TEXTS[:1]))
    assert found == [[] for _ in sites]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.model.modules())


@pytest.mark.parametrize("tokens", ["first", "all"])
def test_losses_of_a_stream_are_those_of_full_forwards(tokens):
    """Edits of the last positions are replayed, those of all positions are not; a session does both in any order."""
    once = {RESIDUAL: True, MLP: False}
    tiny, episode = zoo.build(zoo.idefics3), Episode(3, (1, 2))
    sites = find_sites(tiny.model)
    last, whole = (
        {
            s: random_edit(shape(sites, s), batch=b, everywhere=e, once=once[s] and not e)
            for s, b in ((MLP, None), (RESIDUAL, 2))
        }
        for e in (False, True)
    )
    for order in ((last, whole), (whole, last)):
        used = session(tiny)
        found = {edits[MLP].everywhere: used.losses(episode, edits, tokens) for edits in (*order, *order)}
        assert used.replays is True
        for edits in (last, whole):
            prompt = used.prompts.prompt(episode)
            count = 1 if tokens == "first" else 2
            text, target = [*prompt.text, *prompt.target[: count - 1]], list(prompt.target[:count])
            for row in range(2):
                with applied(sites, {MLP: edits[MLP], RESIDUAL: edits[RESIDUAL].taken(row)}, tail=count):
                    logits = tiny.model(**tiny.inputs([text])).logits[0, -count:]
                expected = nn.functional.cross_entropy(logits, torch.tensor(target)).item()
                assert found[edits[MLP].everywhere][row].item() == pytest.approx(expected, abs=1e-4)


def test_an_edit_of_all_positions_is_never_replayed():
    tiny = zoo.build(zoo.llama)
    sites = find_sites(tiny.model)
    with capture(tiny.model, sites) as captured:
        tiny.model(**tiny.inputs([TEXTS[0]]))
    with pytest.raises(ReplayError, match="full forwards"):
        captured.prefill().replay(tiny.model, sites, random_edit(sites.shape, everywhere=True), [5])


def test_mean_activations_of_a_stream_are_the_means_of_recorded_ones():
    tiny = zoo.build(zoo.llama)
    used = session(tiny, batch_size=2)
    episodes = used.episodes(3, 2, "values")
    rows = []
    for episode in episodes:
        with record(used.sites, MLP) as recording:
            tiny.model(**tiny.inputs([list(used.prompts.prompt(episode).text)]))
        rows.append(recording.last())
    means = used.mean_activations(episodes, MLP)
    torch.testing.assert_close(means, torch.cat(rows).mean(0), rtol=1e-4, atol=1e-5)


class TestFiles:
    @staticmethod
    def made(**flags: bool) -> TaskVector:
        edits = {HEADS: vector().edits[HEADS], RESIDUAL: random_edit((2, 1, 8), **flags)}
        return TaskVector(edits, card(method="other"))

    @pytest.mark.parametrize("flags", [{}, {"everywhere": True}, {"once": True, "renormed": True}])
    def test_streams_and_their_flags_come_back(self, tmp_path, flags):
        made = self.made(**flags)
        back = TaskVector.load(made.save(tmp_path / "v.safetensors"))
        assert back.edits.keys() == made.edits.keys()
        for name, edit in made.edits.items():
            assert all(torch.equal(getattr(edit, p), getattr(back.edits[name], p)) for p in ("value", "keep", "gain"))
            assert all(getattr(edit, f) == getattr(back.edits[name], f) for f in ("everywhere", "once", "renormed"))
        assert back.id == made.id
        assert back.heads == vector().heads

    def test_a_file_of_heads_has_what_it_had_before_there_were_streams(self, tmp_path):
        path = vector().save(tmp_path / "v.safetensors")
        assert sorted(load_file(path)) == ["heads.gain", "heads.keep", "heads.value"]

    def test_flags_count_in_the_checksum_and_unknown_tensors_are_refused(self, tmp_path):
        assert len({self.made(everywhere=e, renormed=r).checksum for e in (0, 1) for r in (0, 1)}) == 4
        made = self.made()
        path, text = made.save(tmp_path / "v.safetensors"), made.card.to_json()
        before = load_file(path)
        for name, digest, message in (
            ("residual.everywhere", checksum(text, before), "checksum"),
            ("residual.colour", None, "does not know"),
            ("logits.value", None, "incomplete"),
        ):
            tensors = before | {name: torch.ones(1)}
            described = {"format": "lmms-mtv", "card": text, "checksum": digest or checksum(text, tensors)}
            save_file(tensors, path, described)
            with pytest.raises(VectorFileError, match=message):
                TaskVector.load(path)

    def test_a_stream_of_another_shape_is_refused(self):
        for edit in (random_edit((2, 2, 8)), random_edit((3, 1, 8))):
            with pytest.raises(GeometryError, match="its card says"):
                TaskVector({RESIDUAL: edit}, card()).check(card().geometry)

    def test_a_page_and_a_line_say_what_is_edited(self):
        keep, gain = torch.ones(2, 1), torch.tensor([[0.0], [1.0]])
        made = TaskVector({RESIDUAL: Edit(torch.ones(2, 1, 8), keep, gain, everywhere=True)}, card(method="other"))
        assert made.described() == "residual of 1 of 2 layers"
        assert vector().described() == "2 of 4 heads"
        facts = dict(page.facts(made))
        assert facts["edited residual"] == "1 of 2 layers (layers 2), at all positions"
        assert "edited heads" not in facts

    def test_only_edits_at_the_same_positions_are_combined(self):
        def of(seed: int, **flags: bool) -> TaskVector:
            return TaskVector({RESIDUAL: random_edit((2, 1, 8), seed, **flags)}, card(seed=seed))

        edits = [of(seed, everywhere=True) for seed in range(2)]
        found = combined(edits, task="task").edits[RESIDUAL]
        assert found.everywhere
        x = torch.randn(2, 1, 8)
        both, one, other = (
            edit.keep[..., None] * x + edit.gain[..., None] * edit.value
            for edit in (found, *(made.edits[RESIDUAL] for made in edits))
        )
        torch.testing.assert_close(both, (one + other) / 2)
        for flags in ({}, {"everywhere": True, "renormed": True}):
            with pytest.raises(GeometryError, match="no sum"):
                combined([edits[0], of(2, **flags)], task="task")
