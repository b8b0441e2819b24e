"""The options that several kinds of requests share."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, create_model

from influence_jobs.requests.base import Many, One, Options, Request, option
from influence_jobs.specs.base import Count, Seed, in_words
from influence_jobs.specs.solvers import SolverSettings
from influence_jobs.terms import JobPrecision

TRAINING, SCORES, QUERY = "Training", "Scores", "What to explain"
CURVATURE, EXPERIMENT = "Curvature", "Experiment"
REDUCE = (
    "What is kept of the gradient of a sample by a layer's weight. kernel: (N, C, kh, kw), the "
    "L2 norm over the inputs; channel: (N, C), the same summed over the kernel; layer: (N), the "
    "L2 norm of the whole."
)

LAYER = (
    "Layer: number (from 1, in forward order), module name, parameter name, pattern such as "
    "`*lora*`, or all: all that have a number. module:3 is the module named 3. May be repeated."
)

LAMBDA = (
    "Lambda, which is added to the eigenvalues of the curvature. By default, of a training by "
    "SGD: (1 - momentum) / (learning rate x steps) + weight decay; else .001 of the largest "
    "eigenvalue."
)


class WeightsRequest(Request):
    """Base of the requests that need trained weights of a task."""

    checkpoint: Many[str] = option(
        (),
        "Weights: the end of a train run (RUN), one of its epochs (RUN@EPOCH), all that it keeps"
        " (RUN@all), a file (torch, safetensors, Lightning), or a folder of Hugging Face "
        "weights. May be repeated. By default a model is trained by the preset.",
    )
    preset: One[str | None] = option(
        None,
        "Training preset: a name such as ffdnet-report, or a YAML file of your own; by default the "
        "task's.",
    )
    epochs: One[Count | None] = option(None, "Epochs to train; by default the preset's.")


class SeedOptions(Options):
    """The seed of requests that draw random numbers."""

    seed: One[Seed] = option(0, "Seed of the samples' noise and of all random choices.")


class QueriesOptions(SeedOptions):
    """The outputs to explain."""

    test: Many[Annotated[int, Field(ge=0)]] = option(
        (), "Id of a test sample. May be repeated.", panel=QUERY
    )
    test_set: One[str | None] = option(
        None,
        "Several test samples: a set that the task names, or a file with an id on each line. "
        "Behind an id may stand a point Y,X, a region Y,X,H,W or a span of tokens A:B.",
        panel=QUERY,
    )
    point: Many[Any] = option(
        (),
        "A pixel of the test images, counted from the upper left. May be repeated.",
        panel=QUERY,
        metavar="Y,X",
    )
    region: Many[Any] = option(
        (),
        "A rectangle of the test images, in pixels. May be repeated.",
        panel=QUERY,
        metavar="Y,X,H,W",
    )
    tokens: Many[Any] = option(
        (),
        "A span of tokens of the test sequences, from A to before B. Only tokens that have a "
        "target are counted, from 0. May be repeated.",
        panel=QUERY,
        metavar="A:B",
    )
    quantity: str = option(
        "loss",
        "What is explained. loss; output, if the task lists it: the mean square of the output in"
        " the region, or its mean logit; change, of FFDNet: the mean square of output minus "
        "input.",
        panel=QUERY,
    )
    noise_draws: One[Count] = option(
        1, "Number of noise draws to average over, for tasks with noise.", panel=QUERY
    )


def _solver_options() -> dict[str, Any]:
    """An option for every setting of a solver; None leaves it at the solver's default."""
    kinds: dict[str, Any] = {}
    helps: dict[str, dict[str, list[str]]] = {}  # by option and text the solvers
    for name, settings in SolverSettings.by_name.items():
        for field_name, field in settings.model_fields.items():
            if field_name in ("name", "damping"):
                continue
            said = (field.description or "").rstrip(".")
            value = settings.asked.get(field_name, field.default)
            default = "" if value is None else f"; {_in_help(value)} by default"
            # Samples of a pass are `batch_size` already.
            option_name = "batch" if field_name == "batch_size" else field_name
            kinds[option_name] = field.annotation
            line = f"{said[:1].lower()}{said[1:]}{default}."
            helps.setdefault(option_name, {}).setdefault(line, []).append(name)
    one: Any = One
    return {
        option_name: (
            one[kinds[option_name] | None],
            option(
                None,
                " ".join(f"{', '.join(names)}: {line}" for line, names in lines.items()),
                panel=CURVATURE,
            ),
        )
        for option_name, lines in helps.items()
    }


def _in_help(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else in_words(value)


SOLVERS = "; ".join(f"{name}: {s.summary}" for name, s in SolverSettings.by_name.items())
SETTINGS = _solver_options()


PRECISION = (
    "Precision of the computation and of what is stored; by default float64 for a model that is "
    "built in it, else float32. tf32: float32 with products in TF32 on a GPU. bfloat16: influence "
    "alone, whose training samples are computed in it, and not the solver."
)


def _number_or_word(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class DampingOptions(Options):
    """The curvature's samples, and what is added to its eigenvalues."""

    damping: One[float | None] = option(None, LAMBDA, panel=CURVATURE)
    curvature_samples: Annotated[int | str | None, BeforeValidator(_number_or_word)] = option(
        None,
        "Number of random training samples that the curvature is of, or all. By default all, up "
        "to 10^10 samples x parameters of the model, but at least 10,000.",
        panel=CURVATURE,
    )
    precision: JobPrecision | None = option(None, PRECISION, panel=CURVATURE)


class CurvatureBase(DampingOptions):
    """How the curvature is measured and inverted."""

    solver: Literal[*SolverSettings.by_name] | None = option(  # type: ignore[valid-type]
        None, f"{SOLVERS}.", panel=CURVATURE
    )
    damping: One[float | None] = option(
        None,
        f"{LAMBDA} With --scale, as in published LiSSA settings, lambda is damping x scale.",
        panel=CURVATURE,
    )
    operator: Literal["gauss-newton", "hessian"] = option(
        "gauss-newton",
        "The curvature matrix. Gauss-Newton is positive semidefinite, the Hessian is not.",
        panel=CURVATURE,
    )
    product: Literal["exact", "finite-difference"] = option(
        "exact", "How the Hessian is multiplied with a vector.", panel=CURVATURE
    )


if TYPE_CHECKING:
    CurvatureOptions = CurvatureBase
else:  # adds one option for each setting of each solver
    CurvatureOptions = create_model(
        "CurvatureOptions", __base__=CurvatureBase, __module__=__name__, **SETTINGS
    )
