"""In-training norms and weights, recorded inside a training loop of the user's own."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from influence_jobs.errors import DataError, ModelError
from influence_jobs.terms import Reduction
from influence_jobs.training.recorded_norms import RecordedNorms

NORMS = "norms.npz"
WRITTEN = "recorded.json"  # written last: what else is in the folder


@dataclass(frozen=True)
class Recording:
    """What a recorder has written.

    Attributes:
        num_samples: N.
        epochs: Number of finished epochs.
        saved: Those whose weights are there, from 1.
        layers: Layers with norms.
        reduction: What is kept of the gradient.
        skip_epochs: Number of first epochs whose norms do not count.
    """

    num_samples: int
    epochs: int
    saved: tuple[int, ...]
    layers: tuple[str, ...]
    reduction: Reduction
    skip_epochs: int


def weights_name(epoch: int) -> str:
    """The file with the weights after an epoch."""
    return f"epoch-{epoch:04d}.pt"


def read_recording(folder: Path) -> tuple[Recording, str]:
    """What a recorder wrote into a folder, and the SHA-256 of its files.

    Raises:
        ModelError: The folder has none, or lacks a file of it.
    """
    try:
        text = (folder / WRITTEN).read_bytes()
        fields: Any = json.loads(text)
        lists = {key: tuple(fields[key]) for key in ("saved", "layers")}
        found = Recording(**{**fields, **lists})
        digest = hashlib.sha256(text)
        for name in (NORMS, *map(weights_name, found.saved)):
            with (folder / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"{folder} has no recording of influence_jobs.Recorder, or not all of it ({error})"
        ) from error
    return found, digest.hexdigest()


class Recorder:
    """Records the norms of batch gradients (`RecordedNorms`) and the weights of a training.

    It leaves the training as it is::

        recorder = Recorder(model, len(data), layers=["conv1", "fc"], folder="recorded")
        for epoch in range(5):
            for ids, x, y in loader:  # ids: positions in the training set
                optimizer.zero_grad()
                loss(model(x), y).backward()
                recorder.step(ids)
                optimizer.step()
            recorder.end_epoch()

    Of a gradient gathered over several batches, `step` takes the ids of all of them. Where a
    gradient is scaled, as by a GradScaler, it must be unscaled before. `training.lightning` and
    `training.hugging_face` have callbacks for their trainers.

    After every epoch the folder gets `epoch-0001.pt`, a state dict, and `norms.npz`, the sums so
    far, an array (N, ...) for each layer. `infl submit train --recorded` makes a run of it.

    Args:
        model: The model that is trained, without wrappers.
        num_samples: N.
        layers: Names of layers or weights.
        folder: Where to write; it is made.
        reduction: What is kept of the gradient: kernel, channel or layer, as in grad-norms.
        skip_epochs: Number of first epochs whose norms do not count.
        save_epochs: Epochs, from 1, whose weights are kept; by default all.

    Attributes:
        norms: The norms; `norms.sums` has them by layer, shape (N, ...).
        epoch: Number of finished epochs.
        steps: Number of steps so far.

    Raises:
        ModelError: There is no such layer, or it is frozen; or the training has several processes,
            each of which would see its own samples only.
    """

    def __init__(
        self,
        model: nn.Module,
        num_samples: int,
        *,
        layers: Sequence[str],
        folder: str | Path,
        reduction: Reduction = "channel",
        skip_epochs: int = 1,
        save_epochs: Collection[int] | None = None,
    ):
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            require_one_process(torch.distributed.get_world_size())
        self.model, self.epoch, self.steps = model, 0, 0
        self.norms = RecordedNorms(
            model, layers, num_samples, reduction=reduction, skip_epochs=skip_epochs
        )
        self._num_samples, self._skip_epochs = num_samples, skip_epochs
        self._save_epochs, self._saved = save_epochs, tuple[int, ...]()
        self._reduction = reduction
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)

    @property
    def counts(self) -> bool:
        """Whether norms of this epoch count."""
        return self.epoch >= self._skip_epochs

    def step(self, ids: Any, measured: Mapping[str, Tensor] | None = None) -> None:
        """Record one step, between `backward()` and the optimizer's step.

        Args:
            ids: The batch's positions in the training set, shape (B,): a tensor, array or list.
            measured: The norms by layer, if they were taken before the gradient was changed.

        Raises:
            DataError: An id is no position in the training set.
            ModelError: A layer has no gradient.
        """
        ids_B = torch.as_tensor(ids).detach().cpu()
        whole = not (ids_B.is_floating_point() or ids_B.is_complex() or ids_B.dtype == torch.bool)
        if ids_B.ndim != 1 or not whole:
            raise DataError(
                f"ids of a batch have shape {tuple(ids_B.shape)} and are {ids_B.dtype}: give one "
                "whole number a sample, its position in the training set"
            )
        if len(ids_B) and not (ids_B.min() >= 0 and ids_B.max() < self._num_samples):
            raise DataError(
                f"ids of a batch are from {int(ids_B.min())} to {int(ids_B.max())}: positions in "
                f"the training set are from 0 to {self._num_samples - 1}"
            )
        if self.counts:
            found = self.norms.measure(self.model) if measured is None else measured
            self.norms.add_measured(found, ids_B.long())
        self.steps += 1

    def end_epoch(self) -> None:
        """Write the weights and the norms so far."""
        self.epoch += 1
        if self._save_epochs is None or self.epoch in self._save_epochs:
            self._saved += (self.epoch,)
            self._write(
                weights_name(self.epoch), lambda file: torch.save(self.model.state_dict(), file)
            )
        arrays: dict[str, Any] = {layer: sums.numpy() for layer, sums in self.norms.sums.items()}
        self._write(NORMS, lambda file: np.savez(file, **arrays))
        written = Recording(
            num_samples=self._num_samples,
            epochs=self.epoch,
            saved=self._saved,
            layers=tuple(arrays),
            reduction=self._reduction,
            skip_epochs=self._skip_epochs,
        )
        self._write(WRITTEN, lambda file: file.write(json.dumps(asdict(written)).encode()))

    def _write(self, name: str, write: Any) -> None:
        aside = self._folder / f"{name}.partial"
        with aside.open("wb") as file:
            write(file)
        aside.replace(self._folder / name)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on in a training that is resumed."""
        return {
            "epoch": self.epoch,
            "steps": self.steps,
            "saved": self._saved,
            "norms": self.norms.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.epoch, self.steps, self._saved = state["epoch"], state["steps"], state["saved"]
        self.norms.load_state_dict(state["norms"])


def require_one_process(count: int) -> None:
    """Refuse a training by several processes or devices.

    Raises:
        ModelError: There are several.
    """
    if count > 1:
        raise ModelError(
            f"this training has {count} processes or devices, each with samples of its own, and a "
            "recorder sees one: train with one"
        )
