"""A fingerprint of a model's weights that is computed in an instant."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from lmms_mtv.hooks.sites import Sites

_SHOWN = 16
"""The number of weights of each projection that count."""


def fingerprint(sites: Sites) -> str | None:
    """Return a digest of a few weights of each site's projection, 16 hexadecimal digits.

    Models with other weights have another fingerprint in practice, whatever their names. The digest is of numbers in
    bfloat16, so that it is the same in float32 and bfloat16. It is no proof that all weights are the same.

    Returns:
        The digest; None if weights are not in memory, or are not floating point, such as quantized weights.
    """
    weights = [w for site in sites if isinstance(w := getattr(site.module, "weight", None), Tensor)]
    if len(weights) < len(sites) or any(not w.is_floating_point() or w.device.type == "meta" for w in weights):
        return None
    # One copy from each device.
    parts: dict[torch.device, list[Tensor]] = {}
    for weight in weights:
        parts.setdefault(weight.device, []).append(weight.detach().flatten()[:_SHOWN].bfloat16())
    digest = hashlib.sha256()
    for group in parts.values():
        digest.update(torch.cat(group).cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]
