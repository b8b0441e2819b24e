"""Gradients kept on disk: what storing them costs, what is lost, and how fast queries are answered.

    python benchmarks/gradients.py gpt2                   # 124 million parameters, from a config
    python benchmarks/gradients.py ranks --runs gr-runs   # rank agreement with exact dot products
    python benchmarks/gradients.py store --folder /tmp/store    # 1,000,000 x 4,096 float16

`gpt2` compares with forward + backward of the same batches. `ranks` uses the command line.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from harness import Contestant, checked, header, over, print_race, print_table
from scipy import stats
from torch import Tensor, nn

from influence_jobs.gradients import GradNorms, GradProjections, ParameterSpace
from influence_jobs.gradients.projections import WHOLE, projections
from influence_jobs.gradients.reference import gradients_one_by_one
from influence_jobs.kinds.gradients.rows import packed_rows, row_layouts
from influence_jobs.kinds.gradients.spec import GradientsSpec
from influence_jobs.kinds.gradients.store import GradientStore
from influence_jobs.kinds.train.spec import FileCheckpoint
from influence_jobs.specs.base import TaskSpec
from influence_jobs.store.layout import SCORES
from influence_jobs.store.run import Run
from influence_jobs.store.top import top_of

app = typer.Typer(help=__doc__, rich_markup_mode=None)
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
    sequences: Annotated[int, typer.Option(help="Sequences a round.")] = 8,
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

    def of_norms(ids: Tensor) -> None:
        with GradNorms(model, names, losses, reduction="layer") as engine:
            engine(ids)

    def of_store(ids: Tensor) -> None:
        with GradProjections(model, space, losses, maps) as engine:
            engine(ids)

    contestants.append(
        Contestant(f"norms of {len(names)} weights", over(batches, of_norms), sequences, error)
    )
    contestants.append(
        Contestant(
            f"store, 16 x 16 of {len(maps)} layers",
            over(batches, of_store),
            sequences,
            projected_error,
        )
    )
    print()
    print_race(contestants, rounds, "sequences", "forward + backward")


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
    for dim in ("4x4", "8x8", "16x16", "32x32"):
        for stored in ("float32", "float16", "int8", "1-bit"):
            store = submit(["gradients", *at, "--dim", dim, "--stored", stored], runs)
            of_store = ["gradient-scores", "--gradients", store, "--method", "dot", *queries]
            found = scores(submit(of_store, runs), runs)
            pairs = list(zip(exact, found, strict=True))
            rank = [stats.spearmanr(a, b).statistic for a, b in pairs]
            top = [len({*np.argsort(-a)[:100]} & {*np.argsort(-b)[:100]}) / 100 for a, b in pairs]
            rows.append([dim, stored, f"{np.mean(rank):.3f}", f"{np.mean(top):.2f}"])
    print_table(["numbers a layer", "stored as", "rank correlation", "top 100 shared"], rows)


def submit(words: Sequence[str], runs: str) -> str:
    """Run `infl submit` and return the id of its run."""
    command = [INFL, "submit", *words, "--runs", runs, "--local", "--json"]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: str = json.loads(answer.stdout.splitlines()[-1])["run"]
    return found


def scores(run: str, runs: str) -> np.ndarray:
    """The scores (Q, N) of a run."""
    opened = Run.open(runs, run)
    return opened.read_rows(SCORES, 0, opened.array(SCORES).shape[1])


@app.command()
def store(
    folder: Annotated[Path, typer.Option(help="Folder for the store; it stays there.")],
    rows: Annotated[int, typer.Option(help="Samples.")] = 1_000_000,
    numbers: Annotated[int, typer.Option(help="Numbers of a sample.")] = 4096,
    stored: Annotated[str, typer.Option(help="How they are rounded.")] = "float16",
    queries: Annotated[int, typer.Option(help="Queries at once.")] = 1,
) -> None:
    """Write a store of random rows, as a job would, and find the top 100 of queries in it."""
    header(f"A store of {rows:,} x {numbers:,} {stored}")
    checkpoint = FileCheckpoint(path="none", sha256="0" * 64)
    spec = GradientsSpec(
        task=TaskSpec(name="random", data=f"{rows} x {numbers}"),
        checkpoint=checkpoint,
        modules=(WHOLE,),
        whole=True,
        stored=stored,  # type: ignore[arg-type]
    )
    run = Run.create(str(folder), spec)
    layouts = row_layouts(
        rows, {WHOLE: numbers}, stored=spec.stored, axis="sample", quantity="loss"
    )
    if not run.array_names():
        run.create_arrays(layouts)
        run = Run.open(str(folder), run.id)
        step = 8 * layouts[0].chunk_rows
        generator, started, drawn = np.random.default_rng(0), time.perf_counter(), 0.0
        for start in range(0, rows, step):
            count, before = min(step, rows - start), time.perf_counter()
            values = {WHOLE: generator.standard_normal((count, numbers), np.float32)}
            drawn += time.perf_counter() - before
            packed = packed_rows(values, np.zeros(count), stored=spec.stored)
            for name, part in packed.items():
                run.write_rows(name, start, part)
        took = time.perf_counter() - started - drawn
        print(f"- rounded and written: {rows / took:,.0f} samples/s, one thread of work")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"- on disk: {size / 1e9:.2f} GB")
    opened = GradientStore(str(folder), spec)
    query_QD = np.random.default_rng(1).standard_normal((queries, numbers), np.float32)
    for attempt in ("first", "second"):
        started = time.perf_counter()
        blocks = (
            (start, opened.dots(query_QD, WHOLE, start, stop).astype(np.float64))
            for start, stop in opened.blocks()
        )
        top_of(blocks, range(queries), 100)
        took = time.perf_counter() - started
        print(f"- {attempt} exact top 100 of {queries} queries: {took:.1f} s, {peak_mb():,} MB")


if __name__ == "__main__":
    app()
