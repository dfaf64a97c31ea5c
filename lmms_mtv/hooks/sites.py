"""Attention sites: the places of a model's attention heads, found from its modules and not from its name.

The heads are still separate at the input of the attention's output projection. A site is such a projection. Each block
of the language decoder with softmax self-attention has one site.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple

import torch
from torch import nn

from lmms_mtv.errors import DiscoveryError
from lmms_mtv.vectors import Geometry

logger = logging.getLogger(__name__)

# A name or class with one of these texts may be attention.
_ATTENTION: Final = ("att",)
_PROJECTION: Final = ("o_proj", "out_proj", "c_proj", "dense", "wo", "proj", "o")
_HEAD_DIM: Final = ("v_head_dim", "head_dim", "head_size", "attention_head_size", "hidden_size_per_attention_head")
_HEADS: Final = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_INPUT: Final = re.compile(r"(^|_)(q|k|v|qkv|query|key|value|attn|pack|kv)(_|$)|qkv", re.IGNORECASE)
CROSS: Final = re.compile(r"cross|enc(oder)?_?(dec|att)", re.IGNORECASE)
_RECURRENT: Final = re.compile(r"conv1d|^A_log$|decay|slope")
_HIDDEN: Final = ("hidden_size", "n_embd", "d_model")
_BLOCKS: Final = ("decoder_layers", "num_hidden_layers", "n_layer", "n_layers", "num_layers")


class Site(NamedTuple):
    """The attention output projection of one block.

    Attributes:
        layer: index of the block among all blocks.
        name: dotted name of the projection.
        module: the projection.
        heads: number of heads.
        head_dim: size of a head.
        attention: dotted name and module of the self-attention that has the projection.
        block: dotted name and module of the block that has the self-attention.
    """

    layer: int
    name: str
    module: nn.Module
    heads: int
    head_dim: int
    attention: tuple[str, nn.Module]
    block: tuple[str, nn.Module]


@dataclass(frozen=True)
class Sites:
    """The attention sites of a model, in the order of its blocks.

    Attributes:
        sites: one site for each block with softmax self-attention.
        decoder: the module that runs the blocks. Its ``forward`` receives the attention mask of the tokens, which tells
            hooks which positions of a batch are real. If the decoder receives another mask, hooks take the mask that
            ``model`` receives.
        model: the whole model.
        skipped: indices of the blocks without softmax self-attention.
    """

    sites: tuple[Site, ...]
    decoder: nn.Module
    model: nn.Module
    skipped: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __getitem__(self, index: int) -> Site:
        return self.sites[index]

    @cached_property
    def around(self) -> tuple[nn.Module, ...]:
        """The modules that a forward calls up to the sites: the model, the decoder, all that hold a site, the sites."""
        names = {""}
        for site in self:
            parts = site.name.split(".")
            names |= {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
        holders = [module for name, module in self.model.named_modules() if name in names]
        return (*holders, *(() if self.decoder in holders else (self.decoder,)))

    @property
    def geometry(self) -> Geometry:
        """The geometry of a vector that fits: block index, name, number of heads and size of a head, for each site."""
        return tuple((site.layer, site.name, site.heads, site.head_dim) for site in self)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of sites, heads of a site, size of a head."""
        return len(self), self[0].heads, self[0].head_dim

    @property
    def width(self) -> int:
        """Width of the hidden states, which is the width of the output projections' outputs.

        Raises:
            DiscoveryError: neither the first projection nor the configuration has the width.
        """
        width = out_features(self[0].module) or _first_integer(text_config(self.model), _HIDDEN)
        if width is None:
            raise DiscoveryError(f"{self[0].name} does not say how wide its output is: only its heads can be edited")
        return width


