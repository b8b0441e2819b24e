"""Does the influence on a region find the right patches? Those of the test images are planted.

    python benchmarks/planted.py --images FOLDER --weights FFDNet.pth [--pool 4] [--samples 256]

The first two photographs of a folder are the test images. The pool has all of their patches, and
those of the next `--pool` images. The queries are two regions of each test image, for every
quantity. Patches whose centre is within 9 pixels of a region's centre are the planted ones. For
each region, the table has the rank of the first planted patch, in per cent of the pool. For the
loss, patches are ranked by score, most helpful first. A sample may raise or lower the other
quantities; for these, patches are ranked by absolute score.
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

SIDE = 50  # pixels; of a region, and of a patch
NEAR = 9  # pixels; the stride of the patches is 17


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--pool", type=int, default=4)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--quantity", action="append")
    parser.add_argument("--draws", type=int, default=8, help="noise draws of a test image")
    parser.add_argument("--train-draws", type=int, default=2, help="noise draws of a patch")
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
    residual = solution.residual_Q.mean()
    print(f"{everyone} patches, lambda {solution.damping:.3g}, residual {residual:.2f}")
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
    both = torch.cat(scores).T
    influence, products = both[: len(queries)], both[len(queries) :]
    by_name = {name: torch.cat(parts) for name, parts in squares.items()}
    contestants = {
        "EK-FAC": influence,
        "EK-FAC, theta-relative": relative_scores(influence, by_name["theta"])[0],
        "dot product": products,
        "cosine": relative_scores(products, by_name["gradient"])[0],
    }
    where = task.describe(np.arange(everyone))
    print("| method | " + " | ".join(quantities) + " |")
    print("|---|" + "---|" * len(quantities))
    for name, found in contestants.items():
        cells = []
        for quantity in quantities:
            firsts = []
            for row, (q, test, region) in zip(found.numpy(), queries, strict=True):
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
