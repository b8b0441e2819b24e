"""From what the user typed to specs of scores."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from infl_cli.render import say
from infl_cli.requests import Subject
from infl_cli.score_options import CurvatureOptions, QueryOptions
from influence_jobs.errors import SpecError
from influence_jobs.gradients.rules import matrix_layers
from influence_jobs.jobs.queries import require_queries
from influence_jobs.specs import (
    AnySpec,
    AttributionSpec,
    ConjugateGradient,
    Curvature,
    EkFac,
    GradNormsSpec,
    Identity,
    Lissa,
    Model,
    Queries,
    Query,
    Solver,
    STestSpec,
    TrainSpec,
    make_spec,
)
from influence_jobs.store.find import find_run
from influence_jobs.tasks.base import Task
from influence_jobs.tasks.layers import resolve_layers

M = TypeVar("M", bound=AnySpec)

SOLVERS: dict[str, type[Model]] = {
    "cg": ConjugateGradient,
    "lissa": Lissa,
    "ek-fac": EkFac,
    "identity": Identity,
}


def queries_request(options: QueryOptions, task: Task, *, seed: int) -> Queries:
    """The queries a user asked for: every test sample, at every point and region if any.

    Raises:
        SpecError: None is named, or the task has no such test sample, region or quantity.
    """
    tests = [*(options.test or ()), *_test_set(options.test_set, task)]
    if not tests:
        raise SpecError(
            "say what to explain: --test ID (may be repeated), or --test-set with a file of ids"
        )
    regions: list[Any] = [(*_numbers("--point", word, 2), 1, 1) for word in options.point or ()]
    regions += [_numbers("--region", word, 4) for word in options.region or ()]
    queries = make_spec(
        Queries,
        items=tuple(
            make_spec(Query, test=test, region=region)
            for test in tests
            for region in regions or (None,)
        ),
        quantity=options.quantity,
        noise_draws=options.noise_draws,
        seed=seed,
    )
    require_queries(task, queries)
    return queries


def _test_set(word: str | None, task: Task) -> Sequence[int]:
    if word is None:
        return ()
    if word in task.query_sets:
        return task.query_sets[word]
    try:
        lines = Path(word).read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        named = ", ".join(task.query_sets) or "no named sets"
        raise SpecError(
            f"--test-set {word}: it is no readable file, and {type(task).__name__} has {named}"
        ) from error
    for line in lines:
        if not line.isdecimal():
            raise SpecError(f"--test-set {word}: {line!r} is no test id")
    return [int(line) for line in lines]


def _numbers(option: str, word: str, count: int) -> tuple[int, ...]:
    parts = word.split(",")
    if len(parts) != count or not all(part.strip().isdecimal() for part in parts):
        form = "Y,X" if count == 2 else "Y,X,H,W"
        raise SpecError(f"{option} {word}: write {form}, in whole pixels from the upper left")
    return tuple(map(int, parts))


def s_test_requests(
    subject: Subject,
    queries: Queries,
    options: CurvatureOptions,
    *,
    layers: Sequence[str] | None,
    seed: int,
) -> tuple[STestSpec, ...]:
    """s_test vectors of the queries at each of the subject's checkpoints.

    Raises:
        SpecError: An option does not fit the solver or is out of range, or a layer does not exist.
    """
    solver = _solver(options)
    curvature = make_spec(
        Curvature,
        operator=options.operator,
        product=options.product,
        samples=_curvature_samples(options.curvature_samples),
        seed=seed,
    )
    modules = resolve_layers(layers, subject.built) if layers else _modules(subject.built, solver)
    return tuple(
        make_spec(
            STestSpec,
            task=subject.task,
            checkpoint=checkpoint,
            modules=modules,
            queries=queries,
            curvature=curvature,
            solver=solver,
        )
        for checkpoint in subject.checkpoints
    )


def _solver(options: CurvatureOptions) -> Solver:
    damping = options.damping
    if damping is not None and options.scale is not None:
        damping *= options.scale  # the fixed point of the published recursion
    given: Mapping[str, Any] = {
        "damping": damping,
        "tolerance": options.tolerance,
        "max_iterations": options.max_iterations,
        "scale": options.scale,
        "depth": options.depth,
        "batch_size": options.batch,
        "repeats": options.repeats,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    of_lissa = chosen.keys() & {"scale", "depth", "batch_size", "repeats"}
    name_of_solver = options.solver or ("lissa" if of_lissa else "cg")
    kind = SOLVERS[name_of_solver]
    for name in chosen:
        if name not in kind.model_fields:
            option = "--batch" if name == "batch_size" else f"--{name.replace('_', '-')}"
            raise SpecError(f"{option} has no meaning for --solver {name_of_solver}: leave it out")
    default = CurvatureOptions()
    for option in ("operator", "product", "curvature_samples"):
        if kind is Identity and getattr(options, option) != getattr(default, option):
            word = option.replace("_", "-")
            raise SpecError(f"--{word} has no meaning for --solver identity: leave it out")
    solver: Solver = make_spec(kind, **chosen)  # type: ignore[assignment]
    if damping is not None and options.scale is not None:
        say(f"effective damping lambda = {options.damping:g} x {options.scale:g} = {damping:g}")
    return solver


def _curvature_samples(word: str) -> int | None:
    if word == "all":
        return None
    if not word.isdecimal() or int(word) == 0:
        raise SpecError(f"--curvature-samples {word}: write a number of samples, or all")
    return int(word)


def _modules(task: Task, solver: Solver) -> tuple[str, ...]:
    """All modules with parameters of their own; of them those that EK-FAC can do."""
    kinds = matrix_layers() if isinstance(solver, EkFac) else (nn.Module,)
    return tuple(
        name
        for name, module in task.model().named_modules()
        if isinstance(module, kinds) and any(True for _ in module.parameters(recurse=False))
    )


def found_spec(root: str, word: str, kind: type[M], what: str) -> M:
    """The spec of an existing run, which must be of one kind.

    Raises:
        StoreError: There is no such run.
        SpecError: It is of another kind.
    """
    spec = find_run(root, word).spec
    if not isinstance(spec, kind):
        raise SpecError(f"{spec.run_id} is no {what}")
    return spec


def replayed_norms(subject: Subject, layers: tuple[str, ...], *, seed: int) -> GradNormsSpec:
    """Norms of some layers at the subject's checkpoint."""
    return make_spec(
        GradNormsSpec,
        task=subject.task,
        checkpoints=subject.checkpoints,
        layers=layers,
        seed=seed,
    )


def attribution_of(
    subject: Subject,
    norms: TrainSpec | GradNormsSpec,
    queries: Queries,
    layers: tuple[str, ...],
    **fields: Any,
) -> AttributionSpec:
    """Attribution by the norms of some layers."""
    return make_spec(
        AttributionSpec,
        task=subject.task,
        norms=norms,
        checkpoint=subject.checkpoints[0],
        layers=layers,
        queries=queries,
        **fields,
    )
