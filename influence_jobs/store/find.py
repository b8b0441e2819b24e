"""Find runs in the folder of all runs."""

from influence_jobs.errors import StoreError
from influence_jobs.store import layout
from influence_jobs.store.files import LocalFiles, open_files
from influence_jobs.store.folder import for_runs
from influence_jobs.store.run import Run


def run_ids(root: str) -> list[str]:
    """Ids of the runs in a folder, sorted; other folders there are ignored.

    The folder of all runs is the user's own, so that a run in it may be a link to another disk.
    """
    files = open_files(root)
    if isinstance(files, LocalFiles):
        return [name for name in files.folders() if layout.SPEC in files.sub(name).names("")]
    return [name for name in files.folders() if layout.SPEC in files.names(name)]


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
        raise StoreError(f"{word!r} may be any of {', '.join(found)}: give more characters")
    if word in open_files(root).folders():
        raise StoreError(
            f"run {word} in {root} has lost its {layout.SPEC}: submit the same request again, "
            "which writes it anew"
        )
    raise StoreError(
        f"there is no run {word} in {root}: `infl runs{for_runs(root)}` lists the runs there"
    )
