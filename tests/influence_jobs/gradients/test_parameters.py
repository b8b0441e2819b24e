import pytest
import torch
from torch import nn

from influence_jobs.errors import ModelError
from influence_jobs.gradients.parameters import ParameterSpace


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2), nn.PReLU()))


def test_split_and_join_are_inverse_and_follow_the_models_order(model):
    space = ParameterSpace(model)
    assert list(space.shapes) == ["0.weight", "0.bias", "2.0.weight", "2.0.bias", "2.1.weight"]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert space.size == len(flat)
    assert torch.equal(space.join(space.parameters()), flat)
    v_QP = torch.randn(5, space.size)
    parts = space.split(v_QP)
    assert parts["0.weight"].shape == (5, 4, 3)
    assert torch.equal(space.join(parts), v_QP)


def test_the_gradient_is_autograds_and_zero_for_unused_parameters(model):
    space = ParameterSpace(model, ["0", "2.1"])
    gradient = space.split(space.gradient(model[0](torch.ones(1, 3)).square().sum()))
    expected = torch.autograd.grad(model[0](torch.ones(1, 3)).square().sum(), model[0].weight)[0]
    assert torch.equal(gradient["0.weight"], expected)
    assert gradient["2.1.weight"].abs().sum() == 0
    assert set(gradient) == {"0.weight", "0.bias", "2.1.weight"}


@pytest.mark.parametrize(
    ("modules", "message"), [(["9"], "no layer '9'"), (["1"], "no parameters of its own")]
)
def test_bad_modules_are_named(model, modules, message):
    with pytest.raises(ModelError, match=message):
        ParameterSpace(model, modules)
