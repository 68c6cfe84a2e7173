"""Breaks nights on purpose and looks at what readers see: `make chaos`, or `python tests/chaos/chaos.py --kills 50`.

Every fault is followed by a plain rerun. Held at all times: each release that sid.release names can be read whole, with the digest it was published with.
Held at the end: the tables equal those of an undisturbed run row by row, no audit branch is left, no MLflow run looks alive.
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
from datetime import date
from pathlib import Path

from pipeline import config, lakehouse, log
from pipeline.context import Home

logger = logging.getLogger("chaos")
FIRST, SECOND = date(2026, 3, 2), date(2026, 3, 3)
NIGHTS = ("--date", str(FIRST), "--through", str(SECOND))
LAKE = config.load("tiny").lake
NAMES_A_RUN = {"path", "encoder_uri", "tokenizer_uri"}  # addresses, which differ between homes and tries; all else must be equal
ANNOUNCED = "stage start name="


class Broken(AssertionError):
    """A promise that did not hold."""


# ---------------------------------------------------------------- what must hold


def readable(home: Path) -> int:
    """Number of releases, each read whole through PyIceberg and found to be what was published.

    Raises: Broken.
    """
    found = lakehouse.read_releases(Home(home), LAKE).to_pylist()
    for row in found:
        rows = lakehouse.read_release(Home(home), LAKE, row["tag"])
        if len(rows) != row["items"]:
            raise Broken(f"{row['tag']} has {len(rows)} rows, {row['items']} were published")
    return len(found)


def contents(home: Path) -> dict[str, str]:
    """Table -> digest of its rows, whatever their order, without the columns that name a run."""
    found = {}
    for table in sorted(set(lakehouse.table_names()) - {"sid.pin", "rank.rank_example", "sid.release"}):
        rows = lakehouse.read_arrow(Home(home), LAKE, table).to_pylist()
        lines = sorted(json.dumps({name: value for name, value in row.items() if name not in NAMES_A_RUN}, default=str, sort_keys=True) for row in rows)
        found[table] = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    published = [(row["tag"], row["rows_digest"], row["status"]) for row in lakehouse.read_releases(Home(home), LAKE).to_pylist()]
    return found | {"releases": json.dumps(published)}


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


def random_kills(home: Path, kills: int, seconds: float, seed: int, until: float) -> Counter[str]:
    """Stage -> SIGKILLs that fell into it, over as many processes as needed; each process runs the two nights from where the last one left off."""
    rng, fallen = random.Random(seed), Counter[str]()
    while sum(fallen.values()) < kills and time.monotonic() < until:
        process = start(home, "run", "refresh", *NIGHTS)
        deadline = time.monotonic() + rng.triangular(4.0, seconds, 4.0)  # a third of a run on average, so that fifty kills fit into three quarters of an hour
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if not kill(process) and process.returncode == 0:  # both nights are out: look, and begin again on an empty lake
            settled(home, REFERENCE)
            shutil.rmtree(home)
            continue
        fallen[last_stage(home)] += 1
        readable(home)
        logger.info("kills %d of %d, the last one in %s", sum(fallen.values()), kills, last_stage(home))
    return fallen


def mlflow_unreachable(home: Path) -> str:
    """What a night says when its tracking server does not answer; nothing is published without its runs."""
    process = start(home, "run", "refresh", "--date", str(FIRST), MLFLOW_TRACKING_URI="http://127.0.0.1:9", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    code = process.wait(timeout=600)
    if code != 75 or readable(home):
        raise Broken(f"exit {code}, releases {readable(home)}; a retry was expected and no release")
    return f"exit {code} (may be retried), no release"


def disk_full(home: Path) -> str:
    """What happens when the lake's file system has no room: the state folder lies on a small tmpfs."""
    home.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(home)], check=False, capture_output=True, text=True)
    if mounted.returncode:
        return f"not run: {mounted.stderr.strip()}"
    try:
        code = start(home, "run", "refresh", *NIGHTS).wait(timeout=600)
        seen = readable_or_none(home)
        if code != 75:
            raise Broken(f"exit {code}; a full disk and a retry were expected")
        subprocess.run(["mount", "-o", "remount,size=600m", str(home)], check=True)
        ended_well(start(home, "run", "refresh", *NIGHTS))
        settled(home, REFERENCE)
    finally:
        subprocess.run(["umount", "--lazy", str(home)], check=True)
    return f"exit {code}, {seen} releases readable; with room again the same rows"


def readable_or_none(home: Path) -> int:
    """`readable`, 0 for a lake that could not even be made."""
    from pipeline.errors import SidError

    try:
        return readable(home)
    except SidError:
        return 0


def executor_killed(home: Path) -> str:
    """A Spark executor dies in a stage: with a second one left Spark runs its tasks again."""
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
        return f"not run: no two executors appeared (exit {code})"
    if code:
        readable(home)
        ended_well(start(home, "run", "refresh", "--date", str(FIRST)))
    return f"exit {code} after one of two executors was killed"


