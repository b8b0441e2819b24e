"""Plans, probes and what arrays say of themselves, against numbers worked out by hand."""

import itertools
from typing import Any

import pytest
from torch import nn

from influence_jobs.jobs import saved_state
from influence_jobs.jobs.base import Plan, Shard
from influence_jobs.jobs.norm_arrays import norm_layouts
from influence_jobs.jobs.retraining import _pieces
from influence_jobs.jobs.saved_state import SavedState
from influence_jobs.kinds import open_job, runner
from influence_jobs.kinds.attribution.spec import AttributionSpec
from influence_jobs.kinds.influence.spec import InfluenceSpec
from influence_jobs.kinds.lds.spec import LdsSpec
from influence_jobs.kinds.s_test.spec import STestSpec
from influence_jobs.kinds.train.spec import TrainedCheckpoint
from influence_jobs.specs.base import AnySpec, make_spec
from influence_jobs.specs.solvers import LissaSettings
from influence_jobs.store.files import LocalFiles
from influence_jobs.store.layout import ArrayLayout
from influence_jobs.store.run import Run

N = 1500
WEIGHTS = 8 * 9 + 4 * 8 + 16 * 8 * 9 + 16 + 10 * 256 + 10  # and of BatchNorm its running figures
COUNTER = 8  # bytes of BatchNorm's num_batches_tracked


@pytest.fixture(scope="module")
def job_of(trained_root):
    def make(spec: AnySpec, batch_size: int | None = None) -> Any:
        run = Run(str(trained_root), spec)
        return open_job(run, device="cpu", batch_size=batch_size)

    return make


def test_a_plan_counts_its_bytes() -> None:
    arrays = (
        ArrayLayout("a", (10, 3), 0, 4, ("sample", "channel")),
        ArrayLayout("b", (10,), 0, 4, ("sample",), dtype="float64"),
    )
    assert Plan(arrays, (), units=0, batch_size=1, file_bytes=7).disk_bytes == 7 + 120 + 80
    assert list(Shard("x", 0, 3).repeats) == [0]
    assert list(Shard("x", 0, 3, part=3, parts=2).repeats) == [3, 4]


def bounds(plan: Plan) -> list[tuple[int, int]]:
    return [(shard.start, shard.stop) for shard in plan.shards]


