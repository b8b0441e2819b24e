"""The commands of a table's columns: each runs `infl` as a user does and checks what came out."""

import contextlib
import io
import json
import re
import signal
import subprocess
import sys
import traceback
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import zarr
from numpy.random import Philox
from oracle import Truth, activations, channel_norms, error, solved
from scipy import stats
from torch import nn

TESTS = (0, 1)
TRAINING = ("--epochs", 3, "--batch-size", 8, "--lr", 0.02)
CLASSES = 3  # nothing is relabelled to another

RIGHT, REFUSED, WRONG = "right", "refused", "WRONG"
TRACEBACK, TIMEOUT, UNKNOWN = "TRACEBACK", "timeout", "unknown"


class Refused(Exception):
    """`infl` refused with one line and exit code 2."""


class Wrong(Exception):
    """A number is wrong, or missing, or was not asked for."""


class Crashed(Exception):
    """`infl` ended otherwise than with success or one line."""


class Timeout(BaseException):
    """A cell took too long. No `except Exception` catches it."""


@dataclass
class Cell:
    """What came out.

    Attributes:
        mark: right, refused, WRONG, TRACEBACK, timeout, or unknown where this program failed.
        error: The largest relative error of a right or wrong one.
        words: The refusal, what else is worth saying, or the traceback.
    """

    mark: str
    error: float | None = None
    words: str = ""


@dataclass
class Answer:
    """What `infl` printed."""

    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out.splitlines()[-1])


def infl(*words):
    """Run `infl` in this process.

    Raises:
        Refused: It refused as it should.
        Crashed: It ended otherwise.
    """
    from infl_cli.main import main

    out, err = io.StringIO(), io.StringIO()
    argv, handler = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = ["infl", *map(str, words)]
    code: object = 1
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as leaving:
        code = leaving.code
    except Exception as raised:
        raise Crashed(traceback.format_exc()) from raised
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)
    said = err.getvalue()
    if "Traceback" in said + out.getvalue():
        raise Crashed(said + out.getvalue())
    if code == 0:
        return Answer(out.getvalue(), said)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if code != 2 or len(errors) != 1:
        raise Crashed(f"exit code {code}: {said}{out.getvalue()}")
    line = errors[0].removeprefix("error: ")
    if re.search(r"\b\w*(Error|Exception): ", line):  # an error that nobody meant to raise
        raise Crashed(f"{line}\n{said}")
    raise Refused(line)


class Run:
    """A finished run, read without the library."""

    def __init__(self, root, id):
        self.folder, self.id = Path(root) / id, id
        self.spec = json.loads((self.folder / "spec.json").read_text())

    @property
    def arrays(self):
        return zarr.open_group(self.folder / "data.zarr", mode="r")

    def names(self, prefix):
        """Names of the arrays under a group, such as norms."""
        group = self.arrays
        if prefix not in group:
            return []
        return sorted(name for name, _ in group[prefix].arrays())

    def table(self, name):
        return pq.read_table(self.folder / f"tables/{name}.parquet").to_pylist()


class Subject:
    """A model of the zoo, trained, with a runs folder of its own.

    Args:
        place: The task's file and class, as `--task` takes them.
        kind: The task's class.
        folder: An empty folder.
    """

    def __init__(self, place, kind, folder):
        self.place, self.task, self.folder = place, kind(), folder
        self.runs = str(folder / "runs")
        self._trained = None

    def submit(self, kind, *words):
        """Submit a run of the trained model; the run that it made."""
        answer = infl(
            *("submit", kind, "--checkpoint", self.trained.id, *words),
            *("--runs", self.runs, "--local", "--json"),
        )
        return Run(self.runs, answer.json["run"])

    @property
    def trained(self):
        """The training that everything is of."""
        if self._trained is None:
            answer = infl(
                *("submit", "train", "--task", self.place, *TRAINING),
                *("--runs", self.runs, "--local", "--json"),
            )
            self._trained = Run(self.runs, answer.json["run"])
        return self._trained

    @cached_property
    def weights(self):
        (file,) = (self.trained.folder / "checkpoints").glob("epoch-*.pt")
        return torch.load(file)

    @cached_property
    def truth(self):
        return Truth(self.task, self.weights, TESTS)

    @cached_property
    def roots(self):
        """Roots of Gauss-Newton matrices, by their columns."""
        return {}


