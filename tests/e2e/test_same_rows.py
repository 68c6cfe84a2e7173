"""Same inputs, same rows: one night by spark-submit, with the next day's file already in the lake, equals the night run in one process without it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

from pipeline import config, lakehouse
from pipeline.context import Home

pytestmark = pytest.mark.e2e
NIGHT, NEXT = date(2026, 3, 10), date(2026, 3, 11)
UNDATED = {"feature.item_content_vector", "sid.codebook", "sid.generation"}


def sid(home: Path, *arguments: str) -> None:
    environment = {**os.environ, "SID_HOME": str(home), "SID_PROFILE": "tiny"}
    done = subprocess.run([sys.executable, "-m", "jobs.cli", *arguments], env=environment, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def digests(home: Path) -> dict[str, str]:
    """Table -> digest of its rows up to the night, whatever their order."""
    lake = config.load("tiny").lake
    found = {}
    for table in sorted(set(lakehouse.table_names()) - {"rank.rank_example", "sid.release"}):
        rows = lakehouse.read_arrow(Home(home), lake, table).to_pylist()
        day = lakehouse.partition_columns(table)[0] if table not in UNDATED else ""
        kept = sorted(json.dumps({**row, "path": ""}, default=str, sort_keys=True) for row in rows if not day or row[day] <= NIGHT)  # a path names its home
        found[table] = hashlib.sha256("\n".join(kept).encode()).hexdigest() if kept or table == "raw.rejected_row" else "empty"
    return found


def test_another_launcher_and_a_file_from_the_future_change_no_row(tmp_path: Path) -> None:
    plain, ahead = tmp_path / "plain", tmp_path / "ahead"
    sid(plain, "run", "refresh", "--date", str(NIGHT))
    sid(ahead, "run", "ingest", "--date", str(NEXT))
    sid(ahead, "run", "refresh", "--date", str(NIGHT), "--set", "launch.kind=submit")
    assert "empty" not in digests(plain).values()
    assert digests(ahead) == digests(plain)
    release = [lakehouse.read_releases(Home(home), config.load("tiny").lake).to_pylist()[0] for home in (plain, ahead)]
    assert release[0]["rows_digest"] == release[1]["rows_digest"]
