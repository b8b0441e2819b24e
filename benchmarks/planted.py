"""Does region influence find what it must? Patches of the test images themselves are planted in the training pool.

    python benchmarks/planted.py --images FOLDER --weights FFDNet.pth [--pool 4] [--samples 256]

Of a folder of photographs the first two are test images; all of their patches join those of the next `--pool` images.
Two regions of each test image are queries, for every measured quantity, and the patches whose centre is within 9
pixels of a region's are the planted ones. The table tells where in the ranking the first of them comes, region by region,
in per cent of the pool. By the loss of the region the ranking is by score, most helpful first; by quantities that a
sample may raise or lower it is by absolute score.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from influence_jobs.curvature import EkFac, GaussNewton
from influence_jobs.gradients import GradDots, GradQuadratics, ParameterSpace
from influence_jobs.methods.relative import relative_scores
from influence_jobs.models.checkpoints import load_weights
from influence_jobs.tasks.base import Draw
from influence_jobs.tasks.ffdnet import FFDNetTask

SIDE = 50  # of a region, as of a patch
NEAR = 9  # pixels; the patches' stride is 17


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--pool", type=int, default=4)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--quantity", action="append")
    parser.add_argument("--draws", type=int, default=8, help="of the test images' noise")
    parser.add_argument("--train-draws", type=int, default=2, help="of the patches' noise")
    parser.add_argument("--damping", type=float)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--every", type=int, default=37)
    options = parser.parse_args()
    files = sorted(options.images.iterdir())[:: options.every]
    with tempfile.TemporaryDirectory() as folder:
        pool, tests = Path(folder, "pool"), Path(folder, "tests")
        for place, chosen in ((pool, files[: 2 + options.pool]), (tests, files[:2])):
            place.mkdir()
            for file in chosen:
                (place / file.name).symlink_to(file.absolute())
        task = FFDNetTask(images=str(pool), test_images=str(tests), stride=17)
        torch.set_num_threads(options.threads)
        study(task, options)


def study(task: FFDNetTask, options: argparse.Namespace) -> None:
    weights, samples, draws = options.weights, options.samples, options.draws
    quantities = options.quantity or task.quantities
    model = task.model()
    load_weights(model, weights)
    model = model.eval().to(memory_format=torch.channels_last)
    space = ParameterSpace(
        model, [n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)]
    )
    queries = []  # (quantity, test, region)
    for test in range(2):
        height, width = task.test_size(test)
        for y, x in ((height // 4, width // 3), (2 * height // 3, 2 * width // 3)):
            queries += [(q, test, (y, x, SIDE, SIDE)) for q in quantities]
    rows = []
    for quantity, test, region in queries:
        total = torch.zeros(space.size)
        for draw in range(draws):
            batch = task.test_batch(torch.tensor([test]), Draw(0, draw))
            total += space.gradient(task.measure(model, batch, quantity, region).sum()) / draws
        rows.append(total)
    g_QP = torch.stack(rows)
    everyone = len(task.train_data())
    ids = torch.randperm(everyone, generator=torch.Generator().manual_seed(0))[:samples]
    operator = GaussNewton(model, space, task, ids.sort().values)
    solver = EkFac(options.damping)
    solution = solver.solve(operator, g_QP)
    print(
        f"{everyone} patches, lambda {solution.damping:.3g}, residual {solution.residual_Q.mean():.2f}"
    )
    fitted = solver.metrics(operator, power=2)
    metrics = {
        "theta": fitted,
        "gradient": dict.fromkeys(fitted),
    }
    sizes = {name: GradQuadratics(model, metric, task.losses) for name, metric in metrics.items()}
    vectors = torch.cat([solution.x_QP, g_QP])
    scores, squares = [], {name: [] for name in sizes}
    with GradDots(model, space, task.losses, vectors) as dots:
        for ids in torch.arange(everyone).split(task.batch_size):
            batches = [task.batch(ids, Draw(0, draw)) for draw in range(options.train_draws)]
            scores.append(sum(dots.total(batch) for batch in batches))
            for name, engine in sizes.items():
                parts = [torch.stack([*engine(batch).values()]).sum(0) for batch in batches]
                squares[name].append(sum(parts))
    both = torch.cat(scores).T.numpy()
    influence, products = both[: len(queries)], both[len(queries) :]
    by_name = {name: torch.cat(parts).numpy() for name, parts in squares.items()}
    contestants = {
        "EK-FAC": influence,
        "EK-FAC, theta-relative": relative_scores(influence, by_name["theta"]),
        "dot product": products,
        "cosine": relative_scores(products, by_name["gradient"]),
    }
    where = task.describe(np.arange(everyone))
    print("| method | " + " | ".join(quantities) + " |")
    print("|---|" + "---|" * len(quantities))
    for name, found in contestants.items():
        cells = []
        for quantity in quantities:
            firsts = []
            for row, (q, test, region) in zip(found, queries, strict=True):
                if q != quantity:
                    continue
                ranking = -row if quantity == "loss" else -np.abs(row)
                position = np.empty(everyone)
                position[np.argsort(ranking, kind="stable")] = np.arange(1, everyone + 1)
                planted = (
                    (where["file"] == task.test_data()[test])
                    & (abs(where["row"] - region[0]) <= NEAR)
                    & (abs(where["column"] - region[1]) <= NEAR)
                )
                firsts.append(f"{100 * position[planted].min() / everyone:.2f}")
            cells.append(" ".join(firsts))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
