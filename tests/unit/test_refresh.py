"""Refits that keep the champion's words: starting at it, being pulled to it, matching codes, holding on to codes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tokenizer_items import ada_settings, rq_settings, tiny_items, training

from pipeline.errors import ContractError
from pipeline.tokenizers.ada_sid import AdaSid
from pipeline.tokenizers.base import FitOptions, ItemBatch, Keep, Start, Tokenizer
from pipeline.tokenizers.quantize import hold_on, kmeans, residual_codes
from pipeline.tokenizers.refresh import champion, match_codes
from pipeline.tokenizers.rq_kmeans import RqKmeans


def moved_items(way: float) -> ItemBatch:
    rng = torch.Generator().manual_seed(5)
    return tiny_items().map(lambda value: value + way * torch.randn(value.shape, generator=rng) if value.ndim == 2 else value)


def fitted(name: str, *, seed: int = 0, way: float = 0.0, start: Start | None = None) -> Tokenizer:
    tokenizer = AdaSid(ada_settings()) if name == "ada_sid" else RqKmeans(rq_settings(balanced=False))
    tokenizer.fit(moved_items(way), FitOptions(seed=seed, settings=training(), start=start))
    return tokenizer


def kept_share(old: Tokenizer, new: Tokenizer) -> float:
    items = tiny_items()
    return float((old.encode(items).codes_NL == new.encode(items).codes_NL).all(1).double().mean())


@pytest.mark.parametrize("name", ["ada_sid", "rq_kmeans"])
def test_an_anchored_refit_keeps_more_codes_than_a_cold_one(name):
    old = fitted(name)
    anchored = fitted(name, seed=1, start=Start(tokenizer=old, pull=100.0))
    cold = fitted(name, seed=1)
    assert kept_share(old, anchored) > kept_share(old, cold) + 0.3


@pytest.mark.parametrize("name", ["ada_sid", "rq_kmeans"])
def test_the_pull_holds_the_code_rows(name):
    old = fitted(name)
    way = {}
    for pull in (0.0, 1000.0):
        new = fitted(name, seed=1, way=0.3, start=Start(tokenizer=old, pull=pull))
        way[pull] = sum(float((a - b).square().sum()) for a, b in zip(old.codebooks(), new.codebooks(), strict=True))
    assert way[1000.0] < 0.5 * way[0.0]


def test_a_refit_does_not_touch_its_champion():
    old = fitted("ada_sid")
    before = {name: value.clone() for name, value in old.state().items()}
    fitted("ada_sid", seed=1, way=0.5, start=Start(tokenizer=old, pull=1.0))
    assert all(torch.equal(before[name], value) for name, value in old.state().items())


def test_a_champion_of_another_kind_is_refused():
    start = Start(tokenizer=fitted("rq_kmeans"))
    with pytest.raises(ContractError, match="cannot begin"):
        champion(start, AdaSid, ada_settings(), {"text": 12})
    with pytest.raises(ContractError, match="cannot begin"):
        champion(start, RqKmeans, rq_settings(num_levels=4, balanced=False), {"text": 12, "image": 8, "behavior": 6})


def test_matching_finds_the_best_of_all_renamings():
    rng = np.random.default_rng(0)
    old, new = torch.from_numpy(rng.integers(0, 5, (200, 2))), torch.from_numpy(rng.integers(0, 5, (200, 2)))  # code 4 = masked
    orders = match_codes(old, new, [4, 4])
    for position in range(2):
        best = max(
            sum(int(((old[:, position] == name) & (new[:, position] == code)).sum()) for name, code in enumerate(order))
            for order in itertools.permutations(range(4))
        )
        got = sum(int(((old[:, position] == name) & (new[:, position] == int(code))).sum()) for name, code in enumerate(orders[position]))
        assert got == best


@pytest.mark.parametrize("name", ["ada_sid", "rq_kmeans"])
def test_matching_undoes_a_renaming(name):
    old, new = fitted(name), fitted(name)
    items = tiny_items()
    rng = torch.Generator().manual_seed(3)
    new.relabel([torch.randperm(size, generator=rng) for size in new.codebook_sizes])
    codes = old.encode(items).codes_NL
    assert not torch.equal(new.encode(items).codes_NL, codes)
    new.relabel(match_codes(codes, new.encode(items).codes_NL, new.codebook_sizes))
    assert torch.equal(new.encode(items).codes_NL, codes)


def test_a_code_is_held_until_another_wins_by_the_margin():
    distance = torch.tensor([[1.0, 1.05, 9.0], [1.0, 1.2, 9.0], [3.0, 1.0, 9.0]])
    assert hold_on(distance, torch.tensor([1, 1, 3]), 0.1).tolist() == [1, 0, 1]  # within the margin, beyond it, nothing to hold
    assert hold_on(distance, torch.tensor([1, 1, 2]), 10.0).tolist() == [1, 1, 2]


@pytest.mark.parametrize("name", ["ada_sid", "rq_kmeans"])
def test_an_unbounded_margin_keeps_everything_and_none_keeps_nothing(name):
    tokenizer, items = fitted(name), tiny_items()
    other = fitted(name, seed=9).encode(items).codes_NL
    sizes = torch.tensor(tokenizer.codebook_sizes)
    free = tokenizer.encode(items).codes_NL
    held = tokenizer.encode(items, Keep(codes_NL=other, margin=1e9)).codes_NL
    assert torch.equal(held, torch.where((other < sizes) & (free < sizes), other, free))
    assert torch.equal(tokenizer.encode(items, Keep(codes_NL=other.clone(), margin=0.0)).codes_NL, free)


def test_below_a_code_that_moved_a_residual_walk_holds_nothing():
    books = torch.tensor([[[0.0], [10.0]], [[0.0], [1.0]]])
    points = torch.tensor([[10.4]])
    codes, _ = residual_codes(points, books, torch.tensor([[0, 1]]), margin=0.5)
    assert codes.tolist() == [[1, 0]]  # level 0 moved from 0 to 10, so level 1 takes the nearest code of the new rest


def test_anchored_kmeans_moves_by_the_weight_of_its_points():
    points = torch.tensor([[1.0], [1.0], [9.0], [9.0]])
    anchor = torch.tensor([[0.0], [10.0]])
    moved = kmeans(points, 2, generator=torch.Generator(), anchor=(anchor, 1.0))
    assert moved.flatten().tolist() == pytest.approx([0.5, 9.5])  # two points and an equal share of the points (2) at the old row
