"""The samples of EK-FAC, batch by batch, with the columns that their gradients are along."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from influence_jobs.curvature.matrices import GaussNewton
from influence_jobs.curvature.operators import LOOKED_AT
from influence_jobs.curvature.output_roots import (
    Doubts,
    exact_roots,
    random_root,
    random_signs,
    token_signs,
)
from influence_jobs.tasks.base import Batch
from influence_jobs.tasks.placement import device_of
from influence_jobs.tasks.sequences import tokens_in
from influence_jobs.transfers import loader_for, on_device


def few_samples(operator: GaussNewton) -> tuple[Any, Tensor]:
    """A few samples, and vectors of their outputs' shape."""
    batch = operator.batch(operator.ids[:LOOKED_AT])
    with torch.no_grad():
        outputs = operator.task.outputs(operator.model, batch)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(outputs.shape, generator=generator).to(outputs.dtype)
    return batch, on_device(vectors, outputs.device)


def outputs_of(operator: GaussNewton) -> int:
    """The outputs of a sample that count, the most of a few samples."""
    batch, like = few_samples(operator)
    counted_BT = operator.form.counted(operator.task.targets(batch))
    size = like[0].numel()
    if counted_BT is None:
        return size
    return size // counted_BT.shape[1] * int(counted_BT.sum(1).max())


def columns_of(
    operator: GaussNewton, seed: int, doubts: Doubts, *, exact: bool
) -> Iterator[tuple[Tensor, Batch, Iterator[Tensor]]]:
    """The operator's samples, batch by batch: ids, the batch, columns s (B, ...) of the roots."""
    task, model, start = operator.task, operator.model, 0
    pieces = torch.split(operator.ids, operator.batch_size)
    loader = loader_for(device_of(model))

    def fetched(ids: Tensor) -> tuple[Tensor, Batch, int]:
        read = operator.read(ids)
        # Here, where a look at the numbers lets nothing wait.
        counts_B = tokens_in(task, read)
        return ids, operator.placed(read), 0 if counts_B is None else int(counts_B.max())

    # Not `map`, which passes on a StopIteration of the user's code: samples would be left out.
    for ids, batch, tokens in loader(fetched(ids) for ids in pieces):
        targets = task.targets(batch)
        with torch.no_grad():
            outputs = task.outputs(model, batch)
        form, rows = operator.form, range(start, start + len(ids))
        counted_BT, axis = form.counted(targets), form.classes
        if exact:
            columns = exact_roots(form, outputs, targets, doubts, tokens)
        elif counted_BT is None:
            signs = random_signs(seed, rows, outputs)
            columns = iter([random_root(form, outputs, targets, signs, doubts)])
        else:
            signs_BTV = token_signs(seed, rows, outputs.movedim(axis, 2), counted_BT, tokens)
            signs = signs_BTV.movedim(2, axis)
            columns = iter([random_root(form, outputs, targets, signs, doubts)])
        yield ids, batch, columns
        start += len(ids)
