"""Day files of a user's own folder through ingest, its audits and the counts that follow: nothing is lost, and a bad file leaves the lake as it was."""

import csv
import dataclasses
import json
from datetime import date, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import images, ingest, item_popularity, plan_night, runner
from jobs.inputs import Inputs
from pipeline import config, lakehouse
from pipeline.context import Context, Plan, write_json
from pipeline.datasets import base, dataset
from pipeline.errors import ConfigError, ContractError, GateFailed, UpstreamMissing
from pipeline.stages import BY_NAME

pytestmark = pytest.mark.spark
D = date(2026, 3, 2)
EVENT_HEADER = ["user_id", "item_id", "event_ts", "event_type", "value", "session_id"]
ITEM_HEADER = ["item_id", "title", "text", "category", "image_uri"]
SAME = {name: name for name in EVENT_HEADER}


def write_csv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])


def event(user="u1", item="a", moment=f"{D} 10:00:00", kind="click", value="1", session="s1"):
    return [user, item, moment, kind, value, session]


def stop_at(name):
    """A runner.step that ends the process there, as far as a test can see."""

    def step(ctx, reached):
        if reached == name:
            raise KeyboardInterrupt

    return step


class Nights:
    """A source folder and a lake, driven as the runner drives them."""

    def __init__(self, spark, home, root, **source):
        self.spark, self.home, self.root, self.frames = spark, home, root, {}
        root.mkdir(parents=True, exist_ok=True)
        given = {"catalogue": "delta", "events_pattern": "events/{date}.csv", "items_pattern": "items/{date}.csv", **source}
        self.config = config.parse(
            {
                "source": {"dataset": "folder", "path": str(root), "event_columns": SAME, "item_columns": {n: n for n in ITEM_HEADER}, **given},
                "ingest": {"max_rejected_share": 1.0},
            },
            where="test",
        )

    def limits(self, **limits):
        self.config = self.config.model_copy(update={"ingest": config.Ingest(**limits)})

    def source(self, **changes):
        self.config = self.config.model_copy(update={"source": self.config.source.model_copy(update=changes)})

    def events(self, *rows, day=D, header=EVENT_HEADER):
        write_csv(self.root / "events" / f"{day}.csv", header, rows)

    def items(self, *rows, day=D, header=ITEM_HEADER):
        write_csv(self.root / "items" / f"{day}.csv", header, rows)

    def plan(self, *days, kinds=("events", "items"), changed=None):
        """Context of a night that reads the files of `days` (default D)."""
        source = self.config.source
        spec = dataset(source.dataset).prepare(source, self.home.folder("data"), 0)
        files = [base.planned_file(spec, source, day, kind) for day in days or (D,) for kind in spec.kinds if kind in kinds]
        files = [file.model_copy(update=changed or {}) for file in files]
        last = max(days or (D,))
        night = Plan(
            logical_date=last, tag="d1", revision=1, generation=1, start="cold", reason="test", parent=None,
            files=tuple(files), input_fingerprint="f", config_hash="c", seed=0,
        )  # fmt: skip
        ctx = Context(self.config, self.home, "ingest", last, "test")
        write_json(ctx.staging / "plan_night.json", {"outputs": night.model_dump(mode="json")})
        return ctx

    def run(self, ctx, job=ingest):
        """The job, its audits and its publishing, without MLflow; returns the job's metrics."""
        inputs = self._inputs(ctx.stage)
        result = job.run(inputs, getattr(self.config, ctx.stage), ctx)
        runner._write_all(self.spark, ctx, result.writes, inputs.snapshots, runner.Ledger())
        self.spark.catalog.clearCache()
        return result.metrics

    def load(self, *days, **plan):
        """Ingest the days (default D) and publish."""
        return self.run(self.plan(*days, **plan))

    def judge(self, *days, **plan):
        """Ingest the days (default D) without publishing; `rows` then reads what the job would write."""
        self.spark.catalog.clearCache()
        result = ingest.run(self._inputs("ingest"), self.config.ingest, self.plan(*days, **plan))
        self.frames = {write.table: write.frame for write in result.writes}
        return result.metrics

    def count(self, last=D):
        return self.run(dataclasses.replace(self.plan(last), stage="item_popularity"), item_popularity)

    def rows(self, table, *columns, where="true"):
        """Rows as sorted tuples, nulls last."""
        frame = self.frames[table] if table in self.frames else self.spark.table(f"lake.{table}")
        rows = (tuple(row) for row in frame.where(where).selectExpr(*columns).collect())
        return sorted(rows, key=lambda row: [(value is None, value) for value in row])

    def _inputs(self, stage):
        snapshots = {table: lakehouse.snapshot(self.spark, table) for table in BY_NAME[stage].inputs}
        return Inputs(self.home, self.config.lake, snapshots, self.spark)

    def reasons(self):
        return [reason for (reason,) in self.rows("raw.rejected_row", "reason")]


