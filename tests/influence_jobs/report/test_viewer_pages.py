"""What the viewer's pages say, asked without a browser."""

import re
import shutil

import numpy as np
import pyarrow as pa
import pytest

from influence_jobs.store.run import Run


@pytest.fixture
def influence(runs_of_all_kinds, tmp_path) -> Run:
    """An influence run of three queries, to be written to."""
    shutil.copytree(runs_of_all_kinds.influence.root, tmp_path / "runs")
    return Run.open(str(tmp_path / "runs"), runs_of_all_kinds.influence.id)


def samples_of(page: str) -> list[int]:
    return [int(sample) for sample in re.findall(r'href="/sample/(\d+)"', page)]


@pytest.mark.parametrize(("word", "labels"), [("3.0", {3.0}), ("2.5", {2.5}), ("None", {None})])
def test_samples_are_filtered_by_labels_of_any_kind(influence, asking, word, labels) -> None:
    table = influence.read_table("samples")
    values = [[3.0, 2.5, None][i % 3] for i in range(table.num_rows)]
    column = pa.array(values, pa.float64())
    influence.write_table("samples", table.set_column(1, "label", column))
    page = asking(influence).get("/query", params={"test": 5, "label": word})
    assert page.status_code == 200
    found = samples_of(page.text)
    assert len(found) == 20
    assert {values[sample] for sample in found} == labels
    offered = re.findall(r"<option(?: selected)?>([^<]*)</option>", page.text)
    assert offered == ["2.5", "3.0", "None"]


def test_a_rank_is_among_those_that_are_ranked(influence, asking) -> None:
    scores = influence.array("scores")
    values = np.asarray(scores[:])
    values[1, :400] = np.nan
    scores[:] = values
    best = int(np.nanargmax(values[1]))
    viewer = asking(influence)
    page = viewer.get(f"/sample/{best}").text
    assert "rank 1 of 1,100" in page
    assert "of 1,500" in page
    assert "test=0" not in viewer.get("/sample/7").text


def test_a_click_is_refused_where_the_norms_are_gone(denoiser_runs, asking, tmp_path) -> None:
    shutil.copytree(denoiser_runs[1].root, tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / denoiser_runs[0].id)
    viewer = asking(Run.open(str(tmp_path / "runs"), denoiser_runs[1].id))
    assert len(samples_of(viewer.get("/query?test=1&region=40,30,1,1").text)) == 10
    answer = viewer.get("/image/1?y=40&x=30")
    assert answer.status_code == 400
    assert f"run {denoiser_runs[0].id} has no arrays: " in answer.text
