"""Whether a process whose id and start time were recorded still runs, and how it fares."""

import re
from pathlib import Path

import psutil

# Start times are computed from the boot time, which moves when the clock is set.
CLOCK_STEP_S = 1.0


def is_same(process: psutil.Process, started: float) -> bool:
    """Whether a process is the one that started at a time, not a later one with the same id."""
    return abs(process.create_time() - started) < CLOCK_STEP_S


def is_running(pid: int, started: float) -> bool:
    """Whether the process with this id and start time still runs; a zombie does not."""
    try:
        process = psutil.Process(pid)
        return is_same(process, started) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def oom_kills() -> int | None:
    """How many processes this machine has killed for lack of memory since it was started.

    The killed process itself can tell nothing. None: the machine does not count them.
    """
    try:
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def hangs(pid: int) -> str:
    """What a process that makes no progress waits for, as far as the system knows."""
    try:
        state = psutil.Process(pid).status()
    except psutil.Error:
        return "it is gone"
    if state in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
        return f"it is stopped: kill -CONT {pid} lets it go on"
    if state == psutil.STATUS_DISK_SLEEP:
        return "it waits for a disk"
    return "a long step, or it hangs"
