"""A run that is disturbed: start it, hold it in the middle, let it go on, compare its bytes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from slow_task import SlowTask

from influence_jobs.errors import StoreError
from influence_jobs.store import layout
from influence_jobs.store.documents import Entry
from influence_jobs.store.find import run_ids
from influence_jobs.store.run import Run
from influence_jobs.store.verify import find_damage

HERE = Path(__file__).parent
CODE = (HERE / "slow_task.py").read_text()
SHARDS, ROWS = 8, 256
HELD = 3  # the first shard that waits; those before it are finished
SILENCE_S = 60.0  # no command may be silent for longer, unless it says what it waits for
# Seconds for anything here. The machine may be busy with other work; a hang is far longer.
PATIENCE_S = float(os.environ.get("FAULTS_PATIENCE_S", "240"))

RIGHT, INCOMPLETE = "right bytes", "incomplete, and says what is missing"


@dataclass(frozen=True)
class Told:
    """What a command ended with."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return " ".join((self.out + self.err).split())


class Command:
    """A command that may still run."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.pid = int(wait_for(lambda: self._read(".pid"), "start of a command"))

    def _read(self, suffix: str) -> str | None:
        path = self._out.with_suffix(suffix)
        return path.read_text(errors="replace") if path.exists() else None

    @property
    def runs(self) -> bool:
        return self._read(".code") is None

    def told(self) -> Told:
        """Wait for the end."""
        code = wait_for(lambda: self._read(".code"), f"end of process {self.pid}")
        return Told(int(code), self._read(".out") or "", self._read(".err") or "")

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, how)


def wait_for(condition: Callable[[], Any], what: str, seconds: float = PATIENCE_S) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"no {what} within {seconds} s")


class ForkServer:
    """Starts commands without their imports; see fork_server.py."""

    def __init__(self) -> None:
        path = [str(HERE), *sys.path]
        self._folder = tempfile.TemporaryDirectory(prefix="infl-faults-")
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "fork_server.py"), "infl"],
            stdin=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        )

    def start(self, *words: str, cwd: Path, env: dict[str, str], **wrong: float) -> Command:
        self._count += 1
        out = Path(self._folder.name) / f"{self._count}.x"
        clock = {"clock_s": 0.0, "clock_after_s": 0.0, "stale_s": 20.0, **wrong}
        request = {"words": words, "cwd": str(cwd), "env": env, "out": str(out), **clock}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Command(out)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


@dataclass
class World:
    """A folder with the task, its data and weights, and a folder of runs.

    Attributes:
        root: Folder or URL of the runs.
        how: Options that say where the run is computed.
        reference: What an undisturbed run stores.
        expected: Its arrays, as numbers.
        touched: Shards whose data or records were damaged on purpose.
        starts: How often a shard may have been started.
        lines: What commands said of the fault, for the record.
    """

    server: ForkServer
    folder: Path
    root: str = ""
    how: tuple[str, ...] = ("--local",)
    env: dict[str, str] = field(default_factory=dict)
    reference: dict[str, bytes] = field(default_factory=dict)
    expected: dict[str, Any] = field(default_factory=dict)
    touched: set[str] = field(default_factory=set)
    starts: int = 2
    before: dict[str, Entry] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    begun: Command | None = None
    proxy: Any = None
    spec: Any = None

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.root = self.root or str(self.folder / "runs")
        (self.folder / "disturbed.py").write_text(CODE)
        rows = np.random.default_rng(0).normal(size=(SHARDS * ROWS, 5)).astype(np.float32)
        rows[:, 0] = np.arange(len(rows))
        np.save(self.folder / "rows.npy", rows)
        torch.save(SlowTask().model().state_dict(), self.folder / "weights.pt")

    # -- commands ---------------------------------------------------------------------------------

    def start(self, *words: str, **wrong: float) -> Command:
        return self.start_in(self.root, *words, **wrong)

    def start_in(self, runs: str, *words: str, **wrong: float) -> Command:
        words = (*words, "--runs", runs)
        return self.server.start(*words, cwd=self.folder, env=self.env, **wrong)

    def infl(self, *words: str, **wrong: float) -> Told:
        """Run a command to its end; it must not show a traceback."""
        told = self.start(*words, **wrong).told()
        assert "Traceback" not in told.err, (words, told.err)
        return told

    def server_infl(self, *words: str) -> Told:
        """Run a command that has no option --runs."""
        return self.server.start(*words, cwd=self.folder, env=self.env).told()

    def submit(self, **wrong: float) -> Command:
        words = ("submit", "grad-norms", "--task", "disturbed.py:SlowTask", "--layer", "all")
        sizes = ("--checkpoint", "weights.pt", "--shard-size", str(ROWS), "--batch-size", str(ROWS))
        return self.start(*words, *sizes, *self.how, **wrong)

    def begin(self, **wrong: float) -> Command:
        """Start a run and wait until it is held in the middle, with workers at work."""
        self.hold(HELD)
        self.begun = self.submit(**wrong)
        self.wait_until_held()
        return self.begun

    def wait_until_held(self) -> None:
        wait_for(self.is_held, "run that waits in the middle")
        self.before = self.done()

    def is_held(self) -> bool:
        assert self.begun is not None
        if not self.begun.runs:
            raise AssertionError(f"the run ended: {self.begun.told()}")
        return self.state_of(HELD) == "running" and len(self.done()) >= HELD

    def complete(self) -> None:
        """Carry out a run to its end."""
        told = self.submit().told()
        assert told.code == 0, told
        self.before = self.done()

    def resume(self, code: int = 0, **wrong: float) -> Told:
        told = self.infl("resume", self.id, *self.how, **wrong)
        assert told.code == code, told
        return told

    # -- files ------------------------------------------------------------------------------------

    def hold(self, shard: int) -> None:
        (self.folder / "hold").write_text(str(shard * ROWS))

    def let_go(self) -> None:
        (self.folder / "hold").unlink(missing_ok=True)

    def poison(self, **samples: str) -> None:
        """`s5="nan"`: what happens at sample 5."""
        text = json.dumps({name[1:]: what for name, what in samples.items()})
        (self.folder / "poison").write_text(text)

    def cure(self) -> None:
        (self.folder / "poison").unlink(missing_ok=True)

    @property
    def id(self) -> str:
        (found,) = (name for name in run_ids(self.root) if name.startswith("grad-norms"))
        return found

    @property
    def path(self) -> Path:
        return Path(self.root) / self.id

    @property
    def run(self) -> Run:
        """The run; its spec.json may be damaged by now."""
        if self.spec is None:
            self.spec = Run.open(self.root, self.id).spec
        return Run(self.root, self.spec)

    def done(self) -> dict[str, Entry]:
        found = self.run.manifest.done()
        return {name: entry for name, entry in found.items() if name != layout.FINISH}

    def state_of(self, shard: int) -> str | None:
        try:
            entry = self.run.manifest.read(shard_id(shard))
        except (ValueError, StoreError):  # there is no run yet
            return None
        return entry.state if entry else None

    def status(self, **wrong: float) -> dict[str, Any]:
        told = self.infl("status", self.id, "--json", **wrong)
        assert told.code == 0, told
        found: dict[str, Any] = json.loads(told.out)
        return found["progress"]

    def stored(self) -> dict[str, bytes]:
        return stored_in(self.run)

    # -- judgement --------------------------------------------------------------------------------

    def says(self, told: Told | str, *words: str) -> None:
        """Require words of what was told."""
        text = told if isinstance(told, str) else told.text
        for word in words:
            assert word in text, (word, text)
        self.lines += words

    def check(self) -> str:
        """Compare with the undisturbed run: bytes, checksums, attempts."""
        assert self.stored() == self.reference
        found = find_damage(self.run)
        assert (found.planned, found.good, found.damaged) == (SHARDS, SHARDS, {})
        assert self.infl("verify", self.id).code == 0
        assert self.infl("status", self.id).code == 0
        after = self.done()
        for shard, entry in self.before.items():
            if shard not in self.touched:
                now = after[shard]
                assert (now.attempt, now.finished_at) == (entry.attempt, entry.finished_at), shard
        attempts = max(entry.attempt for entry in after.values())
        assert attempts <= self.starts, attempts
        return f"{RIGHT}; at most {attempts} attempt{'s' if attempts > 1 else ''} a shard"

    def check_incomplete(self, missing: int = 1) -> str:
        """Require that all other shards are right, and that commands say what is missing."""
        done = self.done()
        assert len(done) == SHARDS - missing
        assert find_damage(self.run).damaged == {}
        found = self.status()
        assert found["state"] == "failed", found
        assert f"{missing} of {SHARDS} shards failed" in found["message"]
        for name, array in arrays_of(self.run).items():
            for shard in done.values():
                rows = array[shard.start : shard.stop]
                np.testing.assert_array_equal(rows, self.expected[name][shard.start : shard.stop])
        return INCOMPLETE

    def close(self) -> None:
        self.let_go()
        if self.begun is not None and self.begun.runs:
            self.begun.kill(signal.SIGCONT)
            self.begun.kill()


def shard_id(number: int) -> str:
    return f"{number * ROWS:09d}-{(number + 1) * ROWS:09d}"


def stored_in(run: Run) -> dict[str, bytes]:
    """Arrays and tables of a run, byte by byte; metadata by value, for they may be written anew."""
    found: dict[str, bytes] = {}
    for folder in (layout.ARRAYS, layout.TABLES):
        for name, data in _files_below(run, folder):
            is_json = name.endswith("zarr.json")
            found[name] = json.dumps(json.loads(data), sort_keys=True).encode() if is_json else data
    return found


def _files_below(run: Run, folder: str) -> Iterator[tuple[str, bytes]]:
    if "://" in run.root:
        import obstore
        from obstore.store import from_url

        store: Any = from_url(f"{run.root}/{run.id}/{folder}")
        for entry in obstore.list(store).collect():
            yield f"{folder}/{entry['path']}", bytes(store.get(entry["path"]).bytes())
        return
    root = Path(run.files.url)
    for path in sorted((root / folder).rglob("*")):
        if path.is_file():
            yield str(path.relative_to(root)), path.read_bytes()


def arrays_of(run: Run) -> dict[str, Any]:
    return {name: np.asarray(run.array(name)[:]) for name in run.array_names()}


@dataclass(frozen=True)
class Fault:
    """A fault that is injected.

    Attributes:
        group: What it is done to.
        name: What happens.
        how: How it is injected.
        promise: What a user may rely on.
        inject: Does it to a world, follows the cure that is told, and returns the outcome.
        fast: It is part of the normal suite, too.
        fixture: What makes its world.
    """

    group: str
    name: str
    how: str
    promise: str
    inject: Callable[[World], str]
    fast: bool = False
    fixture: str = "world"

    @property
    def id(self) -> str:
        return f"{self.group}: {self.name}"
