"""Is a process that was written down still the same one?"""

import psutil

CLOCK_STEP_S = (
    1.0  # start times are told relative to the boot time, which moves when the clock is set
)


def is_same(process: psutil.Process, started: float) -> bool:
    """Whether a process is the one that started then, and not a later one with its id."""
    return abs(process.create_time() - started) < CLOCK_STEP_S


def is_running(pid: int, started: float) -> bool:
    """Whether the process with that id and start time still runs; a zombie has ended."""
    try:
        process = psutil.Process(pid)
        return is_same(process, started) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
