"""The plain control of the study (k-means per slot) and the reader of neighbours, against slow loops."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizer_items import tiny_items

from jobs import study_cells, study_data
from jobs.study_data import Catalogue, Log, World, prepared
from pipeline import study
from pipeline.study import DataSet
from pipeline.tokenizers import quantize
from pipeline.tokenizers.base import ItemBatch
from pipeline.tokenizers.prior import BehaviorPrior

SIZE, KNOWN = 7, 80  # K; the last 16 of the 96 items are known to later periods alone
SLOTS = ("shared_0", "text_0", "text_1", "image_0", "behavior_0", "behavior_1", "behavior_2")
WIDE = {"text": range(1, 3), "image": range(3, 4), "behavior": range(4, 7)}  # modality -> its slots


def world(num_items: int, num_known: int, *, users: int = 12, seed: int = 0) -> World:
    """Users of 4 to 9 events, the last two of them asked; items that the training period does not know are never trained on."""
    rng = np.random.default_rng(seed)
    user_T = np.repeat(np.array([f"u{user:03d}" for user in range(users)]), rng.integers(4, 10, users))
    part_T, stop_T = study_data._last_two(user_T)
    ids = np.array([f"i{item:03d}" for item in range(num_items)])
    drawn_T = rng.integers(0, num_known, len(user_T))
    words = [""] * num_items
    catalogue = Catalogue(ids, words, words, words, np.arange(num_items) < num_known, np.full(num_items, -1))
    return prepared(Log(user_T, ids[drawn_T], part_T, stop_T, np.zeros(len(user_T), dtype=bool), np.full(len(user_T), np.nan)), catalogue, DataSet())


def page(**sections: object) -> study.Page:
    ada = {"num_shared": 1, "num_text": 2, "num_image": 1, "num_behavior": 3, "codebook_size": SIZE, **dict(sections.pop("ada", {}))}
    arms = {"here": {"tokenizer": "plain"}}
    chosen = {"data": {"toy": {"kind": "shop"}}, "arms": arms, "readers": {"near": {"kind": "neighbours"}}, "train_tokenizer": {"ada_sid": ada}}
    return study.parse({**chosen, **sections}, where="here")


def job(chosen: study.Page, kind: str, made: World, root: Path = Path()) -> study_cells.Job:
    cell = next(cell for cell in study.grid(chosen, {"toy": "digest"}) if cell.kind == kind)
    return study_cells.Job(chosen, cell, made, study_cells.Store(root), "valid")


# ---------------------------------------------------------------- k-means per slot


class Watched:
    """The plain codes of some items, and for each slot the points its centroids were made of and the centroids."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, items: ItemBatch, **ada: object) -> None:
        self.fitted: list[tuple[np.ndarray, np.ndarray]] = []
        real = quantize.kmeans

        def seen(points_ND: torch.Tensor, size: int, **options: object) -> torch.Tensor:
            centroids_KD = real(points_ND, size, **options)
            self.fitted.append((points_ND.numpy(), centroids_KD.numpy()))
            return centroids_KD

        with monkeypatch.context() as patched:
            patched.setattr(quantize, "kmeans", seen)
            made = study_cells.plain_codes(job(page(ada=ada), "codes", world(len(items), KNOWN)), items, 5)
        self.codes_NL, self.weights_NL = (each.numpy() for each in made[:2])
        self.sizes, self.slots = made[2:]


def shown(items: ItemBatch) -> list[np.ndarray]:
    """Which items each slot shows."""
    masks = {name: items.mask(name).numpy() for name in WIDE}
    return [masks["text"] | masks["image"] | masks["behavior"], *(masks[name] for name, slots in WIDE.items() for _ in slots)]


