"""Quadratic forms of sample gradients, compared with the formula on float64 gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from influence_jobs.errors import ModelError
from influence_jobs.gradients import GradQuadratics, Metric
from influence_jobs.gradients.reference import gradients_one_by_one


def gradient_of(model, name, losses, batch):
    """Explicit gradients (B, C, J) by [weight, bias], weights flattened as they lie in memory."""
    module = model.get_submodule(name)
    names = [f"{name}.weight"] + (
        [f"{name}.bias"] if getattr(module, "bias", None) is not None else []
    )
    parts = gradients_one_by_one(model, names, losses, batch)
    columns = [part.reshape(len(part), len(module.weight), -1) for part in parts.values()]
    return torch.cat(columns, dim=2) if columns[0].ndim == 3 else columns


def metric_for(module):
    outputs, inputs = len(module.weight), module.weight[0].numel() + (module.bias is not None)
    u_CC = torch.linalg.qr(torch.randn(outputs, outputs, dtype=torch.float64)).Q
    v_JJ = torch.linalg.qr(torch.randn(inputs, inputs, dtype=torch.float64)).Q
    return Metric(u_CC, v_JJ, torch.rand(outputs, inputs, dtype=torch.float64))


def expected_form(gradient_BCJ, metric):
    """Entry by entry, as the definition has it."""
    rotated = torch.einsum("ck,bcj,jl->bkl", metric.outputs_CC, gradient_BCJ, metric.inputs_JJ)
    return torch.einsum("kl,bkl->b", metric.weights_CJ, rotated**2)


def test_identity_is_the_squared_norm_of_weight_and_bias(case):
    metrics = dict.fromkeys(case.layers)
    with GradQuadratics(case.model, metrics, case.losses) as engine:
        found = engine(case.batch)
        engine.check(case.batch)
    assert list(found) == list(case.layers)
    for name, forms_B in found.items():
        own = [f"{name}.{p}" for p, _ in case.model.get_submodule(name).named_parameters()]
        gradients = gradients_one_by_one(case.model, own, case.losses, case.batch)
        expected = sum(g.flatten(1).square().sum(1) for g in gradients.values())
        torch.testing.assert_close(forms_B.double(), expected, rtol=2e-5, atol=0)


def test_metric_in_an_eigenbasis(case):
    kron = [
        name
        for name in case.layers
        if isinstance(case.model.get_submodule(name), nn.Linear | nn.Conv2d)
    ]
    metrics = {name: metric_for(case.model.get_submodule(name)) for name in kron}
    with GradQuadratics(case.model, metrics, case.losses) as engine:
        found = engine(case.batch)
        engine.check(case.batch)
    for name, forms_B in found.items():
        gradient = gradient_of(case.model, name, case.losses, case.batch)
        expected = expected_form(gradient, metrics[name])
        torch.testing.assert_close(forms_B.double(), expected, rtol=2e-5, atol=0)


def test_identity_basis_equals_none(resnet_case):
    """U = V = I and D = 1, given and left out."""
    metrics = {}
    for name in ("stem", "branch", "down", "head"):
        made = metric_for(resnet_case.model.get_submodule(name))
        eye = torch.eye(len(made.outputs_CC)), torch.eye(len(made.inputs_JJ))
        metrics[name] = Metric(*eye, torch.ones_like(made.weights_CJ))
    with GradQuadratics(resnet_case.model, metrics, resnet_case.losses) as engine:
        given_forms = engine(resnet_case.batch)
    with GradQuadratics(resnet_case.model, dict.fromkeys(metrics), resnet_case.losses) as engine:
        for name, forms_B in engine(resnet_case.batch).items():
            torch.testing.assert_close(given_forms[name], forms_B, rtol=1e-5, atol=0)


def weighted_sum(model, batch):
    x, weights = batch
    return (model(x).sin() * weights).flatten(1).sum(1)


@settings(max_examples=60, deadline=None)
@given(
    groups=st.sampled_from([1, 2]),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    basis=st.booleans(),
)
def test_conv2d_geometry(groups, kernel, stride, padding, dilation, bias, basis):
    conv = nn.Conv2d(2 * groups, 3 * groups, kernel, stride, padding, dilation, groups, bias=bias)
    model = nn.Sequential(conv.double()).eval()
    x = torch.randn(2, 2 * groups, 6, 7, dtype=torch.float64)
    batch = x, torch.randn_like(model(x))
    metric = metric_for(conv) if basis else None
    with GradQuadratics(model, {"0": metric}, weighted_sum, precision="float64") as engine:
        found = engine(batch)["0"]
    gradient = gradient_of(model, "0", weighted_sum, batch)
    expected = expected_form(gradient, metric) if metric else gradient.square().sum((1, 2))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(6), nn.GroupNorm(2, 6)])
def test_normalisation_layers_with_positions(layer):
    model = nn.Sequential(layer.double()).eval()
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    batch = x, torch.randn_like(x)
    gradients = gradients_one_by_one(model, ["0.weight", "0.bias"], weighted_sum, batch)
    with GradQuadratics(model, {"0": None}, weighted_sum, precision="float64") as engine:
        expected = sum(g.square().sum(1) for g in gradients.values())
        torch.testing.assert_close(engine(batch)["0"], expected)


def test_bfloat16(case):
    with GradQuadratics(
        case.model, dict.fromkeys(case.layers), case.losses, precision="bfloat16"
    ) as engine:
        engine.check(case.batch)


def test_a_weight_used_twice_and_an_axis_as_long_as_the_batch_are_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return nn.functional.linear(self.layer(x), self.layer.weight)

    torch.manual_seed(0)
    model = Twice().eval()
    with (
        GradQuadratics(model, {"layer": None}, lambda m, x: m(x).sin().sum(1)) as engine,
        pytest.raises(
            ModelError, match=r"^layer 'layer' has no quadratic forms, because its weights are"
        ),
    ):
        engine(torch.randn(3, 6))

    class PositionsFirst(Twice):
        def forward(self, x):
            return self.layer(x.transpose(0, 1)).transpose(0, 1)

    model = PositionsFirst().eval()
    with (
        GradQuadratics(model, {"layer": None}, lambda m, x: m(x).sin().sum((1, 2))) as engine,
        pytest.raises(ModelError, match="the first axis of its output is not the sample"),
    ):
        engine(torch.randn(3, 3, 6))


def test_refusals(resnet_case):
    def refused(message, metrics, model=resnet_case.model):
        flags = [p.requires_grad for p in model.parameters()]
        with pytest.raises(ModelError, match=message) as caught:
            GradQuadratics(model, metrics, resnet_case.losses)
        assert "\n" not in str(caught.value)
        assert [p.requires_grad for p in model.parameters()] == flags

    head = metric_for(resnet_case.model.head)
    refused("no layer was named", {})
    refused("no layer 'fc'", {"fc": None})
    refused(r"layer 'norm' \(BatchNorm2d\) has no Kronecker eigenbasis", {"norm": head})
    refused("layer 'stem': a metric of shapes .* does not fit", {"stem": head})
    negative = Metric(head.outputs_CC, head.inputs_JJ, -head.weights_CJ)
    refused("layer 'head': its metric has NaN, infinity or negative", {"head": negative})
    refused(
        "layer '0' .* no gradient rule; supported: .*GroupNorm",
        {"0": None},
        nn.Sequential(nn.ReLU(), nn.Linear(2, 2)).eval(),
    )
