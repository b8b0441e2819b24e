"""A `Recorder` as a callback of Lightning. Needs the package `lightning`."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from influence_jobs.errors import ModelError
from influence_jobs.training.recorder import Recorder, require_one_process


class LightningRecorder(Callback):
    """Records in-training norms and weights: `Trainer(callbacks=[LightningRecorder(...)])`.

    Norms are those of the gradient before it is clipped. A checkpoint of Lightning has the state.

    Args:
        recorder: Of the module that is trained, or of the network in it.
        ids: Takes a batch, gives the positions of its samples in the training set, (B,).
    """

    def __init__(self, recorder: Recorder, ids: Callable[[Any], Any]):
        self.recorder, self._ids_of = recorder, ids
        self._ids: list[Tensor] = []  # of the batches since the last step

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse what cannot be recorded.

        Raises:
            ModelError: There are several processes or optimizers.
        """
        require_one_process(trainer.world_size)
        if len(trainer.optimizers) != 1:
            raise ModelError(
                f"this training has {len(trainer.optimizers)} optimizers, whose steps a recorder "
                "cannot tell apart: call Recorder.step() in training_step()"
            )

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the samples."""
        self._ids.append(torch.as_tensor(self._ids_of(batch)).detach().cpu())

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Record the gradient of the batches since the last step.

        Raises:
            ModelError: There was no batch since then.
        """
        if not self._ids:
            raise ModelError(
                "this training takes several steps on one batch, which a recorder cannot tell "
                "apart: call Recorder.step() in training_step()"
            )
        self.recorder.step(torch.cat(self._ids))
        self._ids.clear()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Write."""
        self.recorder.end_epoch()

    def state_dict(self) -> dict[str, Any]:
        """The recorder's."""
        return self.recorder.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The recorder's."""
        self.recorder.load_state_dict(state_dict)
