"""Run ids last: a request has the same id in this version as in an earlier one.

The ids are those of revision 4c8d190. With another id for the same request, the finished runs of
earlier versions could not be read. A new field is left out of the hash at its default. Only a
request that means other numbers than before (`specs.FORMAT`) may get another id.
"""

import pytest

from influence_jobs.kinds.ablation.spec import AblationSpec
from influence_jobs.kinds.attribution.spec import AttributionSpec
from influence_jobs.kinds.baseline.spec import BaselineSpec
from influence_jobs.kinds.grad_norms.spec import GradNormsSpec
from influence_jobs.kinds.influence.spec import InfluenceSpec
from influence_jobs.kinds.lds.spec import LdsSpec
from influence_jobs.kinds.paper.spec import PaperSpec
from influence_jobs.kinds.s_test.spec import STestSpec
from influence_jobs.kinds.stability.spec import StabilitySpec
from influence_jobs.kinds.train.spec import FileCheckpoint, TrainedCheckpoint, TrainSpec
from influence_jobs.specs.base import Spec, TaskSpec, parse_spec
from influence_jobs.specs.queries import Queries, Query
from influence_jobs.specs.rankings import Ranking
from influence_jobs.specs.solvers import (
    ConjugateGradientSettings,
    Curvature,
    EkFacSettings,
    IdentitySettings,
    LissaSettings,
)

MNIST = TaskSpec(
    name="mnist",
    options={"limit": None},
    paths={"data_dir": "/data"},
    data="MNIST, 60000 samples",
)
FFDNET = TaskSpec(
    name="ffdnet",
    options={"patch_size": 50, "stride": 25, "sigma": 25.0, "skip": ("a.png",), "limit": None},
    paths={"images": "/images", "test_images": "samples-test"},
    data="images 0123 test 4567",
)
OWN = TaskSpec(
    name="my_module:MyTask",
    options={"width": 8, "rate": 0.5, "name": "ab", "deep": True},
    data="1500 samples, code 0123456789abcdef",
)

DEFAULT_TRAIN = TrainSpec(task=MNIST)
TRAIN = TrainSpec(
    task=MNIST, epochs=20, batch_size=8, lr=0.003, norm_layers=("fc1", "fc2"), save_epochs=(5, 10)
)
OTHER_SEED = TRAIN.model_copy(update={"seed": 1})
ADAM = TrainSpec(task=OWN, seed=3, epochs=2, optimizer="adam", lr=1e-3, weight_decay=1e-4)
# Training does not look at the noise level of attribution.
FFDNET_TRAIN = TrainSpec(
    task=FFDNET.model_copy(
        update={"options": {k: v for k, v in FFDNET.options.items() if k != "sigma"}}
    ),
    epochs=60,
    batch_size=64,
    optimizer="adam",
    norm_layers=("main.29",),
    norm_reduction="kernel",
    norm_skip_epochs=2,
)

FIRST, LAST = (TrainedCheckpoint(train=TRAIN, epoch=epoch) for epoch in (5, 20))
OTHER_LAST = TrainedCheckpoint(train=OTHER_SEED, epoch=20)
FILE = FileCheckpoint(path="/weights.pth", sha256="ab" * 32)

NORMS = GradNormsSpec(task=MNIST, checkpoints=(LAST,), layers=("fc1", "fc2"))
SUMMED = GradNormsSpec(
    task=MNIST, checkpoints=(LAST, FIRST, FILE), layers=("fc3",), reduction="layer", seed=5
)
KEPT = GradNormsSpec(
    task=MNIST, checkpoints=(LAST, FIRST), layers=("fc1",), combine="keep", precision="float64"
)
OF_FILE = GradNormsSpec(
    task=FFDNET, checkpoints=(FILE,), layers=("main.29",), reduction="kernel", precision="bfloat16"
)

QUERIES = Queries(items=(Query(test=597), Query(test=3520)))
POINTS = Queries(
    items=(Query(test=0, region=(3, 5, 1, 1)), Query(test=0, region=(8, 8, 4, 2))),
    quantity="change",
    noise_draws=4,
    seed=7,
)
ALL = ("fc1", "fc2", "fc3")

CG = STestSpec(task=MNIST, checkpoint=LAST, modules=ALL, queries=QUERIES)
SET_CG = STestSpec(
    task=MNIST,
    checkpoint=LAST,
    modules=ALL,
    queries=QUERIES,
    curvature=Curvature(operator="hessian", product="finite-difference", samples=10_000, seed=2),
    solver=ConjugateGradientSettings(damping=0.25, tolerance=1e-3, max_iterations=50),
)
LISSA = STestSpec(
    task=MNIST,
    checkpoint=FIRST,
    modules=ALL,
    queries=QUERIES,
    curvature=Curvature(samples=10_000),
    solver=LissaSettings(damping=0.25, scale=25.0, depth=1000, batch_size=8),
)
EK_FAC = STestSpec(
    task=FFDNET,
    checkpoint=FILE,
    modules=("main.0", "main.29"),
    queries=POINTS,
    curvature=Curvature(samples=2000),
    solver=EkFacSettings(damping=1e-3),
)
IDENTITY = STestSpec(
    task=MNIST, checkpoint=LAST, modules=ALL, queries=QUERIES, solver=IdentitySettings()
)
OF_OTHER_SEED = CG.model_copy(update={"checkpoint": OTHER_LAST})

