"""What people see of a sample: every form that `show` may give, and what it may not."""

import io
import wave
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from influence_jobs import Sound, Task, Text
from influence_jobs.errors import SpecError
from influence_jobs.tasks.seen import Wave, content, content_of_test, contents


class Rows(Task):
    """Three images of two channels' worth of nothing, and whatever `shown` says."""

    shown: object = None

    def __init__(self, *, channels: int = 1):
        drawn = torch.Generator().manual_seed(0)
        self.images = torch.rand(3, channels, 6, 5, generator=drawn) * 4 - 2
        self.data = TensorDataset(self.images, torch.arange(3))

    def model(self):
        return nn.Linear(3, 3)

    def train_data(self):
        return self.data

    def test_data(self):
        return self.data

    def losses(self, model, batch):
        return batch[0].sum((1, 2, 3))


class Shown(Rows):
    def show(self, sample):
        return [None, "a text", 3][sample]


IDS = np.arange(3)


def test_images_of_a_batch_are_stretched_and_seen() -> None:
    found: list[Any] = contents(Rows(), IDS, [{}] * 3)
    for picture, image in zip(found, Rows().images[:, 0].numpy(), strict=True):
        expected = (image - image.min()) / (image.max() - image.min()) * 255
        assert picture.dtype == np.uint8
        np.testing.assert_allclose(picture, expected, atol=0.51)
    tested: Any = content_of_test(Rows(), 1, {})
    assert np.array_equal(tested, found[1])
    assert contents(Rows(channels=3), IDS, [{}] * 3)[0].shape == (6, 5, 3)
    # Two channels are no image: then columns are seen, if there are several, or a text.
    columns: list[Any] = [{"a": 1, "b": 2}, {"a": 1}, {"a": 1, "text": "words"}]
    assert contents(Rows(channels=2), IDS, columns) == [columns[0], None, Text(["words"], ())]
    assert content_of_test(Rows(channels=2), 0, columns[2]) == Text(["words"], ())


def test_a_sample_of_which_show_says_nothing_is_seen_as_without_it() -> None:
    found: list[Any] = contents(Shown(), IDS[:2], [{}] * 2)
    plain: list[Any] = contents(Rows(), IDS, [{}] * 3)
    assert np.array_equal(found[0], plain[0])
    assert found[1] == Text(["a text"], ())
    with pytest.raises(SpecError, match=r"Shown\.show\(2\) gives a int, which cannot be shown: gi"):
        contents(Shown(), IDS, [{}] * 3)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (np.array([[0, 255]], dtype=np.uint8), [[0, 255]]),
        (torch.tensor([[[0.0, 1.0]]]), [[0, 255]]),
        (np.array([[0.0, 1.0, 0.5]]), [[0, 255, 128]]),
        (np.array([[-1.0, 3.0]]), [[0, 255]]),
        (np.array([[7.0, 7.0]]), [[0, 0]]),
        (np.zeros((2, 1, 3)), np.zeros((2, 1, 3))),
        (torch.zeros(3, 2, 4), np.zeros((2, 4, 3))),
        (torch.zeros(1, 2, 3), np.zeros((2, 3))),
        (Image.new("RGBA", (4, 2), "#102030"), [[[16, 32, 48]] * 4] * 2),
        (Image.new("L", (2, 1), 9), [[9, 9]]),
    ],
)
def test_images_of_any_kind(given, expected) -> None:
    found: Any = content(given)
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected)


def test_texts_columns_and_their_tokens() -> None:
    assert content(["a", " b"]) == Text(["a", " b"])
    assert [*Text(["a", " b"]).places] == [0, 1]
    assert [*Text(["a", " b"], range(1, 2)).places] == [1]
    assert str(Text(["a", " b"])) == "a b"
    assert content({1: 2}) == {"1": 2}
    assert content(None) is None


def test_a_sound_is_a_file_of_16_bits() -> None:
    samples = np.array([0.0, 0.5, -1.0, 2.0, np.nan])
    for given in (Sound(samples, 8000), (torch.from_numpy(samples), 8000)):
        found = content(given)
        assert isinstance(found, Wave)
        assert found.seconds == 5 / 8000
        with wave.open(io.BytesIO(found.file())) as read:
            assert (read.getframerate(), read.getsampwidth(), read.getnchannels()) == (8000, 2, 1)
            values = np.frombuffer(read.readframes(5), "<i2")
        assert values.tolist() == [0, 16384, -32767, 32767, 0]
    with wave.open(io.BytesIO(content(Sound([0.0, 1.0], 1000)).file())) as read:  # too slow to play
        assert read.getframerate() == 3000
        assert np.frombuffer(read.readframes(9), "<i2").tolist() == [0] * 3 + [32767] * 3
    stereo = content(Sound(np.array([[1, 2], [3, -40000]]), 4))
    assert stereo.values.tolist() == [[1, 2], [3, -32768]]


@pytest.mark.parametrize(
    "given",
    [3, (1, 2, 3), [], [1, 2], np.zeros((2, 2, 2)), np.zeros((0, 3)), np.array([["a"]]),
     torch.zeros(2, 3, 4, 5), Sound(np.zeros((2, 2, 2)), 8), Sound(np.zeros(0), 8), ([0.0], 0),
     Text(["a"], [1])],
)  # fmt: skip
def test_what_cannot_be_shown_is_refused_in_a_line(given) -> None:
    with pytest.raises(SpecError, match=r"^show\(\) gives a .*: ") as refused:
        content(given)
    assert "\n" not in str(refused.value)


def test_an_error_of_a_users_own_show_is_named() -> None:
    class Broken(Rows):
        def show_test(self, test):
            return {}["missing"]

    with pytest.raises(SpecError, match=r"Broken\.show_test\(1\) failed: KeyError: 'missing' \("):
        content_of_test(Broken(), 1, {})
