"""What people see of a sample: an image, a text, the columns of a row, or a sound.

A task says it by `show` and `show_test`. Without them its `pictures` are shown, or the images that
its batches begin with, or else what `describe` says.

Letters: B batch, C channels, H and W height and width, T samples of a sound.
"""

import io
import wave
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from influence_jobs.errors import InflError, SpecError
from influence_jobs.gradients.batches import plain_leaves
from influence_jobs.tasks.base import READING, Draw, Task, defines
from influence_jobs.tasks.own_code import described

Picture = npt.NDArray[np.uint8]
FEWEST_PIXELS = 4  # a side of a tensor that counts as an image
FULL = 32767  # the largest value of 16 bits
SLOWEST = 3000  # samples a second that browsers play
WANTED = (
    "an image (an array (H, W) or (H, W, 3), a tensor (C, H, W), or a PIL image), a str, a Text or "
    "a list of its pieces, a dict of columns, or a Sound"
)


class Sound(NamedTuple):
    """A sound: `Sound(samples, rate)`; a plain pair of the two will do.

    Attributes:
        samples: (T,), or (T, C) or (C, T) of several channels: floats from -1 to 1, or whole
            numbers of 16 bits.
        rate: Samples a second.
    """

    samples: Any
    rate: int


@dataclass(frozen=True)
class Text:
    """A text, cut into pieces that read as the text when joined.

    Attributes:
        pieces: The pieces, with the white space between them.
        tokens: Which pieces are the sample's tokens as `--tokens` counts them, that is those with a
            target that counts; by default all.
    """

    pieces: Sequence[str]
    tokens: Sequence[int] | None = None

    @property
    def places(self) -> Sequence[int]:
        """The positions in `pieces` of the tokens."""
        return range(len(self.pieces)) if self.tokens is None else self.tokens

    def __str__(self) -> str:
        return "".join(self.pieces)


