"""Rows of numbers as fewer bytes: a scale a row, and codes."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from influence_jobs.errors import StoreError
from influence_jobs.terms import Stored

LARGEST_CODE = 127
CODES: dict[Stored, str] = {
    "float32": "float32",
    "float16": "float16",
    "int8": "int8",
    "1-bit": "uint8",
}


def code_shape(size: int, stored: Stored) -> int:
    """Number of codes of a row of `size` numbers."""
    return size // 8 + 1 if stored == "1-bit" else size  # a bit more than there are numbers


def row_bytes(size: int, stored: Stored) -> int:
    """Bytes of a row of `size` numbers, with its scale."""
    scale = 0 if stored == "float32" else 4
    return np.dtype(CODES[stored]).itemsize * code_shape(size, stored) + scale


def packed(
    rows_BD: npt.NDArray[np.floating[Any]], stored: Stored
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
    """Codes (B, ...) and scales (B,) of rows.

    `float16` and `int8` are relative to the row's largest number. `1-bit` keeps the signs, as bits
    of bytes, and the mean size (QLESS, arXiv 2502.01703); a further bit is always 1, so that no row
    looks like one that is missing. `float32` keeps the rows; scales are 1.
    """
    rows_BD = np.asarray(rows_BD, dtype=np.float32)
    if stored == "float32":
        return rows_BD, np.ones(len(rows_BD), dtype=np.float32)
    sizes_BD = np.abs(rows_BD)
    if stored == "1-bit":
        bits = np.pad(rows_BD >= 0, ((0, 0), (0, 1)), constant_values=True)
        return np.packbits(bits, axis=1), sizes_BD.mean(axis=1)
    scales_B = sizes_BD.max(axis=1)
    relative_BD = rows_BD / np.where(scales_B > 0, scales_B, 1)[:, None]
    if stored == "float16":
        return relative_BD.astype(np.float16), scales_B
    return np.rint(relative_BD * LARGEST_CODE).astype(np.int8), scales_B / LARGEST_CODE


def unpacked(
    codes: npt.NDArray[Any], scales_B: npt.NDArray[np.float32] | None, size: int, stored: Stored
) -> npt.NDArray[np.float32]:
    """The rows (B, D) of codes and scales; the inverse of `packed`, up to rounding.

    Raises:
        StoreError: See `without_scales`.
    """
    rows_BD = without_scales(codes, scales_B, size, stored)
    return rows_BD if scales_B is None else rows_BD * scales_B[:, None]


def without_scales(
    codes: npt.NDArray[Any], scales_B: npt.NDArray[np.float32] | None, size: int, stored: Stored
) -> npt.NDArray[np.float32]:
    """The rows (B, D) of codes, each still to be multiplied by its scale.

    Args:
        scales_B: None for float32, which has none.

    Raises:
        StoreError: A row's codes are missing: they read as 0, though its scale is not.
    """
    if scales_B is not None and np.issubdtype(codes.dtype, np.integer):
        lost_B = np.logical_not(codes.any(axis=1))
        if (lost_B & (scales_B != 0)).any():
            raise StoreError("projected gradients are missing: infl verify names the shard")
    if stored == "1-bit":
        rows_BD = np.unpackbits(codes, axis=1, count=size).astype(np.float32)
        rows_BD *= 2
        rows_BD -= 1
        return rows_BD
    # Torch converts half precision several times as fast as NumPy.
    return torch.from_numpy(codes).float().numpy()
