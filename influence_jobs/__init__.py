"""Training-data attribution: which training samples did this output of a network come from?"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infl_cluster.submit import submit
    from influence_jobs.contract import check
    from influence_jobs.curvature import (
        ConjugateGradient,
        EkFac,
        GaussNewton,
        Hessian,
        Identity,
        Lissa,
        Operator,
        Solution,
        Solver,
    )
    from influence_jobs.errors import InflError
    from influence_jobs.gradients import GradDots, GradNorms, GradQuadratics
    from influence_jobs.gradients.parameters import ParameterSpace
    from influence_jobs.report.results import Results, open_run
    from influence_jobs.store.run import Run
    from influence_jobs.tasks.base import Batch, Draw, Task
    from influence_jobs.tasks.seen import Sound, Text
    from influence_jobs.terms import Region
    from influence_jobs.training.recorder import Recorder

# The one place that names the version; pyproject.toml and the records of runs read it.
__version__ = "0.2.0"

_HOMES = {
    "influence_jobs.contract": ("check",),
    "influence_jobs.tasks.base": ("Batch", "Draw", "Task"),
    "influence_jobs.tasks.seen": ("Sound", "Text"),
    "influence_jobs.terms": ("Region",),
    "influence_jobs.gradients": ("GradDots", "GradNorms", "GradQuadratics"),
    "influence_jobs.gradients.parameters": ("ParameterSpace",),
    "influence_jobs.curvature": (
        "ConjugateGradient",
        "EkFac",
        "GaussNewton",
        "Hessian",
        "Identity",
        "Lissa",
        "Operator",
        "Solution",
        "Solver",
    ),
    "influence_jobs.errors": ("InflError",),
    "influence_jobs.report.results": ("Results", "open_run"),
    "influence_jobs.store.run": ("Run",),
    "influence_jobs.training.recorder": ("Recorder",),
    "infl_cluster.submit": ("submit",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Batch",
    "ConjugateGradient",
    "Draw",
    "EkFac",
    "GaussNewton",
    "GradDots",
    "GradNorms",
    "GradQuadratics",
    "Hessian",
    "Identity",
    "InflError",
    "Lissa",
    "Operator",
    "ParameterSpace",
    "Recorder",
    "Region",
    "Results",
    "Run",
    "Solution",
    "Solver",
    "Sound",
    "Task",
    "Text",
    "check",
    "open_run",
    "submit",
]


def __getattr__(name: str) -> Any:
    # Loaded on demand: processes that only watch others must not load torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        from influence_jobs.extras import missing_extra

        raise missing_extra(error) or error from None


def __dir__() -> list[str]:
    return [*__all__]
