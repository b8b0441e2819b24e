"""Speed of scores: dot products of ten vectors with the gradient of every sample's loss.

For MNIST the ten vectors are the gradients of the research report's ten test images: peers without
a solver can multiply only with such gradients. The contestants are forward and backward of the mean
loss, this project, the peers, and the *bound*. The bound is the bare matrix products that every
exact method needs, on arrays of the same shapes: the forward pass, the gradient of each layer's
output, and the products with the vectors. For FFDNet the ten vectors are random and cover all
parameters; the contestants are forward and backward, and this project. Before timing, every answer
is compared with float64 gradients, one sample at a time.

    python benchmarks/scores.py [--full] [--threads 1] [--batch 1024]
"""

import copy
import logging
import tempfile
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from harness import Contestant, checked, cut, gather, header, over, print_race, use_worker_allocator
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from influence_jobs.gradients import GradDots, ParameterSpace
from influence_jobs.gradients.reference import gradients_one_by_one
from influence_jobs.tasks.base import Draw, Task
from influence_jobs.tasks.ffdnet import FFDNetTask
from influence_jobs.tasks.mnist import MnistTask

VECTORS = 10

Batch = tuple[Tensor, ...]


class Contest:
    """A network, its data in memory, ten vectors, and the float64 scores of some samples."""

    def __init__(
        self, task: Task, vectors: Callable[[nn.Module], Tensor], samples: int, batch: int, few: int
    ):
        torch.manual_seed(0)
        self.task, self.network, self.samples, self.batch = (
            task,
            task.model().eval(),
            samples,
            batch,
        )
        self.space = ParameterSpace(self.network)
        self.v_QP = vectors(self.network)
        self.data: Batch = task.batch(torch.arange(samples), Draw(0))
        self.few = tuple(part[:few] for part in self.data)
        exact = gradients_one_by_one(self.network, list(self.space.shapes), task.losses, self.few)
        self.expected_BQ = self.space.join(exact) @ self.v_QP.double().t()

    def entry(
        self, name: str, scores: Callable[[Batch], Tensor], samples: int, batch: int
    ) -> Contestant:
        error = checked(scores(self.few), self.expected_BQ)
        return Contestant(name, over(cut(self.data, samples, batch), scores), samples, error)

    def limit(self) -> Contestant:
        model = copy.deepcopy(self.network)

        def step(batch: Batch) -> None:
            model.zero_grad()
            self.task.losses(model, batch).mean().backward()

        run = over(cut(self.data, self.samples, self.batch), step)
        return Contestant("forward + backward", run, self.samples)

    def this_project(self) -> Contestant:
        engine = GradDots(copy.deepcopy(self.network), self.space, self.task.losses, self.v_QP)
        return self.entry("this project", engine.total, self.samples, self.batch)


