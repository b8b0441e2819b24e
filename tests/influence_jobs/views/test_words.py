"""What tables and captions make of numbers, names and places."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from infl_cli.render import print_table
from influence_jobs.terms import speed
from influence_jobs.views import scores as scores_view
from influence_jobs.views.contact_sheet import Cell
from influence_jobs.views.figure import file_name
from influence_jobs.views.ranking import by_query, named, places, summed_over
from influence_jobs.views.scores import of_first, scores_seen
from influence_jobs.views.sheets import region_of
from influence_jobs.views.table import Table, cell_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"),
        (-0.5, "-0.5"),
        (999.4, "999"),
        (1000.0, "1,000"),
        (-123456.7, "-123,457"),
        (1e7, "1e+07"),
        (9.99e6, "9,990,000"),
        (float("nan"), "-"),
        (None, "-"),
        (123456, "123456"),
        ("loss", "loss"),
    ],
)
def test_numbers_have_three_digits_and_thousands_apart(value: object, text: str) -> None:
    assert cell_text(value) == text


@pytest.mark.parametrize(
    ("rate", "text"), [(12345.6, "12,346"), (10, "10"), (0.254, "0.25"), (7.04, "7")]
)
def test_slow_speeds_are_not_zero(rate: float, text: str) -> None:
    assert speed(rate) == f"{text} samples/s"


def test_a_missing_number_is_the_same_in_all_tables(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("a", 0.5, None), ("b", float("nan"), float("nan"))]
    print_table(("method", "mean", "low"), rows)
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["a", "0.50000", "-"],
        ["b", "-", "-"],
    ]


def test_a_table_in_markdown() -> None:
    table = Table("What", ("a", "b"), [("x", 0.25), ("y", 2000.0)], "Mind.")
    assert table.markdown() == (
        "**What**\n\n| a | b |\n|---|---|\n| x | 0.25 |\n| y | 2,000 |\n\nMind.\n"
    )
    assert Table("What", ("a",), [("x",)]).markdown().endswith("| x |\n")


@pytest.mark.parametrize(
    ("axis", "ndim", "channel", "words"),
    [
        (0, 1, None, ""),
        (0, 2, None, "channels"),
        (0, 2, 3, ""),
        (0, 3, None, "channels and kernel positions"),
        (0, 4, 3, "kernel positions"),
        (1, 2, None, "checkpoints"),
        (1, 3, None, "checkpoints and channels"),
        (1, 5, None, "checkpoints and channels and kernel positions"),
    ],
)
def test_what_a_ranking_of_norms_sums_over(
    axis: int, ndim: int, channel: int | None, words: str
) -> None:
    run: Any = SimpleNamespace(row_axis=lambda _: axis, array=lambda _: SimpleNamespace(ndim=ndim))
    assert summed_over(run, "norms/a", channel=channel) == words


def test_methods_are_called_helpful_where_they_are_of_a_loss() -> None:
    assert named("helpful", "loss") == "helpful"
    assert named("helpful", "output") == "influence that lowers the output"
    assert named("harmful", "change") == "influence that raises the change"
    assert named("random", "output") == "random"


@pytest.mark.parametrize(
    ("text", "name"), [("main.29", "main-29"), ("a b/c+d_e", "a-b-c+d_e"), (".x.", "x")]
)
def test_names_of_files(text: str, name: str) -> None:
    assert file_name(text) == name


def test_places_have_regions_if_any_query_has_one() -> None:
    plain = [{"test": 5, "region": None, "more": 1}, {"test": 0, "region": None, "more": 2}]
    assert places(plain) == [{"test": 5}, {"test": 0}]
    assert places([plain[0], {"test": 0, "region": "1,2,3,4"}]) == [
        {"test": 5, "region": None},
        {"test": 0, "region": "1,2,3,4"},
    ]
    assert region_of("1,20,3,4") == (1, 20, 3, 4)
    assert region_of(None) is None


def ranked(*queries: tuple[int, str | None]) -> list[dict[str, Any]]:
    return [
        {"test": test, "region": region, "side": "helpful", "sample": 10 * rank, "label": rank}
        for test, region in queries
        for rank in (1, 2)
    ]


def test_captions_of_scores_say_what_is_marked_and_what_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = ranked((5, None), (5, "1,2,3,4"))
    queries: list[dict[str, Any]] = [
        {"test": 5, "region": None, "label": 1},
        {"test": 5, "region": "1,2,3,4", "label": 7},
    ]
    counted = "Places: 4, different samples in them: 2."
    mark = " The mark shows the explained point or region."
    frame = " Places with the label of their query (green frame): 1."
    assert scores_seen(rows, queries, classes=True) == counted + frame + mark
    assert scores_seen(rows, queries, classes=False) == counted + mark
    unlabelled = [{k: v for k, v in row.items() if k != "label"} for row in rows]
    assert scores_seen(unlabelled, queries, classes=True) == counted + mark
    monkeypatch.setattr(scores_view, "MAX_ROWS", 2)
    assert scores_seen(rows, queries, classes=False) == counted + mark
    monkeypatch.setattr(scores_view, "MAX_ROWS", 1)
    more = " Only the first 1 of 2 queries are drawn; the data have all."
    assert scores_seen(rows, queries, classes=False) == counted + mark + more
    assert of_first(rows, 1) == rows[:2]
    assert list(by_query(rows)) == [(5, None, "helpful"), (5, "1,2,3,4", "helpful")]


@pytest.mark.parametrize(("height", "photo"), [(64, False), (65, True)])
def test_large_pictures_are_photographs(height: int, photo: bool) -> None:
    assert Cell(np.zeros((height, 8), dtype=np.uint8), []).is_photo == photo
    assert not Cell(None, []).is_photo
