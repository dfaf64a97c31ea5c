"""The runner of a fit in lm-eval, which runs prompts through lm-eval's model ``hf``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from lmms_mtv.errors import ContextLengthError
from lmms_mtv.harness.lm.task import LmPrompt
from lmms_mtv.hooks import logits_unread
from lmms_mtv.models.generation import GREEDY, attention_of
from lmms_mtv.models.identity import adapter_of, identity, text_files_of
from lmms_mtv.models.prompts import Reply, blanks
from lmms_mtv.runtime.batches import BatchSize
from lmms_mtv.runtime.compat import unwrapped

# Arguments of hf that change neither tokens nor results, or that a card has elsewhere: weights, precision, adapter, and
# everything that shapes the text of a prompt. All other arguments are part of a recipe.
_NOT_IN_RECIPE: Final = (
    *("pretrained", "gguf_file", "revision", "dtype", "peft", "delta", "tokenizer", "attn_implementation"),
    *("device", "device_map", "parallelize", "max_memory_per_gpu", "max_cpu_memory", "offload_folder", "tp_plan"),
    *("batch_size", "max_batch_size", "logits_cache", "softmax_dtype", "truncation", "trust_remote_code", "backend"),
    *("think_end_token", "enable_thinking", "chat_template_args"),
)


class LmRunner:
    """The model ``hf`` of lm-eval for a fit, with the same tokens as in the evaluation, padded on the left.

    Args:
        lm: the model.
        arguments: the arguments of ``hf`` that the model was made with, by name.
    """

    def __init__(self, lm: Any, arguments: Mapping[str, Any]) -> None:
        self._lm = lm
        self.model: torch.nn.Module = unwrapped(lm.model)
        source = lm.pretrained if isinstance(lm.pretrained, str) else lm.model.name_or_path
        commit = getattr(lm.config, "_commit_hash", None)
        name, self.revision, text_files = identity(source, commit, arguments.get("gguf_file"))
        adapter = adapter_of(lm.peft) if lm.peft else None
        self.name = "+".join(filter(None, (name, lm.delta, adapter)))
        self.dtype = str(lm.model.dtype).removeprefix("torch.")
        self.device: torch.device = lm.device
        self.recipe = _recipe(lm, arguments, text_files)
        # An automatic batch size is a batch size of evaluation; activations do not depend on the batch size.
        self.batch_size = BatchSize(lm.batch_size if isinstance(lm.batch_size, int) else 1)

    def text_parts(self, prompt: LmPrompt) -> list[str]:
        """Return the context, and the texts before, in and after the target."""
        return [prompt.context, prompt.delimiter, prompt.target, prompt.ending]

    @torch.no_grad()
    def run(self, prompts: Sequence[LmPrompt]) -> None:
        """Run the first forward of a generation, which computes the positions of padded rows, without its logits."""
        with logits_unread(self.model):
            self._generated_ids(prompts, 1)

    @torch.no_grad()
    def greedy_replies(self, prompts: Sequence[LmPrompt], new_tokens: int, edited: bool) -> list[Reply]:
        """Return greedy answers, or an empty list if a target is scored.

        Args:
            prompts: a batch of prompts.
            new_tokens: the largest number of tokens of an answer.
            edited: True if an edit is applied; nothing here depends on it.
        """
        if any(prompt.scored for prompt in prompts):
            return []
        replies = []
        for prompt, ids in zip(prompts, self._generated_ids(prompts, new_tokens).tolist(), strict=True):
            end = self._lm.tokenizer.eos_token_id
            own = ids[: ids.index(end)] if end in ids else ids
            whole: str = self._lm.tok_decode(own)
            text = whole.split(prompt.ending)[0] if prompt.ending else whole
            replies.append(Reply(text, len(own) < len(ids) or text != whole))
        return replies

    def _generated_ids(self, prompts: Sequence[LmPrompt], new_tokens: int) -> Tensor:
        """Return the token ids that follow the prompts, [prompts, at most new_tokens]."""
        rows = [self._tokens(prompt)[0] for prompt in prompts]
        longest, pad = max(map(len, rows)), self._lm.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=self._lm.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self._lm.device)
        settings: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "num_beams": 1, **GREEDY}
        settings |= {"pad_token_id": pad, "use_cache": True, "cache_implementation": None}
        output: Tensor = self._lm.model.generate(input_ids=ids, attention_mask=mask, **settings)
        return output[:, longest:]

    def lead_ids(self, prompt: LmPrompt) -> list[int]:
        """Return the ids of the blank tokens between the context and :meth:`target_ids`."""
        ids = self._tokens(prompt)[1]
        return ids[: blanks(ids, self._lm.tok_decode)]

    def target_ids(self, prompt: LmPrompt) -> list[int]:
        """Return the ids of the scored tokens, or of a generated target and the end of an answer.

        The ids follow the context and :meth:`lead_ids`.
        """
        ids = self._tokens(prompt)[1]
        return ids[blanks(ids, self._lm.tok_decode) :]

    def _tokens(self, prompt: LmPrompt) -> tuple[list[int], list[int]]:
        """Return the token ids of the context and of the target, split as lm-eval splits them.

        Raises:
            ContextLengthError: lm-eval would cut the beginning of the prompt off.
        """
        before, after = self._scored(prompt) if prompt.scored else self._generated(prompt)
        if len(before) + len(after) > self._lm.max_length + 1:
            raise ContextLengthError(
                f"a prompt of {len(before)} tokens with a target of {len(after)} does not fit the "
                f"{self._lm.max_length} tokens of {self.name}: pass a smaller fit_shots= (or --num_fewshot)"
            )
        return before, after

    def _scored(self, prompt: LmPrompt) -> tuple[list[int], list[int]]:
        lm = self._lm
        if prompt.context:
            before, after = lm._encode_pair(prompt.context, prompt.continuation)
            return before, after
        after = lm.tok_encode(prompt.continuation, add_special_tokens=False)
        return (after[:1], after[1:]) if after[:1] == [lm.prefix_token_id] else ([lm.prefix_token_id], after)

    def _generated(self, prompt: LmPrompt) -> tuple[list[int], list[int]]:
        lm, answer = self._lm, prompt.continuation + prompt.ending
        before: list[int] = lm.tok_batch_encode([prompt.context])[0][0].tolist()
        whole: list[int] = lm.tok_batch_encode([prompt.context + answer])[0][0].tolist()
        if whole[: len(before)] == before:
            return before, whole[len(before) :]
        return before, lm.tok_encode(answer, add_special_tokens=False)


def _recipe(lm: Any, arguments: Mapping[str, Any], text_files: str | None) -> dict[str, Any]:
    """Return the settings that differ from the default of ``hf`` and change tokens or the results for tokens."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(HFLM).parameters.items()}
    recipe = {
        name: value
        for name, value in arguments.items()
        if name not in _NOT_IN_RECIPE and value is not None and value != defaults.get(name)
    }
    recipe |= attention_of(lm.model)
    tokenizer = arguments.get("tokenizer")
    if tokenizer is not None:
        text_files = text_files_of(str(tokenizer))
    if tokenizer is not None or text_files is not None:
        recipe["files"] = text_files or str(tokenizer)
    return recipe
