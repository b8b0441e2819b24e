"""Time of each solver to an accurate s_test: MNIST, the ten test images of the research report.

An s_test is accurate if its cosine with the exact answer is at least .99, in the median over the
queries. The exact answer comes from conjugate gradients over all samples, to a residual of 1e-5.
Each solver tries settings from cheap to costly until one is accurate; all tried settings are
listed. Times are of one run, everything that the solver needs included. There are two matrices: the
Gauss-Newton matrix with lambda .25, and, because most peers have it only, the Hessian with lambda
1, which makes its negative eigenvalues positive.

    python benchmarks/solvers.py [--full] [--weights CHECKPOINT.pt] [--threads 2]
"""

import copy
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from harness import header, print_table, use_worker_allocator
from s_test import Contest, Epochs, Threads, Weights, trained
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from influence_jobs.curvature import (
    ConjugateGradient,
    EkFac,
    GaussNewton,
    Hessian,
    Lissa,
    Operator,
    Solver,
)
from influence_jobs.curvature.spectrum import smallest_eigenvalue

WANTED = 0.99  # cosine with the exact answer
LAMBDA = {GaussNewton: 0.25, Hessian: 1.0}
SCALE, BATCH, DEPTH, REPEATS = 25.0, 8, 1000, 5  # of LiSSA, as published
PARTS = (24, 12, 6, 3, 1)  # divisors of the number of samples


@dataclass(frozen=True)
class Try:
    """One setting of one solver."""

    solver: str
    settings: str
    solve: Callable[[], Tensor]  # (Q, P)


