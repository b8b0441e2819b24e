"""How speed grows with workers, and cost with samples, queries and parameters.

- Workers: gradient norms in one process with one thread, and in two such processes at once, like
  two workers. The table has the ratio of their speeds. The limit is 2; the ratio of a bare matrix
  product shows what this machine allows.
- Cost: seconds of scores of MNIST images by N samples, Q vectors and P parameters (a wider first
  layer), relative to the smallest; in brackets the ratio of exactly linear growth.

    python benchmarks/scaling.py [--full]
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Annotated

import torch
import typer
from harness import cut, header, over, print_table, seconds_of, spread, use_worker_allocator
from torch import nn

from influence_jobs.gradients import GradDots, GradNorms, ParameterSpace
from influence_jobs.tasks.base import Draw
from influence_jobs.tasks.ffdnet import FFDNetTask
from influence_jobs.tasks.mnist import MnistTask

SIZES = (128, 256, 512, 1024)


def bare_products() -> tuple[Callable[[], object], int]:
    a, b = torch.randn(512, 1024), torch.randn(1024, 1024)
    return lambda: a @ b, 512


def mnist_norms() -> tuple[Callable[[], object], int]:
    task = MnistTask()
    batch = task.batch(torch.arange(2000), Draw(0))
    engine = GradNorms(task.model().eval(), ["fc1", "fc2", "fc3"], task.losses, reduction="channel")
    return lambda: engine(batch), 2000


def ffdnet_norms() -> tuple[Callable[[], object], int]:
    task = FFDNetTask(patch_size=50)
    batch = task.batch(torch.arange(task.batch_size), Draw(0))
    model = task.model().eval().to(memory_format=torch.channels_last)
    engine = GradNorms(model, ["main.29"], task.losses, reduction="kernel")
    return lambda: engine(batch), task.batch_size


WORK = {
    "a bare matrix product": bare_products,
    "norms, MNIST, three layers": mnist_norms,
    "norms, FFDNet, layer 11": ffdnet_norms,
}


def work(name: str, orders: Connection) -> None:
    """A worker with one thread. It receives seconds to work, sends samples a second; 0 ends it."""
    torch.set_num_threads(1)
    run, samples = WORK[name]()
    while seconds := orders.recv():
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            run()
            done += samples
        orders.send(done / (time.perf_counter() - started))


def one_and_two(name: str, rounds: int, seconds: float) -> list[tuple[float, float]]:
    """Samples a second of one worker and of two together, in every round after a first one."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(2)]
    processes = [context.Process(target=work, args=(name, theirs)) for _, theirs in pipes]
    ours = [own for own, _ in pipes]
    for process in processes:
        process.start()
    found = []
    for _ in range(1 + rounds):
        rates = []
        for busy in (ours[:1], ours):
            for orders in busy:
                orders.send(seconds)
            rates.append(sum(orders.recv() for orders in busy))
        found.append((rates[0], rates[1]))
    for orders, process in zip(ours, processes, strict=True):
        orders.send(0)
        process.join()
    return found[1:]


def scores(samples: int, queries: int, width: int, batch: int) -> Callable[[], None]:
    """A function that computes scores of a perceptron; `width` is that of its first layer."""
    task = MnistTask()
    data = task.batch(torch.arange(samples), Draw(0))
    model = nn.Sequential(
        nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 10)
    ).eval()
    space = ParameterSpace(model)

    def losses(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    engine = GradDots(model, space, losses, torch.randn(queries, space.size))
    return over(cut(data, samples, batch), engine.total)


def print_growth(title: str, runs: dict[int, Callable[[], None]], rounds: int) -> None:
    seconds: dict[int, list[float]] = {size: [] for size in runs}
    for counts in [False] + [True] * rounds:
        for size, run in runs.items():
            taken = seconds_of(run)
            if counts:
                seconds[size].append(taken)
    least = min(runs)
    rows = []
    for size in runs:
        growth = [a / b for a, b in zip(seconds[size], seconds[least], strict=True)]
        median = statistics.median(seconds[size])
        rows.append([f"{size:,}", f"{median:.3f}", f"{spread(growth)} [{size / least:g}]"])
    print_table([title, "s", "over the least"], rows)
    print()


def main(
    full: Annotated[
        bool, typer.Option("--full", help="More samples, longer, more rounds.")
    ] = False,
) -> None:
    """Print a table for workers, and tables for N, Q and P."""
    use_worker_allocator()
    torch.set_num_threads(1)
    header("Scaling: workers, samples, queries, parameters")
    rounds, seconds = (5, 5.0) if full else (3, 2.0)
    rows = []
    for name in WORK:
        pairs = one_and_two(name, rounds, seconds)
        one, two = (statistics.median(rates) for rates in zip(*pairs, strict=True))
        gain = spread([both / alone for alone, both in pairs])
        rows.append([name, f"{one:,.0f}", f"{two:,.0f}", gain])
    print_table(["", "1 worker, samples/s", "2 workers", "ratio"], rows)
    print()
    base = 20_000 if full else 5_000
    print_growth(
        "N, 10 vectors", {n: scores(n, 10, 128, 1000) for n in (base, 2 * base, 3 * base)}, rounds
    )
    print_growth("Q vectors", {q: scores(base, q, 128, 1000) for q in (1, 4, 16, 64)}, rounds)
    widths = {784 * w + w + 64 * w + 64 + 650: scores(base, 10, w, 1000) for w in SIZES}
    print_growth("P, 10 vectors", widths, rounds)
    print(f"{rounds} rounds; median (least-most).")


if __name__ == "__main__":
    typer.run(main)