def garbled(items: ItemBatch) -> ItemBatch:
    """The items, with something huge where a mask says there is nothing; the second item has nothing at all."""
    bare_N = torch.arange(len(items)) == 1
    masks = {name: items.mask(name) & ~bare_N for name in WIDE}
    vectors = {name: torch.where(masks[name][:, None], items.vectors(name), torch.tensor(1e6)) for name in WIDE}
    return replace(items, **{f"{name}_N": mask for name, mask in masks.items()}, **{f"{name}_ND": each for name, each in vectors.items()})


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def test_a_code_is_the_nearest_centroid_and_one_that_is_not_shown_is_the_reserved_code(monkeypatch: pytest.MonkeyPatch) -> None:
    items = garbled(tiny_items())
    found = Watched(monkeypatch, items)
    assert found.slots == SLOTS
    assert found.sizes == (SIZE,) * len(SLOTS)
    np.testing.assert_array_equal(found.weights_NL, found.codes_NL != SIZE)
    shared = [np.concatenate([unit(items.vectors(name)[row].numpy()) * bool(items.mask(name)[row]) for name in WIDE]) for row in range(len(items))]
    for slot, mask_N in enumerate(shown(items)):
        points, centroids_KD = found.fitted[slot]
        assert len(points) == mask_N[:KNOWN].sum(), "known items that the slot shows, and no others"
        assert (found.codes_NL[~mask_N, slot] == SIZE).all()
        own = iter(points)
        for row in np.flatnonzero(mask_N)[: len(points)]:
            point = next(own)
            if slot == 0:
                np.testing.assert_allclose(point, shared[row], atol=1e-6)
            distance_K = [float(((point - centroid) ** 2).sum()) for centroid in centroids_KD]
            assert distance_K[found.codes_NL[row, slot]] == pytest.approx(min(distance_K), abs=1e-5)
    for row in range(KNOWN, len(items)):  # items without a training event are coded by the same centroids
        distance_K = [float(((shared[row] - centroid) ** 2).sum()) for centroid in found.fitted[0][1]]
        assert distance_K[found.codes_NL[row, 0]] == pytest.approx(min(distance_K), abs=1e-5)
    assert (found.codes_NL[1] == SIZE).all(), "nothing is known of this one"


def test_items_of_later_periods_move_no_centroid(monkeypatch: pytest.MonkeyPatch) -> None:
    items = tiny_items()
    later_N1 = (torch.arange(len(items)) >= KNOWN)[:, None]
    moved = replace(items, **{f"{name}_ND": torch.where(later_N1, 9 - 3 * items.vectors(name), items.vectors(name)) for name in WIDE})
    for prior in ("none", "absent"):
        before, after = (Watched(monkeypatch, each, behavior_prior=prior) for each in (items, moved))
        for (_, old), (_, new) in zip(before.fitted, after.fitted, strict=True):
            np.testing.assert_array_equal(old, new)
        np.testing.assert_array_equal(before.codes_NL[:KNOWN], after.codes_NL[:KNOWN])
        assert (before.codes_NL[KNOWN:] != after.codes_NL[KNOWN:]).any()


@pytest.mark.parametrize("name", [*WIDE])
def test_the_slots_of_a_modality_share_out_its_axes_with_about_equal_variance(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    items = tiny_items()
    fitted = [Watched(monkeypatch, items).fitted[slot][0].astype(np.float64) for slot in WIDE[name]]
    own = items.vectors(name)[:KNOWN][items.mask(name)[:KNOWN]].double().numpy()
    centred = own - own.mean(0)
    turned = np.concatenate(fitted, 1)
    assert turned.shape == own.shape, "every axis once"
    np.testing.assert_allclose(turned @ turned.T, centred @ centred.T, atol=1e-3)
    covariance = turned.T @ turned / len(own)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-3)  # the axes are principal: they do not vary together
    spread = [np.log(part.var(0)).sum() for part in fitted]
    axes = sorted(np.log(np.diag(covariance)), reverse=True)
    in_a_row = [sum(part) for part in np.array_split(axes, len(fitted))]
    assert len({part.shape[1] for part in fitted}) == 1
    assert max(spread) - min(spread) <= 0.25 * (max(in_a_row) - min(in_a_row))


