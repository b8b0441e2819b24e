"""Saved state of a long shard, so that a killed shard can resume."""

import io
import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from influence_jobs.errors import first_line
from influence_jobs.store.files import Files
from influence_jobs.store.layout import FACTORS
from influence_jobs.torch_files import load_torch

log = logging.getLogger(__name__)

SAVE_EVERY_S = 30.0
SAVE_SHARE = 0.03  # saving may take at most this share of the time


class SavedState:
    """A file of state: plain tensors, numbers and containers.

    Args:
        files: The files of the run.
        name: Name of the file.
    """

    def __init__(self, files: Files, name: str):
        self._files, self._name = files, name
        self._last, self._took_s = time.monotonic(), 0.0

    def read(self) -> Any:
        """The state that was saved last, on the CPU; None if there is none, or it is damaged."""
        try:
            data = self._files.read(self._name)
        except FileNotFoundError:
            return None
        try:
            return load_torch(io.BytesIO(data))
        except Exception as error:  # noqa: BLE001  (torch raises any error on damaged bytes)
            why = first_line(error)
            log.warning("%s is damaged, so its shard begins anew: %s", self._name, why)
            return None

    def keep(self, state: Callable[[], Any]) -> None:
        """Save the state if the last save was long enough ago."""
        started = time.monotonic()
        if started - self._last > max(SAVE_EVERY_S, self._took_s / SAVE_SHARE):
            self._files.write(self._name, saved_bytes(state()))
            self._last = time.monotonic()
            self._took_s = self._last - started

    def write(self, state: Any) -> None:
        """Save the state now."""
        self._files.write(self._name, saved_bytes(state))

    def delete(self) -> None:
        """Delete the file, once the work is done."""
        self._files.delete(self._name)


class SavedFactors:
    """Factors of EK-FAC in the run folder while the run is carried out, a file for each layer.

    All workers write the same numbers.

    Args:
        files: The files of the run.
    """

    def __init__(self, files: Files):
        self._files = files

    def read(self, name: str) -> Any:
        """What was kept; None if there is none, or it is damaged."""
        return self._of(name).read()

    def write(self, name: str, state: Any) -> None:
        """Keep the factors of a layer or parameter."""
        self._of(name).write(state)

    def delete(self) -> None:
        """Delete them all, once the run is done."""
        for name in self._files.names(FACTORS):
            self._files.delete(f"{FACTORS}/{name}")

    def _of(self, name: str) -> SavedState:
        return SavedState(self._files, f"{FACTORS}/{name or '(model)'}.pt")


def saved_bytes(value: Any) -> bytes:
    """The bytes that `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
