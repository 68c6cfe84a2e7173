"""The night's plan as a pure function of what the lake and the files say."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from jobs.plan_night import (
    LEDGER,
    RAW,
    check_finished,
    check_held,
    check_manifest,
    last_revision,
    make_plan,
    parent_release,
    planned,
    run,
    tag_name,
    unfinished,
)
from pipeline import config
from pipeline.context import Context, Home, Plan, PlannedFile
from pipeline.datasets.base import EVENT_COLUMNS, SourceSpec, file_digest
from pipeline.errors import ContractError, UpstreamMissing
from pipeline.lakehouse import Commit
from pipeline.stages import STAGES

DAY = date(2026, 3, 2)  # a Monday
YESTERDAY = DAY - timedelta(days=1)


def context(folder: Path, *overrides: str, day: date = DAY) -> Context:
    return Context(config=config.load("tiny", overrides), home=Home(folder), stage="plan_night", logical_date=day, run_id="r")


def a_file(day: date = DAY, sha: str = "a" * 64, **changes: Any) -> PlannedFile:
    return PlannedFile(**{"file_date": day, "kind": "events", "path": f"{day}.csv", "sha256": sha, "bytes": 9, **changes})


def a_ledger_row(file: PlannedFile, status: str = "loaded") -> dict[str, Any]:
    return {"file_date": file.file_date, "kind": file.kind, "sha256": file.sha256, "status": status}


def a_release(day: date = YESTERDAY, revision: int = 1, **changes: Any) -> dict[str, Any]:
    base = {
        "tag": tag_name(day, revision), "logical_date": day, "revision": revision, "generation": 1, "codebook_digest": "c", "parent_tag": None,
        "snapshot_id": 10 + revision, "rows_digest": f"rows of {day} {revision}", "input_fingerprint": f"inputs of {day} {revision}",
        "status": "current", "refit_due": False, "drift": "{}", "items": 3, "reason": "frozen",
    }  # fmt: skip
    return {**base, **changes}


def a_generation(number: int = 1, fingerprint: str = "inputs of the first night") -> dict[str, Any]:
    return {"generation": number, "input_fingerprint": fingerprint}


def plan_of(ctx: Context, releases: tuple[dict[str, Any], ...] = (), generations: tuple[dict[str, Any], ...] = (), **given: Any) -> Plan:
    held = given.get("held", [row["tag"] for row in releases])
    return make_plan(ctx, ctx.config.plan_night, given.get("files", (a_file(),)), given.get("ledger", ()), releases, generations, held)


# ---------------------------------------------------------------- policy


def test_the_first_night_fits_generation_one(tmp_path: Path) -> None:
    plan = plan_of(context(tmp_path))
    assert (plan.tag, plan.revision, plan.generation, plan.new_generation, plan.parent, plan.reuse) == ("d20260302", 1, 1, True, None, "")
    assert plan.reason == "first release"
    assert plan.seed == config.load("tiny").seed
    assert plan.config_hash == config.load("tiny").digest()


def test_frozen_keeps_the_parents_generation(tmp_path: Path) -> None:
    plan = plan_of(context(tmp_path), (a_release(generation=3),), (a_generation(3), a_generation(4)))
    assert (plan.generation, plan.new_generation, plan.reason) == (3, False, "frozen")
    assert plan.parent is not None
    assert (plan.parent.tag, plan.parent.snapshot_id) == ("d20260301", 11)


def test_cold_fits_a_new_generation_every_night(tmp_path: Path) -> None:
    plan = plan_of(context(tmp_path, "plan_night.policy=cold"), (a_release(generation=3),), (a_generation(3), a_generation(4)))
    assert (plan.generation, plan.new_generation, plan.reason) == (5, True, "policy cold")
    assert plan.parent is not None, "churn is measured against the parent even so"


def test_a_due_refit_is_obeyed_unless_the_profile_says_otherwise(tmp_path: Path) -> None:
    due = (a_release(refit_due=True),)
    obeyed = plan_of(context(tmp_path), due, (a_generation(1),))
    assert (obeyed.generation, obeyed.start, obeyed.reason) == (2, "anchored", "refit due, anchored")
    ignored = plan_of(context(tmp_path, "plan_night.refit_when_due=false"), due, (a_generation(1),))
    assert (ignored.generation, ignored.start, ignored.reason) == (1, "", "frozen")


@pytest.mark.parametrize("policy", ["anchored", "warm", "cold"])
def test_a_policy_says_how_each_generation_begins_but_the_first_has_nothing_to_begin_at(tmp_path: Path, policy: str) -> None:
    later = plan_of(context(tmp_path, f"plan_night.policy={policy}"), (a_release(),), (a_generation(1),))
    assert (later.generation, later.start, later.reason) == (2, policy, f"policy {policy}")
    assert plan_of(context(tmp_path, f"plan_night.policy={policy}"), (), ()).start == "cold"


def test_the_way_a_generation_begins_is_part_of_what_the_night_is(tmp_path: Path) -> None:
    ways = [("plan_night.policy=cold",), ("plan_night.policy=anchored",), ()]
    assert len({plan_of(context(tmp_path, *way), (a_release(),), (a_generation(1),)).input_fingerprint for way in ways}) == 3


def test_only_the_parents_refit_counts(tmp_path: Path) -> None:
    older = a_release(YESTERDAY - timedelta(days=1), refit_due=True)
    assert not plan_of(context(tmp_path), (older, a_release()), (a_generation(1),)).new_generation


# ---------------------------------------------------------------- parent


def test_an_expired_parent_is_refused() -> None:
    check_held("d20260301", {"d20260301": 7})
    with pytest.raises(ContractError, match="expired"):
        check_held("d20260301", {"d20260302": 7})


def test_a_night_copies_nothing_from_a_parent_whose_manifest_is_gone(tmp_path: Path) -> None:
    frozen = plan_of(context(tmp_path), (a_release(),), (a_generation(1),))
    check_manifest(frozen, 7)
    with pytest.raises(ContractError, match="manifest that d20260301 was made from is gone") as caught:
        check_manifest(frozen, None)
    assert caught.value.next_command.startswith("sid backfill --start 2026-03-01 --end 2026-03-01 ")
    check_manifest(plan_of(context(tmp_path, "plan_night.policy=cold"), (a_release(),), (a_generation(1),)), None)
    check_manifest(plan_of(context(tmp_path)), None)


def test_the_last_revision_of_a_date_is_the_one_published_last_whatever_became_of_it() -> None:
    rows = [a_release(revision=2, status="withdrawn"), a_release(), a_release(DAY, 3)]
    assert last_revision(rows, YESTERDAY) == rows[0]
    assert last_revision(rows, DAY - timedelta(days=9)) is None


def test_settings_of_readers_and_of_housekeeping_change_no_night(tmp_path: Path) -> None:
    plain = plan_of(context(tmp_path)).input_fingerprint
    assert plan_of(context(tmp_path, "train_ranker.dim=32", "maintain.release_days=30", "launch.threads=2")).input_fingerprint == plain
    assert plan_of(context(tmp_path, "train_tokenizer.max_epochs=3")).input_fingerprint != plain


def test_the_parent_is_the_current_revision_of_the_latest_earlier_date() -> None:
    older = a_release(DAY - timedelta(days=9))
    withdrawn = a_release(status="withdrawn")
    superseded, current = a_release(DAY - timedelta(days=5), 1, status="superseded"), a_release(DAY - timedelta(days=5), 2)
    assert parent_release([older, withdrawn, superseded, current, a_release(DAY), a_release(DAY + timedelta(days=1))], DAY) == current
    assert parent_release([a_release(DAY), a_release(DAY + timedelta(days=1)), withdrawn], DAY) is None
    assert parent_release([], DAY) is None


@pytest.mark.parametrize(("revision", "tag"), [(1, "d20260302"), (2, "d20260302_r2"), (11, "d20260302_r11")])
def test_a_tag_names_the_day_and_from_two_on_the_revision(revision: int, tag: str) -> None:
    assert tag_name(DAY, revision) == tag


# ---------------------------------------------------------------- reuse and revisions


def test_a_night_published_from_the_same_inputs_is_reused(tmp_path: Path) -> None:
    ctx = context(tmp_path)
    first = plan_of(ctx)
    today = a_release(DAY, input_fingerprint=first.input_fingerprint)
    again = plan_of(ctx, (today,), (a_generation(1, first.input_fingerprint),))
    assert (again.reuse, again.tag, again.revision, again.generation) == ("d20260302", "d20260302", 1, 1)


@pytest.mark.parametrize("change", [{"drift": None}, {"status": "withdrawn"}, {"status": "superseded"}, {"input_fingerprint": "other"}])
def test_an_unfinished_withdrawn_or_other_night_is_not_reused(tmp_path: Path, change: dict[str, Any]) -> None:
    ctx = context(tmp_path)
    first = plan_of(ctx)
    today = a_release(DAY, **{"input_fingerprint": first.input_fingerprint, **change})
    again = plan_of(ctx, (today,), (a_generation(1, first.input_fingerprint),))
    assert again.reuse == ""
    assert (again.tag, again.revision) == ("d20260302_r2", 2)


def test_a_night_whose_rows_were_swept_away_is_made_again(tmp_path: Path) -> None:
    ctx = context(tmp_path)
    first = plan_of(ctx)
    today = a_release(DAY, input_fingerprint=first.input_fingerprint)
    again = plan_of(ctx, (today,), (a_generation(1, first.input_fingerprint),), held=["d20260301"])
    assert (again.reuse, again.tag, again.generation) == ("", "d20260302_r2", 1)


def test_revisions_count_on_from_the_highest(tmp_path: Path) -> None:
    today = tuple(a_release(DAY, number, status="superseded" if number < 3 else "withdrawn") for number in (3, 1, 2))
    assert plan_of(context(tmp_path), today, (a_generation(1),)).tag == "d20260302_r4"


def test_the_generation_of_a_killed_night_is_used_again(tmp_path: Path) -> None:
    ctx = context(tmp_path)
    killed = plan_of(ctx)  # wrote its generation, died before its release
    assert plan_of(ctx, (), (a_generation(1, killed.input_fingerprint),)).generation == 1
    other = plan_of(context(tmp_path, "seed=5"), (), (a_generation(1, killed.input_fingerprint),))
    assert other.generation == 2, "another configuration never takes the orphan's number"


# ---------------------------------------------------------------- fingerprint


def test_what_was_loaded_counts_like_what_will_be_loaded(tmp_path: Path) -> None:
    """A rerun finds the night's own files in the ledger: the same inputs, so the same fingerprint."""
    ctx, early, own = context(tmp_path), a_file(YESTERDAY, "b" * 64), a_file()
    closed = a_file(YESTERDAY - timedelta(days=1), "", status="declared_empty", bytes=0)
    first = plan_of(ctx, files=(closed, early, own), ledger=())
    again = plan_of(ctx, files=(own,), ledger=(a_ledger_row(early), a_ledger_row(own), a_ledger_row(closed, "declared_empty")))
    assert again.input_fingerprint == first.input_fingerprint


