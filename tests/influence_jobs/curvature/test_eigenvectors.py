"""Eigenvectors where a library fails."""

import pytest
import torch
from torch import Tensor

from influence_jobs.curvature import eigenvectors
from influence_jobs.curvature.eigenvectors import eigh


def symmetric(*shape: int) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return x @ x.mT


def test_many_matrices_are_given_to_it_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices, plain, sizes = symmetric(25, 3, 3), torch.linalg.eigh, list[int]()

    def some(given: Tensor) -> object:
        sizes.append(len(given))
        return plain(given)

    monkeypatch.setattr(torch.linalg, "eigh", some)
    monkeypatch.setattr(eigenvectors, "MOST_AT_ONCE", 10)
    values, vectors = eigh(matrices)
    assert sizes == [10, 10, 5]
    torch.testing.assert_close(vectors * values.unsqueeze(1) @ vectors.mT, matrices)
    sizes.clear()
    eigh(symmetric(25, 25))  # one matrix
    assert sizes == [25]


def test_what_float32_does_not_find_is_found_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, plain = symmetric(6, 2), torch.linalg.eigh

    def fails(given: Tensor) -> object:
        if given.dtype == torch.float32 or not given.any():
            raise torch.linalg.LinAlgError("failed to converge")  # type: ignore[attr-defined]
        return plain(given)

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    values, vectors = eigh(matrix)
    assert values.dtype == vectors.dtype == torch.float32
    torch.testing.assert_close(vectors * values @ vectors.mT, matrix)
    with pytest.raises(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        eigh(torch.zeros(3, 3))
