"""Finished runs of every kind, and a browser to open pages in."""

import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image
from playwright.sync_api import Browser, Page

from infl_cluster.driver import drive
from infl_cluster.inline import InlineBackend
from influence_jobs.kinds.ablation.spec import AblationSpec
from influence_jobs.kinds.attribution.spec import AttributionSpec
from influence_jobs.kinds.baseline.spec import BaselineSpec
from influence_jobs.kinds.grad_norms.spec import GradNormsSpec
from influence_jobs.kinds.influence.spec import InfluenceSpec
from influence_jobs.kinds.lds.spec import LdsSpec
from influence_jobs.kinds.paper.spec import PaperSpec
from influence_jobs.kinds.s_test.spec import STestSpec
from influence_jobs.kinds.stability.spec import StabilitySpec
from influence_jobs.kinds.train.spec import TrainedCheckpoint
from influence_jobs.models.ffdnet import FFDNet
from influence_jobs.report.viewer import make_viewer
from influence_jobs.specs.base import AnySpec, TaskSpec
from influence_jobs.specs.queries import Queries, Query
from influence_jobs.specs.rankings import Ranking
from influence_jobs.specs.solvers import IdentitySettings
from influence_jobs.store.checkpoints import file_checkpoint
from influence_jobs.store.run import Run
from influence_jobs.tasks.registry import make_task

sys.path.insert(0, str(Path(__file__).parent))  # many_kinds


@dataclass(frozen=True)
class Runs:
    """One finished run of each kind, of the example task."""

    train: Run
    norms: Run
    s_test: Run
    influence: Run
    attribution: Run
    random: Run
    stability: Run
    ablation: Run
    lds: Run
    paper: Run


def _done(root: Path, spec: AnySpec) -> Run:
    run = Run.create(str(root), spec)
    drive(run.root, run.id, InlineBackend())
    return run


@pytest.fixture(scope="session")
def runs_of_all_kinds(
    tmp_path_factory: pytest.TempPathFactory, trained_root: Path, grad_norms_spec: GradNormsSpec
) -> Runs:
    root = tmp_path_factory.mktemp("report") / "runs"
    shutil.copytree(trained_root, root)
    task, checkpoint = grad_norms_spec.task, grad_norms_spec.checkpoints[0]
    assert isinstance(checkpoint, TrainedCheckpoint)
    queries = Queries(items=tuple(Query(test=test) for test in (5, 0, 111)))

    def s_test_of(point: TrainedCheckpoint) -> STestSpec:
        return STestSpec(
            task=task,
            checkpoint=point,
            modules=("conv1", "conv2", "head"),
            queries=queries,
            solver=IdentitySettings(),
        )

    def influence_of(point: TrainedCheckpoint) -> InfluenceSpec:
        return InfluenceSpec(task=task, s_tests=(s_test_of(point),))

    other_train = checkpoint.train.model_copy(update={"seed": 1})
    other = TrainedCheckpoint(train=other_train, epoch=checkpoint.epoch)
    influence = influence_of(checkpoint)
    attribution = AttributionSpec(
        task=task,
        norms=grad_norms_spec,
        checkpoint=checkpoint,
        layers=("conv2",),
        queries=queries,
    )
    random = BaselineSpec(task=task, method="random", queries=queries)
    helpful = Ranking(name="helpful", scores=(influence,))
    stability = StabilitySpec(
        task=task,
        methods=((helpful, Ranking(name="helpful", scores=(influence_of(other),))),),
        top=20,
    )
    ablation = AblationSpec(
        task=task,
        recipe=checkpoint.train,
        rankings=(helpful, Ranking(name="random", scores=(random,))),
        sizes=(20, 300),
        modes=("relabel", "remove"),
    )
    lds = LdsSpec(task=task, recipe=checkpoint.train, rankings=(helpful,), subsets=4)
    parts = (checkpoint.train, grad_norms_spec, influence, attribution, stability, ablation)
    paper = PaperSpec(task=task, parts=parts)
    return Runs(
        train=Run.open(str(root), checkpoint.train.run_id),
        paper=_done(root, paper),
        norms=Run.open(str(root), grad_norms_spec.run_id),
        s_test=Run.open(str(root), s_test_of(checkpoint).run_id),
        influence=Run.open(str(root), influence.run_id),
        attribution=Run.open(str(root), attribution.run_id),
        random=Run.open(str(root), random.run_id),
        stability=Run.open(str(root), stability.run_id),
        ablation=Run.open(str(root), ablation.run_id),
        lds=_done(root, lds),
    )


