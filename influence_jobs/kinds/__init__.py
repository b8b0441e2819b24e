"""All kinds of runs. Each folder in this package is a kind; there is no other list of them."""

import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from influence_jobs.errors import SpecError
from influence_jobs.kinds.base import Kind
from influence_jobs.specs.base import Spec

if TYPE_CHECKING:
    from influence_jobs.jobs.base import Job
    from influence_jobs.store.run import Run
    from influence_jobs.views.base import View


@cache
def kinds() -> Mapping[str, Kind]:
    """The kinds by name."""
    folders = [module.name for module in pkgutil.iter_modules(__path__) if module.ispkg]
    found: list[Kind] = [import_module(f"{__name__}.{folder}").KIND for folder in folders]
    return {kind.name: kind for kind in found}


def kind_of(spec: Spec) -> Kind:
    """The kind of a spec."""
    return kinds()[spec.kind]


def find_kind(name: str) -> Kind:
    """The kind of this name.

    Raises:
        SpecError: There is no such kind.
    """
    if not isinstance(name, str) or name not in kinds():
        raise SpecError(f"there is no kind of run {name!r}; there are {', '.join(kinds())}")
    return kinds()[name]


def open_job(run: "Run", *, device: str = "cpu", batch_size: int | None = None) -> "Job[Any]":
    """The job that computes a run."""
    import torch  # late, so that requests and --help are fast

    job = kind_of(run.spec).job_type
    return job(run, device=torch.device(device), batch_size=batch_size)


def missing_inputs(run: "Run") -> list["Run"]:
    """The runs that must be carried out before this one, in the order of their dependencies.

    Raises:
        StoreError: A run's folder is damaged.
    """
    from influence_jobs.store.run import Run
    from influence_jobs.store.status import is_done

    missing: dict[str, Run] = {}
    for spec in kind_of(run.spec).job_type.inputs(run.spec):
        needed = Run(run.root, spec)
        if needed.id not in missing and not is_done(needed):
            missing |= {other.id: other for other in (*missing_inputs(needed), needed)}
    return [*missing.values()]


def view_of(run: "Run") -> "View[Any]":
    """The view of a run."""
    return kind_of(run.spec).view_type(run)