TESTED = tuple(word for test in TESTS for word in ("--test", test))


def judged(value, limit, words=""):
    """A right or wrong number."""
    return Cell(RIGHT if value <= limit else WRONG, value, words)


# -- the columns -----------------------------------------------------------------------------------


def check(subject):
    """`infl check` has no complaint, or says what is the matter."""
    try:
        answer = infl("check", subject.place)
    except Crashed as crash:
        failed = re.findall(r"^fail +(.*)", str(crash), re.MULTILINE)
        if "Traceback" in str(crash) or not failed:
            raise
        return Cell(REFUSED, words="; ".join(failed))
    return Cell(RIGHT, words="; ".join(re.findall(r"^warn +(.*)", answer.out, re.MULTILINE)))


def train(subject):
    """Weights after training equal those of a plain loop."""
    recipe, limit, words = subject.trained.spec, _training_limit(subject), ""
    plain = subject.truth.retrained(recipe, 0)
    off = _distance(subject.weights, plain)
    if off > limit:  # does rounding alone lead this training elsewhere?
        noisy = (subject.truth.retrained(recipe, 0, noise=noise) for noise in (1e-7, 3e-7))
        limit = max(_distance(plain, weights) for weights in noisy)
        words = f"rounding alone moves the weights by {limit:.0e}"
    return judged(off, limit, words)


def norms(subject):
    """Norms of every weight of the model, L2 of the whole gradient."""
    model = subject.truth.model
    loose = [name for name, p in model._parameters.items() if p is not None and p.requires_grad]
    named = [word for name in ("*", *loose) for word in ("--layer", name)]
    run = subject.submit("grad-norms", *named, "--reduce", "layer")
    seen = set()
    found, expected = [], []
    for name in run.names("norms"):
        array = run.arrays[f"norms/{name}"]
        parameter = array.attrs.get("parameter") or f"{name}.weight"
        seen.add(parameter)
        gradients = subject.truth.gradients_NP[:, _columns(subject, parameter)]
        found.append(array[:])
        expected.append(gradients.norm(dim=1).numpy())
    weights = {n for n, p in subject.truth.parameters.items() if p.ndim > 1}
    if missing := weights - seen:
        raise Wrong(f"no norms of {', '.join(sorted(missing))}")
    worst = max(
        error(f, e, least=1e-6 * np.max(expected)) for f, e in zip(found, expected, strict=True)
    )
    return judged(worst, _limit(subject, 1e-4), f"{len(found)} weights")


def norms_by_channel(subject):
    """Norms by channel of the layers that `--layer all` takes."""
    run = subject.submit("grad-norms", "--layer", "all")
    errors = []
    for name in run.names("norms"):
        array = run.arrays[f"norms/{name}"]
        parameter = array.attrs.get("parameter") or f"{name}.weight"
        weight = subject.truth.parameters[parameter]
        gradients = subject.truth.gradients_NP[:, _columns(subject, parameter)]
        gradients = gradients.view(-1, *weight.shape)
        module = subject.truth.model.get_submodule(parameter.rpartition(".")[0])
        expected = channel_norms(module, gradients).numpy()
        errors.append(error(array[:].T, expected.T, least=1e-3 * expected.max()))
    return judged(max(errors), _limit(subject, 1e-3), f"{len(errors)} layers")


def s_test_cg(subject):
    """(G + lambda I) x = v: against a dense solve, or by the residual in float64."""
    return _solved(subject, "cg", 3e-3)


def s_test_hessian(subject):
    """(H + lambda I) x = v: the residual in float64 is what the run says; 0 is no difference."""
    run = subject.submit("s-test", *TESTED, "--operator", "hessian", "--tolerance", 1e-3)
    x_QP, columns = _vectors(subject, run, "s_test")
    return _residual(subject, run, {0: x_QP}, columns, subject.truth.hessian_product)


