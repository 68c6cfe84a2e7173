"""Alerts: what they say, where they may be sent, and that they never add a failure to a failure."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import alerts
from pipeline.context import Home, write_json
from pipeline.errors import ConfigError, GateFailed, UpstreamMissing

RUN = "scheduled__2026-03-01T00:00:00+00:00"
GATE = GateFailed(
    "2 expectation(s) on raw.source_file do not hold; main is untouched",
    expected="a <= 1; b >= 2",
    found="a <= 1 (observed 3); b >= 2 (observed 0)",
    where="raw.source_file, branch audit_ingest_20260301_1a2b3c4d (nightly)",
    next_command="sid inspect audit_ingest_20260301_1a2b3c4d",
)


class Receiver:
    """A webhook on loopback that keeps what it was sent and answers as told."""

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []
        self.status, self.headers = 200, {}
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                receiver.received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(receiver.status)
                for name, value in receiver.headers.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *words: Any) -> None:
                """Silent."""

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/hook/t0ken-of-the-receiver"


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    found = Receiver()
    thread = threading.Thread(target=found.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    monkeypatch.setenv(alerts.WEBHOOK, found.address)
    yield found
    found.server.shutdown()
    found.server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("SID_HOME", str(tmp_path))
    monkeypatch.delenv(alerts.WEBHOOK, raising=False)
    return Home(tmp_path)


def context(**changes: Any) -> dict[str, Any]:
    task = SimpleNamespace(dag_id="sid_refresh", task_id="ingest", try_number=2)
    return {
        "ti": task, "run_id": RUN, "params": {"profile": "tiny", "date": None}, "data_interval_start": datetime(2026, 3, 1, tzinfo=UTC),
        "exception": ValueError("first\nsecond"), **changes,
    }  # fmt: skip


def test_a_failed_gate_says_table_branch_expectations_and_what_to_type(home: Home) -> None:
    write_json(home.run_folder(f"{RUN}__sid_refresh") / "ingest.json", {"status": "failed", "error": GATE.fields()})
    assert alerts.failure(context()) == {
        "event": "task_failed", "dag": "sid_refresh", "task": "ingest", "run_id": RUN, "try": 2, "date": "2026-03-01", "profile": "tiny",
        "table": "raw.source_file", "audit_branch": "audit_ingest_20260301_1a2b3c4d",
        "failed_expectations": ["a <= 1 (observed 3)", "b >= 2 (observed 0)"], **GATE.fields(), "next_command": f"{GATE.next_command} --profile tiny",
    }  # fmt: skip


def test_the_command_to_type_goes_on_with_the_overrides_of_the_run(home: Home) -> None:
    write_json(home.run_folder(f"{RUN}__sid_refresh") / "ingest.json", {"status": "failed", "error": GATE.fields()})
    found = alerts.failure(context(params={"profile": "tiny", "overrides": ["source.path=/data"]}))
    assert found["next_command"] == f"{GATE.next_command} --profile tiny --set source.path=/data"


def test_without_a_document_the_exception_speaks(home: Home) -> None:
    found = alerts.failure(context())
    assert (found["class"], found["headline"], found["failed_expectations"]) == ("ValueError", "first", [])
    behind = RuntimeError("wrapped")
    behind.__cause__ = UpstreamMissing("no file", next_command="sid run ingest")
    found = alerts.failure(context(exception=behind))
    assert (found["class"], found["headline"], found["next_command"]) == ("UpstreamMissing", "no file", "sid run ingest --profile tiny")
    (home.run_folder(f"{RUN}__sid_refresh") / "ingest.json").write_text("{")
    assert alerts.failure(context())["headline"] == "a document of the run is damaged"
    assert alerts.failure(context(exception=None, ti=SimpleNamespace(dag_id="d", task_id="t", try_number=1)))["headline"] == "the process ended"


def test_a_try_that_ends_before_its_stage_begins_does_not_tell_the_story_of_the_one_before(home: Home) -> None:
    write_json(home.run_folder(f"{RUN}__sid_refresh") / "ingest.json", {"status": "failed", "error": GATE.fields()})
    refused = RuntimeError("wrapped")
    refused.__cause__ = ConfigError("unknown key 'max_rejected' in section [ingest]")
    found = alerts.failure(context(exception=refused))
    assert (found["class"], found["headline"]) == ("ConfigError", "unknown key 'max_rejected' in section [ingest]")
    assert (found["table"], found["failed_expectations"]) == ("", [])


def test_the_webhook_gets_the_payload_and_the_log_gets_no_token(receiver: Receiver, caplog: pytest.LogCaptureFixture, home: Home) -> None:
    write_json(home.run_folder(f"{RUN}__sid_refresh") / "ingest.json", {"status": "failed", "error": GATE.fields()})
    alerts.on_failure(context(params={"date": "2026-02-27"}))
    assert receiver.received[0]["audit_branch"] == "audit_ingest_20260301_1a2b3c4d"
    assert receiver.received[0]["date"] == "2026-02-27"
    assert "audit_ingest_20260301_1a2b3c4d" in caplog.text
    assert "t0ken" not in caplog.text


def test_secrets_are_blotted_out_of_the_payload(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SID_CATALOG_PASSWORD", "c4n4ry-word")
    assert alerts.deliver({"headline": "password c4n4ry-word was wrong"})
    assert receiver.received == [{"headline": "password *** was wrong"}]


@pytest.mark.parametrize("status", [302, 400, 500])
def test_a_receiver_that_refuses_or_redirects_is_only_logged(receiver: Receiver, status: int, caplog: pytest.LogCaptureFixture) -> None:
    receiver.status, receiver.headers = status, {"Location": receiver.address}
    assert alerts.deliver({"a": 1}) is False
    assert len(receiver.received) == 1, "a redirection is not followed"
    assert "alert not sent" in caplog.text


def test_a_home_on_a_full_disk_is_still_told_about(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuses(path: Path, mode: int = 0o777) -> None:
        raise full

    monkeypatch.setattr(os, "mkdir", refuses)
    alerts.on_failure(context(exception=full))
    assert [(alert["task"], alert["headline"]) for alert in receiver.received] == [("ingest", "[Errno 28] No space left on device")]


def test_nobody_listening_is_only_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(alerts.WEBHOOK, "http://127.0.0.1:9/secret-hook")
    assert alerts.deliver({"a": 1}) is False
    assert "secret-hook" not in caplog.text


@pytest.mark.parametrize("address", ["http://example.org/t0ken", "ftp://127.0.0.1/t0ken", "file:///etc/t0ken", "http://127.0.0.1.example.org/t0ken", "t0ken"])
def test_an_unsafe_address_is_refused_and_not_repeated(address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(alerts.WEBHOOK, address)
    with pytest.raises(ConfigError) as caught:
        alerts.webhook()
    assert "t0ken" not in str(caught.value)
    assert alerts.deliver({"a": 1}) is False
    assert "t0ken" not in caplog.text


@pytest.mark.parametrize("address", ["https://example.org/x", "http://127.0.0.1:8/x", "http://[::1]:8/x", "http://localhost/x", ""])
def test_https_and_loopback_are_allowed(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(alerts.WEBHOOK, address)
    assert alerts.webhook() == address


def test_a_late_night_names_its_run_and_its_deadline(receiver: Receiver) -> None:
    run = {"dag_id": "sid_refresh", "dag_run_id": RUN, "logical_date": "2026-03-01T00:00:00Z", "state": "running"}
    asyncio.run(alerts.on_missed_deadline(context={"dag_run": run, "deadline": {"id": "x", "deadline_time": "2026-03-02T06:00:00Z"}}))
    asyncio.run(alerts.on_missed_deadline())
    assert receiver.received[0] == {
        "event": "deadline_missed", "dag": "sid_refresh", "run_id": RUN, "date": "2026-03-01", "state": "running", "deadline": "2026-03-02T06:00:00Z",
        "next_command": f"airflow tasks states-for-dag-run sid_refresh {RUN}",
    }  # fmt: skip
    assert receiver.received[1]["event"] == "deadline_missed"


@pytest.mark.parametrize(("text", "minutes"), [("", 360), ("90", 90)])
def test_the_limit_of_a_night(text: str, minutes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SID_DEADLINE_MINUTES", text)
    assert alerts.night_limit() == timedelta(minutes=minutes)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "soon", "9" * 9])
def test_a_limit_that_is_no_number_of_minutes_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SID_DEADLINE_MINUTES", text)
    with pytest.raises(ConfigError):
        alerts.night_limit()