def find_sites(model: nn.Module, decoder: str | None = None) -> Sites:
    """Return the attention sites of a model's language decoder.

    Only softmax self-attention over the tokens counts. Blocks without softmax self-attention (recurrent, convolutional,
    cross-attention) are left out and logged. The other blocks keep their index among all blocks. Cross-attention inside
    a block is ignored.

    Args:
        model: the model; it may be on the meta device, without weights.
        decoder: dotted name, inside ``model``, of the module that holds the decoder's list of blocks. The name is only
            needed if the modules do not tell which module that is.

    Raises:
        DiscoveryError: the model has no module ``decoder``; there are no candidates or several equally good candidates;
            the model has an encoder and a decoder; the blocks contradict the configuration; blocks share an attention
            module; or the number or size of the heads is unclear or differs between blocks. The message names the
            argument that helps.
    """
    name, owner, blocks = _named_decoder(model, decoder) if decoder is not None else _search(model)
    config = text_config(owner) or text_config(model)
    hidden, kinds = _first_integer(config, _HIDDEN), _kinds(config, len(blocks))
    sites, skipped = [], []
    for layer, ((block_name, block), kind) in enumerate(zip(blocks, kinds, strict=True)):
        attentions = [] if kind is False else _attentions(block, hidden)
        if not attentions:
            if kind and decoder is None:
                raise DiscoveryError(
                    f"the configuration says that block {layer} of {name or 'the model'} has attention, but no module "
                    "in it looks like one: pass decoder= if its heads are to be left alone"
                )
            skipped.append(layer)
            continue
        if len(attentions) > 1:
            candidates = ", ".join(f"{block_name}.{part}" for part, _, _ in attentions)
            raise DiscoveryError(
                f"block {layer} of {name or 'the model'} has several attention modules ({candidates}) and it is not "
                "clear whose heads are meant: pass decoder= with the name of a module whose blocks have one"
            )
        part_name, attention, projection = attentions[0]
        module = getattr(attention, projection)
        around = ".".join(filter(None, (name, block_name)))
        inner = ".".join(filter(None, (around, part_name)))
        full = f"{inner}.{projection}"
        sites.append(Site(layer, full, module, *_heads(attention, module, full), (inner, attention), (around, block)))
    if not sites:
        raise DiscoveryError(f"no attention output projection in the blocks of {name or 'the model'}: pass decoder=")
    if skipped:
        logger.info("blocks without softmax self-attention are left alone: %s", skipped)
    _make_sure(sites)
    return Sites(tuple(sites), owner, model, tuple(skipped))


def _make_sure(sites: list[Site]) -> None:
    """Raise :class:`DiscoveryError` unless projections are distinct and have equal numbers and sizes of heads."""
    if len({id(site.module) for site in sites}) < len(sites):
        raise DiscoveryError(
            f"blocks share one attention module ({sites[0].name}, ...), whose runs cannot be told apart: pass decoder= "
            "with the name of a module whose blocks have their own"
        )
    if len({(site.heads, site.head_dim) for site in sites}) > 1:
        raise DiscoveryError(
            "the blocks of the decoder differ in number or size of heads, which a vector cannot have: "
            + ", ".join(f"{site.name} {site.heads} x {site.head_dim}" for site in sites)
            + "; pass decoder= if this is not the language decoder"
        )


def in_features(module: nn.Module) -> int:
    """Return the width of a projection's input, for a Linear, a quantised Linear or a Conv1D (weight [in, out]).

    Raises:
        DiscoveryError: the module has neither ``in_features`` nor a matrix as its weight.
    """
    if isinstance(width := getattr(module, "in_features", None), int):
        return width
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dim() == 2:
        return weight.shape[0] if hasattr(module, "nf") else weight.shape[1]
    raise DiscoveryError(f"{type(module).__name__} has neither in_features nor a matrix for a weight: pass decoder=")


Blocks = list[tuple[str, nn.Module]]


def _named_decoder(model: nn.Module, name: str) -> tuple[str, nn.Module, Blocks]:
    try:
        owner = model.get_submodule(name)
    except AttributeError as error:
        raise DiscoveryError(f"decoder={name!r} is no module of {type(model).__name__}: {error}") from None
    lists = _block_lists(owner)
    if not lists:
        raise DiscoveryError(
            f"decoder={name!r} holds no list of blocks with attention: {_first_block(owner)}; "
            "docs/support-a-model.md says which names are known and how to add others"
        )
    return name, owner, _nearest(name, lists)


def _search(model: nn.Module) -> tuple[str, nn.Module, Blocks]:
    """Return name, module and blocks of the innermost module around the token embedding with blocks with attention."""
    if any(getattr(config, "is_encoder_decoder", False) for config in (_config(model), text_config(model))):
        raise DiscoveryError(
            f"{type(model).__name__} has an encoder and a decoder: pass decoder= with the dotted name of the module "
            "that holds the decoder's blocks"
        )
    embedding = _token_embedding(model)
    path = next((name for name, module in model.named_modules() if module is embedding), "")
    while path:
        path = path.rpartition(".")[0]
        owner = model.get_submodule(path)
        if lists := _block_lists(owner):
            blocks = _nearest(path, lists)
            count = _first_integer(text_config(owner) or text_config(model), _BLOCKS)
            if count not in (None, len(blocks)):
                raise DiscoveryError(
                    f"{path or 'the model'} has {len(blocks)} blocks with attention, but the configuration tells of "
                    f"{count}: pass decoder= with the dotted name of the module that holds the decoder's blocks"
                )
            return path, owner, blocks
    raise DiscoveryError(
        f"no list of blocks with attention next to the token embedding of {type(model).__name__}: "
        f"{_first_block(model)}. If its attention is among them, add the names as docs/support-a-model.md says; "
        "else pass decoder= with the dotted name of the module that holds the decoder's blocks"
    )


