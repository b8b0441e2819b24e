"""Dot products with every sample's gradient, compared with float64 gradients one by one."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from influence_jobs.errors import ModelError
from influence_jobs.gradients import GradDots, ParameterSpace
from influence_jobs.gradients.batches import one_sample
from influence_jobs.gradients.reference import gradients_one_by_one


def vectors_of(model, queries=3, modules=None):
    space = ParameterSpace(model, modules)
    return space, torch.randn(queries, space.size)


def expected_parts(case, space, v_QP):
    """{module: (B, Q)} from explicit gradients."""
    gradients = gradients_one_by_one(case.model, list(space.shapes), case.losses, case.batch)
    vectors = space.split(v_QP.double())
    parts: dict[str, Tensor] = {}
    for name, gradient in gradients.items():
        part = gradient.reshape(5, -1) @ vectors[name].reshape(len(v_QP), -1).t()
        module = name.rpartition(".")[0]
        parts[module] = parts.get(module, 0) + part
    return parts


def assert_parts(found, expected, bound=1e-5):
    """Errors relative to the largest product of each part and vector."""
    assert list(found) == list(expected)
    for name, part in expected.items():
        assert found[name].shape == part.shape
        error = (found[name].double() - part).abs().amax(0) / part.abs().amax(0)
        assert error.max() < bound, (name, error)


def to_double(batch):
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, batch)


@pytest.mark.parametrize("queries", [1, 10])
def test_parts_and_total_equal_explicit_products(case, queries):
    space, v_QP = vectors_of(case.model, queries)
    expected = expected_parts(case, space, v_QP)
    with GradDots(case.model, space, case.losses, v_QP) as engine:
        assert_parts(engine(case.batch), expected)
        assert_parts({"": engine.total(case.batch)}, {"": sum(expected.values())})
        engine.check(case.batch)
        assert set(engine._layers) == set(case.layers)  # by rules, all of them


def test_float64(case):
    case.model.double()
    case = case._replace(batch=to_double(case.batch))
    space, v_QP = vectors_of(case.model)
    with GradDots(case.model, space, case.losses, v_QP, precision="float64") as engine:
        found = engine(case.batch)
        engine.check(case.batch)
    assert all(part.dtype == torch.float64 for part in found.values())
    assert_parts(found, expected_parts(case, space, v_QP), 1e-10)


def test_bfloat16_error_is_bounded(case):
    space, v_QP = vectors_of(case.model)
    expected = expected_parts(case, space, v_QP)
    with GradDots(case.model, space, case.losses, v_QP, precision="bfloat16") as engine:
        found = engine(case.batch)
        engine.check(case.batch)
    assert all(part.dtype == torch.float32 for part in found.values())
    assert_parts(found, expected, 2e-1)
    with pytest.raises(AssertionError):  # it was used
        assert_parts(found, expected, 1e-4)


@pytest.mark.parametrize("modules", [["branch"], ["norm", "head"]])
def test_only_the_modules_of_the_space_count(resnet_case, modules):
    space, v_QP = vectors_of(resnet_case.model, modules=modules)
    with GradDots(resnet_case.model, space, resnet_case.losses, v_QP) as engine:
        assert_parts(engine(resnet_case.batch), expected_parts(resnet_case, space, v_QP))


def test_linear_in_the_vectors_and_other_batches(case):
    space, v_QP = vectors_of(case.model, 2)
    combined = torch.stack([v_QP[0] - 2 * v_QP[1], v_QP[1]])
    order = torch.tensor([3, 1, 4, 0, 2])
    shuffled = pytree.tree_map_only(Tensor, lambda t: t[order] if len(t) == 5 else t, case.batch)
    with GradDots(case.model, space, case.losses, v_QP) as engine:
        first = engine.total(case.batch)
        torch.testing.assert_close(engine.total(shuffled), first[order], rtol=1e-4, atol=1e-5)
        alone = torch.cat([engine.total(one_sample(case.batch, i, 5)) for i in range(5)])
        torch.testing.assert_close(alone, first, rtol=1e-4, atol=1e-5)
    with GradDots(case.model, space, case.losses, combined) as engine:
        expected = torch.stack([first[:, 0] - 2 * first[:, 1], first[:, 1]], dim=1)
        torch.testing.assert_close(engine.total(case.batch), expected, rtol=1e-4, atol=1e-4)


class Zoo(nn.Module):
    """Layers with a rule and without: attention, recurrence, shared and custom parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8, padding_idx=2)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.scale = nn.Parameter(torch.randn(8))
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.groups = nn.GroupNorm(2, 8)
        self.batch_norm = nn.BatchNorm1d(8)
        self.wide = nn.Linear(8, 12)
        self.narrow = nn.Linear(12, 8)
        self.twice = nn.Linear(8, 8)
        self.folded = nn.Linear(8, 8)  # called with samples and positions as one axis
        self.as_function = nn.Linear(8, 8)  # called, and its weight used as a function too
        self.head = nn.Linear(8, 9)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.batch_norm.running_mean)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(self.embed(ids))
        h = h + self.attention(h, h, h, need_weights=False)[0]
        h = self.gru(h)[0] * self.scale
        h = self.batch_norm(self.groups(h.transpose(1, 2))).transpose(1, 2)
        h = self.narrow(F.relu(self.wide(h)))
        h = self.twice(self.twice(h).relu_())
        h = self.folded(h.flatten(0, 1)).view_as(h)
        h = self.as_function(h) + F.linear(h, self.as_function.weight)
        return self.head(h).mean(1) / self.temperature


