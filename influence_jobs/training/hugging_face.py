"""A `Recorder` as a callback of the Trainer of transformers. Needs that package."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from influence_jobs.errors import DataError, ModelError
from influence_jobs.training.recorder import Recorder, require_one_process


class HuggingFaceRecorder(TrainerCallback):
    """Records in-training norms and weights: `Trainer(callbacks=[HuggingFaceRecorder(...)])`.

    The rows of the training set carry their position in a column of their own, which is taken out
    of the batch before the model sees it. The Trainer needs `remove_unused_columns=False`.

    Norms are those of the gradient before it is clipped.

    Args:
        recorder: Of the model that is trained.
        ids: Name of the column.
    """

    def __init__(self, recorder: Recorder, *, ids: str = "sample"):
        self.recorder, self._column = recorder, ids
        self._ids: list[Tensor] = []  # of the batches since the last step
        self._measured: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to look at batches and gradients.

        Raises:
            ModelError: There are several devices, gradients are scaled, or the training goes on
                where the recorder was not there.
        """
        require_one_process(max(args.n_gpu, args.world_size))
        if args.fp16:
            raise ModelError(
                "fp16 training scales the gradients, so their norms would be wrong: use bf16"
            )
        if state.global_step != self.recorder.steps:
            raise ModelError(
                f"the training goes on after step {state.global_step}, but the recorder has seen "
                f"{self.recorder.steps} steps: load its state of that step with load_state_dict()"
            )
        model, recorder = self.recorder.model, self.recorder
        self._hooks = [model.register_forward_pre_hook(self._take_ids, with_kwargs=True)]
        for layer, parameter in recorder.norms.parameters.items():

            def measure(_: Tensor, layer: str = layer) -> None:
                if recorder.counts:
                    self._measured[layer] = recorder.norms.measure_one(model, layer)

            # When `on_pre_optimizer_step` is called, the gradient is already clipped.
            watched: Any = model.get_parameter(parameter)
            self._hooks.append(watched.register_post_accumulate_grad_hook(measure))

    def _take_ids(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        ids = kwargs.pop(self._column, None)
        if model.training:
            if ids is None:
                raise DataError(
                    f"a batch has no {self._column!r}: give every row of the training set its "
                    "position in that column, and the Trainer remove_unused_columns=False"
                )
            self._ids.append(ids.detach().cpu())
        return args, kwargs

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the gradient of the batches since the last step.

        Raises:
            ModelError: The recorder's model is not the one that is trained.
        """
        layers = self.recorder.norms.parameters
        if not self._ids or (self.recorder.counts and self._measured.keys() != layers.keys()):
            raise ModelError(
                "the model that the Trainer trains is not the recorder's, or a layer has no "
                "gradient: give both the same model"
            )
        self.recorder.step(torch.cat(self._ids), self._measured)
        self._ids.clear()
        self._measured.clear()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write."""
        self.recorder.end_epoch()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
