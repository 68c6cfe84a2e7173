"""The demo in small: two nights and the ranker through the real DAGs on the 200-item shop, then the same again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from homes import releases, sid

from pipeline import config, lakehouse, release_file
from pipeline.context import ROOT, Home

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(home, what the demo printed)."""
    home = tmp_path_factory.mktemp("demo")
    return home, sid(home, "demo", "--dataset", "shop")


@pytest.fixture(scope="module")
def listed(told) -> list[dict[str, object]]:
    """What `sid releases` says after the demo."""
    return releases(told[0])


def test_two_nights_give_a_chain_of_two_current_releases(listed) -> None:
    rows = listed
    assert [row["status"] for row in rows] == ["current", "current"]
    assert rows[1]["parent_tag"] == rows[0]["tag"]
    assert rows[0]["generation"] == rows[1]["generation"] == 1
    assert rows[1]["items"] >= rows[0]["items"] > 200


def test_unmoved_items_are_copied_bit_by_bit_and_moved_ones_are_flagged(told, listed) -> None:
    home, lake = Home(told[0]), config.load("tiny").lake
    before, after = [{row["item_id"]: row for row in lakehouse.read_release(home, lake, row["tag"]).to_pylist()} for row in listed]
    flagged = {item for item, row in after.items() if row["changed_from_parent"]}
    differs = {item for item, row in before.items() if row["codes"] != after[item]["codes"]}
    assert differs == flagged & set(before)
    kept = set(before) - flagged
    assert len(kept) > 0.5 * len(before)
    features = lakehouse.read_arrow(home, lake, "feature.item_feature", where=f"logical_date == '{after[next(iter(after))]['logical_date']}'").to_pylist()
    carried = {row["item_id"] for row in features if row["behavior_date"] is not None and row["behavior_date"] < row["logical_date"]}
    assert carried
    assert all(before[item]["weights"] == after[item]["weights"] for item in carried & set(before))
    assert all(row["is_new"] == (item not in before) for item, row in after.items())


def test_the_summary_says_what_a_newcomer_asks(told) -> None:
    for words in ("seconds per stage", "releases", "shares most codes with", "churn", "ranker", "report", "MLflow", "asset event announces"):
        assert words in told[1]


def test_the_report_is_one_file_without_outside_addresses(told, listed) -> None:
    newest = listed[-1]["tag"]
    page = (told[0] / "reports" / f"{newest}.html").read_text()
    assert newest in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page


def test_an_exported_release_is_the_one_in_the_lake(told, listed, tmp_path: Path) -> None:
    newest = listed[-1]
    path = sid(told[0], "export", newest["tag"], "--out", str(tmp_path / "codes.arrow")).strip()
    found = release_file.read(Path(path))
    home, lake = Home(told[0]), config.load("tiny").lake
    rows, published = lakehouse.read_release(home, lake, newest["tag"]), lakehouse.read_releases(home, lake).to_pylist()[-1]
    assert found.codes_NL.tolist() == rows["codes"].to_pylist()
    assert found.rows.to_pylist() == rows.to_pylist()
    assert {name: found.facts[name] for name in ("tag", "codebook_digest", "rows_digest")} == {
        name: published[name] for name in ("tag", "codebook_digest", "rows_digest")
    }


def test_lineage_leads_from_the_release_to_its_runs_and_back(told, listed) -> None:
    newest = listed[-1]["tag"]
    lake = config.load("tiny").lake
    rows = lakehouse.read_release(Home(told[0]), lake, newest)
    shown = json.loads(sid(told[0], "show", rows["item_id"][0].as_py(), "--lineage", "--json"))[0]
    walked = {(row["stage"], row["side"], row["table"]) for row in shown["lineage"]}
    assert ("assign_sid", "outputs", "sid.item_sid") in walked
    assert ("ingest", "outputs", "raw.interaction") in walked


def test_running_it_again_reuses_both_nights_and_changes_nothing(told, listed) -> None:
    again = sid(told[0], "demo", "--dataset", "shop")
    assert again.count("reused release") == 2
    assert releases(told[0]) == listed


def test_the_lines_of_the_readme_read_the_release(told, listed, monkeypatch: pytest.MonkeyPatch) -> None:
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.setenv("SID_HOME", str(told[0]))
    names: dict[str, object] = {}
    exec(lines.replace("d19980422", str(listed[-1]["tag"])), names)
    assert names["rows"].column_names == ["item_id", "codes", "weights"]
    assert names["rows"].num_rows == listed[-1]["items"]
