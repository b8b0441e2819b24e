"""The report: one page for runs of every kind, its figures and their data."""

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from influence_jobs import __version__
from influence_jobs.errors import SpecError, StoreError
from influence_jobs.kinds import view_of
from influence_jobs.kinds.attribution.spec import AttributionSpec
from influence_jobs.report.html import render_report, sections_of, write_report
from influence_jobs.store.files import LocalFiles
from influence_jobs.store.run import Run
from influence_jobs.tasks.base import Task


@pytest.fixture(scope="module")
def every(runs_of_all_kinds):
    """All runs, each once: the parts of the paper run, and those that are not in it."""
    kinds = runs_of_all_kinds
    return [kinds.paper, kinds.s_test, kinds.random, kinds.lds]


@pytest.fixture(scope="module")
def report(every, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_report("Everything", sections_of(every), folder)
    return folder


def test_every_kind_of_run_has_a_section_that_says_how_it_was_made(report, every) -> None:
    text = (report / "report.html").read_text()
    kinds = ("train", "grad-norms", "influence", "attribution", "stability", "ablation")
    assert "gradient equivalents" in text
    for kind in (*kinds, "s-test", "baseline", "lds"):
        section = re.search(rf'<section id="{kind}-digitstask-\w+".*?</section>', text, re.DOTALL)
        assert section, kind
        assert "What was asked" in section[0]
        assert f"influence-jobs {__version__}, torch" in section[0], kind
        assert "&#34;kind&#34;: &#34;" + kind in section[0]
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (1280, "light"),
        (390, "dark"),
        pytest.param(1280, "dark", marks=pytest.mark.slow),
        pytest.param(390, "light", marks=pytest.mark.slow),
    ],
)
def test_it_opens_from_disk_alone(report, watched, faults, width, scheme) -> None:
    shown = watched(width, scheme)
    address = (report / "report.html").as_uri()
    shown.page.goto(address)
    shown.page.wait_for_load_state("networkidle")
    assert shown.complaints == []
    assert shown.requests == [address]
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
    pictures = shown.page.locator("img").evaluate_all(
        "all => all.map(one => [one.alt, one.naturalWidth])"
    )
    assert len(pictures) > 60
    assert all(alt.strip() and size for alt, size in pictures)
    assert faults(shown.page) == []
    ground = shown.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


def test_every_figure_is_a_picture_with_its_data(report, every) -> None:
    names = {
        "training",
        "norms-conv2",
        "largest-norms",
        "nodes",
        "top-helpful",
        "top-harmful",
        "top-attribution",
        "top-baseline",
        "seeds-helpful",
        "ablation-helpful",
        "lds",
    }
    found = {path.stem for path in report.glob("figures/*/*.png")}
    assert names <= found
    for path in report.glob("figures/*/*.png"):
        assert pq.read_table(path.with_suffix(".parquet")).num_rows > 0
        with Image.open(path) as image:
            assert min(image.size) > 200
            assert len(image.convert("L").getcolors(256)) > 16


def test_the_data_are_those_of_the_store(runs_of_all_kinds) -> None:
    kinds = runs_of_all_kinds
    said: list[str] = []
    shown = {one.name: one for one in view_of(kinds.norms).figures(said.append)}
    head = np.asarray(kinds.norms.array("norms/head")[:])
    expected = [np.argsort(-head[:, node], kind="stable")[:5].tolist() for node in range(10)]
    rows = shown["nodes"].data.to_pylist()
    assert [row["sample"] for row in rows] == np.ravel(expected).tolist()
    assert [row["channel"] for row in rows] == np.repeat(range(10), 5).tolist()
    matching = sum(row["label"] == row["channel"] for row in rows)
    assert shown["nodes"].caption.startswith(f"{matching} of 50 ")
    assert sum(cell.matches for row in shown["nodes"].rows for cell in row.samples) == matching
    totals = np.asarray(kinds.norms.array("norms/conv2")[:]).sum(axis=1, dtype=np.float64)
    counts = shown["norms-conv2"].data
    assert counts.column("samples").to_numpy().sum() == len(totals)
    assert f"the largest is {totals.max():.3g}" in shown["norms-conv2"].caption

    scores = np.asarray(kinds.influence.array("scores")[:])
    shown = {one.name: one for one in view_of(kinds.influence).figures(said.append)}
    for side, sign in (("helpful", -1), ("harmful", 1)):
        samples = shown[f"top-{side}"].data.column("sample").to_pylist()
        order = np.argsort(sign * scores, axis=1, kind="stable")[:, :5]
        assert samples == order.ravel().tolist()

    (seeds,) = view_of(kinds.stability).figures(said.append)
    rows = seeds.data.to_pylist()
    assert len(rows) == 3 * 2 * 5
    first = [row["sample"] for row in rows if row["training"] == "first training"]
    assert first == np.argsort(-scores, axis=1, kind="stable")[:, :5].ravel().tolist()
    overlap = len(set(first[:5]) & {row["sample"] for row in rows[5:10]})
    assert seeds.rows[1].samples and overlap == sum(
        cell.lines[-1] == "in 2 of 2" for cell in seeds.rows[0].samples
    )
    assert said == []