ZOO_RULED = {"embed", "norm", "groups", "batch_norm", "wide", "narrow", "twice", "head"}


@pytest.fixture
def zoo_case(resnet_case) -> Any:
    torch.manual_seed(3)
    batch = torch.randint(0, 9, (5, 6)), resnet_case.batch[1]
    return resnet_case._replace(model=Zoo().eval(), layers=[], batch=batch)


@pytest.mark.parametrize("queries", [1, 10])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_whatever_has_no_rule_goes_forward_mode(zoo_case, queries, precision):
    if precision == "float64":
        zoo_case.model.double()
    space, v_QP = vectors_of(zoo_case.model, queries)
    expected = expected_parts(zoo_case, space, v_QP)
    with (
        warnings.catch_warnings(),
        GradDots(zoo_case.model, space, zoo_case.losses, v_QP, precision=precision) as engine,
    ):
        warnings.simplefilter("error", UserWarning)
        assert_parts(engine(zoo_case.batch), expected)
        assert_parts({"": engine.total(zoo_case.batch)}, {"": sum(expected.values())})
        engine.check(zoo_case.batch)
        assert set(engine._layers) == ZOO_RULED


def test_callers_no_grad_and_autocast_change_nothing(zoo_case):
    space, v_QP = vectors_of(zoo_case.model)
    with GradDots(zoo_case.model, space, zoo_case.losses, v_QP) as engine:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            found = engine(zoo_case.batch)
        assert_parts(found, expected_parts(zoo_case, space, v_QP))


def test_bfloat16_in_forward_mode(zoo_case):
    space, v_QP = vectors_of(zoo_case.model)
    with GradDots(zoo_case.model, space, zoo_case.losses, v_QP, precision="bfloat16") as engine:
        found = engine(zoo_case.batch)
        engine.check(zoo_case.batch)
        assert set(engine._layers) == ZOO_RULED  # autocast's casts hide no use of a weight
    assert all(part.dtype == torch.float32 for part in found.values())
    for name, part in expected_parts(zoo_case, space, v_QP).items():
        # A fifth of a layer's products where one unit falls to the other side of a ReLU.
        assert (found[name] - part).norm() < 3e-1 * part.norm(), name


class TwiceScaled(torch.autograd.Function):
    """Has no forward-mode derivative."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return 2 * x * weight

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return 2 * g * weight, (2 * g * x).sum(0)


class Exotic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(12, 4)
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return TwiceScaled.apply(self.body(x), self.weight)


def test_without_forward_mode_one_sample_at_a_time(mlp_case):
    case = mlp_case._replace(model=Exotic().eval())
    space, v_QP = vectors_of(case.model)
    with GradDots(case.model, space, case.losses, v_QP) as engine:
        with pytest.warns(UserWarning, match="'weight' .* sample by sample, which is slow"):
            found = engine(case.batch)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # said once
            engine.total(case.batch)
        assert not any(p.requires_grad for p in case.model.parameters())
    assert_parts(found, expected_parts(case, space, v_QP))


class Spare(nn.Module):
    """A model with a layer that is never called, and one whose output is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.dropped = nn.Linear(12, 4), nn.Linear(3, 3), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.dropped(x)
        return self.used(x)


def test_unused_layers_have_products_of_zero(mlp_case):
    case = mlp_case._replace(model=Spare().eval())
    space, v_QP = vectors_of(case.model)
    with GradDots(case.model, space, case.losses, v_QP) as engine:
        found = engine(case.batch)
        engine.check(case.batch)
    assert found["idle"].abs().max() == found["dropped"].abs().max() == 0
    assert found["idle"].shape == (5, 3)


