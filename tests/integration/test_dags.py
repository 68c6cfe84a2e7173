"""The DAGs as Airflow reads them, and what becomes of a stage's outcome: success, a retry, a final failure, an asset event."""

from __future__ import annotations

import ast
import copy
import logging
import os
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.context import ROOT, Context, Home
from pipeline.errors import ConfigError, ContractError, GateFailed, PublishConflict, ResourceLost, SidError, StageFailed, UpstreamMissing, VersionMismatch
from pipeline.stages import BY_NAME, STAGES, group, upstream

pytestmark = pytest.mark.airflow
GROUPS = {"sid_refresh": "refresh", "rank_training": "consumers", "lake_maintenance": "maintenance", "sid_rollback": "rollback"}
BY_HAND = {"sid_rollback": {"tag": "d20260301", "reason": "a bad file"}}  # parameters that somebody must give


@pytest.fixture(scope="module")
def airflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """The private Airflow of a throw-away home, whose first start was killed: its database is an empty file."""
    from jobs import airflow_home

    before, handlers = dict(os.environ), list(logging.getLogger().handlers)
    home = Home(tmp_path_factory.mktemp("home"))
    (home.folder("airflow") / "airflow.db").touch()
    airflow_home.prepare(home)
    yield home
    os.environ.clear()
    os.environ.update(before)
    logging.getLogger().handlers[:] = handlers


@pytest.fixture(scope="module")
def bag(airflow: Home) -> Any:
    from airflow.dag_processing.dagbag import DagBag

    return DagBag(str(ROOT / "dags"))


# ---------------------------------------------------------------- as Airflow reads them


def test_every_dag_file_is_read_without_an_error(bag: Any) -> None:
    assert bag.import_errors == {}
    assert set(bag.dags) == set(GROUPS)


@pytest.mark.parametrize("dag_id", GROUPS)
def test_tasks_are_the_stages_and_edges_the_derived_edges(bag: Any, dag_id: str) -> None:
    tasks = bag.dags[dag_id].task_dict
    assert {name: task.upstream_task_ids for name, task in tasks.items()} == {stage.name: set(upstream(stage)) for stage in group(GROUPS[dag_id])}


@pytest.mark.parametrize("dag_id", GROUPS)
def test_parameters_are_typed_titled_and_pass_their_own_defaults(bag: Any, dag_id: str) -> None:
    from airflow.sdk.exceptions import ParamValidationError

    dag = bag.dags[dag_id]
    for name in dag.params:
        schema = dag.params.get_param(name).schema
        assert schema["title"], name
        assert schema["type"], name
        assert dag.params.get_param(name).description
    asked = copy.deepcopy(dag.params)
    for name, value in BY_HAND.get(dag_id, {}).items():
        with pytest.raises(ParamValidationError, match=name):
            asked.validate()
        asked[name] = value
    asked.validate()
    usual = {"profile", "overrides", "reason"} | ({"tag"} if dag_id == "sid_rollback" else {"date"})
    assert set(dag.params) == usual | ({"release"} if dag_id == "rank_training" else set())


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("date", "2026-13-01"), ("date", "soon"), ("reason", ""), ("overrides", "seed=1"), ("overrides", [1]), ("release", "latest"), ("release", "d2026"),
        ("profile", None),
    ],
)  # fmt: skip
def test_a_bad_parameter_is_refused_before_anything_runs(bag: Any, name: str, bad: Any) -> None:
    from airflow.sdk.exceptions import ParamValidationError

    param = bag.dags["rank_training"].params.get_param(name)
    with pytest.raises(ParamValidationError):
        param.resolve(bad)


@pytest.mark.parametrize("dag_id", GROUPS)
def test_one_run_at_a_time_nothing_caught_up_and_somebody_owns_it(bag: Any, dag_id: str) -> None:
    dag = bag.dags[dag_id]
    assert dag.catchup is False
    assert dag.max_active_runs == 1
    assert dag.start_date.tzinfo is not None
    for heading in ("### What it does", "### A task is red", "Owner:"):
        assert heading in dag.doc_md
    for task in dag.task_dict.values():
        assert task.owner != "airflow"
        assert task.doc_md == BY_NAME[task.task_id].summary
        assert task.retries == 3
        assert task.retry_exponential_backoff
        assert task.retry_delay < task.max_retry_delay


def test_the_refresh_covers_the_day_before_its_start(bag: Any) -> None:
    from airflow.sdk import CronDataIntervalTimetable

    timetable = bag.dags["sid_refresh"].timetable
    assert isinstance(timetable, CronDataIntervalTimetable)
    assert timetable.expression == "0 0 * * *"


