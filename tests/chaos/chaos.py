"""Breaks nights on purpose and looks at what readers see: `make chaos`, or `python tests/chaos/chaos.py --kills 50`.

Every fault is followed by a plain rerun. Held at all times: each release that sid.release names can be read whole, and its rows are those of the same tag in a
home where nothing happened. Held at the end: all tables equal that home's row by row, no audit branch is left, no MLflow run looks alive.
The clock decides where a random kill falls, so two runs kill at other places; the seed only fixes the waiting times.
A busy machine makes a night slower and kills rarer: after --minutes of random kills the last rerun and the last look come, whatever the number is by then.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from pipeline import config, lakehouse, log
from pipeline.context import Home

logger = logging.getLogger("chaos")
FIRST, SECOND, THIRD = (date(2026, 3, 2) + timedelta(days=number) for number in range(3))
NIGHTS = ("--date", str(FIRST), "--through", str(SECOND))
LAKE = config.load("tiny").lake
NAMES_A_RUN = {"path", "encoder_uri", "tokenizer_uri"}  # addresses, which differ between homes and tries; all else must be equal
ANNOUNCED = "stage start name="


class Broken(AssertionError):
    """A promise that did not hold."""


class NotRun(Exception):
    """A fault that could not be made here: nothing was shown."""


# ---------------------------------------------------------------- what must hold


def digest(rows: list[dict[str, Any]]) -> str:
    """sha256 of rows, whatever their order, without the columns that name a run."""
    lines = sorted(json.dumps({name: value for name, value in row.items() if name not in NAMES_A_RUN}, default=str, sort_keys=True) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def published(home: Path) -> dict[str, tuple[str, str]]:
    """Tag -> (digest it was published with, digest of its rows as PyIceberg reads them now)."""
    found = lakehouse.read_releases(Home(home), LAKE).to_pylist()
    return {row["tag"]: (row["rows_digest"], digest(lakehouse.read_release(Home(home), LAKE, row["tag"]).to_pylist())) for row in found}


def contents(home: Path) -> dict[str, str]:
    """Table -> digest of its rows; `releases` are the tags in order, with their digests and states."""
    tables = sorted(set(lakehouse.table_names()) - {"sid.pin", "rank.rank_example", "sid.release"})
    found = {table: digest(lakehouse.read_arrow(Home(home), LAKE, table).to_pylist()) for table in tables}
    releases = [(row["tag"], row["rows_digest"], row["status"]) for row in lakehouse.read_releases(Home(home), LAKE).to_pylist()]
    return found | {"releases": json.dumps(releases)}


class Reference:
    """A home where nothing happens; its nights are run when something is first compared with them."""

    def __init__(self, home: Path) -> None:
        self.home, self.seconds = home, list[float]()
        self._contents: list[dict[str, str]] = []
        self._published: dict[str, tuple[str, str]] = {}

    def nights(self, count: int) -> dict[str, str]:
        """`contents` after so many nights."""
        while len(self._contents) < count:
            began = time.monotonic()
            if code := start(self.home, "run", "refresh", "--date", str(FIRST + timedelta(days=len(self._contents)))).wait(timeout=900):
                raise RuntimeError(f"a night without a fault failed with {code}: there is nothing to compare with")
            self.seconds.append(round(time.monotonic() - began, 1))
            self._contents.append(contents(self.home))
            self._published = published(self.home)
        return self._contents[count - 1]

    def release(self, tag: str) -> tuple[str, str] | None:
        """What `published` says of a tag, None when no night publishes it."""
        while tag not in self._published and len(self._contents) < (THIRD - FIRST).days + 1:
            self.nights(len(self._contents) + 1)
        return self._published.get(tag)


def readable(home: Path, reference: Reference) -> int:
    """Number of releases, each read whole and found to hold the rows that it holds in an undisturbed home.

    Raises: Broken.
    """
    found = published(home)
    if unlike := [tag for tag, seen in found.items() if reference.release(tag) != seen]:
        raise Broken(f"releases that are not those of an undisturbed run: {unlike}")
    return len(found)


def rerun_settles(home: Path, reference: Reference, nights: int) -> None:
    """Nothing, when a plain rerun of so many nights ends well and the home is then as if nothing had happened.

    Raises: Broken naming the tables, branches or runs.
    """
    ended_well(start(home, "run", "refresh", "--date", str(FIRST), "--through", str(FIRST + timedelta(days=nights - 1))))
    settled(home, reference.nights(nights))


def settled(home: Path, expected: dict[str, str]) -> None:
    """Nothing, when the home is as if nothing had happened.

    Raises: Broken naming the tables, branches or runs.
    """
    found = contents(home)
    if unlike := [table for table in expected if found[table] != expected[table]]:
        raise Broken(f"other rows than undisturbed: {unlike}")
    branches = {name for table in lakehouse.table_names() for name in lakehouse.open_table(Home(home), LAKE, table).metadata.refs if name.startswith("audit_")}
    if branches:
        raise Broken(f"audit branches are left: {sorted(branches)}")
    if ghosts := ghost_runs(home):
        raise Broken(f"runs that look alive: {ghosts}")


def ghost_runs(home: Path) -> list[str]:
    """Names of MLflow runs that still look alive."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(Home(home).tracking_uri)
    runs = [run for experiment in client.search_experiments() for run in client.search_runs([experiment.experiment_id], max_results=5000)]
    return [run.info.run_name for run in runs if run.info.status in ("RUNNING", "SCHEDULED") and run.data.tags.get("superseded") != "true"]


