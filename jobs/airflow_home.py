"""A private Airflow inside SID_HOME: settings, database and pools, for runs in one process without a scheduler or a web server."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.context import ROOT, Home
from pipeline.errors import ContractError

AGAIN_SECONDS = 2.0  # between two interrupts of a run that shall end


def prepare(home: Home) -> None:
    """Point Airflow at this home and make its database and pools; must come before anything imports airflow."""
    os.environ.update(settings(home))
    from airflow.utils.db import initdb

    initdb()  # also of a database that is there: a kill may have left half of one, an older Airflow another
    _make_pools()


def settings(home: Home) -> dict[str, str]:
    """Environment of the private Airflow: everything on loopback, secrets made here and never stored."""
    return {
        "AIRFLOW_HOME": str(home.folder("airflow")),
        "SID_HOME": str(home.root),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_hex(32),
        "AIRFLOW__LOGGING__LOGGING_LEVEL": "ERROR",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
    }


def run_dag(dag_id: str, logical_date: datetime, conf: dict[str, Any]) -> str:
    """Identity (as stages know it) of a DAG run that ran to its end in this process.

    Raises: ContractError naming the tasks that failed.
    """
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(str(ROOT / "dags"))
    if bag.import_errors:
        raise ContractError("a DAG file cannot be read", expected="no import errors", found=str(bag.import_errors), where="dags/")
    bag.dags[dag_id].deadline = None  # no scheduler watches here, and Airflow 3.3.2 looks for the alert in a table that such a run never fills
    began = datetime.now(UTC)
    with stoppable():
        done = bag.dags[dag_id].test(logical_date=logical_date, run_after=logical_date, run_conf=conf)
    _correct_start(done.id, began)
    identity = f"{done.run_id}__{dag_id}"
    unfinished = sorted((task.state != "failed", task.task_id, str(task.state)) for task in done.get_task_instances() if task.state != "success")
    if unfinished:  # those that failed themselves first, then those that could not start
        raise ContractError(
            f"DAG {dag_id} failed",
            expected="every task green",
            found=", ".join(f"{name} ({state})" for _, name, state in unfinished),
            where=done.run_id,
            next_command=shlex.join(["cat", f"{Home.from_environment().run_folder(identity) / unfinished[0][1]}.json"]),
        )
    return identity


@contextmanager
def stoppable(again: float = AGAIN_SECONDS) -> Iterator[None]:
    """Ctrl-C and SIGTERM end what runs inside: Airflow takes an interrupt for a failed task and begins the next one, so it is repeated until it gets out.

    Raises: KeyboardInterrupt at the end if all of them were swallowed.
    """
    ended, asked = threading.Event(), threading.Event()

    def interrupt(number: int, frame: object) -> None:
        """The first signal begins the repeating; each one interrupts whatever runs."""
        if ended.is_set():
            return
        if not asked.is_set():
            asked.set()
            repeating.start()
        raise KeyboardInterrupt

    def repeat() -> None:
        """Ask the main thread again and again."""
        while not ended.wait(again):
            os.kill(os.getpid(), signal.SIGINT)

    repeating = threading.Thread(target=repeat, daemon=True)
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        ended.set()
        if repeating.is_alive():
            repeating.join()  # no signal comes after this
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked.is_set():
        raise KeyboardInterrupt


def _correct_start(run: int, began: datetime) -> None:
    """Say when the run began: such a run claims to have begun on its logical date, and the interface would show it as having taken decades."""
    from airflow.models.dagrun import DagRun
    from airflow.utils.session import create_session
    from sqlalchemy import update

    with create_session() as session:
        session.execute(update(DagRun).where(DagRun.id == run).values(start_date=began))


def newest_event() -> dict[str, Any]:
    """Extra of the newest asset event of a new release, empty when there was none."""
    from airflow.models.asset import AssetEvent
    from airflow.utils.session import create_session
    from sqlalchemy import select

    with create_session() as session:
        found = session.scalars(select(AssetEvent).order_by(AssetEvent.id.desc()).limit(1)).first()
        return dict(found.extra) if found is not None else {}


def initialise() -> None:
    """Database, pools and the login of a deployment, from its environment; run once before the services start, again after each upgrade.

    Raises: KeyError when AIRFLOW_LOGIN or the path of the password file is not set.
    """
    from airflow.utils.db import upgradedb

    upgradedb()
    _make_pools()
    path = Path(os.environ["AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE"])
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_text(json.dumps({"admin": os.environ["AIRFLOW_LOGIN"]}), encoding="utf-8")


def _make_pools() -> None:
    from airflow.models.pool import Pool

    from jobs.airflow_task import pools

    for name, slots in pools().items():
        Pool.create_or_update_pool(name=name, slots=slots, description="", include_deferred=False)


if __name__ == "__main__":
    initialise()
