"""Sites of every family of models, against a table written by hand, and runs of tiny random ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lmms_mtv import Edit, applied, find_sites, record, verify
from lmms_mtv.errors import DiscoveryError, HookError
from lmms_mtv.vectors import MLP, STREAMS
from support import matrix, zoo

TEXT = {
    "vocab_size": zoo.VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = TEXT | {"head_dim": 12}  # not 48 / 6
VISION = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 10}
DEEPSEEK_MOE = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_hidden_layers": 8,
}
LAYERS = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Family:
    """A class of transformers, its configuration, and where its heads are: what ``find_sites`` has to say.

    ``image_tokens`` and ``media`` are for models that do not run without an image.
    """

    architecture: str
    options: dict[str, Any]
    names: str
    heads: int = 6
    head_dim: int = 8
    layers: tuple[int, ...] = LAYERS
    skipped: tuple[int, ...] = ()
    variant: str = ""
    image_tokens: int = 0
    media: Callable[[Tensor], dict[str, Tensor]] = field(default=lambda ids: {})

    def __str__(self) -> str:
        return self.architecture + self.variant

    def build(self) -> nn.Module:
        kind = getattr(transformers, self.architecture)
        return kind(kind.config_class(**self.options))


def _pixels(ids: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": torch.ones(len(ids), 3, 16, 16)}


def _gated_pixels(ids: Tensor) -> dict[str, Tensor]:
    mask = torch.ones(*ids.shape, 1, dtype=torch.long)
    return {"pixel_values": torch.ones(len(ids), 1, 3, 16, 16), "image_attention_mask": mask}


def _qformer_pixels(ids: Tensor) -> dict[str, Tensor]:
    return _pixels(ids) | {"qformer_input_ids": torch.full((len(ids), 2), 5)}


def _placed_pixels(ids: Tensor) -> dict[str, Tensor]:
    return _pixels(ids) | {"image_embeds_position_mask": ids == zoo.IMAGE}


def _text(kind: str, options: dict[str, Any] = TEXT, **more: Any) -> dict[str, Any]:
    return {"model_type": kind, **options, **more}


def _seen(text: dict[str, Any], vision: dict[str, Any] = VISION, **more: Any) -> dict[str, Any]:
    return {"text_config": text, "vision_config": vision, **more}


_QWEN_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 24,
    "num_heads": 4,
    "out_hidden_size": 48,
    "patch_size": 4,
    "deepstack_visual_indexes": [0],
}
_CLIP, _SIGLIP = VISION | {"model_type": "clip_vision_model"}, VISION | {"model_type": "siglip_vision_model"}
_OPT = {
    "model_type": "opt",
    "vocab_size": zoo.VOCABULARY,
    "hidden_size": 48,
    "word_embed_proj_dim": 48,
    "ffn_dim": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
_T5 = {
    "model_type": "t5",
    "vocab_size": zoo.VOCABULARY,
    "d_model": 48,
    "d_kv": 12,
    "d_ff": 40,
    "num_layers": 4,
    "num_decoder_layers": 5,
    "num_heads": 6,
    "decoder_start_token_id": 0,
}
_QFORMER = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "encoder_hidden_size": 32,
}

SELF = "model.layers.{}.self_attn.o_proj"
NESTED = "model.language_model.layers.{}.self_attn.o_proj"

FAMILIES = (
    Family("LlamaForCausalLM", WIDE, SELF, head_dim=12),
    Family("Llama4ForCausalLM", WIDE | {"intermediate_size_mlp": 40, "num_local_experts": 4}, SELF, head_dim=12),
    Family(
        "Llama4ForConditionalGeneration",
        _seen(
            _text("llama4_text", WIDE, intermediate_size_mlp=40, num_local_experts=4, attention_chunk_size=4),
            VISION | {"vision_output_dim": 24, "projector_input_dim": 24, "projector_output_dim": 24},
        ),
        "language_model.model.layers.{}.self_attn.o_proj",
        head_dim=12,
    ),
    Family("MistralForCausalLM", WIDE, SELF, head_dim=12),
    Family("MixtralForCausalLM", TEXT | {"num_local_experts": 4}, SELF),
    Family(
        "Mistral3ForConditionalGeneration",
        _seen(_text("mistral", WIDE), VISION | {"model_type": "pixtral"}),
        NESTED,
        head_dim=12,
    ),
    Family(
        "Mistral3ForConditionalGeneration",
        _seen(_text("ministral3", WIDE), VISION | {"model_type": "pixtral"}),
        NESTED,
        head_dim=12,
        variant="-ministral3",
    ),
    Family("Qwen2ForCausalLM", TEXT, SELF),
    Family("Qwen2MoeForCausalLM", TEXT | MOE | {"shared_expert_intermediate_size": 24}, SELF),
    Family("Qwen3ForCausalLM", WIDE, SELF, head_dim=12),
    Family("Qwen3MoeForCausalLM", WIDE | MOE, SELF, head_dim=12),
    Family(
        "Qwen2VLForConditionalGeneration",
        _seen(TEXT | {"rope_parameters": MROPE | {"mrope_section": [1, 1, 2]}}, _QWEN_VISION | {"hidden_size": 48}),
        NESTED,
    ),
    Family(
        "Qwen2_5_VLForConditionalGeneration",
        _seen(TEXT | {"rope_parameters": MROPE | {"mrope_section": [1, 1, 2]}}, _QWEN_VISION),
        NESTED,
    ),
    Family(
        "Qwen3VLForConditionalGeneration",
        _seen(WIDE | {"rope_parameters": MROPE | {"mrope_section": [2, 2, 2]}}, _QWEN_VISION),
        NESTED,
        head_dim=12,
    ),
    Family(
        "Qwen3VLMoeForConditionalGeneration",
        _seen(WIDE | MOE | {"rope_parameters": MROPE | {"mrope_section": [2, 2, 2]}}, _QWEN_VISION),
        NESTED,
        head_dim=12,
    ),
    Family(
        "Qwen3NextForCausalLM",
        WIDE | MOE | DELTA | {"shared_expert_intermediate_size": 24},
        SELF,
        head_dim=12,
        layers=(3, 7),
        skipped=(0, 1, 2, 4, 5, 6),
    ),
    Family("Qwen3_5ForCausalLM", WIDE | DELTA, SELF, head_dim=12, layers=(3, 7), skipped=(0, 1, 2, 4, 5, 6)),
    Family(
        "Qwen3_5ForConditionalGeneration",
        _seen(WIDE | DELTA, _QWEN_VISION),
        NESTED,
        head_dim=12,
        layers=(3, 7),
        skipped=(0, 1, 2, 4, 5, 6),
    ),
    Family(
        "Qwen3_5MoeForConditionalGeneration",
        _seen(WIDE | DELTA | MOE | {"shared_expert_intermediate_size": 24}, _QWEN_VISION),
        NESTED,
        head_dim=12,
        layers=(3, 7),
        skipped=(0, 1, 2, 4, 5, 6),
    ),
    Family("GemmaForCausalLM", WIDE, SELF, head_dim=12),
    Family("Gemma2ForCausalLM", WIDE | {"sliding_window": 4}, SELF, head_dim=12),
    Family("Gemma3ForCausalLM", WIDE | {"sliding_window": 4}, SELF, head_dim=12),
    Family(
        "Gemma3ForConditionalGeneration",
        _seen(WIDE | {"sliding_window": 4}, _SIGLIP, mm_tokens_per_image=4, image_token_id=zoo.IMAGE),
        NESTED,
        head_dim=12,
    ),
    Family("PhiForCausalLM", TEXT, "model.layers.{}.self_attn.dense"),
    Family("Phi3ForCausalLM", TEXT, SELF),
    Family("PhimoeForCausalLM", TEXT | {"num_local_experts": 4}, SELF),
    Family(
        "Phi4MultimodalForCausalLM",
        TEXT
        | {
            "vision_config": VISION | {"crop_size": 16},
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 24,
                "num_blocks": 2,
                "num_attention_heads": 4,
                "ext_pw_out_channel": 32,
                "nemo_conv_channels": 32,
            },
        },
        SELF,
    ),
    Family(
        "GPT2LMHeadModel",
        {"vocab_size": zoo.VOCABULARY, "n_positions": 64, "n_embd": 48, "n_layer": 5, "n_head": 6},
        "transformer.h.{}.attn.c_proj",
    ),
    Family(
        "GPT2LMHeadModel",
        {
            "vocab_size": zoo.VOCABULARY,
            "n_positions": 64,
            "n_embd": 48,
            "n_layer": 5,
            "n_head": 6,
            "add_cross_attention": True,
        },
        "transformer.h.{}.attn.c_proj",
        variant="-with-cross-attention",
    ),
    Family("GPTNeoXForCausalLM", TEXT, "gpt_neox.layers.{}.attention.dense"),
    Family("OPTForCausalLM", _OPT, "model.decoder.layers.{}.self_attn.out_proj"),
    Family(
        "FalconForCausalLM",
        TEXT | {"multi_query": True, "new_decoder_architecture": False},
        "transformer.h.{}.self_attention.dense",
    ),
    Family(
        "FalconForCausalLM",
        TEXT | {"num_kv_heads": 2, "new_decoder_architecture": True},
        "transformer.h.{}.self_attention.dense",
        variant="-new",
    ),
    Family(
        "BloomForCausalLM",
        {"vocab_size": zoo.VOCABULARY, "hidden_size": 48, "n_layer": 5, "n_head": 6},
        "transformer.h.{}.self_attention.dense",
    ),
    Family("StableLmForCausalLM", TEXT, SELF),
    Family("OlmoForCausalLM", TEXT, SELF),
    Family("Olmo2ForCausalLM", TEXT, SELF),
    Family("Olmo3ForCausalLM", TEXT | {"sliding_window": 4}, SELF),
    Family("OlmoeForCausalLM", TEXT | {"num_experts": 4, "num_experts_per_tok": 2}, SELF),
    Family("GraniteForCausalLM", TEXT, SELF),
    Family("GraniteMoeForCausalLM", TEXT | {"num_local_experts": 4}, SELF),
    Family(
        "GraniteMoeHybridForCausalLM",
        TEXT
        | {
            "num_local_experts": 4,
            "shared_intermediate_size": 24,
            "layer_types": ["mamba", "mamba", "attention", "mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_state": 8,
            "mamba_expand": 2,
        },
        SELF,
        layers=(2, 4),
        skipped=(0, 1, 3),
    ),
    Family("DeepseekV2ForCausalLM", TEXT | MLA | DEEPSEEK_MOE | {"num_key_value_heads": 6}, SELF, head_dim=10),
    Family(
        "DeepseekV3ForCausalLM",
        TEXT | MLA | DEEPSEEK_MOE | {"n_group": 2, "topk_group": 1, "num_key_value_heads": 6},
        SELF,
        head_dim=10,
    ),
    Family(
        "MiMoV2FlashForCausalLM",
        WIDE | MOE | {"v_head_dim": 10, "n_routed_experts": 4, "num_key_value_heads": 3},
        SELF,
        head_dim=10,
    ),
    Family("DeepseekVLForConditionalGeneration", _seen(_text("llama"), _SIGLIP), NESTED),
    Family("CohereForCausalLM", TEXT, SELF),
    Family("Cohere2ForCausalLM", WIDE | {"sliding_window": 4}, SELF, head_dim=12),
    Family(
        "IdeficsForVisionText2Text",
        TEXT
        | {
            "num_hidden_layers": 6,
            "cross_layer_interval": 2,
            "vision_config": VISION | {"embed_dim": 32},
            "perceiver_config": {"resampler_n_heads": 2, "resampler_head_dim": 8, "resampler_depth": 2},
            "use_resampler": True,
        },
        SELF,
        layers=(0, 1, 2, 3, 4, 5),
        media=_gated_pixels,
    ),
    Family(
        "Idefics2ForConditionalGeneration",
        _seen(
            _text("mistral", WIDE),
            perceiver_config={**zoo.PERCEIVER, "hidden_size": 48},
        ),
        "model.text_model.layers.{}.self_attn.o_proj",
        head_dim=12,
    ),
    Family(
        "Idefics3ForConditionalGeneration",
        _seen(_text("llama", WIDE)),
        "model.text_model.layers.{}.self_attn.o_proj",
        head_dim=12,
    ),
    Family(
        "SmolVLMForConditionalGeneration",
        _seen(_text("llama", WIDE)),
        "model.text_model.layers.{}.self_attn.o_proj",
        head_dim=12,
    ),
    Family("LlavaForConditionalGeneration", _seen(_text("llama"), _CLIP), NESTED),
    Family(
        "LlavaForConditionalGeneration",
        _seen(_text("mistral", WIDE), VISION | {"model_type": "pixtral"}),
        NESTED,
        head_dim=12,
        variant="-pixtral",
    ),
    Family("LlavaNextForConditionalGeneration", _seen(_text("mistral", WIDE), _CLIP), NESTED, head_dim=12),
    Family("LlavaOnevisionForConditionalGeneration", _seen(_text("qwen2"), _SIGLIP), NESTED),
    Family("InternVLForConditionalGeneration", _seen(_text("qwen3", WIDE)), NESTED, head_dim=12),
    Family(
        "PaliGemmaForConditionalGeneration",
        _seen(_text("gemma2", WIDE), _SIGLIP, projection_dim=48),
        NESTED,
        head_dim=12,
    ),
    Family(
        "MllamaForConditionalGeneration",
        _seen(
            TEXT | {"cross_attention_layers": [1, 4]},
            VISION
            | {
                "attention_heads": 4,
                "num_global_layers": 2,
                "supported_aspect_ratios": [[1, 1]],
                "intermediate_layers_indices": [0],
                "vision_output_dim": 64,
            },
        ),
        NESTED,
        layers=(0, 2, 3),
        skipped=(1, 4),
    ),
    Family(
        "Kosmos2ForConditionalGeneration",
        _seen(
            {
                "vocab_size": zoo.VOCABULARY,
                "embed_dim": 48,
                "layers": 5,
                "ffn_dim": 40,
                "attention_heads": 6,
                "max_position_embeddings": 64,
            },
            latent_query_num=4,
        ),
        "text_model.model.layers.{}.self_attn.out_proj",
        image_tokens=4,
        media=_placed_pixels,
    ),
    Family(
        "Blip2ForConditionalGeneration",
        _seen(_OPT, qformer_config=_QFORMER, num_query_tokens=4, image_token_index=zoo.IMAGE),
        "language_model.model.decoder.layers.{}.self_attn.out_proj",
        image_tokens=4,
        media=_pixels,
    ),
    Family(
        "InstructBlipForConditionalGeneration",
        _seen(_text("llama", WIDE), qformer_config=_QFORMER, num_query_tokens=4, image_token_index=zoo.IMAGE),
        "language_model.model.layers.{}.self_attn.o_proj",
        head_dim=12,
        image_tokens=4,
        media=_qformer_pixels,
    ),
    Family("AyaVisionForConditionalGeneration", _seen(_text("cohere2", WIDE), _SIGLIP), NESTED, head_dim=12),
    Family("Cohere2VisionForConditionalGeneration", _seen(_text("cohere2", WIDE), _SIGLIP), NESTED, head_dim=12),
)


REPRESENTATIVES = {
    "LlamaForCausalLM",
    "LlavaForConditionalGeneration",
    "OPTForCausalLM",  # no MLP of its own
    "Qwen3NextForCausalLM",  # blocks without heads
}
of_every_family = pytest.mark.parametrize(
    "family", matrix.members(FAMILIES, *(family for family in FAMILIES if str(family) in REPRESENTATIVES), label=str)
)


@of_every_family
def test_the_sites_of_a_family(family: Family):
    with torch.device("meta"):
        model = family.build()
    sites = find_sites(model)
    assert sites.geometry == tuple(
        (layer, family.names.format(layer), family.heads, family.head_dim) for layer in family.layers
    )
    assert sites.skipped == family.skipped


WITHOUT_MLP = {
    "Blip2ForConditionalGeneration",  # OPT
    "GraniteMoeHybridForCausalLM",  # two of them
    "Llama4ForCausalLM",  # over tokens of all rows at once
    "Llama4ForConditionalGeneration",
    "OPTForCausalLM",  # two matrices of the block itself
}


@of_every_family
def test_a_tiny_model_of_a_family_computes_with_its_sites(family: Family):
    """Identity changes nothing, zeros change something, and a padded row, edited, equals its own edited run."""
    tiny = zoo.build(lambda: zoo.Tiny(str(family), family.build(), family.image_tokens))
    model, sites = tiny.model, find_sites(tiny.model)
    texts = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14]]
    inputs = tiny.inputs(texts, "right")
    inputs |= family.media(inputs["input_ids"])
    try:
        model(**inputs)
    except AttributeError as error:
        # Llama 4 of transformers 5.24 reads a field of its output that its output does not have.
        if "image_outputs" not in str(error):
            raise
        pytest.skip(f"transformers {transformers.__version__} cannot run {family.architecture}: {error}")
    for stream in STREAMS:
        if stream == MLP and family.architecture in WITHOUT_MLP:
            with pytest.raises((DiscoveryError, HookError), match="edits another stream"):
                verify(model, sites, inputs, stream)
        else:
            verify(model, sites, inputs, stream)
    rng = torch.Generator().manual_seed(0)
    edit = Edit.replace(torch.randn(sites.shape, generator=rng), torch.rand(sites.shape[:2], generator=rng) < 0.5)
    with torch.no_grad(), applied(sites, edit), record(sites) as together:
        batch = model(**inputs).logits
    for row, text in enumerate(texts):
        single = tiny.inputs([text])
        single |= family.media(single["input_ids"])
        with torch.no_grad(), applied(sites, edit), record(sites) as alone:
            expected = model(**single).logits[0, -1]
        torch.testing.assert_close(batch[row, single["input_ids"].shape[1] - 1], expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(together.last()[row], alone.last()[0], rtol=1e-3, atol=1e-3)


class QwenVLAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 6, 8
        self.c_attn, self.c_proj = nn.Linear(48, 144), nn.Linear(48, 48, bias=False)
        self.attn_dropout = nn.Dropout(0.0)


class QwenVLVisualAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads_per_partition, self.hidden_size_per_attention_head = 4, 8
        self.in_proj, self.out_proj = nn.Linear(32, 96), nn.Linear(32, 32)


class QwenVLResampler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kv_proj, self.attn = nn.Linear(32, 48, bias=False), nn.MultiheadAttention(48, 6)


def qwen_vl() -> nn.Module:
    """The module tree of Qwen-VL's remote code: attention is ``transformer.h.*.attn``, the ViT is inside."""
    model = nn.Module()
    model.transformer = nn.Module()
    model.transformer.wte = nn.Embedding(zoo.VOCABULARY, 48)
    model.transformer.h = nn.ModuleList(nn.ModuleDict({"attn": QwenVLAttention()}) for _ in LAYERS)
    visual = model.transformer.visual = nn.Module()
    visual.transformer = nn.Module()
    visual.transformer.resblocks = nn.ModuleList(nn.ModuleDict({"attn": QwenVLVisualAttention()}) for _ in range(3))
    visual.attn_pool = QwenVLResampler()
    model.lm_head = nn.Linear(48, zoo.VOCABULARY)
    model.get_input_embeddings = lambda: model.transformer.wte
    return model


