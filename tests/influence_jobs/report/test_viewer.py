"""The viewer: access, answers, and that it writes nothing."""

import contextlib
import http.client
import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import expect

from influence_jobs.errors import InflError, SpecError
from influence_jobs.kinds import view_of
from influence_jobs.methods.attribution import query_activations
from influence_jobs.report.explain import Explainer
from influence_jobs.report.html import render_report, sections_of
from influence_jobs.report.results import Results
from influence_jobs.report.viewer import make_viewer
from influence_jobs.store.checkpoints import load_checkpoint
from influence_jobs.store.documents import Status
from influence_jobs.store.run import Run, now
from influence_jobs.tasks.base import Draw

TOKEN = "right-token"  # the token of `served`


@pytest.fixture(scope="module")
def digits(runs_of_all_kinds, served) -> Iterator[str]:
    with served([runs_of_all_kinds.paper], lambda _: "http://127.0.0.1:1/#/jobs/x") as address:
        yield address


@pytest.fixture(scope="module")
def denoiser(denoiser_runs, served) -> Iterator[str]:
    with served([denoiser_runs[1]]) as address:
        yield address


@pytest.fixture
def get(digits) -> Iterator[httpx.Client]:
    """A client of the viewer of the digits' runs, with its token."""
    with httpx.Client(base_url=digits, follow_redirects=True) as client:
        assert client.get(f"/?token={TOKEN}").status_code == 200
        yield client


def files_of(root: str) -> dict[Path, tuple[int, float]]:
    return {
        path: (path.stat().st_size, path.stat().st_mtime)
        for path in Path(root).rglob("*")
        if path.is_file()
    }


def test_no_access_without_the_token(digits) -> None:
    addresses = (
        "/",
        "/progress",
        "/query?test=5",
        "/sample/1",
        "/picture/0.png",
        "/static/viewer.js",
    )
    for address in (*addresses, "/tables/x/samples.parquet", "/nowhere"):
        assert httpx.get(digits + address).status_code == 401
        assert httpx.get(digits + address, params={"token": "wrong"}).status_code == 401
        port = digits.rpartition(":")[2]
        cookies = {f"infl-{port}": "wrong"}
        assert httpx.get(digits + address, cookies=cookies).status_code == 401
    first = httpx.get(f"{digits}/query?test=5&token={TOKEN}")
    assert (first.status_code, first.headers["location"]) == (303, "/query?test=5")
    assert "httponly" in first.headers["set-cookie"].lower()
    assert "samesite=lax" in first.headers["set-cookie"].lower()


def test_a_token_leads_nowhere_else(digits) -> None:
    asking = http.client.HTTPConnection(digits.removeprefix("http://"))
    asking.request("GET", f"//evil.example/?token={TOKEN}")
    answer = asking.getresponse()
    assert (answer.status, answer.getheader("location")) == (303, "/evil.example/")
    asking.close()


def test_another_sites_name_for_this_machine_is_refused(digits) -> None:
    answer = httpx.get(f"{digits}/?token={TOKEN}", headers={"host": "evil.example"})
    assert answer.status_code == 400
    assert "set-cookie" not in answer.headers


def test_it_only_reads(get, runs_of_all_kinds) -> None:
    root = runs_of_all_kinds.paper.root
    before = files_of(root)
    for address in ("/", "/progress", "/query?test=5", "/sample/7"):
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            assert get.request(method, address).status_code == 405
        answer = get.get(address)
        assert answer.status_code == 200
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-store"
    assert files_of(root) == before


