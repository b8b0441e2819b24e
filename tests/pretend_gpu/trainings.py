"""Trainers and ensembles, and the way back through their steps, on the pretended GPU."""

import copy
import tempfile
from typing import Any

import torch

from influence_jobs.training.ensemble import EnsembleTrainer, Variant
from influence_jobs.training.ensemble_norms import NormsWanted
from influence_jobs.training.recipe import Recipe
from influence_jobs.training.recorded_norms import RecordedNorms
from influence_jobs.training.recorder import Recorder
from influence_jobs.training.statistics import statistics_of
from influence_jobs.training.train import Trainer
from influence_jobs.training.trajectory import Trajectory
from influence_jobs.training.unrolled import Unrolled

from .networks import Digits, made
from .work import BATCH, QUERIES, Tensors, Work, batches

SGD = Recipe(50, BATCH, "sgd", lr=0.05, momentum=0.9, weight_decay=1e-2)
OWN = Recipe(50, BATCH, "task", lr=None)
ADAM = Recipe(50, BATCH, "adam", lr=3e-3, schedule="cosine", warmup=2, clip_norm=1.0)


def training(network: str, recipe: Recipe, *, recorded: bool = False, kind: Any = Digits) -> Any:
    def start(device: torch.device) -> Work:
        def run(units: int) -> Tensors:
            task = kind(network=network)
            kept = None
            if recorded:
                kept = RecordedNorms(
                    task.model(), ["1", "3"], len(task.y), reduction="channel", skip_epochs=0
                )
            trainer = Trainer(task, recipe, seed=3, device=device, norms=kept)
            for _ in range(units):
                trainer.step()
                trainer.require_finite()
            return list(trainer.model.state_dict().values()), kept.sums if kept else ()

        return run

    return start


def recorder(device: torch.device) -> Work:
    """A loop of the user's own, with its ids on the CPU."""
    task, model = made("perceptron", device)
    given = batches(task, device)
    folder = tempfile.TemporaryDirectory()

    def run(units: int) -> Tensors:
        found = Recorder(model, len(task.y), layers=["1", "3"], folder=folder.name, skip_epochs=0)
        for i in range(units):
            model.zero_grad()
            task.losses(model, given[i]).mean().backward()
            found.step(torch.arange(BATCH * i, BATCH * (i + 1)))
        return found.norms.sums

    return run


def ensemble(task: Digits, recipe: Recipe, wanted: NormsWanted | None = None) -> Any:
    def start(device: torch.device) -> Work:
        def run(units: int) -> Tensors:
            variants = [Variant(seed) for seed in range(3)]
            trainer = EnsembleTrainer(task, recipe, variants, device=device, norms=wanted)
            for _ in range(units):
                trainer.step()
            found = [list(trainer.model(i).state_dict().values()) for i in range(3)]
            return found, [trainer.norms(i) for i in range(3)]

        return run

    return start


class _Kept(dict[int, Any]):
    """Snapshots in memory."""

    def steps(self) -> list[int]:
        return [*self]

    def read(self, step: int) -> Any:
        return copy.deepcopy(self.get(step))

    def write(self, step: int, state: Any) -> None:
        self[step] = copy.deepcopy(state)


def unrolled(network: str, recipe: Recipe) -> Any:
    def start(device: torch.device) -> Work:
        def run(units: int) -> Tensors:
            task = Digits(network=network)
            task.x, task.y = task.x[: BATCH * units], task.y[: BATCH * units]
            how = Recipe(**{**vars(recipe), "epochs": 1})
            path = Trajectory(task, how, seed=2, epochs=1, device=device, snapshots=_Kept())
            model = path.train(lambda steps: None)
            back = Unrolled(path, torch.float32)
            named = dict(model.named_parameters()) | statistics_of(model)
            given = {n: torch.ones(QUERIES, *p.shape).to(device) for n, p in named.items()}
            return back.scores(given, lambda steps: None)

        return run

    return start
