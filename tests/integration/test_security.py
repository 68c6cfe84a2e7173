"""A secret of the environment reaches no file of the home; hostile values are refused or inert; nothing that runs code from data is in the source."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from datetime import date
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline import config, lakehouse
from pipeline.context import ROOT, Context, Home
from pipeline.errors import ConfigError, SidError

PASSWORD, TOKEN = "c4n4ry-catalog-password", "c4n4ry-webhook-token"
NASTY = [
    "'; DROP TABLE lake.raw.item; --", '"', "$(touch gone)", "`touch gone`", "../../gone", "a\0b", "..", "x' OR '1'='1", "{{ 7*7 }}", "%s%n", "\\", "a\nb", "",
]  # fmt: skip
NASTY_WORDS = [text for text in NASTY if "\0" not in text]  # the system itself refuses a NUL in an argument


# ---------------------------------------------------------------- a canary

SESSION = """
import psutil
from pipeline import config, spark
from pipeline.context import Home

profile = config.load("tiny", ["lake.catalog=rest"])
session = spark.session(Home.from_environment(), profile.lake, profile.launch)
print("TABLES", [row.namespace for row in session.sql("SHOW NAMESPACES IN lake").collect()])
for process in psutil.Process().children(recursive=True):
    print("COMMAND", process.cmdline())
"""

WORK = """
from datetime import UTC, date, datetime
from jobs import airflow_home, launchers
from pipeline import config, log
from pipeline.context import Context, Home
from pipeline.errors import ContractError, ResourceLost

log.configure()
home = Home.from_environment()
airflow_home.prepare(home)
conf = {"date": "2026-03-02", "profile": "tiny", "overrides": ["ingest.max_rejected_share=0.0"], "reason": "a gate that no day passes"}
try:
    airflow_home.run_dag("sid_refresh", datetime(2026, 3, 2, tzinfo=UTC), conf)
except ContractError as error:
    print("FAILED", error.found)


def launch(stage, run_id, *overrides):
    ctx = Context(config=config.load("tiny", overrides), home=home, stage=stage, logical_date=date(2026, 3, 2), run_id=run_id, reason="by hand")
    return launchers.launch(ctx, launchers.Request(profile="tiny", overrides=overrides))


for stage in ("plan_night", "ingest"):
    print("DONE", stage, launch(stage, "by_hand")["status"])
try:
    launch("plan_night", "no_catalog", "lake.catalog=jdbc")
except ResourceLost as error:
    print("UNREACHABLE", error)
"""


@pytest.mark.spark
def test_a_catalogs_token_reaches_the_catalog_and_no_command_line(tmp_path: Path) -> None:
    logins: list[str] = []

    class Catalog(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            logins.append(self.headers.get("Authorization", ""))
            body = json.dumps({"namespaces": [["raw"]]} if "namespaces" in self.path else {"defaults": {}, "overrides": {}}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: Any) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Catalog)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SID_")}
    given = kept | {"SID_HOME": str(tmp_path), "SID_CATALOG_URI": f"http://127.0.0.1:{server.server_port}", "SID_CATALOG_TOKEN": TOKEN}
    done = subprocess.run([sys.executable, "-c", SESSION], env=given, capture_output=True, text=True, timeout=300, check=False)
    server.shutdown()
    server.server_close()
    assert "TABLES ['raw']" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    assert set(logins) == {f"Bearer {TOKEN}"}
    assert "spark.sql.catalog.lake.uri" in done.stdout, "the command line of the JVM was looked at"
    assert TOKEN not in done.stdout + done.stderr


@dataclass(frozen=True)
class Aftermath:
    """What two runs left: one whose gate failed under Airflow, one that was published, one without a catalog."""

    home: Home
    alerts: list[dict[str, Any]]
    printed: str


@pytest.fixture(scope="module")
def aftermath(tmp_path_factory: pytest.TempPathFactory) -> Aftermath:
    """Both runs in a process of their own, with secrets in its environment and a webhook that listens."""
    received: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *words: Any) -> None:
            """Silent."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    home = Home(tmp_path_factory.mktemp("secret") / "home")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW", "SID_", "MLFLOW_TRACKING"))}
    given = kept | {
        "SID_HOME": str(home.root),
        "SID_CATALOG_URI": "jdbc:postgresql://127.0.0.1:9/lake",
        "SID_CATALOG_USER": "sid",
        "SID_CATALOG_PASSWORD": PASSWORD,
        "SID_ALERT_WEBHOOK": f"http://127.0.0.1:{server.server_port}/services/{TOKEN}",
    }
    done = subprocess.run([sys.executable, "-c", WORK], env=given, capture_output=True, text=True, timeout=600, check=False)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return Aftermath(home, received, done.stdout + done.stderr)