def test_figures_of_the_research_reports_experiments_have_its_numbers(runs_of_all_kinds) -> None:
    sections = sections_of([runs_of_all_kinds.paper])
    numbers = {one.name: one.number for section in sections for one in section.figures}
    assert numbers["nodes"] == "4.1"
    assert numbers["top-attribution"] == "4.2"
    assert (numbers["top-helpful"], numbers["top-harmful"]) == ("4.3", "4.4")
    assert numbers["seeds-helpful"] == "4.6"
    assert numbers["ablation-helpful"] == "4.9"
    assert numbers["training"] is None
    alone = sections_of([runs_of_all_kinds.influence])
    assert {one.number for section in alone for one in section.figures} == {None}


def test_points_are_marked_where_they_are(denoiser_runs, tmp_path, watched) -> None:
    _, attribution = denoiser_runs
    (tmp_path / "page.html").write_text(render_report("points", sections_of([attribution])))
    page = watched().page
    page.goto((tmp_path / "page.html").as_uri())
    image = page.locator(".query img").first.bounding_box()
    mark = page.locator(".mark").first.bounding_box()
    # Row 40 of 80, column 30 of 96.
    assert mark["y"] + mark["height"] / 2 - image["y"] == pytest.approx(image["height"] / 2, abs=3)
    centre = mark["x"] + mark["width"] / 2 - image["x"]
    assert centre == pytest.approx(image["width"] * 30 / 96, abs=3)
    area = page.locator(".area").first.bounding_box()
    other = page.locator(".query img").nth(1).bounding_box()
    assert area["width"] == pytest.approx(other["width"] * 24 / 96, abs=4)


def test_a_page_does_not_tell_where_things_lie(denoiser_runs) -> None:
    spec = denoiser_runs[1].spec
    assert isinstance(spec, AttributionSpec)
    text = render_report("paths", sections_of([denoiser_runs[1]]))
    assert "weights.pth (SHA-256 " in text
    for path in (*spec.task.paths.values(), denoiser_runs[1].root, spec.checkpoint.path):
        assert path not in text


def test_what_cannot_be_shown_is_said(runs_of_all_kinds, denoiser_runs, tmp_path) -> None:
    spec = denoiser_runs[1].spec
    assert isinstance(spec, AttributionSpec)
    gone = {**spec.task.paths, "images": str(tmp_path / "gone")}
    moved = spec.model_copy(update={"task": spec.task.model_copy(update={"paths": gone})})
    (section,) = sections_of([Run(denoiser_runs[1].root, moved)])
    assert section.figures == []
    assert "no pictures: " in section.notes[0]
    assert str(tmp_path / "gone") in section.notes[0]
    assert section.notes[0].replace("'", "&#39;") in render_report("moved", [section])


def test_unfinished_runs_are_refused(finished_run, tmp_path) -> None:
    run = Run.create(str(tmp_path), finished_run.spec)
    with pytest.raises(StoreError, match=r"not finished \(new\): infl resume grad-norms-"):
        sections_of([run])


@pytest.mark.parametrize("below", ["", "sub", "sub/deeper"])
@pytest.mark.parametrize(("name", "what"), [("file", "a file"), ("link", "a link to nothing")])
def test_a_folder_that_cannot_be_is_refused(tmp_path, name, what, below) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(SpecError, match=f": {tmp_path}/{name} is {what}, name a folder$"):
        write_report("", [], tmp_path / name / below)
    assert not (tmp_path / "gone").exists()


def test_a_report_is_written_through_a_link_to_a_folder(tmp_path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    write_report("", [], tmp_path / "link" / "sub")
    assert (tmp_path / "folder/sub/report.html").is_file()
    # What is in the way lies above a link that leads somewhere.
    (tmp_path / "folder/file").touch()
    with pytest.raises(SpecError, match=f": {tmp_path}/link/file is a file, name a folder$"):
        write_report("", [], tmp_path / "link/file/sub")


def test_titles_tell_runs_apart(runs_of_all_kinds) -> None:
    kinds = vars(runs_of_all_kinds).values()
    assert len({view_of(run).title for run in kinds}) == len(list(kinds))


def test_a_task_without_pictures_is_told_in_words(
    runs_of_all_kinds, tmp_path, monkeypatch, watched, faults
) -> None:
    from digits import DigitsTask

    monkeypatch.setattr(DigitsTask, "pictures", Task.pictures)
    monkeypatch.setattr(DigitsTask, "test_picture", Task.test_picture)
    sections = sections_of([runs_of_all_kinds.influence, runs_of_all_kinds.norms])
    assert all(section.notes == [] for section in sections)
    write_report("words", sections, tmp_path)
    shown = watched(390)
    shown.page.goto((tmp_path / "report.html").as_uri())
    expected = runs_of_all_kinds.influence.array("scores")[0].argmax()
    first = shown.page.locator(".row").first
    assert "test 5, label" in first.inner_text()
    assert first.locator(".cell").nth(1).inner_text().startswith(f"{expected}\nscore ")
    assert faults(shown.page) == []


def test_a_report_reads_no_entry_of_a_shard(
    runs_of_all_kinds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a stability study with many runs of many shards, it would be thousands of files."""
    read: list[str] = []
    original = LocalFiles.read
    monkeypatch.setattr(
        LocalFiles, "read", lambda self, n, **k: read.append(n) or original(self, n, **k)
    )
    (section,) = sections_of([runs_of_all_kinds.stability])
    assert len(section.made) == 7
    entries = [name for name in read if name.startswith("manifest/")]
    assert entries == ["manifest/finish.json"] * len(section.made)
