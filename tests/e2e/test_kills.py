"""One SIGKILL at every named point between two effects of a night; then a plain rerun ends in the rows of an undisturbed night."""

from __future__ import annotations

import signal
from datetime import date
from pathlib import Path

import pytest
from homes import digests, sid, start

from pipeline import config, lakehouse, tracking
from pipeline.context import Home

pytestmark = pytest.mark.e2e
NIGHT = date(2026, 3, 2)
LAKE = config.load("tiny").lake
RUN = ("--date", str(NIGHT), "--run-id", "k")
INGEST = ("before_job", "before_write", "after_write", "after_audit", "after_publish_1", "after_publish_3")  # the fourth table is the marker
PUBLISH = ("before_write", "after_publish_1", "before_alias")  # tag without its row, row without figures, row without alias


def killed(home: Path, what: str, point: str) -> None:
    process = start(home, "run", what, *RUN, SID_KILL_AT=point)
    _, complaints = process.communicate(timeout=900)
    assert process.returncode == -signal.SIGKILL, complaints[-3000:]


def releases(home: Path) -> list[tuple[str, str]]:
    """Tag and digest of every release, each read whole."""
    found = lakehouse.read_releases(Home(home), LAKE).to_pylist()
    assert all(len(lakehouse.read_release(Home(home), LAKE, row["tag"])) == row["items"] for row in found)
    return [(row["tag"], row["rows_digest"]) for row in found]


def test_a_kill_at_any_point_costs_a_rerun_and_nothing_else(tmp_path: Path) -> None:
    plain, broken = tmp_path / "plain", tmp_path / "broken"
    sid(plain, "run", "refresh", *RUN)
    for point in INGEST:
        killed(broken, "ingest", f"ingest:{point}")
        assert lakehouse.read_arrow(Home(broken), LAKE, "raw.source_file").num_rows == 0, "without its marker the day does not count as loaded"
    killed(broken, "refresh", f"publish_release:{PUBLISH[0]}")
    assert releases(broken) == [], "a tag without a row is no release"
    killed(broken, "publish_release", f"publish_release:{PUBLISH[1]}")
    assert releases(broken) == releases(plain)
    killed(broken, "publish_release", f"publish_release:{PUBLISH[2]}")
    assert tracking.alias_target(Home(broken), "sid_tokenizer", "current") == ""

    sid(broken, "run", "refresh", *RUN)
    assert tracking.alias_target(Home(broken), "sid_tokenizer", "current")
    assert releases(broken) == releases(plain)
    by_address = {"sid.generation"}  # names the models, which a killed try may have logged once more
    tables = set(digests(plain, NIGHT)) - by_address
    assert digests(broken, NIGHT, tables) == digests(plain, NIGHT, tables)
    references = {name for table in lakehouse.table_names() for name in lakehouse.open_table(Home(broken), LAKE, table).metadata.refs}
    assert not [name for name in references if name.startswith("audit_")]
