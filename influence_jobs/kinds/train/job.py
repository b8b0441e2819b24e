"""Train one model, in a single shard that saves its state from time to time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from influence_jobs.errors import DataError, ModelError
from influence_jobs.jobs.base import Job, Plan, Progress, Result, Shard
from influence_jobs.jobs.norm_arrays import norm_layouts
from influence_jobs.jobs.recipe import recipe_of
from influence_jobs.jobs.saved_state import SavedState, saved_bytes
from influence_jobs.kinds.train.spec import TrainSpec
from influence_jobs.models.checkpoints import load_weights
from influence_jobs.specs.base import AnySpec
from influence_jobs.store.layout import TRAINING_STATE, ArrayLayout, checkpoint_name, norms_name
from influence_jobs.tasks.base import Draw
from influence_jobs.tasks.placement import to_device
from influence_jobs.training.changes import Changes
from influence_jobs.training.own import trained_by_task
from influence_jobs.training.recorded_norms import RecordedNorms
from influence_jobs.training.recorder import NORMS, read_recording, weights_name
from influence_jobs.training.train import Trainer, initial_model, require_full_batches


class TrainJob(Job[TrainSpec]):
    """One shard for all epochs. A killed training resumes from its last saved state, bit by bit."""

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
        if self.spec.trainer == "infl":
            require_full_batches(self.task, self.spec.batch_size, n)
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

    @property
    def tells_progress(self) -> bool:
        return self.spec.trainer != "task"

    def run(self, shard: Shard, progress: Progress) -> Result:
        if self.spec.trainer == "task":
            return self._run_by_task(progress)
        if self.spec.trainer == "recorded":
            return self._run_recorded(progress)
        files = self.run_store.files
        trainer, metrics = self._trainer(), []
        saved = SavedState(files, TRAINING_STATE)
        if (state := saved.read()) is not None:
            trainer.load_state_dict(state["trainer"])
            metrics = state["metrics"]
        progress(trainer.samples_seen)
        while not trainer.finished:
            mean_loss = trainer.step()
            progress(trainer.samples_seen)
            trainer.require_finite()
            if mean_loss is not None:
                trainer.model.eval()
                figures = self.task.evaluate(trainer.model)
                trainer.model.train()
                metrics.append({"epoch": trainer.epoch, "train_loss": mean_loss, **figures})
                if trainer.epoch in self.spec.save_epochs:
                    files.write(
                        checkpoint_name(trainer.epoch), saved_bytes(trainer.model.state_dict())
                    )
            if not trainer.finished:
                saved.keep(lambda: {"trainer": trainer.state_dict(), "metrics": metrics})
        sums = trainer.norms.sums if trainer.norms is not None else {}
        arrays = {norms_name(layer): values.numpy() for layer, values in sums.items()}
        return Result(arrays, self._files(metrics))

    def _run_by_task(self, progress: Progress) -> Result:
        """The task trains; there is nothing to resume within its training."""
        progress(0)
        model = trained_by_task(self.task, self.spec.seed, self.device, Changes())
        figures = {"train_loss": self._mean_loss(model), **self.task.evaluate(model)}
        self.run_store.files.write(checkpoint_name(1), saved_bytes(model.state_dict()))
        progress(len(self.task.train_data()))
        return Result(files=self._files([{"epoch": 1, **figures}]))

    def _run_recorded(self, progress: Progress) -> Result:
        """Take over the weights and norms of a training elsewhere."""
        assert self.spec.recorded is not None
        folder, metrics = Path(self.spec.recorded.path), []
        progress(0)
        if read_recording(folder)[1] != self.spec.recorded.sha256:
            raise ModelError(
                f"recording {folder} has changed since the run was submitted: submit it again"
            )
        model = initial_model(self.task, 0, self.device).eval()
        for epoch in self.spec.save_epochs:
            load_weights(model, folder / weights_name(epoch))
            figures = {"train_loss": self._mean_loss(model), **self.task.evaluate(model)}
            metrics.append({"epoch": epoch, **figures})
            self.run_store.files.write(checkpoint_name(epoch), saved_bytes(model.state_dict()))
        with np.load(folder / NORMS) as norms:
            arrays = {norms_name(layer): norms[layer] for layer in self.spec.norm_layers}
        progress(len(self.task.train_data()) * self.spec.epochs)
        return Result(arrays, self._files(metrics))

    @torch.no_grad()
    def _mean_loss(self, model: nn.Module) -> float:
        total = 0.0
        everything = torch.arange(len(self.task.train_data()))
        for ids in torch.split(everything, self.task.batch_size):
            batch = to_device(self.task.batch(ids, Draw(self.spec.seed)), self.device)
            losses_B = self.task.losses(model, batch)
            if (bad_B := ~losses_B.isfinite().cpu()).any():
                raise DataError(
                    f"the training loss of sample {int(ids[bad_B][0])} is not finite after its "
                    "own training: check the sample"
                )
            total += float(losses_B.sum())
        return total / len(everything)

    def _files(self, metrics: list[dict[str, Any]]) -> dict[str, str]:
        """Checksums of the weights, and of the table that is written here."""
        files = self.run_store.files
        names = [checkpoint_name(epoch) for epoch in self.spec.save_epochs]
        sums = {name: files.checksum(name) for name in names}
        return sums | self.run_store.write_table("metrics", pa.Table.from_pylist(metrics))

    def _trainer(self) -> Trainer:
        spec = self.spec
        norms = None
        if spec.norm_layers:
            norms = RecordedNorms(
                self.task.model(),
                spec.norm_layers,
                len(self.task.train_data()),
                reduction=spec.norm_reduction,
                skip_epochs=spec.norm_skip_epochs,
            )
        return Trainer(self.task, recipe_of(spec), seed=spec.seed, device=self.device, norms=norms)

    def probe(self) -> Iterator[int]:
        if self.spec.trainer == "recorded":
            yield len(self.task.train_data()) * self.spec.epochs  # files are copied
        if self.spec.trainer != "infl":
            return
        trainer = self._trainer()
        while not trainer.finished:
            before = trainer.samples_seen
            trainer.step()
            yield trainer.samples_seen - before

    def finish(self) -> Result:
        self.run_store.files.delete(TRAINING_STATE)
        return Result(files=self.write_samples() if self.spec.norm_layers else {})