def test_housekeeping_counts_ages_from_the_day_it_runs(bag: Any) -> None:
    import pendulum
    from airflow.sdk import CronTriggerTimetable
    from airflow.timetables.trigger import CronTriggerTimetable as Scheduled

    timetable, asked = bag.dags["lake_maintenance"].timetable, pendulum.datetime(2026, 11, 28, 15)
    assert isinstance(timetable, CronTriggerTimetable)
    assert timetable.expression == "0 6 * * 0"
    by_hand = Scheduled(timetable.expression, timezone="UTC").infer_manual_data_interval(run_after=asked)
    assert by_hand.start == asked, "an interval of a week ends on a Sunday and began up to two weeks ago"


def test_the_readers_start_on_the_asset_and_only_publishing_announces_it(bag: Any) -> None:
    from jobs.airflow_task import NEW_RELEASE, RELEASE

    assert list(bag.dags["rank_training"].timetable.asset_condition.objects) == [RELEASE]
    announcing = {task.task_id: task.outlets for dag in bag.dags.values() for task in dag.task_dict.values() if task.outlets}
    assert announcing == {"publish_release": [NEW_RELEASE], "rollback": [NEW_RELEASE]}


def test_gpu_stages_share_one_slot_and_every_writer_has_its_own(bag: Any) -> None:
    from airflow.models.pool import Pool
    from airflow.utils.session import create_session
    from sqlalchemy import select

    used = {task.task_id: task.pool for dag in bag.dags.values() for task in dag.task_dict.values()}
    assert used == {stage.name: "gpu" if stage.gpu else f"write_{stage.name}" if stage.outputs else "default_pool" for stage in STAGES}
    with create_session() as session:
        slots = {pool.pool: pool.slots for pool in session.scalars(select(Pool))}
    assert {name: slots[name] for name in used.values() if name != "default_pool"} == {name: 1 for name in used.values() if name != "default_pool"}


@pytest.mark.parametrize("path", sorted((ROOT / "dags").glob("*.py")), ids=lambda path: path.name)
def test_a_dag_file_asks_no_clock_no_variable_and_no_database(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not [name for name in called if name.endswith((".now", ".today", ".utcnow", "Variable.get", "days_ago", "open"))]
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"Variable", "Connection", "os", "environ", "create_session"}


# ---------------------------------------------------------------- outcome -> success, retry, failure


class Events(dict):
    """Outlet events of one task: what was added, by alias."""

    def __missing__(self, alias: Any) -> Any:
        added: list[tuple[Any, dict[str, Any]]] = []
        self[alias] = SimpleNamespace(added=added, add=lambda asset, extra: added.append((asset, extra)))
        return self[alias]


def context(**changes: Any) -> dict[str, Any]:
    start = datetime(2026, 3, 1, tzinfo=UTC)
    params = {"date": None, "profile": "tiny", "overrides": [], "reason": "nightly", **changes.pop("params", {})}
    return {
        "params": params, "run_id": "scheduled__2026-03-01T00:00:00+00:00", "ti": SimpleNamespace(try_number=2), "data_interval_start": start,
        "triggering_asset_events": {}, "outlet_events": Events(), **changes,
    }  # fmt: skip


def execute(stage: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, outcome: SidError | dict[str, Any] | None = None) -> tuple[Any, Context]:
    """(what the operator returned, the context it launched) with a launch that ends as told."""
    from jobs import launchers
    from jobs.airflow_task import StageOperator

    seen: list[Context] = []

    def launch(ctx: Context, request: launchers.Request) -> dict[str, Any]:
        seen.append(ctx)
        if isinstance(outcome, SidError):
            raise outcome
        return {"stage": stage, "status": "done", "seconds": 1.5, "outputs": {}, **(outcome or {})}

    monkeypatch.setattr(launchers, "launch", launch)
    returned = StageOperator(stage=stage).execute(given)
    return returned, seen[0]


