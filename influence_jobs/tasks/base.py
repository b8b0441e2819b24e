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

and is used as `infl submit grad-norms --task my_module:Iris`. Keyword arguments of its constructor are
options of the command: `def __init__(self, *, rows: Annotated[int, Doc("How many.")] = 100)` is
`--rows 50`. Scores ask for more: `test_data`, whose outputs are explained, and for the Gauss-Newton
matrix `outputs`, `targets` and `output_loss`.
"""

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
from influence_jobs.terms import OutputLoss, Region

Batch = Any  # a pytree of tensors with a leading batch axis
FINGERPRINT_ROWS = 16  # training samples whose numbers are part of a fingerprint


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move every tensor of a batch."""
    return pytree.tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), batch)


def to_type(batch: Batch, dtype: torch.dtype) -> Batch:
    """A batch with its floating-point tensors in another type."""
    return pytree.tree_map_only(
        Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, batch
    )


def digest(batch: Batch) -> str:
    """SHA-256 of a batch: of its tensors' bytes, shapes and types, and of what else it holds."""
    found = hashlib.sha256()
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor):
            found.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            found.update(leaf.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(leaf).encode())
    return found.hexdigest()


def device_of(model: nn.Module) -> torch.device:
    """Where a model's weights lie."""
    return next(model.parameters()).device


@dataclass(frozen=True)
class Draw:
    """Which random realisation of a sample: the same (seed, index, sample) gives the same numbers.

    Attributes:
        seed: The run's seed.
        index: The epoch in training, the number of the noise draw in attribution.
    """

    seed: int
    index: int = 0


class Task(ABC):
    """Model, data and loss of one problem.

    Attributes:
        batch_size: Samples a pass in attribution, unless the user says otherwise.
        paths: Arguments of the constructor that say where data lie. They do not name the run; the data's
            fingerprint does.
        attribution_options: Arguments of the constructor that training does not look at, so that
            changing them needs no new training.
        request_options: What else a user may ask for, by name: a type, perhaps with
            `typing_extensions.Doc`. `settle` makes arguments of it.
        output_loss: What the loss of a sample is of its outputs: cross-entropy of logits and class, or the mean
            squared error over a sample's outputs. None where it is neither; then there is no Gauss-Newton matrix.
            Pages compare labels where it is cross-entropy: elsewhere they are no classes.
        quantities: What `measure` can measure of a test sample, the default first.
        query_sets: Test ids that belong together, by name.
        published: What the research report found on this task, to print beside what we find.
    """

    batch_size: ClassVar[int] = 64
    paths: ClassVar[frozenset[str]] = frozenset()
    attribution_options: ClassVar[frozenset[str]] = frozenset()
    request_options: ClassVar[Mapping[str, Any]] = {}
    output_loss: ClassVar[OutputLoss | None] = None
    quantities: ClassVar[tuple[str, ...]] = ("loss",)
    query_sets: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    published: ClassVar[Published | None] = None
    given: Mapping[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        task = super().__new__(cls)
        # A run keeps what the object was made with, so that workers can make another one.
        bound = inspect.signature(cls.__init__).bind_partial(task, *args, **kwargs)
        task.given = dict(list(bound.arguments.items())[1:])
        return task

    @abstractmethod
    def model(self) -> nn.Module:
        """The architecture, freshly initialised from torch's global seed; weights come from checkpoints."""

    @abstractmethod
    def train_data(self) -> Sized:
        """The training set; `len` gives N and the position of a sample is its id for good."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The training loss of every sample of a batch, shape (B,): not averaged."""

    def batch(self, ids: Tensor, draw: Draw) -> Batch:
        """The samples with these ids, shape (B,), as attribution sees them.

        Randomness must depend on `draw` and the sample's id alone, never on the batch around it.
        """
        data: Any = self.train_data()
        return default_collate([data[int(i)] for i in ids])

    def train_batch(self, ids: Tensor, draw: Draw) -> Batch:
        """The samples as training sees them: augmented, noised; by default as attribution does."""
        return self.batch(ids, draw)

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        """Figures of merit on held-out data, e.g. `{"accuracy": .98}`; the model is in eval mode."""
        return {}

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the loss is of, shape (B, ...): logits, pixels. See `output_loss`."""
        raise SpecError(
            f"{type(self).__name__} defines no outputs(), targets() and output_loss, which the Gauss-Newton matrix "
            "needs: define them, or use --operator hessian"
        )

    def targets(self, batch: Batch) -> Tensor:
        """What outputs are compared with: classes (B,), or values of the outputs' shape."""
        raise NotImplementedError

    def test_data(self) -> Sized:
        """The samples whose outputs can be explained; the position of a sample is its id."""
        return ()

    def test_batch(self, ids: Tensor, draw: Draw) -> Batch:
        """The test samples with these ids; tensors of one batch have one shape."""
        data: Any = self.test_data()
        return default_collate([data[int(i)] for i in ids])

    def test_size(self, test: int) -> tuple[int, int] | None:
        """Height and width of a test image whose regions can be measured; None where nothing has regions."""
        return None

    def measure(
        self, model: nn.Module, batch: Batch, quantity: str, region: Region | None
    ) -> Tensor:
        """The quantity to explain, for every sample of a test batch, shape (B,); one of `quantities`."""
        return self.losses(model, batch)

    def describe_test(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        """Columns that tell a person which test samples these are."""
        return {}

    def pictures(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Training samples as a person sees them: (B, H, W) grey or (B, H, W, 3) RGB.

        Raises:
            SpecError: They have no picture.
        """
        raise SpecError(f"{type(self).__name__} defines no pictures()")

    def test_picture(self, test: int) -> npt.NDArray[np.uint8]:
        """One test sample as a person sees it: (H, W) or (H, W, 3)."""
        raise SpecError(f"{type(self).__name__} defines no test_picture()")

    def describe(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        """Columns that tell a person which samples these are, e.g. label, or file, row and column."""
        return {}

    def prepare(self, say: Callable[[str], None]) -> None:  # noqa: B027  (many tasks need nothing)
        """Fetch and check the data, once, when a job is submitted; `say` takes lines for the user.

        Raises:
            DataError: They cannot be had or are damaged.
        """

    def fingerprint(self) -> str:
        """Changes when the data do, so that results of other data are never reused.

        By default it has the number of samples and a digest of some of them. Data of which others
        can change need a fingerprint of their own. Code is looked at apart: `tasks.fingerprints`.

        Raises:
            DataError: A sample has other numbers each time it is fetched.
        """
        n = len(self.train_data())
        ids = torch.linspace(0, n - 1, min(n, FINGERPRINT_ROWS)).round().long()
        first, second = (digest(self.batch(ids, Draw(0))) for _ in range(2))
        if first != second:
            raise DataError(
                f"{type(self).__name__} gives other numbers each time a training sample is fetched, "
                "so no result could be repeated: let batch() draw from (draw.seed, draw.index, "
                "sample id) alone, and augment in train_batch()"
            )
        return f"{n} samples, rows {first[:16]}"

    @classmethod
    def inherit(cls, trained: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Options where a trained model is looked at: what is not given is as in its training.

        Args:
            trained: The options and paths of the training.
            given: What the user gave now.
        """
        return {**trained, **given}

    @classmethod
    def settle(cls, options: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
        """Arguments of the constructor as a run keeps them, from those that the user gave.

        Args:
            options: What was given: arguments of the constructor, and `request_options`.
            say: Takes lines for the user.
        """
        return options
