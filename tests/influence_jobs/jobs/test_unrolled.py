"""Unrolled runs of the example task: what is stored, how they resume, and what they refuse."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infl_cluster.driver import drive
from infl_cluster.inline import InlineBackend
from influence_jobs.errors import RuntimeFault, SpecError
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.jobs import saved_state
from influence_jobs.jobs.queries import query_gradients
from influence_jobs.jobs.recipe import recipe_of
from influence_jobs.kinds import open_job, view_of
from influence_jobs.kinds.train.spec import FileCheckpoint, TrainedCheckpoint, TrainSpec
from influence_jobs.kinds.unrolled import job as unrolled_job
from influence_jobs.kinds.unrolled.spec import UnrolledSpec
from influence_jobs.specs.base import make_spec
from influence_jobs.store.documents import Entry
from influence_jobs.store.layout import BY_QUERY, SCORES
from influence_jobs.store.run import Run
from influence_jobs.store.verify import find_damage
from influence_jobs.tasks.base import Task
from influence_jobs.training import train
from influence_jobs.training.statistics import with_statistics
from influence_jobs.training.trajectory import Trajectory
from influence_jobs.training.unrolled import Unrolled

N = 1500


@pytest.fixture(scope="module")
def training(grad_norms_spec) -> TrainSpec:
    return make_spec(
        TrainSpec, task=grad_norms_spec.task, epochs=2, batch_size=128, lr=0.05, save_epochs=(1,)
    )


@pytest.fixture(scope="module")
def spec(grad_norms_spec, queries, training) -> UnrolledSpec:
    return make_spec(
        UnrolledSpec,
        task=grad_norms_spec.task,
        checkpoint=TrainedCheckpoint(train=training, epoch=2),
        queries=queries,
    )


@pytest.fixture(scope="module")
def done(carry_out, spec) -> Run:
    run: Run = carry_out(spec)
    return run


def names_in(run: Run, folder: str) -> list[str]:
    return [path.name for path in (Path(run.root) / run.id / folder).iterdir()]


def test_the_scores_are_those_of_the_library(
    done: Run, spec: UnrolledSpec, digits_task: Task
) -> None:
    class Kept(dict[int, Any]):
        def steps(self):
            return [*self]

        def read(self, step):
            return self.get(step)

        def write(self, step, state):
            self[step] = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, state)

    steps = Trajectory(
        digits_task,
        recipe_of(spec.checkpoint.train),
        seed=0,
        epochs=2,
        device=torch.device("cpu"),
        snapshots=Kept(),
    )
    model = with_statistics(steps.train(lambda done: None))
    space = ParameterSpace(model)
    asked = query_gradients(digits_task, model, space, spec.queries, 0, 3)
    found = Unrolled(steps, torch.float32).scores(space.split(asked), lambda done: None)
    stored = done.read_rows(SCORES, 0, N)
    np.testing.assert_allclose(stored, found.numpy(), rtol=1e-3, atol=1e-4 * np.abs(stored).max())
    assert (stored == done.read_rows(BY_QUERY, 0, 3)).all()
    assert done.array(SCORES).attrs["sign"] == "positive = helpful, negative = harmful"


def test_what_only_the_work_needs_is_gone_and_the_rest_is_good(done: Run) -> None:
    assert names_in(done, "checkpoints") == []
    assert find_damage(done).damaged == {}
    assert done.read_table("queries").column("test").to_pylist() == [5, 0, 111]


def test_its_view_ranks_like_that_of_influence(done: Run) -> None:
    view = view_of(done)
    rows = view.top(2)[SCORES]
    scores = done.read_rows(SCORES, 0, N)
    assert [row["sample"] for row in rows if row["side"] == "helpful"][:2] == [
        *np.argsort(-scores[0], kind="stable")[:2]
    ]
    assert {row["side"] for row in rows} == {"helpful", "harmful"}
    with pytest.raises(SpecError, match="keeps no scores of layer head: leave --layer out"):
        view.top(2, layer="head")
    assert "training of seed 0 as it was" in view.certainty()[0]


class Killed(BaseException):
    """No `Exception`: a worker does not survive it."""


def test_killed_within_a_shard_it_resumes_to_the_same_bytes(
    done: Run, spec: UnrolledSpec, fresh_root, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_state, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(saved_state, "SAVE_SHARE", 1e9)
    back, taken = Unrolled._back, 0

    def counted(self: Any, *arguments: Any) -> Any:
        nonlocal taken
        if taken == 17:
            raise Killed
        taken += 1
        return back(self, *arguments)

    run = Run.create(str(fresh_root()), spec)
    with monkeypatch.context() as patch:
        patch.setattr(Unrolled, "_back", counted)
        with pytest.raises(Killed):
            drive(run.root, run.id, InlineBackend())
    assert {"state-000000-000003.pt", "step-000000024.pt"} <= {*names_in(run, "checkpoints")}
    monkeypatch.setattr(Unrolled, "_back", counted)
    taken = 10
    drive(run.root, run.id, InlineBackend())
    assert taken == 17  # 7 steps were left of 24
    assert (run.read_rows(SCORES, 0, N) == done.read_rows(SCORES, 0, N)).all()


def test_each_block_of_queries_is_a_shard(
    done: Run, spec: UnrolledSpec, fresh_root, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unrolled_job, "MAX_QUERIES", 2)
    run = Run.create(str(fresh_root()), spec)
    drive(run.root, run.id, InlineBackend())
    assert [*run.manifest.done()] == ["000000-000002", "000002-000003", "finish"]
    scores = done.read_rows(SCORES, 0, N)
    np.testing.assert_allclose(
        run.read_rows(SCORES, 0, N), scores, rtol=1e-3, atol=1e-4 * np.abs(scores).max()
    )


def test_a_training_that_ends_in_other_weights_is_refused(
    spec: UnrolledSpec, done: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = spec.model_copy(update={"checkpoint": spec.checkpoint.model_copy(update={"epoch": 1})})
    run = Run.create(done.root, other)
    order = train.epoch_order
    monkeypatch.setattr(train, "epoch_order", lambda n, seed, epoch: order(n, seed + 1, epoch))
    with pytest.raises(RuntimeFault, match=r"end in other weights.* delete the folder of train-"):
        drive(run.root, run.id, InlineBackend())


def test_the_steps_are_repeated_with_the_threads_of_the_training(done: Run) -> None:
    job: Any = open_job(done)
    (entry,) = [e for e in job._entries() if e.shard == "all"]
    assert entry.threads == torch.get_num_threads()
    manifest = Run(done.root, job.spec.checkpoint.train).manifest
    manifest.write(Entry(**{**entry.__dict__, "threads": 3}))
    try:
        with job._as_trained():
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == entry.threads
    finally:
        manifest.write(entry)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer": "task"}, r"trains itself, by train\(\).* give it an optimizer\(\)"),
        (
            {
                "trainer": "recorded",
                "recorded": FileCheckpoint(path="/r", sha256="ab"),
                "save_epochs": (2,),
            },
            "was recorded elsewhere",
        ),
    ],
)
def test_trainings_whose_steps_are_not_known_are_refused(
    spec: UnrolledSpec, changes: Any, message: str
) -> None:
    given = {name: getattr(spec.checkpoint.train, name) for name in ("task", "epochs")}
    other = make_spec(TrainSpec, **(given | changes))
    with pytest.raises(SpecError, match=message):
        make_spec(
            UnrolledSpec,
            task=spec.task,
            checkpoint=TrainedCheckpoint(train=other, epoch=other.epochs),
            queries=spec.queries,
        )


def test_a_dry_run_says_steps_memory_and_disk(done: Run) -> None:
    job = open_job(done)
    plan = job.plan()
    assert plan.units == 3 * N * 2
    assert next(iter(job.probe())) == 3 * 128
    (said,) = job.notes()
    assert "24 steps, gone back through by 3 queries at a time" in said
    assert "of memory for 5 steps" in said
    assert "on disk for 6 states" in said
