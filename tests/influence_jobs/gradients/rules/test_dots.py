"""Dot products of each rule: its layer's options, both orders, whole and in blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from influence_jobs.gradients import GradDots, ParameterSpace
from influence_jobs.gradients.reference import gradients_one_by_one
from influence_jobs.gradients.rules import blocks, conv, linear


def weighted_sum(model, batch):
    x, weights = batch
    return (model(x).sin() * weights).flatten(1).sum(1)


def check_layer(layer, x, queries):
    """Compare one float64 layer with explicit gradients, with a random gradient at its output."""
    model = nn.Sequential(layer.double()).eval()
    batch = (x, torch.randn_like(model(x)))
    space = ParameterSpace(model)
    v_QP = torch.randn(queries, space.size, dtype=torch.float64)
    gradients = gradients_one_by_one(model, list(space.shapes), weighted_sum, batch)
    with GradDots(model, space, weighted_sum, v_QP, precision="float64") as engine:
        found = engine.total(batch)
        assert list(engine._layers) == ["0"]
    torch.testing.assert_close(found, space.join(gradients) @ v_QP.t(), rtol=1e-9, atol=1e-9)


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def convolutions(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    stride, dilation = draw(pairs), draw(pairs)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding = draw(
        st.one_of(st.tuples(*[st.integers(0, 2)] * 2), st.sampled_from(["same", "valid"]))
    )
    if padding == "same":
        stride = (1, 1)
    # Large enough for the kernel, and for `reflect`, which may not pad by the size or more.
    size = [
        max(d * (k - 1) + 1 + draw(st.integers(0, 6)), 3)
        for d, k in zip(dilation, kernel, strict=True)
    ]
    conv = nn.Conv2d(
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 3)),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )
    return conv, torch.randn(draw(st.integers(1, 3)), conv.in_channels, *size, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@settings(max_examples=120, deadline=None)
@given(made=convolutions(), queries=st.sampled_from([1, 2, 7]), channels_last=st.booleans())
def test_conv2d_geometry(made, queries, channels_last):
    conv, x = made
    check_layer(conv, x.to(memory_format=torch.channels_last) if channels_last else x, queries)


LAYERS = [
    (nn.Linear(5, 3), (4, 5)),
    (nn.Linear(3, 5, bias=False), (4, 3)),
    (nn.Linear(3, 5), (4, 6, 3)),
    (nn.Linear(5, 3), (4, 2, 3, 5)),
    (nn.Conv2d(4, 6, 3, groups=2), (4, 4, 6, 5)),
    (nn.BatchNorm1d(3), (4, 3)),
    (nn.BatchNorm1d(3), (4, 3, 5)),
    (nn.BatchNorm2d(3), (4, 3, 5, 2)),
    (nn.LayerNorm(3), (4, 3)),
    (nn.LayerNorm((5, 3), bias=False), (4, 2, 5, 3)),
    (nn.GroupNorm(2, 6), (4, 6)),
    (nn.GroupNorm(3, 6, eps=0.1), (4, 6, 2, 3)),
]


@pytest.mark.parametrize("queries", [1, 10])
@pytest.mark.parametrize("block", [1, 2**21])
@pytest.mark.parametrize("layer,shape", LAYERS, ids=lambda value: str(value).partition("(")[0])
def test_layers_whole_and_in_blocks(layer, shape, queries, block, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(blocks, "_BLOCK_CPU", block)
    monkeypatch.setattr(blocks, "_FEWEST_SAMPLES", 3)
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        nn.init.normal_(layer.running_mean)
        nn.init.uniform_(layer.running_var, 0.5, 2)
    check_layer(layer, torch.randn(shape, dtype=torch.float64), queries)


@pytest.mark.parametrize("shape", [(4,), (4, 6), (4, 2, 3)])
@pytest.mark.parametrize("padding", [None, 1])
def test_embedding(shape, padding):
    torch.manual_seed(0)
    check_layer(nn.Embedding(5, 3, padding_idx=padding), torch.randint(0, 5, shape), 4)


@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize(
    "layer,shape",
    [
        (nn.Linear(5, 3), (4, 5)),
        (nn.Linear(3, 5), (4, 6, 3)),
        (nn.Conv2d(4, 6, 3, stride=2, groups=2, padding=1, padding_mode="reflect"), (4, 4, 6, 5)),
        (nn.Conv2d(2, 3, (2, 1), dilation=2), (4, 2, 5, 5)),
    ],
)
def test_both_orders(layer, shape, through, monkeypatch):
    torch.manual_seed(0)
    for rules in (conv, linear):
        monkeypatch.setattr(rules, "through_gradient", lambda positions, vectors: through)
    check_layer(layer, torch.randn(shape, dtype=torch.float64), 3)


def test_the_cheaper_order_is_chosen():
    assert not blocks.through_gradient(1, 1000)  # one position: the gradient is an outer product
    assert not blocks.through_gradient(625, 1)
    assert blocks.through_gradient(625, 10)
    assert blocks.through_gradient(8, 10)