def s_test_lissa(subject):
    """The residual of every repeat in float64 is what the run says."""
    run = subject.submit("s-test", *TESTED, "--solver", "lissa", "--repeats", 2, "--depth", 20)
    vectors = {r: _vectors(subject, run, f"repeats/{r}") for r in range(2)}
    x_RQP, columns = {r: x for r, (x, _) in vectors.items()}, vectors[0][1]
    mean, _ = _vectors(subject, run, "s_test")
    if not torch.allclose(mean, (x_RQP[0] + x_RQP[1]) / 2, rtol=1e-4, atol=1e-6 * mean.abs().max()):
        raise Wrong("s_test is not the mean of the repeats")
    return _residual(subject, run, x_RQP, columns, subject.truth.gauss_newton_product)


def s_test_ek_fac(subject):
    """The residual in float64 is what the run says: of EK-FAC it is large, as it approximates."""
    run = subject.submit("s-test", *TESTED, "--solver", "ek-fac")
    x_QP, columns = _vectors(subject, run, "s_test")
    if not (x_QP * subject.truth.queries_QP[:, columns]).sum(1).gt(0).all():
        raise Wrong("x . v is not positive")
    cell = _residual(subject, run, {0: x_QP}, columns, subject.truth.gauss_newton_product)
    cell.words += _share(subject, columns)
    return cell


def s_test_identity(subject):
    """x is the query's gradient."""
    run = subject.submit("s-test", *TESTED, "--solver", "identity")
    x_QP, columns = _vectors(subject, run, "s_test")
    _require_all(subject, columns)
    return judged(error(x_QP, subject.truth.queries_QP[:, columns]), _limit(subject, 1e-4))


def influence(subject):
    """Scores by CG are its vectors times gradients; the parts of the layers add up to them."""
    run = subject.submit("influence", *TESTED, "--keep-layers")
    solver = _run_of(subject, "s-test", lambda spec: spec == run.spec["s_tests"][0])
    x_QP, columns = _vectors(subject, solver, "s_test")
    expected = (x_QP @ subject.truth.gradients_NP[:, columns].t()).numpy()
    scores = run.arrays["scores"][:]
    parts = sum(run.arrays[f"parts/{name}"][:] for name in run.names("parts"))
    apart = error(parts, expected)
    return judged(max(error(scores, expected), apart), _limit(subject, 1e-4))


def influence_all(subject):
    """Scores of `--layer all` without curvature, against gradients of the layers that it takes."""
    run = subject.submit("influence", *TESTED, "--solver", "identity", "--layer", "all")
    taken = run.spec["s_tests"][0]["modules"]
    columns = _columns_of(subject, taken)
    expected = subject.truth.queries_QP[:, columns] @ subject.truth.gradients_NP[:, columns].t()
    found = error(run.arrays["scores"][:], expected.numpy())
    return judged(found, _limit(subject, 1e-4), f"{len(taken)} layers")


def relative(subject):
    """theta-relative influence without curvature: divided by the length of a sample's gradient.

    Only layers of which EK-FAC is made have a length, which the run says.
    """
    run = subject.submit("influence", *TESTED, "--solver", "identity", "--relative", "theta")
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    modules = dict(subject.truth.model.named_modules())
    named = "Conv1D"  # of transformers
    taken = run.spec["s_tests"][0]["modules"]
    measured = _columns_of(
        subject,
        [
            name
            for name in taken
            if isinstance(modules.get(name), kinds) or type(modules.get(name)).__name__ == named
        ],
    )
    lengths = subject.truth.gradients_NP[:, measured].norm(dim=1)
    dots = subject.truth.queries_QP @ subject.truth.gradients_NP.t()
    found = error(run.arrays["scores"][:], (dots / lengths).numpy())
    return judged(found, _limit(subject, 1e-4), _share(subject, measured))


