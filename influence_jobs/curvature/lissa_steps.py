r"""Steps of LiSSA's recursion h <- v + (1 - d) h - A_B h / s: of any model, and of perceptrons in blocks.

The first layer of a perceptron holds nearly all its weights, and a step touches all of them, for every vector, for a handful of
samples. But the samples are known in advance and the recursion is linear. Let X_t be the first layer's inputs (B, I) in step
t, D_t the part of A_B h that belongs to its outputs, (B, C), so that its rows of A_B h are D_t^T X_t, r = 1 - d and
c_t = 1 + r + ... + r^(t-1). From h_0 at a block's begin

    h_t = r^t h_0 + c_t v - sum_{u<t} r^(t-1-u) D_u^T X_u / s,

and all that a step asks of h is the change of the layer's outputs along it,

    X_t h_t^T = r^t X_t h_0^T + c_t X_t v^T - sum_{u<t} r^(t-1-u) (X_t X_u^T) D_u / s.

The first two terms come from one product each of the block's inputs with h_0 and v, the latter next to free where a
query is one sample's loss; X_t X_u^T from one Gram matrix that all vectors
share, and one more product takes the block's updates. Nothing is left out: this is the recursion up to rounding.

Letters: Q vectors, S steps of a block, B batch, K = S B samples, C outputs of a layer, I its inputs with the ones that
stand for its bias.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from influence_jobs.curvature.operators import GaussNewton, Hessian, Operator
from influence_jobs.tasks.chain import Chain, find_chain, first_inputs

BLOCK_SAMPLES = 256  # K, at most, by measurement
AGREEMENT = 1e-3  # relative difference of a product; rounding makes 1e-6


class LissaSteps(ABC):
    """Where the recursion stands for Q vectors, h_0 = v.

    Attributes:
        longest: As many steps can be taken at once.
    """

    longest: int

    @abstractmethod
    def take(self, ids_SB: Tensor, total_QP: Tensor | None = None) -> None:
        """S steps with these mini-batches, adding every h to a total."""

    @abstractmethod
    def h_QP(self) -> Tensor:
        """Where it stands."""

    @abstractmethod
    def lengths(self) -> Tensor:
        """Lengths (Q,) of h."""


def lissa_steps(
    operator: Operator, rhs_QP: Tensor, own_damping: float, scale: float, batch_size: int
) -> LissaSteps:
    """Blocked steps where the rule below admits the model and they agree with the operator; else any model's.

    The rule: the Gauss-Newton matrix or the exact Hessian of a cross-entropy, of a model that is a `Chain`, and of
    all its parameters.
    """
    steps = AnySteps(operator, rhs_QP, own_damping, scale)
    if operator.task.output_loss != "cross-entropy" or not (
        isinstance(operator, GaussNewton)
        or (isinstance(operator, Hessian) and not operator.finite_difference)
    ):
        return steps
    chain = find_chain(operator.model)
    if chain is None or set(operator.space.shapes) != set(_names(chain)):
        return steps
    operator.look()
    ids = operator.ids[:batch_size]
    inputs = first_inputs(operator.task, operator.model, chain, operator.batch(ids))
    if inputs.ndim != 2:
        return steps
    once = ChainSteps(operator, chain, rhs_QP, 0.0, 1.0, len(ids))
    once.take(ids[None])
    expected_QP = operator.product(rhs_QP, ids)
    error_QP = 2 * rhs_QP - once.h_QP() - expected_QP
    # The sum of 2 v and h rounds by the size of v.
    if error_QP.norm() > AGREEMENT * torch.maximum(expected_QP.norm(), rhs_QP.norm()):
        return steps
    return ChainSteps(operator, chain, rhs_QP, own_damping, scale, batch_size)


class AnySteps(LissaSteps):
    """One product of the operator a step."""

    longest = 16  # divergence is looked for in between

    def __init__(self, operator: Operator, rhs_QP: Tensor, own_damping: float, scale: float):
        self._operator, self._rhs_QP = operator, rhs_QP
        self._decay, self._scale = 1 - own_damping, scale
        self._h_QP = rhs_QP.clone()

    def take(self, ids_SB: Tensor, total_QP: Tensor | None = None) -> None:
        for ids in ids_SB:
            product_QP = self._operator.product(self._h_QP, ids)
            self._h_QP.mul_(self._decay).add_(self._rhs_QP)
            self._h_QP.add_(product_QP, alpha=-1 / self._scale)
            if total_QP is not None:
                total_QP += self._h_QP

    def h_QP(self) -> Tensor:
        return self._h_QP

    def lengths(self) -> Tensor:
        lengths_Q: Tensor = torch.linalg.vector_norm(self._h_QP, dim=1)
        return lengths_Q


class ChainSteps(LissaSteps):
    """Perceptrons: derivatives along all vectors written out as plain products, the first layer in blocks.

    Along h, the outputs of a layer change by R z = (R a) W^T + a h^T. Back through the layers goes the output loss's
    second derivative times R z; for the Hessian, with the derivative of the gradient itself (Pearlmutter 1994).
    """

    def __init__(
        self,
        operator: Operator,
        chain: Chain,
        rhs_QP: Tensor,
        own_damping: float,
        scale: float,
        batch_size: int,
    ):
        self._operator, self._chain, self._scale = operator, chain, scale
        self._decay, self._num_vectors = 1 - own_damping, len(rhs_QP)
        self._whole_hessian = isinstance(operator, Hessian)
        self._weights = _with_bias(
            chain, {name: p.detach()[None] for name, p in operator.space.parameters().items()}
        )
        self._inner = [w_CI[:, :-1].contiguous() for w_CI in self._weights]
        self._v = _with_bias(chain, operator.space.split(rhs_QP))
        self._h = [v_RI.clone() for v_RI in self._v]
        self._first_v = _Forcing(self._v[0], len(rhs_QP))
        inputs = self._weights[0].shape[1]
        self.longest = max(1, min(BLOCK_SAMPLES, inputs) // batch_size)

    @torch.no_grad()
    def take(self, ids_SB: Tensor, total_QP: Tensor | None = None) -> None:
        (steps, size), operator = ids_SB.shape, self._operator
        batch = operator.batch(ids_SB.flatten())
        operator.work += operator.cost * self._num_vectors * ids_SB.numel()
        x_KI = first_inputs(operator.task, operator.model, self._chain, batch)
        x_KI = F.pad(x_KI, (0, 1), value=1.0)
        totals = [torch.zeros_like(h_RI) for h_RI in self._h[1:]]
        block = _Block(self._h[0], self._first_v, x_KI, steps, self._decay, self._scale)
        network = _network(self._weights, x_KI, operator.task.targets(batch), size)
        for step, (seen, d_BR) in enumerate(
            zip(network, torch.split(block.d_KR, size), strict=True)
        ):
            self._step(block.outputs(step), seen, d_BR)
            if total_QP is not None:
                for total_RI, h_RI in zip(totals, self._h[1:], strict=True):
                    total_RI += h_RI
        if total_QP is not None:
            self._add(total_QP, [block.total(), *totals])
        block.finish()

    def _step(self, rz_BR: Tensor, seen: "_Seen", d_BR: Tensor) -> None:
        """Take a step of all layers but the first, and fill in the first's D (B, R)."""
        size, vectors = len(rz_BR), self._num_vectors
        tangents = []
        for mask_B1C, a_BI, w_CI, h_RI in zip(
            seen.masks, seen.inputs, self._inner[1:], self._h[1:], strict=True
        ):
            ra_BQC = rz_BR.view(size, vectors, -1) * mask_B1C
            tangents.append(ra_BQC)
            rz_BR = (ra_BQC.view(size * vectors, -1) @ w_CI.t()).view(size, -1)
            rz_BR.addmm_(a_BI, h_RI.t())
        weighted_BQC = rz_BR.view(size, vectors, -1) * seen.mean_probabilities_B1C
        d_BQC = weighted_BQC.addcmul(
            seen.probabilities_B1C, weighted_BQC.sum(2, keepdim=True), value=-1
        )
        for layer in reversed(range(len(tangents))):
            w_CI, h_RI = self._inner[layer + 1], self._h[layer + 1]
            below_BQI = (d_BQC.view(size * vectors, -1) @ w_CI).view(size, vectors, -1)
            if self._whole_hessian:
                delta_BC = seen.deltas[layer]
                h_QCI = h_RI.view(vectors, -1, h_RI.shape[1])[..., :-1]
                below_BQI += (delta_BC @ h_QCI).transpose(0, 1)
                update_QCI = delta_BC.t() @ tangents[layer].transpose(0, 1)
            h_RI.addmm_(
                d_BQC.view(size, -1).t(),
                seen.inputs[layer],
                beta=self._decay,
                alpha=-1 / self._scale,
            )
            h_RI.add_(self._v[layer + 1])
            if self._whole_hessian:
                h_QCI.add_(update_QCI, alpha=-1 / self._scale)
            d_BQC = below_BQI.mul_(seen.masks[layer]) if layer else below_BQI
        derivative = seen.masks[0] if seen.masks else 1  # of what follows the first layer
        torch.mul(d_BQC, derivative, out=d_BR.view(size, vectors, -1))

    def h_QP(self) -> Tensor:
        total_QP = self._h[0].new_zeros(self._num_vectors, self._operator.size)
        self._add(total_QP, self._h)
        return total_QP

    def lengths(self) -> Tensor:
        squares = [h_RI.view(self._num_vectors, -1).square().sum(1) for h_RI in self._h]
        return torch.stack(squares).sum(0).sqrt()

    def _add(self, total_QP: Tensor, layers: list[Tensor]) -> None:
        """Add layers (Q C, I) to vectors of the space."""
        views = self._operator.space.split(total_QP)
        for name, h_RI in zip(self._chain.linears, layers, strict=True):
            h_QCI = h_RI.view(self._num_vectors, -1, h_RI.shape[1])
            views[f"{name}.weight"] += h_QCI[..., :-1]
            views[f"{name}.bias"] += h_QCI[..., -1]


