"""What the numbers of a model should be: plain autograd in float64, and dense solves.

It uses nothing of the library but the task itself, and of training the order of samples and the
seeds of steps, which define the training.
"""

from functools import cached_property

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from influence_jobs import Draw
from influence_jobs.training.train import epoch_order, step_seed

MAX_BYTES = 500 * 2**20  # of the dense root of the Gauss-Newton matrix
MAX_ROWS = 1000
IGNORED = -100


def double(batch):
    """A batch in float64."""
    convert = pytree.tree_map_only
    return convert(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, batch)


def plain_kernels():
    """Attention by plain operations, which alone can be differentiated twice."""
    return sdpa_kernel(SDPBackend.MATH)


class Truth:
    """A model with some weights, in float64.

    Args:
        task: The task.
        weights: A state dict.
        tests: Test ids of the queries.
    """

    def __init__(self, task, weights, tests):
        self.task, self.tests = task, tests
        model = task.model()
        model.load_state_dict(weights)
        self.model = model.double().eval()
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.count = len(task.train_data())

    def sample(self, i):
        """Training sample i, as a batch of one."""
        return double(self.task.batch(torch.tensor([i]), Draw(0)))

    def test_sample(self, i):
        """Test sample i, as a batch of one."""
        return double(self.task.test_batch(torch.tensor([i]), Draw(0)))

    def gradient(self, value, **options):
        """Derivatives by all trained parameters, (P,)."""
        parts = torch.autograd.grad(
            value, list(self.parameters.values()), materialize_grads=True, **options
        )
        return torch.cat([part.reshape(-1) for part in parts])

    @cached_property
    def gradients_NP(self):
        """The gradient of each training sample's loss."""
        losses = (self.task.losses(self.model, self.sample(i)).sum() for i in range(self.count))
        return torch.stack([self.gradient(loss) for loss in losses])

    @cached_property
    def losses_N(self):
        """The loss of each training sample."""
        with torch.no_grad():
            found = [self.task.losses(self.model, self.sample(i)) for i in range(self.count)]
        return torch.cat(found).numpy()

    @cached_property
    def queries_QP(self):
        """The gradient of each query's loss."""
        values = (
            self.task.measure(self.model, self.test_sample(i), self.task.quantities[0], None).sum()
            for i in self.tests
        )
        return torch.stack([self.gradient(value) for value in values])

    def columns(self, parameters):
        """Where parameters (names and shapes, in any order) stand among all, (P of them,)."""
        starts, at = {}, 0
        for name, parameter in self.parameters.items():
            starts[name] = at
            at += parameter.numel()
        missing = [name for name, _ in parameters if name not in starts]
        if missing:
            raise AssertionError(f"no trained parameter is named {missing}")
        return torch.cat(
            [
                torch.arange(starts[name], starts[name] + self.parameters[name].numel())
                for name, _ in parameters
            ]
        )

    # -- curvature --------------------------------------------------------------------------------

    def _output_loss(self, outputs, targets):
        """The loss (1,) of the outputs of one sample, written without the library."""
        kind = type(self.task).output_loss
        if callable(kind):
            return self.task.output_loss(outputs, targets)
        if kind == "mse":
            return (outputs - targets).square().flatten(1 if outputs.ndim > 1 else 0).mean(-1)
        if kind == "binary-cross-entropy":
            losses = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
            return losses.mean(1)
        last = outputs.ndim == 3  # tokens: (B, T, V); segmentation: (B, C, H, W)
        logits = outputs.mT if last else outputs
        losses = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
        total = losses.sum().reshape(1)
        counted = (targets != IGNORED).sum()
        mean = total / counted
        own = self._summed
        return total if own else mean

    @cached_property
    def _summed(self):
        """Whether a sample's loss is the sum over its positions, not the mean."""
        return type(self.task).__name__ == "Llama"

    def gauss_newton_root(self, columns):
        """A (R, P) with A^T A the Gauss-Newton matrix of the mean loss, or None if it is too large.

        Raises:
            AssertionError: The loss of the outputs is not the task's loss.
        """
        roots, used = [], 0
        for i in range(self.count):
            batch = self.sample(i)
            with plain_kernels():
                outputs = self.task.outputs(self.model, batch)
                targets = self.task.targets(batch)
                loss = self._output_loss(outputs.detach(), targets)
                expected = self.task.losses(self.model, batch)
                torch.testing.assert_close(loss.reshape(1), expected.detach().reshape(1))
                used += outputs.numel() * len(columns) * 8
                rows_in_all = outputs.numel() * self.count
                if rows_in_all > MAX_ROWS or used * self.count / (i + 1) > MAX_BYTES:
                    return None
                flat = outputs.reshape(-1)
                rows = [self.gradient(z, retain_graph=True)[columns] for z in flat]
            hessian = torch.autograd.functional.hessian(
                lambda z, shape=outputs.shape, t=targets: self._output_loss(z.view(shape), t).sum(),
                flat.detach(),
            )
            values, vectors = torch.linalg.eigh(hessian)
            kept = values > 1e-12 * values.abs().max().clamp_min(1e-300)
            root = vectors[:, kept] * (values[kept] / self.count).sqrt()
            roots.append(root.t() @ torch.stack(rows))
        return torch.cat(roots)

    def hessian_product(self, x_QP, columns):
        """The Hessian of the mean loss, of chosen parameters, times vectors."""
        products = torch.zeros_like(x_QP)
        for i in range(self.count):
            with plain_kernels():
                loss = self.task.losses(self.model, self.sample(i)).sum()
                gradient = self.gradient(loss, create_graph=True)[columns]
                if not gradient.requires_grad:
                    continue
                for row, x in zip(products, x_QP, strict=True):
                    row += self.gradient(gradient @ x, retain_graph=True)[columns] / self.count
        return products

    def gauss_newton_product(self, x_QP, columns):
        """The Gauss-Newton matrix of the mean loss times vectors."""
        try:
            return self._gauss_newton_product(x_QP, columns)
        except RuntimeError as error:  # a second derivative, which the root does not need
            if "not implemented" not in str(error):
                raise
            root = self.gauss_newton_root(columns)
            return x_QP @ root.t() @ root

    def _gauss_newton_product(self, x_QP, columns):
        products = torch.zeros_like(x_QP)
        for i in range(self.count):
            batch = self.sample(i)
            targets = self.task.targets(batch)
            with plain_kernels():
                outputs = self.task.outputs(self.model, batch)
                w = torch.zeros_like(outputs, requires_grad=True)
                pulled = self.gradient(outputs, grad_outputs=w, create_graph=True)[columns]
                for row, x in zip(products, x_QP, strict=True):
                    (pushed,) = torch.autograd.grad(pulled @ x, w, retain_graph=True)
                    z = outputs.detach().requires_grad_(True)
                    (slope,) = torch.autograd.grad(
                        self._output_loss(z, targets).sum(), z, create_graph=True
                    )
                    (curved,) = torch.autograd.grad(slope, z, pushed)
                    back = self.gradient(outputs, grad_outputs=curved, retain_graph=True)[columns]
                    row += back / self.count
        return products

    # -- training ---------------------------------------------------------------------------------

    def retrained(self, recipe, seed, *, removed=(), relabelled=None, noise=0.0):
        """A model trained by a plain loop of SGD without some samples; its weights.

        Args:
            recipe: Of the run: epochs, batch_size, lr, momentum, weight_decay.
            relabelled: New classes by sample.
            noise: A relative change of the initial weights.
        """
        task = self.task
        torch.manual_seed(seed)
        model = task.model().train()
        with torch.no_grad():
            for p in model.parameters() if noise else ():
                p *= 1 + noise * torch.randn_like(p)
        options = {name: recipe[name] for name in ("lr", "momentum", "weight_decay")}
        optimizer = torch.optim.SGD(model.parameters(), **options)
        for epoch in range(recipe["epochs"]):
            order = [i for i in epoch_order(self.count, seed, epoch).tolist() if i not in removed]
            for step, first in enumerate(range(0, len(order), recipe["batch_size"])):
                ids = torch.tensor(order[first : first + recipe["batch_size"]])
                batch = task.train_batch(ids, Draw(seed, epoch))
                torch.manual_seed(step_seed(seed, epoch, step))
                if relabelled is None:
                    losses = task.losses(model, batch)
                else:
                    targets = task.targets(batch)
                    new = torch.tensor([relabelled.get(int(i), -1) for i in ids])
                    targets = torch.where(new < 0, targets, new)
                    losses = F.cross_entropy(task.outputs(model, batch), targets, reduction="none")
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
        return model.state_dict()


