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

import hashlib
import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import default_collate

from influence_jobs.errors import DataError, InflError, SpecError
from influence_jobs.gradients.batches import KINDS, plain_leaves
from influence_jobs.tasks.own_code import described
from influence_jobs.tasks.published import Published
from influence_jobs.tasks.regions import image_size, measure_outputs
from influence_jobs.terms import Region

#: What `losses` takes, also `influence_jobs.Batch`. It is a tensor, or a tree of tuples, lists,
#: dicts and dataclasses with tensors that have the samples along their first axis.
Batch = Any
FINGERPRINT_ROWS = 16  # training samples whose values are part of a fingerprint
_READ_ONCE = ("train_data", "test_data")
# Held while a task makes a batch: for a GPU a thread does it in advance, and data sets that seek in
# a file would mix up the samples of two at a time.
READING = threading.RLock()


def spread_ids(n: int, most: int) -> Tensor:
    """Ids of up to `most` samples, from the first of n to the last."""
    # In float32, on which fingerprints depend: beyond 16 million the last may round up to n.
    return torch.linspace(0, n - 1, min(n, most)).round().long().clamp(max=n - 1)


def some_ids(n: int, most: int) -> Tensor:
    """Ids of up to `most` of n samples from all over, in an order that is always the same."""
    ids = spread_ids(n, most)
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]


