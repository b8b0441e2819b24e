"""The queries of a spec: their checks, gradients and table."""

from functools import partial

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from influence_jobs.errors import DataError, ModelError, SpecError
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.gradients.transforms import differentiable_kernels
from influence_jobs.memory import is_out_of_memory
from influence_jobs.specs.queries import Queries, Query
from influence_jobs.store.run import Run
from influence_jobs.tasks.base import Batch, Draw, Task
from influence_jobs.tasks.output_loss import alike
from influence_jobs.tasks.placement import copy_of, device_of, to_device, to_type, widened
from influence_jobs.tasks.regions import CURE
from influence_jobs.tasks.sequences import tokens_in
from influence_jobs.terms import Region
from influence_jobs.transfers import numbers


def require_queries(task: Task, queries: Queries) -> None:
    """Refuse queries that the task does not have.

    Raises:
        SpecError: A test id, a region or the quantity does not exist.
    """
    name = type(task).__name__
    if queries.quantity not in task.quantities:
        cure = ""
        if queries.quantity == "output" and type(task).measure is Task.measure:
            cure = '; its class may say quantities = ("loss", "output")'
        raise SpecError(
            f"{name} cannot measure {queries.quantity!r}: it has {', '.join(task.quantities)}{cure}"
        )
    count = len(task.test_data())
    if count == 0:
        raise SpecError(f"{name} has no test samples to explain: define test_data()")
    for query in queries.items:
        if query.test >= count:
            raise SpecError(
                f"there is no test sample {query.test}: {name} has {count:,}, 0 to {count - 1}"
            )
        if query.region is None:
            continue
        size = size_of(task, query.test)
        if size is None:
            raise SpecError(f"{name} has no image regions: leave --point and --region out ({CURE})")
        y, x, height, width = query.region
        if y + height > size[0] or x + width > size[1]:
            if size[0] == 1:
                raise SpecError(
                    f"tokens {x}:{x + width} are outside test sample {query.test}, which has "
                    f"{size[1]} with a target"
                )
            what = f"point {y},{x}" if (height, width) == (1, 1) else f"region {_comma(query)}"
            raise SpecError(
                f"{what} is outside test image {query.test}, which is {size[0]} high and "
                f"{size[1]} wide"
            )


def size_of(task: Task, test: int) -> tuple[int, int] | None:
    """Height and width of a test image; of a sequence 1 and the number of its tokens; else None."""
    size = task.test_size(test)
    if size is None and type(task).measure is Task.measure:
        counts = tokens_in(task, task.test_batch(torch.tensor([test]), Draw(0)))
        return None if counts is None else (1, int(counts))
    return size


def embeds(task: Task) -> bool:
    """Whether nearest compares a task's own vectors, rather than pixels."""
    return type(task).embed is not Task.embed


def require_comparable(task: Task, queries: Queries) -> None:
    """Refuse nearest for samples that have neither vectors nor pictures.

    Raises:
        SpecError: They have not, or a region of a vector is asked for.
    """
    if embeds(task):
        if any(query.region for query in queries.items):
            raise SpecError(
                "--method nearest compares whole samples by embed(): leave --point, --region and "
                "--tokens out"
            )
        return
    try:
        task.pictures(np.array([0]))
        task.test_picture(queries.items[0].test)
    except SpecError as error:
        raise SpecError(
            f"{error}, and --method nearest compares pixels, or vectors (B, D) if the task defines "
            "embed(batch)"
        ) from error


def require_same_measure(
    task: Task, model: nn.Module, batch: Batch, quantity: str, region: Region | None
) -> None:
    """Refuse a quantity that two passes over the same test samples measure differently.

    Raises:
        ModelError: They do.
    """
    once_B, again_B = (
        task.measure(model, batch, quantity, region).detach().double() for _ in range(2)
    )
    finite, same = numbers([once_B.isfinite().all(), alike(once_B, again_B)])
    if finite and not same:
        raise ModelError(_changing(task, quantity))


def _changing(task: Task, quantity: str) -> str:
    return (
        f"two passes over the same test samples of {type(task).__name__} give different values of "
        f"{quantity}: switch dropout off in eval mode, and draw noise from the Draw and the "
        "sample's id only"
    )


def query_gradients(
    task: Task, model: nn.Module, space: ParameterSpace, queries: Queries, start: int, stop: int
) -> Tensor:
    """Gradients of the quantity of queries start..stop, mean over noise draws, shape (Q, P).

    Raises:
        DataError: A gradient is not finite.
        ModelError: Two passes over the first query's sample give different values.
    """
    device, dtype = device_of(model), next(model.parameters()).dtype
    exact = copy_of(model).double()
    rows = list[Tensor]()
    for query in queries.items[start:stop]:
        # In float64: a float32 sum over many draws would lose digits.
        total = torch.zeros(space.size, dtype=torch.float64, device=device)
        same = torch.ones((), dtype=torch.bool, device=device)
        for draw in range(queries.noise_draws):
            batch = task.test_batch(torch.tensor([query.test]), Draw(queries.seed, draw))
            batch = to_device(batch, device)

            def measured(model: nn.Module, batch: Batch, query: Query = query) -> Tensor:
                with differentiable_kernels(model):
                    return task.measure(model, batch, queries.quantity, query.region)

            # In float64: where a query is fitted well its gradient is a difference that float32
            # cannot tell from zero.
            used, given = exact, partial(to_type, batch, torch.float64)
            try:
                values_B = measured(used, given())
                total += space.of(used).gradient(values_B.sum())
            except RuntimeError as error:  # a model that only its own type will do for
                if is_out_of_memory(error):
                    raise
                used, given = model, partial(widened, batch, dtype)
                values_B = measured(used, given())
                total += space.gradient(values_B.sum())
            if not rows and draw == 0:
                same = alike(values_B.detach(), measured(used, given()).detach())
        finite, moving, repeats = numbers([total.isfinite().all(), total.any(), same])
        if not finite:
            raise DataError(
                f"the gradient of the {queries.quantity} of test sample {query.test} is not "
                "finite: check the sample and the checkpoint"
            )
        if not repeats:
            raise ModelError(_changing(task, queries.quantity))
        if not moving:
            raise DataError(
                f"the gradient of the {queries.quantity} of test sample {query.test} is exactly "
                "zero, so no training sample can influence it: check that its loss depends on "
                "trained parameters, and on that sample alone"
            )
        rows.append((total / queries.noise_draws).to(dtype))
    return torch.stack(rows)


def queries_table(task: Task, queries: Queries) -> pa.Table:
    """One row a query: its test id, region or span of tokens, and the sample's description."""
    ids = np.array([query.test for query in queries.items])
    return pa.table(
        {
            "query": np.arange(len(ids)),
            "test": ids,
            "region": [_place(task, query) for query in queries.items],
            "quantity": [queries.quantity] * len(ids),
            **task.describe_test(ids),
        }
    )


def write_queries(run: Run, task: Task, queries: Queries) -> dict[str, str]:
    """Write the table of a run's queries; returns the SHA-256 of its file by name."""
    return run.write_table("queries", queries_table(task, queries))


def _comma(query: Query) -> str:
    return ",".join(map(str, query.region or ()))


def _place(task: Task, query: Query) -> str | None:
    """A query's region as tables have it: y,x,height,width, or first:end of tokens."""
    if query.region is None:
        return None
    size = size_of(task, query.test)
    if size is not None and size[0] == 1:
        _, start, _, count = query.region
        return f"{start}:{start + count}"
    return _comma(query)
