"""`--precision tf32` in every kind of run, on a pretended GPU that rounds as TF32 does."""

import shutil
from typing import Any

import numpy as np
import pytest
import torch

import influence_jobs
from influence_jobs.errors import SpecError
from influence_jobs.kinds.runner import ShardRunner

from .runs import QUERIES, TASK, arrays

CG = {"solver": "cg", "damping": 0.1}
EK_FAC = {"solver": "ek-fac", "damping": 0.1}
# By run: its options, and the runs besides it that compute in TF32.
RUNS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "grad-norms": ({"layer": ["all"]}, set()),
    "gradients": ({"dim": "3x4"}, set()),
    "s-test": ({**QUERIES, **CG}, set()),
    "influence": ({**QUERIES, **CG}, {"s-test"}),
    "influence, EK-FAC": ({**QUERIES, **EK_FAC}, {"s-test"}),
    "influence, LiSSA": ({**QUERIES, "solver": "lissa", "damping": 0.1}, {"s-test"}),
    "influence, relative": ({**QUERIES, **EK_FAC, "relative": "theta"}, {"s-test"}),
    "self-influence": ({}, set()),
    "baseline, norm": ({**QUERIES, "method": "norm"}, set()),
    "train": ({"norms_layer": ["1"]}, set()),
}
LONGEST = ("influence, LiSSA", "influence, relative")


def flags() -> tuple[bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.fixture
def seen(monkeypatch):
    """By kind of run, how TF32 was set while its shards were computed."""
    found: dict[str, set[tuple[bool, bool]]] = {}
    do = ShardRunner._do

    def noted(runner, *args):
        found.setdefault(runner.kind, set()).add(flags())
        return do(runner, *args)

    monkeypatch.setattr(ShardRunner, "_do", noted)
    return found


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in LONGEST else ()) for name in RUNS],
)
def test_numbers_are_near_and_others_and_the_setting_is_restored(
    name, trained, tmp_path, here, seen
):
    kind, before = name.partition(",")[0], flags()
    options, also = RUNS[name]
    found = {}
    for precision in ("float32", "tf32"):
        shutil.copytree(trained, root := tmp_path / precision)
        options = {**options, "task": TASK, "epochs": 2, "precision": precision}
        seen.clear()
        found[precision], _ = here(kind, runs=root, **options)
        on = {k for k, of in seen.items() if of == {(True, True)}}
        assert on == (also | {kind} if precision == "tf32" else set())
        assert flags() == before
    assert found["tf32"].run.id != found["float32"].run.id
    if kind == "train":  # of another seed of rounding, trainings part
        return
    ours, exact = arrays(found["tf32"]), arrays(found["float32"])
    assert ours.keys() == exact.keys()
    whole = [n for n in exact if exact[n].dtype.kind == "f" and np.isfinite(exact[n]).all()]
    assert any((ours[array] != exact[array]).any() for array in whole)
    for array in whole:  # medians: where a ReLU turns, a sample's gradient jumps
        there = exact[array] != 0
        apart = np.abs(ours[array] - exact[array])[there]
        assert np.median(apart) < 0.02 * np.median(np.abs(exact[array])[there])


def test_retrainings_are_rounded_as_the_training_was(trained, tmp_path, here, seen):
    shutil.copytree(trained, root := tmp_path / "runs")
    options = {"task": TASK, "runs": root}
    train, _ = here("train", epochs=2, precision="tf32", **options)
    more = {**QUERIES, "by": ["random"], "subsets": 3, "seeds": 1}
    here("lds", checkpoint=[train.run.id], **more, **options)
    assert seen == {"train": {(True, True)}, "baseline": {(False, False)}, "lds": {(True, True)}}


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("s-test", {"precision": "bfloat16"}, "precision=bfloat16 is not for this"),
        ("self-influence", {"precision": "bfloat16-weights"}, "precision=bfloat16-weights is"),
        ("baseline", {"method": "norm", "precision": "bfloat16"}, "precision=bfloat16 is not"),
        ("unrolled", {"precision": "tf32"}, "precision=tf32: unrolled computes exact derivatives"),
        (
            "train",
            {"precision": "bfloat16"},
            "a training computes in the number format that the model is built in",
        ),
        (
            "influence",
            {"precision": "tf32", "operator": "hessian", "product": "finite-difference"},
            "a finite difference is smaller than TF32's rounding",
        ),
    ],
)
def test_what_a_precision_would_harm_is_refused(kind, options, said, trained):
    queries = {} if kind in ("self-influence", "train") else QUERIES
    with pytest.raises(SpecError, match=said):
        influence_jobs.submit(kind, task=TASK, runs=trained, quiet=True, **queries, **options)


def test_a_training_in_tf32_is_not_gone_back_through(trained):
    with pytest.raises(SpecError, match="was trained in TF32"):
        influence_jobs.submit(
            "unrolled", task=TASK, runs=trained, checkpoint=[_trained(trained)], quiet=True,
            **QUERIES,
        )  # fmt: skip


def _trained(root):
    found = influence_jobs.submit(
        "train", task=TASK, runs=root, epochs=1, precision="tf32", quiet=True
    )
    return found.run.id