def executors(session: int) -> list[int]:
    """Process ids of the Spark executors in a session."""
    listed = subprocess.run(["pgrep", "--session", str(session), "--full", "CoarseGrainedExecutorBackend"], capture_output=True, text=True, check=False).stdout
    return [int(line) for line in listed.split()]


def corrupted_file(home: Path) -> str:
    """A data file of a table that the next night reads loses its middle: the night fails, older releases stay; with the file back it goes on."""
    files = sorted((home / "lake" / "feature" / "item_content_vector" / "data").rglob("*.parquet"))
    original = files[0].read_bytes()
    middle = len(original) // 2
    files[0].write_bytes(original[: middle - 200] + bytes(400) + original[middle + 200 :])
    (files[0].parent / f".{files[0].name}.crc").unlink(missing_ok=True)  # the sidecar would only say so earlier
    before = readable(home)
    code = start(home, "run", "refresh", "--date", "2026-03-04").wait(timeout=600)
    if code == 0 and readable(home) != before + 1:
        raise Broken("the night ended well but published nothing")
    files[0].write_bytes(original)
    ended_well(start(home, "run", "refresh", "--date", "2026-03-04"))
    return f"exit {code}, {before} releases readable meanwhile; with the file back the night ended"


def racing(home: Path) -> str:
    """Two processes refresh the same night at once: one release, the same rows."""
    both = [start(home, "run", "refresh", "--date", str(FIRST), "--run-id", name) for name in ("one", "two")]
    codes = [process.wait(timeout=900) for process in both]
    if set(codes) - {0, 75}:
        raise Broken(f"exit codes {codes}")
    ended_well(start(home, "run", "refresh", *NIGHTS))
    settled(home, REFERENCE)
    return f"exit codes {codes}, one release per night"


def ended_well(process: subprocess.Popen[str]) -> None:
    """Raises: Broken when the process failed."""
    if process.wait(timeout=900):
        raise Broken(f"a plain rerun failed with {process.returncode}")


# ---------------------------------------------------------------- the story


REFERENCE: dict[str, str] = {}


def undisturbed(home: Path) -> float:
    """Seconds of two nights without faults, whose rows everything is compared with."""
    began = time.monotonic()
    ended_well(start(home, "run", "refresh", *NIGHTS))
    REFERENCE.update(contents(home))
    return time.monotonic() - began


def killed_at_random(home: Path, kills: int, seconds: float, seed: int, minutes: float) -> str:
    """The stages that were killed, after a plain rerun ended in the undisturbed rows."""
    fallen = random_kills(home, kills, seconds, seed, time.monotonic() + 60 * minutes)
    ended_well(start(home, "run", "refresh", *NIGHTS))
    settled(home, REFERENCE)
    return f"{sum(fallen.values())} of {kills} kills: " + ", ".join(f"{stage} {count}" for stage, count in fallen.most_common())


def attempt(name: str, fault: Callable[[], str]) -> dict[str, str | float]:
    """One line of the table."""
    logger.info("%s ...", name)
    began = time.monotonic()
    try:
        found, held = fault(), "yes"
    except Broken as broken:
        found, held = str(broken), "NO"
    logger.info("%s: held=%s %s", name, held, found)
    return {"fault": name, "held": held, "found": found, "seconds": round(time.monotonic() - began, 1)}


def main() -> int:
    """0 when every promise held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=60.0, help="at most so long for the random kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="comma-separated names of faults")
    parser.add_argument("--out", type=Path, default=Path(".sid/chaos.json"))
    given = parser.parse_args()
    log.configure()
    logger.setLevel(logging.INFO)
    with tempfile.TemporaryDirectory(prefix="sid_chaos_") as folder:
        root = Path(folder)
        seconds = undisturbed(root / "plain")
        faults: dict[str, Callable[[], str]] = {
            "two publishers at once": lambda: racing(root / "race"),
            "MLflow unreachable": lambda: mlflow_unreachable(root / "mlflow"),
            "disk full": lambda: disk_full(root / "disk"),
            "Spark executor killed": lambda: executor_killed(root / "executor"),
            "data file corrupted": lambda: corrupted_file(root / "plain"),
            "random kills": lambda: killed_at_random(root / "killed", given.kills, seconds, given.seed, given.minutes),
        }
        chosen = [name.strip() for name in given.only.split(",") if name.strip()] or list(faults)
        rows: list[dict[str, str | float]] = []
        given.out.parent.mkdir(parents=True, exist_ok=True)
        for name in chosen:
            rows.append(attempt(name, faults[name]))  # written as they come: a run that is stopped leaves what it saw
            given.out.write_text(json.dumps({"undisturbed_seconds": round(seconds, 1), "faults": rows}, indent=1), encoding="utf-8")
    return int(any(row["held"] == "NO" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
