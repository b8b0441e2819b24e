"""What scoring costs: ten vectors against every sample's gradient, over plain forward and backward of the same data.

Of MNIST and its MLP three things are timed, interleaved in one process: forward and backward of the mean loss; the
engine; and the bare matrix products without which no exact method gets on - the forward, the gradient of each layer's
output, the vectors' products - of the same images and of arrays of the same shapes. Of FFDNet, scores of all parameters, and forward and
backward. Before anything is timed the engine's answer is compared with float64 gradients, one sample at a time.
Run from the project's folder with nothing else going on:

    python benchmarks/scores.py --threads 1 --batch 512 --batch 1024
"""

import json
import resource
import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch import nn

from influence_jobs.gradients import GradDots, ParameterSpace
from influence_jobs.gradients.reference import gradients_one_by_one
from influence_jobs.models.ffdnet import FFDNet
from influence_jobs.tasks.base import Draw, Task
from influence_jobs.tasks.ffdnet import FFDNetTask
from influence_jobs.tasks.mnist import MnistTask

VECTORS = 10
CHECKED = 64


class Contest:
    """One network, its data cut into batches, and ten random vectors."""

    def __init__(self, task: Task, model: nn.Module, samples: int, batch_size: int):
        self.task, self.model, self.samples = task, model.eval(), samples
        self.ids = torch.arange(samples).split(batch_size)
        self.space = ParameterSpace(model)
        torch.manual_seed(0)
        self.v_QP = torch.randn(VECTORS, self.space.size)

    def fwd_bwd(self) -> None:
        for ids in self.ids:
            self.model.zero_grad()
            self.task.losses(self.model, self.task.batch(ids, Draw(0))).mean().backward()

    def scores(self) -> None:
        with GradDots(self.model, self.space, self.task.losses, self.v_QP) as engine:
            for ids in self.ids:
                engine.total(self.task.batch(ids, Draw(0)))

    def bare_products(self) -> None:
        size = len(self.ids[0])
        layers = [module for module in self.model.children() if isinstance(module, nn.Linear)]
        hidden = [torch.randn(size, layer.in_features) for layer in layers[1:]]
        outputs = [torch.randn(size, layer.out_features) for layer in layers]
        stacked = [layer.weight.detach().repeat(VECTORS, 1) for layer in layers]
        with torch.no_grad():
            for ids in self.ids:
                inputs = [self.task.batch(ids, Draw(0))[0], *hidden]
                for i, (layer, a, g) in enumerate(zip(layers, inputs, outputs, strict=True)):
                    a[: len(ids)] @ layer.weight.t()
                    a[: len(ids)] @ stacked[i].t()
                    if i:
                        g[: len(ids)] @ layer.weight

    def error(self, samples: int) -> float:
        """Largest difference to float64, as a part of the largest score."""
        batch = self.task.batch(torch.arange(samples), Draw(0))
        names = list(self.space.shapes)
        gradients = gradients_one_by_one(self.model, names, self.task.losses, batch)
        expected = self.space.join(gradients) @ self.v_QP.double().t()
        with GradDots(self.model, self.space, self.task.losses, self.v_QP) as engine:
            found = engine.total(batch)
        return float((found - expected).abs().max() / expected.abs().max())


def interleaved(contestants: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, each contestant once a round after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for counts in [False] + [True] * rounds:
        for name, run in contestants.items():
            started = time.perf_counter()
            run()
            if counts:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def report(contest: Contest, batch_size: int, rounds: int, checked: int, *, bare: bool) -> None:
    row: dict[str, object] = {
        "network": type(contest.model).__name__,
        "samples": contest.samples,
        "batch": batch_size,
        "threads": torch.get_num_threads(),
        "error": contest.error(checked),
    }
    contestants = {"fwd_bwd": contest.fwd_bwd, "scores": contest.scores}
    if bare:
        contestants["bare_products"] = contest.bare_products
    seconds = interleaved(contestants, rounds)
    for name, values in seconds.items():
        row[f"{name}_samples_per_s"] = round(contest.samples / statistics.median(values))
        row[f"{name}_spread"] = round((max(values) - min(values)) / statistics.median(values), 3)
    for other in seconds.keys() - {"scores"}:
        ratios = [o / s for o, s in zip(seconds[other], seconds["scores"], strict=True)]
        row[f"scores_over_{other}"] = round(statistics.median(ratios), 3)
    row["peak_rss_MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(row), flush=True)


def main(
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    rounds: Annotated[int, typer.Option(help="Repetitions; medians are printed.")] = 7,
    batch: Annotated[list[int], typer.Option(help="Batch sizes for MNIST.")] = [1024],  # noqa: B006
    ffdnet: Annotated[bool, typer.Option(help="FFDNet too.")] = True,
) -> None:
    """Print one JSON object a network and batch size; a speed ratio of 1 is as fast."""
    torch.set_num_threads(threads)
    mnist = MnistTask()
    for size in batch:
        torch.manual_seed(0)
        contest = Contest(mnist, mnist.model(), len(mnist.train_data()), size)
        report(contest, size, rounds, CHECKED, bare=True)
    if ffdnet:
        patches = FFDNetTask(patch_size=50)
        contest = Contest(patches, FFDNet(color=True), patches.batch_size, patches.batch_size)
        report(contest, patches.batch_size, rounds, 2, bare=False)


if __name__ == "__main__":
    typer.run(main)
