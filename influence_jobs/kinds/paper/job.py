"""A set of runs that is carried out as one."""

from collections.abc import Iterator

from influence_jobs.jobs.base import Job, Plan, Progress, Result, Shard
from influence_jobs.kinds.paper.spec import PaperSpec
from influence_jobs.specs.base import AnySpec
from influence_jobs.store.run import Run


class PaperJob(Job[PaperSpec]):
    """A job without shards: the runs of the set are its inputs."""

    spec_type = PaperSpec
    reads_data = False

    @property
    def title(self) -> str:
        return f"paper {self.spec.task.slug}"

    @staticmethod
    def inputs(spec: PaperSpec) -> tuple[AnySpec, ...]:
        return spec.parts

    def input_digests(self) -> dict[str, str]:
        root = self.run_store.root
        return {member.run_id: Run(root, member).digest() for member in self.spec.parts}

    def plan(self, shard_rows: int | None = None) -> Plan:
        return Plan((), (), units=0, batch_size=self.batch_size)

    def run(self, shard: Shard, progress: Progress) -> Result:
        raise AssertionError("a paper run has no shards")

    def probe(self) -> Iterator[int]:
        yield 0
