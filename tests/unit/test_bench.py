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


def test_a_checkout_that_lacks_a_package_is_left_out_and_the_package_named(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert bench.repository("PEER_CHECKOUT", "peer_that_loads") is None
    (tmp_path / "peer_that_loads.py").write_text("NAME = 'peer'\n", encoding="utf-8")
    (tmp_path / "peer_that_lacks.py").write_text("import a_package_nobody_has\n", encoding="utf-8")
    monkeypatch.setenv("PEER_CHECKOUT", str(tmp_path))
    (module,) = bench.repository("PEER_CHECKOUT", "peer_that_loads")
    assert module.NAME == "peer"
    assert bench.repository("PEER_CHECKOUT", "peer_that_lacks") is None
    assert "PEER_CHECKOUT needs the package a_package_nobody_has" in capsys.readouterr().err


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


@pytest.fixture
def accelerator(bench, monkeypatch):
    """The benchmark of an accelerator, at sizes that a CPU does in seconds."""
    module = importlib.import_module("accelerator")
    tiny = module.Sizes(small=96, large=128, batch=32, epochs=2, recorded_epochs=2, large_epochs=2, users=20, square=16, copied=1 << 10, repeats=64)
    monkeypatch.setattr(module, "QUICK", tiny)
    yield module
    del sys.modules["accelerator"]


def test_the_accelerator_bench_runs_on_a_cpu(accelerator, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert accelerator.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "accelerator.json").read_text(encoding="utf-8"))
    assert [case["case"] for case in document["cases"]] == [name for name, _, _ in accelerator.cases(accelerator.QUICK, cuda=False)]
    assert all(
        case["same_bits"] == {"ada_sid, twice": True, "rq_kmeans, twice": True, "sasrec, twice": True} for case in document["cases"] if "same_bits" in case
    )
    printed = capsys.readouterr().out
    assert accelerator.main(["--page", str(tmp_path / "accelerator.json")]) == 0
    assert capsys.readouterr().out == printed == (tmp_path / "accelerator.md").read_text(encoding="utf-8")
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {len(accelerator.HEADER) + 1}


def test_a_case_that_fails_or_outlasts_its_time_costs_no_other(accelerator, monkeypatch, tmp_path):
    def broken(bench):
        """A case with an error."""
        raise RuntimeError("out of luck")

    def endless(bench):
        """A case that never ends."""
        while True:
            pass

    found = [("broken", 5.0, broken), ("endless", 0.2, endless), ("fine", 5.0, lambda bench: {"items_s": 3.0})]
    monkeypatch.setattr(accelerator, "cases", lambda sizes, cuda: found)
    document = accelerator.run(accelerator.Bench(accelerator.torch.device("cpu"), accelerator.QUICK), 60.0, tmp_path)
    assert [case.get("failed", "") for case in document["cases"]] == ["RuntimeError: out of luck", "TimeoutError: outlasted its 0 s", ""]
    assert "out of luck" in accelerator.page(document)


def test_a_device_that_is_not_there_is_refused(accelerator, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(accelerator, "best_device", lambda: "cpu")
    with pytest.raises(SystemExit):
        accelerator.main(["--out", str(tmp_path / "none")])
    assert "compute on cpu, not on cuda" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_sequences_of_a_file(accelerator, tmp_path):
    path = tmp_path / "interactions.csv"
    path.write_text("user_id,item_id,position\nb,y,1\na,x,1\nb,x,0\na,z,0\n", encoding="utf-8")
    events, num_items = accelerator.sequences(5, path)
    assert (events.offsets.tolist(), events.items[0] != events.items[1], num_items) == ([0, 2, 4], True, 3)
