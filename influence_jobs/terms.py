"""Words that requests, engine and trainer share."""

from typing import Literal

Reduction = Literal["kernel", "channel", "layer"]
Precision = Literal["float32", "float64", "bfloat16"]
