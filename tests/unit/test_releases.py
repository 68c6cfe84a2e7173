"""The reading helpers of the CLI and the pure decisions of publish_release and gate_drift, on small tables."""

from __future__ import annotations

import json
from datetime import date, timedelta

import numpy as np
import pyarrow as pa
import pytest

from jobs import assign_sid, gate_drift, publish_release, releases, views
from pipeline.config import Config, GateDrift
from pipeline.context import Home, Plan, Release
from pipeline.errors import ContractError, UpstreamMissing

D = date(2026, 1, 5)
SIZES = (10, 10, 10)


def release_row(tag, day, revision=1, *, status="current", parent=None, digest="x", generation=1, drift=None):
    return {
        "tag": tag, "logical_date": day, "revision": revision, "generation": generation, "codebook_digest": "cb", "parent_tag": parent, "snapshot_id": revision,
        "rows_digest": digest, "input_fingerprint": "f", "status": status, "refit_due": False, "drift": drift, "items": 3, "reason": "test",
    }  # fmt: skip


def sid_table(rows):
    """A release from (item_id, codes, weights, popularity, stratum, status)."""
    names = ("item_id", "codes", "weights", "popularity", "popularity_stratum", "status")
    table = pa.table({name: [row[index] for row in rows] for index, name in enumerate(names)})
    size = len(table)
    extra = {"disambiguator": [0] * size, "first_seen": [D] * size, "changed_from_parent": [False] * size}
    for name, values in extra.items():
        table = table.append_column(name, pa.array(values))
    return table


def item(item_id, codes, weights=(1.0, 1.0, 1.0), popularity=1.0, stratum="head", status="live"):
    return (item_id, list(codes), list(weights), popularity, stratum, status)


# ---------------------------------------------------------------- releases


def test_the_list_marks_the_newest_and_what_was_made_from_superseded_rows():
    rows = [
        release_row("d20260105", D, parent="d20260104"),
        release_row("d20260104", D - timedelta(days=1), status="superseded"),
        release_row("d20260104_r2", D - timedelta(days=1), 2),
        release_row("d20260106", D + timedelta(days=1), status="withdrawn", parent="d20260105"),
    ]
    listed = releases.release_rows(pa.Table.from_pylist(rows))
    assert [(row["tag"], row["newest"], row["parent_superseded"]) for row in listed] == [
        ("d20260104", False, False),
        ("d20260104_r2", False, False),
        ("d20260105", True, True),
        ("d20260106", False, False),
    ]
    assert releases.resolve(pa.Table.from_pylist(rows))["tag"] == "d20260105"
    assert releases.resolve(pa.Table.from_pylist(rows), "d20260106")["status"] == "withdrawn"
    with pytest.raises(UpstreamMissing, match="d19990101") as caught:
        releases.resolve(pa.Table.from_pylist(rows), "d19990101")
    assert "d20260104_r2" in caught.value.expected


def test_diff_counts_moves_apart_from_first_unmaskings():
    old = sid_table([item("a", (1, 1, 1), popularity=3.0), item("b", (2, 2, 10), stratum="tail"), item("c", (3, 3, 3)), item("gone", (4, 4, 4))])
    new = sid_table([item("new", (9, 9, 9)), item("c", (3, 3, 3)), item("b", (2, 2, 5), stratum="head"), item("a", (1, 7, 7))])
    rows = {(row["scope"], row["name"]): row for row in releases.diff_rows(old, new, SIZES, SIZES)}
    overall = rows["overall", "all items"]
    assert (overall["items"], overall["changed"], overall["unmasked"]) == (3, 1, 1)
    assert overall["churn"] == pytest.approx(1 / 3)
    assert overall["mass_churn"] == pytest.approx(3 / 5)
    assert rows["stratum", "tail"]["unmasked"] == 1
    assert rows["stratum", "tail"]["churn"] == 0.0
    assert rows["stratum", "torso"]["churn"] == 0.0
    assert [rows["position", str(place)]["changed"] for place in range(3)] == [0, 1, 1]
    assert rows["items", "new items"]["items"] == rows["items", "gone items"]["items"] == 1


