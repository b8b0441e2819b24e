"""Gradients kept on disk: what storing them costs, what is lost, and how fast queries are answered.

    python benchmarks/gradients.py gpt2                   # 124 million parameters, from a config
    python benchmarks/gradients.py gpt2-jobs --runs gpt2-runs    # 200 sequences, 20 queries
    python benchmarks/gradients.py ranks --runs gr-runs   # rank agreement with exact dot products
    python benchmarks/gradients.py store --runs store-runs    # 1,000,000 x 4,096 float16

`gpt2` compares with forward + backward of the same batches. The others use the command line.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from harness import Contestant, checked, header, over, print_race, print_table
from scipy import stats
from torch import Tensor, nn

from influence_jobs.gradients import GradNorms, GradProjections, ParameterSpace
from influence_jobs.gradients.projections import projections
from influence_jobs.gradients.reference import gradients_one_by_one
from influence_jobs.store.layout import SCORES, checkpoint_name
from influence_jobs.store.run import Run

app = typer.Typer(help=__doc__, rich_markup_mode=None)
# Sizes and roundings of `ranks`.
ROUNDED = [(dim, "float32") for dim in ("4x4", "8x8", "16x16", "32x32", "64x64")]
ROUNDED += [("16x16", stored) for stored in ("float16", "int8", "1-bit")]
INFL = str(Path(sys.executable).with_name("infl"))


def peak_mb() -> int:
    """Peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, a sequence each."""
    scores = model(input_ids=ids).logits
    return F.cross_entropy(scores[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


@app.command()
def gpt2(
    sequences: Annotated[int, typer.Option(help="Sequences a round.")] = 32,
    tokens: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 128,
    batch: Annotated[int, typer.Option(help="Sequences in a batch.")] = 4,
    rounds: Annotated[int, typer.Option(help="Rounds that count.")] = 3,
    layers: Annotated[int, typer.Option(help="Blocks of the network; GPT-2 has 12.")] = 12,
) -> None:
    """Norms of all layers and projected gradients (16 x 16 a layer) of GPT-2, embeddings tied."""
    from transformers import GPT2Config, GPT2LMHeadModel

    header("Gradients of GPT-2")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers, attn_implementation="sdpa")).eval()
    batches = list(torch.randint(0, 50257, (sequences, tokens)).split(batch))
    space = ParameterSpace(model)
    matrices = [name for name, shape in space.shapes.items() if len(shape) == 2]
    names = [name.removesuffix(".weight") for name in matrices if "wpe" not in name]
    maps = projections(
        model, space, outputs=16, inputs=16, distribution="gaussian", seed=0, whole=False
    )

    def plain(ids: Tensor) -> None:
        model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            losses(model, ids).sum().backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)

    limit = Contestant("forward + backward", over(batches, plain), sequences)
    print(f"- peak memory after the model was built {peak_mb():,} MB")
    limit.run()
    print(f"- after forward + backward {peak_mb():,} MB")
    one = batches[0][:1]
    exact = gradients_one_by_one(model, [*space.shapes], losses, one)
    contestants = [limit]
    with GradNorms(model, names, losses, reduction="layer") as norms:
        wanted = torch.stack([exact[f"{name}.weight"].norm() for name in names])
        found = torch.stack([*norms(one).values()])[:, 0]
        error = checked(found, wanted, 1e-3)
    parts = [
        [p.to(torch.device("cpu"), torch.float64)(exact[n]) for n, p in of_group.items()]
        for of_group in maps.values()
    ]
    wanted = torch.cat([torch.stack(part).sum(0).flatten() for part in parts])
    with GradProjections(model, space, losses, maps) as store:
        projected_error = checked(torch.cat([*store(one).values()], dim=1)[0], wanted, 1e-3)
    del exact, parts

    # One engine for a round: it freezes the model and looks at its layers once, as in a job.
    def of_norms() -> None:
        with GradNorms(model, names, losses, reduction="layer") as engine:
            for ids in batches:
                engine(ids)

    def of_store() -> None:
        with GradProjections(model, space, losses, maps) as engine:
            for ids in batches:
                engine(ids)

    contestants.append(Contestant(f"norms of {len(names)} weights", of_norms, sequences, error))
    contestants.append(
        Contestant(
            f"store, 16 x 16 of {len(maps)} layers",
            of_store,
            sequences,
            projected_error,
        )
    )
    # What gradients_peers.py measures of other libraries.
    blocks = [name for name in names if ".h." in name]
    few = ParameterSpace(model, [f"{name}.weight" for name in blocks])
    of_few = projections(
        model, few, outputs=16, inputs=16, distribution="gaussian", seed=0, whole=False
    )

    def of_blocks() -> None:
        with GradProjections(model, few, losses, of_few) as engine:
            for ids in batches:
                engine(ids)

    contestants.append(
        Contestant(f"store of the {len(blocks)} matrices of the blocks", of_blocks, sequences)
    )
    print()
    print_race(contestants, rounds, "sequences", "forward + backward")


@app.command()
def gpt2_jobs(
    runs: Annotated[str, typer.Option(help="Folder of runs; a new one.")],
    sequences: Annotated[int, typer.Option(help="Training sequences.")] = 200,
    tokens: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 128,
    tests: Annotated[int, typer.Option(help="Queries.")] = 20,
) -> None:
    """By the commands: norms of all layers, a store of 16 x 16 a layer, and queries of it."""
    from random_gpt2 import RandomGpt2

    header(f"GPT-2 by the commands: {sequences} sequences of {tokens} tokens, {tests} queries")
    torch.manual_seed(0)
    task = RandomGpt2(sequences=sequences, tokens=tokens)
    model, weights = task.model().eval(), Path(runs) / "gpt2.pt"
    weights.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), weights)
    passed, started = min(32, sequences), time.perf_counter()
    for ids in torch.arange(passed).split(4):
        task.losses(model, task.train_set[ids]).sum().backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)
    limit = sequences / passed * (time.perf_counter() - started)
    print(f"- forward + backward of all sequences {limit:.0f} s, peak {peak_mb():,} MB")
    del model
    where = ["--task", f"{Path(__file__).with_name('random_gpt2.py')}:RandomGpt2"]
    where += ["--sequences", str(sequences), "--tokens", str(tokens)]
    at = [*where, "--checkpoint", str(weights)]
    queries = [word for test in range(tests) for word in ("--test", str(test))]
    steps = [("norms of all layers", ["grad-norms", *at, "--layer", "all"])]
    steps += [("store, 16 x 16 a layer", ["gradients", *at, "--dim", "16x16"])]
    rows = []
    for name, words in steps:
        run, took, peak = submitted(words, runs)
        rows.append([name, f"{took:.0f}", f"{limit / took:.2f}", f"{peak:,}"])
    named = ["--gradients", run, *queries]
    for name, words in [
        (f"{tests} queries, their gradients with it", ["--method", "influence"]),
        (f"{tests} queries again, cosine", ["--method", "cosine"]),
    ]:
        run, took, peak = submitted(["gradient-scores", *named, *words], runs)
        rows.append([name, f"{took:.0f}", "", f"{peak:,}"])
    print_table(["command", "s", "of forward + backward", "peak, MB"], rows)


@app.command()
def ranks(
    runs: Annotated[str, typer.Option(help="Folder of runs; what is there is used.")] = "gr-runs",
    tests: Annotated[int, typer.Option(help="Test samples.")] = 20,
    task: Annotated[str, typer.Option(help="Task.")] = "mnist",
    more: Annotated[str, typer.Option(help="More options of every command.")] = "",
) -> None:
    """Rank correlation of projected with exact dot products, by size and rounding."""
    header(f"Projected and exact dot products, {task}")
    words = ["--task", task, *more.split()]
    trained = submit(["train", *words], runs)
    at = ["--checkpoint", trained]
    queries = [word for test in range(tests) for word in ("--test", str(test))]
    exact = scores(submit(["baseline", "--method", "dot-product", *at, *queries], runs), runs)
    rows = []
    for dim, stored in ROUNDED:
        store = submit(["gradients", *at, "--dim", dim, "--stored", stored], runs)
        of_store = ["gradient-scores", "--gradients", store, "--method", "dot", *queries]
        found = scores(submit(of_store, runs), runs)
        pairs = list(zip(exact, found, strict=True))
        rank = [stats.spearmanr(a, b).statistic for a, b in pairs]
        top = [len({*np.argsort(-a)[:100]} & {*np.argsort(-b)[:100]}) / 100 for a, b in pairs]
        rows.append([dim, stored, f"{np.mean(rank):.3f}", f"{np.mean(top):.2f}"])
    print_table(["numbers a layer", "stored as", "rank correlation", "top 100 shared"], rows)


class Submitted(NamedTuple):
    """A run, and what its command took."""

    run: str
    seconds: float
    peak_mb: int


def submitted(words: Sequence[str], runs: str) -> Submitted:
    """Run `infl submit`."""
    command = [INFL, "submit", *words, "--runs", runs, "--local", "--json"]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise typer.Exit(process.returncode)
    run = json.loads(said.splitlines()[-1])["run"]
    return Submitted(run, time.perf_counter() - started, used.ru_maxrss // 1024)


def submit(words: Sequence[str], runs: str) -> str:
    """Run `infl submit` and return the id of its run."""
    return submitted(words, runs).run


def scores(run: str, runs: str) -> np.ndarray:
    """The scores (Q, N) of a run."""
    opened = Run.open(runs, run)
    return opened.read_rows(SCORES, 0, opened.array(SCORES).shape[1])


@app.command()
def store(
    runs: Annotated[str, typer.Option(help="Folder of runs; what is there is used.")],
    rows: Annotated[int, typer.Option(help="Samples.")] = 1_000_000,
    method: Annotated[str, typer.Option(help="Of the scores.")] = "influence",
) -> None:
    """Real gradients of MNIST images at many places: store, second moments, index, and queries."""
    header(f"A store of {rows:,} x 4,096 float16")
    task = ["--task", f"{Path(__file__).with_name('moved_mnist.py')}:MovedMnist"]
    many = [*task, "--copies", str(rows)]
    steps = []

    def step(name: str, words: Sequence[str]) -> str:
        run, took, peak = submitted(words, runs)
        size = sum(p.stat().st_size for p in (Path(runs) / run).rglob("*") if p.is_file())
        steps.append(
            [name, f"{took:,.1f}", f"{rows / took:,.0f}", f"{size / 1e9:.3f}", f"{peak:,}"]
        )
        print(steps[-1], file=sys.stderr)
        return run

    trained = submit(["train", *task, "--copies", "60000", "--epochs", "2"], runs)
    weights = str(Path(runs) / trained / checkpoint_name(2))
    layers = [word for layer in range(4) for word in ("--layer", f"module:{2 * layer}")]
    kept = ["gradients", *many, "--checkpoint", weights, *layers, "--dim", "32x32"]
    named = step("store", kept)
    of_store = ["--gradients", named, "--method", method]
    step("second moments", ["gram", "--gradients", named])
    step("index", ["gradient-index", *of_store])
    for test in range(3):
        asked = ["gradient-scores", *of_store, "--test", str(test)]
        step(f"query {test}, exact", asked)
        step(f"query {test}, approximate", [*asked, "--approximate", "100"])
    columns = ["step", "s, the whole command", "samples/s", "GB", "peak, MB"]
    print_table(columns, steps)
    opened = Run.open(runs, submit(["gradient-index", *of_store], runs))
    recall = np.mean(opened.read_table("recall").column("recall").to_numpy())
    print(f"\nThe index finds {100 * recall:.1f} % of the top 100.")


if __name__ == "__main__":
    app()
