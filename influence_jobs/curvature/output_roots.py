"""Roots of the loss's Hessian in the outputs: vectors s whose s s^T add up to it.

The Gauss-Newton matrix of a sample is J^T H J, with J the Jacobian of its outputs and H the Hessian
of its loss in them. With s from here J^T s s^T J adds up to it: exactly for all columns of a root
of H, in expectation for one random s. So per-sample gradients of (outputs . s) are all that EK-FAC
needs.

A random s is a root times random signs. Usually one draws a target from the model's own
distribution instead (Martens: "New Insights and Perspectives on the Natural Gradient Method", JMLR
2020). That has the same mean, but where the model is sure almost all its draws are near zero, and
the others are rare and large.

Nothing waits for a GPU here: what speaks against a root is noted on the device.

Letters: B batch, D numbers of a sample's outputs, C classes, R positions that count.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from influence_jobs.errors import ModelError, SpecError
from influence_jobs.tasks.output_loss import Form
from influence_jobs.tasks.sequences import order_of
from influence_jobs.transfers import numbers, on_device

MOST_EXACT = 1024  # outputs of a sample whose Hessian is formed; its root takes D^3
# Negative curvature, as a part of the largest, that is rounding: of a diagonal, or what a Cholesky
# decomposition leaves, which is more than the eigenvalue if there are many outputs.
_CONVEX = 1e-4
_WORDS = 4  # random words per value of Philox's counter
_STREAM = 4  # keeps Philox's numbers apart from those of other uses of the same seed


class Doubts:
    """What speaks against roots, noted on the device and looked at once, after all batches."""

    def __init__(self) -> None:
        self._noted: dict[str, tuple[Tensor, Callable[[], ModelError]]] = {}

    def note(self, name: str, flag: Tensor, error: Callable[[], ModelError]) -> None:
        """A flag that must not be true, and what is raised if it is in any batch."""
        before = self._noted.get(name)
        self._noted[name] = (flag | before[0] if before else flag), error

    def settle(self) -> None:
        """Look at what was noted.

        Raises:
            ModelError: As noted; the first.
        """
        flags = numbers(flag for flag, _ in self._noted.values())
        for flag, (_, error) in zip(flags, self._noted.values(), strict=True):
            if flag:
                raise error()


def random_signs(seed: int, positions: range, like: Tensor) -> Tensor:
    """Signs +-1 of the shape of `like`, (B, ...), for the samples at some positions among all.

    They are a function of seed, position and a sample's shape.
    """
    size = like[0].numel()
    steps = -(-size // (64 * _WORDS))  # of Philox's counter, for a sample
    bits = np.random.Philox(key=[seed, steps], counter=[positions.start * steps, 0, _STREAM, 0])
    words = bits.random_raw(len(positions) * steps * _WORDS).astype("<u8")
    drawn = np.unpackbits(words.view(np.uint8).reshape(len(positions), -1), axis=1, count=size)
    return _signs(drawn, like).view_as(like)


def _signs(bits: npt.NDArray[np.uint8], like: Tensor) -> Tensor:
    return on_device(torch.from_numpy(bits), like.device).to(like.dtype).mul_(2).sub_(1)


def token_signs(
    seed: int, positions: range, like: Tensor, counted_BT: Tensor, tokens: int
) -> Tensor:
    """Signs +-1 of the shape of `like`, (B, T, V), for tokens, of which some count.

    They are a function of seed, position, and how many tokens that count come before: padding
    changes none.

    Args:
        tokens: The most tokens of a sample that count.
    """
    tokens, size = max(1, tokens), like.shape[2]
    steps = -(-size // (64 * _WORDS))  # of Philox's counter, for a token
    drawn = []
    for position in positions:
        bits = np.random.Philox(key=[seed, steps], counter=[0, position, _STREAM, 1])
        words = bits.random_raw(tokens * steps * _WORDS).astype("<u8")
        drawn.append(np.unpackbits(words.view(np.uint8).reshape(tokens, -1), axis=1, count=size))
    signs_BRV = _signs(np.stack(drawn), like)
    before_BT = (counted_BT.cumsum(1) - 1).clamp(min=0)
    return signs_BRV.gather(1, before_BT.unsqueeze(2).expand(-1, -1, size))


def exact_roots(
    form: Form, outputs: Tensor, targets: Tensor, doubts: Doubts, tokens: int | None = None
) -> Iterator[Tensor]:
    """Columns (B, ...) of a root of each sample's Hessian.

    Args:
        doubts: Takes whether the loss is not convex in the outputs.
        tokens: The most positions of a sample that count, where some do not.

    Raises:
        SpecError: A sample has more than `MOST_EXACT` outputs.
    """
    size = outputs[0].numel()
    if size > MOST_EXACT:
        raise SpecError(
            f"--targets exact takes up to {MOST_EXACT:,} outputs a sample, and there are "
            f"{size:,}: use --targets sampled"
        )
    if form.root is None:
        yield from _pivoted(form, outputs, targets, doubts)
        return
    units = _axes(outputs)
    if not form.diagonal:
        counted_BT = form.counted(targets)
        order_BR = None if counted_BT is None else order_of(counted_BT)[:, :tokens]
        units = _beside_the_roots(outputs, form.classes, order_BR)
    for unit in units:
        yield form.root(outputs, targets, unit)


def _axes(outputs: Tensor) -> Iterator[Tensor]:
    """Unit vectors (B, ...) of the outputs."""
    size = outputs[0].numel()
    for unit_D in torch.eye(size, dtype=outputs.dtype, device=outputs.device):
        yield unit_D.view(outputs.shape[1:]).expand_as(outputs)


def _beside_the_roots(outputs: Tensor, classes: int, order_BR: Tensor | None) -> Iterator[Tensor]:
    """By position, an orthonormal basis of what is orthogonal to q, the roots of probabilities.

    Along q the root of the Hessian of a softmax, diag(q) (I - q q^T), is zero. The basis are all
    columns but the last of the Householder reflection that takes q to minus the last axis.

    Args:
        order_BR: The positions that count, first; None for all.

    Yields:
        Vectors (B, ...) of the outputs' shape.
    """
    q = outputs.softmax(classes).sqrt().movedim(classes, -1)
    q_BTC = q.reshape(len(q), -1, q.shape[-1])
    samples = torch.arange(len(q), device=q.device)
    for r in range(q_BTC.shape[1] if order_BR is None else order_BR.shape[1]):
        at_B = torch.full_like(samples, r) if order_BR is None else order_BR[:, r]
        q_BC = q_BTC[samples, at_B]
        normal_BC = q_BC.clone()
        normal_BC[:, -1] += 1
        for c in range(q_BC.shape[1] - 1):
            column_BC = normal_BC * (-q_BC[:, c] / normal_BC[:, -1]).unsqueeze(1)
            column_BC[:, c] += 1
            found_BTC = torch.zeros_like(q_BTC)
            found_BTC[samples, at_B] = column_BC
            yield found_BTC.view_as(q).movedim(-1, classes)


def _pivoted(form: Form, outputs: Tensor, targets: Tensor, doubts: Doubts) -> Iterator[Tensor]:
    """Columns (B, ...) for a loss of the task's own, by a Cholesky decomposition with pivots.

    Higham: "Analysis of the Cholesky decomposition of a semi-definite matrix", 1990. It needs no
    look at the numbers, as eigenvalues do. What is not finite stays so, and is told by the sweep.
    """
    columns = [
        _times_hessian(form, outputs, targets, unit).reshape(len(outputs), -1)
        for unit in _axes(outputs)
    ]
    hessian_BDD = torch.stack(columns, dim=2).double()
    hessian_BDD = (hessian_BDD + hessian_BDD.mT) / 2
    largest_B1 = hessian_BDD.abs().amax((1, 2)).unsqueeze(1)
    rounding_B1 = 8 * torch.finfo(outputs.dtype).eps * largest_B1
    found_BDD = torch.zeros_like(hessian_BDD)  # column k of the root is row k here
    left_BD = hessian_BDD.diagonal(dim1=1, dim2=2).clone()
    size = left_BD.shape[1]
    for k in range(size):
        pivot_B1, at_B1 = left_BD.max(dim=1, keepdim=True)
        at_B11 = at_B1.unsqueeze(2)
        row_BD = hessian_BDD.gather(1, at_B11.expand(-1, 1, size)).squeeze(1)
        before_BKD = found_BDD[:, :k]
        there_BK1 = before_BKD.gather(2, at_B11.expand(-1, k, 1))
        column_BD = (row_BD - (before_BKD.mT @ there_BK1).squeeze(2)) / pivot_B1.sqrt()
        column_BD = column_BD.where(~(pivot_B1 <= rounding_B1), 0.0)
        found_BDD[:, k] = column_BD
        left_BD = left_BD - column_BD.square()
        yield column_BD.to(outputs.dtype).view_as(outputs)
    left = (hessian_BDD - found_BDD.mT @ found_BDD).abs().max()
    doubts.note("convex", left > _CONVEX * largest_B1.max(), _not_convex)


def random_root(
    form: Form, outputs: Tensor, targets: Tensor, signs: Tensor, doubts: Doubts
) -> Tensor:
    """A random s (B, ...) with E[s s^T] = H for every sample.

    Args:
        signs: Of the outputs' shape, from `random_signs`.
        doubts: Takes whether the loss is one of the task's own that is not convex, or whose Hessian
            is not diagonal.
    """
    if form.root is not None:
        return form.root(outputs, targets, signs)
    diagonal = _times_hessian(form, outputs, targets, torch.ones_like(outputs))
    product = _times_hessian(form, outputs, targets, signs)
    limit = 1e-4 * (diagonal * signs).abs() + 1e-5 * product.norm()
    coupled = ~((product - diagonal * signs).abs() <= limit).all()  # of NaN too
    words = f"{form.words}, which mixes the {outputs[0].numel():,} outputs of a sample"
    doubts.note("diagonal", coupled, lambda: _not_diagonal(words))
    doubts.note("convex", diagonal.min() < -_CONVEX * diagonal.abs().max(), _not_convex)
    return diagonal.clamp(min=0).sqrt() * signs


def _times_hessian(form: Form, outputs: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:
    """The Hessian of each sample's own loss, times its tangent."""
    return form.hessian(outputs, targets, tangents) * len(outputs)


def _not_diagonal(words: str) -> ModelError:
    return ModelError(
        f"EK-FAC cannot draw targets for {words}: give output_loss the name of a loss, or use "
        "--solver cg"
    )


def _not_convex() -> ModelError:
    return ModelError(
        "the loss is not convex in the outputs, so it has no Gauss-Newton factors: use "
        "--operator hessian with --solver cg or lissa"
    )
