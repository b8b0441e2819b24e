"""Does the influence on a region of a denoised image predict what retraining does to it?

    python benchmarks/denoiser.py --images FOLDER --runs denoiser-runs

The network is a grey FFDNet of 6 layers with 32 channels (task `ffdnet-small`). Every twelfth
photograph of the folder is cut into patches to train on; eight others are test images. In each of
these, three regions of 32 x 32 pixels are queries: the most even one and, of the quarter with the
steepest gradients, the one whose gradients have most one direction (edge) and the one whose have
least (texture).

- `lds`: models are retrained on random halves of the patches. The first halves choose among the
  variants of influence, the others tell the linear datamodeling scores.
- `removal`: models are retrained without the first 1, 2 and 5 % of the patches by a method, for
  the regions of the first four test images: the same runs, with these patches masked.
- `planted`: patches of the test images lie among the others. Where is a region's own patch ranked?

Everything is asked for by the command line; what is there is used again.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from harness import print_table
from PIL import Image

import influence_jobs
from influence_jobs.datasets.images import ImageFolder
from influence_jobs.experiments.intervals import Interval, mean_interval
from influence_jobs.experiments.lds import ceiling, mean_difference, mean_lds, subset
from influence_jobs.store.layout import SCORES, part_name

COMMAND = (sys.executable, "-c", "from infl_cli.entry import main; main()")
SIDE, MARGIN, STEP = (
    32,
    16,
    8,
)  # pixels: of a region and a patch; to the image's edge; of the search
CLASSES = ("even", "edge", "texture")
TRAIN, TESTS = slice(0, None, 12), slice(31, None, 62)  # of the folder's photographs
GRID = ("--patch-size", str(SIDE), "--stride", "144")
REMOVED_FROM = 4  # test images
SHARES = (0.01, 0.02, 0.05)
DRAWS = ("--noise-draws", "4")
EARLY = (2, 5)  # epochs
LAMBDAS = ("1e-2", "1e-3")
LAYERS = [f"main.{2 * number}" for number in range(6)]
EK_FAC = ("influence", "--solver", "ek-fac", "--curvature-samples", "all")
BASELINES = ("random", "loss", "norm", "nearest", "dot-product", "cosine")
MOVED = 8  # pixels, down and right, that a planted patch is from its region
PLANTED = {
    "EK-FAC": EK_FAC,
    "EK-FAC, theta-relative": (*EK_FAC, "--relative", "theta"),
    **{name: ("baseline", "--method", name) for name in BASELINES if name != "random"},
}

Region = tuple[int, int, int, int]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """A method: its words for `infl submit`; epoch, models and layer if not the last, one, all."""

    words: tuple[str, ...]
    epoch: int | None = None
    models: int = 1
    layer: str | None = None


def methods_of(models: int) -> dict[str, Scored]:
    """All methods, by name."""
    return {
        **{name: Scored(("baseline", "--method", name)) for name in BASELINES},
        "EK-FAC": Scored(EK_FAC),
        f"EK-FAC, {models} models": Scored(EK_FAC, models=models),
        **{f"EK-FAC, lambda {value}": Scored((*EK_FAC, "--damping", value)) for value in LAMBDAS},
        **{f"EK-FAC, epoch {epoch}": Scored(EK_FAC, epoch) for epoch in EARLY},
        f"EK-FAC, epoch {EARLY[-1]}, {models} models": Scored(EK_FAC, EARLY[-1], models),
        "EK-FAC, one noise draw": Scored((*EK_FAC, "--noise-draws", "1")),
        "EK-FAC, theta-relative": Scored((*EK_FAC, "--relative", "theta")),
        **{
            f"EK-FAC, layer {number} alone": Scored((*EK_FAC, "--keep-layers"), layer=layer)
            for number, layer in enumerate(LAYERS, start=1)
        },
    }


def main(
    images: Annotated[Path, typer.Option(help="Folder of photographs.")],
    runs: Annotated[Path, typer.Option(help="Folder of runs; what is there is used.")] = Path(
        "denoiser-runs"
    ),
    part: Annotated[list[str] | None, typer.Option(help="lds, removal, planted; else all.")] = None,
    halves: Annotated[int, typer.Option(help="Random halves.")] = 80,
    choosing: Annotated[int, typer.Option(help="Halves that choose, not told of.")] = 20,
    seeds: Annotated[int, typer.Option(help="Models of a half.")] = 1,
    models: Annotated[int, typer.Option(help="Models of an ensemble.")] = 3,
    removals: Annotated[int, typer.Option(help="Models of a removal.")] = 3,
) -> None:
    """Compute what is missing, and print the tables."""
    bench = Bench(images, runs, models)
    if not part or "lds" in part:
        bench.lds(halves, choosing, seeds)
    if not part or "removal" in part:
        bench.removal(removals)
    if not part or "planted" in part:
        bench.planted()


class Bench:
    """The task, its regions and its trained models."""

    def __init__(self, images: Path, runs: Path, models: int):
        self.runs, self.models = runs, models
        photographs = sorted(images.iterdir())
        self.train = linked(runs / "data" / "train", photographs[TRAIN])
        self.test = linked(runs / "data" / "test", photographs[TESTS])
        self.names, self.regions = regions_of(self.test)
        self.all = listed(runs / "data" / "regions.txt", self.regions)
        self.few = listed(
            runs / "data" / "removed.txt", self.regions[: REMOVED_FROM * len(CLASSES)]
        )

    def task(self, train: Path | None = None) -> tuple[str, ...]:
        """The words that name the task."""
        folders = ("--images", str(train or self.train), "--test-images", str(self.test))
        return ("--task", "ffdnet-small", *folders, *GRID)

    def run(self, *words: str) -> str:
        """`infl submit`; returns the id of the run."""
        command = [*COMMAND, "submit", *words, "--runs", str(self.runs), "--local", "--json"]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found: str = json.loads(answer.stdout.splitlines()[-1])["run"]
        return found

    def trained(self, model: int) -> str:
        """A model for scores. Retrained models have the seeds below 10, or those of a half."""
        early = [word for epoch in EARLY for word in ("--save-epoch", str(epoch))]
        return self.run("train", *self.task(), "--seed", str(10 + model), *early)

    def scores(self, method: Scored, regions: Path, *quantity: str) -> list[str]:
        """The runs with a method's scores, one for each of its models."""
        of_weights = method.words[-1] not in ("random", "nearest")
        found = []
        for model in range(method.models):
            at = "" if method.epoch is None else f"@{method.epoch}"
            source = ("--checkpoint", f"{self.trained(model)}{at}") if of_weights else ()
            draws = () if "--noise-draws" in method.words else DRAWS
            where = ("--test-set", str(regions), *draws, *quantity)
            found.append(self.run(*method.words, *(source or self.task()), *where))
        return found

    def values(self, found: Sequence[str], layer: str | None = None) -> Floats:
        """The mean scores of some runs, through all layers or one, (Q, N)."""
        name = SCORES if layer is None else part_name(layer)
        arrays = [np.asarray(self.results(one)[name], dtype=np.float64) for one in found]
        mean: Floats = np.mean(arrays, axis=0)
        return mean

    def results(self, run: str) -> influence_jobs.Results:
        """A finished run."""
        return influence_jobs.open_run(self.runs / run)

    # -- linear datamodeling scores ----------------------------------------------------------------

    def lds(self, halves: int, choosing: int, seeds: int) -> None:
        """All methods, on halves that did not choose; which variant the first halves choose."""
        methods = methods_of(self.models)
        runs = {name: self.scores(method, self.all) for name, method in methods.items()}
        whole = [name for name, method in methods.items() if method.layer is None]
        by = [f"{name}={'+'.join(runs[name])}" for name in whole if "one noise draw" not in name]
        words = ["--test-set", str(self.all), *DRAWS]
        words += ["--subsets", str(halves), "--seeds", str(seeds)]
        retrained = self.run("lds", *self.task(), *words, *(w for one in by for w in ("--by", one)))
        losses_VQ = np.asarray(self.results(retrained)["losses"], dtype=np.float64)
        losses_MSQ = losses_VQ.reshape(halves, seeds, -1)
        found_QM = losses_MSQ.mean(axis=1).T
        predicted = {}
        for name, ids in runs.items():
            scores_QN = self.values(ids, methods[name].layer)
            members_NM = np.zeros((scores_QN.shape[1], halves))
            for half in range(halves):
                members_NM[subset(len(members_NM), 0.5, half), half] = 1
            predicted[name] = -scores_QN @ members_NM
        first, rest = slice(0, choosing), slice(choosing, None)

        def on(name: str, part: slice) -> Interval:
            return mean_lds(predicted[name][:, part], found_QM[:, part])

        chosen = max((n for n in runs if n.startswith("EK-FAC")), key=lambda n: on(n, first).mean)
        simple = max(BASELINES, key=lambda n: on(n, first).mean)
        print(
            f"\n{halves} halves, {seeds} models each; the first {choosing} choose {chosen!r}, and "
            f"{simple!r} of the baselines. The others:\n"
        )
        each = {name: on(name, rest) for name in runs}
        rows = []
        for name in sorted(runs, key=lambda name: -each[name].mean):
            by_class = [
                mean_lds(
                    predicted[name][k :: len(CLASSES), rest], found_QM[k :: len(CLASSES), rest]
                )
                for k in range(len(CLASSES))
            ]
            rows.append([name, words_of(each[name]), *(f"{one.mean:.3f}" for one in by_class)])
        print_table(["method", "LDS (95 %)", *CLASSES], rows)
        gain = mean_difference(
            predicted[chosen][:, rest], predicted[simple][:, rest], found_QM[:, rest]
        )
        print(f"\n{chosen} minus {simple}: {words_of(gain)}")
        if seeds > 1:
            print(f"\n{ceiling(losses_MSQ[rest]).words}")

    # -- removal -----------------------------------------------------------------------------------

    def removal(self, seeds: int) -> None:
        """The fall of the PSNR without the first patches by each method."""
        methods = methods_of(self.models)
        words = ["--test-set", str(self.few), *DRAWS, "--mode", "remove", "--same-run"]
        words += ["--seeds", str(seeds)]
        for name in (f"EK-FAC, {self.models} models", "random", "norm", "nearest"):
            words += ["--by", f"{name}={'+'.join(self.scores(methods[name], self.few))}"]
        n = self.values(self.scores(methods["random"], self.few)).shape[1]
        words += [w for share in SHARES for w in ("--k", str(round(share * n)))]
        found = self.results(self.run("ablation", *self.task(), *words))
        rows = found.table("results").to_pylist()
        print(f"\nFall of the PSNR in dB, {self.few.name}, {seeds} seeds\n")
        names = ("psnr_fall", "psnr_fall_elsewhere")
        table = []
        for k, by in dict.fromkeys((row["k"], row["by"]) for row in rows):
            group = [row for row in rows if (row["k"], row["by"]) == (k, by)]
            there, elsewhere = (by_query(group, lambda row, n=n: row[n]) for n in names)
            cells = [words_of(mean_interval(x)) for x in (there, elsewhere, there - elsewhere)]
            chance = [row for row in rows if (row["k"], row["by"]) == (k, "random")]
            more = there - by_query(chance, lambda row: row[names[0]])
            cells += ["" if by == "random" else words_of(mean_interval(more))]
            cells += [f"{there[c :: len(CLASSES)].mean():.3f}" for c in range(len(CLASSES))]
            table.append([str(k), by, *cells])
        columns = ["k", "without the first by", "the region", "others of its image", "difference"]
        columns += ["more than random"]
        print_table([*columns, *CLASSES], table)

    # -- planted patches ---------------------------------------------------------------------------

    def planted(self) -> None:
        """The rank of a region's own patch among all, in per cent, by method and quantity."""
        pool = self.runs / "data" / "planted"
        linked(pool, files(self.train))
        tests = ImageFolder(self.test, color=False)
        for number, (test, (y, x, height, width)) in enumerate(self.regions):
            top, left = y + MOVED, x + MOVED
            patch = tests.load(test)[0, top : top + height, left : left + width]
            Image.fromarray(patch.numpy()).save(pool / f"planted-{number:02d}.png")
        task = self.task(pool)
        model = self.run("train", *task, "--seed", "10")
        where = ("--checkpoint", model, "--test-set", str(self.all), *DRAWS)
        rows = []
        for quantity in ("loss", "output", "change"):
            for name, words in PLANTED.items():
                asked = (*where, "--quantity", quantity)
                if words[-1] in ("loss", "norm", "nearest"):  # they know of no quantity
                    if quantity != "loss":
                        continue
                    asked = where if words[-1] != "nearest" else (*task, *where[2:])
                run = self.run(*words, *asked)
                scores_QN = self.values([run])
                ranked = scores_QN if quantity == "loss" else np.abs(scores_QN)
                names = np.array(self.results(run).table("samples").column("file").to_pylist())
                shares = []
                for query in range(len(self.regions)):
                    own = np.flatnonzero(names == f"planted-{query:02d}.png")[0]
                    better = (ranked[query] > ranked[query, own]).sum()
                    shares.append(100 * (1 + better) / len(names))
                found = np.array(shares)
                by_class = [found[k :: len(CLASSES)] for k in range(len(CLASSES))]
                cells = [f"{np.median(one):.1f} ({(one <= 1).sum()})" for one in by_class]
                rows.append([quantity, name, f"{np.median(found):.1f}", *cells])
        print(
            f"\nRank of the planted patch in per cent of {len(names)}: median, and how many of "
            f"{len(self.regions) // len(CLASSES)} are in the first per cent\n"
        )
        print_table(["quantity", "method", "all", *CLASSES], rows)


