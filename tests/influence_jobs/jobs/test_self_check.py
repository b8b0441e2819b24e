"""Jobs refuse a model whose gradients the engines would get wrong, before they store a number."""

import digits
import numpy as np
import pytest
import torch
from torch import Tensor

from influence_jobs.errors import RuntimeFault
from influence_jobs.gradients import reduce_gradient
from influence_jobs.gradients.reference import gradients_one_by_one
from influence_jobs.kinds.influence.spec import InfluenceSpec
from influence_jobs.specs.base import make_spec
from influence_jobs.store.checkpoints import load_checkpoint
from influence_jobs.store.run import Run
from influence_jobs.tasks.base import Draw

BRIGHT = 0.33  # a mean brightness that the first two samples do not have


class Mixing(digits.DigitsNet):
    """Its outputs depend on the other samples of the batch, which no look at the modules finds."""

    def forward(self, images: Tensor) -> Tensor:
        outputs = super().forward(images)
        return outputs + outputs.mean(0)


class SecondUse(digits.DigitsNet):
    """Uses a weight outside its module too, through a handle that no look at the modules finds."""

    def __init__(self, width: int = 8):
        super().__init__(width)
        self.handles = [self.conv2.weight]

    def forward(self, images: Tensor) -> Tensor:
        sums = self.handles[0].sum(dim=(1, 2, 3))[:10]
        return super().forward(images) + sums * images.mean(dim=(1, 2, 3))[:, None]


class Sorting(digits.DigitsNet):
    """Its layers see the samples by brightness, as those of texts are often sorted by length."""

    def forward(self, images: Tensor) -> Tensor:
        order = images.mean(dim=(1, 2, 3)).argsort()
        found: Tensor = super().forward(images[order])[order.argsort()]
        return found


class SometimesTwice(digits.DigitsNet):
    """Uses a weight a second time, if a batch has a bright sample; the first of all is not."""

    def forward(self, images: Tensor) -> Tensor:
        outputs, bright = super().forward(images), images.mean(dim=(1, 2, 3)) > BRIGHT
        if bright.any():
            outputs = outputs + bright[:, None] * self.conv2.weight.sum(dim=(1, 2, 3))[:10]
        return outputs


@pytest.fixture
def mixing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's model with the weights that it always had, and outputs that are mixed."""
    monkeypatch.setattr(digits.DigitsTask, "model", lambda self: Mixing(self.width))


def test_samples_that_a_model_sorts_keep_their_own_numbers(
    carry_out, fresh_root, grad_norms_spec, s_test_of, digits_task, monkeypatch
) -> None:
    first = digits_task.batch(torch.arange(2), Draw(0))[0].mean(dim=(1, 2, 3))
    assert first[0] < first[1]  # in order already, so that they alone would not show it
    influence = make_spec(InfluenceSpec, task=grad_norms_spec.task, s_tests=(s_test_of(),))
    for spec in (grad_norms_spec, influence):
        plain = carry_out(spec, root=fresh_root())
        with monkeypatch.context() as patched:
            patched.setattr(digits.DigitsTask, "model", lambda self: Sorting(self.width))
            run = carry_out(spec, root=fresh_root())
        for name in plain.array_names():
            found, wanted = (np.asarray(one.array(name)[...]) for one in (run, plain))
            assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max(), name


def test_a_second_use_that_the_first_samples_do_not_show_is_counted(
    carry_out, fresh_root, grad_norms_spec, digits_task, checkpoint, monkeypatch
) -> None:
    monkeypatch.setattr(digits.DigitsTask, "model", lambda self: SometimesTwice(self.width))
    root = fresh_root()
    run = carry_out(grad_norms_spec, root=root)
    model = SometimesTwice(8).eval()
    load_checkpoint(model, str(root), checkpoint)
    batch = digits_task.batch(torch.arange(40), Draw(grad_norms_spec.seed))
    bright = batch[0].mean(dim=(1, 2, 3)) > BRIGHT
    assert not bright[:2].any()
    assert bright.any()
    (gradient,) = gradients_one_by_one(model, ["conv2.weight"], digits_task.losses, batch).values()
    wanted = reduce_gradient(model.conv2, gradient, grad_norms_spec.reduction)
    found = run.read_rows("norms/conv2", 0, 40)
    assert np.abs(found - wanted.numpy()).max() <= 1e-5 * wanted.max()


@pytest.mark.usefixtures("mixing")
def test_norms_are_refused(carry_out, fresh_root, grad_norms_spec) -> None:
    root = fresh_root()
    with pytest.raises(RuntimeFault, match=r"loss is .* alone and .* in a batch of"):
        carry_out(grad_norms_spec, root=root)
    assert Run(str(root), grad_norms_spec).manifest.done() == {}


@pytest.mark.usefixtures("mixing")
def test_influence_is_refused(carry_out, fresh_root, grad_norms_spec, s_test_of) -> None:
    root = fresh_root()
    spec = make_spec(InfluenceSpec, task=grad_norms_spec.task, s_tests=(s_test_of(),))
    with pytest.raises(RuntimeFault, match=r"loss is .* alone and .* in a batch of"):
        carry_out(spec, root=root)
    assert Run(str(root), spec).manifest.done() == {}


def test_a_second_use_of_a_weight_is_counted(
    carry_out, fresh_root, grad_norms_spec, digits_task, checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digits.DigitsTask, "model", lambda self: SecondUse(self.width))
    root = fresh_root()
    run = carry_out(grad_norms_spec, root=root)
    model = SecondUse().eval()
    load_checkpoint(model, str(root), checkpoint)
    batch = digits_task.batch(torch.arange(3), Draw(grad_norms_spec.seed))
    (gradient,) = gradients_one_by_one(model, ["conv2.weight"], digits_task.losses, batch).values()
    wanted = reduce_gradient(model.conv2, gradient, grad_norms_spec.reduction)
    found = run.read_rows("norms/conv2", 0, 3)
    assert np.abs(found - wanted.numpy()).max() <= 1e-5 * wanted.max()