def test_hostile_labels_and_names_are_text(runs_of_all_kinds, tmp_path, served) -> None:
    hostile = "<script>alert(1)</script><img src=x onerror=alert(2)>'\"&{{7*7}}"
    shutil.copytree(runs_of_all_kinds.random.root, tmp_path / "runs")
    shown = []
    for run in (runs_of_all_kinds.random, runs_of_all_kinds.influence):
        copy = Run.open(str(tmp_path / "runs"), run.id)
        shown.append(copy)
        for name in ("samples", "queries"):
            table = copy.read_table(name)
            texts = pa.array([hostile] * len(table))
            at = table.column_names.index("label")
            copy.write_table(name, table.set_column(at, "label", texts))
    status = shown[0].read_json("status.json", Status)
    shown[0].write_json("status.json", {**status, "state": "failed", "message": hostile})
    seen = 0
    with served(shown) as address, httpx.Client(base_url=address, follow_redirects=True) as client:
        client.get(f"/?token={TOKEN}")
        for path in ("/", "/query?test=5", "/sample/7", "/progress", "/?label=" + quote(hostile)):
            answer = client.get(path)
            assert answer.status_code == 200, path
            for evil in ("<script>alert", "<img src=x", "onerror=alert(2)>"):
                assert evil not in answer.text, path
            seen += "&lt;script&gt;alert(1)" in answer.text
    assert seen >= 2
    text = render_report(hostile, sections_of(shown[1:]))
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_slow_and_large_requests_do_not_hold_the_others(digits, get) -> None:
    host, port = digits.removeprefix("http://").split(":")
    slow = [socket.create_connection((host, int(port))) for _ in range(100)]
    try:
        for connection in slow:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Never-Ends: ")
        assert get.get("/").status_code == 200
        endless = slow[0]
        with contextlib.suppress(OSError):  # the server may hang up at any time
            for _ in range(64):
                endless.sendall(b"a" * 2**16)
            endless.settimeout(10)
            assert endless.recv(100).startswith(b"HTTP/1.1 400") or not endless.recv(1)
    finally:
        for connection in slow:
            connection.close()
    before = psutil.Process().memory_info().rss
    body = (bytes(2**20) for _ in range(200))
    with contextlib.suppress(httpx.TransportError):
        assert get.post("/", content=body).status_code == 405
    assert psutil.Process().memory_info().rss - before < 150 * 2**20
    assert get.get("/").status_code == 200


@pytest.mark.parametrize(
    "address",
    [
        "/tables/{run}/../../spec.json",
        "/tables/{run}/../spec.parquet",
        "/tables/{run}/..%2Fspec.parquet",
        "/tables/{run}/%2e%2e%2f%2e%2e%2fspec.parquet",
        "/tables/..%2F{run}/samples.parquet",
        "/tables/{other}/samples.parquet",
        "/tables/{run}/nothing.parquet",
        "/static/../viewer.py",
        "/static/..%2Fviewer.py",
        "/static/pieces.html.j2",
        "/picture/99999.png",
        "/sample/99999",
        "/query?test=6",
        "/query?test=99999",
        "/image/0",
    ],
)
def test_what_is_outside_of_the_runs_is_not_there(digits, runs_of_all_kinds, address) -> None:
    kinds = runs_of_all_kinds
    # A run in the same folder that the viewer does not show.
    path = address.format(run=kinds.influence.id, other=kinds.lds.id)
    # Not httpx, which resolves `..` before it asks.
    host, port = digits.removeprefix("http://").split(":")
    asking = http.client.HTTPConnection(host, int(port))
    asking.request("GET", path, headers={"Cookie": f"infl-{port}={TOKEN}"})
    answer = asking.getresponse()
    assert answer.status == 404
    assert b"Traceback" not in answer.read()
    asking.close()


def test_tables_come_as_they_are(get, runs_of_all_kinds, tmp_path) -> None:
    run = runs_of_all_kinds.influence
    (tmp_path / "found").write_bytes(get.get(f"/tables/{run.id}/samples.parquet").content)
    assert pq.read_table(tmp_path / "found").equals(run.read_table("samples"))


