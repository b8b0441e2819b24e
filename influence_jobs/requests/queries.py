"""From a user's options to queries."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from influence_jobs.errors import SpecError
from influence_jobs.jobs.queries import require_queries
from influence_jobs.requests.options import QueriesOptions
from influence_jobs.specs.base import make_spec
from influence_jobs.specs.queries import Queries, Query
from influence_jobs.tasks.base import Task


def queries_of(request: QueriesOptions, task: Task, *, default_set: bool = False) -> Queries:
    """The user's queries: every test sample, at every point and region if any is given.

    Args:
        default_set: If no test sample is given, take the task's first named set.

    Raises:
        SpecError: No test sample is given, or the task has no such test sample, region or quantity.
    """
    named = request.test_set
    if default_set and not request.test and named is None:
        named = next(iter(task.query_sets), None)
    tests = [*request.test, *_test_set(named, task)]
    if not tests:
        raise SpecError(
            "say what to explain: --test ID (may be repeated), or --test-set with a file of ids"
        )
    points, areas = _pairs(request.point, 2), _pairs(request.region, 4)
    regions: list[Any] = [(*_numbers("--point", word, 2), 1, 1) for word in points]
    regions += [_numbers("--region", word, 4) for word in areas]
    queries = make_spec(
        Queries,
        items=tuple(
            make_spec(Query, test=test, region=region)
            for test in tests
            for region in regions or (None,)
        ),
        quantity=request.quantity,
        noise_draws=request.noise_draws,
        seed=request.seed,
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
            f"--test-set {word}: this is not a readable file, and {type(task).__name__} has {named}"
        ) from error
    for line in lines:
        if not line.isdecimal():
            raise SpecError(f"--test-set {word}: {line!r} is not a test id")
    return [int(line) for line in lines]


def _pairs(given: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """Bare numbers, such as `point=(3, 4)`, are one point or region."""
    return (given,) if len(given) == count and all(isinstance(v, int) for v in given) else given


def _numbers(option: str, word: Any, count: int) -> tuple[int, ...]:
    """Numbers from `Y,X` on the command line or (y, x) in Python."""
    parts = word.split(",") if isinstance(word, str) else [str(part) for part in word]
    if len(parts) != count or not all(part.strip().isdecimal() for part in parts):
        form = "Y,X" if count == 2 else "Y,X,H,W"
        raise SpecError(f"{option} {word}: write {form}, in whole pixels from the upper left")
    return tuple(map(int, parts))
