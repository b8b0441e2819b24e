"""What runs on the pretended GPU: each computes something in a number of equal units of work."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from influence_jobs.curvature import (
    ConjugateGradient,
    EkFac,
    GaussNewton,
    Hessian,
    Identity,
    Lissa,
)
from influence_jobs.curvature.halves import cosines_of_halves
from influence_jobs.curvature.lissa_steps import AnySteps, lissa_steps
from influence_jobs.curvature.source import Segment, Source
from influence_jobs.curvature.spectrum import leading_eigenpair, smallest_eigenvalue, trace
from influence_jobs.gradients import (
    GradDots,
    GradNorms,
    GradProjections,
    GradQuadratics,
    Metric,
    ParameterSpace,
    TokenDots,
    TokenNorms,
)
from influence_jobs.gradients.projections import projections
from influence_jobs.training.ensemble_norms import NormsWanted

from .networks import (
    Digits,
    NoisyDigits,
    OwnDigits,
    SquareDigits,
    SteepDigits,
    Texts,
    made,
    summed_token_losses,
    token_losses,
)
from .trainings import ADAM, OWN, SGD, ensemble, recorder, training, unrolled
from .work import BATCH, QUERIES, Tensors, Work, batches, vectors


@dataclass(frozen=True)
class Subject:
    """Something that runs on a device.

    Attributes:
        unit: What is repeated.
        start: Prepares it on a device, and does the work of a first unit.
        most: Waits of a unit.
        once: Waits besides, however many units there are.
    """

    unit: str
    start: Callable[[torch.device], Work]
    most: int
    once: int


def by_batch(
    network: str, make: Callable[[Any, Any], Callable[[Any], Tensors]]
) -> Callable[[torch.device], Work]:
    """The work of an engine: a call for each batch."""

    def start(device: torch.device) -> Work:
        task, model = made(network, device)
        given = batches(task, device)
        call = make(task, model)
        call(given[0])
        return lambda units: [call(given[i % len(given)]) for i in range(units)]

    return start


def norms(reduction: Any) -> Any:
    def make(task: Digits, model: Any) -> Any:
        names = [
            name
            for name, module in model.named_modules()
            if isinstance(getattr(module, "weight", None), Tensor)
        ]
        return GradNorms(model, names, task.losses, reduction=reduction).unwatched

    return make


def norms_of_every_layer(task: Digits, model: Any) -> Any:
    names = [name for name, p in model.named_parameters() if name.endswith("weight")]
    return GradNorms(model, names, task.losses, reduction="layer").unwatched


def odd_norms(task: Digits, model: Any) -> Any:
    names = [name for name, p in model.named_parameters() if p.ndim > 1] + ["scale"]
    return GradNorms(model, names, task.losses, reduction="layer").unwatched


def dots(method: str) -> Any:
    def make(task: Digits, model: Any) -> Any:
        space = ParameterSpace(model)
        v_QP = vectors(space.size, next(model.parameters()).device)
        engine = GradDots(model, space, task.losses, v_QP)
        return engine.total if method == "total" else engine

    return make


def projected(task: Digits, model: Any) -> Any:
    space = ParameterSpace(model)
    maps = projections(
        model, space, outputs=3, inputs=4, distribution="gaussian", seed=1, whole=False
    )
    return GradProjections(model, space, task.losses, maps)


def quadratics(task: Digits, model: Any) -> Any:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(2)
    outputs, inputs = torch.eye(12), torch.eye(17)
    metric = Metric(outputs, inputs, torch.rand(12, 17, generator=generator))
    metric = Metric(*(part.to(device) for part in vars(metric).values()))
    return GradQuadratics(model, {"1": metric, "3": None}, task.losses)


def token_norms(task: Digits, model: Any) -> Any:
    engine = TokenNorms(model, ["head"], token_losses, precision="float32")
    return lambda batch: engine.unwatched(batch, 4)


def token_dots(task: Digits, model: Any) -> Any:
    space = ParameterSpace(model)
    v_QP = vectors(space.size, next(model.parameters()).device)
    totals = GradDots(model, space, summed_token_losses, v_QP).total
    engine = TokenDots(model, space, token_losses, v_QP)
    return lambda batch: engine.unwatched(batch, totals(batch))


def operator(kind: Any, network: str, device: torch.device, samples: int = 16, **how: Any) -> Any:
    task, model = made(network, device)
    return kind(model, ParameterSpace(model), task, torch.arange(samples), **how)


def products(kind: Any, network: str, **how: Any) -> Callable[[torch.device], Work]:
    """Products with all samples, of one batch each."""

    def start(device: torch.device) -> Work:
        matrix = operator(kind, network, device, batch_size=64, **how)
        v_QP = vectors(matrix.size, device)
        _ = matrix @ v_QP
        return lambda units: [matrix @ v_QP for _ in range(units)]

    return start


def batches_of_a_product(device: torch.device) -> Work:
    task, model = made("convolutions", device)
    space = ParameterSpace(model)
    v_QP = vectors(space.size, device)

    def run(units: int) -> Tensors:
        ids = torch.arange(BATCH * units) % len(task.y)
        matrix = GaussNewton(model, space, task, ids, batch_size=BATCH)
        matrix.look()
        return matrix @ v_QP

    return run


def conjugate_gradients(device: torch.device) -> Work:
    matrix = operator(GaussNewton, "convolutions", device, batch_size=BATCH)
    rhs_QP = vectors(matrix.size, device)
    matrix.look()

    def run(units: int) -> Tensors:
        solver = ConjugateGradient(damping=1e-3, tolerance=1e-9, max_iterations=units)
        found = solver.solve(matrix, rhs_QP)
        assert found.iterations_Q.tolist() == [units] * QUERIES
        return found.x_QP, found.residual_Q

    return run


def lissa_settings(network: str, matrix: Any = GaussNewton) -> Callable[[torch.device], Work]:
    def start(device: torch.device) -> Work:
        of = operator(matrix, network, device, samples=8, batch_size=8)
        of.look()
        solver = Lissa()

        def run(units: int) -> Tensors:
            found = []
            for _ in range(units):
                settings, record = solver._settings(of, solver.damping_for(of))
                found.append([settings.scale, settings.batch_size, record["trace"]])
            return torch.tensor(found)

        return run

    return start


def lissa(network: str) -> Callable[[torch.device], Work]:
    def start(device: torch.device) -> Work:
        matrix = operator(GaussNewton, network, device)
        rhs_QP = vectors(matrix.size, device)

        def run(units: int) -> Tensors:
            matrix.look()
            steps = lissa_steps(matrix, rhs_QP, 0.01, 10.0, 4)
            assert isinstance(steps, AnySteps) == (network != "perceptron")
            solver = Lissa(0.1, scale=10.0, batch_size=4, depth=units * steps.longest)
            return solver.solve(matrix, rhs_QP).x_QP

        return run

    return start


def ek_fac(
    network: str = "perceptron", targets: Any = "auto", kind: Any = Digits
) -> Callable[[torch.device], Work]:
    def start(device: torch.device) -> Work:
        task, model = made(network, device, kind)
        space = ParameterSpace(model)
        rhs_QP = vectors(space.size, device)

        def run(units: int) -> Tensors:
            ids = torch.arange(BATCH * units) % len(task.y)
            matrix = GaussNewton(model, space, task, ids, batch_size=BATCH)
            return EkFac(damping=0.1, targets=targets).solve(matrix, rhs_QP).x_QP

        return run

    return start


def identity(device: torch.device) -> Work:
    matrix = operator(GaussNewton, "perceptron", device)
    rhs_QP = vectors(matrix.size, device)
    return lambda units: [Identity().solve(matrix, rhs_QP).x_QP for _ in range(units)]


def source(exponential: Any) -> Callable[[torch.device], Work]:
    def start(device: torch.device) -> Work:
        segment = Segment([operator(GaussNewton, "perceptron", device, batch_size=48)], 2.0, 0.01)
        rhs_QP = vectors(segment.operators[0].size, device)

        def run(units: int) -> Tensors:
            return [one.x_QP for one in Source(exponential).solve([segment] * units, rhs_QP)]

        return run

    return start


def halves(solver: Any) -> Callable[[torch.device], Work]:
    def start(device: torch.device) -> Work:
        matrix = operator(GaussNewton, "perceptron", device, batch_size=BATCH)
        rhs_QP = vectors(matrix.size, device)

        def run(units: int) -> Tensors:
            found = [cosines_of_halves(solver, matrix, rhs_QP, 0.1) for _ in range(units)]
            return torch.tensor(found)

        return run

    return start


def spectrum(device: torch.device) -> Work:
    matrix = operator(Hessian, "perceptron", device, batch_size=48)
    matrix.look()

    def run(units: int) -> Tensors:
        return [
            torch.tensor([leading_eigenpair(matrix)[0], trace(matrix), smallest_eigenvalue(matrix)])
            for _ in range(units)
        ]

    return run


SUBJECTS: Mapping[str, Subject] = {
    "GradNorms, kernel": Subject("batch", by_batch("convolutions", norms("kernel")), 0, 0),
    "GradNorms, channel": Subject("batch", by_batch("convolutions", norms("channel")), 0, 0),
    "GradNorms, layer": Subject("batch", by_batch("convolutions", norms("layer")), 0, 0),
    "GradNorms, perceptron": Subject("batch", by_batch("perceptron", norms("layer")), 0, 0),
    "GradNorms, shared weights": Subject("batch", by_batch("tied", norms("layer")), 0, 0),
    "GradNorms, no rules": Subject("batch", by_batch("odd", odd_norms), 0, 0),
    "GradNorms, every layer": Subject("batch", by_batch("every layer", norms_of_every_layer), 0, 0),
    "GradDots": Subject("batch", by_batch("convolutions", dots("call")), 0, 0),
    "GradDots, total": Subject("batch", by_batch("perceptron", dots("total")), 0, 0),
    "GradDots, shared weights": Subject("batch", by_batch("tied", dots("total")), 0, 0),
    "GradDots, every layer": Subject("batch", by_batch("every layer", dots("call")), 0, 0),
    "GradDots, forward mode": Subject("batch", by_batch("odd", dots("call")), 0, 0),
    "GradProjections": Subject("batch", by_batch("convolutions", projected), 0, 0),
    "GradProjections, every layer": Subject("batch", by_batch("every layer", projected), 0, 0),
    "GradProjections, no rules": Subject("batch", by_batch("odd", projected), 0, 0),
    "GradQuadratics": Subject("batch", by_batch("perceptron", quadratics), 0, 0),
    "TokenNorms": Subject("batch", by_batch("odd", token_norms), 0, 0),
    "TokenDots": Subject("batch", by_batch("odd", token_dots), 0, 0),
    "Gauss-Newton": Subject("product", products(GaussNewton, "convolutions"), 1, 0),
    "Gauss-Newton, no rules": Subject("product", products(GaussNewton, "odd"), 1, 0),
    "Gauss-Newton, every layer": Subject("product", products(GaussNewton, "layers"), 1, 0),
    "Gauss-Newton, batches": Subject("batch", batches_of_a_product, 0, 20),
    "Hessian": Subject("product", products(Hessian, "convolutions"), 1, 0),
    "Hessian, differences": Subject(
        "product", products(Hessian, "convolutions", finite_difference=True), 1, 0
    ),
    "ConjugateGradient": Subject("iteration", conjugate_gradients, 1, 5),
    "Lissa, settings": Subject("choice", lissa_settings("convolutions"), 12, 0),
    "Lissa, settings, Hessian": Subject("choice", lissa_settings("convolutions", Hessian), 90, 0),
    "Lissa": Subject("block of steps", lissa("convolutions"), 1, 16),
    "Lissa, perceptron": Subject("block of steps", lissa("perceptron"), 1, 16),
    "EkFac": Subject("batch", ek_fac("convolutions"), 0, 28),
    "EkFac, perceptron": Subject("batch", ek_fac(), 0, 22),
    "EkFac, every layer": Subject("batch", ek_fac("layers"), 0, 54),
    "EkFac, no rules": Subject("batch", ek_fac("odd"), 0, 47),
    "EkFac, sampled": Subject("batch", ek_fac(targets="sampled"), 0, 22),
    "EkFac, squared error": Subject("batch", ek_fac(kind=SquareDigits), 0, 22),
    "EkFac, loss of its own": Subject("batch", ek_fac(kind=SteepDigits), 0, 24),
    "EkFac, tokens": Subject("batch", ek_fac("reader", kind=Texts), 0, 44),
    "EkFac, sampled tokens": Subject("batch", ek_fac("reader", "sampled", Texts), 0, 43),
    "Halves, EK-FAC": Subject("pair", halves(EkFac(0.1)), 45, 0),
    "Halves, ConjugateGradient": Subject("pair", halves(ConjugateGradient(0.1)), 29, 3),
    "Identity": Subject("call", identity, 1, 0),
    "Source, EK-FAC": Subject("segment", source("ek-fac"), 11, 1),
    "Source, Chebyshev": Subject("segment", source("chebyshev"), 17, 1),
    "Spectrum of a Hessian": Subject("choice", spectrum, 60, 0),
    "Trainer, SGD": Subject("step", training("convolutions", SGD), 0, 16),
    "Trainer, Adam": Subject("step", training("perceptron", ADAM), 0, 6),
    "Trainer, no rules": Subject("step", training("odd", SGD), 0, 11),
    "Trainer, optimizer of its own": Subject(
        "step", training("perceptron", OWN, kind=OwnDigits), 0, 12
    ),
    "Trainer, norms": Subject("step", training("perceptron", SGD, recorded=True), 0, 7),
    "Recorder": Subject("step", recorder, 0, 1),
    "Ensemble": Subject("step", ensemble(Digits(network="convolutions"), SGD), 0, 48),
    "Ensemble, Adam": Subject("step", ensemble(NoisyDigits(), ADAM), 0, 21),
    "Ensemble, perceptron": Subject(
        "block of steps",
        ensemble(Digits(), SGD, NormsWanted(("1", "3"), "layer", 0)),
        1,
        32,
    ),
    "Unrolled, SGD": Subject("step", unrolled("convolutions", SGD), 1, 130),
    "Unrolled, Adam": Subject("step", unrolled("perceptron", ADAM), 2, 65),
}
