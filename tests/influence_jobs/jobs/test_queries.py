"""What is refused of queries by every kind of run that measures them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from digits import DigitsTask
from torch import Tensor, nn

import influence_jobs
from influence_jobs import Batch


class NoisyAlways(DigitsTask):
    """Noise that eval mode does not switch off, as of dropout that is called as a function.

    The untrained model does not show it, since its last layer gives zeros.
    """

    def model(self) -> nn.Module:
        model = super().model()
        for parameter in model.get_submodule("head").parameters():
            nn.init.zeros_(parameter)
        return model

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = super().outputs(model, batch)
        return logits * (1 + 0.1 * torch.randn_like(logits))


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        ("ablation", {"by": "random", "mode": "remove", "k": 10}),
        ("unrolled", {}),
        ("s-test", {"solver": "identity"}),
    ],
)
def test_a_quantity_that_each_pass_measures_anew_is_refused(
    kind: str, asked: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(influence_jobs.InflError, match="switch dropout off in eval mode"):
        influence_jobs.submit(
            kind, task=NoisyAlways(width=2), epochs=1, test=3, runs=tmp_path, quiet=True, **asked
        )


class CountsRight(DigitsTask):
    quantities = ("loss", "correct")

    def measure(
        self, model: nn.Module, batch: Batch, quantity: str = "loss", region: Any = None
    ) -> Tensor:
        if quantity == "loss":
            return super().measure(model, batch, quantity, region)
        return self.outputs(model, batch).argmax(1) == self.targets(batch)


def test_a_quantity_may_be_a_truth_value(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"by": "random", "mode": "remove", "k": 10, "quantity": "correct"}
    asked |= {"task": CountsRight(width=2), "epochs": 1, "test": [3, 4]}
    run = influence_jobs.submit("ablation", runs=tmp_path, quiet=True, **asked)
    assert set(run["losses"].values.ravel()) <= {0, 1}
