"""Tables that are built on the night before: the same rows as from all files, and the night before only while its files stand."""

from __future__ import annotations

import hashlib
from datetime import date, datetime, timedelta
from typing import Any

import numpy as np
import pytest

from jobs import build_on, item_popularity, user_sequence
from jobs.inputs import Inputs
from pipeline.config import Config, UserSequence
from pipeline.context import Context, Home

pytestmark = pytest.mark.spark
FIRST, NIGHTS, CORRECTED = date(2026, 3, 1), 5, 3  # the night that brings a corrected file of the second day
TABLES = {
    "raw.source_file": "file_date date, kind string, sha256 string, rows_in bigint, rejected bigint",
    "raw.interaction": "file_date date, user_id string, item_id string, event_ts timestamp, session_id string",
    "raw.item": "file_date date, item_id string",
    "feature.item_day_stat": "logical_date date, event_date date, item_id string, events bigint, source_sha256 string",
    "feature.item_popularity": "logical_date date, item_id string, popularity double, percentile double, popularity_decile int, popularity_stratum string,"
    " evidence_count bigint, first_event_date date, days_since_first_event int, inputs_sha256 string",
    "feature.user_sequence": "logical_date date, user_id string, item_ids array<string>, event_ts array<timestamp>, baskets array<int>, num_events int,"
    " inputs_sha256 string",
}
Rows = list[tuple[Any, ...]]


class Frames(Inputs):
    """Tables given as rows instead of snapshots."""

    def frame(self, table: str, *, at: int | None = None) -> Any:
        assert self.spark is not None
        return self.spark.createDataFrame(self.lake.get(table, []), TABLES[table])


def day(number: int) -> date:
    return FIRST + timedelta(days=number)


def events(number: int, seed: int) -> Rows:
    """A day's file: events of that day and late ones, sessions that go on over days, one user who comes every day."""
    rng = np.random.default_rng(seed)
    moments = [datetime(*day(number).timetuple()[:3], 9) - timedelta(days=int(late)) for late in rng.choice([0, 0, 2], 12)]
    drawn = [(f"u{rng.integers(5)}", f"i{rng.integers(6)}", moment + timedelta(hours=int(rng.integers(9))), f"s{rng.integers(4)}") for moment in moments]
    return [(day(number), *row) for row in (*drawn, ("daily", f"i{number}", moments[0], None))]


def lake(night: int) -> dict[str, Rows]:
    """What is loaded on a night."""
    files = {number: events(number, seed=77 if number == 1 and night >= CORRECTED else number) for number in range(night + 1)}
    digests = {number: hashlib.sha256(str(rows).encode()).hexdigest() for number, rows in files.items()}
    ledger = [(day(number), "events", digests[number], len(rows), 0) for number, rows in files.items()]
    listed = [(day(number), f"only listed {number}") for number in files]
    return {"raw.source_file": ledger, "raw.interaction": [row for rows in files.values() for row in rows], "raw.item": listed}


@pytest.mark.parametrize(("job", "order"), [(item_popularity, "time"), (user_sequence, "time"), (user_sequence, "basket")])
def test_the_rows_are_those_of_reading_everything(spark: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, job: Any, order: Any) -> None:
    config, begun = Config(user_sequence=UserSequence(order=order, max_events=4)), []
    kept: dict[str, Rows] = {}

    def run(night: int, tables: dict[str, Rows]) -> dict[str, Rows]:
        """Table -> rows that the job would write."""
        ctx = Context(config, Home(tmp_path), job.__name__.split(".")[-1], day(night), "test")
        result = job.run(Frames(ctx.home, {**lake(night), **tables}, {}, spark), getattr(config, ctx.stage), ctx)
        found = {write.table: sorted((tuple(row) for row in write.frame.collect()), key=str) for write in result.writes}
        spark.catalog.clearCache()
        return found

    def noted(*given: Any) -> build_on.Ground:
        """The ground, and what it was."""
        begun.append(build_on.ground(*given))
        return begun[-1]

    monkeypatch.setattr(job, "ground", noted)
    for night in range(NIGHTS):
        whole = run(night, {})
        built = run(night, kept)
        assert built[job.TABLE] == whole[job.TABLE] != []
        for table, rows in built.items():
            days = {row[0] for row in rows}
            kept[table] = [*(row for row in kept.get(table, []) if row[0] not in days), *rows]
    nothing = build_on.LONG_AGO
    assert [ground.after for ground in begun[1::2]] == [nothing, day(0), day(1), nothing, day(3)]


@pytest.mark.parametrize("job", [item_popularity, user_sequence])
def test_rows_from_before_there_was_a_digest_are_no_ground(spark: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, job: Any) -> None:
    monkeypatch.setitem(TABLES, job.TABLE, TABLES[job.TABLE].removesuffix(", inputs_sha256 string"))
    assert build_on.ground(Frames(Home(tmp_path), lake(1), {}, spark), job.TABLE, day(1)).after == build_on.LONG_AGO


def test_the_digest_holds_files_up_to_the_night_and_settings_in_any_order() -> None:
    files = [(str(day(number)), "events", f"sha{number}", "9", "1") for number in range(3)]
    known = build_on.digest(files, day(1), "time", 50)
    assert known == build_on.digest(files[::-1], day(1), "time", 50) == build_on.digest(files[:2], day(1), "time", 50)
    assert known not in {
        build_on.digest(files, day(2), "time", 50),
        build_on.digest(files, day(1), "time", 51),
        build_on.digest([*files, (str(day(0)), "items", "late", "1", "0")], day(1), "time", 50),
        build_on.digest([(*files[0][:4], "2"), *files[1:]], day(1), "time", 50),
    }
