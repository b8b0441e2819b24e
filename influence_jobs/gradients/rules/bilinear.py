"""Rule of Bilinear."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from influence_jobs.gradients.rules.base import LayerRule


class BilinearRule(LayerRule[nn.Bilinear]):
    """I runs over the pairs of an input of the first and one of the second."""

    layer = nn.Bilinear

    def recorded(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Both inputs, side by side."""
        names = ("input1", "input2")
        return torch.cat([*args, *(kwargs[name] for name in names[len(args) :])], dim=-1)

    def weight_gradient(self, a: Tensor, g: Tensor) -> Tensor:
        sizes = [self.module.in1_features, self.module.in2_features]
        first, second = torch.split(a.reshape(len(a), -1, sum(sizes)), sizes, dim=-1)
        g_BTC = g.reshape(len(g), -1, self.module.out_features)
        return torch.einsum("btc,bti,btj->bcij", g_BTC, first, second)

    def bias_gradient(self, g: Tensor) -> Tensor:
        return g.reshape(len(g), -1, self.module.out_features).sum(1)
