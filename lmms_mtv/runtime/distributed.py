"""Several processes that fit one vector together: the share of each process, and their communication."""

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
    """The rank of this process in a run. All processes of the run make the same calls.

    A single process does not communicate.

    Attributes:
        rank: number of this process, from 0.
        count: number of processes.
    """

    rank: int = 0
    count: int = 1

    @property
    def shard_slice(self) -> slice:
        """Slice of any sequence that is the share of this rank: every ``count``-th element."""
        return slice(self.rank, None, self.count)

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """Return the elements of ``items`` for this rank; there may be no elements."""
        return items[self.shard_slice]

    def all_reduce(self, part: Tensor) -> Tensor:
        """Return the sum of ``part`` over all ranks, on the CPU. Shape and dtype are the same on each rank."""
        if self.count == 1:
            return part.cpu()
        gathered = part.to(_device())
        distributed.all_reduce(gathered)
        return gathered.cpu()

    def broadcast(self, own: T | None, source: int) -> T:
        """Return the value of one rank on every rank.

        Args:
            own: the value, which is used on rank ``source`` only. It is pickled, so its tensors must be on the CPU.
            source: the rank whose value is returned.
        """
        box: list[Any] = [own]
        if self.count > 1:
            distributed.broadcast_object_list(box, src=source, device=_device())
        value: T = box[0]
        return value

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """Raise on all ranks if the block raises on one rank, since the others would wait for that rank forever.

        Raises:
            MtvError: the block raised on other ranks only. A rank whose block raised gets the exception of its block.
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
    """Return the ranks of torch.distributed if ``accelerate launch`` or torchrun set it up, else a single rank."""
    if distributed.is_available() and distributed.is_initialized():
        return Ranks(distributed.get_rank(), distributed.get_world_size())
    return Ranks()


def _device() -> torch.device:
    """Return the device of collectives: NCCL needs the GPU of this process, gloo takes the CPU."""
    if distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
