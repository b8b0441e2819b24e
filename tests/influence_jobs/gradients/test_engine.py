"""The engine compared with float64 vmap and with itself on changed batches; no side effects."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from influence_jobs.errors import ModelError
from influence_jobs.gradients import GradNorms, norm_shape, reduce_gradient
from influence_jobs.gradients.batches import one_sample
from influence_jobs.gradients.reference import per_sample_gradients

REDUCTIONS = ["kernel", "channel", "layer"]


def norms_of(case, reduction="kernel", precision="float32", batch=None):
    with GradNorms(
        case.model, case.layers, case.losses, reduction=reduction, precision=precision
    ) as engine:
        return engine(case.batch if batch is None else batch)


def reference_of(case, reduction="kernel"):
    gradients = per_sample_gradients(case.model, case.layers, case.losses, case.batch)
    return {
        name: reduce_gradient(case.model.get_submodule(name), gradient, reduction)
        for name, gradient in gradients.items()
    }


def relative_error(found, expected):
    """Largest error over all samples, each relative to that sample's largest norm."""
    assert found.shape == expected.shape
    error = (found.cpu().double() - expected.cpu().double()).abs().reshape(len(found), -1).amax(1)
    return (error / expected.cpu().double().reshape(len(found), -1).amax(1)).max().item()


def assert_equal_norms(found, expected, bound):
    assert list(found) == list(expected)
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < bound, errors


