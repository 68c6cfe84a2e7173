"""Errors: the four facts, the way over a process boundary, the exit codes."""

from __future__ import annotations

import errno
import json
import re

import pytest

from pipeline import errors
from pipeline.context import ROOT
from pipeline.errors import (
    ConfigError,
    ContractError,
    GateFailed,
    PublishConflict,
    ResourceLost,
    SidError,
    StageFailed,
    UpstreamMissing,
    VersionMismatch,
    for_profile,
    from_fields,
    unforeseen,
)

KINDS = (ConfigError, ContractError, GateFailed, VersionMismatch, StageFailed, PublishConflict, ResourceLost, UpstreamMissing)


def example(kind: type[SidError]) -> SidError:
    return kind("three rows lack a date", expected="a date", found="null", where="raw.interaction", next_command="sid releases")


def test_the_tree_is_complete() -> None:
    assert {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SidError)} == {SidError, *KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_has_the_headline_first_and_one_fact_a_line(kind: type[SidError]) -> None:
    lines = str(example(kind)).splitlines()
    assert lines[0] == "three rows lack a date"
    assert [line.split(maxsplit=1) for line in lines[1:]] == [
        ["expected", "a date"],
        ["found", "null"],
        ["where", "raw.interaction"],
        ["next", "sid releases"],
    ]


def test_a_fact_that_is_not_known_makes_no_line() -> None:
    assert str(ConfigError("no", where="here")).splitlines() == ["no", "  where     here"]


@pytest.mark.parametrize("kind", KINDS)
def test_fields_survive_json(kind: type[SidError]) -> None:
    before = example(kind)
    after = from_fields(json.loads(json.dumps(before.fields())))
    assert type(after) is kind
    assert str(after) == str(before)
    assert after.fields() == before.fields()
    assert (after.retry, after.exit_code) == (before.retry, before.exit_code)


def test_exit_codes_say_whether_a_retry_helps() -> None:
    assert {kind.__name__ for kind in KINDS if example(kind).exit_code == 75} == {"PublishConflict", "ResourceLost", "UpstreamMissing"}
    assert {kind.__name__ for kind in KINDS if example(kind).exit_code == 64} == {
        "ConfigError",
        "ContractError",
        "GateFailed",
        "VersionMismatch",
        "StageFailed",
    }
    assert all(example(kind).retry == (example(kind).exit_code == 75) for kind in KINDS)


@pytest.mark.parametrize("fields", [{}, {"class": "Nonsense", "headline": "x"}, {"class": "SystemExit"}])
def test_an_unknown_class_is_not_retried_and_makes_no_other_object(fields: dict[str, str]) -> None:
    error = from_fields(fields)
    assert type(error) is SidError
    assert error.exit_code == 64
    assert error.headline


class Speechless(Exception):
    """Like an exception of Java whose JVM has gone: asking for its text raises another one."""

    def __str__(self) -> str:
        raise ConnectionRefusedError


def caused(error: Exception, by: Exception) -> Exception:
    error.__cause__ = by
    return error


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (ZeroDivisionError("division by zero"), StageFailed, "ZeroDivisionError: division by zero"),
        (OSError(errno.ENOSPC, "No space left on device"), ResourceLost, "OSError: [Errno 28] No space left on device"),
        (FileNotFoundError(errno.ENOENT, "No such file"), StageFailed, "FileNotFoundError: [Errno 2] No such file"),
        (MemoryError(), ResourceLost, "MemoryError"),
        (TimeoutError("read"), ResourceLost, "TimeoutError: read"),
        (RuntimeError("Connection closed by peer [::1]:29500"), ResourceLost, "RuntimeError: Connection closed by peer [::1]:29500"),
        (
            RuntimeError("Job aborted\nExecutorLostFailure (executor 2 exited)"),
            ResourceLost,
            "RuntimeError: Job aborted ... ExecutorLostFailure (executor 2 exited)",
        ),
        (
            RuntimeError("calling o106.append\n: java.io.IOException: No space left on device\n\tat sun.nio"),
            ResourceLost,
            "IOException: No space left on device",
        ),
        (caused(ValueError("cannot read"), ConnectionResetError("peer")), ResourceLost, "ValueError: cannot read"),
        (OSError("AWS Error NETWORK_CONNECTION during HeadObject"), ResourceLost, "OSError: AWS Error NETWORK_CONNECTION during HeadObject"),
        (OSError("AWS Error NO_SUCH_BUCKET during HeadObject"), StageFailed, "OSError: AWS Error NO_SUCH_BUCKET during HeadObject"),
        (RuntimeError("calling o1.load\n: java.net.UnknownHostException: db"), ResourceLost, "java.net.UnknownHostException: db"),
        (Speechless(), StageFailed, "test_errors.Speechless: <exception str() failed>"),
    ],
)
def test_a_foreign_exception_says_what_it_is_and_is_retried_where_another_try_may_help(error: Exception, kind: type[SidError], told: str) -> None:
    known = unforeseen(error, where="ingest", next_command="sid run ingest --date D")
    assert type(known) is kind
    assert known.headline == f"the stage was ended by {type(error).__name__}"
    assert known.found.endswith(told.removeprefix("test_errors."))
    assert (known.where, known.next_command) == ("ingest", "sid run ingest --date D")


