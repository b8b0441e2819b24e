"""Roots of the loss's Hessian in the outputs: vectors s whose s s^T add up to it.

The Gauss-Newton matrix of a sample is J^T H J, with J the Jacobian of its outputs and H the Hessian
of its loss in them. With s from here J^T s s^T J adds up to it: exactly for all columns of a root
of H, in expectation for one random s. So per-sample gradients of (outputs . s) are all that EK-FAC
needs. A random s is what a target drawn from the model's own distribution gives
(Martens: "New Insights and Perspectives on the Natural Gradient Method", JMLR 2020, section 6).

Letters: B batch, D numbers of a sample's outputs, K columns.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from influence_jobs.curvature.output_loss import Form
from influence_jobs.errors import ModelError, SpecError

MOST_EXACT = 1024  # outputs of a sample whose Hessian is formed; its root takes D^3
_CONVEX = 1e-4  # negative curvature, as a part of the largest, that is rounding
_STREAM = 4  # keeps Philox's numbers apart from those of other uses of the same seed


class Draws:
    """Uniform numbers in [0, 1), a function of seed and position alone.

    Args:
        positions: Of the samples of a batch among all, (B,).
    """

    def __init__(self, seed: int, positions: Sequence[int], device: torch.device) -> None:
        self._seed, self._positions, self._device = seed, positions, device

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """Numbers (B, *shape), float32."""
        rows = np.empty((len(self._positions), math.prod(shape)), dtype=np.float32)
        for row, position in zip(rows, self._positions, strict=True):
            bits = np.random.Philox(key=[self._seed, position], counter=[0, 0, _STREAM, 0])
            np.random.Generator(bits).random(out=row, dtype=np.float32)
        return torch.from_numpy(rows).view(len(rows), *shape).to(self._device)


def exact_roots(form: Form, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
    """Columns (B, ...) of a root of each sample's Hessian, those that are zero left out.

    Raises:
        SpecError: A sample has more than `MOST_EXACT` outputs.
        ModelError: The loss is not convex in the outputs.
    """
    size = outputs[0].numel()
    if size > MOST_EXACT:
        raise SpecError(
            f"--targets exact takes up to {MOST_EXACT:,} outputs a sample, and there are "
            f"{size:,}: use --targets sampled"
        )
    basis_DD = torch.eye(size, dtype=outputs.dtype, device=outputs.device)
    columns = [
        _times_hessian(form, outputs, targets, unit_D.view(outputs.shape[1:]).expand_as(outputs))
        for unit_D in basis_DD
    ]
    rows = [column.reshape(len(outputs), size) for column in columns]
    hessian_BDD = torch.stack(rows, dim=2).double()
    values_BD, vectors_BDD = torch.linalg.eigh(hessian_BDD)
    _require_convex(values_BD)
    roots_BDD = (vectors_BDD * values_BD.clamp(min=0).sqrt().unsqueeze(1)).to(outputs.dtype)
    largest = values_BD.max()
    for k in range(size):
        if values_BD[:, k].max() > 1e-12 * largest:
            yield roots_BDD[:, :, k].view_as(outputs)


def sampled_root(form: Form, outputs: Tensor, targets: Tensor, draws: Draws) -> Tensor:
    """A random s (B, ...) with E[s s^T] = H for every sample.

    Raises:
        ModelError: The loss is one of the task's own that is not convex, or whose Hessian is
            neither small nor diagonal.
    """
    if form.sampled is not None:
        return form.sampled(outputs, targets, draws)
    diagonal = _times_hessian(form, outputs, targets, torch.ones_like(outputs))
    signs = torch.where(draws(outputs.shape[1:]) < 0.5, -1.0, 1.0).to(outputs)
    product = _times_hessian(form, outputs, targets, signs)
    if not torch.allclose(product, diagonal * signs, rtol=1e-4, atol=1e-5 * float(product.norm())):
        raise ModelError(
            f"EK-FAC cannot sample targets of {form.words}, which couples a sample's "
            f"{outputs[0].numel():,} outputs: name the loss in output_loss, or use --solver cg"
        )
    _require_convex(diagonal)
    return diagonal.clamp(min=0).sqrt() * signs


def _times_hessian(form: Form, outputs: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:
    """The Hessian of each sample's own loss, times its tangent."""
    return form.hessian(outputs, targets, tangents) * len(outputs)


def _require_convex(eigenvalues: Tensor) -> None:
    if eigenvalues.min() < -_CONVEX * eigenvalues.abs().max():
        raise ModelError(
            "the loss is not convex in the outputs, so it has no Gauss-Newton factors: use "
            "--operator hessian with --solver cg or lissa"
        )
