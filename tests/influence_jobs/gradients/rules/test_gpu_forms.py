"""The forms that a GPU takes give what the others give, and each is taken where it is cheaper."""

import pytest
import torch
from torch import nn

from influence_jobs.gradients.rules import blocks, conv, rule_of
from influence_jobs.gradients.rules.blocks import SampleShape

from .test_contract import CASES, close, names, prepared, seen

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CONVOLUTIONS = [
    (layer, shape)
    for layer, shape in [
        *CASES,
        (nn.Conv2d(3, 6, (2, 3), groups=3, stride=(2, 3), dilation=(2, 1)), (3, 8, 9)),
        (nn.Conv1d(4, 4, 3, groups=4, padding="same", padding_mode="reflect"), (4, 7)),
    ]
    if type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=names)
def test_one_grouped_convolution_gives_every_samples_gradient(layer, shape):
    model, batch = prepared(layer, shape)
    rule, a, _, g = seen(model, batch)
    close(rule.grouped_gradient(a, g), rule.weight_gradient(a, g))  # type: ignore[attr-defined]
    found = torch.linalg.vector_norm(rule.grouped_gradient(a, g), dim=2)  # type: ignore[attr-defined]
    close(found, rule.kernel_norms(a, g))


def test_no_convolution_of_a_large_batch_has_more_numbers_than_cuda_takes(monkeypatch):
    layer = nn.Conv2d(2, 4, 3, groups=2, padding=1)
    model, batch = prepared(layer, (2, 5, 6))
    rule, a, _, g = seen(model, batch)
    whole = rule.grouped_gradient(a, g)  # type: ignore[attr-defined]
    sizes, convolve = [], conv.Conv2dRule.convolve

    def noted(x, filters, *how):
        sizes.append(max(x.numel(), filters.numel()))
        return convolve(x, filters, *how)

    monkeypatch.setattr(conv, "_INDEXED", 2 * 4 * 5 * 6 + 1)  # of two samples
    monkeypatch.setattr(conv.Conv2dRule, "convolve", staticmethod(noted))
    close(rule.grouped_gradient(a, g), whole)  # type: ignore[attr-defined]
    assert len(sizes) > 1
    assert max(sizes) < conv._INDEXED


def test_it_is_taken_on_a_gpu_for_groups_of_one_input():
    depthwise, plain = rule_of(nn.Conv2d(4, 8, 3, groups=4)), rule_of(nn.Conv2d(4, 8, 3))
    assert depthwise.by_grouped(GPU)  # type: ignore[attr-defined]
    assert not depthwise.by_grouped(CPU)  # type: ignore[attr-defined]
    assert not plain.by_grouped(GPU)  # type: ignore[attr-defined]


def test_patches_are_copied_on_a_gpu_where_that_is_less_than_reading_again():
    assert blocks.through_patches(SampleShape(625, 64, 3, 9), own=False, device=GPU)
    assert not blocks.through_patches(SampleShape(625, 12, 96, 9), own=False, device=GPU)
