"""What charts draw, read back from their axes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex

from influence_jobs.views.curves import (
    METHOD,
    RANDOM,
    Panel,
    ablation_panels,
    chart,
    epoch_panels,
    histogram_panels,
    lds_panels,
)


def row(mode: str, by: str, k: int, change: float, changed: int = 0) -> dict[str, Any]:
    return {
        "mode": mode,
        "by": by,
        "k": k,
        "mean_change": change,
        "low": change - 1,
        "high": change + 2,
        "changed_decisions": changed,
    }


SUMMARY = [
    row("relabel", "helpful", 300, 0.5, changed=2),
    row("relabel", "helpful", 20, 0.25),
    row("relabel", "random", 20, -0.125, changed=1),
    row("relabel", "loss", 20, 7.0),
    row("remove", "helpful", 20, 3.0),
]


def drawn(panels: Sequence[Panel], *, dark: bool = False) -> list[Any]:
    """The axes of a chart; its artists are of many types."""
    return list(chart(panels, dark=dark).axes)


def lines(axis: Any) -> dict[str, list[tuple[float, float]]]:
    """The points of an axis' labelled lines."""
    return {
        str(line.get_label()): list(zip(*map(list, line.get_data()), strict=True))
        for line in axis.lines
        if not str(line.get_label()).startswith("_")
    }


def test_an_ablation_is_drawn_from_zero_in_order_of_k_beside_random_samples() -> None:
    relabelled, removed = drawn(ablation_panels(SUMMARY, "helpful", "output"))
    assert relabelled.get_title(loc="left") == "(a) labels changed"
    assert removed.get_title(loc="left") == "(b) samples removed"
    of_random, of_method = lines(relabelled).items()
    assert of_random == ("random", [(0, 0), (20, -0.125)])
    assert of_method[1] == [(0, 0), (20, 0.25), (300, 0.5)]
    assert list(lines(removed).values()) == [[(0, 0), (20, 3)]]
    colors = [line.get_color() for line in relabelled.lines[:2]]
    assert colors == [RANDOM, METHOD]
    band = {tuple(point) for point in relabelled.collections[1].get_paths()[0].vertices.tolist()}
    assert band == {(0, 0), (20, -0.75), (300, -0.5), (300, 2.5), (20, 2.25)}
    assert [(note.get_text(), note.xy) for note in relabelled.texts] == [("2", (300, 0.5))]
    assert [line.get_ydata()[0] for line in relabelled.lines[2:]] == [0]
    assert relabelled.get_xlabel() == "samples k"
    assert relabelled.get_ylabel() == "mean change of the queries' output"


def test_methods_are_bars_with_their_intervals_the_best_on_top() -> None:
    def of(method: str, mean: float) -> dict[str, Any]:
        return {"method": method, "mean_lds": mean, "low": mean - 0.25, "high": mean + 0.125}

    summary = [of("good", 0.5), of("none", np.nan), of("bad", -0.25)]
    (axis,) = drawn(lds_panels(summary))
    assert [text.get_text() for text in axis.get_yticklabels()] == ["bad", "good"]
    assert [bar.get_width() for bar in axis.patches] == [-0.25, 0.5]
    bounds = [segment[:, 0].tolist() for segment in axis.collections[0].get_segments()]
    assert bounds == [[-0.5, -0.125], [0.25, 0.625]]


def test_a_histogram_has_its_counts_and_its_limit() -> None:
    counts, edges = np.array([3, 0, 5]), np.array([0.0, 1.0, 2.0, 4.0])
    (axis,) = drawn(histogram_panels(counts, edges, 1.5, "norm at head"))
    values, bounds, _ = axis.patches[0].get_data()
    assert (values.tolist(), bounds.tolist()) == (counts.tolist(), edges.tolist())
    assert [list(line.get_xdata()) for line in axis.lines] == [[1.5, 1.5]]
    assert axis.get_yscale() == "log"
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("norm at head", "samples")


def test_every_measured_figure_has_its_panel_over_epochs() -> None:
    metrics = [
        {"epoch": 1, "mean_loss": 2.0, "accuracy": 0.5},
        {"epoch": 2, "mean_loss": 1.0, "accuracy": 0.75},
    ]
    axes = drawn(epoch_panels(metrics))
    assert [axis.get_title(loc="left") for axis in axes] == ["mean loss", "accuracy"]
    points = [[list(data) for data in axis.lines[0].get_data()] for axis in axes]
    assert points == [[[1, 2], [2.0, 1.0]], [[1, 2], [0.5, 0.75]]]
    assert all(float(tick).is_integer() for tick in axes[0].get_xticks())


@pytest.mark.parametrize(("dark", "brightness"), [(False, "dark"), (True, "light")])
def test_ink_is_seen_on_its_page(dark: bool, brightness: str) -> None:
    (axis,) = drawn(epoch_panels([{"epoch": 1, "loss": 2.0}]), dark=dark)
    ink = to_hex(axis.xaxis.label.get_color())
    assert (int(ink[1:3], 16) > 128) == (brightness == "light")
