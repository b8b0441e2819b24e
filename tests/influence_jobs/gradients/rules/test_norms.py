"""Norms of Conv2d over all its options, and shapes and edge cases of single rules."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from influence_jobs.errors import ModelError
from influence_jobs.gradients import GradNorms, norm_shape, reduce_gradient, supported
from influence_jobs.gradients.reference import per_sample_gradients
from influence_jobs.gradients.rules import base
from influence_jobs.gradients.rules import conv as convolution_rules


def weighted_sum(model, batch):
    x, weights = batch
    return (model(x).sin() * weights).flatten(1).sum(1)


def check_layer(layer, x, reduction="kernel"):
    """Compare one float64 layer with the reference, with a random gradient at its output."""
    model = nn.Sequential(layer.double()).eval()
    batch = (x, torch.randn_like(model(x)))
    (gradient,) = per_sample_gradients(model, ["0"], weighted_sum, batch).values()
    with GradNorms(model, ["0"], weighted_sum, reduction=reduction, precision="float64") as engine:
        found = engine(batch)["0"]
    expected = reduce_gradient(layer, gradient, reduction)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


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
    span = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    # Large enough for the kernel, and for `reflect`, which may not pad by the size or more.
    size = [s + draw(st.integers(0, 6)) for s in span]
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
    size = [max(s, 3) for s in size]
    return conv, torch.randn(draw(st.integers(1, 3)), conv.in_channels, *size, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("large_from", [0, convolution_rules._LARGE_CONVOLUTION])
@settings(max_examples=150, deadline=None)
@given(
    made=convolutions(),
    reduction=st.sampled_from(["kernel", "channel", "layer"]),
    channels_last=st.booleans(),
)
def test_conv2d_geometry(large_from, made, reduction, channels_last):
    conv, x = made
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    with pytest.MonkeyPatch.context() as patch:  # of the other forms see test_forms.py
        patch.setattr(convolution_rules, "_LARGE_CONVOLUTION", large_from)
        patch.setattr(convolution_rules, "through_patches", lambda *_, **__: False)
        patch.setattr(base, "through_gram", lambda *_, **__: False)
        check_layer(conv, x, reduction)


def test_a_large_convolution_is_the_same_whatever_the_batch():
    conv = nn.Conv2d(32, 64, 3, padding=1).eval()
    x = torch.randn(5, 32, 20, 20)
    assert conv.weight.numel() * 400 >= convolution_rules._LARGE_CONVOLUTION
    weights = torch.randn(5, 64, 20, 20)
    with GradNorms(nn.Sequential(conv).eval(), ["0"], weighted_sum, reduction="kernel") as engine:
        together = engine((x, weights))["0"]
        apart = [engine(part)["0"] for part in zip(x.split(2), weights.split(2), strict=True)]
    torch.testing.assert_close(together, torch.cat(apart))


def test_linear_with_tiny_gradients_does_not_underflow():
    """The closed form multiplies norms: their squares would underflow in float32."""
    model = nn.Sequential(nn.Linear(3, 2)).eval()
    with GradNorms(
        model, ["0"], lambda model, x: model(x).sum(1) * 1e-25, reduction="channel"
    ) as engine:
        norms = engine(torch.ones(1, 3))["0"]
    torch.testing.assert_close(norms, torch.full((1, 2), 3**0.5 * 1e-25), rtol=1e-5, atol=0)


def test_embedding_adds_repeated_rows_before_the_norm():
    embedding = nn.Embedding(4, 1, padding_idx=3)
    model = nn.Sequential(embedding).eval()
    signs = torch.tensor([1.0, -1.0, 2.0, 5.0])

    def losses(model, ids):
        return (model(ids).squeeze(2) * signs).sum(1)

    with GradNorms(model, ["0"], losses, reduction="channel") as engine:
        norms = engine(torch.tensor([[0, 0, 1, 3], [2, 1, 2, 2]]))["0"]
    assert norms.tolist() == [[0, 2, 0, 0], [0, 1, 8, 0]]


def test_embedding_of_one_id_a_sample():
    model = nn.Sequential(nn.Embedding(3, 4)).eval()
    with GradNorms(model, ["0"], lambda m, ids: m(ids).sum(1), reduction="channel") as engine:
        assert engine(torch.tensor([2, 0])).popitem()[1].tolist() == [[0, 0, 2], [2, 0, 0]]


@pytest.mark.parametrize(
    "layer,kernel",
    [
        (nn.Conv2d(4, 6, (3, 2), groups=2), (6, 3, 2)),
        (nn.Linear(5, 7), (7, 1, 1)),
        (nn.Conv1d(4, 6, 3, groups=2), (6, 3)),
        (nn.BatchNorm1d(3), (3, 1, 1)),
        (nn.BatchNorm2d(3), (3, 1, 1)),
        (nn.GroupNorm(2, 4), (4, 1, 1)),
        (nn.LayerNorm((4, 5)), (20, 1, 1)),
        (nn.Embedding(8, 3), (8, 1, 1)),
    ],
)
def test_norm_shape(layer, kernel):
    assert supported(layer)
    assert norm_shape(layer, "kernel") == kernel
    assert norm_shape(layer, "channel") == kernel[:1]
    assert norm_shape(layer, "layer") == ()


def test_norm_shape_refuses_unsupported_types():
    assert not supported(nn.LSTM(1, 1))
    with pytest.raises(ModelError, match=r"type LSTM; supported: .*Conv1D, Conv1d, Conv2d.*Linear"):
        norm_shape(nn.LSTM(1, 1), "layer")