def test_diff_knows_a_masked_slot_by_the_codebook_sizes_of_its_own_release():
    old = sid_table([item("masked", (1, 1, 10)), item("first code", (2, 2, 10)), item("code", (10, 3, 3)), item("same", (4, 4, 4))])
    new = sid_table([item("masked", (1, 1, 20)), item("first code", (2, 2, 10)), item("code", (5, 3, 3)), item("same", (4, 4, 4))])
    overall = releases.diff_rows(old, new, (20, 10, 10), (20, 20, 20))[0]
    assert (overall["items"], overall["changed"], overall["unmasked"]) == (4, 1, 1)


def test_diff_refuses_releases_of_another_length():
    one = sid_table([item("a", (1, 1, 1))])
    with pytest.raises(ContractError, match="another length"):
        releases.diff_rows(one, one, (10, 10), (10, 10))
    with pytest.raises(ContractError, match="another number of positions"):
        releases.diff_rows(one, one, (10, 10), SIZES)


def test_show_orders_neighbours_by_shared_codes_and_never_counts_masked_slots():
    rows = [
        item("me", (1, 2, 10), (1.0, 0.5, 0.0)),
        item("both", (1, 2, 3)),
        item("masked too", (5, 6, 10)),
        item("light", (9, 2, 4), (1.0, 0.1, 1.0), popularity=50.0),
        item("heavy", (1, 9, 4)),
        item("retired", (1, 2, 4), status="retired"),
    ]
    titles = pa.table({"item_id": ["me", "both"], "title": ["My film", "Its twin"]})
    asked: list[list[str]] = []
    shown = releases.show_item(sid_table(rows), "me", SIZES, titles=lambda item_ids: asked.append(item_ids) or titles)
    assert asked == [["me", "both", "heavy", "light"]], "the catalogue is asked for what is shown only"
    assert shown["codes"] == [1, 2, None]
    assert shown["title"] == "My film"
    assert [(near["item_id"], near["shared"], near["positions"]) for near in shown["neighbours"]] == [("both", 2, [0, 1]), ("heavy", 1, [0]), ("light", 1, [1])]
    assert [near["title"] for near in shown["neighbours"]] == ["Its twin", None, None]
    assert len(releases.show_item(sid_table(rows), "me", SIZES, top=1)["neighbours"]) == 1
    with pytest.raises(UpstreamMissing, match="nobody"):
        releases.show_item(sid_table(rows), "nobody", SIZES)


# ---------------------------------------------------------------- publish_release


def plan():
    before = Release(tag="d20260104", logical_date=D - timedelta(days=1), revision=1, generation=1, snapshot_id=1)
    return Plan(
        logical_date=D, tag="d20260105", revision=1, generation=1, start="", reason="frozen", parent=before, files=(),
        input_fingerprint="f", config_hash="c", seed=1,
    )  # fmt: skip


def test_a_night_planned_before_a_rollback_is_not_published_after_it():
    before = release_row("d20260104", D - timedelta(days=1), digest="x")
    publish_release.check_parent(plan(), [before])
    publish_release.check_parent(plan(), [{**before, "status": "superseded"}])
    with pytest.raises(ContractError, match="withdrawn meanwhile"):
        publish_release.check_parent(plan(), [{**before, "status": "withdrawn"}])