def _first_block(owner: nn.Module) -> str:
    """Return in words the modules of the first block of the longest list of modules in ``owner``."""
    lists = {
        name: module for name, module in owner.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    if not lists:
        return f"{type(owner).__name__} holds no nn.ModuleList"
    name = max(lists, key=lambda name: len(lists[name]))
    inside = [
        f"{child} ({', '.join([type(module).__name__, *dict(module.named_children())])})"
        for child, module in lists[name][0].named_children()
    ]
    return f"{f'{name}.0'.removeprefix('.')} has {', '.join(inside) or 'no modules'}"


def _nearest(name: str, lists: Mapping[str, nn.ModuleList]) -> Blocks:
    depth = min(key.count(".") for key in lists)
    nearest = [key for key in lists if key.count(".") == depth]
    if len(nearest) > 1:
        raise DiscoveryError(
            f"{name or 'the model'} holds several lists of blocks with attention ({', '.join(nearest)}): pass decoder= "
            "with the dotted name of the module that holds only the decoder's"
        )
    around = f"{nearest[0]}." if nearest[0] else ""
    return [(f"{around}{index}", block) for index, block in lists[nearest[0]].named_children()]


def _block_lists(owner: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the lists of blocks with attention inside ``owner``, without lists that are inside another list."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in owner.named_modules():
        inside = any(name.startswith(outer + ".") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside and any(map(_has_attention, module)):
            lists[name] = module
    return lists


def _has_attention(block: nn.Module) -> bool:
    return bool(_attentions(block, None))


def _attentions(block: nn.Module, hidden: int | None) -> list[tuple[str, nn.Module, str]]:
    """Return the softmax self-attention modules of a block: dotted name, module, name of its output projection."""
    return [
        (name, module, projection)
        for name, module in block.named_modules()
        if (projection := _projection(name, module, hidden)) is not None
    ]


def _projection(name: str, module: nn.Module, hidden: int | None) -> str | None:
    """Return the name of the output projection if ``module`` is softmax self-attention, else None."""
    own_name, kind = name.rpartition(".")[2], type(module).__name__
    children = dict(module.named_children())
    if not any(text in f"{own_name} {kind}".lower() for text in _ATTENTION) or not any(map(_INPUT.search, children)):
        return None
    if CROSS.search(own_name) or "cross" in kind.lower():
        return None
    if any(map(_RECURRENT.search, (*children, *module._parameters, *module._buffers))):
        return None
    for projection in _PROJECTION:
        if projection in children and (hidden is None or out_features(children[projection]) in (hidden, None)):
            return projection
    return None


def out_features(module: nn.Module) -> int | None:
    """Return the width of a projection's output, or None if the module has no attribute with the width."""
    for attribute in ("out_features", "nf"):
        if isinstance(width := getattr(module, attribute, None), int):
            return width
    return None


def _token_embedding(model: nn.Module) -> nn.Module:
    getter = getattr(model, "get_input_embeddings", None)
    if callable(getter):
        try:
            embedding = getter()
        except (NotImplementedError, AttributeError):
            embedding = None
        if isinstance(embedding, nn.Module):
            return embedding
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if not tables:
        raise DiscoveryError(f"{type(model).__name__} has no token embedding to find its decoder by: pass decoder=")
    return max(tables, key=lambda table: table.num_embeddings)


def _config(model: nn.Module) -> Any:
    return getattr(model, "config", None)


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the language model, or the model's whole configuration if there is only one."""
    getter = getattr(_config(model), "get_text_config", None)
    return getter() if callable(getter) else _config(model)


def _kinds(config: Any, blocks: int) -> list[bool | None]:
    """Return whether each block has softmax self-attention by the configuration, None where this is unknown."""
    kinds = getattr(config, "layer_types", None)
    if not isinstance(kinds, (list, tuple)) or len(kinds) != blocks:
        return [None] * blocks
    return ["linear" not in kind if kind.endswith("attention") else None for kind in kinds]


def _heads(attention: nn.Module, module: nn.Module, name: str) -> tuple[int, int]:
    """Return number and size of the heads.

    The attention module has the size of a head. If not, the first number of heads, in the module or in its
    configuration, determines the size. All these numbers then cross-check the result.
    """
    width = in_features(module)
    size = _first_integer(attention, _HEAD_DIM)
    counts = list(_integers((attention, getattr(attention, "config", None)), _HEADS))
    if size is None and counts:
        size = width // counts[0]
    if size is None or size < 1 or width % size or (counts and width // size not in counts):
        raise DiscoveryError(
            f"the heads of {name} are not clear: its input is {width} wide, the size of a head is {size}, the number "
            f"of heads is said to be {counts or 'nothing'}: add the attribute of the attention that has one of them to "
            "_HEADS or _HEAD_DIM (docs/support-a-model.md), or pass decoder= if this is not the language decoder"
        )
    return width // size, size


def _first_integer(holder: Any, names: Iterable[str]) -> int | None:
    return next(_integers((holder,), names), None)


def _integers(holders: Iterable[Any], names: Iterable[str]) -> Iterator[int]:
    names = tuple(names)
    for holder in holders:
        for name in names:
            if isinstance(number := getattr(holder, name, None), int):
                yield number
