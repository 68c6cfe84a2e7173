"""Which releases live, which tags, days, branches, snapshots and files go."""

from __future__ import annotations

import os
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from py4j.protocol import Py4JJavaError

from jobs import maintain
from pipeline import lakehouse, tracking
from pipeline.config import Config
from pipeline.context import Context, Home
from pipeline.errors import ContractError, PublishConflict
from pipeline.lakehouse import History, StoredFile
from pipeline.stages import StageResult

NOW = datetime(2026, 6, 1, tzinfo=UTC)
LIMIT = NOW - timedelta(days=90)


def row(day: str, generation: int = 1, revision: int = 1, status: str = "current") -> dict[str, Any]:
    tag = f"d{day.replace('-', '')}" + (f"_r{revision}" if revision > 1 else "")
    return {"tag": tag, "logical_date": date.fromisoformat(day), "revision": revision, "generation": generation, "status": status}


ROWS = [
    row("2026-01-01"), row("2026-01-02", status="superseded"), row("2026-01-02", revision=2), row("2026-01-03", 2, status="withdrawn"),
    row("2026-01-04", 2), row("2026-01-05", 2), row("2026-05-01", 2), row("2026-05-02", 2, status="withdrawn"),
]  # fmt: skip
PUBLISHED = {found["tag"]: datetime.combine(found["logical_date"], datetime.min.time(), tzinfo=UTC) for found in ROWS}


def live(pinned: tuple[str, ...] = (), published: dict[str, datetime] = PUBLISHED, limit: datetime = LIMIT) -> tuple[set[str], set[str]]:
    return maintain.live_releases(ROWS, published, pinned, limit)


def test_young_newest_first_of_a_generation_and_pinned_releases_live() -> None:
    young, alive = live(("d20260102",))
    assert young == {"d20260501", "d20260502"}, "a withdrawn release has readers too"
    assert alive == young | {"d20260101", "d20260104", "d20260102"}, "the first that was not withdrawn stands for its generation"


def test_the_newest_current_release_lives_however_old_it_is() -> None:
    young, alive = live(limit=NOW + timedelta(days=400))
    assert young == set()
    assert alive == {"d20260101", "d20260104", "d20260501"}


def test_a_backfilled_release_is_as_young_as_its_publication_and_a_swept_one_does_not_come_back() -> None:
    published = {**PUBLISHED, "d20260102_r2": NOW}
    del published["d20260101"]
    young, alive = live(("d20260101",), published)
    assert "d20260102_r2" in young
    assert "d20260101" not in alive, "a pin of what is gone holds nothing"


def test_tags_of_dead_releases_go_and_a_tag_without_a_row_only_when_it_is_old() -> None:
    _, alive = live()
    published = {**PUBLISHED, "d20260106": NOW - timedelta(days=30), "d20260503": NOW - timedelta(hours=1)}
    gone = maintain.dropped_tags(ROWS, published, alive, NOW - timedelta(days=14))
    assert gone == ["d20260102", "d20260102_r2", "d20260103", "d20260105", "d20260106"]


def test_days_go_below_the_oldest_young_release_where_no_release_lives() -> None:
    young, alive = live()
    days = [date(2026, 1, day) for day in range(1, 8)] + [date(2026, 4, 30), date(2026, 5, 1), date(2026, 5, 2)]
    gone = maintain.dropped_days(days, ROWS, young, alive)
    assert gone == [date(2026, 1, day) for day in (2, 3, 5, 6, 7)] + [date(2026, 4, 30)]
    assert maintain.dropped_days(days, ROWS, set(), alive) == [], "with nothing young there is no line to draw"


def test_a_day_that_was_written_lately_is_known_by_the_snapshot_that_added_its_files() -> None:
    history = History(committed={1: NOW - timedelta(days=40), 2: NOW - timedelta(days=1)}, branches={"main": 2}, tags={})
    files = [StoredFile(bytes=1, partition=(day,), added=added) for day, added in (("2026-01-01", 1), ("2026-01-02", 1), ("2026-01-02", 2), ("2026-01-03", 7))]
    assert maintain.changed_days(files, history, NOW - timedelta(days=14)) == {date(2026, 1, 2)}, "snapshot 7 has expired, so it is old"