def attribution(subject):
    """Positive mean activations of the query times norms of the samples, by hand."""
    run = subject.submit("attribution", *TESTED)
    layers, model = run.spec["layers"], subject.truth.model
    means = activations(subject.truth, layers)
    expected = 0
    for layer in layers:
        weight = model.get_submodule(layer).weight
        columns = _columns(subject, f"{layer}.weight")
        gradients = subject.truth.gradients_NP[:, columns].view(-1, *weight.shape)
        norms = channel_norms(model.get_submodule(layer), gradients).numpy()
        expected = expected + means[layer] @ norms.T
    found = error(run.arrays["scores"][:], expected)
    return judged(found, _limit(subject, 1e-3), f"{len(layers)} layers")


def baselines(subject):
    """random, loss, dot-product, by a few lines of NumPy; nearest by its pictures."""
    count, errors, words = subject.truth.count, {}, []
    run = subject.submit("baseline", "--method", "random", *TESTED)
    for row, scores in enumerate(run.arrays["scores"][:]):
        raw = Philox(key=[0, row], counter=[0, 0, 1, 0]).random_raw(count)
        errors[f"random {row}"] = error(scores, (raw >> np.uint64(40)) * 2.0**-24)
    run = subject.submit("baseline", "--method", "loss", *TESTED)
    errors["loss"] = max(error(row, subject.truth.losses_N) for row in run.arrays["scores"][:])
    run = subject.submit("baseline", "--method", "dot-product", *TESTED)
    dots = (subject.truth.queries_QP @ subject.truth.gradients_NP.t()).numpy()
    errors["dot-product"] = error(run.arrays["scores"][:], dots)
    try:
        run = subject.submit("baseline", "--method", "nearest", *TESTED)
        flat = subject.task.pictures(np.arange(count)).reshape(count, -1).astype(float)
        tests = [subject.task.test_picture(test).ravel().astype(float) for test in TESTS]
        distances = [-np.linalg.norm(flat - test, axis=1) for test in tests]
        errors["nearest"] = error(run.arrays["scores"][:], distances)
    except Refused as refusal:
        words = [f"nearest refused: {refusal}"]
    worst = max(errors, key=errors.__getitem__)
    return judged(errors[worst], _limit(subject, 1e-4), "; ".join(words))


def ablation(subject):
    """The query's loss after a retraining without its top samples, retrained by a plain loop."""
    run = subject.submit(
        *("ablation", *TESTED, "--by", "dot-product", "--k", 4, "--mode", "remove")
    )
    scores = _run_of(
        subject, "influence", lambda spec: spec == run.spec["rankings"][0]["scores"][0]
    )
    errors, words = [], ""
    for row in run.table("results"):
        top = np.argsort(-scores.arrays["scores"][row["query"]], kind="stable")[:4].tolist()

        def off(noise, row=row, top=top):
            recipe, seed = run.spec["recipe"], row["seed"]
            weights = subject.truth.retrained(recipe, seed, removed=top, noise=noise)
            expected = _loss(subject, weights, row["test"])
            return abs(row["loss"] - expected) / abs(expected)

        errors.append(off(0.0))
        if errors[-1] > _training_limit(subject):  # a training that rounding alone leads elsewhere?
            words = f"rounding alone moves a loss by {errors[-1]:.0e}"
            errors[-1] = min(off(noise) for noise in (1e-8, 3e-8, 1e-7))
        before = _loss(subject, subject.weights, row["test"])
        errors.append(abs(row["loss_before"] - before) / abs(before))
    return judged(max(errors), _training_limit(subject), words)


