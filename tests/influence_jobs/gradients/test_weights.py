"""Which parameters of a module are weights, and which are biases."""

import pytest
import torch
from torch import nn

from influence_jobs.gradients.weights import own_weights


class Named(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.zeros(2, 2)))


@pytest.mark.parametrize(
    ("module", "weights"),
    [
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), ["in_proj_weight"]),
        (nn.GRUCell(2, 3), ["weight_ih", "weight_hh"]),
        (
            nn.LSTM(2, 3, bidirectional=True, proj_size=2),
            [f"weight_{w}_l0{way}" for way in ("", "_reverse") for w in ("ih", "hh", "hr")],
        ),
        (Named("b", "b1", "out_b", "bias_l0", "w"), ["w"]),
        # Of torchvision's Swin.
        (Named("relative_position_bias_table"), ["relative_position_bias_table"]),
        (Named("debias", "bias_scale"), ["debias", "bias_scale"]),
    ],
)
def test_biases_are_told_by_their_names(module: nn.Module, weights: list[str]) -> None:
    assert own_weights(module) == weights
