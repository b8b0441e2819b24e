"""Experiments that retrain: many variants of one model, trained side by side, each kept for all experiments."""

import itertools
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor, nn

from influence_jobs.errors import ModelError, SpecError
from influence_jobs.jobs.base import Job, Plan, Report, Result, Shard
from influence_jobs.jobs.queries import require_queries, write_queries
from influence_jobs.jobs.rankings import digests, needed_runs
from influence_jobs.jobs.saved_state import SavedState
from influence_jobs.jobs.train import recipe_of
from influence_jobs.specs import AnySpec, RetrainingSpec
from influence_jobs.store.layout import CHECKPOINTS, ArrayLayout
from influence_jobs.store.retrained import Retrained, variant_key
from influence_jobs.tasks.base import Batch, Draw, to_device
from influence_jobs.terms import Region
from influence_jobs.training.changes import Changes
from influence_jobs.training.ensemble import EnsembleTrainer, Variant
from influence_jobs.training.ensemble_width import WIDTHS, bytes_per_variant, measure_widths
from influence_jobs.training.train import Trainer

MAX_SHARD, MIN_SHARD, AIM_SHARDS = 128, 8, 16
MEASURED_STEPS = 200_000  # a shard of fewer model-steps is over before measuring pays
MEMORY_SHARE = 0.5  # of what is free, for the models of one ensemble
LOSSES, DECISIONS = "losses", "decisions"

S = TypeVar("S", bound=RetrainingSpec)
# Rows of queries, their test batch, and the region measured of it.
Asked = tuple[Sequence[int], Batch, Region | None]


