"""What a run of thousands of workers is told, without them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infl_cluster import pool
from influence_jobs.jobs.base import Shard
from influence_jobs.store.files import LocalFiles


@pytest.mark.parametrize(("workers", "asked", "told"), [(2, 20, 20), (64, 1, 3), (1920, 20, 90)])
def test_a_worker_that_tells_seldom_does_not_hang(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, workers: int, asked: float, told: float
) -> None:
    """1,920 workers tell their progress every 30 s: after 20 s they do not count as hanging."""
    given: dict[str, Any] = {}

    class Stopped(Exception):
        pass

    def dispatch(actors: object, shards: object, **options: Any) -> None:
        given.update(options)
        raise Stopped

    def actors(start: object, kind: str, stalled_after_s: float) -> object:
        given["starts"] = stalled_after_s
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(pool, "Dispatch", dispatch)
    monkeypatch.setattr(pool, "Actors", actors)
    monkeypatch.setattr(pool.RayBackend, "_live", lambda self: [])
    monkeypatch.setattr(pool, "require_same_software", lambda nodes: None)
    backend = pool.RayBackend(workers, device="cpu", stalled_after_s=asked)
    run: Any = SimpleNamespace(spec=SimpleNamespace(kind="grad-norms"), files=LocalFiles(tmp_path))
    shards = [Shard(str(i), i, i + 1) for i in range(workers)]
    nothing: Any = None
    with pytest.raises(Stopped):
        backend.run(
            run,
            shards,
            on_start=nothing,
            on_leave=nothing,
            on_receipt=nothing,
            on_rescue=nothing,
            on_idle=nothing,
            quiet_s=nothing,
        )
    assert given["stalled_after_s"] == given["starts"] == told
