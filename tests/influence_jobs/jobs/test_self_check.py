"""Jobs refuse a model whose gradients the engines would get wrong, before they store a number."""

import digits
import pytest
import torch
from torch import Tensor

from influence_jobs.errors import RuntimeFault
from influence_jobs.kinds.influence.spec import InfluenceSpec
from influence_jobs.specs.base import make_spec
from influence_jobs.store.run import Run


class SecondUse(digits.DigitsNet):
    """Uses a weight outside its module too, through a handle that no look at the modules finds."""

    def __init__(self, width: int = 8):
        super().__init__(width)
        self.handles = [self.conv2.weight]

    def forward(self, images: Tensor) -> Tensor:
        sums = self.handles[0].sum(dim=(1, 2, 3))[:10]
        return super().forward(images) + sums * images.mean(dim=(1, 2, 3))[:, None]


@pytest.fixture(autouse=True)
def second_use(digits_task, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's model has the weights that it always had, and uses one of them twice."""
    plain, other = digits_task.model().eval(), SecondUse().eval()
    other.load_state_dict(plain.state_dict())
    images = torch.rand(2, 1, 8, 8)
    assert not torch.allclose(other(images), plain(images))
    monkeypatch.setattr(digits.DigitsTask, "model", lambda self: SecondUse(self.width))


def test_norms_are_refused(carry_out, fresh_root, grad_norms_spec) -> None:
    root = fresh_root()
    with pytest.raises(RuntimeFault, match="'conv2': per-sample norms differ from one-sample"):
        carry_out(grad_norms_spec, root=root)
    assert Run(str(root), grad_norms_spec).manifest.done() == {}


def test_influence_is_refused(carry_out, fresh_root, grad_norms_spec, s_test_of) -> None:
    root = fresh_root()
    spec = make_spec(InfluenceSpec, task=grad_norms_spec.task, s_tests=(s_test_of(),))
    with pytest.raises(RuntimeFault, match=r"'conv2': per-sample .* differ from one-sample"):
        carry_out(spec, root=root)
    assert Run(str(root), spec).manifest.done() == {}
