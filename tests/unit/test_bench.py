"""The benchmark runner: turns, ratios, verdicts, unequal answers, both files; what it measures is not tested here."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from pipeline.context import ROOT

FOLDER = ROOT / "tests" / "bench"
LIMITS = {"read": 1e10, "fp32": 1e11, "bf16": 1e12}


@pytest.fixture
def bench(monkeypatch):
    """The runner as `python tests/bench/bench.py` sees itself."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("bench")
    for name in [name for name in sys.modules if name == "bench" or name.split(".")[0] == "rows"]:
        del sys.modules[name]


def measured(bench, **given):
    case = bench.Case(name="a case", rounds=3, **given)
    return bench.measure(1, "a row", case)


def test_contestants_take_turns_and_another_one_begins_each_round(bench):
    calls = []
    contestants = {name: (lambda name=name: calls.append(name)) for name in ("ours", "a", "b")}
    wall, cpu = bench.alternate(contestants, 3)
    assert calls == ["ours", "a", "b", "a", "b", "ours", "b", "ours", "a"]
    assert {name: len(times) for name, times in wall.items()} == {name: len(times) for name, times in cpu.items()} == {"ours": 3, "a": 3, "b": 3}


def test_the_ratio_is_taken_within_rounds(bench):
    assert bench.ratio({"ours": [1.0, 10.0, 1.0], "a": [2.0, 20.0, 5.0]}, "a") == 2.0


def test_a_peer_with_another_answer_is_named_and_not_clocked(bench):
    result = measured(bench, ours=lambda: 1, peers={"same": lambda: 1, "other": lambda: 2}, equal=lambda a, b: "" if a == b else "another number")
    assert result.differs == {"other": "another number"}
    assert set(result.wall) == {"ours", "same"}
    assert "other is not clocked, another number" in bench.table([result], LIMITS)


def test_verdicts(bench):
    def result(**given):
        base = {"ours": lambda: None, "peers": {"a": lambda: None, "b": lambda: None}} | given
        found = measured(bench, **base)
        found.wall.update({"ours": [1.0] * 3, "a": [3.0] * 3, "b": [1.5] * 3})
        return bench.verdict(found)

    assert result(target=2.0) == "missed"  # the best peer counts
    assert result(target=1.4) == "met"
    assert result(target=2.0, judged=("a",)) == "met"
    assert result() == "-"
    assert result(seconds=1.0) == "met"
    assert result(seconds=0.5) == "missed"


def test_a_target_without_a_rival_is_neither_met_nor_missed(bench):
    assert bench.verdict(measured(bench, ours=lambda: None, target=2.0)) == "-"


def test_a_peer_that_is_not_installed_is_none(bench):
    assert bench.peer("no_such_package_at_all") is None
    assert bench.peer("json") is json


def test_the_table_has_one_line_per_contestant_with_all_cells(bench):
    result = measured(bench, ours=lambda: None, peers={"a": lambda: None, "b": lambda: None}, units=10, work=1e3, limit="fp32", notices=("left out",))
    lines = [line for line in bench.table([result], LIMITS).splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {len(bench.HEADER) + 1}
    assert "left out" in bench.table([result], LIMITS)


def test_main_writes_json_and_table(bench, monkeypatch, tmp_path, capsys):
    module = type("Row", (), {"NUMBER": 7, "TITLE": "t", "cases": staticmethod(lambda scale: [bench.Case(name=f"at {scale}", ours=lambda: 1, rounds=1)])})
    monkeypatch.setattr(bench, "rows", lambda numbers: iter([module]) if list(numbers) == [7] else iter(()))
    monkeypatch.setattr(bench, "machine_limits", lambda threads: LIMITS)
    assert bench.main(["--rows", "7", "--scale", "quick", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert document["results"][0]["case"] == "at quick"
    assert document["machine"]["limits"] == LIMITS
    assert (tmp_path / "bench.md").read_text(encoding="utf-8") == capsys.readouterr().out


def test_every_row_has_a_number_of_its_own_and_a_title():
    texts = [path.read_text(encoding="utf-8") for path in Path(FOLDER / "rows").glob("*.py") if path.stem != "__init__"]
    numbers = [int(text.split("NUMBER, TITLE = ")[1].split(",")[0]) for text in texts]
    assert len(set(numbers)) == len(numbers) >= 8
    assert all("def cases(scale: str) -> Iterator[Case]:" in text for text in texts)
