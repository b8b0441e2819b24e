"""`infl top`: the samples that come first, by gradient norm or by score."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import typer

from infl_cli import options as o
from infl_cli import render
from infl_cli.render import say
from infl_cluster.status import read_status
from influence_jobs.errors import SpecError, StoreError
from influence_jobs.specs import GradNormsSpec, InfluenceSpec, ScoresSpec, STestSpec, TrainSpec
from influence_jobs.store.find import find_run
from influence_jobs.store.layout import SCORES, part_name
from influence_jobs.store.run import Run
from influence_jobs.store.top import largest_rows, top_scores

_OF_SCORES, _OF_NORMS = "Of scores", "Of gradient norms"


def top(
    run: o.RunId,
    k: Annotated[int, typer.Option(min=1, help="How many samples.")] = 10,
    layer: Annotated[
        str | None,
        typer.Option(
            help="Module name of a layer; by default all layers of the run, of scores their sum."
        ),
    ] = None,
    test: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            help="Only the queries of this test sample. May be repeated.",
            rich_help_panel=_OF_SCORES,
        ),
    ] = None,
    side: Annotated[
        Literal["helpful", "harmful", "both"],
        typer.Option(
            help="Of influence: largest scores, smallest, or both.", rich_help_panel=_OF_SCORES
        ),
    ] = "both",
    png: Annotated[
        Path | None,
        typer.Option(
            help="Write a contact sheet: the queries and their samples.",
            rich_help_panel=_OF_SCORES,
        ),
    ] = None,
    channel: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Rank by this channel's norm, not by the sum over channels.",
            rich_help_panel=_OF_NORMS,
        ),
    ] = None,
    parquet: Annotated[Path | None, typer.Option(help="Write the table to this file.")] = None,
    runs: o.Runs = o.DEFAULT_RUNS,
    json: o.Json = False,
) -> None:
    """Print the samples with the largest norms or scores, with their label or file, row and column."""
    found = find_run(o.runs_folder(runs), run)
    if read_status(found)["state"] != "done":
        raise StoreError(
            f"{found.id} is not done yet: infl resume {found.id}{o.for_runs(found.root)}"
        )
    for file in (png, parquet):
        if file is not None and not file.parent.is_dir():
            raise SpecError(f"cannot write {file}: there is no folder {file.parent}")
    if not isinstance(found.spec, (ScoresSpec, STestSpec, GradNormsSpec, TrainSpec)):
        raise SpecError(
            f"{found.id} ranks no samples: infl figures {found.id}{o.for_runs(found.root)}"
        )
    scored = isinstance(found.spec, ScoresSpec)
    for name, given, fits in (
        ("--test", test is not None, scored),
        ("--side", side != "both", isinstance(found.spec, InfluenceSpec)),
        ("--png", png is not None, scored),
        ("--channel", channel is not None, not scored),
    ):
        if given and not fits:
            raise SpecError(f"{name} has no meaning for {found.id}: leave it out")
    if scored:
        rows = ranked_scores(found, k, layer, test, side)
        tables = {SCORES if layer is None else part_name(layer): rows}
    else:
        tables = _ranked_norms(found, k, layer, channel)
    if parquet:
        flat = [{"array": name, **row} for name, table in tables.items() for row in table]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(flat), buffer)
        parquet.write_bytes(buffer.getvalue())
        say(f"wrote {parquet}")
    if png:
        from infl_cli.contact_sheets import sheet

        sheet(found, tables[next(iter(tables))]).savefig(png, format="png")
        say(f"wrote {png}")
    if json:
        render.print_json({"run": found.id, "top": tables})
    elif scored:
        _print_scores(found, next(iter(tables)), tables[next(iter(tables))])
    else:
        _print_norms(found, tables, channel)


# -- scores ---------------------------------------------------------------------------------------


def sides(run: Run) -> dict[str, bool]:
    """What the ends of a run's ranking are called, and whether that end is the largest scores."""
    if not isinstance(run.spec, InfluenceSpec):
        return {run.spec.kind: True}
    if run.spec.asked.quantity == "loss":
        return {"helpful": True, "harmful": False}
    return {"lowers it": True, "raises it": False}


def ranked_scores(
    run: Run, k: int, layer: str | None, tests: Sequence[int] | None, side: str
) -> list[dict[str, Any]]:
    """The first k samples of each query and side: test, region if any, side, rank, score, and what the sample is.

    Args:
        layer: Of this layer's part only.
        tests: Only queries of these test samples.
        side: helpful, harmful or both.

    Raises:
        SpecError: The run keeps no such part, has no such query, or scores nothing.
    """
    array = SCORES if layer is None else part_name(layer)
    if array not in run.array_names():
        kept = [name.partition("/")[2] for name in run.array_names() if name != SCORES]
        there = (
            f"it has {', '.join(kept)}"
            if kept
            else "leave --layer out, or submit with --keep-layers"
        )
        raise SpecError(f"{run.id} keeps no scores of layer {layer}: {there}")
    queries = _table(run, "queries").to_pylist()
    chosen = [row for row in queries if tests is None or row["test"] in tests]
    for test in tests or ():
        if test not in [row["test"] for row in queries]:
            has = ", ".join(dict.fromkeys(str(row["test"]) for row in queries))
            raise SpecError(f"{run.id} has no query of test sample {test}; it has {has}")
    samples = _table(run, "samples")
    rows = []
    ranked = {
        name: top_scores(run, array, [row["query"] for row in chosen], k, largest=largest)
        for name, largest in sides(run).items()
        if side == "both" or (side == "helpful") == largest
    }
    if not any(len(ids) for found in ranked.values() for ids, _ in found):
        raise SpecError(
            f"{run.id} leaves all samples out: submit it with another --exclude-norm-above"
        )
    for i, query in enumerate(chosen):
        for name, found in ranked.items():
            ids, values = found[i]
            described = samples.take(ids).to_pylist()
            for rank, (sample, score) in enumerate(zip(described, values, strict=True), start=1):
                where = {"test": query["test"]}
                if query["region"]:
                    where["region"] = query["region"]
                rows.append({**where, "side": name, "rank": rank, "score": float(score), **sample})
    return rows


