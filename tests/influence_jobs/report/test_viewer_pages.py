"""The content of the viewer's pages, requested without a browser."""

import html
import re
import shutil

import numpy as np
import pyarrow as pa
import pytest

from infl_cluster.driver import drive
from infl_cluster.inline import InlineBackend
from influence_jobs.kinds import view_of
from influence_jobs.kinds.self_influence.spec import SelfInfluenceSpec
from influence_jobs.methods.attribution import clamped_outputs
from influence_jobs.report import explain
from influence_jobs.report.explain import Explainer
from influence_jobs.report.results import Results
from influence_jobs.specs.solvers import IdentitySettings
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
    assert offered == ["2.5", "3.0", "None", "helpful", "harmful"]


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


def test_a_click_asks_what_the_attribution_run_asked(denoiser_runs, asking, tmp_path) -> None:
    shutil.copytree(denoiser_runs[1].root, tmp_path / "runs")
    norms = denoiser_runs[0]
    layers = ("main.26", "main.29")
    totals_N = sum(np.asarray(norms.array(f"norms/{layer}")[:]).sum(axis=1) for layer in layers)
    options = {"normalize": True, "exclude_norm_above": float(np.median(totals_N))}
    spec = denoiser_runs[1].spec.model_copy(update={"layers": layers, **options})
    run = Run.create(str(tmp_path / "runs"), spec)
    drive(run.root, run.id, InlineBackend())
    viewer = asking(run)
    form = viewer.get("/image/1").text
    assert '<option value="">main.26, main.29</option>' in form
    assert 'name="normalize" value="yes" checked>' in form
    limit = re.search(r'name="limit"[^>]* value="([^"]*)"', form)
    given = {"y": 40, "x": 30, "layer": "", "normalize": "yes", "limit": limit[1]}
    expected = Results(run.root, run.id).top_k(10, test=1).column("sample").to_pylist()
    page = viewer.get("/image/1", params=given)
    assert samples_of(page.text) == expected
    # An option that was removed from the form stays removed.
    other = viewer.get("/image/1", params={**given, "normalize": "no", "limit": ""}).text
    assert 'name="normalize" value="yes">' in other
    assert samples_of(other) != expected


@pytest.fixture
def computed(monkeypatch) -> list[list[str]]:
    """The layers of each forward pass of the network."""
    asked: list[list[str]] = []

    def watched(task, model, layers, batch):
        asked.append([*layers])
        return clamped_outputs(task, model, layers, batch)

    monkeypatch.setattr(explain, "clamped_outputs", watched)
    return asked


def test_a_network_is_run_once_for_all_layers_of_an_image(denoiser_runs, computed) -> None:
    explainer, layers = Explainer(view_of(denoiser_runs[1]).stored_norms), ["main.26", "main.29"]
    found = explainer.top(0, (3, 4), 500, layers=layers)
    assert computed == [layers]
    each = [dict(explainer.top(0, (3, 4), 500, layers=[layer])) for layer in layers]
    for sample, score in found:
        assert score == pytest.approx(sum(scores[sample] for scores in each), rel=1e-5)
    explainer.prepare(1, layers[:1])
    explainer.prepare(1, layers)
    assert computed == [layers, *([layer] for layer in layers)]


def test_activations_are_kept_while_there_is_room(denoiser_runs, computed, monkeypatch) -> None:
    explainer, layers = Explainer(view_of(denoiser_runs[1]).stored_norms), ["main.26", "main.29"]
    for test in (0, 1, 0):
        explainer.prepare(test, layers)
    assert computed == [layers] * 2
    # Without room for more, all layers of the last image.
    monkeypatch.setattr(explain, "MAP_BYTES", 1)
    for test, runs in ((1, 2), (1, 2), (0, 3), (0, 3), (1, 4)):
        explainer.prepare(test, layers)
        assert computed == [layers] * runs


@pytest.mark.parametrize("what", ["images", "test_images"])
def test_scores_are_shown_in_words_where_images_are_gone(
    denoiser_runs, asking, tmp_path, what
) -> None:
    done = denoiser_runs[1]
    here = asking(done)
    task = done.spec.task
    moved = task.model_copy(update={"paths": {**task.paths, what: str(tmp_path / "gone")}})
    viewer = asking(Run(done.root, done.spec.model_copy(update={"task": moved})))
    overview = viewer.get("/")
    assert overview.text.count('<a href="/query') == 2
    assert f"points cannot be explained: {tmp_path}/gone" in overview.text
    assert "test 1, b.png" in viewer.get("/query?test=1&region=40,30,1,1").text
    for address in ("/query?test=1&region=40,30,1,1", "/query?test=0&region=8,16,20,24"):
        page, whole = viewer.get(address), here.get(address)
        assert page.status_code == 200
        assert samples_of(page.text) == samples_of(whole.text) != []
        assert 0 <= page.text.count("<img") < whole.text.count("<img")
    sample = viewer.get("/sample/3")
    assert "<dt>file</dt><dd>a.png</dd>" in sample.text
    for address in ("/image/0", "/image/0?y=1&x=1", "/image/0/explained?y=1&x=1"):
        answer = viewer.get(address)
        assert answer.status_code == 404
        assert f"{tmp_path}/gone" in answer.text
    assert viewer.get("/sample/99999999999999999999999").status_code == 404


def test_samples_that_are_ranked_without_queries_are_shown_and_lead_on(
    grad_norms_spec, trained_root, asking, tmp_path
) -> None:
    shutil.copytree(trained_root, tmp_path / "runs")
    spec = SelfInfluenceSpec(
        task=grad_norms_spec.task,
        checkpoint=grad_norms_spec.checkpoints[0],
        modules=("head",),
        solver=IdentitySettings(),
    )
    run = Run.create(str(tmp_path / "runs"), spec)
    drive(run.root, run.id, InlineBackend())
    viewer = asking(run)
    page = viewer.get("/").text
    best = Results(run.root, run.id).suspects(24, by="self-influence")
    assert samples_of(page) == best.column("sample").to_pylist()
    first = best.to_pylist()[0]
    assert "<h2>Self-influence (digitstask, no curvature)</h2>" in page
    assert f"predicted {first['predicted']}" in page
    own = viewer.get(f"/sample/{first['sample']}").text
    assert f"<dt>predicted</dt><dd>{first['predicted']} " in own


def test_a_query_says_what_its_scores_mean(influence, asking) -> None:
    page = asking(influence).get("/query", params={"test": 5}).text
    said = influence.array("scores").attrs
    assert f"Score: {said['quantity']}; {said['sign']}; unit: {said['unit']}." in html.unescape(
        page
    )
    assert "A green frame marks the query's label" in html.unescape(page)
