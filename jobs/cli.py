"""The command `sid`: run stages and nights, look at releases. The only module that prints.

Exit codes: 0 done, 64 do not retry, 75 a retry may help. Every reading command has --json.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from jobs import profiles
from jobs.display import table
from pipeline import config, log
from pipeline.context import Context, Home, read_json
from pipeline.errors import DEFAULT_PROFILE, ConfigError, ContractError, ResourceLost, SidError, unforeseen
from pipeline.stages import BY_NAME, STAGES, Stage, group, upstream

logger = logging.getLogger("jobs.cli")  # its name when it is run as a module, too
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
CHANGING = frozenset({"maintenance", "maintain", "rollback"})  # what `sid run` may take away or move
console = Console()
complaints = Console(stderr=True)
GROUPS = ("refresh", "consumers", "maintenance")
IN_FORCE: ContextVar[tuple[str, tuple[str, ...]]] = ContextVar("in_force", default=("", ()))  # profile and overrides, for the next command of an error

Profile = Annotated[
    str,
    typer.Option("--profile", "-p", help="A name in pipeline/profiles or a .toml file; empty = SID_PROFILE, else the one that made the lake, else demo."),
]
Sets = Annotated[list[str] | None, typer.Option("--set", "-s", help="Override, section.key=value; repeatable.")]
Day = Annotated[str, typer.Option("--date", "-d", help="Logical date, YYYY-MM-DD.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Reason = Annotated[str, typer.Option("--reason", "-r", help="Why; stored in every snapshot.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would run, change nothing.")]


def _version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        console.print(f"sidmill {metadata.version('sidmill')}", highlight=False)
        raise typer.Exit


@app.callback()
def main_options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="More log lines.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")] = False,
) -> None:
    """Grinds a catalogue and an event log into semantic IDs, every night, on a lakehouse."""
    log.configure(10 if verbose else 20)


# ---------------------------------------------------------------- running


@app.command(epilog="sid run refresh --date 1998-04-21 --profile demo --dry-run")
def run(
    what: Annotated[str, typer.Argument(help="A stage, or the group refresh, consumers or maintenance.")],
    day: Day,
    through: Annotated[str, typer.Option("--through", help="Last date of a range that starts at --date; the nights run one after the other.")] = "",
    profile: Profile = "",
    sets: Sets = None,
    reason: Reason = "by hand",
    dry_run: DryRun = False,
    run_id: Annotated[str, typer.Option("--run-id", help="Identity of the run, stable over retries.")] = "",
    attempt: Annotated[int, typer.Option("--attempt", help="Number of this try.", min=1)] = 1,
    param: Annotated[list[str] | None, typer.Option("--param", help="Run parameter, e.g. release=d19980421.")] = None,
    inline: Annotated[bool, typer.Option("--inline", help="Run in this process, whatever the profile's launcher.")] = False,
) -> None:
    """Run one stage, or every stage of a group in order, for one date or, with --through, for each date of a range."""
    from jobs import launchers

    profile = _in_force(profile, sets, changes=what in CHANGING)
    loaded = config.load(profile, tuple(sets or ()))
    if inline:
        loaded = loaded.model_copy(update={"launch": loaded.launch.model_copy(update={"kind": "inline"})})
    base = Context(
        config=loaded,
        home=Home.from_environment(),
        stage="plan_night",
        logical_date=parse_date(day),
        run_id=run_id,
        attempt=attempt,
        reason=reason,
        params=tuple(parse_pair(text) for text in param or ()),
    )
    request = launchers.Request(profile=profile, overrides=tuple(sets or ()))
    outcomes = []
    for night in nights(base.logical_date, parse_date(through, "--through") if through else base.logical_date):
        ctx = replace(base, logical_date=night, run_id=run_id or f"cli__{loaded.name}__{night}")
        stages = selected(what, ctx, named_run=bool(run_id))
        if dry_run:
            show_rows(
                [
                    {"stage": stage.name, "engine": stage.engine, "reads": ", ".join(stage.inputs), "writes": ", ".join(stage.outputs) or "MLflow"}
                    for stage in stages
                ],
                f"would run for {night}",
            )
        else:
            outcomes += [{"night": night, **announced(launchers.launch(replace(ctx, stage=stage.name), request))} for stage in stages]
    if outcomes:
        show_rows([{name: outcome[name] for name in ("night", "stage", "status", "seconds")} for outcome in outcomes], what)


@app.command(epilog="sid backfill --start 1998-04-21 --end 1998-04-22 --reason 'corrected file' --cascade --dry-run")
def backfill(
    start: Annotated[str, typer.Option("--start", help="First date, YYYY-MM-DD.")],
    end: Annotated[str, typer.Option("--end", help="Last date, YYYY-MM-DD.")],
    reason: Annotated[str, typer.Option("--reason", "-r", help="Why; stored in every snapshot and run.")],
    stages: Annotated[str, typer.Option("--stages", help="Comma-separated stages; empty = the whole refresh.")] = "",
    cascade: Annotated[bool, typer.Option("--cascade", help="Rebuild every later release on the repaired ones.")] = False,
    dry_run: DryRun = False,
    profile: Profile = "",
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Run past nights again, oldest first; unchanged nights end as `reused`, other rows become a new revision of their release."""
    from jobs import backfill as plan
    from jobs import launchers

    profile = _in_force(profile, changes=True)
    home, loaded = _lake(profile, sets)
    steps = plan.steps(home, loaded, nights(parse_date(start, "--start"), parse_date(end, "--end"), "--end"), stages, cascade=cascade)
    if dry_run:
        show_rows([plan.described(step) for step in steps], f"would run because: {reason}", as_json)
        return
    request = launchers.Request(profile=profile, overrides=tuple(sets or ()))
    outcomes = []
    for step in steps:
        ctx = Context(
            config=loaded, home=home, stage="plan_night", logical_date=step.night, run_id=plan.run_id(loaded, step.night, reason), reason=f"backfill: {reason}"
        )
        done = [announced(launchers.launch(replace(ctx, stage=stage.name), request)) for stage in step.stages]
        outcomes.append(plan.result(step, done))
    show_rows(outcomes, "backfill", as_json)


