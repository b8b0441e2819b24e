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
from influence_jobs.report.points import Points
from influence_jobs.report.shelf import Shelf
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
    shelf = Shelf(runs)
    pages, points = Pages(shelf, dashboard), Points(shelf)
    return Starlette(
        routes=[
            Route("/", pages.overview),
            Route("/progress", pages.progress),
            Route("/queries.{kind}", pages.queries),
            Route("/query", pages.query),
            Route("/query/samples.{kind}", pages.samples),
            Route("/ranked/{run}.{kind}", pages.ranked),
            Route("/sample/{sample:int}", pages.sample),
            Route("/sample/{sample:int}/queries.{kind}", pages.influenced),
            Route("/image/{test:int}", points.image),
            Route("/image/{test:int}/explained", points.explained),
            Route("/image/{test:int}/samples.{kind}", points.samples),
            Route("/picture/{test:int}.png", pages.picture),
            Route("/sound/sample/{sample:int}.wav", pages.sound),
            Route("/sound/test/{test:int}.wav", pages.test_sound),
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
