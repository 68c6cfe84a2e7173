"""The study: its page, its grid, what it trains on, its statistics against slow loops, its verdicts and its tables."""

from __future__ import annotations

import itertools
import operator
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from tokenizer_items import tiny_history, tiny_items, training, unger_settings

from jobs import study as command
from jobs import study_cells, study_data
from jobs.study_data import TEST, TRAIN, VALID, Catalogue, Log, World, prepared
from pipeline import evaluation, intervals, study, study_page
from pipeline.context import ROOT, Home
from pipeline.errors import ConfigError
from pipeline.retrievers import base
from pipeline.study import Claim, DataSet, Estimate, Statistics
from pipeline.tokenizers.base import FitOptions
from pipeline.tokenizers.unger import Unger

CLAIM = {"title": "t", "arm": "ada", "control": "mean", "reader": "wide", "metric": "recall@50"}
SMALL = {
    "data": {"toy": {"kind": "shop"}, "other": {"kind": "shop", "worlds": 2}},
    "inputs": {"weak": {"text": "tfidf"}, "none": {"text": "none"}},
    "arms": {
        "ada": {},
        "mean": {"train_tokenizer": {"ada_sid": {"strength": "mean"}}},
        "permuted": {"codes": "permuted"},
        "ids": {"tokenizer": "none"},
        "here": {"tokenizer": "plain", "data": ["toy"], "readers": ["wide"]},
    },
    "readers": {"wide": {}, "din": {"kind": "ranker"}},
    "claims": [CLAIM],
    "statistics": {"seeds": [0, 1, 2], "encoder_seeds": 2},
}


def page(**changes: object) -> study.Page:
    return study.parse({**SMALL, **changes}, where="here")


def cells(chosen: study.Page, **options: object) -> list[study.Cell]:
    return study.grid(chosen, {label: f"digest of {label}" for label, _, _ in study.worlds(chosen)}, **options)


# ---------------------------------------------------------------- the page


