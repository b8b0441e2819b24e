"""The plug-in: a Task is a model, its training data, and a loss for every sample.

A minimal task has three methods::

    class Iris(Task):
        def model(self):
            return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))

        def train_data(self):
            return TensorDataset(features, labels)

        def losses(self, model, batch):
            x, y = batch
            return F.cross_entropy(model(x), y, reduction="none")

and is used as `infl submit grad-norms --task my_module:Iris`. Keyword arguments of its constructor
become options of the command: `def __init__(self, *, rows: Annotated[int, Doc("How many.")] = 100)`
gives `--rows 50`. Scores need more: `test_data`, the samples whose outputs are explained. The
Gauss-Newton matrix needs `outputs`, `targets` and `output_loss`.
"""

import copy
import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

from influence_jobs.errors import DataError, SpecError
from influence_jobs.tasks.published import Published
from influence_jobs.terms import Region

Batch = Any  # a pytree of tensors with a leading batch axis
FINGERPRINT_ROWS = 16  # training samples whose values are part of a fingerprint


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move every tensor of a batch."""
    return pytree.tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), batch)


def to_type(batch: Batch, dtype: torch.dtype) -> Batch:
    """A batch with its floating-point tensors in another type."""
    return pytree.tree_map_only(
        Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, batch
    )


def digest(batch: Batch) -> str:
    """SHA-256 of a batch: of its tensors' bytes, shapes and types, and of its other contents."""
    found = hashlib.sha256()
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor):
            found.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            found.update(leaf.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(leaf).encode())
    return found.hexdigest()


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's weights."""
    return next(model.parameters()).device


def copy_of(model: nn.Module) -> nn.Module:
    """A copy of a model, also of one that keeps a result of autograd, such as weight_norm's."""
    kept = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    # Such a tensor cannot be copied as it is; the forward pass computes it anew.
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in kept})


def require_at_least(least: float, **options: float | None) -> None:
    """Refuse options of a task that are too small; None is no option given.

    Raises:
        SpecError: Naming the first.
    """
    for name, value in options.items():
        if value is not None and not value >= least:
            raise SpecError(f"--{name.replace('_', '-')} {value}: it must be at least {least}")


@dataclass(frozen=True)
class Draw:
    """Selects the random numbers of a sample; they depend on (seed, index, sample id) only.

    Attributes:
        seed: The run's seed.
        index: In training the epoch, in attribution the number of the noise draw.
    """

    seed: int
    index: int = 0