@pytest.mark.parametrize(
    ("rows", "tags", "expected"),
    [
        ([], {}, ("publish", "d20260105", 1)),
        ([release_row("d20260105", D, digest="same")], {}, ("reused", "d20260105", 1)),
        ([release_row("d20260105", D, digest="other")], {}, ("publish", "d20260105_r2", 2)),
        ([], {"d20260105": (7, "same")}, ("roll_forward", "d20260105", 1)),
        ([], {"d20260105": (7, "other")}, ("publish", "d20260105_r2", 2)),
        ([], {"d20260105": (7, "other"), "d20260105_r2": (8, "same")}, ("roll_forward", "d20260105_r2", 2)),
        ([release_row("d20260105", D, digest="same", status="withdrawn")], {}, ("publish", "d20260105_r2", 2)),
        ([release_row("d20260104", D - timedelta(days=1), digest="same")], {}, ("publish", "d20260105", 1)),
    ],
)
def test_decision(rows, tags, expected):
    decision = publish_release.decide(plan(), rows, "same", tags, {row["tag"] for row in rows})
    assert (decision.action, decision.tag, decision.revision) == expected


def test_a_release_that_has_expired_is_published_again_under_the_next_revision():
    rows = [release_row("d20260105", D, digest="same")]
    assert publish_release.decide(plan(), rows, "same", {}, {"d20260105"}).action == "reused"
    decision = publish_release.decide(plan(), rows, "same", {}, {"d20260104"})
    assert (decision.action, decision.tag, decision.revision) == ("publish", "d20260105_r2", 2)


def test_the_same_rows_on_a_repaired_parent_are_no_longer_superseded():
    day = D - timedelta(days=1)
    rows = [release_row("d20260104", day, status="superseded"), release_row("d20260104_r2", day, 2), release_row("d20260105", D, parent="d20260104")]
    assert releases.stale_tags(rows) == {"d20260105"}
    repaired = Release(tag="d20260104_r2", logical_date=day, revision=2, generation=1, snapshot_id=2)
    night = plan().model_copy(update={"parent": repaired, "input_fingerprint": "g"})
    decision = publish_release.Decision(action="reused", tag="d20260105", revision=1, snapshot_id=1)
    again = publish_release.reaffirmed(rows, decision, night)
    assert again == [*rows[:2], {**rows[2], "parent_tag": "d20260104_r2", "input_fingerprint": "g"}]
    assert releases.stale_tags(again) == set()


def test_only_the_newest_date_becomes_current_for_consumers():
    assigned = {"codebook_digest": "cb", "rows_digest": "same", "items": 3}
    decision = publish_release.Decision(action="publish", tag="d20260105_r2", revision=2)
    older = [release_row("d20260105", D), release_row("d20260104", D - timedelta(days=1))]
    rows = publish_release.with_release(older, publish_release.release_row(decision, plan(), assigned, 9))
    assert {row["tag"]: row["status"] for row in rows} == {"d20260104": "current", "d20260105": "superseded", "d20260105_r2": "current"}
    said = publish_release.outputs(decision, plan(), assigned, rows)
    assert said["current"]
    assert said["is_current_newest"]
    assert not publish_release.outputs(decision, plan(), assigned, rows, again=True)["is_current_newest"]
    later = [*rows, release_row("d20260106", D + timedelta(days=1))]
    assert not publish_release.outputs(decision, plan(), assigned, later)["is_current_newest"]


def test_a_run_without_a_held_branch_is_told_what_to_do():
    with pytest.raises(ContractError, match="no audited branch") as caught:
        publish_release.held_branch({"tag": "x"})
    assert caught.value.next_command.startswith("sid run assign_sid")


def test_a_run_whose_audited_branch_was_swept_away_is_told_to_make_it_again():
    publish, reused = (publish_release.Decision(action=action, tag="d20260105", revision=1) for action in ("publish", "reused"))
    publish_release.check_branch(publish, "audit_a", {"main": 1, "audit_a": 2})
    publish_release.check_branch(reused, "audit_a", {"main": 1})
    with pytest.raises(ContractError, match="branch is gone") as caught:
        publish_release.check_branch(publish, "audit_a", {"main": 1})
    assert caught.value.next_command == "sid run assign_sid --date D"


# ---------------------------------------------------------------- assign_sid