def test_a_corrected_file_counts_instead_of_the_loaded_one(tmp_path: Path) -> None:
    ctx, own = context(tmp_path), a_file()
    corrected = a_file(sha="c" * 64)
    loaded = plan_of(ctx, files=(own,), ledger=(a_ledger_row(own),)).input_fingerprint
    assert plan_of(ctx, files=(corrected,), ledger=(a_ledger_row(own),)).input_fingerprint != loaded


def test_the_fingerprint_sees_everything_the_night_is_a_function_of(tmp_path: Path) -> None:
    releases, generations = (a_release(),), (a_generation(1),)
    base = plan_of(context(tmp_path), releases, generations).input_fingerprint
    others = {
        plan_of(context(tmp_path, "seed=1"), releases, generations).input_fingerprint,
        plan_of(context(tmp_path, "item_popularity.half_life_days=8.0"), releases, generations).input_fingerprint,
        plan_of(context(tmp_path, "plan_night.policy=cold"), releases, generations).input_fingerprint,
        plan_of(context(tmp_path), (a_release(rows_digest="other rows"),), generations).input_fingerprint,
        plan_of(context(tmp_path), (a_release(refit_due=True),), generations).input_fingerprint,
        plan_of(context(tmp_path), (), generations).input_fingerprint,
        plan_of(context(tmp_path, day=DAY + timedelta(days=1)), releases, generations).input_fingerprint,
        plan_of(context(tmp_path), releases, generations, files=(a_file(sha="d" * 64),)).input_fingerprint,
        plan_of(context(tmp_path), releases, generations, files=(a_file(), a_file(kind="items"))).input_fingerprint,
    }
    assert len(others | {base}) == 10
    assert plan_of(context(tmp_path / "elsewhere", "launch.kind=submit"), releases, generations).input_fingerprint == base, "where it runs is no input"