def test_a_query_shows_all_methods_beside_each_other(
    digits, runs_of_all_kinds, watched, faults
) -> None:
    shown = watched()
    shown.page.goto(f"{digits}/?token={TOKEN}")
    assert TOKEN not in shown.page.url
    assert shown.page.get_by_role("link", name="Ray dashboard").get_attribute("href").endswith("/x")
    assert faults(shown.page) == []
    shown.page.locator(".gallery a").nth(2).click()
    expect(shown.page.get_by_role("heading", level=1)).to_contain_text("test 111")
    for run, side, heading in (
        (runs_of_all_kinds.influence, "helpful", "influence (identity): helpful"),
        (runs_of_all_kinds.influence, "harmful", "influence (identity): harmful"),
        (runs_of_all_kinds.attribution, "both", "attribution at conv2"),
    ):
        samples = shown.page.get_by_role("region", name=heading).locator("a.cell")
        top = Results(run.root, run.id).top_k(10, test=111, side=side)  # type: ignore[arg-type]
        expected = top.column("sample")
        found = samples.evaluate_all("all => all.map(one => one.getAttribute('href'))")
        assert found == [f"/sample/{i}" for i in expected.to_pylist()]
    boxes = [one.bounding_box() for one in shown.page.locator(".sides > section").all()]
    assert len({box["x"] for box in boxes}) == 3  # side by side
    assert len({box["y"] for box in boxes}) == 1
    assert faults(shown.page) == []
    assert shown.complaints == []

    shown.page.get_by_label("samples of label").select_option("3")
    shown.page.get_by_role("button", name="Filter").click()
    captions = shown.page.locator("a.cell").all_inner_texts()
    assert len(captions) == 30
    assert all("label 3" in caption for caption in captions)

    shown.page.locator("a.cell").first.click()
    expect(shown.page.get_by_role("heading", level=1)).to_contain_text("training sample")
    assert faults(shown.page) == []
    assert shown.complaints == []


def test_a_sample_leads_to_the_queries_it_influences(get, runs_of_all_kinds) -> None:
    scores = np.asarray(runs_of_all_kinds.influence.array("scores")[:])
    sample = int(np.argmax(scores[1]))
    text = get.get(f"/sample/{sample}").text
    assert "/query?test=0" in text
    helped = int((scores[:, sample] > 0).sum())
    helpful = text.partition("influence (identity): helpful")[2]
    helpful, _, harmful = helpful.partition("influence (identity): harmful")
    harmful = harmful.partition("attribution at")[0]
    assert helpful.count("rank ") == helped
    assert harmful.count("rank ") == 3 - helped
    assert "rank 1 of 1,500" in helpful


def test_queries_are_filtered(get) -> None:
    assert get.get("/?test=5").text.count('<a href="/query') == 1
    assert get.get("/").text.count('<a href="/query') == 3
    assert "0 queries" in get.get("/?label=99").text
    for address in ("/?page=1", "/?page=x", "/query?test=-1", "/query?test=²"):
        answer = get.get(address)
        assert answer.status_code == 400
        assert "a whole number" in answer.text


def test_a_click_on_a_pixel_is_answered_with_patches(
    denoiser, denoiser_runs, watched, faults
) -> None:
    _, attribution = denoiser_runs
    shown = watched()
    shown.page.goto(f"{denoiser}/image/1?token={TOKEN}")
    assert shown.page.get_by_label("layer").input_value() == "main.29"
    image = shown.page.locator("#image img")
    box = image.bounding_box()
    # The pixel at row 40, column 30 of 80 x 96, which the attribution run explains.
    at = {"x": (30 + 0.5) / 96 * box["width"], "y": (40 + 0.5) / 80 * box["height"]}
    image.click(position=at)
    expect(shown.page.locator("#answer h2")).to_contain_text("row 40, column 30")
    cells = shown.page.locator("#answer a.cell")
    expected = Results(attribution.root, attribution.id).top_k(10, test=1).to_pylist()
    found = cells.all_inner_texts()
    assert len(found) == len(expected) == 10
    for text, row in zip(found, expected, strict=True):
        first, score, file, place = text.strip().split("\n")
        assert first == str(row["sample"])
        assert float(score.removeprefix("score ")) == pytest.approx(row["score"], rel=1e-2)
        assert file == row["file"]
        assert place == f"row {row['row']}, column {row['column']}"
    assert shown.page.locator("#image .mark").is_visible()
    assert faults(shown.page) == []

    # By the keyboard, with another layer.
    shown.page.get_by_label("layer").select_option("main.26")
    shown.page.locator("[name=x]").fill("95")
    shown.page.locator("[name=x]").press("Enter")
    expect(shown.page.locator("#answer h2")).to_contain_text("row 40, column 95")
    expect(shown.page.locator("#answer p").first).to_contain_text("main.26")
    shown.page.locator("[name=x]").fill("96")
    shown.page.get_by_role("button", name="Explain").click()
    expect(shown.page.locator("#answer")).to_have_text("x=96: write a whole number below 96")
    assert [text for text in shown.complaints if "400" not in text] == []
    assert all(asked.startswith(denoiser) for asked in shown.requests)


