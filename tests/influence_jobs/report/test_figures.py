"""Figures: captions are true, and only what is shown is computed."""

import shutil
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from zarr.storage import LocalStore

from infl_cluster.driver import drive
from infl_cluster.inline import InlineBackend
from influence_jobs import open_run
from influence_jobs.kinds import view_of
from influence_jobs.kinds.baseline.spec import BaselineSpec
from influence_jobs.specs.queries import Queries, Query
from influence_jobs.specs.rankings import Ranking
from influence_jobs.store.run import Run
from influence_jobs.views import scores
from influence_jobs.views.figure import Shown


def shown_of(run: Run) -> dict[str, Shown]:
    said: list[str] = []
    found = {one.name: one for one in view_of(run).figures(said.append)}
    assert said == []
    return found


def test_pictures_are_made_of_what_is_shown_alone(runs_of_all_kinds, monkeypatch) -> None:
    from digits import DigitsTask

    expected = shown_of(runs_of_all_kinds.influence)["top-helpful"]
    asked, pictures = [], DigitsTask.pictures
    monkeypatch.setattr(scores, "MAX_ROWS", 2)
    monkeypatch.setattr(
        DigitsTask, "pictures", lambda task, ids: asked.append(ids.tolist()) or pictures(task, ids)
    )
    shown = shown_of(runs_of_all_kinds.influence)["top-helpful"]
    assert asked[:2] == [[cell.sample for cell in row.samples] for row in expected.rows[:2]]
    assert len(asked) == 2 * 2  # rows of each side
    assert len(shown.rows) == 2
    assert shown.data.equals(expected.data)
    drawn = "Only the first 2 of 3 queries are drawn; the data have all."
    assert shown.caption == f"{expected.caption} {drawn}"


def test_the_scores_of_all_trainings_are_read_once(runs_of_all_kinds, monkeypatch) -> None:
    read: Counter[str] = Counter()
    get = LocalStore.get

    async def counted(self: LocalStore, key: str, *more, **options):
        if "scores/c/" in key:
            read[f"{self.root}/{key}"] += 1
        return await get(self, key, *more, **options)

    monkeypatch.setattr(LocalStore, "get", counted)
    assert "seeds-helpful" in shown_of(runs_of_all_kinds.stability)
    assert len(read) > 2
    assert set(read.values()) == {1}


def test_labels_that_are_no_classes_are_not_compared(runs_of_all_kinds, monkeypatch) -> None:
    from digits import DigitsTask

    assert "nodes" in shown_of(runs_of_all_kinds.norms)
    monkeypatch.setattr(DigitsTask, "output_loss", "mse")
    assert "nodes" not in shown_of(runs_of_all_kinds.norms)
    helpful = shown_of(runs_of_all_kinds.influence)["top-helpful"]
    assert "label" not in helpful.caption
    assert not any(cell.matches for row in helpful.rows for cell in row.samples)


def test_what_lowers_another_quantity_is_not_called_helpful(runs_of_all_kinds) -> None:
    done = runs_of_all_kinds.ablation
    queries = Queries(items=(Query(test=5),), quantity="output")
    random = BaselineSpec(task=done.spec.task, method="random", queries=queries)
    run = Run(done.root, done.spec)
    run.spec = done.spec.model_copy(
        update={"rankings": (Ranking(name="helpful", scores=(random,)),)}
    )
    shown = shown_of(run)["ablation-helpful"]
    assert "output when their top k by influence that lowers the output are" in shown.title
    legend = shown.draw().axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [
        "random",
        "influence that lowers the output",
    ]


@pytest.mark.parametrize(
    ("reduction", "ending"), [("layer", ""), ("channel", ", summed over channels")]
)
def test_what_norms_are_summed_over(
    trained_root, grad_norms_spec, tmp_path, reduction, ending
) -> None:
    shutil.copytree(trained_root, tmp_path / "runs")
    spec = grad_norms_spec.model_copy(update={"reduction": reduction, "layers": ("conv2",)})
    run = Run.create(str(tmp_path / "runs"), spec)
    drive(run.root, run.id, InlineBackend())
    drawn = shown_of(run)["norms-conv2"].draw()
    assert drawn.axes[0].get_xlabel() == f"gradient norm at conv2{ending}"


def test_tables_have_regions_whichever_query_comes_first(runs_of_all_kinds, tmp_path: Path) -> None:
    shutil.copytree(runs_of_all_kinds.influence.root, tmp_path / "runs")
    run = Run.open(str(tmp_path / "runs"), runs_of_all_kinds.influence.id)
    regions = [None, "1,2,3,4", None]
    queries = run.read_table("queries")
    position = queries.column_names.index("region")
    run.write_table("queries", queries.set_column(position, "region", pa.array(regions)))
    found = open_run(f"{run.root}/{run.id}").top_k(2, side="helpful")
    assert found.column("region").to_pylist() == [region for region in regions for _ in range(2)]
    assert "region" not in open_run(f"{run.root}/{run.id}").top_k(2, test=5).column_names
