"""In-training gradient norms of several variants at once."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from influence_jobs.gradients.weights import weight_named
from influence_jobs.terms import Reduction


@dataclass(frozen=True)
class NormsWanted:
    """Which in-training norms to record.

    Attributes:
        layers: Names of weights, as `weight_named` takes them.
        reduction: As for replayed norms: `kernel`, `channel` or `layer`.
        skip_epochs: First epochs that are not counted.
    """

    layers: tuple[str, ...]
    reduction: Reduction
    skip_epochs: int


class EnsembleNorms:
    """What `RecordedNorms` accumulates for one training, for M trainings.

    Args:
        wanted: What to record.
        model: One of the models.
        num_variants: M.
        num_samples: N of the whole training set; a removed sample's norms stay 0.
        device: Where the training is.

    Attributes:
        weights: By layer, what the norms are of.
        sums: By layer the sums so far, shape (M, N, *norm_shape), float32.
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
        """Whether an epoch (from 0) is counted."""
        return epoch >= self._skip_epochs

    def add(self, layer: str, rows: slice, ids_MSB: Tensor, norms_MS: Tensor) -> None:
        """Add the norms (M, S, *norm_shape) of S batches of the variants `rows` to the sums."""
        sums = self.sums[layer].flatten(0, 1)
        row_M = torch.arange(rows.start, rows.stop, device=ids_MSB.device)
        where = (ids_MSB + self._num_samples * row_M[:, None, None]).flatten().to(sums.device)
        # A variant meets a sample once an epoch, so `where` has nothing twice: plain indexing adds.
        sums[where] += norms_MS.flatten(0, 1).repeat_interleave(ids_MSB.shape[2], dim=0)

    def state_dict(self) -> dict[str, Tensor]:
        """The sums, by layer."""
        return dict(self.sums)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved sums."""
        for layer, sums in self.sums.items():
            sums.copy_(state[layer])