def test_a_snapshot_stays_while_it_is_young_or_pointed_at() -> None:
    history = History(
        committed={number: NOW - timedelta(days=100 - 10 * number) for number in range(1, 10)}, branches={"main": 9, "audit_x": 3}, tags={"t": 2, "u": 4}
    )
    assert maintain.kept_snapshots(history, ["t"], NOW - timedelta(days=30)) == {3, 4, 7, 8, 9}
    assert maintain.kept_snapshots(history, ["audit_x"], NOW + timedelta(days=1)) == {2, 4, 9}


def test_a_branch_that_shows_what_main_shows_may_have_been_cut_just_now() -> None:
    old = NOW - timedelta(days=50)
    history = History(committed={1: old, 2: old, 3: NOW}, branches={"main": 2, "audit_new": 2, "audit_old": 1, "audit_written": 3, "other": 1}, tags={})
    assert maintain.stale_branches(history, NOW - timedelta(days=14)) == {"audit_old": 1}


def test_small_files_count_by_partition() -> None:
    def files(partition: str, number: int, size: int) -> list[StoredFile]:
        return [StoredFile(bytes=size, partition=(partition,))] * number

    found = maintain.small_files([*files("a", 5, 10), *files("b", 4, 10), *files("c", 9, maintain.SMALL_BYTES)], 5)
    assert [file.partition for file in found] == [("a",)] * 5


class Thrown:
    """A Java exception as py4j shows it, by the names of its class and of its causes' classes."""

    def __init__(self, *kinds: str) -> None:
        self.kinds, self._target_id, self._gateway_client = kinds, "o1", None

    def __str__(self) -> str:
        return f"{self.kinds[0]}: it did not work"

    def getClass(self) -> Any:
        return SimpleNamespace(getSimpleName=lambda: self.kinds[0])

    def getCause(self) -> Thrown | None:
        return Thrown(*self.kinds[1:]) if self.kinds[1:] else None


