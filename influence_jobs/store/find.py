"""Find runs in the folder of all runs."""

from collections.abc import Sequence
from contextlib import suppress
from textwrap import shorten

from influence_jobs.errors import StoreError
from influence_jobs.specs.base import Spec
from influence_jobs.store import layout
from influence_jobs.store.files import LocalFiles, open_files
from influence_jobs.store.folder import for_runs
from influence_jobs.store.run import Run

HASH = 6  # characters of a hash that tell runs apart
MANY, FIELDS, WIDTH = 8, 3, 48  # runs, fields of each, and characters of a field in a message


def run_ids(root: str) -> list[str]:
    """Ids of the runs in a folder, sorted; other folders there are ignored.

    The folder of all runs is the user's own, so that a run in it may be a link to another disk.
    """
    files = open_files(root)
    if isinstance(files, LocalFiles):
        return [name for name in files.folders() if layout.SPEC in files.sub(name).names("")]
    return [name for name in files.folders() if layout.SPEC in files.names(name)]


def _words(spec: Spec) -> dict[str, str]:
    """The request of a run in words; a single run that it needs stands with its own request."""
    words = dict(spec.request_in_words())
    for name in type(spec).model_fields:
        value = getattr(spec, name)
        inputs = value if isinstance(value, tuple) else (value,)
        if len(inputs) == 1 and isinstance(inputs[0], Spec):
            words.pop(name.replace("_", " "), None)
            words |= {n: w for n, w in _words(inputs[0]).items() if n not in words}
    return words


def _told_apart(root: str, ids: Sequence[str]) -> list[str]:
    """Runs, each with what its request says otherwise than those of the same kind and task."""
    requests: dict[str, dict[str, str]] = {}
    for run_id in ids[:MANY]:
        with suppress(StoreError):  # a damaged run is listed by its id alone
            requests[run_id] = _words(Run.open(root, run_id).spec)
    told = []
    for run_id in ids[:MANY]:
        of = requests.get(run_id, {})
        like = [r for i, r in requests.items() if i.rpartition("-")[0] == run_id.rpartition("-")[0]]
        names = [n for n in {n: None for r in like for n in r} if len({r.get(n) for r in like}) > 1]
        words = [f"{name}: {shorten(of.get(name, 'not given'), WIDTH)}" for name in names[:FIELDS]]
        told.append(f"{run_id} ({'; '.join(words)})" if of and words else run_id)
    return told + [f"{len(ids) - MANY} more"] * (len(ids) > MANY)


def find_run(root: str, word: str) -> Run:
    """The run with this id, or whose id or hash begins with these characters.

    The whole name before the hash, such as influence-mnist, means no run of a longer name.

    Raises:
        StoreError: No run matches, or several do.
    """
    ids = run_ids(root)
    if word in ids:
        return Run.open(root, word)
    found = [i for i in ids if i.rpartition("-")[0] == word] or [
        i for i in ids if i.startswith(word) or i.rpartition("-")[2].startswith(word)
    ]
    if len(found) == 1:
        return Run.open(root, found[0])
    if found:
        runs = ", ".join(_told_apart(root, found))
        raise StoreError(
            f"{word!r} may be any of {runs}: give the whole id, or the first characters of its "
            f"hash, such as {found[0].rpartition('-')[2][:HASH]}"
        )
    if word in open_files(root).folders():
        raise StoreError(
            f"run {word} in {root} has lost its {layout.SPEC}: submit the same request again, "
            "which writes it anew"
        )
    raise StoreError(
        f"there is no run {word} in {root}: `infl runs{for_runs(root)}` lists the runs there"
    )