@pytest.mark.parametrize("name", ["study-smoke", "study-cpu", "study-gpu", "study-systems"])
def test_a_shipped_page_loads_and_every_arm_of_its_claims_runs_where_it_is_claimed(name: str) -> None:
    shipped = study.load(name)
    for claim in shipped.claims:
        for data in claim.data or [*shipped.data]:
            for arm, reader in ((claim.arm, claim.reader), (claim.control or claim.arm, claim.control_reader or claim.reader)):
                if reader in shipped.readers:
                    assert not shipped.arms[arm].data or data in shipped.arms[arm].data, f"{claim.title}: {arm} is not run on {data}"
                    assert reader in study.readers_of(shipped, arm, data), f"{claim.title}: {reader} does not read {arm} on {data}"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"colour": "red"}, "colour"),
        ({"arms": {"ada": {"train_tokenizer": {"ada_sid": {"strenght": "mean"}}}}, "claims": []}, "strenght"),
        ({"arms": {"ada": {"train_tokenizer": {"ada_sid": {"num_shared": "two"}}}}, "claims": []}, "num_shared"),
        ({"arms": {"ada": {"readers": ["wider"]}}, "claims": []}, "wider"),
        ({"claims": [{**CLAIM, "arm": "adda"}]}, "adda"),
        ({"readers": {"wide": {"train_retriever": {"beamz": 3}}}, "arms": {"ada": {}}, "claims": []}, "beamz"),
        ({"claims": [{**CLAIM, "metric": "ndgc@50"}]}, "'ndgc@50', reader 'wide' is judged by recall@k or ndcg@k"),
        ({"claims": [{**CLAIM, "metric": "recall@0"}]}, "'recall@0', reader"),
        ({"claims": [{**CLAIM, "reader": "din"}]}, "'recall@50', reader 'din' is judged by auc or gauc"),
        ({"claims": [{**CLAIM, "control_metric": "recall@10"}]}, "compares recall@50 with recall@10"),
        ({"claims": [{**CLAIM, "arm": "ease", "reader": "floor"}]}, "names 'floor'"),
        ({"claims": [{**CLAIM, "stratum": "tale"}]}, "claims.0.stratum"),
        ({"claims": [{**CLAIM, "title": "above {control}", "controls": ["mean"]}]}, "in place of `control`"),
        ({"claims": [{"title": "above {control}", "controls": []}]}, "a list of names"),
        ({"claims": [{"title": "above all", "controls": ["mean", "permuted"]}]}, r"\{control\} in the title"),
        ({"claims": ["ada"]}, "claims.0"),
        ({"source": {"pth": "x"}}, "source.pth"),
        ({"data": {"films": {"kind": "movielens", "options": {"holdout": 0.3}}}, "claims": []}, "movielens has no options, found holdout"),
        ({"inputs": {"weak": {"train_behavior_encoder": {"sasrec": {"dimm": 3}}}}}, "dimm"),
    ],
)
def test_a_wrong_key_or_name_is_told_by_name(changes: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        page(**changes)


def test_a_claim_with_several_controls_is_a_claim_a_control() -> None:
    shared = {key: value for key, value in CLAIM.items() if key not in ("title", "control")}
    several = page(claims=[{**shared, "title": "above {control}", "controls": ["mean", "permuted"]}, CLAIM])
    single = page(claims=[*({**shared, "title": f"above {name}", "control": name} for name in ("mean", "permuted")), CLAIM])
    assert several.claims == single.claims
    assert several.digest() == single.digest()


def test_the_path_of_own_data_comes_from_outside_and_names_nothing() -> None:
    shop, own = {"kind": "shop"}, {"kind": "amazon_beauty"}
    given = study.parse({**SMALL, "data": {"toy": shop, "other": shop, "mine": own}, "source": {"path": "x/y"}}, where="here")
    plain = study.parse({**SMALL, "data": {"toy": shop, "other": shop, "mine": own}}, where="here")
    assert given.data["mine"].path == "x/y"
    assert given.data["toy"].path == ""
    assert given.digest() == plain.digest()
    assert [cell.key for cell in cells(given)] == [cell.key for cell in cells(plain)]
    with pytest.raises(ConfigError, match="your own copy"):
        study_data.files_of(plain.data["mine"], "mine")


def test_a_page_may_lay_changes_over_another(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('extends = "study-smoke"\ntitle = "mine"\nonly = "/plain/"\n[statistics]\nseeds = [7]\n[arms.mine]\ntokenizer = "rq_vae"\n')
    base, mine = study.load("study-smoke"), study.load(str(path), ["statistics.level=0.9"])
    assert (mine.title, mine.only, mine.statistics.seeds, mine.statistics.level) == ("mine", "/plain/", [7], 0.9)
    assert mine.statistics.thin_rows == base.statistics.thin_rows
    assert {**base.arms, "mine": mine.arms["mine"]} == mine.arms
    assert mine.claims == base.claims
    home = Home(tmp_path / "home")
    assert {cell.arm for cell in command.plan(str(path), home=home).cells} == {"", "plain"}
    assert "ada_sid" in {cell.arm for cell in command.plan(str(path), only="/ada_sid/", home=home).cells}
    path.write_text('extends = "study-nowhere"\n')
    with pytest.raises(ConfigError, match="unknown page to extend"):
        study.load(str(path))


def test_overrides_reach_every_section() -> None:
    changed = study.load("study-smoke", ["statistics.seeds=[5]", "train_tokenizer.ada_sid.codebook_size=7", "data.shop.options.items=99"])
    assert changed.statistics.seeds == [5]
    assert study.tokenizer_settings(changed, "ada_sid", next(iter(changed.data))).ada_sid.codebook_size == 7
    assert changed.data["shop"].options["items"] == 99


def test_a_data_set_changes_the_tokenizer_before_an_arm_does() -> None:
    changes = ["data.shop.train_tokenizer.ada_sid.num_text=4", "data.shop.train_tokenizer.ada_sid.codebook_size=9"]
    plain, changed = study.load("study-smoke"), study.load("study-smoke", changes)
    assert [study.tokenizer_settings(page, "ada_sid", "shop").ada_sid.num_text for page in (plain, changed)] == [1, 4]
    assert (
        study.tokenizer_settings(study.load("study-smoke", [*changes, "arms.ada_sid.train_tokenizer.ada_sid.num_text=3"]), "ada_sid", "shop").ada_sid.num_text
        == 3
    )
    keys = [{cell.name: cell.key for cell in cells(page)} for page in (plain, changed)]
    moved = {name.split("/")[1] for name in keys[0] if keys[0][name] != keys[1][name]}
    assert "ada_sid" in moved
    assert "rq_kmeans" not in moved
    with pytest.raises(ConfigError, match="num_txt"):
        study.load("study-smoke", ["data.shop.train_tokenizer.ada_sid.num_txt=4"])


# ---------------------------------------------------------------- the grid


def test_the_grid_is_in_order_shares_codes_and_leaves_out_what_an_arm_does_not_want() -> None:
    found = cells(page())
    place = {cell.key: at for at, cell in enumerate(found)}
    assert len(place) == len(found)
    assert all(place[need] < place[cell.key] for cell in found for need in cell.needs)
    toy = [cell for cell in found if cell.data == "toy"]
    kinds = {kind: [cell for cell in toy if cell.kind == kind] for kind in ("floors", "features", "codes", "read")}
    assert [len(kinds[kind]) for kind in kinds] == [1, 2, 9, 24]  # 3 tokenizers x 3 seeds: `permuted` reads the codes of `ada`
    assert {cell.arm for cell in kinds["codes"]} == {"ada", "mean", "here"}, "the first arm names what several share"
    assert {cell.reader for cell in toy if cell.arm == "ids"} == {"din"}
    assert {cell.reader for cell in toy if cell.arm == "here" and cell.kind == "read"} == {"wide"}
    assert not [cell for cell in found if cell.arm == "here" and cell.data == "other"]
    assert {cell.world for cell in found if cell.data == "other"} == {0, 1}


def test_a_key_follows_what_decides_the_result_and_nothing_else() -> None:
    def keys(kind: str, **changes: object) -> set[str]:
        return {cell.key for cell in cells(page(**changes)) if cell.kind == kind}

    assert keys("codes", train_tokenizer={"opq": {"codebook_size": 9}}) == keys("codes")
    assert keys("codes", train_tokenizer={"ada_sid": {"codebook_size": 9}}).isdisjoint(keys("codes"))
    assert keys("features", train_behavior_encoder={"richness": "count"}) == keys("features")
    assert keys("codes", train_behavior_encoder={"richness": "count"}).isdisjoint(keys("codes"))
    assert keys("codes", train_retriever={"max_epochs": 2}) == keys("codes")
    assert not keys("read", train_retriever={"max_epochs": 2}) >= keys("read")
    of_test = {cell.key for cell in cells(page(), part="test")}
    assert {cell.key for cell in cells(page()) if cell.kind in ("codes", "features")} <= of_test
    assert keys("read").isdisjoint(of_test)


def test_a_selection_takes_along_what_it_needs() -> None:
    chosen = study.selected(cells(page()), "toy/mean/wide/seed 1$")
    assert [cell.kind for cell in chosen] == ["floors", "features", "codes", "read"]
    assert {cell.data for cell in chosen} == {"toy"}
    with pytest.raises(ConfigError, match="matches no cell"):
        study.selected(cells(page()), "nothing")
    with pytest.raises(ConfigError, match="selection"):
        study.selected(cells(page()), "(")


# ---------------------------------------------------------------- what is trained on


def log(seed: int = 0, users: int = 30, items: int = 25) -> tuple[Log, Catalogue]:
    """Users of 4 to 9 events; the last two are asked."""
    rng = np.random.default_rng(seed)
    user_T = np.repeat(np.array([f"u{number:03d}" for number in range(users)]), rng.integers(4, 10, users))
    item_T = np.array([f"i{number:03d}" for number in rng.integers(0, items, len(user_T))])
    part_T, stop_T = study_data._last_two(user_T)
    ids = np.array([f"i{number:03d}" for number in range(items)])
    catalogue = Catalogue(ids, [f"text {name}" for name in ids], [""] * items, [""] * items, np.ones(items, dtype=bool), np.full(items, -1))
    return Log(user_T, item_T, part_T, stop_T, np.zeros(len(user_T), dtype=bool), np.full(len(user_T), np.nan)), catalogue


def job(world: World, **data: object) -> study_cells.Job:
    chosen = page(data={"toy": {"kind": "shop", **data}, "other": {"kind": "shop"}})
    return study_cells.Job(chosen, cells(chosen)[0], world, study_cells.Store(Path()), "valid")


def test_nothing_of_later_periods_enters_what_is_trained_on() -> None:
    first, catalogue = log()
    later = first.part_T != TRAIN
    moved = np.where(later, np.random.default_rng(1).permutation(first.item_T), first.item_T)
    worlds = [prepared(each, catalogue, DataSet()) for each in (first, replace(first, item_T=moved))]
    assert (worlds[0].item_T != worlds[1].item_T).any()
    for a, b in zip(worlds[0].train()[:2], worlds[1].train()[:2], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(worlds[0].count_N, worlds[1].count_N)
    np.testing.assert_array_equal(worlds[0].stratum_N, worlds[1].stratum_N)
    rows = [study_cells.rank_rows(job(world), world.learned(3), final=False, history=5) for world in worlds]
    for name in ("user", "target", "history", "label", "stratum", "evidence"):
        np.testing.assert_array_equal(getattr(rows[0], name), getattr(rows[1], name), err_msg=name)


def test_a_history_ends_before_its_answer_and_negatives_are_nobodys_own() -> None:
    world = prepared(*log(users=40), DataSet())
    for part, code in (("valid", VALID), ("test", TEST)):
        asked = world.asked(part)
        assert (world.part_T[asked.at_Q] == code).all()
        assert (asked.stop_Q <= asked.at_Q).all()
        offsets, items = study_data.packed(world.item_T, asked.start_Q, asked.stop_Q)
        for row, at in enumerate(asked.at_Q):
            np.testing.assert_array_equal(items[offsets[row] : offsets[row + 1]], world.item_T[world.offset_U[world.user_T[at]] : asked.stop_Q[row]])
    asked = world.asked("test")
    drawn = study_cells.negatives(world, asked, 3, 7, final=True)
    own = {(user, item) for user, item in zip(world.user_T, world.item_T, strict=True)}
    answers = np.repeat(world.item_T[asked.at_Q], 3)
    assert not own & set(zip(np.repeat(world.user_T[asked.at_Q], 3), drawn, strict=True))
    assert (world.stratum_N[drawn] == world.stratum_N[answers]).all()


def test_a_ranker_knows_no_user_that_it_is_not_taught() -> None:
    events, catalogue = log(users=40)
    events = replace(events, part_T=np.where(events.user_T < "u010", np.where(events.part_T == TRAIN, study_data.UNUSED, events.part_T), events.part_T))
    world = prepared(events, catalogue, DataSet())
    taught = study_cells.rank_rows(job(world), world.learned(3), final=False, history=5)
    asked = study_cells.rank_rows(job(world), world.asked("test"), final=True, history=5)
    assert set(asked.person[asked.user == 0]) == set(range(10)), "a row of the user table that nothing has trained is noise"
    for rows in (taught, asked):
        np.testing.assert_array_equal(rows.user[rows.user > 0], rows.person[rows.user > 0] + 1)
    assert set(asked.user) - {0} <= set(taught.user)
    assert (taught.user > 0).all()


def test_a_ranker_is_not_judged_where_newness_tells_the_answer() -> None:
    events, catalogue = log(users=40)
    tied = np.arange(len(events.part_T)) % 3 == 0
    world = prepared(replace(events, tied_T=tied), replace(catalogue, known_N=np.arange(25) % 5 != 0), DataSet())
    asked = world.asked("test")
    rows = study_cells.rank_rows(job(world), asked, final=True, history=5)
    masks = study_cells.row_masks(world, asked, rows)
    count = len(asked.at_Q)
    again = [world.item_T[at] in world.item_T[start:stop] for at, start, stop in zip(asked.at_Q, asked.start_Q, asked.stop_Q, strict=True)]
    assert 0 < sum(again) < count
    for row in range(len(rows)):
        question = row if row < count else (row - count) // 4
        fair = world.item_T[asked.at_Q[question]] < world.num_known
        assert masks["all"][row] == (fair and not asked.tied_Q[question] and not again[question])
        assert masks["all_with_ties"][row] == (fair and not again[question])
        assert masks["all_with_repeats"][row] == (fair and not asked.tied_Q[question])
    assert (rows.target[masks["all"]] <= world.num_known).all()
    assert not (rows.history[masks["all"]] == rows.target[masks["all"], None]).any(), "no answer stands in its own history, as no negative does"


def test_a_subset_of_users_keeps_their_events_and_the_ends_of_their_histories() -> None:
    whole, catalogue = log()
    some = study_data._some_users(whole, 7)
    assert len(np.unique(some.user_T)) == 7
    for user in np.unique(some.user_T):
        rows, old = np.flatnonzero(some.user_T == user), np.flatnonzero(whole.user_T == user)
        np.testing.assert_array_equal(some.item_T[rows], whole.item_T[old])
        np.testing.assert_array_equal(some.stop_T[rows] - rows[0], whole.stop_T[old] - old[0])
    assert prepared(some, catalogue, DataSet()).offset_U[-1] == len(some.user_T)


def test_items_that_only_later_periods_know_come_last() -> None:
    events, catalogue = log()
    known = np.arange(25) % 5 != 0
    world = prepared(events, replace(catalogue, known_N=known), DataSet())
    assert world.num_known == known.sum()
    assert world.catalogue.known_N[: world.num_known].all()
    np.testing.assert_array_equal(world.catalogue.item_ids[world.item_T], events.item_T)


def test_retail_baskets_are_asked_whole_from_before_and_their_order_is_no_id_order(tmp_path: Path) -> None:
    head = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID"
    for day, number in (("2010-12-01", 1), ("2011-06-30", 2), ("2011-08-20", 3), ("2011-11-15", 4)):
        lines = [f"{number}00{user},{code},item {code},1,{day} 10:00:00,1.5,{user}.0" for user in (1, 2) for code in range(10000 + number, 10005 + number)]
        lines += [f"C{number},10009,gone,1,{day} 10:00:00,1,1", f"{number}9,POST,post,1,{day} 10:00:00,1,1", f"{number}8,10009,free,0,{day} 10:00:00,1,1"]
        (tmp_path / f"{day}.csv").write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
    world = study_data.read_world(DataSet(kind="online_retail", path=str(tmp_path)), "retail", 0, Home(tmp_path))
    assert "10009" not in world.catalogue.item_ids
    assert world.catalogue.known_N.tolist() == [True] * 6 + [False] * 2  # the codes 10001 .. 10006 stand before the periods that are asked
    asked = world.asked("valid")
    assert np.unique(world.user_T[asked.at_Q], return_counts=True)[1].tolist() == [5, 5]
    assert set(asked.stop_Q - asked.start_Q) == {10}
    basket = world.item_T[world.offset_U[0] : world.offset_U[0] + 5]
    assert sorted(basket) != basket.tolist() or sorted(world.item_T[world.offset_U[0] + 5 : world.offset_U[0] + 10]) != basket.tolist()


# ---------------------------------------------------------------- codes as read


def test_weights_as_a_control_hands_them_on() -> None:
    codes = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2]])
    weights = torch.tensor([[1.0, 0.2], [1.0, 0.0], [1.0, 0.6], [1.0, 0.0]])
    shelf = base.Catalogue(codes, weights, base.numbered(codes), (3, 2), 1)
    np.testing.assert_allclose(study_cells.weights_as(shelf, "mean", 0).numpy(), [[1, 0.4], [1, 0], [1, 0.4], [1, 0]])
    np.testing.assert_allclose(study_cells.weights_as(shelf, "one", 0).numpy(), [[1, 1], [1, 0], [1, 1], [1, 0]])
    shuffled = {tuple(study_cells.weights_as(shelf, "shuffled", seed)[:, 1].tolist()) for seed in range(8)}
    assert {tuple(sorted(row)) for row in shuffled} == {tuple(sorted(weights[:, 1].tolist()))}
    assert len(shuffled) == 2
    assert study_cells.weights_as(shelf, "own", 0) is weights