# ---------------------------------------------------------------- files


def a_source(folder: Path, **changes: Any) -> SourceSpec:
    given: dict[str, Any] = {
        "events_path": lambda day: folder / f"{day}.csv", "items_path": lambda day: folder / f"items-{day}.csv", "file_format": "csv", "items_format": "csv",
        "event_columns": EVENT_COLUMNS, "item_columns": ("item_id",), "event_select": {}, "item_select": {}, "first_date": YESTERDAY - timedelta(days=1),
    }  # fmt: skip
    return SourceSpec(**{**given, **changes})


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text(f"content of {name}\n", encoding="utf-8")


def test_the_first_night_reads_every_day_and_a_later_one_only_what_the_ledger_lacks(tmp_path: Path) -> None:
    days = [DAY - timedelta(days=back) for back in (2, 1, 0)]
    put(tmp_path, *[f"{day}.csv" for day in days], f"items-{days[0]}.csv")
    ctx, spec = context(tmp_path), a_source(tmp_path)
    first = planned(spec, ctx, [])
    assert [(file.file_date, file.kind, file.status) for file in first] == [
        (day, kind, "present" if kind == "events" or day == days[0] else "declared_empty") for day in days for kind in ("events", "items")
    ]
    assert first[0].sha256 == file_digest(tmp_path / f"{days[0]}.csv")
    ledger = [a_ledger_row(file, "loaded" if file.status == "present" else file.status) for file in first if file.file_date != days[1]]
    assert [(file.file_date, file.kind) for file in planned(spec, ctx, ledger)] == [(day, kind) for day in days[1:] for kind in ("events", "items")]


