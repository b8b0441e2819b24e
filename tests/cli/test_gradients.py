"""From `infl submit gradients` to the top samples of a new query, in a user's steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import digits
import pytest
from starlette.testclient import TestClient
from torch import Tensor, nn
from torch.nn import functional as F

from influence_jobs.report.viewer import make_viewer
from influence_jobs.store.run import Run

Infl = Callable[..., Any]
Refused = Callable[..., str]
DIGITS = ("--checkpoint", "train-digits", "--local")
STORE = ("submit", "gradients", *DIGITS)
SCORES = ("submit", "gradient-scores", "--local")
ONE = ("--test", "3")


def test_from_a_store_to_the_top_samples(infl: Infl, runs: Path) -> None:
    stored = infl(*STORE, "--dim", "4x4", "--layer", "head")
    assert stored.code == 0, stored.err
    assert "data.zarr/gradients/head: 1500 x 16 float16" in stored.out
    assert "next: infl submit gradient-scores --gradients gradients-digitstask-" in stored.out
    for method in ("influence", "trak", "dot", "cosine"):
        scored = infl(
            *SCORES, "--gradients", "gradients-digits", *ONE, "--method", method, "--json"
        )
        assert scored.code == 0, scored.err
        assert scored.json["arrays"]["scores"]["shape"] == [1, 1500]
        top = infl("top", scored.json["run"], "--k", 2)
        assert "sign: positive = helpful, negative = harmful" in top.out
        assert top.out.count("test 3 (label") == 2
    page = infl("report", scored.json["run"])
    assert page.code == 0, page.err


def test_trak_of_losses_that_are_no_cross_entropy_is_refused(
    infl: Infl, runs: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of smoothed labels exp(-loss) is no probability."""
    assert infl(*STORE, "--dim", "4x4", "--layer", "head").code == 0

    def losses(self: digits.DigitsTask, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        outputs, targets = self.outputs(model, batch), self.targets(batch)
        return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=0.1)

    monkeypatch.setattr(digits.DigitsTask, "losses", losses)
    said = refused(*SCORES, "--gradients", "gradients-digits", *ONE, "--method", "trak")
    assert "losses() of DigitsTask does not give the cross-entropy of outputs()" in said
    assert infl(*SCORES, "--gradients", "gradients-digits", *ONE, "--method", "dot").code == 0


def test_the_top_samples_by_an_index(infl: Infl, runs: Path) -> None:
    assert infl(*STORE, "--dim", "4x4", "--layer", "head").code == 0
    words = (*SCORES, "--gradients", "gradients-digits", *ONE, "--approximate", "20")
    scored = infl(*words, "--json")
    assert scored.code == 0, scored.err
    top = infl("top", scored.json["run"], "--k", "30")
    assert top.out.count("\n  20 ") == 2  # both ends
    assert "\n  21 " not in top.out  # which would be of the other end
    ablation = ("submit", "ablation", "--checkpoint", "train-digits", "--k", "5", *ONE, "--local")
    said = infl(*ablation, "--by", f"index={scored.json['run']}")
    assert said.code == 2
    assert "scores of the first samples only: leave --approximate out" in said.err
    assert infl("report", scored.json["run"]).code == 0
    index = infl("submit", "gradient-index", "--gradients", "gradients-digits", "--local")
    assert index.code == 0, index.err
    assert "of the 100 samples of largest score" in index.out
    assert len(list(runs.glob("gradient-index-*"))) == 1  # the same one


def test_the_viewer_shows_no_sample_of_the_other_end(infl: Infl, runs: Path) -> None:
    """The page has room for ten a side, and an index gave three."""
    assert infl(*STORE, "--dim", "4x4", "--layer", "head").code == 0
    words = ("--gradients", "gradients-digits", *ONE, "--approximate", "3", "--json")
    scored = infl(*SCORES, *words)
    assert scored.code == 0, scored.err
    run = Run.open(str(runs), scored.json["run"])
    with TestClient(make_viewer([run], "token"), "http://127.0.0.1") as client:
        assert client.get("/?token=token").status_code == 200
        page = client.get("/query?test=3").text
    assert page.count("/sample/") == 6


