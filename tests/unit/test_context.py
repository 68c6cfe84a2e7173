"""The home folder, the run's identity, its documents."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline import config
from pipeline.context import Context, Home, Plan, Release, derive_seed, read_json, write_json
from pipeline.errors import ConfigError, ContractError, UpstreamMissing

DAY = date(2026, 3, 1)


def make(folder: Path, **changes: object) -> Context:
    given = {"config": config.load("tiny"), "home": Home(folder), "stage": "ingest", "logical_date": DAY, "run_id": "scheduled__2026-03-01T00:00:00+00:00"}
    return Context(**{**given, **changes})


@pytest.mark.parametrize("release", ["../../outside", "/etc", "d20260301_r", "d20260301\n", "D20260301", "d2026"])
def test_a_release_that_names_no_tag_names_no_folder_either(tmp_path: Path, release: str) -> None:
    with pytest.raises(ConfigError, match="not the tag of a release"):
        make(tmp_path, params=(("release", release),))
    assert make(tmp_path, params=(("release", "d20260301_r2"),)).param("release") == "d20260301_r2"
    assert make(tmp_path, params=(("release", ""),)).param("release") == ""


def a_plan(**changes: object) -> Plan:
    given = {
        "logical_date": DAY, "tag": "d20260301", "revision": 1, "generation": 1, "start": "cold", "reason": "first release", "parent": None,
        "files": (), "input_fingerprint": "f", "config_hash": "c", "seed": 1,
    }  # fmt: skip
    return Plan(**{**given, **changes})


# ---------------------------------------------------------------- home


def test_the_home_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SID_WAREHOUSE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SID_HOME", str(tmp_path / "here"))
    home = Home.from_environment()
    assert home.root == tmp_path / "here"
    assert home.warehouse == str(tmp_path / "here" / "lake")
    assert home.tracking_uri == f"sqlite:///{tmp_path / 'here' / 'mlflow.db'}"
    monkeypatch.setenv("SID_WAREHOUSE", "s3://bucket/lake")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert (home.warehouse, home.tracking_uri) == ("s3://bucket/lake", "http://127.0.0.1:5000")


def test_a_namespace_is_a_plain_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SID_NAMESPACE", raising=False)
    assert Home(tmp_path).namespace == ""
    monkeypatch.setenv("SID_NAMESPACE", "prod-eu_1")
    assert Home(tmp_path).namespace == "prod-eu_1"
    for wrong in ("a/b", "a'b", "a.b", "x" * 61, "prod\n"):
        monkeypatch.setenv("SID_NAMESPACE", wrong)
        with pytest.raises(ConfigError, match="not a plain name"):
            Home.from_environment()


def test_without_an_environment_the_home_is_a_folder_beside_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SID_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    assert Home.from_environment().root == tmp_path / ".sid"
    assert not (tmp_path / ".sid").exists(), "looking at a home makes nothing"


# ---------------------------------------------------------------- identity


def test_the_key_is_stable_over_attempts_and_reasons_and_differs_by_stage_date_and_run(tmp_path: Path) -> None:
    base = make(tmp_path)
    assert make(tmp_path, attempt=7, reason="again", params=(("release", "d20260301"),)).branch == base.branch
    others = [make(tmp_path, stage="assign_sid"), make(tmp_path, logical_date=date(2026, 3, 2)), make(tmp_path, run_id="manual__1")]
    assert len({base.key, *(other.key for other in others)}) == 4


def test_a_branch_says_stage_and_day_and_is_a_valid_reference(tmp_path: Path) -> None:
    from pipeline.lakehouse import REFERENCE

    branch = make(tmp_path, run_id="asset_triggered__2026-03-01T00:00:00+00:00_a'b/c").branch
    assert branch.startswith("audit_ingest_20260301_")
    assert len(branch.rsplit("_", 1)[1]) == 8
    assert REFERENCE.fullmatch(branch)


def test_the_cutoff_is_the_first_instant_after_the_day(tmp_path: Path) -> None:
    assert make(tmp_path).cutoff == datetime(2026, 3, 2, tzinfo=UTC)
    assert make(tmp_path, logical_date=date(2026, 12, 31)).cutoff == datetime(2027, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize("run_id", ["scheduled__2026-03-01T00:00:00+00:00", "../../outside", "a b/c\\d", "name'; DROP TABLE x"])
def test_staging_stays_inside_the_home(tmp_path: Path, run_id: str) -> None:
    staging = make(tmp_path, run_id=run_id).staging
    assert staging.is_dir()
    assert staging.parent == tmp_path / "staging"


def test_params_are_looked_up_by_name(tmp_path: Path) -> None:
    ctx = make(tmp_path, params=(("release", "d20260301"), ("dry_run", "true")))
    assert (ctx.param("release"), ctx.param("dry_run"), ctx.param("other")) == ("d20260301", "true", "")


# ---------------------------------------------------------------- documents


def test_a_stage_that_has_not_ended_is_named_with_the_command_that_runs_it(tmp_path: Path) -> None:
    with pytest.raises(UpstreamMissing) as caught:
        make(tmp_path).outcome("plan_night")
    assert "plan_night" in caught.value.headline
    assert caught.value.next_command == "sid run plan_night --date 2026-03-01"


def test_the_plan_survives_its_document(tmp_path: Path) -> None:
    parent = Release(tag="d20260228", logical_date=date(2026, 2, 28), revision=1, generation=1, snapshot_id=2**62)
    plan = a_plan(start="", parent=parent, reason="frozen")
    ctx = make(tmp_path)
    write_json(ctx.staging / "plan_night.json", {"outputs": plan.model_dump(mode="json")})
    assert make(tmp_path, attempt=3, stage="assign_sid").plan() == plan


def test_an_outcome_serves_only_the_plan_it_was_made_under(tmp_path: Path) -> None:
    ctx = make(tmp_path)
    write_json(ctx.staging / "assign_sid.json", {"status": "done", "plan": "f", "outputs": {"tag": "x"}})
    assert ctx.outcome("assign_sid")["outputs"] == {"tag": "x"}, "a run without a manifest has nothing to compare with"
    write_json(ctx.staging / "plan_night.json", {"outputs": a_plan().model_dump(mode="json")})
    assert ctx.outcome("assign_sid")["outputs"] == {"tag": "x"}
    write_json(ctx.staging / "plan_night.json", {"outputs": a_plan(input_fingerprint="g").model_dump(mode="json")})
    with pytest.raises(ContractError, match="planned anew from other inputs") as caught:
        ctx.outcome("assign_sid")
    assert (caught.value.found, caught.value.next_command) == ("of f", "sid run refresh --date 2026-03-01")
    assert ctx.plan().input_fingerprint == "g"


def test_a_plan_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    ctx = make(tmp_path)
    write_json(ctx.staging / "plan_night.json", {"outputs": {**a_plan().model_dump(mode="json"), "extra": 1}})
    with pytest.raises(ValidationError, match="extra"):
        ctx.plan()


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"[1, 2]", b"null", b"\xff\xfe{}"])
def test_a_damaged_document_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a night" / "ingest.json"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ContractError) as caught:
        read_json(path)
    assert caught.value.where == str(path)
    assert caught.value.next_command == f"rm '{path}'"


def test_writing_leaves_one_complete_document(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"b": date(2026, 3, 1), "a": [1]})
    write_json(path, {"a": [2]})
    assert read_json(path) == {"a": [2]}
    assert [found.name for found in tmp_path.iterdir()] == ["x.json"]


def test_a_document_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {("not", "a", "key"): 1})
    assert json.loads(path.read_text()) == {"a": 1}


# ---------------------------------------------------------------- seeds


def test_a_seed_depends_on_every_part_and_nothing_else() -> None:
    assert derive_seed(1, 2, "i7", 3) == derive_seed(1, 2, "i7", 3) == 1206006759
    assert len({derive_seed(1, 2, "i7", 3), derive_seed(1, 2, "i7", 4), derive_seed(2, 2, "i7", 3), derive_seed("a", "b"), derive_seed("a")}) == 5
    assert all(0 <= derive_seed(number) < 2**31 for number in range(1000))