def nights(first: date, last: date, where: str = "--through") -> list[date]:
    """Every day from the first to the last, both included.

    Raises: ContractError when the last lies before the first.
    """
    if last < first:
        raise ContractError("the range of dates is empty", expected=f"{first} or later", found=str(last), where=where)
    return [first + timedelta(days=offset) for offset in range((last - first).days + 1)]


def selected(what: str, ctx: Context, *, named_run: bool = False) -> tuple[Stage, ...]:
    """The stages a word names; a single refresh stage is preceded by plan_night when its run has no manifest.

    Ingest by hand always plans anew, so that it sees new files; a run that was named (`--run-id`: a launcher's process, a retry) keeps its manifest.
    Raises: ConfigError for an unknown word.
    """
    if what in GROUPS:
        return group(what)
    if what not in BY_NAME:
        raise ConfigError(f"no stage or group {what!r}", expected=", ".join([*GROUPS, *BY_NAME]), found=what, where="sid run", next_command="sid stages")
    stage = BY_NAME[what]
    plan = ctx.home.root.is_dir() and ctx.staging / "plan_night.json"
    planned = plan and plan.is_file() and read_json(plan).get("status") != "failed"
    needs_plan = stage.group == "refresh" and what != "plan_night" and not (planned and (named_run or what != "ingest"))
    return (BY_NAME["plan_night"], stage) if needs_plan else (stage,)


def announced(outcome: dict[str, Any]) -> dict[str, Any]:
    """The outcome, after a line about it."""
    complaints.print(f"[green]{outcome['status']:>8}[/green] {outcome['stage']} {outcome['seconds']:.1f} s", highlight=False)
    return outcome


# ---------------------------------------------------------------- looking