# ---------------------------------------------------------------- faults


def start(home: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
    """`sid` in a session of its own, so that a kill takes the JVM and the Python workers with it; its lines go to <home>/chaos.log."""
    environment = {**os.environ, "SID_HOME": str(home), "SID_PROFILE": "tiny", **more}
    home.mkdir(parents=True, exist_ok=True)
    with (home / "chaos.log").open("a", encoding="utf-8") as log:
        return subprocess.Popen([sys.executable, "-m", "jobs.cli", *arguments], env=environment, stdout=log, stderr=log, text=True, start_new_session=True)


def kill(process: subprocess.Popen[str]) -> bool:
    """Whether SIGKILL met the process group before it ended by itself."""
    alive = process.poll() is None
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return alive


def last_stage(home: Path) -> str:
    """The stage that was started last, by the log."""
    lines = [line for line in (home / "chaos.log").read_text(encoding="utf-8", errors="replace").splitlines() if ANNOUNCED in line]
    return lines[-1].split(ANNOUNCED)[1].split()[0] if lines else "start"


def random_kills(home: Path, reference: Reference, kills: int, seed: int, minutes: float) -> Counter[str]:
    """Stage -> SIGKILLs that fell into it, over as many processes as needed; each process runs the two nights from where the last one left off."""
    rng, fallen, expected = random.Random(seed), Counter[str](), reference.nights(2)
    seconds, until = sum(reference.seconds[:2]), time.monotonic() + 60 * minutes
    while sum(fallen.values()) < kills and time.monotonic() < until:
        process = start(home, "run", "refresh", *NIGHTS)
        deadline = time.monotonic() + rng.triangular(4.0, seconds, 4.0)  # a third of a run on average, so that fifty kills fit into three quarters of an hour
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if not kill(process) and process.returncode == 0:  # both nights are out: look, and begin again on an empty lake
            settled(home, expected)
            shutil.rmtree(home)
            continue
        fallen[last_stage(home)] += 1
        readable(home, reference)
        logger.info("kills %d of %d, the last one in %s", sum(fallen.values()), kills, last_stage(home))
    return fallen


def mlflow_unreachable(home: Path, reference: Reference) -> str:
    """What a night says when its tracking server does not answer: nothing is published without its runs, and with the server back the night is as any other."""
    process = start(home, "run", "refresh", "--date", str(FIRST), MLFLOW_TRACKING_URI="http://127.0.0.1:9", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    code, seen = process.wait(timeout=600), readable(home, reference)
    if code != 75 or seen:
        raise Broken(f"exit {code}, releases {seen}; a retry was expected and no release")
    rerun_settles(home, reference, 1)
    return f"exit {code} (may be retried), no release; with MLflow back the same rows"


def disk_full(home: Path, reference: Reference) -> str:
    """What happens when the lake's file system has no room: the state folder lies on a small tmpfs."""
    home.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(home)], check=False, capture_output=True, text=True)
    if mounted.returncode:
        raise NotRun(mounted.stderr.strip())
    try:
        code = start(home, "run", "refresh", *NIGHTS).wait(timeout=600)
        seen = readable_or_none(home, reference)
        if code != 75:
            raise Broken(f"exit {code}; a full disk and a retry were expected")
        subprocess.run(["mount", "-o", "remount,size=600m", str(home)], check=True)
        rerun_settles(home, reference, 2)
    finally:
        subprocess.run(["umount", "--lazy", str(home)], check=True)
    return f"exit {code}, {seen} releases readable; with room again the same rows"


def readable_or_none(home: Path, reference: Reference) -> int:
    """`readable`, 0 for a lake that could not even be made."""
    from pipeline.errors import SidError

    try:
        return readable(home, reference)
    except SidError:
        return 0


def executor_killed(home: Path, reference: Reference) -> str:
    """A Spark executor dies in a stage: with a second one left Spark runs its tasks again, and the rows are the same."""
    process = start(home, "run", "refresh", "--date", str(FIRST), "--set", "launch.master=local-cluster[2,1,1024]")
    victim = 0
    while process.poll() is None:
        found = executors(process.pid)
        if len(found) == 2 and last_stage(home) in ("item_popularity", "content_embedding"):
            victim = found[0]
            os.kill(victim, signal.SIGKILL)
            break
        time.sleep(0.05)
    code = process.wait(timeout=900)
    if not victim:
        raise NotRun(f"no two executors appeared (exit {code})")
    seen = readable_or_none(home, reference)
    rerun_settles(home, reference, 1)
    return f"exit {code} after one of two executors was killed, {seen} releases readable; after a plain rerun the same rows"


