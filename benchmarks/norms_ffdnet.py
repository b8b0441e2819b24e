"""Norms (96, 3, 3) of FFDNet's layer 11, patches of 50x50.

The limit is plain forward and backward of the mean loss, where backward ends at the layer. Before
timing, every answer for four patches is compared with float64 gradients, one patch at a time. Peers
compute that layer only.

    python benchmarks/norms_ffdnet.py [--full] [--threads 1] [--weights FFDNet.pth]
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from harness import Contestant, checked, cut, gather, header, over, print_race, use_worker_allocator
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from influence_jobs.gradients import GradNorms
from influence_jobs.gradients.reference import gradients_one_by_one
from influence_jobs.models.checkpoints import load_weights
from influence_jobs.tasks.base import Draw
from influence_jobs.tasks.ffdnet import FFDNetTask

LAYER = 29  # of `main`: the eleventh convolution
WEIGHT = f"main.{LAYER}.weight"
CHECKED = 4
BATCH = 32  # the best of 8 to 64 for all

Batch = Sequence[Tensor]
TASK = FFDNetTask(patch_size=50)


class Contest:
    """The network, patches in memory, and the float64 answer for a few of them."""

    def __init__(self, weights: Path | None, samples: int):
        torch.manual_seed(0)
        self.network = TASK.model().eval()
        if weights:
            load_weights(self.network, weights)
        self.data, self.samples = TASK.batch(torch.arange(samples), Draw(0)), samples
        self.few = tuple(part[:CHECKED] for part in self.data)
        exact = gradients_one_by_one(self.network, [WEIGHT], TASK.losses, self.few)
        self.expected = exact[WEIGHT].norm(dim=2)

    def copy(self) -> nn.Module:
        """A copy of the network in which only the layer's weight requires a gradient."""
        network = copy.deepcopy(self.network).requires_grad_(False)
        network.get_parameter(WEIGHT).requires_grad_(True)
        return network

    def entry(self, name: str, norms: Callable[[Batch], Tensor], samples: int) -> Contestant:
        error = checked(norms(self.few), self.expected)
        return Contestant(name, over(cut(self.data, samples, BATCH), norms), samples, error)

    def limit(self) -> Contestant:
        model = self.copy()

        def step(batch: Batch) -> None:
            model.zero_grad()
            TASK.losses(model, batch).mean().backward()

        return Contestant("limit", over(cut(self.data, self.samples, BATCH), step), self.samples)

    def forward(self) -> Contestant:
        model = self.copy().requires_grad_(False)

        def step(batch: Batch) -> None:
            TASK.losses(model, batch)

        run = over(cut(self.data, self.samples, BATCH), step)
        return Contestant("forward alone", run, self.samples)

    def this_project(self) -> Contestant:
        model = self.copy().to(memory_format=torch.channels_last)
        engine = GradNorms(model, [f"main.{LAYER}"], TASK.losses, reduction="kernel")
        return self.entry(
            "this project", lambda batch: engine(batch)[f"main.{LAYER}"], self.samples
        )

    def vmap(self) -> Contestant:
        """Use vmap from that layer on; earlier layers need no gradient."""
        model = self.copy()
        layers = model.main
        head, tail = layers[:LAYER], layers[LAYER:]
        weight = layers[LAYER].weight.detach()

        def loss(weight: Tensor, hidden: Tensor, clean: Tensor) -> Tensor:
            denoised = functional_call(tail, {f"{LAYER}.weight": weight}, (hidden[None],))
            return (nn.functional.pixel_shuffle(denoised, 2) - clean).square().mean()

        gradients = vmap(grad(loss), in_dims=(None, 0, 0))

        def norms(batch: Batch) -> Tensor:
            with torch.no_grad():
                hidden = head(folded(batch))
            return gradients(weight, hidden, batch[2]).norm(dim=2)

        return self.entry("torch.func vmap, from the layer on", norms, self.samples // 2)

    def opacus(self) -> Contestant:
        from opacus import GradSampleModule

        network = self.copy()
        # Opacus records in train mode only, which changes nothing else in a convolution.
        network.main[LAYER].train()
        model = GradSampleModule(network, loss_reduction="sum", strict=False)
        weight = network.get_parameter(WEIGHT)

        def norms(batch: Batch) -> Tensor:
            model.zero_grad()
            TASK.losses(model, batch).sum().backward()
            return weight.grad_sample.norm(dim=2)

        return self.entry("opacus", norms, self.samples // 2)

    def backpack(self) -> Contestant:
        from backpack import backpack, extend
        from backpack.extensions import BatchGrad

        model = self.copy()
        layer = extend(model.main[LAYER])

        def norms(batch: Batch) -> Tensor:
            model.zero_grad()
            with backpack(BatchGrad()):
                TASK.losses(model, batch).sum().backward()
            return layer.weight.grad_batch.norm(dim=2)

        return self.entry("BackPACK", norms, self.samples // 2)

    def one_by_one(self) -> Contestant:
        model = self.copy()
        weight = model.get_parameter(WEIGHT)

        def norms(batch: Batch) -> Tensor:
            rows = []
            for one in cut(batch, len(batch[0]), 1):
                (gradient,) = torch.autograd.grad(TASK.losses(model, one).sum(), weight)
                rows.append(gradient.norm(dim=1))
            return torch.stack(rows)

        return self.entry("one by one", norms, self.samples // 2)


def folded(batch: Batch) -> Tensor:
    """The input of FFDNet's `main`."""
    noisy, sigma_B, _ = batch
    pixels = nn.functional.pixel_unshuffle(noisy, 2)
    noise_map = sigma_B.view(-1, 1, 1, 1).expand(-1, 1, *pixels.shape[-2:])
    return torch.cat((pixels, noise_map), dim=1)


def main(
    full: Annotated[bool, typer.Option("--full", help="More patches, more rounds.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    weights: Annotated[Path | None, typer.Option(help="State dict; else untrained.")] = None,
) -> None:
    """Print patches a second, and ratios to the limit."""
    use_worker_allocator()
    torch.set_num_threads(threads)
    header("Gradient norms of FFDNet's layer 11, patches of 50x50")
    contest = Contest(weights, 256 if full else 64)
    builders = (
        contest.limit,
        contest.forward,
        contest.this_project,
        contest.vmap,
        contest.opacus,
        contest.backpack,
        contest.one_by_one,
    )
    print_race(gather(builders), 9 if full else 5, "patches", "limit")


if __name__ == "__main__":
    typer.run(main)
