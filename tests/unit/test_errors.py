"""Errors: the four facts, the way over a process boundary, the exit codes."""

from __future__ import annotations

import json

import pytest

from pipeline import errors
from pipeline.errors import ConfigError, ContractError, GateFailed, PublishConflict, SidError, UpstreamMissing, VersionMismatch, from_fields

KINDS = (ConfigError, ContractError, GateFailed, VersionMismatch, PublishConflict, UpstreamMissing)


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
    assert {kind.__name__ for kind in KINDS if example(kind).exit_code == 75} == {"PublishConflict", "UpstreamMissing"}
    assert {kind.__name__ for kind in KINDS if example(kind).exit_code == 64} == {"ConfigError", "ContractError", "GateFailed", "VersionMismatch"}
    assert all(example(kind).retry == (example(kind).exit_code == 75) for kind in KINDS)


@pytest.mark.parametrize("fields", [{}, {"class": "Nonsense", "headline": "x"}, {"class": "SystemExit"}])
def test_an_unknown_class_is_not_retried_and_makes_no_other_object(fields: dict[str, str]) -> None:
    error = from_fields(fields)
    assert type(error) is SidError
    assert error.exit_code == 64
    assert error.headline
