"""One night, its readers, a backfill and a failure on real services: `make test-services`.

    python tests/services/run.py [--s3] [--direct] [--keep] [--no-backfill]

PostgreSQL, an MLflow server on it, a Spark master and two workers, Airflow's scheduler, DAG processor, triggerer and API server on PostgreSQL, the Iceberg
catalog on PostgreSQL; with --s3 the tables lie on an S3 server; --direct leaves Airflow and the Spark cluster out (one process per command, Spark inside).
Everything on loopback, everything stopped at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import stack as services
from rich.console import Console
from stack import HOST, Stack, wait_for

from jobs import up
from jobs.display import table
from pipeline.context import Home

console = Console()
RUN_SECONDS = 2700.0  # a night takes 22 minutes on two cores that others use as well
GREEN, ENDED = "success", ("success", "failed")


@dataclass
class Story:
    """What was done and what it took."""

    stack: Stack
    rows: list[tuple[str, float, str]] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    token: str = ""
    yesterday: Any = None
    began: float = field(default_factory=time.monotonic)

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """What the work returned; its seconds go into the table."""
        began = time.monotonic()
        found = work()
        self.rows.append((name, time.monotonic() - began, found if isinstance(found, str) else ""))
        console.print(f"{time.monotonic() - self.began:6.0f} s  {name}: {self.rows[-1][2] or 'done'}", highlight=False, soft_wrap=True)
        return found

    def api(self, path: str, body: dict[str, Any] | None = None, method: str = "") -> dict[str, Any]:
        """An answer of Airflow's REST interface, with the token of a login."""
        wanted = urllib.request.Request(
            f"http://{HOST}:{self.stack.ports['airflow']}/{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.token}"} if self.token else {})},
            method=method or ("GET" if body is None else "POST"),
        )
        with urllib.request.urlopen(wanted, timeout=60) as answer:
            return dict(json.loads(answer.read() or b"{}"))

    def run_of(self, dag: str, kind: str, count: int = 1, patience: float = RUN_SECONDS) -> list[dict[str, Any]]:
        """The DAG's runs of a kind, once there are `count` and all have ended."""

        def ended() -> list[dict[str, Any]]:
            found = [run for run in self.api(f"api/v2/dags/{dag}/dagRuns?limit=100")["dag_runs"] if run["run_type"] == kind]
            return found if len(found) >= count and all(run["state"] in ENDED for run in found) else []

        return list(wait_for(f"the {kind} run of {dag}", ended, patience, self.stack))

    def tasks(self, dag: str, run_id: str) -> dict[str, str]:
        """task -> state of one run."""
        quoted = urllib.parse.quote(run_id, safe="")
        return {one["task_id"]: one["state"] for one in self.api(f"api/v2/dags/{dag}/dagRuns/{quoted}/taskInstances?limit=100")["task_instances"]}


# ---------------------------------------------------------------- the story


def tell(story: Story, *, backfill: bool, direct: bool) -> None:
    """Start everything, run everything, look at what came out."""
    stack = story.stack
    story.step("tools", lambda: services.fetch_tools(stack))
    stack.home.mkdir()
    services.write_profile(stack, story.yesterday, cluster=not direct)
    listen(story)
    story.step("PostgreSQL", lambda: services.start_postgres(stack))
    if stack.s3:
        story.step("S3 server", lambda: services.start_s3(stack))
    story.step("MLflow server on PostgreSQL", lambda: services.start_mlflow(stack))
    (by_hand if direct else by_airflow)(story, backfill)
    story.step("what came out", lambda: results(story))
    story.step("loopback only, no secret anywhere", lambda: safety(story))


def by_hand(story: Story, backfill: bool) -> None:
    """The same work through `sid`, and the dry run of the housekeeping, which lists what the store holds."""
    day = str(story.yesterday)
    release = f"release=d{story.yesterday:%Y%m%d}"
    story.step("a night (sid run refresh)", lambda: sid(story, "run", "refresh", "--date", day))
    story.step("its readers (sid run consumers)", lambda: sid(story, "run", "consumers", "--date", day, "--param", release))
    story.step("the night again", lambda: sid(story, "run", "refresh", "--date", day))
    if backfill:
        before = str(story.yesterday - timedelta(days=1))
        story.step(
            "a backfill (sid backfill)", lambda: sid(story, "backfill", "--start", before, "--end", before, "--reason", "a day from before the beginning")
        )
    story.step("what would be swept (sid maintain --dry-run)", lambda: sid(story, "maintain", "--dry-run"))


