"""Every kind of run on the pretended GPU, through the driver in this process: arrays and waits."""

import shutil
from collections.abc import Callable, Iterator
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
TASK, TEXTS = f"{NETWORKS}:Digits", f"{NETWORKS}:Texts"
QUERIES: dict[str, Any] = {"test": [1, 2]}
LISSA: dict[str, Any] = {"solver": "lissa", "depth": 20, "scale": 9, "batch": 4}
OF_TOKENS: dict[str, Any] = {"task": TEXTS, "solver": "identity", "per_token": True}

# By name: the kind, its options, and the waits of a batch besides those of a shard.
JOBS: dict[str, tuple[str, dict[str, Any], int]] = {
    "grad-norms": ("grad-norms", {"layer": ["all"]}, 0),
    "grad-norms, tokens": ("grad-norms", {"task": TEXTS, "layer": ["head"], "per_token": True}, 4),
    "influence": ("influence", QUERIES, 0),
    "influence, LiSSA": ("influence", {**QUERIES, **LISSA}, 0),
    "influence, relative": ("influence", {**QUERIES, "solver": "ek-fac", "relative": "theta"}, 4),
    "influence, tokens": ("influence", {**QUERIES, **OF_TOKENS}, 4),
    "influence, SOURCE": ("influence", {**QUERIES, "solver": "source", "segments": 2}, 4),
    "attribution": ("attribution", {**QUERIES, "layer": ["1"]}, 0),
    "loss": ("baseline", {**QUERIES, "method": "loss"}, 0),
    "norm": ("baseline", {**QUERIES, "method": "norm"}, 1),
    "random": ("baseline", {**QUERIES, "method": "random"}, 0),
    "gradients": ("gradients", {"dim": "3x4"}, 0),
}  # fmt: skip
# Of other runs' arrays or of several models, and so without batches to compare.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "train": ("train", {"epochs": 2, "batch_size": 16, "norms_layer": ["1"]}),
    "gradient-scores": ("gradient-scores", {**QUERIES, "method": "trak"}),
    "unrolled": ("unrolled", QUERIES),
    "ablation": ("ablation", {**QUERIES, "k": [5], "by": ["random"], "seeds": 1}),
    "lds": ("lds", {**QUERIES, "by": ["random"], "subsets": 3, "seeds": 1}),
    "stability": ("stability", {**QUERIES, "top": 5, "by": ["dot-product"], "retrainings": 1}),
}


@pytest.fixture
def here(gpu: PretendGpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Runs a kind on the pretended GPU; gives its results and the waits of its own shards."""

    def submitted(kind: str, **options: Any) -> tuple[Any, list[Wait]]:
        waits: list[Wait] = []
        with monkeypatch.context() as patch:
            patch.setattr(devices, "resolved", lambda device: str(gpu.device))
            run_shard = ShardRunner.run

            def counted(runner: ShardRunner, shard: Any) -> Any:
                with gpu.counting() as found:
                    receipt = run_shard(runner, shard)
                if runner.kind == kind:
                    waits.extend(found)
                return receipt

            patch.setattr(ShardRunner, "run", counted)
            return influence_jobs.submit(kind, quiet=True, **options), waits

    yield submitted


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with a short training of each task on the CPU."""
    root = tmp_path_factory.mktemp("trained")
    for task in (TASK, TEXTS):
        influence_jobs.submit("train", task=task, runs=root, epochs=2, quiet=True)
    return root


def arrays(results: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(results.run.array(name)[...]) for name in results.arrays}


def require_alike(found: Any, expected: Any) -> None:
    ours, theirs = arrays(found), arrays(expected)
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        largest = np.nanmax(np.abs(values), initial=0)
        np.testing.assert_allclose(ours[name], values, rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize("name", JOBS)
def test_a_run_of_samples(name, trained, tmp_path, here):
    kind, options, of_a_batch = JOBS[name]
    options = {"task": TASK, "epochs": 2, **options}
    waits = {}
    for size in (4, 24):
        root = tmp_path / str(size)
        shutil.copytree(trained, root)
        found, waits[size] = here(kind, runs=root, batch_size=size, **options)
    more = len(waits[4]) - len(waits[24])
    assert more <= of_a_batch * (48 // 4 - 48 // 24), "\n".join(map(str, waits[4]))
    shutil.copytree(trained, tmp_path / "cpu")
    require_alike(
        found,
        influence_jobs.submit(kind, runs=tmp_path / "cpu", batch_size=24, quiet=True, **options),
    )


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_of_other_runs_or_models(name, trained, tmp_path, here):
    kind, options = OTHERS[name]
    options = {"task": TASK, "epochs": 2, **options}
    for root in ("gpu", "cpu"):
        shutil.copytree(trained, tmp_path / root)
    found, _ = here(kind, runs=tmp_path / "gpu", **options)
    expected = influence_jobs.submit(kind, runs=tmp_path / "cpu", quiet=True, **options)
    require_alike(found, expected)


def test_a_shard_is_copied_once(trained, tmp_path, here):
    shutil.copytree(trained, tmp_path / "runs")
    options = {"task": TASK, "epochs": 2, "layer": ["all"], "batch_size": 4}
    _, waits = here("grad-norms", runs=tmp_path / "runs", **options)
    assert sum("rows.py" in " ".join(wait.stack) for wait in waits) == 1


def test_norms_that_leave_the_range_of_float32_are_computed_again(trained, tmp_path, here):
    """Squares of these gradients vanish in float32, which a shard shows at its end."""
    options = {"epochs": 2, "layer": ["1"], "batch_size": 8, "reduce": "layer"}
    shutil.copytree(trained, tmp_path / "runs")
    faint, _ = here("grad-norms", task=f"{NETWORKS}:FaintDigits", runs=tmp_path / "runs", **options)
    plain, _ = here("grad-norms", task=TASK, runs=tmp_path / "runs", **options)
    (found,), (expected,) = arrays(faint).values(), arrays(plain).values()
    assert expected.min() > 0
    np.testing.assert_allclose(found, expected * 2.0**-90, rtol=1e-5)
