"""Airflow's and MLflow's own interfaces on this machine: five processes on loopback, one password, one clean end.

`sid up` starts them, watches them and stops them. Nothing listens outside 127.0.0.1; both interfaces ask for the user and password in
SID_HOME/up_password.json, which only its owner can read. MLflow's own login needs a library that is not among ours, so its server runs inside `Login`.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import airflow_home
from pipeline import tracking
from pipeline.context import Home
from pipeline.errors import ConfigError, ContractError

Say = Callable[[str], None]
Message = MutableMapping[str, Any]
Application = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

USER = "admin"
FILE_VARIABLE = "SID_UP_PASSWORD_FILE"
LOOPBACK = "127.0.0.1"
START_SECONDS = 180.0
GRACE_SECONDS = (12.0, 5.0, 5.0)  # after an interrupt, after a termination, after a kill
OPEN_PATHS = ("/health",)


@dataclass(frozen=True, kw_only=True)
class Service:
    """A process to start: the words after `python -m`, its environment, and the address that answers when it is ready (empty = none)."""

    name: str
    words: tuple[str, ...]
    environment: Mapping[str, str]
    health: str = ""


@dataclass(frozen=True, kw_only=True)
class Running:
    """A started service, the leader of a process group of its own."""

    service: Service
    process: subprocess.Popen[bytes]
    log: Path


def run(home: Home, *, airflow: int, mlflow: int, say: Say) -> None:
    """Serve both interfaces until this process is interrupted; every child has then ended.

    Args:
        airflow, mlflow: ports on loopback.
        say: takes one line of progress.
    Raises: ConfigError for a port that is taken; ContractError when a service ends by itself or does not answer.
    """
    check_ports({"--port-airflow": airflow, "--port-mlflow": mlflow} if _local(home) else {"--port-airflow": airflow})
    password_file = make_password(home)
    say("preparing Airflow's database")
    airflow_home.prepare(home)
    home.folder("airflow").chmod(0o700)  # its configuration and database hold keys
    with _interrupts(), _started(services(home, airflow, mlflow, password_file), home.folder("logs"), say) as running:
        _wait_until_ready(running, say)
        say(f"Airflow   http://{LOOPBACK}:{airflow}   (DAGs are paused until you switch them on)")
        say(f"MLflow    {f'http://{LOOPBACK}:{mlflow}/#/experiments' if _local(home) else home.tracking_uri}")
        say(f"user      {USER}, password in {password_file}")
        say(f"logs      {home.folder('logs')}")
        say(f"shell     export {shell_environment(home)}   (then `airflow` in another terminal means this one)")
        say("stop with Ctrl-C")
        _watch(running)


def shell_environment(home: Home) -> str:
    """What a shell needs for `airflow dags trigger ...` to reach this Airflow; no secret is among it."""
    private = airflow_home.settings(home)
    return " ".join(f"{name}={shlex.quote(private[name])}" for name in ("AIRFLOW_HOME", "AIRFLOW__CORE__DAGS_FOLDER", "SID_HOME"))


def services(home: Home, airflow: int, mlflow: int, password_file: Path) -> list[Service]:
    """What `run` starts, the interfaces first; MLflow only when its store is on this machine."""
    environment = airflow_environment(home, airflow, password_file)
    address = f"http://{LOOPBACK}:{airflow}"
    found = [
        Service(name="airflow-api", words=("airflow", "api-server"), environment=environment, health=f"{address}/api/v2/monitor/health"),
        Service(name="airflow-dag-processor", words=("airflow", "dag-processor"), environment=environment),
        # Without their log servers, which would listen on every address of the machine: the API server reads the same files.
        Service(name="airflow-scheduler", words=("airflow", "scheduler", "--skip-serve-logs"), environment=environment),
        Service(name="airflow-triggerer", words=("airflow", "triggerer", "--skip-serve-logs"), environment=environment),
    ]
    return [mlflow_service(home, mlflow, password_file), *found] if _local(home) else found


def airflow_environment(home: Home, port: int, password_file: Path) -> dict[str, str]:
    """Environment of all Airflow processes: one secret between them, made anew at each start and never stored."""
    address = f"http://{LOOPBACK}:{port}"
    return {
        **os.environ,
        **airflow_home.settings(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # tasks look for spark-submit there
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": address,
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__API__SECRET_KEY": secrets.token_hex(32),
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{address}/execution/",
        "AIRFLOW__CORE__PARALLELISM": "2",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "False",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{USER}:ADMIN",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(password_file),
        "AIRFLOW__LOGGING__LOGGING_LEVEL": "INFO",
    }


def mlflow_service(home: Home, port: int, password_file: Path) -> Service:
    """MLflow's server inside `Login`, on the home's store."""
    environment = {
        **os.environ,
        **tracking.ENVIRONMENT,
        FILE_VARIABLE: str(password_file),
        # What the command `mlflow server` hands to its workers; it has no word for an application of another module.
        "_MLFLOW_SERVER_FILE_STORE": home.tracking_uri,
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": home.folder("mlartifacts").as_uri(),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        "_MLFLOW_SGI_NAME": "uvicorn",
    }
    words = ("uvicorn", "jobs.up:guarded_mlflow", "--factory", "--host", LOOPBACK, "--port", str(port), "--log-level", "warning")
    return Service(name="mlflow", words=words, environment=environment, health=f"http://{LOOPBACK}:{port}/health")


# ---------------------------------------------------------------- the password


def make_password(home: Home) -> Path:
    """The file `{user: password}` that both interfaces read, made on first use for its owner's eyes only."""
    path = home.root / "up_password.json"
    home.root.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            json.dump({USER: secrets.token_urlsafe(18)}, file)
    path.chmod(0o600)
    return path


