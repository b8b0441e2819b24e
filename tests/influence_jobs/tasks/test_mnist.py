from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from influence_jobs.tasks.base import Draw
from influence_jobs.tasks.mnist import MnistTask

LABELS = [6, 9, 0, 8, 0, 4, 5, 1, 6, 7]  # of the ten test ids of the research report


@pytest.fixture(scope="module")
def task(mnist_dir: Path) -> MnistTask:
    return MnistTask(data_dir=str(mnist_dir), limit=64)


def test_loss_and_outputs_written_out(task: MnistTask) -> None:
    torch.manual_seed(0)
    model = task.model().eval()
    ids = np.array([5, 0, 41])
    batch = task.batch(torch.from_numpy(ids), Draw(0))
    hidden = task.pictures(ids).reshape(3, 784) / 255 * 2 - 1
    weights = [parameter.detach().double().numpy() for parameter in model.parameters()]
    for weight, bias in zip(weights[::2], weights[1::2], strict=True):
        hidden = np.maximum(hidden, 0) if len(weight) < 128 else hidden
        hidden = hidden @ weight.T + bias
    probabilities = np.exp(hidden) / np.exp(hidden).sum(axis=1, keepdims=True)
    labels = task.describe(ids)["label"]
    np.testing.assert_array_equal(task.targets(batch), labels)
    with torch.no_grad():
        outputs, losses = task.outputs(model, batch), task.losses(model, batch)
    np.testing.assert_allclose(outputs.exp(), probabilities, rtol=1e-5)
    np.testing.assert_allclose(losses, -np.log(probabilities[range(3), labels]), rtol=1e-5)


def test_the_loss_is_the_named_loss_of_the_outputs(task: MnistTask) -> None:
    """Value and gradient alike: the Gauss-Newton matrix is built on it."""
    model = task.model().double().eval()
    images, labels = task.batch(torch.arange(8), Draw(0))
    batch = images.double(), labels
    assert task.output_loss == "cross-entropy"
    named = F.cross_entropy(task.outputs(model, batch), task.targets(batch), reduction="none")
    losses = task.losses(model, batch)
    parameters = list(model.parameters())
    torch.testing.assert_close(named, losses)
    for ours, theirs in zip(
        torch.autograd.grad(losses.sum(), parameters, retain_graph=True),
        torch.autograd.grad(named.sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_test_samples_are_the_ten_thousand(task: MnistTask) -> None:
    ids = np.array(task.query_sets["paper"])
    assert len(task.test_data()) == 10_000  # for any limit of training images
    assert task.describe_test(ids)["label"].tolist() == LABELS
    images, labels = task.test_batch(torch.from_numpy(ids), Draw(0))
    assert labels.tolist() == LABELS
    for row, test in enumerate(ids):
        picture = task.test_picture(int(test))
        assert picture.shape == (28, 28)
        assert picture.dtype == np.uint8
        np.testing.assert_allclose(images[row], picture.ravel() / 127.5 - 1, atol=1e-6)
    assert torch.equal(images, task.test_images()[torch.from_numpy(ids)])


def test_the_measure_of_a_test_sample_is_its_loss(task: MnistTask) -> None:
    model = task.model().eval()
    batch = task.test_batch(torch.tensor([3520, 7]), Draw(0))
    with torch.no_grad():
        measured = task.measure(model, batch, "loss", None)
        expected = -model(batch[0])[[0, 1], batch[1]]
    assert torch.equal(measured, expected)
    assert task.test_size(3520) is None
