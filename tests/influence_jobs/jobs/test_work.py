"""What jobs do of what they planned: units, draws, memory, and samples that are not finite."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import digits
import numpy as np
import pytest
import torch

from influence_jobs.errors import DataError, SpecError
from influence_jobs.jobs import retraining
from influence_jobs.kinds import open_job
from influence_jobs.kinds.ablation.job import require_ablation
from influence_jobs.kinds.attribution.spec import AttributionSpec
from influence_jobs.kinds.influence.spec import InfluenceSpec
from influence_jobs.kinds.lds.spec import LdsSpec
from influence_jobs.kinds.s_test.job import curvature_samples
from influence_jobs.specs.base import AnySpec, make_spec
from influence_jobs.specs.solvers import (
    ConjugateGradientSettings,
    Curvature,
)
from influence_jobs.store.layout import SCORES
from influence_jobs.store.run import Run
from influence_jobs.tasks.base import Draw

N = 1500


@pytest.fixture(scope="module")
def specs(grad_norms_spec, checkpoint, queries, s_test_of, recipe, random) -> dict[str, AnySpec]:
    """One of each kind that has shards; influence is of two checkpoints and three draws."""
    task, first = grad_norms_spec.task, checkpoint.model_copy(update={"epoch": 1})
    kept = grad_norms_spec.model_copy(
        update={"checkpoints": (first, checkpoint), "combine": "keep"}
    )
    both = (s_test_of(), s_test_of(checkpoint=first))
    cg = s_test_of(solver=ConjugateGradientSettings(damping=0.5), curvature=Curvature(samples=100))
    return {
        "train": recipe,
        "grad-norms": kept,
        "s-test": cg,
        "influence": make_spec(InfluenceSpec, task=task, s_tests=both, noise_draws=3),
        "attribution": make_spec(
            AttributionSpec,
            task=task,
            norms=kept,
            checkpoint=checkpoint,
            layers=("conv2",),
            queries=queries,
        ),
        "lds": make_spec(LdsSpec, task=task, recipe=recipe, rankings=(random,), subsets=3),
    }


@pytest.mark.parametrize(
    "kind", ["train", "grad-norms", "s-test", "influence", "attribution", "lds"]
)
def test_progress_never_falls_and_ends_at_the_planned_units(carry_out, specs, kind: str) -> None:
    run = carry_out(specs[kind])
    job = open_job(Run(run.root, run.spec), device="cpu", batch_size=500)
    plan = job.plan()
    ended = 0
    for shard in plan.shards:
        told: list[int] = []
        job.run(shard, told.append)
        assert told == sorted(told)
        ended += told[-1]
    assert ended == plan.units
    # Models that are there already count as done.
    assert (told[0] == plan.units) == (kind == "lds")


def test_norms_of_several_checkpoints_count_together(carry_out, specs) -> None:
    scores = carry_out(specs["attribution"])
    norms = carry_out(specs["grad-norms"]).read_rows("norms/conv2", 0, N)
    assert norms.shape == (2, N, 16)
    one = specs["attribution"].model_copy(update={"norms": specs["grad-norms"]})
    job: Any = open_job(Run(scores.root, one), device="cpu")
    found = job._activations["conv2"] @ norms.sum(axis=0, dtype=np.float64).T
    np.testing.assert_allclose(scores.read_rows(SCORES, 0, N), found, rtol=1e-5)


def test_every_draw_of_every_checkpoint_counts_once(carry_out, specs, monkeypatch) -> None:
    """Of a task without noise all draws are alike."""
    spec = specs["influence"].model_copy(update={"seed": 5})
    one = spec.model_copy(update={"noise_draws": 1})
    alike, alone = (carry_out(each).read_rows(SCORES, 0, N) for each in (spec, one))
    np.testing.assert_allclose(alike, alone, rtol=1e-4, atol=1e-5)
    mean = carry_out(spec.model_copy(update={"combine": "mean"})).read_rows(SCORES, 0, N)
    np.testing.assert_allclose(mean, alone / 2, rtol=1e-4, atol=1e-5)
    asked: Counter[Draw] = Counter()
    plain = digits.DigitsTask.batch

    def noted(self, ids, draw):
        asked[draw] += len(ids)
        return plain(self, ids, draw)

    monkeypatch.setattr(digits.DigitsTask, "batch", noted)
    job: Any = open_job(Run(carry_out(one).root, spec), device="cpu", batch_size=500)
    for term in range(job.terms):
        ids = torch.arange(N)
        job.score(term, ids, job.fetch(term, ids), job.checks(None))
    checks = 2 * 8  # eight samples a checkpoint, before its first batch
    drawn = {draw: count for draw, count in asked.items() if draw.seed == 5}
    assert drawn == {Draw(5, 0): 2 * N + checks, Draw(5, 1): 2 * N, Draw(5, 2): 2 * N}


def test_a_sample_without_a_finite_gradient_is_named(specs, carry_out, monkeypatch) -> None:
    plain = digits.DigitsTask.batch

    def broken(self, ids, draw):
        images, labels = plain(self, ids, draw)
        images = images.clone()
        images[(ids == 1300) | (ids == 1337)] = torch.nan
        return images, labels

    done = carry_out(specs["influence"])
    monkeypatch.setattr(digits.DigitsTask, "batch", broken)
    job = open_job(Run(done.root, done.spec), device="cpu")
    label = int(digits.DigitsTask().describe(np.array([1300]))["label"][0])
    told = rf"the gradient is not finite for sample 1300 \(label {label}\) and 1 more: check"
    with pytest.raises(DataError, match=told):
        job.run(job.plan().shards[-1], lambda _: None)


def test_a_curvature_is_of_all_samples_or_of_some_at_random(digits_task) -> None:
    everything = list(range(N))
    for samples in (None, N, N + 1):
        assert curvature_samples(digits_task, Curvature(samples=samples)).tolist() == everything
    some = [curvature_samples(digits_task, Curvature(samples=99, seed=seed)) for seed in (0, 1)]
    for ids in some:
        assert ids.tolist() == sorted(set(ids.tolist()))
        assert len(ids) == 99
        assert 0 <= ids.min() <= ids.max() < N
    assert some[0].tolist() != some[1].tolist()


def _task_with(output_loss: str | None) -> Any:
    return SimpleNamespace(train_data=lambda: range(N), output_loss=output_loss)


@pytest.mark.parametrize(
    ("sizes", "modes", "output_loss", "told"),
    [
        ((1501,), ("relabel",), "cross-entropy", "--k 1501: there are 1,500 training samples"),
        ((5, 1500), ("remove",), "cross-entropy", "removal must leave some"),
        ((5,), ("relabel", "remove"), "mse", "its loss is mse, not cross-entropy"),
        ((5,), ("relabel",), None, "its loss is its own, not cross-entropy"),
    ],
)
def test_grids_that_cannot_be_are_refused(grid, sizes, modes, output_loss, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        require_ablation(grid(sizes=sizes, modes=modes), _task_with(output_loss))


def test_grids_that_can_just_be_are_not(grid) -> None:
    require_ablation(grid(sizes=(5, 1500), modes=("relabel",)), _task_with("cross-entropy"))
    require_ablation(grid(sizes=(5, 1499), modes=("remove",)), _task_with(None))


def test_ensembles_are_as_wide_as_memory_allows(specs, carry_out, monkeypatch) -> None:
    job: Any = open_job(Run(carry_out(specs["lds"]).root, specs["lds"]), device="cpu")
    monkeypatch.setattr(retraining, "bytes_per_variant", lambda *_, **__: 1000)
    for free, width in ((0, 1), (5999, 2), (6000, 3), (10**9, 32)):
        monkeypatch.setattr(job, "_free_bytes", lambda free=free: free)
        assert job._fastest_width() == width


def test_workers_share_the_memory_of_a_machine(specs, carry_out, monkeypatch) -> None:
    job: Any = open_job(Run(carry_out(specs["lds"]).root, specs["lds"]), device="cpu")
    process = SimpleNamespace(cpu_affinity=lambda: list(range(8)))
    memory = SimpleNamespace(available=7000)
    fake = SimpleNamespace(Process=lambda: process, virtual_memory=lambda: memory)
    monkeypatch.setattr(retraining, "psutil", fake)
    for threads, share in ((1, 875), (3, 3500), (16, 7000)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert job._free_bytes() == share
