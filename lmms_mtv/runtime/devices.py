"""The device that an argument names, and the device of a model."""

from __future__ import annotations

from typing import Final

import torch
from torch import nn

from lmms_mtv.errors import ArgumentError

_MEND: Final = "pass device=cpu, or leave device= out"


def check_device(name: object) -> None:
    """Check that torch can use the device ``name`` of this machine; None is any device.

    Raises:
        ArgumentError: torch knows no such device, or the machine has none.
    """
    if name is None:
        return
    try:
        device = torch.device(str(name))
    except RuntimeError as error:
        raise ArgumentError(f"device={name} is no device of torch, expected cpu, cuda, cuda:0 or mps") from error
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ArgumentError(f"device={name}: torch {torch.__version__} finds no MPS device: {_MEND}")
    check_cuda(name)


def check_cuda(name: object) -> None:
    """Check that the machine has the device ``name``, if that is a device of CUDA; other names are not checked.

    Raises:
        ArgumentError: the machine has no such device.
    """
    if not str(name).startswith("cuda"):
        return
    if not torch.cuda.is_available():
        built = "is built without CUDA" if torch.version.cuda is None else "finds no GPU"
        raise ArgumentError(f"device={name}: torch {torch.__version__} {built}: {_MEND}")
    index, count = str(name).partition(":")[2], torch.cuda.device_count()
    if index.isdigit() and int(index) >= count:
        raise ArgumentError(f"device={name}: this machine has {count} GPUs, counted from 0: {_MEND}")


def only_device(model: nn.Module) -> torch.device | None:
    """Return the device of all weights of ``model``; None for several devices, or no weights."""
    devices = {parameter.device for parameter in model.parameters()}
    return devices.pop() if len(devices) == 1 else None
