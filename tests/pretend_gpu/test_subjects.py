"""Every engine, operator, solver and trainer on the pretended GPU: its numbers, and its waits."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from influence_jobs import gradients
from influence_jobs.gradients.rules import registered
from influence_jobs.specs.solvers import SolverSettings

from .networks import NETWORKS
from .pretend import PretendGpu, PretendTensor
from .subjects import SUBJECTS, Subject

CPU = torch.device("cpu")
LONGEST = ("Lissa, settings, Hessian", "EkFac, no rules", "EkFac, sampled tokens")


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of a tree, on the CPU."""
    return [
        (leaf.held if isinstance(leaf, PretendTensor) else leaf).detach()
        for leaf in pytree.tree_leaves(tree)
        if isinstance(leaf, Tensor)
    ]


def hold(subject: Subject, gpu: PretendGpu) -> list[Tensor]:
    """Require no more waits than are allowed; the results of two units."""
    work = subject.start(gpu.device)
    work(1)
    with gpu.counting() as one:
        work(1)
    with gpu.counting() as two:
        found = tensors(work(2))
    each = len(two) - len(one)
    told = "\n".join([f"{each} a {subject.unit}, {len(one) - each} once", *map(str, two)])
    assert each <= subject.most, told
    assert len(two) <= subject.once + 2 * subject.most, told
    return found


def test_every_engine_solver_and_layer_is_here():
    here = {name.partition(",")[0] for name in SUBJECTS}
    engines = {name for name in gradients.__all__ if name.startswith(("Grad", "Token"))}
    solvers = {settings.solver.partition(":")[2] for settings in SolverSettings.by_name.values()}
    assert engines | solvers <= here
    layers = {type(module).__name__ for module in NETWORKS["every layer"]().modules()}
    assert {rule.type_name() for rule in registered()} <= layers


@pytest.mark.parametrize(
    "subject",
    [
        pytest.param(subject, id=name, marks=pytest.mark.slow if name in LONGEST else ())
        for name, subject in SUBJECTS.items()
    ],
)
def test_the_numbers_are_those_of_the_cpu_and_the_waits_few(subject: Subject, gpu: PretendGpu):
    found = hold(subject, gpu)
    expected = tensors(subject.start(CPU)(2))
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        scale = float(theirs.double().abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * scale)
