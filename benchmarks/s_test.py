"""Accuracy and cost of every way to s_test: MNIST, 60,000 images, ten queries, Gauss-Newton, lambda .25.

    python benchmarks/s_test.py [--weights CHECKPOINT.pt] [--threads 2]

The reference is conjugate gradients over all samples to a residual of 1e-5. Gradient-equivalents count passes of
forward and backward over all 60,000 images for one vector, all ten queries together.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from influence_jobs.curvature import (
    ConjugateGradient,
    EkFac,
    GaussNewton,
    Identity,
    Lissa,
    Solver,
)
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.models.checkpoints import load_weights
from influence_jobs.tasks.base import Draw
from influence_jobs.tasks.mnist import MnistTask
from influence_jobs.training.train import Recipe, Trainer

LAMBDA = 0.25
REPEATS = 5


def trained(task: MnistTask, weights: Path | None, epochs: int) -> torch.nn.Module:
    if weights:
        model = task.model()
        load_weights(model, weights)
        return model.eval()
    recipe = Recipe(
        epochs=epochs, optimizer="sgd", lr=0.003, momentum=0.9, weight_decay=0.001, batch_size=8
    )
    trainer = Trainer(task, recipe, seed=0, device=torch.device("cpu"))
    while not trainer.finished:
        trainer.step()
    return trainer.model.eval()


def solve(operator: GaussNewton, rhs_QP: Tensor, chains: list[Solver]) -> tuple[Tensor, float, str]:
    """Mean over chains, cost, and what to say of them."""
    solutions = [chain.solve(operator, rhs_QP) for chain in chains]
    record = solutions[0].record
    named = {k: record[k] for k in ("scale", "batch_size", "depth") if k in record}
    said = ", ".join(f"{k} {v:.4g}" for k, v in named.items())
    return (
        torch.stack([s.x_QP for s in solutions]).mean(dim=0),
        sum(s.gradient_equivalents for s in solutions) * operator.num_samples / 60000,
        said or f"{int(solutions[0].iterations_Q.max())} iterations",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task = MnistTask()
    model = trained(task, options.weights, options.epochs)
    space = ParameterSpace(model)
    rows = []
    for test in task.query_sets["paper"]:
        batch = task.test_batch(torch.tensor([test]), Draw(0))
        rows.append(space.gradient(task.losses(model, batch).sum()))
    rhs_QP = torch.stack(rows)
    everything = GaussNewton(model, space, task, torch.arange(60000))
    some = torch.randperm(60000, generator=torch.Generator().manual_seed(0))
    subset = everything.over(some[:5000].sort().values)
    large = everything.over(some[:10000].sort().values)
    reference = ConjugateGradient(LAMBDA, tolerance=1e-5).solve(everything, rhs_QP)
    print(
        f"reference residual {float(reference.residual_Q.max()):.1e}, {int(reference.iterations_Q.max())} steps"
    )
    classical = {"scale": 25.0, "depth": 1000, "batch_size": 8}
    contestants: dict[str, tuple[GaussNewton, list[Solver]]] = {
        "cg, 60,000 images, residual 1e-4": (everything, [ConjugateGradient(LAMBDA)]),
        "cg, 60,000 images, residual 1e-2": (everything, [ConjugateGradient(LAMBDA, 1e-2)]),
        "cg, 10,000 images, residual 1e-2": (large, [ConjugateGradient(LAMBDA, 1e-2)]),
        "cg, 5,000 images, residual 1e-2": (subset, [ConjugateGradient(LAMBDA, 1e-2)]),
        "lissa, automatic, 5 repeats": (
            everything,
            [Lissa(LAMBDA, repeat=r) for r in range(REPEATS)],
        ),
        "lissa, published setting, 5 repeats": (
            everything,
            [Lissa(LAMBDA, repeat=r, **classical) for r in range(REPEATS)],
        ),
        "ek-fac, 60,000 images": (everything, [EkFac(LAMBDA)]),
        "identity": (everything, [Identity()]),
    }
    print("| solver | settings | cosine, median | least | gradient-equivalents | s |")
    print("|---|---|---|---|---|---|")
    for name, (operator, chains) in contestants.items():
        started = time.perf_counter()
        x_QP, cost, said = solve(operator, rhs_QP, chains)
        seconds = time.perf_counter() - started
        cosine_Q = torch.cosine_similarity(x_QP, reference.x_QP, dim=1)
        print(
            f"| {name} | {said} | {float(cosine_Q.median()):.4f} | {float(cosine_Q.min()):.4f} "
            f"| {cost:.1f} | {seconds:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