def digest(batch: Batch) -> str:
    """SHA-256 of a batch: of its tensors' bytes, shapes and types, and of its other contents.

    Raises:
        DataError: There is something in it that does not show its contents.
    """
    found = hashlib.sha256()
    for leaf in plain_leaves(batch):
        if isinstance(leaf, Tensor):
            if leaf.layout != torch.strided or leaf.is_nested:
                kind = "nested" if leaf.is_nested else str(leaf.layout).removeprefix("torch.")
                raise DataError(
                    f"a batch has a {kind} tensor in it, whose rows are not those of the samples: "
                    "give dense tensors, and let the model convert them"
                )
            found.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            found.update(leaf.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(leaf, np.ndarray) and leaf.dtype != object:
            found.update(f"{leaf.dtype} {leaf.shape}".encode() + leaf.tobytes())
        elif repr(leaf) == object.__repr__(leaf):  # an address, other each time
            raise DataError(f"a batch has a {type(leaf).__name__} in it: it must be {KINDS}")
        else:
            found.update(repr(leaf).encode())
    return found.hexdigest()


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
        quantities: The quantities that `measure` knows, the default first. The default `measure`
            knows "loss", and "output" if it is listed.
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
        own = vars(task)  # attributes of a frozen dataclass cannot be set
        own["given"] = dict(list(bound.arguments.items())[1:])
        # Read once: the data would be opened again for every batch, by `batch` or a user's own.
        own |= {name: _read_once(task, name) for name in _READ_ONCE}
        return task

    def __getstate__(self) -> dict[str, Any]:
        # A copy reads its own data.
        return {name: value for name, value in vars(self).items() if name not in _READ_ONCE}

    @abstractmethod
    def model(self) -> nn.Module:
        """The untrained model, initialised from torch's global seed."""

    @abstractmethod
    def train_data(self) -> Sized:
        """The training set of length N; a sample's position is its id and must never change.

        An object is asked once, and what it gave is kept.
        """

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The training loss of every sample of a batch, shape (B,), not averaged."""

    def batch(self, ids: Tensor, draw: Draw) -> Batch:
        """The samples with these ids, shape (B,), as attribution uses them.

        Random numbers must depend on `draw` and the sample's id only, never on the other samples of
        the batch.
        """
        data: Any = self.train_data()
        return self.collate([data[int(i)] for i in ids])

    def collate(self, rows: list[Any]) -> Batch:
        """A batch of rows of `train_data` or `test_data`; a DataLoader calls this `collate_fn`.

        Raises:
            DataError: torch's `default_collate`, which is used unless the task has its own, cannot
                put the rows together.
        """
        try:
            return default_collate(rows)
        except (TypeError, KeyError, RuntimeError) as error:
            raise DataError(_uncollated(rows, error)) from error

    def train_batch(self, ids: Tensor, draw: Draw) -> Batch:
        """The samples as training uses them, e.g. augmented or noised; by default as `batch`."""
        return self.batch(ids, draw)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer to train with, of the model's parameters, instead of a recipe's.

        Its state must be tensors, numbers and plain containers, so that a training can be resumed.
        """
        raise NotImplementedError

    def scheduler(
        self, optimizer: torch.optim.Optimizer, *, epochs: int, steps_per_epoch: int
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The learning-rate schedule to train with, instead of a recipe's; it steps every batch."""
        raise NotImplementedError

    def train(self, ids: Tensor, seed: int, labels: Tensor | None = None) -> Mapping[str, Tensor]:
        """A training of your own, instead of ours: the state dict of the trained model.

        Leave `labels` out if the samples cannot be relabelled. torch's global generators are seeded
        when it begins; if anything else is random in it, take it from `seed`.

        Args:
            ids: The training samples to use, shape (n,), in ascending order.
            seed: Decides all that is random.
            labels: Classes (n,) to train these samples with; None for their own.
        """
        raise NotImplementedError

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        """Metrics on held-out data, e.g. `{"accuracy": .98}`; the model is in eval mode."""
        return {}

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The outputs that the loss is computed from, e.g. logits or pixels, shape (B, ...)."""
        raise self._lacks("outputs()")

    def targets(self, batch: Batch) -> Tensor:
        """What outputs are compared with: classes (B, ...), or values of the outputs' shape."""
        raise self._lacks("targets()")

    def _lacks(self, what: str) -> SpecError:
        return SpecError(
            f"{type(self).__name__} defines no {what}: the Gauss-Newton matrix needs outputs(), "
            "targets() and output_loss; define them, or use --operator hessian"
        )

    def test_data(self) -> Sized:
        """The samples whose outputs can be explained, as `train_data`; a position is an id."""
        return ()

    def test_batch(self, ids: Tensor, draw: Draw) -> Batch:
        """The test samples with these ids; all must have tensors of the same shape."""
        data: Any = self.test_data()
        return self.collate([data[int(i)] for i in ids])

    def test_size(self, test: int) -> tuple[int, int] | None:
        """Height and width of a test image, if regions of it can be measured; else None.

        By default those of its targets, if they are images and `measure` is the default.
        """
        if self.output_loss is None or type(self).measure is not Task.measure:
            return None
        try:
            targets = self.targets(self.test_batch(torch.tensor([test]), Draw(0)))
        except NotImplementedError:
            return None
        return image_size(self, targets)

    def measure(
        self, model: nn.Module, batch: Batch, quantity: str, region: Region | None
    ) -> Tensor:
        """One of `quantities`, for every sample of a test batch, shape (B,).

        By default it knows `loss` and `output`; see `tasks.regions.measure_outputs`. A task that
        has other quantities, or regions of other outputs, defines it and `test_size`.

        Raises:
            SpecError: The quantity or the region cannot be measured.
        """
        if quantity == "loss" and region is None:
            return self.losses(model, batch)
        return measure_outputs(self, model, batch, quantity, region)

    def embed(self, batch: Batch) -> Tensor:
        """A vector of every sample of a training or test batch, (B, D), for `--method nearest`.

        Without it the pixels of `pictures` and `test_picture` are compared.

        Raises:
            SpecError: The samples have no embedding.
        """
        raise SpecError(f"{type(self).__name__} defines no embed()")

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

    def show(self, sample: int) -> Any:
        """What people see of a training sample; None for what they see without this.

        An image (array (H, W) or (H, W, 3), tensor (C, H, W), PIL image), a str, a `Text` or a list
        of its pieces, a dict of columns, or a `Sound`. Without it they see its picture, or the
        image that its batch begins with, or else its text or columns as `describe` names them.
        """
        return None

    def show_test(self, test: int) -> Any:
        """Like `show`, of a test sample."""
        return None

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

        By default it has the number of samples and a digest of 16 of them. Runs also keep digests
        of more samples (`kinds.same_data`), but not of all: if a single one may change, define a
        fingerprint that covers them. `tasks.fingerprints` covers the code.

        Raises:
            DataError: A sample has other values each time it is fetched.
        """
        n = len(self.train_data())
        ids = spread_ids(n, FINGERPRINT_ROWS)
        first, second = (digest(self.batch(ids, Draw(0))) for _ in range(2))
        if first != second:
            raise DataError(
                f"{type(self).__name__} gives different numbers each time a training sample is "
                "fetched, so no result could be repeated: in batch(), let random numbers depend "
                "on (draw.seed, draw.index, sample id) only, and augment in train_batch()"
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


def _read_once(task: Task, name: str) -> Callable[[], Any]:
    """A method of a task that gives its data, called once."""
    read = getattr(task, name)

    @cache
    def data() -> Any:
        try:
            return read()
        except InflError:
            raise
        except Exception as error:
            raise DataError(f"{type(task).__name__}.{name}() failed: {described(error)}") from error

    return data


def defines(kind: type[Task], name: str) -> bool:
    """Whether a class of tasks has a method of its own in place of the one of `Task`."""
    found = getattr(kind, name)
    return callable(found) and found is not getattr(Task, name)


def call_own(task: Task, name: str, *arguments: Any, **keywords: Any) -> Any:
    """Call a method of the task's class, also where its object keeps something else by that name.

    Raises:
        SpecError: There is none, or it takes other arguments.
    """
    if not defines(type(task), name):
        raise SpecError(
            f"{type(task).__name__} no longer has the {name}() that models were trained with: "
            "restore it, or train again"
        )
    method = partial(getattr(type(task), name), task)
    try:
        inspect.signature(method).bind(*arguments, **keywords)
    except TypeError as error:
        takes = str(inspect.signature(getattr(Task, name))).partition(" ->")[0]
        raise SpecError(
            f"{name}() of {type(task).__name__} is called as {name}{takes}: {error}; let it take "
            "these, or give it another name"
        ) from None
    return method(*arguments, **keywords)


def _uncollated(rows: list[Any], error: Exception) -> str:
    """Why rows cannot be put together, and the cure."""
    own = "or define collate(rows), as the collate_fn of a DataLoader"
    if isinstance(error, KeyError):
        return f"not every row has {error}: give all rows the same keys, {own}"
    parts = plain_leaves(rows)
    for part in parts:
        if not isinstance(part, Tensor | np.ndarray | np.generic | int | float | str | bytes):
            if isinstance(part, Image):
                return (
                    "a row has a PIL image in it, which makes no batch: give the dataset a "
                    "transform that ends in a tensor, such as torchvision.transforms.ToTensor(), "
                    f"{own}"
                )
            kind = type(part).__name__
            return f"a row has a {kind} in it, which makes no batch: give tensors, {own}"
    said = " ".join(str(error).split())
    return f"rows are of several shapes ({said}): cut or pad them to one, {own}"
