"""Vectors on the Hugging Face hub: model repositories with a vector's file and page."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lmms_mtv.errors import ArgumentError, HubError, VectorFileError
from lmms_mtv.runtime import tensor_files
from lmms_mtv.vectors import TaskVector
from lmms_mtv.vectors.library import page
from lmms_mtv.vectors.library.place import FILE, PAGE
from lmms_mtv.vectors.library.reference import PREFIX

_NAME: Final = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([^@\s]+))?", re.ASCII)

# The error of a client without a connection. The class is httpx's, or that of another library in other versions.
_TRANSPORT: Final[type[BaseException]] = HfHubHTTPError.__bases__[0]


def pushed(path: Path, repository: str, *, private: bool = False) -> str:
    """Upload a vector's file, unchanged, and its page in one commit, and return the address of the repository.

    Args:
        path: the vector's file.
        repository: ``owner/name``; the repository is created if it does not exist.
        private: True to create a private repository.

    Raises:
        HubError: the hub does not accept the upload.
        ArgumentError: ``repository`` is no such name, or has a revision.
        VectorFileError: the file is not intact.
    """
    name, revision = parsed(repository)
    if revision is not None:
        raise ArgumentError(f"a vector is pushed to the newest revision: leave @{revision} out of {repository!r}")
    vector = TaskVector.load(path)
    described = page.of(vector, name).encode("utf-8", "replace")
    operations = [CommitOperationAdd(FILE, path), CommitOperationAdd(PAGE, described)]
    with _told(name, "pushed to", "the hub wants a token that may write there"):
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        commit = api.create_commit(name, operations, commit_message=f"Task vector {vector.id}")
        return str(commit.repo_url)


def pulled(repository: str) -> TaskVector:
    """Return the vector of ``owner/name`` or ``owner/name@revision``.

    Only the vector's file is downloaded, and only if the file is not too large.

    Raises:
        ArgumentError: ``repository`` is no such name.
        HubError: the repository does not exist, has no vector, or cannot be read.
        VectorFileError: the file is too large, of unknown size, or no intact vector.
    """
    name, revision = parsed(repository)
    with (
        _told(repository, "pulled from", "there is none of this name, or it is private"),
        tempfile.TemporaryDirectory() as folder,
    ):
        api = HfApi()
        found = api.model_info(name, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size for file in found.siblings or ()}
        if FILE not in sizes:
            raise HubError(f"{repository} on the hub has no {FILE}: it is no vector of lmms-mtv")
        size = sizes[FILE]
        if size is None or size > tensor_files.LIMIT:
            raise VectorFileError(
                f"{FILE} of {repository} on the hub has {'an unknown number of' if size is None else f'{size:,}'} "
                f"bytes, a vector has at most {tensor_files.LIMIT:,}: it is not downloaded"
            )
        path = api.hf_hub_download(name, FILE, revision=found.sha, local_dir=folder)
        try:
            return TaskVector.load(Path(path))
        except VectorFileError as error:
            raise VectorFileError(f"what {repository} on the hub has is refused: {error}") from error


def parsed(repository: str) -> tuple[str, str | None]:
    """Return ``owner/name``, and the revision or None.

    Raises:
        ArgumentError: ``repository`` is neither ``owner/name`` nor ``owner/name@revision``.
    """
    match = _NAME.fullmatch(repository.removeprefix(PREFIX))
    if match is None:
        raise ArgumentError(f"{repository!r} is no repository of the hub: give owner/name or owner/name@revision")
    return match[1], match[2]


@contextmanager
def _told(repository: str, done: str, refused: str) -> Iterator[None]:
    """Turn the errors of the hub's client inside the block into :class:`HubError` with a remedy.

    ``done`` is the attempted action in words. ``refused`` describes the possible causes if the hub knows no such
    repository or denies access: the hub does not tell which.
    """
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise HubError(f"nothing can be {done} {repository}: HF_HUB_OFFLINE is set, unset it") from error
    except GatedRepoError as error:
        raise HubError(f"{repository} on the hub is gated: ask for access on its page, and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repository} on the hub has no such revision: check what follows the @") from error
    except (OSError, ValueError, RuntimeError, _TRANSPORT) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
            raise HubError(
                f"nothing can be {done} {repository}: {refused}; run `hf auth login`, or set HF_TOKEN"
            ) from error
        said = " ".join(str(error).split())[:300]
        raise HubError(f"nothing can be {done} {repository} on the hub ({type(error).__name__}: {said})") from error
