"""What the task files use to get their rows."""

from __future__ import annotations

from datasets import Dataset

from lmms_mtv import data
from lmms_mtv.errors import DataError
from lmms_mtv.harness.lmms.failure import fail_with_status


@fail_with_status
def documents(named: Dataset) -> Dataset:
    """Return the rows that ``named`` stands for: one row with the name of the data, in a split of the wanted name.

    Where a task has a ``dataset_name``, that is the name of the data: tasks with one name each share a stand-in.

    A task names such a stand-in as its data set and this function as its ``process_docs``, which the harness calls
    for the splits that it needs: a split that nothing needs is not loaded. The rows keep the name, in ``data``.

    Raises :class:`DataError` if ``named`` is no stand-in, or the rows cannot be had.
    """
    if named.column_names != ["data"] or len(named) != 1:
        raise DataError(
            f"found columns {', '.join(named.column_names)} and {len(named)} rows where one row with the name of the "
            "data was expected: this task takes its demonstrations from its own data, leave out PATH of demonstrations="
        )
    (row,) = named
    name = str(row["data"] if named.info.config_name in (None, "default") else named.info.config_name)
    found = data.documents(name, str(named.split))
    return found.add_column("data", [name] * len(found))