@dataclass(frozen=True)
class _Seen:
    """What the samples of a step make of the network, whatever the vectors.

    Attributes:
        inputs: Those (B, I) of every layer after the first.
        masks: Where each of them is above zero, as the derivative (B, 1, C) of ReLU.
        probabilities_B1C: Softmax of the logits.
        mean_probabilities_B1C: The same over B.
        deltas: Gradients (B, C) of the mean loss by the outputs of every layer after the first.
    """

    inputs: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]
    probabilities_B1C: Tensor
    mean_probabilities_B1C: Tensor
    deltas: tuple[Tensor, ...]


def _network(weights: list[Tensor], x_KI: Tensor, targets_K: Tensor, size: int) -> Iterator[_Seen]:
    """Forward and backward of a block's samples together, then step by step."""
    inputs, masks = [], []
    z_KC = x_KI @ weights[0].t()
    for w_CI in weights[1:]:
        masks.append((z_KC > 0).to(z_KC.dtype))
        inputs.append(F.pad(z_KC.relu(), (0, 1), value=1.0))
        z_KC = inputs[-1] @ w_CI.t()
    p_KC = z_KC.softmax(1)
    deltas = [(p_KC - F.one_hot(targets_K, p_KC.shape[1])) / size]
    for mask_KC, w_CI in zip(masks[:0:-1], weights[:1:-1], strict=True):
        deltas.insert(0, (deltas[0] @ w_CI[:, :-1]) * mask_KC)
    parts = [
        *inputs,
        *(m_KC[:, None] for m_KC in masks),
        p_KC[:, None],
        p_KC[:, None] / size,
        *deltas,
    ]
    n = len(inputs)
    for step in zip(*(torch.split(part, size) for part in parts), strict=True):
        yield _Seen(step[:n], step[n : 2 * n], step[2 * n], step[2 * n + 1], step[2 * n + 2 :])


