"""Same inputs, same rows: one night by spark-submit, with the next day's file already in the lake, equals the night run in one process without it."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
from homes import digests, sid

from pipeline import config, lakehouse
from pipeline.context import Home

pytestmark = pytest.mark.e2e
NIGHT, NEXT = date(2026, 3, 10), date(2026, 3, 11)


def test_another_launcher_and_a_file_from_the_future_change_no_row(tmp_path: Path) -> None:
    plain, ahead = tmp_path / "plain", tmp_path / "ahead"
    sid(plain, "run", "refresh", "--date", str(NIGHT))
    sid(ahead, "run", "ingest", "--date", str(NEXT))
    sid(ahead, "run", "refresh", "--date", str(NIGHT), "--set", "launch.kind=submit")
    assert "empty" not in digests(plain, NIGHT).values()
    assert digests(ahead, NIGHT) == digests(plain, NIGHT)
    release = [lakehouse.read_releases(Home(home), config.load("tiny").lake).to_pylist()[0] for home in (plain, ahead)]
    assert release[0]["rows_digest"] == release[1]["rows_digest"]
