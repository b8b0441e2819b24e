"""Baselines: simple scores that influence and attribution must beat."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from influence_jobs.errors import SpecError
from influence_jobs.gradients import GradNorms
from influence_jobs.jobs.base import Progress, Result, Shard
from influence_jobs.jobs.queries import embeds
from influence_jobs.jobs.rows import AnotherWayError, Checks, Numbers, until_right
from influence_jobs.jobs.samples import trained_inputs
from influence_jobs.jobs.scores import Scores, ScoresJob
from influence_jobs.kinds.baseline.spec import EMBEDDED, METHODS, BaselineSpec
from influence_jobs.kinds.train.spec import Checkpoint
from influence_jobs.methods.baselines import (
    nearest_scores,
    own_scores,
    query_pixels,
    random_scores,
)
from influence_jobs.specs.base import AnySpec
from influence_jobs.store.layout import SCORES
from influence_jobs.tasks.base import Batch, Draw
from influence_jobs.tasks.layers import resolve_weights
from influence_jobs.tasks.placement import dtype_of
from influence_jobs.terms import FullPrecision, stored_as


def scorer(method: str) -> str:
    """The name of the function of `BaselineJob` that scores by a method."""
    return f"_{method.replace('-', '_')}"


class BaselineJob(ScoresJob[BaselineSpec]):
    """Scores by random numbers, a sample's loss or gradient norm, or distances of pixels."""

    spec_type = BaselineSpec
    _watched = False  # whether the range of each batch's norms is looked at

    @property
    def title(self) -> str:
        return f"baseline {self.spec.method} {self.spec.task.slug}"

    @staticmethod
    def inputs(spec: BaselineSpec) -> tuple[AnySpec, ...]:
        return trained_inputs((spec.checkpoint,) if spec.checkpoint else ())

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        return (self.spec.checkpoint,) if self.spec.checkpoint else ()

    @property
    def meaning(self) -> dict[str, str]:
        method = METHODS[self.spec.method]
        if self.spec.method == "nearest" and embeds(self.task):
            method = EMBEDDED
        return {"quantity": method.quantity, "sign": method.sign, "unit": method.unit}

    @property
    def dtype(self) -> torch.dtype | None:
        asked = self.spec.precision
        found: torch.dtype | None = asked and getattr(torch, stored_as(asked))
        return found

    def of_test(self, test: int) -> Any:
        if self.spec.method == "nearest" and not embeds(self.task):
            return self.task.test_picture(test)
        return super().of_test(test)

    def fetch(self, term: int, ids: torch.Tensor) -> Batch:
        draw = Draw(self.spec.seed)
        if self.spec.method in ("loss", "norm"):
            return self.batch(ids, draw)
        if self.spec.method == "nearest" and embeds(self.task):
            return self.task.batch(ids, draw)
        return None

    def run(self, shard: Shard, progress: Progress) -> Result:
        return until_right(lambda: super(BaselineJob, self).run(shard, progress))

    def score(self, term: int, ids: torch.Tensor, fetched: Any, checks: Checks) -> Scores:
        return {SCORES: getattr(self, scorer(self.spec.method))(ids, fetched, checks)}

    def probe(self) -> Iterator[int]:
        # With untrained weights: the checkpoint may not exist yet, and the time is the same.
        self._loaded = self.spec.checkpoint
        yield from super().probe()

    def _random(self, ids: torch.Tensor, _: None, checks: Checks) -> Numbers:
        rows = np.arange(len(self.spec.queries.items))
        return random_scores(rows, ids.numpy(), seed=self.spec.seed)

    def _nearest(self, ids: torch.Tensor, batch: Batch, checks: Checks) -> Numbers:
        if embeds(self.task):
            vectors = self._embedded(batch, len(ids))
            checks.finite("the embedding", vectors, ids)
            vectors = np.nan_to_num(vectors)  # refused at the shard's end
            return nearest_scores(self._query_vectors, vectors)
        pictures = self.task.pictures(ids.numpy())
        return nearest_scores(self._query_vectors, pictures.reshape(len(ids), -1))

    def _loss(self, ids: torch.Tensor, batch: Batch, checks: Checks) -> Numbers:
        self._load_once()
        with torch.no_grad():
            losses_B = self.task.losses(self.model, batch)
        checks.finite("the loss", losses_B, ids)
        return own_scores(losses_B, len(self.spec.queries.items))

    def _norm(self, ids: torch.Tensor, batch: Batch, checks: Checks) -> Numbers:
        self._load_once()
        if self._watched:
            norms = self._norms(batch)
        else:
            norms, right = self._norms.unwatched(batch)
            if right is not None:
                checks.right("range", right, self._watch)
        norms_B = torch.stack([*norms.values()]).double().square().sum(dim=0).sqrt()
        checks.finite("the gradient", norms_B, ids)
        return own_scores(norms_B, len(self.spec.queries.items))

    def _watch(self) -> NoReturn:
        """Look at each batch's range from now on: squares of norms left that of float32."""
        self._watched = True
        raise AnotherWayError

    def _load_once(self) -> None:
        if self._loaded is None and self.spec.checkpoint is not None:
            self.load(self.spec.checkpoint)

    @cached_property
    def _norms(self) -> GradNorms:
        weights = resolve_weights(("all",), self.task, lambda _: None)
        built: FullPrecision = "float64" if dtype_of(self.model) == torch.float64 else "float32"
        precision = self.spec.precision or built
        engine = GradNorms(
            self.model, weights, self.task.losses, reduction="layer", precision=precision
        )
        self.check(engine.check, self.spec.seed)
        return engine

    @cached_property
    def _query_vectors(self) -> npt.NDArray[Any]:
        """What nearest compares of every query, (Q, D)."""
        queries = self.spec.queries
        if embeds(self.task):
            rows = [
                self._embedded(
                    self.task.test_batch(torch.tensor([query.test]), Draw(queries.seed)), 1
                )
                for query in queries.items
            ]
            return np.concatenate(rows)
        shape = self.task.pictures(np.array([0])).shape[1:]
        return np.stack(
            [
                query_pixels(self.task.test_picture(query.test), query.region, shape)
                for query in queries.items
            ]
        )

    def _embedded(self, batch: Batch, size: int) -> npt.NDArray[np.float32]:
        with torch.no_grad():
            vectors = self.task.embed(batch)
        if vectors.ndim != 2 or len(vectors) != size:
            raise SpecError(
                f"embed() of {type(self.task).__name__} gives {tuple(vectors.shape)} for {size} "
                "samples: a vector for each, shape (B, D), is needed"
            )
        return vectors.float().cpu().numpy()