def test_norms_pass_every_sample_once_a_checkpoint(job_of, grad_norms_spec, checkpoint) -> None:
    first = checkpoint.model_copy(update={"epoch": 1})
    spec = grad_norms_spec.model_copy(
        update={"checkpoints": (first, checkpoint), "combine": "keep"}
    )
    plan = job_of(spec, batch_size=100).plan(300)
    assert (plan.units, plan.batch_size) == (2 * N, 100)
    chunk = plan.arrays[0].chunk_rows
    rows = -(-300 // chunk) * chunk
    assert bounds(plan) == [(start, min(start + rows, N)) for start in range(0, N, rows)]
    assert [array.shape for array in plan.arrays] == [(2, N, 8), (2, N, 16), (2, N, 10)]
    assert plan.disk_bytes == 4 * 2 * N * (8 + 16 + 10)
    said = [array.attributes["of"] for array in plan.arrays]
    assert set(said) == {"each sample's own loss, model in eval mode"}
    several = spec.model_copy(update={"combine": "sum"})
    (said, *_) = [array.attributes["of"] for array in job_of(several).plan().arrays]
    assert said.endswith(", summed over 2 checkpoints")
    (said, *_) = [array.attributes["of"] for array in job_of(grad_norms_spec).plan().arrays]
    assert said.endswith("eval mode")


def test_a_training_passes_every_sample_once_an_epoch(job_of, checkpoint) -> None:
    plan = job_of(checkpoint.train.model_copy(update={"norm_layers": ("head",)})).plan()
    assert (plan.units, plan.batch_size) == (2 * N, 32)
    assert bounds(plan) == [(0, N)]
    assert plan.arrays[0].shape == (N, 10)
    assert plan.arrays[0].attributes["of"].endswith("summed over epochs 2 to 2 of the training")
    assert job_of(checkpoint.train).plan().arrays == ()


def test_an_ablation_trains_each_cell_of_its_grid_and_one_model_more_a_seed(job_of, grid) -> None:
    job = job_of(grid(sizes=(100, 200), seeds=(3, 4), modes=("relabel", "remove")))
    plan = job.plan(20)
    assert len(job.sizes) == 2 * (1 + 2 * 2 * 2 * 3)
    one = 25 * N - 6 * (100 + 200)  # of a seed; one epoch
    assert sum(job.sizes) == plan.units == 2 * one
    assert plan.arrays[0].shape == (50, 3)
    assert bounds(plan) == [(0, 16), (16, 33), (33, 50)]
    assert plan.file_bytes == 50 * (4 * WEIGHTS + COUNTER)
    assert job.title == "ablation digitstask 50 trainings"
    assert bounds(job.plan()) == [(0, 7), (7, 14), (14, 21), (21, 28), (28, 35), (35, 42), (42, 50)]


def test_an_lds_run_trains_each_subset_once_a_seed(job_of, grad_norms_spec, recipe, random) -> None:
    recipe = recipe.model_copy(update={"epochs": 3})
    fields = {"task": grad_norms_spec.task, "recipe": recipe, "rankings": (random,)}
    job = job_of(make_spec(LdsSpec, **fields, subsets=40, seeds=(0, 5), fraction=0.25))
    plan = job.plan()
    assert job.sizes == [375] * 80
    assert plan.units == 80 * 375 * 3
    assert len(plan.shards) == 10
    assert [job.variant(row).seed for row in (0, 1, 2, 3)] == [0, 5 * 2**32, 1, 1 + 5 * 2**32]
    first, again, second = (job.variant(row).changes.removed for row in (0, 1, 2))
    assert len(first) == N - 375
    assert first.tolist() == again.tolist() != second.tolist()


@pytest.mark.parametrize(
    ("count", "largest", "expected"),
    [(1, 4, [(0, 1)]), (8, 4, [(0, 4), (4, 8)]), (9, 4, [(0, 3), (3, 6), (6, 9)])],
)
def test_pieces_are_few_and_of_about_one_size(count, largest, expected) -> None:
    assert list(_pieces(count, largest)) == expected


def test_vectors_count_the_samples_of_their_curvature_once_a_repeat(job_of, s_test_of) -> None:
    plan = job_of(s_test_of()).plan()
    assert plan.units == N
    assert [array.name for array in plan.arrays] == ["s_test"]
    solver = LissaSettings(damping=0.5, scale=30.0, depth=5, repeats=7)
    plan = job_of(s_test_of(solver=solver)).plan()
    assert [(shard.part, shard.parts) for shard in plan.shards] == [(0, 3), (3, 2), (5, 2)]
    assert plan.units == 7 * N
    size = 16 * 8 * 9 + 16 + 10 * 256 + 10
    assert plan.disk_bytes == 4 * 3 * size * (2 + 7)
    quantities = [array.attributes["quantity"] for array in plan.arrays]
    solution = "(curvature + lambda I)^-1 gradient of the query's loss"
    assert quantities[:3] == [
        solution,
        "variance over repeats of each entry of s_test",
        f"{solution}, one repeat",
    ]


def test_probes_do_whole_batches_in_the_units_of_the_plan(
    job_of, grad_norms_spec, checkpoint, queries, s_test_of, random, loss, grid
) -> None:
    attribution = make_spec(
        AttributionSpec,
        task=grad_norms_spec.task,
        norms=grad_norms_spec,
        checkpoint=checkpoint,
        layers=("conv2", "head"),
        queries=queries,
    )
    influence = make_spec(InfluenceSpec, task=grad_norms_spec.task, s_tests=(s_test_of(),))
    for spec in (grad_norms_spec, attribution, influence, random.scores[0]):
        assert list(itertools.islice(job_of(spec, batch_size=700).probe(), 2)) == [700, 700], spec
    few = job_of(grad_norms_spec, batch_size=700).probe()
    assert list(itertools.islice(few, 4)) == [700, 700, 100, 700]
    assert list(itertools.islice(job_of(checkpoint.train).probe(), 2)) == [32, 32]
    job = job_of(grid())
    assert sum(job.probe()) == len(job.sizes) * N


def test_what_influence_is_of_is_said_with_its_arrays(job_of, s_test_of, checkpoint) -> None:
    first = TrainedCheckpoint(train=checkpoint.train, epoch=1)
    solver = LissaSettings(damping=0.5, scale=30.0, depth=5)
    one, other = s_test_of(solver=solver), s_test_of(solver=solver, checkpoint=first)

    def meaning(*s_tests: STestSpec, **fields: Any) -> dict[str, str]:
        return job_of(make_spec(InfluenceSpec, task=one.task, s_tests=s_tests, **fields)).meaning

    plain = "s_test . gradient of the sample's loss: "
    rise = f"{plain}N x the predicted rise of the query's loss when the sample is removed"
    assert meaning(one) == {
        "quantity": rise,
        "sign": "positive = helpful, negative = harmful",
        "unit": "loss",
    }
    two = ", {} over 2 s_test runs"
    assert meaning(one, other)["quantity"] == rise + two.format("summed")
    assert meaning(one, other, combine="mean")["quantity"] == rise + two.format("averaged")
    no_curvature = f"{plain}the dot product of the two gradients, no curvature divided out"
    assert meaning(s_test_of())["quantity"] == no_curvature
    theta, loss = (meaning(one, relative=relative) for relative in ("theta", "loss"))
    assert "effect on the parameters" in theta["quantity"]
    assert "effect on the losses" in loss["quantity"]
    assert theta["unit"] == loss["unit"] == "relative loss"
    assert job_of(one).title == "s-test digitstask lissa"


def test_axes_of_norms_are_named(grad_norms_spec) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, (3, 2)), nn.Flatten(), nn.Linear(6, 5))

    def layouts(reduction: Any, checkpoints: int | None = None) -> tuple[ArrayLayout, ...]:
        return norm_layouts(
            model,
            ("0", "2"),
            num_samples=10,
            reduction=reduction,
            checkpoints=checkpoints,
            source="",
        )

    conv, linear = layouts("kernel", 2)
    assert conv.shape == (2, 10, 4, 3, 2)
    assert conv.dims == ("checkpoint", "sample", "channel", "kernel_y", "kernel_x")
    assert (linear.shape, linear.dims) == ((2, 10, 5, 1, 1), conv.dims)
    assert (conv.row_axis, conv.chunk_rows) == (1, linear.chunk_rows)
    assert [array.dims for array in layouts("layer")] == [("sample",)] * 2
    assert [array.dims for array in layouts("channel")] == [("sample", "channel")] * 2


