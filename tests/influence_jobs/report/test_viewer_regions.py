"""Regions of any network from images to images, keys, and links, in a browser and without."""

import re
import shlex
import shutil
import sys
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import expect

from infl_cli.main import main
from infl_cluster.submit import submit
from influence_jobs.kinds import view_of
from influence_jobs.methods.attribution import query_activations
from influence_jobs.report.commands import influence_of
from influence_jobs.report.explain import Explainer
from influence_jobs.report.results import Results
from influence_jobs.store.checkpoints import load_checkpoint
from influence_jobs.store.run import Run
from influence_jobs.tasks.base import Draw
from influence_jobs.terms import Region

TOKEN = "right-token"
TASK: dict[str, Any] = {"task": "unet:UNet", "samples": 12, "width": 2}


@pytest.fixture(scope="module")
def unet(tmp_path_factory) -> dict[str, Run]:
    """Runs of a small U-Net: its training, influence on a region, and norms of channels."""
    root = tmp_path_factory.mktemp("unet")
    given: dict[str, Any] = {"runs": root, "quiet": True}
    train = submit("train", **TASK, epochs=1, **given)
    asked: dict[str, Any] = {
        "checkpoint": train,
        "test": [0, 1],
        "region": ["4,4,8,8"],
        "solver": "identity",
    }
    made = {
        "train": train,
        "influence": submit("influence", **asked, **given),
        "norms": submit("grad-norms", checkpoint=train, layer=["down.conv", "out"], **given),
    }
    return {name: run.run for name, run in made.items()}


def test_without_norms_the_command_is_said_and_does_it(
    unet, asking, tmp_path, monkeypatch, capsys
) -> None:
    shutil.copytree(unet["influence"].root, tmp_path / "runs")
    run = Run.open(str(tmp_path / "runs"), unet["influence"].id)
    viewer = asking(run)
    page = viewer.get("/image/0?y=3&x=5&h=2&w=4").text
    assert "neither scores of rows 3 to 4, columns 5 to 8 nor norms by channel" in page
    assert 'href="/query?test=0&amp;region=4%2C4%2C8%2C8"' in page  # stored, and overlaps
    commands = re.findall(r"<pre[^>]*>(.*?)</pre>", page)
    assert [shlex.split(one)[2] for one in commands] == ["influence", "grad-norms"]
    monkeypatch.setattr(sys, "path", [*sys.path])
    for command in commands:
        words = [*shlex.split(command), "--local"]
        words += ["--solver", "identity"] if "influence" in words else []
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as leaving:
            main()
        assert leaving.value.code == 0, capsys.readouterr().err
    (new,) = {path.name for path in (tmp_path / "runs").glob("influence-*")} - {run.id}
    made = {path.name for path in (tmp_path / "runs").glob("grad-norms-*")}
    (norms,) = made - {unet["norms"].id}
    (query,) = Run.open(str(tmp_path / "runs"), new).read_table("queries").to_pylist()
    assert (query["test"], query["region"]) == (0, "3,5,2,4")
    viewer = asking(*(Run.open(str(tmp_path / "runs"), name) for name in (run.id, new, norms)))
    page = viewer.get("/image/0?y=3&x=5&h=2&w=4").text
    assert "Stored scores of this region" in page
    assert "Activations of" in page
    assert "infl submit" not in page


def test_a_region_is_explained_by_the_mean_of_its_activations(unet) -> None:
    norms = view_of(unet["norms"]).stored_norms
    explainer = Explainer(norms)
    model = explainer.task.model().eval()
    load_checkpoint(model, norms.run.root, norms.checkpoint)
    region: Region = (3, 5, 6, 7)
    asked = (["down.conv"], [(1, region)], [Draw(0)])
    a_QC = query_activations(explainer.task, model, *asked)["down.conv"]
    expected = np.asarray(norms.run.array("norms/down.conv")[:]) @ a_QC[0]
    found = dict(explainer.top(1, (3, 5), 12, extent=(6, 7), layers=["down.conv"]))
    assert [found[i] for i in range(12)] == pytest.approx(expected.tolist(), rel=1e-4)


def test_a_region_outside_is_refused(unet, asking) -> None:
    viewer = asking(unet["norms"], unet["influence"])
    for place in ("y=16&x=0", "y=9&x=0&h=8&w=1", "y=0&x=15&h=1&w=2", "y=0&x=0&h=0&w=1", "y=-1&x=0"):
        assert viewer.get(f"/image/0?{place}").status_code == 400, place
        assert viewer.get(f"/image/0/samples.csv?{place}").status_code == 400
    exported = viewer.get("/image/0/samples.csv?y=9&x=0&h=7&w=16&k=3").text.splitlines()
    assert len(exported) == 4
    assert exported[0].startswith("run,array,test,region,side,rank,score,sample,shape")
    assert '"9,0,7,16"' in exported[1]


def test_a_command_names_a_task_and_a_file_of_weights(denoiser_runs) -> None:
    words = shlex.split(influence_of([denoiser_runs[1]], 1, (4, 5, 1, 1)))
    asked = dict(zip(words[3::2], words[4::2], strict=True))
    spec = denoiser_runs[1].spec
    assert asked["--task"] == "ffdnet"
    assert (asked["--patch-size"], asked["--stride"]) == ("24", "8")
    assert asked["--images"] == spec.task.paths["images"]
    assert asked["--checkpoint"] == spec.checkpoint.path
    assert (asked["--test"], asked["--point"]) == ("1", "4,5")


