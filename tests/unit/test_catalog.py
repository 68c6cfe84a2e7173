"""Catalog and object store, said once for Spark and PyIceberg: addresses from the environment, secrets beside them, jars and the driver's name."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import date
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from jobs import backfill, pins
from pipeline import catalog, config, lakehouse, spark
from pipeline.config import Lake, Launch
from pipeline.context import Home
from pipeline.errors import ConfigError, ResourceLost, SidError, UpstreamMissing

CANARY = "c4n4ry/with+odd=chars&more"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SID_CATALOG_URI", "SID_CATALOG_USER", "SID_CATALOG_TOKEN", "SID_CATALOG_CREDENTIAL", "SID_WAREHOUSE", "SID_S3_ENDPOINT", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SID_CATALOG_PASSWORD", CANARY)


# ---------------------------------------------------------------- the catalog's properties


def test_user_and_password_go_beside_the_address_for_spark_and_inside_it_for_pyiceberg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SID_CATALOG_URI", "jdbc:postgresql://db:5432/lake")
    monkeypatch.setenv("SID_CATALOG_USER", "sid")
    monkeypatch.setenv("SID_WAREHOUSE", "s3://bucket/lake")
    monkeypatch.setenv("SID_S3_ENDPOINT", "http://127.0.0.1:9000")
    home, lake = Home.from_environment(), Lake(catalog="jdbc")
    spark = catalog.for_spark(home, lake)
    assert (spark["uri"], spark["jdbc.user"], spark["jdbc.password"]) == ("jdbc:postgresql://db:5432/lake", "sid", CANARY)
    assert spark["io-impl"].endswith("S3FileIO")
    reader = catalog.for_pyiceberg(home, lake)
    assert reader["uri"] == "postgresql+psycopg2://sid:c4n4ry%2Fwith%2Bodd%3Dchars%26more@db:5432/lake"
    assert spark["s3.endpoint"] == reader["s3.endpoint"] == "http://127.0.0.1:9000"
    assert "io-impl" not in reader


def test_a_rest_catalog_takes_its_token_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SID_CATALOG_URI", "https://catalog.example/api")
    monkeypatch.setenv("SID_CATALOG_TOKEN", CANARY)
    monkeypatch.setenv("SID_WAREHOUSE", "prod")
    for found in (catalog.for_spark(Home.from_environment(), Lake(catalog="rest")), catalog.for_pyiceberg(Home.from_environment(), Lake(catalog="rest"))):
        assert (found["type"], found["uri"], found["token"], found["warehouse"]) == ("rest", "https://catalog.example/api", CANARY, "prod")


@pytest.mark.parametrize("uri", ["", "jdbc:postgresql://db/x?user=a&password=hunter22", "jdbc:postgresql://a:hunter22@db/x"])
def test_a_missing_address_or_one_with_a_password_is_refused(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SID_CATALOG_URI", uri)
    with pytest.raises(ConfigError) as caught:
        catalog.for_spark(Home.from_environment(), Lake(catalog="jdbc"))
    assert "hunter22" not in str(caught.value)


def test_a_folder_catalog_in_an_object_store_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SID_WAREHOUSE", "s3://bucket/lake")
    with pytest.raises(ConfigError, match="object store"):
        catalog.for_spark(Home.from_environment(), Lake())


# ---------------------------------------------------------------- jars and the driver's address


def test_the_sites_own_jars_go_wherever_icebergs_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jar = tmp_path / "driver.jar"
    jar.touch()
    monkeypatch.setenv("SID_JARS", str(jar))
    assert spark.jars() == [spark.iceberg_jar(), jar]
    settings = spark._settings(Launch())
    assert settings["spark.jars"].split(",")[1:] == settings["spark.executor.extraClassPath"].split(":")[1:] == [str(jar)]
    monkeypatch.setenv("SID_JARS", f"{jar}:{tmp_path / 'gone.jar'}")
    with pytest.raises(ConfigError, match=r"gone\.jar"):
        spark.jars()


def test_the_driver_listens_on_loopback_unless_it_is_given_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SID_DRIVER_HOST", raising=False)
    assert {spark._settings(Launch())[f"spark.driver.{name}"] for name in ("host", "bindAddress")} == {"127.0.0.1"}
    monkeypatch.setenv("SID_DRIVER_HOST", "scheduler")
    assert spark._settings(Launch())["spark.driver.host"] == "scheduler"


# ---------------------------------------------------------------- tables on a catalog server


def test_a_table_of_a_server_is_found_or_missing_and_nothing_is_made_by_looking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    from pyiceberg.catalog import load_catalog

    monkeypatch.setenv("SID_CATALOG_URI", f"jdbc:sqlite:{tmp_path}/lake.db?journal_mode=WAL&busy_timeout=30000")
    monkeypatch.setenv("SID_WAREHOUSE", (tmp_path / "lake").as_uri())
    home, lake = Home(tmp_path / "home"), Lake(catalog="jdbc")
    with pytest.raises(UpstreamMissing, match="does not exist yet"):
        lakehouse.open_table(home, lake, "sid.release")
    assert not lakehouse.is_ready(home, lake, "sid.release")
    maker = load_catalog("lake", type="sql", uri=f"sqlite:///{tmp_path}/lake.db", warehouse=(tmp_path / "lake").as_uri())
    maker.create_namespace("sid")
    with pytest.raises(UpstreamMissing, match="does not exist yet"):
        lakehouse.open_table(home, lake, "sid.release")
    rows = pa.table({"tag": ["d20260301"], "logical_date": ["2026-03-01"], "revision": [1]})
    table = maker.create_table("sid.release", rows.schema)
    assert not lakehouse.is_ready(home, lake, "sid.release"), "a kill left it without its first snapshot, and so without a main to branch from"
    table.append(rows)
    assert lakehouse.is_ready(home, lake, "sid.release")
    assert lakehouse.read_releases(home, lake)["tag"].to_pylist() == ["d20260301"]
    maker.engine.dispose()


def test_some_items_are_read_without_the_others_and_main_tells_its_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    from pyiceberg.catalog import load_catalog

    from jobs import views

    monkeypatch.setenv("SID_CATALOG_URI", f"jdbc:sqlite:{tmp_path}/lake.db")
    monkeypatch.setenv("SID_WAREHOUSE", (tmp_path / "lake").as_uri())
    home, configured = Home(tmp_path / "home"), config.load("tiny", ("lake.catalog=jdbc",))
    maker = load_catalog("lake", type="sql", uri=f"sqlite:///{tmp_path}/lake.db", warehouse=(tmp_path / "lake").as_uri())
    maker.create_namespace("raw")
    for day in (1, 2, 3):
        names = ["i1", "it's", "i3"][:day]
        rows = {"item_id": names, "title": [f"{name} {day}" for name in names], "image_uri": pa.nulls(day, pa.string())}
        rows |= {"file_date": pa.array([date(2026, 3, day)] * day), "parts": pa.array([names[:place] for place in range(day)], pa.list_(pa.string()))}
        table = maker.create_table("raw.item", pa.table(rows).schema) if day == 1 else maker.load_table("raw.item")
        table.append(pa.table(rows), snapshot_properties={"sid.record_key": str(day)})
    full = lakehouse.read_arrow(home, configured.lake, "raw.item")
    some = lakehouse.read_arrow(home, configured.lake, "raw.item", among={"item_id": ["it's", "nobody"]})
    assert (len(full), some["title"].to_pylist(), some.column_names) == (6, ["it's 3", "it's 2"], full.column_names)
    assert len(lakehouse.read_arrow(home, configured.lake, "raw.item", among={"item_id": []})) == 0
    holding = lakehouse.read_arrow(home, configured.lake, "raw.item", among={"parts": ["i1", "nobody"], "item_id": ["it's"]})
    assert (holding["title"].to_pylist(), holding["parts"].to_pylist()) == (["it's 3", "it's 2"], [["i1"], ["i1"]])
    assert len(lakehouse.read_arrow(home, configured.lake, "raw.item", among={"parts": ["it's"]})) == 1
    shown = views.titles((home, configured), date(2026, 3, 2), ["it's", "i3"])
    assert shown.select(["item_id", "title"]).to_pylist() == [{"item_id": "it's", "title": "it's 2"}], "newest up to the day"
    commits = lakehouse.main_commits(home, configured.lake, "raw.item")
    assert [commit.origin["sid.record_key"] for commit in commits] == ["3", "2", "1"]
    assert commits[0].at >= commits[-1].at > 0
    maker.engine.dispose()


def test_a_server_that_does_not_answer_is_told_from_a_table_or_a_lake_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SID_CATALOG_URI", "jdbc:postgresql://127.0.0.1:9/lake")
    monkeypatch.setenv("SID_CATALOG_USER", "sid")
    home, profile = Home(tmp_path), config.Config(lake=Lake(catalog="jdbc"))
    looks: list[Callable[[], object]] = [
        lambda: lakehouse.open_table(home, profile.lake, "sid.release"),
        lambda: lakehouse.is_ready(home, profile.lake, "sid.release"),
        lambda: lakehouse.read_releases(home, profile.lake),  # no releases would mean to housekeeping that all tags may go
        lambda: pins.held_tags(home, profile),  # no tags would mean that the parent of a night has expired
        lambda: lakehouse.histories(home, profile.lake),
        lambda: backfill.ledger_rows(home, profile),
    ]
    for look in looks:
        with pytest.raises(ResourceLost, match=lakehouse.UNREACHABLE) as caught:
            look()
        assert CANARY not in str(caught.value) + str(caught.value.__cause__)


@pytest.fixture
def rest(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A REST catalog on loopback that answers everything with `status`."""
    said: dict[str, Any] = {"status": 500}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"error": {"message": "in the words of the server", "type": "Thrown", "code": 0}}'
            self.send_response(said["status"])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: Any) -> None:
            """Silent."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    monkeypatch.setenv("SID_CATALOG_URI", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("SID_WAREHOUSE", "prod")
    yield said
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(("status", "kind"), [(500, ResourceLost), (429, ResourceLost), (401, ConfigError), (403, ConfigError)])
def test_a_rest_catalog_in_trouble_may_be_tried_again_and_one_that_refuses_may_not(
    tmp_path: Path, rest: dict[str, Any], status: int, kind: type[SidError]
) -> None:
    rest["status"] = status
    with pytest.raises(kind) as caught:
        lakehouse.open_table(Home(tmp_path), Lake(catalog="rest"), "sid.release")
    assert "in the words of the server" in caught.value.found


@pytest.mark.parametrize(("kind", "known"), [("UndefinedTable", UpstreamMissing), ("InsufficientPrivilege", ConfigError), ("DeadlockDetected", ResourceLost)])
def test_only_a_catalog_without_tables_of_its_own_counts_as_empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, known: type[SidError]) -> None:
    """PostgreSQL's driver calls a table that is not there and one that may not be read the same kind of error."""
    import psycopg2.errors
    from sqlalchemy.exc import DBAPIError

    thrown = DBAPIError.instance("SELECT", {}, getattr(psycopg2.errors, kind)("iceberg_tables"), psycopg2.Error)

    def refuses(properties: Any) -> Any:
        raise thrown

    monkeypatch.setenv("SID_CATALOG_URI", "jdbc:postgresql://db/lake")
    monkeypatch.setattr(lakehouse, "_server", refuses)
    with pytest.raises(known, match="does not exist yet" if known is UpstreamMissing else None):
        lakehouse.open_table(Home(tmp_path), Lake(catalog="jdbc"), "sid.release")