def solved(root_RP, v_QP, damping):
    """(A^T A + damping I)^-1 v, by the Woodbury identity."""
    small = root_RP @ root_RP.t() + damping * torch.eye(len(root_RP), dtype=v_QP.dtype)
    inner = torch.linalg.solve(small, root_RP @ v_QP.t())
    return (v_QP - (root_RP.t() @ inner).t()) / damping


def channel_norms(module, gradients):
    """Norms (N, C) of weight gradients (N, *shape): L2 over the inputs, summed over the kernel."""
    inputs, outputs = 2, 1
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    if isinstance(module, transposed) or type(module).__name__ == "Conv1D":
        inputs, outputs = 1, 2
    norms = gradients.movedim((outputs, inputs), (1, 2)).norm(dim=2)
    return norms.flatten(2).sum(2) if norms.ndim > 2 else norms


def channel_means(module, output):
    """An activation (1, ...) of a layer, clamped at zero, mean over positions: (C,)."""
    positive = output.clamp_min(0)[0]
    last = not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and not type(
        module
    ).__name__.startswith("ConvTranspose")
    channels_first = positive.movedim(-1, 0) if last else positive
    return channels_first.flatten(1).mean(1) if channels_first.ndim > 1 else channels_first


def activations(truth, layers):
    """Mean positive activations of layers for every query: {layer: (Q, C)}."""
    found = {layer: [] for layer in layers}
    handles = [
        truth.model.get_submodule(layer).register_forward_hook(
            lambda module, _, output, layer=layer: found[layer].append(
                channel_means(module, output.detach().clone())
            )
        )
        for layer in layers
    ]
    with torch.no_grad():
        for test in truth.tests:
            truth.task.losses(truth.model, truth.test_sample(test))
    for handle in handles:
        handle.remove()
    return {layer: torch.stack(rows).numpy() for layer, rows in found.items()}


def error(found, expected, *, least=0.0):
    """Largest difference, relative to the largest number of each row; NaN counts as infinite.

    Args:
        least: Rows whose numbers are smaller are compared with this instead: they are rounding.
    """
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        raise AssertionError(f"shape {found.shape}, not {expected.shape}")
    rows = (len(expected), -1) if expected.ndim > 1 else (1, -1)
    found, expected = found.reshape(rows), expected.reshape(rows)
    scale = np.maximum(np.abs(expected).max(1), max(least, 1e-30))
    errors = np.abs(found - expected).max(1) / scale
    return float(np.nan_to_num(errors, nan=np.inf).max())
