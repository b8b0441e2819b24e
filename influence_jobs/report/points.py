"""The viewer's pages of test images whose points and regions are explained."""

from typing import Any

import numpy as np
from starlette.background import BackgroundTask
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from influence_jobs.errors import SpecError
from influence_jobs.report.addresses import number, positive
from influence_jobs.report.commands import influence_of, norms_of
from influence_jobs.report.explain import Explainer
from influence_jobs.report.selection import MOST, TOP, table_file
from influence_jobs.report.shelf import Shelf
from influence_jobs.store.layout import SCORES
from influence_jobs.terms import Region
from influence_jobs.views.norms import StoredNorms
from influence_jobs.views.sheets import query_cell, query_words, region_of, sample_cells


class Points:
    """Answers requests for points and regions of test images."""

    def __init__(self, shelf: Shelf):
        self.shelf = shelf

    def image(self, request: Request) -> Response:
        test, given, shelf = request.path_params["test"], request.query_params, self.shelf
        size = self._size(test)
        explainer = shelf.explaining()
        has_point = "y" in given
        norms = explainer.norms if explainer else None
        layers = _layers(norms, given) if norms else ()
        normalize = norms is not None and norms.normalize
        limit = (norms.exclude_norm_above if norms else None) or ""
        page = shelf.render(
            "viewer-image.html.j2",
            test=test,
            known=query_words(shelf.task, test),
            size=size,
            pictured=query_cell(shelf.task, test)[0].picture is not None,
            count=len(shelf.task.test_data()),
            norms=norms,
            chosen=layers,
            values=given,
            normalize=given.get("normalize") == "yes" if has_point else normalize,
            limit=given.get("limit", "") if has_point else limit,
            stored=self._stored(test),
            answer=self._explained(request, test) if has_point else None,
        )
        if explainer and norms and set(layers) <= set(norms.layers):
            page.background = BackgroundTask(explainer.prepare, test, layers)
        return page

    def explained(self, request: Request) -> Response:
        test = request.path_params["test"]
        return self.shelf.render("viewer-explained.html.j2", answer=self._explained(request, test))

    def samples(self, request: Request) -> Response:
        """The samples that explain a point, as a file."""
        test, kind = request.path_params["test"], request.path_params["kind"]
        size, explainer = self._size(test), self.shelf.explaining()
        if explainer is None:
            raise SpecError(
                "no run here has the norms that explain points: compute them by infl submit "
                "grad-norms --layer all"
            )
        region = _region(request.query_params, size)
        head = {"run": explainer.norms.run.id, "array": SCORES, "test": test}
        head |= {"region": ",".join(map(str, region)), "side": "attribution"}
        ranked = self._ranked(explainer, test, region, request.query_params)
        rows = [
            {**head, "rank": rank, "score": row["score"], **row} | head | {"rank": rank}
            for rank, row in enumerate(ranked, start=1)
        ]
        return table_file(rows, kind, f"test-{test}-{head['region']}")

    def _size(self, test: int) -> tuple[int, int]:
        shelf = self.shelf
        if not shelf.has_regions or not 0 <= test < len(shelf.task.test_data()):
            why = f": {shelf.absent}" if shelf.absent else ""
            raise HTTPException(
                404, f"there is no test image {test} whose points can be explained{why}"
            )
        size = shelf.task.test_size(test)
        assert size is not None
        return size

    def _stored(self, test: int) -> list[tuple[str, Region]]:
        """The addresses of the stored queries of an image's regions."""
        return [
            (self.shelf.query_link(row), region)
            for row in self.shelf.queries()
            if row["test"] == test and (region := region_of(row["region"])) is not None
        ]

    def _explained(self, request: Request, test: int) -> dict[str, Any]:
        shelf, given = self.shelf, request.query_params
        region = _region(given, self._size(test))
        runs = [*shelf.runs.values()]
        answer: dict[str, Any] = {
            "region": region,
            "test": test,
            "stored": [link for link, other in self._stored(test) if other == region],
            "near": [
                (link, other)
                for link, other in self._stored(test)
                if other != region and _overlap(other, region)
            ],
            "influence": influence_of(runs, test, region),
            "of": None,
            "address": request.url.query,
        }
        explainer = shelf.explaining()
        if explainer is None:
            answer["norms"] = norms_of(runs)
        else:
            ranked = self._ranked(explainer, test, region, given)
            answer |= {
                "cells": sample_cells(explainer.task, ranked, {}),
                "of": explainer.norms.run.id,
                "layers": _layers(explainer.norms, given),
            }
        return answer

    @staticmethod
    def _ranked(
        explainer: Explainer, test: int, region: Region, given: QueryParams
    ) -> list[dict[str, Any]]:
        found = explainer.top(
            test,
            region[:2],
            number(given, "k", TOP, below=MOST + 1),
            extent=region[2:],
            layers=_layers(explainer.norms, given),
            normalize=given.get("normalize") == "yes",
            exclude_norm_above=positive(given, "limit"),
        )
        ids = np.array([sample for sample, _ in found], dtype=np.int64)
        columns = {k: np.asarray(v).tolist() for k, v in explainer.task.describe(ids).items()}
        return [
            # Ours come first, and count where a column of the task has their name.
            {"sample": sample, "score": score}
            | {k: v[i] for k, v in columns.items()}
            | {"sample": sample, "score": score}
            for i, (sample, score) in enumerate(found)
        ]


def _layers(norms: StoredNorms, given: QueryParams) -> tuple[str, ...]:
    """The layer that the address names, or else the chosen layers."""
    return (given["layer"],) if given.get("layer") else norms.chosen


def _region(given: QueryParams, size: tuple[int, int]) -> Region:
    """The region of an address; without a height and a width the point.

    Raises:
        SpecError: It is not inside the image.
    """
    y, x = number(given, "y", 0, below=size[0]), number(given, "x", 0, below=size[1])
    height = number(given, "h", 1, below=size[0] - y + 1) if given.get("h") else 1
    width = number(given, "w", 1, below=size[1] - x + 1) if given.get("w") else 1
    if not height or not width:
        raise SpecError(f"a region of {height} x {width} pixels is empty: write at least 1 x 1")
    return y, x, height, width


def _overlap(one: Region, other: Region) -> bool:
    return all(
        one[axis] < other[axis] + other[axis + 2] and other[axis] < one[axis] + one[axis + 2]
        for axis in (0, 1)
    )