class Clock:
    """A clock that goes on when it is told to."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_state_is_saved_seldom_enough_for_what_saving_takes(tmp_path, monkeypatch) -> None:
    clock = Clock()
    monkeypatch.setattr(saved_state, "time", clock)
    saved, written = SavedState(LocalFiles(tmp_path), "state.pt"), []

    def state() -> dict[str, float]:
        written.append(clock.now)
        clock.now += 3  # which is .03 of 100 seconds
        return {"at": clock.now}

    for clock.now in (1, 29, 30, 31, 60, 133, 135, 230, 238):
        saved.keep(state)
    assert written == [31, 135]
    assert saved.read() == {"at": written[-1] + 3}
    saved.delete()
    assert saved.read() is None


def test_progress_is_written_once_a_second_and_counts_this_attempt_alone(monkeypatch) -> None:
    clock, written = Clock(), []

    class Written:
        def write_json(self, name: str, value: Any) -> None:
            written.append((name, value["units"], value["resumed"]))

    monkeypatch.setattr(runner, "time", clock)
    progress = runner._Progress(Written(), Shard("s", 0, 9), 1.0)  # type: ignore[arg-type]
    for clock.now, done in ((0.0, 40), (0.5, 45), (1.0, 50), (1.5, 60), (2.5, 70)):
        progress(done)
    assert written == [("progress/s.json", units, 40) for units in (40, 50, 70)]
    assert progress.units == 30
    written.clear()
    afresh = runner._Progress(Written(), Shard("s", 0, 9), 1.0)  # type: ignore[arg-type]
    assert afresh.units == 0
    afresh(0)
    assert written == []
