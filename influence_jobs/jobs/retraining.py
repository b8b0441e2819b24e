"""Experiments that train many variants of one model side by side and keep each of them."""

import itertools
import json
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

from influence_jobs.errors import SpecError
from influence_jobs.jobs.base import Job, Plan, Progress, Result, Shard
from influence_jobs.jobs.queries import require_queries, require_same_measure, write_queries
from influence_jobs.jobs.recipe import recipe_of, trained_task
from influence_jobs.jobs.saved_state import SavedState
from influence_jobs.memory import free_bytes
from influence_jobs.specs.base import AnySpec
from influence_jobs.specs.rankings import RetrainingSpec
from influence_jobs.store.documents import Width
from influence_jobs.store.layout import CHECKPOINTS, ArrayLayout
from influence_jobs.store.rankings import digests, needed_runs
from influence_jobs.store.retrained import Retrained, variant_key
from influence_jobs.tasks.base import Batch, Draw
from influence_jobs.tasks.placement import converted, out_of_half, to_device
from influence_jobs.terms import Region
from influence_jobs.training.changes import Changes, move_weights
from influence_jobs.training.ensemble import EnsembleTrainer, Variant, why_alone
from influence_jobs.training.ensemble_width import (
    WIDTHS,
    bytes_per_variant,
    faster_alone,
    measure_widths,
)
from influence_jobs.training.own import trained_by_task
from influence_jobs.training.train import Trainer, require_full_batches, require_sound_samples

MAX_SHARD, MIN_SHARD, AIM_SHARDS = 128, 8, 16
# Steps over all models; a smaller run does not repay measuring.
COMPARED_STEPS, MEASURED_STEPS = 5_000, 200_000
MEMORY_SHARE = 0.5  # share of the free memory for the models of one ensemble
LOSSES, DECISIONS = "losses", "decisions"
WIDTH = "width.json"

S = TypeVar("S", bound=RetrainingSpec)
# Rows of queries, their test batch, and the region that is measured.
QueryBatch = tuple[Sequence[int], Batch, Region | None]