@dataclass(frozen=True)
class Wave:
    """A sound as a file has it: 16 bits a sample.

    Attributes:
        values: (T, C), int16.
        rate: Samples a second.
    """

    values: npt.NDArray[np.int16]
    rate: int

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return len(self.values) / self.rate

    def file(self) -> bytes:
        """A WAV file of it; of fewer samples a second than browsers play, each is repeated."""
        buffer = io.BytesIO()
        times = -(-SLOWEST // self.rate)
        with wave.open(buffer, "wb") as written:
            written.setnchannels(self.values.shape[1])
            written.setsampwidth(2)
            written.setframerate(self.rate * times)
            written.writeframes(self.values.repeat(times, axis=0).astype("<i2").tobytes())
        return buffer.getvalue()


MOST_CHANNELS = 8  # of a sound
Content = Picture | Text | Mapping[str, Any] | Wave


def contents(
    task: Task, ids: npt.NDArray[np.int64], columns: Sequence[Mapping[str, Any]]
) -> list[Content | None]:
    """What people see of training samples; None where there is nothing but their number.

    Args:
        columns: The description of each.

    Raises:
        SpecError: `show` gives something else.
        DataError: The task's data are missing.
    """
    found: list[Content | None] = [None] * len(ids)
    if defines(type(task), "show"):
        found = [_shown(task, "show", int(i)) for i in ids]
    rest = [i for i, one in enumerate(found) if one is None]
    other: Sequence[Content | None] = [None] * len(rest)
    if rest and defines(type(task), "pictures"):
        with suppress(SpecError):  # it may say that these have none
            other = [*task.pictures(ids[rest])]
    elif rest and len(task.train_data()):
        with suppress(Exception), READING:  # a page can do without the batch
            other = _images(task.batch(torch.from_numpy(ids[rest]), Draw(0)), len(rest))
    for i, one in zip(rest, other, strict=True):
        found[i] = _of_columns(columns[i]) if one is None else one
    return found


def content_of_test(task: Task, test: int, columns: Mapping[str, Any]) -> Content | None:
    """What people see of a test sample, as for `contents`."""
    found: Content | None = None
    if defines(type(task), "show_test"):
        found = _shown(task, "show_test", test)
    if found is None and defines(type(task), "test_picture"):
        with suppress(SpecError):
            found = task.test_picture(test)
    elif found is None and len(task.test_data()):
        with suppress(Exception), READING:
            (found,) = _images(task.test_batch(torch.tensor([test]), Draw(0)), 1)
    return _of_columns(columns) if found is None else found


def content(value: Any, name: str = "show()") -> Content | None:
    """What a task gave to be shown, in its one form; None for None.

    Raises:
        SpecError: It is none of what can be shown.
    """
    match value:
        case None:
            return None
        case Text():
            places = [*value.places]
            if not all(isinstance(piece, str) for piece in value.pieces):
                raise SpecError(f"{name} gives a Text of pieces that are no strings")
            if not all(isinstance(place, int | np.integer) for place in places):
                raise SpecError(f"{name} gives a Text of tokens {places}: name positions of pieces")
            if any(not 0 <= place < len(value.pieces) for place in places):
                raise SpecError(
                    f"{name} gives a Text of {len(value.pieces)} pieces, and tokens {places}: name "
                    "positions of its pieces"
                )
            return value
        case str():
            return Text([value], ())  # whose tokens are not known
        case Mapping():
            return {str(key): _plain(column) for key, column in value.items()}
        case Image.Image():
            grey = value.mode in ("1", "L", "I", "I;16", "F")
            return np.asarray(value.convert("L" if grey else "RGB"))
        case (_, int() | float() | np.integer() | np.floating()):  # a Sound, or a pair
            return _wave(value, name)
        case list() if value and all(isinstance(piece, str) for piece in value):
            return Text(value)
        case np.ndarray() | Tensor() if (picture := _picture(value)) is not None:
            return picture
    kind = type(value).__name__
    shape = f" {tuple(value.shape)}" if isinstance(value, np.ndarray | Tensor) else ""
    raise SpecError(f"{name} gives a {kind}{shape}, which cannot be shown: give {WANTED}")


def _shown(task: Task, hook: str, sample: int) -> Content | None:
    name = f"{type(task).__name__}.{hook}({sample})"
    try:
        return content(getattr(task, hook)(sample), name)
    except InflError:
        raise
    except Exception as error:
        raise SpecError(f"{name} failed: {described(error)}") from error


def _plain(value: Any) -> Any:
    """A value of a row: a number, a text, or a list in place of an array."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray | Tensor) else value


def _of_columns(columns: Mapping[str, Any]) -> Content | None:
    """The text of a sample, or its columns if there are several."""
    if isinstance(text := columns.get("text"), str):
        return Text([text], ())
    return dict(columns) if len(columns) > 1 else None


def _images(batch: Any, count: int) -> list[Content | None]:
    """The images that a batch begins with, (B, 1 or 3, H, W); else nothing."""
    first = next((leaf for leaf in plain_leaves(batch) if isinstance(leaf, Tensor)), None)
    if (
        first is None
        or not (first.is_floating_point() or first.dtype == torch.uint8)
        or first.ndim != 4
        or len(first) != count
        or first.shape[1] not in (1, 3)
        or min(first.shape[2:]) < FEWEST_PIXELS
    ):
        return [None] * count
    return [_picture(image) for image in first]


def _picture(value: npt.NDArray[Any] | Tensor) -> Picture | None:
    """An image of bytes (H, W) or (H, W, 3); None if it is no image.

    Floats from 0 to 1 are taken as they are. Others, such as standardised ones, are stretched from
    their smallest to their largest value.
    """
    first = isinstance(value, Tensor)  # where torch has the channels
    image = value.detach().cpu().float().numpy() if isinstance(value, Tensor) else value
    if isinstance(value, Tensor) and value.dtype == torch.uint8:
        image = value.cpu().numpy()
    if image.dtype.kind not in "fu" or (image.dtype.kind == "u" and image.dtype != np.uint8):
        return None
    if image.ndim == 3:
        last = image.shape[2] in (1, 3)
        if image.shape[0] in (1, 3) and (first or not last):
            image = np.moveaxis(image, 0, 2)
        elif not last:
            return None
        image = image[:, :, 0] if image.shape[2] == 1 else image
    if (image.ndim != 2 and image.ndim != 3) or not image.size:
        return None
    if image.dtype != np.uint8:
        image = np.nan_to_num(image.astype(np.float64))
        low, high = image.min(), image.max()
        if low < 0 or high > 1:
            image = (image - low) / max(high - low, 1e-12)
        image = np.round(image * 255).astype(np.uint8)
    return np.ascontiguousarray(image)


def _wave(value: tuple[Any, Any], name: str) -> Wave:
    samples, rate = value
    if isinstance(samples, Tensor):
        samples = samples.detach().cpu()
        samples = samples.float() if samples.is_floating_point() else samples
    values = np.asarray(samples)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim == 2 and values.shape[0] <= MOST_CHANNELS < values.shape[1]:
        values = values.T  # (C, T), as torchaudio has it
    if (
        values.ndim != 2
        or not values.size
        or values.shape[1] > MOST_CHANNELS
        or values.dtype.kind not in "fi"
        or rate < 1
        or rate != int(rate)
    ):
        raise SpecError(
            f"{name} gives a sound of {values.dtype} {values.shape[:-1] or ()} at a rate of "
            f"{rate}: samples are (T,), (T, C) or (C, T), floats from -1 to 1 or whole "
            "numbers of 16 bits"
        )
    if values.dtype.kind == "f":
        values = np.round(np.nan_to_num(values).clip(-1, 1) * FULL)
    return Wave(values.clip(-FULL - 1, FULL).astype(np.int16), int(rate))
