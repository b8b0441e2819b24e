"""Exact influence through the training of one run: shards are blocks of queries."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import nn

from influence_jobs.errors import ModelError
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.jobs.base import Job, Plan, Progress, Result, Shard
from influence_jobs.jobs.queries import query_gradients, require_queries, write_queries
from influence_jobs.jobs.recipe import recipe_of
from influence_jobs.jobs.saved_state import SavedState, saved_bytes
from influence_jobs.jobs.scores import scores_layout, sides_of
from influence_jobs.kinds.unrolled.spec import UnrolledSpec
from influence_jobs.specs.base import AnySpec
from influence_jobs.store.checkpoints import load_checkpoint, recorded_digest
from influence_jobs.store.documents import Entry
from influence_jobs.store.files import Files
from influence_jobs.store.layout import (
    BY_QUERY,
    CHECKPOINTS,
    SCORES,
    STEP,
    ArrayLayout,
    step_name,
)
from influence_jobs.store.run import Run
from influence_jobs.store.software import other_versions
from influence_jobs.tasks.placement import in_dtype
from influence_jobs.terms import size
from influence_jobs.training.statistics import with_statistics
from influence_jobs.training.train import initial_model
from influence_jobs.training.trajectory import State, Trajectory, same_weights
from influence_jobs.training.unrolled import Unrolled

# A shard is a block of queries, which go back through the steps together.
MAX_QUERIES, MAX_BLOCK_BYTES = 64, 2**30
PASSES = 3  # of every step: forward twice, and back


class UnrolledJob(Job[UnrolledSpec]):
    """The states of the repeated training are kept in the run's folder, for all workers.

    A killed shard resumes from its last saved derivatives, bit by bit.
    """

    spec_type = UnrolledSpec

    @property
    def title(self) -> str:
        return f"unrolled {self.spec.task.slug} {len(self.spec.queries.items)} queries"

    @staticmethod
    def inputs(spec: UnrolledSpec) -> tuple[AnySpec, ...]:
        return (spec.checkpoint.train,)

    def input_digests(self) -> dict[str, str]:
        checkpoint = self.spec.checkpoint
        name = f"{checkpoint.train.run_id}@{checkpoint.epoch}"
        return {name: recorded_digest(self.run_store.root, checkpoint)}

    @property
    def batch_size(self) -> int:
        return self.spec.checkpoint.train.batch_size

    @property
    def meaning(self) -> dict[str, str]:
        """Quantity, sign and unit of the scores, stored as attributes of the arrays."""
        quantity = self.spec.queries.quantity
        return {
            **sides_of(quantity),
            "quantity": "- N x derivative by the weight of the sample's loss in this training: N x "
            f"the predicted rise of the query's {quantity} when the sample is masked there",
            "of": "all",
        }

    def plan(self, shard_rows: int | None = None) -> Plan:
        require_queries(self.task, self.spec.queries)
        q, n = len(self.spec.queries.items), len(self.task.train_data())
        dtype, steps = self.spec.precision, self._trajectory
        block = max(1, min(MAX_QUERIES, MAX_BLOCK_BYTES // self._unrolled.query_bytes, q))
        by_query = ArrayLayout(
            name=BY_QUERY,
            shape=(q, n),
            row_axis=0,
            chunk_rows=1,
            dims=("query", "sample"),
            dtype=dtype,
            attributes=self.meaning,
        )
        scores = scores_layout(SCORES, q, n, dtype=dtype, attributes=self.meaning)
        shards = tuple(
            Shard(f"{start:06d}-{min(start + block, q):06d}", start, min(start + block, q))
            for start in range(0, q, block)
        )
        return Plan(
            (by_query, scores),
            shards,
            units=len(shards) * self._units,
            batch_size=self.batch_size,
            file_bytes=steps.num_states * steps.state_bytes,
        )

    @property
    def _units(self) -> int:
        """Samples that a shard passes through the model."""
        return PASSES * len(self.task.train_data()) * self.spec.checkpoint.epoch

    def run(self, shard: Shard, progress: Progress) -> Result:
        require_queries(self.task, self.spec.queries)
        unrolled, steps = self._unrolled, self._trajectory
        saved = SavedState(self.run_store.files, f"{CHECKPOINTS}/state-{shard.id}.pt")
        state = saved.read()

        def at(passes: int, offset: int) -> Callable[[int], None]:
            def told(done: int) -> None:
                part = (offset + passes * done / steps.num_steps) / PASSES
                progress(round(part * self._units))

            return told

        with self._as_trained():
            # Where derivatives are saved, this only reads the end of the training.
            trained = steps.train(at(1, 0) if state is None else lambda done: None)
            self._require_the_same(trained)
            model = in_dtype(with_statistics(trained), unrolled.dtype)
            space = ParameterSpace(model)
            gradients_QP = query_gradients(
                self.task, model, space, self.spec.queries, shard.start, shard.stop
            )
            scores_QN = unrolled.scores(
                space.split(gradients_QP), at(PASSES - 1, 1), state=state, keep=saved.keep
            )
        saved.delete()
        return Result({BY_QUERY: scores_QN.numpy()})

    @cached_property
    def _unrolled(self) -> Unrolled:
        return Unrolled(self._trajectory, getattr(torch, self.spec.precision))

    @cached_property
    def _trajectory(self) -> Trajectory:
        train = self.spec.checkpoint.train
        return Trajectory(
            self.task,
            recipe_of(train),
            seed=train.seed,
            epochs=self.spec.checkpoint.epoch,
            device=self.device,
            snapshots=_Snapshots(self.run_store.files),
        )

    def _entries(self) -> list[Entry]:
        """The manifest of the training."""
        return [*Run(self.run_store.root, self.spec.checkpoint.train).manifest.done().values()]

    @contextmanager
    def _as_trained(self) -> Iterator[None]:
        """With as many threads as the training had: rounding depends on them."""
        before = torch.get_num_threads()
        torch.set_num_threads(
            max((entry.threads for entry in self._entries()), default=0) or before
        )
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _require_the_same(self, trained: nn.Module) -> None:
        """Refuse a repeated training that ends in other weights than those that are stored.

        Raises:
            ModelError: It does.
        """
        checkpoint = self.spec.checkpoint
        stored = initial_model(self.task, checkpoint.train.seed, self.device)
        load_checkpoint(stored, self.run_store.root, checkpoint)
        if same_weights(trained.state_dict(), stored.state_dict()):
            return
        entries, why = self._entries(), ""
        if others := other_versions(entries):
            why = f", with another {', '.join(sorted(others))}"
        elif not any(entry.threads for entry in entries):
            why = ", or with another number of threads, which it does not say"
        raise ModelError(
            f"{checkpoint.words()} was trained on another machine or device{why}: repeated on this "
            f"{self.device.type}, its steps end in other weights, and unrolled needs the same; "
            f"delete the folder of {checkpoint.train.run_id} and submit again, to train it here"
        )

    def probe(self) -> Iterator[int]:
        queries = self.plan().shards[0].stop
        for samples in self._unrolled.trial(queries):
            yield PASSES * samples

    def notes(self) -> Sequence[str]:
        steps, queries = self._trajectory, self.plan().shards[0].stop
        said = (
            f"{steps.num_steps:,} steps, gone back through by {queries} queries at a time: "
            f"{size(steps.spacing * steps.step_bytes)} of memory for {steps.spacing} steps, "
            f"{size(queries * self._unrolled.query_bytes)} for derivatives; "
            f"{size(steps.num_states * steps.state_bytes)} on disk for {steps.num_states} states, "
            "until it is done"
        )
        return [said]

    def finish(self) -> Result:
        run = self.run_store
        scores_QN = run.read_rows(BY_QUERY, 0, len(self.spec.queries.items))
        files = write_queries(run, self.task, self.spec.queries) | self.write_samples()
        for step in _Snapshots(run.files).steps():
            run.files.delete(step_name(step))
        return Result({SCORES: scores_QN}, files)


class _Snapshots:
    """States of the trainer, as files of the run."""

    def __init__(self, files: Files):
        self._files = files

    def steps(self) -> Sequence[int]:
        names = [n for n in self._files.names(CHECKPOINTS) if n.startswith(STEP)]
        return [int(name.removeprefix(STEP).removesuffix(".pt")) for name in names]

    def read(self, step: int) -> State | None:
        state: State | None = SavedState(self._files, step_name(step)).read()
        return state

    def write(self, step: int, state: State) -> None:
        self._files.write(step_name(step), saved_bytes(state))
