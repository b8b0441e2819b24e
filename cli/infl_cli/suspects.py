"""`infl suspects`: the samples whose labels are most likely wrong, with the evidence."""

import io
from pathlib import Path
from typing import Annotated, Literal

import pyarrow as pa
import pyarrow.csv
import typer

from infl_cli import options as o
from infl_cli import render
from infl_cli.render import say
from influence_jobs.errors import SpecError, StoreError
from influence_jobs.store.find import find_run
from influence_jobs.store.folder import runs_folder
from influence_jobs.store.status import read_status


def suspects(
    run: o.RunId,
    k: Annotated[int, typer.Option(min=1, help="How many samples.")] = 20,
    by: Annotated[
        Literal["self-influence", "loss"],
        typer.Option(
            help="What they are ranked by; the largest come first. The loss found more wrong "
            "labels where both were tried (docs/use-cases/mislabelled.md)."
        ),
    ] = "loss",
    csv: Annotated[
        Path | None,
        typer.Option(help="Write the table to this file; its first rows are printed too."),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Write the samples' pictures to this file.")
    ] = None,
    runs: o.Runs = o.DEFAULT_RUNS,
    trust: o.Trust = False,
    json: o.Json = False,
) -> None:
    """Print the samples whose labels are most likely wrong, of a self-influence run.

    Each has its label, the class that the model finds most likely and its probability, its loss and
    its self-influence. They are suspects: rare and hard samples are among them, so look at them.
    """
    found = find_run(runs_folder(runs), run)
    if found.spec.kind != "self-influence":
        raise SpecError(
            f"{found.id} has no predictions beside its labels: run infl submit self-influence with "
            "the same --checkpoint, and name that run"
        )
    if read_status(found)["state"] != "done":
        raise StoreError(f"{found.id} is not done yet: {found.resume_command}")
    for file in (csv, png):
        if file is not None and not file.parent.is_dir():
            raise SpecError(f"cannot write {file}: there is no folder {file.parent}")
        if file is not None and file.is_dir():
            raise SpecError(f"cannot write {file}: it is a folder, so name a file in it")
    from influence_jobs.kinds.self_influence.view import SelfInfluenceView

    view = SelfInfluenceView(found)
    rows = view.suspects(k, by=by)
    if csv:
        buffer = io.BytesIO()
        pyarrow.csv.write_csv(pa.Table.from_pylist(rows), buffer)
        csv.write_bytes(buffer.getvalue())
        say(f"wrote {csv}")
    if png:
        from influence_jobs.views.contact_sheet import contact_sheet
        from influence_jobs.views.sheets import plain_rows

        contact_sheet(plain_rows(view.task, rows)).savefig(png, format="png")
        say(f"wrote {png}")
    if json:
        render.print_json({"run": found.id, "by": by, "suspects": rows})
        return
    other = sum(row["predicted"] != row["label"] for row in rows)
    render.out.print(
        f"{len(rows)} samples with the largest {by}; for {other} of them the model finds another "
        "class likelier than the label"
    )
    render.print_table(tuple(rows[0]), [tuple(row.values()) for row in rows], written=csv)