def test_purity_and_shared_codes_against_slow_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    codes, weights, cluster = torch.from_numpy(rng.integers(0, 3, (9, 3))), torch.from_numpy(rng.random((9, 3))).float(), rng.integers(0, 2, 9)
    for ordered in (False, True):
        score = study_cells.shared_codes(codes, weights, codes, weights, ordered=ordered)
        for a, b in itertools.product(range(9), range(9)):
            same = (codes[a] == codes[b]).tolist()
            counted = list(itertools.takewhile(bool, same)) if ordered else same
            want = sum(float(weights[a, at] * weights[b, at]) for at, equal in enumerate(counted) if equal)
            assert float(score[a, b]) == pytest.approx(want, abs=1e-6)
    monkeypatch.setattr(study_cells, "ROWS", 4)  # several blocks
    same_cluster = partial(lambda cluster, rows: cluster[rows, None] == cluster, cluster)
    found, wider = study_cells.nearest_shares(codes, weights, [(same_cluster, 3), (same_cluster, 5)], True)
    np.testing.assert_array_equal(wider, *study_cells.nearest_shares(codes, weights, [(same_cluster, 5)], True))
    for item in range(9):
        others = [other for other in range(9) if other != item]
        edge = sorted((round(float(score[item, other]) * 1e5) for other in others), reverse=True)[2]
        above, tied = ([other for other in others if way(round(float(score[item, other]) * 1e5), edge)] for way in (operator.gt, operator.eq))
        hits = [sum(cluster[other] == cluster[item] for other in group) for group in (above, tied)]
        assert found[item] == pytest.approx((hits[0] + (3 - len(above)) * hits[1] / len(tied)) / 3)
    nothing = torch.zeros(9, 3, dtype=torch.int64), torch.zeros(9, 3)
    assert study_cells.nearest_shares(*nothing, [(same_cluster, 3)], False)[0][0] == pytest.approx((np.sum(cluster == cluster[0]) - 1) / 8)  # all tied: chance


