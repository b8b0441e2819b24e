"""Attribution: a query's activations times the training samples' gradient norms."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from influence_jobs.jobs.norm_arrays import norm_layouts
from influence_jobs.jobs.rows import Checks
from influence_jobs.jobs.samples import trained_inputs
from influence_jobs.jobs.scores import Scores, ScoresJob
from influence_jobs.kinds.attribution.spec import AttributionSpec
from influence_jobs.kinds.train.spec import Checkpoint
from influence_jobs.methods.attribution import attribution_scores, query_activations
from influence_jobs.specs.base import AnySpec
from influence_jobs.store.layout import SCORES, norms_name, part_name
from influence_jobs.store.run import Run
from influence_jobs.tasks.base import Draw


class AttributionJob(ScoresJob[AttributionSpec]):
    """Reads stored norms; only the queries go through the model."""

    spec_type = AttributionSpec
    reads_samples = False

    @staticmethod
    def inputs(spec: AttributionSpec) -> tuple[AnySpec, ...]:
        trained = trained_inputs((spec.checkpoint,))
        return tuple({needed.run_id: needed for needed in (*trained, spec.norms)}.values())

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        return (self.spec.checkpoint,)

    def input_digests(self) -> dict[str, str]:
        return super().input_digests() | {self._norms.id: self._norms.digest()}

    @property
    def kept_layers(self) -> tuple[str, ...]:
        return self.spec.layers if self.spec.keep_layers else ()

    @property
    def meaning(self) -> dict[str, str]:
        return {
            "quantity": "sum over channels of the query's activation x the sample's gradient norm",
            "sign": "never negative: larger = the sample moved more of what the query uses",
            "unit": "loss per unit of weight, times activation",
        }

    @cached_property
    def _norms(self) -> Run:
        return Run(self.run_store.root, self.spec.norms)

    @cached_property
    def _activations(self) -> dict[str, npt.NDArray[np.float32]]:
        self.load(self.spec.checkpoint)
        queries = self.spec.queries
        return query_activations(
            self.task,
            self.model,
            self.spec.layers,
            [(query.test, query.region) for query in queries.items],
            [Draw(queries.seed, draw) for draw in range(queries.noise_draws)],
        )

    def score(self, term: int, ids: torch.Tensor, fetched: Any, checks: Checks) -> Scores:
        start, stop = int(ids[0]), int(ids[-1]) + 1
        by_layer = attribution_scores(
            self._activations,
            {layer: self._rows(layer, start, stop) for layer in self.spec.layers},
            exclude_norm_above=self.spec.exclude_norm_above,
            normalize=self.spec.normalize,
        )
        kept = {part_name(layer): by_layer[layer] for layer in self.kept_layers}
        return {SCORES: np.stack([*by_layer.values()]).sum(axis=0, dtype=np.float64), **kept}

    def _rows(self, layer: str, start: int, stop: int) -> npt.NDArray[Any]:
        name = norms_name(layer)
        values = self._norms.read_rows(name, start, stop)
        if self._norms.row_axis(name):  # a leading checkpoint axis
            values = values.sum(axis=0, dtype=np.float64)
        return values

    def probe(self) -> Iterator[int]:
        # The norms may not exist yet. Made-up numbers take the same time.
        layouts = norm_layouts(
            self.task.model(),
            self.spec.layers,
            num_samples=self.batch_size,
            reduction=self.spec.norms.norms_reduction,
            checkpoints=None,
            source="",
        )
        num_queries = len(self.spec.queries.items)
        norms = {
            layer: np.ones(array.shape)
            for layer, array in zip(self.spec.layers, layouts, strict=True)
        }
        activations = {layer: np.ones((num_queries, len(rows[0]))) for layer, rows in norms.items()}
        while True:
            attribution_scores(activations, norms, normalize=self.spec.normalize)
            yield self.batch_size
