"""Runners whose shards behave as their ids say. Ray's workers import them.

Every start of a shard writes a file `<shard>.<attempt>` to the root.
"""

import os
import signal
import time
from pathlib import Path

import ray

from influence_jobs.errors import StoreError
from influence_jobs.jobs.base import Receipt

SET = ("OMP_NUM_THREADS", "MALLOC_MMAP_MAX_", "GOMP_SPINCOUNT")


class FakeRunner:
    def __init__(self, root, run_id, *, device, threads, workers):
        self._root = Path(root)
        self.title = f"fake {run_id} on {device}"

    def run(self, shard):
        attempt = 1
        while (mark := self._root / f"{shard.id}.{attempt}").exists():
            attempt += 1
        mark.write_text(" ".join(os.environ[name] for name in SET))
        behaviour = shard.id.split("-")[0]
        if behaviour == "poison":
            return Receipt(shard.id, "failed", "bad rows", "user", attempt)
        if behaviour == "full":
            return Receipt(shard.id, "failed", "the disk is full", "fatal", attempt)
        if (behaviour == "hiccup" and attempt < 3) or (behaviour == "late" and attempt < 5):
            return Receipt(shard.id, "failed", "read error", "transient", attempt)
        if behaviour == "killer" or (behaviour == "killed" and attempt == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if behaviour == "stopped" and attempt == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        while behaviour == "held" and not (self._root / "release").exists():
            time.sleep(0.05)
        return Receipt(shard.id, "done", None, None, attempt, 0.5, shard.stop - shard.start)


class Refusing:
    def __init__(self, *_args, **_kwargs):
        raise StoreError("the run folder is gone")


class Dying:
    def __init__(self, *_args, **_kwargs):
        os.kill(os.getpid(), signal.SIGKILL)


class Hanging:
    def __init__(self, *_args, **_kwargs):
        os.kill(os.getpid(), signal.SIGSTOP)


class Placed(FakeRunner):
    """Notes on which node of Ray each shard was."""

    def run(self, shard):
        time.sleep(0.5)  # so that each worker gets some
        (self._root / f"{shard.id}.node").write_text(ray.get_runtime_context().get_node_id())
        return super().run(shard)