def test_a_tokenizer_is_given_the_vectors_that_its_arm_names() -> None:
    items = tiny_items(12)
    only = study_cells.narrowed(items, ["behavior"])
    assert only.widths() == {"behavior": 6}
    assert not (only.text_N | only.image_N).any()
    assert torch.equal(only.behavior_N, items.behavior_N)
    assert study_cells.narrowed(items, []).widths() == items.widths()
    plain, chosen = (cells(page(arms={"ada": {"reads": reads}}, claims=[])) for reads in ([], ["text"]))
    assert {cell.key for cell in plain if cell.kind == "codes"}.isdisjoint(cell.key for cell in chosen)
    assert {cell.key for cell in plain if cell.kind == "features"} == {cell.key for cell in chosen if cell.kind == "features"}


def test_ungers_vector_is_measured_against_both_sides_and_teaches() -> None:
    tokenizer, items = Unger(unger_settings()), tiny_items(gaps=False)
    tokenizer.fit(items, FitOptions(seed=0, settings=training(), history=tiny_history()))
    arrays, found = study_cells.integrated(tokenizer, items)
    np.testing.assert_array_equal(arrays["teacher_ND"], tokenizer.integrated(items).numpy())
    assert set(found) == {f"overlap/{name}_{side}" for name in ("integrated", "concat") for side in ("behavior", "content")}
    assert all(0 <= value <= 1 for value in found.values())


