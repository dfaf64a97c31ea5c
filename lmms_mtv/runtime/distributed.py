"""Several processes that fit one vector together: who does what, and what they tell each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from lmms_mtv.errors import MtvError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run: number ``rank`` of ``count``. All of them make the same calls.

    One process alone communicates with nobody.
    """

    rank: int = 0
    count: int = 1

    @property
    def shard_slice(self) -> slice:
        """The share of this rank in any sequence: every ``count``-th element."""
        return slice(self.rank, None, self.count)

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """Return the elements of ``items`` that this rank works on; there may be none."""
        return items[self.shard_slice]

    def all_reduce(self, part: Tensor) -> Tensor:
        """Return the sum over all ranks of ``part``, which has the same shape and dtype on each, on the CPU."""
        if self.count == 1:
            return part.cpu()
        gathered = part.to(_device())
        distributed.all_reduce(gathered)
        return gathered.cpu()

    def broadcast(self, own: T | None, source: int) -> T:
        """Return what rank ``source`` gives as ``own``, on every rank. It is pickled: tensors in it are on the CPU."""
        box: list[Any] = [own]
        if self.count > 1:
            distributed.broadcast_object_list(box, src=source, device=_device())
        value: T = box[0]
        return value

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """A block that all ranks finish, or none: an exception in one of them raises in all.

        Without it the others would wait for a rank that has given up. Raises :class:`MtvError` on the others.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        failed = self.all_reduce(torch.tensor(float(error is not None)))
        if error is not None:
            raise error
        if failed:
            raise MtvError(f"{int(failed)} of {self.count} processes failed: their own messages say why")


def current() -> Ranks:
    """Return the ranks of this run: those of torch.distributed where ``accelerate launch`` or torchrun set it up."""
    if distributed.is_available() and distributed.is_initialized():
        return Ranks(distributed.get_rank(), distributed.get_world_size())
    return Ranks()


def _device() -> torch.device:
    """Return where collectives run: NCCL needs the GPU of this process, gloo takes the CPU."""
    if distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
