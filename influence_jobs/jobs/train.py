"""Train one model; a run of a single shard that saves its state as it goes."""

import io
import math
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import torch

from influence_jobs.errors import SpecError
from influence_jobs.jobs.base import Job, Plan, Report, Result, Shard
from influence_jobs.jobs.norm_arrays import norm_layouts
from influence_jobs.specs import AnySpec, TrainSpec
from influence_jobs.store.layout import TRAINING_STATE, ArrayLayout, checkpoint_name, norms_name
from influence_jobs.store.run import checksum
from influence_jobs.training.recorded_norms import RecordedNorms
from influence_jobs.training.train import Recipe, Trainer

SAVE_EVERY_S = 30.0
SAVE_SHARE = 0.03  # at most this part of the time goes into saving state


class TrainJob(Job[TrainSpec]):
    """One shard: all epochs. A killed training goes on from its last saved state, with the same bits."""

    spec_type = TrainSpec

    @property
    def title(self) -> str:
        return f"train {self.spec.task.slug} seed {self.spec.seed}"

    @staticmethod
    def inputs(spec: TrainSpec) -> tuple[AnySpec, ...]:
        return ()

    @property
    def batch_size(self) -> int:
        return self.spec.batch_size

    def plan(self, shard_rows: int | None = None) -> Plan:
        n = len(self.task.train_data())
        arrays: tuple[ArrayLayout, ...] = ()
        if self.spec.norm_layers:
            arrays = norm_layouts(
                self.task.model(),
                self.spec.norm_layers,
                num_samples=n,
                reduction=self.spec.norm_reduction,
                checkpoints=None,
                source="the mean loss of each batch a sample was in, summed over epochs "
                f"{self.spec.norm_skip_epochs + 1} to {self.spec.epochs} of the training",
            )
        shard = Shard("all", 0, n)
        return Plan(arrays, (shard,), units=n * self.spec.epochs, batch_size=self.batch_size)

    def run(self, shard: Shard, report: Report) -> Result:
        files, saved_files = self.run_store.files, {}
        trainer = self._trainer()
        metrics = self._resume(trainer)
        report(trainer.samples_seen)
        last_saved, saving_s = time.monotonic(), 0.0
        while not trainer.finished:
            mean_loss = trainer.step()
            report(trainer.samples_seen)
            if mean_loss is not None:
                if not math.isfinite(mean_loss):
                    raise SpecError(
                        f"the training diverged: the mean loss of epoch {trainer.epoch} is {mean_loss}; "
                        "lower the learning rate"
                    )
                metrics.append(
                    {"epoch": trainer.epoch, "train_loss": mean_loss, **self._evaluate(trainer)}
                )
                if trainer.epoch in self.spec.save_epochs:
                    files.write(checkpoint_name(trainer.epoch), _bytes(trainer.model.state_dict()))
            since = time.monotonic() - last_saved
            if since > max(SAVE_EVERY_S, saving_s / SAVE_SHARE) and not trainer.finished:
                started = time.monotonic()
                state = {"trainer": trainer.state_dict(), "metrics": metrics}
                files.write(TRAINING_STATE, _bytes(state))
                last_saved = time.monotonic()
                saving_s = last_saved - started
        for epoch in self.spec.save_epochs:
            saved_files[checkpoint_name(epoch)] = checksum(files.read(checkpoint_name(epoch)))
        saved_files |= self.run_store.write_table("metrics", pa.Table.from_pylist(metrics))
        sums = trainer.norms.sums if trainer.norms is not None else {}
        arrays = {norms_name(layer): values.numpy() for layer, values in sums.items()}
        return Result(arrays, saved_files)

    def _trainer(self) -> Trainer:
        spec = self.spec
        recipe = Recipe(
            epochs=spec.epochs,
            batch_size=spec.batch_size,
            optimizer=spec.optimizer,
            lr=spec.lr,
            momentum=spec.momentum,
            weight_decay=spec.weight_decay,
        )
        norms = None
        if spec.norm_layers:
            norms = RecordedNorms(
                self.task.model(),
                spec.norm_layers,
                len(self.task.train_data()),
                reduction=spec.norm_reduction,
                skip_epochs=spec.norm_skip_epochs,
            )
        return Trainer(self.task, recipe, seed=spec.seed, device=self.device, norms=norms)

    def _resume(self, trainer: Trainer) -> list[dict[str, Any]]:
        """Put the trainer where an earlier attempt was; returns the metrics so far."""
        try:
            data = self.run_store.files.read(TRAINING_STATE)
        except FileNotFoundError:
            return []
        state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        trainer.load_state_dict(state["trainer"])
        metrics: list[dict[str, Any]] = state["metrics"]
        return metrics

    def probe(self) -> Iterator[int]:
        trainer = self._trainer()
        while not trainer.finished:
            before = trainer.samples_seen
            trainer.step()
            yield trainer.samples_seen - before

    def _evaluate(self, trainer: Trainer) -> dict[str, float]:
        trainer.model.eval()
        figures = dict(self.task.evaluate(trainer.model))
        trainer.model.train()
        return figures

    def finish(self) -> Result:
        self.run_store.files.delete(TRAINING_STATE)
        return Result(files=self.write_samples() if self.spec.norm_layers else {})


def _bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