@pytest.fixture(scope="module")
def never_written(spark, _session_home):
    """The session's home; the tests that share it publish nothing."""
    return _session_home


@pytest.fixture
def files(spark, never_written, tmp_path):
    """For tests that publish nothing."""
    return Nights(spark, never_written, tmp_path / "my data [1] {x}")


@pytest.fixture
def nights(spark, lake_home, tmp_path):
    """For tests that publish: the lake is empty."""
    return Nights(spark, lake_home, tmp_path / "source")


def test_every_bad_event_is_quarantined_with_its_reason_and_none_is_lost(files):
    late = f"{D - timedelta(days=3)} 23:00:00"
    rows = [
        event(), event(), event(value="2", moment=f"{D} 23:59:59"), event(moment=late),
        event(user=" "), event(item=""), event(moment="yesterday"), event(moment=f"{D + timedelta(days=1)} 00:00:00"),
        event(value="many"), event(value="NaN"), ["u9", "a"], [*event(), "one column too many"],
    ]  # fmt: skip
    files.events(*rows)
    files.items(["a", "Title, with comma", "line\nbreak", "c", ""])
    metrics = files.judge()
    assert files.reasons() == [
        "bad_time", "bad_value", "bad_value", "duplicate_event", "future_event", "malformed_row", "malformed_row", "missing_item", "missing_user",
    ]  # fmt: skip
    assert files.rows("raw.source_file", "kind", "rows_in", "rejected", "status") == [("events", 12, 9, "loaded"), ("items", 1, 0, "loaded")]
    assert len(files.rows("raw.interaction", "item_id")) == 3
    assert metrics["late_events"] == 1
    assert metrics["rejected/bad_value"] == 2
    assert metrics["rejected_share"] == pytest.approx(9 / 13)
    kept = dict(files.rows("raw.rejected_row", "reason", "row", where="reason IN ('bad_time', 'malformed_row')"))
    assert json.loads(kept["bad_time"])["event_ts"] == "yesterday"
    assert "u9,a" in kept["malformed_row"] or "one column too many" in kept["malformed_row"]
    assert files.rows("raw.item", "title", "text") == [("Title, with comma", "line\nbreak")]


def test_a_corrected_file_replaces_its_own_rows_and_an_empty_rerun_of_a_full_day_empties_it(nights):
    before = D - timedelta(days=1)
    nights.source(absent="declared_empty")
    nights.events(event(user="old", moment=f"{before} 10:00:00"), day=before)
    nights.events(event(user="wrong"), event(user=""))
    nights.items(["a", "A", "", "", ""])
    nights.load(before, D)
    nights.count()
    assert nights.rows("feature.item_popularity", "item_id", "evidence_count") == [("a", 2)]
    nights.events(event(user="right"), event(user="right", item="b"))
    nights.load()
    assert nights.rows("raw.interaction", "user_id", "item_id") == [("old", "a"), ("right", "a"), ("right", "b")]
    assert nights.reasons() == []
    assert nights.count()["files_counted"] == 1
    ledger, counted = (nights.spark.table(f"lake.{table}") for table in ("raw.source_file", "feature.item_day_stat"))
    assert item_popularity.pending_days(ledger, counted, D) == []
    nights.events()
    nights.items()
    nights.load()
    assert nights.rows("raw.interaction", "user_id") == [("old",)]
    assert nights.rows("raw.item", "item_id") == []
    assert nights.rows("raw.source_file", "kind", "rows_in", "status", where=f"file_date = DATE'{D}'") == [("events", 0, "loaded"), ("items", 0, "loaded")]
    nights.count()
    assert nights.rows("feature.item_day_stat", "logical_date", "events") == [(before, 1)]
    assert nights.rows("feature.item_popularity", "item_id", "evidence_count", "days_since_first_event") == [("a", 1, 1)]


