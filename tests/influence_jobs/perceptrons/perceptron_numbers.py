"""Numbers of all that has a faster path for perceptrons, in float64: LiSSA, ensembles, jobs.

Run as a program, it writes the numbers and the paths taken to a file. It imports nothing of
`influence_jobs.perceptrons`, so that it also runs without that package.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infl_cluster.driver import drive
from infl_cluster.inline import InlineBackend
from influence_jobs.curvature import GaussNewton, Hessian, Lissa
from influence_jobs.curvature.lissa_steps import lissa_steps
from influence_jobs.errors import ModelError
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.kinds.ablation.spec import AblationSpec
from influence_jobs.kinds.baseline.spec import BaselineSpec
from influence_jobs.kinds.s_test.spec import STestSpec
from influence_jobs.kinds.train.spec import TrainedCheckpoint, TrainSpec
from influence_jobs.specs.base import TaskSpec, make_spec
from influence_jobs.specs.queries import Queries, Query
from influence_jobs.specs.rankings import Ranking
from influence_jobs.specs.solvers import Curvature, LissaSettings
from influence_jobs.store.layout import S_TEST
from influence_jobs.store.run import Run
from influence_jobs.tasks.base import Batch, Draw, Task
from influence_jobs.tasks.trust import trust_all
from influence_jobs.training.changes import Changes
from influence_jobs.training.ensemble import EnsembleTrainer, Variant
from influence_jobs.training.ensemble_norms import NormsWanted
from influence_jobs.training.recipe import Recipe
from influence_jobs.training.train import Trainer

N, CPU = 90, torch.device("cpu")
RECIPE = Recipe(2, 8, "sgd", lr=0.05, momentum=0.9, weight_decay=1e-2)
VARIANTS = (
    Variant(0, Changes(removed=np.arange(40, 63))),
    Variant(1),
    Variant(2, Changes(relabelled=np.arange(5, 45), labels=np.arange(40) % 5)),
    Variant(3, Changes(np.arange(11), relabelled=np.arange(20, 30), labels=np.full(10, 3))),
)
LAYERS = ("1", "4", "7")


class PointsTask(Task):
    """Random points of five classes and a perceptron, with dropout or without."""

    output_loss = "cross-entropy"

    def __init__(self, *, dropout: float = 0.0):
        generator = torch.Generator().manual_seed(0)
        self._x = torch.randn(N, 1, 4, 4, generator=generator, dtype=torch.float64)
        self._y = torch.randint(5, (N,), generator=generator)
        self._dropout = dropout

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Dropout(self._dropout),
            nn.Linear(12, 7), nn.ReLU(), nn.Dropout(self._dropout), nn.Linear(7, 5),
        ).double()  # fmt: skip

    def train_data(self) -> Tensor:
        return self._y

    def test_data(self) -> Tensor:
        return self._y[:6]

    def batch(self, ids: Tensor, draw: Draw) -> Batch:
        return self._x[ids], self._y[ids]

    def test_batch(self, ids: Tensor, draw: Draw) -> Batch:
        return -self._x[ids], self._y[ids]

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(batch[0])
        return logits

    def targets(self, batch: Batch) -> Tensor:
        labels: Tensor = batch[1]
        return labels

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self.outputs(model, batch), batch[1], reduction="none")


def lissa() -> tuple[dict[str, Tensor], set[str]]:
    """Three repeats with both curvatures that have blocks, at a given and at a chosen depth."""
    task, found, paths = PointsTask(), {}, set()
    torch.manual_seed(0)
    model = task.model().eval()
    space = ParameterSpace(model)
    samples = [
        task.losses(model, task.test_batch(torch.tensor([i]), Draw(0))).sum() for i in (0, 3)
    ]
    v_QP = torch.stack([*map(space.gradient, samples), torch.ones(space.size).double()])
    for kind in (GaussNewton, Hessian):
        operator = kind(model, space, task, torch.arange(N))
        paths.add(type(lissa_steps(operator, v_QP, 0.02, 20.0, 4)).__name__)
        for depth in (40, None):
            solver = Lissa(1.0, scale=20.0, depth=depth, batch_size=4)
            for repeat, solution in enumerate(solver.solve_repeats(operator, v_QP, range(3))):
                name = f"{kind.__name__}, depth {depth}, repeat {repeat}"
                found[name] = solution.x_QP
                found[f"{name}, steps"] = solution.iterations_Q
                found[f"{name}, residual"] = solution.residual_Q
    return found, paths


def ensembles() -> tuple[dict[str, Tensor], set[str]]:
    """Variants with samples removed and relabelled, with norms, and with dropout."""
    found, paths = {}, set()
    for dropout in (0.0, 0.2):
        task, norms = PointsTask(dropout=dropout), NormsWanted(LAYERS, "channel", skip_epochs=0)
        try:
            trainer = EnsembleTrainer(task, RECIPE, VARIANTS, device=CPU, norms=norms)
        except ModelError as error:
            assert "one at a time" in str(error)
            paths.add("one at a time")
            models = [alone(task, variant) for variant in VARIANTS]
        else:
            paths.add(type(trainer.steps).__name__)
            while not trainer.finished:
                losses_M = trainer.step()
            assert losses_M is not None
            models = [trainer.model(i) for i in range(len(VARIANTS))]
            if not dropout:
                found["losses"] = losses_M
                for i in range(len(VARIANTS)):
                    for layer, norms_NC in trainer.norms(i).items():
                        found[f"norms {i} {layer}"] = norms_NC
        for i, model in enumerate(models):
            for name, value in model.state_dict().items():
                found[f"dropout {dropout}, variant {i}, {name}"] = value
    return found, paths


def alone(task: Task, variant: Variant) -> nn.Module:
    trainer = Trainer(task, RECIPE, seed=variant.seed, device=CPU, changes=variant.changes)
    while not trainer.finished:
        trainer.step()
    return trainer.model


def jobs() -> dict[str, Tensor]:
    """An s-test by LiSSA, and an ablation that retrains, without and with dropout."""
    found = {}
    with tempfile.TemporaryDirectory() as root:
        for dropout in (0.0, 0.2):
            task = TaskSpec(
                name=f"{Path(__file__).stem}:PointsTask",
                options={"dropout": dropout},
                data=PointsTask().fingerprint(),
            )
            train = make_spec(TrainSpec, task=task, epochs=1, batch_size=8, lr=0.05)
            queries = Queries(items=tuple(Query(test=test) for test in (0, 2, 5)))
            s_test = make_spec(
                STestSpec,
                task=task,
                checkpoint=TrainedCheckpoint(train=train, epoch=1),
                modules=LAYERS,
                queries=queries,
                curvature=Curvature(),
                solver=LissaSettings(damping=1.0, scale=20.0, depth=40, batch_size=4, repeats=3),
            )
            random = make_spec(BaselineSpec, task=task, method="random", queries=queries)
            ablation = make_spec(
                AblationSpec,
                task=task,
                recipe=train,
                rankings=(Ranking(name="random", scores=(random,)),),
                sizes=(10,),
                modes=("relabel", "remove"),
            )
            for spec in (s_test, ablation):
                run = Run.create(root, spec)
                drive(root, run.id, InlineBackend())
                if spec is s_test:
                    found[f"s-test {dropout}"] = torch.from_numpy(run.read_rows(S_TEST, 0, 3))
                else:
                    losses = [row["loss"] for row in run.read_table("results").to_pylist()]
                    found[f"ablation {dropout}"] = torch.tensor(losses)
    return found


if __name__ == "__main__":
    trust_all()
    torch.set_num_threads(1)
    (solutions, steps), (trained, trainers) = lissa(), ensembles()
    # The path of the imported package: the test checks that it is the right one.
    library = sys.modules["influence_jobs"].__file__
    paths = {"library": library, "lissa": steps, "ensembles": trainers}
    torch.save({"paths": paths, "numbers": solutions | trained | jobs()}, sys.argv[1])
