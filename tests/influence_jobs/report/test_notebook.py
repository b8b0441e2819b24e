"""What a notebook shows of runs, tables, figures, specs and checks, and their plain text."""

import base64
import io

import numpy as np
import pyarrow as pa
import pytest
from digits import DigitsTask
from PIL import Image

import influence_jobs
from influence_jobs import open_run
from influence_jobs.report.sample_rows import MOST, SampleRows
from influence_jobs.terms import html_table

HOSTILE = "<script>alert(1)</script>\u202e&"


def results(run):
    return open_run(f"{run.root}/{run.id}")


def test_a_run_says_what_it_is_and_has(runs_of_all_kinds) -> None:
    run = runs_of_all_kinds.influence
    lines = repr(results(run)).splitlines()
    assert lines[0] == f"{run.id}: done"
    assert "  scores, 3 query x 1,500 sample, float32, loss" in lines
    assert lines[-1] == "  tables: queries, samples"
    assert len(lines) < 8
    html = results(run)._repr_html_()
    assert len(html) < 4000
    assert "<td style" in html
    assert "style=&#34;" not in html  # its tables are not escaped twice


@pytest.mark.parametrize(
    ("scheme", "ink"),
    [("light", "#000000"), pytest.param("dark", "#ffffff", marks=pytest.mark.slow)],
)
def test_it_is_read_in_both_schemes(runs_of_all_kinds, watched, scheme, ink) -> None:
    """It brings no colours, so it has those of the notebook."""
    found = results(runs_of_all_kinds.influence)
    parts = [
        found._repr_html_(),
        found.show(found.top_k(3))._repr_html_(),
        found.spec._repr_html_(),
        influence_jobs.check(DigitsTask, width=2)._repr_html_(),
    ]
    assert not any(word in part for part in parts for word in ("color:", "background", "<script"))
    page = watched().page
    page.set_content(f'<body style="color: {ink}">{"".join(parts)}</body>')
    colors = page.evaluate(
        "[...new Set([...document.querySelectorAll('td, th, p, code')]"
        ".map(e => getComputedStyle(e).color))]"
    )
    assert colors == [f"rgb({', '.join(str(int(ink[i : i + 2], 16)) for i in (1, 3, 5))})"]


def test_rows_have_their_samples_pictures_below_their_query(runs_of_all_kinds, watched) -> None:
    found = results(runs_of_all_kinds.influence)
    top = found.top_k(4, test=[5, 0], side="helpful")
    rows = found.show(top)
    page = watched().page
    page.set_content(rows._repr_html_())
    assert page.locator("table").count() == 2
    assert page.locator("tbody tr").count() == 8
    assert page.locator("td img").count() == 8
    headings = page.locator("p").all_inner_texts()
    label = found.table("queries").to_pylist()[0]["label"]
    assert headings[0].strip() == f"test 5, label {label}"
    # The pictures are those of the samples, in their order.
    first = page.locator("td img").first.get_attribute("src")
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(first.partition(",")[2]))))
    sample = top.column("sample")[0].as_py()
    assert np.array_equal(shown, DigitsTask().pictures(np.array([sample]))[0])
    text = repr(rows).splitlines()
    assert text[0].split() == top.column_names
    assert len(text) == 9
    assert str(sample) in text[1].split()


def test_a_table_of_queries_shows_the_test_samples(runs_of_all_kinds) -> None:
    found = results(runs_of_all_kinds.influence)
    html = found.show(found.table("queries"))._repr_html_()
    assert html.count("<img") == 3
    assert html.count("<table") == 1


def test_without_pictures_or_samples_there_are_rows_alone() -> None:
    table = pa.table({"sample": [3, 4], "score": [0.5, float("nan")]})
    for task in (None, Blind()):
        html = SampleRows(table, task)._repr_html_()
        assert (html.count("<img"), html.count("<tr>")) == (0, 3)
    assert SampleRows(pa.table({"epoch": [1]}), DigitsTask())._repr_html_().count("<img") == 0
    assert "<table" not in SampleRows(table.slice(0, 0), None)._repr_html_()
    assert repr(SampleRows(table.slice(0, 0), None)) == "sample  score"


class Blind(DigitsTask):
    """Its samples are no pictures."""

    pictures = influence_jobs.Task.pictures

    def show(self, sample):
        return None

    def batch(self, ids, draw):
        images, labels = super().batch(ids, draw)
        return images.flatten(1), labels


class Told(Blind):
    """Its samples are shown as its `show` says."""

    def show(self, sample):
        return f"<b> sample {sample}" if sample % 2 else np.full((8, 8), sample, np.uint8)

    def show_test(self, test):
        return ["one ", f"test {test}"]


def test_rows_show_what_the_task_shows_of_their_samples() -> None:
    html = SampleRows(pa.table({"sample": [4, 5], "score": [0.5, 0.25]}), Told())._repr_html_()
    first, second = html.split("<tr>")[2:]
    assert "<img" in first
    assert '<td style="text-align: left">&lt;b&gt; sample 5</td>' in second
    assert "<img" not in second
    html = SampleRows(pa.table({"test": [3], "value": [0.5]}), Told())._repr_html_()
    assert ">one test 3</td>" in html
    # A text that the row has already is not told twice.
    html = SampleRows(pa.table({"test": [3], "text": ["one test 3"]}), Told())._repr_html_()
    assert html.count("one test 3") == 1


def test_a_long_table_is_cut_and_says_so() -> None:
    rows = SampleRows(pa.table({"rank": range(MOST + 7)}), None)
    assert rows._repr_html_().count("<tr>") == MOST + 1
    for text in (rows._repr_html_(), repr(rows)):
        assert "and 7 more rows" in text


def test_texts_of_strangers_are_escaped() -> None:
    rows = SampleRows(pa.table({"sample": [0], HOSTILE: [HOSTILE], "test": [1]}), None)
    for html in (rows._repr_html_(), html_table([(HOSTILE, HOSTILE)], (HOSTILE, HOSTILE))):
        assert "<script" not in html
        assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;\\u202e&amp;") >= 2
    assert "\u202e" not in repr(rows)


def test_a_spec_is_its_request_in_words(runs_of_all_kinds) -> None:
    spec = runs_of_all_kinds.norms.spec
    lines = str(spec).splitlines()
    assert lines[0].split() == ["run", spec.run_id]
    assert "layers" in str(spec)
    assert "conv1, conv2, head" in str(spec)
    assert f'<td style="text-align: left">{spec.run_id}</td>' in spec._repr_html_()


def test_a_request_names_its_test_samples(runs_of_all_kinds) -> None:
    """Also where they are those of the runs that scores are made of."""
    for run in (runs_of_all_kinds.influence, runs_of_all_kinds.attribution):
        said = dict(run.spec.request_in_words())
        assert said["queries"] == "loss of test samples 5, 0, 111"
        assert said["queries"] in results(run)._repr_html_()
    assert "queries" not in dict(runs_of_all_kinds.norms.spec.request_in_words())


def test_checks_are_lines_and_a_table() -> None:
    found = influence_jobs.check(DigitsTask, width=2)
    assert repr(found) == "\n".join(str(finding) for finding in found)
    assert found._repr_html_().count("<tr>") == len(found) > 5


def test_a_figure_shows_itself(runs_of_all_kinds) -> None:
    found = results(runs_of_all_kinds.influence)
    figure = found.figure(found.figures[0])
    data, size = figure._repr_png_()  # type: ignore[attr-defined]
    image = Image.open(io.BytesIO(data))
    assert image.size[0] / image.size[1] == pytest.approx(size["width"] / size["height"], rel=0.01)