@pytest.mark.slow
def test_it_fits_a_phone(denoiser, digits, watched, faults) -> None:
    for address in (f"{digits}/?token={TOKEN}", f"{digits}/query?test=5", f"{digits}/sample/3",
                    f"{denoiser}/?token={TOKEN}", f"{denoiser}/image/0?y=3&x=4"):  # fmt: skip
        shown = watched(390, "dark")
        start = denoiser if address.startswith(denoiser) else digits
        shown.page.goto(f"{start}/?token={TOKEN}")
        shown.page.goto(address)
        assert shown.page.evaluate("document.documentElement.scrollWidth") <= 390
        assert faults(shown.page) == []


def test_explained_points_are_those_of_an_attribution_run(denoiser_runs) -> None:
    norms, attribution = denoiser_runs
    for run in (norms, attribution):
        explainer = Explainer(view_of(run).stored_norms)
        found = explainer.top(1, (40, 30), 12, layers=["main.29"])
        expected = Results(attribution.root, attribution.id).top_k(12, test=1).to_pylist()
        assert [sample for sample, _ in found] == [row["sample"] for row in expected]
        scores = [score for _, score in found]
        assert scores == pytest.approx([row["score"] for row in expected], rel=1e-5)
    # Dividing and leaving out, as the method itself does.
    totals = np.asarray(norms.array("norms/main.29")[:]).sum(axis=1)
    limit = float(np.median(totals))
    kept = explainer.top(1, (40, 30), 500, layers=["main.29"], exclude_norm_above=limit)
    assert {sample for sample, _ in kept} == set(np.flatnonzero(totals <= limit).tolist())
    divided = dict(explainer.top(1, (40, 30), 500, layers=["main.29"], normalize=True))
    plain = dict(explainer.top(1, (40, 30), 500, layers=["main.29"]))
    assert divided[7] == pytest.approx(plain[7] / totals[7], rel=1e-5)
    for bad in ({"test": 2}, {"point": (80, 0)}, {"point": (0, -1)}, {"layers": ["main.2"]}):
        with pytest.raises(SpecError):
            asked: dict[str, Any] = {"test": 1, "point": (4, 4), "k": 1, "layers": ["main.29"]}
            explainer.top(**(asked | bad))