class Ladder:
    """A matrix, the exact answer, and the settings of each solver, from cheap to costly."""

    def __init__(
        self, contest: Contest, kind: type[GaussNewton] | type[Hessian], repeats: tuple[int, ...]
    ):
        self.contest, self.kind, self.damping = contest, kind, LAMBDA[kind]
        self.repeats = repeats  # of LiSSA in its published setting
        self.rhs_QP, self.samples = contest.rhs_QP, contest.samples
        self.shuffled = torch.randperm(self.samples, generator=torch.Generator().manual_seed(0))
        exact = ConjugateGradient(self.damping, tolerance=1e-5)
        self.exact_QP = exact.solve(self.operator(), self.rhs_QP).x_QP

    def ids(self, part: int = 1) -> Tensor:
        return self.shuffled[: self.samples // part].sort().values

    def operator(self, part: int = 1) -> Operator:
        return self.contest.operator(self.kind, self.ids(part))

    def cosines(self, x_QP: Tensor) -> Tensor:
        return torch.cosine_similarity(x_QP, self.exact_QP, dim=1)

    def one(self, name: str, settings: str, solver: Solver, part: int = 1) -> Try:
        return Try(name, settings, lambda: solver.solve(self.operator(part), self.rhs_QP).x_QP)

    def cg(self) -> Iterator[Try]:
        solver = ConjugateGradient(self.damping, 1e-2)
        for part in PARTS:
            settings = f"{self.samples // part:,} samples, residual 1e-2"
            yield self.one("this project, cg", settings, solver, part)

    def lissa(self) -> Iterator[Try]:
        for count in (1, REPEATS):
            yield self._lissa("automatic", Lissa(self.damping), count)

    def lissa_as_published(self) -> Iterator[Try]:
        solver = Lissa(self.damping, scale=SCALE, depth=DEPTH, batch_size=BATCH)
        for count in self.repeats:
            yield self._lissa("published setting", solver, count)

    def _lissa(self, settings: str, solver: Lissa, count: int) -> Try:
        def solve() -> Tensor:
            solutions = []
            for first in range(0, count, REPEATS):
                repeats = range(first, min(first + REPEATS, count))
                solutions += solver.solve_repeats(self.operator(), self.rhs_QP, repeats)
            return torch.stack([solution.x_QP for solution in solutions]).mean(dim=0)

        return Try(f"this project, lissa, {settings}", f"{count} repeat{'s' * (count > 1)}", solve)

    def ek_fac(self) -> Iterator[Try]:
        yield self.one("this project, ek-fac", "all samples", EkFac(self.damping))

    def kronfluence(self) -> Iterator[Try]:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments
        from kronfluence.task import Task as KronfluenceTask

        class Nll(KronfluenceTask):
            def compute_train_loss(
                self, batch: Any, model: nn.Module, sample: bool = False
            ) -> Tensor:
                outputs = model(batch[0])
                labels = torch.distributions.Categorical(logits=outputs.detach()).sample()
                return nn.functional.nll_loss(
                    outputs, labels if sample else batch[1], reduction="sum"
                )

            def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
                return self.compute_train_loss(batch, model)

        def solve() -> Tensor:
            model = prepare_model(copy.deepcopy(self.contest.model), Nll())
            with tempfile.TemporaryDirectory() as folder:
                analyzer = Analyzer(
                    "mnist", model, Nll(), cpu=True, output_dir=folder, disable_tqdm=True
                )
                analyzer.logger.setLevel(logging.ERROR)
                analyzer.fit_all_factors(
                    "ekfac",
                    self.contest.data(self.ids()),
                    per_device_batch_size=1000,
                    factor_args=FactorArguments(strategy="ekfac"),
                )
                factors = analyzer.load_all_factors("ekfac")
            return self._multiplied(factors)

        yield Try("kronfluence, ek-fac", "all samples", solve)

    def _multiplied(self, factors: dict[str, dict[str, Tensor]]) -> Tensor:
        """The queries' gradients times the inverse factors, as kronfluence does while it scores."""
        space = self.contest.space
        parts = space.split(self.rhs_QP)
        answers = {}
        for layer in {name.rpartition(".")[0] for name in parts}:
            rhs_QCI = torch.cat(
                (parts[f"{layer}.weight"], parts[f"{layer}.bias"][..., None]), dim=2
            )
            outputs_CC = factors["gradient_eigenvectors"][layer]
            inputs_II = factors["activation_eigenvectors"][layer]
            samples = factors["num_lambda_processed"][layer]
            values_CI = factors["lambda_matrix"][layer] / samples + self.damping
            rotated_QCI = outputs_CC.t() @ rhs_QCI @ inputs_II / values_CI
            answer_QCI = outputs_CC @ rotated_QCI @ inputs_II.t()
            answers[f"{layer}.weight"] = answer_QCI[..., :-1]
            answers[f"{layer}.bias"] = answer_QCI[..., -1]
        return space.join(answers)

    def pydvl_cg(self) -> Iterator[Try]:
        from pydvl.influence.torch.operator import CgOperator, HessianOperator

        for part in PARTS:
            data = DataLoader(self.contest.data(self.ids(part)), batch_size=1000)

            def solve(data: DataLoader[Any] = data) -> Tensor:
                hessian = HessianOperator(self.contest.model, nn.functional.nll_loss, data)
                inverse = CgOperator(hessian, self.damping, rtol=1e-2, use_block_cg=True)
                return inverse.apply(self.rhs_QP)

            yield Try("pyDVL, cg", f"{self.samples // part:,} samples, residual 1e-2", solve)

    def pydvl_lissa(self) -> Iterator[Try]:
        from pydvl.influence.torch.operator import HessianBatchOperation, LissaOperator

        hessian = HessianBatchOperation(self.contest.model, nn.functional.nll_loss)
        data = DataLoader(self.contest.data(self.ids()), batch_size=BATCH, shuffle=True)

        for count in self.repeats:

            def solve(count: int = count) -> Tensor:
                operator = LissaOperator(
                    hessian,
                    data,
                    maxiter=DEPTH,
                    dampen=self.damping / SCALE,
                    scale=SCALE,
                    rtol=0.0,
                    warn_on_max_iteration=False,
                )
                return torch.stack([operator.apply(self.rhs_QP) for _ in range(count)]).mean(dim=0)

            yield Try("pyDVL, lissa, published setting", f"{count} repeats", solve)

    def dattri_cg(self) -> Iterator[Try]:
        from dattri.func.hessian import ihvp_cg

        space = self.contest.space
        weights = {name: p.detach() for name, p in self.contest.model.named_parameters()}
        theta_P = space.join(weights)

        def loss(theta_P: Tensor, images: Tensor, labels: Tensor) -> Tensor:
            outputs = functional_call(self.contest.model, space.split(theta_P), (images,))
            return nn.functional.nll_loss(outputs, labels.long())

        for part in PARTS:

            def solve(part: int = part) -> Tensor:
                images, labels = self.contest.data(self.ids(part)).tensors
                inverse = ihvp_cg(loss, max_iter=10, regularization=self.damping)
                data = (theta_P, images, labels.float())  # dattri differentiates by all of them
                return inverse(data, self.rhs_QP)

            yield Try("dattri, cg", f"{self.samples // part:,} samples, 10 steps", solve)


def climb(ladder: Ladder, tries: Iterable[Try]) -> Iterator[list[str]]:
    """A row for each setting, up to the first accurate one."""
    for this in tries:
        started = time.perf_counter()
        x_QP = this.solve()
        seconds = time.perf_counter() - started
        cosine_Q = ladder.cosines(x_QP)
        near = float(cosine_Q.median()) >= WANTED
        cosines = [f"{float(c):.4f}" for c in (cosine_Q.median(), cosine_Q.min())]
        yield [
            this.solver,
            this.settings,
            *cosines,
            f"{seconds:.1f}",
            f"**{seconds:.1f}**" if near else "",
        ]
        if near:
            return


def print_ladder(ladder: Ladder, solvers: Iterable[Callable[[], Iterator[Try]]]) -> None:
    rows = []
    for solver in solvers:
        try:
            rows += list(climb(ladder, solver()))
        except ImportError as error:
            print(f"- {solver.__name__.replace('_', ' ')} is left out: {error}")
    columns = ["solver", "settings", "cosine, median", "least", "s", f"s to {WANTED}"]
    print_table(columns, rows)


def main(
    full: Annotated[bool, typer.Option("--full", help="60,000 samples, more repeats.")] = False,
    weights: Weights = None,
    epochs: Epochs = 2,
    threads: Threads = 2,
) -> None:
    """Print a table for each matrix."""
    use_worker_allocator()
    torch.set_num_threads(threads)
    header("Time to the right s_test")
    contest = Contest(trained(weights, epochs), 60_000 if full else 6_000)
    print(f"## Gauss-Newton, lambda {LAMBDA[GaussNewton]}, {contest.samples:,} samples\n")
    repeats = (REPEATS, 5 * REPEATS) if full else (REPEATS,)
    ladder = Ladder(contest, GaussNewton, repeats)
    own = (ladder.cg, ladder.lissa, ladder.lissa_as_published, ladder.ek_fac)
    print_ladder(ladder, (*own, ladder.kronfluence))
    print(f"\n## Hessian, lambda {LAMBDA[Hessian]}, {contest.samples:,} samples\n")
    ladder = Ladder(contest, Hessian, repeats)
    print(f"Smallest eigenvalue {smallest_eigenvalue(ladder.operator()):.3f}.\n")
    own = (ladder.cg, ladder.lissa, ladder.lissa_as_published)
    print_ladder(ladder, (*own, ladder.pydvl_cg, ladder.pydvl_lissa, ladder.dattri_cg))


if __name__ == "__main__":
    typer.run(main)
