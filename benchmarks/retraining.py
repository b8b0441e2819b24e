"""Retraining the MNIST network: many variants side by side compared with one after the other.

Measured are model-steps a second: steps of one model with batch 8, summed over all models. The
recipe is that of the research report (SGD, momentum .9, weight decay .001). The contestants:

- `plain`: a loop over preloaded tensors, `nn.Module` and `torch.optim.SGD`; the reference;
- `trainer`: this project's `Trainer`, one model;
- `torch.func` and `mlp`: an `EnsembleTrainer` of M models, by its general and its fast path. Each
  model has its own order of samples, as after removals;
- `relabelled`: the fast path with models of one seed that differ in labels only, and share inputs;
- two processes with one thread each, like two workers: `mlp` and `relabelled` with M models each,
  and `plain`.

Before timing, each answer is compared with a float64 loop on the same batches. Contestants take
turns in every round, so that other load on the machine affects all of them. Ratios within a round
are more reliable than rates. Run it from the project's folder:

    python benchmarks/retraining.py [--full]
    python benchmarks/retraining.py --device cuda --models 64 --models 512 --models 2048
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from typing import Annotated

import numpy as np
import torch
import typer
from harness import header, print_table, spread, use_worker_allocator
from torch import nn
from torch.nn import functional as F

from influence_jobs.models.mnist_mlp import MnistMLP
from influence_jobs.tasks.base import Draw
from influence_jobs.tasks.mnist import MnistTask
from influence_jobs.training.changes import Changes
from influence_jobs.training.ensemble import EnsembleTrainer, Variant
from influence_jobs.training.recipe import Recipe
from influence_jobs.training.train import Trainer, epoch_order, initial_model

BATCH = 8
PATHS = ("torch.func", "mlp", "relabelled")
RECIPE = Recipe(1, BATCH, "sgd", lr=0.003, momentum=0.9, weight_decay=0.001)
CHECKED_STEPS = 320
# Each layer: forward and the gradient of the weight; all but the first: the gradient of the input.
FLOPS = 2 * BATCH * (2 * 784 * 128 + 3 * 128 * 64 + 3 * 64 * 10)
WEIGHTS = sum(p.numel() for p in MnistMLP().parameters())


class GeneralMnistTask(MnistTask):
    """The task without a declared loss; it takes the general path."""

    output_loss = None  # type: ignore[assignment]


def plain_loop(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, seed: int
) -> Callable[[], int]:
    """A function that takes one step and returns the number of model-steps, 1."""
    order = epoch_order(len(labels), seed, 0)
    sgd = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9, weight_decay=0.001)
    step = 0

    def advance() -> int:
        nonlocal step
        first = step * BATCH % len(order)
        ids = order[first : first + BATCH]
        sgd.zero_grad()
        F.nll_loss(model(images[ids]), labels[ids]).backward()
        sgd.step()
        step += 1
        return 1

    return advance


def relabelled(i: int) -> Changes:
    """Relabel a thousand samples, others for each model."""
    return Changes(relabelled=np.arange(1000 * i, 1000 * (i + 1)), labels=np.zeros(1000, np.int64))


def contestant(name: str, models: int, device: torch.device) -> Callable[[], int]:
    """A function that takes some steps and returns the number of model-steps."""
    endless = replace(RECIPE, epochs=10**9)
    if name == "plain":
        task = MnistTask()
        images, labels = task.batch(torch.arange(60_000), Draw(0))
        return plain_loop(initial_model(task, 0, device), images.to(device), labels.to(device), 0)
    if name == "trainer":
        trainer = Trainer(MnistTask(), endless, seed=0, device=device)
        return lambda: 1 + 0 * (trainer.step() is None)
    variants = [Variant(seed) for seed in range(models)]
    if name == "relabelled":
        variants = [Variant(0, relabelled(i)) for i in range(models)]
    task = GeneralMnistTask() if name == "torch.func" else MnistTask()
    ensemble = EnsembleTrainer(task, endless, variants, device=device)
    path = "StackedSteps" if name == "torch.func" else "PerceptronSteps"
    assert type(ensemble.steps).__name__ == path

    def advance() -> int:
        before = ensemble.samples_seen
        ensemble.step()
        return (ensemble.samples_seen - before) // BATCH

    return advance


def rate(advance: Callable[[], int], seconds: float, device: torch.device) -> float:
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        done += advance()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return done / (time.perf_counter() - started)


def check(device: torch.device) -> dict[str, float]:
    """Errors of the change of the parameters after some steps, relative to a float64 loop.

    Of ensembles, the second of three models is compared.
    """
    images, labels = MnistTask().batch(torch.arange(60_000), Draw(0))
    start = initial_model(MnistTask(), 1, torch.device("cpu"))
    exact = initial_model(MnistTask(), 1, torch.device("cpu")).double()
    advance = plain_loop(exact, images.double(), labels, 1)
    single = initial_model(MnistTask(), 1, device)
    advance_single = plain_loop(single, images.to(device), labels.to(device), 1)
    for _ in range(CHECKED_STEPS):
        advance()
        advance_single()
    found: dict[str, nn.Module] = {"plain": single}
    trainer = Trainer(MnistTask(), RECIPE, seed=1, device=device)
    for _ in range(CHECKED_STEPS):
        trainer.step()
    found["trainer"] = trainer.model
    variants = [Variant(seed) for seed in range(3)]
    for name, task in (("torch.func", GeneralMnistTask()), ("mlp", MnistTask())):
        ensemble = EnsembleTrainer(task, RECIPE, variants, device=device)
        while ensemble.samples_seen < 3 * BATCH * CHECKED_STEPS:
            ensemble.step()
        found[name] = ensemble.model(1)

    def change(model: nn.Module) -> torch.Tensor:
        pairs = zip(model.parameters(), start.parameters(), strict=True)
        return torch.cat([(p.detach().cpu().double() - q.detach()).flatten() for p, q in pairs])

    expected = change(exact)
    return {
        name: float((change(model) - expected).norm() / expected.norm())
        for name, model in found.items()
    }


def work(
    name: str, models: int, seconds: float, barrier: Barrier, rates: "multiprocessing.Queue[float]"
) -> None:
    """The work of one of two processes: a contestant on one thread."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    advance = contestant(name, models, device)
    rate(advance, 0.5, device)
    barrier.wait()
    rates.put(rate(advance, seconds, device))


