"""Hooks that find, read and change the heads and other streams of a model, and replays of a prompt's last token."""

from lmms_mtv.hooks.checkpointing import checkpointed
from lmms_mtv.hooks.edit import Fired, Recording, applied, record, verify
from lmms_mtv.hooks.output_layer import OutputInputs, inputs_as_logits, logits_unread
from lmms_mtv.hooks.prefill import Prefill, ReplayError, capture
from lmms_mtv.hooks.sites import Site, Sites, find_sites
from lmms_mtv.hooks.streams import HookPoint, attention_outputs, hook_points, receivers, shape
from lmms_mtv.hooks.watch import ForwardCounter, Watch, watched

__all__ = [
    "Fired",
    "ForwardCounter",
    "HookPoint",
    "OutputInputs",
    "Prefill",
    "Recording",
    "ReplayError",
    "Site",
    "Sites",
    "Watch",
    "applied",
    "attention_outputs",
    "capture",
    "checkpointed",
    "find_sites",
    "hook_points",
    "inputs_as_logits",
    "logits_unread",
    "receivers",
    "record",
    "shape",
    "verify",
    "watched",
]