@pytest.mark.parametrize(
    ("kinds", "told"),
    [
        (("RuntimeException", "ValidationException"), PublishConflict),  # what the rewrite says when a day was written anew while its files were joined
        (("RuntimeException", "CommitFailedException"), PublishConflict),
        (("SparkException", "OutOfMemoryError"), Py4JJavaError),
    ],
)
def test_files_that_were_written_anew_while_they_were_joined_ask_for_another_try(
    kinds: tuple[str, ...], told: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rewriting(*given: Any) -> list[Any]:
        raise Py4JJavaError("An error occurred while calling o1.sql.\n", Thrown(*kinds))

    monkeypatch.setattr(lakehouse, "_call", rewriting)
    with pytest.raises(told):
        lakehouse.compact(None, "raw.item", 5)  # type: ignore[arg-type]


def context(home: Path, day: date = date(2026, 5, 31)) -> Context:
    return Context(config=Config(), home=Home(home), stage="maintain", logical_date=day, run_id="m")


def test_old_staging_goes_but_not_what_mlflow_has_not_seen(tmp_path: Path) -> None:
    staging = Home(tmp_path).folder("staging")
    for name, age, flushed in (("old", 40, True), ("waiting", 40, False), ("young", 2, True)):
        record = staging / name / "mlflow" / "ingest-1"
        record.mkdir(parents=True)
        (record / "record.json").write_text("{}")
        if flushed:
            (record / "flushed.json").write_text("{}")
        at = (NOW - timedelta(days=age)).timestamp()
        for path in (*(staging / name).rglob("*"), staging / name):
            os.utime(path, (at, at))
    (staging / "elsewhere").symlink_to(tmp_path)
    found = maintain.stale_folders(context(tmp_path), 30)
    assert [path.name for path in found] == ["old"]
    assert found[staging / "old"] >= 4
    os.utime(staging / "old" / "mlflow")
    assert maintain.stale_folders(context(tmp_path), 30) == {}, "one fresh file keeps the folder"


def test_a_fetched_model_goes_when_nobody_has_read_it_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, fetched = Home(tmp_path), []

    def remote(*, artifact_uri: str, dst_path: str) -> str:
        fetched.append(artifact_uri)
        folder = Path(dst_path) / "model"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        return str(folder)

    monkeypatch.setattr("mlflow.artifacts.download_artifacts", remote)
    read, left = (tracking._fetch(home, f"s3://models/{name}") for name in ("read", "left"))
    for folder in (read, left):
        for path in (folder / "config.json", folder):
            os.utime(path, (0, 0))
    assert tracking._fetch(home, "s3://models/read") == read
    assert fetched == ["s3://models/read", "s3://models/left"], "once a home"
    found = maintain.Survey(sweeps=(), folders=maintain.stale_folders(context(tmp_path), 30), older=NOW)
    assert [(row["what"], row["names"]) for row in found.rows()] == [("fetched model", [left.name])]
    maintain.carry_out(None, found, Config().maintain, context(tmp_path))  # type: ignore[arg-type]
    assert list(home.folder("models").iterdir()) == [read]


def test_a_run_that_works_while_its_folder_is_listed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Home(tmp_path).folder("staging") / "run"
    run.mkdir()
    (run / ".plan_night.json.4711").write_text("{}")
    for path in (run / ".plan_night.json.4711", run):
        os.utime(path, (0, 0))
    assert [path.name for path in maintain.stale_folders(context(tmp_path), 30)] == ["run"]
    listed = Path.rglob

    def replaced(folder: Path, pattern: str) -> list[Path]:
        found = list(listed(folder, pattern))
        (run / ".plan_night.json.4711").replace(run / "plan_night.json")
        return found

    monkeypatch.setattr(Path, "rglob", replaced)
    assert maintain.stale_folders(context(tmp_path), 30) == {}


def test_a_folder_that_was_taken_up_again_since_the_survey_stays(tmp_path: Path) -> None:
    staging = Home(tmp_path).folder("staging")
    for name in ("old", "again"):
        (staging / name).mkdir()
        os.utime(staging / name, (0, 0))
    found = maintain.Survey(sweeps=(), folders=maintain.stale_folders(context(tmp_path), 30), older=NOW)
    assert [path.name for path in found.folders] == ["again", "old"]
    (staging / "again" / "plan_night.json").write_text("{}")
    maintain.carry_out(None, found, Config().maintain, context(tmp_path))  # type: ignore[arg-type]
    assert [path.name for path in staging.iterdir()] == ["again"]


def test_what_a_kill_leaves_of_a_folder_holds_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "run" / "mlflow" / "ingest-1" / "record.json"
    record.parent.mkdir(parents=True)
    record.write_text("{}")

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(maintain.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        maintain._forget(tmp_path / "run")
    assert not record.exists()
    assert not (tmp_path / "run").exists(), "half a folder under its name would be taken for a whole one"
    assert not list(tmp_path.rglob(record.name)), "nor does it hold one elsewhere"


def test_a_run_that_is_made_again_after_its_folder_went_is_no_try_that_mlflow_knows(tmp_path: Path) -> None:
    ctx = Context(config=Config(), home=Home(tmp_path), stage="ingest", logical_date=date(2026, 3, 1), run_id="cli__tiny__2026-03-01")

    def tried() -> str:
        return tracking.record(ctx, StageResult(), status="done", seconds=1.0, inputs={}, outputs={}).key

    named = tracking.record_key(ctx)
    assert tracking.record_key(ctx) == named, "a try that was killed goes on under its name"
    assert tried() == named
    maintain._forget(ctx.staging)
    assert tried() != named, "its parameters may be others, and the snapshots of the first one still carry the name"


def test_a_date_to_come_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="not come yet"):
        maintain.survey(None, Config().maintain, context(tmp_path, date(2999, 1, 1)))  # type: ignore[arg-type]


def test_the_listing_names_kind_table_count_and_bytes() -> None:
    sweep = maintain.Sweep(
        table="sid.item_sid",
        tags={"d20260102": 1},
        snapshots=(1, 2),
        freed={"a": 10, "b": 5},
        orphans={"x/y.parquet": 7},
        days=(date(2026, 1, 2),),
        day_bytes=9,
    )
    survey = maintain.Survey(sweeps=(sweep, maintain.Sweep(table="raw.item")), folders={Path("staging/run1"): 4, Path("models/a1"): 5}, older=NOW)
    assert survey.freed == 31
    assert [(found["what"], found["count"], found["frees_now"], found["frees_later"]) for found in survey.rows()] == [
        ("tag", 1, 0, 0), ("snapshot", 2, 15, 0), ("orphan file", 1, 7, 0), ("day", 1, 0, 9), ("staging folder", 1, 4, 0),
        ("fetched model", 1, 5, 0),
    ]  # fmt: skip
    assert survey.rows()[2]["names"] == ["y.parquet"]
