"""`sid up`: a password only its owner reads, everything on loopback, a login before MLflow, and nothing left when it ends."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs import up
from pipeline.context import Home
from pipeline.errors import ConfigError, ContractError

PATIENCE = 120.0


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Home(tmp_path / "home")


# ---------------------------------------------------------------- the password


def test_the_password_is_made_once_and_only_its_owner_reads_it(home: Home) -> None:
    path = up.make_password(home)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    first = json.loads(path.read_text())
    assert list(first) == ["admin"]
    assert len(first["admin"]) >= 20
    path.chmod(0o644)
    assert json.loads(up.make_password(home).read_text()) == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600, "a loosened mode is tightened again"


# ---------------------------------------------------------------- the login before MLflow


def ask(path: str, authorization: str = "", kind: str = "http") -> tuple[list[dict[str, Any]], bool]:
    """(what was sent, whether the application behind the login was reached)."""
    reached, sent = [], []

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope)

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"authorization", authorization.encode())] if authorization else []
    asyncio.run(up.Login(behind, "admin", "right")({"type": kind, "path": path, "headers": headers}, None, send))  # type: ignore[arg-type]
    return sent, bool(reached)


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize("authorization", ["", basic("admin", "wrong"), basic("root", "right"), "Bearer right", basic("admin", "right") + "x", "Basic \xe9"])
@pytest.mark.parametrize("path", ["/", "/api/2.0/mlflow/experiments/search", "/health/", "/get-artifact"])
def test_without_the_right_password_nothing_is_reached(path: str, authorization: str) -> None:
    sent, reached = ask(path, authorization)
    assert not reached
    assert sent[0]["status"] == 401
    assert sent[0]["headers"][0][0] == b"www-authenticate"


def test_with_the_right_password_everything_is_reached() -> None:
    assert ask("/", basic("admin", "right")) == ([], True)
    assert ask("/health") == ([], True)
    assert ask("", kind="lifespan") == ([], True)
    assert ask("/", kind="websocket") == ([{"type": "websocket.close", "code": 1008}], False)


# ---------------------------------------------------------------- what is started


def test_everything_listens_on_loopback_and_asks_for_the_same_password(home: Home) -> None:
    found = {service.name: service for service in up.services(home, 18080, 15000, home.root / "p.json")}
    assert list(found) == ["mlflow", "airflow-api", "airflow-dag-processor", "airflow-scheduler", "airflow-triggerer"]
    assert found["mlflow"].words[3:7] == ("--host", "127.0.0.1", "--port", "15000")
    assert found["mlflow"].environment[up.FILE_VARIABLE] == str(home.root / "p.json")
    for name in ("airflow-scheduler", "airflow-triggerer"):
        assert "--skip-serve-logs" in found[name].words, "the log servers listen on every address"
    airflow = found["airflow-api"].environment
    assert airflow["AIRFLOW__API__HOST"] == "127.0.0.1"
    assert airflow["AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS"] == "False"
    assert airflow["AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE"] == str(home.root / "p.json")
    for name in ("AIRFLOW__API_AUTH__JWT_SECRET", "AIRFLOW__API__SECRET_KEY"):
        assert len({service.environment.get(name) for service in found.values()} - {None}) == 1, "one secret between the processes"


def test_another_tracking_server_is_pointed_at_not_started(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    assert "mlflow" not in [service.name for service in up.services(home, 18080, 15000, home.root / "p.json")]


def test_a_taken_port_is_refused_by_the_name_of_its_option() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError) as caught:
            up.check_ports({"--port-mlflow": taken.getsockname()[1]})
    assert caught.value.where == "--port-mlflow"


STUBBORN = """
import signal, subprocess, sys, time
from pathlib import Path
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
Path("ready").write_text("")
time.sleep(60)
"""


def test_a_process_that_ignores_signals_and_its_child_in_another_group_end_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up, "GRACE_SECONDS", (0.2, 0.2, 2.0))
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    running = [up.start(up.Service(name="stubborn", words=("stubborn",), environment=dict(os.environ)), tmp_path)]
    wait_for(lambda: (tmp_path / "ready").is_file(), 20)
    family = [psutil.Process(running[0].process.pid), *psutil.Process(running[0].process.pid).children(recursive=True)]
    assert len(family) == 2
    up.stop(running)
    assert not [process for process in psutil.wait_procs(family, timeout=2)[1] if process.status() != psutil.STATUS_ZOMBIE]


def test_a_service_that_ends_by_itself_stops_the_others_and_names_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "short.py").write_text("")
    (tmp_path / "long.py").write_text("import time; time.sleep(60)")
    wanted = [up.Service(name=name, words=(name,), environment=dict(os.environ)) for name in ("long", "short")]
    said: list[str] = []
    family: list[subprocess.Popen[bytes]] = []

    def serve() -> None:
        with up._started(wanted, tmp_path, said.append) as running:
            family.extend(one.process for one in running)
            up._watch(running)

    with pytest.raises(ContractError) as caught:
        serve()
    assert caught.value.next_command == f"tail {tmp_path / 'short.log'}"
    assert all(process.poll() is not None for process in family)
    assert said[-1] == "stopped"


def wait_for(done: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := done():
            return answer
        time.sleep(0.1)
    raise AssertionError("it did not happen in time")


# ---------------------------------------------------------------- the real thing


def status(address: str, password: str = "") -> int:
    headers = {"Authorization": basic("admin", password)} if password else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def token(airflow: str, password: str) -> str:
    """Airflow's own login: a token for a user and password."""
    body = json.dumps({"username": "admin", "password": password}).encode()
    wanted = urllib.request.Request(f"{airflow}/auth/token", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(wanted, timeout=20) as answer:
        return str(json.loads(answer.read())["access_token"])


def free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as two:
        for each in (one, two):
            each.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1]


def heed_interrupts() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so would all its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.airflow
def test_both_interfaces_run_ask_for_the_password_and_leave_no_process(home: Home) -> None:
    airflow, mlflow = free_ports()
    words = ["up", "--port-airflow", str(airflow), "--port-mlflow", str(mlflow)]
    given = {**os.environ, "SID_HOME": str(home.root), "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *words], env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heed_interrupts
    )
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line.rstrip())
            if line.startswith("stop with"):
                break
        text = "\n".join(said)
        family = psutil.Process(process.pid).children(recursive=True)
        assert f"http://127.0.0.1:{mlflow}" in text
        assert process.poll() is None, text
        password = json.loads((home.root / "up_password.json").read_text())["admin"]
        assert password not in text
        assert status(f"http://127.0.0.1:{mlflow}/") == 401
        assert status(f"http://127.0.0.1:{mlflow}/", password) == 200
        assert status(f"http://127.0.0.1:{airflow}/api/v2/dags") == 401
        wanted = urllib.request.Request(
            f"http://127.0.0.1:{airflow}/api/v2/pools/gpu", headers={"Authorization": f"Bearer {token(f'http://127.0.0.1:{airflow}', password)}"}
        )
        with urllib.request.urlopen(wanted, timeout=20) as answer:
            assert json.loads(answer.read())["slots"] == 1
        bound = {connection.laddr.ip for one in family for connection in one.net_connections("inet") if connection.status == psutil.CONN_LISTEN}
        assert bound == {"127.0.0.1"}
    finally:
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=PATIENCE)[0]
    assert "stopped" in rest
    assert process.returncode == 0, rest
    assert len(family) >= 5
    assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    for path in (home.root / "logs").glob("*.log"):
        assert password not in path.read_text(errors="replace")