class _Forcing:
    """The first layer's part of v, (R, I), and its product with inputs.

    A query that is the loss of one sample has an outer product there, which makes that product next to nothing.

    Attributes:
        v_RI: What it is.
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

    def along(self, x_KI: Tensor) -> Tensor:
        """X v^T, (K, R)."""
        if self._outer is None:
            return x_KI @ self.v_RI.t()
        column_QC, row_QI = self._outer
        return ((x_KI @ row_QI.t())[:, :, None] * column_QC).flatten(1)


class _Block:
    """Some steps of the first layer: ask for each step's `outputs`, fill in its rows of `d_KR`, then `finish`.

    Attributes:
        d_KR: The D of all vectors, (K, Q C).
    """

    def __init__(
        self, h_RI: Tensor, forcing: _Forcing, x_KI: Tensor, steps: int, decay: float, scale: float
    ):
        self._h_RI, self._v_RI, self._x_KI, self._scale = h_RI, forcing.v_RI, x_KI, scale
        self._size = len(x_KI) // steps
        power_T = decay ** torch.arange(steps + 1, dtype=torch.float64)
        sum_T = F.pad(power_T.cumsum(0), (1, 0))[:-1]  # c_0 to c_S
        self._powers, self._sums = power_T.tolist(), sum_T.tolist()

        def by_row(values_S: Tensor) -> Tensor:
            return values_S.repeat_interleave(self._size)[:, None].to(x_KI)

        self._updates_K1 = by_row(power_T[:-1].flip(0))  # step u has S - 1 - u steps to decay
        self._shares_K1 = by_row(sum_T[1:].flip(0))
        step_K = torch.arange(steps).repeat_interleave(self._size)
        lag_KK = step_K[:, None] - step_K - 1
        answers_KK = torch.where(lag_KK < 0, 0.0, power_T[lag_KK.clamp(min=0)] / -scale)
        self._pending_KK = (x_KI @ x_KI.t()).mul_(answers_KK.to(x_KI))
        self._base_KR = (x_KI @ h_RI.t()).mul_(by_row(power_T[:-1]))
        self._base_KR.addcmul_(forcing.along(x_KI), by_row(sum_T[:-1]))
        self.d_KR = torch.empty_like(self._base_KR)

    def outputs(self, step: int) -> Tensor:
        """How the layer's outputs change along every vector, (B, R), the steps before being done."""
        start, stop = step * self._size, (step + 1) * self._size
        if not step:
            return self._base_KR[:stop]
        return torch.addmm(
            self._base_KR[start:stop], self._pending_KK[start:stop, :start], self.d_KR[:start]
        )

    def total(self) -> Tensor:
        """The sum (R, I) of h after every step."""
        total_RI: Tensor = self._v_RI * sum(self._sums[1:])
        total_RI.add_(self._h_RI, alpha=sum(self._powers[1:]))
        d_KR = self.d_KR * self._shares_K1
        return total_RI.addmm_(d_KR.t(), self._x_KI, alpha=-1 / self._scale)

    def finish(self) -> None:
        """Take all the block's updates."""
        d_KR = self.d_KR * self._updates_K1
        self._h_RI.addmm_(d_KR.t(), self._x_KI, beta=self._powers[-1], alpha=-1 / self._scale)
        self._h_RI.add_(self._v_RI, alpha=self._sums[-1])


def _names(chain: Chain) -> list[str]:
    return [f"{layer}.{kind}" for layer in chain.linears for kind in ("weight", "bias")]


def _with_bias(chain: Chain, parts: dict[str, Tensor]) -> list[Tensor]:
    """Weights (Q, C, I - 1) and biases (Q, C) of every layer as (Q C, I), contiguous."""
    return [
        torch.cat((parts[f"{name}.weight"], parts[f"{name}.bias"][..., None]), dim=2).flatten(0, 1)
        for name in chain.linears
    ]