@pytest.mark.spark
@pytest.mark.airflow
def test_the_runs_went_as_planned(aftermath: Aftermath) -> None:
    assert "FAILED ingest (failed)" in aftermath.printed
    assert "DONE ingest done" in aftermath.printed
    assert "UNREACHABLE the catalog cannot be reached" in aftermath.printed


@pytest.mark.spark
@pytest.mark.airflow
def test_somebody_is_told_which_table_branch_and_expectation_failed_and_what_to_type(aftermath: Aftermath) -> None:
    (alert,) = aftermath.alerts
    assert {name: alert[name] for name in ("event", "dag", "task", "date", "profile", "class")} == {
        "event": "task_failed", "dag": "sid_refresh", "task": "ingest", "date": "2026-03-02", "profile": "tiny", "class": "GateFailed",
    }  # fmt: skip
    assert alert["table"] == "raw.source_file"
    assert alert["audit_branch"].startswith("audit_ingest_20260302_")
    assert any("rejected_share" in expectation and "observed" in expectation for expectation in alert["failed_expectations"])
    assert alert["next_command"] == f"sid inspect {alert['audit_branch']} --profile tiny --set ingest.max_rejected_share=0.0"
    assert any("from ingest.max_rejected_share" in expectation for expectation in alert["failed_expectations"]), "the setting to change is named"


@pytest.mark.spark
@pytest.mark.airflow
@pytest.mark.parametrize("secret", [PASSWORD, TOKEN])
def test_a_secret_is_in_no_file_of_the_home_and_in_nothing_printed(aftermath: Aftermath, secret: str) -> None:
    files = [path for path in aftermath.home.root.rglob("*") if path.is_file()]
    kinds = {path.suffix for path in files}
    assert {".json", ".db", ".parquet", ".avro"} <= kinds, "documents, databases, rows and manifests were searched"
    assert [str(path) for path in files if secret.encode() in path.read_bytes()] == []
    assert secret not in aftermath.printed
    assert secret not in json.dumps(aftermath.alerts)


@pytest.mark.spark
@pytest.mark.airflow
def test_the_search_would_have_found_what_was_there(aftermath: Aftermath) -> None:
    """The reason of the published run lies in documents, in a snapshot and in MLflow: the same search finds it in each."""
    found = {path.suffix for path in aftermath.home.root.rglob("*") if path.is_file() and b"by hand" in path.read_bytes()}
    assert {".json", ".db"} <= found
    assert any("metadata" in path.parts for path in aftermath.home.folder("lake").rglob("*.json") if b"by hand" in path.read_bytes())


# ---------------------------------------------------------------- hostile values


@pytest.mark.parametrize("text", NASTY)
def test_a_name_that_is_no_name_never_reaches_sql(text: str) -> None:
    for check in (lakehouse._checked, lakehouse._checked_reference):
        with pytest.raises(ConfigError):
            check(text)


@pytest.mark.parametrize("text", NASTY)
def test_a_runs_name_cannot_leave_the_staging_folder(text: str, tmp_path: Path) -> None:
    folder = Home(tmp_path / "home").run_folder(text)
    assert folder.resolve().parent == (tmp_path / "home" / "staging").resolve()
    assert folder.name not in ("", ".", "..")


@pytest.mark.parametrize("text", NASTY)
def test_branches_are_made_of_letters_digits_and_underscores_whatever_the_run_is_called(text: str, tmp_path: Path) -> None:
    ctx = Context(config=config.load("tiny"), home=Home(tmp_path), stage="ingest", logical_date=date(2026, 3, 2), run_id=text)
    assert lakehouse.REFERENCE.fullmatch(ctx.branch)


@pytest.mark.parametrize("text", [*NASTY, "../../../pipeline/profiles/tiny", "sub/tiny", "/etc/passwd"])
def test_a_profile_is_one_of_ours_or_a_toml_file(text: str) -> None:
    with pytest.raises(ConfigError):
        config.load(text)


@pytest.mark.parametrize("text", NASTY)
def test_a_hostile_override_is_refused_or_stays_a_string(text: str) -> None:
    try:
        loaded = config.load("tiny", (f"source.path={text}",))
    except ConfigError:
        return
    assert loaded.source.path in (text, text.strip())


