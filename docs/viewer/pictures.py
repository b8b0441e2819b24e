"""Make the pictures of docs/viewer.md: `python docs/viewer/pictures.py`, some minutes.

It trains the examples, small, in a temporary folder, shows their runs in the viewer, and takes
pictures in the Chromium of the system by Playwright. `--all FOLDER` keeps every page at 1280 and
390 pixels, light and dark, to look at.
"""

import argparse
import io
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from influence_jobs.report.viewer import make_viewer
from influence_jobs.store.find import find_run
from influence_jobs.store.run import Run

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
TOKEN = "pictures"  # noqa: S105  (of a server that ends with this script)
MOST_BYTES = 100_000


@dataclass(frozen=True)
class Scene:
    """Runs of an example, and the pages of them that are taken.

    Attributes:
        commands: What follows `infl submit`.
        runs: The first characters of the runs to view.
        pages: Addresses by name.
        kept: The page that the document shows; "" for none.
        height: Of its picture.
    """

    commands: Sequence[str]
    runs: Sequence[str]
    pages: dict[str, str]
    kept: str = ""
    height: int = 800


SCENES = [
    Scene(
        (
            "train --task digits.py:DigitsTask --epochs 3 --lr .05",
            (
                "influence --checkpoint train-digitstask --test 5 --test 8 --test 111 --layer all "
                "--solver ek-fac"
            ),
            "self-influence --checkpoint train-digitstask --layer all",
        ),
        ("influence-digitstask", "self-influence-digitstask"),
        {"digits-overview": "/", "digits-query": "/query?test=5", "digits-sample": "/sample/7"},
        "digits-query",
    ),
    Scene(
        (
            "train --task gpt.py:Gpt --epochs 8 --optimizer adam --lr .003",
            (
                "influence --checkpoint train-gpt --test 0 --tokens 2:3 --tokens 0:2 --per-token "
                "--solver ek-fac"
            ),
        ),
        ("influence-gpt",),
        {"text-query": "/query?test=0&region=2:3&k=6", "text-sample": "/sample/12"},
        "text-query",
    ),
    Scene(
        (
            "train --task tabular.py:Tabular --epochs 20 --optimizer adam --lr .003",
            (
                "influence --checkpoint train-tabular --test 0 --test 1 --quantity prediction "
                "--solver ek-fac"
            ),
        ),
        ("influence-tabular",),
        {"table-overview": "/", "table-query": "/query?test=0&k=6", "table-sample": "/sample/92"},
        "table-query",
    ),
    Scene(
        (
            "train --task audio.py:Audio --epochs 8 --optimizer adam --lr .003",
            "influence --checkpoint train-audio --test 0 --test 1 --solver ek-fac",
        ),
        ("influence-audio",),
        {"audio-query": "/query?test=0&k=6", "audio-sample": "/sample/3"},
        "audio-query",
    ),
    Scene(
        (
            "train --task unet.py:UNet --epochs 20 --optimizer adam --lr .003",
            "grad-norms --checkpoint train-unet --layer all",
            "influence --checkpoint train-unet --test 0 --region 4,4,8,8 --solver ek-fac",
        ),
        ("influence-unet", "grad-norms-unet"),
        {"region": "/image/0?y=3&x=5&h=6&w=7", "region-query": "/query?test=0&region=4,4,8,8"},
        "region",
        900,
    ),
]


def main() -> None:
    """Make the pictures."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--all", type=Path, metavar="FOLDER", help="Keep every page here.")
    folder = asked.parse_args().all
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    sys.path.append(str(EXAMPLES))
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        os.environ["INFL_RUNS"] = str(Path(place) / "runs")  # commands on pages need no --runs
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scene in SCENES:
            runs = _made(scene, Path(place))
            with _served(runs) as address:
                _take(scene, address, browser, folder)
            if folder:
                _report(runs, scene, browser, folder)
        browser.close()


def _made(scene: Scene, place: Path) -> list[Run]:
    for command in scene.commands:
        words = [
            str(EXAMPLES / word) if word.partition(":")[0].endswith(".py") else word
            for word in shlex.split(command)
        ]
        done = subprocess.run(
            [sys.executable, "-c", "from infl_cli.entry import main; main()", "submit", *words,
             "--local", "--json"],
            cwd=place, env=os.environ, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"infl submit {command}: {done.stderr}")
    return [find_run(str(place / "runs"), name) for name in scene.runs]


@contextmanager
def _served(runs: Sequence[Run]) -> Iterator[str]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(make_viewer(runs, TOKEN), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def _take(scene: Scene, address: str, browser: Browser, folder: Path | None) -> None:
    for width in (1280, 390):
        for scheme in ("light", "dark"):
            context = browser.new_context(
                viewport={"width": width, "height": scene.height},
                color_scheme="dark" if scheme == "dark" else "light",
            )
            page = context.new_page()
            page.goto(f"{address}/?token={TOKEN}")
            for name, place in scene.pages.items():
                page.goto(address + place)
                page.wait_for_load_state("networkidle")
                if folder:
                    folder.mkdir(parents=True, exist_ok=True)
                    page.screenshot(path=folder / f"{name}-{width}-{scheme}.png", full_page=True)
                if (name, width, scheme) == (scene.kept, 1280, "light"):
                    _keep(page.screenshot(), HERE / f"{name}.webp")
            context.close()


def _report(runs: Sequence[Run], scene: Scene, browser: Browser, folder: Path) -> None:
    from influence_jobs.report.html import sections_of, write_report

    name = f"report-{scene.kept.partition('-')[0]}"
    write_report(name, sections_of(runs), folder / name)
    for width in (1280, 390):
        for scheme in ("light", "dark"):
            context = browser.new_context(
                viewport={"width": width, "height": 900},
                color_scheme="dark" if scheme == "dark" else "light",
            )
            page = context.new_page()
            page.goto((folder / name / "report.html").absolute().as_uri())
            page.screenshot(path=folder / f"{name}-{width}-{scheme}.png", full_page=True)
            context.close()


def _keep(png: bytes, path: Path) -> None:
    Image.open(io.BytesIO(png)).convert("RGB").save(path, "WEBP", quality=80, method=6)
    if path.stat().st_size > MOST_BYTES:
        raise SystemExit(f"{path} has {path.stat().st_size:,} bytes, more than {MOST_BYTES:,}")
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
