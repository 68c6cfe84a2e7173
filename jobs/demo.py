"""The two-command story: consecutive nights through the real DAGs in one process, ranking training on the release they announce, a summary.

No web server and no scheduler: the DAG runs are made here, everything inside them is the same as in production.
"""

from __future__ import annotations

import logging
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from jobs import airflow_home, launchers
from jobs.display import table
from pipeline import config
from pipeline.context import Context, Home, read_json
from pipeline.errors import ConfigError
from pipeline.redact import scrub

if TYPE_CHECKING:
    from pipeline.datasets.base import SourceSpec

PROFILES = {"movielens": "demo", "shop": "tiny", "online_retail": "online_retail"}
FAMOUS = ("Star Wars (1977)", "Toy Story (1995)", "The Godfather (1972)", "Fargo (1996)")
STRATA = {"all": "AUC", "head": "head", "torso": "torso", "tail": "tail", "evidence_0": "0 events", "evidence_1_4": "1-4 events"}


@dataclass
class Story:
    """What the demo did, as it goes along."""

    home: Home
    loaded: config.Config
    profile: str
    overrides: tuple[str, ...]
    console: Console
    runs: dict[str, str] = field(default_factory=dict)  # night -> run id
    release: str = ""
    started: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        """One line with the time since the start."""
        self.console.print(f"[dim]{time.monotonic() - self.started:6.0f} s[/dim]  {text}", highlight=False)


def run(*, dataset: str, nights: int, dataset_path: str, overrides: tuple[str, ...], console: Console) -> None:
    """Run the nights, train the ranker on the announced release, write the report and print the summary."""
    story = _begin(dataset, dataset_path, overrides, console)
    spec = _prepare_data(story)
    airflow_home.prepare(story.home)
    _show_progress(story)
    for night in _nights(spec, nights):
        _night(story, night)
    announced = airflow_home.newest_event()
    story.release = str(announced.get("release", ""))
    story.say(f"the asset event announces release [bold]{story.release}[/bold]")
    if spec.holdout_date is not None:
        _evaluation_day(story, spec.holdout_date)
    _consumers(story)
    _summary(story)


def _begin(dataset: str, dataset_path: str, overrides: tuple[str, ...], console: Console) -> Story:
    if dataset not in PROFILES:
        raise ConfigError(
            f"no demo of {dataset!r}", expected=", ".join(PROFILES), found=dataset, where="--dataset", next_command="sid demo --dataset movielens"
        )
    sets = (*overrides, f"source.path={dataset_path}") if dataset_path else overrides
    profile = PROFILES[dataset]
    return Story(home=Home.from_environment(), loaded=config.load(profile, sets), profile=profile, overrides=sets, console=console)


def _prepare_data(story: Story) -> SourceSpec:
    from pipeline.datasets import dataset

    source = story.loaded.source
    story.say(f"data set [bold]{source.dataset}[/bold]: fetching or checking it")
    return dataset(source.dataset).prepare(source, story.home.folder("data"), story.loaded.seed)


class _Progress(logging.Handler):
    """Shows what the stages log, on the demo's own console (Airflow takes stdout and stderr of a task for itself)."""

    def __init__(self, story: Story) -> None:
        super().__init__(logging.INFO)
        self.story = story

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        self.story.say(f"[dim]{escape(record.getMessage())}[/dim]")


def _show_progress(story: Story) -> None:
    assert sys.__stdout__ is not None
    story.console.file = sys.__stdout__  # a fixed stream: the console would else follow the redirections of a task
    handler = _Progress(story)
    for name in ("jobs", "pipeline"):
        logging.getLogger(name).setLevel(logging.INFO)
        logging.getLogger(name).addHandler(handler)


def _nights(spec: SourceSpec, count: int) -> list[date]:
    if spec.last_date is None:
        raise ConfigError("the data set does not say where it ends", expected="a data set with a last day", found="none", where="sid demo")
    return [spec.last_date - timedelta(days=back) for back in reversed(range(count))]


