"""The arrays of a store: rows of projected gradients, of samples or of queries."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.gradients.projections import Projection, projected_size, projections
from influence_jobs.kinds.gradients.spec import GradientsSpec
from influence_jobs.methods.packing import CODES, code_shape, packed, row_bytes
from influence_jobs.store.layout import (
    LOSSES_OF_ROWS,
    ArrayLayout,
    chunk_rows,
    gradients_name,
    scales_name,
)
from influence_jobs.terms import Stored


def projections_of(
    spec: GradientsSpec, model: nn.Module, space: ParameterSpace
) -> dict[str, dict[str, Projection]]:
    """The projections of a store, by group and full name of a parameter."""
    return projections(
        model,
        space,
        outputs=spec.outputs,
        inputs=spec.inputs,
        distribution=spec.distribution,
        seed=spec.seed,
        whole=spec.whole,
        keeps_small=spec.keeps_small,
    )


def sizes_of(maps: Mapping[str, Mapping[str, Projection]]) -> dict[str, int]:
    """D by group."""
    return {group: projected_size(of_group) for group, of_group in maps.items()}


def row_layouts(
    num_rows: int, sizes: Mapping[str, int], *, stored: Stored, axis: str, quantity: str
) -> tuple[ArrayLayout, ...]:
    """The arrays of a store.

    Args:
        num_rows: N or Q.
        sizes: D by group.
        axis: Name of the rows' axis.
        quantity: What the gradients are of.
    """
    rows = chunk_rows(num_rows, max(row_bytes(size, stored) for size in sizes.values()))
    found = [
        ArrayLayout(
            name=gradients_name(group),
            shape=(num_rows, code_shape(size, stored)),
            row_axis=0,
            chunk_rows=rows,
            dims=(axis, "number"),
            dtype=CODES[stored],
            attributes={
                "quantity": f"random projection of the gradient of the {quantity}",
                "layer": group,
                "numbers": size,
                "stored": stored,
            },
        )
        for group, size in sizes.items()
    ]
    singles = {LOSSES_OF_ROWS: f"{quantity} of the row"}
    if stored != "float32":
        singles |= {scales_name(group): "factor of the row's codes" for group in sizes}
    found += [
        ArrayLayout(
            name=name,
            shape=(num_rows,),
            row_axis=0,
            chunk_rows=rows,
            dims=(axis,),
            attributes={"quantity": said},
        )
        for name, said in singles.items()
    ]
    return tuple(found)


def packed_rows(
    rows: Mapping[str, npt.NDArray[np.floating[Any]]],
    losses: npt.NDArray[np.floating[Any]],
    *,
    stored: Stored,
) -> dict[str, npt.NDArray[Any]]:
    """The arrays' rows, by array name, of projected gradients (B, D) by group."""
    found: dict[str, npt.NDArray[Any]] = {LOSSES_OF_ROWS: losses}
    for group, values in rows.items():
        codes, scales = packed(values, stored)
        found[gradients_name(group)] = codes
        if stored != "float32":
            found[scales_name(group)] = scales
    return found