class Login:
    """An ASGI application that lets only requests with the right user and password through (HTTP basic authentication)."""

    def __init__(self, application: Application, user: str, password: str) -> None:
        self.application = application
        self.expected = b"Basic " + base64.b64encode(f"{user}:{password}".encode())

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]) -> None:
        """Pass the request on, or answer 401."""
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if scope["type"] == "lifespan" or scope.get("path") in OPEN_PATHS or hmac.compare_digest(given, self.expected):
            await self.application(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"www-authenticate", b'Basic realm="MLflow of sidmill"'), (b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b"user and password, please\n"})
        else:
            await send({"type": "websocket.close", "code": 1008})


def guarded_mlflow() -> Login:
    """MLflow's application behind a login, for `uvicorn --factory`; the password file is named by the environment."""
    from mlflow.server.fastapi_app import app

    known = json.loads(Path(os.environ[FILE_VARIABLE]).read_text(encoding="utf-8"))
    return Login(app, USER, known[USER])


# ---------------------------------------------------------------- processes


def check_ports(ports: Mapping[str, int]) -> None:
    """Nothing when every port is free.

    Raises: ConfigError naming the option of a port that is taken.
    """
    for option, port in ports.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except (OSError, OverflowError) as error:
                raise ConfigError(
                    "the port cannot be used", expected="a free port", found=f"{port}: {error}", where=option, next_command=f"sid up {option} {port + 10}"
                ) from error


def start(service: Service, logs: Path) -> Running:
    """The service's process, its output in a file of its own."""
    path = logs / f"{service.name}.log"
    with path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *service.words],
            env=dict(service.environment),
            cwd=logs,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Running(service=service, process=process, log=path)


def stop(running: list[Running]) -> None:
    """End every process and all it started: interrupt the parents, terminate their groups, kill what is left."""
    import psutil

    family = _family(running)
    for number, grace in enumerate(GRACE_SECONDS):
        for one in running:
            with contextlib.suppress(ProcessLookupError):
                if number == 0:
                    one.process.send_signal(signal.SIGINT)
                else:
                    os.killpg(one.process.pid, signal.SIGTERM if number == 1 else signal.SIGKILL)
        deadline = time.monotonic() + grace
        for one in running:  # our own children are reaped here; those of a dead parent have another one
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.process.wait(max(0.05, deadline - time.monotonic()))
        if not psutil.wait_procs(family, timeout=max(0.05, deadline - time.monotonic()))[1]:
            return
    for process in family:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _family(running: list[Running]) -> list[Any]:
    """The services' processes and all their descendants."""
    import psutil

    found = []
    for one in running:
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(one.process.pid)
            found += [parent, *parent.children(recursive=True)]
    return found


@contextlib.contextmanager
def _started(wanted: list[Service], logs: Path, say: Say) -> Iterator[list[Running]]:
    running: list[Running] = []
    try:
        for service in wanted:
            running.append(start(service, logs))
            say(f"started {service.name} (process {running[-1].process.pid})")
        yield running
    finally:
        with _deaf():
            say("stopping")
            stop(running)
            say("stopped")


def _wait_until_ready(running: list[Running], say: Say) -> None:
    """Return when every health address answers.

    Raises: ContractError when a process ends first, or after START_SECONDS.
    """
    began = time.monotonic()
    waiting = [one for one in running if one.service.health]
    while waiting:
        _check_alive(running)
        for one in [one for one in waiting if answers(one.service.health)]:
            say(f"{one.service.name} answers after {time.monotonic() - began:.0f} s")
            waiting.remove(one)
        if waiting and time.monotonic() - began > START_SECONDS:
            raise _silent(waiting[0], f"no answer within {START_SECONDS:.0f} s")
        time.sleep(0.5)


def _watch(running: list[Running]) -> None:
    """Return on an interrupt.

    Raises: ContractError when a service ends by itself.
    """
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            _check_alive(running)
            time.sleep(0.5)


def _check_alive(running: list[Running]) -> None:
    for one in running:
        if one.process.poll() is not None:
            raise _silent(one, f"exit code {one.process.returncode}")


def _silent(one: Running, found: str) -> ContractError:
    return ContractError(
        f"{one.service.name} does not run", expected="a running service", found=found, where=str(one.log), next_command=shlex.join(["tail", str(one.log)])
    )


def answers(address: str) -> bool:
    """Whether the address answers with success."""
    with contextlib.suppress(OSError, urllib.error.URLError), urllib.request.urlopen(address, timeout=5) as answer:  # noqa: S310  our own loopback address
        return bool(answer.status == 200)
    return False


def _local(home: Home) -> bool:
    """Whether MLflow's store is a database that this machine may serve, not another server."""
    return not home.tracking_uri.startswith(("http:", "https:", "databricks"))


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """A termination or a closed terminal ends the block as Ctrl-C does."""
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except KeyboardInterrupt:
        return
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: object) -> None:
    """A signal's handler that does what Ctrl-C does."""
    raise KeyboardInterrupt


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Further interrupts are ignored while the children end."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
