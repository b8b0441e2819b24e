"""The engine on a GPU, without Ray or files: norms, scores, LiSSA, CG, ensembles.

For each workload and precision the table has: samples a second at the fastest batch size that a
probe finds; the speed relative to plain forward + backward, which ends at the same layers; the
speed relative to the bound; and the error relative to float64. The *bound* is a roofline. It is the
longer of two times: the workload's matrix products at the measured rate of a large product in that
precision, and its input and output at the measured rate of a large copy. Images are random numbers
of MNIST's and FFDNet's sizes, so that nothing needs to be there but the library, torch and typer.

    python benchmarks/gpu.py [--device cuda] [--full]
    python benchmarks/gpu.py --device cpu     # tiny sizes, to try the script
"""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from harness import Contestant, header, print_table, race, ratios, seconds_of, spread
from PIL import Image
from torch import Tensor, nn

from influence_jobs.curvature import ConjugateGradient, GaussNewton
from influence_jobs.curvature.lissa_steps import lissa_steps
from influence_jobs.datasets.mnist import Mnist
from influence_jobs.gpu import tf32
from influence_jobs.gradients import GradDots, GradNorms, ParameterSpace
from influence_jobs.gradients.reference import gradients_one_by_one
from influence_jobs.memory import is_out_of_memory
from influence_jobs.tasks.base import Draw, Task
from influence_jobs.tasks.ffdnet import FFDNetTask
from influence_jobs.tasks.mnist import MnistTask
from influence_jobs.tasks.placement import to_device
from influence_jobs.terms import Precision
from influence_jobs.training.ensemble import EnsembleTrainer, Variant
from influence_jobs.training.recipe import Recipe

VECTORS = 10
CHECKED = 4
GAIN = 1.05  # the batch is doubled as long as that is faster by this factor

MODES: dict[str, tuple[Precision, bool]] = {  # precision of the engine, TF32 allowed
    "float32": ("float32", False),
    "tf32": ("float32", True),
    "bf16": ("bfloat16", False),
}


class RandomDigits(MnistTask):
    """Images and classes of MNIST's sizes, from random numbers."""

    @cached_property
    def _mnist(self) -> Mnist:
        generator = np.random.default_rng(0)
        images = generator.integers(0, 256, (70_000, 28, 28), np.uint8)
        classes = generator.integers(0, 10, 70_000)
        pixels, labels = torch.from_numpy(images), torch.from_numpy(classes)
        return Mnist(pixels[:60_000], labels[:60_000], pixels[60_000:], labels[60_000:])


def random_photographs(folder: str) -> FFDNetTask:
    """The denoiser's task on patches of images of random numbers, which are put into a folder."""
    generator = np.random.default_rng(1)
    for i in range(4):
        pixels = generator.integers(0, 256, (400, 400, 3), np.uint8)
        Image.fromarray(pixels).save(Path(folder, f"{i}.png"))
    return FFDNetTask(images=folder, test_images=folder, patch_size=50)


@dataclass(frozen=True)
class Device:
    """Measured rates of a device: FLOP/s of products by mode, and bytes/s of copies."""

    where: torch.device
    flops: dict[str, float]
    bytes_s: float


def measured(where: torch.device, side: int) -> Device:
    """The rates of the fastest of ten large products and of ten large copies."""

    def best(run: Callable[[], object]) -> float:
        return min(seconds_of(run) for _ in range(10))

    a = torch.randn(side, side, device=where)
    flops = {}
    for name, (precision, allowed) in MODES.items():
        b = a.bfloat16() if precision == "bfloat16" else a
        with tf32(allowed):
            flops[name] = 2 * side**3 / best(lambda b=b: b @ b)
    big = torch.empty(side * side * 4, device=where)
    return Device(where, flops, 2 * big.nbytes / best(lambda: big.clone()))


@dataclass
class Workload:
    """One computation of an engine on a batch.

    Attributes:
        name: Name of the row in the table.
        task: The task with samples and losses.
        flop: FLOP for one sample, in the products that every exact method needs.
        bytes: Bytes of one sample's input and result.
        make: Makes the engine's function of a batch, from a model and a precision.
        exact: The expected result, from float64 gradients of some samples by all parameters.
        weights: Weights that plain forward + backward differentiates by; empty for all.
    """

    name: str
    task: Task
    flop: float
    bytes: float
    make: Callable[[nn.Module, Precision], Callable[[tuple[Tensor, ...]], Tensor]]
    exact: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    weights: tuple[str, ...] = ()


def norms(name: str, task: Task, layers: list[str], flop: float, numbers: int) -> Workload:
    """Gradient norms of some layers, over the input axis of each weight."""

    def make(model: nn.Module, precision: Precision) -> Callable[[tuple[Tensor, ...]], Tensor]:
        engine = GradNorms(model, layers, task.losses, reduction="kernel", precision=precision)
        return lambda batch: torch.cat([found.flatten(1) for found in engine(batch).values()], 1)

    def exact(model: nn.Module, gradients: dict[str, Tensor]) -> Tensor:
        return torch.cat(
            [gradients[f"{layer}.weight"].norm(dim=2).flatten(1) for layer in layers], 1
        )

    weights = tuple(f"{layer}.weight" for layer in layers)
    return Workload(name, task, flop, 4 * numbers, make, exact, weights)


