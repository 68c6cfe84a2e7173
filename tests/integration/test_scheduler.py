"""A real scheduler with small tasks: the asset event starts its consumers, retries happen where they help, a pool of one slot serialises.

The DAGs below are made of the operator, asset, alias, defaults and pools of `jobs.airflow_task`; only the work of a stage is replaced
(`launchers.launch`), so that a task takes a second. SQLite, LocalExecutor, loopback, a folder of its own; the processes are gone afterwards.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.context import ROOT

pytestmark = pytest.mark.airflow
PATIENCE = 240.0  # seconds for everything together on a busy machine; about 45 are needed on two idle cores
PASSED, FAILED = "success", "failed"

DAGS = '''
import json, time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from airflow.sdk import DAG

from jobs import launchers
from jobs.airflow_task import DEFAULTS, PARAMS, RELEASE, StageOperator
from pipeline.errors import ContractError, UpstreamMissing

NOTES = Path(__file__).parent.parent / "notes"


def work(ctx, request):
    """Stands in for the stage's process: notes when it ran, then does what the stage's reason for being here asks."""
    run = ctx.run_id.split("__")[0]
    note = NOTES / f"{run}-{ctx.stage}-{ctx.attempt}.json"
    began = time.time()
    note.write_text(json.dumps({"began": began, "release": ctx.param("release"), "day": str(ctx.logical_date)}))
    outputs = {}
    if ctx.stage == "content_embedding" and ctx.attempt == 1:
        raise UpstreamMissing("the file of the day is late", found="nothing")
    if ctx.stage == "user_sequence":
        raise ContractError("the file lacks columns", found="two columns")
    if ctx.stage in ("plan_night", "ingest"):  # each waits for the other: they end only when they run at the same time
        other = NOTES / f"{run}-{'ingest' if ctx.stage == 'plan_night' else 'plan_night'}-1.json"
        while not other.is_file() and time.time() < began + 60:
            time.sleep(0.05)
        outputs["met"] = other.is_file()
    if ctx.stage in ("train_behavior_encoder", "train_tokenizer"):
        time.sleep(1.0)
    if ctx.stage == "publish_release":
        outputs = {"tag": "d20260301", "logical_date": "2026-03-01", "codebook_digest": "c" * 64, "generation": 3, "is_current_newest": True}
    note.write_text(json.dumps({**json.loads(note.read_text()), "ended": time.time(), **outputs}))
    return {"stage": ctx.stage, "status": "done", "seconds": 0.0, "outputs": outputs}


launchers.launch = work
QUICK = DEFAULTS | {"retry_delay": timedelta(seconds=1), "max_retry_delay": timedelta(seconds=2)}
GIVEN = {name: PARAMS[name] for name in ("date", "overrides", "reason", "release")} | {"profile": "tiny"}


def tasks(dag, *stages, **places):
    return [StageOperator(stage=stage, dag=dag, **places) for stage in stages]


with DAG("night", schedule="@once", start_date=datetime(2026, 3, 1, tzinfo=UTC), catchup=False, default_args=QUICK, params=GIVEN) as night:
    together = tasks(night, "plan_night", "ingest")
    others = tasks(night, "content_embedding", "user_sequence")
    one_by_one = tasks(night, "train_behavior_encoder", "train_tokenizer", pool="gpu")
    from jobs.airflow_task import NEW_RELEASE
    publish = tasks(night, "publish_release", pool="write_publish_release", outlets=[NEW_RELEASE])

with DAG("readers", schedule=[RELEASE], start_date=datetime(2026, 3, 1, tzinfo=UTC), catchup=False, default_args=QUICK, params=GIVEN) as readers:
    tasks(readers, "rank_example")
'''

PREPARE = """
from airflow.utils.db import initdb
from jobs.airflow_home import _make_pools
initdb()
_make_pools()
"""


@dataclass(frozen=True)
class Airflow:
    """A running scheduler and API server in a folder of their own."""

    folder: Path
    port: int

    def note(self, name: str) -> dict[str, Any]:
        """What a task left when it ran."""
        return json.loads((self.folder / "notes" / f"{name}.json").read_text(encoding="utf-8"))

    def get(self, path: str) -> dict[str, Any]:
        """An answer of the REST interface."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v2/{path}", timeout=20) as answer:
            return json.loads(answer.read())

    def states(self, dag: str) -> dict[str, tuple[str, int]]:
        """task_id -> (state, tries) of the DAG's only run; empty before there is one."""
        found = self.get(f"dags/{dag}/dagRuns/~/taskInstances")["task_instances"]
        return {task["task_id"]: (task["state"], task["try_number"]) for task in found}


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def environment(folder: Path, ports: list[int]) -> dict[str, str]:
    api, worker_logs, trigger_logs = ports
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW", "SID_"))}
    address = f"http://127.0.0.1:{api}"
    return kept | {
        "AIRFLOW_HOME": str(folder),
        "SID_HOME": str(folder / "sid"),
        "PYTHONPATH": str(ROOT),
        "AIRFLOW__CORE__DAGS_FOLDER": str(folder / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__PARALLELISM": "3",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{address}/execution/",
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(api),
        "AIRFLOW__API__BASE_URL": address,
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_hex(32),
        "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(worker_logs),
        "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(trigger_logs),
        "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.3",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
    }


def family(processes: list[subprocess.Popen[bytes]]) -> list[psutil.Process]:
    """The processes and all their descendants."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(process.pid)
            found += [parent, *parent.children(recursive=True)]
    return found


def wait_for(what: str, done: Callable[[], Any], deadline: float, logs: Path) -> Any:
    """The first answer that is true; fails with the end of the logs after the deadline."""
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            if answer := done():
                return answer
        time.sleep(0.3)
    tails = "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(logs.glob("*.log")))
    pytest.fail(f"{what} did not happen in time\n{tails}")


def start(name: str, words: list[str], folder: Path, given: dict[str, str]) -> subprocess.Popen[bytes]:
    """`python <words>` as the leader of a process group of its own."""
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen([sys.executable, *words], env=given, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Interrupt each parent, then terminate, then kill its group: a scheduler that is only terminated may leave children behind."""
    for send, patience in (
        (lambda process: process.send_signal(signal.SIGINT), 10),
        (lambda process: os.killpg(process.pid, signal.SIGTERM), 10),
        (lambda process: os.killpg(process.pid, signal.SIGKILL), 10),
    ):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                send(process)
        deadline = time.monotonic() + patience
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))


