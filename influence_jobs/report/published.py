"""What the report found and how it numbers it: "Inner workings of a denoising network", to print beside what we find."""

import numpy as np
import numpy.typing as npt

TESTS = (3520, 3879, 597, 2667, 5673, 8616, 5570, 9489, 3714, 7362)
TOP = 100
TABLES = {"attribution": "4.1", "helpful": "4.2", "harmful": "4.3"}
FIGURES = {
    "nodes": "4.1",
    "top-attribution": "4.2",
    "top-helpful": "4.3",
    "top-harmful": "4.4",
    "seeds-attribution": "4.5",
    "seeds-helpful": "4.6",
    "seeds-harmful": "4.7",
    "ablation-attribution": "4.8",
    "ablation-helpful": "4.9",
    "ablation-harmful": "4.10",
}
NORM_LIMIT = 5.0  # section 4.2.2: samples of a larger norm count as outliers
SETTLED_LAYER = {"ffdnet": "main.29", "ffdnet-grey": "main.38"}  # the one before the last

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


STABILITY = {
    "attribution": _read(_ATTRIBUTION),
    "helpful": _read(_HELPFUL),
    "harmful": _read(_HARMFUL),
}
# Checked in the original code: first gradients without create_graph, and lists joined where a mean was meant.
OTHER_QUANTITY = (
    "The report's numbers are of something else: its code differentiated the test gradient's graph where the "
    "Hessian of the training loss was meant, and joined its repeats where it meant their mean."
)
