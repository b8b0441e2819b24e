"""Types that requests, engines and the trainer share."""

from typing import Literal

Reduction = Literal["kernel", "channel", "layer"]
Precision = Literal["float32", "float64", "bfloat16"]
OutputLoss = Literal["cross-entropy", "mse", "binary-cross-entropy"]
Region = tuple[int, int, int, int]  # y, x, height, width in pixels
