"""`--device auto` is what the workers find, wherever the run was submitted."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from infl_cluster import pool
from influence_jobs import devices
from influence_jobs.store.files import LocalFiles


class Runner:
    """Keeps the device that its worker gave it."""

    title = "device"

    def __init__(self, root: str, run_id: str, *, device: str, threads: int, workers: int) -> None:
        self.device = device


class NoMetrics:
    def __init__(self, *_: object) -> None:
        pass


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """The resources of the nodes of a cluster that this process seems to be part of."""
    offered: list[dict[str, float]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(
        ray, "nodes", lambda: [{"Alive": True, "Labels": {}, "Resources": r} for r in offered]
    )
    monkeypatch.setattr(pool, "WorkerMetrics", NoMetrics)
    return offered


@pytest.mark.parametrize(
    ("offered", "asked", "gpus", "workers"),
    [
        ([{"CPU": 4}, {"CPU": 2}], None, 0.0, 6),
        ([{"CPU": 4}, {"CPU": 8, "GPU": 2}], None, 1.0, 2),
        ([{"CPU": 4}, {"CPU": 8, "GPU": 2}], 0.5, 0.5, 4),
        ([{"CPU": 4}, {"CPU": 8, "GPU": 2}], 0.0, 0.0, 12),
    ],
)
def test_workers_reserve_gpus_if_the_cluster_has_any(
    cluster: list[dict[str, float]],
    offered: list[dict[str, float]],
    asked: float | None,
    gpus: float,
    workers: int,
    tmp_path: Path,
) -> None:
    cluster += offered
    backend = pool.RayBackend(device="auto", num_gpus=asked)
    assert (backend._num_gpus, backend.most_workers) == (gpus, workers)
    given: dict[str, Any] = {}
    remote = SimpleNamespace(remote=lambda *_, **more: given.update(more))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "remote", lambda _: SimpleNamespace(options=lambda **_: remote))
        spec = SimpleNamespace(kind="kind")
        run: Any = SimpleNamespace(root="", id="", spec=spec, files=LocalFiles(tmp_path))
        backend._start_worker(run, {}, threads=1, workers=1, owner=None)
    assert given["device"] == ("auto" if gpus else "cpu")


def test_a_worker_asks_the_store_for_minutes_from_its_start(
    cluster: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(pool, "be_patient", lambda: said.append("patient"))
    monkeypatch.setattr(pool, "open_files", lambda _: SimpleNamespace(sub=lambda _: None))
    monkeypatch.setattr(pool, "require_held_by", lambda *_: said.append("looked"))
    pool.ShardWorker(
        "root", "run", kind="kind", device="cpu", threads=1, runner=f"{__name__}:Runner", owner="o"
    )
    assert said == ["patient", "looked"]


@pytest.mark.parametrize(
    ("has", "share", "device", "said"),
    [
        (True, 1.0, "cuda", "cuda"),
        (False, 0.0, "cpu", "cpu"),
        (
            False,
            1.0,
            "cpu",
            "the CPU, though it reserves a GPU: torch finds none there (infl doctor)",
        ),
    ],
)
def test_a_worker_looks_for_a_gpu_itself(
    cluster: list[dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
    has: bool,
    share: float,
    device: str,
    said: str,
) -> None:
    monkeypatch.setattr(devices, "has_cuda", lambda: has)
    monkeypatch.setattr(pool, "require_usable", lambda device: None)
    worker = pool.ShardWorker(
        "root",
        "run",
        kind="kind",
        device="auto",
        threads=1,
        runner=f"{__name__}:Runner",
        gpu_share=share,
    )
    assert worker._runner.device == device
    assert worker.begin()[0] is None
    assert worker.begin()[2] == said


def test_a_worker_of_a_gpu_that_cannot_compute_refuses_before_it_takes_a_shard(
    cluster: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "has_cuda", lambda: True)

    def ones(*_: object, device: torch.device) -> torch.Tensor:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\nCompile with")

    monkeypatch.setattr(torch, "ones", ones)
    cluster += [{"GPU": 1.0}]
    worker = pool.ShardWorker(
        "root",
        "run",
        kind="kind",
        device="cuda",
        threads=1,
        runner=f"{__name__}:Runner",
        gpu_share=1.0,
    )
    assert worker.begin()[0] == (
        "the GPU cannot compute (CUDA error: unspecified launch failure): see infl doctor, or take "
        "--device cpu"
    )
    assert worker._runner is None