@app.command(epilog="sid releases --json")
def releases(as_json: AsJson = False, profile: Profile = "", sets: Sets = None) -> None:
    """List every release: tag, date, generation, status, parent, refit due."""
    from jobs import views

    columns = (
        "tag", "logical_date", "generation", "status", "newest", "parent_tag", "parent_superseded", "refit_due", "items", "reason", "pinned_by", "expired",
    )  # fmt: skip
    rows = [{name: row.get(name) for name in columns} for row in views.releases(_lake(profile, sets))]
    if not as_json:
        rows = [_short(row) for row in rows]
    show_rows(rows, "releases", as_json)


@app.command(epilog="sid show 50 --release d19980421")
def show(
    item: Annotated[str, typer.Argument(help="An item_id.")],
    release: Annotated[str, typer.Option("--release", help="A tag; empty = the newest current release.")] = "",
    lineage: Annotated[bool, typer.Option("--lineage", help="Also print snapshots and runs behind the release.")] = False,
    as_json: AsJson = False,
    profile: Profile = "",
    sets: Sets = None,
) -> None:
    """Show one item: codes, router weights, and the items that share most codes with it, with titles."""
    from jobs import views

    lake = _lake(profile, sets)
    found = views.item(lake, item, release)
    if lineage:
        found["lineage"] = views.lineage(lake, found["release"])
    if as_json:
        show_rows([found], "", as_json)
        return
    console.print(f"[bold]{escape(found['title'] or item)}[/bold]  ({escape(item)}, {found['popularity_stratum']}, release {found['release']})")
    show_rows(found["positions"], "codes")
    show_rows(found["neighbours"], "items that share most codes")
    if lineage:
        show_rows(found["lineage"], "lineage")


@app.command(epilog="sid diff d19980421 d19980422")
def diff(
    old: Annotated[str, typer.Argument(help="Tag of the earlier release.")],
    new: Annotated[str, typer.Argument(help="Tag of the later release.")],
    as_json: AsJson = False,
    profile: Profile = "",
    sets: Sets = None,
) -> None:
    """Compare two releases: churn overall, by position, by popularity stratum and by popularity mass."""
    from jobs import views

    show_rows(views.diff(_lake(profile, sets), old, new), f"{old} -> {new}", as_json)


@app.command(epilog="sid inspect audit_assign_sid_19980421_1a2b3c4d")
def inspect(branch: Annotated[str, typer.Argument(help="Name of an audit branch.")], as_json: AsJson = False, profile: Profile = "", sets: Sets = None) -> None:
    """Show an audit branch that was not published: its rows, its metrics and the expectations that failed."""
    from jobs import views

    show_rows(views.branch(_lake(profile, sets), branch), branch, as_json)


@app.command(epilog="sid repair --dry-run")
def repair(dry_run: DryRun = False, profile: Profile = "", sets: Sets = None, as_json: AsJson = False) -> None:
    """Bring what is derived from sid.release (the MLflow alias, buffered runs) in line with it."""
    from jobs import views

    show_rows(views.repair(_lake(profile, sets), dry_run=dry_run), "repair", as_json)


@app.command(epilog='sid rollback --to d19980421 --reason "prices were wrong"')
def rollback(
    to: Annotated[str, typer.Option("--to", help="Tag of the release to restore; all newer ones are withdrawn.")],
    reason: Annotated[str, typer.Option("--reason", "-r", help="Why; stored in the snapshot.")],
    dry_run: DryRun = False,
    as_json: AsJson = False,
    profile: Profile = "",
    sets: Sets = None,
) -> None:
    """Make an earlier release the current one, in one commit; tags do not move, so pinned readers notice nothing."""
    from jobs import launchers, views

    profile = _in_force(profile, changes=True)
    loaded = _lake(profile, sets)
    rows = views.rollback(loaded, to)
    if not dry_run:
        day = next(row["logical_date"] for row in views.releases(loaded) if row["tag"] == to)
        ctx = Context(config=loaded[1], home=loaded[0], stage="rollback", logical_date=day, run_id=f"rollback__{to}", reason=reason, params=(("release", to),))
        rows = launchers.launch(ctx, launchers.Request(profile=profile, overrides=tuple(sets or ())))["outputs"].get("changes", [])
    show_rows(rows, "would change" if dry_run else "changed", as_json)
    if not dry_run:  # also when nothing changed: an earlier try may have been killed before it could say so
        conf = {"release": to, "profile": profile, **({"overrides": sets} if sets else {})}
        readers = shlex.join(["airflow", "dags", "trigger", "rank_training", "--conf", json.dumps(conf)])
        complaints.print(f"only Airflow makes the asset event; for its readers: {escape(readers)}", highlight=False, soft_wrap=True)


