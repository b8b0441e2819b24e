"""Speed of LiSSA: MNIST, the ten test images of the research report, the published setting.

The setting is five repeats, depth 1,000, batch 8, damping .01 and scale 25, so lambda is .25. Our
repeats run side by side (`Lissa.solve_repeats`; a shard of `infl submit s-test` has up to three).
The unit is a curvature product for one vector. The bound is the two products of the first layer
that a step of all queries needs, in blocks of 32 steps. Before timing, every contestant solves for
eight copies of one image, where nothing is random, and is compared with the recursion in float64.
`solvers.py` measures the accuracy of the solvers.

    python benchmarks/s_test.py [--full] [--weights CHECKPOINT.pt] [--threads 2]
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from harness import (
    Contestant,
    checked,
    gather,
    header,
    print_race,
    use_worker_allocator,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from influence_jobs.curvature import GaussNewton, Hessian, Operator
from influence_jobs.curvature.lissa_steps import AnySteps, lissa_steps
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.models.checkpoints import load_weights
from influence_jobs.tasks.base import Draw
from influence_jobs.tasks.mnist import MnistTask
from influence_jobs.training.recipe import Recipe
from influence_jobs.training.train import Trainer

LAMBDA, SCALE, BATCH, REPEATS, DEPTH = 0.25, 25.0, 8, 5, 1000
CHECKED_DEPTH = 30
BLOCK = 32  # steps of the bound

TASK = MnistTask()
Weights = Annotated[Path | None, typer.Option(help="State dict; else trained here.")]
Epochs = Annotated[int, typer.Option(help="Epochs of the training.")]
Threads = Annotated[int, typer.Option(help="Threads of torch.")]
Solve = Callable[[Tensor, int], Tensor]  # (ids of the training set, depth) to (Q, P)


def trained(weights: Path | None, epochs: int) -> nn.Module:
    if weights:
        model = TASK.model()
        load_weights(model, weights)
        return model.eval()
    recipe = Recipe(
        epochs=epochs, optimizer="sgd", lr=0.003, momentum=0.9, weight_decay=0.001, batch_size=8
    )
    trainer = Trainer(TASK, recipe, seed=0, device=torch.device("cpu"))
    while not trainer.finished:
        trainer.step()
    return trainer.model.eval()


class Contest:
    """The trained network and the gradients of ten queries."""

    def __init__(self, model: nn.Module, samples: int):
        self.model, self.samples = model, samples
        self.space = ParameterSpace(model)
        rows = []
        for test in TASK.query_sets["paper"]:
            batch = TASK.test_batch(torch.tensor([test]), Draw(0))
            rows.append(self.space.gradient(TASK.losses(model, batch).sum()))
        self.rhs_QP = torch.stack(rows)
        self.copies = torch.full((BATCH,), 7)  # eight copies of one image: one mini-batch

    def operator(self, kind: type[Operator], ids: Tensor) -> Operator:
        return kind(self.model, self.space, TASK, ids)

    def data(self, ids: Tensor) -> TensorDataset:
        return TensorDataset(*TASK.batch(ids, Draw(0)))

    def recursion(self, kind: type[Operator]) -> Tensor:
        """LiSSA's result in float64, by plain autograd."""
        model = copy.deepcopy(self.model).double()
        images, labels = TASK.batch(self.copies[:1], Draw(0))
        logits_C = model(images.double())[0]
        parameters = list(model.parameters())

        def flat(value: Tensor) -> Tensor:
            gradients = torch.autograd.grad(value, parameters, create_graph=True)
            return torch.cat([part.flatten() for part in gradients])

        v_QP = self.rhs_QP.double()
        if kind is GaussNewton:
            jacobian_CP = torch.stack([flat(value) for value in logits_C]).detach()
            p_C = logits_C.detach().softmax(0)
            inner_CC = p_C.diag() - torch.outer(p_C, p_C)

            def product(h_QP: Tensor) -> Tensor:
                return h_QP @ jacobian_CP.t() @ inner_CC @ jacobian_CP
        else:
            gradient_P = flat(-logits_C[labels[0]])

            def product(h_QP: Tensor) -> Tensor:
                rows = [
                    torch.autograd.grad(gradient_P @ h_P, parameters, retain_graph=True)
                    for h_P in h_QP
                ]
                return torch.stack([torch.cat([p.flatten() for p in row]) for row in rows])

        h_QP = v_QP
        for _ in range(CHECKED_DEPTH):
            h_QP = v_QP + (1 - LAMBDA / SCALE) * h_QP - product(h_QP) / SCALE
        return h_QP.detach() / SCALE

    def entry(
        self, name: str, kind: type[Operator], solve: Solve, depth: int, repeats: int = 1
    ) -> Contestant:
        error = checked(solve(self.copies, CHECKED_DEPTH), self.recursion(kind))
        ids = torch.arange(self.samples)
        products = len(self.rhs_QP) * depth * repeats
        return Contestant(name, lambda: solve(ids, depth), products, error)

    def bound(self) -> Contestant:
        rows = sum(p.numel() for p in (self.model.fc1.weight, self.model.fc1.bias))
        inputs = self.model.fc1.in_features + 1
        h_RI = torch.randn(len(self.rhs_QP) * rows // inputs, inputs)
        x_KI = torch.randn(BLOCK * BATCH, inputs)

        def run() -> None:
            for _ in range(DEPTH // BLOCK):
                outputs_KR = x_KI @ h_RI.t()
                h_RI.addmm_(outputs_KR.t(), x_KI, beta=0)

        return Contestant("bound", run, DEPTH // BLOCK * BLOCK * len(self.rhs_QP))

    def steps(self, kind: type[Operator], blocked: bool) -> Solve:
        """Solve by the recursion, all repeats side by side."""

        def solve(ids: Tensor, depth: int) -> Tensor:
            operator = self.operator(kind, ids)
            settings = (operator, self.rhs_QP, LAMBDA / SCALE, SCALE)
            if blocked:
                steps = lissa_steps(*settings, BATCH, REPEATS)
            else:
                steps = AnySteps(*settings, REPEATS)
            chosen = ids[torch.randint(len(ids), (REPEATS, depth, BATCH))]
            for piece in chosen.split(steps.longest, dim=1):
                steps.take(piece)
            return steps.h_EQP().mean(dim=0) / SCALE

        return solve

    def this_project(self) -> Contestant:
        solve = self.steps(GaussNewton, blocked=True)
        return self.entry("this project, perceptrons", GaussNewton, solve, DEPTH, REPEATS)

    def this_project_hessian(self) -> Contestant:
        solve = self.steps(Hessian, blocked=True)
        return self.entry("this project, perceptrons, Hessian", Hessian, solve, DEPTH, REPEATS)

    def this_project_any_model(self) -> Contestant:
        solve = self.steps(Hessian, blocked=False)
        return self.entry("this project, any model, Hessian", Hessian, solve, DEPTH // 4, REPEATS)

    def pydvl(self) -> Contestant:
        from pydvl.influence.torch.operator import HessianBatchOperation, LissaOperator

        hessian = HessianBatchOperation(self.model, nn.functional.nll_loss)

        def solve(ids: Tensor, depth: int) -> Tensor:
            operator = LissaOperator(
                hessian,
                DataLoader(self.data(ids), batch_size=BATCH),
                maxiter=depth,
                dampen=LAMBDA / SCALE,
                scale=SCALE,
                rtol=0.0,
                warn_on_max_iteration=False,
            )
            return operator.apply(self.rhs_QP)

        return self.entry("pyDVL, Hessian", Hessian, solve, DEPTH // 10)

    def dattri(self) -> Contestant:
        from dattri.func.hessian import ihvp_lissa

        model = self.model
        names = list(self.space.shapes)

        def loss(theta_P: Tensor, images: Tensor, labels: Tensor) -> Tensor:
            outputs = functional_call(model, self.space.split(theta_P), (images,))
            return nn.functional.nll_loss(outputs, labels.long())

        theta_P = self.space.join({name: model.get_parameter(name).detach() for name in names})

        def solve(ids: Tensor, depth: int) -> Tensor:
            inverse = ihvp_lissa(
                loss,
                batch_size=BATCH,
                num_repeat=1,
                recursion_depth=depth,
                damping=LAMBDA / SCALE,
                scaling=SCALE,
            )
            with torch.no_grad():  # added by us: dattri would keep the graph of every step
                images, labels = self.data(ids).tensors
                data = (theta_P, images, labels.float())  # dattri differentiates by all of them
                return inverse(data, self.rhs_QP, in_dims=(None, 0, 0))

        return self.entry("dattri, Hessian", Hessian, solve, DEPTH // 50)


def main(
    full: Annotated[bool, typer.Option("--full", help="60,000 samples, more rounds.")] = False,
    weights: Weights = None,
    epochs: Epochs = 2,
    threads: Threads = 2,
) -> None:
    """Print products a second, and ratios to pyDVL and to the bound."""
    use_worker_allocator()
    torch.set_num_threads(threads)
    header("LiSSA's products, the published setting")
    contest = Contest(trained(weights, epochs), 60_000 if full else 6_000)
    builders = (
        contest.pydvl,
        contest.bound,
        contest.this_project,
        contest.this_project_hessian,
        contest.this_project_any_model,
        contest.dattri,
    )
    print_race(gather(builders), 9 if full else 5, "products", "pyDVL, Hessian", "bound")


if __name__ == "__main__":
    typer.run(main)
