"""The labels by which metrics of runs and workers are told apart, without Ray."""

from typing import Any, ClassVar

import pytest

from infl_cluster import metrics


class Metric:
    """Keeps the labels that it was given."""

    made: ClassVar[list["Metric"]] = []

    def __init__(self, name: str, said: str, keys: tuple[str, ...]) -> None:
        self.keys, self.tags = keys, dict[str, str]()
        self.made.append(self)

    def set_default_tags(self, tags: dict[str, str]) -> None:
        self.tags = tags


@pytest.mark.parametrize(
    ("make", "labels"),
    [
        (
            lambda: metrics.WorkerMetrics("r", "grad-norms", "/runs", "host:7"),
            {"run": "r", "kind": "grad-norms", "folder": "/runs", "worker": "host:7"},
        ),
        (
            lambda: metrics.RunMetrics("r", "grad-norms", "/runs"),
            {"run": "r", "kind": "grad-norms", "folder": "/runs"},
        ),
    ],
)
def test_metrics_name_run_folder_and_worker(
    monkeypatch: pytest.MonkeyPatch, make: Any, labels: dict[str, str]
) -> None:
    monkeypatch.setattr(Metric, "made", [])
    for kind in ("Counter", "Gauge"):
        monkeypatch.setattr(metrics, kind, Metric)
    make()
    assert Metric.made
    for metric in Metric.made:
        assert metric.tags == labels
        assert {*metric.keys} == {*labels}
