"""Training-data attribution: which training examples did this output of a network come from?"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from influence_jobs.errors import InflError
    from influence_jobs.gradients import GradNorms
    from influence_jobs.report.results import Results, open_run
    from influence_jobs.store.run import Run
    from influence_jobs.tasks.base import Batch, Draw, Task

__all__ = ["Batch", "Draw", "GradNorms", "InflError", "Results", "Run", "Task", "open_run"]

_HOMES = {
    "Batch": "tasks.base",
    "Draw": "tasks.base",
    "GradNorms": "gradients",
    "InflError": "errors",
    "Results": "report.results",
    "Run": "store.run",
    "Task": "tasks.base",
    "open_run": "report.results",
}


def __getattr__(name: str) -> Any:
    # On demand: processes that only watch others must not load torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        from influence_jobs.extras import missing_extra

        raise missing_extra(error) or error from None
