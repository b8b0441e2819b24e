"""Starts `infl` without waiting for its imports: `python fork_server.py infl`.

Each line on standard input is a request: words of the command, folder, file for its output,
variables, seconds by which its clock is wrong. A nanny waits for each command and writes its exit
code. The last argument is what `infl stop` knows a driver by.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

# Whatever a run imports on its way.
import pandas  # noqa: F401
import pyarrow.parquet  # noqa: F401
import sympy  # noqa: F401
import torch.fx.experimental.symbolic_shapes

import influence_jobs.kinds.grad_norms.job
import influence_jobs.kinds.train.job  # noqa: F401
from infl_cli import main as command
from infl_cli import runs as runs_commands
from infl_cluster import launch
from influence_jobs.jobs import saved_state
from influence_jobs.store import status


def serve() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nannies leave no zombies
    for line in sys.stdin:
        if os.fork() == 0:
            nurse(json.loads(line))


def nurse(request: dict[str, Any]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        run(request)
    out = Path(request["out"])
    write(out.with_suffix(".pid"), str(child))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    write(out.with_suffix(".code"), str(code))
    os._exit(0)


def write(path: Path, text: str) -> None:
    aside = path.with_suffix(".new")
    aside.write_text(text)
    aside.replace(path)


def run(request: dict[str, Any]) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, name in ((1, ".out"), (2, ".err")):
        path = Path(request["out"]).with_suffix(name)
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), stream)
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    torch.set_num_threads(1)
    launch.threads = lambda: 1  # type: ignore[attr-defined]
    runs_commands.STOP_GRACE_S = 1.0
    saved_state.SAVE_EVERY_S = 0.1
    status.STALE_S = request["stale_s"]
    shift(request["clock_s"], request["clock_after_s"])
    code: Any = 1
    try:
        sys.argv = ["infl", *request["words"]]
        command.main()
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:  # noqa: BLE001  as Python itself
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def shift(clock_s: float, after_s: float) -> None:
    """Set the clock that this process sees."""
    if clock_s:
        right, began = time.time, time.monotonic()
        time.time = lambda: right() + clock_s * (time.monotonic() - began >= after_s)


if __name__ == "__main__":
    serve()