def files(folder: Path) -> list[Path]:
    """The files of a folder, by name."""
    return sorted(folder.iterdir())


def linked(folder: Path, photographs: Sequence[Path]) -> Path:
    """A folder with links to photographs."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in photographs:
        link = folder / file.name
        if not link.exists():
            link.symlink_to(file.resolve())
    return folder


def listed(file: Path, regions: Sequence[tuple[int, Region]]) -> Path:
    """A file for `--test-set`."""
    file.write_text("".join(f"{test} {','.join(map(str, at))}\n" for test, at in regions))
    return file


def words_of(found: Interval) -> str:
    """A mean with its interval, as text."""
    return f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f})"


def by_query(
    rows: Sequence[Mapping[str, Any]], measure: Callable[[Mapping[str, Any]], float]
) -> Floats:
    """A measurement of every query, mean over seeds."""
    found: dict[int, list[float]] = {}
    for row in rows:
        found.setdefault(row["query"], []).append(measure(row))
    return np.array([np.mean(found[query]) for query in sorted(found)])


def regions_of(tests: Path) -> tuple[list[str], list[tuple[int, Region]]]:
    """The names of the test images, and their regions in the order of `CLASSES`."""
    folder = ImageFolder(tests, color=False)
    found = []
    for test in range(len(folder.names)):
        picture = folder.load(test)[0].double().numpy()
        down, right = np.gradient(picture)
        places = []
        for y in range(MARGIN, picture.shape[0] - SIDE - MARGIN + 1, STEP):
            for x in range(MARGIN, picture.shape[1] - SIDE - MARGIN + 1, STEP):
                at = (slice(y, y + SIDE), slice(x, x + SIDE))
                xx, yy, xy = (right[at] ** 2).sum(), (down[at] ** 2).sum(), (right * down)[at].sum()
                one_way = np.hypot(xx - yy, 2 * xy) / max(xx + yy, 1e-9)
                places.append((y, x, xx + yy, one_way, picture[at].mean()))
        table = np.array(places)
        steep = table[:, 2] >= np.quantile(table[:, 2], 0.75)
        clipped = (table[:, 4] <= 20) | (table[:, 4] >= 235)
        chosen = (
            np.where(clipped, np.inf, table[:, 2]).argmin(),
            np.where(steep, table[:, 3], -1).argmax(),
            np.where(steep, table[:, 3], 2).argmin(),
        )
        found += [(test, (int(table[i, 0]), int(table[i, 1]), SIDE, SIDE)) for i in chosen]
    return list(folder.names), found


if __name__ == "__main__":
    typer.run(main)
