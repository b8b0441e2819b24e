"""The view of an ablation."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from influence_jobs.kinds.ablation.spec import AblationSpec
from influence_jobs.views.base import Say, View
from influence_jobs.views.ranking import named
from influence_jobs.views.table import Table

if TYPE_CHECKING:
    from influence_jobs.views.figure import Shown


class AblationView(View[AblationSpec]):
    """The change of the queries after their top samples are removed or relabelled."""

    @property
    def title(self) -> str:
        return f"Ablation ({self.spec.task.slug})"

    def certainty(self) -> list[str]:
        queries, seeds = len(self.spec.queries.items), len(self.spec.seeds)
        said = [f"Mean over {queries} queries and {seeds} seed(s)."]
        if self.spec.same_run:
            said.append(
                "Samples are masked: order, batches and random numbers are those of the unchanged "
                "training, and batch statistics still have the samples in them."
            )
        return said

    def next_step(self) -> str:
        return f"infl report {self.run.id}{self.more}"

    def tables(self) -> list[Table]:
        return [
            self._changes(),
            *(table for table in (self._falls(), self._decisions()) if table.rows),
        ]

    def _falls(self) -> Table:
        summary = self.run.read_table("summary").to_pylist()
        names = ("psnr_fall", "psnr_fall_elsewhere", "psnr_fall_beyond")
        return Table(
            title="Fall of the PSNR in dB, of the query and of the other queries of its image",
            columns=(
                "mode",
                "by",
                "k",
                *(
                    column
                    for name in ("fall", "elsewhere", "difference")
                    for column in (name, "95 % from", "to")
                ),
            ),
            rows=[
                (
                    *(row[name] for name in ("mode", "by", "k")),
                    *(
                        row.get(column)
                        for name in names
                        for column in (f"mean_{name}", f"{name}_low", f"{name}_high")
                    ),
                )
                for row in summary
                if row.get("mean_psnr_fall") is not None
            ],
            note="A method that finds the samples that matter for a region, and not just samples "
            "that matter, makes it fall more there than elsewhere.",
        )

    def _changes(self) -> Table:
        summary, quantity = self.run.read_table("summary").to_pylist(), self.spec.queries.quantity
        return Table(
            title=f"Change of the query's {quantity} when its top k samples are relabelled or "
            "removed: mean over queries",
            columns=(
                "mode",
                "by",
                "k",
                "change",
                "95 % from",
                "to",
                quantity,
                "before",
                "changed decisions",
            ),
            rows=[
                (
                    row["mode"],
                    row["by"],
                    row["k"],
                    row["mean_change"],
                    row["low"],
                    row["high"],
                    row["mean_loss"],
                    row["mean_loss_before"],
                    f"{row['changed_decisions']} of {row['decisions']}"
                    if row["decisions"]
                    else "-",
                )
                for row in summary
            ],
            note="Intervals: BCa bootstrap over queries; with few and skewed values they cover "
            "less than 95 %. One query has none.",
        )

    def _decisions(self) -> Table:
        groups: dict[tuple[str, str, int], list[str]] = {}
        for row in self.run.read_table("results").to_pylist():
            if row["decision"] != row["decision_before"]:
                seed = f" (seed {row['seed']})" if len(self.spec.seeds) > 1 else ""
                text = f"{row['test']}: {row['decision_before']} to {row['decision']}{seed}"
                groups.setdefault((row["mode"], row["by"], row["k"]), []).append(text)
        return Table(
            title="Decisions that changed, by test id",
            columns=("mode", "by", "k", "changed"),
            rows=[(*group, "; ".join(texts)) for group, texts in groups.items()],
            note="From that of the unchanged training of the same seed.",
        )

    def figures(self, say: Say) -> "Iterator[Shown]":
        from influence_jobs.views.curves import ablation_panels
        from influence_jobs.views.figure import Shown, file_name

        rows, quantity = self.run.read_table("summary").to_pylist(), self.spec.queries.quantity
        for by in dict.fromkeys(row["by"] for row in rows):
            if by == "random":
                continue
            mine = [row for row in rows if row["by"] in (by, "random")]
            yield Shown(
                f"ablation-{file_name(by)}",
                f"Change of the queries' {quantity} when their top k by {named(by, quantity)} are "
                "manipulated",
                ablation_seen(mine, by),
                pa.Table.from_pylist(mine),
                panels=ablation_panels(rows, by, quantity),
            )


def ablation_seen(rows: Sequence[Mapping[str, Any]], by: str) -> str:
    """The caption of an ablation figure: one method compared with random samples."""
    said = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        largest = max(row["k"] for row in rows if row["mode"] == mode)
        found = {row["by"]: row for row in rows if row["mode"] == mode and row["k"] == largest}
        verb = {"relabel": "relabelled", "remove": "removed"}[mode]
        text = f"With {largest:,} samples {verb} the mean changes by {found[by]['mean_change']:.3g}"
        if "random" in found:
            text += f", with random ones by {found['random']['mean_change']:.3g}"
        said.append(f"{text}.")
    return (
        " ".join(said)
        + " Bands: 95 % intervals over queries. Numbers at points: changed decisions."
    )