def test_a_store_of_weights_in_a_file_knows_its_task(infl: Infl, runs: Path) -> None:
    (folder,) = runs.glob("train-digits*")
    weights = str(folder / "checkpoints" / "epoch-0002.pt")
    words = ("--task", "digits:DigitsTask", "--checkpoint", weights, "--layer", "head", "--local")
    stored = infl("submit", "gradients", *words, "--dim", "4x4", "--json")
    assert stored.code == 0, stored.err
    of_store = ("--gradients", stored.json["run"], *ONE)
    assert infl("submit", "query-gradients", "--local", *of_store).code == 0
    scored = infl(*SCORES, *of_store, "--method", "dot")
    assert scored.code == 0, scored.err


def test_a_dry_run_tells_what_rounding_loses(infl: Infl, runs: Path) -> None:
    planned = infl(*STORE[:4], "--dry-run", "--stored", "1-bit", "--dim", "4x4")
    assert planned.code == 0, planned.err
    for stored in ("float32", "float16", "int8", "1-bit"):
        assert f"stored as {stored}: " in planned.out
    assert planned.out.count("(chosen)") == 1


def test_a_store_is_made_if_none_is_named(infl: Infl, runs: Path) -> None:
    scored = infl(*SCORES, "--checkpoint", "train-digits", *ONE, "--method", "dot", "--json")
    assert scored.code == 0, scored.err
    kinds = {path.name.rpartition("-digits")[0] for path in runs.iterdir()}
    assert {"gradients", "gradient-scores"} <= kinds
    again = infl(*SCORES, "--checkpoint", "train-digits", *ONE, "--method", "cosine")
    assert again.code == 0, again.err
    assert len(list(runs.glob("gradients-*"))) == len(list(runs.glob("query-gradients-*"))) == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((*STORE, "--dim", "16"), "--dim 16: write two numbers, such as 16x16"),
        ((*STORE, "--dim", "0x4"), "--dim 0x4: write two numbers"),
        ((*STORE, "--stored", "int4"), "'int4' is not one of 'float32', 'float16', 'int8'"),
        ((*STORE, "--projection", "dct"), "'dct' is not one of 'gaussian'"),
        ((*STORE, "--layer", "nix"), "layer 'nix' does not exist"),
        ((*SCORES, "--gradients", "train-digits", *ONE), "has no projected gradients"),
        ((*SCORES, "--gradients", "nix", *ONE), "there is no run nix"),
        ((*SCORES, *DIGITS[:2]), "say what to explain: --test ID"),
        ((*SCORES, *DIGITS[:2], *ONE, "--damping", "-1"), "--damping: input should be greater"),
        (
            (*SCORES, *DIGITS[:2], *ONE, "--method", "dot", "--damping", ".1"),
            "--damping has no meaning for --method dot: leave it out",
        ),
        (
            (*SCORES, *DIGITS[:2], *ONE, "--method", "cosine", "--keep-layers"),
            "a cosine is not a sum over layers: leave --keep-layers out",
        ),
        (
            (*SCORES, *DIGITS[:2], *ONE, "--approximate", "5", "--keep-layers"),
            "an index has no scores of single layers: leave --approximate or --keep-layers out",
        ),
        ((*SCORES, *DIGITS[:2], *ONE, "--approximate", "0"), "--approximate: input should be"),
        (("submit", "gradient-index", "--gradients", "train-digits"), "no projected gradients"),
        (("submit", "gram", "--gradients", "train-digits"), "has no projected gradients"),
    ],
)
def test_a_wrong_command_line_is_refused(
    refused: Refused, runs: Path, words: tuple[str, ...], expected: str
) -> None:
    assert expected in refused(*words)


def test_options_beside_a_store_are_refused(infl: Infl, runs: Path) -> None:
    assert infl(*STORE, "--dim", "2x2", "--layer", "head").code == 0
    said = infl(*SCORES, "--gradients", "gradients-digits", *DIGITS[:2], *ONE)
    assert said.code == 2
    assert "--gradients RUN decides the checkpoint: leave --checkpoint" in said.err
