"""A CPU tensor, a copy to the CPU and a look at a number, planted in a step of each, are found."""

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
from torch import Tensor
from torch.utils import _pytree as pytree

from influence_jobs.curvature import Solution
from influence_jobs.errors import InflError
from influence_jobs.gradients.rules import registered

from .pretend import DeviceMismatch, PretendGpu
from .subjects import SUBJECTS
from .test_subjects import hold

# By subject: the step, as module:name or module:class.name, whose results are changed.
STEPS = {
    "GradNorms, kernel": "gradients.rules.base:LayerRule.norms",
    "GradNorms, channel": "gradients.engine:_in_safe_range",
    "GradNorms, no rules": "gradients.weights:Weight.norms",
    "GradDots": "gradients.rules.base:LayerRule.dots",
    "GradDots, forward mode": "gradients.dots:directional_derivatives",
    "GradProjections": "gradients.rules.base:LayerRule.projected",
    "GradProjections, no rules": "gradients.projections:Projection.__call__",
    "GradQuadratics": "gradients.rules.base:LayerRule.squared_norms",
    "TokenNorms": "gradients.tokens:_together",
    "TokenDots": "gradients.tokens:TokenDots._products",
    "Gauss-Newton": "curvature.matrices:GaussNewton._multiply",
    "Gauss-Newton, batches": "curvature.matrices:GaussNewton._multiply",
    "Hessian": "curvature.matrices:Hessian._multiply",
    "Hessian, differences": "curvature.matrices:difference",
    "ConjugateGradient": "curvature.cg:_dot",
    "Lissa, settings": "curvature.operators:Operator.unchecked",
    "Lissa": "curvature.lissa_steps:AnySteps.lengths",
    "Lissa, perceptron": "perceptrons.lissa:PerceptronLissaSteps.lengths",
    "EkFac": "curvature.ek_fac_columns:exact_roots",
    "EkFac, sampled": "curvature.ek_fac_columns:random_root",
    "EkFac, squared error": "curvature.ek_fac_blocks:MatrixBlock.diagonals",
    "EkFac, loss of its own": "curvature.output_roots:_pivoted",
    "EkFac, tokens": "curvature.output_roots:_beside_the_roots",
    "EkFac, sampled tokens": "curvature.ek_fac_columns:token_signs",
    "Halves, ConjugateGradient": "curvature.cg:_dot",
    "Identity": "curvature.identity:Identity._solve",
    "Source, EK-FAC": "curvature.source:Segment.met",
    "Source, Chebyshev": "curvature.operators:Operator.unchecked",
    "Trainer, SGD": "training.train:changed_losses",
    "Trainer, optimizer of its own": "training.train:changed_losses",
    "Recorder": "training.recorded_norms:RecordedNorms.measure_one",
    "Trainer, norms": "training.recorded_norms:RecordedNorms.measure_one",
    "Ensemble": "training.ensemble_stacked:StackedSteps._forward",
    "Ensemble, perceptron": "perceptrons.ensemble:gather",
    "Unrolled, SGD": "training.adjoint:OfSGD.back",
    "Unrolled, Adam": "training.adjoint:OfAdam.back",
}


def to_cpu(found: Tensor) -> Tensor:
    return found.cpu()


def looked_at(found: Tensor) -> Tensor:
    float(found.detach().double().sum())
    return found


def home_and_back(found: Tensor) -> Tensor:
    return found.cpu().to(found.device)


@pytest.mark.parametrize(
    "plant",
    [
        to_cpu,
        pytest.param(looked_at, marks=pytest.mark.slow),
        pytest.param(home_and_back, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("name", "step"), STEPS.items(), ids=STEPS)
def test_what_is_planted_is_found(name, step, plant, gpu: PretendGpu, monkeypatch):
    module, _, path = step.partition(":")
    owner: Any = import_module(f"influence_jobs.{module}")
    *classes, function = path.split(".")
    for one in classes:
        owner = getattr(owner, one)
    plain, planted = getattr(owner, function), 0

    def changed(*args: Any, **kwargs: Any) -> Any:
        nonlocal planted
        planted += 1
        found = plain(*args, **kwargs)
        if isinstance(found, Iterator):
            found = [*found]
        if isinstance(found, Solution):
            return replace(found, x_QP=plant(found.x_QP))
        return pytree.tree_map_only(Tensor, plant, found)

    monkeypatch.setattr(owner, function, changed)
    with pytest.raises((AssertionError, DeviceMismatch, RuntimeError, TypeError, InflError)):
        hold(SUBJECTS[name], gpu)
    assert planted


@pytest.mark.parametrize("rule", registered(), ids=lambda rule: rule.type_name())
def test_what_is_planted_in_a_rule_is_found(rule, gpu: PretendGpu, monkeypatch):
    plain = rule.norms
    monkeypatch.setattr(rule, "norms", lambda *given: plain(*given).cpu())
    with pytest.raises((AssertionError, DeviceMismatch)):
        hold(SUBJECTS["GradNorms, every layer"], gpu)


def test_every_kind_of_subject_has_a_plant():
    assert {name.partition(",")[0] for name in STEPS} >= {
        name.partition(",")[0] for name in SUBJECTS
    } - {"Spectrum of a Hessian"}
