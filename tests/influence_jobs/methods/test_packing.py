"""Packed rows come back up to the rounding that each way promises."""

import numpy as np
import pytest

from influence_jobs.errors import StoreError
from influence_jobs.methods.packing import CODES, code_shape, packed, row_bytes, unpacked
from influence_jobs.methods.rounding import rounding_lines

BOUND = {"float32": 0.0, "float16": 2.0**-11, "int8": 0.5 / 127}


def rows(seed: int = 0) -> np.ndarray:
    """Of sizes from 1e-30 to 1e30, which no float16 holds."""
    made = np.random.default_rng(seed).standard_normal((7, 13))
    return (made * 10.0 ** np.linspace(-30, 30, 7)[:, None]).astype(np.float32)


@pytest.mark.parametrize("stored", CODES)
def test_rows_come_back(stored) -> None:
    values = rows()
    values[3] = 0
    codes, scales = packed(values, stored)
    assert codes.dtype == CODES[stored]
    assert codes.shape == (7, code_shape(13, stored))
    assert row_bytes(13, stored) == codes[0].nbytes + (0 if stored == "float32" else 4)
    back = unpacked(codes, scales, 13, stored)
    if stored == "1-bit":
        size = np.abs(values).mean(axis=1, keepdims=True)
        np.testing.assert_allclose(back, np.where(values >= 0, size, -size), rtol=1e-6)
    else:
        largest = np.abs(values).max(axis=1, keepdims=True)
        assert (np.abs(back - values) <= BOUND[stored] * largest * (1 + 1e-5)).all()


@pytest.mark.parametrize("size", [1, 7, 8, 9])
def test_signs_that_are_all_negative_are_no_loss(size) -> None:
    values = -np.ones((3, size), np.float32)
    codes, scales = packed(values, "1-bit")
    assert codes.shape == (3, code_shape(size, "1-bit"))
    np.testing.assert_array_equal(unpacked(codes, scales, size, "1-bit"), values)
    codes[1] = 0
    with pytest.raises(StoreError, match="missing"):
        unpacked(codes, scales, size, "1-bit")


@pytest.mark.parametrize("stored", ["int8", "1-bit"])
def test_lost_codes_are_no_zeros(stored) -> None:
    codes, scales = packed(rows(), stored)
    with pytest.raises(StoreError, match="missing"):
        unpacked(np.zeros_like(codes), scales, 13, stored)


def test_what_rounding_loses_is_told() -> None:
    generator = np.random.default_rng(0)
    parts = [generator.standard_normal((200, 32)), generator.standard_normal((200, 8))]
    lines = rounding_lines(parts, chosen="int8")
    assert [line.partition(":")[0] for line in lines] == [f"stored as {name}" for name in CODES]
    assert [line.endswith("(chosen)") for line in lines] == [False, False, True, False]
    assert lines[0] == "stored as float32: 160 B a sample"
    assert "rank correlation 1.0000" in lines[1]
    one_bit = float(lines[3].split("rank correlation ")[1].split()[0])
    assert 0.6 < one_bit < 0.95