@app.command(epilog="sid pin d19980421 --by ranking")
def pin(
    tag: Annotated[str, typer.Argument(help="A release tag.")],
    by: Annotated[str, typer.Option("--by", help="Who holds it; letters, digits and _.")],
    release: Annotated[bool, typer.Option("--release", help="Let it go again.")] = False,
    as_json: AsJson = False,
    profile: Profile = "",
    sets: Sets = None,
) -> None:
    """Hold a release, so that maintain never drops it, however old it becomes."""
    from jobs import pins

    show_rows(pins.pin(_lake(_in_force(profile, changes=True), sets), tag, by, release=release), "pins", as_json)


@app.command(epilog="sid maintain --dry-run")
def maintain(dry_run: DryRun = False, as_json: AsJson = False, reason: Reason = "by hand", profile: Profile = "", sets: Sets = None) -> None:
    """Take away what nothing holds any more: old releases, branches, snapshots, days, orphan files; join small files."""
    from jobs import launchers, views

    profile = _in_force(profile, changes=True)
    home, loaded = _lake(profile, sets)
    today = datetime.now(UTC).date()
    ctx = Context(config=loaded, home=home, stage="maintain", logical_date=today, run_id=f"maintain__{today}", reason=reason)
    request = launchers.Request(profile=profile, overrides=tuple(sets or ()))
    rows = views.maintain(ctx) if dry_run else launchers.launch(ctx, request)["outputs"]["rows"]
    show_rows(rows, "would go" if dry_run else "gone", as_json)
    if not as_json:
        freed, later = (sum(row[name] for row in rows) for name in ("frees_now", "frees_later"))
        console.print(f"{freed:,} bytes {'would be ' if dry_run else ''}freed, {later:,} more when the snapshots that still show them have aged")


@app.command(epilog="sid export d19980421 --out codes.arrow")
def export(
    tag: Annotated[str, typer.Argument(help="A release tag; empty = the newest current release.")] = "",
    out: Annotated[Path | None, typer.Option("--out", help="Where to write the file; empty = exports/<tag>.arrow of the home.")] = None,
    profile: Profile = "",
    sets: Sets = None,
) -> None:
    """Write a release as one Arrow file that a training maps into memory."""
    from jobs import export as exporting

    console.print(str(exporting.write(_lake(profile, sets), tag, out)), soft_wrap=True)


@app.command(epilog="sid report d19980421")
def report(
    tag: Annotated[str, typer.Argument(help="A release tag; empty = the newest current release.")] = "",
    out: Annotated[Path | None, typer.Option("--out", help="Where to write the page; empty = reports/<tag>.html of the home.")] = None,
    profile: Profile = "",
    sets: Sets = None,
) -> None:
    """Write one self-contained HTML page about a release."""
    from jobs import report_page

    console.print(str(report_page.write(_lake(profile, sets), tag, out)), soft_wrap=True)


@app.command(epilog="sid equations")
def equations(as_json: AsJson = False) -> None:
    """List every equation in the code: source, function, and where we differ from the paper."""
    from jobs import views

    show_rows(views.equations(), "equations", as_json)


@app.command(epilog="sid stages")
def stages(as_json: AsJson = False) -> None:
    """List the stages: engine, what each reads and writes, what it waits for."""
    rows = [
        {
            "stage": stage.name,
            "group": stage.group,
            "engine": stage.engine,
            "reads": ", ".join(stage.inputs),
            "writes": ", ".join(stage.outputs) or "MLflow",
            "after": ", ".join(upstream(stage)),
            "summary": stage.summary,
        }
        for stage in STAGES
    ]
    show_rows(rows, "stages", as_json)