def sid(story: Story, *words: str) -> str:
    """The last word of what `sid` said on standard error, when it ended well."""
    with (story.stack.logs / "sid.log").open("a", encoding="utf-8") as log:
        done = subprocess.run([sys.executable, "-m", "jobs.cli", *words], env=story.stack.environment(), stdout=log, stderr=log, check=False)
    assert done.returncode == 0, (story.stack.logs / "sid.log").read_text()[-3000:]
    return f"{' '.join(words[:2])} done"


def by_airflow(story: Story, backfill: bool) -> None:
    """The night by the schedule, its readers by the asset, a backfill and a failure through the API."""
    stack = story.stack
    story.step("Spark master and 2 workers", lambda: services.start_spark(stack))
    password_file = up.make_password(Home(stack.home))
    story.step("Airflow: 4 processes on PostgreSQL", lambda: services.start_airflow(stack, password_file))
    story.token = login(story, password_file)
    story.step("the DAG files are read", lambda: wait_for("the DAGs", lambda: dags(story), 180, stack))
    story.step("a night by the schedule (sid_refresh)", lambda: night(story))
    story.step("its readers by the asset (rank_training)", lambda: readers(story))
    story.step("a failure and its alert (sid_rollback)", lambda: failure(story))
    if backfill:
        story.step("a backfill through the API", lambda: backfilled(story))


def listen(story: Story) -> None:
    """Take alerts on loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            story.alerts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *words: Any) -> None:
            """Silent."""

    server = ThreadingHTTPServer((HOST, story.stack.ports["hook"]), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()


def login(story: Story, password_file: Path) -> str:
    """A token; without one Airflow refuses."""
    refused = 0
    try:
        story.api("api/v2/dags")
    except urllib.error.HTTPError as error:
        refused = error.code
    assert refused == 401, "Airflow answers without a login"
    password = json.loads(password_file.read_text())[up.USER]
    return str(story.api("auth/token", {"username": up.USER, "password": password})["access_token"])


def dags(story: Story) -> str:
    """The DAGs' names, once all four are there."""
    found = sorted(dag["dag_id"] for dag in story.api("api/v2/dags")["dags"])
    errors = story.api("api/v2/importErrors")["import_errors"]
    assert not errors, errors
    return ", ".join(found) if len(found) >= 4 else ""


def switch_on(story: Story, dag: str) -> None:
    """Let the scheduler have the DAG."""
    story.api(f"api/v2/dags/{dag}", {"is_paused": False}, "PATCH")


def night(story: Story) -> str:
    """The scheduler's own run of yesterday, every task green."""
    switch_on(story, "rank_training")
    switch_on(story, "sid_refresh")
    (run,) = story.run_of("sid_refresh", "scheduled")
    tasks = story.tasks("sid_refresh", run["dag_run_id"])
    assert run["state"] == GREEN, tasks
    assert run["logical_date"][:10] == str(story.yesterday), run
    return f"{run['dag_run_id']}, {len(tasks)} tasks green"


def readers(story: Story) -> str:
    """The run that the asset event of the release started."""
    run = story.run_of("rank_training", "asset_triggered")[0]
    tasks = story.tasks("rank_training", run["dag_run_id"])
    assert run["state"] == GREEN, tasks
    (event,) = story.api("api/v2/assets/events")["asset_events"]
    assert event["extra"]["release"] == f"d{story.yesterday:%Y%m%d}", event
    return f"{event['extra']['release']}, {', '.join(sorted(tasks))} green"


def backfilled(story: Story) -> str:
    """The day before yesterday, asked for through the API as a backfill."""
    day = story.yesterday - timedelta(days=1)
    asked = {
        "dag_id": "sid_refresh", "from_date": f"{day}T00:00:00Z", "to_date": f"{day}T00:00:00Z", "max_active_runs": 1, "reprocess_behavior": "none",
        "dag_run_conf": {"reason": "a day from before the beginning"},
    }  # fmt: skip
    made = story.api("api/v2/backfills", asked)
    (run,) = story.run_of("sid_refresh", "backfill")
    assert run["state"] == GREEN, story.tasks("sid_refresh", run["dag_run_id"])
    assert run["logical_date"][:10] == str(day), run
    return f"backfill {made['id']}: {run['dag_run_id']}"


def failure(story: Story) -> str:
    """A rollback to a release that never was: it fails for good, and somebody is told."""
    switch_on(story, "sid_rollback")
    story.api("api/v2/dags/sid_rollback/dagRuns", {"logical_date": None, "conf": {"tag": "d19700101", "reason": "no such release"}})
    (run,) = story.run_of("sid_rollback", "manual")
    assert run["state"] == "failed", run
    told = wait_for("the alert", lambda: [alert for alert in story.alerts if alert["event"] == "task_failed"], 60, story.stack)
    assert (told[0]["dag"], told[0]["task"], told[0]["class"]) == ("sid_rollback", "rollback", "ContractError"), told
    late = [alert for alert in story.alerts if alert["event"] == "deadline_missed"]
    assert late, "the night took longer than its deadline of one minute: the triggerer should have told"
    assert late[0]["dag"] == "sid_refresh", late
    return f"{told[0]['headline']}; {len(late)} deadline alert(s)"


