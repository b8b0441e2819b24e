"""Score runs of the example task."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from infl_cluster.driver import drive
from infl_cluster.inline import InlineBackend
from influence_jobs.specs import AnySpec, GradNormsSpec, Queries, Query
from influence_jobs.store.run import Run

Carry = Callable[..., Run]


@pytest.fixture(scope="session")
def queries() -> Queries:
    return Queries(items=tuple(Query(test=test) for test in (5, 0, 111)))


@pytest.fixture(scope="session")
def scores_root(tmp_path_factory: pytest.TempPathFactory, trained_root: Path) -> Path:
    """Runs of all score tests of this session, beside the training that they read."""
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