POOL = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from jobs import study

if __name__ == "__main__":
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=study._begin) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 300).result()
"""


def test_a_killed_study_leaves_no_worker_at_work(tmp_path: Path) -> None:
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout is not None
    worker = psutil.Process(int(process.stdout.readline()))
    process.kill()
    process.wait()
    process.stdout.close()
    worker.wait(timeout=60)


# ---------------------------------------------------------------- statistics against slow loops


def test_the_interval_of_a_mean_has_the_width_of_resampled_users_and_seeds() -> None:
    rng = np.random.default_rng(0)
    users = rng.integers(0, 60, 400)
    value = rng.normal(0.1, 1, (3, 400)) + rng.normal(0, 0.5, 60)[users] + rng.normal(0, 0.2, (3, 1))
    found = intervals.estimate(intervals.mean_effect(value, users))
    drawn = []
    spread = (value.mean(1) - value.mean()) * np.sqrt(3 / 2)  # three seeds show two thirds of their own variance
    for _ in range(4000):
        picked = np.bincount(rng.integers(0, 60, 60), minlength=60)[users]
        seeds = rng.integers(0, 3, 3)
        drawn.append((value.mean(0) - value.mean()) @ picked / picked.sum() + spread[seeds].mean())
    assert found.difference == pytest.approx(value.mean())
    assert found.detectable / intervals.POWER == pytest.approx(np.std(drawn), rel=0.08)
    assert (found.seeds, found.units, found.rows) == (3, 60, 400)
    assert found.seed_sd == pytest.approx(value.mean(1).std(ddof=1))


@pytest.mark.parametrize(("seeds", "level", "at_most"), [(3, 0.05, 0.075), (3, 0.05 / 12, 0.013), (5, 0.05, 0.065), (5, 0.05 / 12, 0.01)])
def test_a_true_null_is_seldom_rejected_with_a_handful_of_seeds(seeds: int, level: float, at_most: float) -> None:
    """Seeds add as much to the standard error as users do; a bootstrap of the seeds rejects .017 and .011 at a twelfth of .05."""
    rng, draws, users = np.random.default_rng(3), 3000, 50
    rejected = 0
    for _ in range(draws):
        value_SB = rng.normal(0, 1, users) + rng.normal(0, np.sqrt(seeds / users), (seeds, 1))
        rejected += intervals.estimate(intervals.mean_effect(value_SB, np.arange(users))).p <= level
    assert level / 3 < rejected / draws <= at_most


def test_an_estimate_of_one_seed_is_the_t_test_over_its_users() -> None:
    from scipy import stats

    value = np.random.default_rng(2).normal(0.2, 1, 40)
    found, known = intervals.estimate(intervals.mean_effect(value, np.arange(40)), null=0.1), stats.ttest_1samp(value, 0.1)
    scale = np.sqrt(40 / 39)  # influences sum squares over U, the test over U - 1
    assert (found.difference - 0.1) / (found.detectable / intervals.POWER) == pytest.approx(known.statistic * scale)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(known.statistic) * scale, 39))
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 39, value.mean(), value.std() / np.sqrt(40)))


def test_influence_is_the_derivative_for_means_aucs_and_rank_correlations() -> None:
    rng = np.random.default_rng(2)
    rows, users = 60, np.arange(60) // 2
    label, a, b = rng.random(rows) < 0.4, rng.normal(size=rows).round(1), rng.normal(size=rows).round(1)
    weights = rng.random(rows)

    def weighted_auc(score: np.ndarray, count: np.ndarray) -> float:
        wins = (score[label][:, None] > score[~label]) + 0.5 * (score[label][:, None] == score[~label])
        return float((count[label][:, None] * count[~label] * wins).sum() / (count[label].sum() * count[~label].sum()))

    def weighted_rho(x: np.ndarray, y: np.ndarray, count: np.ndarray) -> float:
        x, y = evaluation.midranks(x), evaluation.midranks(y)
        x, y = x - np.average(x, weights=count), y - np.average(y, weights=count)
        return float((count * x * y).sum() / np.sqrt((count * x * x).sum() * (count * y * y).sum()))

    truth = rng.normal(size=rows)
    statistics = [
        (intervals.mean_effect(a - b, users, weights), lambda count: float(np.average(a - b, weights=weights * count))),
        (intervals.auc_effect(label, a, b, users), lambda count: weighted_auc(a, count) - weighted_auc(b, count)),
    ]
    for effect, statistic in statistics:
        assert effect.theta_S[0] == pytest.approx(statistic(np.ones(rows)))
        slope = [(statistic(1 + 1e-6 * (users == user)) - statistic(np.ones(rows))) / 1e-6 for user in range(30)]
        np.testing.assert_allclose(effect.influence_SU[0], slope, atol=1e-5)
        assert effect.influence_SU.sum() == pytest.approx(0, abs=1e-12)
    other = rng.normal(size=rows)
    ranked = intervals.spearman_effect(a, b, truth, other)
    assert ranked.theta_S[0] == pytest.approx(evaluation.spearman(a, truth) - evaluation.spearman(b, other))
    difference = lambda count: weighted_rho(a, truth, count) - weighted_rho(b, other, count)  # noqa: E731
    slope = [(difference(1 + 1e-6 * (np.arange(rows) == row)) - difference(np.ones(rows))) / 1e-6 for row in range(rows)]
    np.testing.assert_allclose(ranked.influence_SU[0], slope, atol=1e-5)


def test_richness_of_each_recipe_is_judged_by_its_own_overlap(tmp_path: Path) -> None:
    rng, store = np.random.default_rng(4), study_cells.Store(tmp_path)
    known = {key: {"overlap_N": rng.random(40), "richness/rank": rng.random(40), "richness/norm": rng.random(40)} for key in ("minilm", "tied")}
    known["tied"]["overlap_N"][3] = np.nan
    for key, arrays in known.items():
        store.keep(key, arrays)
    claim = Claim(title="t", arm="minilm", control="tied", reader="features", metric="richness_spearman/rank", control_metric="richness_spearman/norm")
    left, right = ([(SimpleNamespace(key=key, seed=0), {})] for key in ("minilm", "tied"))
    found = command._richness_effect(SimpleNamespace(store=store), claim, left, right)
    kept = np.isfinite(known["tied"]["overlap_N"])
    rho = [evaluation.spearman(known[key][f"richness/{kind}"][kept], known[key]["overlap_N"][kept]) for key, kind in (("minilm", "rank"), ("tied", "norm"))]
    assert found.theta_S[0] == pytest.approx(rho[0] - rho[1])


def test_an_estimate_keeps_to_its_level_its_null_and_its_power() -> None:
    effect = intervals.mean_effect(np.random.default_rng(1).normal(0.3, 1, 900), np.arange(900))
    wide, half = (intervals.estimate(effect, level=level) for level in (0.95, 0.5))
    assert (half.high - half.low) / (wide.high - wide.low) == pytest.approx(0.6745 / 1.96, rel=0.1)
    assert wide.detectable == pytest.approx(2.8 / 30, rel=0.1)
    assert 0 < wide.p < 1e-12
    assert intervals.estimate(effect, null=float(effect.theta_S[0])).p > 0.9
    values = [[0.1], [0.2], [0.6]]
    single, nothing = intervals.scalar_estimate(values, np.zeros((3, 1)), level=0.8), intervals.scalar_estimate(values, np.zeros((3, 1)), null=0.3)
    error = np.std([0.1, 0.2, 0.6], ddof=1) / np.sqrt(3)
    assert (single.low, single.high) == pytest.approx((0.3 - 1.88561808 * error, 0.3 + 1.88561808 * error))  # t of 80 % with two degrees of freedom
    assert single.detectable == pytest.approx(2.8 * error)
    assert (single.p, nothing.p) == (0.25, 1.0)


def test_drawn_sign_flips_are_never_nothing_and_hold_the_values_as_they_are() -> None:
    assert intervals.sign_flip(np.ones(40)) == 1 / (intervals.DRAWN_FLIPS + 1)
    values = np.random.default_rng(0).normal(0.3, 1, 17)
    flips = np.abs(values @ (1 - 2 * np.indices((2,) * 17).reshape(17, -1)))
    assert intervals.sign_flip(values) == pytest.approx((flips >= abs(values.sum()) - 1e-12).mean(), rel=0.1)


def test_worlds_and_seeds_of_single_numbers() -> None:
    a, b = [[0.7, 0.8], [0.6, 0.6], [0.9, 0.8]], [[0.6, 0.6], [0.6, 0.5], [0.7, 0.9]]
    several = intervals.scalar_estimate(a, b)
    assert several.difference == pytest.approx(np.mean([0.15, 0.05, 0.05]))
    assert several.p == pytest.approx(0.25)  # all three positive: 2 of 8 sign flips are as far
    assert (several.units, several.seeds) == (3, 2)
    one = intervals.scalar_estimate(a[:1], b[:1])
    assert one.low < one.difference < one.high
    assert not np.isfinite(intervals.scalar_estimate([[0.5]], [[0.4]]).low)
    values = np.random.default_rng(0).normal(0.3, 1, 7)
    flips = [abs(np.dot(signs, values)) for signs in itertools.product((1, -1), repeat=7)]
    assert intervals.sign_flip(values) == pytest.approx(np.mean(np.array(flips) >= abs(values.sum()) - 1e-12))


def test_holm() -> None:
    assert intervals.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert intervals.holm([0.9, 0.8]) == [1.0, 1.0]
    assert intervals.holm([]) == []
    one_class = intervals.auc_effect(np.ones(30), *np.random.default_rng(0).random((2, 2, 30)), np.arange(30))
    assert np.isnan(one_class.theta_S).all()
    assert intervals.estimate(one_class).p == 1.0, "a claim that cannot be measured makes no other one more likely"


def test_intervals_decide_for_a_better_arm_and_not_for_equal_ones_or_without_rows() -> None:
    draw = np.random.default_rng(5)
    labels, users = draw.integers(0, 2, 2000), draw.integers(0, 200, 2000)
    good, noise = labels + draw.normal(0, 1, 2000), draw.normal(0, 1, 2000)
    better = intervals.estimate(intervals.auc_effect(labels, good, noise, users))
    assert 0 < better.low < better.difference < better.high
    same = intervals.estimate(intervals.auc_effect(labels, good, good, users))
    assert (same.difference, same.low, same.high) == (0, 0, 0)
    empty = evaluation.difference(intervals.mean_effect(np.empty((3, 0)), []))
    assert empty == {"mean": None, "low": None, "high": None, "seed_sd": None, "seeds": 3}
    one_class = evaluation.difference(intervals.auc_effect([1, 1], [0.0, 1.0], [1.0, 0.0], ["a", "b"]))
    assert one_class["mean"] is None


# ---------------------------------------------------------------- verdicts


def estimated(low: float, high: float, **changes: object) -> Estimate:
    facts = {"difference": (low + high) / 2, "low": low, "high": high, "p": 0.01, "detectable": 0.01, "seed_sd": 0.001, "seeds": 3, "units": 900, "rows": 5000}
    return Estimate(**{**facts, **changes})


@pytest.mark.parametrize(
    ("claimed", "found", "options", "word"),
    [
        ({}, estimated(0.001, 0.01), {}, "kept"),
        ({}, estimated(-0.01, -0.001), {}, "not kept"),
        ({}, estimated(-0.001, 0.01), {}, "cannot tell"),
        ({"least": 0.02}, estimated(-0.001, 0.01), {}, "not kept"),
        ({"margin": 0.002}, estimated(0.001, 0.01), {}, "cannot tell"),
        ({"direction": "smaller"}, estimated(-0.01, -0.001), {}, "kept"),
        ({"direction": "smaller"}, estimated(0.001, 0.01), {}, "not kept"),
        ({"direction": "not_worse", "margin": 0.003}, estimated(-0.002, 0.01), {}, "kept"),
        ({"direction": "not_worse", "margin": 0.003}, estimated(-0.01, 0.01), {}, "cannot tell"),
        ({"direction": "not_worse", "margin": 0.003}, estimated(-0.01, -0.004), {}, "not kept"),
        ({"primary": True}, estimated(0.001, 0.01), {"adjusted_p": 0.2}, "cannot tell"),
        ({"primary": True}, estimated(0.001, 0.01), {"adjusted_p": 0.01}, "kept"),
        ({}, estimated(0.001, 0.01, seeds=1), {}, "cannot tell"),
        ({}, estimated(0.001, 0.01, rows=999), {}, "cannot tell"),
        ({"reader": "codes"}, estimated(0.001, 0.01, rows=3), {}, "kept"),
        ({}, estimated(0.001, 0.01), {"capped": True}, "cannot tell"),
        ({}, estimated(0.001, 0.01, units=5), {"several_worlds": True}, "cannot tell"),
        ({}, estimated(0.001, 0.01, units=6, rows=9), {"several_worlds": True}, "kept"),
        ({}, estimated(0.001, 0.01, seeds=2, rows=1000), {}, "kept"),
        ({}, estimated(float("nan"), float("nan")), {}, "cannot tell"),
    ],
)
def test_a_verdict_says_what_the_interval_allows(claimed: dict, found: Estimate, options: dict, word: str) -> None:
    claim = Claim(**{"title": "t", "arm": "a", "control": "b", "reader": "wide", "metric": "recall@50", **claimed})
    verdict = study.verdict(claim, found, Statistics(), **options)
    assert verdict.word == word
    assert verdict.reason


def test_a_page_may_let_readers_that_still_improved_count() -> None:
    assert study.verdict(Claim(**CLAIM), estimated(0.001, 0.01), Statistics(void_at_cap=False), capped=True).word == "kept"


def ranked(tmp_path: Path, chosen: study.Page) -> tuple[command.Plan, list[command.Pair], dict[str, np.ndarray]]:
    """(a study of 90 questions on `toy` whose readers have run, its cells, ranks by arm and seed), arm `mean` without seed 2; 30 questions are no slice."""
    todo = command.Plan(chosen, [], {}, "valid", Home(tmp_path), "")
    draw, ranks, pairs = np.random.default_rng(0), {}, []
    for cell in cells(chosen):
        if cell.data == "toy" and cell.kind == "floors":
            ranks["markov"] = draw.integers(1, 40, 90).astype(float)
            todo.store.keep(cell.key, {"rank/markov": ranks["markov"], "user_Q": np.arange(90) // 2, "mask/all": np.arange(90) >= 30})
            pairs.append((cell, {"table": {"markov": {}}}))
        elif cell.data == "toy" and cell.reader == "wide" and cell.arm in ("ada", "mean") and (cell.arm, cell.seed) != ("mean", 2):
            ranks[f"{cell.arm}/{cell.seed}"] = draw.integers(1, 40, 90).astype(float)
            todo.store.keep(cell.key, {"rank_Q": ranks[f"{cell.arm}/{cell.seed}"]})
            pairs.append((cell, {"table": {}, "capped": False}))
    return todo, pairs, ranks


def test_a_claim_on_ranks_is_the_paired_difference_of_the_seeds_that_both_sides_have(tmp_path: Path) -> None:
    claims = [{**CLAIM, "metric": "recall@10", "times": 2.0}, {**CLAIM, "metric": "ndcg@10", "control": "markov", "control_reader": "floor"}]
    todo, pairs, ranks = ranked(tmp_path, page(claims=claims))
    recall, ndcg = ({name: metric(value[30:], 10).mean() for name, value in ranks.items()} for metric in (evaluation.recall_at, evaluation.ndcg_at))
    (several, _), (floor, _) = (command.compared(todo, pairs, claim, "toy") for claim in todo.page.claims)
    assert several.difference == pytest.approx(np.mean([recall[f"ada/{seed}"] - 2 * recall[f"mean/{seed}"] for seed in (0, 1)]))
    assert floor.difference == pytest.approx(np.mean([ndcg[f"ada/{seed}"] - ndcg["markov"] for seed in (0, 1, 2)]))
    assert [(each.seeds, each.units, each.rows) for each in (several, floor)] == [(2, 30, 60), (3, 30, 60)]


def test_a_primary_claim_that_was_not_run_stays_in_the_family(tmp_path: Path) -> None:
    absent = {**CLAIM, "title": "absent", "arm": "permuted", "primary": True, "data": ["toy"]}
    todo, pairs, _ = ranked(tmp_path, page(claims=[{**CLAIM, "metric": "recall@10", "primary": True, "data": ["toy"]}, absent]))
    (row,), not_run = command.judged(todo, pairs)
    assert not_run == ["absent (toy)"]
    assert row["holm_p"] == pytest.approx(min(1.0, 2 * row["p"]))
    assert row["p"] < row["holm_p"]


def test_a_claim_may_ask_for_a_multiple_of_its_control() -> None:
    chosen = page(claims=[{"title": "half", "arm": "ada", "control": "mean", "reader": "codes", "metric": "collision_rate", "times": 0.5, "data": ["toy"]}])
    pairs = [
        (cell, {"metrics": {"collision_rate": {"ada": 0.1, "mean": 0.3}[cell.arm]}}) for cell in cells(chosen) if cell.kind == "codes" and cell.arm != "here"
    ]
    found = command.compared(command.Plan(chosen, [], {}, "valid", Home(Path()), ""), pairs, chosen.claims[0], "toy")
    assert found is not None
    assert found[0].difference == pytest.approx(0.1 - 0.5 * 0.3)
    row = study_page.claim_metric(chosen.claims[0].model_dump())
    assert row == "collision_rate - 0.5 x control, codes, all"
    with pytest.raises(ConfigError, match="no zero"):
        page(claims=[{"title": "t", "arm": "ada", "control": "mean", "reader": "din", "metric": "auc", "times": 2.0}])


# ---------------------------------------------------------------- tables and the page


def document() -> dict:
    claim = {"title": "a <b> beats b", "data": "toy", "arm": "a", "control": "b", "reader": "wide", "control_metric": "", "metric": "recall@50"}
    claim |= {"times": 1.0, "stratum": "tail", "primary": True, "difference": 0.01, "low": 0.002, "high": 0.02, "p": 0.01, "holm_p": 0.02, "detectable": 0.01}
    claim |= {"seed_sd": 0.001, "rows": 1200, "seeds": 2, "verdict": "kept", "reason": "the interval lies on the claimed side"}
    row = {"data": "toy", "reader": "wide", "arm": "a", "rows": 1200, "fits": 2, "thin": False, "capped": False, "spread": {"recall@50": 0.001}}
    rows = [{**row, "stratum": name, "metrics": {"recall@50": 0.1, "ndcg@50": 0.05}} for name in ("all", "tail")]
    floor = {**row, "reader": "floor", "arm": "markov", "stratum": "all", "fits": 1, "metrics": {"recall@50": 0.06}, "spread": {}}
    rich = {f"{name}/rank": 0.3 for name in ("richness_spearman", "mean_strength", "low_strength_share", "high_strength_share")}
    return {
        "name": "toy", "title": "A toy", "about": "About.", "part": "valid", "command": "sid study toy",
        "commit": "c" * 40, "commits": ["c" * 40], "config": "f" * 12,
        "seeds": [0, 1], "devices": ["NVIDIA H200", "cpu"], "statistics": {"level": 0.95},
        "cpu_seconds": 90.0, "seconds": 100.0, "counts": {"kept": 1, "not kept": 0, "cannot tell": 0},
        "data": {"toy": {"digest": "d" * 12, "items": 9, "cold_items": 1, "users": 5, "train_events": 30, "questions": 1200}},
        "readings": [*rows, floor], "codes": [{"data": "toy", "name": "a", "fits": 2, "metrics": {"perplexity": 90.5, "purity": 0.5}, "spread": {}}],
        "inputs": [{"data": "toy", "name": "weak", "fits": 1, "metrics": rich, "spread": {}}],
        "strength": {"toy/inputs weak/seed 0": {"rank": {"edges": [0, 0.5, 1], "counts": {"head": [1, 2], "tail": [3, 0]}}}},
        "claims": [claim], "not_run": ["c beats d (toy)"], "curves": {"toy/a/wide/seed 0": {"valid_ndcg@50": [0.1, 0.2]}},
        "cells": [{"name": "toy/floors", "key": "k", "config": "f", "data_digest": "d", "commit": "c" * 40, "command": "sid study toy", "seconds": 3.0}],
    }  # fmt: skip


def test_the_tables_show_arms_floors_and_verdicts() -> None:
    text = study_page.markdown(document())
    assert "| a <b> beats b | toy | recall@50, wide, tail (primary) | +0.0100 | [+0.0020, +0.0200] | 2 | **kept** |" in text
    assert "| a | 2 | 0.1000 (0.0010) | 0.0500 | 0.1000 (0.0010) |" in text
    assert text.index("| markov | 1 | 0.0600 |") < text.index("| a | 2 |")
    assert "`sid study toy`" in text
    assert "Not run here: 1 of 2 comparisons" in text
    assert "d" * 12 in text
    assert "2 CPU minutes, on NVIDIA H200, cpu." in text


def test_the_page_is_one_file_without_addresses_and_escapes_what_it_shows(tmp_path: Path) -> None:
    text = study_page.write_page(tmp_path / "index.html", document()).read_text(encoding="utf-8")
    assert "a &lt;b&gt; beats b" in text
    assert text.count("<svg") == 4
    assert 'class="verdict pass">kept' in text
    assert "validation NDCG@50" in text, "what the curves show stands at their axis"
    assert "<script" not in text
    assert 'src="http' not in text


def test_a_results_file_gets_the_table_between_its_markers_alone() -> None:
    before = "# Results\n<!-- study:toy -->\nold\n<!-- /study -->\nrest <!-- study:other -->\nkept\n<!-- /study -->\n"
    after = study_page.inserted(before, "toy", "new \\1\n", where="f")
    assert after == before.replace("old\n", "new \\1\n")
    assert study_page.inserted(after, "toy", "new \\1\n", where="f") == after
    with pytest.raises(ConfigError, match="no place"):
        study_page.inserted("nothing", "toy", "new", where="f")