def test_a_rectangle_is_dragged_or_typed_and_the_address_restores_it(
    unet, served, watched, faults
) -> None:
    with served([unet["influence"], unet["norms"]]) as address:
        shown = watched()
        page = shown.page
        page.goto(f"{address}/?token={TOKEN}")
        page.goto(f"{address}/image/0")
        box = page.locator("#image img").bounding_box()
        step = box["width"] / 16
        page.mouse.move(box["x"] + 5.5 * step, box["y"] + 3.5 * step)
        page.mouse.down()
        page.mouse.move(box["x"] + 11.5 * step, box["y"] + 8.5 * step, steps=4)
        page.mouse.up()
        heading = page.locator("#answer h2")
        expect(heading).to_contain_text("rows 3 to 8, columns 5 to 11")
        assert "y=3&x=5&h=6&w=7" in page.url
        assert TOKEN not in page.url
        area = page.locator("#image .area").bounding_box()
        assert area["width"] == pytest.approx(7 * step, abs=3)
        samples = page.locator("#answer a.cell").all_inner_texts()
        page.reload()
        expect(heading).to_contain_text("rows 3 to 8, columns 5 to 11")
        assert page.locator("#answer a.cell").all_inner_texts() == samples
        assert page.locator("#image .area").is_visible()
        # A click is a point again, and a hand that shakes does not matter.
        page.mouse.move(box["x"] + 2.5 * step, box["y"] + 1.5 * step)
        page.mouse.down()
        page.mouse.move(box["x"] + 2.5 * step + 3, box["y"] + 1.5 * step + 2)
        page.mouse.up()
        expect(heading).to_contain_text("row 1, column 2")
        # By the keyboard alone.
        page.keyboard.press("/")
        for text in ("4", "6", "2", "3"):
            page.keyboard.press("ControlOrMeta+a")
            page.keyboard.type(text)
            page.keyboard.press("Tab")
        page.get_by_role("button", name="Explain").press("Enter")
        expect(heading).to_contain_text("rows 4 to 5, columns 6 to 8")
        assert faults(page) == []
        assert shown.complaints == []


def test_every_key_does_what_the_list_says(unet, served, watched, faults) -> None:
    with served([unet["influence"], unet["norms"]]) as address:
        shown = watched()
        page = shown.page
        page.goto(f"{address}/?token={TOKEN}")
        focused = "document.activeElement.getAttribute('href')"
        queries = page.locator(".gallery a").evaluate_all(
            "all => all.map(a => a.getAttribute('href'))"
        )
        page.keyboard.press("j")
        page.keyboard.press("j")
        assert page.evaluate(focused) == queries[1]
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none"
        page.keyboard.press("ArrowUp")
        assert page.evaluate(focused) == queries[0]
        page.keyboard.press("Enter")
        page.wait_for_url("**/query?**")
        page.keyboard.press("ArrowRight")
        page.wait_for_url("**/query?test=1**")
        page.keyboard.press("ArrowLeft")
        page.wait_for_url("**/query?test=0**")
        page.keyboard.press("k")
        page.keyboard.press("x")
        assert "pick=" in page.url
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.name") == "side"
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.tagName") == "BODY"
        page.keyboard.press("?")
        expect(page.locator("#help")).to_be_visible()
        for key in ("j", "Enter", "x", "/", "Esc", "?"):
            assert (
                page.locator("#help kbd", has_text=re.compile(f"^{re.escape(key)}$")).count() == 1
            )
        assert faults(page) == []
        page.keyboard.press("Escape")
        expect(page.locator("#help")).not_to_be_visible()
        page.keyboard.press("Escape")
        page.wait_for_url(f"{address}/")
        assert shown.complaints == []


def test_a_link_is_copied_without_the_token_and_opens_what_was_seen(unet, served, browser) -> None:
    with served([unet["influence"]]) as address:
        context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
        page = context.new_page()
        page.goto(f"{address}/query?test=1&region=4,4,8,8&side=harmful&k=3&token={TOKEN}")
        before = page.locator(".item a").evaluate_all("all => all.map(a => a.href)")
        page.get_by_role("button", name="Copy link").click()
        expect(page.locator("#said")).to_contain_text("no token")
        link = page.evaluate("navigator.clipboard.readText()")
        assert TOKEN not in link
        other = context.new_page()  # the same browser has the token
        other.goto(link)
        assert other.locator(".item a").evaluate_all("all => all.map(a => a.href)") == before
        top = Results(unet["influence"].root, unet["influence"].id).top_k(3, test=1, side="harmful")
        assert [int(one.rpartition("/")[2]) for one in before] == top.column("sample").to_pylist()
        stranger = browser.new_context().new_page()
        assert stranger.goto(link).status == 401
        context.close()


@pytest.mark.parametrize(
    ("scheme", "width"),
    [
        ("light", 390),
        pytest.param("dark", 1280, marks=pytest.mark.slow),
        pytest.param("light", 1280, marks=pytest.mark.slow),
        pytest.param("dark", 390, marks=pytest.mark.slow),
    ],
)
def test_every_page_fits_and_has_no_fault(unet, served, watched, faults, width, scheme) -> None:
    places = ("/", "/query?test=0&region=4,4,8,8", "/query?test=0&region=4,4,8,8&pick=3&k=3",
              "/sample/3", "/image/0", "/image/0?y=3&x=5&h=6&w=7", "/image/0?y=3&x=5",
              "/image/0?y=99&x=5", "/nowhere")  # fmt: skip
    for names in (("influence", "norms"), ("influence",)):
        with served([unet[name] for name in names]) as address:
            shown = watched(width, scheme)
            shown.page.goto(f"{address}/?token={TOKEN}")
            for place in places:
                shown.page.goto(address + place)
                wide = shown.page.evaluate("document.documentElement.scrollWidth")
                assert wide <= width, (place, wide)
                assert faults(shown.page) == [], place