def test_parameters_are_as_before(zoo_case):
    model = zoo_case.model
    model.norm.bias.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    space, v_QP = vectors_of(model)
    with GradDots(model, space, zoo_case.losses, v_QP) as engine:
        engine(zoo_case.batch)
        engine.check(zoo_case.batch)
        assert not any(p.requires_grad for p in model.parameters())
    engine.close()  # twice is fine
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_weights_may_be_loaded_in_between(zoo_case):
    space, v_QP = vectors_of(zoo_case.model)
    with GradDots(zoo_case.model, space, zoo_case.losses, v_QP) as engine:
        engine(zoo_case.batch)
        state = {
            name: 1.5 * value if value.is_floating_point() else value
            for name, value in zoo_case.model.state_dict().items()
        }
        zoo_case.model.load_state_dict(state)
        assert_parts(engine(zoo_case.batch), expected_parts(zoo_case, space, v_QP))


class Planted(nn.Module):
    def __init__(self, fault: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.shift = nn.Parameter(torch.randn(6))
        self.fault = fault

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x) + self.shift
        if self.fault == "batch statistics":
            h = h - h.mean(0)
        if self.fault == "first sample":
            h = h * h[:1].detach()
        return self.second(h)


@pytest.mark.parametrize("fault", ["batch statistics", "first sample", "averaged", "none"])
def test_check_finds_planted_faults(fault):
    torch.manual_seed(0)
    model = Planted(fault).eval()

    def losses(model, x):
        values = model(x).square().sum(1)
        return values / len(x) if fault == "averaged" else values

    space, v_QP = vectors_of(model)
    with GradDots(model, space, losses, v_QP) as engine:
        if fault == "none":
            engine.check(torch.randn(2, 6))
        else:
            with pytest.raises(ModelError, match=r"usual causes|divides by"):
                engine.check(torch.randn(2, 6))


class KeyBiases(nn.Module):
    """Attention of which biases alone are trained; softmax takes no notice of those of the keys."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (2, 4)) for layer in (self.query, self.key, self.value))
        heads = (one.transpose(1, 2) for one in (q, k, v))
        return F.scaled_dot_product_attention(*heads).flatten(1)


def test_check_does_not_measure_rounding_against_rounding():
    torch.manual_seed(0)
    model, x = KeyBiases().eval(), torch.randn(5, 6, 8)

    def losses(model, x):
        return model(x).square().sum(1)

    space = ParameterSpace(model)
    gradients = gradients_one_by_one(model, list(space.shapes), losses, x)
    assert gradients["key.bias"].abs().max() < 1e-12 * gradients["query.bias"].abs().max()
    v_QP = space.gradient(losses(model, x[:1]).sum())[None]  # with rounding for the keys
    with GradDots(model, space, losses, v_QP) as engine:
        engine.check(x)


def refused(message, model, vectors=None, space=None, precision="float32"):
    space = space or ParameterSpace(model)
    vectors = torch.zeros(1, space.size) if vectors is None else vectors
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ModelError, match=message) as caught:
        GradDots(model, space, lambda m, x: m(x).sum(1), vectors, precision=precision)
    assert "\n" not in str(caught.value)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_refusals():
    model = nn.Sequential(nn.Linear(2, 2)).eval()
    refused(r"vectors of shape \(3, 5\) do not fit Sequential: \(Q, 6\)", model, torch.ones(3, 5))
    refused(r"vectors of shape \(6,\)", model, torch.ones(6))
    bad = torch.ones(3, 6)
    bad[1, 2] = torch.nan
    refused("vector 1 holds NaN or infinity", model, bad)
    refused("layer '0' has float32 weights, .* needs float64", model, precision="float64")
    refused("train mode", nn.Sequential(nn.Linear(2, 2)))
    statistics = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)).eval()
    refused("no running statistics", statistics)
    refused("uses max_norm", nn.Sequential(nn.Embedding(3, 2, max_norm=1.0)).eval())


def test_train_mode_is_refused_at_every_call(mlp_case):
    space, v_QP = vectors_of(mlp_case.model)
    with GradDots(mlp_case.model, space, mlp_case.losses, v_QP) as engine:
        engine(mlp_case.batch)
        mlp_case.model.train()
        with pytest.raises(ModelError, match="train mode"):
            engine.total(mlp_case.batch)


@pytest.mark.gpu
def test_on_cuda(case, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    space, v_QP = vectors_of(case.model)
    expected = expected_parts(case, space, v_QP)
    case.model.cuda()
    batch = pytree.tree_map_only(Tensor, lambda t: t.cuda(), case.batch)
    with GradDots(case.model, space, case.losses, v_QP) as engine:
        found = {name: part.cpu() for name, part in engine(batch).items()}
        engine.check(batch)
    assert_parts(found, expected)
