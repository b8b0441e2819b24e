"""From the curvature options to specs of s_test vectors."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn

from influence_jobs.curvature.requirements import require_output_loss
from influence_jobs.errors import InflError, ModelError, SpecError
from influence_jobs.gradients import GradQuadratics
from influence_jobs.gradients.rules import (
    MatrixRule,
    has_factors,
    matrix_layers,
    nearest_rule,
    supported,
)
from influence_jobs.jobs.recipe import scheduled_damping
from influence_jobs.kinds.s_test.spec import STestSpec
from influence_jobs.kinds.train.spec import Checkpoint, TrainedCheckpoint
from influence_jobs.requests.base import Say
from influence_jobs.requests.options import SETTINGS, CurvatureOptions
from influence_jobs.requests.subject import Subject
from influence_jobs.specs.base import make_spec
from influence_jobs.specs.queries import Queries
from influence_jobs.specs.solvers import (
    Curvature,
    DampedSettings,
    LissaSettings,
    SolverSettings,
)
from influence_jobs.tasks.base import Draw, Task
from influence_jobs.tasks.layers import by_type, left_out, resolve_layers, trained_modules
from influence_jobs.tasks.output_loss import forms_of
from influence_jobs.tasks.placement import converted, dtype_of
from influence_jobs.terms import FullPrecision, JobPrecision, ScorePrecision

if TYPE_CHECKING:
    from influence_jobs.kinds.self_influence.request import SelfInfluenceRequest

# Without --curvature-samples: all, as 1,000 of 5,000 gave half the LDS; but samples x parameters,
# the cost of a product, have a limit.
MOST_WORK, LEAST_SAMPLES = 10**10, 10_000
MOST_LOOKED_AT = 50_000_000  # parameters of a model that is tried before its run
LOOKED_AT = 4  # samples whose losses are compared with what `output_loss` says of them


def s_tests_of(
    request: CurvatureOptions,
    subject: Subject,
    queries: Queries,
    say: Say,
    *,
    layers: Sequence[str | int] = (),
    seed: int,
) -> tuple[STestSpec, ...]:
    """Specs of the queries' s_test vectors, one for each checkpoint of the subject.

    Args:
        layers: The user's names of the layers whose parameters are used; empty for all that the
            solver can handle.

    Raises:
        SpecError: An option does not fit the solver or is out of range, or a layer does not exist.
    """
    built = subject.built
    solver = _solver(request, say)
    runs = [c.train.run_id for c in subject.checkpoints if isinstance(c, TrainedCheckpoint)]
    if not solver.inverts and len({*runs}) < len(runs):
        raise SpecError(
            f"--solver {solver.name} uses all checkpoints of a training up to the one that is "
            "named: name one of each training with --checkpoint"
        )
    curvature = make_spec(
        Curvature,
        operator=request.operator,
        product=request.product,
        samples=_curvature_samples(request.curvature_samples, built),
        seed=seed,
    )
    if solver.uses_curvature and curvature.operator == "gauss-newton":
        require_declared_loss(built)
    modules = resolve_layers(layers, built, say) if layers else _modules(built, solver)
    specs = tuple(
        make_spec(
            STestSpec,
            task=subject.task,
            checkpoint=checkpoint,
            modules=modules,
            queries=queries,
            curvature=curvature,
            solver=solver
            if getattr(request, "damping_share", None) is not None
            else _with_damping(solver, curvature, checkpoint, built),
            precision=full_precision(request.precision, built),
        )
        for checkpoint in subject.checkpoints
    )
    model = built.model()
    if not layers and (others := left_out(model, modules)):
        say(
            f"--solver {solver.name} takes {len(modules)} of {len(modules) + len(others)} layers; "
            f"these have no Kronecker factors and are left out: {by_type(model, others)}"
        )
    return specs


C = TypeVar("C", bound=CurvatureOptions)


def without_bfloat16(request: C) -> tuple[C, Literal["bfloat16"] | None]:
    """The options for s_test vectors, and the precision in which samples are multiplied with them.

    With `bfloat16` the vectors are of full precision all the same.
    """
    if request.precision != "bfloat16":
        return request, None
    return request.model_copy(update={"precision": None}), "bfloat16"


def full_precision(asked: JobPrecision | None, task: Task) -> FullPrecision:
    """The precision of curvature and scores; by default that in which the task's model is built.

    Raises:
        SpecError: It is a half precision.
    """
    if asked == "bfloat16" or asked == "bfloat16-weights":
        raise SpecError(
            f"--precision {asked} is not for this, since the three digits of bfloat16 are too few "
            "for a solver or a sum over parameters: use tf32, float32 or float64 (norms and "
            "gradients take bfloat16 and bfloat16-weights, and influence takes bfloat16)"
        )
    return asked or ("float64" if dtype_of(task.model()) == torch.float64 else "float32")


def require_used(request: CurvatureOptions, methods: Sequence[str]) -> None:
    """Refuse curvature options if no method uses the curvature.

    Args:
        methods: Names of methods. They must be valid: rankings were made of them before.

    Raises:
        SpecError: Such an option is given; the message names the first.
    """
    if {"helpful", "harmful"} & {*methods}:
        return
    for name in CurvatureOptions.model_fields:
        if request.given(name):
            raise SpecError(
                f"{_flag(name)} has no meaning for --by {', '.join(methods)}: leave it out"
            )


def self_solvers_of(
    request: "SelfInfluenceRequest", subject: Subject, say: Say
) -> tuple[Curvature, tuple[SolverSettings, ...]]:
    """The curvature of self-influence, and the solver for each checkpoint of the subject.

    Raises:
        SpecError: An option does not fit the solver or is out of range.
    """
    built, solver = subject.built, _solver(request, say)
    if solver.uses_curvature and built.output_loss is None:
        raise SpecError(
            f"{type(built).__name__} has no output_loss, which the curvature needs: define "
            "outputs(), targets() and output_loss, or use --solver identity"
        )
    if solver.uses_curvature:
        require_declared_loss(built)
    samples = _curvature_samples(request.curvature_samples, built)
    curvature = make_spec(Curvature, samples=samples, seed=request.seed)
    return curvature, tuple(
        _with_damping(solver, curvature, checkpoint, built) for checkpoint in subject.checkpoints
    )


@torch.no_grad()
def require_declared_loss(task: Task, most: float = MOST_LOOKED_AT) -> None:
    """Refuse losses that are not what `output_loss` says, before a model is trained with them.

    Args:
        most: Parameters of a model that is looked at.

    Raises:
        ModelError: The untrained model shows it on a few samples, on the CPU. What fails there
            otherwise is left to the run, which may have a GPU, and so are large models.
    """
    forms = forms_of(task)
    try:
        model, fitting = converted(task, torch.device("cpu"))
        if sum(parameter.numel() for parameter in model.parameters()) > most:
            return
        few = torch.arange(min(LOOKED_AT, len(task.train_data())))
        batch = fitting(task.batch(few, Draw(seed=0)))
        losses = task.losses(model, batch)
    except Exception:  # noqa: BLE001  (whatever the user's code raises)
        return
    if isinstance(losses, torch.Tensor) and not losses.isfinite().all():
        return  # trained weights may give better ones
    try:
        require_output_loss(task, model, batch, forms)
    except InflError:
        raise
    except Exception:  # noqa: BLE001, S110  (as above)
        pass


def factored_modules(task: Task, wanted: Sequence[str | int], say: Say) -> tuple[str, ...]:
    """The layers whose gradients have a quadratic form in an eigenbasis of Kronecker factors.

    Args:
        wanted: The user's names of layers; empty for all that have one.

    Raises:
        SpecError: A layer that the user names has none.
        ModelError: No layer has one; or as `GradQuadratics` and `converted`.
    """
    model, fitting = converted(task, torch.device("cpu"))
    names = resolve_layers(wanted, task, say) if wanted else trained_modules(model)
    modules = dict(model.named_modules())
    found = tuple(name for name in names if name in modules and _is_whole(modules[name]))
    if found:
        dtype = dtype_of(model)
        batch = task.batch(torch.arange(min(2, len(task.train_data()))), Draw(seed=0))
        precision: ScorePrecision = "float64" if dtype == torch.float64 else "float32"
        forms = dict.fromkeys(found)
        with GradQuadratics(model, forms, task.losses, precision=precision) as engine:
            found = engine.plain_layers(fitting(batch))
    if not found or (wanted and len(found) < len(names)):
        without = by_type(model, [name for name in names if name not in found])
        kind = SpecError if wanted else ModelError
        raise kind(
            f"self-influence is of layers ({matrix_layers()}) whose parameters are all trained and "
            f"used in one call, and these are not: {without}; leave them out, or use "
            "infl submit baseline --method norm, the norms of any layer's gradients"
        )
    if not wanted and (others := left_out(model, found)):
        say(
            f"self-influence is through {len(found)} of {len(found) + len(others)} layers; these "
            f"have no Kronecker factors and are left out: {by_type(model, others)}"
        )
    return found


def _is_whole(module: nn.Module) -> bool:
    """Whether EK-FAC factors a layer with all of its parameters, and the engine has its rule."""
    return (
        supported(module)
        and has_factors(module)
        and isinstance(nearest_rule(module), MatrixRule)
        and all(parameter.requires_grad for parameter in module.parameters())
    )


def _solver(request: "CurvatureOptions | SelfInfluenceRequest", say: Say) -> SolverSettings:
    scale = getattr(request, "scale", None)
    damping = request.damping
    if damping is not None and scale is not None:
        damping *= scale  # effective lambda at the fixed point of the published recursion
    given: Mapping[str, Any] = {
        "damping": damping,
        **{name: getattr(request, name, None) for name in SETTINGS},
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    of_lissa = chosen.keys() & (
        {*LissaSettings.model_fields, "batch"} - {*DampedSettings.model_fields}
    )
    if {"damping", "damping_share"} <= chosen.keys():
        raise SpecError("--damping and --damping-share both say lambda: leave one out")
    name_of_solver = request.solver or ("lissa" if of_lissa else "cg")
    kind = SolverSettings.by_name[name_of_solver]
    fields = {"batch": "batch_size"}
    for name in chosen:
        if fields.get(name, name) not in kind.model_fields:
            raise SpecError(
                f"{_flag(name)} has no meaning for --solver {name_of_solver}: leave it out"
            )
    for name in ("operator", "product", "curvature_samples"):
        if not kind.uses_curvature and name in type(request).model_fields and request.given(name):
            raise SpecError(
                f"{_flag(name)} has no meaning for --solver {name_of_solver}: leave it out"
            )
    named = {fields.get(name, name): value for name, value in chosen.items()}
    solver = make_spec(kind, **{**kind.asked, **named})
    if damping is not None and scale is not None:
        say(f"lambda = damping {request.damping:g} x scale {scale:g} = {damping:g}")
    return solver


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _with_damping(
    solver: SolverSettings, curvature: Curvature, checkpoint: Checkpoint, task: Task
) -> SolverSettings:
    """The solver with the lambda of the checkpoint's schedule, if the user gave none.

    Of the Hessian lambda must also make negative eigenvalues positive, so it is measured.
    """
    if not isinstance(solver, DampedSettings) or curvature.operator != "gauss-newton":
        return solver
    found = scheduled_damping(checkpoint, len(task.train_data()))
    if solver.damping is not None or found is None:
        return solver
    return type(solver)(**{**dict(solver), "damping": found.value})


def _curvature_samples(given: int | str | None, task: Task) -> int | None:
    if given == "all":
        return None
    if given is None:
        parameters = sum(parameter.numel() for parameter in task.model().parameters())
        most, n = max(LEAST_SAMPLES, MOST_WORK // max(1, parameters)), len(task.train_data())
        if n <= LEAST_SAMPLES:
            return LEAST_SAMPLES  # all, as requests said before: so their runs keep their ids
        return most if most < n else None
    if not str(given).isdecimal() or int(given) == 0:
        raise SpecError(f"--curvature-samples {given}: write a number of samples, or all")
    return int(given)


def _modules(task: Task, solver: SolverSettings) -> tuple[str, ...]:
    """All modules with trained parameters of their own, as far as the solver can do them."""
    model = task.model()
    found = trained_modules(model)
    if solver.needs_factors:
        found = tuple(name for name in found if has_factors(model.get_submodule(name)))
    if not found:
        which = f"{matrix_layers()} layers" if solver.needs_factors else "parameters"
        cure = "use --solver cg" if solver.needs_factors else "let the task's model() train some"
        raise ModelError(f"{type(task).__name__} has no trained {which}: {cure}")
    return found
