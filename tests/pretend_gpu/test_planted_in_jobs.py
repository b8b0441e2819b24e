"""As `test_planted`, in steps of kinds of run."""

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from influence_jobs.errors import InflError

from .pretend import DEVICE, DeviceMismatch
from .runs import JOBS, hold_batches, hold_shards
from .test_planted import home_and_back, looked_at, to_cpu

STORED = "kinds.gradients.store:GradientStore"
# By run: the step, as module:class.name or module:name, whose results are changed.
STEPS = {
    "grad-norms": "gradients.rules.base:LayerRule.norms",
    "self-influence": "kinds.self_influence.job:SelfInfluenceJob._values",
    "self-influence, identity": "kinds.self_influence.job:SelfInfluenceJob._values",
    "calibrate": "perceptrons.ensemble:gather",
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
        found = pytree.tree_map_only(Tensor, plant, found)
        return pytree.tree_map_only(np.ndarray, through_device, found)

    monkeypatch.setattr(owner, function, changed)
    hold = hold_batches if name in JOBS else hold_shards
    with pytest.raises((AssertionError, DeviceMismatch, RuntimeError, TypeError, InflError)):
        hold(name, trained, tmp_path / "runs", here)
    assert planted