def test_a_day_that_was_empty_is_read_when_its_file_arrives(tmp_path: Path) -> None:
    put(tmp_path, f"{YESTERDAY}.csv", f"{DAY}.csv", f"{DAY - timedelta(days=2)}.csv")
    spec, ctx = a_source(tmp_path, items_path=None, catalogue="from_events"), context(tmp_path)
    ledger = [
        {"file_date": DAY - timedelta(days=2), "kind": "events", "status": "loaded", "sha256": "x"},
        {"file_date": YESTERDAY, "kind": "events", "status": "declared_empty", "sha256": ""},
    ]
    assert [file.file_date for file in planned(spec, ctx, ledger)] == [YESTERDAY, DAY]


def test_an_open_day_without_a_file_is_named_with_its_command(tmp_path: Path) -> None:
    put(tmp_path, f"{DAY}.csv")
    spec = a_source(tmp_path, items_path=None, catalogue="from_events")
    with pytest.raises(UpstreamMissing) as caught:
        planned(spec, context(tmp_path), [])
    assert caught.value.found == "nothing for 2026-02-28, 2026-03-01"
    assert "sid run ingest --date 2026-02-28" in caught.value.next_command
    assert str(tmp_path / "2026-02-28.csv") in caught.value.expected


def test_a_closed_day_without_a_file_is_declared_empty(tmp_path: Path) -> None:
    put(tmp_path, f"{DAY}.csv", f"{DAY - timedelta(days=2)}.csv")
    spec = a_source(tmp_path, items_path=None, catalogue="from_events")
    files = planned(spec, context(tmp_path, "source.closed_weekdays=['sunday']"), [])
    assert [file.status for file in files] == ["present", "declared_empty", "present"]


def test_a_snapshot_catalogue_may_not_be_silent(tmp_path: Path) -> None:
    put(tmp_path, *[f"{DAY - timedelta(days=back)}.csv" for back in (2, 1, 0)])
    with pytest.raises(UpstreamMissing, match="3 open day"):
        planned(a_source(tmp_path, catalogue="snapshot"), context(tmp_path), [])


def test_a_date_before_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="before the data"):
        planned(a_source(tmp_path), context(tmp_path, day=date(2026, 1, 1)), [])


def test_a_date_to_come_is_refused(tmp_path: Path) -> None:
    """A mistyped year: where absent files are declared empty, nothing else would keep its release from being the newest."""
    ctx = context(tmp_path, day=date(2999, 1, 1))
    with pytest.raises(ContractError, match="not come yet"):
        run(None, ctx.config.plan_night, ctx)  # type: ignore[arg-type]


def test_a_file_of_a_later_day_changes_nothing(tmp_path: Path) -> None:
    put(tmp_path, *[f"{DAY - timedelta(days=back)}.csv" for back in (2, 1, 0)])
    spec, ctx = a_source(tmp_path, items_path=None, catalogue="from_events"), context(tmp_path)
    before = planned(spec, ctx, [])
    put(tmp_path, f"{DAY + timedelta(days=1)}.csv")
    assert planned(spec, ctx, []) == before


