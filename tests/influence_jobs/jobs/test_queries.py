"""What is refused of queries by every kind of run that measures them."""

from pathlib import Path
from typing import Any

import pytest
from digits import DigitsTask
from torch import Tensor, nn
from torch.nn import functional as F

import influence_jobs
from influence_jobs import Batch


class DropsAlways(DigitsTask):
    """Dropout as a function, which eval mode does not switch off."""

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.dropout(super().outputs(model, batch), 0.1)


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
            kind, task=DropsAlways(width=2), epochs=1, test=3, runs=tmp_path, quiet=True, **asked
        )
