"""Shared by the benchmarks: contestants that take turns, checks of answers, tables of ratios.

Other processes on the machine, clock changes and warm caches affect all contestants of a round
alike. Ratios within a round are therefore more reliable than rates.
"""

import importlib.metadata
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from influence_jobs.devices import MALLOC

PACKAGES = ["torch", "backpack-for-pytorch", "captum", "dattri", "kronfluence", "opacus", "pyDVL"]


class WrongAnswer(Exception):
    """A contestant's answer is not the float64 reference's."""


@dataclass(frozen=True)
class Contestant:
    """Something to time.

    Attributes:
        name: Name of the row in the table.
        run: Processes all its samples once.
        samples: Number of samples; slow contestants take fewer.
        error: Error of its answer relative to float64; None for a limit, which has no answer.
    """

    name: str
    run: Callable[[], object]
    samples: int
    error: float | None = None


def use_worker_allocator() -> None:
    """Restart this script with the allocator settings of workers, which are read at start only."""
    if not MALLOC.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})


def header(title: str) -> None:
    """Print the head of a page: title, command, machine and versions."""
    words = ["python", "benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]]
    cores = len(os.sched_getaffinity(0))
    print(f"# {title}\n\n`{' '.join(words)}`, {datetime.now(UTC):%Y-%m-%d}\n")
    print(f"- {_processor()}, {cores} cores, {torch.get_num_threads()} threads, load {_load()}")
    if torch.cuda.is_available():
        print(f"- {torch.cuda.get_device_name()}")
    print(f"- Python {platform.python_version()}, {', '.join(_versions())}\n", flush=True)


def checked(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> float:
    """Largest difference, relative to the largest expected number.

    Raises:
        WrongAnswer: It is above the tolerance, or NaN.
    """
    expected = expected.double().cpu()
    error = float((found.detach().double().cpu() - expected).abs().max() / expected.abs().max())
    if not error <= tolerance:
        raise WrongAnswer(f"relative error {error:.1e} where {tolerance:.0e} is allowed")
    return error


def cut(batch: Sequence[Tensor], samples: int, size: int) -> list[tuple[Tensor, ...]]:
    """The first samples of tensors (N, ...), in batches. They are views, which cost nothing."""
    starts = range(0, samples, size)
    return [tuple(part[i : min(i + size, samples)] for part in batch) for i in starts]


def over(batches: Sequence[Any], answer: Callable[[Any], object]) -> Callable[[], None]:
    """A function that calls `answer` for every batch."""

    def run() -> None:
        for batch in batches:
            answer(batch)

    return run


def gather(builders: Sequence[Callable[[], Contestant]]) -> list[Contestant]:
    """The contestants that work; prints which peers are not installed or give wrong answers."""
    contestants = []
    for build in builders:
        try:
            contestants.append(build())
        except (ImportError, WrongAnswer) as error:
            print(f"- {build.__name__.replace('_', ' ')} is left out: {error}")
    return contestants


def race(contestants: Sequence[Contestant], rounds: int) -> dict[str, list[float]]:
    """Seconds a sample in every round. A first round to warm up is not counted."""
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for counts in [False] + [True] * rounds:
        for contestant in contestants:
            taken = seconds_of(contestant.run) / contestant.samples
            if counts:
                seconds[contestant.name].append(taken)
    return seconds


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds of a call, its work on a GPU included."""
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def ratios(seconds: dict[str, list[float]], name: str, reference: str) -> list[float]:
    """Speed of one contestant relative to the reference, in every round."""
    pairs = zip(seconds[reference], seconds[name], strict=True)
    return [theirs / own for theirs, own in pairs]


def spread(values: Sequence[float]) -> str:
    """Median, smallest and largest value, as text."""
    middle, least, most = (
        f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        for value in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({least}-{most})"


def print_race(contestants: Sequence[Contestant], rounds: int, unit: str, *references: str) -> None:
    """Race, and print for each contestant its speed and its ratios to the references."""
    seconds = race(contestants, rounds)
    rows = []
    for contestant in contestants:
        rate = 1 / statistics.median(seconds[contestant.name])
        speeds = [spread(ratios(seconds, contestant.name, other)) for other in references]
        error = "" if contestant.error is None else f"{contestant.error:.0e}"
        rows.append([contestant.name, f"{contestant.samples:,}", f"{rate:,.0f}", *speeds, error])
    columns = ["", unit, f"{unit}/s", *(f"x {other}" for other in references), "error"]
    print_table(columns, rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"\n{rounds} rounds; median (least-most); peak memory of the process {peak:,} MB.")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    for row in (columns, ["---"] * len(columns), *rows):
        print("| " + " | ".join(row) + " |", flush=True)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f}"


def _versions() -> list[str]:
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    return [f"{name} {installed[name.lower()]}" for name in PACKAGES if name.lower() in installed]
