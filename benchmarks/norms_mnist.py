"""Per-node gradient norms of the MNIST network, all three layers, 60,000 images.

The limit is plain forward and backward of the mean loss, which gives no norm of an image. Before
timing, every answer for 128 images is compared with float64 gradients, one image at a time. Peers
that form each gradient take fewer images.

    python benchmarks/norms_mnist.py [--full] [--threads 1] [--batch 2000]
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated

import torch
import typer
from harness import Contestant, checked, cut, gather, header, over, print_race, use_worker_allocator
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from influence_jobs.gradients import GradNorms
from influence_jobs.gradients.reference import gradients_one_by_one
from influence_jobs.tasks.base import Draw
from influence_jobs.tasks.mnist import MnistTask

LAYERS = ("fc1", "fc2", "fc3")
WEIGHTS = tuple(f"{layer}.weight" for layer in LAYERS)
CHECKED = 128
PEER_BATCH = 64  # the fastest of 16 to 500 for peers that form gradients

Batch = Sequence[Tensor]
TASK = MnistTask()


class Contest:
    """The network, images in memory, and the float64 answer for some of them."""

    def __init__(self, batch: int, peer_samples: int):
        torch.manual_seed(0)
        self.network = TASK.model().eval()
        self.data = TASK.batch(torch.arange(60_000), Draw(0))
        self.batch, self.peer_samples = batch, peer_samples
        self.few = tuple(part[:CHECKED] for part in self.data)
        exact = gradients_one_by_one(self.network, WEIGHTS, TASK.losses, self.few)
        self.expected = row_norms(exact.values())

    def entry(
        self, name: str, norms: Callable[[Batch], Tensor], samples: int, batch: int
    ) -> Contestant:
        error = checked(norms(self.few), self.expected)
        return Contestant(name, over(cut(self.data, samples, batch), norms), samples, error)

    def limit(self) -> Contestant:
        model = copy.deepcopy(self.network)

        def step(batch: Batch) -> None:
            model.zero_grad()
            TASK.losses(model, batch).mean().backward()

        return Contestant("limit", over(cut(self.data, 60_000, self.batch), step), 60_000)

    def this_project(self) -> Contestant:
        model = copy.deepcopy(self.network)
        engine = GradNorms(model, LAYERS, TASK.losses, reduction="channel")

        def norms(batch: Batch) -> Tensor:
            return torch.cat(list(engine(batch).values()), dim=1)

        return self.entry("this project", norms, 60_000, self.batch)

    def vmap(self) -> Contestant:
        model = copy.deepcopy(self.network)
        weights = {name: model.get_parameter(name).detach() for name in WEIGHTS}

        def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
            outputs = functional_call(model, weights, (image[None],))
            return nn.functional.nll_loss(outputs, label[None])

        gradients = vmap(grad(loss), in_dims=(None, 0, 0))
        return self.entry(
            "torch.func vmap",
            lambda batch: row_norms(gradients(weights, *batch).values()),
            self.peer_samples,
            PEER_BATCH,
        )

    def opacus(self) -> Contestant:
        from opacus import GradSampleModule

        return self.wrapped("opacus, hooks", GradSampleModule)

    def opacus_expanded_weights(self) -> Contestant:
        from opacus.grad_sample import GradSampleModuleExpandedWeights

        return self.wrapped("opacus, expanded weights", GradSampleModuleExpandedWeights)

    def wrapped(self, name: str, wrapper: Callable[..., nn.Module]) -> Contestant:
        model = wrapper(copy.deepcopy(self.network).train(), loss_reduction="sum")
        parameters = dict(model._module.named_parameters())

        def norms(batch: Batch) -> Tensor:
            model.zero_grad()
            TASK.losses(model, batch).sum().backward()
            return row_norms(parameters[name].grad_sample for name in WEIGHTS)

        return self.entry(name, norms, self.peer_samples, PEER_BATCH)

    def backpack(self) -> Contestant:
        from backpack import backpack, extend
        from backpack.extensions import BatchGrad

        copied = copy.deepcopy(self.network)
        layers = [getattr(copied, layer) for layer in LAYERS]
        model = extend(nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]))
        loss = extend(nn.CrossEntropyLoss(reduction="sum"))

        def norms(batch: Batch) -> Tensor:
            model.zero_grad()
            with backpack(BatchGrad()):
                loss(model(batch[0]), batch[1]).backward()
            return row_norms(layer.weight.grad_batch for layer in layers)

        return self.entry("BackPACK", norms, self.peer_samples, PEER_BATCH)

    def one_by_one(self) -> Contestant:
        model = copy.deepcopy(self.network)
        weights = [model.get_parameter(name) for name in WEIGHTS]

        def norms(batch: Batch) -> Tensor:
            rows = []
            for one in cut(batch, len(batch[0]), 1):
                gradients = torch.autograd.grad(TASK.losses(model, one).sum(), weights)
                rows.append(torch.cat([g_CI.norm(dim=1) for g_CI in gradients]))
            return torch.stack(rows)

        return self.entry("one by one", norms, self.peer_samples // 4, PEER_BATCH)


def row_norms(gradients: Iterable[Tensor]) -> Tensor:
    """Norms (B, nodes) of the rows of the layers' gradients (B, C, I)."""
    return torch.cat([torch.linalg.vector_norm(g_BCI, dim=2) for g_BCI in gradients], dim=1)


def main(
    full: Annotated[
        bool, typer.Option("--full", help="More images for peers, more rounds.")
    ] = False,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    batch: Annotated[int, typer.Option(help="Batch size of the limit and of this project.")] = 2000,
) -> None:
    """Print images a second, and ratios to the limit."""
    use_worker_allocator()
    torch.set_num_threads(threads)
    header("Per-node gradient norms: MNIST network, three layers")
    contest = Contest(batch, 12_000 if full else 2000)
    builders = (
        contest.limit,
        contest.this_project,
        contest.vmap,
        contest.opacus,
        contest.opacus_expanded_weights,
        contest.backpack,
        contest.one_by_one,
    )
    print_race(gather(builders), 15 if full else 7, "images", "limit")


if __name__ == "__main__":
    typer.run(main)
