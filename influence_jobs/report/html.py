"""The report: one HTML file that explains runs, with its figures as PNG and Parquet beside it."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from influence_jobs.errors import SpecError, StoreError
from influence_jobs.kinds import view_of
from influence_jobs.report.cells import (
    Sounds,
    all_columns,
    columns_of,
    differs,
    pieces_of,
    unmarked,
)
from influence_jobs.report.made import Made, made, needed
from influence_jobs.specs.base import Spec
from influence_jobs.store import layout
from influence_jobs.store.files import LocalFiles
from influence_jobs.store.run import Run
from influence_jobs.store.status import read_status
from influence_jobs.tasks.seen import Picture, Wave
from influence_jobs.terms import html_table
from influence_jobs.views.base import View
from influence_jobs.views.curves import Panel, chart
from influence_jobs.views.figure import Shown
from influence_jobs.views.table import Table, cell_text

THUMBNAIL = 320  # pixels; larger pictures are scaled down


@dataclass(frozen=True)
class Section:
    """The section of the report about one run.

    Attributes:
        request: The request in words, as pairs of name and value.
        notes: What cannot be shown, with the reason.
        certainty: How certain the result is, as a list of sentences.
        made: How the run and the runs it depends on were made, the nearest first.
    """

    run: str
    title: str
    request: list[tuple[str, str]]
    figures: list[Shown]
    tables: list[Table]
    notes: list[str]
    certainty: list[str]
    made: list[Made]


def sections_of(runs: Sequence[Run]) -> list[Section]:
    """A section for each run; for a set of runs, one for each member.

    Raises:
        StoreError: A run is not finished.
    """
    found: dict[str, Section] = {}
    for run in runs:
        if (state := read_status(run)["state"]) != "done":
            raise StoreError(f"{run.id} is not finished ({state}): {run.resume_command}")
        whole = view_of(run)
        for member in whole.members():
            if member.id not in found:
                found[member.id] = _section(view_of(member), whole)
    return list(found.values())


def _section(view: View[Any], whole: View[Any]) -> Section:
    notes: list[str] = []
    run = view.run
    return Section(
        run=run.id,
        title=view.title,
        request=run.spec.request_in_words(),
        figures=whole.member_figures(view, notes.append),
        tables=view.tables(),
        notes=notes,
        certainty=view.certainty(),
        made=[made(Run(run.root, spec)) for spec in needed(run.spec) if _is_there(run.root, spec)],
    )


def _is_there(root: str, spec: Spec) -> bool:
    """Whether a spec has a run; the recipe of retrainings may have none."""
    return layout.SPEC in Run(root, spec).files.names("")


def render_report(title: str, sections: Sequence[Section]) -> str:
    """Render one self-contained HTML page."""
    template = environment().get_template("report.html.j2")
    sounds = Sounds()
    return template.render(
        title=title,
        sections=sections,
        sound=lambda cell: sound_uri(cell.content) if sounds.fits(cell.content) else None,
    )


def write_report(title: str, sections: Sequence[Section], folder: Path) -> list[Path]:
    """Write `report.html`, `tables.md` if there are tables, and a PNG and Parquet of each figure.

    Returns:
        The files.

    Raises:
        SpecError: The folder, or a folder above it, is a file or a link to nothing.
        StoreError: What is to be written is a link.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        found = (path for path in (folder, *folder.parents) if path.is_symlink() or path.exists())
        file = next(path for path in found if not path.is_dir())
        what = "a file" if file.exists() else "a link to nothing"
        raise SpecError(
            f"cannot write a report to {folder}: {file} is {what}, name a folder"
        ) from None
    files = LocalFiles(folder)  # which follow no link: the folder may lie in a stranger's run
    written: list[Path] = []

    def write(name: str, data: bytes) -> None:
        files.write(name, data)
        written.append(folder / name)

    write("report.html", render_report(title, sections).encode())
    if tables := [table for section in sections for table in section.tables]:
        ids = ", ".join(f"`{section.run}`" for section in sections if section.tables)
        text = "\n".join([f"Runs: {ids}\n", *(table.markdown() for table in tables)])
        write("tables.md", text.encode())
    for section in sections:
        for shown in section.figures:
            drawn, data = io.BytesIO(), io.BytesIO()
            shown.draw().savefig(drawn, format="png")
            pq.write_table(shown.data, data)
            name = f"figures/{section.run}/{shown.name}"
            write(f"{name}.png", drawn.getvalue())
            write(f"{name}.parquet", data.getvalue())
    return written


@cache
def environment() -> Environment:
    """Jinja2 with our templates. Unknown names are errors, and text is escaped."""
    jinja = Environment(
        loader=PackageLoader("influence_jobs.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters |= {
        "picture": picture_uri,
        "chart": chart_uri,
        "parquet": parquet_uri,
        "cell": cell_text,
        "pieces": pieces_of,
        "unmarked": unmarked,
        "columns": columns_of,
        "all_columns": all_columns,
        "differs": differs,
    }
    return jinja


def picture_uri(picture: Picture) -> str:
    """A picture as a data URI: a small one as PNG, a photograph as JPEG of at most 320 pixels."""
    image, buffer = Image.fromarray(picture), io.BytesIO()
    if max(image.size) <= THUMBNAIL // 2:
        image.save(buffer, "PNG", optimize=True)
        return _data_uri("image/png", buffer)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(buffer, "JPEG", quality=85)
    return _data_uri("image/jpeg", buffer)


def chart_uri(panel: Panel, dark: bool) -> str:
    """A panel as a data URI of a PNG, in ink for a light or a dark page."""
    buffer = io.BytesIO()
    chart([panel], dark=dark).savefig(buffer, format="png", transparent=True)
    return _data_uri("image/png", buffer)


def parquet_uri(table: pa.Table) -> str:
    """A table as a data URI of a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return _data_uri("application/vnd.apache.parquet", buffer)


def sound_uri(sound: Wave) -> str:
    """A sound as a data URI of a WAV file."""
    return _data_uri("audio/wav", io.BytesIO(sound.file()))


def _data_uri(kind: str, buffer: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _dimensions(array: "zarr.Array[Any]") -> Sequence[str]:
    names = array.metadata.to_dict().get("dimension_names")
    if not isinstance(names, (list, tuple)):  # of a stranger
        names = [f"axis {axis}" for axis in range(array.ndim)]
    return [str(name) for name in names]


def array_rows(run: Run) -> list[tuple[str, str, str, str]]:
    """Name, shape with the names of its axes, type and unit of each array of a run."""
    arrays = {name: run.array(name) for name in run.array_names()}
    return [
        (
            name,
            " x ".join(
                f"{length:,} {dim}"
                for length, dim in zip(array.shape, _dimensions(array), strict=True)
            ),
            str(array.dtype),
            str(array.attrs.get("unit", "")),
        )
        for name, array in arrays.items()
    ]


def results_html(run: Run) -> str:
    """What a notebook shows of a run: state, results, arrays, and on demand its request."""
    template, rows = environment().get_template("results.html.j2"), array_rows(run)
    view, state = view_of(run), read_status(run)["state"]
    return template.render(
        title=view.title,
        run=run.id,
        state=state,
        certainty=view.certainty() if state == "done" else (),
        results=[
            (
                table.title,
                html_table([[*map(cell_text, row)] for row in table.rows], table.columns),
                table.note,
            )
            for table in (view.tables() if state == "done" else ())
        ],
        request=html_table(run.spec.request_in_words()),
        arrays=html_table(rows, ("array", "shape", "type", "unit")) if rows else "",
        tables=run.table_names(),
    )
