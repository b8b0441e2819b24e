"""Steps of an ensemble of any model: one vmapped forward, one backward, one optimiser."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils import _pytree as pytree

from influence_jobs.errors import ModelError
from influence_jobs.gradients.functional import functional_call
from influence_jobs.memory import is_out_of_memory
from influence_jobs.tasks.base import Batch, Task
from influence_jobs.training.changes import changed_losses, require_one_each
from influence_jobs.training.ensemble_data import Asked, Feed, Members
from influence_jobs.training.ensemble_norms import EnsembleNorms
from influence_jobs.training.recipe import Recipe, decay_groups, make_optimizer, rate_factor
from influence_jobs.transfers import on_device

_STEPS = "steps_per_epoch"  # of the variants whose parameters are in a group of the optimizer


class _Losses(nn.Module):
    """The task's losses as a module, so that `functional_call` can insert the weights."""

    def __init__(self, task: Task, model: nn.Module):
        super().__init__()
        self._task = task
        self.model = model

    def forward(self, batch: Batch, new_labels_B: Tensor | None) -> Tensor:
        return changed_losses(self._task, self.model, batch, new_labels_B)


class StackedSteps:
    """M models as one stack of parameters and buffers.

    Losses of different variants share no parameters, so the gradient of their sum holds the
    gradient of each. `vmap` writes the statistics of batch normalisation into the stack, each
    variant's into its own row. The optimiser is torch's own. Its parameters are slices of the
    stack, one for every *cohort*: the variants of one size, which always step together. So Adam
    counts the steps of each cohort, and a waiting cohort does not change. Where the learning rate
    changes, cohorts with other numbers of steps have groups of their own.

    Args:
        task: The task to train.
        recipe: How to train it.
        members: The M variants.
        norms: Records norms of the batch gradients, if wanted.

    Raises:
        ModelError: The model draws random numbers (dropout), or `vmap` does not support it.
    """

    longest = 1

    def __init__(
        self, task: Task, recipe: Recipe, members: Members, norms: EnsembleNorms | None = None
    ):
        models, sizes = members.models, members.sizes
        _refuse_dropout(models[0])
        self._device = members.device
        self._task = task
        self._losses = _Losses(task, models[0])
        self._feed = Feed(task, members.seeds, members.device)
        self._new_labels_MN = members.new_labels_MN
        self._weights_MN = members.weights_MN
        self._norms = norms
        parameters = [dict(model.named_parameters()) for model in models]
        trained = [name for name, p in parameters[0].items() if p.requires_grad]
        tensors = [
            {**p, **dict(m.named_buffers())} for p, m in zip(parameters, models, strict=True)
        ]
        # One tensor (M, ...) per name. These are copies: the caller's models do not change.
        self._stack = {
            name: torch.stack([t[name].detach() for t in tensors]).contiguous()
            for name in tensors[0]
        }
        cohorts = [0] + [i for i in range(1, len(sizes)) if sizes[i] != sizes[i - 1]]
        self._cohorts = [
            (slice(start, stop), {name: self._stack[name][start:stop] for name in trained})
            for start, stop in zip(cohorts, [*cohorts[1:], len(sizes)], strict=True)
        ]
        self._recipe = recipe
        self._changing = recipe.schedule != "constant" or recipe.warmup > 0
        by_steps: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for cohort_rows, cohort in self._cohorts:
            steps = math.ceil(sizes[cohort_rows.start] / recipe.batch_size)
            leaves = by_steps.setdefault(steps if self._changing else 0, [])
            leaves += [(leaf, parameters[0][name]) for name, leaf in cohort.items()]
        self._optimizer = make_optimizer(
            recipe,
            (
                {**group, _STEPS: steps}
                for steps, leaves in by_steps.items()
                for group in decay_groups(recipe, leaves)
            ),
        )

    def take(self, now: Asked, following: Asked | None = None) -> Tensor:
        """Take one step (S is 1) of whole cohorts; returns the sums (M,) of their losses."""
        rows, epoch, ids_MB = now.rows, now.epoch, now.ids_MSB[:, 0]
        batch = self._feed.batch(now, following)
        new_labels_MB = None
        if self._new_labels_MN is not None:
            new_labels_MB = self._new_labels_MN[rows].gather(1, on_device(ids_MB, self._device))
        trained = self._cohorts[0][1]
        stack = {name: tensor[rows] for name, tensor in self._stack.items()}
        leaves = {name: stack[name].detach().requires_grad_() for name in trained}
        losses_MB = self._forward({**stack, **leaves}, batch, new_labels_MB)
        require_one_each(losses_MB, ids_MB.shape)
        if self._weights_MN is not None:
            weights_MB = self._weights_MN[rows].gather(1, on_device(ids_MB, self._device))
            losses_MB = losses_MB * weights_MB.to(losses_MB)
        gradients: dict[str, Tensor | None] = dict(
            zip(
                leaves,
                torch.autograd.grad(
                    losses_MB.mean(1).sum(), list(leaves.values()), allow_unused=True
                ),
                strict=True,
            )
        )
        if self._norms is not None and self._norms.counts(epoch):
            self._record(rows, now.ids_MSB, gradients)
        if self._recipe.clip_norm is not None:
            gradients = _clipped(gradients, self._recipe.clip_norm)
        self._optimizer.zero_grad(set_to_none=True)
        for members, cohort in self._cohorts:
            if rows.start <= members.start < rows.stop:
                inside = slice(members.start - rows.start, members.stop - rows.start)
                for name, leaf in cohort.items():
                    gradient = gradients[name]
                    # Contiguous, since fused optimisers read memory in order and ignore strides.
                    leaf.grad = None if gradient is None else gradient[inside].contiguous()
        self._set_rates(epoch, now.first_step)
        self._optimizer.step()
        return losses_MB.detach().sum(1, dtype=torch.float64)

    def _set_rates(self, epoch: int, first_step: int) -> None:
        if not self._changing:
            return
        assert self._recipe.lr is not None
        for group in self._optimizer.param_groups:
            steps = group[_STEPS]
            factor = rate_factor(self._recipe, epoch * steps + first_step, steps)
            group["lr"] = self._recipe.lr * factor

    def _forward(
        self, stack: Mapping[str, Tensor], batch: Batch, new_labels_MB: Tensor | None
    ) -> Tensor:
        def losses(tensors: dict[str, Tensor], batch: Batch, new_labels_B: Tensor | None) -> Tensor:
            out: Tensor = functional_call(self._losses, tensors, (batch, new_labels_B))
            return out

        named = {f"model.{name}": tensor for name, tensor in stack.items()}
        mapped = pytree.tree_map(lambda x: 0 if isinstance(x, Tensor) else None, batch)
        axes = (0, mapped, None if new_labels_MB is None else 0)
        try:
            losses_MB: Tensor = vmap(losses, in_dims=axes)(named, batch, new_labels_MB)
        except Exception as error:  # what cannot be mapped, texts among it, or a fault of the model
            if is_out_of_memory(error):
                raise
            said, *_ = str(error).splitlines() or [type(error).__name__]
            raise ModelError(
                f"{type(self._losses.model).__name__} cannot be trained as an ensemble, so train "
                f"its variants one at a time: {said}"
            ) from error
        return losses_MB

    def _record(self, rows: slice, ids_MSB: Tensor, gradients: Mapping[str, Tensor | None]) -> None:
        assert self._norms is not None
        for layer, weight in self._norms.weights.items():
            gradient = gradients[weight.parameter]
            assert gradient is not None
            norms_M = weight.norms(gradient, self._norms.reduction)
            self._norms.add(layer, rows, ids_MSB, norms_M[:, None])

    def weights(self, row: int) -> dict[str, Tensor]:
        """Parameters and buffers of one variant."""
        return {name: tensor[row] for name, tensor in self._stack.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue from here."""
        return {"stack": dict(self._stack), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        for name, tensor in self._stack.items():
            tensor.copy_(state["stack"][name])
        self._optimizer.load_state_dict(state["optimizer"])


def _clipped(gradients: Mapping[str, Tensor | None], limit: float) -> dict[str, Tensor | None]:
    """Gradients (M, ...) of M variants, each scaled down to a norm, as `clip_grad_norm_` does."""
    some = [gradient for gradient in gradients.values() if gradient is not None]
    norms_M = torch.stack([g.flatten(1).norm(dim=1) for g in some], dim=1).norm(dim=1)
    factor_M = (limit / (norms_M + 1e-6)).clamp(max=1)
    return {
        name: None if g is None else g * factor_M.to(g.dtype).view(-1, *[1] * (g.ndim - 1))
        for name, g in gradients.items()
    }


def _refuse_dropout(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ModelError(
                f"{type(model).__name__} cannot be trained as an ensemble: dropout {name!r} (p = "
                f"{module.p}) would draw other random numbers than in a training alone; train its "
                "variants one at a time, or set p to 0"
            )