def run_once(words: list[str], folder: Path, given: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, *words], env=given, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def airflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Airflow]:
    """Both DAGs run to their end; the scheduler still stands while the tests look."""
    folder = tmp_path_factory.mktemp("airflow")
    deadline = time.monotonic() + PATIENCE
    for name in ("dags", "notes"):
        (folder / name).mkdir()
    (folder / "dags" / "small.py").write_text(DAGS, encoding="utf-8")
    ports = free_ports(3)
    given = environment(folder, ports)
    run_once(["-c", PREPARE], folder, given)
    running = Airflow(folder, ports[0])
    processes = [start("api-server", ["-m", "airflow", "api-server"], folder, given)]
    try:
        run_once(["-m", "airflow", "dag-processor", "--num-runs", "1"], folder, given)
        wait_for("the API server", lambda: running.get("version"), deadline, folder)
        processes.append(start("scheduler", ["-m", "airflow", "scheduler", "--skip-serve-logs"], folder, given))
        for dag, count in (("night", 7), ("readers", 1)):
            wait_for(f"the end of {dag}", lambda dag=dag, count=count: ended(running.states(dag), count), deadline, folder)
        yield running
    finally:
        members = family(processes)
        stop(processes)
        _, left = psutil.wait_procs(members, timeout=5)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
    assert len(members) > len(processes), "the scheduler keeps workers: their end is part of the test"
    assert not left, f"left behind: {left}"


def ended(states: dict[str, tuple[str, int]], count: int) -> bool:
    return len(states) == count and all(state in (PASSED, FAILED) for state, _ in states.values())


def test_the_event_of_a_new_release_starts_its_readers_with_its_tag(airflow: Airflow) -> None:
    assert airflow.states("night")["publish_release"] == (PASSED, 1)
    assert airflow.states("readers") == {"rank_example": (PASSED, 1)}
    (run,) = airflow.get("dags/readers/dagRuns")["dag_runs"]
    assert run["run_type"] == "asset_triggered"
    note = airflow.note("asset_triggered-rank_example-1")
    assert (note["release"], note["day"]) == ("d20260301", "2026-03-01")
    (event,) = airflow.get("assets/events")["asset_events"]
    assert (event["name"], event["source_dag_id"], event["source_task_id"]) == ("sid_release", "night", "publish_release")
    assert event["extra"] == {"release": "d20260301", "tag": "d20260301", "logical_date": "2026-03-01", "codebook_digest": "c" * 64, "generation": 3}


def test_a_stage_that_may_succeed_later_is_tried_again(airflow: Airflow) -> None:
    assert airflow.states("night")["content_embedding"] == (PASSED, 2)
    assert "ended" not in airflow.note("scheduled-content_embedding-1")
    assert "ended" in airflow.note("scheduled-content_embedding-2")


def test_a_stage_that_cannot_succeed_is_not_tried_again(airflow: Airflow) -> None:
    assert airflow.states("night")["user_sequence"] == (FAILED, 1)
    assert not list((airflow.folder / "notes").glob("*user_sequence-2.json"))


def test_a_pool_of_one_slot_runs_one_task_at_a_time_while_others_run_side_by_side(airflow: Airflow) -> None:
    assert airflow.get("pools/gpu")["slots"] == 1
    assert airflow.note("scheduled-plan_night-1")["met"], "without a shared pool two tasks run at the same time"
    assert airflow.note("scheduled-ingest-1")["met"]
    first, second = sorted((airflow.note(f"scheduled-{stage}-1") for stage in ("train_behavior_encoder", "train_tokenizer")), key=lambda note: note["began"])
    assert first["ended"] <= second["began"]
