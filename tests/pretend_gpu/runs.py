"""Every kind of run on the pretended GPU: its options, and the waits that it may take."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import influence_jobs
from influence_jobs import devices
from influence_jobs.kinds.runner import ShardRunner

from . import networks
from .pretend import PretendGpu, Wait

NETWORKS = Path(networks.__file__)
TASK, TEXTS, REPORT, EMBEDDED = (
    f"{NETWORKS}:{name}" for name in ("Digits", "Texts", "ReportDigits", "EmbeddedDigits")
)
QUERIES: dict[str, Any] = {"test": [1, 2]}
LISSA: dict[str, Any] = {"solver": "lissa", "depth": 20, "scale": 9, "batch": 4}
OF_TOKENS: dict[str, Any] = {"task": TEXTS, "solver": "identity", "per_token": True}
OF_STORE: dict[str, Any] = {"gradients": "gradients-digits"}
GRID: dict[str, Any] = {"solver": ["cg"], "epoch": [2], "damping": [0.1], "models": [1]}
CALIBRATE: dict[str, Any] = {**QUERIES, **GRID, "subsets": 8, "held_out": 8, "seeds": 2}

# By name: the kind, its options, and the waits of a batch besides those of a shard.
JOBS: dict[str, tuple[str, dict[str, Any], int]] = {
    "grad-norms": ("grad-norms", {"layer": ["all"]}, 0),
    "grad-norms, tokens": ("grad-norms", {"task": TEXTS, "layer": ["head"], "per_token": True}, 0),
    "s-test": ("s-test", QUERIES, 0),
    "s-test, EK-FAC": ("s-test", {**QUERIES, "solver": "ek-fac"}, 0),
    "s-test, LiSSA": ("s-test", {**QUERIES, **LISSA}, 0),
    "s-test, SOURCE": ("s-test", {**QUERIES, "solver": "source", "segments": 2}, 0),
    "influence": ("influence", QUERIES, 0),
    "influence, LiSSA": ("influence", {**QUERIES, **LISSA}, 0),
    "influence, relative": ("influence", {**QUERIES, "solver": "ek-fac", "relative": "theta"}, 0),
    "influence, tokens": ("influence", {**QUERIES, **OF_TOKENS}, 0),
    "influence, SOURCE": ("influence", {**QUERIES, "solver": "source", "segments": 2}, 0),
    "attribution": ("attribution", {**QUERIES, "layer": ["1"]}, 0),
    "self-influence": ("self-influence", {}, 0),
    "self-influence, identity": ("self-influence", {"solver": "identity"}, 0),
    "loss": ("baseline", {**QUERIES, "method": "loss"}, 0),
    "norm": ("baseline", {**QUERIES, "method": "norm"}, 0),
    "nearest": ("baseline", {**QUERIES, "task": EMBEDDED, "method": "nearest"}, 0),
    "random": ("baseline", {**QUERIES, "method": "random"}, 0),
    "gradients": ("gradients", {"dim": "3x4"}, 0),
}  # fmt: skip


@dataclass(frozen=True)
class Other:
    """A run without batches to compare: of other runs' arrays, or of several models.

    Attributes:
        most: Waits of its shards together.
        first: A kind and options of a run that must be there.
    """

    kind: str
    most: int
    options: dict[str, Any] = field(default_factory=dict)
    first: tuple[str, dict[str, Any]] | None = None


STORE = ("gradients", {"dim": "3x4"})
OTHERS: dict[str, Other] = {
    "train": Other("train", 20, {"epochs": 2, "batch_size": 16, "norms_layer": ["1"]}),
    "unrolled": Other("unrolled", 190, QUERIES),
    "ablation": Other("ablation", 145, {**QUERIES, "k": [5], "by": ["random"], "seeds": 1}),
    "lds": Other("lds", 115, {**QUERIES, "by": ["random"], "subsets": 3, "seeds": 1}),
    "stability": Other(
        "stability", 0, {**QUERIES, "top": 5, "by": ["dot-product"], "retrainings": 1}
    ),
    "calibrate": Other("calibrate", 440, CALIBRATE),
    "query-gradients": Other("query-gradients", 22, {**QUERIES, **OF_STORE}, STORE),
    # These read arrays, and have nothing to ask of a GPU.
    "gradient-scores": Other("gradient-scores", 0, {**QUERIES, "method": "trak"}),
    "gram": Other("gram", 0, OF_STORE, STORE),
    "gradient-index": Other("gradient-index", 0, OF_STORE, STORE),
    "scores": Other("scores", 0, QUERIES),
    # It has no shards: the waits of all its parts.
    "paper": Other("paper", 800, {"task": REPORT, "quick": True}),
}

Submitted = Callable[..., tuple[Any, list[Wait]]]


def submitter(gpu: PretendGpu, monkeypatch: pytest.MonkeyPatch) -> Submitted:
    """Submits a kind on the pretended GPU; gives its results and the waits of its own shards."""

    def submitted(kind: str, **options: Any) -> tuple[Any, list[Wait]]:
        waits: list[Wait] = []
        with monkeypatch.context() as patch:
            patch.setattr(devices, "resolved", lambda device: str(gpu.device))
            run_shard = ShardRunner.run

            def counted(runner: ShardRunner, shard: Any) -> Any:
                with gpu.counting() as found:
                    receipt = run_shard(runner, shard)
                if kind in (runner.kind, "paper"):
                    waits.extend(found)
                return receipt

            patch.setattr(ShardRunner, "run", counted)
            return influence_jobs.submit(kind, quiet=True, **options), waits

    return submitted


def hold_batches(name: str, trained: Path, folder: Path, here: Submitted) -> Any:
    """Require no more waits a batch than are allowed; the results."""
    kind, options, of_a_batch = JOBS[name]
    waits = {}
    for size in (8, 24):
        root = folder / str(size)
        shutil.copytree(trained, root)
        found, waits[size] = here(kind, runs=root, batch_size=size, **of_digits(options))
    more = len(waits[8]) - len(waits[24])
    assert more <= of_a_batch * (48 // 8 - 48 // 24), "\n".join(map(str, waits[8]))
    return found


def hold_shards(name: str, trained: Path, folder: Path, here: Submitted) -> Any:
    """Require no more waits of all shards than are allowed; the results."""
    other = OTHERS[name]
    options = prepared(other, trained, folder, here)
    found, waits = here(other.kind, **options)
    assert len(waits) <= other.most, "\n".join([f"{len(waits)}", *map(str, waits)])
    return found


def prepared(other: Other, trained: Path, folder: Path, submit: Callable[..., Any]) -> Any:
    """The options of a run in a new folder, with what it needs."""
    shutil.copytree(trained, folder)
    if other.first:
        kind, options = other.first
        submit(kind, runs=folder, **of_digits(options))
    options = {"runs": folder, **other.options}
    if other.kind == "scores":
        path = folder / "scores.npy"
        np.save(path, np.arange(2 * 48, dtype=np.float32).reshape(2, 48))
        return {"task": TASK, "file": path, **options}
    if other.kind in ("query-gradients", "gram", "gradient-index"):
        return options
    return of_digits(options)


def of_digits(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a run with the task and the training of `trained`, if they name no others."""
    return {"task": TASK, "epochs": 2, **options}


def arrays(results: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(results.run.array(name)[...]) for name in results.arrays}


def require_alike(found: Any, expected: Any) -> None:
    ours, theirs = arrays(found), arrays(expected)
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        largest = np.nanmax(np.abs(values), initial=0)
        np.testing.assert_allclose(ours[name], values, rtol=1e-3, atol=1e-4 * largest)