@pytest.mark.parametrize("source", ["source.absent=missing", "source.absent=declared_empty", "source.closed_weekdays=['monday']"])
def test_a_loaded_file_that_was_archived_keeps_its_rows(tmp_path: Path, source: str) -> None:
    put(tmp_path, f"{DAY}.csv")
    ledger = [a_ledger_row(a_file(day, kind=kind)) for day in (YESTERDAY, DAY) for kind in ("events", "items")]
    spec, ctx = a_source(tmp_path, first_date=DAY), context(tmp_path, source)
    assert [(file.file_date, file.kind) for file in planned(spec, ctx, ledger)] == [(DAY, "events")], "the items of the day stay as they were loaded"
    (tmp_path / f"{DAY}.csv").unlink()
    assert planned(spec, ctx, ledger) == ()
    assert planned(spec, context(tmp_path, source, day=YESTERDAY), ledger[:2]) == (), "a night before the first file that is left"
    (tmp_path / f"items-{DAY}.csv").touch()
    assert [(file.kind, file.status, file.bytes) for file in planned(spec, ctx, ledger)] == [("items", "present", 0)], "an empty file empties its day"


# ---------------------------------------------------------------- half an ingest


def a_commit(at: int, key: str, day: date = YESTERDAY, stage: str = "ingest") -> Commit:
    return Commit(at=at, origin={"sid.stage": stage, "sid.record_key": key, "sid.logical_date": str(day)})


def histories(ledger: list[Commit], **tables: list[Commit]) -> dict[str, list[Commit]]:
    made = Commit(at=1, origin={})
    return {LEDGER: [*ledger, made], **{table: [*tables.get(table.split(".")[1], ledger), made] for table in RAW}}


def test_an_ingest_without_its_marker_is_unfinished() -> None:
    first, again = a_commit(10, "n1/ingest-1"), a_commit(20, "n1/ingest-1.1")
    assert unfinished(histories([])) == set()
    assert unfinished(histories([first])) == set()
    assert unfinished(histories([first], interaction=[again, first])) == {YESTERDAY}
    assert unfinished(histories([first], interaction=[a_commit(20, "n1/ingest-1"), first])) == {YESTERDAY}, "a try that was never recorded has its name again"
    assert unfinished(histories([], item=[first])) == {YESTERDAY}, "the first of all"
    assert unfinished(histories([again, first])) == set(), "run again to its end"


def test_half_an_ingest_is_not_forgotten_over_a_whole_one_of_an_earlier_date() -> None:
    """A backfill of an earlier night is let through and replaces nothing of it; a later night only where its own files do."""
    first, half = a_commit(10, "n1/ingest-1"), a_commit(20, "n2/ingest-1")
    earlier, later = a_commit(30, "b1/ingest-1", YESTERDAY - timedelta(days=10)), a_commit(40, "n3/ingest-1", DAY)
    assert unfinished(histories([earlier, first], interaction=[earlier, half, first])) == {YESTERDAY}
    assert unfinished(histories([later, earlier, first], interaction=[later, earlier, half, first])) == set()
    assert unfinished(histories([earlier, first], interaction=[later, earlier, half, first])) == {YESTERDAY, DAY}


def test_what_other_stages_write_and_what_the_ledger_forgot_is_finished() -> None:
    first, later = a_commit(10, "n1/ingest-1"), a_commit(20, "n2/ingest-1", DAY)
    refused = a_commit(30, "n2/content_embedding-1", DAY, stage="content_embedding")
    assert unfinished(histories([later, first], interaction=[first], rejected_row=[refused, later, first])) == set(), "a night that only brought items"
    forgotten = histories([later], interaction=[first])
    forgotten[LEDGER] = [later]  # housekeeping expired the rest; the newest snapshot of a table always stays
    assert unfinished(forgotten) == set()


def test_a_night_waits_for_half_an_ingest_unless_its_own_files_replace_it() -> None:
    check_finished(set(), (), DAY)
    check_finished({DAY}, (), YESTERDAY)
    check_finished({DAY, YESTERDAY}, (a_file(), a_file(YESTERDAY)), DAY)
    with pytest.raises(UpstreamMissing) as caught:
        check_finished({YESTERDAY}, (a_file(),), DAY)
    assert f"sid run ingest --date {YESTERDAY}" in caught.value.next_command
    with pytest.raises(UpstreamMissing):
        check_finished({DAY}, (), DAY)


def test_the_ledger_is_pinned_before_the_rows_it_vouches_for() -> None:
    """The other way round a file loaded in between would count as read while its old rows were."""
    for stage in (stage for stage in STAGES if LEDGER in stage.inputs and stage.group != "maintenance"):
        assert next(name for name in stage.inputs if name.startswith("raw.")) == LEDGER, stage.name