class RetrainJob(Job[S]):
    """A row is a variant, and a shard is a group of variants.

    A trained variant is kept in `Retrained` at once, and is looked up there before training. So no
    variant is trained twice, even by different experiments or after interruptions.
    """

    @property
    @abstractmethod
    def sizes(self) -> Sequence[int]:
        """Number of samples in an epoch of each variant, by row."""

    @abstractmethod
    def variant(self, row: int) -> Variant:
        """The variant of a row; it needs the finished runs of the rankings."""

    @staticmethod
    def inputs(spec: RetrainingSpec) -> tuple[AnySpec, ...]:
        return needed_runs(spec.rankings)

    def sweep(self) -> None:
        self._retrained.sweep()

    def input_digests(self) -> dict[str, str]:
        return digests(self.run_store.root, self.spec.rankings)

    @property
    def batch_size(self) -> int:
        return self.spec.recipe.batch_size

    def plan(self, shard_rows: int | None = None) -> Plan:
        require_queries(self.task, self.spec.queries)
        count, num_queries = len(self.sizes), len(self.spec.queries.items)
        for size in sorted(set(self.sizes)) if self.spec.recipe.trainer == "infl" else ():
            require_full_batches(self.task, self.spec.recipe.batch_size, size)
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
        weights = sum(t.nbytes for t in self._model.state_dict().values())
        return Plan(
            arrays,
            shards,
            units=units,
            batch_size=self.batch_size,
            file_bytes=weights * count,
        )

    @property
    def tf32(self) -> bool:
        return self.spec.recipe.precision == "tf32"

    @property
    def tells_progress(self) -> bool:
        return self.spec.recipe.trainer != "task"

    def run(self, shard: Shard, progress: Progress) -> Result:
        require_queries(self.task, self.spec.queries)
        self._require_same_measure()
        rows = range(shard.start, shard.stop)
        in_rows = [self.variant(row) for row in rows]
        keys = [_key(variant) for variant in in_rows]
        variants = dict(zip(keys, in_rows, strict=True))
        weights = {key: self._retrained.read(key) for key in variants}
        missing = {key for key in variants if weights[key] is None}
        done = sum(self._samples(variants[key]) for key in keys if key not in missing)
        progress(done)
        weights |= self._train(shard, variants, missing, done, progress)
        measured = []
        for key in keys:
            trained = weights[key]
            assert trained is not None
            self._model.load_state_dict(trained)
            measured.append(self._measure())
        losses, decisions = (np.stack(values) for values in zip(*measured, strict=True))
        return Result({LOSSES: losses, DECISIONS: decisions})

    # -- training ---------------------------------------------------------------------------------

    @cached_property
    def _retrained(self) -> Retrained:
        recipe, root = self.spec.recipe, self.run_store.root
        return Retrained(root, recipe, lambda: trained_task(recipe, self.spec.task, self.task))

    def _samples(self, variant: Variant) -> int:
        """Samples that a variant is trained on, summed over epochs."""
        n = len(self.task.train_data()) - len(variant.changes.removed)
        return n * self.spec.recipe.epochs

    def _train(
        self,
        shard: Shard,
        variants: Mapping[str, Variant],
        missing: set[str],
        done: int,
        progress: Progress,
    ) -> dict[str, dict[str, Tensor]]:
        """Train and keep the missing variants of a shard, one ensemble at a time.

        Returns:
            Their weights by key.
        """
        found: dict[str, dict[str, Tensor]] = {}
        if not missing:
            return found
        if self.spec.recipe.trainer == "task":
            for key in (key for key in variants if key in missing):
                variant = variants[key]
                model = trained_by_task(self.task, variant.seed, self.device, variant.changes)
                found[key] = dict(model.state_dict())
                self._retrained.write(key, found[key])
                done += self._samples(variant)
                progress(done)
            return found
        saved = SavedState(self.run_store.files, f"{CHECKPOINTS}/state-{shard.id}.pt")
        state = saved.read()
        if state is not None and ("steps" in state["trainer"]) == self._one_at_a_time:
            state = None  # of an earlier version, which trained ensembles of one
        for group in self._groups(variants):
            keys = [key for key in group if key in missing]
            if not keys:
                continue
            if resumed := state is not None and set(keys) <= set(state["keys"]) <= set(group):
                # Resume the interrupted ensemble, even if some of its members are already kept.
                keys = state["keys"]
                done -= sum(self._samples(variants[key]) for key in set(keys) - missing)
            trainer = self._trainer([variants[key] for key in keys])
            if resumed:
                trainer.load_state_dict(state["trainer"])
            progress(done + trainer.samples_seen)
            while not trainer.finished:
                trainer.step()
                progress(done + trainer.samples_seen)
                if isinstance(trainer, Trainer):
                    trainer.require_finite()
                if not trainer.finished:
                    saved.keep(lambda: {"keys": keys, "trainer": trainer.state_dict()})  # noqa: B023
            lost: dict[str, tuple[int, int]] = {}
            for i, key in enumerate(keys):
                if isinstance(trainer, EnsembleTrainer) and (place := trainer.diverged(i)):
                    lost[key] = place
                elif key in missing:
                    model = trainer.model if isinstance(trainer, Trainer) else trainer.model(i)
                    found[key] = dict(model.state_dict())
                    self._retrained.write(key, found[key])
            if lost:
                self._refuse_diverged(variants, lost, len(keys))
            done += trainer.samples_seen
        saved.delete()
        return found

    def _refuse_diverged(
        self, variants: Mapping[str, Variant], lost: Mapping[str, tuple[int, int]], count: int
    ) -> None:
        """Say why the loss of some of `count` trainings is not finite.

        Args:
            lost: Epoch from 0, and number of its steps before, by key of the variant.

        Raises:
            DataError: A sample is at fault.
            SpecError: The trainings diverged.
        """
        key, (epoch, step) = next(iter(lost.items()))
        one = variants[key]
        require_sound_samples(self.task, one.seed, self.device, changes=one.changes, epoch=epoch)
        raise SpecError(
            f"{len(lost)} of {count} trainings diverged: their losses are not finite, with seed "
            f"{one.seed} after step {step} of epoch {epoch + 1}; lower the learning rate"
        )

    def _trainer(self, variants: Sequence[Variant]) -> Trainer | EnsembleTrainer:
        recipe = recipe_of(self.spec.recipe)
        if not self._one_at_a_time:
            return EnsembleTrainer(self.task, recipe, variants, device=self.device)
        (one,) = variants
        return Trainer(self.task, recipe, seed=one.seed, device=self.device, changes=one.changes)

    def _groups(self, variants: Mapping[str, Variant]) -> list[list[str]]:
        """Cut a shard's variants into ensembles of similar size, at most the fastest width.

        The cut does not depend on which variants are already trained. Variants without removals
        have ensembles of their own: they share batches, and their rounding errors must not depend
        on other variants.
        """
        sizes = {key: len(variant.changes.removed) for key, variant in variants.items()}
        kinds = [[k for k, n in sizes.items() if n], [k for k, n in sizes.items() if not n]]
        width = self._width()
        return [
            kind[start:stop] for kind in kinds if kind for start, stop in _pieces(len(kind), width)
        ]

    @cached_property
    def _alone(self) -> str:
        """Why the model is trained one variant at a time; empty if as an ensemble."""
        if self.spec.recipe.trainer == "task":
            return f"{type(self.task).__name__} has a train() of its own"
        return why_alone(self.task, recipe_of(self.spec.recipe), self.device)

    def notes(self) -> Sequence[str]:
        return [f"models are trained one at a time: {self._alone}"] if self._alone else []

    @cached_property
    def _one_at_a_time(self) -> bool:
        return bool(self._alone) or self._width() == 1

    def _width(self) -> int:
        """Number of variants to train side by side; 1 for one at a time.

        The run's first worker chooses it, so that ensembles are the same in all workers.
        """
        if self._alone:
            return 1
        stored = self.run_store.read_json(WIDTH, Width)
        if stored is None:
            found: Width = {"variants_side_by_side": self._fastest_width()}
            self.run_store.files.create(WIDTH, json.dumps(found).encode())
            stored = self.run_store.read_json(WIDTH, Width) or found
        return stored["variants_side_by_side"]

    def _fastest_width(self) -> int:
        recipe, memory = recipe_of(self.spec.recipe), int(self._free_bytes() * MEMORY_SHARE)
        if self._faster_alone:
            return 1
        if self._steps < MEASURED_STEPS:
            each = bytes_per_variant(self.task, recipe, device=self.device)
            return min(WIDTHS[-1], max(1, memory // each))
        rates = measure_widths(
            self.task, recipe, device=self.device, widths=WIDTHS, seconds=0.5, memory=memory
        )
        return max(rates, key=rates.__getitem__)

    @cached_property
    def _steps(self) -> float:
        """Steps of all models together."""
        return sum(self.sizes) * self.spec.recipe.epochs / self.spec.recipe.batch_size

    @cached_property
    def _faster_alone(self) -> bool:
        if self._steps < COMPARED_STEPS:
            return False
        return faster_alone(self.task, recipe_of(self.spec.recipe), device=self.device)

    def _free_bytes(self) -> int:
        """Free memory for this worker, in bytes."""
        if self.device.type == "cuda":
            return free_bytes(self.device)
        cores = len(psutil.Process().cpu_affinity())
        workers = max(1, cores // torch.get_num_threads())
        available: int = psutil.virtual_memory().available
        return available // workers

    # -- measuring --------------------------------------------------------------------------------

    @cached_property
    def _model(self) -> nn.Module:
        return converted(self.task, self.device)[0]

    @cached_property
    def _query_batches(self) -> list[QueryBatch]:
        """Batches of queries, once for every noise draw. Each image has its own batch."""
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
        return out_of_half(to_device(batch, self.device), self._model)

    @torch.no_grad()
    def _require_same_measure(self) -> None:
        """Look at the first queries before anything is trained."""
        move_weights(self._model)  # dropout before a last layer of zeros changes nothing
        _, batch, region = self._query_batches[0]
        require_same_measure(self.task, self._model, batch, self.spec.queries.quantity, region)

    @torch.no_grad()
    def _measure(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Measure the model on the queries.

        Returns:
            The quantity, mean over noise draws, (Q,); the decisions, (Q,).
        """
        queries = self.spec.queries
        values_Q = np.zeros(len(queries.items))
        decisions_Q = np.full(len(queries.items), np.nan)
        for rows, batch, region in self._query_batches:
            measured: Tensor = self.task.measure(self._model, batch, queries.quantity, region)
            values_Q[rows] += measured.double().cpu().numpy() / queries.noise_draws
            if self.task.output_loss == "cross-entropy":
                outputs = self.task.outputs(self._model, batch)
                if outputs.ndim == 2:  # else a sample has several decisions, such as tokens
                    decisions_Q[rows] = outputs.argmax(1).cpu().numpy()
        if not np.isfinite(values_Q).all():
            raise SpecError(
                "a retrained model's loss on a query is not finite: lower the learning rate"
            )
        return values_Q, decisions_Q

    def probe(self) -> Iterator[int]:
        if self.spec.recipe.trainer == "task":
            return
        # No samples are removed: the scores that choose them may not exist yet.
        # Not by `_width`, which is kept in the run: there may be none.
        self._one_at_a_time = bool(self._alone) or self._faster_alone
        count = 1 if self._one_at_a_time else min(len(self.sizes), WIDTHS[-1])
        trainer = self._trainer([Variant(seed) for seed in range(count)])
        while not trainer.finished:
            before = trainer.samples_seen
            trainer.step()
            yield trainer.samples_seen - before

    def write_queries(self) -> dict[str, str]:
        """Write the table of the queries."""
        return write_queries(self.run_store, self.task, self.spec.queries)

    def measured(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """The measurements of all shards: losses and decisions, (V, Q)."""
        count = len(self.sizes)
        losses, decisions = (
            self.run_store.read_rows(name, 0, count) for name in (LOSSES, DECISIONS)
        )
        return losses, decisions


def _pieces(count: int, largest: int) -> Iterator[tuple[int, int]]:
    """Bounds of the fewest pieces of similar size with at most `largest` items."""
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
        np.sort(changes.masked).astype("<i8").tobytes(),
    )
