"""The identity of a checkpoint, from its contents. The folder and the spelling of its path do not count."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple

from loguru import logger
from torch import nn
from transformers.utils import cached_file

from lmms_mtv.data.official import checksum
from lmms_mtv.models import gguf
from lmms_mtv.pictures import EYES
from lmms_mtv.shapes import CHECKPOINT
from lmms_mtv.vectors.card import LOCAL

_WEIGHTS: Final = ("*.safetensors", "pytorch_model*.bin")
_ADAPTERS: Final = ("adapter_config.json", "adapter_model*.safetensors", "adapter_model*.bin")
_TEXT: Final = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template*", "*processor_config.json", "*.py"),
)
"""Files that decide how a text or an image is encoded, and code of the checkpoint."""

_BUNDLED: Final = {CHECKPOINT.resolve(): "lmms-mtv/tiny", EYES.resolve(): "lmms-mtv/pictures"}
"""Names of the bundled models by their folders."""

_IGNORED: Final = ("transformers_version", "name_or_path", "_name_or_path")
"""Entries of JSON files that change nothing."""

# Bytes: a size that takes seconds to read, and the size of a part that is read at a time.
_LONG, _PART = 10**9, 1 << 23


class Identity(NamedTuple):
    """The identity of a loaded model.

    Attributes:
        name: the name of the model.
        revision: the revision; None if unknown.
        text_files: the digest of the text files, see :func:`text_files_of`; None if the revision covers these files.
    """

    name: str
    revision: str | None
    text_files: str | None


def identity(source: str, commit: str | None, gguf_file: str | None = None) -> Identity:
    """Return the identity of a loaded model.

    Args:
        source: a folder, or a name on the hub.
        commit: the commit of the hub that was loaded, if there is one.
        gguf_file: the GGUF file in ``source`` that was loaded. The file has weights and tokenizer, and counts alone.
    """
    if gguf_file is None:
        revision = revision_of(source, commit)
        if (bundled := _BUNDLED.get(Path(source).resolve())) is not None:
            return Identity(bundled, revision, None)
        return Identity(name_of(source, revision), revision, text_files_of(source))
    local = Path(source).is_dir()
    path = Path(source, gguf_file) if local else cached_file(source, gguf_file, revision=commit)
    digest = checksum(Path(str(path)), "sha256")
    named = gguf.packaged_name(digest) or (LOCAL + digest[:16] if local else source)
    return Identity(named, f"sha256:{digest[:16]}", None)


def identity_of(model: nn.Module) -> Identity:
    """Return the identity of a model of transformers that is in memory.

    A model that was loaded from the hub or from a folder has the identity of what was loaded: weights that were changed
    since then do not count. Any other model has a digest of its weights.

    Args:
        model: the model.
    """
    loaded: Any = model
    source = str(getattr(loaded, "name_or_path", ""))
    commit = getattr(loaded.config, "_commit_hash", None)
    if source and (commit is not None or Path(source).is_dir()):
        return identity(source, commit)
    digest = hashlib.sha256()
    for name, tensor in sorted(loaded.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    revision = f"sha256:{digest.hexdigest()[:16]}"
    return Identity(source or LOCAL + revision.removeprefix("sha256:"), revision, None)


def revision_of(source: str, commit: str | None) -> str | None:
    """Return the revision of a model: the commit on the hub, or for a folder a digest of its configuration and weights.

    All weights are read.

    Args:
        source: a folder, or a name on the hub.
        commit: the commit of the hub that was loaded, if there is one.

    Returns:
        The revision; None if ``source`` is no folder and there is no commit.
    """
    folder = Path(source)
    if commit is not None or not folder.is_dir():
        return commit
    weights = (path for pattern in _WEIGHTS for path in folder.glob(pattern))
    return _digest(sorted(path for path in [folder / "config.json", *weights] if path.is_file()), folder)


def adapter_of(source: str) -> str:
    """Return a digest of the settings and weights of a PEFT adapter in a folder; a name on the hub stays unchanged."""
    folder = Path(source)
    files = sorted({path for pattern in _ADAPTERS for path in folder.glob(pattern)}) if folder.is_dir() else []
    return _digest(files, folder) if files else source


def name_of(source: str, revision: str | None) -> str:
    """Return the name of a model: the name on the hub, or for a folder its digest, so that a folder may be moved.

    Args:
        source: a folder, or a name on the hub.
        revision: the revision, see :func:`revision_of`.
    """
    if revision is not None and Path(source).is_dir():
        return LOCAL + revision.removeprefix("sha256:")
    return source


def text_files_of(source: str) -> str | None:
    """Return a digest of the tokenizer, the processor, their templates and the code in a folder.

    JSON files count by their entries, not by their layout. The result is None if ``source`` is no folder: the commit of
    the hub, which is the revision, identifies these files too.
    """
    folder = Path(source)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _TEXT for path in folder.glob(pattern) if path.is_file()}):
        digest.update(path.name.encode() + b"\0" + _content(path))
    return f"sha256:{digest.hexdigest()[:16]}"


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix != ".json":
        return content
    try:
        entries = json.loads(content)
    except ValueError:
        return content
    if isinstance(entries, dict):
        entries = {name: value for name, value in entries.items() if name not in _IGNORED}
    return json.dumps(entries, sort_keys=True).encode()


def _digest(files: Iterable[Path], folder: Path) -> str:
    files = list(files)
    size = sum(path.stat().st_size for path in files)
    if size > _LONG:
        logger.info(f"reading the {size / 1e9:.1f} GB of {folder} once, to tell its weights from any others")
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            while part := file.read(_PART):
                digest.update(part)
    return f"sha256:{digest.hexdigest()[:16]}"
