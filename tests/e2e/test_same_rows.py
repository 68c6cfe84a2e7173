"""Same inputs, same rows: a night equals the undisturbed one under another launcher, with a file from the future, and after a SIGKILL at every named point."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import pytest
from homes import digests, sid, start

from pipeline import config, lakehouse, tracking
from pipeline.context import Home
from pipeline.stages import BY_NAME, group

pytestmark = pytest.mark.e2e
NIGHT, NEXT = date(2026, 3, 10), date(2026, 3, 11)
LAKE = config.load("tiny").lake
RUN = ("--date", str(NIGHT), "--run-id", "k")
BRANCHES = {"before_job": 0, "before_write": 0, "after_write": 1, "after_audit": 4, "after_publish_1": 3, "after_publish_3": 1}  # left by a kill there
INGEST = tuple(BRANCHES)  # the fourth table is the marker
PUBLISH = ("before_write", "after_publish_1", "before_alias")  # tag without its row, row without figures, row without alias
COMPILED = "launch.java_options=-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"  # unlike the profile's: with code that Spark generates
WITHOUT_WORK = {"content_pair", "train_content_encoder", "content_cre"}  # the content recipe is off in this profile


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of the night in one process, undisturbed; here Spark compiles its queries, in the other runs it interprets them."""
    home = tmp_path_factory.mktemp("plain")
    sid(home, "run", "refresh", "--date", str(NIGHT), "--set", COMPILED)
    assert "empty" not in digests(home, NIGHT).values()
    return home


def releases(home: Path) -> list[tuple[str, str]]:
    """Tag and digest of every release, each read whole."""
    found = lakehouse.read_releases(Home(home), LAKE).to_pylist()
    assert all(len(lakehouse.read_release(Home(home), LAKE, row["tag"])) == row["items"] for row in found)
    return [(row["tag"], row["rows_digest"]) for row in found]


def test_another_launcher_and_a_file_from_the_future_change_no_row(tmp_path: Path, plain: Path) -> None:
    otherwise = ("launch.kind=submit", "launch.master=local[2]")  # a process per stage, two tasks at a time
    sid(tmp_path, "run", "ingest", "--date", str(NEXT))
    process = start(tmp_path, "run", "refresh", "--date", str(NIGHT), *(word for text in otherwise for word in ("--set", text)))
    told, logged = process.communicate(timeout=1500)
    assert process.returncode == 0, told[-3000:] + logged[-3000:]
    started = set(re.findall(r"launch command=\S*(?:spark-submit|python\S*) .*?\brun (\w+) ", logged))
    assert started == {stage.name for stage in group("refresh")} - WITHOUT_WORK, "a stage without work starts no process"
    assert digests(tmp_path, NIGHT) == digests(plain, NIGHT)
    assert releases(tmp_path) == releases(plain)


def audit_branches(home: Path, tables: Iterable[str]) -> int:
    """Number of audit branches on the tables."""
    references = [name for table in tables for name in lakehouse.open_table(Home(home), LAKE, table).metadata.refs]
    return sum(name.startswith("audit_") for name in references)


def killed(home: Path, what: str, point: str) -> None:
    process = start(home, "run", what, *RUN, SID_KILL_AT=point)
    _, complaints = process.communicate(timeout=900)
    assert process.returncode == -signal.SIGKILL, complaints[-3000:]


def test_a_kill_at_any_point_costs_a_rerun_and_nothing_else(tmp_path: Path, plain: Path) -> None:
    for point in INGEST:
        killed(tmp_path, "ingest", f"ingest:{point}")
        assert lakehouse.read_arrow(Home(tmp_path), LAKE, "raw.source_file").num_rows == 0, "without its marker the day does not count as loaded"
        assert (lakehouse.read_arrow(Home(tmp_path), LAKE, "raw.interaction").num_rows > 0) == ("publish" in point), "audited is not published"
        assert audit_branches(tmp_path, BY_NAME["ingest"].outputs) == BRANCHES[point]
        assert not (tmp_path / "staging" / "k" / "ingest.json").exists(), "a killed try looks like no success"
    killed(tmp_path, "refresh", f"publish_release:{PUBLISH[0]}")
    assert releases(tmp_path) == [], "a tag without a row is no release"
    killed(tmp_path, "publish_release", f"publish_release:{PUBLISH[1]}")
    assert releases(tmp_path) == releases(plain)
    killed(tmp_path, "publish_release", f"publish_release:{PUBLISH[2]}")
    assert tracking.alias_target(Home(tmp_path), "sid_tokenizer", "current") == ""

    sid(tmp_path, "run", "refresh", *RUN)
    assert tracking.alias_target(Home(tmp_path), "sid_tokenizer", "current")
    assert releases(tmp_path) == releases(plain)
    by_address = {"sid.generation"}  # names the models, which a killed try may have logged once more
    tables = set(digests(plain, NIGHT)) - by_address
    assert digests(tmp_path, NIGHT, tables) == digests(plain, NIGHT, tables)
    assert audit_branches(tmp_path, lakehouse.table_names()) == 0