def test_a_generation_number_that_another_night_took_asks_for_a_new_plan_not_for_another_seed():
    fitted = assign_sid.Vocabulary(
        generation=1, tokenizer="rq_kmeans", codebook_sizes=SIZES, slots=("a", "b", "c"), codebook_digest="mine", tokenizer_uri="models:/t/2", recorded=True
    )
    row = {"codebook_digest": "mine", "input_fingerprint": "f", "logical_date": D}
    assign_sid.check_number(row, fitted, plan())
    with pytest.raises(ContractError, match="never rewritten") as caught:
        assign_sid.check_number({**row, "codebook_digest": "other"}, fitted, plan())
    assert "--set seed=2" in caught.value.next_command
    backfilled = {"codebook_digest": "other", "input_fingerprint": "g", "logical_date": D - timedelta(days=30)}
    with pytest.raises(ContractError, match="another night began generation 1") as caught:
        assign_sid.check_number(backfilled, fitted, plan())
    assert caught.value.next_command.startswith("sid run refresh --date 2026-01-05  (")
    assert "2025-12-06" in caught.value.found


# ---------------------------------------------------------------- titles


def test_a_title_or_picture_that_the_newest_file_no_longer_names_is_gone(tmp_path, monkeypatch):
    seen = {
        "item_id": ["b", "a", "b", "a"], "title": ["B old", "A", None, "A new"], "image_uri": ["b.png", None, None, "a.png"],
        "file_date": [D - timedelta(days=1), D - timedelta(days=2), D, D - timedelta(days=1)],
    }  # fmt: skip
    monkeypatch.setattr(views.lakehouse, "read_arrow", lambda *_, **__: pa.table(seen))
    found = views.titles((Home(tmp_path), Config()), D)
    assert found.to_pylist() == [{"item_id": "a", "title": "A new", "image_uri": "a.png"}, {"item_id": "b", "title": None, "image_uri": None}]


# ---------------------------------------------------------------- gate_drift


def test_next_of_group_is_a_rotation_inside_each_group():
    group_P = np.array(["b", "a", "b", "a", "b", "c"])
    partner_P = gate_drift.next_of_group(group_P)
    assert partner_P.tolist() == [2, 3, 4, 1, 0, 5]
    assert gate_drift.next_of_group(np.zeros(0, dtype=str)).shape == (0,)


def test_shared_share_skips_positions_that_one_of_the_two_lacks():
    codes_a_PL, codes_b_PL = np.array([[1, 10, 3], [10, 10, 10], [1, 2, 3]]), np.array([[1, 10, 4], [10, 10, 10], [1, 2, 3]])
    assert gate_drift.shared_share(codes_a_PL, codes_b_PL, np.asarray(SIZES)).tolist() == [0.5, 0.0, 1.0]


def test_agreement_equals_a_slow_loop_and_is_nought_for_codes_without_meaning():
    rng = np.random.default_rng(11)
    count = 900
    taste_P = rng.integers(0, 8, count)
    codes_a_PL = np.stack([taste_P, taste_P, rng.integers(0, 10, count)], axis=1)
    codes_b_PL = np.stack([taste_P, rng.integers(0, 10, count), rng.integers(0, 10, count)], axis=1)
    items_P2 = np.array([[f"a{row}", f"b{row % 50}"] for row in range(count)])
    stratum_P = np.array(["head", "torso", "tail"])[rng.integers(0, 3, count)]
    found = gate_drift.agreement(codes_a_PL, codes_b_PL, items_P2, stratum_P, np.asarray(SIZES))
    gains = []
    for row in range(count):
        others = [other for other in range(count) if stratum_P[other] == stratum_P[row]]
        partner = others[(others.index(row) + 1) % len(others)]
        if items_P2[partner, 1] not in items_P2[row]:
            gains.append((codes_a_PL[row] == codes_b_PL[row]).mean() - (codes_a_PL[row] == codes_b_PL[partner]).mean())
    assert found["overall"] == {
        "value": pytest.approx(np.mean(gains), abs=1e-6),
        "se": pytest.approx(np.std(gains, ddof=1) / len(gains) ** 0.5, abs=1e-6),
        "pairs": len(gains),
    }
    assert found["overall"]["value"] > 0.2
    empty = gate_drift.agreement(np.zeros((0, 3), int), np.zeros((0, 3), int), np.zeros((0, 2), str), np.zeros(0, str), np.asarray(SIZES))
    assert empty["overall"] == {"value": None, "se": None, "pairs": 0}
    meaningless = gate_drift.agreement(rng.integers(0, 10, (count, 3)), rng.integers(0, 10, (count, 3)), items_P2, stratum_P, np.asarray(SIZES))["overall"]
    assert abs(meaningless["value"]) < 3 * meaningless["se"]