def by_query(
    rows: Sequence[Mapping[str, Any]],
) -> dict[tuple[int, str | None, str], list[Mapping[str, Any]]]:
    """Ranked rows by (test, region, side), in their order."""
    blocks: dict[tuple[int, str | None, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        blocks.setdefault((row["test"], row.get("region"), row["side"]), []).append(row)
    return blocks


def _print_scores(run: Run, array: str, rows: Sequence[Mapping[str, Any]]) -> None:
    meaning = run.array(array).attrs
    render.out.print(f"scores: {meaning['quantity']}")
    render.out.print(f"sign: {meaning['sign']}; unit: {meaning['unit']}")
    queries = {row["query"]: row for row in _table(run, "queries").to_pylist()}
    for (test, region, side), block in by_query(rows).items():
        query = next(q for q in queries.values() if (q["test"], q["region"]) == (test, region))
        known = {
            name: value
            for name, value in query.items()
            if name not in ("query", "test", "quantity") and value is not None
        }
        which = ", ".join(f"{name} {value}" for name, value in known.items())
        render.out.print(f"\ntest {test}{f' ({which})' if which else ''}: {side}")
        shown = [
            {k: v for k, v in row.items() if k not in ("test", "region", "side")} for row in block
        ]
        render.print_table(tuple(shown[0]), [tuple(row.values()) for row in shown])


# -- gradient norms -------------------------------------------------------------------------------


def _ranked_norms(
    run: Run, k: int, layer: str | None, channel: int | None
) -> dict[str, list[dict[str, Any]]]:
    arrays = {
        str(run.array(name).attrs["layer"]): name
        for name in run.array_names()
        if "layer" in run.array(name).attrs
    }
    if isinstance(run.spec, STestSpec):
        raise SpecError(
            f"{run.id} has no scores yet: infl submit influence --s-test {run.id}{o.for_runs(run.root)}"
        )
    if not arrays:
        raise SpecError(
            f"{run.id} has no gradient norms: infl submit grad-norms --layer all "
            f"--checkpoint {run.id}{o.for_runs(run.root)}"
        )
    if layer is not None and layer not in arrays:
        raise SpecError(f"{run.id} has no norms of layer {layer}; it has {', '.join(arrays)}")
    samples = _table(run, "samples")
    tables: dict[str, list[dict[str, Any]]] = {}
    for name, array in arrays.items():
        if layer not in (None, name):
            continue
        shape = run.array(array).shape[run.row_axis(array) + 1 :]
        if channel is not None and not (shape and channel < shape[0]):
            channels = f"channels 0 to {shape[0] - 1}" if shape else "one norm a sample"
            raise SpecError(f"layer {name} has no channel {channel}; it has {channels}")
        rows, values = largest_rows(run, array, k, channel=channel)
        described = samples.take(rows).to_pylist()
        tables[array] = [{**d, "norm": float(v)} for d, v in zip(described, values, strict=True)]
    return tables


def _print_norms(
    run: Run, tables: Mapping[str, Sequence[Mapping[str, Any]]], channel: int | None
) -> None:
    meaning = run.array(next(iter(tables))).attrs  # the same for all layers
    render.out.print(f"norms: {meaning['quantity']}; of {meaning['of']}")
    for array, table in tables.items():
        ranked_by = _ranked_by(run.array(array).ndim, run.row_axis(array), channel)
        render.out.print(f"\nlayer {run.array(array).attrs['layer']}: {ranked_by}")
        render.print_table(tuple(table[0]), [tuple(row.values()) for row in table])


def _ranked_by(ndim: int, row_axis: int, channel: int | None) -> str:
    trailing = ndim - row_axis - 1
    summed = {
        "checkpoints": row_axis > 0,
        "channels": trailing > 0 and channel is None,
        "kernel positions": trailing > 1,
    }
    over = " and ".join(axis for axis, there in summed.items() if there)
    return (
        "largest norms"
        + ("" if channel is None else f" of channel {channel}")
        + (f", summed over {over}" if over else "")
    )


def _table(run: Run, name: str) -> pa.Table:
    try:
        return run.read_table(name)
    except (FileNotFoundError, ValueError):  # ArrowInvalid is a ValueError
        raise StoreError(
            f"the table of {run.id}'s {name} is missing or damaged: infl verify {run.id}{o.for_runs(run.root)}"
        ) from None