def scores(name: str, task: Task, flop: float, numbers: int) -> Workload:
    """Dot products with ten random vectors."""

    def vectors(model: nn.Module) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(VECTORS, ParameterSpace(model).size, generator=generator)

    def make(model: nn.Module, precision: Precision) -> Callable[[tuple[Tensor, ...]], Tensor]:
        space = ParameterSpace(model)
        return GradDots(model, space, task.losses, vectors(model), precision=precision).total

    def exact(model: nn.Module, gradients: dict[str, Tensor]) -> Tensor:
        return ParameterSpace(model).join(gradients) @ vectors(model).double().t()

    return Workload(name, task, flop, 4 * numbers, make, exact)


def workloads(folder: str) -> list[Workload]:
    mnist, ffdnet = RandomDigits(), random_photographs(folder)
    layers = [784 * 128, 128 * 64, 64 * 10]
    passes = 2 * (2 * sum(layers) - layers[0])  # forward, and backward to the first layer's output
    convolutions = [13 * 96, *[96 * 96] * 10, 96 * 12]
    forward = 2 * 9 * 625 * sum(convolutions)
    backward = 2 * 9 * 625 * (2 * sum(convolutions) - convolutions[0])
    last = 2 * 9 * 625 * (convolutions[-1] + convolutions[-2])
    inputs = 2 * 3 * 50 * 50
    return [
        norms("norms, MNIST, three layers", mnist, ["fc1", "fc2", "fc3"], passes, 784 + 202),
        norms("norms, FFDNet, layer 11", ffdnet, ["main.29"], forward + last, inputs + 864),
        scores("scores, MNIST", mnist, passes + 2 * VECTORS * sum(layers), 784 + VECTORS),
        scores("scores, FFDNet", ffdnet, backward, inputs + VECTORS),
    ]


def batch_of(task: Task, size: int, device: torch.device) -> tuple[Tensor, ...]:
    ids = torch.arange(size) % len(task.train_data())  # type: ignore[arg-type]
    batch: tuple[Tensor, ...] = to_device(task.batch(ids, Draw(0)), device)
    return batch


def best_batch(
    run: Callable[[tuple[Tensor, ...]], object], task: Task, device: torch.device, most: int
) -> int:
    """The fastest batch size: doubled as long as that is faster and memory suffices."""
    best, best_rate, size = 0, 0.0, min(32, most)
    while size <= most:
        try:
            batch = batch_of(task, size, device)
            run(batch)
            rate = size / min(seconds_of(lambda batch=batch: run(batch)) for _ in range(3))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
        if rate < GAIN * best_rate:
            break
        best, best_rate, size = size, rate, 2 * size
    return best


def raced(
    answer: Callable[[tuple[Tensor, ...]], object],
    limit: Callable[[tuple[Tensor, ...]], object],
    batch: tuple[Tensor, ...],
    rounds: int,
) -> tuple[dict[str, list[float]], int]:
    """Seconds a sample of both, and the size of the batch, halved until both fit into memory."""
    size = len(batch[0])
    while True:
        contestants = [
            Contestant("limit", partial(limit, batch), size),
            Contestant("engine", partial(answer, batch), size),
        ]
        torch.cuda.empty_cache()
        try:
            return race(contestants, rounds), size
        except RuntimeError as error:
            if not is_out_of_memory(error) or size == 1:
                raise
        size //= 2
        batch = tuple(part[:size] for part in batch)