# ---------------------------------------------------------------- what came out


def results(story: Story) -> str:
    """Releases, rows, runs and models as the services hold them, read without a JVM."""
    look = str(Path(__file__).with_name("look.py"))
    done = subprocess.run([sys.executable, look], env=story.stack.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    backfill = [name for name, _, _ in story.rows if name.startswith("a backfill")]
    assert len(found["releases"]) == (2 if backfill else 1), found["releases"]
    assert min(found["rows"]["sid.item_sid"], found["rows"]["rank.rank_example"]) > 0, found["rows"]
    assert found["states"] == ["FINISHED"], found["states"]
    assert all(place.startswith("s3://" if story.stack.s3 else "file:/") for place in found["places"]), found["places"]
    for release in found["releases"]:
        console.print(f"          {release}", highlight=False)
    return f"{len(found['releases'])} release(s), {sum(map(bool, found['rows'].values()))} tables with rows, {found['runs']} runs, models {found['models']}"


def safety(story: Story) -> str:
    """Every socket listens on loopback, and no password lies in a log, a document, a database of runs or a snapshot."""
    import psutil

    family = up._family(story.stack.running)
    bound = {item.laddr.ip for one in family for item in _connections(one) if item.status == psutil.CONN_LISTEN}
    assert bound <= {HOST, "::ffff:127.0.0.1", "::1"}, bound
    secrets = [secret.encode() for secret in story.stack.passwords.values()]
    skipped = {story.stack.folder / "postgres"}  # the server's own files: it keeps hashes; what it stores for MLflow and Airflow is dumped below
    files = [path for path in story.stack.folder.rglob("*") if path.is_file() and not any(folder in path.parents for folder in skipped)]
    leaks = [str(path) for path in files if holds(path.read_bytes(), secrets)]
    leaks += [f"database {name}" for name in services.DATABASES if holds(dump(story.stack, name), secrets)]
    assert not leaks, leaks
    return f"{len(files)} files and {len(services.DATABASES)} databases searched for {len(secrets)} secrets"


def holds(content: bytes, secrets: list[bytes]) -> bool:
    """Whether one of the secrets lies in it; the content is read once, a cluster's work folders hold gigabytes."""
    return any(secret in content for secret in secrets)


def _connections(process: Any) -> list[Any]:
    import psutil

    try:
        return list(process.net_connections("inet"))
    except psutil.Error:
        return []


def dump(stack: Stack, name: str) -> bytes:
    """Everything that a database holds, as SQL."""
    binary = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name)) / "pg_dump"
    login_as = {"PGPASSWORD": stack.passwords[name], "PGHOST": HOST, "PGPORT": str(stack.ports["postgres"]), "PGUSER": name, "PGDATABASE": name}
    return subprocess.run([str(binary)], env=os.environ | login_as, capture_output=True, check=True).stdout


# ---------------------------------------------------------------- the end


def main() -> int:
    """0 when all went well; the folder stays behind after a failure."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--s3", action="store_true", help="tables on an S3 server")
    words.add_argument("--direct", action="store_true", help="without Airflow and the Spark cluster")
    words.add_argument("--keep", action="store_true", help="leave the folder behind")
    words.add_argument("--no-backfill", action="store_true", help="only the night, its readers and the failure")
    given = words.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="sidmill-services-"))
    story = Story(Stack(folder, s3=given.s3), yesterday=(datetime.now(UTC) - timedelta(days=1)).date())
    console.print(f"everything lies in {folder}", highlight=False)
    well = False
    try:
        tell(story, backfill=not given.no_backfill, direct=given.direct)
        well = True
    except (AssertionError, RuntimeError, OSError, ValueError):
        console.print(traceback.format_exc(), markup=False, highlight=False)
    finally:
        began = time.monotonic()
        left = story.stack.stop()
        story.rows.append(("stop", time.monotonic() - began, f"{len(left)} processes left"))
        well = well and not left
    shown = table("services")
    for name, side in (("step", "left"), ("seconds", "right"), ("what", "left")):
        shown.add_column(name, justify=side, overflow="fold")  # type: ignore[arg-type]
    for name, seconds, what in story.rows:
        shown.add_row(name, f"{seconds:.1f}", what)
    console.print(shown)
    if well and not given.keep:
        shutil.rmtree(folder)
    console.print("all well" if well else f"FAILED; logs in {folder / 'logs'}", highlight=False)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
