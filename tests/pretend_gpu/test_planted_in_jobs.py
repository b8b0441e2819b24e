"""As `test_planted`, in steps of kinds of run."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from influence_jobs.errors import InflError
from influence_jobs.kinds import kinds

from .pretend import DEVICE, DeviceMismatch
from .runs import JOBS, OTHERS, hold_batches, hold_shards
from .test_planted import home_and_back, looked_at, to_cpu

STORED = "kinds.gradients.store:GradientStore"
# By run: the step, as module:class.name or module:name, whose results are changed.
STEPS = {
    "grad-norms": "gradients.rules.base:LayerRule.norms",
    "grad-norms, tokens": "tasks.sequences:TokenLosses.unwatched",
    "s-test": "curvature.matrices:GaussNewton._multiply",
    "s-test, EK-FAC": "curvature.ek_fac_columns:exact_roots",
    "influence": "gradients.dots:GradDots.total",
    "influence, relative": "kinds.influence.job:relative_scores",
    "influence, tokens": "gradients.tokens:TokenDots._products",
    "attribution": "kinds.attribution.job:attribution_scores",
    "loss": "kinds.baseline.job:own_scores",
    "norm": "gradients.engine:GradNorms.unwatched",
    "nearest": "kinds.baseline.job:nearest_scores",
    "random": "kinds.baseline.job:random_scores",
    "gradients": "gradients.rules.base:LayerRule.projected",
    "self-influence": "kinds.self_influence.job:SelfInfluenceJob._values",
    "self-influence, identity": "kinds.self_influence.job:SelfInfluenceJob._values",
    "train": "training.train:changed_losses",
    "unrolled": "training.unrolled:back_through_clipping",
    "ablation": "perceptrons.ensemble:gather",
    "lds": "perceptrons.ensemble:_Hidden.backward",
    "calibrate": "perceptrons.ensemble:gather",
    "query-gradients": "gradients.projections:Projection.__call__",
    "gradient-scores": f"{STORED}.dots",
    "gram": f"{STORED}.rows",
    "gradient-index": f"{STORED}.rows",
    "scores": "kinds.scores.job:read_scores",
    "paper": "perceptrons.ensemble:gather",
}


@pytest.mark.parametrize(
    "plant",
    [
        to_cpu,
        pytest.param(looked_at, marks=pytest.mark.slow),
        pytest.param(home_and_back, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("name", "step"),
    [
        pytest.param(name, step, id=name, marks=[pytest.mark.slow] * (name == "paper"))
        for name, step in STEPS.items()
    ],
)
def test_what_is_planted_is_found(name, step, plant, here, trained, tmp_path, monkeypatch):
    module, _, path = step.partition(":")
    owner: Any = import_module(f"influence_jobs.{module}")
    *classes, function = path.split(".")
    for one in classes:
        owner = getattr(owner, one)
    plain, planted = getattr(owner, function), 0

    def through_device(found: np.ndarray) -> np.ndarray:
        there: Tensor = plant(torch.from_numpy(found.copy()).to(DEVICE))
        return there.cpu().numpy()

    def changed(*args: Any, **kwargs: Any) -> Any:
        nonlocal planted
        planted += 1
        found = plain(*args, **kwargs)
        found = [*found] if isinstance(found, Iterator) else found
        found = pytree.tree_map_only(Tensor, plant, found)
        return pytree.tree_map_only(np.ndarray, through_device, found)

    monkeypatch.setattr(owner, function, changed)
    hold = hold_batches if name in JOBS else hold_shards
    with pytest.raises((AssertionError, DeviceMismatch, RuntimeError, TypeError, InflError)):
        hold(name, trained, tmp_path / "runs", here)
    assert planted


def test_every_kind_of_run_has_a_plant():
    planted = {JOBS[name][0] if name in JOBS else OTHERS[name].kind for name in STEPS}
    assert planted == {*kinds()} - {"stability"}  # its shard has nothing to do