@pytest.mark.parametrize("name", [
    "password", "s3.secret-access-key", "token", "jdbc.password", "credential", "s3.access-key-id", "header.Authorization", "adls.auth.shared-key.account.key",
    "adls.account-key", "header.X-Api-Key", "adls.sas.account", "client.cookie",
])  # fmt: skip
def test_a_secret_has_no_place_in_a_profile(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load("tiny", (f'lake.properties={{"{name}"="{PASSWORD}"}}',))
    assert PASSWORD not in str(caught.value)


def test_properties_that_are_no_secrets_have_one() -> None:
    plain = {
        "io-impl": "org.apache.iceberg.aws.s3.S3FileIO",
        "header.X-Iceberg-Access-Delegation": "vended-credentials",
        "s3.endpoint": "http://127.0.0.1:9",
        "client.region": "x",
    }
    assert config.Lake(properties=plain).properties == plain


@pytest.mark.parametrize("text", ["/etc/passwd", "../{date}.csv", "a/../../{date}.csv", "{date}/../../../x"])
def test_a_pattern_cannot_leave_the_data_folder(text: str, tmp_path: Path) -> None:
    from pipeline.datasets import dataset

    (tmp_path / "data").mkdir()
    sets = ("source.dataset=folder", f"source.path={tmp_path / 'data'}", f"source.events_pattern={text}")
    with pytest.raises(SidError):
        dataset("folder").prepare(config.load("tiny", sets).source, tmp_path, 0)


@pytest.mark.parametrize("text", NASTY_WORDS)
def test_words_of_the_command_line_are_refused_or_inert(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from typer.main import get_command

    from jobs import cli

    monkeypatch.setenv("SID_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SID_PROFILE", raising=False)
    tiny = ["--profile", "tiny"]
    commands = [
        ["run", text, "--date", "2026-03-02"],
        ["run", "refresh", "--date", text],
        ["show", "1", "--profile", text, "--release", text],
        ["rollback", "--to", text, "--reason", "why", "--dry-run", *tiny],
        ["pin", text, "--by", text, *tiny],
        ["run", "train_retriever", "--date", "2026-03-02", "--param", f"release={text or '..'}", *tiny],
    ]
    for words in commands:
        with pytest.raises(SidError):
            get_command(cli.app).main(args=words, prog_name="sid", standalone_mode=False)
    assert {path.name for path in tmp_path.rglob("gone")} == set()
    assert {path.name for path in tmp_path.iterdir()} <= {"home"}


# ---------------------------------------------------------------- the source

CODE = sorted(path for folder in ("pipeline", "jobs", "dags") for path in (ROOT / folder).rglob("*.py"))
RUNS_DATA = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.execvp", "pickle.load", "pickle.loads", "torch.load", "torch.jit.load",
    "joblib.load", "yaml.load", "yaml.unsafe_load", "marshal.loads", "shelve.open", "dill.load", "cloudpickle.load", "pd.read_pickle", "pandas.read_pickle",
    "np.load", "numpy.load", "subprocess.getoutput", "subprocess.getstatusoutput", "tempfile.mktemp",
}  # fmt: skip
MODULES = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "marshal", "shelve", "pty", "telnetlib"}


def dangers(tree: ast.AST) -> list[str]:
    """What in a syntax tree runs code from data or gives a text to a shell."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            words = {word.arg: ast.unparse(word.value) for word in node.keywords}
            plain_data = words.get("allow_pickle") == "False" or words.get("weights_only") == "True"
            found += [name] if name in RUNS_DATA and not plain_data else []
            found += [f"shell in {name}"] if words.get("shell", "False") != "False" else []
            found += [f"weights in {name}"] if words.get("weights_only") == "False" else []
            found += [f"allow_pickle in {name}"] if words.get("allow_pickle") == "True" else []
            found += [f"verify in {name}"] if words.get("verify") == "False" else []
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [name for name in names if name.partition(".")[0] in MODULES]
    return found


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_in_the_source_runs_code_from_data(path: Path) -> None:
    assert dangers(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from joblib import load", "torch.load(p)", "eval(x)", "subprocess.run(c, shell=True)", "np.load(p)", "np.load(p, allow_pickle=True)",
     "torch.load(p, weights_only=False)", "os.system(c)", "requests.get(u, verify=False)"],
)  # fmt: skip
def test_the_search_for_dangers_finds_them(line: str) -> None:
    assert dangers(ast.parse(line))
    assert not dangers(ast.parse("np.load(p, allow_pickle=False); subprocess.run(['a', b]); json.loads(x)"))


def test_pictures_and_texts_have_limits() -> None:
    content, ingest = config.ContentEmbedding(), config.Ingest()
    assert content.max_pixels <= 100_000_000
    assert ingest.max_image_bytes <= 100_000_000
    assert content.max_tokens <= 512