def test_a_run_at_work_shows_its_progress_and_then_its_results(
    runs_of_all_kinds, tmp_path, watched, served
) -> None:
    shutil.copytree(runs_of_all_kinds.influence.root, tmp_path / "runs")
    run = Run.open(str(tmp_path / "runs"), runs_of_all_kinds.influence.id)
    status = run.read_json("status.json", Status)
    moment = {"state": "running", "units_done": 450, "units_before": 0, "units_total": 1500}
    moment |= {"work_started_at": now() - 10, "updated_at": now() + 60}
    run.write_json("status.json", {**status, **moment})
    with served([run]) as address:
        shown = watched()
        shown.page.goto(f"{address}/?token={TOKEN}")
        bar = shown.page.get_by_role("progressbar")
        assert bar.get_attribute("value") == "450"
        expect(shown.page.locator("#progress")).to_contain_text("450 of 1,500 samples")
        assert shown.page.locator(".gallery a").count() == 0
        run.write_json("status.json", {**status, **moment, "units_done": 900})
        expect(shown.page.locator("#progress")).to_contain_text(
            "900 of 1,500 samples", timeout=8000
        )
        run.write_json("status.json", status)
        expect(shown.page.locator(".gallery a")).to_have_count(3, timeout=8000)
        assert shown.complaints == []


def test_the_page_of_a_failed_run_stays_as_it_is(
    runs_of_all_kinds, tmp_path, watched, served
) -> None:
    shutil.copytree(runs_of_all_kinds.influence.root, tmp_path / "runs")
    run = Run.open(str(tmp_path / "runs"), runs_of_all_kinds.influence.id)
    status = {**run.read_json("status.json", Status), "updated_at": now() + 60}
    run.write_json("status.json", {**status, "state": "running"})
    with served([run]) as address:
        shown = watched()
        shown.page.goto(f"{address}/?token={TOKEN}")
        failed = {"state": "failed", "message": "shard 0: running out of memory"}
        run.write_json("status.json", {**status, **failed})
        expect(shown.page.locator("#progress")).to_contain_text("failed", timeout=8000)
        asked = len(shown.requests)
        shown.page.wait_for_timeout(4500)  # two turns
        assert shown.requests[asked:] == []


def test_runs_of_other_data_are_not_mixed(runs_of_all_kinds, denoiser_runs) -> None:
    with pytest.raises(SpecError, match="is of another task or data than"):
        make_viewer([runs_of_all_kinds.influence, denoiser_runs[1]], TOKEN)


def test_norms_are_shown_where_the_test_images_are_gone(denoiser_runs, tmp_path, served) -> None:
    run = denoiser_runs[0]
    gone = {**run.spec.task.paths, "test_images": str(tmp_path / "gone")}
    task = run.spec.task.model_copy(update={"paths": gone})
    moved = Run(run.root, run.spec.model_copy(update={"task": task}))
    with served([moved]) as address, httpx.Client(follow_redirects=True) as client:
        page = client.get(f"{address}/?token={TOKEN}")
        assert page.status_code == 200
        assert run.id in page.text
        assert client.get(f"{address}/sample/3").text.count("norm at main.2") == 2
        assert client.get(f"{address}/image/0").status_code == 404


def test_weights_that_cannot_be_loaded_answer_nothing(denoiser_runs, tmp_path) -> None:
    norms = view_of(denoiser_runs[1]).stored_norms
    gone = norms.checkpoint.model_copy(update={"path": str(tmp_path / "gone.pth")})
    explainer = Explainer(replace(norms, checkpoint=gone))
    for _ in range(2):  # the second time no more than the first
        with pytest.raises(InflError):
            explainer.top(1, (40, 30), 3, layers=["main.29"])


def test_a_click_is_answered_with_the_runs_own_noise(denoiser_runs) -> None:
    norms = replace(view_of(denoiser_runs[1]).stored_norms, seed=5, noise_draws=3)
    explainer = Explainer(norms)
    model = explainer.task.model().eval()
    load_checkpoint(model, norms.run.root, norms.checkpoint)
    query, draws = (1, (40, 30, 1, 1)), [Draw(5, draw) for draw in range(3)]
    a_QC = query_activations(explainer.task, model, ["main.29"], [query], draws)["main.29"]
    expected = np.asarray(norms.run.array("norms/main.29")[:]) @ a_QC[0]
    found = dict(explainer.top(1, (40, 30), len(expected), layers=["main.29"]))
    assert [found[i] for i in range(len(expected))] == pytest.approx(expected.tolist(), rel=1e-4)
