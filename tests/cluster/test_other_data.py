"""Each worker, and a driver that resumes, compares the data, not by the fingerprint alone."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from digits import DigitsTask

from infl_cluster import shipping
from infl_cluster.driver import drive
from infl_cluster.inline import InlineBackend
from infl_cluster.pool import ShardWorker
from influence_jobs.errors import DataError
from influence_jobs.kinds import same_data
from influence_jobs.kinds.grad_norms.spec import GradNormsSpec
from influence_jobs.kinds.runner import ShardRunner
from influence_jobs.kinds.s_test.spec import STestSpec
from influence_jobs.specs.base import AnySpec, make_spec
from influence_jobs.specs.queries import Queries, Query
from influence_jobs.specs.solvers import IdentitySettings
from influence_jobs.store import layout
from influence_jobs.store.run import Run
from influence_jobs.store.status import is_done
from influence_jobs.tasks.base import FINGERPRINT_ROWS, Draw, Task
from influence_jobs.tasks.digests import SAMPLES

N = 1500


class Stopped(Exception):
    """The driver is ended before it has computed all."""


class Halves(InlineBackend):
    """Ends after half of the shards."""

    def run(self, run: Run, shards: Any, **told: Any) -> None:
        super().run(run, shards[: len(shards) // 2], **told)
        raise Stopped


def s_test_of(norms: GradNormsSpec, tests: range) -> STestSpec:
    return make_spec(
        STestSpec,
        task=norms.task,
        checkpoint=norms.checkpoints[0],
        modules=("head",),
        queries=Queries(items=tuple(Query(test=test) for test in tests)),
        solver=IdentitySettings(),
    )


@pytest.fixture
def root(tmp_path: Path, trained_root: Path) -> str:
    shutil.copytree(trained_root, tmp_path / "runs")
    return str(tmp_path / "runs")


def begun(root: str, spec: AnySpec) -> Run:
    run = Run.create(root, spec)
    with pytest.raises(Stopped):
        drive(root, run.id, Halves(), shard_rows=256)
    return run


def of_node(monkeypatch: pytest.MonkeyPatch, *, train: bool = False, test: bool = False) -> None:
    """From now on rows differ, as on a node with other files; those of the fingerprint do not."""
    batch, test_batch = DigitsTask.batch, DigitsTask.test_batch
    seen = torch.linspace(0, N - 1, FINGERPRINT_ROWS).round().long()

    def others(self: Task, ids: torch.Tensor, draw: Draw) -> Any:
        images, labels = batch(self, ids, draw)
        return images + (~torch.isin(ids, seen)).float()[:, None, None, None], labels

    def other_tests(self: Task, ids: torch.Tensor, draw: Draw) -> Any:
        images, labels = test_batch(self, ids, draw)
        return images + 1, labels

    if train:
        monkeypatch.setattr(DigitsTask, "batch", others)
    if test:
        monkeypatch.setattr(DigitsTask, "test_batch", other_tests)


def test_a_run_does_not_go_on_with_other_rows(
    root: str, grad_norms_spec: GradNormsSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(root, grad_norms_spec)
    done = set(run.manifest.done_shards())
    with monkeypatch.context() as patch:
        of_node(patch, train=True)
        with pytest.raises(
            DataError,
            match=rf"^training sample \d+ is not the one that train-digitstask-\w+ was begun with "
            rf"\({SAMPLES} of 1,500 training samples are compared\): restore the data, or delete "
            r"the folder of train-digitstask-\w+ and submit again$",
        ):
            drive(root, run.id, InlineBackend())
        # Its training may be of an earlier version.
        plan: Any = Run(root, grad_norms_spec.checkpoints[0].train).plan()  # type: ignore[union-attr]
        del plan["samples"]
        Run(root, grad_norms_spec.checkpoints[0].train).write_json(layout.PLAN, plan)  # type: ignore[union-attr]
        with pytest.raises(DataError, match=rf"is not the one that {run.id} was begun with"):
            drive(root, run.id, InlineBackend())
    assert set(run.manifest.done_shards()) == done
    drive(root, run.id, InlineBackend())
    assert is_done(run)


def test_a_run_does_not_go_on_with_other_test_data(
    root: str, grad_norms_spec: GradNormsSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(root, s_test_of(grad_norms_spec, range(100)))
    with monkeypatch.context() as patch:
        of_node(patch, test=True)
        with pytest.raises(
            DataError, match=rf"^test sample 0 is not the one that {run.id} was begun with \("
        ):
            drive(root, run.id, InlineBackend())
    drive(root, run.id, InlineBackend())
    assert is_done(run)


def test_a_run_of_an_earlier_version_goes_on(
    root: str, grad_norms_spec: GradNormsSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(root, grad_norms_spec)
    for one in (run, Run(root, grad_norms_spec.checkpoints[0].train)):  # type: ignore[union-attr]
        plan: Any = one.plan()
        del plan["samples"]
        one.write_json(layout.PLAN, plan)
    of_node(monkeypatch, train=True)
    ShardRunner(root, run.id)
    drive(root, run.id, InlineBackend())
    plan = run.plan()
    assert plan is not None
    assert "samples" not in plan


@pytest.mark.parametrize("what", ["training", "test"])
def test_a_worker_with_other_rows_is_refused_by_name(
    root: str, grad_norms_spec: GradNormsSpec, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    run = Run.create(root, s_test_of(grad_norms_spec, range(100)))
    drive(root, run.id, InlineBackend())
    of_node(monkeypatch, train=what == "training", test=what == "test")
    monkeypatch.setattr(ray, "nodes", lambda: [{}, {}])
    monkeypatch.setattr(shipping, "unpack", lambda: None)
    monkeypatch.setattr("socket.gethostname", lambda: "node2")
    runner = "influence_jobs.kinds.runner:ShardRunner"
    worker = ShardWorker(root, run.id, kind="s-test", device="cpu", threads=1, runner=runner)
    said = worker.begin()[0] or ""
    assert said.startswith(f"on node node2: {what} sample ")
    assert f"is not the one that {run.id} was begun with (64 of 1,500 training samples and " in said
    assert "and 50 of 100 test samples of its queries are compared): every node and" in said
    assert "--node-label chooses nodes)" in said


def test_a_worker_with_the_same_rows_computes_them(
    root: str, grad_norms_spec: GradNormsSpec
) -> None:
    run = begun(root, grad_norms_spec)
    ShardRunner(root, run.id, threads=torch.get_num_threads())


def test_each_run_looks_at_other_rows(root: str, grad_norms_spec: GradNormsSpec) -> None:
    kept = []
    for layers in (("conv1",), ("conv2",)):
        run = Run.create(root, grad_norms_spec.model_copy(update={"layers": layers}))
        drive(root, run.id, InlineBackend())
        plan = run.plan()
        assert plan is not None
        kept.append(set(plan["samples"]["training"]))
        assert plan["samples"]["test"] == {}
    assert [len(rows) for rows in kept] == [SAMPLES, SAMPLES]
    assert len(kept[0] & kept[1]) < SAMPLES / 2


def test_in_one_process_they_are_looked_at_once(
    root: str, grad_norms_spec: GradNormsSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: Counter[str] = Counter()
    for name in ("digests_of", "first_other"):
        original = getattr(same_data, name)

        def counted(
            what: str, digests: Any, fetch: Any, name: str = name, do: Any = original
        ) -> Any:
            looked[f"{name} {what}"] += len(digests)
            return do(what, digests, fetch)

        monkeypatch.setattr(same_data, name, counted)
    run = Run.create(root, s_test_of(grad_norms_spec, range(3)))
    drive(root, run.id, InlineBackend())
    # It keeps its own, and compares those of the training.
    assert looked == {
        "digests_of training": SAMPLES,
        "digests_of test": 3,
        "first_other training": SAMPLES,
        "first_other test": 0,
    }
