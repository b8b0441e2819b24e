"""One rule a layer type: a class in any file of this folder, registered by importing it."""

import importlib
import pkgutil

from influence_jobs.gradients.rules.base import (
    LayerRule,
    MatrixRule,
    matrix_layers,
    names_of,
    nearest_rule,
    norm_shape,
    reduce_gradient,
    reduce_norms,
    reduce_read,
    reduced_shape,
    registered,
    rule_of,
    supported,
    supported_layers,
)

__all__ = [
    "LayerRule",
    "MatrixRule",
    "matrix_layers",
    "names_of",
    "nearest_rule",
    "norm_shape",
    "reduce_gradient",
    "reduce_norms",
    "reduce_read",
    "reduced_shape",
    "registered",
    "rule_of",
    "supported",
    "supported_layers",
]

# A list of files would be a second place to edit, and a rule missing from it would be missed late.
for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