@pytest.fixture(scope="session")
def denoiser_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """Runs of an untrained FFDNet on two small pictures: norms, and attribution of two regions."""
    folder = tmp_path_factory.mktemp("denoiser")
    generator = np.random.default_rng(0)
    for name in ("train", "test"):
        (folder / name).mkdir()
        for letter in "ab":
            # Blocks of one colour: patches differ in their colours.
            colours = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
            pixels = colours.repeat(16, axis=0).repeat(16, axis=1)
            Image.fromarray(pixels).save(folder / name / f"{letter}.png")
    torch.manual_seed(0)
    torch.save(FFDNet(color=True).state_dict(), folder / "weights.pth")
    given = TaskSpec(
        name="ffdnet",
        options={"patch_size": 24, "stride": 8},
        paths={"images": str(folder / "train"), "test_images": str(folder / "test")},
        data="",
    )
    task = given.model_copy(update={"data": make_task(given).fingerprint()})
    weights = file_checkpoint(str(folder / "weights.pth"))
    norms = GradNormsSpec(task=task, checkpoints=(weights,), layers=("main.26", "main.29"))
    items = (Query(test=1, region=(40, 30, 1, 1)), Query(test=0, region=(8, 16, 20, 24)))
    attribution = AttributionSpec(
        task=task,
        norms=norms,
        checkpoint=weights,
        layers=("main.29",),
        queries=Queries(items=items),
    )
    root = folder / "runs"
    made = _done(root, attribution)
    return Run.open(str(root), norms.run_id), made


@contextmanager
def _served(
    runs: Sequence[Run], dashboard: Callable[[Run], str | None] = lambda _: None
) -> Iterator[str]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        app = make_viewer(runs, "right-token", dashboard)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(timeout=10)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def served() -> Callable[..., AbstractContextManager[str]]:
    """Serves some runs from a thread, with the token `right-token`; gives the address."""
    return _served


@pytest.fixture
def asking() -> Iterator[Callable[..., httpx.Client]]:
    """A client of a viewer of some runs, with its token."""
    with ExitStack() as stack:

        def make(*runs: Run) -> httpx.Client:
            address = stack.enter_context(_served(runs))
            client = httpx.Client(base_url=address, follow_redirects=True)
            assert stack.enter_context(client).get("/?token=right-token").status_code == 200
            return client

        yield make


@dataclass
class Watched:
    """A page, the messages of its console, and its network requests."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def watched(browser: Browser) -> Iterator[Callable[..., Watched]]:
    """Opens an empty page of some width, and watches it from the beginning."""
    contexts = []

    def make(width: int = 1280, scheme: str = "light") -> Watched:
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if scheme == "dark" else "light",
        )
        contexts.append(context)
        found = Watched(context.new_page())
        found.page.on(
            "console",
            lambda said: found.complaints.append(said.text) if said.type != "log" else None,
        )
        found.page.on("pageerror", lambda error: found.complaints.append(str(error)))
        found.page.on(
            "request",
            lambda asked: (
                None if asked.url.startswith("data:") else found.requests.append(asked.url)
            ),
        )
        return found

    yield make
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def faults() -> Callable[[Page], list[str]]:
    """Everything that axe-core finds wrong with a page, best practices included."""
    from axe_playwright_python.sync_playwright import Axe

    def find(page: Page) -> list[str]:
        found = Axe().run(page).response["violations"]
        return [f"{one['id']}: {one['nodes'][0]['html'][:200]}" for one in found]

    return find
