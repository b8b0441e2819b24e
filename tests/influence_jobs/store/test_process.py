import os
import subprocess
import sys

import psutil

from influence_jobs.store.process import is_running


def test_a_process_stays_the_same_when_the_clock_is_set() -> None:
    started = psutil.Process().create_time()
    assert is_running(os.getpid(), started + 0.5)
    assert is_running(os.getpid(), started - 0.5)
    assert not is_running(os.getpid(), started - 5)


def test_an_ended_process_is_not_running() -> None:
    with subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE) as process:
        started = psutil.Process(process.pid).create_time()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
        assert not is_running(process.pid, started)
    assert not is_running(process.pid, started)