class Task(ABC):
    """Model, data and loss of one problem.

    Attributes:
        batch_size: Samples per pass in attribution, unless the user gives another number.
        paths: Arguments of the constructor that say where data lie. They are not part of the run's
            id; the data's fingerprint is.
        attribution_options: Arguments of the constructor that training ignores. Changing them needs
            no new training.
        request_options: Further options for the user, by name: a type, possibly with
            `typing_extensions.Doc`. `settle` turns them into arguments.
        output_loss: What the loss of a sample is of its outputs and targets. "cross-entropy" of
            logits and classes, "mse", or "binary-cross-entropy" of logits: each of one output or of
            several, with the mean or the sum over a sample's positions, where a class of -100 does
            not count. Or a method `output_loss(self, outputs, targets)` that gives losses (B,),
            convex in the outputs. Without it (None) there is no Gauss-Newton matrix. Pages compare
            labels only where it is "cross-entropy", since elsewhere labels are not classes.
        quantities: The quantities that `measure` knows, the default first.
        query_sets: Named sets of test ids.
        published: Results of the research report for this task, printed beside ours.
    """

    batch_size: ClassVar[int] = 64
    paths: ClassVar[frozenset[str]] = frozenset()
    attribution_options: ClassVar[frozenset[str]] = frozenset()
    request_options: ClassVar[Mapping[str, Any]] = {}
    output_loss: ClassVar[Any] = None  # an OutputLoss, a method, or None
    quantities: ClassVar[tuple[str, ...]] = ("loss",)
    query_sets: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    published: ClassVar[Published | None] = None
    given: Mapping[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        task = super().__new__(cls)
        # A run stores these arguments, so that workers can construct the task again.
        bound = inspect.signature(cls.__init__).bind_partial(task, *args, **kwargs)
        task.given = dict(list(bound.arguments.items())[1:])
        return task

    @abstractmethod
    def model(self) -> nn.Module:
        """The untrained model, initialised from torch's global seed."""

    @abstractmethod
    def train_data(self) -> Sized:
        """The training set of length N; a sample's position is its id and must never change."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The training loss of every sample of a batch, shape (B,), not averaged."""

    def batch(self, ids: Tensor, draw: Draw) -> Batch:
        """The samples with these ids, shape (B,), as attribution uses them.

        Random numbers must depend on `draw` and the sample's id only, never on the other samples of
        the batch.
        """
        data: Any = self.train_data()
        return default_collate([data[int(i)] for i in ids])

    def train_batch(self, ids: Tensor, draw: Draw) -> Batch:
        """The samples as training uses them, e.g. augmented or noised; by default as `batch`."""
        return self.batch(ids, draw)

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        """Metrics on held-out data, e.g. `{"accuracy": .98}`; the model is in eval mode."""
        return {}

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The outputs that the loss is computed from, e.g. logits or pixels, shape (B, ...)."""
        raise SpecError(
            f"{type(self).__name__} defines no outputs(), targets() and output_loss, which the "
            "Gauss-Newton matrix needs: define them, or use --operator hessian"
        )

    def targets(self, batch: Batch) -> Tensor:
        """What outputs are compared with: classes (B, ...), or values of the outputs' shape."""
        raise NotImplementedError

    def test_data(self) -> Sized:
        """The samples whose outputs can be explained; a sample's position is its id."""
        return ()

    def test_batch(self, ids: Tensor, draw: Draw) -> Batch:
        """The test samples with these ids; all must have tensors of the same shape."""
        data: Any = self.test_data()
        return default_collate([data[int(i)] for i in ids])

    def test_size(self, test: int) -> tuple[int, int] | None:
        """Height and width of a test image, if regions of it can be measured; else None."""
        return None

    def measure(
        self, model: nn.Module, batch: Batch, quantity: str, region: Region | None
    ) -> Tensor:
        """One of `quantities`, for every sample of a test batch, shape (B,)."""
        return self.losses(model, batch)

    def describe_test(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        """Like `describe`, for test samples."""
        return {}

    def pictures(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Pictures of training samples for people: (B, H, W) grey or (B, H, W, 3) RGB.

        Raises:
            SpecError: The samples have no pictures.
        """
        raise SpecError(f"{type(self).__name__} defines no pictures()")

    def test_picture(self, test: int) -> npt.NDArray[np.uint8]:
        """A picture of one test sample for people: (H, W) or (H, W, 3)."""
        raise SpecError(f"{type(self).__name__} defines no test_picture()")

    def describe(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        """Columns (B,) that describe training samples to people, e.g. label, or file and row."""
        return {}

    def prepare(self, say: Callable[[str], None]) -> None:  # noqa: B027  (many tasks need nothing)
        """Fetch and check the data once, when a job is submitted; `say` takes lines for the user.

        Raises:
            DataError: The data cannot be fetched or are damaged.
        """

    def fingerprint(self) -> str:
        """A text that changes when the data change, so that results of old data are not reused.

        By default it has the number of samples and a digest of some of them. If other samples may
        change too, define a fingerprint that covers them. `tasks.fingerprints` covers the code.

        Raises:
            DataError: A sample has other values each time it is fetched.
        """
        n = len(self.train_data())
        ids = torch.linspace(0, n - 1, min(n, FINGERPRINT_ROWS)).round().long()
        first, second = (digest(self.batch(ids, Draw(0))) for _ in range(2))
        if first != second:
            raise DataError(
                f"{type(self).__name__} gives other numbers each time a training sample is "
                "fetched, so no result could be repeated: in batch(), draw from (draw.seed, "
                "draw.index, sample id) only, and augment in train_batch()"
            )
        return f"{n} samples, rows {first[:16]}"

    @classmethod
    def inherit(cls, trained: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Options for work on a trained model: those of its training, unless the user gave others.

        Args:
            trained: The options and paths of the training.
            given: The options that the user gave now.
        """
        return {**trained, **given}

    @classmethod
    def settle(cls, options: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
        """Turn the options that the user gave into the constructor arguments that a run stores.

        Args:
            options: Arguments of the constructor, and `request_options`.
            say: Takes lines for the user.
        """
        return options