class Vila(nn.Module):
    """The module tree of VILA: a whole language model below ``llm``, and no embeddings of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = nn.Module()
        self.vision_tower.vision_tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION))
        self.llm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDE))
        self.mm_projector = nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 48), nn.GELU(), nn.Linear(48, 48))

    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("build", "names", "head_dim"),
    [
        (qwen_vl, "transformer.h.{}.attn.c_proj", 8),
        (Vila, "llm.model.layers.{}.self_attn.o_proj", 12),
    ],
)
def test_the_sites_of_models_outside_transformers(build, names, head_dim):
    with torch.device("meta"):
        sites = find_sites(build())
    assert sites.geometry == tuple((layer, names.format(layer), 6, head_dim) for layer in LAYERS)


def meta(architecture: str, options: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return Family(architecture, options, "").build()


BART = {
    "vocab_size": zoo.VOCABULARY,
    "d_model": 48,
    "encoder_layers": 3,
    "decoder_layers": 5,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
}


@pytest.mark.parametrize(
    ("architecture", "options", "decoder", "names", "head_dim"),
    [
        ("BartForConditionalGeneration", BART, "model.decoder", "model.decoder.layers.{}.self_attn.out_proj", 8),
        ("T5ForConditionalGeneration", _T5, "decoder", "decoder.block.{}.layer.0.SelfAttention.o", 12),
        (
            "Blip2ForConditionalGeneration",
            _seen(_T5, qformer_config=_QFORMER, num_query_tokens=4),
            "language_model.decoder",
            "language_model.decoder.block.{}.layer.0.SelfAttention.o",
            12,
        ),
        (
            "InstructBlipForConditionalGeneration",
            _seen(_T5, qformer_config=_QFORMER, num_query_tokens=4),
            "language_model.decoder",
            "language_model.decoder.block.{}.layer.0.SelfAttention.o",
            12,
        ),
    ],
)
def test_an_encoder_decoder_needs_the_decoder_named(architecture, options, decoder, names, head_dim):
    """Its self-attention counts, the attention to the encoder does not."""
    model = meta(architecture, options)
    with pytest.raises(DiscoveryError, match="has an encoder and a decoder: pass decoder="):
        find_sites(model)
    sites = find_sites(model, decoder)
    assert sites.geometry == tuple((layer, names.format(layer), 6, head_dim) for layer in LAYERS)


def test_the_named_decoder_of_an_encoder_decoder_computes_with_its_sites():
    tiny = zoo.build(lambda: zoo.Tiny("t5", Family("T5ForConditionalGeneration", _T5, "").build()))
    inputs = tiny.inputs([[5, 6, 7, 8], [9, 10]]) | {"decoder_input_ids": torch.tensor([[0, 11, 12], [0, 13, 14]])}
    sites = find_sites(tiny.model, "decoder")
    verify(tiny.model, sites, inputs)


def test_a_q_former_is_no_decoder():
    model = meta("Blip2ForConditionalGeneration", _seen(_OPT, qformer_config=_QFORMER, num_query_tokens=4))
    with pytest.raises(DiscoveryError, match=r"decoder='qformer\.encoder' holds no list of blocks with attention"):
        find_sites(model, "qformer.encoder")


def test_a_decoder_that_no_module_resembles_is_not_replaced_by_the_vision_tower():
    """GIT's text blocks have their output projection outside their attention; its ViT's look like a decoder's."""
    options = TEXT | {"num_hidden_layers": 5, "vision_config": VISION}
    with pytest.raises(DiscoveryError, match=r"3 blocks with attention.*configuration tells of 5: pass decoder="):
        find_sites(meta("GitForCausalLM", options))