def relabelling(subject):
    """The query's loss after a retraining with top samples relabelled."""
    run = subject.submit(
        *("ablation", *TESTED, "--by", "random", "--k", 6, "--mode", "relabel"),
        *("--relabel-to", "report"),
    )
    scores = _run_of(subject, "baseline", lambda spec: spec == run.spec["rankings"][0]["scores"][0])
    errors = []
    for row in run.table("results"):
        top = np.argsort(-scores.arrays["scores"][row["query"]], kind="stable")[:6]
        target = subject.task.targets(subject.truth.test_sample(row["test"]))
        new = 1 if int(target) == 0 else 0
        relabelled = {int(i): new for i in top}
        weights = subject.truth.retrained(run.spec["recipe"], row["seed"], relabelled=relabelled)
        expected = _loss(subject, weights, row["test"])
        errors.append(abs(row["loss"] - expected) / abs(expected))
    return judged(max(errors), _training_limit(subject))


def stability(subject):
    """The rank correlation with scores of a model that a plain loop trained from another seed."""
    run = subject.submit(
        "stability", *TESTED, "--by", "dot-product", "--retrainings", 1, "--top", 5
    )
    weights = subject.truth.retrained(subject.trained.spec, 1)
    other = Truth(subject.task, weights, TESTS)
    errors = []
    for row in run.table("results"):
        both = [
            (t.queries_QP[row["query"]] @ t.gradients_NP.t()).numpy()
            for t in (subject.truth, other)
        ]
        expected = stats.spearmanr(*both).statistic
        tops = [set(np.argsort(-scores)[:5]) for scores in both]
        errors.append(abs(row["rank_correlation"] - expected))
        if errors[-1] < 1e-6 and abs(row["overlap"] - len(tops[0] & tops[1]) / 5) > 1e-6:
            raise Wrong(f"overlap {row['overlap']}")
    # Two neighbours that change places move it by 1e-3.
    return judged(max(errors), 100 * _training_limit(subject))