INFLUENCE = InfluenceSpec(task=MNIST, s_tests=(CG,))
TRACIN = InfluenceSpec(
    task=MNIST,
    s_tests=(IDENTITY, IDENTITY.model_copy(update={"checkpoint": FIRST})),
)
ENSEMBLE = InfluenceSpec(task=MNIST, s_tests=(CG, OF_OTHER_SEED), combine="mean")
RELATIVE = InfluenceSpec(
    task=FFDNET, s_tests=(EK_FAC,), relative="theta", keep_modules=True, noise_draws=4, seed=7
)
ATTRIBUTION = AttributionSpec(
    task=MNIST, norms=TRAIN, checkpoint=LAST, layers=("fc1", "fc2"), queries=QUERIES
)
NORMALIZED = AttributionSpec(
    task=FFDNET,
    norms=OF_FILE,
    checkpoint=FILE,
    layers=("main.29",),
    queries=POINTS,
    exclude_norm_above=5.0,
    normalize=True,
    keep_layers=True,
)
RANDOM = BaselineSpec(task=MNIST, method="random", queries=QUERIES, checkpoint=LAST, seed=4)
LOSS = BaselineSpec(task=MNIST, method="loss", queries=QUERIES, checkpoint=LAST)

HELPFUL = Ranking(name="helpful", scores=(INFLUENCE,))
HARMFUL = Ranking(name="harmful", scores=(INFLUENCE,), largest=False)
BY_CHANCE = Ranking(name="random", scores=(RANDOM,))
MEAN = Ranking(name="attribution x2", scores=(ATTRIBUTION, LOSS))

ABLATION = AblationSpec(
    task=MNIST,
    recipe=TRAIN,
    rankings=(HELPFUL, HARMFUL, BY_CHANCE),
    sizes=(5000, 1000),
    modes=("remove", "relabel"),
)
NEXT = AblationSpec(
    task=MNIST,
    recipe=TRAIN,
    rankings=(MEAN,),
    seeds=(0, 1),
    sizes=(10,),
    modes=("relabel",),
    relabel="next",
)
LDS = LdsSpec(task=MNIST, recipe=TRAIN, rankings=(HELPFUL, MEAN, BY_CHANCE))
SMALL_LDS = LdsSpec(
    task=MNIST, recipe=TRAIN, rankings=(BY_CHANCE,), seeds=(2, 0), subsets=3, fraction=0.25
)
STABILITY = StabilitySpec(
    task=MNIST,
    methods=(
        (
            HELPFUL,
            Ranking(name="helpful", scores=(InfluenceSpec(task=MNIST, s_tests=(OF_OTHER_SEED,)),)),
        ),
    ),
    top=50,
)
PAPER = PaperSpec(
    task=MNIST, parts=(TRAIN, NORMS, INFLUENCE, ATTRIBUTION, RANDOM, STABILITY, ABLATION, LDS)
)

GOLDEN: list[tuple[Spec, str]] = [
    (DEFAULT_TRAIN, "train-mnist-5afe48a8d458"),
    (TRAIN, "train-mnist-9f17a50bc9bb"),
    (OTHER_SEED, "train-mnist-87a6d7ae2019"),
    (ADAM, "train-mytask-2af203e6313f"),
    (FFDNET_TRAIN, "train-ffdnet-c866de778844"),
    (NORMS, "grad-norms-mnist-ea1f9566a2d8"),
    (SUMMED, "grad-norms-mnist-ac167ca68511"),
    (KEPT, "grad-norms-mnist-a742411f11fd"),
    (OF_FILE, "grad-norms-ffdnet-42b7123ddf8e"),
    (CG, "s-test-mnist-abf2b8b6acb8"),
    (SET_CG, "s-test-mnist-af3008723459"),
    (LISSA, "s-test-mnist-cd3f2d87230a"),
    (EK_FAC, "s-test-ffdnet-534d326330db"),
    (IDENTITY, "s-test-mnist-6df9ee1616ae"),
    (OF_OTHER_SEED, "s-test-mnist-972a58f4e5ba"),
    (INFLUENCE, "influence-mnist-5198f80c4e5e"),
    (TRACIN, "influence-mnist-ff45ea762fb6"),
    (ENSEMBLE, "influence-mnist-fa0509a1866d"),
    (RELATIVE, "influence-ffdnet-000c7b4b434f"),
    (ATTRIBUTION, "attribution-mnist-8c8f38b356b2"),
    (NORMALIZED, "attribution-ffdnet-f2552ff6b62a"),
    (RANDOM, "baseline-mnist-aad89fa07bbe"),
    (LOSS, "baseline-mnist-1750313c80e8"),
    (ABLATION, "ablation-mnist-a7975f228735"),
    (NEXT, "ablation-mnist-23d3d2a14922"),
    (LDS, "lds-mnist-1f64e45db6c9"),
    (SMALL_LDS, "lds-mnist-2c9ab12e8447"),
    (STABILITY, "stability-mnist-8d55109ad558"),
    (PAPER, "paper-mnist-ccdb0ae0374f"),
]


@pytest.mark.parametrize(("spec", "run_id"), GOLDEN, ids=[run_id for _, run_id in GOLDEN])
def test_run_ids_are_those_of_earlier_versions(spec: Spec, run_id: str) -> None:
    assert spec.run_id == run_id
    assert parse_spec(spec.model_dump_json(), "spec.json").run_id == run_id


def test_every_kind_is_pinned() -> None:
    kinds = {spec.kind for spec, _ in GOLDEN}
    assert kinds == {
        "train", "grad-norms", "s-test", "influence", "attribution", "baseline",
        "ablation", "lds", "stability", "paper",
    }  # fmt: skip


def test_the_whole_hash_lasts_too() -> None:
    # Manifests hold it whole.
    assert TRAIN.hash == "9f17a50bc9bbd0ab77347570dbd619047d6492b5763f0f9b07fe12637989b6ea"
