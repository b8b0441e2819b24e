"""Results of the research report, printed beside ours.

The research report is "Inner workings of a denoising network", here sections 4.1 (MNIST) and 4.2
(FFDNet).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Published:
    """What the research report says about one task.

    Attributes:
        section: Number of the section.
        quick_epochs: Epochs of a training that takes minutes.
        quick_samples: Training samples for that training; None for all.
        tests: Test ids that the research report explains.
        top: Number of best samples that are compared between trainings.
        stability: By method, the share of the top samples found again in another training:
            trainings (rows), tests (columns).
        stability_tables: By method, the number of that table in the research report.
        norm_limit: A sample whose norm, summed over a training, is larger counts as an outlier.
        settled_layer: The layer whose norms explain best: the one before the last.
    """

    section: str
    quick_epochs: int
    quick_samples: int | None = None
    tests: tuple[int, ...] = ()
    top: int = 0
    stability: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    stability_tables: Mapping[str, str] = field(default_factory=dict)
    norm_limit: float | None = None
    settled_layer: str | None = None


# Per cent of the top 100 shared with seed 0: five retrainings (rows), ten test images (columns).
_ATTRIBUTION = """
61 65 55 48 53 65 45 63 61 66
60 67 57 54 57 55 53 64 64 62
62 65 60 52 57 54 54 67 64 67
63 64 55 56 62 60 54 63 58 65
65 61 48 52 55 54 48 65 61 68
"""
_HELPFUL = """
7 8 21 31 25 14 21 15 28 44
16 1 11 0 0 3 4 1 1 1
18 8 0 4 0 0 3 3 0 28
15 12 40 27 1 16 1 5 34 44
14 7 1 0 0 9 2 23 1 3
"""
_HARMFUL = """
24 7 21 26 23 14 27 32 10 29
26 8 12 0 0 12 8 3 3 1
17 10 1 21 0 0 15 3 4 23
47 17 36 21 0 19 20 12 20 18
10 7 4 1 0 19 12 38 1 3
"""


def _read(text: str) -> npt.NDArray[np.float64]:
    return np.array([line.split() for line in text.split("\n") if line], dtype=np.float64) / 100


MNIST = Published(
    section="4.1",
    quick_epochs=2,
    tests=(3520, 3879, 597, 2667, 5673, 8616, 5570, 9489, 3714, 7362),
    top=100,
    stability={
        "attribution": _read(_ATTRIBUTION),
        "helpful": _read(_HELPFUL),
        "harmful": _read(_HARMFUL),
    },
    stability_tables={"attribution": "4.1", "helpful": "4.2", "harmful": "4.3"},
)
FFDNET = Published(
    section="4.2", quick_epochs=3, quick_samples=1000, norm_limit=5.0, settled_layer="main.29"
)
FFDNET_GREY = Published(
    section="4.2", quick_epochs=3, quick_samples=1000, norm_limit=5.0, settled_layer="main.38"
)
# Seen in the original code: first gradients without create_graph, and lists joined, not averaged.
OTHER_QUANTITY = (
    "The numbers of the research report are of another quantity: its code differentiated the graph "
    "of the test gradient instead of applying the Hessian of the training loss, and concatenated "
    "its repeats instead of averaging them."
)