class MnistContest(Contest):
    """The contest on MNIST, with the bound and the peers; the peers take fewer images."""

    def __init__(self, batch: int, peer_samples: int):
        super().__init__(MnistTask(), self.query_gradients, 60_000, batch, 64)
        self.peer_samples = peer_samples

    def query_gradients(self, network: nn.Module) -> Tensor:
        """Gradients (Q, P) of the queries' losses."""
        ids = torch.tensor(MnistTask.query_sets["paper"])
        self.queries: Batch = MnistTask().test_batch(ids, Draw(0))
        space, losses = ParameterSpace(network), MnistTask().losses
        return torch.stack(
            [space.gradient(losses(network, one).sum()) for one in cut(self.queries, VECTORS, 1)]
        )

    def bound(self) -> Contestant:
        layers = [module for module in self.network.children() if isinstance(module, nn.Linear)]
        hidden = [torch.randn(self.batch, layer.in_features) for layer in layers[1:]]
        outputs = [torch.randn(self.batch, layer.out_features) for layer in layers]
        stacked = [layer.weight.detach().repeat(VECTORS, 1) for layer in layers]

        @torch.no_grad()
        def products(batch: Batch) -> None:
            size = len(batch[0])
            for i, layer in enumerate(layers):
                a = hidden[i - 1][:size] if i else batch[0]
                a @ layer.weight.t()
                a @ stacked[i].t()
                if i:
                    outputs[i][:size] @ layer.weight

        return Contestant("bound", over(cut(self.data, 60_000, self.batch), products), 60_000)

    def kronfluence(self) -> Contestant:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments
        from kronfluence.task import Task as KronfluenceTask

        class Nll(KronfluenceTask):
            def compute_train_loss(
                self, batch: Any, model: nn.Module, sample: bool = False
            ) -> Tensor:
                return nn.functional.nll_loss(model(batch[0]), batch[1], reduction="sum")

            def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
                return self.compute_train_loss(batch, model)

        model = prepare_model(copy.deepcopy(self.network), Nll())
        folder = tempfile.mkdtemp()
        analyzer = Analyzer("mnist", model, Nll(), cpu=True, output_dir=folder, disable_tqdm=True)
        analyzer.logger.setLevel(logging.ERROR)
        analyzer.fit_all_factors(
            "none", TensorDataset(*self.few), factor_args=FactorArguments(strategy="identity")
        )

        def scores(batch: Batch) -> Tensor:
            analyzer.compute_pairwise_scores(
                "scores",
                "none",
                TensorDataset(*self.queries),
                TensorDataset(*batch),
                per_device_query_batch_size=VECTORS,
                per_device_train_batch_size=1024,
                overwrite_output_dir=True,
            )
            return analyzer.load_pairwise_scores("scores")["all_modules"].t()

        # It scores a whole data set at a time.
        return self.entry("kronfluence, identity", scores, 60_000, 60_000)

    def pydvl(self) -> Contestant:
        from pydvl.influence.torch import LissaInfluence

        influence = LissaInfluence(copy.deepcopy(self.network), nn.functional.nll_loss, dampen=0.01)
        influence = influence.fit(DataLoader(TensorDataset(*self.few), batch_size=8))

        def scores(batch: Batch) -> Tensor:
            return influence.influences_from_factors(self.v_QP, *batch).t()

        return self.entry("pyDVL", scores, self.peer_samples, 64)

    def captum(self) -> Contestant:
        from captum.influence import TracInCP

        def scores(batch: Batch) -> Tensor:
            tracin = TracInCP(
                copy.deepcopy(self.network),
                TensorDataset(*batch),
                ["the weights as they are"],
                checkpoints_load_func=lambda model, path: 1.0,
                loss_fn=nn.NLLLoss(reduction="sum"),
                batch_size=64,
                sample_wise_grads_per_batch=True,
            )
            return tracin.influence(self.queries).t()

        return self.entry("captum TracInCP", scores, self.peer_samples, self.peer_samples)

    def dattri(self) -> Contestant:
        from dattri.algorithm.tracin import TracInAttributor
        from dattri.task import AttributionTask

        network = copy.deepcopy(self.network)

        def loss(parameters: dict[str, Tensor], batch: Batch) -> Tensor:
            image, label = batch
            outputs = functional_call(network, parameters, (image.unsqueeze(0),))
            return nn.functional.nll_loss(outputs, label.unsqueeze(0))

        task = AttributionTask(loss_func=loss, model=network, checkpoints=network.state_dict())
        attributor = TracInAttributor(task, weight_list=torch.ones(1), normalized_grad=False)
        attributor.projector_kwargs = None  # by default it projects gradients at random
        queries = DataLoader(TensorDataset(*self.queries), batch_size=VECTORS)

        def scores(batch: Batch) -> Tensor:
            return attributor.attribute(DataLoader(TensorDataset(*batch), batch_size=256), queries)

        samples = self.peer_samples // 4
        return self.entry("dattri TracIn", scores, samples, samples)


def random_vectors(network: nn.Module) -> Tensor:
    return torch.randn(VECTORS, ParameterSpace(network).size)


def main(
    full: Annotated[
        bool, typer.Option("--full", help="More images for peers, more rounds.")
    ] = False,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    batch: Annotated[
        int, typer.Option(help="Batch size of the limits and of this project.")
    ] = 1024,
) -> None:
    """Print a table for each network, with speeds and ratios to the references."""
    use_worker_allocator()
    torch.set_num_threads(threads)
    rounds = 9 if full else 5
    header("Scores: ten vectors times every sample's gradient")
    print("## MNIST\n")
    mnist = MnistContest(batch, 12_000 if full else 2048)
    builders = (
        mnist.limit,
        mnist.bound,
        mnist.this_project,
        mnist.kronfluence,
        mnist.pydvl,
        mnist.captum,
        mnist.dattri,
    )
    print_race(gather(builders), rounds, "images", "bound", "forward + backward")
    print("\n## FFDNet, patches of 50x50, all parameters\n")
    patches = FFDNetTask(patch_size=50)
    size = patches.batch_size
    ffdnet = Contest(patches, random_vectors, size * (4 if full else 1), size, 2)
    contestants = gather((ffdnet.limit, ffdnet.this_project))
    print_race(contestants, rounds, "patches", "forward + backward")


if __name__ == "__main__":
    typer.run(main)
