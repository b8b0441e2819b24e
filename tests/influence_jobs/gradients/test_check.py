"""The engine's self-check finds faults that an inspection of the modules cannot find."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from influence_jobs.errors import ModelError
from influence_jobs.gradients import GradDots, GradNorms
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.gradients.rules.linear import LinearRule


class Probe(nn.Module):
    """Two layers with a planted fault between them."""

    def __init__(self, fault="none"):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.fault = fault

    def forward(self, x):
        h = self.first(x)
        if self.fault == "functional use":
            h = h + F.linear(x, self.first.weight.t())
        if self.fault == "batch statistics":
            h = h - h.mean(0)
        if self.fault == "first sample":  # visible in the second sample only
            h = h * h[:1].detach()
        if self.fault == "dropout":
            h = F.dropout(h, 0.5)
        return self.second(h)


def losses(model, x):
    return model(x).square().sum(1)


def check(model, losses=losses, batch=None, layers=("first", "second"), precision="float32"):
    with GradNorms(
        model.eval(), layers, losses, reduction="channel", precision=precision
    ) as engine:
        engine.check(torch.randn(2, 6) if batch is None else batch)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_sound_model_passes(rows):
    check(Probe(), batch=torch.randn(rows, 6))
    check(Probe(), batch=torch.randn(rows, 6), precision="bfloat16")


@pytest.mark.parametrize("fault", ["batch statistics", "first sample", "dropout"])
def test_planted_fault_is_found(fault):
    with pytest.raises(ModelError, match=r"(layer 'first': per-sample norms|loss).* usual causes"):
        check(Probe(fault))


def test_a_use_outside_the_layer_is_counted():
    model = Probe("functional use").eval()
    with GradNorms(model, ["first", "second"], losses, reduction="channel") as engine:
        engine.check(torch.randn(5, 6))
        assert list(engine.slow_layers(torch.randn(5, 6))) == ["first"]


def test_losses_divided_by_the_batch_size():
    with pytest.raises(
        ModelError, match=r"losses\(\) divides by the number of samples in the batch"
    ):
        check(Probe(), losses=lambda model, x: losses(model, x) / len(x))


def test_wrong_rule(monkeypatch):
    def forgets_the_input(rule, a, g):
        return g.abs()[..., None, None]

    monkeypatch.setattr(LinearRule, "kernel_norms", forgets_the_input)
    with pytest.raises(ModelError, match="layer 'first'"):
        check(Probe())


def test_numbers_that_are_not_finite_are_left_to_the_caller():
    check(Probe(), batch=torch.full((2, 6), torch.nan))


def test_batch_that_cannot_be_cut():
    class Opaque:
        x = torch.randn(2, 6)

    with pytest.raises(
        ModelError,
        match=r"losses\(\) gives 2 numbers for one sample that is cut out of a batch: a batch",
    ):
        check(Probe(), losses=lambda model, batch: losses(model, batch.x), batch=Opaque())


def test_weights_stay_frozen_after_a_failure():
    model = Probe("batch statistics").eval()
    with GradNorms(model, ["first"], losses, reduction="layer") as engine:
        with pytest.raises(ModelError):
            engine.check(torch.randn(2, 6))
        assert not any(p.requires_grad for p in model.parameters())


def engines(model, losses):
    """Both engines, without their check."""
    space = ParameterSpace(model)
    yield GradNorms(model, ["first", "second"], losses, reduction="layer")
    yield GradDots(model, space, losses, torch.randn(1, space.size))


@pytest.mark.parametrize("change", [lambda x: x.flip(0), lambda x: x - x.mean(0)])
def test_samples_that_change_places_or_mix_are_seen_without_the_check(change):
    for engine in engines(Probe().eval(), lambda model, x: losses(model, change(x))):
        with (
            engine,
            pytest.raises(
                ModelError, match=r"a sample's loss is \S+ alone and \S+ in a batch of 5: let it"
            ),
        ):
            engine(torch.randn(5, 6))


def class_weights(model, batch):
    x, y, weights = batch
    return F.cross_entropy(model(x), y, weight=weights, reduction="none")


def input_weights(model, batch):
    x, _, weights = batch
    return losses(model, x * weights)


@pytest.mark.parametrize("weighted", [class_weights, input_weights])
def test_a_tensor_that_samples_share_is_not_cut_with_them(weighted):
    weights = torch.rand(6)

    def batch(size):
        return torch.randn(size, 6), torch.randint(6, (size,)), weights

    for engine in engines(Probe().eval(), weighted):
        with (
            engine,
            pytest.raises(
                ModelError, match=r"a batch of 6 samples holds a tensor \(6,\) that has no row"
            ),
        ):
            engine(batch(6))
    check(Probe(), losses=weighted, batch=batch(5))


def test_losses_that_almost_vanish_are_not_taken_for_others():
    tiny = [lambda model, x, power=power: losses(model, x) * 10.0**-power for power in (6, 9, 30)]
    for small in tiny:
        check(Probe(), losses=small)


class AtAKink(nn.Module):
    """A ReLU is at zero, and in a batch the rounding of float32 goes to the other side."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        h = self.first(x)
        side = (1e-12 if len(x) == 1 else -1e-12) * (x.dtype == torch.float32)
        return self.second(x) + F.relu(h - h.detach() + side)


