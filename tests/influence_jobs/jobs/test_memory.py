"""Memory: blocks of queries, and peaks that do not grow with the number of samples."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from influence_jobs.jobs import samples
from influence_jobs.kinds import open_job
from influence_jobs.kinds.influence import job as influence_job
from influence_jobs.kinds.influence.spec import InfluenceSpec
from influence_jobs.specs.base import make_spec
from influence_jobs.specs.solvers import EkFacSettings
from influence_jobs.store.run import Run

SCRIPT = Path(__file__).parent / "many_samples.py"
SLACK = 1.1


@pytest.mark.parametrize("relative", [None, pytest.param("theta", marks=pytest.mark.slow)])
def test_vectors_that_do_not_fit_are_multiplied_block_by_block(
    relative: str | None,
    carry_out,
    fresh_root,
    grad_norms_spec,
    s_test_of,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    solver = EkFacSettings(damping=0.1, targets="sampled")
    spec = make_spec(
        InfluenceSpec,
        task=grad_norms_spec.task,
        s_tests=(s_test_of(solver=solver),),
        noise_draws=2,
        relative=relative,
        keep_modules=True,
    )
    expected = carry_out(spec)
    job: Any = open_job(expected)
    assert len(job._blocks) == 1
    monkeypatch.setattr(influence_job, "MAX_VECTOR_BYTES", 2 * job._vector_bytes + 1)
    root = fresh_root()
    found = carry_out(spec, root=root)
    blocks = open_job(Run(found.root, spec))
    assert blocks._blocks == [slice(0, 2), slice(2, 3)]  # type: ignore[attr-defined]
    assert blocks.plan().units == 2 * job.plan().units
    assert blocks.held_bytes(blocks.plan()) < job.held_bytes(job.plan())
    for name in expected.array_names():
        values, wanted = found.array(name)[...], np.asarray(expected.array(name)[...])
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-6 * scale, err_msg=name)


def test_shards_of_many_wide_rows_are_many(
    carry_out, grad_norms_spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard has at most so many bytes, or one chunk; but for what the user asks for."""
    monkeypatch.setattr(samples, "MAX_SHARDS", 1)
    job = open_job(Run("runs", grad_norms_spec))
    assert [shard.stop for shard in job.plan().shards] == [1536 - 36]
    row = samples.row_bytes(job.plan().arrays)
    assert row == 4 * (8 + 16 + 10)
    monkeypatch.setattr(samples, "MAX_SHARD_BYTES", 600 * row)
    assert [shard.stop for shard in job.plan().shards] == [768, 1500]
    assert job.held_bytes(job.plan()) == 768 * 3 * row  # float64, and float32
    monkeypatch.setattr(samples, "MAX_SHARD_BYTES", 1)
    assert [shard.stop for shard in job.plan().shards][:2] == [256, 512]
    assert len(job.plan(1500).shards) == 1


PEAK = """
import torch
from influence_jobs.memory import Peak, free_bytes
before, cpu = torch.zeros(2**22), torch.device("cpu")
peak = Peak(cpu)
taken = torch.ones(2**24)
del taken
print(peak.bytes, peak.most, free_bytes(cpu))
"""


def test_a_peak_is_of_what_was_taken_meanwhile() -> None:
    """In a process of its own: pytest's gives memory back meanwhile."""
    done = subprocess.run([sys.executable, "-c", PEAK], check=True, capture_output=True, text=True)
    taken, most, free = map(int, done.stdout.split())
    assert 0.9 * 2**26 < taken < 1.5 * 2**26
    assert most > taken
    assert free > 2**26


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "few"),
    [("grad-norms", 300), ("gradients", 300), ("influence", 200), ("s-test", 100), ("ek-fac", 100)],
)
def test_ten_times_the_samples_take_no_more_memory(kind: str, few: int, tmp_path: Path) -> None:
    def told(count: int, *more: str) -> dict[str, int]:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), kind, str(count), str(tmp_path / str(count)), *more],
            check=True,
            capture_output=True,
            text=True,
            cwd=SCRIPT.parent,
        )
        found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
        return found

    for count in (few, 10 * few):
        told(count, "prepared")  # its own memory does not count
    one, ten = told(few), told(10 * few)
    assert ten["peak"] < SLACK * one["peak"]
    assert ten["most"] < 1.15 * told(10 * few, "stated")["stated"]
