"""Consecutive nights of the real refresh on a generated catalogue with given vectors, in one process of their own, watched while they run.

Night 0 loads and codes the whole catalogue; every later night brings events, new items and changed items.
Not here: what is compared (rows/nightly.py, rows/memory.py).
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bench import Timed, resident

from pipeline.context import read_json
from pipeline.stages import group

PROFILE = Path(__file__).with_name("nights.toml")
FIRST = date(2026, 3, 1)
WIDTH, CLUSTERS = 64, 500
EVENTS_AN_ITEM, EVENTS_A_NIGHT = 6.0, 0.25  # of the first file, and of every later one, per item of the catalogue
NEW, CHANGED = 0.01, 0.01  # shares of the catalogue, every night after the first
LOOK_SECONDS = 0.2
SHORT = "launch.java_options=-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"  # as the demo has it: nights of a small catalogue are over before hard compiling pays
SMALL = 10_000  # items
SIZES = {"quick": (2_000,), "normal": (20_000, 200_000), "full": (20_000, 200_000, 1_000_000)}
COUNT = {"quick": 2, "normal": 3, "full": 3}  # nights, the first included
FITS = ("train_behavior_encoder", "train_tokenizer")


@dataclass(frozen=True)
class Night:
    """Stage -> seconds, CPU seconds and peak memory (MB) of all processes of the run, and the bytes written below lake/ until the night's end."""

    seconds: Mapping[str, float]
    cpu: Mapping[str, float]
    peak: Mapping[str, float]
    bytes: int

    def work(self, without: tuple[str, ...] = ()) -> Timed:
        """Seconds of all stages but the first, in which the JVM starts and the tables are made."""
        stages = self.seconds.keys() - {"plan_night", *without}
        return Timed(sum(self.seconds[stage] for stage in stages), cpu=sum(self.cpu[stage] for stage in stages))


@functools.cache
def measured(items: int, nights: int) -> tuple[Night, ...]:
    """What every night took, in a home that is gone afterwards; run once for all rows that look at it."""
    with tempfile.TemporaryDirectory() as folder:
        return tuple(run(Path(folder), items, nights))


def run(folder: Path, items: int, nights: int) -> list[Night]:
    """What every night took, its home below the folder.

    Raises: CalledProcessError when a night fails.
    """
    write_days(folder / "landing", items, nights)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SID_", "MLFLOW_TRACKING_", "AIRFLOW"))}  # not the caller's lake
    environment = {**kept, "SID_HOME": str(folder / "home"), "SID_PROFILE": str(PROFILE)}
    last = FIRST + timedelta(days=nights - 1)
    sets = [f"source.path={folder / 'landing'}", *([SHORT] if items < SMALL else [])]
    command = [
        sys.executable,
        "-m",
        "jobs.cli",
        "backfill",
        "--start",
        str(FIRST),
        "--end",
        str(last),
        "--reason",
        "bench",
        *(word for change in sets for word in ("--set", change)),
    ]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        seen: list[tuple[float, float, float]] = []
        watcher = threading.Thread(target=_watch, args=(process, seen))
        watcher.start()
        said = process.communicate()[0]
        watcher.join()
    if process.returncode:
        sys.stderr.write(said[-4000:])
        raise subprocess.CalledProcessError(process.returncode, command)
    return list(_nights(folder / "home", nights, seen))


def _nights(home: Path, nights: int, seen: list[tuple[float, float, float]]) -> Iterator[Night]:
    """The nights from what their stages left in staging/ and when."""
    written = sorted((path.stat().st_mtime, path.stat().st_size) for path in (home / "lake").rglob("*") if path.is_file())
    before = 0.0
    for number in range(nights):
        (run_folder,) = (home / "staging").glob(f"backfill__*__{FIRST + timedelta(days=number)}__*")
        outcomes = {stage.name: run_folder / f"{stage.name}.json" for stage in group("refresh") if (run_folder / f"{stage.name}.json").is_file()}
        ends = {name: path.stat().st_mtime for name, path in outcomes.items()}
        seconds = {name: float(read_json(path)["seconds"]) for name, path in outcomes.items()}
        peak = {name: max((held for at, held, _ in seen if ends[name] - seconds[name] <= at <= ends[name]), default=0.0) for name in outcomes}
        instants, _, worked = np.array(seen).T
        cpu = {name: float(np.diff(np.interp([ends[name] - seconds[name], ends[name]], instants, worked))[0]) for name in outcomes}
        end = max(ends.values())
        yield Night(seconds, cpu, peak, sum(size for at, size in written if before < at <= end))
        before = end


