"""The top samples by score or by gradient norm, with their descriptions."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from influence_jobs.errors import SpecError
from influence_jobs.specs.scores import ScoresSpec
from influence_jobs.store.folder import for_runs
from influence_jobs.store.layout import SCORES, SCORES_OF_TOKENS, part_name
from influence_jobs.store.run import Run
from influence_jobs.store.top import largest_rows, strongest_tokens, top_scores
from influence_jobs.views.base import RankedRow

Side = Literal["helpful", "harmful", "both"]


class NothingLeft(SpecError):
    """All samples are excluded from a ranking. Cure: exclude fewer of them."""


def named(method: str, quantity: str) -> str:
    """The name of a ranking; `helpful` and `harmful` are replaced if the quantity is not a loss."""
    if quantity == "loss":
        return method
    for word, verb in (("helpful", "lowers"), ("harmful", "raises")):
        method = method.replace(word, f"influence that {verb} the {quantity}")
    return method


def ranked_scores(
    run: Run,
    k: int,
    *,
    layer: str | None = None,
    tests: Sequence[int] | None = None,
    side: str = "both",
    sides: Mapping[str, bool],
) -> list[dict[str, Any]]:
    """The top k samples of each query and side.

    Args:
        layer: Rank by the scores of this layer.
        tests: Only queries of these test samples.
        side: "helpful" for the largest scores, "harmful" for the smallest, or "both".
        sides: The sides of the ranking by name, each with whether its largest scores come first.

    Returns:
        Rows with test, region (if any query has one), side, rank, score, token (if the run has
        scores of tokens: the one that brings most to the score), and the description of the sample.

    Raises:
        SpecError: The run has no scores of this layer, or no such query.
        NothingLeft: All samples are excluded.
        StoreError: The scores are missing.
    """
    if side not in get_args(Side):
        raise SpecError(f"side {side!r}: choose {', '.join(get_args(Side))}")
    if k < 1:
        raise SpecError(f"k = {k}: k must be at least 1")
    if isinstance(run.spec, ScoresSpec) and run.spec.top_only:
        k = min(k, run.spec.top_only)  # what comes next is the other end
    array = SCORES if layer is None else part_name(layer)
    run.array(SCORES)  # if even these are missing, the layer is not the cause
    if array not in run.array_names():
        kept = [name.partition("/")[2] for name in run.array_names() if name.startswith("parts/")]
        there = (
            f"it has {', '.join(kept)}"
            if kept
            else "leave --layer out, or submit with --keep-layers"
        )
        raise SpecError(f"{run.id} keeps no scores of layer {layer}: {there}")
    queries = run.read_table("queries").to_pylist()
    chosen = [row for row in queries if tests is None or row["test"] in tests]
    for test in tests or ():
        if test not in [row["test"] for row in queries]:
            has = ", ".join(dict.fromkeys(str(row["test"]) for row in queries))
            raise SpecError(f"{run.id} has no query of test sample {test}; it has {has}")
    samples = run.read_table("samples")
    rows = []
    ranked = {
        name: top_scores(run, array, [row["query"] for row in chosen], k, largest=largest)
        for name, largest in sides.items()
        if side == "both" or (side == "helpful") == largest
    }
    if not any(len(ids) for found in ranked.values() for ids, _ in found):
        raise NothingLeft(
            f"{run.id} leaves all samples out: submit it with a larger --exclude-norm-above"
        )
    for i, place in enumerate(places(chosen)):
        for name, found in ranked.items():
            ids, values = found[i]
            described = samples.take(ids).to_pylist()
            tokens: list[dict[str, int | None]] = [{}] * len(ids)
            if array == SCORES and SCORES_OF_TOKENS in run.array_names():
                strongest = strongest_tokens(run, chosen[i]["query"], ids, largest=sides[name])
                tokens = [{"token": token} for token in strongest]
            for rank, (sample, score, token) in enumerate(
                zip(described, values, tokens, strict=True), start=1
            ):
                row = {**place, "side": name, "rank": rank, "score": float(score), **token}
                # Ours come first, and count where a column of the task has their name.
                rows.append(row | sample | row)
    return rows


def places(queries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The test id of each query, and its region if any of the queries has one."""
    names = ("test", "region") if any(query["region"] for query in queries) else ("test",)
    return [{name: query[name] for name in names} for query in queries]


def place_words(text: str) -> str:
    """A region of a table, or a span of tokens, in words."""
    return f"{'tokens' if ':' in text else 'region'} {text}"


def by_query(rows: Sequence[RankedRow]) -> dict[tuple[int, str | None, str], list[RankedRow]]:
    """Ranked rows by (test, region, side), in their order."""
    blocks: dict[tuple[int, str | None, str], list[RankedRow]] = {}
    for row in rows:
        blocks.setdefault((row["test"], row.get("region"), row["side"]), []).append(row)
    return blocks


def ranked_norms(
    run: Run,
    arrays: Mapping[str, str],
    k: int,
    *,
    channel: int | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """The k samples with the largest norms, by array: description and norm of each sample.

    Args:
        run: A run with norms.
        arrays: Its arrays of norms, by layer.
        k: Number of samples.
        channel: Rank by the norm of this channel instead of the sum over channels.

    Raises:
        SpecError: The run has no norms, or no such channel.
    """
    if not arrays:
        raise SpecError(
            f"{run.id} has no gradient norms: "
            f"infl submit grad-norms --layer all --checkpoint {run.id}{for_runs(run.root)}"
        )
    samples = run.read_table("samples")
    tables: dict[str, list[dict[str, Any]]] = {}
    for name, array in arrays.items():
        shape = run.array(array).shape[run.row_axis(array) + 1 :]
        if channel is not None and not (shape and channel < shape[0]):
            channels = f"channels 0 to {shape[0] - 1}" if shape else "one norm a sample"
            raise SpecError(f"layer {name} has no channel {channel}; it has {channels}")
        rows, values = largest_rows(run, array, k, channel=channel)
        described = samples.take(rows).to_pylist()
        tables[array] = [{**d, "norm": float(v)} for d, v in zip(described, values, strict=True)]
    return tables


def summed_over(run: Run, array: str, *, channel: int | None = None) -> str:
    """The axes that `ranked_norms` sums over, in words; empty if there are none."""
    axis = run.row_axis(array)
    trailing = run.array(array).ndim - axis - 1
    summed = {
        "checkpoints": axis > 0,
        "channels": trailing > 0 and channel is None,
        "kernel positions": trailing > 1,
    }
    return " and ".join(name for name, there in summed.items() if there)