def test_a_secret_in_a_foreign_exception_is_blotted_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SID_CATALOG_PASSWORD", "c4n4ry-password")
    assert "c4n4ry" not in str(unforeseen(ValueError("login c4n4ry-password"), where="ingest", next_command=""))


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("sid run refresh --date D", "sid run refresh --date D --profile nightly"),
        (
            "sid run ingest --date D1; sid run ingest --date D2  (or close days)",
            "sid run ingest --date D1 --profile nightly; sid run ingest --date D2 --profile nightly  (or close days)",
        ),
        ("sid run consumers --date D, to train", "sid run consumers --date D --profile nightly, to train"),
        ("sid inspect audit_x_20260301_abc", "sid inspect audit_x_20260301_abc --profile nightly"),
        ("sid run refresh --date D --profile tiny", "sid run refresh --date D --profile tiny"),
        ("sid stages", "sid stages"),
        ("rm -r folder", "rm -r folder"),
        ("see the task's log", "see the task's log"),
        ("", ""),
    ],
)
def test_the_next_command_is_one_for_the_profile(command: str, shown: str) -> None:
    assert for_profile(command, "nightly") == shown
    assert for_profile(command, "demo") == for_profile(command, "") == command


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("sid run ingest --date D  (or close days)", "sid run ingest --date D --set 'source.path=a b' --set plan_night.policy=warm  (or close days)"),
        ("sid run refresh --date D --set plan_night.policy=cold", "sid run refresh --date D --set plan_night.policy=cold --set 'source.path=a b'"),
        ("sid inspect audit_x", "sid inspect audit_x --set 'source.path=a b' --set plan_night.policy=warm"),
        ("sid stages", "sid stages"),
        ("", ""),
    ],
)
def test_the_next_command_goes_on_with_the_settings_that_met_the_error_but_for_those_it_changes(command: str, shown: str) -> None:
    overrides = ("source.path=a b", "plan_night.policy=warm")
    assert for_profile(command, "demo", overrides) == shown
    assert example(GateFailed).message("tiny", overrides[1:]).splitlines()[-1].endswith("sid releases --profile tiny --set plan_night.policy=warm")


def test_a_message_names_the_profile_and_a_path_with_a_space_is_quoted() -> None:
    assert example(GateFailed).message("my nights.toml").splitlines()[-1].endswith("sid releases --profile 'my nights.toml'")
    assert str(example(GateFailed)).endswith("sid releases")


def test_no_next_command_names_a_path_without_quotes() -> None:
    sources = [path for folder in ("jobs", "pipeline") for path in (ROOT / folder).rglob("*.py")]
    assert not [path.name for path in sources if re.search(r'next_command=f"(?:rm|cat|tail)\b', path.read_text(encoding="utf-8"))]
