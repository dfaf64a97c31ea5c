"""Finding the heads of a model, reading them, changing them, and replaying the last token of a prompt."""

from lmms_mtv.hooks.edit import Fired, Recording, applied, record, verify
from lmms_mtv.hooks.prefill import Prefill, ReplayError, capture
from lmms_mtv.hooks.sites import Site, Sites, find_sites
from lmms_mtv.hooks.watch import Watch, watched

__all__ = [
    "Fired",
    "Prefill",
    "Recording",
    "ReplayError",
    "Site",
    "Sites",
    "Watch",
    "applied",
    "capture",
    "find_sites",
    "record",
    "verify",
    "watched",
]