def two_processes(name: str, models: int, seconds: float) -> float:
    context = multiprocessing.get_context("spawn")
    barrier, rates = context.Barrier(2), context.Queue()
    workers = [
        context.Process(target=work, args=(name, models, seconds, barrier, rates)) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    total = sum(rates.get() for _ in workers)
    for worker in workers:
        worker.join()
    return total


def peak_flops(device: torch.device) -> float:
    """FLOP/s of a large float32 product, the fastest of ten."""
    a = torch.randn(2048, 2048, device=device)
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - started)
    return 2 * 2048**3 / best


def main(
    models: Annotated[list[int] | None, typer.Option(help="Models side by side.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds.")] = None,
    seconds: Annotated[float, typer.Option(help="Seconds of each contestant in a round.")] = 2.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    full: Annotated[bool, typer.Option("--full", help="More models, more rounds.")] = False,
) -> None:
    """Print errors, the floor, and a row for each contestant.

    Ratios are to `plain` with as many threads; those of two processes, to the fastest `plain`.
    """
    use_worker_allocator()
    where = torch.device(device)
    models = models or ([2, 8, 16, 32, 128] if full else [32])
    rounds = rounds or (5 if full else 3)
    header("Retraining: many variants side by side")
    errors = ", ".join(f"{name} {error:.0e}" for name, error in check(where).items())
    print(f"- relative error of the parameters' change after {CHECKED_STEPS} steps: {errors}")
    names = ["plain", "trainer", *(f"{path} {m}" for path in PATHS for m in models)]
    steppers = {
        name: contestant(name.split()[0], int(name.split()[-1]) if " " in name else 1, where)
        for name in names
    }
    threads = [1, 2] if device == "cpu" else [torch.get_num_threads()]
    rates: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    peaks: dict[int, float] = {}
    for _ in range(rounds):
        for count in threads:
            torch.set_num_threads(count)
            peaks[count] = max(peaks.get(count, 0), peak_flops(where))
            reference = 0.0
            for name, advance in steppers.items():
                rate(advance, 0.2, where)
                found = rate(advance, seconds, where)
                reference = found if name == "plain" else reference
                rates.setdefault(f"{name}, threads {count}", []).append(found)
                ratios.setdefault(f"{name}, threads {count}", []).append(found / reference)
        if device == "cpu":
            plain = max(rates[f"plain, threads {count}"][-1] for count in threads)
            for name, m in [("plain", 1), *((p, m) for p in PATHS[1:] for m in models if m <= 32)]:
                key = f"{name} {m}, two processes of one thread"
                rates.setdefault(key, []).append(two_processes(name, m, seconds))
                ratios.setdefault(key, []).append(rates[key][-1] / plain)
    floors = ", ".join(
        f"{peak / FLOPS:,.0f} with {count} threads ({peak / 1e9:.0f} GFLOP/s)"
        for count, peak in peaks.items()
    )
    print(
        f"- floor: {FLOPS / 1e6:.2f} MFLOP and {16 * WEIGHTS / 1e6:.1f} MB of weights and momentum "
        f"a model-step; at the rate of a large product {floors} model-steps/s\n"
    )
    rows = [
        [key, f"{statistics.median(values):,.0f}", spread(ratios[key])]
        for key, values in rates.items()
    ]
    print_table(["", "model-steps/s", "x plain"], rows)
    print(f"\n{rounds} rounds; median (least-most).")


if __name__ == "__main__":
    typer.run(main)
