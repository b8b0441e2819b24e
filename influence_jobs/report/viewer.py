"""The viewer: shows runs in a browser on this machine, read only, to users with the token."""

from collections.abc import Callable, Sequence
from importlib import resources

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from influence_jobs.errors import InflError
from influence_jobs.report.guarded import Guarded
from influence_jobs.report.pages import Pages
from influence_jobs.store.run import Run

HOSTS = ["127.0.0.1", "localhost"]  # any other name is another site that was rebound here


def make_viewer(
    runs: Sequence[Run], token: str, dashboard: Callable[[Run], str | None] = lambda _: None
) -> Starlette:
    """The web application. Every address answers only GET requests with the token.

    Args:
        runs: The runs to show, all of one task and its data; they may be unfinished. A set of runs
            is shown as its members.
        token: The browser gives it once as `?token=` and then keeps it in a cookie.
        dashboard: The address of the Ray dashboard of a run's job, if it has one.

    Raises:
        SpecError: The runs are of several tasks, whose sample ids mean different samples.
    """
    pages = Pages(runs, dashboard)
    return Starlette(
        routes=[
            Route("/", pages.overview),
            Route("/progress", pages.progress),
            Route("/query", pages.query),
            Route("/sample/{sample:int}", pages.sample),
            Route("/image/{test:int}", pages.image),
            Route("/image/{test:int}/explained", pages.explained),
            Route("/picture/{test:int}.png", pages.picture),
            Route("/tables/{run}/{name}.parquet", pages.table),
            Route("/static/{name}", _static),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS),
            Middleware(Guarded, token=token),
        ],
        exception_handlers={InflError: pages.refused, HTTPException: pages.refused},
    )


def _static(request: Request) -> Response:
    kinds = {"style.css": "text/css", "viewer.css": "text/css", "viewer.js": "text/javascript"}
    name = request.path_params["name"]
    if name not in kinds:
        raise HTTPException(404, "there is no such file")
    text = resources.files("influence_jobs.report").joinpath("templates", name).read_text()
    return Response(text, media_type=kinds[name])
