"""The rows of a task, which task files name as their ``process_docs``, and prompts with an image before each text."""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset
from PIL import Image

from lmms_mtv import data
from lmms_mtv.errors import DataError
from lmms_mtv.harness.lmms.failure import fail_with_status
from lmms_mtv.models.prompts import Message


@fail_with_status
def documents(named: Dataset) -> Dataset:
    """Return the rows of a data set of this package, in place of a stand-in.

    A task names a stand-in as its data set and this function as its ``process_docs``. The harness calls
    ``process_docs`` for the splits that it needs, so that other splits are not loaded.

    Args:
        named: the stand-in: one row with the name of the data, in a split with the name of the wanted split. If the
            task has a ``dataset_name``, this is the name of the data, and several tasks share a stand-in.

    Returns:
        The rows, each with the name of the data in the column ``data``.

    Raises:
        DataError: ``named`` is no stand-in, or the rows cannot be loaded.
    """
    if named.column_names != ["data"] or len(named) != 1:
        raise DataError(
            f"found columns {', '.join(named.column_names)} and {len(named)} rows where one row with the name of the "
            "data was expected: this task takes its demonstrations from its own data, leave out PATH of demonstrations="
        )
    (row,) = named
    name = str(row["data"] if named.info.config_name in (None, "default") else named.info.config_name)
    rows = data.documents(name, str(named.split))
    return rows.add_column("data", [name] * len(rows))


def text_with_images(texts: Sequence[str]) -> str:
    """Return one text with ``<image>`` before each of ``texts``, for wrappers that put images at these places."""
    return "".join(f"<image>{text}" for text in texts)


def messages_with_images(images: Sequence[Image.Image], texts: Sequence[str]) -> list[Message]:
    """Return one chat message with an image before each of ``texts``."""
    pairs = zip(images, texts, strict=True)
    content = [
        part for image, text in pairs for part in ({"type": "image", "url": image}, {"type": "text", "text": text})
    ]
    return [{"role": "user", "content": content}]
