"""Norms of the whole weight gradient, every Linear and Conv2d layer, of three common networks.

The weights are random: LeNet on images of 28x28; a ResNet-18 of torchvision on 64x64, in eval mode;
a BERT of transformers (hidden 128, 4 layers, 128 tokens) that classifies. The limit is plain
forward and backward of the mean loss by all parameters, which gives no sample's norm. Every answer
for four samples is first compared with float64 gradients, one sample at a time.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from harness import (
    Contestant,
    checked,
    cut,
    gather,
    header,
    over,
    print_race,
    seconds_of,
    use_worker_allocator,
)
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from influence_jobs.gradients import GradNorms
from influence_jobs.gradients.reference import gradients_one_by_one

CHECKED = 4

Batch = Sequence[Tensor]


class LeNet(nn.Module):
    """Two convolutions with pooling, three Linear layers."""

    sample = (1, 28, 28)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x).relu(), 2)
        x = F.max_pool2d(self.conv2(x).relu(), 2)
        return self.fc3(self.fc2(self.fc1(x.flatten(1)).relu()).relu())


def lenet() -> tuple[nn.Module, Tensor]:
    """The network and inputs."""
    return LeNet(), torch.randn(512, 1, 28, 28)


def resnet_18() -> tuple[nn.Module, Tensor]:
    """The network and inputs."""
    from torchvision.models import resnet18

    return resnet18(num_classes=10), torch.randn(64, 3, 64, 64)


def bert() -> tuple[nn.Module, Tensor]:
    """The network and inputs; without dropout, as a peer records in train mode only."""
    from transformers import BertConfig, BertForSequenceClassification

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = BertConfig(
                vocab_size=1000,
                hidden_size=128,
                num_hidden_layers=4,
                num_attention_heads=2,
                intermediate_size=512,
                max_position_embeddings=128,
                hidden_dropout_prob=0,
                attention_probs_dropout_prob=0,
            )
            self.bert = BertForSequenceClassification(config)

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.bert(ids).logits
            return logits

    return Classifier(), torch.randint(0, 1000, (64, 128))


NETWORKS = {"LeNet": lenet, "ResNet-18": resnet_18, "BERT": bert}


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of each sample, (B,)."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def layer_norms(gradients: Iterable[Tensor]) -> Tensor:
    """Norms (B, layers) of the layers' gradients (B, *weight shape)."""
    return torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients], dim=1)


class Contest:
    """One network, some samples in memory, and the float64 answer for a few."""

    def __init__(self, make: Callable[[], tuple[nn.Module, Tensor]], batch: int):
        torch.manual_seed(0)
        self.network, inputs = make()
        self.network.eval()
        self.data = inputs, torch.randint(0, 2, (len(inputs),))
        self.batch, self.samples = batch, len(inputs)
        self.few = tuple(part[:CHECKED] for part in self.data)
        modules = self.network.named_modules()
        self.layers = [name for name, m in modules if isinstance(m, nn.Linear | nn.Conv2d)]
        self.weights = [f"{layer}.weight" for layer in self.layers]
        exact = gradients_one_by_one(self.network, self.weights, losses, self.few)
        self.expected = layer_norms(exact.values())

    def copy(self) -> nn.Module:
        """The network, of which only the layers' weights require a gradient."""
        model = copy.deepcopy(self.network).requires_grad_(False)
        for name in self.weights:
            model.get_parameter(name).requires_grad_(True)
        return model

    def entry(self, name: str, norms: Callable[[Batch], Tensor]) -> Contestant:
        error = checked(norms(self.few), self.expected)
        batches = cut(self.data, self.samples, self.batch)
        seconds_of(lambda: norms(batches[0]))  # a peer that cannot take a whole batch fails here
        return Contestant(name, over(batches, norms), self.samples, error)

    def limit(self) -> Contestant:
        model = copy.deepcopy(self.network)

        def step(batch: Batch) -> None:
            model.zero_grad()
            losses(model, batch).mean().backward()

        batches = cut(self.data, self.samples, self.batch)
        return Contestant("limit", over(batches, step), self.samples)

    def this_project(self) -> Contestant:
        engine = GradNorms(copy.deepcopy(self.network), self.layers, losses, reduction="layer")
        return self.entry(
            "this project", lambda batch: torch.stack(list(engine(batch).values()), dim=1)
        )

    def vmap(self) -> Contestant:
        model = copy.deepcopy(self.network)
        weights = {name: model.get_parameter(name).detach() for name in self.weights}

        def loss(weights: dict[str, Tensor], inputs: Tensor, label: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(model, weights, (inputs[None],)), label[None])

        gradients = vmap(grad(loss), in_dims=(None, 0, 0))
        return self.entry(
            "torch.func vmap", lambda batch: layer_norms(gradients(weights, *batch).values())
        )

    def opacus(self) -> Contestant:
        from opacus import GradSampleModule

        network = self.copy()
        for layer in self.layers:  # it records in train mode only; they have no other use of it
            network.get_submodule(layer).train()
        model = GradSampleModule(network, loss_reduction="sum", strict=False)
        weights = [network.get_parameter(name) for name in self.weights]

        def norms(batch: Batch) -> Tensor:
            model.zero_grad()
            losses(model, batch).sum().backward()
            return layer_norms(weight.grad_sample for weight in weights)

        return self.entry("opacus", norms)

    def one_by_one(self) -> Contestant:
        model = self.copy()
        weights = [model.get_parameter(name) for name in self.weights]

        def norms(batch: Batch) -> Tensor:
            return torch.cat(
                [
                    layer_norms(
                        g[None] for g in torch.autograd.grad(losses(model, one).sum(), weights)
                    )
                    for one in cut(batch, len(batch[0]), 1)
                ]
            )

        return self.entry("one by one", norms)


def main(
    full: Annotated[bool, typer.Option("--full", help="More rounds.")] = False,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 1,
    batch: Annotated[int, typer.Option(help="Samples a pass, of all contestants.")] = 16,
    only: Annotated[str | None, typer.Option(help="One network.")] = None,
) -> None:
    """Print a table for each network, of samples a second and of ratios to the limit's speed."""
    use_worker_allocator()
    torch.set_num_threads(threads)
    header("Norms of whole layers: LeNet, ResNet-18, BERT")
    for name, make in NETWORKS.items():
        if only not in (None, name):
            continue
        print(f"## {name}\n")
        try:
            contest = Contest(make, batch)
        except ImportError as error:
            print(f"- left out: {error}\n")
            continue
        builders = (
            contest.limit,
            contest.this_project,
            contest.vmap,
            contest.opacus,
            contest.one_by_one,
        )
        print_race(gather(builders), 15 if full else 7, "samples", "limit")
        print()


if __name__ == "__main__":
    typer.run(main)
