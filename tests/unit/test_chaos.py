"""How the chaos run judges: what was not run is not held, rows are compared and not counted, and the undisturbed nights are made once, when needed."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pyarrow as pa
import pytest

from pipeline import lakehouse
from pipeline.context import ROOT

ITEMS = [{"item_id": "a", "codes": [1, 2], "path": "one/home"}, {"item_id": "b", "codes": [3, 4], "path": "one/home"}]


@pytest.fixture
def chaos(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The program as `python tests/chaos/chaos.py` sees itself."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "chaos"))
    yield importlib.import_module("chaos")
    del sys.modules["chaos"]


@pytest.fixture
def homes(chaos: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, tuple[str, list[dict]]]]:
    """Home -> tag -> (digest it was published with, rows); a night of any home publishes the two items."""
    found: dict[str, dict[str, tuple[str, list[dict]]]] = {}

    def night(home: Path, *words: str) -> SimpleNamespace:
        dates = [date.fromisoformat(word) for word in words if word[:1] == "2"]
        for number in range((dates[-1] - dates[0]).days + 1):
            found.setdefault(home.name, {}).setdefault(f"d{dates[0] + timedelta(days=number):%Y%m%d}", ("digest", ITEMS))
        return SimpleNamespace(wait=lambda timeout: 0)

    def releases(home: object, lake: object) -> pa.Table:
        return pa.Table.from_pylist([{"tag": tag, "rows_digest": digest, "status": "published"} for tag, (digest, _) in found.get(home.root.name, {}).items()])

    monkeypatch.setattr(chaos, "start", night)
    monkeypatch.setattr(chaos, "ghost_runs", lambda home: [])
    monkeypatch.setattr(lakehouse, "open_table", lambda home, lake, table: SimpleNamespace(metadata=SimpleNamespace(refs={"main": 0})))
    monkeypatch.setattr(lakehouse, "table_names", lambda: ["sid.item_sid"])
    monkeypatch.setattr(lakehouse, "read_releases", releases)
    monkeypatch.setattr(lakehouse, "read_release", lambda home, lake, tag: pa.Table.from_pylist(found[home.root.name][tag][1]))
    monkeypatch.setattr(
        lakehouse, "read_arrow", lambda home, lake, table: pa.Table.from_pylist([row for _, rows in found[home.root.name].values() for row in rows])
    )
    return found


def test_a_fault_that_could_not_be_made_is_neither_held_nor_broken(chaos: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def raising(error: Exception) -> object:
        raise error

    faults = {"fine": lambda: "found", "absent": lambda: raising(chaos.NotRun("no mount")), "bad": lambda: raising(chaos.Broken("other rows"))}
    rows = {name: chaos.attempt(name, fault) for name, fault in faults.items()}
    assert {name: (row["held"], row["found"]) for name, row in rows.items()} == {
        "fine": ("yes", "found"),
        "absent": ("not run", "no mount"),
        "bad": ("NO", "other rows"),
    }
    monkeypatch.setattr(chaos.log, "configure", lambda: None)  # the test process has its own logging
    monkeypatch.setattr("sys.argv", ["chaos.py", "--only", "disk full", "--out", str(tmp_path / "chaos.json")])
    for fault, code in ((chaos.NotRun("why"), 0), (chaos.Broken("why"), 1)):
        monkeypatch.setattr(chaos, "disk_full", lambda home, reference, fault=fault: raising(fault))
        assert chaos.main() == code


@pytest.mark.parametrize(
    ("tag", "digest", "rows", "holds"),
    [
        ("d20260302", "digest", ITEMS, True),
        ("d20260304", "digest", [{**row, "path": "another/home"} for row in reversed(ITEMS)], True),
        ("d20260302", "digest", [{**ITEMS[0], "codes": [1, 9]}, ITEMS[1]], False),
        ("d20260302", "digest", ITEMS[:1], False),
        ("d20260302", "another", ITEMS, False),
        ("d20260302_r2", "digest", ITEMS, False),
    ],
    ids=["as published", "another order and home", "another code", "a row less", "another digest", "published twice"],
)
def test_a_release_is_readable_when_it_holds_the_undisturbed_rows(
    chaos: ModuleType, homes: dict, tmp_path: Path, tag: str, digest: str, rows: list[dict], holds: bool
) -> None:
    homes["broken"] = {tag: (digest, rows)}
    reference = chaos.Reference(tmp_path / "plain")
    if holds:
        assert chaos.readable(tmp_path / "broken", reference) == 1
    else:
        with pytest.raises(chaos.Broken, match=tag):
            chaos.readable(tmp_path / "broken", reference)


def test_undisturbed_nights_are_run_once_and_only_as_many_as_are_asked_for(chaos: ModuleType, homes: dict, tmp_path: Path) -> None:
    reference = chaos.Reference(tmp_path / "plain")
    assert not homes
    one = reference.nights(1)
    assert list(homes["plain"]) == ["d20260302"]
    three = reference.nights(3)
    assert list(homes["plain"]) == ["d20260302", "d20260303", "d20260304"]
    assert [json.loads(kept["releases"])[-1][0] for kept in (one, reference.nights(2), three)] == ["d20260302", "d20260303", "d20260304"]
    assert reference.nights(1) == one
    assert len(reference.seconds) == 3


@pytest.mark.parametrize(
    ("ends", "rows", "held"),
    [
        (64, None, "yes"),
        (0, [{**ITEMS[0], "codes": [0, 0]}, ITEMS[1]], "NO"),
        (64, [{**ITEMS[0], "codes": [0, 0]}, ITEMS[1]], "NO"),
        (64, ITEMS, "NO"),
        (0, ITEMS, "not run"),
    ],
    ids=["the night fails", "read as if it were rows", "failed after it was published", "published although it failed", "never read"],
)
def test_a_damaged_file_must_fail_the_night_and_leave_the_undisturbed_rows(
    chaos: ModuleType, homes: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ends: int, rows: list[dict] | None, held: str
) -> None:
    home, usual = tmp_path / "corrupted", chaos.start
    file = home / "lake" / "feature" / "item_content_vector" / "data" / "one.parquet"
    file.parent.mkdir(parents=True)
    file.write_bytes(bytes(range(256)) * 4)
    whole = file.read_bytes()

    def night(where: Path, *words: str) -> SimpleNamespace:
        if where != home or file.read_bytes() == whole:
            return usual(where, *words)
        if rows is not None:
            homes[home.name]["d20260304"] = ("digest", rows)
        return SimpleNamespace(wait=lambda timeout: ends)

    monkeypatch.setattr(chaos, "start", night)
    told = chaos.attempt("damage", lambda: chaos.corrupted_file(home, chaos.Reference(tmp_path / "plain")))
    assert told["held"] == held, told


@pytest.mark.parametrize(("later", "held"), [(ITEMS, "yes"), (ITEMS[:1], "NO")], ids=["as any other", "a row less"])
def test_a_night_without_its_tracking_server_is_made_again_and_compared(
    chaos: ModuleType, homes: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, later: list[dict], held: str
) -> None:
    home, usual = tmp_path / "mlflow", chaos.start

    def night(where: Path, *words: str, **more: str) -> SimpleNamespace:
        if more:
            return SimpleNamespace(wait=lambda timeout: 75)
        if where == home:
            homes[home.name] = {"d20260302": ("digest", later)}
        return usual(where, *words)

    monkeypatch.setattr(chaos, "start", night)
    assert chaos.attempt("server", lambda: chaos.mlflow_unreachable(home, chaos.Reference(tmp_path / "plain")))["held"] == held
