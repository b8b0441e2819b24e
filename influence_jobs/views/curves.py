"""Charts: panels that are drawn side by side for print, or one by one on narrow pages."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from influence_jobs.views.drawing import Drawing
from influence_jobs.views.ranking import named

# These colours are equally visible on white and on black.
METHOD, RANDOM, OTHER = "#3b82c4", "#d9534f", "#8a8f98"
_INK = {False: "#1f2328", True: "#e6e8eb"}
_PANELS = {"relabel": "labels changed", "remove": "samples removed"}
_SIZE = (4.2, 3.2)  # inches


@dataclass(frozen=True)
class Panel:
    """One pair of axes: its title, and the function that draws on it."""

    title: str
    draw: Callable[[Axes], None]


def chart(panels: Sequence[Panel], *, dark: bool = False) -> Figure:
    """Draw panels side by side, in ink for a light or a dark page."""
    ink = _INK[dark]
    colors = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style: Any = {**dict.fromkeys(colors, ink), "font.size": 8, "axes.titlesize": 9}
    with mpl.rc_context(style):
        figure = Drawing(figsize=(_SIZE[0] * len(panels), _SIZE[1]), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        for axis, panel in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            axis.set_facecolor("none")
            axis.spines[["top", "right"]].set_visible(False)
            panel.draw(axis)
            axis.set_title(panel.title, loc="left")
    return figure


def ablation_panels(
    summary: Sequence[Mapping[str, Any]], by: str, quantity: str = "loss"
) -> list[Panel]:
    """Mean change of the loss against k, for one method and random samples; a panel for each mode.

    Args:
        summary: Rows of an ablation run's table `summary`.
        by: The method; not `random`.
        quantity: The measured quantity of the queries.
    """
    modes = [mode for mode in _PANELS if any(row["mode"] == mode for row in summary)]
    return [
        Panel(
            f"({'ab'[i]}) {_PANELS[mode]}",
            partial(_against_k, summary=summary, by=by, mode=mode, quantity=quantity),
        )
        for i, mode in enumerate(modes)
    ]


def _against_k(
    axis: Axes, summary: Sequence[Mapping[str, Any]], by: str, mode: str, quantity: str
) -> None:
    for name, color, marker in (("random", RANDOM, "s"), (by, METHOD, "o")):
        rows = sorted(
            (row for row in summary if (row["mode"], row["by"]) == (mode, name)),
            key=lambda row: row["k"],
        )
        if not rows:
            continue
        k, mean, low, high = (
            np.array([0, *(row[c] for row in rows)], dtype=float)
            for c in ("k", "mean_change", "low", "high")
        )
        label = named(name, quantity)
        axis.plot(k, mean, color=color, marker=marker, markersize=3.5, linewidth=1.4, label=label)
        axis.fill_between(k, low, high, color=color, alpha=0.2, linewidth=0)
        if name == by:
            for row in rows:
                if row["changed_decisions"]:
                    _note(axis, str(row["changed_decisions"]), (row["k"], row["mean_change"]))
    axis.axhline(0, color=OTHER, linewidth=0.6)
    axis.set_xlabel("samples k")
    axis.set_ylabel(f"mean change of the queries' {quantity}")
    axis.legend(frameon=False)


def _note(axis: Axes, text: str, at: tuple[float, float]) -> None:
    """Write beside a point."""
    axis.annotate(text, at, xytext=(0, 5), textcoords="offset points", ha="center", fontsize=7)


def lds_panels(summary: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Mean linear datamodeling scores with their intervals, the best method first.

    Args:
        summary: Rows of an LDS run's table `summary`.
    """
    rows = sorted(
        (row for row in summary if not np.isnan(row["mean_lds"])), key=lambda row: row["mean_lds"]
    )
    means = np.array([row["mean_lds"] for row in rows])
    bounds = np.array([[row["low"], row["high"]] for row in rows]).T

    def draw(axis: Axes) -> None:
        axis.barh(
            [row["method"] for row in rows],
            means,
            xerr=np.abs(bounds - means),
            color=METHOD,
            error_kw={"elinewidth": 1, "ecolor": OTHER},
        )
        axis.axvline(0, color=OTHER, linewidth=0.6)
        axis.set_xlabel("linear datamodeling score, mean over queries")

    return [Panel("", draw)]


def histogram_panels(
    counts: npt.NDArray[np.int64], edges: npt.NDArray[np.float64], limit: float, label: str
) -> list[Panel]:
    """A histogram with a line at `limit`; values above it count as outliers."""

    def draw(axis: Axes) -> None:
        axis.stairs(counts, edges, fill=True, color=METHOD)
        axis.set_yscale("log")
        axis.axvline(limit, color=RANDOM, linewidth=1, linestyle="--")
        axis.set_xlabel(label)
        axis.set_ylabel("samples")

    return [Panel("", draw)]


def epoch_panels(metrics: Sequence[Mapping[str, float]]) -> list[Panel]:
    """The measurements after each epoch, a panel for each.

    Args:
        metrics: Rows of a train run's table `metrics`.
    """
    epochs = [row["epoch"] for row in metrics]

    def panel(name: str) -> Panel:
        def draw(axis: Axes) -> None:
            axis.plot(
                epochs, [row[name] for row in metrics], color=METHOD, marker="o", markersize=3
            )
            axis.set_xlabel("epoch")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))

        return Panel(name.replace("_", " "), draw)

    return [panel(name) for name in metrics[0] if name != "epoch"]
