"""Gradient norms recorded during training: Algorithm 1 of the research report.

After each backward pass the norms of a layer's *batch* gradient are added to the sums of every
sample in the batch. They are not per-sample norms: all samples of a batch get the same norms. Only
the sum over epochs distinguishes samples, since each epoch has another order. For exact norms
replay checkpoints (`GradNorms`).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from influence_jobs.errors import ModelError
from influence_jobs.gradients.weights import weight_named
from influence_jobs.terms import Reduction
from influence_jobs.transfers import on_cpu

MOST_WAITING = 64  # steps whose norms are left on a GPU


class RecordedNorms:
    """Accumulates norms of the batch gradient, by sample.

    Args:
        model: The model to train.
        layers: Names of weights, as `weight_named` takes them.
        num_samples: N.
        reduction: As for replayed norms: `kernel`, `channel` or `layer`.
        skip_epochs: Number of first epochs that are not counted.
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
        for layer, weight in self._weights.items():
            if not model.get_parameter(weight.parameter).requires_grad:
                raise ModelError(
                    f"layer '{layer}' is frozen (requires_grad is False), so training gives it no "
                    "gradient: leave it out of --norms-layer"
                )
        self._sums = {
            layer: torch.zeros(num_samples, *weight.norm_shape(reduction))
            for layer, weight in self._weights.items()
        }
        self._waiting: list[tuple[Tensor, Mapping[str, Tensor]]] = []  # steps still on a GPU

    @property
    def sums(self) -> dict[str, Tensor]:
        """The sums so far, by layer, shape (N, *norm_shape), float32, on the CPU."""
        self._gather()
        return self._sums

    def add(self, model: nn.Module, ids: Tensor, epoch: int) -> None:
        """Add norms of the model's gradients to the samples `ids` (B,) of an epoch (from 0)."""
        if epoch >= self._skip_epochs:
            self.add_measured(self.measure(model), ids)

    @property
    def parameters(self) -> dict[str, str]:
        """The name of each layer's parameter."""
        return {layer: weight.parameter for layer, weight in self._weights.items()}

    def measure(self, model: nn.Module) -> dict[str, Tensor]:
        """Norms of the model's gradients as they are now, by layer."""
        return {layer: self.measure_one(model, layer) for layer in self._sums}

    @torch.no_grad()
    def measure_one(self, model: nn.Module, layer: str) -> Tensor:
        """Norms of one layer's gradient.

        Raises:
            ModelError: It has none.
        """
        weight = self._weights[layer]
        gradient = model.get_parameter(weight.parameter).grad
        if gradient is None:
            raise ModelError(
                f"layer '{layer}' has no gradient to record: the loss must depend on it, and norms "
                "are taken between backward() and zero_grad()"
            )
        # Squares of half precision have too few digits.
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        return weight.norms(gradient[None], self._reduction)[0]

    def add_measured(self, norms: Mapping[str, Tensor], ids: Tensor) -> None:
        """Add the norms of one batch gradient to its samples; once for each time it has them."""
        self._waiting.append((ids, norms))
        on_gpu = any(values.device.type != "cpu" for values in norms.values())
        if not on_gpu or len(self._waiting) == MOST_WAITING:
            self._gather()

    def _gather(self) -> None:
        """Add the norms of the steps that wait; of a GPU they are copied together."""
        steps, self._waiting = self._waiting, []
        found = on_cpu(
            {(i, layer): norms[layer] for i, (_, norms) in enumerate(steps) for layer in norms}
        )
        for i, (ids, _) in enumerate(steps):
            for layer, sums in self._sums.items():
                norms_B = found[i, layer].to(sums).expand(len(ids), *sums.shape[1:])
                sums.index_add_(0, ids, norms_B)

    def state_dict(self) -> dict[str, Tensor]:
        """The sums, by layer."""
        return dict(self.sums)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from saved sums."""
        for layer, sums in self.sums.items():
            sums.copy_(state[layer])
