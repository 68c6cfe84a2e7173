"""The time line of `make demo` after installation: one run in a fresh home, start-up of interpreter and JVM apart, every stage's seconds."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import timeline
from bench import Case, clocked

NUMBER, TITLE = 11, "make demo"
SECONDS = 240.0
DATASET = {"quick": "shop", "normal": "movielens", "full": "movielens"}
STARTS = {
    "interpreter with the command line": "import jobs.cli",
    "interpreter with Airflow, torch, MLflow and Spark": "import airflow, torch, mlflow, pyspark",
    "the same with a JVM, a session and the empty tables": (
        "import airflow, torch, mlflow, pyspark; from pipeline import config, lakehouse, spark; from pipeline.context import Home;"
        "loaded = config.load('demo'); lakehouse.create_tables(spark.session(Home.from_environment(), loaded.lake, loaded.launch))"
    ),
}


def cases(scale: str) -> Iterator[Case]:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder, "home")
        yield Case(
            name=f"sid demo --dataset {DATASET[scale]}",
            ours=lambda: _python(home, "-m", "jobs.cli", "demo", "--dataset", DATASET[scale]),
            rounds=0,
            seconds=SECONDS,
            facts=lambda: _facts(home, Path(folder)),
        )


def _python(home: Path, *arguments: str) -> None:
    environment = {**os.environ, "SID_HOME": str(home)}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])


def _facts(home: Path, folder: Path) -> dict[str, str]:
    """Seconds of starting up, measured apart, and of the stages; the chart goes to stderr."""
    chart = timeline.bars(home)
    sys.stderr.write(timeline.text(chart))
    starts = {name: f"{clocked(lambda code=code: _python(folder / 'start', '-c', code))[0]:.1f} s" for name, code in STARTS.items()}
    by_run: dict[str, float] = {}
    for bar in chart:
        by_run[bar.run] = by_run.get(bar.run, 0.0) + bar.seconds
    return {**starts, **{f"stages of {run}": f"{seconds:.0f} s" for run, seconds in by_run.items()}}
