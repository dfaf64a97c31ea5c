"""A record of a model that other code runs: the prompts that the model saw, and the first error inside the model."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lmms_mtv.hooks.positions import cached_tokens, mask_argument, tells
from lmms_mtv.hooks.sites import Sites
from lmms_mtv.hooks.temporary import after, before
from lmms_mtv.runtime.compat import given_cache, naming, uncompiled

_IMAGE_TOKENS = ("image_token_id", "image_token_index")


class Watch:
    """The record of a :func:`watched` block.

    Attributes:
        forwards: number of completed forwards of the decoder.
        prompts: number of prompts, which are the rows of completed forwards that did not continue from a cache.
        tokens: number of real tokens of the prompts; all tokens, if neither the decoder's mask nor the model's mask
            tells which tokens are real.
        images: number of tokens of the prompts that stand for images; None if the model does not tell which these are.
        cached: False if a forward of prompts kept no cache.
        error: the first exception that left a forward, also if other code caught the exception later.
    """

    def __init__(self) -> None:
        self.forwards = 0
        self.prompts = 0
        self.tokens = 0
        self.images: int | None = 0
        self.cached = True
        self.error: Exception | None = None

    def _failed(self, output: Any) -> bool:
        """Return whether the forward with this output raised; keep the first exception."""
        raised = sys.exc_info()[1] if output is None else None
        if isinstance(raised, Exception):
            self.error = self.error or raised
        return raised is not None

    def _saw(self, inputs: Mapping[str, Any], images: int | None) -> None:
        ids, cache, mask = inputs.get("input_ids"), given_cache(inputs), inputs.get("attention_mask")
        ids = ids if ids is not None else inputs["inputs_embeds"]
        rows, length = ids.shape[:2]
        self.prompts += rows
        self.tokens += int(mask.sum()) if isinstance(mask, Tensor) and mask.dim() == 2 else rows * length
        self.images = None if self.images is None or images is None else self.images + images
        self.cached &= cache is not None or bool(inputs.get("use_cache"))


class ForwardCounter:
    """A count of completed forwards of a decoder. The hook is registered inside :meth:`counting` blocks only."""

    def __init__(self, sites: Sites) -> None:
        self.count = 0
        self._sites = sites
        self._is_counting = False

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the forwards inside the block. Nested blocks count each forward once."""
        if self._is_counting:
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(uncompiled(self._sites.around))
            stack.enter_context(after(self._sites.decoder, self._completed))
            self._is_counting = True
            stack.callback(setattr, self, "_is_counting", False)
            yield

    def _completed(self, *_: Any) -> None:
        self.count += 1


@contextmanager
def watched(model: nn.Module, sites: Sites) -> Iterator[Watch]:
    """Watch every forward of a model and of its decoder inside the block, without changing anything.

    Args:
        model: the model that other code calls.
        sites: the attention sites of the model.

    Yields:
        The record, which grows with every forward.
    """
    watch = Watch()
    to_decoder, to_model = naming(sites.decoder), naming(model)
    given_to_model = mask_argument(model)
    outer: dict[str, Any] = {}
    prompt: dict[str, Any] = {}

    def entered(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        outer["attention_mask"] = given_to_model(args, kwargs)
        outer["images"] = _image_tokens(model, to_model(args, kwargs).get("input_ids"))

    def begins(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        prompt.clear()
        inputs = to_decoder(args, kwargs)
        if not cached_tokens(given_cache(inputs)):
            prompt.update(inputs if tells(inputs.get("attention_mask")) else inputs | outer)

    def ends(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not watch._failed(output):
            watch.forwards += 1
            if prompt:
                watch._saw(prompt, outer.get("images"))
        prompt.clear()

    def outside(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outer.clear()
        watch._failed(output)

    with ExitStack() as stack:
        stack.enter_context(uncompiled(sites.around))
        stack.enter_context(before(model, entered))
        stack.enter_context(before(sites.decoder, begins))
        stack.enter_context(after(sites.decoder, ends, always_call=True))
        stack.enter_context(after(model, outside, always_call=True))
        yield watch


def _image_tokens(model: nn.Module, ids: Any) -> int | None:
    """Return the number of tokens that stand for images: 0 in a text model, None if these tokens are unknown."""
    config = getattr(model, "config", None)
    image_tokens = [token for name in _IMAGE_TOKENS if isinstance(token := getattr(config, name, None), int)]
    if not isinstance(ids, Tensor) or (not image_tokens and hasattr(config, "vision_config")):
        return None
    return sum(int((ids == image_token).sum()) for image_token in image_tokens[:1])
