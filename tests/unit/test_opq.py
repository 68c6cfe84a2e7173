"""OPQ: rotation, batched k-means and the alternation against loops, padding, whitening, and the tokenizer's duties."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import tokenizer_contract as contract
import torch
from draws import rand
from tokenizer_items import tiny_items, training

from pipeline.config import Opq as Settings
from pipeline.tokenizers import opq, quantize
from pipeline.tokenizers.base import FitOptions
from pipeline.tokenizers.opq import Opq


def settings(**changes: object) -> Settings:
    return Settings(**{"num_positions": 4, "codebook_size": 8, "iterations": 8, **changes})


def test_procrustes_finds_the_rotation_and_none_is_better():
    points, turn = rand(50, 4), torch.linalg.qr(rand(4, 4, seed=1)).Q
    torch.testing.assert_close(opq.procrustes(points, points @ turn), turn, atol=1e-5, rtol=0)
    target = rand(50, 4, seed=2)
    best = opq.procrustes(points, target)
    torch.testing.assert_close(best @ best.T, torch.eye(4), atol=1e-5, rtol=0)
    error = float((points @ best - target).square().sum())
    tries = [torch.linalg.qr(best + 0.2 * rand(4, 4, seed=at)).Q for at in range(20)]
    signs = [turned * (turned.T @ best).diagonal().sign() for turned in tries]
    assert min(float((points @ turned - target).square().sum()) for turned in [*tries, *signs]) > error


def test_nearest_codes_by_space_against_a_loop(monkeypatch):
    points, books = rand(3, 20, 2), rand(3, 5, 2, seed=1)
    slow = [[int(np.argmin(((points[space, n] - books[space]) ** 2).sum(1).numpy())) for space in range(3)] for n in range(20)]
    assert opq.nearest_by_space(points, books).tolist() == slow
    monkeypatch.setattr(opq, "CHUNK", 45)
    assert opq.nearest_by_space(points, books).tolist() == slow


@pytest.mark.parametrize("pull", [0.0, 0.5])
def test_means_by_space_against_a_loop(pull):
    points, old = rand(2, 12, 3), rand(2, 4, 3, seed=1)
    codes = torch.tensor([[0, 1], [1, 1], [3, 2]]).repeat(4, 1)
    found = opq.means_by_space(points, codes, old, pull)
    weight = pull * 12 / 4
    for space in range(2):
        empty = []
        for code in range(4):
            own = [points[space, n].numpy() for n in range(12) if codes[n, space] == code]
            if own or weight:
                slow = (np.sum(own, axis=0) + weight * old[space, code].numpy()) / (len(own) + weight)
                np.testing.assert_allclose(found[space, code].numpy(), slow, atol=1e-5)
            else:
                empty.append(code)
        error = (points[space] - found[space][codes[:, space]]).square().sum(1)
        for code, worst in zip(empty, error.argsort(descending=True), strict=False):
            assert torch.equal(found[space, code], points[space, worst])


def test_seeds_are_points_far_apart_and_equal_draws_give_equal_seeds():
    centres = 100 * rand(5, 2)
    points = torch.stack([centres, centres.flip(0)]).repeat(1, 8, 1) + 0.01 * rand(2, 40, 2, seed=1)
    seeds = opq.seeds_by_space(points, 5, generator=torch.Generator().manual_seed(0))
    for space in range(2):
        assert all((points[space] == seed).all(1).any() for seed in seeds[space])
        assert len(quantize.nearest_centroid(seeds[space], points[space, :5]).unique()) == 5
    assert torch.equal(seeds, opq.seeds_by_space(points, 5, generator=torch.Generator().manual_seed(0)))


def test_the_dealt_start_is_a_permutation_of_fair_hands():
    variance = torch.tensor([64.0, 32, 16, 8, 4, 2, 1, 1])
    start = opq.dealt_rotation(variance, 4)
    torch.testing.assert_close(start @ start.T, torch.eye(8))
    product = (variance @ start).view(4, 2).prod(1)
    assert product.max() / product.min() <= 2.0


def test_each_round_of_the_alternation_loses_less():
    report = Opq(settings(whiten=False, codebook_size=16)).fit(tiny_items(500, gaps=False), FitOptions(seed=0, settings=training()))
    lost = report.curves["loss/reconstruction"]
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(lost))
    assert lost[-1] < 0.9 * lost[0]
    assert report.metrics["nmse/text"] < 0.5


def test_a_learned_rotation_beats_none():
    """Two strongly correlated halves: without a rotation both positions say the same."""
    shared = rand(600, 4)
    points = torch.cat([shared, shared + 0.1 * rand(600, 4, seed=1)], 1)
    tokenizer, lost = Opq(settings(num_positions=2, codebook_size=16)), []
    for rounds in (0, 25):
        tokenizer.settings = settings(num_positions=2, codebook_size=16, iterations=rounds)
        spaces = points.view(600, 2, 4).transpose(0, 1)
        rows = opq.seeds_by_space(spaces, 16, generator=torch.Generator().manual_seed(0))
        tokenizer.tensors = {"rotation_WW": torch.eye(8), "codebook_LKd": rows}
        lost.append(tokenizer._alternate(points, 0.0, range(rounds + opq.LAST_ROUNDS))[-1])
    assert lost[1] < 0.8 * lost[0]


@pytest.mark.parametrize(("positions", "pca", "width"), [(4, 512, 28), (5, 7, 10), (40, 512, 40)])
def test_any_width_is_filled_up_to_the_positions(positions, pca, width):
    tokenizer = contract.fitted("opq", settings(num_positions=positions, pca_dim=pca, iterations=2))
    assert tokenizer.state()["rotation_WW"].shape == (width, width)
    assert tokenizer.encode(tiny_items()).codes_NL.shape == (96, positions)


def test_whitened_axes_have_unit_variance_and_flat_ones_count_nothing():
    tokenizer = contract.fitted("opq", settings(pca_dim=20))
    variance = tokenizer._inputs(tiny_items()).var(0, correction=0)
    assert torch.allclose(variance, torch.ones(20), atol=1e-3)
    few = contract.fitted("opq", settings(pca_dim=20, codebook_size=4), items=tiny_items(6, gaps=False))
    assert int((few.state()["scale_W"] == 0).sum()) == 20 - 5


def test_nothing_to_fit_on_is_refused():
    with pytest.raises(ValueError, match="at least one modality"):
        Opq(settings()).fit(tiny_items(modalities=()), FitOptions(seed=0, settings=training()))
    with pytest.raises(ValueError, match="not fitted"):
        Opq(settings()).encode(tiny_items(3))


def test_what_every_tokenizer_owes():
    contract.repeats_and_survives_storage("opq", settings())
    contract.speaks_in_shape("opq", settings())
    contract.begins_at_its_champion("opq", settings())
    contract.renames_and_holds("opq", settings())
