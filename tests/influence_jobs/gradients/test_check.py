"""The engine's self-check finds faults that an inspection of the modules cannot find."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from influence_jobs.errors import ModelError
from influence_jobs.gradients import GradNorms
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
    with pytest.raises(ModelError, match=r"layer 'first': per-sample norms differ .* usual causes"):
        check(Probe(fault))


def test_a_use_outside_the_layer_is_counted():
    model = Probe("functional use").eval()
    with GradNorms(model, ["first", "second"], losses, reduction="channel") as engine:
        engine.check(torch.randn(5, 6))
        assert list(engine.slow_layers(torch.randn(5, 6))) == ["first"]


def test_losses_divided_by_the_batch_size():
    with pytest.raises(ModelError, match=r"differ from one-sample autograd by 5\.0e-01"):
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
        ModelError, match="have length 2: the batch cannot be cut into samples, it must"
    ):
        check(Probe(), losses=lambda model, batch: losses(model, batch.x), batch=Opaque())


def test_weights_stay_frozen_after_a_failure():
    model = Probe("batch statistics").eval()
    with GradNorms(model, ["first"], losses, reduction="layer") as engine:
        with pytest.raises(ModelError):
            engine.check(torch.randn(2, 6))
        assert not any(p.requires_grad for p in model.parameters())
