"""State of a long shard, saved now and then, so that a killed one goes on from there."""

import io
import time
from collections.abc import Callable
from typing import Any

import torch

from influence_jobs.store.files import Files

SAVE_EVERY_S = 30.0
SAVE_SHARE = 0.03  # at most this part of the time goes into saving


class SavedState:
    """One file of state: plain tensors, numbers and containers.

    Args:
        files: Of the run.
        name: Of the file.
    """

    def __init__(self, files: Files, name: str):
        self._files, self._name = files, name
        self._last, self._took_s = time.monotonic(), 0.0

    def read(self) -> Any:
        """What was saved last, on the CPU; None if nothing was."""
        try:
            data = self._files.read(self._name)
        except FileNotFoundError:
            return None
        return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")

    def keep(self, state: Callable[[], Any]) -> None:
        """Save the state if it is time to."""
        started = time.monotonic()
        if started - self._last > max(SAVE_EVERY_S, self._took_s / SAVE_SHARE):
            self._files.write(self._name, saved_bytes(state()))
            self._last = time.monotonic()
            self._took_s = self._last - started

    def delete(self) -> None:
        """Forget it: the work is done."""
        self._files.delete(self._name)


def saved_bytes(value: Any) -> bytes:
    """What `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
