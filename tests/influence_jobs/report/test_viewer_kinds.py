"""Texts, table rows and sounds in the viewer, in the report, and in exported tables."""

import csv
import html
import io
import re
import wave
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from many_kinds import HOSTILE, RATE, Sounds

from infl_cluster.submit import submit
from influence_jobs.report.html import render_report, sections_of
from influence_jobs.report.results import Results
from influence_jobs.report.selection import csv_text
from influence_jobs.store.run import Run
from influence_jobs.views.contact_sheet import contact_sheet
from influence_jobs.views.sheets import score_rows, token_scores_of

TOKEN = "right-token"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes an influence run of some queries of a task of `many_kinds`, once each."""
    root, found = tmp_path_factory.mktemp("kinds"), {}

    def make(name: str, **options: Any) -> Run:
        if name not in found:
            run = submit(
                "influence", task=f"many_kinds:{name}", epochs=1, layer="all", solver="identity",
                runs=root, quiet=True, **options,
            )  # fmt: skip
            found[name] = run.run
        return found[name]

    return make


@pytest.fixture
def texts(made) -> Run:
    return made("Texts", test=[0, 3], tokens=["0:2"], per_token=True)


@pytest.fixture
def rows(made) -> Run:
    return made("Rows", test=[0, 1])


@pytest.fixture
def sounds(made) -> Run:
    return made("Sounds", test=[0, 1])


def test_tokens_are_shaded_by_what_they_bring(texts, asking) -> None:
    page = asking(texts).get("/query?test=3&region=0:2&k=16&side=helpful").text
    scores = np.asarray(texts.array("token_scores"))[1]  # (samples, tokens)
    for sample in range(16):
        block = re.search(rf'href="/sample/{sample}">(.*?)</a>', page, re.DOTALL)[1]
        marks = re.findall(r'<mark class="(plus|minus) level-(\d)">\s*(.*?)</mark>', block)
        own = scores[sample][~np.isnan(scores[sample])]
        levels = np.round(4 * np.abs(own) / np.abs(own).max()).astype(int)
        kept = [(np.sign(s), level) for s, level in zip(own, levels, strict=True) if level]
        assert [(1.0 if sign == "plus" else -1.0, int(n)) for sign, n, _ in marks] == kept
        for sign, level, text in marks:  # a sign that is no colour
            assert text.endswith(f"<sup>{'+' if sign == 'plus' else '-'}</sup>") == (level > "1")
    assert "What a token brings to the score" in page
    subject = page.partition('<div class="subject')[2].partition("<form")[0]
    assert subject.count("explained") == 2
    assert "<mark" in render_report("texts", sections_of([texts]))


def test_a_text_with_markup_is_text(texts, rows, asking, watched, served) -> None:
    for run, addresses in ((texts, ("/query?test=3&region=0:2", "/sample/3")),
                           (rows, ("/query?test=0", "/sample/2"))):  # fmt: skip
        viewer = asking(run)
        pages = [viewer.get(address) for address in addresses]
        for text in [*(page.text for page in pages), render_report("all", sections_of([run]))]:
            assert "<script>alert" not in text
            assert "<img src=x" not in text
            assert html.escape(HOSTILE) in text
        assert all(
            "script-src 'self';" in page.headers["content-security-policy"] for page in pages
        )
    assert "\\u202eodd" in asking(texts).get("/sample/3").text  # what turns reading is written out
    with served([texts]) as address:
        shown = watched()
        shown.page.goto(f"{address}/?token={TOKEN}")
        shown.page.goto(f"{address}/query?test=3&region=0:2")
        assert HOSTILE in shown.page.locator(".subject").inner_text()
        assert shown.complaints == []


def test_tokens_that_do_not_fit_are_not_shaded_and_it_is_said(made, asking) -> None:
    run = made("WrongTexts", test=[0, 3], tokens=["0:2"], per_token=True)
    page = asking(run).get("/query?test=3&region=0:2").text
    samples = page.partition('class="wide-sides"')[2]
    assert "<mark class" not in samples.replace('<mark class="plus level-4">raises', "").replace(
        '<mark class="minus level-4">lowers', ""
    )
    assert "not shaded: it has scores of" in samples


def test_rows_are_a_table_with_what_differs_from_the_query(rows, asking) -> None:
    page = asking(rows).get("/query?test=1&k=3").text
    table = page.partition("<table")[2].partition("</table>")[0]
    names = re.findall(r'<th scope="col">(.*?)</th>', table)
    assert names == ["sample", "measure", "size", "age", "town"]
    lines = re.findall(r"<tr.*?</tr>", table.partition("<tbody>")[2], re.DOTALL)
    assert "query" in lines[0] and "Rome" in lines[0]
    top = Results(rows.root, rows.id).top_k(3, test=1, side="helpful").to_pylist()
    for line, row in zip(lines[1:], top, strict=True):
        assert f'href="/sample/{row["sample"]}"' in line
        assert ("&ne;" in line) == (row["town"] != "Rome")
        difference = row["age"] - -1
        assert ("class=differs" in line.partition("town")[0]) or difference == 0
        if difference:
            assert f"<small>{difference:+}</small>" in line


def test_sounds_are_played(sounds, asking, watched, served, faults) -> None:
    viewer = asking(sounds)
    for address, number in (("/sound/sample/7.wav", 7), ("/sound/test/1.wav", 1)):
        answer = viewer.get(address)
        assert answer.headers["content-type"] == "audio/wav"
        with wave.open(io.BytesIO(answer.content)) as read:
            values = np.frombuffer(read.readframes(10**6), "<i2")
            assert read.getframerate() == RATE
        expected = Sounds().show(number)[0] * 32767
        assert np.abs(values - expected).max() <= 1
    for address in ("/sound/sample/12.wav", "/sound/test/99.wav", "/picture/0.png"):
        assert viewer.get(address).status_code == 404
    with served([sounds]) as address:
        shown = watched()
        shown.page.goto(f"{address}/?token={TOKEN}")
        shown.page.goto(f"{address}/query?test=0&k=12")
        players = shown.page.locator("audio")
        assert players.count() == 25
        length = players.first.evaluate(
            "one => new Promise(done => { one.onloadedmetadata = () => done(one.duration);"
            "one.onerror = () => done(-1); one.preload = 'auto'; one.load(); })"
        )
        assert length == pytest.approx(0.5, abs=0.01)
        assert faults(shown.page) == []
        assert shown.complaints == []


def test_a_report_has_sounds_and_says_which_it_leaves_out(sounds, watched, tmp_path) -> None:
    run = Results(sounds.root, sounds.id)
    ranked = run.top_k(12, test=0).to_pylist()
    page = render_report("sounds", sections_of([sounds]))
    shown = [row["sample"] for row in run.top_k(5, test=0).to_pylist()]
    shown += [row["sample"] for row in run.top_k(5, test=1).to_pylist()]
    assert page.count("data:audio/wav;base64,") == len(shown) + 4 - shown.count(5)
    assert page.count("sound of 100.0 s, left out of this page for its size") == shown.count(5)
    assert {row["sample"] for row in ranked} == set(range(12))
    assert len(page) < 2**20


def test_sheets_have_texts_rows_and_sounds(texts, rows, sounds) -> None:
    for run, words in ((texts, "the"), (rows, "town"), (sounds, None)):
        top = Results(run.root, run.id).top_k(2, side="helpful").to_pylist()
        task = {texts.id: "Texts", rows.id: "Rows", sounds.id: "Sounds"}[run.id]
        made = score_rows(getattr(__import__("many_kinds"), task)(), top, token_scores_of(run))
        axes = contact_sheet(made).axes
        if words:
            assert any(words in text.get_text() for axis in axes for text in axis.texts)
        else:
            assert all(axis.lines for axis in axes)


def test_a_selection_is_exported_as_it_is_shown(rows, asking) -> None:
    viewer = asking(rows)
    answer = viewer.get("/query/samples.parquet?test=1&k=12")
    found = pq.read_table(io.BytesIO(answer.content))
    assert "attachment" in answer.headers["content-disposition"]
    top = Results(rows.root, rows.id).top_k(12, test=1)
    assert found.drop_columns(["run", "array"]).to_pylist() == top.to_pylist()
    assert set(found.column("run").to_pylist()) == {rows.id}
    # Filters, a side, and ticks.
    given = "test=1&k=12&side=harmful&pick=4&pick=2"
    picked = pq.read_table(io.BytesIO(viewer.get(f"/query/samples.parquet?{given}").content))
    expected = [r for r in top.to_pylist() if r["sample"] in (2, 4) and r["side"] == "harmful"]
    assert picked.drop_columns(["run", "array"]).to_pylist() == expected
    page = viewer.get(f"/query?{given}").text
    assert re.findall(r'value="(\d+)" form="filter" checked', page).count("4") == 1
    assert page.count('<section class="row"') == 1
    for address in ("/query/samples.exe?test=1", "/ranked/none.csv", "/sample/99/queries.csv"):
        assert viewer.get(address).status_code == 404 or "99" in address
    assert viewer.get("/query/samples.csv?test=1&k=501").status_code == 400
    queries = pq.read_table(io.BytesIO(viewer.get("/queries.parquet").content))
    assert queries.column("test").to_pylist() == [0, 1]
    of_sample = pq.read_table(io.BytesIO(viewer.get("/sample/3/queries.parquet").content))
    assert set(of_sample.column("sample").to_pylist()) == {3}


def test_csv_keeps_numbers_and_defuses_formulas(rows, asking) -> None:
    text = asking(rows).get("/query/samples.csv?test=1&k=12").text
    found = list(csv.DictReader(io.StringIO(text)))
    top = Results(rows.root, rows.id).top_k(12, test=1).to_pylist()
    for line, row in zip(found, top, strict=True):
        assert float(line["score"]) == row["score"]
        assert int(line["age"]) == row["age"]  # -3 is a number, and stays one
        assert line["town"] == ("'" * (row["town"][0] == "=")) + row["town"]
    hostile = {name: f"{name}cmd" for name in "=+-@\t\r"}
    (values,) = csv.DictReader(io.StringIO(csv_text(["a", *hostile], [{**hostile, "a": None}])))
    assert all(value == "" or value.startswith("'") for value in values.values())
    assert all(name == "a" or name.startswith("'") for name in values)


def test_the_export_buttons_take_filters_and_ticks(rows, served, watched) -> None:
    with served([rows]) as address:
        shown = watched()
        page = shown.page
        page.goto(f"{address}/?token={TOKEN}")
        page.goto(f"{address}/query?test=1&k=3")
        page.get_by_label("choose sample").first.check()
        chosen = page.get_by_label("choose sample").first.get_attribute("value")
        assert f"pick={chosen}" in page.url
        with page.expect_download() as waiting:
            page.get_by_role("button", name="CSV").click()
        lines = list(csv.DictReader(waiting.value.path().open(newline="")))
        assert {line["sample"] for line in lines} == {chosen}
        page.reload()  # the address restores it
        assert page.locator("[name=pick]:checked").first.get_attribute("value") == chosen
        assert shown.complaints == []


def test_a_client_without_the_token_gets_no_sound_and_no_table(sounds, served) -> None:
    with served([sounds]) as address:
        for path in ("/sound/sample/1.wav", "/query/samples.csv?test=0", "/queries.parquet"):
            assert httpx.get(address + path).status_code == 401
