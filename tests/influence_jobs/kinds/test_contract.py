"""Every kind of run has all its pieces. A missing piece fails here, not after the compute."""

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any, get_args

import pytest
from pydantic import create_model

from influence_jobs.jobs.base import Job
from influence_jobs.kinds import find_kind, kind_of, kinds
from influence_jobs.kinds.base import Kind, Panel
from influence_jobs.kinds.baseline.job import BaselineJob, scorer
from influence_jobs.kinds.baseline.spec import METHODS
from influence_jobs.kinds.influence.spec import InfluenceSpec
from influence_jobs.requests.base import Request
from influence_jobs.specs.base import Spec
from influence_jobs.specs.scores import ScoresSpec
from influence_jobs.views.base import View

BASES: dict[str, type] = {"request_type": Request, "job_type": Job, "view_type": View}


def missing(kind: Kind) -> Iterator[str]:
    """The missing pieces of a kind, a line for each."""
    if not issubclass(kind.spec, Spec) or kind.spec.__module__ != f"{kind.folder}.spec":
        yield f"{kind.name}: its spec is not in {kind.folder}.spec"
    if issubclass(kind.spec, ScoresSpec) and not (
        "queries" in kind.spec.model_fields or hasattr(kind.spec, "queries")
    ):
        yield f"{kind.name}: {kind.spec.__name__} lacks queries"
    if kind.panel not in get_args(Panel):
        yield f"{kind.name}: there is no panel {kind.panel!r}"
    for piece, base in BASES.items():
        try:
            found: Any = getattr(kind, piece)
        except (ModuleNotFoundError, AttributeError) as error:
            yield f"{kind.name}: {error}"
            continue
        if not issubclass(found, base):
            yield f"{kind.name}: {found.__name__} is no {base.__name__}"
        if inspect.isabstract(found):
            yield f"{kind.name}: {found.__name__} lacks {', '.join(found.__abstractmethods__)}"
        if not (found.__doc__ or "").strip():
            yield f"{kind.name}: {found.__name__} has no docstring"
        if base is Request:
            for name, field in found.model_fields.items():
                if name != "task_options" and not field.description:
                    yield f"{kind.name}: option {name} has no help"


@pytest.mark.parametrize("name", kinds())
def test_a_kind_has_all_its_pieces(name: str) -> None:
    assert list(missing(kinds()[name])) == []


@pytest.mark.parametrize("name", kinds())
def test_a_job_is_of_its_kinds_spec(name: str) -> None:
    assert kinds()[name].job_type.spec_type is kinds()[name].spec


@pytest.mark.parametrize("method", METHODS)
def test_a_scoring_method_has_all_its_pieces(method: str) -> None:
    assert hasattr(BaselineJob, scorer(method))
    for kind in ("ablation", "lds", "stability"):
        said = kinds()[kind].request_type.model_fields["by"].description
        assert method in re.split("[:,;] ", said)
    assert f"{method}: " in kinds()["baseline"].request_type.model_fields["method"].description


def test_kinds_are_found_by_name_and_by_spec() -> None:
    assert {kind.spec for kind in kinds().values()} == set(Spec._by_kind.values())
    for name, kind in kinds().items():
        assert find_kind(name) is kind
        assert kind.folder == f"influence_jobs.kinds.{name.replace('-', '_')}"
        spec: Any = kind.spec
        assert kind_of(spec.model_construct(kind=name)) is kind


def test_what_a_kind_forgets_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing view, half a view, and an option without help are all found."""
    whole = kinds()["baseline"]
    assert list(missing(replace(whole, view="NoView"))) != []
    view = import_module("influence_jobs.kinds.baseline.view")

    class HalfView(View[Any]):
        """Half a view."""

        title = "half"

    monkeypatch.setattr(view, "HalfView", HalfView, raising=False)
    (said,) = missing(replace(whole, view="HalfView"))
    assert "HalfView lacks" in said
    assert "certainty" in said

    with monkeypatch.context() as patch:
        patch.delattr(InfluenceSpec, "queries")
        assert list(missing(kinds()["influence"])) == ["influence: InfluenceSpec lacks queries"]

    mute = create_model("Mute", __base__=whole.request_type, __doc__="Mute.", unsaid=(int, 0))

    request = sys.modules["influence_jobs.kinds.baseline.request"]
    monkeypatch.setattr(request, "Mute", mute, raising=False)
    assert list(missing(replace(whole, request="Mute"))) == ["baseline: option unsaid has no help"]
