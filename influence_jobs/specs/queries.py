"""Queries: the test samples, or regions of them, that are explained."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from influence_jobs.specs.base import Count, Model, Seed, listed
from influence_jobs.terms import Region


class Query(Model):
    """One output to explain: a test sample, or a region (y, x, height, width) of a test image."""

    test: Annotated[int, Field(ge=0)]
    region: Region | None = None

    @model_validator(mode="after")
    def _region_is_not_empty(self) -> Self:
        if self.region is not None and (min(self.region[:2]) < 0 or min(self.region[2:]) < 1):
            raise ValueError(
                f"region {','.join(map(str, self.region))} is empty or outside the image: "
                "y,x,height,width from 0,0 and at least 1 x 1"
            )
        return self


class Queries(Model):
    """The outputs to explain, and how each is measured.

    Attributes:
        items: The queries; the position of a query is its row in the results.
        quantity: The quantity measured of the output (`Task.quantities`).
        noise_draws: The measurement is the mean over this many draws of the test samples' noise.
        seed: Seed of the noise.
    """

    items: Annotated[tuple[Query, ...], Field(min_length=1)]
    quantity: str = "loss"
    noise_draws: Count = 1
    seed: Seed = 0

    @model_validator(mode="after")
    def _no_query_twice(self) -> Self:
        seen: set[Query] = set()
        for query in self.items:
            if query in seen:
                raise ValueError(f"test {query.test} is asked for twice")
            seen.add(query)
        return self

    def words(self) -> str:
        items = [
            f"{q.test}" + (f" at {q.region[0]},{q.region[1]}" if q.region else "")
            for q in self.items
        ]
        draws = f", mean over {self.noise_draws} noise draws" if self.noise_draws > 1 else ""
        return f"{self.quantity} of test samples {listed(items)}{draws}"