def _night(story: Story, night: date) -> None:
    story.say(f"[bold]night {night}[/bold]: DAG sid_refresh")
    conf = {"date": str(night), "profile": story.profile, "overrides": list(story.overrides), "reason": "demo"}
    story.runs[str(night)] = airflow_home.run_dag("sid_refresh", _midnight(night), conf)
    plan = _outcome(story, str(night), "plan_night")["outputs"]
    story.say(
        f"night {night}: "
        + (
            f"reused release {plan['reuse']}, nothing written"
            if plan["reuse"]
            else f"published {plan['tag']} (generation {plan['generation']}, {plan['reason']})"
        )
    )


def _evaluation_day(story: Story, day: date) -> None:
    """Load the day that holds each user's last events: dated after every night, so no release has seen them."""
    story.say(f"evaluation day {day}: each user's last ratings arrive")
    base = Context(config=story.loaded, home=story.home, stage="plan_night", logical_date=day, run_id=f"evaluation__{day}", reason="demo")
    for stage in ("plan_night", "ingest"):
        launchers.launch(replace(base, stage=stage), launchers.Request(profile=story.profile, overrides=story.overrides))


def _consumers(story: Story) -> None:
    story.say(f"DAG rank_training on {story.release}")
    day = date.fromisoformat(f"{story.release[1:5]}-{story.release[5:7]}-{story.release[7:9]}")
    conf = {"release": story.release, "profile": story.profile, "overrides": list(story.overrides), "reason": "demo"}
    story.runs["ranking"] = airflow_home.run_dag("rank_training", _midnight(day), conf)


# ---------------------------------------------------------------- the summary


def _summary(story: Story) -> None:
    from jobs import report_page, views

    lake = (story.home, story.loaded)
    page = report_page.write(lake, story.release, None)
    story.console.rule("[bold]what came out")
    _seconds(story)
    _releases(story, lake)
    famous = _famous_items(lake, story.release)
    for item_id in famous:
        _item(story, views.item(lake, item_id, story.release))
    _churn(story, lake)
    _ranker(story)
    _where_to_look(story, page, famous[0])


def _seconds(story: Story) -> None:
    runs = [name for name in story.runs]
    shown = table("seconds per stage")
    for name in ["stage", *runs]:
        shown.add_column(name, justify="left" if name == "stage" else "right")
    outcomes = {run: {path.stem: read_json(path) for path in _staging(story, run).glob("*.json") if not path.stem.endswith(".k8s")} for run in runs}
    for stage in dict.fromkeys(stage for run in runs for stage in _ordered(outcomes[run])):
        cells = [outcomes[run].get(stage) for run in runs]
        shown.add_row(stage, *[f"{cell['seconds']:.1f}" + (f" ({cell['status']})" if cell["status"] != "done" else "") if cell else "" for cell in cells])
    story.console.print(shown)


def _ordered(outcomes: Mapping[str, Any]) -> list[str]:
    from pipeline.stages import BY_NAME

    return [stage for stage in BY_NAME if stage in outcomes]


def _releases(story: Story, lake: tuple[Home, config.Config]) -> None:
    from jobs.releases import release_rows
    from pipeline import lakehouse

    shown = table("releases")
    for name in ("tag", "night", "items", "generation", "status", "parent", "refit due"):
        shown.add_column(name)
    for row in release_rows(lakehouse.read_releases(lake[0], lake[1].lake)):
        shown.add_row(
            row["tag"],
            str(row["logical_date"]),
            str(row["items"]),
            str(row["generation"]),
            row["status"],
            row["parent_tag"] or "-",
            "yes" if row["refit_due"] else "no",
        )
    story.console.print(shown)


