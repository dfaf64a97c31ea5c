"""CUDA graphs: the kernels of a function, captured once and run again without the function's Python code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class GraphPool:
    """Captured functions that share the memory of their intermediate results: they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def captured(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return a function that runs the kernels of ``function`` on the same memory.

        ``function`` runs twice, and only the second run is captured. All tensors that it reads have to stay where they
        are. Each call of the result overwrites the tensor of the call before.

        Raises:
            RuntimeError: the function waits for the device, or does something else that a graph cannot hold.
        """
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            # The first run makes handles and work spaces. It also finds what waits for the device: in a capture, such
            # a failure would leave torch's random numbers and allocator in the state of a capture.
            with torch.cuda.stream(stream), _errors_for_waiting():
                function()
            torch.cuda.current_stream().wait_stream(stream)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                result = function()

        def run() -> Tensor:
            graph.replay()
            return result

        return run


@contextmanager
def _errors_for_waiting() -> Iterator[None]:
    """Raise RuntimeError inside the block where a function of torch waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
