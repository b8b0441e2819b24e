"""The sign of influence: retrain without the most helpful or the most harmful samples."""

from pathlib import Path

import numpy as np
import pytest
import torch

from infl_cluster.driver import drive
from infl_cluster.inline import InlineBackend
from influence_jobs.kinds.influence.spec import InfluenceSpec
from influence_jobs.kinds.s_test.spec import STestSpec
from influence_jobs.kinds.train.spec import TrainedCheckpoint, TrainSpec
from influence_jobs.specs.base import TaskSpec, make_spec
from influence_jobs.specs.queries import Queries, Query
from influence_jobs.specs.solvers import ConjugateGradientSettings, Curvature
from influence_jobs.store.layout import SCORES
from influence_jobs.store.run import Run
from influence_jobs.tasks.base import Draw
from influence_jobs.tasks.mnist import MnistTask
from influence_jobs.training.changes import Changes
from influence_jobs.training.recipe import Recipe
from influence_jobs.training.train import Trainer

REMOVED, SEEDS, EPOCHS, TEST = 2000, 3, 2, 3520


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_without_helpful_samples_the_loss_rises_and_without_harmful_ones_it_does_not(
    mnist_dir: Path, tmp_path: Path
) -> None:
    task = MnistTask(data_dir=str(mnist_dir))
    named = TaskSpec(name="mnist", paths={"data_dir": str(mnist_dir)}, data=task.fingerprint())
    train = make_spec(
        TrainSpec, task=named, epochs=EPOCHS, lr=0.003, momentum=0.9, weight_decay=0.001
    )
    s_test = make_spec(
        STestSpec,
        task=named,
        checkpoint=TrainedCheckpoint(train=train, epoch=EPOCHS),
        modules=("fc1", "fc2", "fc3"),
        queries=Queries(items=(Query(test=TEST),)),
        curvature=Curvature(samples=10000),
        solver=ConjugateGradientSettings(damping=0.25, tolerance=1e-2),
    )
    run = Run.create(str(tmp_path), make_spec(InfluenceSpec, task=named, s_tests=(s_test,)))
    drive(run.root, run.id, InlineBackend())
    scores = run.read_rows(SCORES, 0, 60000)[0]
    order = np.argsort(-scores, kind="stable")
    generator = np.random.default_rng(0)
    groups = {
        "none": order[:0],
        "helpful": order[:REMOVED],
        "harmful": order[-REMOVED:],
        "random": generator.choice(60000, REMOVED, replace=False),
    }
    losses = {
        name: np.mean([_loss_without(task, removed, seed) for seed in range(1, 1 + SEEDS)])
        for name, removed in groups.items()
    }
    print(losses)
    assert losses["helpful"] > 1.5 * losses["random"]
    assert losses["harmful"] <= losses["random"]


def _loss_without(task: MnistTask, removed: np.ndarray, seed: int) -> float:
    recipe = Recipe(
        epochs=EPOCHS, optimizer="sgd", lr=0.003, momentum=0.9, weight_decay=0.001, batch_size=8
    )
    trainer = Trainer(
        task,
        recipe,
        seed=seed,
        device=torch.device("cpu"),
        changes=Changes(removed=np.sort(removed)),
    )
    while not trainer.finished:
        trainer.step()
    model = trainer.model.eval()
    with torch.no_grad():
        return float(task.losses(model, task.test_batch(torch.tensor([TEST]), Draw(0))))