def test_many_days_are_one_load_and_columns_are_matched_by_name(files):
    days = [D - timedelta(days=number) for number in range(4)]
    for number, day in enumerate(days[:3]):
        header = EVENT_HEADER if number != 1 else EVENT_HEADER[::-1]
        row = event(user=f"u{number}", moment=f"{day} 01:00:00")
        files.events(row if number != 1 else row[::-1], day=day, header=header)
    files.source(absent="declared_empty")
    metrics = files.judge(*days)
    assert files.rows("raw.interaction", "file_date", "user_id", "session_id") == [(days[2], "u2", "s1"), (days[1], "u1", "s1"), (days[0], "u0", "s1")]
    assert files.rows("raw.source_file", "file_date", where="kind = 'events' AND status = 'declared_empty'") == [(days[3],)]
    assert (metrics["files_loaded"], metrics["files_declared_empty"]) == (3, 5)


def test_files_load_all_their_rows_whatever_their_path(spark, never_written, tmp_path):
    odd = "dt={date} (a+b) 100% %20 \u00fcml\u00e4ut @1,&'"
    nights = Nights(spark, never_written, tmp_path / "M\u00fcller & S\u00f6hne+[1]", events_pattern=f"{odd}/x.csv", items_pattern=f"items {odd}.csv")
    write_csv(nights.root / odd.replace("{date}", str(D)) / "x.csv", EVENT_HEADER, [event(), event(user="u2")])
    write_csv(nights.root / f"items {odd.replace('{date}', str(D))}.csv", ITEM_HEADER, [["a", "A", "", "", ""]])
    nights.judge()
    assert nights.rows("raw.source_file", "kind", "rows_in", "rejected") == [("events", 2, 0), ("items", 1, 0)]
    assert [len(nights.rows(table, "1")) for table in ("raw.interaction", "raw.item")] == [2, 1]


def test_a_file_whose_rows_spark_skips_is_refused(files):
    files.source(events_pattern="_{date}.csv", absent="declared_empty", catalogue="from_events", items_pattern="", item_columns={"title": "event_type"})
    path = files.root / f"_{D}.csv"
    write_csv(path, EVENT_HEADER, [event()])
    with pytest.raises(ContractError, match="a file with rows gave none") as caught:
        files.judge()
    assert caught.value.where == str(path)
    write_csv(path, EVENT_HEADER, [])
    files.judge()
    assert files.rows("raw.source_file", "rows_in", "status") == [(0, "loaded")]


def test_a_file_of_ours_is_read_from_any_folder(spark, tmp_path):
    folder = tmp_path / "a b+c [1] {x} 100% \u00fc"
    folder.mkdir()
    pq.write_table(pa.table({"x": [1, 2]}), folder / "rows.parquet")
    assert spark.read.parquet(ingest.literal_path(folder / "rows.parquet")).count() == 2


def test_an_archived_file_keeps_its_rows_and_half_an_ingest_is_seen(nights, monkeypatch):
    nights.events(event())
    nights.items(["a", "A", "", "", ""])
    nights.load()
    nights.load(kinds=())  # nothing planned: the files were archived
    assert nights.rows("raw.interaction", "user_id") == [("u1",)]
    assert plan_night.half_ingests(nights.home, nights.config) == set()
    nights.events(event(user="right"))
    going_on = runner.step
    monkeypatch.setattr(runner, "step", stop_at("after_publish_1"))
    with pytest.raises(KeyboardInterrupt):
        nights.load()
    monkeypatch.setattr(runner, "step", going_on)
    assert nights.rows("raw.interaction", "user_id") == [("right",)]
    assert plan_night.half_ingests(nights.home, nights.config) == {D}
    nights.load()
    assert plan_night.half_ingests(nights.home, nights.config) == set()
    nights.load(D + timedelta(days=1), kinds=("items",), changed={"status": "declared_empty"})
    assert plan_night.half_ingests(nights.home, nights.config) == set()


