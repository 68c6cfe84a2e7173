"""A state folder as a user drives it: the command line in a process of its own, and what its tables then hold."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from datetime import date
from pathlib import Path

from pipeline import config, lakehouse
from pipeline.context import Home

SERVE = """
import contextlib, io, json, os, sys
from jobs import cli
from pipeline import spark
from typer.main import get_command

for line in sys.stdin:
    home, arguments = json.loads(line)
    if home != os.environ["SID_HOME"]:
        spark.stop()  # a session belongs to one warehouse; the next one starts in the same JVM
    os.environ["SID_HOME"] = home
    with contextlib.redirect_stdout(io.StringIO()) as said:
        ended = get_command(cli.app).main(args=arguments, prog_name="sid", standalone_mode=False)
    if ended:
        sys.exit(f"sid {arguments} ended with {ended}: {said.getvalue()}")
    print(json.dumps(said.getvalue()), flush=True)
"""
UNDATED = {"feature.item_content_vector", "sid.codebook", "sid.generation"}
MAY_BE_EMPTY = {
    "raw.rejected_row",
    "feature.content_pair",
    "feature.content_encoder",
    "sid.user_sid",
}  # both are off in this profile
NOT_ROWS = {"rank.rank_example", "sid.release"}  # examples follow a release, and the list of releases says how one got there


def start(home: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
    """`sid` with the profile `tiny` in a process of its own, with `more` in its environment."""
    environment = {**_environment(home), **more}
    return subprocess.Popen([sys.executable, "-m", "jobs.cli", *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _environment(home: Path | str) -> dict[str, str]:
    return {**os.environ, "SID_HOME": str(home), "SID_PROFILE": "tiny", "COLUMNS": "200"}


def ended(process: subprocess.Popen[str]) -> str:
    """What it printed, when it ended well."""
    out, complaints = process.communicate(timeout=1500)
    assert process.returncode == 0, out[-3000:] + complaints[-3000:]
    return out


def sid(home: Path, *arguments: str) -> str:
    """What `sid` printed."""
    return ended(start(home, *arguments))


class Warm:
    """`sid` command after command in one process with one JVM, whatever their homes.

    For commands whose boundary between processes is not the point: a cold JVM is most of the time of a small one.
    """

    def __init__(self, folder: Path) -> None:
        self._complaints = folder / "complaints"
        with self._complaints.open("w") as to:
            command = [sys.executable, "-W", "ignore", "-c", SERVE]
            self._process = subprocess.Popen(command, env=_environment(""), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=to, text=True)

    def sid(self, home: Path, *arguments: str) -> str:
        """What `sid` printed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(home), arguments]) + "\n")
        self._process.stdin.flush()
        told = self._process.stdout.readline()
        assert told, self._complaints.read_text()[-3000:]
        return str(json.loads(told))

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=60)


def digests(home: Path, last: date, tables: Iterable[str] = ()) -> dict[str, str]:
    """Table -> digest of its rows up to a date, whatever their order."""
    lake = config.load("tiny").lake
    found = {}
    for table in sorted(set(tables) or set(lakehouse.table_names()) - NOT_ROWS):
        rows = lakehouse.read_arrow(Home(home), lake, table).to_pylist()
        partition = lakehouse.partition_columns(table)
        day = partition[0] if partition and table not in UNDATED else ""
        kept = sorted(json.dumps({**row, "path": ""}, default=str, sort_keys=True) for row in rows if not day or row[day] <= last)  # a path names its home
        found[table] = hashlib.sha256("\n".join(kept).encode()).hexdigest() if kept or table in MAY_BE_EMPTY else "empty"
    return found


def releases(home: Path) -> list[dict[str, object]]:
    """What `sid releases` says."""
    rows: list[dict[str, object]] = json.loads(sid(home, "releases", "--json"))
    return rows
