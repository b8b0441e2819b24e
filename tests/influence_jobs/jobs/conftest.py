"""Score runs of the example task, and small grids of retrainings."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infl_cluster.driver import drive
from infl_cluster.inline import InlineBackend
from influence_jobs.jobs import retraining
from influence_jobs.kinds.ablation.spec import AblationSpec
from influence_jobs.kinds.baseline.spec import BaselineSpec
from influence_jobs.kinds.grad_norms.spec import GradNormsSpec
from influence_jobs.kinds.s_test.spec import STestSpec
from influence_jobs.kinds.train.spec import TrainSpec
from influence_jobs.specs.base import AnySpec, make_spec
from influence_jobs.specs.queries import Queries, Query
from influence_jobs.specs.rankings import Ranking
from influence_jobs.specs.solvers import IdentitySettings
from influence_jobs.store.run import Run

Carry = Callable[..., Run]


@pytest.fixture(scope="session")
def queries() -> Queries:
    return Queries(items=tuple(Query(test=test) for test in (5, 0, 111)))


@pytest.fixture(scope="session")
def scores_root(tmp_path_factory: pytest.TempPathFactory, trained_root: Path) -> Path:
    """Folder of the runs of all score tests of this session, and of their training."""
    root = tmp_path_factory.mktemp("scores") / "runs"
    shutil.copytree(trained_root, root)
    return root


@pytest.fixture(scope="session")
def carry_out(scores_root: Path) -> Carry:
    """Carries out a spec in this process."""

    def run(spec: AnySpec, *, shard_rows: int | None = None, root: Path = scores_root) -> Run:
        made = Run.create(str(root), spec)
        drive(made.root, made.id, InlineBackend(), shard_rows=shard_rows)
        return made

    return run


@pytest.fixture(scope="session")
def fresh_root(tmp_path_factory: pytest.TempPathFactory, trained_root: Path) -> Callable[[], Path]:
    """Makes folders of runs that hold the training alone."""

    def make() -> Path:
        root = tmp_path_factory.mktemp("fresh") / "runs"
        shutil.copytree(trained_root, root)
        return root

    return make


@pytest.fixture(scope="session")
def checkpoint(grad_norms_spec: GradNormsSpec):
    return grad_norms_spec.checkpoints[0]


@pytest.fixture(scope="session")
def recipe(grad_norms_spec) -> TrainSpec:
    return make_spec(TrainSpec, task=grad_norms_spec.task, epochs=1, batch_size=64, lr=0.05)


@pytest.fixture(scope="session")
def random(grad_norms_spec, queries) -> Ranking:
    spec = make_spec(BaselineSpec, task=grad_norms_spec.task, method="random", queries=queries)
    return Ranking(name="random", scores=(spec,))


@pytest.fixture(scope="session")
def loss(grad_norms_spec, checkpoint, queries) -> Ranking:
    spec = make_spec(
        BaselineSpec,
        task=grad_norms_spec.task,
        method="loss",
        queries=queries,
        checkpoint=checkpoint,
    )
    return Ranking(name="loss", scores=(spec,))


@pytest.fixture(scope="session")
def grid(grad_norms_spec, recipe, random, loss):
    def make(**fields: Any) -> AblationSpec:
        chosen = {
            "task": grad_norms_spec.task,
            "recipe": recipe,
            "rankings": (random, loss),
            "sizes": (100,),
            "modes": ("relabel", "remove"),
        }
        return make_spec(AblationSpec, **(chosen | fields))

    return make


@pytest.fixture(scope="session")
def s_test_of(grad_norms_spec, checkpoint, queries):
    """Makes specs of s_test runs, without curvature unless told otherwise."""

    def make(**fields: Any) -> STestSpec:
        chosen = {
            "task": grad_norms_spec.task,
            "checkpoint": checkpoint,
            "modules": ("conv2", "head"),
            "queries": queries,
            "solver": IdentitySettings(),
        }
        return make_spec(STestSpec, **(chosen | fields))

    return make


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts how often each variant begins to be trained."""
    begun: Counter[str] = Counter()
    make = retraining.RetrainJob._trainer

    def count(self: Any, variants: Any, **how: Any) -> Any:
        begun.update(retraining._key(variant) for variant in variants)
        return make(self, variants, **how)

    monkeypatch.setattr(retraining.RetrainJob, "_trainer", count)
    return begun