def test_a_pruned_model_needs_its_decoder_named():
    model = meta("LlamaForCausalLM", WIDE)
    del model.model.layers[4]
    with pytest.raises(DiscoveryError, match=r"4 blocks .*tells of 5: pass decoder="):
        find_sites(model)
    assert find_sites(model, "model").shape == (4, 6, 12)


def test_linear_attention_is_skipped_and_reported(caplog):
    kinds = ["linear_attention", "full_attention", "linear_attention", "linear_attention", "full_attention"]
    model = meta("MiniMaxForCausalLM", WIDE | {"layer_types": kinds, "num_local_experts": 4})
    with caplog.at_level("INFO", "lmms_mtv"):
        sites = find_sites(model)
    assert [(site.layer, site.name) for site in sites] == [(i, SELF.format(i)) for i in (1, 4)]
    assert sites.skipped == (0, 2, 3)
    assert "left alone: [0, 2, 3]" in caplog.text
    model.config.layer_types = None  # from the modules alone
    assert find_sites(model).geometry == sites.geometry


def test_linear_attention_that_looks_like_any_other_is_known_from_the_configuration():
    model = meta("Qwen3ForCausalLM", WIDE)
    model.config.layer_types[1] = "linear_attention"
    for decoder in (None, "model"):
        sites = find_sites(model, decoder)
        assert [site.layer for site in sites] == [0, 2, 3, 4]
        assert sites.skipped == (1,)


