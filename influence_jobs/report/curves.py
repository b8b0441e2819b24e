"""What retraining did to the loss, drawn: curves against k, and linear datamodeling scores."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_METHOD, _RANDOM, _OTHER = "#1f6fb2", "#c8443c", "#8a8f98"
_PANELS = {"relabel": "labels changed", "remove": "samples removed"}


def _figure(columns: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(4.2 * columns, 3.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes


def ablation_figure(
    summary: Sequence[Mapping[str, Any]], by: str, quantity: str = "loss"
) -> Figure:
    """Mean change of the loss against k, one method and random samples, a panel for each mode.

    Args:
        summary: Rows of an ablation run's table `summary`.
        by: The method.
        quantity: What was measured of the queries.
    """
    modes = [mode for mode in _PANELS if any(row["mode"] == mode for row in summary)]
    figure, axes = _figure(len(modes))
    for i, (axis, mode) in enumerate(zip(axes, modes, strict=True)):
        for name, color in dict.fromkeys((("random", _RANDOM), (by, _METHOD))):
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
            axis.plot(k, mean, color=color, marker="o", markersize=3, linewidth=1.4, label=name)
            axis.fill_between(k, low, high, color=color, alpha=0.15, linewidth=0)
        axis.axhline(0, color=_OTHER, linewidth=0.6)
        axis.set_title(f"({'ab'[i]}) {_PANELS[mode]}", fontsize=9, loc="left")
        axis.set_xlabel("samples k", fontsize=8)
    axes[0].set_ylabel(f"mean change of the queries' {quantity}", fontsize=8)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def lds_figure(summary: Sequence[Mapping[str, Any]]) -> Figure:
    """Mean linear datamodeling scores with their intervals, the best method first.

    Args:
        summary: Rows of an LDS run's table `summary`.
    """
    rows = sorted(
        (row for row in summary if not np.isnan(row["mean_lds"])), key=lambda row: row["mean_lds"]
    )
    figure, (axis,) = _figure(1)
    means = np.array([row["mean_lds"] for row in rows])
    bounds = np.array([[row["low"], row["high"]] for row in rows]).T
    axis.barh(
        [row["method"] for row in rows],
        means,
        xerr=np.abs(bounds - means),
        color=_METHOD,
        error_kw={"elinewidth": 1, "ecolor": "0.3"},
    )
    axis.axvline(0, color=_OTHER, linewidth=0.6)
    axis.set_xlabel("linear datamodeling score, mean over queries", fontsize=8)
    return figure


def norms_figure(norms_N: np.ndarray[Any, Any], limit: float, layer: str) -> Figure:
    """Histogram of the samples' total gradient norms, with the limit beyond which they count as outliers."""
    figure, (axis,) = _figure(1)
    axis.hist(norms_N, bins=80, color=_METHOD)
    axis.set_yscale("log")
    beyond = int((norms_N > limit).sum())
    axis.axvline(limit, color=_RANDOM, linewidth=1)
    axis.set_title(
        f"{beyond:,} of {len(norms_N):,} samples beyond {limit:g}", fontsize=9, loc="left"
    )
    axis.set_xlabel(f"gradient norm at {layer}, summed over channels", fontsize=8)
    axis.set_ylabel("samples", fontsize=8)
    return figure
