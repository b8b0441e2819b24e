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
    """Where the pieces of one kind of run are; they are loaded when they are asked for.

    Args:
        folder: The package that holds `spec`, `request`, `job` and `view`.
        spec: What can be asked for.
        panel: Heading under which the command line lists it.
        request: Class in `request`: the options of command line and Python, and how a spec is made
            of them. It loads without torch.
        job: Class in `job` that computes.
        view: Class in `view` that people see.
        shard_unit: What a shard has several of, if the user may say how many.
        batched: Samples pass through the model in batches, whose size the user may choose.
        workers: Its work, or that of the runs it needs, spreads over workers.
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

    @property
    def name(self) -> str:
        """As commands and run ids have it, e.g. `grad-norms`."""
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
