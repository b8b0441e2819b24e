"""Curvature of the mean training loss as a linear operator, v -> Gv or v -> Hv, without a matrix.

`curvlinops` has such operators for a fixed data set. LiSSA needs another mini-batch in every step,
and one forward pass for all vectors. So vectors have a leading axis here.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils import _pytree as pytree

from influence_jobs.curvature.batch_curvature import BatchCurvature
from influence_jobs.curvature.derivatives import Parameters, agreement, without_rows
from influence_jobs.curvature.requirements import saved_bytes
from influence_jobs.errors import DataError, SpecError
from influence_jobs.gradients.batches import flattened
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.gradients.transforms import all_derivatives
from influence_jobs.memory import BatchSize, is_out_of_memory
from influence_jobs.tasks.base import READING, Batch, Draw, Task
from influence_jobs.tasks.lengths import by_length, pads
from influence_jobs.tasks.placement import device_of, is_wider, runs, to_device, to_type, widened
from influence_jobs.transfers import loader_for

T = TypeVar("T")

MAX_BYTES = 2**30  # largest memory for activations times vectors in a pass
MIN_ROWS = 8  # least samples in a pass; below it fewer vectors are faster than fewer samples
LOOKED_AT = 8  # samples in the first check of a model


class Operator(BatchCurvature):
    """A symmetric P x P matrix, the mean of one such matrix per sample.

    Args:
        model: In eval mode; every product uses its current weights.
        space: The parameters that the matrix is of.
        task: Gives samples and losses.
        ids: Samples of the mean, shape (n,), on the CPU.
        draw: Draw of the samples' noise.
        batch_size: Largest number of samples in a pass. It is smaller if many vectors would take
            more than `MAX_BYTES`, and halved if they do not fit into memory.

    Raises:
        SpecError: There are no samples.
        ModelError: A parameter is of half precision.

    Attributes:
        positive_semidefinite: Whether the matrix is positive semidefinite for every model.
        cost: Cost of a product for one vector, in gradients of the same samples. It counts the
            matrix products of a linear layer, of which a gradient has three, without the forward
            pass that all vectors share.
        work: Cost of all products so far, in gradients of one sample.
    """

    positive_semidefinite: ClassVar[bool]
    cost: ClassVar[float]

    def __init__(
        self,
        model: nn.Module,
        space: ParameterSpace,
        task: Task,
        ids: Tensor,
        draw: Draw = Draw(0),  # noqa: B008  (frozen)
        batch_size: int | BatchSize | None = None,
    ):
        if len(ids) == 0:
            raise SpecError("curvature needs at least one sample")
        super().__init__(model, space, task)
        self.ids, self.draw = ids, draw
        if not isinstance(batch_size, BatchSize):
            batch_size = BatchSize(batch_size or task.batch_size)
        self.batching = batch_size
        self.work = 0.0
        self._by_length: Tensor | None = None
        self._sample_bytes: int | None = None  # activations of a sample; known after `look`
        self._takes_wider: bool | None = None  # samples than its weights; known once there are some
        # By shape (E, B): whether vmap over E mini-batches of B samples works for the model.
        self._batches_together: dict[torch.Size, bool] = {}

    @property
    def batch_size(self) -> int:
        """Samples in a pass now, at most."""
        return min(self.batching.size, self.samples_at_once(1))

    @property
    def size(self) -> int:
        """P."""
        return self.space.size

    @property
    def num_samples(self) -> int:
        """Number of samples of the mean."""
        return len(self.ids)

    @property
    def gradient_equivalents(self) -> float:
        """`work` in gradients of all n samples."""
        return self.work / self.num_samples

    def over(self, ids: Tensor) -> Self:
        """The operator of other samples (n,), with its work counted from zero."""
        other = copy.copy(self)
        other.ids, other.work, other._by_length = ids, 0.0, None
        return other

    def within(self, space: ParameterSpace) -> Self:
        """The same matrix for some of the parameters: a block on its diagonal."""
        other = copy.copy(self)
        other.space = space
        return other

    @torch.no_grad()
    def require_finite(self) -> None:
        """Compute the losses of all samples once.

        Raises:
            DataError: The loss of a sample is not finite; the message names the sample.
        """

        def sound(ids: Tensor, batch: Batch) -> Tensor:
            losses_B = self.task.losses(self.model, batch)
            return torch.cat([losses_B.isfinite().all().view(1), self._check(batch, losses_B)])

        flags: Tensor | None = None
        for _, found in self._map(sound, self.ids, self.samples_at_once(1)):
            flags = found if flags is None else flags & found
        assert flags is not None
        finite, *checked = flags.tolist()
        if not finite:
            self._refuse_losses()
        self._checked(checked)

    def _refuse_losses(self) -> None:
        """Name the first sample whose loss is not finite."""

        def bad(ids: Tensor, batch: Batch) -> Tensor:
            return ids[~self.task.losses(self.model, batch).isfinite().cpu()]

        for _, found in self._map(bad, self.ids, self.samples_at_once(1)):
            if len(found):
                raise DataError(
                    f"the training loss of sample {int(found[0])} is not finite: check the sample "
                    "and the checkpoint"
                )

    def _check(self, batch: Batch, losses_B: Tensor) -> Tensor:
        """What must hold of every batch, as flags on the device; most operators ask nothing."""
        return losses_B.new_ones(0, dtype=torch.bool)

    def _checked(self, right: Sequence[bool]) -> None:
        """Take note of the flags that hold for all batches, and refuse what must not be."""

    def product(self, v_QP: Tensor, ids: Tensor) -> Tensor:
        """The matrix of a mini-batch, ids (B,), times every row of v_QP: (Q, P).

        The result is not checked for NaN.

        Raises:
            ModelError: The model is in train mode, uses batch statistics or is not deterministic,
                or the task's losses are not those that it declares.
        """
        return self.space.join(self.products(v_QP[None], ids[None]))[0]

    def products(self, v_EQP: Tensor, ids_EB: Tensor) -> Parameters:
        """Matrices of E mini-batches, each times its own Q vectors: `{name: (E, Q, *shape)}`.

        The result is not checked for NaN.

        Raises:
            ModelError: As `product`.
        """
        (found,) = self._in_turn(v_EQP, [ids_EB], iter)
        return found

    def products_in_turn(self, v_EQP: Tensor, steps: Iterable[Tensor]) -> Iterator[Parameters]:
        """`products` for one step after the other; a GPU's samples come in advance.

        Args:
            v_EQP: May be changed in place once a step's products are given.
            steps: Ids (E, B) of each step's mini-batches.

        Raises:
            ModelError: As `product`.
        """
        return self._in_turn(v_EQP, steps, loader_for(device_of(self.model)))

    def _in_turn(
        self,
        v_EQP: Tensor,
        steps: Iterable[Tensor],
        loader: Callable[[Iterator[Any]], Iterator[Any]],
    ) -> Iterator[Parameters]:
        queries, total, done = v_EQP.shape[1], dict[str, Tensor](), 0
        sizes: deque[int] = deque()  # B of the steps that are begun

        def mini_batches() -> Iterator[Tensor]:
            for ids_EB in steps:
                sizes.append(ids_EB.shape[1])
                yield ids_EB.t()

        for ids_BE, means in self.batching.map(
            lambda ids_BE, batches: self._means(v_EQP, ids_BE.t(), batches),
            mini_batches(),
            fetch=lambda ids_BE: self._batches(ids_BE.t(), queries),
            loader=loader,
            most=self.samples_at_once(queries),
        ):
            if len(ids_BE) == sizes[0]:
                sizes.popleft()
                yield means
                continue
            part, done = len(ids_BE) / sizes[0], done + len(ids_BE)
            if not total:
                # Not in place: the zeros of an unused parameter may share one number in memory.
                total = {name: mean * part for name, mean in means.items()}
            else:
                for name, mean in means.items():
                    total[name].add_(mean, alpha=part)
            if done == sizes[0]:
                sizes.popleft()
                yield total
                total, done = {}, 0

    def __matmul__(self, v_QP: Tensor) -> Tensor:
        """The matrix of all n samples times every row of v_QP: (Q, P).

        Raises:
            ModelError: As `product`.
            DataError: A product is not finite.
        """
        product_QP = self.unchecked(v_QP)
        if not product_QP.isfinite().all():
            self._refuse_product(v_QP)
        return product_QP

    def unchecked(self, v_QP: Tensor) -> Tensor:
        """`A @ v` without a look at whether it is finite, which would wait for a GPU: (Q, P).

        Raises:
            ModelError: As `product`.
        """
        # In float64: a float32 sum over thousands of batches loses digits that conjugate gradients
        # need, and depends on the batch size.
        total_QP = torch.zeros_like(v_QP, dtype=torch.float64)
        sums = self.space.split(total_QP)
        for ids, means in self._by_batch(v_QP):
            for name, mean in means.items():
                sums[name].add_(mean[0], alpha=len(ids) / self.num_samples)
        return total_QP.to(v_QP.dtype)

    def _by_batch(self, v_QP: Tensor) -> Iterator[tuple[Tensor, Parameters]]:
        """Ids of batches of all samples, and the mean matrix of each times the vectors."""

        def product(ids: Tensor, batch: Batch) -> Parameters:
            return self._means(v_QP[None], ids[None], [batch])

        return self._map(product, self._ordered, self.samples_at_once(len(v_QP)))

    def _map(
        self, function: Callable[[Tensor, Batch], T], ids: Tensor, most: int
    ) -> Iterator[tuple[Tensor, T]]:
        """A function of batches of samples; see `BatchSize.map`. A GPU's come in advance."""
        loader = loader_for(device_of(self.model))
        return self.batching.map(function, [ids], fetch=self.batch, loader=loader, most=most)

    def _refuse_product(self, v_QP: Tensor) -> None:
        """Name the first batch whose product is not finite."""
        for ids, means in self._by_batch(v_QP):
            if not all(mean.isfinite().all() for mean in means.values()):
                raise DataError(
                    f"the curvature of samples {int(ids.min())} to {int(ids.max())} is not "
                    "finite: check these samples and the checkpoint"
                )
        raise DataError(
            "a product with the curvature is too large for its number format: use --precision "
            "float64, or check the checkpoint"
        )

    @property
    def _ordered(self) -> Tensor:
        """The ids; where batches are padded, samples of one length together."""
        if self._by_length is None:
            self._by_length = by_length(self.task, self.ids) if pads(self.task) else self.ids
        return self._by_length

    # The transforms keep their own graphs; autograd would keep one more, of the parameters that do
    # not count.
    @torch.no_grad()
    def _means(self, v_EQP: Tensor, ids_EB: Tensor, batches: Sequence[Batch]) -> Parameters:
        """What `products` gives, for mini-batches that fit into memory.

        Args:
            batches: Their samples, from `_batches`.
        """
        if self._padding:
            v_EQP = self.space.join(without_rows(self.space.split(v_EQP), self._padding))
        with all_derivatives(self.model):
            self.work += self.cost * v_EQP.shape[1] * ids_EB.numel()
            if self._may_go_together(ids_EB, v_EQP.shape[1]):
                if ids_EB.shape not in self._batches_together:
                    self._batches_together[ids_EB.shape] = self._look_together(v_EQP, ids_EB.shape)
                if self._batches_together[ids_EB.shape]:
                    together = batches[0] if len(batches) == 1 else self.batch(ids_EB.flatten())
                    return self._together(v_EQP, ids_EB, together)
            if len(batches) != len(ids_EB):
                batches = [self.batch(ids) for ids in ids_EB]
            return self._one_by_one(v_EQP, batches, ids_EB.shape[1])

    def _batches(self, ids_EB: Tensor, queries: int) -> list[Batch]:
        """The samples of E mini-batches as `_means` will take them: as one batch, or as E."""
        if not self._may_go_together(ids_EB, queries):
            return [self.batch(ids) for ids in ids_EB]
        if ids_EB.shape not in self._batches_together:
            return []  # not known yet
        if self._batches_together[ids_EB.shape]:
            return [self.batch(ids_EB.flatten())]
        return [self.batch(ids) for ids in ids_EB]

    def _may_go_together(self, ids_EB: Tensor, queries: int) -> bool:
        several = len(ids_EB) > 1 and self._exact and not self._plain
        return several and self._fits(queries * ids_EB.numel())

    def _fits(self, passes: int) -> bool:
        """Whether the activations of this many passes of one sample fit into `MAX_BYTES`."""
        assert self._sample_bytes is not None
        return passes * self._sample_bytes <= MAX_BYTES

    def _one_by_one(self, v_EQP: Tensor, batches: Sequence[Batch], size: int) -> Parameters:
        assert self._sample_bytes is not None
        at_once = min(v_EQP.shape[1], max(1, MAX_BYTES // (size * self._sample_bytes)))
        means = [
            self._products(self.space.split(v_QP), batch, at_once)
            for v_QP, batch in zip(v_EQP, batches, strict=True)
        ]
        if len(means) == 1:
            return {name: mean[None] for name, mean in means[0].items()}
        return {name: torch.stack([mean[name] for mean in means]) for name in means[0]}

    def _together(self, v_EQP: Tensor, ids_EB: Tensor, batch: Batch) -> Parameters:
        """`_means` by one pass over all mini-batches, whose samples are one batch."""
        repeats, queries, _ = v_EQP.shape
        leaves, structure = flattened(batch)
        mapped = [isinstance(x, Tensor) and x.shape[:1] == (ids_EB.numel(),) for x in leaves]
        leaves = [
            x.reshape(repeats, -1, *x.shape[1:]) if own else x
            for x, own in zip(leaves, mapped, strict=True)
        ]

        def means(vectors: Parameters, leaves: list[object]) -> Parameters:
            batch = pytree.tree_unflatten(leaves, structure)
            return self._multiply(self._values(), vectors, batch, queries)

        dims = (0, [0 if own else None for own in mapped])
        result: Parameters = vmap(means, in_dims=dims)(self.space.split(v_EQP), leaves)
        return result

    def _look_together(self, like_EQP: Tensor, shape: torch.Size) -> bool:
        """Whether `_together` gives the same as `_one_by_one`.

        vmap fails for a model whose control flow depends on values. The vectors and samples of this
        check are fixed, so that every worker decides alike.
        """
        generator = torch.Generator().manual_seed(0)
        v_EQP = torch.randn(like_EQP.shape, generator=generator).to(like_EQP)
        ids_EB = self.ids[torch.arange(shape.numel()) % len(self.ids)].view(shape)
        each = [self.batch(ids) for ids in ids_EB]
        expected = self.space.join(self._one_by_one(v_EQP, each, shape[1]))
        try:
            found = self.space.join(self._together(v_EQP, ids_EB, self.batch(ids_EB.flatten())))
        except Exception as error:  # the model may raise anything when mapped
            if is_out_of_memory(error):
                raise
            return False
        return bool((found - expected).norm() <= agreement() * expected.norm())

    def batch(self, ids: Tensor) -> Batch:
        """Samples on the model's device, in a dtype that its weights take."""
        return self.placed(self.read(ids))

    def read(self, ids: Tensor) -> Batch:
        """Samples as the task gives them."""
        with READING:
            return self.task.batch(ids, self.draw)

    def placed(self, batch: Batch) -> Batch:
        """What was read, on the model's device, in a dtype that its weights take."""
        dtype = next(self.model.parameters()).dtype
        batch = widened(to_device(batch, device_of(self.model)), dtype)
        if self._takes_wider is None and is_wider(batch, dtype):
            self._takes_wider = runs(self.task, self.model, batch)
        return to_type(batch, dtype) if self._takes_wider is False else batch

    def look(self) -> None:
        """Check on a few samples that products will be right; only the first call does it.

        Raises:
            ModelError: As `product`.
        """
        if self._sample_bytes is None:
            ids = self.ids[:LOOKED_AT]
            self._look(self.batch(ids), self.batch(ids))
            self._sample_bytes = saved_bytes(self.task, self.model, self.batch(ids)) // len(ids)

    def samples_at_once(self, num_vectors: int) -> int:
        """The samples whose activations fit into `MAX_BYTES` for so many vectors."""
        self.look()
        assert self._sample_bytes is not None
        fitting = MAX_BYTES // (num_vectors * self._sample_bytes)
        return max(MIN_ROWS, fitting)
