"""Carry out the runs of a request, and print where their results are."""

from infl_cli import render
from infl_cli.render import say
from infl_cluster.how import How
from influence_jobs.kinds.base import Kind
from influence_jobs.requests.base import Request
from influence_jobs.store.folder import runs_folder
from influence_jobs.store.run import Run


def submit(kind: Kind, request: Request, how: How, runs: str, *, json: bool, dry_run: bool) -> None:
    """Carry out all runs that a request asks for.

    Raises:
        InflError: It cannot be carried out, or it failed; what was finished is kept.
    """
    root = runs_folder(runs)
    for spec in request.specs(root, say):
        run = Run(root, spec)
        if dry_run:
            from infl_cli.dry_run import print_plan
            from infl_cluster.launch import keep_plan

            print_plan(run, keep_plan(run, how, say), json=json)
        elif bring_to_end(run, how, json=json) and kind.view_type.writes_report:
            from infl_cli.report import report_folder, write_report_of

            if "://" not in root:
                write_report_of([run], report_folder(run))


def bring_to_end(run: Run, how: How, *, json: bool) -> bool:
    """Carry out one run and print its results; False if it goes on in the background.

    Raises:
        InflError: It cannot be carried out, or it failed; what was finished is kept.
    """
    from infl_cluster.driver import stop_on_sigterm
    from infl_cluster.launch import carry_out

    if how.local:
        stop_on_sigterm()
    if carry_out(run, how, say):
        _print_result(run, json=json)
        return True
    if json:
        render.print_json(render.run_summary(run, "running"))
    return False


def _print_result(run: Run, *, json: bool) -> None:
    from influence_jobs.kinds import view_of
    from influence_jobs.store.status import read_status

    summary = render.run_summary(run, read_status(run)["state"])
    if json:
        render.print_json(summary)
        return
    render.out.print(f"{run.id}: done")
    render.out.print(f"  {run.files.url}")
    for array in summary["arrays"].values():
        shape = " x ".join(map(str, array["shape"]))
        render.out.print(f"  {array['path']}: {shape} {array['dtype']}")
    if "metrics" in summary["tables"]:
        last = run.read_table("metrics").to_pylist()[-1]
        figures = ", ".join(f"{k} {v:.4g}" for k, v in last.items() if k != "epoch")
        render.out.print(f"  after epoch {last['epoch']}: {figures}")
    view = view_of(run)
    for line in view.certainty():
        render.out.print(f"  {line}")
    for path in summary["tables"].values():
        render.out.print(f"  {path}")
    for table in view.tables():
        render.out.print(f"\n{table.title}")
        render.print_table(table.columns, table.rows)
        if table.note:
            render.out.print(table.note)
    render.out.print(f"next: {view.next_step()}")