def test_behaviour_comes_from_content_where_the_section_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    items = tiny_items()
    none, absent, poor = (Watched(monkeypatch, items, behavior_prior=how) for how in ("none", "absent", "poor"))
    own_N, content_N = items.behavior_N.numpy(), (items.text_N | items.image_N).numpy()
    behavior = [*WIDE["behavior"]]
    assert (none.codes_NL[~own_N][:, behavior] == SIZE).all()
    prior = BehaviorPrior(items.widths())
    prior.fit(items.take(torch.arange(len(items)) < KNOWN))
    for how, found in (("absent", absent), ("poor", poor)):
        np.testing.assert_array_equal((found.codes_NL[:, behavior] < SIZE).all(1), own_N | content_N)
        given = prior.apply_to(items, shrink=how == "poor")
        own = given.vectors("behavior")[:KNOWN][given.behavior_N[:KNOWN]].double().numpy()
        turned = np.concatenate([found.fitted[slot][0] for slot in behavior], 1).astype(np.float64)
        centred = own - own.mean(0)
        np.testing.assert_allclose(turned @ turned.T, centred @ centred.T, atol=1e-3)
    assert not np.allclose(absent.fitted[behavior[0]][0], poor.fitted[behavior[0]][0], atol=1e-3)


def test_the_plain_control_has_the_slots_that_there_are_vectors_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Watched(monkeypatch, tiny_items(modalities=("text", "behavior")), num_shared=2, num_text=1, num_behavior=0)
    assert found.slots == ("shared_0", "shared_1", "text_0")
    assert (found.codes_NL[:, 0] != found.codes_NL[:, 1]).any(), "two shared slots begin at other seeds"


# ---------------------------------------------------------------- neighbours


@pytest.mark.parametrize("slots", [("shared_0", "text_0", "behavior_0"), ("level_0", "level_1", "level_2")])
@pytest.mark.parametrize("mask_history", [True, False])
def test_neighbours_rank_items_by_the_codes_they_share_with_the_last_one(tmp_path: Path, slots: tuple[str, ...], mask_history: bool) -> None:
    made, rng = world(20, 20, users=30), np.random.default_rng(1)
    asking = job(page(train_retriever={"mask_history": mask_history}), "read", made, tmp_path)
    codes_NL = rng.integers(0, 3, (20, 3))
    weights_NL = rng.choice([0.25, 0.5, 1.0], (20, 3)).astype(np.float32)  # sums of their products are exact, so equal scores are equal
    codes_NL[3] = 3
    weights_NL[3] = 0
    asking.store.keep(asking.cell.needs[1], {"codes_NL": codes_NL, "weights_NL": weights_NL})
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / f"{asking.cell.needs[1]}.json").write_text(json.dumps({"sizes": [3, 3, 3], "slots": slots}), encoding="utf-8")
    document = study_cells.read(asking)

    def shared(a: int, b: int) -> float:
        total = 0.0
        for slot, name in enumerate(slots):
            if codes_NL[a, slot] == codes_NL[b, slot]:
                total += float(weights_NL[a, slot] * weights_NL[b, slot])
            elif name.startswith("level"):
                break
        return total

    ranks, again = [], []
    for at in made.asked("valid").at_Q:
        before = made.item_T[made.offset_U[made.user_T[at]] : at]
        target = int(made.item_T[at])
        again.append(target in before)
        others = [item for item in range(20) if item != target and not (mask_history and item in before)]
        own = shared(before[-1], target)
        ranks.append(1 + sum(shared(before[-1], other) > own for other in others) + 0.5 * sum(shared(before[-1], other) == own for other in others))
    assert len(ranks) == 30
    np.testing.assert_array_equal(asking.store.arrays(asking.cell.key)["rank_Q"], ranks)
    hit, new = np.array(ranks) <= 10, ~np.array(again)
    assert 0 < new.sum() < 30
    assert document["table"]["all"]["recall@10"] == pytest.approx(hit[new].mean()), "what the user has had would tell itself"
    assert document["table"]["all"]["rows"] == new.sum()
    assert document["table"]["all_with_repeats"]["recall@10"] == pytest.approx(hit.mean())
    assert document["table"]["all_with_repeats"]["rows"] == 30
