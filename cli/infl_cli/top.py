"""`infl top`: the samples with the largest gradient norms or scores."""

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
from influence_jobs.errors import SpecError, StoreError
from influence_jobs.store.find import find_run
from influence_jobs.store.folder import runs_folder
from influence_jobs.store.run import Run
from influence_jobs.store.status import read_status

_OF_SCORES, _OF_NORMS = "Of scores", "Of gradient norms"


def top(
    run: o.RunId,
    k: Annotated[int, typer.Option(min=1, help="How many samples.")] = 10,
    layer: Annotated[
        str | None,
        typer.Option(
            help="Layer: number, module or parameter name, or pattern, as for submit. By default"
            " norms are shown layer by layer, and scores are summed over layers."
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
            help="Of influence: the largest scores, the smallest, or both.",
            rich_help_panel=_OF_SCORES,
        ),
    ] = "both",
    png: Annotated[
        Path | None,
        typer.Option(
            help="Write a contact sheet to this file: the queries and their samples.",
            rich_help_panel=_OF_SCORES,
        ),
    ] = None,
    channel: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Rank by the norm of this channel, not by the sum over channels.",
            rich_help_panel=_OF_NORMS,
        ),
    ] = None,
    parquet: Annotated[
        Path | None,
        typer.Option(help="Write the table to this file; its first rows are printed too."),
    ] = None,
    runs: o.Runs = o.DEFAULT_RUNS,
    trust: o.Trust = False,
    json: o.Json = False,
) -> None:
    """Print the samples with the largest norms or scores, and their labels, or files and pixels."""
    found = find_run(runs_folder(runs), run)
    if read_status(found)["state"] != "done":
        raise StoreError(f"{found.id} is not done yet: {found.resume_command}")
    for file in (png, parquet):
        if file is not None and not file.parent.is_dir():
            raise SpecError(f"cannot write {file}: there is no folder {file.parent}")
    from influence_jobs.kinds import view_of

    view = view_of(found)
    scored = view.ranks == "scores"
    for name, given, fits in (
        ("--test", test is not None, scored),
        ("--side", side != "both", len(view.sides) > 1),
        ("--png", png is not None, scored),
        ("--channel", channel is not None, view.ranks == "norms"),
    ):
        if view.ranks and given and not fits:
            raise SpecError(f"{name} has no meaning for {found.id}: leave it out")
    tables = view.top(k, layer=layer, tests=test, side=side, channel=channel)
    if parquet:
        flat = [{"array": name, **row} for name, table in tables.items() for row in table]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(flat), buffer)
        parquet.write_bytes(buffer.getvalue())
        say(f"wrote {parquet}")
    if png:
        from influence_jobs.views.contact_sheet import contact_sheet
        from influence_jobs.views.sheets import score_rows

        rows_drawn = score_rows(view.task, tables[next(iter(tables))])
        contact_sheet(rows_drawn).savefig(png, format="png")
        say(f"wrote {png}")
    if json:
        render.print_json({"run": found.id, "top": tables})
    elif scored:
        _print_scores(found, next(iter(tables)), tables[next(iter(tables))], parquet)
    elif view.ranks == "norms":
        _print_norms(found, tables, channel, parquet)
    else:
        for array, table in tables.items():
            render.out.print(f"{array}: {found.array(array).attrs.get('quantity', array)}")
            _print_rows(table, parquet)


def _print_rows(rows: Sequence[Mapping[str, Any]], written: Path | None) -> None:
    render.print_table(tuple(rows[0]), [tuple(row.values()) for row in rows], written=written)


def _print_scores(
    run: Run, array: str, rows: Sequence[Mapping[str, Any]], written: Path | None
) -> None:
    from influence_jobs.views.ranking import by_query, place_words

    meaning = run.array(array).attrs
    render.out.print(f"scores: {meaning['quantity']}")
    render.out.print(f"sign: {meaning['sign']}; unit: {meaning['unit']}")
    queries = {row["query"]: row for row in run.read_table("queries").to_pylist()}
    for (test, region, side), block in by_query(rows).items():
        query = next(q for q in queries.values() if (q["test"], q["region"]) == (test, region))
        known = {
            name: value
            for name, value in query.items()
            if name not in ("query", "test", "quantity") and value is not None
        }
        which = ", ".join(
            place_words(value) if name == "region" else f"{name} {value}"
            for name, value in known.items()
        )
        render.out.print(f"\ntest {test}{f' ({which})' if which else ''}: {side}")
        hidden = ("test", "region", "side")
        _print_rows([{k: v for k, v in row.items() if k not in hidden} for row in block], written)


def _print_norms(
    run: Run,
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    channel: int | None,
    written: Path | None,
) -> None:
    from influence_jobs.views.ranking import summed_over

    meaning = run.array(next(iter(tables))).attrs  # the same for all layers
    render.out.print(f"norms: {meaning['quantity']}; of {meaning['of']}")
    for array, table in tables.items():
        of_channel = "" if channel is None else f" of channel {channel}"
        over = summed_over(run, array, channel=channel)
        render.out.print(
            f"\nlayer {run.array(array).attrs.get('layer', array)}: largest norms{of_channel}"
            f"{f', summed over {over}' if over else ''}"
        )
        _print_rows(table, written)
