"""Calibration: which epoch, lambda, solver and number of models predict retrainings best."""

from influence_jobs.kinds.base import Kind
from influence_jobs.kinds.calibrate.spec import CalibrateSpec

KIND = Kind(
    __name__,
    CalibrateSpec,
    panel="Experiments",
    request="CalibrateRequest",
    job="CalibrateJob",
    view="CalibrateView",
    shard_unit="models",
)