def test_repeated_and_conflicting_catalogue_rows(files):
    files.events(event())
    files.items(
        ["a", "A", "t", "", ""], ["a", "A", "t", "", ""], ["b", "one", "", "", ""], ["b", "two", "", "", ""], ["", "x", "", "", ""], ["c", "", "", "", ""]
    )
    files.judge()
    assert files.reasons() == ["conflicting_item", "conflicting_item", "duplicate_item", "missing_item"]
    assert files.rows("raw.item", "item_id", "title") == [("a", "A"), ("c", None)]
    assert files.rows("raw.item", "text_hash IS NULL") == [(False,), (True,)]


def test_unusable_images_are_quarantined_and_their_items_go_on(files):
    pictures = files.root / "img"
    pictures.mkdir()
    (pictures / "ok.jpg").write_bytes(b"x" * 10)
    (pictures / "big.jpg").write_bytes(b"x" * 11)
    (files.root / "secret").write_bytes(b"x")
    files.source(image_root="img")
    files.limits(max_rejected_share=0.0, max_image_bytes=10)
    files.events(event())
    named = [("a", "ok.jpg"), ("b", "big.jpg"), ("c", "none.jpg"), ("d", "../secret"), ("e", ""), ("f", "."), ("g", "x" * 300), ("h", "gs://b/x.jpg")]
    files.items(*([name, "T", "", "", uri] for name, uri in named))
    metrics = files.judge()
    assert files.rows("raw.rejected_row", "reason", "get_json_object(row, '$.item_id')") == [
        ("image_missing", "c"), ("image_missing", "f"), ("image_missing", "g"),
        ("image_outside_root", "d"), ("image_outside_root", "h"), ("image_too_large", "b"),
    ]  # fmt: skip
    assert files.rows("raw.item", "item_id", "image_hash IS NOT NULL") == [(name, name == "a") for name in "abcdefgh"]
    assert metrics["rows_rejected"] == 0
    assert metrics["rejected/image_missing"] == 3


def test_formats_give_the_same_rows(files, tmp_path):
    rows = [event(), event(user="u2", value="2.5"), event(user=""), event(user="u3", session="")]
    digests, records = [], [dict(zip(EVENT_HEADER, row, strict=True)) for row in rows]
    for suffix in ("csv", "jsonl", "parquet"):
        other = Nights(files.spark, files.home, tmp_path / suffix, catalogue="from_events", events_pattern=f"e/{{date}}.{suffix}", items_pattern="")
        path = other.root / "e" / f"{D}.{suffix}"
        write_csv(path, EVENT_HEADER, rows)
        if suffix == "jsonl":
            path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
        elif suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(records), path)
        other.source(item_columns={"title": "event_type"})
        other.judge()
        digests.append(lakehouse.rows_digest(other.frames["raw.interaction"]))
        assert other.reasons() == ["missing_user"]
    assert len(set(digests)) == 1


def test_a_catalogue_from_events_takes_the_most_frequent_description(files):
    files.source(catalogue="from_events", items_pattern="", item_columns={"title": "event_type"})
    titles = ["MUG", "mug", "MUG", "wrongly coded", ""]
    files.events(
        *(event(user=f"u{number}", kind=title) for number, title in enumerate(titles)),
        event(item="b", kind="Z"),
        event(item="b", user="v", kind="Y"),
        event(item="c", kind=""),
    )
    files.judge(kinds=("events",))
    assert files.rows("raw.item", "item_id", "title") == [("a", "MUG"), ("b", "Y")]


def test_a_snapshot_that_retires_too_much_is_refused_and_main_is_untouched(nights):
    nights.source(catalogue="snapshot")
    nights.limits(max_rejected_share=1.0, max_retired_share=0.3)
    before = D - timedelta(days=1)
    nights.events(event(moment=f"{before} 01:00:00"), day=before)
    nights.items(*([name, name, "", "", ""] for name in "abcd"), day=before)
    assert nights.load(before)["retired_share"] == 0
    nights.events(event())
    nights.items(["a", "a", "", "", ""], ["b", "b", "", "", ""], ["new", "new", "", "", ""])
    with pytest.raises(GateFailed, match="retired_share"):
        nights.load()
    assert nights.rows("raw.source_file", "file_date") == [(before,), (before,)]
    assert len(nights.rows("raw.interaction", "user_id")) == 1
    nights.items(*([name, name, "", "", ""] for name in "abc"))
    assert nights.judge()["retired_share"] == 0.25