class CrossAttention(QwenVLAttention):
    pass


def test_cross_attention_is_known_by_its_class_too():
    with torch.device("meta"):
        model = qwen_vl()
        for block in model.transformer.h[1:]:
            block["attn_to_image"] = CrossAttention()
        model.transformer.h[2]["attn"] = CrossAttention()
    sites = find_sites(model)
    assert [site.name for site in sites] == [f"transformer.h.{layer}.attn.c_proj" for layer in (0, 1, 3, 4)]
    assert sites.skipped == (2,)


def test_two_attentions_in_a_block_are_a_doubt():
    with torch.device("meta"):
        model = qwen_vl()
        model.transformer.h[3]["attn_too"] = QwenVLAttention()
    with pytest.raises(DiscoveryError, match=r"block 3 of transformer.*h\.3\.attn, h\.3\.attn_too.*pass decoder="):
        find_sites(model)


def test_attention_that_the_configuration_tells_of_has_to_be_found():
    model = meta("Qwen3ForCausalLM", WIDE)
    model.model.layers[2].self_attn = nn.Identity()
    with pytest.raises(DiscoveryError, match=r"says that block 2 of model has attention.*pass decoder="):
        find_sites(model)
    assert find_sites(model, "model").skipped == (2,)


def test_blocks_that_share_one_attention_are_refused():
    model = meta("LlamaForCausalLM", WIDE)
    model.model.layers[3].self_attn = model.model.layers[1].self_attn
    with pytest.raises(DiscoveryError, match=r"share one attention module.*decoder="):
        find_sites(model)


