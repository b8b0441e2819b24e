"""`infl submit`: one command for each kind of run, made from the kind's request."""

import inspect
from collections.abc import Sequence
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperCommand

from infl_cli import options as o
from infl_cli.launch import submit
from infl_cluster.how import How
from influence_jobs.errors import SpecError
from influence_jobs.kinds import kinds
from influence_jobs.kinds.base import Kind, Panel
from influence_jobs.requests.base import Request
from influence_jobs.requests.options import CURVATURE, EXPERIMENT, QUERY, SCORES, TRAINING

# Modules that load torch are imported when a command runs: help and completion must be fast.

app = typer.Typer(
    no_args_is_help=True,
    help="Start a run: train, compute norms or scores, retrain. It can be stopped and resumed.",
)
PANELS = get_args(Panel)
OPTION_PANELS = ("What to compute", QUERY, SCORES, EXPERIMENT, TRAINING, CURVATURE)
HIDDEN = ("task_options",)  # no option of its own: a task's options stand among the others
TaskOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="NAME=VALUE",
        help="Option of the task, where an option of this command has the same name. May be "
        "repeated.",
        rich_help_panel=OPTION_PANELS[0],
    ),
]


class SubmitCommand(TyperCommand):
    """A command that also takes the options of a task. With `--task NAME` its help shows them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--help" in args:
            ctx.meta["infl.task"] = _named(args, "--task")
        return super().parse_args(ctx, args)

    def get_params(self, ctx: Any) -> list[Any]:
        found = super().get_params(ctx)
        if name := ctx.meta.get("infl.task"):
            from infl_cli.task_help import shown_options

            found = [*found[:-1], *shown_options(name), found[-1]]  # the last one is --help
        return found


def _named(args: Sequence[str], option: str) -> str | None:
    """The value of an option in words that are not parsed yet."""
    for i, word in enumerate(args):
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
        if word == option and i + 1 < len(args):
            return args[i + 1]
    return None


def add_command(kind: Kind) -> None:
    """Add the command of a kind of run."""
    request = kind.request_type
    fields = {name: request.model_fields[name] for name in _option_names(request)}
    how = {name: How.model_fields[name] for name in _how_options(kind)}

    def command(ctx: typer.Context, **values: Any) -> None:
        given = {n: values[n] for n in fields if values[n] is not None}
        asked = How.checked({n: values[n] for n in how if values[n] is not None})
        options = task_options(ctx.args, values["option"] or ())
        wanted = request.of({**given, "task_options": options})
        submit(kind, wanted, asked, values["runs"], json=values["json"], dry_run=values["dry_run"])

    others = (
        ("option", TaskOptions, None),
        ("runs", o.Runs, o.DEFAULT_RUNS),
        ("trust", o.Trust, False),
        ("dry_run", o.DryRun, False),
        ("json", o.Json, False),
    )
    o.take(
        command,
        [
            inspect.Parameter("ctx", o.KEYWORD_ONLY, annotation=typer.Context),
            *o.parameters(fields | how),
            *(
                inspect.Parameter(name, o.KEYWORD_ONLY, annotation=kind, default=default)
                for name, kind, default in others
            ),
        ],
    )
    app.command(
        kind.name,
        help=inspect.getdoc(request),
        cls=SubmitCommand,
        rich_help_panel=kind.panel,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(command)


def _option_names(request: type[Request]) -> list[str]:
    """The options of a request in the order of help: by panel, the task first."""

    def rank(name: str) -> tuple[int, bool]:
        panel = o.panel_of(request.model_fields[name])
        place = OPTION_PANELS.index(panel) if panel in OPTION_PANELS else len(OPTION_PANELS)
        return place, name != "task"

    return sorted((name for name in request.model_fields if name not in HIDDEN), key=rank)


def _how_options(kind: Kind) -> list[str]:
    """The fields of `How` that have a meaning for a kind."""
    without = {
        "workers": not kind.workers,
        "batch_size": not kind.batched,
        "shard_size": kind.shard_unit is None,
    }
    return [name for name in How.model_fields if not without.get(name, False)]


def task_options(words: Sequence[str], pairs: Sequence[str]) -> dict[str, Any]:
    """The options of a task by name.

    Args:
        words: `--name value`, as the command did not understand them.
        pairs: `NAME=VALUE`, as `--option` takes them.

    Raises:
        SpecError: A word or a pair is written in another way.
    """
    return {**_words(words), **_pairs(pairs)}


def _words(words: Sequence[str]) -> dict[str, Any]:
    """The task's options from words unknown to the command: `--name value` or `--name`."""
    found: dict[str, Any] = {}
    waiting = [*words]
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--") or word == "--":
            raise SpecError(f"unexpected word {word!r}: options are written --name value")
        name, separator, value = word[2:].partition("=")
        if not separator and waiting and not waiting[0].startswith("--"):
            value, separator = waiting.pop(0), "="
        found[name.replace("-", "_")] = value if separator else True
    return found


def _pairs(words: Sequence[str]) -> dict[str, str]:
    found = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not separator:
            raise SpecError(f"--option {word}: write NAME=VALUE")
        found[name.replace("-", "_")] = value
    return found


for _kind in sorted(kinds().values(), key=lambda kind: (PANELS.index(kind.panel), kind.name)):
    add_command(_kind)
