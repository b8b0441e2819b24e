"""Every kind of run on the pretended GPU, through the driver in this process: arrays and waits."""

import shutil
from functools import partial

import numpy as np
import pytest

import influence_jobs
from influence_jobs.kinds import kinds

from .runs import (
    JOBS,
    NETWORKS,
    OTHERS,
    TASK,
    arrays,
    hold_batches,
    hold_shards,
    of_digits,
    prepared,
    require_alike,
)


@pytest.mark.parametrize("name", JOBS)
def test_a_run_of_samples(name, trained, tmp_path, here):
    found = hold_batches(name, trained, tmp_path, here)
    kind, options, _ = JOBS[name]
    shutil.copytree(trained, tmp_path / "cpu")
    options = {"runs": tmp_path / "cpu", "batch_size": 24, "quiet": True, **of_digits(options)}
    require_alike(found, influence_jobs.submit(kind, **options))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "paper")) for name in OTHERS],
)
def test_a_run_of_other_runs_or_models(name, trained, tmp_path, here):
    found = hold_shards(name, trained, tmp_path / "gpu", here)
    submit = partial(influence_jobs.submit, quiet=True)
    options = prepared(OTHERS[name], trained, tmp_path / "cpu", submit)
    require_alike(found, submit(OTHERS[name].kind, **options))


def test_every_kind_of_run_is_here():
    there = {kind for kind, _, _ in JOBS.values()} | {other.kind for other in OTHERS.values()}
    assert there == {*kinds()}


def test_a_shard_is_copied_once(trained, tmp_path, here):
    shutil.copytree(trained, tmp_path / "runs")
    options = {"task": TASK, "epochs": 2, "layer": ["all"], "batch_size": 4}
    _, waits = here("grad-norms", runs=tmp_path / "runs", **options)
    assert sum("rows.py" in " ".join(wait.stack) for wait in waits) == 1


def test_norms_that_leave_the_range_of_float32_are_computed_again(trained, tmp_path, here):
    """Squares of these gradients vanish in float32, which a shard shows at its end."""
    options = {"epochs": 2, "layer": ["1"], "batch_size": 8, "reduce": "layer"}
    shutil.copytree(trained, tmp_path / "runs")
    faint, _ = here("grad-norms", task=f"{NETWORKS}:FaintDigits", runs=tmp_path / "runs", **options)
    plain, _ = here("grad-norms", task=TASK, runs=tmp_path / "runs", **options)
    (found,), (expected,) = arrays(faint).values(), arrays(plain).values()
    assert expected.min() > 0
    np.testing.assert_allclose(found, expected * 2.0**-90, rtol=1e-5)
