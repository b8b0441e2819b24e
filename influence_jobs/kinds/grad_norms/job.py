"""Replay: per-sample gradient norms of chosen layers at saved checkpoints."""

import logging
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from influence_jobs.gradients import GradNorms, TokenNorms
from influence_jobs.gradients.fallback import slow_lines
from influence_jobs.jobs.base import Progress, Result, Shard
from influence_jobs.jobs.norm_arrays import norm_layouts
from influence_jobs.jobs.samples import (
    Rows,
    SampleJob,
    dtype_for,
    engine_precision,
    trained_inputs,
)
from influence_jobs.jobs.tokens import only_tokens
from influence_jobs.kinds.grad_norms.spec import GradNormsSpec
from influence_jobs.kinds.train.spec import Checkpoint
from influence_jobs.specs.base import AnySpec
from influence_jobs.store.layout import ArrayLayout, norms_name, token_norms_name
from influence_jobs.tasks.base import Batch, Draw
from influence_jobs.tasks.sequences import TokenLosses

log = logging.getLogger(__name__)


class GradNormsJob(SampleJob[GradNormsSpec]):
    """A shard is a range of rows of all arrays."""

    spec_type = GradNormsSpec

    @property
    def title(self) -> str:
        return f"grad-norms {self.spec.task.slug} {','.join(self.spec.layers)}"

    @staticmethod
    def inputs(spec: GradNormsSpec) -> tuple[AnySpec, ...]:
        return trained_inputs(spec.checkpoints)

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        return self.spec.checkpoints

    @property
    def passes(self) -> int:
        return len(self.spec.checkpoints)

    def layouts(self) -> tuple[ArrayLayout, ...]:
        several = len(self.spec.checkpoints)
        return norm_layouts(
            self.task.model(),
            self.spec.layers,
            num_samples=len(self.task.train_data()),
            reduction=self.spec.reduction,
            checkpoints=several if self.spec.combine == "keep" else None,
            tokens=self.spec.tokens,
            source="each sample's own loss, model in eval mode"
            + (
                f", summed over {several} checkpoints"
                if self.spec.combine == "sum" and several > 1
                else ""
            ),
        )

    def run(self, shard: Shard, progress: Progress) -> Result:
        progress(done := 0)
        found, kept = Rows(shard), list[dict[str, npt.NDArray[np.float64]]]()
        for checkpoint in self.spec.checkpoints:
            self.load(checkpoint)
            for ids, norms in self.each(shard, Draw(self.spec.seed), self._norms):
                found.add(ids, norms)
                done += len(ids)
                progress(done)
            if self.spec.combine == "keep":
                kept.append(found.arrays)
                found = Rows(shard)
        if self.spec.combine == "keep":
            return Result({name: np.stack([one[name] for one in kept]) for name in kept[0]})
        return Result(found.arrays)

    @property
    def dtype(self) -> torch.dtype:
        return dtype_for(self.spec.precision)

    @cached_property
    def _engine(self) -> GradNorms:
        engine = GradNorms(
            self.model,
            self.spec.layers,
            self.task.losses,
            reduction=self.spec.reduction,
            precision=engine_precision(self.spec.precision),
        )
        # Once a worker: hooks do not see every use that a model makes of its weights.
        first = torch.arange(min(2, len(self.task.train_data())))
        batch = self.batch(first, Draw(self.spec.seed))
        engine.check(batch)
        for line in slow_lines(engine.slow_layers(batch)):
            log.info(line)
        return engine

    @cached_property
    def _tokens(self) -> tuple[TokenLosses, TokenNorms]:
        parts, precision = TokenLosses(self.task), engine_precision(self.spec.precision)
        engine = TokenNorms(self.model, self.spec.layers, parts, precision=precision)
        first = torch.arange(min(2, len(self.task.train_data())))
        batch = self.batch(first, Draw(self.spec.seed))
        parts.look(self.model, batch)
        engine.check(batch)
        return parts, engine

    def _norms(self, ids: torch.Tensor, batch: Batch) -> dict[str, npt.NDArray[Any]]:
        """The norms of a batch, by array."""
        found = {norms_name(layer): values for layer, values in self._engine(batch).items()}
        counts_B = None
        if self.spec.tokens is not None:
            parts, engine = self._tokens
            counts_B = parts.look(self.model, batch)
            by_layer = engine(batch, max(1, int(counts_B.max())))  # NaN below where there is none
            found |= {token_norms_name(layer): values for layer, values in by_layer.items()}
        norms = {name: values.cpu().numpy() for name, values in found.items()}
        for name, values in norms.items():
            layer = name.partition("/")[2]
            self.require_finite(f"the gradient of layer {layer}", values, ids)
        if counts_B is not None and self.spec.tokens is not None:
            for name in map(token_norms_name, self.spec.layers):
                norms[name] = only_tokens(norms[name], counts_B, self.spec.tokens)
        return norms

    def probe(self) -> Iterator[int]:
        # The checkpoint may not exist yet. Untrained weights take the same time.
        for ids in self.all_batches():
            self._norms(ids, self.batch(ids, Draw(self.spec.seed)))
            yield len(ids)
