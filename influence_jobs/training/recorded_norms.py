"""Gradient norms recorded while training: the report's Algorithm 1.

After each backward the norms of the *batch* gradient of a layer are added to the entry of every sample in the batch.
They are not per-sample norms: samples of one batch share what they are given, and only the sum over epochs, each with
another order, tells them apart. For exact norms replay checkpoints (`GradNorms`).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from influence_jobs.gradients.weights import weight_named
from influence_jobs.terms import Reduction


class RecordedNorms:
    """Accumulates norms of the batch gradient, by sample.

    Args:
        model: The model that will be trained.
        layers: Names of weights, as `weight_named` takes them.
        num_samples: N.
        reduction: As for replayed norms: `kernel`, `channel` or `layer`.
        skip_epochs: First epochs that are not counted.

    Attributes:
        sums: By layer the sums so far, shape (N, *norm_shape), float32, on the CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        num_samples: int,
        *,
        reduction: Reduction,
        skip_epochs: int,
    ):
        self._reduction = reduction
        self._skip_epochs = skip_epochs
        self._weights = {layer: weight_named(model, layer) for layer in layers}
        self.sums = {
            layer: torch.zeros(num_samples, *weight.norm_shape(reduction))
            for layer, weight in self._weights.items()
        }

    @torch.no_grad()
    def add(self, model: nn.Module, ids: Tensor, epoch: int) -> None:
        """Count the gradients now in the model for the samples `ids` (B,) of an epoch (from 0)."""
        if epoch < self._skip_epochs:
            return
        for layer, sums in self.sums.items():
            weight = self._weights[layer]
            gradient = model.get_parameter(weight.parameter).grad
            assert isinstance(gradient, Tensor)
            norms = weight.norms(gradient[None], self._reduction)
            # A sample occurs once an epoch, so once in a batch: plain indexing adds.
            sums[ids] += norms.to(sums.device)

    def state_dict(self) -> dict[str, Tensor]:
        """The sums, by layer."""
        return dict(self.sums)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved sums."""
        for layer, sums in self.sums.items():
            sums.copy_(state[layer])