def test_a_sample_at_a_kink_is_right_as_it_is_in_its_batch():
    check(AtAKink(), batch=torch.randn(3, 6))
    tied = AtAKink()
    tied.again = tied.second  # one weight under two names
    check(tied, batch=torch.randn(3, 6), layers=("first",))
    assert {p.dtype for p in tied.parameters()} == {torch.float32}
    tied.again = nn.Linear(6, 6)
    tied.again.weight = tied.second.weight  # and of two modules
    check(tied, batch=torch.randn(3, 6), layers=("first",))
    assert tied.again.weight is tied.second.weight
    model = AtAKink()
    with GradDots(model.eval(), ParameterSpace(model), losses, torch.randn(1, 84)) as engine:
        engine.check(torch.randn(3, 6))


class OthersInTheGradient(nn.Module):
    """A sample has the same loss alone and in a batch, but not the same gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        h = self.first(x)
        h = h + (h.mean(0) - h.mean(0).detach()) * (len(x) > 1)
        return self.second(h)


def test_a_gradient_of_other_samples_is_found_where_the_losses_are_the_same():
    with pytest.raises(ModelError, match=r"layer 'first': per-sample norms differ"):
        check(OthersInTheGradient(), batch=torch.randn(3, 6))


class StandardisedLosses(nn.Module):
    """Each loss is right up to what the batch decides, and of one sample there is none."""

    def __init__(self, how):
        super().__init__()
        self.first, self.second, self.how = nn.Linear(6, 6), nn.Linear(6, 6), how

    def forward(self, x):
        return self.second(self.first(x))

    def losses(self, model, x):
        found = losses(model, x)
        if self.how == "by their spread":
            return found / found.std().detach()
        return 1e4 + found / len(x)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", ["by their spread", "divided, with an offset"])
@pytest.mark.parametrize("size", [2, 6])
def test_losses_of_a_batch_are_no_kink(precision, how, size):
    for seed in range(5):
        torch.manual_seed(seed)
        model = StandardisedLosses(how)
        with pytest.raises(ModelError, match=r"layer 'first': per-sample norms differ"):
            check(model, losses=model.losses, batch=torch.randn(size, 6), precision=precision)


class Energy(nn.Module):
    """Gives the derivative of a network by its input, as models of forces do."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 1)

    def forward(self, x):
        x = x.detach().requires_grad_()
        energy = self.second(self.first(x).tanh()).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]


def test_a_gradient_taken_in_the_forward_is_named():
    with pytest.raises(ModelError, match="takes a gradient of its own through layer 'second'"):
        check(Energy())


class Reordered(Probe):
    """Its layers see the samples in another order; the first two stay in place."""

    def forward(self, x):
        order = torch.arange(len(x))
        order[2:] = order[2:].flip(0)
        return super().forward(x[order])[order.argsort()]


def test_layers_that_see_samples_in_another_order_are_found_by_all_samples():
    rows, model = torch.randn(5, 6), Reordered().eval()
    with GradNorms(model, ("first", "second"), losses, reduction="layer") as engine:
        engine.check(rows[:2])  # which decides how the weights are served
        with pytest.raises(ModelError, match="differ from those of each sample alone"):
            engine.check(rows)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_batch_that_shows_another_order_is_served_rightly(precision):
    check(Reordered(), batch=torch.randn(5, 6), precision=precision)


class Half(nn.Linear):
    """Does not run in half precision, as LSTMs do not on some processors."""

    def forward(self, x):
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("could not create a primitive")
        return super().forward(x)


def test_a_layer_that_does_not_run_in_half_precision_is_named():
    model = nn.Sequential(Half(6, 6)).eval()
    said = r"Sequential does not run in bfloat16 on cpu \(could not create a primitive\): use "
    with pytest.raises(ModelError, match=said):
        check(model, layers=("0",), precision="bfloat16")
    check(model, layers=("0",))


class Scaled(nn.Module):
    """Has a weight of its own, and gives one number a sample, or a part without numbers too."""

    def __init__(self, form="row"):
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 1)
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.form = form

    def forward(self, x):
        h = self.second(self.first(x).tanh()) * self.scale
        return {"row": lambda: h.squeeze(1), "number": h.squeeze, "part": lambda: (h, h[:, :0])}[
            self.form
        ]()


class FreesItsInput(torch.autograd.Function):
    """May go back once only."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach()
        return x * 2

    @staticmethod
    def backward(ctx, g):
        scale = 2 + 0 * ctx.x
        ctx.x = None
        return g * scale


def of_outputs(model, x):
    found = model(x)
    return (found[0] if isinstance(found, tuple) else found).reshape(len(x), -1).square().sum(1)


@pytest.mark.parametrize("form", ["row", "number", "part"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_outputs_of_any_shape_are_looked_at(form, precision):
    layers = ("first", "second", "scale")
    check(Scaled(form), of_outputs, torch.randn(4, 6), layers, precision)


def test_a_backward_that_may_run_once_is_left_alone():
    def losses(model, x):
        return FreesItsInput.apply(model(x)).square().sum(1)

    check(Probe(), losses, torch.randn(4, 6))


class Gated(nn.Module):
    """Twelve layers, each with a gate of one number, which half precision rounds much."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(12))
        self.gates = nn.ModuleList(nn.Linear(32, 1) for _ in range(12))

    def forward(self, x):
        for layer, gate in zip(self.layers, self.gates, strict=True):
            x = x + gate(x).sigmoid() * layer(x).tanh()
        return x


def test_layers_in_order_keep_their_rules_in_half_precision():
    model, names = Gated().eval(), [f"gates.{i}" for i in range(12)]
    with GradNorms(model, names, losses, reduction="layer", precision="bfloat16") as engine:
        assert engine.slow_layers(torch.randn(8, 32)) == {}