def _famous_items(lake: tuple[Home, config.Config], tag: str) -> list[str]:
    """Four items everybody knows; in another data set the four most popular ones."""
    from jobs import views
    from pipeline import lakehouse

    rows = lakehouse.read_release(lake[0], lake[1].lake, tag, columns=("item_id", "popularity", "logical_date"))
    titles = views.titles(lake, rows["logical_date"][0].as_py())
    by_title = dict(zip(titles["title"].to_pylist(), titles["item_id"].to_pylist(), strict=True))
    known = [by_title[title] for title in FAMOUS if title in by_title]
    return known or rows.sort_by([("popularity", "descending"), ("item_id", "ascending")])["item_id"].to_pylist()[:4]


def _item(story: Story, found: Mapping[str, Any]) -> None:
    codes = "  ".join(
        f"{position['position']}=[bold]{'-' if position['code'] is None else position['code']}[/bold]|{position['weight']:.2f}"
        for position in found["positions"]
    )
    story.console.print(f"[bold cyan]{escape(found['title'] or found['item_id'])}[/bold cyan]  {codes}", highlight=False)
    near = ", ".join(f"{escape(other['title'] or other['item_id'])} ({other['shared']})" for other in found["neighbours"][:5])
    story.console.print(f"   shares most codes with: {near or 'nothing'}", highlight=False)


def _churn(story: Story, lake: tuple[Home, config.Config]) -> None:
    from jobs import views
    from jobs.releases import release_rows
    from pipeline import lakehouse

    rows = release_rows(lakehouse.read_releases(lake[0], lake[1].lake))
    now = next(row for row in rows if row["tag"] == story.release)
    if not now["parent_tag"]:
        return
    shown = table(f"churn {now['parent_tag']} -> {now['tag']}")
    for name in ("scope", "name", "items", "changed", "first behaviour code", "churn", "of popularity mass"):
        shown.add_column(name)
    for row in views.diff(lake, now["parent_tag"], now["tag"]):
        shown.add_row(
            row["scope"], row["name"], str(row["items"]), str(row["changed"]), str(row["unmasked"]), f"{row['churn']:.2%}", f"{row['mass_churn']:.2%}"
        )
    story.console.print(shown)


def _ranker(story: Story) -> None:
    outputs = _outcome(story, "ranking", "train_ranker")["outputs"]
    arms = outputs.get("arms") or {}
    if not arms:
        story.console.print("ranker: no events after a release's cutoff yet, so no evaluation")
        return
    shown = table(f"ranker, tested on events release {outputs['evaluation_release']} has not seen")
    strata = [stratum for stratum in STRATA if stratum in next(iter(arms.values()))]
    for name in ["arm", *[STRATA[stratum] for stratum in strata], "GAUC"]:
        shown.add_column(name, justify="right" if name != "arm" else "left")
    for arm, by_stratum in arms.items():
        aucs = [_number(by_stratum[stratum].get("auc")) + (" *" if by_stratum[stratum].get("thin") else "") for stratum in strata]
        shown.add_row(arm, *aucs, _number(by_stratum["all"].get("gauc")))
    story.console.print(shown)
    story.console.print("[dim]* fewer than 1,000 rows: no verdict[/dim]")


def _where_to_look(story: Story, page: Path, item_id: str) -> None:
    story.console.rule()
    story.console.print(f"report   {page}", soft_wrap=True, highlight=False)
    activate = "" if shutil.which("sid") else f". {sys.prefix}/bin/activate && "
    store = scrub(story.home.tracking_uri)
    story.console.print(f"MLflow   {activate}mlflow ui --backend-store-uri {store} --host 127.0.0.1", soft_wrap=True, highlight=False)
    look = f"sid releases   |   sid show {shlex.quote(item_id)}   |   sid stages      (SID_HOME={story.home.root})"
    story.console.print(f"look     {activate}{look}", soft_wrap=True, highlight=False)
    story.say("done")


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"


def _outcome(story: Story, run: str, stage: str) -> dict[str, Any]:
    return read_json(_staging(story, run) / f"{stage}.json")


def _staging(story: Story, run: str) -> Path:
    return story.home.run_folder(story.runs[run])


def _midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)