def _watch(process: subprocess.Popen[str], seen: list[tuple[float, float, float]]) -> None:
    """(instant, MB, CPU seconds so far) of the process and everything below it, again and again until it ends."""
    while process.poll() is None:
        living = family(process.pid)
        seen.append((time.time(), sum(resident("VmRSS", one) for one in living), sum(map(_worked, living))))
        time.sleep(LOOK_SECONDS)


def _worked(process: str) -> float:
    """CPU seconds of a process and of its children that have ended; nothing of one that has ended itself."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def family(root: int) -> list[str]:
    """The process and its descendants that live now."""
    below: dict[str, list[str]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        below.setdefault(fields[1], []).append(status.parent.name)
    found = [str(root)]
    for one in found:
        found += below.get(one, [])
    return [one for one in found if Path("/proc", one).exists()]


# ---------------------------------------------------------------- the day files


def write_days(folder: Path, items: int, nights: int) -> None:
    """Parquet day files: catalogue deltas with vectors, and events whose popularity is skewed."""
    generator = np.random.default_rng(0)
    centre_CD = generator.standard_normal((CLUSTERS, WIDTH)).astype(np.float32)
    for kind in ("items", "events"):
        (folder / kind).mkdir(parents=True)
    known = items
    for number in range(nights):
        day = FIRST + timedelta(days=number)
        fresh = int(items * NEW) if number else 0
        rows = np.concatenate([generator.choice(items, int(items * CHANGED), replace=False), np.arange(known, known + fresh)]) if number else np.arange(items)
        known += fresh
        _catalogue(folder / "items" / f"{day}.parquet", rows, number, centre_CD, generator)
        _events(folder / "events" / f"{day}.parquet", int(items * (EVENTS_A_NIGHT if number else EVENTS_AN_ITEM)), known, day, generator)


def _names(numbers: np.ndarray) -> pa.Array:
    return pa.array(np.char.add("item", np.char.zfill(numbers.astype(str), 9)))


def _catalogue(path: Path, rows: np.ndarray, version: int, centre_CD: np.ndarray, generator: np.random.Generator) -> None:
    vector_ND = centre_CD[rows % CLUSTERS] + 0.7 * generator.standard_normal((len(rows), WIDTH)).astype(np.float32)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(vector_ND.reshape(-1)), WIDTH).cast(pa.list_(pa.float32()))
    title = pa.array(np.char.add(np.char.add("thing ", rows.astype(str)), f" v{version}"))
    pq.write_table(pa.table({"item_id": _names(rows), "title": title, "text": title, "text_vector": vectors}), path)


def _events(path: Path, count: int, known: int, day: date, generator: np.random.Generator) -> None:
    item_E = (known * generator.random(count) ** 2).astype(np.int64)
    user_E = generator.integers(0, max(known // 10, 1), count)
    moment_E = np.datetime64(datetime(day.year, day.month, day.day), "us") + generator.integers(0, 86_400_000_000, count).astype("timedelta64[us]")
    pq.write_table(pa.table({"user_id": pa.array(np.char.add("u", user_E.astype(str))), "item_id": _names(item_E), "event_ts": pa.array(moment_E)}), path)


def described(night: Night) -> dict[str, Any]:
    """The night's stages as text, longest first."""
    longest = sorted(night.seconds.items(), key=lambda pair: -pair[1])
    told = [f"{name} {seconds:.1f} ({night.cpu[name]:.1f})" for name, seconds in longest if seconds >= night.work().seconds / 50]
    return {"stages, s (CPU s)": "; ".join(told)}
