"""A kind of run: one folder with its spec, request, job and view."""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from influence_jobs.specs.base import Spec

if TYPE_CHECKING:
    from influence_jobs.jobs.base import Job
    from influence_jobs.requests.base import Request
    from influence_jobs.views.base import View


#: Headings under which the command line lists the kinds, in its order.
Panel = Literal["Training", "Norms and scores", "Experiments"]


@dataclass(frozen=True)
class Kind:
    """The classes of one kind of run. They are loaded on first use.

    Args:
        folder: The package with the modules `spec`, `request`, `job` and `view`.
        spec: Class of its specs.
        panel: Heading under which the command line lists it.
        request: Name of the class in `request` that turns options into specs. It loads without
            torch.
        job: Name of the class in `job` that computes.
        view: Name of the class in `view` that shows results.
        shard_unit: The items of a shard whose number the user may choose; None if there is no
            choice.
        batched: Whether samples pass through the model in batches whose size the user may choose.
        workers: Whether its work, or the work of the runs it needs, spreads over workers.
        here: Whether it is carried out where it is submitted, because it reads files that workers
            may not have.
    """

    folder: str
    spec: type[Spec]
    panel: Panel
    request: str
    job: str
    view: str
    shard_unit: Literal["samples", "models"] | None = None
    batched: bool = False
    workers: bool = True
    here: bool = False

    @property
    def name(self) -> str:
        """The name in commands and run ids, e.g. `grad-norms`."""
        return str(self.spec.model_fields["kind"].default)

    @property
    def request_type(self) -> "type[Request]":
        """The class of its requests."""
        found: type[Request] = self._load("request", self.request)
        return found

    @property
    def job_type(self) -> "type[Job[Any]]":
        """The class of its jobs."""
        found: type[Job[Any]] = self._load("job", self.job)
        return found

    @property
    def view_type(self) -> "type[View[Any]]":
        """The class of its views."""
        found: type[View[Any]] = self._load("view", self.view)
        return found

    def _load(self, module: str, name: str) -> Any:
        return getattr(import_module(f"{self.folder}.{module}"), name)