@app.command(epilog="sid demo --nights 2")
def demo(
    dataset: Annotated[str, typer.Option("--dataset", help="movielens | shop | online_retail")] = "movielens",
    nights: Annotated[int, typer.Option("--nights", help="Consecutive nights.", min=1)] = 2,
    dataset_path: Annotated[str, typer.Option("--dataset-path", help="Your own copy of the data.")] = "",
    sets: Sets = None,
) -> None:
    """Run consecutive nights through the Airflow DAGs in this process, then train the ranker, then say what came out."""
    from jobs import demo as story

    story.run(dataset=dataset, nights=nights, dataset_path=dataset_path, overrides=tuple(sets or ()), console=console)


@app.command(epilog="sid study study-cpu --set source.path=FOLDER --only 'beauty/(ada_sid|plain)/'")
def study(
    page: Annotated[str, typer.Argument(help="A name in pipeline/studies or a .toml file.")],
    sets: Sets = None,
    only: Annotated[str, typer.Option("--only", help="Regular expression over the names of cells; what they need runs too.")] = "",
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Processes of one thread each; 0 = one per core.", min=0)] = 0,
    out: Annotated[str, typer.Option("--out", help="Folder of study.json, study.md and index.html; empty = reports/<page> of the home.")] = "",
    results: Annotated[str, typer.Option("--results", help="Markdown file whose part between the study's markers is replaced.")] = "",
    final: Annotated[bool, typer.Option("--final", help="Open the test part, with committed code; counted, at most three times.")] = False,
    confirm: Annotated[bool, typer.Option("--confirm", help="Open the confirmation part, with committed code; once per SID_HOME.")] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Run a grid of data sets, tokenizers, readers and seeds, resumable, and judge the page's claims."""
    from jobs import study as grid

    if final and confirm:
        raise ConfigError("two parts are opened one after the other", expected="--final or --confirm", found="both", where="sid study")
    home = Home.from_environment()
    todo = grid.plan(page, sets=tuple(sets or ()), only=only, part="confirm" if confirm else "test" if final else "valid", home=home, command=_typed())
    if dry_run:
        show_rows(grid.overview(todo), todo.page.name, as_json)
        return
    folder = Path(out) if out else home.folder("reports") / (todo.page.name if todo.part == "valid" else f"{todo.page.name}-{todo.part}")
    document = grid.run(todo, jobs=jobs or os.cpu_count() or 1, out=folder, results=Path(results) if results else None)
    if as_json:
        typer.echo(json.dumps(document, indent=1, default=str))
        return
    show_rows(grid.claims_table(document), todo.page.title or todo.page.name)
    console.print(f"wrote {escape(str(folder / 'index.html'))}", soft_wrap=True, highlight=False)


@app.command(epilog="sid up --port-airflow 8090 --port-mlflow 5010")
def up(
    port_airflow: Annotated[int, typer.Option("--port-airflow", help="Port of Airflow's interface.", min=1, max=65535)] = 8080,
    port_mlflow: Annotated[int, typer.Option("--port-mlflow", help="Port of MLflow's interface.", min=1, max=65535)] = 5000,
) -> None:
    """Serve Airflow's and MLflow's interfaces on loopback, with a password, until Ctrl-C."""
    from jobs import up as interfaces

    interfaces.run(
        Home.from_environment(), airflow=port_airflow, mlflow=port_mlflow, say=lambda line: console.print(escape(line), soft_wrap=True, highlight=False)
    )


# ---------------------------------------------------------------- helpers


def show_rows(rows: Sequence[Mapping[str, Any]], title: str, as_json: bool = False) -> None:
    """Print rows as a table, or as JSON."""
    if as_json:
        typer.echo(json.dumps(list(rows), indent=1, default=str))
        return
    if not rows:
        console.print(f"{title}: nothing")
        return
    shown = table(title)
    for name in rows[0]:
        shown.add_column(name.replace("_", " "), overflow="fold")
    for row in rows:
        shown.add_row(*[escape(_cell(value)) for value in row.values()])  # a title may hold square brackets
    console.print(shown)


def parse_date(text: str, option: str = "--date") -> date:
    """A date.

    Args:
        option: where it was given.
    Raises: ContractError for anything else than YYYY-MM-DD.
    """
    with suppress(ValueError):
        found = date.fromisoformat(text)
        if str(found) == text:  # Python also reads 20261120 and 2026-W47-5
            return found
    raise ContractError("not a date", expected="YYYY-MM-DD", found=text, where=option)


def parse_pair(text: str) -> tuple[str, str]:
    """(name, value) of `name=value`.

    Raises: ConfigError without an equals sign.
    """
    name, separator, value = text.partition("=")
    if not separator:
        raise ConfigError("not a run parameter", expected="name=value", found=text, where="--param")
    return name, value


def _short(row: Mapping[str, Any]) -> dict[str, Any]:
    """A release as a line that fits a terminal; --json has every column."""
    known = {"newest": "newest", "parent_superseded": "parent superseded", "refit_due": "refit due", "expired": "expired"}
    notes = [text for name, text in known.items() if row[name]] + [f"pinned by {name}" for name in row["pinned_by"]]
    kept = {"tag": row["tag"], "items": row["items"], "gen": row["generation"], "status": row["status"], "parent": row["parent_tag"], "reason": row["reason"]}
    return {**kept, "notes": ", ".join(notes)}


def _typed() -> str:
    """The command as it was typed, quoted where a shell needs it."""
    return shlex.join(["sid", *sys.argv[1:]])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bool):
        return "yes" if value else ""
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _lake(profile: str, sets: list[str] | None) -> tuple[Home, config.Config]:
    return Home.from_environment(), config.load(_in_force(profile, sets), tuple(sets or ()))


