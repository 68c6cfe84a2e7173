"""Secrets of the environment are blotted out of texts, errors and log lines; innocent words are not."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from pipeline import redact
from pipeline.config import Config
from pipeline.context import Context, Home
from pipeline.errors import UpstreamMissing

CANARY = "c4n4ry/with+odd=chars&more"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SID_CATALOG_PASSWORD", CANARY)


@pytest.mark.parametrize("form", [CANARY, "c4n4ry%2Fwith%2Bodd%3Dchars%26more"])
def test_a_secret_is_blotted_out_in_every_form(form: str) -> None:
    assert redact.scrub(f"before {form} after") == "before *** after"


def test_a_secret_is_blotted_out_of_a_json_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """An alert is scrubbed as the text that is sent: there quotes, backslashes and umlauts look otherwise."""
    monkeypatch.setenv("SID_CATALOG_PASSWORD", 'c4n"4ry\\w\u00f6rd')
    assert redact.scrub(json.dumps({"found": 'login c4n"4ry\\w\u00f6rd'})) == '{"found": "login ***"}'


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("postgresql://sid:hunter@db:5432/x", "postgresql://sid:***@db:5432/x"),
        ("jdbc:postgresql://db/x?user=sid&password=hunter&ssl=true", "jdbc:postgresql://db/x?user=sid&password=***&ssl=true"),
        ("https://host:8080/a@b", "https://host:8080/a@b"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("password reset at 10:30", "password reset at 10:30"),
    ],
)
def test_only_the_password_of_an_address_goes(text: str, clean: str) -> None:
    assert redact.scrub(text) == clean
    assert redact.holds_secret(text) is (text != clean)


def test_the_password_inside_another_variables_address_is_a_secret_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://sid:hunter%2F22@db/x")
    assert redact.scrub("failed with hunter/22") == "failed with ***"


def test_the_reason_of_a_run_is_clean_before_it_reaches_a_snapshot_or_mlflow(tmp_path: Path) -> None:
    ctx = Context(config=Config(), home=Home(tmp_path), stage="ingest", logical_date=date(2026, 3, 1), run_id="r", reason=f"login {CANARY} was changed")
    assert ctx.reason == "login *** was changed"
    assert replace(ctx, reason=CANARY).reason == "***"


@pytest.mark.parametrize("name", ["SID_UP_PASSWORD_FILE", "AWS_ACCESS_KEY_ID", "TOKENIZERS_PARALLELISM", "HOME"])
def test_places_and_names_are_no_secrets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "something-plain")
    assert redact.scrub("something-plain") == "something-plain"


def test_errors_and_log_lines_are_clean(caplog: pytest.LogCaptureFixture) -> None:
    error = UpstreamMissing(f"a {CANARY}", expected=CANARY, found=CANARY, where=CANARY, next_command=CANARY)
    assert CANARY not in str(error) + str(error.fields())
    before = logging.getLogRecordFactory()
    try:
        redact.clean_records()
        redact.clean_records()
        with caplog.at_level(logging.INFO):
            logging.getLogger("pipeline.x").info("to %s", CANARY)
            logging.getLogger("elsewhere").info("count %d", 3)
        assert logging.makeLogRecord({"msg": "copied"}).getMessage() == "copied", "structlog copies records"
    finally:
        logging.setLogRecordFactory(before)
    assert [record.getMessage() for record in caplog.records] == ["to ***", "count 3"]
