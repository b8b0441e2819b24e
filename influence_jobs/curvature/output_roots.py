"""Roots of the loss's Hessian in the outputs: vectors s whose s s^T add up to it.

The Gauss-Newton matrix of a sample is J^T H J, with J the Jacobian of its outputs and H the Hessian
of its loss in them. With s from here J^T s s^T J adds up to it: exactly for all columns of a root
of H, in expectation for one random s. So per-sample gradients of (outputs . s) are all that EK-FAC
needs.

A random s is a root times random signs. Usually one draws a target from the model's own
distribution instead (Martens: "New Insights and Perspectives on the Natural Gradient Method", JMLR
2020). That has the same mean, but where the model is sure almost all its draws are near zero, and
the others are rare and large.

Letters: B batch, D numbers of a sample's outputs, K columns.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from influence_jobs.curvature.eigenvectors import eigh
from influence_jobs.errors import ModelError, SpecError
from influence_jobs.tasks.output_loss import Form
from influence_jobs.transfers import on_device

MOST_EXACT = 1024  # outputs of a sample whose Hessian is formed; its root takes D^3
_CONVEX = 1e-4  # negative curvature, as a part of the largest, that is rounding
_WORDS = 4  # random words per value of Philox's counter
_STREAM = 4  # keeps Philox's numbers apart from those of other uses of the same seed


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


def token_signs(seed: int, positions: range, like: Tensor, counted_BT: Tensor) -> Tensor:
    """Signs +-1 of the shape of `like`, (B, T, V), for tokens, of which some count.

    They are a function of seed, position, and how many tokens that count come before: padding
    changes none.
    """
    tokens, size = max(1, int(counted_BT.sum(1).max())), like.shape[2]
    steps = -(-size // (64 * _WORDS))  # of Philox's counter, for a token
    drawn = []
    for position in positions:
        bits = np.random.Philox(key=[seed, steps], counter=[0, position, _STREAM, 1])
        words = bits.random_raw(tokens * steps * _WORDS).astype("<u8")
        drawn.append(np.unpackbits(words.view(np.uint8).reshape(tokens, -1), axis=1, count=size))
    signs_BRV = _signs(np.stack(drawn), like)
    before_BT = (counted_BT.cumsum(1) - 1).clamp(min=0)
    return signs_BRV.gather(1, before_BT.unsqueeze(2).expand(-1, -1, size))


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
    values_BD, vectors_BDD = eigh(hessian_BDD)
    roots_BDD = (vectors_BDD * values_BD.clamp(min=0).sqrt().unsqueeze(1)).to(outputs.dtype)
    counts_D = values_BD.amax(0) > 1e-12 * values_BD.max()
    convex, *counts = torch.cat([_convex(values_BD).view(1), counts_D]).tolist()
    if not convex:
        raise _not_convex()
    for k in range(size):
        if counts[k]:
            yield roots_BDD[:, :, k].view_as(outputs)


def random_root(form: Form, outputs: Tensor, targets: Tensor, signs: Tensor) -> Tensor:
    """A random s (B, ...) with E[s s^T] = H for every sample.

    Args:
        signs: Of the outputs' shape, from `random_signs`.

    Raises:
        ModelError: The loss is one of the task's own that is not convex, or whose Hessian is
            neither small nor diagonal.
    """
    if form.root is not None:
        return form.root(outputs, targets, signs)
    diagonal = _times_hessian(form, outputs, targets, torch.ones_like(outputs))
    product = _times_hessian(form, outputs, targets, signs)
    limit = 1e-4 * (diagonal * signs).abs() + 1e-5 * product.norm()
    apart = ~((product - diagonal * signs).abs() <= limit).all()  # of NaN too
    coupled, convex = torch.stack([apart, _convex(diagonal)]).tolist()
    if coupled:
        raise ModelError(
            f"EK-FAC cannot draw targets for {form.words}, which mixes the {outputs[0].numel():,} "
            "outputs of a sample: give output_loss the name of a loss, or use --solver cg"
        )
    if not convex:
        raise _not_convex()
    return diagonal.clamp(min=0).sqrt() * signs


def _times_hessian(form: Form, outputs: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:
    """The Hessian of each sample's own loss, times its tangent."""
    return form.hessian(outputs, targets, tangents) * len(outputs)


def _convex(eigenvalues: Tensor) -> Tensor:
    return ~(eigenvalues.min() < -_CONVEX * eigenvalues.abs().max())


def _not_convex() -> ModelError:
    return ModelError(
        "the loss is not convex in the outputs, so it has no Gauss-Newton factors: use "
        "--operator hessian with --solver cg or lissa"
    )
