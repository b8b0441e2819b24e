"""Results in Python: arrays with named axes, read on demand; tables, rankings, figures."""

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from influence_jobs import InflError, open_run
from influence_jobs.store import run as store_run


def test_arrays_have_names_and_are_read_when_indexed(runs_of_all_kinds, monkeypatch) -> None:
    run = runs_of_all_kinds.influence
    result = open_run(f"{run.root}/{run.id}")
    scores = result["scores"]
    assert isinstance(scores, xr.DataArray)
    assert scores.dims == ("query", "sample")
    assert scores.attrs["sign"] == "positive = helpful, negative = harmful"
    assert scores.coords["test"].values.tolist() == [5, 0, 111]
    assert not scores.variable._in_memory
    stored = np.asarray(run.array("scores")[:])
    some = scores.isel(sample=slice(3, 9))
    assert np.array_equal(some.values, stored[:, 3:9])
    assert not scores.variable._in_memory
    assert np.array_equal(scores.swap_dims(query="test").sel(test=0).values, stored[1])


def test_arrays_of_one_group_may_differ_in_length(runs_of_all_kinds) -> None:
    run = runs_of_all_kinds.norms
    result = open_run(f"{run.root}/{run.id}")
    assert result.arrays == ("norms/conv1", "norms/conv2", "norms/head")
    for name in result.arrays:
        array = result[name]
        assert array.dims == ("sample", "channel")
        assert np.array_equal(array.values, np.asarray(run.array(name)[:]))
    with pytest.raises(InflError, match="has no array 'scores'; it has norms/conv1"):
        result["scores"]


def test_the_start_of_an_id_opens_a_run(runs_of_all_kinds) -> None:
    run = runs_of_all_kinds.attribution
    assert open_run(f"{run.root}/attribution-").run.id == run.id
    assert open_run(f"{run.root}/{run.id}/").spec == run.spec
    with pytest.raises(InflError, match="there is no run nothing"):
        open_run(f"{run.root}/nothing")


def test_the_top_of_scores_and_norms(runs_of_all_kinds) -> None:
    kinds = runs_of_all_kinds
    stored = np.asarray(kinds.influence.array("scores")[:])
    result = open_run(f"{kinds.influence.root}/{kinds.influence.id}")
    top = result.top_k(4, test=0, side="harmful")
    assert top.column("sample").to_pylist() == np.argsort(stored[1], kind="stable")[:4].tolist()
    assert top.column_names == ["test", "side", "rank", "score", "sample", "label"]
    assert result.top_k(2, test=[5, 111]).num_rows == 2 * 2 * 2
    norms = open_run(f"{kinds.norms.root}/{kinds.norms.id}")
    top = norms.top_k(3, layer="head", channel=7)
    expected = np.argsort(-np.asarray(kinds.norms.array("norms/head")[:, 7]), kind="stable")[:3]
    assert top.column("sample").to_pylist() == expected.tolist()
    assert top.column("layer").to_pylist() == ["head"] * 3
    assert norms.top_k(2).num_rows == 3 * 2
    for wrong in (
        lambda: norms.top_k(3, test=0),
        lambda: result.top_k(3, channel=0),
        lambda: result.top_k(3, test=6),
        lambda: result.top_k(3, side="Helpful"),  # type: ignore[arg-type]
        lambda: result.top_k(0),
        lambda: open_run(f"{kinds.lds.root}/{kinds.lds.id}").top_k(3),
    ):
        with pytest.raises(InflError):
            wrong()


def test_unfinished_runs_have_no_top(finished_run, tmp_path) -> None:
    run = store_run.Run.create(str(tmp_path), finished_run.spec)
    result = open_run(f"{tmp_path}/{run.id}")
    assert (result.state, result.arrays, result.tables) == ("new", (), ())
    assert "new" in result._repr_html_()
    with pytest.raises(InflError, match="not done yet"):
        result.top_k()
    with pytest.raises(InflError, match="has no arrays: it has not begun"):
        result["norms/head"]


def test_tables_and_figures(runs_of_all_kinds) -> None:
    kinds = runs_of_all_kinds
    result = open_run(f"{kinds.influence.root}/{kinds.influence.id}")
    assert result.tables == ("queries", "samples")
    assert result.table("queries").column("test").to_pylist() == [5, 0, 111]
    with pytest.raises(InflError, match="has no table 'summary'; it has queries, samples"):
        result.table("summary")
    assert result.figures == ("top-helpful", "top-harmful")
    assert isinstance(result.figure("top-helpful"), Figure)
    with pytest.raises(InflError, match="has no figure 'lds'; it has top-helpful"):
        result.figure("lds")
    paper = open_run(f"{kinds.paper.root}/{kinds.paper.id}")
    assert f"{kinds.ablation.id}/ablation-helpful" in paper.figures


def test_a_notebook_shows_what_a_run_has(runs_of_all_kinds, tmp_path, watched) -> None:
    run = runs_of_all_kinds.norms
    html = open_run(f"{run.root}/{run.id}")._repr_html_()
    page = watched().page
    page.set_content(html)
    text = page.locator("body").inner_text()
    assert run.id in text
    assert "1,500 sample x 16 channel" in text
    assert "loss per unit of weight" in text
    assert "Tables: samples" in text
