"""Random codes: the hash against plain integers, evenness, and what an item's code depends on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tokenizer_contract as contract
import torch
from tokenizer_items import tiny_items, training

from pipeline.config import RandomCodes as Settings
from pipeline.tokenizers.base import FitOptions, Start
from pipeline.tokenizers.random_codes import RandomCodes, fingerprints, scramble

ALL = 2**64 - 1


def settings(**changes: object) -> Settings:
    return Settings(**{"num_positions": 3, "codebook_size": 12, **changes})


def slow_scramble(word: int) -> int:
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & ALL
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & ALL
    return word ^ (word >> 31)


def test_scramble_against_plain_integers():
    words = [0, 1, 2, ALL, 0x9E3779B97F4A7C15]
    assert scramble(np.array(words, dtype=np.uint64)).tolist() == [slow_scramble(word) for word in words]


def test_fingerprints_see_every_bit_and_the_order_but_one_zero():
    row = torch.tensor([[0.5, 2.0, -1.0]])
    nudged = torch.from_numpy(np.nextafter(row.numpy(), np.float32(9)))
    words = {int(fingerprints(rows)[0]) for rows in (row, row.flip(1), nudged, row[:, :2])}
    assert len(words) == 4
    assert fingerprints(torch.tensor([[0.0]]))[0] == fingerprints(torch.tensor([[-0.0]]))[0]


def test_codes_are_uniform_and_positions_independent():
    tokenizer = RandomCodes(settings())
    items = tiny_items(6000, gaps=False)
    report = tokenizer.fit(items, FitOptions(seed=0, settings=training()))
    codes = tokenizer.encode(items).codes_NL
    counts = torch.stack([torch.bincount(column, minlength=12) for column in codes.T]).double()
    assert float(((counts - 500).square() / 500).sum(1).max()) < 32.0  # chi-square with 11 degrees, p = .0008
    pairs = torch.bincount(codes[:, 0] * 12 + codes[:, 1], minlength=144).double()
    assert float(((pairs - 6000 / 144).square() / (6000 / 144)).sum()) < 200.0  # 143 degrees, p = .001
    assert report.metrics["perplexity"] > 11.9
    cluster = torch.arange(6000) % 8
    same = torch.bincount(cluster * 12 + codes[:, 0], minlength=96).double()
    assert float(((same - 62.5).square() / 62.5).sum()) < 145.0  # 95 degrees, p = .0008: a code says nothing about the cluster


def test_behaviour_names_an_item_only_where_it_has_no_content():
    items, tokenizer = tiny_items(), RandomCodes(settings())
    tokenizer.fit(items, FitOptions(seed=0, settings=training()))
    moved = (tokenizer.encode(replace(items, behavior_ND=items.behavior_ND + 1.0)).codes_NL != tokenizer.encode(items).codes_NL).any(1)
    assert not moved[items.text_N | items.image_N].any()
    bare = replace(items, text_N=torch.zeros(96, dtype=torch.bool), image_N=torch.zeros(96, dtype=torch.bool))
    changed = (tokenizer.encode(bare).codes_NL != tokenizer.encode(replace(bare, behavior_ND=bare.behavior_ND + 1.0)).codes_NL).any(1)
    assert changed[items.behavior_N].double().mean() > 0.9
    assert not changed[~items.behavior_N].any()


def test_a_champions_hash_and_names_are_taken_over():
    champion = contract.fitted("random_codes", settings())
    order = [torch.arange(12).flip(0)] * 3
    champion.relabel(order)
    heir = contract.fitted("random_codes", settings(), seed=9, start=Start(tokenizer=champion))
    assert torch.equal(heir.encode(tiny_items()).codes_NL, champion.encode(tiny_items()).codes_NL)
    assert torch.equal(heir.encode(tiny_items()).codes_NL, 11 - contract.fitted("random_codes", settings()).encode(tiny_items()).codes_NL)
    assert torch.equal(heir.codebooks()[0], contract.fitted("random_codes", settings()).codebooks()[0].flip(0))


def test_there_is_nothing_to_plot():
    report = RandomCodes(settings()).fit(tiny_items(), FitOptions(seed=0, settings=training()))
    assert report.curves == {}
    assert 0.0 <= report.metrics["collision_rate"] < 0.2


def test_what_every_tokenizer_owes():
    contract.repeats_and_survives_storage("random_codes", settings())
    contract.speaks_in_shape("random_codes", settings())
    with pytest.raises(ValueError, match="no items"):
        RandomCodes(settings()).encode(tiny_items(5).take(slice(0, 0)))