def lds(subject):
    """The losses on subsets, one by a plain loop; the score by SciPy from losses and scores."""
    run = subject.submit("lds", *TESTED, "--by", "dot-product", "--subsets", 4)
    scores = _run_of(
        subject, "influence", lambda spec: spec == run.spec["rankings"][0]["scores"][0]
    )
    count = subject.truth.count
    subsets = []
    for index in range(4):
        draws = np.random.Generator(np.random.Philox(key=index, counter=[0, 0, 2, 0]))
        subsets.append(draws.choice(count, count // 2, replace=False))
    losses = np.array([row["loss"] for row in run.table("losses")]).reshape(4, len(TESTS))
    removed = sorted({*range(count)} - {*subsets[1].tolist()})
    weights = subject.truth.retrained(run.spec["recipe"], 1, removed=removed)
    expected = np.array([_loss(subject, weights, test) for test in TESTS])
    for row in run.table("results"):
        predicted = [-scores.arrays["scores"][row["query"]][subset].sum() for subset in subsets]
        found = stats.spearmanr(predicted, losses[:, row["query"]]).statistic
        if not abs(found - row["lds"]) < 1e-6:
            raise Wrong(f"lds {row['lds']}, not {found}")
    return judged(float((np.abs(losses[1] - expected) / expected).max()), _training_limit(subject))


def top(subject):
    """The order of stored scores and norms."""
    scored = subject.submit("influence", *TESTED, "--solver", "identity")
    answer = infl("top", scored.id, "--k", 5, "--runs", subject.runs, "--json").json
    told = {}
    for row in answer["top"]["scores"]:
        told.setdefault((row["test"], row["side"]), []).append(row["sample"])
    for test, row in zip(TESTS, scored.arrays["scores"][:], strict=True):
        for side, keys in (("helpful", -row), ("harmful", row)):
            if told[test, side] != (order := np.argsort(keys, kind="stable")[:5].tolist()):
                raise Wrong(f"test {test}, {side}: {told[test, side]}, not {order}")
    normed = subject.submit("grad-norms", "--layer", "all", "--reduce", "layer")
    answer = infl("top", normed.id, "--k", 5, "--runs", subject.runs, "--json").json
    for name, rows in answer["top"].items():
        order = np.argsort(-normed.arrays[name][:], kind="stable")[:5].tolist()
        if [row["sample"] for row in rows] != order:
            raise Wrong(f"{name}: {rows}, not {order}")
    return Cell(RIGHT)


def report(subject):
    """One page is written, and has the ids of the runs and of the samples at the top."""
    runs = [
        subject.submit("influence", *TESTED, "--solver", "identity"),
        subject.submit("grad-norms", "--layer", "all", "--reduce", "layer"),
    ]
    out = subject.folder / "report"
    infl("report", subject.trained.id, *(r.id for r in runs), "--runs", subject.runs, "--out", out)
    html = (out / "report.html").read_text()
    for run in runs:
        if run.id not in html:
            raise Wrong(f"{run.id} is not in the report")
    best = int(np.argmax(runs[0].arrays["scores"][0]))
    if not re.search(rf">\s*{best}\s*<", html) and f"{best}" not in html:
        raise Wrong(f"sample {best} is not in the report")
    return Cell(RIGHT)


def view(subject):
    """The viewer answers with 200, and its pages of a query and a sample too."""
    run = subject.submit("influence", *TESTED, "--solver", "identity")
    code = "from infl_cli.entry import main; main()"
    command = [sys.executable, "-c", code, "view", run.id, "--runs", subject.runs]
    viewer = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=subject.folder
    )
    try:
        url = viewer.stdout.readline().strip()
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with opener.open(url, timeout=60) as answer:
            page = answer.read().decode()
        if run.id not in page:
            raise Wrong("the page does not name the run")
        links = sorted(set(re.findall(r'href="(/[^"#]+)"', page)))
        for link in links[:6]:
            with opener.open(url.partition("/?")[0] + link, timeout=60) as answer:
                if answer.status != 200:
                    raise Wrong(f"{link}: {answer.status}")
    except OSError as failed:
        viewer.send_signal(signal.SIGINT)
        raise Crashed(f"{failed}\n{viewer.communicate(timeout=30)[1]}") from failed
    finally:
        viewer.kill()
        viewer.wait()
    return Cell(RIGHT)


COLUMNS = {
    "check": check,
    "train": train,
    "norms": norms,
    "norms by channel": norms_by_channel,
    "cg": s_test_cg,
    "cg hessian": s_test_hessian,
    "lissa": s_test_lissa,
    "ek-fac": s_test_ek_fac,
    "identity": s_test_identity,
    "influence": influence,
    "influence all": influence_all,
    "relative": relative,
    "attribution": attribution,
    "baselines": baselines,
    "ablation": ablation,
    "relabelling": relabelling,
    "stability": stability,
    "lds": lds,
    "top": top,
    "report": report,
    "view": view,
}


def cell(subject, column, seconds):
    """Fill a cell, within a time."""

    def stop(*_):
        raise Timeout

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        return COLUMNS[column](subject)
    except Timeout:
        return Cell(TIMEOUT, words=f"after {seconds} s")
    except Refused as refusal:
        return Cell(REFUSED, words=str(refusal))
    except Wrong as wrong:
        return Cell(WRONG, words=str(wrong))
    except Crashed as crash:
        return Cell(TRACEBACK, words=str(crash))
    except Exception:  # noqa: BLE001  (of this program)
        return Cell(UNKNOWN, words=traceback.format_exc())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# -- pieces ----------------------------------------------------------------------------------------


def _limit(subject, usual):
    """How far a number may be off."""
    return usual


def _training_limit(subject):
    """How far a loss after training may be off: half precision is trained as it is."""
    half = any(p.dtype == torch.bfloat16 for p in subject.task.model().parameters())
    return 0.05 if half else 2e-3


def _columns(subject, parameter):
    return subject.truth.columns([(parameter, None)])


def _columns_of(subject, modules):
    """Columns of the parameters of some modules' own, each once, by whichever name."""
    first = {id(p): name for name, p in subject.truth.parameters.items()}
    model = dict(subject.truth.model.named_modules(remove_duplicate=False))
    own = [
        first[id(p)]
        for module in modules
        for p in model[module]._parameters.values()
        if id(p) in first
    ]
    return subject.truth.columns([(name, None) for name in dict.fromkeys(own)])


def _share(subject, columns):
    """What share of the parameters these columns are, if not all."""
    share = len(columns) / subject.truth.gradients_NP.shape[1]
    return "" if share == 1 else f", {share:.0%} of the parameters"


def _vectors(subject, run, name):
    """s_test vectors and their parameters' columns."""
    array = run.arrays[name]
    columns = subject.truth.columns([tuple(p) for p in array.attrs["parameters"]])
    return torch.from_numpy(array[:]).double(), columns


def _require_all(subject, columns):
    missing = subject.truth.gradients_NP.shape[1] - len(columns)
    if missing:
        raise Wrong(f"{missing} trained parameters are missing")


def _solved(subject, solver, limit):
    run = subject.submit("s-test", *TESTED, "--solver", solver)
    x_QP, columns = _vectors(subject, run, "s_test")
    _require_all(subject, columns)
    solutions = run.table("solutions")
    damping = solutions[0]["damping"]
    truth, v_QP = subject.truth, subject.truth.queries_QP[:, columns]
    root = truth.gauss_newton_root(columns)
    if root is None:
        cell = _residual(subject, run, {0: x_QP}, columns, truth.gauss_newton_product)
        cell.words += ", too large for a dense solve"
        return cell
    largest = float(torch.linalg.eigvalsh(root @ root.t()).max())
    least, most = _lambdas(run.spec, len(subject.truth.gradients_NP), largest)
    if not least < damping < most:
        raise Wrong(f"lambda is {damping:.3g}, and should be {least:.3g} to {most:.3g}")
    return judged(error(x_QP, solved(root, v_QP, damping)), limit, "dense")


def _lambdas(spec, samples, largest):
    """Bounds of the lambda that a request without one has."""
    checkpoint = spec["checkpoint"]
    train = checkpoint["train"]
    if train["optimizer"] == "sgd" and train["schedule"] == "constant":
        steps = checkpoint["epoch"] * -(-samples // train["batch_size"])
        found = train["weight_decay"] + (1 - train["momentum"]) / (train["lr"] * steps)
        return 0.99 * found, 1.01 * found  # it has three digits
    return 0.0005 * largest, 0.00103 * largest  # the eigenvalue is an estimate from below


def _residual(subject, run, vectors, columns, product):
    """Whether the residuals of {repeat: x} are those of the table; the error is the difference."""
    v_QP = subject.truth.queries_QP[:, columns]
    apart, claims = [0.0], []
    for row in run.table("solutions"):
        x_QP = vectors[row["repeat"]][[row["query"]]]
        v = v_QP[[row["query"]]]
        rest = v - product(x_QP, columns) - row["damping"] * x_QP
        residual = float(rest.norm() / v.norm())
        claims.append(row["residual"])
        apart.append(max(0.0, abs(residual - row["residual"]) - 0.02 * row["residual"]))
    return judged(max(apart), 1e-3, f"residual {max(claims):.2g}")


def _run_of(subject, kind, fits):
    for folder in Path(subject.runs).glob(f"{kind}-*"):
        run = Run(subject.runs, folder.name)
        if fits(run.spec):
            return run
    return None


@torch.no_grad()
def _loss(subject, weights, test):
    """The loss of a test sample by a model with these weights, in eval mode."""
    model = subject.task.model()
    model.load_state_dict(weights)
    model.eval()
    from influence_jobs import Draw

    batch = subject.task.test_batch(torch.tensor([test]), Draw(0))
    return float(subject.task.losses(model, batch))


def _distance(ours, plain):
    """The largest difference of weights, relative to the largest weight of each tensor."""
    apart = 0.0
    floating = [value for value in plain.values() if value.is_floating_point() and value.numel()]
    least = 0.01 * max(float(value.abs().max()) for value in floating)
    for name, expected in plain.items():
        if expected.is_floating_point() and expected.numel():
            scale = max(float(expected.abs().max()), least)
            apart = max(apart, float((ours[name] - expected).abs().max()) / scale)
    return apart
