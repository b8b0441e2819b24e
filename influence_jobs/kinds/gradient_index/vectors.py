"""Vectors whose dot products are scores."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from scipy import linalg

from influence_jobs.kinds.gradient_index.spec import GradientIndexSpec
from influence_jobs.kinds.gradients.store import GradientStore
from influence_jobs.methods.projected import damped_root
from influence_jobs.store.layout import GRAM
from influence_jobs.store.run import Run

Rows = npt.NDArray[np.floating]


class ScoreVectors:
    """Maps projected gradients, of samples and of queries alike.

    A layer's q^T (G + lambda I)^-1 g is the dot product of L^-1 q and L^-1 g, with
    L L^T = G + lambda I; the sum over layers is that of the layers' vectors end to end.

    Args:
        root: Folder of all runs.
        spec: Of the index.
    """

    def __init__(self, root: str, spec: GradientIndexSpec) -> None:
        self._spec = spec
        self._roots: dict[str, Rows] = {}
        if spec.gram is None:
            return
        gram = Run(root, spec.gram)
        layers = list(gram.array(GRAM).attrs["layers"])  # type: ignore[arg-type]
        for group, size in GradientStore(root, spec.gradients).sizes.items():
            at = layers.index(group)
            gram_DD = gram.read_rows(GRAM, at, at + 1)[0, :size, :size]
            self._roots[group] = damped_root(gram_DD, damping=spec.damping)

    def __call__(self, rows: Mapping[str, Rows]) -> npt.NDArray[np.float32]:
        """Vectors (B, sum of D) of projected gradients (B, D) by layer."""
        parts = [self._solved(group, values) for group, values in rows.items()]
        found_BD = np.concatenate(parts, axis=1)
        if self._spec.method == "cosine":
            sizes_B1 = np.linalg.norm(found_BD, axis=1, keepdims=True)
            found_BD = found_BD / np.where(sizes_B1 > 0, sizes_B1, 1)
        return np.ascontiguousarray(found_BD, dtype=np.float32)

    def _solved(self, group: str, values_BD: Rows) -> Rows:
        """L^-1 of each row."""
        if not self._roots:
            return values_BD
        root_DD = self._roots[group].astype(values_BD.dtype)
        found_BD: Rows = linalg.solve_triangular(root_DD, values_BD.T, lower=True).T
        return found_BD