class RetrainJob(Job[S]):
    """Rows are variants, shards are groups of them.

    A variant's weights are kept in `Retrained` the moment it is trained, and looked up there first: so nothing is
    trained twice, whichever experiment asked for it and however often it was interrupted.
    """

    @property
    @abstractmethod
    def sizes(self) -> Sequence[int]:
        """Samples that each variant is trained on in an epoch, by row."""

    @abstractmethod
    def variant(self, row: int) -> Variant:
        """What a row is a training of; needs the runs of the rankings."""

    @staticmethod
    def inputs(spec: RetrainingSpec) -> tuple[AnySpec, ...]:
        return needed_runs(spec.rankings)

    def input_digests(self) -> dict[str, str]:
        return digests(self.run_store.root, self.spec.rankings)

    @property
    def batch_size(self) -> int:
        return self.spec.recipe.batch_size

    def plan(self, shard_rows: int | None = None) -> Plan:
        require_queries(self.task, self.spec.queries)
        count, num_queries = len(self.sizes), len(self.spec.queries.items)
        rows = shard_rows or min(max(count // AIM_SHARDS, MIN_SHARD), MAX_SHARD)
        arrays = tuple(
            ArrayLayout(
                name=name,
                shape=(count, num_queries),
                row_axis=0,
                chunk_rows=1,  # shards may be of any size
                dims=("variant", "query"),
                attributes={"quantity": quantity},
            )
            for name, quantity in (
                (LOSSES, f"the query's {self.spec.queries.quantity} after retraining"),
                (DECISIONS, "the class the retrained model decides for; NaN where there are none"),
            )
        )
        shards = tuple(
            Shard(f"{start:06d}-{stop:06d}", start, stop) for start, stop in _pieces(count, rows)
        )
        units = sum(self.sizes) * self.spec.recipe.epochs
        return Plan(arrays, shards, units=units, batch_size=self.batch_size)

    def run(self, shard: Shard, report: Report) -> Result:
        require_queries(self.task, self.spec.queries)
        rows = range(shard.start, shard.stop)
        variants = [self.variant(row) for row in rows]
        keys = [_key(variant) for variant in variants]
        missing = {
            key: variant
            for key, variant in zip(keys, variants, strict=True)
            if self._retrained.read(key) is None
        }
        epochs = self.spec.recipe.epochs
        done = sum(
            self.sizes[row] * epochs
            for row, key in zip(rows, keys, strict=True)
            if key not in missing
        )
        self._train(shard, missing, done, report)
        measured = []
        for key in keys:
            weights = self._retrained.read(key)
            assert weights is not None
            self._model.load_state_dict(weights)
            measured.append(self._measure())
        losses, decisions = (np.stack(values) for values in zip(*measured, strict=True))
        return Result({LOSSES: losses, DECISIONS: decisions})

    # -- training ---------------------------------------------------------------------------------

    @cached_property
    def _retrained(self) -> Retrained:
        return Retrained(self.run_store.root, self.spec.recipe)

    def _train(
        self, shard: Shard, missing: Mapping[str, Variant], done: int, report: Report
    ) -> None:
        """Train what is missing, in ensembles, and keep it."""
        report(done)
        saved = SavedState(self.run_store.files, f"{CHECKPOINTS}/state-{shard.id}.pt")
        state = saved.read()
        todo = list(missing)
        if state is not None and set(state["keys"]) <= set(todo):
            # The ensemble that was cut off goes on as it was, and comes first.
            first = list(state["keys"])
            groups = [first, *self._groups([key for key in todo if key not in first])]
        else:
            state, groups = None, self._groups(todo)
        for keys in groups:
            trainer = self._trainer([missing[key] for key in keys])
            if state is not None:
                trainer.load_state_dict(state["trainer"])
                state = None
            before = done
            report(before + trainer.samples_seen)
            while not trainer.finished:
                means = trainer.step()
                report(before + trainer.samples_seen)
                if means is not None and not np.isfinite(np.asarray(means)).all():
                    raise SpecError(
                        f"a training diverged: its mean loss in epoch {trainer.epoch} is not finite; "
                        "lower the learning rate"
                    )
                if not trainer.finished:
                    saved.keep(lambda: {"keys": keys, "trainer": trainer.state_dict()})  # noqa: B023
            for i, key in enumerate(keys):
                model = trainer.model if isinstance(trainer, Trainer) else trainer.model(i)
                self._retrained.write(key, model.state_dict())
            done = before + trainer.samples_seen
        saved.delete()

    def _trainer(self, variants: Sequence[Variant]) -> Trainer | EnsembleTrainer:
        recipe = recipe_of(self.spec.recipe)
        if len(variants) > 1:
            return EnsembleTrainer(self.task, recipe, variants, device=self.device)
        alone = variants[0]
        return Trainer(
            self.task, recipe, seed=alone.seed, device=self.device, changes=alone.changes
        )

    def _groups(self, keys: Sequence[str]) -> list[list[str]]:
        """Cut variants into ensembles of about one size, no larger than is fastest and fits."""
        if not keys:
            return []
        return [
            list(keys[start:stop]) for start, stop in _pieces(len(keys), self._width(len(keys)))
        ]

    def _width(self, wanted: int) -> int:
        """How many variants to train side by side, of those wanted."""
        if wanted == 1 or not self._stacks:
            return 1
        recipe = recipe_of(self.spec.recipe)
        memory = int(self._free_bytes() * MEMORY_SHARE)
        steps = wanted * recipe.epochs * max(self.sizes) / recipe.batch_size
        if steps < MEASURED_STEPS:
            each = bytes_per_variant(self.task, recipe, device=self.device)
            return min(wanted, max(1, memory // each))
        return min(wanted, self._fastest_width(memory))

    @cached_property
    def _stacks(self) -> bool:
        """Whether the model can be trained as an ensemble; one with dropout between convolutions cannot."""
        pair = [Variant(0), Variant(1)]
        try:
            EnsembleTrainer(self.task, recipe_of(self.spec.recipe), pair, device=self.device).step()
        except ModelError:
            return False
        return True

    @cached_property
    def _widths(self) -> dict[int, float]:
        return {}

    def _fastest_width(self, memory: int) -> int:
        if not self._widths:  # the same for every shard of this worker
            self._widths.update(
                measure_widths(
                    self.task,
                    recipe_of(self.spec.recipe),
                    device=self.device,
                    widths=WIDTHS,
                    seconds=0.5,
                    memory=memory,
                )
            )
        return max(self._widths, key=self._widths.__getitem__)

    def _free_bytes(self) -> int:
        """Memory that this worker may count on."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        workers = max(1, (psutil.cpu_count() or 1) // torch.get_num_threads())
        available: int = psutil.virtual_memory().available
        return available // workers

    # -- measuring --------------------------------------------------------------------------------

    @cached_property
    def _model(self) -> nn.Module:
        return self.task.model().to(self.device).eval()

    @cached_property
    def _asked(self) -> list[Asked]:
        """The queries, those that fit into one batch together, once for every noise draw."""
        queries = self.spec.queries
        together = [
            i
            for i, query in enumerate(queries.items)
            if query.region is None and self.task.test_size(query.test) is None
        ]
        groups: list[tuple[Sequence[int], Region | None]] = [(together, None)] if together else []
        groups += [
            ([i], query.region) for i, query in enumerate(queries.items) if i not in set(together)
        ]
        return [
            (rows, self._test_batch([queries.items[i].test for i in rows], draw), region)
            for rows, region in groups
            for draw in range(queries.noise_draws)
        ]

    def _test_batch(self, tests: Sequence[int], draw: int) -> Batch:
        batch = self.task.test_batch(torch.tensor(tests), Draw(self.spec.queries.seed, draw))
        return to_device(batch, self.device)

    @torch.no_grad()
    def _measure(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """What the model makes of the queries: the measured quantity, mean over noise draws, and decisions, (Q,)."""
        queries = self.spec.queries
        values_Q = np.zeros(len(queries.items))
        decisions_Q = np.full(len(queries.items), np.nan)
        for rows, batch, region in self._asked:
            measured: Tensor = self.task.measure(self._model, batch, queries.quantity, region)
            values_Q[rows] += measured.double().cpu().numpy() / queries.noise_draws
            if self.task.output_loss == "cross-entropy":
                decisions_Q[rows] = self.task.outputs(self._model, batch).argmax(1).cpu().numpy()
        if not np.isfinite(values_Q).all():
            raise SpecError(
                "a retrained model's loss on a query is not finite: lower the learning rate"
            )
        return values_Q, decisions_Q

    def probe(self) -> Iterator[int]:
        # Nothing is removed: what will be is not known before the scores are.
        count = min(len(self.sizes), WIDTHS[-1]) if self._stacks else 1
        trainer = self._trainer([Variant(seed) for seed in range(count)])
        while not trainer.finished:
            before = trainer.samples_seen
            trainer.step()
            yield trainer.samples_seen - before

    def write_queries(self) -> dict[str, str]:
        """Keep the table of the queries."""
        return write_queries(self.run_store, self.task, self.spec.queries)

    def measured(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """What all shards have measured: losses and decisions, (V, Q)."""
        count = len(self.sizes)
        losses, decisions = (
            self.run_store.read_rows(name, 0, count) for name in (LOSSES, DECISIONS)
        )
        return losses, decisions


def _pieces(count: int, largest: int) -> Iterator[tuple[int, int]]:
    """Bounds of as few pieces as can be, of about one size and none too large."""
    pieces = math.ceil(count / largest)
    return itertools.pairwise(count * i // pieces for i in range(pieces + 1))


def _key(variant: Variant) -> str:
    changes: Changes = variant.changes
    order = np.argsort(changes.relabelled, kind="stable")
    return variant_key(
        variant.seed,
        np.sort(changes.removed).astype("<i8").tobytes(),
        changes.relabelled[order].astype("<i8").tobytes(),
        changes.labels[order].astype("<i8").tobytes(),
    )
