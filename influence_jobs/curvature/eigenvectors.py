"""Eigenvectors of symmetric matrices, also where cuSOLVER does not find them at once."""

import torch
from torch import Tensor

MOST_AT_ONCE = 2**14  # matrices; cuSOLVER refuses more than about 2^15


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors, as `torch.linalg.eigh`, of a matrix (n, n) or of R (R, n, n).

    In float32 cuSOLVER may fail for a matrix of low rank, for which it does not in float64.

    Raises:
        torch.linalg.LinAlgError: They are not found in float64 either.
    """
    if matrices.ndim == 3 and len(matrices) > MOST_AT_ONCE:
        parts = [eigh(part) for part in torch.split(matrices, MOST_AT_ONCE)]
        values, vectors = (torch.cat(found) for found in zip(*parts, strict=True))
        return values, vectors
    try:
        values, vectors = torch.linalg.eigh(matrices)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if matrices.dtype == torch.float64:
            raise
        values, vectors = eigh(matrices.double())
    return values.to(matrices.dtype), vectors.to(matrices.dtype)
