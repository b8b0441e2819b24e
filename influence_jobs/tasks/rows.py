"""Whether a task's data can be asked for a sample by its position."""

from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from influence_jobs.errors import DataError
from influence_jobs.tasks.base import Task


def require_rows(task: Task) -> None:
    """Refuse data without a length, or whose rows the task's batches cannot fetch by position.

    Raises:
        DataError: It names the data and the cure.
    """
    own = type(task)
    for name, data, batches in (
        ("train_data()", task.train_data(), own.batch is Task.batch),
        ("test_data()", task.test_data(), own.test_batch is Task.test_batch),
    ):
        if why := _unfit(data, by_position=batches):
            raise DataError(f"{name} is {why}")
    if len(task.train_data()) == 0:
        raise DataError("train_data() is empty")


def _unfit(data: Any, *, by_position: bool) -> str:
    kind = type(data).__name__
    if isinstance(data, DataLoader):
        return (
            f"a {kind}, which gives batches in another order each time: give its dataset "
            "(loader.dataset), and its collate_fn, if it has one, as collate()"
        )
    cure = (
        "a sample's position is its id, so put the samples into a list, or a Dataset with __len__ "
        "and __getitem__"
    )
    if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        return f"a {kind} without a length and rows by position: {cure}"
    if by_position and not hasattr(data, "__getitem__"):
        return f"a {kind} without rows by position: {cure}"
    if by_position and hasattr(data, "keys"):  # a dict, a pandas DataFrame, a datasets.DatasetDict
        return f"a {kind}, which gives parts by their names, not rows by their positions: {cure}"
    return ""