def to_double(batch):
    return pytree.tree_map_only(
        torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, batch
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_vmap_reference(case, reduction):
    found = norms_of(case, reduction)
    assert_equal_norms(found, reference_of(case, reduction), 1e-5)
    for name, norms in found.items():
        assert norms.dtype == torch.float32
        assert norms.shape[1:] == norm_shape(case.model.get_submodule(name), reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_vmap_reference_in_float64(case, reduction):
    case.model.double()
    case = case._replace(batch=to_double(case.batch))
    found = norms_of(case, reduction, "float64")
    assert_equal_norms(found, reference_of(case, reduction), 1e-10)
    assert all(norms.dtype == torch.float64 for norms in found.values())


def test_reference_is_the_gradient_of_each_sample_alone(case):
    case.model.double()
    batch = to_double(case.batch)
    found = per_sample_gradients(case.model, case.layers, case.losses, batch)
    for name, gradients in found.items():
        weight = case.model.get_submodule(name).weight
        for i, gradient in enumerate(gradients):
            loss = case.losses(case.model, one_sample(batch, i, 5)).sum()
            (alone,) = torch.autograd.grad(loss, weight)
            torch.testing.assert_close(gradient, alone)


def test_reductions_follow_their_definition():
    gradient = torch.zeros(1, 2, 2, 1, 2)
    gradient[0, 0, :, 0, 0] = torch.tensor([3.0, 4.0])
    gradient[0, 0, :, 0, 1] = torch.tensor([0.0, 12.0])
    conv = nn.Conv2d(2, 2, (1, 2))
    assert reduce_gradient(conv, gradient, "kernel").tolist() == [[[[5, 12]], [[0, 0]]]]
    assert reduce_gradient(conv, gradient, "channel").tolist() == [[17, 0]]
    assert reduce_gradient(conv, gradient, "layer").tolist() == [13]


def test_batch_of_one_twin(case):
    together = norms_of(case)
    for i in range(5):
        alone = norms_of(case, batch=one_sample(case.batch, i, 5))
        for name, norms in alone.items():
            torch.testing.assert_close(norms[0], together[name][i], rtol=1e-4, atol=1e-6)


def test_permutation_twin(case):
    order = torch.tensor([3, 1, 4, 0, 2])
    shuffled = pytree.tree_map_only(
        torch.Tensor, lambda t: t[order] if len(t) == 5 else t, case.batch
    )
    found, expected = norms_of(case, batch=shuffled), norms_of(case)
    for name, norms in found.items():
        torch.testing.assert_close(norms, expected[name][order], rtol=1e-5, atol=1e-7)


def test_each_layer_alone_equals_all_together(case):
    together = norms_of(case)
    for name in case.layers:
        alone = norms_of(case._replace(layers=[name]))
        torch.testing.assert_close(alone[name], together[name], rtol=1e-6, atol=0)


def test_channels_last_twin(resnet_case):
    expected = norms_of(resnet_case)
    resnet_case.model.to(memory_format=torch.channels_last)
    images, labels = resnet_case.batch
    batch = (images.to(memory_format=torch.channels_last), labels)
    assert_equal_norms(norms_of(resnet_case, batch=batch), expected, 1e-5)


def test_bfloat16_error_is_bounded(case):
    """Mixed precision changes a layer's norm by 5 % at most, its kernel norms by 5 % on average.

    One sample's kernel norms can be 10 % off where a unit falls to the other side of a ReLU.
    """
    found, expected = norms_of(case, "layer", "bfloat16"), reference_of(case, "layer")
    assert all(norms.dtype == torch.float32 for norms in found.values())
    assert_equal_norms(found, expected, 5e-2)
    assert max(relative_error(found[name], expected[name]) for name in found) > 1e-4  # it was used
    found, expected = norms_of(case, "kernel", "bfloat16"), reference_of(case, "kernel")
    for name, norms in found.items():
        difference = (norms - expected[name]).flatten(1).norm(dim=1)
        assert (difference / expected[name].flatten(1).norm(dim=1)).mean() < 5e-2, name


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
def test_check_passes_on_sound_models(case, reduction, precision):
    if precision == "float64":
        case.model.double()
        case = case._replace(batch=to_double(case.batch))
    with GradNorms(
        case.model, case.layers, case.losses, reduction=reduction, precision=precision
    ) as engine:
        engine.check(case.batch)


def test_parameters_are_as_before(resnet_case):
    model = resnet_case.model
    model.norm.bias.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with GradNorms(model, ["branch"], resnet_case.losses, reduction="channel") as engine:
        engine(resnet_case.batch)
        engine.check(resnet_case.batch)
        assert not any(p.requires_grad for p in model.parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    engine.close()  # twice is fine
    assert model.stem.weight.requires_grad


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise AssertionError("the backward went below the first asked layer")


class Guarded(nn.Module):
    def __init__(self):
        super().__init__()
        self.below = nn.Linear(4, 4)
        self.asked = nn.Linear(4, 4)

    def forward(self, x):
        return self.asked(NoBackward.apply(self.below(x)))


def test_no_backward_below_first_asked_layer():
    model = Guarded().eval()
    batch = (torch.randn(3, 4), torch.tensor([0, 1, 2]))

    def losses(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    with GradNorms(model, ["asked"], losses, reduction="layer") as engine:
        engine(batch)
    with (
        GradNorms(model, ["below", "asked"], losses, reduction="layer") as engine,
        pytest.raises(AssertionError, match="below the first"),
    ):
        engine(batch)  # the guard raises if the backward pass reaches it


def test_checkpoints_may_be_loaded_in_between(mlp_case):
    with GradNorms(mlp_case.model, mlp_case.layers, mlp_case.losses, reduction="channel") as engine:
        first = engine(mlp_case.batch)
        state = {name: 2 * value for name, value in mlp_case.model.state_dict().items()}
        mlp_case.model.load_state_dict(state)
        second = engine(mlp_case.batch)
        engine.check(mlp_case.batch)
    assert not torch.allclose(first["0"], second["0"])
    assert_equal_norms(second, reference_of(mlp_case, "channel"), 1e-5)


def test_usable_after_an_exception(resnet_case):
    broken = True

    def losses(model, batch):
        result = resnet_case.losses(model, batch)
        if broken:
            raise ZeroDivisionError
        return result

    with GradNorms(resnet_case.model, resnet_case.layers, losses, reduction="kernel") as engine:
        with pytest.raises(ZeroDivisionError):
            engine(resnet_case.batch)
        broken = False
        found = engine(resnet_case.batch)
    assert_equal_norms(found, norms_of(resnet_case), 1e-6)


def test_other_forwards_are_left_alone(resnet_case):
    images, _ = resnet_case.batch
    expected = resnet_case.model(images).detach()
    with GradNorms(
        resnet_case.model, resnet_case.layers, resnet_case.losses, reduction="kernel"
    ) as engine:
        engine(resnet_case.batch)
        output = resnet_case.model(images)
        assert not output.requires_grad
        assert torch.equal(output, expected)


def test_callers_no_grad_and_autocast_change_nothing(resnet_case):
    expected = norms_of(resnet_case)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = norms_of(resnet_case)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_hooks_of_the_user_are_part_of_the_model(mlp_case):
    for name in ("0", "2"):
        layer = mlp_case.model.get_submodule(name)
        layer.register_forward_pre_hook(lambda module, args: (args[0].sin(),))
        layer.register_forward_hook(lambda module, args, output: output * 3)
    assert_equal_norms(norms_of(mlp_case), reference_of(mlp_case), 1e-5)


class KeywordCall(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(input=x)


def test_input_by_keyword(mlp_case):
    batch = (torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0]))
    case = mlp_case._replace(model=KeywordCall().eval(), layers=["layer"], batch=batch)
    assert_equal_norms(norms_of(case), reference_of(case), 1e-5)


class Overwriting(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x):
        h = self.first(x)
        y = self.second(h)
        return y + h.relu_()  # h was the input of `second`


def test_overwritten_input_is_refused(mlp_case):
    batch = (torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0]))
    case = mlp_case._replace(model=Overwriting().eval(), layers=["second"], batch=batch)
    with pytest.raises(ModelError, match="layer 'second': its input was overwritten"):
        norms_of(case)
    case = case._replace(layers=["first"])  # harmless: its output is overwritten, not its input
    assert_equal_norms(norms_of(case), reference_of(case), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_vmap_reference_on_cuda(case, reduction, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    expected = reference_of(case, reduction)
    case.model.cuda()
    case = case._replace(batch=pytree.tree_map_only(torch.Tensor, lambda t: t.cuda(), case.batch))
    with GradNorms(case.model, case.layers, case.losses, reduction=reduction) as engine:
        engine.check(case.batch)
        assert_equal_norms(engine(case.batch), expected, 1e-5)
    if reduction == "layer":
        assert_equal_norms(norms_of(case, reduction, "bfloat16"), expected, 5e-2)


def test_a_tapped_linear_over_positions_copies_nothing_on_the_way_back():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)).eval()
    names = set()

    def losses(model, x):
        y = model(x)
        nodes = [y.grad_fn]
        while nodes:
            node = nodes.pop()
            names.add(node.name())
            nodes += [following for following, _ in node.next_functions if following is not None]
        return y.flatten(1).sum(1)

    with GradNorms(model, ["0", "1"], losses, reduction="layer") as engine:
        engine(torch.randn(2, 6, 3))
    assert names
    assert not names & {"CopySlices", "AsStridedBackward0"}


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_norms_whose_squares_are_out_of_range_are_right(case, reduction):
    """Losses times powers of two, whose norms are the same powers times the norms."""
    expected = norms_of(case, reduction)
    size = len(next(iter(expected.values())))
    powers_B = torch.tensor([-70, 0, 70, -80, 55])[torch.arange(size) % 5]
    factors_B = torch.ldexp(torch.ones(()), powers_B)
    factors_B[-1] = 0.0

    def losses(model, batch):
        found_B = case.losses(model, batch)
        # A batch of one is a sample that the check cuts out; its place is not known.
        return found_B * (factors_B if len(found_B) == size else factors_B[0])

    with GradNorms(case.model, case.layers, losses, reduction=reduction) as engine:
        found = engine(case.batch)
    for name, norms in found.items():
        factors = factors_B.view(-1, *(1,) * (norms.ndim - 1))
        assert (norms[:-1] > 0).any()
        torch.testing.assert_close(
            norms / factors,
            expected[name].where(factors > 0, torch.nan),
            rtol=1e-5,
            atol=1e-6 * float(expected[name].max()),
            equal_nan=True,
        )


@pytest.mark.parametrize("power", [-75, 62])
def test_all_norms_out_of_range_pass_the_check_by_rule_and_by_fallback(power):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.GRU(4, 3, batch_first=True)).eval()
    x = torch.randn(6, 7, 5)

    def losses(model, x):
        return model(x)[0].square().flatten(1).sum(1) * 2.0**power

    names = ["0", "2.weight_hh_l0"]
    with GradNorms(model, names, losses, reduction="channel") as engine:
        engine.check(x)
        found = engine(x)
    with GradNorms(
        model, names, lambda m, x: losses(m, x) * 2.0**-power, reduction="channel"
    ) as engine:
        for name, norms in engine(x).items():
            torch.testing.assert_close(found[name] * 2.0**-power, norms, rtol=1e-5, atol=1e-7)
