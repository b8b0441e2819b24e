"""The state of a task's own optimizer and schedule, so that a training can be resumed."""

import io
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from influence_jobs.errors import ModelError, first_line
from influence_jobs.tasks.base import Task


def plain(state: Any) -> Any:
    """A state with NumPy's numbers as Python's, since files of state hold no others."""
    return pytree.tree_map_only(np.generic, lambda number: number.item(), state)


def require_saveable(task: Task, state: Any) -> None:
    """Refuse a state that could be saved, but not loaded again without running code.

    Raises:
        ModelError: It holds more than tensors, numbers and plain containers.
    """
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:  # whatever pickle meets
        raise ModelError(
            f"the optimizer or scheduler of {type(task).__name__} has a state that cannot be saved "
            f"({first_line(error)}): keep tensors, numbers and plain containers in it"
        ) from error
