"""From a user's options to queries."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from influence_jobs.errors import SpecError
from influence_jobs.jobs.queries import require_queries, size_of
from influence_jobs.requests.base import Say
from influence_jobs.requests.options import QueriesOptions
from influence_jobs.specs.base import TaskSpec, make_spec
from influence_jobs.specs.queries import Queries, Query
from influence_jobs.tasks.base import Draw, Task
from influence_jobs.tasks.registry import make_task
from influence_jobs.tasks.sequences import CURE, most_tokens
from influence_jobs.terms import Region


def queries_of(request: QueriesOptions, task: Task, *, default_set: bool = False) -> Queries:
    """The user's queries: every test sample, at every point, region and span that is given.

    Args:
        default_set: If no test sample is given, take the task's first named set.

    Raises:
        SpecError: No test sample is given, or the task has no such test sample, region or quantity.
    """
    named = request.test_set
    if default_set and not request.test and named is None:
        named = next(iter(task.query_sets), None)
    chosen = [(test, None) for test in request.test] + _test_set(named, task)
    if not chosen:
        raise SpecError(
            "say what to explain: --test ID (may be repeated), or --test-set with a file of ids"
        )
    points, areas = _pairs(request.point, 2), _pairs(request.region, 4)
    regions = [_region("--point", word) for word in points]
    regions += [_region("--region", word) for word in areas]
    spans = [_span("--tokens", word) for word in _pairs(request.tokens, 2)]
    if (regions or spans) and any(region for _, region in chosen):
        raise SpecError(
            f"--test-set {named} has regions of its own: leave --point, --region and --tokens out"
        )
    if spans:
        _require_sequences(task, [test for test, _ in chosen])
    regions += spans
    queries = make_spec(
        Queries,
        items=tuple(
            make_spec(Query, test=test, region=region)
            for test, own in chosen
            for region in regions or (own,)
        ),
        quantity=request.quantity,
        noise_draws=request.noise_draws,
        seed=request.seed,
    )
    require_queries(task, queries)
    return queries


def tokens_kept(task: TaskSpec, seed: int, say: Say) -> int:
    """The tokens of the longest training sample, for `--per-token`.

    Raises:
        SpecError: The samples are no sequences of tokens.
    """
    say("looking for the training sample with the most tokens (--per-token)")
    return most_tokens(make_task(task), Draw(seed))


def _test_set(word: str | None, task: Task) -> list[tuple[int, Region | None]]:
    """The test samples of a named set, or of a file: a line is an ID, or an ID and a region.

    Raises:
        SpecError: There is no such set or file, or a line is something else.
    """
    if word is None:
        return []
    if word in task.query_sets:
        return [(test, None) for test in task.query_sets[word]]
    try:
        lines = Path(word).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        named = ", ".join(task.query_sets) or "no named sets"
        raise SpecError(
            f"--test-set {word}: this is not a readable file, and {type(task).__name__} has {named}"
        ) from error
    found: list[tuple[int, Region | None]] = []
    for line in lines:
        words = line.split()
        if len(words) == 2 and words[0].isdecimal() and ("," in words[1] or ":" in words[1]):
            read = _span if ":" in words[1] else _region
            found.append((int(words[0]), read(f"--test-set {word}:", words[1])))
            continue
        for part in words:
            if not part.isdecimal():
                raise SpecError(
                    f"--test-set {word}: {line.strip()!r} is not a test id, nor one with a point "
                    "Y,X, a region Y,X,H,W or a span of tokens A:B"
                )
            found.append((int(part), None))
    return found


def _pairs(given: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """Bare numbers, such as `point=(3, 4)`, are one point or region."""
    return (given,) if len(given) == count and all(isinstance(v, int) for v in given) else given


def _region(option: str, word: Any) -> Region:
    """A region from `Y,X,H,W` on the command line, (y, x, h, w) in Python, or a point `Y,X`."""
    parts = word.split(",") if isinstance(word, str) else [str(part) for part in word]
    counts = {"--point": (2,), "--region": (4,)}.get(option, (2, 4))
    if len(parts) not in counts or not all(part.strip().isdecimal() for part in parts):
        form = " or ".join({2: "Y,X", 4: "Y,X,H,W"}[count] for count in counts)
        raise SpecError(f"{option} {word}: write {form}, in whole pixels from the upper left")
    y, x, *size = map(int, parts)
    height, width = size or (1, 1)
    return y, x, height, width


def _span(option: str, word: Any) -> Region:
    """Tokens `A:B`, or (a, b) in Python: the region of a sequence, an image one pixel high."""
    parts = word.split(":") if isinstance(word, str) else [str(part) for part in word]
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise SpecError(f"{option} {word}: write A:B, the first token and the one after the last")
    start, stop = map(int, parts)
    if start >= stop:
        raise SpecError(f"{option} {word}: the span is empty, as B is the token after the last")
    return 0, start, 1, stop - start


def _require_sequences(task: Task, tests: Iterable[int]) -> None:
    for test in tests:
        if test < len(task.test_data()) and (size_of(task, test) or (0, 0))[0] != 1:
            raise SpecError(f"{type(task).__name__} has no tokens: leave --tokens out ({CURE})")
