"""The example task with as many test images as MNIST, for the test ids of the documents."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from digits import TEST_SAMPLES, DigitsTask
from torch.utils.data import TensorDataset


class ManyTestsTask(DigitsTask):
    """The test images of the example, repeated."""

    def test_data(self) -> TensorDataset:
        ids = np.arange(10_000) % TEST_SAMPLES
        return TensorDataset(*(values[ids] for values in super().test_data().tensors))

    def describe_test(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        return super().describe_test(ids % TEST_SAMPLES)

    def test_picture(self, test: int) -> npt.NDArray[np.uint8]:
        return super().test_picture(test % TEST_SAMPLES)