def executors(session: int) -> list[int]:
    """Process ids of the Spark executors in a session."""
    listed = subprocess.run(["pgrep", "--session", str(session), "--full", "CoarseGrainedExecutorBackend"], capture_output=True, text=True, check=False).stdout
    return [int(line) for line in listed.split()]


def corrupted_file(home: Path, reference: Reference) -> str:
    """A data file of a table that the third night reads loses its middle: the night fails, older releases stay; with the file back it ends as any other."""
    ended_well(start(home, "run", "refresh", *NIGHTS))
    damaged = min((home / "lake" / "feature" / "item_content_vector" / "data").rglob("*.parquet"))
    original = damaged.read_bytes()
    middle = len(original) // 2
    damaged.write_bytes(original[: middle - 200] + bytes(400) + original[middle + 200 :])
    (damaged.parent / f".{damaged.name}.crc").unlink(missing_ok=True)  # the sidecar would only say so earlier
    code = start(home, "run", "refresh", "--date", str(THIRD)).wait(timeout=600)
    seen = readable(home, reference)  # a night that read the damage as if it were rows is told here
    damaged.write_bytes(original)
    rerun_settles(home, reference, 3)
    if code == 0:
        raise NotRun("the night never read the damaged part")
    if seen != 2:
        raise Broken(f"exit {code} with {seen} releases; the two older ones were expected")
    return f"exit {code}, {seen} releases readable meanwhile; with the file back the same rows"


def racing(home: Path, reference: Reference) -> str:
    """Two processes refresh the same night at once: one release, the same rows."""
    both = [start(home, "run", "refresh", "--date", str(FIRST), "--run-id", name) for name in ("one", "two")]
    codes = [process.wait(timeout=900) for process in both]
    if set(codes) - {0, 75}:
        raise Broken(f"exit codes {codes}")
    readable(home, reference)
    rerun_settles(home, reference, 2)
    return f"exit codes {codes}, one release per night"


def ended_well(process: subprocess.Popen[str]) -> None:
    """Raises: Broken when the process failed."""
    if process.wait(timeout=900):
        raise Broken(f"a plain rerun failed with {process.returncode}")


# ---------------------------------------------------------------- the story


def killed_at_random(home: Path, reference: Reference, kills: int, seed: int, minutes: float) -> str:
    """The stages that were killed, after a plain rerun ended in the undisturbed rows."""
    fallen = random_kills(home, reference, kills, seed, minutes)
    rerun_settles(home, reference, 2)
    return f"{sum(fallen.values())} of {kills} kills: " + ", ".join(f"{stage} {count}" for stage, count in fallen.most_common())


def attempt(name: str, fault: Callable[[], str]) -> dict[str, str | float]:
    """One line of the table."""
    logger.info("%s ...", name)
    began = time.monotonic()
    try:
        found, held = fault(), "yes"
    except NotRun as reason:
        found, held = str(reason), "not run"
    except Broken as broken:
        found, held = str(broken), "NO"
    logger.info("%s: held=%s %s", name, held, found)
    return {"fault": name, "held": held, "found": found, "seconds": round(time.monotonic() - began, 1)}


def main() -> int:
    """0 when every promise held that could be tried."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=60.0, help="at most so long for the random kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="comma-separated names of faults")
    parser.add_argument("--out", type=Path, default=Path(".sid/chaos.json"))
    given = parser.parse_args()
    for name in [name for name in os.environ if name.startswith(("SID_", "MLFLOW_TRACKING_", "AIRFLOW"))]:
        del os.environ[name]  # not the caller's lake
    log.configure()
    logger.setLevel(logging.INFO)
    with tempfile.TemporaryDirectory(prefix="sid_chaos_") as folder:
        root = Path(folder)
        reference = Reference(root / "plain")
        faults: dict[str, Callable[[], str]] = {
            "two publishers at once": lambda: racing(root / "race", reference),
            "MLflow unreachable": lambda: mlflow_unreachable(root / "mlflow", reference),
            "disk full": lambda: disk_full(root / "disk", reference),
            "Spark executor killed": lambda: executor_killed(root / "executor", reference),
            "data file corrupted": lambda: corrupted_file(root / "corrupted", reference),
            "random kills": lambda: killed_at_random(root / "killed", reference, given.kills, given.seed, given.minutes),
        }
        chosen = [name.strip() for name in given.only.split(",") if name.strip()] or list(faults)
        rows: list[dict[str, str | float]] = []
        given.out.parent.mkdir(parents=True, exist_ok=True)
        for name in chosen:
            rows.append(attempt(name, faults[name]))  # written as they come: a run that is stopped leaves what it saw
            given.out.write_text(json.dumps({"undisturbed_nights_seconds": reference.seconds, "faults": rows}, indent=1), encoding="utf-8")
    return int(any(row["held"] == "NO" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
