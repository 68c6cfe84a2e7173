"""Properties of the ranker's arrays and network: padding and order never matter, tokens name codes, permutation keeps the multiset."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import ranker

SIZES = (3, 5)
TABLE_SIZE = 12


def codes_of(draw_seed: int, rows: int = TABLE_SIZE) -> ranker.ItemCodes:
    draw = np.random.default_rng(draw_seed)
    codes = np.stack([draw.integers(0, size + 1, rows) for size in SIZES], axis=1)
    codes[0] = SIZES
    return ranker.ItemCodes(codes, draw.random((rows, 2)).astype(np.float32) * (codes != np.asarray(SIZES)), SIZES)


def model_of(seed: int) -> ranker.Network:
    codes = codes_of(seed)
    tokens, token_rows = ranker.position_tokens(codes)
    table = ranker.ItemTable(np.arange(TABLE_SIZE), tokens, codes.weights, codes.weights, TABLE_SIZE, token_rows)
    torch.manual_seed(seed)
    model = ranker.network({"dim": 6, "hidden_dims": [5]}, table, ranker.Widths(id=4, token=3), num_users=3).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@given(st.lists(st.lists(st.sampled_from("abcdef"), max_size=5), min_size=1, max_size=8))
def test_histories_come_back_from_their_padded_rows(histories):
    vocabulary = pa.array(list("abcd"))
    padded = ranker._histories(pa.chunked_array([pa.array(histories, pa.list_(pa.string()))]), vocabulary)
    for row, history in zip(padded, histories, strict=True):
        expected = ["abcd".find(item) + 1 for item in history]
        assert row[: len(history)].tolist() == expected
        assert not row[len(history) :].any()


@given(st.integers(0, 10_000))
def test_a_token_names_exactly_one_position_and_code(seed):
    codes = codes_of(seed)
    tokens, rows = ranker.position_tokens(codes)
    named: dict[int, tuple[int, int]] = {}
    for position in range(len(SIZES)):
        for token, code in zip(tokens[:, position], codes.codes[:, position], strict=True):
            assert (token == 0) == (code == SIZES[position])
            if token:
                assert named.setdefault(int(token), (position, int(code))) == (position, int(code))
    assert all(0 < token < rows for token in named)


@given(st.integers(0, 10_000), st.integers(1, 60))
def test_permutation_moves_pairs_within_deciles_only(seed, rows):
    codes = codes_of(seed, rows)
    popularity = np.random.default_rng(seed).integers(0, 5, rows).astype(np.float32)
    moved = ranker.permute_within_deciles(codes, popularity, seed)
    pairs, moved_pairs = (np.concatenate([c.codes, c.weights], axis=1) for c in (codes, moved))
    with_sid = np.flatnonzero((codes.codes != np.asarray(SIZES)).any(axis=1))
    without = np.setdiff1d(np.arange(rows), with_sid)
    np.testing.assert_array_equal(pairs[without], moved_pairs[without])
    ranked = with_sid[np.argsort(popularity[with_sid], kind="stable")]
    decile = np.arange(len(ranked)) * 10 // max(len(ranked), 1)
    for number in np.unique(decile):
        part = ranked[decile == number]
        assert sorted(map(tuple, pairs[part])) == sorted(map(tuple, moved_pairs[part]))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 50), st.integers(0, 4), st.lists(st.lists(st.integers(1, TABLE_SIZE - 1), max_size=4), min_size=2, max_size=5))
def test_padding_and_neighbours_in_the_batch_never_change_a_logit(seed, extra, histories):
    model = model_of(seed)
    width = max(map(len, histories)) or 1
    batch = torch.tensor([history + [0] * (width - len(history)) for history in histories])
    target = torch.arange(len(histories)) % (TABLE_SIZE - 1) + 1
    user = torch.arange(len(histories)) % 4
    with torch.no_grad():
        logits = model(user, target, batch)
        padded = model(user, target, torch.nn.functional.pad(batch, (0, extra)))
        alone = torch.cat([model(user[i : i + 1], target[i : i + 1], batch[i : i + 1]) for i in range(len(histories))])
    torch.testing.assert_close(padded, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone, logits, rtol=1e-4, atol=1e-5)