@pytest.mark.parametrize("kind", [ConfigError, ContractError, GateFailed, VersionMismatch, StageFailed, PublishConflict, ResourceLost, UpstreamMissing])
def test_an_error_fails_for_good_or_asks_for_a_retry_as_its_class_says(kind: type[SidError], airflow: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    error = kind("it did not work", expected="a", found="b", where="c", next_command="sid releases")
    with pytest.raises(AirflowException if error.retry else AirflowFailException) as caught:
        execute("ingest", context(params={"overrides": ["seed=3"]}), monkeypatch, error)
    assert isinstance(caught.value, AirflowFailException) is not error.retry
    assert str(caught.value).endswith("sid releases --profile tiny --set seed=3"), "the log ends in what to type next, with the run's settings"
    assert caught.value.__cause__ is error


def test_a_profile_that_does_not_exist_fails_for_good(airflow: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    with pytest.raises(AirflowFailException, match="no_such_profile"):
        execute("ingest", context(params={"profile": "no_such_profile"}), monkeypatch)


def test_housekeeping_refuses_a_preset_profile_that_did_not_make_the_lake(airflow: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ages would be another lake's: as on the command line, only a profile that somebody typed is meant."""
    from airflow.sdk.exceptions import AirflowFailException

    from jobs import profiles

    monkeypatch.setattr(profiles, "remembered", lambda home: "nightly")
    monkeypatch.setenv("SID_PROFILE", "tiny")
    with pytest.raises(AirflowFailException, match="made with the profile nightly"):
        execute("maintain", context(), monkeypatch)
    assert execute("ingest", context(), monkeypatch)[1].stage == "ingest", "a night may try another profile"
    monkeypatch.delenv("SID_PROFILE")
    assert execute("maintain", context(), monkeypatch)[1].stage == "maintain"


def test_a_defect_of_our_own_is_not_mistaken_for_a_missing_file(airflow: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs import launchers
    from jobs.airflow_task import StageOperator

    def broken(ctx: Context, request: launchers.Request) -> dict[str, Any]:
        raise ZeroDivisionError

    monkeypatch.setattr(launchers, "launch", broken)
    with pytest.raises(ZeroDivisionError):
        StageOperator(stage="ingest").execute(context())


def test_the_run_knows_who_it_is(airflow: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    returned, ctx = execute("ingest", context(params={"overrides": ["seed=3"], "reason": "because"}), monkeypatch)
    assert returned == {"status": "done", "seconds": 1.5}
    assert (ctx.stage, ctx.logical_date, ctx.attempt, ctx.reason, ctx.config.seed) == ("ingest", date(2026, 3, 1), 2, "because", 3)
    from jobs.airflow_task import StageOperator

    assert ctx.run_id == f"scheduled__2026-03-01T00:00:00+00:00__{StageOperator(stage='ingest').dag_id}"
    assert ctx.home.root == airflow.root


# ---------------------------------------------------------------- which day, which release


def event(release: str, minute: int) -> SimpleNamespace:
    return SimpleNamespace(extra={"release": release}, timestamp=datetime(2026, 3, 5, 4, minute, tzinfo=UTC))


def test_the_release_is_the_parameter_else_the_newest_event_never_a_date(airflow: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    events = {"asset": [event("d20260302", 30), event("d20260303", 40), event("d20260301", 10)]}
    assert execute("rank_example", context(triggering_asset_events=events), monkeypatch)[1].params == (("release", "d20260303"),)
    asked = context(triggering_asset_events=events, params={"release": "d20260301_r2"})
    chosen = execute("rank_example", asked, monkeypatch)[1]
    assert chosen.params == (("release", "d20260301_r2"),)
    assert chosen.logical_date == date(2026, 3, 1)
    assert execute("rank_example", context(), monkeypatch)[1].params == ()


def test_the_day_is_the_parameter_else_the_releases_else_the_intervals(airflow: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def day(**given: Any) -> date:
        return execute("rank_example", context(**given), monkeypatch)[1].logical_date

    assert day(params={"date": "2026-02-03", "release": "d20260204"}) == date(2026, 2, 3)
    assert day(params={"release": "d20260204"}) == date(2026, 2, 4)
    assert day() == date(2026, 3, 1)
    assert day(data_interval_start=None, logical_date=datetime(2026, 3, 4, tzinfo=UTC)) == date(2026, 3, 4)


def test_a_run_by_hand_without_a_day_fails_and_says_what_to_give(airflow: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    with pytest.raises(AirflowFailException, match="date"):
        execute("ingest", context(data_interval_start=None), monkeypatch)


# ---------------------------------------------------------------- the asset event

PUBLISHED = {"tag": "d20260301", "logical_date": "2026-03-01", "codebook_digest": "c", "generation": 1, "is_current_newest": True}


def test_a_release_that_became_the_newest_is_announced_with_its_facts(airflow: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs.airflow_task import NEW_RELEASE, RELEASE

    given = context()
    execute("publish_release", given, monkeypatch, {"outputs": PUBLISHED})
    ((asset, extra),) = given["outlet_events"][NEW_RELEASE].added
    assert asset == RELEASE
    assert extra == {"release": "d20260301", "tag": "d20260301", "logical_date": "2026-03-01", "codebook_digest": "c", "generation": 1}


def test_a_restored_release_is_announced_even_when_a_killed_try_had_written_it(bag: Any, airflow: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs import airflow_home, launchers

    seen: list[Context] = []

    def launch(ctx: Context, request: launchers.Request) -> dict[str, Any]:
        seen.append(ctx)
        return {"stage": ctx.stage, "status": "reused", "seconds": 0.1, "outputs": {**PUBLISHED, "tag": "d20260302"}}

    monkeypatch.setattr(launchers, "launch", launch)
    airflow_home.run_dag("sid_rollback", datetime(2026, 3, 9, tzinfo=UTC), {"profile": "tiny", "tag": "d20260302", "reason": "a bad file"})
    assert [(ctx.stage, str(ctx.logical_date), ctx.param("release"), ctx.reason) for ctx in seen] == [("rollback", "2026-03-02", "d20260302", "a bad file")]
    assert airflow_home.newest_event()["release"] == "d20260302"


@pytest.mark.parametrize(
    ("stage", "outcome"),
    [
        ("publish_release", {"outputs": {**PUBLISHED, "is_current_newest": False}}),
        ("publish_release", {"outputs": {**PUBLISHED, "is_current_newest": False}, "status": "reused"}),
        ("publish_release", {"outputs": {"tag": "d20260301"}, "status": "reused"}),
        ("assign_sid", {"outputs": PUBLISHED}),
    ],
)
def test_an_older_or_reused_release_and_other_stages_announce_nothing(
    stage: str, outcome: dict[str, Any], airflow: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = context()
    execute(stage, given, monkeypatch, outcome)
    assert given["outlet_events"] == {}


# ---------------------------------------------------------------- a whole run in this process


def test_a_night_runs_in_this_process_and_announces_its_release(bag: Any, airflow: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs import airflow_home, launchers

    order: list[str] = []

    def launch(ctx: Context, request: launchers.Request) -> dict[str, Any]:
        order.append(ctx.stage)
        outputs = {**PUBLISHED, "tag": "d20260303"} if ctx.stage == "publish_release" else {}
        return {"stage": ctx.stage, "status": "done", "seconds": 0.1, "outputs": outputs}

    monkeypatch.setattr(launchers, "launch", launch)
    airflow_home.run_dag("sid_refresh", datetime(2026, 3, 3, tzinfo=UTC), {"profile": "tiny", "date": "2026-03-03"})
    assert sorted(order) == sorted(stage.name for stage in group("refresh"))
    for stage in group("refresh"):
        assert all(order.index(other) < order.index(stage.name) for other in upstream(stage))
    assert airflow_home.newest_event()["release"] == "d20260303"


def test_a_night_that_fails_names_the_stage_and_leaves_the_later_ones_alone(bag: Any, airflow: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs import airflow_home, launchers

    order: list[str] = []

    def launch(ctx: Context, request: launchers.Request) -> dict[str, Any]:
        order.append(ctx.stage)
        if ctx.stage == "item_popularity":
            raise GateFailed("an expectation does not hold", found="rows 0", where="feature.item_popularity")
        return {"stage": ctx.stage, "status": "done", "seconds": 0.1, "outputs": {}}

    monkeypatch.setattr(launchers, "launch", launch)
    with pytest.raises(ContractError) as caught:
        airflow_home.run_dag("sid_refresh", datetime(2026, 3, 4, tzinfo=UTC), {"profile": "tiny", "date": "2026-03-04"})
    assert caught.value.found.startswith("item_popularity (failed), ")
    assert caught.value.next_command.endswith("/item_popularity.json")
    assert "publish_release (upstream_failed)" in caught.value.found
    assert order.count("item_popularity") == 1
    assert "item_feature" not in order
    assert "publish_release" not in order


def test_the_default_profile_exists(bag: Any) -> None:
    from pipeline.config import known_profiles

    for dag in bag.dags.values():
        assert dag.params["profile"] in known_profiles()


def test_retry_delays_fit_into_a_night(bag: Any) -> None:
    from jobs.airflow_task import DEFAULTS

    assert DEFAULTS["retry_delay"] * 2 ** DEFAULTS["retries"] <= timedelta(hours=1)