def measured(value=0.3, pairs=1000, post_base=0.0, doubled=0.0):
    return {"agreement": {"overall": {"value": value, "se": 0.01, "pairs": pairs}}, "post_base_mass": post_base, "doubled_mass": doubled}


@pytest.mark.parametrize(
    ("now", "reasons"),
    [
        (measured(), 0),
        (measured(value=0.1), 1),
        (measured(value=0.2), 0),  # a loss of a third, but within two standard errors of the limit
        (measured(value=0.1, pairs=50), 0),  # too few pairs to judge
        (measured(post_base=0.31), 1),
        (measured(value=0.1, post_base=0.4, doubled=0.6), 3),
    ],
)
def test_verdict(now, reasons):
    drift = gate_drift.verdict(now, {"tag": "d20260101", "agreement": measured()["agreement"]}, GateDrift())
    assert len(drift["reasons"]) == reasons
    assert gate_drift.metrics(drift)["refit_due"] == float(reasons > 0)


def test_birth_is_the_first_release_of_the_generation_that_stands():
    rows = [
        release_row("d20260101", date(2026, 1, 1), generation=1),
        release_row("d20260102", date(2026, 1, 2), generation=2, status="withdrawn"),
        release_row("d20260103", date(2026, 1, 3), generation=2, status="superseded"),
        release_row("d20260104", date(2026, 1, 4), generation=2),
    ]
    assert gate_drift.birth(rows, rows[3])["tag"] == "d20260103"
    assert gate_drift.birth(rows, rows[1])["tag"] == "d20260102"


def test_the_agreement_at_birth_is_that_of_the_first_release_that_was_measured():
    """gate_drift failed on the birth night: later nights were compared with themselves and never showed a loss."""
    rows = [
        release_row("d20260101", date(2026, 1, 1), drift=None),
        release_row("d20260102", date(2026, 1, 2), drift=None),
        release_row("d20260103", date(2026, 1, 3), drift=json.dumps(measured(value=0.4)), status="withdrawn"),
        release_row("d20260104", date(2026, 1, 4), drift=json.dumps(measured(value=0.3))),
        release_row("d20260105", date(2026, 1, 5), drift=json.dumps(measured(value=0.1))),
    ]
    now = measured(value=0.1)
    agreed = now["agreement"]
    assert gate_drift.at_birth(rows, rows[0], agreed) == {"tag": "d20260101", "agreement": agreed}, "the first is compared with itself"
    for row in (rows[1], rows[3]):
        drift = gate_drift.verdict(now, gate_drift.at_birth(rows, row, agreed), GateDrift())
        assert (drift["agreement_loss"], drift["reasons"], drift["birth"]["tag"]) == (None, [], "d20260101"), "unknown, not nought"
    drift = gate_drift.verdict(now, gate_drift.at_birth(rows, rows[4], agreed), GateDrift())
    assert drift["birth"] == {"tag": "d20260104", "agreement": measured(value=0.3)["agreement"]}
    assert drift["agreement_loss"] == pytest.approx(2 / 3, abs=1e-6)
    assert len(drift["reasons"]) == 1
