"""The options of scores: which outputs are explained, and how the curvature is inverted."""

from dataclasses import dataclass
from typing import Annotated, Literal

import typer

_QUERY = "What to explain"
_CURVATURE = "Curvature"


@dataclass(frozen=True)
class QueryOptions:
    """Which outputs are explained."""

    test: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Id of a test sample. May be repeated.", rich_help_panel=_QUERY),
    ] = None
    test_set: Annotated[
        str | None,
        typer.Option(
            help="A file of test ids, one a line, or paper: the ten of the report.",
            rich_help_panel=_QUERY,
        ),
    ] = None
    point: Annotated[
        list[str] | None,
        typer.Option(
            metavar="Y,X",
            help="Pixel of the test images, from the upper left. May be repeated.",
            rich_help_panel=_QUERY,
        ),
    ] = None
    region: Annotated[
        list[str] | None,
        typer.Option(
            metavar="Y,X,H,W",
            help="Rectangle of the test images, in pixels. May be repeated.",
            rich_help_panel=_QUERY,
        ),
    ] = None
    quantity: Annotated[
        str,
        typer.Option(
            help="What is measured: loss; for denoisers also output (mean square of the region's output) or "
            "change (of output minus input).",
            rich_help_panel=_QUERY,
        ),
    ] = "loss"
    noise_draws: Annotated[
        int,
        typer.Option(
            min=1,
            help="Draws of the samples' noise, averaged; for tasks that have noise.",
            rich_help_panel=_QUERY,
        ),
    ] = 1


@dataclass(frozen=True)
class CurvatureOptions:
    """What s_test vectors are made by."""

    solver: Annotated[
        Literal["cg", "lissa", "ek-fac", "identity"] | None,
        typer.Option(
            help="cg: batched conjugate gradients, the default; lissa: stochastic recursion, the default if one "
            "of its settings is given; ek-fac: Kronecker factors; identity: no curvature.",
            rich_help_panel=_CURVATURE,
        ),
    ] = None
    damping: Annotated[
        float | None,
        typer.Option(
            help="Lambda, added to the curvature's eigenvalues; by default a part of the largest. "
            "With --scale it is LiSSA's own, and lambda is damping x scale, as in published settings.",
            rich_help_panel=_CURVATURE,
        ),
    ] = None
    operator: Annotated[
        Literal["gauss-newton", "hessian"],
        typer.Option(
            help="Gauss-Newton is positive semidefinite, the Hessian is not.",
            rich_help_panel=_CURVATURE,
        ),
    ] = "gauss-newton"
    product: Annotated[
        Literal["exact", "finite-difference"],
        typer.Option(help="How the Hessian is multiplied.", rich_help_panel=_CURVATURE),
    ] = "exact"
    curvature_samples: Annotated[
        str,
        typer.Option(
            help="Random training samples the curvature is measured on, or all.",
            rich_help_panel=_CURVATURE,
        ),
    ] = "10000"
    tolerance: Annotated[
        float | None,
        typer.Option(help="cg: relative residual; 1e-4 by default.", rich_help_panel=_CURVATURE),
    ] = None
    max_iterations: Annotated[
        int | None,
        typer.Option(min=1, help="cg: at most; 200 by default.", rich_help_panel=_CURVATURE),
    ] = None
    scale: Annotated[
        float | None,
        typer.Option(help="lissa: measured if not given.", rich_help_panel=_CURVATURE),
    ] = None
    depth: Annotated[
        int | None,
        typer.Option(
            min=1, help="lissa: steps of a chain; chosen if not given.", rich_help_panel=_CURVATURE
        ),
    ] = None
    batch: Annotated[
        int | None,
        typer.Option(
            min=1, help="lissa: samples of a step; chosen if not given.", rich_help_panel=_CURVATURE
        ),
    ] = None
    repeats: Annotated[
        int | None,
        typer.Option(
            min=1, help="lissa: chains, averaged; 5 by default.", rich_help_panel=_CURVATURE
        ),
    ] = None
