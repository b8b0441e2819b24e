"""The example task, which users copy."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from influence_jobs.tasks.base import Draw, Task


def test_test_samples_and_pictures_are_the_last_297(digits_task: Task) -> None:
    digits = load_digits()
    assert (len(digits_task.train_data()), len(digits_task.test_data())) == (1500, 297)
    images, labels = digits_task.test_batch(torch.tensor([0, 296]), Draw(0))
    assert labels.tolist() == digits.target[[1500, 1796]].tolist()
    np.testing.assert_array_equal(images[:, 0] * 16, digits.images[[1500, 1796]])
    assert digits_task.describe_test(np.array([0, 296]))["label"].tolist() == labels.tolist()
    for picture, image in (
        (digits_task.test_picture(296), digits.images[1796]),
        (digits_task.pictures(np.array([4, 1]))[0], digits.images[4]),
    ):
        assert picture.dtype == np.uint8
        np.testing.assert_allclose(picture, image * 255 / 16, atol=1)


def test_the_loss_is_the_named_loss_of_the_outputs(digits_task: Task) -> None:
    model = digits_task.model().eval()
    batch = digits_task.batch(torch.arange(6), Draw(0))
    assert digits_task.output_loss == "cross-entropy"
    logits = digits_task.outputs(model, batch)
    assert torch.equal(logits, model(batch[0]))
    expected = -F.log_softmax(logits, dim=1)[range(6), digits_task.targets(batch)]
    torch.testing.assert_close(digits_task.losses(model, batch), expected)