def row_of(workload: Workload, mode: str, device: Device, most: int, rounds: int) -> list[str]:
    task, (precision, allowed) = workload.task, MODES[mode]
    torch.manual_seed(0)
    plain = task.model().eval().to(device.where, memory_format=torch.channels_last)
    model = copy.deepcopy(plain)
    few = batch_of(task, CHECKED, torch.device("cpu"))
    network = copy.deepcopy(plain).cpu()
    exact = gradients_one_by_one(network, list(ParameterSpace(network).shapes), task.losses, few)
    expected = workload.exact(network, exact)

    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(not workload.weights or name in workload.weights)

    def forward_backward(batch: tuple[Tensor, ...]) -> None:
        plain.zero_grad()
        mixed = precision == "bfloat16"
        with torch.autocast(device.where.type, dtype=torch.bfloat16, enabled=mixed):
            loss = task.losses(plain, batch).mean()
        loss.backward()

    with tf32(allowed):
        answer = workload.make(model, precision)
        found = answer(to_device(few, device.where)).double().cpu()
        error = float((found - expected).abs().max() / expected.abs().max())
        size = best_batch(answer, task, device.where, most)
        batch = batch_of(task, size, device.where)
        seconds, size = raced(answer, forward_backward, batch, rounds)
    bound = max(workload.flop / device.flops[mode], workload.bytes / device.bytes_s)
    rates = sorted(1 / s for s in seconds["engine"])
    rate = rates[len(rates) // 2]
    ratio = spread(ratios(seconds, "engine", "limit"))
    return [
        workload.name,
        mode,
        f"{size:,}",
        f"{rate:,.0f}",
        ratio,
        f"{rate * bound:.2f}",
        f"{error:.0e}",
    ]


def print_solvers(device: Device, steps: int, rounds: int, sizes: list[int]) -> None:
    """Print LiSSA, conjugate gradients and ensembles on the MNIST network, in float32.

    A product is of the Gauss-Newton matrix of one sample with one vector; its bound are four matrix
    products with the weights. That of a step of retraining, by sample, are six.
    """
    task, weights = RandomDigits(), 784 * 128 + 128 * 64 + 64 * 10
    torch.manual_seed(0)
    model = task.model().eval().to(device.where)
    space = ParameterSpace(model)
    plain = copy.deepcopy(model)
    batch = batch_of(task, 4096 if steps > 100 else 64, device.where)

    def forward_backward() -> None:
        plain.zero_grad()
        task.losses(plain, batch).mean().backward()

    contestant = Contestant("limit", forward_backward, len(batch[0]))
    passes = 1 / min(race([contestant], rounds)["limit"])  # samples a second
    rows: list[list[str]] = []

    def add(name: str, per_s: float, flop: float, of_pass: float) -> None:
        rows.append(
            [
                name,
                f"{per_s:,.0f}",
                f"{per_s * of_pass / passes:.2f}",
                f"{per_s * flop / device.flops['float32']:.3f}",
            ]
        )

    operator = GaussNewton(model, space, task, torch.arange(60_000 if steps > 100 else 256))
    for size in (8, 64):
        v_QP = torch.randn(VECTORS, space.size, device=device.where)
        recursion = lissa_steps(operator, v_QP, 0.01, 100.0, size)
        ids_ESB = torch.randint(operator.num_samples, (1, steps, size))

        def run(recursion=recursion, ids_ESB=ids_ESB) -> None:  # type: ignore[no-untyped-def]
            for _ in recursion.blocks(ids_ESB.split(recursion.longest, dim=1)):
                pass

        products = steps * size * VECTORS
        seconds = min(race([Contestant("lissa", run, products)], rounds)["lissa"])
        add(f"LiSSA, batch {size}, {VECTORS} vectors", 1 / seconds, 8 * weights, 4 / 3)
    operator.batching.size = 4096
    rhs_QP = torch.randn(VECTORS, space.size, device=device.where)
    taken = []
    for iterations in (1, 6):  # the difference is that of five
        solver = ConjugateGradient(damping=1e-3, tolerance=1e-12, max_iterations=iterations)
        solver.solve(operator, rhs_QP)
        solve = partial(solver.solve, operator, rhs_QP)
        taken.append(min(seconds_of(solve) for _ in range(rounds)))
    products = 5 * operator.num_samples * VECTORS
    add(f"CG, {VECTORS} vectors", products / max(taken[1] - taken[0], 1e-9), 8 * weights, 4 / 3)
    recipe = Recipe(10**9, 8, "sgd", lr=0.003, momentum=0.9, weight_decay=0.001)
    for models in sizes:
        variants = [Variant(seed) for seed in range(models)]
        ensemble = EnsembleTrainer(task, recipe, variants, device=device.where)
        ensemble.step()
        seen = ensemble.samples_seen

        def train(ensemble: EnsembleTrainer = ensemble) -> None:
            for _ in range(20 if steps > 100 else 2):
                ensemble.step()

        seconds = seconds_of(train)
        add(
            f"{models:,} networks retrained",
            (ensemble.samples_seen - seen) / seconds,
            6 * weights,
            1,
        )
    columns = ["float32", "samples (x vectors) / s", "x forward + backward", "x compute bound"]
    print_table(columns, rows)


def main(
    device: Annotated[str, typer.Option(help="cuda or cpu; cpu runs tiny sizes.")] = "cuda",
    full: Annotated[bool, typer.Option("--full", help="More rounds, larger ensembles.")] = False,
) -> None:
    """Print tables for workloads in every precision, for LiSSA and for ensembles."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: run it where there is one, or with --device cpu")
    on_gpu = device == "cuda"
    torch.set_num_threads(torch.get_num_threads() if on_gpu else 1)
    header("The engine on a GPU" if on_gpu else "The GPU benchmark, tiny, on a CPU")
    where = measured(torch.device(device), 8192 if on_gpu else 512)
    rounds = 9 if full else 5 if on_gpu else 1
    rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in where.flops.items())
    print(f"- large products: {rates}; copies {where.bytes_s / 1e9:.0f} GB/s\n")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for workload in workloads(folder):
            small = not on_gpu
            most = (64 if "MNIST" in workload.name else 4) if small else 2**17
            rows += [row_of(workload, mode, where, most, rounds) for mode in MODES]
    columns = [
        "workload",
        "precision",
        "batch",
        "samples/s",
        "x forward + backward",
        "x bound",
        "error",
    ]
    print_table(columns, rows)
    print()
    sizes = ([64, 512] + [2048] * full) if on_gpu else [2]
    with tf32(False):
        print_solvers(where, 1000 if on_gpu else 50, rounds, sizes)


if __name__ == "__main__":
    typer.run(main)
