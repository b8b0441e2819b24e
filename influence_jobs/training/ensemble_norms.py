"""In-training gradient norms of several variants at once."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from influence_jobs.gradients.weights import weight_named
from influence_jobs.terms import Reduction
from influence_jobs.transfers import on_device


@dataclass(frozen=True)
class NormsWanted:
    """Which in-training norms to record.

    Attributes:
        layers: Names of weights, as `weight_named` takes them.
        reduction: As for replayed norms: `kernel`, `channel` or `layer`.
        skip_epochs: Number of first epochs that are not counted.
    """

    layers: tuple[str, ...]
    reduction: Reduction
    skip_epochs: int


class EnsembleNorms:
    """Accumulates norms like `RecordedNorms`, but for M trainings at once.

    Args:
        wanted: The norms to record.
        model: One of the models.
        num_variants: M.
        num_samples: N of the whole training set; the norms of a removed sample stay 0.
        device: Device of the models.

    Attributes:
        weights: What the norms are of, by layer.
        sums: The sums so far, by layer, shape (M, N, *norm_shape), float32.
    """

    def __init__(
        self,
        wanted: NormsWanted,
        model: nn.Module,
        *,
        num_variants: int,
        num_samples: int,
        device: torch.device,
    ):
        self.reduction = wanted.reduction
        self._skip_epochs = wanted.skip_epochs
        self._num_samples = num_samples
        self.weights = {layer: weight_named(model, layer) for layer in wanted.layers}
        self.sums = {
            layer: torch.zeros(
                num_variants, num_samples, *weight.norm_shape(wanted.reduction), device=device
            )
            for layer, weight in self.weights.items()
        }

    def counts(self, epoch: int) -> bool:
        """Whether an epoch (counted from 0) is recorded."""
        return epoch >= self._skip_epochs

    def add(self, layer: str, rows: slice, ids_MSB: Tensor, norms_MS: Tensor) -> None:
        """Add the norms (M, S, *norm_shape) of S batches of the variants `rows` to the sums."""
        sums = self.sums[layer].flatten(0, 1)
        row_M = torch.arange(rows.start, rows.stop, device=ids_MSB.device)
        where = (ids_MSB + self._num_samples * row_M[:, None, None]).flatten()
        where = on_device(where, sums.device)
        # A variant sees a sample once per epoch, so `where` has no duplicates and indexing may add.
        sums[where] += norms_MS.flatten(0, 1).repeat_interleave(ids_MSB.shape[2], dim=0)

    def state_dict(self) -> dict[str, Tensor]:
        """The sums, by layer."""
        return dict(self.sums)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from saved sums."""
        for layer, sums in self.sums.items():
            sums.copy_(state[layer])
