"""`infl figures`: what a run has to show, as PNG pictures and Markdown tables."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infl_cli import options as o
from infl_cli.render import say
from infl_cluster.status import read_status
from influence_jobs.errors import SpecError
from influence_jobs.specs import (
    AblationSpec,
    AttributionSpec,
    GradNormsSpec,
    LdsSpec,
    PaperSpec,
    ScoresSpec,
    Spec,
    TrainSpec,
)
from influence_jobs.store.find import find_run
from influence_jobs.store.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OUTLIERS = 5.0  # the report's limit of a sample's total norm
PER_QUERY = 5  # samples in a line of a contact sheet


def figures(
    run: o.RunId,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write to; by default `figures` in the run's own folder."),
    ] = None,
    runs: o.Runs = o.DEFAULT_RUNS,
) -> None:
    """Draw what a run has to show: PNG pictures, and its tables as Markdown."""
    found = find_run(o.runs_folder(runs), run)
    if read_status(found)["state"] != "done":
        raise SpecError(
            f"{found.id} is not finished: infl resume {found.id}{o.for_runs(found.root)}"
        )
    if out is None and "://" in found.root:
        raise SpecError(f"name a folder on this machine: infl figures {found.id} --out DIR")
    for path in write_figures(found, out or figures_folder(found)):
        say(f"wrote {path}")


def figures_folder(run: Run) -> Path:
    """Where the figures of a run on this machine lie by default."""
    return Path(run.root) / run.id / "figures"


def write_figures(run: Run, folder: Path) -> list[Path]:
    """Write all figures and tables of a finished run; returns the files.

    Raises:
        SpecError: It has none.
    """
    from influence_jobs.report.tables import tables_of

    drawn = dict(figures_of(run))
    tables = tables_of(run)
    if not drawn and not tables:
        raise SpecError(f"{run.id} has no figures: infl top {run.id}{o.for_runs(run.root)}")
    if folder.exists() and not folder.is_dir():
        raise SpecError(f"cannot write figures to {folder}: it is a file, name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in drawn.items():
        path = folder / f"{name}.png"
        figure.savefig(path, format="png")
        written.append(path)
    if tables:
        path = folder / "tables.md"
        ids = sorted({part.id for part in _parts(run)})
        origin = f"Runs: {', '.join(f'`{i}`' for i in ids)}\n"
        path.write_text("\n".join([origin, *(table.markdown() for table in tables)]))
        written.append(path)
    return written


def _parts(run: Run) -> list[Run]:
    if isinstance(run.spec, PaperSpec):
        return [Run(run.root, part) for part in run.spec.parts]
    return [run]


def figures_of(run: Run) -> "Iterator[tuple[str, Figure]]":
    """The pictures of a finished run, by name."""
    for part in _parts(run):
        spec = part.spec
        if isinstance(spec, AblationSpec):
            yield from _of_ablation(part, spec)
        elif isinstance(spec, LdsSpec):
            from influence_jobs.report.curves import lds_figure

            yield "lds", lds_figure(part.read_table("summary").to_pylist())
        elif isinstance(spec, ScoresSpec):
            yield from _of_scores(part)
        elif isinstance(spec, (GradNormsSpec, TrainSpec)):
            yield from _of_norms(part)


def _of_ablation(run: Run, spec: AblationSpec) -> "Iterator[tuple[str, Figure]]":
    from influence_jobs.report.curves import ablation_figure

    summary = run.read_table("summary").to_pylist()
    for by in dict.fromkeys(row["by"] for row in summary):
        if by != "random":
            name = re.sub(r"[^\w.+-]+", "-", by)
            yield f"ablation-{name}", ablation_figure(summary, by, spec.queries.quantity)


def _title(spec: Spec) -> str:
    """A name for a file that tells one set of scores from another."""
    words = [spec.kind]
    if isinstance(spec, AttributionSpec):
        words += [layer.replace(".", "-") for layer in spec.layers]
        words += ["normalized"] * spec.normalize
        if spec.exclude_norm_above is not None:
            words.append(f"up-to-{spec.exclude_norm_above:g}")
    return "-".join([*words, spec.hash[:6]])


def _of_scores(run: Run) -> "Iterator[tuple[str, Figure]]":
    from infl_cli.contact_sheets import sheet
    from infl_cli.top import ranked_scores

    try:
        ranked = ranked_scores(run, PER_QUERY, None, None, "both")
    except SpecError as error:  # such as all samples being beyond the limit of norms
        say(f"no picture: {error}")
        return
    yield f"top-{_title(run.spec)}", sheet(run, ranked)


def _of_norms(run: Run) -> "Iterator[tuple[str, Figure]]":
    from influence_jobs.report.curves import norms_figure
    from influence_jobs.store.top import row_totals

    for name in run.array_names():
        layer = str(run.array(name).attrs["layer"])
        yield (
            f"norms-{layer.replace('.', '-')}",
            norms_figure(row_totals(run, name), OUTLIERS, layer),
        )
