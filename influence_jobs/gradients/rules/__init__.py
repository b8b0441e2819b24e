"""One rule per layer type: a class in any file of this folder. Importing it registers it."""

import importlib
import pkgutil

from influence_jobs.gradients.rules.base import (
    LayerRule,
    MatrixRule,
    has_factors,
    matrix_layers,
    nearest_rule,
    norm_shape,
    reduce_gradient,
    registered,
    rule_of,
    supported,
    supported_layers,
)
from influence_jobs.gradients.rules.reductions import reduce_norms, reduce_read, reduced_shape

__all__ = [
    "LayerRule",
    "MatrixRule",
    "has_factors",
    "matrix_layers",
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

# All files are imported, so that a new rule needs no entry in a list.
for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
