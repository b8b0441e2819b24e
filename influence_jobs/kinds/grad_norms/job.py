"""Replay: per-sample gradient norms of chosen layers at saved checkpoints."""

import logging
from collections.abc import Iterator
from functools import cached_property, partial
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from influence_jobs.gradients import GradNorms, TokenNorms
from influence_jobs.gradients.fallback import slow_lines
from influence_jobs.jobs.base import Progress, Result, Shard
from influence_jobs.jobs.norm_arrays import norm_layouts
from influence_jobs.jobs.rows import AnotherWayError, Checks, Rows, until_right
from influence_jobs.jobs.samples import (
    SampleJob,
    dtype_for,
    engine_precision,
    trained_inputs,
)
from influence_jobs.jobs.tokens import first_samples, only_tokens, watch_tokens
from influence_jobs.kinds.grad_norms.spec import GradNormsSpec
from influence_jobs.kinds.train.spec import Checkpoint
from influence_jobs.specs.base import AnySpec
from influence_jobs.store.layout import ArrayLayout, norms_name, token_norms_name
from influence_jobs.tasks.base import Batch, Draw
from influence_jobs.tasks.sequences import TokenLosses, tokens_in

log = logging.getLogger(__name__)


class GradNormsJob(SampleJob[GradNormsSpec]):
    """A shard is a range of rows of all arrays."""

    spec_type = GradNormsSpec
    _watched = False  # whether the range of each batch's norms is looked at

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
        return until_right(lambda: self._run(shard, progress))

    def _run(self, shard: Shard, progress: Progress) -> Result:
        progress(done := 0)
        found, kept = Rows(shard), list[dict[str, npt.NDArray[np.float64]]]()
        for number, checkpoint in enumerate(self.spec.checkpoints, 1):
            self.load(checkpoint)
            checks = self.checks(shard)
            norms_of = partial(self._norms, checks=checks)
            for ids, norms in self.each(shard, Draw(self.spec.seed), norms_of, self._fetched):
                found.add(ids, norms)
                done += len(ids)
                progress(done)
            if self.spec.combine == "keep" or number == len(self.spec.checkpoints):
                kept.append(found.arrays(checks))
                found = Rows(shard)
            else:
                checks.look()
        if self.spec.combine == "keep":
            return Result({name: np.stack([one[name] for one in kept]) for name in kept[0]})
        return Result(kept[0])

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
        self.check(engine.check, self.spec.seed)
        few = self.batch(torch.arange(min(2, self.num_rows)), Draw(self.spec.seed))
        for line in slow_lines(engine.slow_layers(few)):
            log.info(line)
        return engine

    @cached_property
    def _tokens(self) -> tuple[TokenLosses, TokenNorms]:
        parts, precision = TokenLosses(self.task), engine_precision(self.spec.precision)
        engine = TokenNorms(self.model, self.spec.layers, parts, precision=precision)
        draw = Draw(self.spec.seed)
        parts.look(self.model, self.batch(first_samples(self.task, self.batching.size), draw))
        self.check(engine.check, self.spec.seed)
        return parts, engine

    def _fetched(self, ids: torch.Tensor, draw: Draw) -> tuple[Batch, int]:
        """A batch, and the most tokens of its samples, if they count."""
        read, most = self.read(ids, draw), 0
        if self.spec.tokens is not None:
            counts_B = tokens_in(self.task, read)  # here, where a look lets no GPU wait
            most = 0 if counts_B is None else int(counts_B.max())
        return self.placed(read), most

    def _watch(self) -> NoReturn:
        """Look at each batch's range from now on: squares of norms left that of float32."""
        self._watched = True
        raise AnotherWayError

    def _norms(
        self, ids: torch.Tensor, fetched: tuple[Batch, int], *, checks: Checks
    ) -> dict[str, Tensor]:
        """The norms of a batch, by array."""
        batch, most = fetched

        def unless_lost(found: dict[str, Tensor], right: Tensor | None) -> dict[str, Tensor]:
            if right is not None:
                checks.right("range", right, self._watch)
            return found

        whole = self._engine
        by_layer = whole(batch) if self._watched else unless_lost(*whole.unwatched(batch))
        norms = {norms_name(layer): values for layer, values in by_layer.items()}
        counts_B = None
        if self.spec.tokens is not None:
            parts, engine = self._tokens
            counts_B = watch_tokens(parts, self.model, batch, self.spec.tokens, checks)
            most = max(1, most)  # NaN below where there is none
            of_tokens = (
                engine(batch, most)
                if self._watched
                else unless_lost(*engine.unwatched(batch, most))
            )
            norms |= {token_norms_name(layer): values for layer, values in of_tokens.items()}
        for name, values in norms.items():
            layer = name.partition("/")[2]
            checks.finite(f"the gradient of layer {layer}", values, ids)
        if counts_B is not None and self.spec.tokens is not None:
            for name in map(token_norms_name, self.spec.layers):
                norms[name] = only_tokens(norms[name], counts_B, self.spec.tokens)
        return norms

    def probe(self) -> Iterator[int]:
        # The checkpoint may not exist yet. Untrained weights take the same time.
        checks = self.checks(None)
        for ids in self.all_batches():
            self._norms(ids, self._fetched(ids, Draw(self.spec.seed)), checks=checks)
            yield len(ids)
