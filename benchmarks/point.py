"""Time of a click in the viewer: from the pixel of a test image to the patches on the page.

The viewer runs as in `infl view`, and a browser clicks: first on images that were just opened, then
several times on the same image. The norms, 200,000 x 96, are random numbers in a run's arrays. All
else is real: patches of the folder, FFDNet, Zarr, HTTP. Before timing, one answer is compared with
the product over all rows. Run it from the project's folder, on a machine with nothing else to do:

    python benchmarks/point.py --images bsds500 --weights FFDNet_rgb_e20b8_1000.pth
"""

import json
import secrets
import socket
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
import uvicorn
from playwright.sync_api import Page, expect, sync_playwright

from infl_cluster.status import StatusWriter
from influence_jobs.kinds import open_job, view_of
from influence_jobs.kinds.grad_norms.spec import GradNormsSpec
from influence_jobs.methods.attribution import query_activations
from influence_jobs.report.explain import Explainer
from influence_jobs.report.viewer import make_viewer
from influence_jobs.specs.base import TaskSpec
from influence_jobs.store.checkpoints import file_checkpoint, load_checkpoint
from influence_jobs.store.documents import Entry
from influence_jobs.store.layout import FINISH
from influence_jobs.store.run import Run
from influence_jobs.tasks.base import Draw
from influence_jobs.tasks.registry import make_task

LAYER = "main.29"


def norms_run(root: str, images: Path, weights: Path, samples: int) -> Run:
    """A run of gradient norms that counts as finished and holds random numbers."""
    task = TaskSpec(
        name="ffdnet",
        options={"stride": 17, "limit": samples},
        paths={"images": str(images), "test_images": str(images)},
        data="random norms",
    )
    spec = GradNormsSpec(task=task, checkpoints=(file_checkpoint(str(weights)),), layers=(LAYER,))
    run = Run.create(root, spec)
    job = open_job(run, device="cpu")
    (array,) = job.plan().arrays
    run.create_arrays([array])
    generator = np.random.default_rng(0)
    for start in range(0, array.shape[0], array.chunk_rows):
        rows = min(array.chunk_rows, array.shape[0] - start)
        run.write_rows(array.name, start, generator.gamma(2.0, 1.0, (rows, array.shape[1])))
    job.write_samples()
    run.manifest.write(Entry(FINISH, 0, 0, 1, spec.hash, "done"))
    with StatusWriter(run):
        return run


def check(run: Run) -> None:
    """Compare one answer with the product over all rows at once."""
    norms = view_of(run).stored_norms
    assert norms is not None
    explainer = Explainer(norms)
    model = explainer.task.model().eval()
    load_checkpoint(model, run.root, norms.checkpoint)
    found = explainer.top(0, (100, 120), 10, layers=[LAYER])
    (a_C,) = query_activations(explainer.task, model, [LAYER], [(0, (100, 120, 1, 1))], [Draw(0)])[
        LAYER
    ].astype(np.float64)
    expected = np.asarray(run.array(f"norms/{LAYER}")[:], dtype=np.float64) @ a_C
    best = np.argsort(-expected, kind="stable")[:10]
    assert [sample for sample, _ in found] == best.tolist()


def click(page: Page, y: float, x: float) -> float:
    """Seconds from a click until the page has a new answer; y and x are parts of the image."""
    image, answer = page.locator("#image img"), page.locator("#answer h2")
    before = answer.inner_text() if answer.count() else "none"
    box = image.bounding_box()
    assert box is not None
    started = time.perf_counter()
    image.click(position={"x": x * box["width"], "y": y * box["height"]})
    expect(answer).not_to_have_text(before, timeout=60_000)
    return time.perf_counter() - started


def main(
    images: Annotated[
        Path, typer.Option(help="Folder of photographs, 200,000 patches at stride 17.")
    ],
    weights: Annotated[Path, typer.Option(help="State dict of the colour FFDNet.")],
    samples: Annotated[int, typer.Option(help="Patches.")] = 200_000,
    clicks: Annotated[int, typer.Option(help="On each of three images.")] = 10,
    browser: Annotated[str, typer.Option(help="Chromium.")] = "/usr/bin/chromium",
) -> None:
    """Print one JSON object; times are in seconds."""
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as root, socket.socket() as listening:
        run = norms_run(root, images, weights, samples)
        assert len(make_task(run.spec.task).train_data()) == samples, "too few photographs"
        check(run)
        token = secrets.token_urlsafe()
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(make_viewer([run], token), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        opened, first, again = [], [], []
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            page = chromium.new_page()
            page.goto(f"{address}/?token={token}")
            for test in range(3):
                started = time.perf_counter()
                page.goto(f"{address}/image/{test}")
                opened.append(time.perf_counter() - started)
                first.append(click(page, 0.1, 0.1))
                again += [
                    click(page, 0.2 + 0.07 * i % 0.7, 0.9 - 0.05 * i % 0.7) for i in range(clicks)
                ]
            chromium.close()
        server.should_exit = True
        thread.join()
    row = {
        "norms": f"{samples} x 96",
        "page_opened": [round(s, 3) for s in opened],
        "first_click_of_an_image": [round(s, 3) for s in first],
        "further_clicks_median": round(statistics.median(again), 3),
        "further_clicks_max": round(max(again), 3),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    typer.run(main)
