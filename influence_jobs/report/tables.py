"""The tables of an experiment, from its run alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from influence_jobs.report import published
from influence_jobs.specs import AblationSpec, LdsSpec, PaperSpec, StabilitySpec
from influence_jobs.store.run import Run

MAX_SOLUTIONS = 50


@dataclass(frozen=True)
class Table:
    """A table as a person reads it; `note` says what to know about it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [f"**{self.title}**", "", f"| {' | '.join(self.columns)} |"]
        lines.append(f"|{'---|' * len(self.columns)}")
        lines += [f"| {' | '.join(map(cell_text, row))} |" for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else []), ""])


def cell_text(value: object) -> str:
    """A value as people read it: three digits of a fraction, thousands apart."""
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"
    return str(value)


def tables_of(run: Run) -> list[Table]:
    """The tables that a finished run has to show; none where it is no experiment."""
    spec = run.spec
    if isinstance(spec, PaperSpec):
        return [table for part in spec.parts for table in tables_of(Run(run.root, part))]
    if isinstance(spec, AblationSpec):
        return _ablation(run, spec)
    if isinstance(spec, StabilitySpec):
        return [_stability(run, rankings[0].name) for rankings in spec.methods] + [_summary(run)]
    if isinstance(spec, LdsSpec):
        return [_lds(run, spec)]
    return []


def solutions_table(run: Run) -> Table:
    """How the first s_test vectors of a finished run were found."""
    rows = run.read_table("solutions").to_pylist()
    more = f" The first {MAX_SOLUTIONS} of {len(rows)}." if len(rows) > MAX_SOLUTIONS else ""
    return Table(
        title="s_test vectors",
        columns=("query", "repeat", "lambda", "residual", "steps", "gradient equivalents"),
        rows=[
            (
                row["query"],
                row["repeat"],
                row["damping"],
                row["residual"],
                row["iterations"],
                row["gradient_equivalents"],
            )
            for row in rows[:MAX_SOLUTIONS]
        ],
        note="Residual: of (curvature + lambda I) x = gradient, relative to the gradient. Gradient equivalents: cost of "
        f"the query's whole block, in passes over the training set for one vector.{more}",
    )


def _ablation(run: Run, spec: AblationSpec) -> list[Table]:
    summary, quantity = run.read_table("summary").to_pylist(), spec.queries.quantity
    changes = Table(
        title=f"Change of the query's {quantity} when its top k samples are relabelled or removed: mean over queries",
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
                f"{row['changed_decisions']} of {row['decisions']}" if row["decisions"] else "-",
            )
            for row in summary
        ],
        note="Intervals: BCa bootstrap over queries; of few and skewed values they cover less than they say.",
    )
    groups: dict[tuple[str, str, int], list[str]] = {}
    for row in run.read_table("results").to_pylist():
        if row["decision"] != row["decision_before"]:
            seed = f" (seed {row['seed']})" if len(spec.seeds) > 1 else ""
            text = f"{row['test']}: {row['decision_before']} to {row['decision']}{seed}"
            groups.setdefault((row["mode"], row["by"], row["k"]), []).append(text)
    if not groups:
        return [changes]
    decisions = Table(
        title="Decisions that changed, by test id",
        columns=("mode", "by", "k", "changed"),
        rows=[(*group, "; ".join(texts)) for group, texts in groups.items()],
    )
    return [changes, decisions]


def _stability(run: Run, method: str) -> Table:
    rows = [row for row in run.read_table("results").to_pylist() if row["method"] == method]
    tests = list(dict.fromkeys(row["test"] for row in rows))
    queries = list(dict.fromkeys(row["query"] for row in rows))
    retrainings = list(dict.fromkeys(row["retraining"] for row in rows))
    found = {(row["retraining"], row["query"]): row["overlap"] for row in rows}
    shares = np.array([[found[r, q] for q in queries] for r in retrainings])
    top = rows[0]["top"]
    title = (
        f"Stability of {method}: share of the top {top} also found by retrainings from other seeds"
    )
    theirs, note = None, ""
    if _is_the_reports(run) and method in published.STABILITY and top == published.TOP:
        theirs = published.STABILITY[method]
        title = f"Table {published.TABLES[method]}. {title}"
        note = "In brackets: the report's."
        if method != "attribution":
            note += f" {published.OTHER_QUANTITY}"
    lines: list[tuple[object, ...]] = []
    for i, retraining in enumerate(retrainings):
        beside = theirs[i] if theirs is not None and i < len(theirs) else None
        lines.append((f"retraining {retraining}", *_percents(shares[i], beside)))
    beside = theirs.mean(0) if theirs is not None else None
    lines.append(("mean", *_percents(shares.mean(0), beside)))
    names = [str(test) for test in tests] if len(tests) == len(queries) else map(str, queries)
    return Table(title, ("test", *names), lines, note)


def _is_the_reports(run: Run) -> bool:
    """Whether a run is of the report's test images, classifier and training set."""
    spec = run.spec
    assert isinstance(spec, StabilitySpec)
    tests = tuple(query.test for query in spec.queries.items)
    return (
        tests == published.TESTS
        and spec.task.name == "mnist"
        and spec.task.options.get("limit") is None
    )


def _percents(ours: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64] | None) -> list[str]:
    """Shares in per cent, the report's in brackets."""
    if theirs is None:
        return [f"{100 * share:.0f}%" for share in ours]
    return [f"{100 * a:.0f}% ({100 * b:.0f}%)" for a, b in zip(ours, theirs, strict=True)]


def _summary(run: Run) -> Table:
    return Table(
        title="Stability: mean over queries",
        columns=("method", "overlap", "95 % from", "to", "least", "most", "rank correlation"),
        rows=[tuple(row.values()) for row in run.read_table("summary").to_pylist()],
    )


def _lds(run: Run, spec: LdsSpec) -> Table:
    rows = sorted(run.read_table("summary").to_pylist(), key=_by_mean)
    seeds, quantity = len(spec.seeds), spec.queries.quantity
    return Table(
        title=f"Linear datamodeling score: {spec.subsets} subsets of {spec.fraction:g} of the samples, "
        f"{seeds} training{'s' * (seeds > 1)} each",
        columns=("method", "mean LDS", "95 % from", "to", "queries"),
        rows=[tuple(row.values()) for row in rows],
        note=f"Spearman's correlation of summed scores and each query's {quantity} over subsets, mean over queries; "
        f"intervals: percentile bootstrap over subsets. Positive: samples that a method ranks first lower the {quantity}.",
    )


def _by_mean(row: Mapping[str, Any]) -> tuple[bool, float]:
    return bool(np.isnan(row["mean_lds"])), -row["mean_lds"]
