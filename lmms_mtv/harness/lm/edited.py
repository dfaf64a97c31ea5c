"""lm-eval's model ``hf``, whose answers and scores are edited by a task vector."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from lmms_mtv.errors import HookError
from lmms_mtv.harness.lm.scoring import Request, Row, reordered, rounds_of_distinct_inputs, rows_of
from lmms_mtv.hooks import Sites, applied
from lmms_mtv.vectors import TaskVector


class EditedHFLM(HFLM):  # type: ignore[misc]
    """lm-eval's model ``hf``. Inside :meth:`editing` its forwards are edited where they predict scored tokens."""

    _sites: Sites
    _edit: TaskVector | None = None
    # The rows that the next forwards have, in their order.
    _expected: deque[Row]

    @contextmanager
    def editing(self, vector: TaskVector | None) -> Iterator[None]:
        """Edit the forwards inside the block; with None, or a vector without edits, leave the forwards unedited."""
        before, expected = self._edit, self._expected
        self._edit, self._expected = vector if vector is not None and vector.edits else None, deque()
        try:
            yield
        finally:
            self._edit, self._expected = before, expected

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        if self._edit is None:
            plain: Tensor = super()._model_generate(context, max_length, stop, **settings)
            return plain
        with applied(self._sites, self._edit) as fired:
            output: Tensor = super()._model_generate(context, max_length, stop, **settings)
        _check_edited(fired.count)
        return output

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        score = super()._loglikelihood_tokens
        if self._edit is None:
            plain: list[tuple[float, bool]] = score(requests, disable_tqdm, override_bs)
            return plain
        answers: dict[int, tuple[float, bool]] = {}
        for indices in rounds_of_distinct_inputs(requests) if self.logits_cache else [range(len(requests))]:
            own = [requests[index] for index in indices]
            self._expected = deque(rows_of(own, self.max_length, self.logits_cache))
            answers |= dict(zip(indices, score(own, disable_tqdm, override_bs), strict=True))
            if self._expected:
                raise reordered()
        return [answers[index] for index in range(len(requests))]

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        if self._edit is None:
            plain: Tensor = super()._model_call(inps, attn_mask, labels)
            return plain
        if len(self._expected) < len(inps):
            raise reordered()
        rows = [self._expected.popleft() for _ in range(len(inps))]
        padded = torch.zeros_like(inps)
        real = torch.zeros_like(inps)
        for index, row in enumerate(rows):
            fitting = row.tokens[: inps.shape[1]]
            padded[index, : len(fitting)] = torch.tensor(fitting, device=inps.device)
            real[index, : len(row.tokens)] = 1
        if not torch.equal(padded, inps) or max(len(row.tokens) for row in rows) != inps.shape[1]:
            raise reordered()
        # The rows are padded on the right and no mask is passed on, so the edit needs the positions.
        tail = torch.tensor([row.scored for row in rows], device=inps.device)
        with applied(self._sites, self._edit, tail=tail, real=real) as fired:
            logits: Tensor = super()._model_call(inps, attn_mask, labels)
        _check_edited(fired.count)
        return logits

    def _detect_batch_size(self, requests: Sequence[Request] | None = None, pos: int = 0) -> int:
        with self.editing(None):
            rows: int = super()._detect_batch_size(requests, pos)
            return rows


def _check_edited(count: int) -> None:
    if count == 0:
        raise HookError(
            "the edit never ran while the model answered, so that the answers are those of the plain model: pass "
            "decoder= with the module that its forward calls"
        )
