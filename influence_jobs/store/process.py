"""Whether a process whose id and start time were recorded still runs."""

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
