"""TF32 is on where a run asks for it, and nowhere else."""

import shutil

import numpy as np
import pytest
import torch

from infl_cluster.driver import drive
from infl_cluster.inline import InlineBackend
from influence_jobs.gradients import GradNorms
from influence_jobs.store.run import Run


def flags():
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.fixture(params=[True, False])
def before(request):
    """What the process itself has chosen."""
    was = flags()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = request.param
    yield request.param
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = was


def test_a_run_in_tf32_allows_it_and_others_do_not(
    grad_norms_spec, trained_root, tmp_path, monkeypatch, before
):
    seen, computed = set(), GradNorms._computed

    def noted(engine, batch):
        seen.add(flags())
        return computed(engine, batch)

    monkeypatch.setattr(GradNorms, "_computed", noted)
    shutil.copytree(trained_root, tmp_path / "runs")
    found = {}
    for precision in ("tf32", "float32"):
        spec = grad_norms_spec.model_copy(update={"precision": precision})
        run = Run.create(str(tmp_path / "runs"), spec)
        drive(run.root, run.id, InlineBackend())
        found[precision] = [run.read_rows(name, 0, 1500) for name in run.array_names()]
        assert seen == {(precision == "tf32",) * 2}
        assert flags() == (before, before)
        seen.clear()
    for ours, theirs in zip(*found.values(), strict=True):
        np.testing.assert_array_equal(ours, theirs)  # a CPU has no TF32
