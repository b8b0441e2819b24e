"""The options that requests of several kinds share, each written once."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, create_model

from influence_jobs.requests.base import Many, One, Options, Request, option
from influence_jobs.specs.base import Count, Seed
from influence_jobs.specs.solvers import SolverSettings

TRAINING, SCORES, QUERY = "Training", "Scores", "What to explain"
CURVATURE, EXPERIMENT = "Curvature", "Experiment"
REDUCE = (
    "kernel: (N, C, kh, kw), L2 norm over the inputs; channel: (N, C), those summed over the "
    "kernel; layer: (N), L2 norm of the whole weight gradient."
)

LAYER = (
    "Layer number (from 1, in forward order), module name, parameter name, pattern such as "
    "'*lora*', or all: all that have a number. module:3 is the module named 3. May be repeated."
)


class WeightsRequest(Request):
    """Which of a task's trained weights."""

    checkpoint: Many[str] = option(
        (),
        "Train run, RUN@EPOCH, RUN@all, or a state-dict file. May be repeated. One is trained by "
        "the preset if none is named.",
    )
    preset: One[str | None] = option(None, "Training preset: a name, or a YAML file of your own.")
    epochs: One[Count | None] = option(None, "Epochs to train; the preset's by default.")


class SeedOptions(Options):
    """Work that draws random numbers."""

    seed: One[Seed] = option(0, "Seed of the sample noise, and of what is drawn at random.")


class QueriesOptions(SeedOptions):
    """Which outputs are explained."""

    test: Many[Annotated[int, Field(ge=0)]] = option(
        (), "Id of a test sample. May be repeated.", panel=QUERY
    )
    test_set: One[str | None] = option(
        None, "A file of test ids, one a line, or a named set of the task's.", panel=QUERY
    )
    point: Many[Any] = option(
        (),
        "Pixel of the test images, from the upper left. May be repeated.",
        panel=QUERY,
        metavar="Y,X",
    )
    region: Many[Any] = option(
        (),
        "Rectangle of the test images, in pixels. May be repeated.",
        panel=QUERY,
        metavar="Y,X,H,W",
    )
    quantity: str = option(
        "loss",
        "What is measured: loss; for denoisers also output (mean square of the region's output) "
        "or change (of output minus input).",
        panel=QUERY,
    )
    noise_draws: One[Count] = option(
        1, "Draws of the samples' noise, averaged; for tasks that have noise.", panel=QUERY
    )


def _solver_options() -> dict[str, Any]:
    """An option for every setting of a solver; None leaves it at the solver's default."""
    found: dict[str, Any] = {}
    for name, settings in SolverSettings.by_name.items():
        for field_name, field in settings.model_fields.items():
            if field_name in ("name", "damping"):
                continue
            said = (field.description or "").rstrip(".")
            default = "" if field.default is None else f"; {field.default:g} by default"
            # Samples of a pass are `batch_size` already.
            option_name = "batch" if field_name == "batch_size" else field_name
            kind: Any = float if "float" in str(field.annotation) else int
            found[option_name] = (
                One[kind | None],  # type: ignore[misc]
                option(None, f"{name}: {said[:1].lower()}{said[1:]}{default}.", panel=CURVATURE),
            )
    return found


SOLVERS = "; ".join(f"{name}: {s.summary}" for name, s in SolverSettings.by_name.items())
SETTINGS = _solver_options()


def _number_or_word(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class CurvatureBase(Options):
    """How the curvature is measured and inverted."""

    solver: Literal[*SolverSettings.by_name] | None = option(  # type: ignore[valid-type]
        None, f"{SOLVERS}.", panel=CURVATURE
    )
    damping: One[float | None] = option(
        None,
        "Lambda, added to the curvature's eigenvalues; by default a part of the largest. "
        "With --scale it is LiSSA's own, and lambda is damping x scale, as in published settings.",
        panel=CURVATURE,
    )
    operator: Literal["gauss-newton", "hessian"] = option(
        "gauss-newton",
        "Gauss-Newton is positive semidefinite, the Hessian is not.",
        panel=CURVATURE,
    )
    product: Literal["exact", "finite-difference"] = option(
        "exact", "How the Hessian is multiplied.", panel=CURVATURE
    )
    curvature_samples: Annotated[int | str, BeforeValidator(_number_or_word)] = option(
        10_000,
        "Random training samples the curvature is measured on, or all.",
        panel=CURVATURE,
    )


if TYPE_CHECKING:
    CurvatureOptions = CurvatureBase
else:  # with an option for every setting of every solver
    CurvatureOptions = create_model(
        "CurvatureOptions", __base__=CurvatureBase, __module__=__name__, **SETTINGS
    )
