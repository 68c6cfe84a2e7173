"""The command line: every command is documented, its examples parse, errors have exit codes, JSON is JSON."""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from jobs import cli, launchers, profiles, views
from jobs.launchers import Request
from pipeline import config
from pipeline.context import Context, Home
from pipeline.errors import ConfigError, ContractError
from pipeline.stages import STAGES, group

COMMANDS: dict[str, click.Command] = get_command(cli.app).commands  # type: ignore[attr-defined]
ACTING = {"run", "demo", "report", "export", "up"}  # all others only look


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home that does not exist yet."""
    monkeypatch.setenv("SID_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SID_PROFILE", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(cli.log, "configure", lambda level=20: None)  # the test process has its own logging
    return tmp_path / "home"


def ended(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit code of `sid <arguments>`, through the real entry point."""
    monkeypatch.setenv("PYTHONWARNINGS", "")
    monkeypatch.setattr("sys.argv", ["sid", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def launched(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> list[Context]:
    """The contexts that `sid <arguments>` would launch."""
    seen: list[Context] = []

    def note(ctx: Context, request: Request) -> dict[str, Any]:
        seen.append(ctx)
        return {"stage": ctx.stage, "status": "done", "seconds": 0.0}

    monkeypatch.setattr(launchers, "launch", note)
    assert ended(arguments, monkeypatch) == 0
    return seen


# ---------------------------------------------------------------- documented


def test_the_commands_are_the_promised_ones() -> None:
    assert set(COMMANDS) == {"run", "releases", "show", "diff", "inspect", "repair", "report", "equations", "stages", "demo"} | {
        "backfill", "rollback", "pin", "maintain", "export", "up", "study",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_command_has_help_for_itself_and_for_every_parameter(name: str) -> None:
    shown = CliRunner().invoke(cli.app, [name, "--help"])
    assert shown.exit_code == 0
    command = COMMANDS[name]
    first = (command.help or "").splitlines()[0]
    assert first.endswith(".")
    assert first in " ".join(shown.output.split()) or first[:40] in shown.output
    for parameter in command.params:
        if parameter.name != "help":
            assert (getattr(parameter, "help", None) or "").strip(), f"sid {name}: {parameter.name} has no help"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_example_of_a_command_is_a_command_line_that_parses(name: str) -> None:
    words = shlex.split(COMMANDS[name].epilog or "")
    assert words[:2] == ["sid", name]
    context = COMMANDS[name].make_context(name, words[2:])
    assert not context.args, "nothing is left over"


def test_a_command_that_looks_has_json_and_one_that_changes_the_lake_a_dry_run() -> None:
    options = {name: {option for parameter in command.params for option in parameter.opts} for name, command in COMMANDS.items()}
    assert {name for name in COMMANDS if "--json" not in options[name]} == ACTING
    assert {name for name in COMMANDS if "--dry-run" in options[name]} == {"run", "repair", "backfill", "rollback", "maintain", "study"}
    assert "--reason" in options["run"]


def test_it_says_its_version() -> None:
    found = CliRunner().invoke(cli.app, ["--version"])
    assert (found.exit_code, found.output.strip()) == (0, f"sidmill {metadata.version('sidmill')}")


def test_without_a_command_it_says_what_there_is() -> None:
    shown = CliRunner().invoke(cli.app, [])
    assert all(name in shown.output for name in COMMANDS)


# ---------------------------------------------------------------- looking


def test_stages_as_json_are_the_list_of_stages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(["stages", "--json"], monkeypatch) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["stage"] for row in rows] == [stage.name for stage in STAGES]
    assert {row["stage"]: row["after"] for row in rows}["publish_release"] == "assign_sid"


def test_releases_of_an_empty_lake_are_an_empty_list(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(["releases", "--json", "--profile", "tiny"], monkeypatch) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert ended(["releases", "--profile", "tiny"], monkeypatch) == 0
    assert "nothing" in capsys.readouterr().out


def test_equations_as_json_name_source_and_function(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(["equations", "--json"], monkeypatch) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows
    assert all(row["source"] and row["function"].startswith("pipeline/") for row in rows)
    assert {"pipeline/tokenizers/letter.py", "pipeline/encoders/alpharec.py"} <= {row["function"] for row in rows}, "a whole module may have one source"
    assert not any(word in row["differs"] + row["source"] for row in rows for word in ("Args:", "Tensor suffixes"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["show", "50", "--json"], ["diff", "d20260301", "d20260302", "--json"], ["report", "d20260301"], ["export", "d20260301"],
        ["inspect", "audit_ingest_20260301_1a2b3c4d"],
    ],
)  # fmt: skip
def test_a_release_that_is_not_there_may_come_later(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended([*arguments, "--profile", "tiny"], monkeypatch) == 75
    shown = capsys.readouterr()
    assert shown.out == "", "a complaint never goes where JSON is expected"
    assert "UpstreamMissing" in shown.err
    assert "next" in shown.err


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "no_such_stage", "--date", "2026-03-01"], ["ConfigError", "no_such_stage", "item_popularity", "sid stages"]),
        (["run", "refresh", "--date", "2026-13-01"], ["ContractError", "YYYY-MM-DD", "2026-13-01", "--date"]),
        (["run", "refresh", "--date", "yesterday"], ["ContractError", "YYYY-MM-DD", "yesterday"]),
        (["run", "refresh", "--date", "20260301"], ["ContractError", "YYYY-MM-DD", "20260301"]),
        (["run", "refresh", "--date", "2026-03-01", "--profile", "nope"], ["ConfigError", "nope", "tiny"]),
        (["run", "refresh", "--date", "2026-03-01", "--set", "ingest.max=1"], ["ConfigError", "'max'", "[ingest]", "max_rejected_share"]),
        (["run", "refresh", "--date", "2026-03-01", "--set", "ingest"], ["ConfigError", "section.key=value"]),
        (["run", "refresh", "--date", "2026-03-01", "--param", "release"], ["ConfigError", "name=value"]),
        (["demo", "--dataset", "nope"], ["ConfigError", "nope", "movielens"]),
    ],
)
def test_a_mistake_is_explained_and_not_retried(
    arguments: list[str], said: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    assert ended(arguments, monkeypatch) == 64
    shown = capsys.readouterr().err
    for words in said:
        assert words in shown
    assert not home.exists(), "a mistake leaves nothing behind"


def test_a_mistyped_profile_suggests_no_run_with_another_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It would load the demo's films into whatever lake the home has."""
    assert ended(["rollback", "--to", "d20260301", "--reason", "why", "--profile", "nigthly"], monkeypatch) == 64
    said = capsys.readouterr().err
    assert "nightly" in said
    assert "sid run" not in said


def test_a_missing_option_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ended(["run", "refresh"], monkeypatch) == 2
    assert ended(["no_such_command"], monkeypatch) == 2


def test_a_defect_of_our_own_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(ctx: Context, request: Request) -> dict[str, Any]:
        raise ZeroDivisionError

    monkeypatch.setattr(launchers, "launch", broken)
    monkeypatch.setattr("sys.argv", ["sid", "run", "maintain", "--date", "2026-03-01"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.parametrize("words", [["releases", "--json"], ["run", "ingest", "--date", "2026-03-01", "--reason", "a, b"]])
def test_a_full_disk_outside_a_stage_is_told_and_may_be_retried(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    def full(path: Path, mode: int = 0o777) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setenv("SID_PROFILE", "tiny")
    monkeypatch.setattr(os, "mkdir", full)
    assert ended(words, monkeypatch) == 75
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Traceback" not in shown.err
    lines = shown.err.splitlines()
    assert lines[0] == "ResourceLost the command was ended by OSError"
    assert f"[Errno 28] No space left on device: '{home}" in lines[2]
    assert lines[3:] == [f"  where     {home}", f"  next      {shlex.join(['sid', *words])}"]


@pytest.mark.parametrize(("words", "full", "code"), [(["stages"], "stdout", 75), (["run", "nothing", "--date", "2026-03-01"], "stderr", 64)])
def test_the_exit_code_tells_even_when_its_words_have_no_room(words: list[str], full: str, code: int) -> None:
    with Path("/dev/full").open("w") as device:
        done = subprocess.run([sys.executable, "-m", "jobs.cli", *words], check=False, stdin=subprocess.DEVNULL, **{full: device})  # type: ignore[call-overload]
    assert done.returncode == code


# ---------------------------------------------------------------- running


@pytest.mark.parametrize("name", ["refresh", "consumers", "maintenance"])
def test_a_group_runs_its_stages_in_order_as_one_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = launched(monkeypatch, ["run", name, "--date", "2026-03-01", "-p", "tiny", "--reason", "because", "--param", "release=d20260301"])
    assert [ctx.stage for ctx in seen] == [stage.name for stage in group(name)]
    assert {(ctx.run_id, ctx.reason, str(ctx.logical_date), ctx.param("release")) for ctx in seen} == {
        ("cli__tiny__2026-03-01", "because", "2026-03-01", "d20260301")
    }


def test_ingest_by_hand_plans_anew_and_a_later_stage_only_without_a_manifest(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    def stages(what: str) -> list[str]:
        return [ctx.stage for ctx in launched(monkeypatch, ["run", what, "--date", "2026-03-01", "-p", "tiny"])]

    assert stages("item_popularity") == ["plan_night", "item_popularity"]
    manifest = home / "staging" / "cli__tiny__2026-03-01" / "plan_night.json"
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text("{}")
    assert stages("item_popularity") == ["item_popularity"]
    assert stages("ingest") == ["plan_night", "ingest"]
    assert stages("plan_night") == ["plan_night"]
    assert stages("train_ranker") == ["train_ranker"]


@pytest.mark.parametrize("what", ["refresh", "ingest", "train_ranker"])
def test_a_dry_run_prints_the_plan_and_touches_nothing(what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path) -> None:
    assert launched(monkeypatch, ["run", what, "--date", "2026-03-01", "-p", "tiny", "--dry-run"]) == []
    shown = capsys.readouterr().out
    for stage in group("refresh") if what == "refresh" else [stage for stage in STAGES if stage.name == what]:
        assert stage.name in shown
    assert not home.exists()


def test_the_first_stage_that_fails_ends_the_run_with_its_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []

    def fails(ctx: Context, request: Request) -> dict[str, Any]:
        seen.append(ctx.stage)
        if ctx.stage == "item_popularity":
            raise ContractError("no such day", expected="a", found="b", where="c", next_command="sid releases")
        return {"stage": ctx.stage, "status": "done", "seconds": 0.0}

    monkeypatch.setattr(launchers, "launch", fails)
    assert ended(["run", "refresh", "--date", "2026-03-01", "-p", "tiny"], monkeypatch) == 64
    assert seen == ["plan_night", "ingest", "item_popularity"]
    assert "no such day" in capsys.readouterr().err


# ---------------------------------------------------------------- the profile that made the lake


def made_with(home: Path, profile: str) -> None:
    home.mkdir(parents=True, exist_ok=True)
    profiles.remember(Home(home), profile)


def config_of(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """Profile that `sid run train_ranker` runs with."""
    (ctx,) = launched(monkeypatch, ["run", "train_ranker", "--date", "2026-03-01", *arguments])
    return ctx.config.name


def test_a_command_without_a_profile_takes_the_one_that_made_the_lake_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    assert config_of(monkeypatch) == "demo"
    assert "profile" not in capsys.readouterr().err, "nothing is known yet"
    made_with(home, "tiny")
    assert config_of(monkeypatch) == "tiny"
    assert f"profile tiny, as {home / 'profile.json'} says" in capsys.readouterr().err
    assert config_of(monkeypatch, "--profile", "shop") == "shop"
    monkeypatch.setenv("SID_PROFILE", "shop")
    assert config_of(monkeypatch) == "shop"


@pytest.mark.parametrize("content", ["", "{", "{}", '{"profile": ""}', '{"profile": 3}'])
def test_a_home_that_does_not_name_its_profile_is_not_swept_by_the_default_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path, content: str
) -> None:
    made_with(home, "tiny")
    (home / "profile.json").write_text(content)
    assert ended(["maintain"], monkeypatch) == 64
    said = " ".join(capsys.readouterr().err.split())
    assert "rm " not in said
    assert """next echo '{"profile": "NAME"}' > """ in said


def test_the_first_ingest_is_remembered_and_a_later_one_changes_nothing(monkeypatch: pytest.MonkeyPatch, home: Path, tmp_path: Path) -> None:
    from jobs import runner

    monkeypatch.setattr(runner, "run_stage", lambda ctx: {"stage": ctx.stage, "status": "done", "seconds": 0.0})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text((config.PROFILES / "tiny.toml").read_text(encoding="utf-8"), encoding="utf-8")
    assert ended(["run", "plan_night", "--date", "2026-03-01", "-p", "mine.toml"], monkeypatch) == 0
    assert profiles.remembered(Home(home)) == "", "a plan of a mistyped profile has loaded nothing"
    for profile in ("mine.toml", "tiny"):
        assert ended(["run", "ingest", "--date", "2026-03-01", "-p", profile], monkeypatch) == 0
        assert profiles.remembered(Home(home)) == str(tmp_path / "mine.toml")
    assert config_of(monkeypatch) == "mine"


@pytest.mark.parametrize(
    "arguments",
    [
        ["maintain"],
        ["maintain", "--dry-run"],
        ["run", "maintenance", "--date", "2026-03-01"],
        ["rollback", "--to", "d20260301", "--reason", "why"],
        ["pin", "d20260301", "--by", "me"],
        ["backfill", "--start", "2026-03-01", "--end", "2026-03-01", "--reason", "why"],
    ],
)
def test_what_cannot_be_undone_is_refused_with_a_profile_of_the_environment_that_is_not_the_lakes(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    made_with(home, "nightly")
    monkeypatch.setenv("SID_PROFILE", "tiny")
    assert ended(arguments, monkeypatch) == 64
    shown = capsys.readouterr().err
    assert "ConfigError" in shown
    assert all(words in shown for words in ("nightly", "tiny", "SID_PROFILE", "profile.json"))
    assert launched(monkeypatch, ["run", "maintenance", "--date", "2026-03-01", "--profile", "tiny"]), "typed, it is meant"
    monkeypatch.setenv("SID_PROFILE", "nightly")
    assert launched(monkeypatch, ["run", "maintenance", "--date", "2026-03-01"])


def test_the_next_command_of_an_error_carries_the_profile_and_the_overrides(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(["show", "50", "--profile", "tiny"], monkeypatch) == 75
    assert "next      sid releases --profile tiny\n" in capsys.readouterr().err
    assert ended(["show", "50", "--profile", "tiny", "--set", "seed=3"], monkeypatch) == 75
    assert "next      sid releases --profile tiny --set seed=3\n" in capsys.readouterr().err

    def fails(ctx: Context, request: Request) -> dict[str, Any]:
        raise ContractError("no such day", next_command="sid run ingest --date 2026-03-01")

    with monkeypatch.context() as patched:
        patched.setattr(launchers, "launch", fails)
        assert ended(["run", "ingest", "--date", "2026-03-01", "-p", "tiny", "-s", "source.path=/data"], patched) == 64
    assert "next      sid run ingest --date 2026-03-01 --profile tiny --set source.path=/data\n" in capsys.readouterr().err
    assert ended(["show", "50"], monkeypatch) == 75
    assert "--profile" not in capsys.readouterr().err


def test_a_stage_after_a_plan_that_failed_is_planned_anew(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    manifest = home / "staging" / "r" / "plan_night.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text('{"status": "failed"}')
    words = ["run", "ingest", "--date", "2026-03-01", "-p", "tiny", "--run-id", "r"]
    assert [ctx.stage for ctx in launched(monkeypatch, words)] == ["plan_night", "ingest"]


def test_a_rollback_that_is_run_again_after_a_kill_still_says_how_its_readers_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(views, "rollback", lambda lake, tag: [])
    monkeypatch.setattr(views, "releases", lambda lake: [{"tag": "d20260301", "logical_date": cli.parse_date("2026-03-01")}])
    monkeypatch.setattr(launchers, "launch", lambda ctx, request: {"outputs": {"changes": []}})
    words = ["rollback", "--to", "d20260301", "--reason", "why", "-p", "tiny"]
    assert ended(words, monkeypatch) == 0
    assert """airflow dags trigger rank_training --conf '{"release": "d20260301", "profile": "tiny"}'""" in capsys.readouterr().err
    assert ended([*words, "--set", "seed=3"], monkeypatch) == 0
    assert """'{"release": "d20260301", "profile": "tiny", "overrides": ["seed=3"]}'""" in capsys.readouterr().err
    assert ended([*words, "--dry-run"], monkeypatch) == 0
    assert "airflow" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["backfill", "--start", "2026-3-1", "--end", "2026-03-02", "--reason", "why"], "--start"),
        (["backfill", "--start", "2026-03-01", "--end", "2026-3-2", "--reason", "why"], "--end"),
        (["run", "refresh", "--date", "2026-3-1"], "--date"),
        (["run", "refresh", "--date", "2026-03-01", "--through", "2026-3-2"], "--through"),
    ],
)
def test_a_wrong_date_is_told_with_the_option_it_was_given_to(
    words: list[str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended([*words, "-p", "tiny"], monkeypatch) == 64
    assert [line.split()[-1] for line in capsys.readouterr().err.splitlines() if line.startswith("  where")] == [named]


def test_two_parts_of_a_study_are_not_opened_at_once(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(["study", "study-smoke", "--final", "--confirm"], monkeypatch) == 64
    assert "--final or --confirm" in capsys.readouterr().err
    assert not home.exists()


# ---------------------------------------------------------------- small parts


@pytest.mark.parametrize("text", ["2026-3-1", "2026-02-30", "2026-W10-1", "20260301", "", " 2026-03-01", "2026-03-01T00:00"])
def test_only_one_way_to_write_a_date(text: str) -> None:
    with pytest.raises(ContractError, match="not a date"):
        cli.parse_date(text)
    assert str(cli.parse_date("2026-03-01")) == "2026-03-01"


def test_a_run_parameter_keeps_what_follows_the_first_equals_sign() -> None:
    assert cli.parse_pair("a=b=c") == ("a", "b=c")
    assert cli.parse_pair("a=") == ("a", "")
    with pytest.raises(ConfigError):
        cli.parse_pair("a")


def test_a_table_shows_what_is_missing_small_and_many(capsys: pytest.CaptureFixture[str]) -> None:
    cli.show_rows([{"none": None, "real": 0.123456, "yes_no": True, "several": [1, 2], "text": "[REC] (2007)"}], "a title")
    shown = capsys.readouterr().out
    for expected in ("a title", "0.1235", "yes", "1, 2", "yes no", "[REC] (2007)"):
        assert expected in shown


def test_rows_as_json_keep_dates_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    cli.show_rows([{"day": cli.parse_date("2026-03-01"), "items": [1]}], "", as_json=True)
    assert json.loads(capsys.readouterr().out) == [{"day": "2026-03-01", "items": [1]}]