def test_too_many_rejected_rows_fail_the_gate_and_leave_the_lake_as_it_was(nights):
    nights.limits(max_rejected_share=0.3)
    nights.items(["a", "A", "", "", ""])
    nights.events(event(), event(user=""))
    with pytest.raises(GateFailed, match="rejected_share"):
        nights.load()
    for table in ("raw.interaction", "raw.item", "raw.rejected_row", "raw.source_file"):
        assert nights.rows(table, "1") == []


def test_a_late_catalogue_file_keeps_the_events_of_its_day(nights):
    before = D - timedelta(days=1)
    nights.events(event(moment=f"{before} 01:00:00"), event(user="", moment=f"{before} 01:00:00"), day=before)
    nights.items(["a", "A", "", "", ""], day=before)
    nights.load(before)
    nights.items(["a", "A", "", "", ""], ["a", "A", "", "", ""], day=before)
    nights.events(event())
    nights.judge(before, kinds=("items",))
    assert nights.reasons() == ["duplicate_item", "missing_user"]
    assert nights.rows("raw.source_file", "kind", "rejected") == [("events", 1), ("items", 1)]


def test_files_that_cannot_be_used_name_what_is_wrong_and_what_to_do(files):
    files.events(event())
    files.items(["a", "A", "", "", ""])
    with pytest.raises(ContractError, match=r"changed after.*(?s:.*)sid run plan_night --date 2026-03-02"):
        files.judge(changed={"sha256": "0" * 64})
    with pytest.raises(UpstreamMissing, match="sid run ingest --date 2026-03-01"):
        files.judge(D - timedelta(days=1), D)
    files.events(event()[:2], header=EVENT_HEADER[:2])
    with pytest.raises(ContractError, match="lacks columns: event_ts"):
        files.judge()
    files.events(event(), header=[*EVENT_HEADER[:5], "session_id", "USER_ID"])
    with pytest.raises(ContractError, match="twice"):
        files.judge()
    Path(files.root / "events" / f"{D}.csv").write_bytes(b"PK\x03\x04\x00\x00\xff\xfe")
    with pytest.raises(ContractError, match="binary"):
        files.judge()
    files.source(dataset="online_retail", catalogue="snapshot")
    (files.root / f"{D}.csv").touch()
    with pytest.raises(ConfigError, match="no such catalogue"):
        files.judge()


def test_a_file_that_is_written_again_while_it_is_read_is_refused(files, monkeypatch):
    """Its rows would stand in the lake under the digest of other bytes, and no rerun would look at it again."""
    files.events(event())
    files.items(["a", "A", "", "", ""])
    count = ingest.tally

    def late(judged, kind):
        found = count(judged, kind)
        files.events(event(), event(user="u2"))
        return found

    monkeypatch.setattr(ingest, "tally", late)
    with pytest.raises(ContractError, match="changed after") as caught:
        files.judge()
    assert caught.value.where.endswith(f"{D}.csv")


def test_the_same_files_give_the_same_rows(files):
    files.events(*(event(user=f"u{number % 7}", item=f"i{number % 3}", value=str(number % 5)) for number in range(60)))
    files.items(["i0", "A", "", "", ""])
    tables = ("raw.interaction", "raw.item", "raw.rejected_row", "raw.source_file")
    files.judge()
    first = [lakehouse.rows_digest(files.frames[table]) for table in tables]
    files.judge()
    assert [lakehouse.rows_digest(files.frames[table]) for table in tables] == first


@pytest.mark.parametrize(
    ("uri", "reason"),
    [("file:///etc/hostname", "image_outside_root"), ("a\0b", "image_missing"), ("x" * 5000, "image_missing"), ("/etc/hostname", "image_outside_root")],
)
def test_a_hostile_image_address_reads_nothing(tmp_path, uri, reason):
    assert images.image_digest(str(tmp_path), uri, 10)[:2] == (None, reason)


def test_images_are_read_through_fsspec_addresses():
    import fsspec

    with fsspec.open("memory://pictures/a.jpg", "wb") as stream:
        stream.write(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert images.image_digest("memory://pictures", "a.jpg", 3) == (digest, None, None)
    assert images.image_digest("memory://pictures", "b.jpg", 3)[1] == "image_missing"
    assert images.image_digest("memory://pictures", "a.jpg", 2)[1] == "image_too_large"
