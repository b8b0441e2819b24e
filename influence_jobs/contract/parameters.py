"""Checks of the parameters that count, and of the layers that have them."""

import statistics
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from influence_jobs.contract.trial import Said, Trial, fail, ok, warn
from influence_jobs.errors import InflError
from influence_jobs.gradients import GradDots, GradNorms
from influence_jobs.gradients.fallback import Form
from influence_jobs.gradients.functional import functional_call
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.gradients.reference import LossModule
from influence_jobs.gradients.transforms import differentiable_kernels
from influence_jobs.gradients.weights import weight_named, weights_of
from influence_jobs.models.checkpoints import tied_names
from influence_jobs.specs.base import listed
from influence_jobs.tasks.layers import weight_layers
from influence_jobs.tasks.output_loss import RELATIVE_ERROR
from influence_jobs.training.train import seeded

_REPEATS = 3  # of which the median time counts


def parameters(trial: Trial) -> Said:
    """Which parameters count: those that are trained, each once, with a gradient."""
    trained = trial.trained
    total = sum(p.numel() for p in trained.values())
    yield ok(f"{total:,} numbers in {len(trained)} parameters are trained")
    named = dict(trial.model.named_parameters())
    if frozen := [name for name in named if name not in trained]:
        count = sum(named[name].numel() for name in frozen)
        yield warn(f"{count:,} numbers are frozen and get no gradient: {listed(frozen)}")
    for names in tied_names(trial.model):
        yield warn(f"one parameter has several names, as tied weights do: {' = '.join(names)}")
    gradients = torch.autograd.grad(
        trial.losses_B.sum(), list(trained.values()), allow_unused=True, retain_graph=True
    )
    found = dict(zip(trained, gradients, strict=True))
    if unused := [name for name, gradient in found.items() if gradient is None]:
        yield warn(f"the losses of the samples that were tried do not depend on {listed(unused)}")
    used = [gradient for gradient in gradients if gradient is not None]
    if not any(gradient.any() for gradient in used):
        yield fail("the gradient of the losses is zero everywhere: every score would be zero")


@torch.no_grad()
def reached(trial: Trial) -> Said:
    """The losses follow the parameters where torch.func puts other values in their place."""
    named = dict(trial.model.named_parameters())
    before = {name: p.clone() for name, p in named.items()}
    with seeded(0, trial.device):
        moved = {name: p + 0.1 * torch.randn_like(p) for name, p in before.items()}
    loss_module = LossModule(trial.model, trial.task.losses)
    called_B = functional_call(
        loss_module, {f"model.{name}": p for name, p in moved.items()}, (trial.batch,)
    )
    try:
        for name, p in named.items():
            p.copy_(moved[name])
        set_B = trial.task.losses(trial.model, trial.batch)
    finally:
        for name, p in named.items():
            p.copy_(before[name])
    if (called_B - set_B).abs().max() > RELATIVE_ERROR * set_B.abs().max():
        yield warn(
            "the model uses weights past its modules, from a plain list, a closure or a stored "
            "reference, where torch.func.functional_call does not reach them: influence is "
            "computed by plain autograd, one vector or sample at a time, and experiments train "
            "one model at a time; to be faster, use each weight in forward() as an attribute of "
            "its module"
        )
    else:
        yield ok("other weights reach the losses through torch.func")


def layers(trial: Trial) -> Said:
    """Which layers have a rule, which take a slow path and how slow, which are named only."""
    model, trained = trial.model, set(trial.trained)
    owners = dict.fromkeys(name.rpartition(".")[0] for name in trial.trained)
    weights: dict[str, str] = {}  # to their owners; a shared one by its first
    for name in (name for owner in owners for name in weights_of(model, owner)):
        weight = weight_named(model, name)
        if weight.parameter in trained:
            trained.remove(weight.parameter)
            weights[name] = weight.owner
    modules = {name: model.get_submodule(owner) for name, owner in weights.items()}
    plain_s = _seconds(trial, lambda: _forward_backward(trial))
    taken, refusals = _taken(trial, list(weights))
    slow = {name: how for name, how in taken.items() if how is not None}
    if ruled := [name for name, how in taken.items() if how is None]:
        norms_s = _norms_seconds(trial, ruled)
        yield ok(
            f"with a rule: {_typed(modules, ruled)}; norms of them take {norms_s / plain_s:.1f} x "
            "a forward and backward pass"
        )
    for line in refusals:
        yield warn(f"grad-norms refuses: {line}")
    if slow:
        norms_s = _norms_seconds(trial, list(slow))
        dots_s, said = _dots_seconds(trial, [weight_named(model, n).parameter for n in slow])
        yield warn(
            f"without a rule: {_typed(modules, list(slow))}; norms of them take "
            f"{norms_s / plain_s:.1f} x, influence takes {dots_s / plain_s:.1f} x a forward and "
            f"backward pass for one query{said}"
        )
    numbered = weight_layers(trial.task, model)
    if by_name := [name for name, owner in weights.items() if owner not in numbered]:
        yield ok(f"--layer all leaves these layers out, so name them: {_typed(modules, by_name)}")


def _taken(
    trial: Trial, names: Sequence[str]
) -> tuple[dict[str, tuple[Form, str] | None], list[str]]:
    """The weights whose norms can be had and are right, and what is said of the others.

    Returns:
        By weight None if a rule serves it, else the form that does and why; the refusals.
    """
    try:
        if names:
            batch = trial.fetch(trial.few)
            with GradNorms(
                trial.model, names, trial.task.losses, reduction="layer", precision=trial.precision
            ) as norms:
                norms.check(batch)
                slow = norms.slow_layers(batch)
            return {name: slow.get(name) for name in names}, []
    except InflError as error:
        if len(names) == 1:
            return {}, [str(error)]
        each = [_taken(trial, [name]) for name in names]
        taken = {name: how for found, _ in each for name, how in found.items()}
        return taken, [line for _, refused in each for line in refused]
    return {}, []


def _norms_seconds(trial: Trial, names: Sequence[str]) -> float:
    with GradNorms(
        trial.model, names, trial.task.losses, reduction="channel", precision=trial.precision
    ) as norms:
        return _seconds(trial, lambda: norms(trial.full_batch))


def _dots_seconds(trial: Trial, names: Sequence[str]) -> tuple[float, str]:
    """Time of dot products with one vector, and what is said of how they are made.

    Raises:
        ModelError: They are not those of plain autograd.
    """
    space = ParameterSpace(trial.model, names)
    with seeded(0, trial.device):
        vectors_QP = torch.randn(1, space.size)
    with (
        warnings.catch_warnings(record=True) as caught,
        GradDots(
            trial.model, space, trial.task.losses, vectors_QP, precision=trial.precision
        ) as dots,
    ):
        warnings.simplefilter("always", UserWarning)
        dots.check(trial.fetch(trial.few))
        seconds = _seconds(trial, lambda: dots.total(trial.full_batch))
    said = [str(w.message) for w in caught if "differentiated sample by sample" in str(w.message)]
    return seconds, f" ({said[0]})" if said else ""


def _forward_backward(trial: Trial) -> tuple[Tensor | None, ...]:
    with differentiable_kernels(trial.model):
        losses_B = trial.task.losses(trial.model, trial.full_batch)
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        losses_B.sum(), list(trial.trained.values()), allow_unused=True
    )
    return found


def _seconds(trial: Trial, work: Callable[[], object]) -> float:
    work()  # the first time pays for allocations
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        if trial.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _typed(modules: dict[str, nn.Module], names: Sequence[str]) -> str:
    return listed([f"{n or 'the model itself'} ({type(modules[n]).__name__})" for n in names])