class Mixer(torch.nn.Module):
    """Attention under names that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.split3, self.merge = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)


def unknown_model(mixer: torch.nn.Module) -> torch.nn.Module:
    """Return a model with ``mixer`` in the first of its two blocks, in a list that is itself the decoder."""
    model = torch.nn.Module()
    model.words = torch.nn.Embedding(9, 8)
    model.trunk = torch.nn.Module()
    model.trunk.stages = torch.nn.ModuleList([torch.nn.Module(), torch.nn.Module()])
    for stage in model.trunk.stages:
        stage.mixer = mixer
    return model


@pytest.mark.parametrize("decoder", [None, "trunk", "trunk.stages"])
def test_blocks_that_are_not_recognised_are_shown(decoder):
    """The names that discovery lacks are in the message, and the page that says where to add them."""
    with pytest.raises(
        DiscoveryError, match=r"no list of blocks with attention.*0 has mixer \(Mixer, split3, merge\)"
    ) as e:
        find_sites(unknown_model(Mixer()), decoder)
    assert "docs/support-a-model.md" in str(e.value)


def test_unclear_heads_of_a_list_that_is_the_decoder_have_a_whole_name():
    attention = torch.nn.Module()
    attention.q_proj, attention.o_proj = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    model = unknown_model(Mixer())
    for stage in model.trunk.stages:
        stage.attention = attention
    with pytest.raises(DiscoveryError, match=r"the heads of trunk\.stages\.0\.attention\.o_proj are not clear.*_HEADS"):
        find_sites(model, "trunk.stages")
