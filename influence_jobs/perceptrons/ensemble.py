"""Steps of an ensemble of perceptrons as batched matrix products, with the first layer in blocks.

The bias of a layer is stored as the last column of its weight, so the layer's input has a last
column of ones. Letters: M models, S steps, B batch, K = S B samples, C outputs of a layer, I its
inputs with the ones, P weights.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_jobs.curvature.derivatives import agreement
from influence_jobs.gradients.rules import reduce_norms
from influence_jobs.perceptrons.blocked_layer import BlockedLayer, Modes, flush_, sgd_modes
from influence_jobs.perceptrons.network import Perceptron, find_perceptron, first_inputs
from influence_jobs.perceptrons.pending import padded
from influence_jobs.tasks.base import Task
from influence_jobs.tasks.placement import device_of
from influence_jobs.training.changes import replaced
from influence_jobs.training.ensemble import Variant
from influence_jobs.training.ensemble_data import (
    RESIDENT_BYTES,
    Asked,
    Members,
    fixed_samples,
    gather,
    stretches,
)
from influence_jobs.training.ensemble_norms import EnsembleNorms
from influence_jobs.training.recipe import Recipe
from influence_jobs.training.train import Trainer, epoch_order, seeded, step_seed
from influence_jobs.transfers import on_device

BLOCK_SAMPLES = 128  # K, by measurement; with more the Gram matrix costs more than it saves
TRIED = 3  # variants


def perceptron_steps(
    task: Task,
    recipe: Recipe,
    members: Members,
    norms: EnsembleNorms | None,
    variants: Sequence[Variant],
) -> "PerceptronSteps | None":
    """Blocked steps, or None where they do not apply or do not agree with `Trainer`.

    They apply if the task's `output_loss` is cross-entropy, its model is a `Perceptron`, its
    samples are the same in every epoch and at most `RESIDENT_BYTES` large, and the recipe is SGD
    with two `sgd_modes`. The first block of a variant is trained both ways to see whether they
    agree. Rounding alone may part them, at a kink of the activations, so up to `TRIED` variants are
    asked; a wrong step parts all of them.

    Args:
        task: The task to train.
        recipe: How to train it.
        members: The M variants.
        norms: Records norms of the batch gradients, if wanted.
        variants: The variants, in the rows of `members`.
    """
    if task.output_loss != "cross-entropy":
        return None
    modes, perceptron = sgd_modes(recipe), find_perceptron(members.models[0])
    if modes is None or perceptron is None:
        return None
    data = first_layer_data(task, members.models[0], perceptron)
    if data is None:
        return None
    for row, variant in enumerate(variants[:TRIED]):
        only = _one(members, row)
        alone = PerceptronSteps(perceptron, data, modes, recipe, only)
        if _agrees(alone, task, recipe, variant, only):
            return PerceptronSteps(perceptron, data, modes, recipe, members, norms)
    return None


def _one(members: Members, row: int) -> Members:
    """One variant alone."""
    at = slice(row, row + 1)
    labels_MN = members.new_labels_MN
    labels_1N = None if labels_MN is None else labels_MN[at]
    weights_MN = members.weights_MN
    weights_1N = None if weights_MN is None else weights_MN[at]
    return Members(members.models[at], members.seeds[at], members.sizes[at], labels_1N, weights_1N)


def _agrees(
    steps: "PerceptronSteps", task: Task, recipe: Recipe, variant: Variant, members: Members
) -> bool:
    """Whether one block of a variant alone gives the weights that `Trainer` gives."""
    trainer = Trainer(
        task, recipe, seed=variant.seed, device=members.device, changes=variant.changes
    )
    before = copy.deepcopy(dict(trainer.model.named_parameters()))
    block = next(stretches(members.sizes, recipe.batch_size, steps.longest))
    for _ in range(block.steps):
        trainer.step()
    order = variant.changes.order(epoch_order(len(task.train_data()), variant.seed, 0))
    ids = order[: block.steps * block.batch_size].view(1, block.steps, block.batch_size)
    steps.take(Asked(slice(0, 1), ids, 0, 0))
    after, trained = steps.weights(0), dict(trainer.model.named_parameters())
    moved = sum((p - before[name]).square().sum() for name, p in trained.items())
    apart = sum((p - after[name]).square().sum() for name, p in trained.items())
    return bool(apart <= agreement() ** 2 * moved)


@dataclass(frozen=True)
class FirstLayerData:
    """The training set as inputs of the first layer.

    Attributes:
        inputs_NI: The layer's inputs with a column of ones, for its bias, and `padded`.
        targets_N: Classes, int64.
    """

    inputs_NI: Tensor
    targets_N: Tensor


def first_layer_data(task: Task, model: nn.Module, perceptron: Perceptron) -> FirstLayerData | None:
    """Compute the first layer's inputs of all samples.

    Returns:
        The data; None if the samples change from epoch to epoch, are too large to keep, or are not
        vectors.
    """
    batch = fixed_samples(task, device_of(model))
    if batch is None:
        return None
    inputs_NI = first_inputs(task, model, perceptron, batch)
    if inputs_NI.ndim != 2 or inputs_NI.nbytes > RESIDENT_BYTES:
        return None
    return FirstLayerData(padded(F.pad(inputs_NI, (0, 1), value=1.0)), task.targets(batch))


class PerceptronSteps:
    """M perceptrons trained by SGD on the cross-entropy.

    Args:
        perceptron: The layers.
        data: The training set.
        modes: The recipe's modes.
        recipe: The recipe, with SGD.
        members: The M variants.
        norms: Records norms of the batch gradients, if wanted.
    """

    def __init__(
        self,
        perceptron: Perceptron,
        data: FirstLayerData,
        modes: Modes,
        recipe: Recipe,
        members: Members,
        norms: EnsembleNorms | None = None,
    ):
        self._perceptron, self._data, self._recipe = perceptron, data, recipe
        self._seeds, self._new_labels_MN = members.seeds, members.new_labels_MN
        self._weights_MN = members.weights_MN
        self._device, self._norms = members.device, norms
        self.longest = max(1, BLOCK_SAMPLES // recipe.batch_size)
        first_MCI, *others = (_stacked(members.models, name) for name in perceptron.linears)
        self._inputs_and_bias = first_MCI.shape[2]  # of the first layer
        self._first = BlockedLayer(padded(first_MCI), modes)
        self._shapes = [weight_MCI.shape[1:] for weight_MCI in others]
        # In one tensor, so that decay and momentum take one operation for all these layers.
        nothing = first_MCI.new_empty(len(members.models), 0)
        self._others_MP = torch.cat([nothing, *(w_MCI.flatten(1) for w_MCI in others)], dim=1)
        self._momentum_MP = torch.zeros_like(self._others_MP)

    def take(self, now: Asked, following: Asked | None = None) -> Tensor:
        """Take S steps of some variants; returns the sums (M,) of their losses, float64."""
        rows, ids_MSB, epoch = now.rows, now.ids_MSB, now.epoch
        same = bool((ids_MSB == ids_MSB[:1]).all())
        ids_MSB = on_device(ids_MSB, self._device)
        steps, batch = ids_MSB.shape[1:]
        x_MKI = self._inputs(ids_MSB.flatten(1), same=same)
        targets_MK = self._targets(rows, ids_MSB.flatten(1))
        targets_MSB = torch.unflatten(targets_MK, 1, (steps, batch))
        weights_MSB = None
        if self._weights_MN is not None:
            weights_MSB = self._weights_MN[rows].gather(1, ids_MSB.flatten(1)).view_as(ids_MSB)
            weights_MSB = weights_MSB.to(self._others_MP.dtype)
        masks = self._dropout_masks(rows, steps, batch, epoch, now.first_step)
        block = self._first.block(rows, x_MKI, steps)
        hidden = _Hidden(self._others_MP[rows], self._momentum_MP[rows], self._shapes, self._recipe)
        norms_wanted = self._norms is not None and self._norms.counts(epoch)
        logits, seen = [], []
        for step in range(steps):
            logits_MBC = hidden.forward(block.outputs(step), [mask[:, step] for mask in masks])
            logits.append(logits_MBC)
            deltas = hidden.backward(
                logits_MBC,
                targets_MSB[:, step],
                self._perceptron.dropouts,
                None if weights_MSB is None else weights_MSB[:, step],
            )
            block.d_MSBC[:, step] = deltas[0]
            if norms_wanted:
                inputs = [a_MBI.clone() for a_MBI in hidden.inputs]
                seen.append(list(zip(inputs, deltas[1:], strict=True)))
            hidden.update(deltas[1:])
        block.finish()
        flush_(hidden.momentum_MP)
        if norms_wanted:
            x_MSBI = torch.unflatten(x_MKI[..., : self._inputs_and_bias], 1, (steps, batch))
            others = [
                tuple(torch.stack(t, dim=1) for t in zip(*pairs, strict=True))
                for pairs in zip(*seen, strict=True)
            ]
            self._record(rows, ids_MSB, [(x_MSBI, block.d_MSBC), *others])
        logits_MKC = torch.stack(logits, dim=1).flatten(1, 2)
        losses_MK = F.cross_entropy(logits_MKC.transpose(1, 2), targets_MK, reduction="none")
        if weights_MSB is not None:
            losses_MK = losses_MK * weights_MSB.flatten(1)
        return losses_MK.sum(1, dtype=torch.float64)

    def _inputs(self, ids_MK: Tensor, *, same: bool) -> Tensor:
        """The first layer's inputs (M, K, I); one copy if all variants have the same samples."""
        if same:
            return gather(self._data.inputs_NI, ids_MK[:1]).expand(len(ids_MK), -1, -1)
        return gather(self._data.inputs_NI, ids_MK)

    def _targets(self, rows: slice, ids_MK: Tensor) -> Tensor:
        targets_MK = gather(self._data.targets_N, ids_MK)
        if self._new_labels_MN is None:
            return targets_MK
        return replaced(targets_MK, self._new_labels_MN[rows].gather(1, ids_MK))

    def _dropout_masks(
        self, rows: slice, steps: int, batch: int, epoch: int, first_step: int
    ) -> list[Tensor]:
        """Dropout factors (M, S, B, C) of every hidden layer, drawn like those of `Trainer`."""
        if not any(self._perceptron.dropouts):
            return []
        masks = []
        for seed in self._seeds[rows]:
            for step in range(first_step, first_step + steps):
                with seeded(step_seed(seed, epoch, step), self._device):
                    masks.append(
                        [
                            F.dropout(self._others_MP.new_ones(batch, shape[1] - 1), p)
                            for shape, p in zip(
                                self._shapes, self._perceptron.dropouts, strict=True
                            )
                        ]
                    )
        return [
            torch.unflatten(torch.stack(layer), 0, (-1, steps))
            for layer in zip(*masks, strict=True)
        ]

    def _record(self, rows: slice, ids_MSB: Tensor, layers: Sequence[tuple[Tensor, ...]]) -> None:
        """Norms of the rows of each batch's mean gradient D^T X / B, from X X^T.

        The gradient itself is not formed.
        """
        assert self._norms is not None
        for name, (a_MSBI, d_MSBC) in zip(self._perceptron.linears, layers, strict=True):
            if name in self._norms.sums:
                a_MSBI = a_MSBI[..., :-1]  # without the ones of the bias
                gram_MSBB = a_MSBI @ a_MSBI.transpose(-1, -2)
                squares_MSC = ((gram_MSBB @ d_MSBC) * d_MSBC).sum(2).clamp_min(0)
                norms_MSC = squares_MSC.sqrt() / d_MSBC.shape[2]
                kernels = norms_MSC.flatten(0, 1)[..., None, None]
                norms = reduce_norms(kernels, self._norms.reduction)
                self._norms.add(name, rows, ids_MSB, torch.unflatten(norms, 0, norms_MSC.shape[:2]))

    def weights(self, row: int) -> dict[str, Tensor]:
        """Parameters of one variant."""
        others = _views(self._others_MP[row : row + 1], self._shapes)
        first_CI = self._first.weights(row)[:, : self._inputs_and_bias]
        layers = [first_CI, *(w_MCI[0] for w_MCI in others)]
        named: dict[str, Tensor] = {}
        for name, weight_CI in zip(self._perceptron.linears, layers, strict=True):
            named |= {f"{name}.weight": weight_CI[:, :-1], f"{name}.bias": weight_CI[:, -1]}
        return named

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue from here."""
        return {
            "first": self._first.modes_MCI[..., : self._inputs_and_bias],
            "others": self._others_MP,
            "momentum": self._momentum_MP,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


class _Hidden:
    """The layers after the first, for some variants and one block. Steps update their weights."""

    def __init__(
        self, weights_MP: Tensor, momentum_MP: Tensor, shapes: Sequence[torch.Size], recipe: Recipe
    ):
        self._weights_MP, self.momentum_MP, self._recipe = weights_MP, momentum_MP, recipe
        assert recipe.lr is not None  # SGD has one
        self._lr = recipe.lr
        self._weights = _views(weights_MP, shapes)
        self._momenta = _views(momentum_MP, shapes)
        self.inputs: list[Tensor] = []

    def forward(self, z_MBC: Tensor, masks: Sequence[Tensor]) -> Tensor:
        """Logits from the first layer's outputs; sets `inputs` (M, B, I) of every later layer."""
        if not self.inputs:  # once per block; the column of ones is never overwritten
            self.inputs = [
                w_MCI.new_ones(*z_MBC.shape[:2], w_MCI.shape[2]) for w_MCI in self._weights
            ]
        for layer, (a_MBI, w_MCI) in enumerate(zip(self.inputs, self._weights, strict=True)):
            torch.clamp_min(z_MBC, 0, out=a_MBI[..., :-1])
            if masks:
                a_MBI[..., :-1] *= masks[layer]
            z_MBC = a_MBI @ w_MCI.transpose(1, 2)
        return z_MBC

    def backward(
        self,
        logits_MBC: Tensor,
        targets_MB: Tensor,
        dropouts: Sequence[float],
        weights_MB: Tensor | None,
    ) -> list[Tensor]:
        """Gradients (M, B, C) of the summed losses by every layer's outputs, in forward order.

        Args:
            weights_MB: What each loss is multiplied with; None for one.
        """
        d_MBC = torch.softmax(logits_MBC, dim=2)
        d_MBC.scatter_add_(
            2, targets_MB[..., None], torch.full_like(targets_MB[..., None], -1, dtype=d_MBC.dtype)
        )
        if weights_MB is not None:
            d_MBC *= weights_MB[..., None]
        deltas = [d_MBC]
        for a_MBI, w_MCI, p in zip(
            reversed(self.inputs), reversed(self._weights), reversed(dropouts), strict=True
        ):
            # The sign of an input is the derivative of ReLU, or 0 if dropout removed it.
            d_MBC = (d_MBC @ w_MCI[..., :-1]).mul_(a_MBI[..., :-1].sign())
            deltas.append(d_MBC.div_(1 - p) if p else d_MBC)
        return deltas[::-1]

    def update(self, deltas: Sequence[Tensor]) -> None:
        """SGD in place: v <- m v + w W + D^T A / B, W <- W - h v."""
        self.momentum_MP.mul_(self._recipe.momentum)
        self.momentum_MP.add_(self._weights_MP, alpha=self._recipe.weight_decay)
        for v_MCI, d_MBC, a_MBI in zip(self._momenta, deltas, self.inputs, strict=True):
            v_MCI.baddbmm_(d_MBC.transpose(1, 2), a_MBI, alpha=1 / a_MBI.shape[1])
        self._weights_MP.add_(self.momentum_MP, alpha=-self._lr)


def _stacked(models: Sequence[nn.Module], name: str) -> Tensor:
    """Weight and bias of one layer of every model, side by side: (M, C, I)."""
    layers = []
    for model in models:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layers.append(torch.cat((linear.weight, linear.bias[:, None]), dim=1).detach())
    return torch.stack(layers)


def _views(flat_MP: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Views (M, C, I) of the layers' weights in rows of P."""
    pieces = torch.split(flat_MP, [shape.numel() for shape in shapes], dim=1)
    return [torch.unflatten(piece, 1, shape) for piece, shape in zip(pieces, shapes, strict=True)]