def _in_force(profile: str, sets: list[str] | None = None, *, changes: bool = False) -> str:
    """The profile to run with: the one typed, else SID_PROFILE, else the one that made the lake, else the default one.

    Args:
        sets: overrides, which the next command of an error repeats.
        changes: the command takes away or moves what others made; the profile of SID_PROFILE must then be the lake's own.
    Raises: ConfigError.
    """
    home, preset = Home.from_environment(), os.environ.get("SID_PROFILE", "")
    if preset and changes and not profile:
        profiles.check_same(home, preset, "SID_PROFILE")
    if not profile and not preset:
        preset = profiles.default(home)
        if preset != DEFAULT_PROFILE:
            complaints.print(f"profile {escape(preset)}, as {escape(str(home.root / profiles.NAME))} says", highlight=False, soft_wrap=True)
    IN_FORCE.set((profile or preset, tuple(sets or ())))
    return profile or preset


@contextmanager
def _errors_as_exit_codes() -> Iterator[None]:
    try:
        yield
    except SidError as error:
        _complain(error, *IN_FORCE.get())
    except Exception as error:
        known = unforeseen(error, what="command", where=str(Home.from_environment().root), next_command=_typed())
        if not isinstance(known, ResourceLost):
            raise
        logger.debug("the command was ended", exc_info=error)
        _complain(known)  # typed again, it takes its profile from where it took it now


def _complain(error: SidError, profile: str = "", overrides: tuple[str, ...] = ()) -> NoReturn:
    with suppress(OSError):  # standard error may be a file on the disk that is full; the exit code still tells
        complaints.print(f"[bold red]{type(error).__name__}[/bold red] {escape(error.message(profile, overrides))}", highlight=False, soft_wrap=True)
    sys.exit(error.exit_code)


def main() -> None:
    """Entry point of `sid`."""
    quiet = ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning")
    os.environ.setdefault("PYTHONWARNINGS", ",".join(f"ignore::{kind}" for kind in quiet))  # libraries' notes are not the user's business, overflows are
    IN_FORCE.set(("", ()))
    with _errors_as_exit_codes():
        app()


if __name__ == "__main__":
    main()
