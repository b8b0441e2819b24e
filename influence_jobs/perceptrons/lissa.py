r"""Blocks of LiSSA's steps for perceptrons.

The recursion is h <- v + (1 - d) h - A_B h / s. The first layer of a perceptron holds nearly all
its weights. A step touches all of them, for every vector, although its mini-batch has only a few
samples. But the samples are known in advance and the recursion is linear. So the first layer's
update can wait for the end of a block of steps.

Let X_t be the first layer's inputs (B, I) in step t. Let D_t be the part of A_B h that belongs to
the layer's outputs, (B, C), so that the layer's rows of A_B h are D_t^T X_t. With r = 1 - d,
c_t = 1 + r + ... + r^(t-1) and h_0 the value at the beginning of the block,

    h_t = r^t h_0 + c_t v - sum_{u<t} r^(t-1-u) D_u^T X_u / s.

A step needs h only for the change of the layer's outputs along it, which is

    X_t h_t^T = r^t X_t h_0^T + c_t X_t v^T - sum_{u<t} r^(t-1-u) (X_t X_u^T) D_u / s.

The first two terms take one product of the block's inputs with h_0 and one with v. The second costs
almost nothing if each query is the loss of one sample (`_Forcing`). X_t X_u^T comes from one Gram
matrix that all vectors share. One more product makes the block's updates. No term is left out: the
result is that of the recursion up to rounding.

Letters: E repeats side by side, each with mini-batches of its own, Q vectors, S steps of a block,
B samples of a mini-batch, K = S B, C outputs of a layer, I its inputs with a one for the bias,
R = Q C rows.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from influence_jobs.curvature.derivatives import agreement
from influence_jobs.curvature.lissa_steps import LissaSteps
from influence_jobs.curvature.matrices import GaussNewton, Hessian
from influence_jobs.curvature.operators import Operator
from influence_jobs.perceptrons.network import Perceptron, find_perceptron, first_inputs
from influence_jobs.perceptrons.pending import PendingOutputs, padded
from influence_jobs.tasks.base import Batch
from influence_jobs.tasks.placement import device_of
from influence_jobs.transfers import loader_for, on_device

BLOCK_SAMPLES = 192  # the largest K; fastest by measurement


def perceptron_lissa_steps(
    operator: Operator,
    rhs_QP: Tensor,
    own_damping: float,
    scale: float,
    batch_size: int,
    repeats: int,
) -> "PerceptronLissaSteps | None":
    """Blocked steps, or None where they do not apply or do not agree with the operator.

    They apply to the Gauss-Newton matrix and the exact Hessian of a cross-entropy, of a model that
    is a `Perceptron`, over all its parameters. One mini-batch is used to see whether they agree.

    Args:
        operator: A.
        rhs_QP: v.
        own_damping: d.
        scale: s.
        batch_size: B.
        repeats: E.
    """
    if operator.task.output_loss != "cross-entropy" or not (
        isinstance(operator, GaussNewton)
        or (isinstance(operator, Hessian) and not operator.finite_difference)
    ):
        return None
    perceptron = find_perceptron(operator.model)
    if perceptron is None or set(operator.space.shapes) != perceptron.parameters:
        return None
    operator.look()
    ids = operator.ids[:batch_size]
    inputs = first_inputs(operator.task, operator.model, perceptron, operator.batch(ids))
    if inputs.ndim != 2:
        return None
    # With d = 0 and s = 1 the first step gives h = 2 v - A_B v.
    once = PerceptronLissaSteps(operator, perceptron, rhs_QP, 0.0, 1.0, len(ids), 1)
    once.take(ids[None, None])
    expected_QP = operator.product(rhs_QP, ids)
    error_QP = 2 * rhs_QP - once.h_EQP()[0] - expected_QP
    # The rounding error of 2 v - h is relative to v, even if A_B v is small.
    if error_QP.norm() > agreement() * torch.maximum(expected_QP.norm(), rhs_QP.norm()):
        return None
    return PerceptronLissaSteps(
        operator, perceptron, rhs_QP, own_damping, scale, batch_size, repeats
    )


class PerceptronLissaSteps(LissaSteps):
    """Derivatives along all vectors as plain matrix products, with the first layer in blocks.

    Let a layer have inputs a and outputs z = a W^T, and let a' and z' be their derivatives along h.
    Then z' = a' W^T + a h^T. The second derivative of the output loss times z' is propagated back
    through the layers. The Hessian also needs the derivative of the gradient itself (Pearlmutter:
    "Fast exact multiplication by the Hessian", 1994). The code writes `rz` for z' and `ra` for a'.
    """

    def __init__(
        self,
        operator: Operator,
        perceptron: Perceptron,
        rhs_QP: Tensor,
        own_damping: float,
        scale: float,
        batch_size: int,
        repeats: int,
    ):
        self._operator, self._perceptron, self._scale = operator, perceptron, scale
        self._decay, self._num_vectors = 1 - own_damping, len(rhs_QP)
        self._whole_hessian = isinstance(operator, Hessian)
        self._weights = _with_bias(
            perceptron, {name: p.detach()[None] for name, p in operator.space.parameters().items()}
        )
        self._inner = [w_CI[:, :-1].contiguous() for w_CI in self._weights[1:]]
        self._v = _with_bias(perceptron, operator.space.split(rhs_QP))
        self._h = [v_RI.repeat(repeats, 1, 1) for v_RI in self._v]
        self._first_v = _Forcing(self._v[0], len(rhs_QP))
        inputs = self._weights[0].shape[1]
        self.longest = max(1, min(BLOCK_SAMPLES, inputs) // batch_size)

    def blocks(self, ids: Iterable[Tensor], total_EQP: Tensor | None = None) -> Iterator[int]:
        operator = self._operator
        loader = loader_for(device_of(operator.model))
        for ids_ESB, batch in loader((one, operator.batch(one.flatten())) for one in ids):
            self._take(ids_ESB, batch, total_EQP)
            yield ids_ESB.shape[1]

    @torch.no_grad()
    def _take(self, ids_ESB: Tensor, batch: Batch, total_EQP: Tensor | None) -> None:
        (repeats, steps, size), operator = ids_ESB.shape, self._operator
        operator.work += operator.cost * self._num_vectors * ids_ESB.numel()
        x_NI = first_inputs(operator.task, operator.model, self._perceptron, batch)
        x_EKI = padded(F.pad(x_NI, (0, 1), value=1.0)).view(repeats, steps * size, -1)
        targets_EK = operator.task.targets(batch).view(repeats, -1)
        totals = [torch.zeros_like(h_ERI) for h_ERI in self._h[1:]]
        block = _Block(self._h[0], self._first_v, x_EKI, steps, self._decay, self._scale)
        network = _network(self._weights, x_EKI, targets_EK, size)
        for step, (seen, d_EBR) in enumerate(
            zip(network, torch.split(block.d_EKR, size, dim=1), strict=True)
        ):
            self._step(block.outputs(step), seen, d_EBR)
            if total_EQP is not None:
                for total_ERI, h_ERI in zip(totals, self._h[1:], strict=True):
                    total_ERI += h_ERI
        if total_EQP is not None:
            self._add(total_EQP, [block.total(), *totals])
        block.finish()

    def _step(self, rz_EBR: Tensor, seen: "_Seen", d_EBR: Tensor) -> None:
        """Take one step of all layers except the first, and fill in the first layer's D.

        Args:
            rz_EBR: Derivative of the first layer's outputs along every h.
            seen: The network's pass of the step's samples.
            d_EBR: Receives D.
        """
        (repeats, size, _), vectors = rz_EBR.shape, self._num_vectors
        tangents = []
        for mask_EB1C, a_EBI, w_CI, h_ERI in zip(
            seen.masks, seen.inputs, self._inner, self._h[1:], strict=True
        ):
            ra_EBQC = rz_EBR.view(repeats, size, vectors, -1) * mask_EB1C
            tangents.append(ra_EBQC)
            rz_EBR = (ra_EBQC.flatten(0, 2) @ w_CI.t()).view(repeats, size, -1)
            rz_EBR.baddbmm_(a_EBI, h_ERI.mT)
        weighted_EBQC = rz_EBR.view(repeats, size, vectors, -1) * seen.mean_probabilities_EB1C
        d_EBQC = weighted_EBQC.addcmul(
            seen.probabilities_EB1C, weighted_EBQC.sum(3, keepdim=True), value=-1
        )
        for layer in reversed(range(len(tangents))):
            w_CI, h_ERI = self._inner[layer], self._h[layer + 1]
            below_EBQI = (d_EBQC.flatten(0, 2) @ w_CI).view(repeats, size, vectors, -1)
            if self._whole_hessian:
                delta_EBC = seen.deltas[layer][:, None]
                h_EQCI = _by_query(h_ERI, vectors)[..., :-1]
                below_EBQI += (delta_EBC @ h_EQCI).transpose(1, 2)
                update_EQCI = delta_EBC.mT @ tangents[layer].transpose(1, 2)
            h_ERI.baddbmm_(
                d_EBQC.view(repeats, size, -1).mT,
                seen.inputs[layer],
                beta=self._decay,
                alpha=-1 / self._scale,
            )
            h_ERI.add_(self._v[layer + 1])
            if self._whole_hessian:
                h_EQCI.add_(update_EQCI, alpha=-1 / self._scale)
            d_EBQC = below_EBQI.mul_(seen.masks[layer]) if layer else below_EBQI
        derivative = seen.masks[0] if seen.masks else 1  # of the ReLU after the first layer
        torch.mul(d_EBQC, derivative, out=d_EBR.view(repeats, size, vectors, -1))

    def h_EQP(self) -> Tensor:
        total_EQP = self._h[0].new_zeros(len(self._h[0]), self._num_vectors, self._operator.size)
        self._add(total_EQP, self._h)
        return total_EQP

    def lengths(self) -> Tensor:
        squares = [_by_query(h_ERI, self._num_vectors).square().sum((2, 3)) for h_ERI in self._h]
        return torch.stack(squares).sum(0).sqrt()

    def _add(self, total_EQP: Tensor, layers: list[Tensor]) -> None:
        """Add layers (E, Q C, I) to vectors of the space."""
        views = self._operator.space.split(total_EQP)
        for name, h_ERI in zip(self._perceptron.linears, layers, strict=True):
            h_EQCI, weight_EQCI = _by_query(h_ERI, self._num_vectors), views[f"{name}.weight"]
            weight_EQCI += h_EQCI[..., : weight_EQCI.shape[3]]
            views[f"{name}.bias"] += h_EQCI[..., weight_EQCI.shape[3]]


@dataclass(frozen=True)
class _Seen:
    """The results of the network's forward and backward pass in one step, for all vectors.

    Attributes:
        inputs: Inputs (E, B, I) of every layer after the first.
        masks: Derivatives (E, B, 1, C) of the ReLU before each of these layers: 0 or 1.
        probabilities_EB1C: Softmax of the logits.
        mean_probabilities_EB1C: The probabilities divided by B.
        deltas: Gradients (E, B, C) of the mean loss by the outputs of every layer after the first.
    """

    inputs: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]
    probabilities_EB1C: Tensor
    mean_probabilities_EB1C: Tensor
    deltas: tuple[Tensor, ...]


def _network(
    weights: list[Tensor], x_EKI: Tensor, targets_EK: Tensor, size: int
) -> Iterator[_Seen]:
    """One forward and backward pass of all samples of a block; yields its results step by step."""
    inputs, masks = [], []
    z_EKC = x_EKI @ weights[0].t()
    for w_CI in weights[1:]:
        masks.append((z_EKC > 0).to(z_EKC.dtype))
        inputs.append(F.pad(z_EKC.relu(), (0, 1), value=1.0))
        z_EKC = inputs[-1] @ w_CI.t()
    p_EKC = z_EKC.softmax(2)
    deltas = [(p_EKC - F.one_hot(targets_EK, p_EKC.shape[2])) / size]
    for mask_EKC, w_CI in zip(masks[:0:-1], weights[:1:-1], strict=True):
        deltas.insert(0, (deltas[0] @ w_CI[:, :-1]) * mask_EKC)
    parts = [
        *inputs,
        *(m_EKC[:, :, None] for m_EKC in masks),
        p_EKC[:, :, None],
        p_EKC[:, :, None] / size,
        *deltas,
    ]
    n = len(inputs)
    for step in zip(*(torch.split(part, size, dim=1) for part in parts), strict=True):
        yield _Seen(step[:n], step[n : 2 * n], step[2 * n], step[2 * n + 1], step[2 * n + 2 :])


class _Forcing:
    """The first layer's part of v, and its product with inputs.

    If every query is the loss of one sample, its gradient by this layer is an outer product. Then
    the product with inputs uses the two factors and costs almost nothing.

    Attributes:
        v_RI: The first layer's part of v.
    """

    def __init__(self, v_RI: Tensor, num_vectors: int):
        self.v_RI, self._outer = v_RI, None
        v_QCI = v_RI.view(num_vectors, -1, v_RI.shape[1])
        queries = torch.arange(num_vectors, device=v_RI.device)
        largest_Q = v_QCI.flatten(1).abs().argmax(1)
        row_Q, column_Q = largest_Q // v_RI.shape[1], largest_Q % v_RI.shape[1]
        row_QI, column_QC = v_QCI[queries, row_Q], v_QCI[queries, :, column_Q]
        column_QC = (column_QC / row_QI.gather(1, column_Q[:, None])).nan_to_num(nan=0)
        rest_QCI = v_QCI - column_QC[:, :, None] * row_QI[:, None]
        tolerance = 8 * torch.finfo(v_RI.dtype).eps
        if (rest_QCI.flatten(1).norm(dim=1) <= tolerance * v_QCI.flatten(1).norm(dim=1)).all():
            self._outer = column_QC, row_QI

    def along(self, x_EKI: Tensor) -> Tensor:
        """X v^T, (E, K, R)."""
        if self._outer is None:
            return x_EKI @ self.v_RI.t()
        column_QC, row_QI = self._outer
        return ((x_EKI @ row_QI.t())[..., None] * column_QC).flatten(2)


class _Block:
    """A block of steps of the first layer.

    For each step call `outputs` and fill in its rows of `d_EKR`; then call `finish`.

    Attributes:
        outputs: Gives the change (E, B, R) of the layer's outputs along every h in a step.
        d_EKR: D of all vectors.
    """

    def __init__(
        self,
        h_ERI: Tensor,
        forcing: _Forcing,
        x_EKI: Tensor,
        steps: int,
        decay: float,
        scale: float,
    ):
        self._h_ERI, self._v_RI, self._x_EKI, self._scale = h_ERI, forcing.v_RI, x_EKI, scale
        size = x_EKI.shape[1] // steps
        power_T = decay ** torch.arange(steps + 1, dtype=torch.float64)
        sum_T = F.pad(power_T.cumsum(0), (1, 0))[:-1]  # c_0 to c_S
        self._powers, self._sums = power_T.tolist(), sum_T.tolist()

        def by_row(values_S: Tensor) -> Tensor:
            return there(values_S.repeat_interleave(size)[:, None])

        def there(values: Tensor) -> Tensor:
            return on_device(values.to(x_EKI.dtype), x_EKI.device)

        self._updates_K1 = by_row(power_T[:-1].flip(0))  # D of step u decays for S - 1 - u steps
        self._shares_K1 = by_row(sum_T[1:].flip(0))
        step_K = torch.arange(steps).repeat_interleave(size)
        lag_KK = step_K[:, None] - step_K - 1
        responses_KK = torch.where(lag_KK < 0, 0.0, power_T[lag_KK.clamp(min=0)] / -scale)
        base_EKR = (x_EKI @ h_ERI.mT).mul_(by_row(power_T[:-1]))
        base_EKR.addcmul_(forcing.along(x_EKI), by_row(sum_T[:-1]))
        pending = PendingOutputs(base_EKR, x_EKI, there(responses_KK), size)
        self.outputs, self.d_EKR = pending.outputs, pending.d_EKC

    def total(self) -> Tensor:
        """The sum (E, R, I) of h after every step."""
        total_ERI: Tensor = self._h_ERI * sum(self._powers[1:])
        total_ERI.add_(self._v_RI, alpha=sum(self._sums[1:]))
        d_EKR = self.d_EKR * self._shares_K1
        return total_ERI.baddbmm_(d_EKR.mT, self._x_EKI, alpha=-1 / self._scale)

    def finish(self) -> None:
        """Make the updates of the whole block."""
        d_EKR = self.d_EKR * self._updates_K1
        self._h_ERI.baddbmm_(d_EKR.mT, self._x_EKI, beta=self._powers[-1], alpha=-1 / self._scale)
        self._h_ERI.add_(self._v_RI, alpha=self._sums[-1])


def _by_query(h_ERI: Tensor, vectors: int) -> Tensor:
    """(E, Q C, I) as (E, Q, C, I)."""
    repeats, _, inputs = h_ERI.shape
    return h_ERI.view(repeats, vectors, -1, inputs)


def _with_bias(perceptron: Perceptron, parts: dict[str, Tensor]) -> list[Tensor]:
    """Weights (Q, C, I - 1) and biases (Q, C) of every layer as one contiguous tensor (Q C, I).

    The tensor of the first layer is `padded`.
    """
    first, *others = (
        torch.cat((parts[f"{name}.weight"], parts[f"{name}.bias"][..., None]), dim=2).flatten(0, 1)
        for name in perceptron.linears
    )
    return [padded(first), *others]
