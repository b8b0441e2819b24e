"""What views say of runs, against the stored arrays and tables."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from digits import DigitsTask
from scipy import stats

from infl_cluster.driver import drive
from infl_cluster.inline import InlineBackend
from influence_jobs.kinds import view_of
from influence_jobs.kinds.influence.spec import InfluenceSpec
from influence_jobs.kinds.paper.spec import PaperSpec
from influence_jobs.kinds.s_test import view as s_test_view
from influence_jobs.kinds.s_test.spec import STestSpec
from influence_jobs.report.html import sections_of
from influence_jobs.specs.queries import Queries, Query
from influence_jobs.specs.solvers import IdentitySettings
from influence_jobs.store.run import Run
from influence_jobs.tasks.published import OTHER_QUANTITY, Published
from influence_jobs.views.table import Table


def table(run: Run, name: str) -> list[dict[str, Any]]:
    return run.read_table(name).to_pylist()


def said_of(run: Run, pattern: str) -> tuple[str, ...]:
    """What stands in the places of a pattern in the one line that a view says of its certainty."""
    (line,) = view_of(run).certainty()
    found = re.fullmatch(pattern, line)
    assert found, line
    return found.groups()


# -- how sure a result is -------------------------------------------------------------------------


def test_a_stability_run_has_the_intervals_that_it_names(runs_of_all_kinds) -> None:
    run = runs_of_all_kinds.stability
    level, method, over = said_of(
        run, r"(\d+) % intervals of the means by (\w+) bootstrap over (\w+)\."
    )
    assert over == "queries"
    overlaps = np.array([row["overlap"] for row in table(run, "results")])
    assert len(overlaps) == 3  # one retraining: a value a query
    expected = stats.bootstrap(
        (overlaps,),
        np.mean,
        confidence_level=int(level) / 100,
        method=method,
        rng=np.random.default_rng(0),
    ).confidence_interval
    (summary,) = table(run, "summary")
    assert np.ptp(overlaps) > 0
    assert (summary["low"], summary["high"]) == pytest.approx((expected.low, expected.high))


def test_an_ablation_counts_its_queries_and_seeds(runs_of_all_kinds) -> None:
    run = runs_of_all_kinds.ablation
    counts = said_of(run, r"Mean over (\d+) queries and (\d+) seed\(s\)\.")
    rows = table(run, "results")
    assert [int(count) for count in counts] == [
        len({row["query"] for row in rows}),
        len({row["seed"] for row in rows}),
    ]


def test_an_lds_run_counts_its_subsets_and_trainings(runs_of_all_kinds) -> None:
    run = runs_of_all_kinds.lds
    subsets, trainings = map(int, said_of(run, r"(\d+) subsets, (\d+) training\(s\) each\."))
    assert subsets == len({row["subset"] for row in table(run, "losses")})
    assert subsets * trainings == run.array("losses").shape[0]


def test_norms_name_their_precision_and_trainings_their_seed(runs_of_all_kinds) -> None:
    kinds = runs_of_all_kinds
    for precision in ("float32", "float64"):
        run = Run(kinds.norms.root, kinds.norms.spec)
        run.spec = run.spec.model_copy(update={"precision": precision})
        assert said_of(run, r"Computed in (\w+) and compared with plain autograd on .*") == (
            precision,
        )
    for seed in (0, 7):
        run = Run(kinds.train.root, kinds.train.spec)
        run.spec = run.spec.model_copy(update={"seed": seed})
        assert said_of(run, r"One training, from seed (\d+); .*") == (str(seed),)


def test_influence_without_curvature_says_so(runs_of_all_kinds) -> None:
    kinds = runs_of_all_kinds
    for run in (kinds.s_test, kinds.influence):
        assert said_of(run, "no curvature: s_test is the query's (gradient)")
    assert kinds.s_test.spec.solver.name == "identity"


# -- tables ---------------------------------------------------------------------------------------


def test_the_table_of_an_lds_run_has_the_stored_summary(runs_of_all_kinds) -> None:
    (shown,) = view_of(runs_of_all_kinds.lds).tables()
    (row,) = table(runs_of_all_kinds.lds, "summary")
    expected = {
        "method": row["method"],
        "mean LDS": row["mean_lds"],
        "95 % from": row["low"],
        "to": row["high"],
        "queries": row["queries"],
    }
    assert dict(zip(shown.columns, shown.rows[0], strict=True)) == pytest.approx(
        expected, nan_ok=True
    )
    assert len(shown.rows) == 1
    assert 0 < expected["queries"] <= 3


def test_a_column_more_in_a_stored_table_moves_no_cell(
    runs_of_all_kinds, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown() -> dict[str, str]:
        views = {name: view_of(run) for name, run in vars(runs_of_all_kinds).items()}
        # As text: NaN is not equal to itself.
        return {name: repr((view.tables(), view.certainty())) for name, view in views.items()}

    before = shown()
    read = Run.read_table

    def wider(self: Run, name: str) -> pa.Table:
        found = read(self, name)
        return found.add_column(0, "more", pa.array(["more"] * found.num_rows))

    monkeypatch.setattr(Run, "read_table", wider)
    assert shown() == before


def cells(table: Table) -> list[dict[str, object]]:
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def test_the_tables_of_an_ablation_are_its_summary_and_the_decisions_that_changed(
    runs_of_all_kinds,
) -> None:
    run = runs_of_all_kinds.ablation
    changes, decisions = view_of(run).tables()
    results, summary = table(run, "results"), table(run, "summary")
    assert len(changes.rows) == len(summary) == 2 * 2 * 2
    for shown, row in zip(cells(changes), summary, strict=True):
        cell = [r for r in results if all(r[name] == row[name] for name in ("mode", "by", "k"))]
        changed = [r for r in cell if r["decision"] != r["decision_before"]]
        assert shown == pytest.approx(
            {
                **{name: row[name] for name in ("mode", "by", "k")},
                "change": np.mean([r["loss"] - r["loss_before"] for r in cell]),
                "95 % from": row["low"],
                "to": row["high"],
                "loss": np.mean([r["loss"] for r in cell]),
                "before": np.mean([r["loss_before"] for r in cell]),
                "changed decisions": f"{len(changed)} of 3",
            },
            nan_ok=True,
        )
    texts = [text for row in cells(decisions) for text in str(row["changed"]).split("; ")]
    assert texts == [
        f"{r['test']}: {r['decision_before']} to {r['decision']}"
        for r in results
        if r["decision"] != r["decision_before"]
    ]
    assert texts


def test_an_ablation_of_several_seeds_says_which_decision_is_of_which(runs_of_all_kinds) -> None:
    run = Run(runs_of_all_kinds.ablation.root, runs_of_all_kinds.ablation.spec)
    run.spec = run.spec.model_copy(update={"seeds": (0, 1)})
    rows = cells(view_of(run).tables()[1])
    assert all(
        text.endswith(" (seed 0)") for row in rows for text in str(row["changed"]).split("; ")
    )


def test_the_caption_of_an_ablation_tells_what_the_largest_k_does(runs_of_all_kinds) -> None:
    run = runs_of_all_kinds.ablation
    (shown,) = view_of(run).figures(print)
    changes = {(r["mode"], r["by"], r["k"]): r["mean_change"] for r in table(run, "summary")}
    for mode, verb in (("relabel", "relabelled"), ("remove", "removed")):
        ours, chance = (changes[mode, by, 300] for by in ("helpful", "random"))
        assert (
            f"With 300 samples {verb} the mean changes by {ours:.3g}, with random ones by "
            f"{chance:.3g}." in shown.caption
        )
    assert shown.data.num_rows == len(changes)


def test_shares_found_again_stand_beside_the_published_ones(
    runs_of_all_kinds, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs_of_all_kinds.stability
    overlaps = [row["overlap"] for row in table(run, "results")]
    percent = [f"{100 * share:.0f}%" for share in overlaps]
    plain, summary = view_of(run).tables()
    assert plain.title.startswith("Stability of helpful: share of the top 20 also found")
    assert plain.columns == ("test", "5", "0", "111")
    assert plain.rows == [("retraining 1", *percent), ("mean", *percent)]
    (row,) = table(run, "summary")
    assert summary.rows == [
        (
            "helpful",
            pytest.approx(np.mean(overlaps)),
            row["low"],
            row["high"],
            min(overlaps),
            max(overlaps),
            row["mean_rank_correlation"],
        )
    ]
    known = Published(
        section="4.1",
        quick_epochs=1,
        tests=(5, 0, 111),
        top=20,
        stability={"helpful": np.array([[0.5, 0.25, 1.0], [0.7, 0.75, 0.0]])},
        stability_tables={"helpful": "4.2"},
    )
    monkeypatch.setattr(DigitsTask, "published", known)
    beside = view_of(run).tables()[0]
    assert beside.title == f"Table 4.2. {plain.title}"
    theirs = [["50%", "25%", "100%"], ["60%", "50%", "50%"]]
    assert [row[1:] for row in beside.rows] == [
        tuple(f"{a} ({b})" for a, b in zip(percent, line, strict=True)) for line in theirs
    ]
    assert OTHER_QUANTITY in beside.note
    # Another head, other tests, or a part of the training set: the published numbers are not of it.
    for other in ({"top": 10}, {"tests": (5, 0)}):
        monkeypatch.setattr(DigitsTask, "published", replace(known, **other))
        assert view_of(run).tables()[0] == plain
    monkeypatch.setattr(DigitsTask, "published", known)
    part = Run(run.root, run.spec)
    options = {"task": run.spec.task.model_copy(update={"options": {"limit": 100}})}
    part.spec = run.spec.model_copy(update=options)
    assert view_of(part).tables()[0].rows == plain.rows


def test_a_long_table_of_vectors_is_cut_and_says_so(
    runs_of_all_kinds, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs_of_all_kinds.s_test
    (whole,) = view_of(run).tables()
    rows = table(run, "solutions")
    assert [row["query"] for row in cells(whole)] == [row["query"] for row in rows] == [0, 1, 2]
    assert [row["lambda"] for row in cells(whole)] == [row["damping"] for row in rows]
    assert [row["steps"] for row in cells(whole)] == [row["iterations"] for row in rows]
    assert "The first" not in whole.note
    monkeypatch.setattr(s_test_view, "MAX_SOLUTIONS", 3)
    assert view_of(run).tables() == [whole]
    monkeypatch.setattr(s_test_view, "MAX_SOLUTIONS", 2)
    (cut,) = view_of(run).tables()
    assert cut.rows == whole.rows[:2]
    assert cut.note == f"{whole.note} The first 2 of 3."


# -- figures -------------------------------------------------------------------------------------


def test_figures_of_a_denoiser_bear_the_research_reports_numbers(denoiser_runs) -> None:
    norms, attribution = denoiser_runs
    spec = attribution.spec
    s_test = STestSpec(
        task=spec.task,
        checkpoint=spec.checkpoint,
        modules=("main.29",),
        queries=Queries(items=(Query(test=0),)),
        solver=IdentitySettings(),
    )
    parts = {
        "4.11": spec,
        "4.12": InfluenceSpec(task=spec.task, s_tests=(s_test,)),
        "4.14": spec.model_copy(update={"exclude_norm_above": 1e9}),
        "4.15": spec.model_copy(update={"normalize": True}),
        "4.16": spec.model_copy(update={"normalize": True, "layers": ("main.26",)}),
    }
    paper = PaperSpec(task=spec.task, parts=(norms.spec, *parts.values()))
    run = Run.create(norms.root, paper)
    drive(run.root, run.id, InlineBackend())
    first, *others = sections_of([run])
    assert {one.name: one.number for one in first.figures if one.number} == {
        "norms-main-29": "4.13"
    }
    assert [{one.number for one in section.figures} for section in others] == [{n} for n in parts]
    assert [section.run for section in others] == [part.run_id for part in parts.values()]


def test_a_paper_run_is_shown_as_its_parts(runs_of_all_kinds) -> None:
    view = view_of(runs_of_all_kinds.paper)
    assert [part.id for part in view.members()] == [part.run_id for part in view.spec.parts]
    assert len(view.tables()) == sum(len(view_of(part).tables()) for part in view.members())
