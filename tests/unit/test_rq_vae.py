"""RQ-VAE: its equations against loops, what is reconstructed, the even assignment, resume, and the tokenizer's duties."""

from __future__ import annotations

import numpy as np
import pytest
import tokenizer_contract as contract
import torch
from draws import rand
from tokenizer_items import WIDTHS, tiny_items, training

from pipeline.config import RqVae as Settings
from pipeline.tokenizers import rq_vae
from pipeline.tokenizers.base import FitOptions
from pipeline.tokenizers.quantize import nearest_centroid
from pipeline.tokenizers.rq_vae import Autoencoder, RqVae, Training
from pipeline.tokenizers.world import World


def settings(**changes: object) -> Settings:
    return Settings(**{"num_levels": 3, "codebook_size": 12, "latent_dim": 6, "hidden_dims": [24], "warmup_epochs": 2, **changes})


def test_residual_walk_against_a_loop():
    z, books = rand(6, 3), rand(2, 4, 3, seed=1)
    codes, rests, rows = rq_vae.residual_walk(z, books)
    for b in range(6):
        rest = z[b].double().numpy()
        for level in range(2):
            k = int(np.argmin([((rest - book) ** 2).sum() for book in books[level].double().numpy()]))
            assert k == int(codes[b, level])
            np.testing.assert_allclose(rests[b, level].numpy(), rest, atol=1e-6)
            np.testing.assert_array_equal(rows[b, level].numpy(), books[level, k].numpy())
            rest = rest - books[level, k].numpy()


def test_every_level_pulls_the_latent_and_each_row_its_own_rest():
    z, books = rand(5, 3).requires_grad_(), rand(2, 4, 3, seed=1).requires_grad_()
    codes, rests, rows = rq_vae.residual_walk(z, books)
    rq_vae.commitment_loss(rests, rows).sum().backward()
    assert books.grad is None
    torch.testing.assert_close(z.grad, 2 * (rests - rows).sum(1).detach())
    rq_vae.codebook_loss(rests, rows).sum().backward()
    slow = torch.zeros(2, 4, 3)
    for b in range(5):
        for level in range(2):
            slow[level, codes[b, level]] += 2 * (rows - rests)[b, level].detach()
    torch.testing.assert_close(books.grad, slow)


def test_reconstruction_asks_nothing_of_masked_columns():
    x, y, shown = rand(3, 4), rand(3, 4, seed=1), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    slow = [sum(float(x[b, d] - y[b, d]) ** 2 for d in range(4) if shown[b, d]) / 4 for b in range(3)]
    np.testing.assert_allclose(rq_vae.reconstruction_loss(x, y, shown).numpy(), slow, rtol=1e-5)


def test_even_codes_fill_what_nearest_codes_leave_empty():
    points, book = rand(40, 2), torch.cat([torch.zeros(1, 2), rand(3, 2, seed=1) + 9.0])
    even = rq_vae.even_codes(points, book, epsilon=0.01, rounds=200, world=World())
    assert nearest_centroid(points, book).unique().tolist() == [0]
    counts = torch.bincount(even, minlength=4)
    assert 5 <= int(counts.min()) <= int(counts.max()) <= 15


def test_inputs_keep_the_shares_of_unit_vectors_and_masks_are_zero():
    items = tiny_items()
    network = Autoencoder(settings(), WIDTHS)
    network.fit_inputs(items)
    prepared = network.prepare(items)
    shares = []
    for name in WIDTHS:
        assert (prepared.vectors(name)[~items.mask(name)] == 0).all()
        shown = prepared.vectors(name)[items.mask(name)]
        assert torch.allclose(shown.mean(0), torch.zeros(shown.shape[1]), atol=1e-5)
        unit = torch.nn.functional.normalize(items.vectors(name)[items.mask(name)], dim=1)
        shares.append(float(shown.var(0, correction=0).sum() / unit.var(0, correction=0).sum()))
    assert max(shares) == pytest.approx(min(shares), rel=1e-4)
    with pytest.raises(ValueError, match="wide"):
        network.prepare(tiny_items().map(lambda value: value[:, :5] if value.dim() == 2 else value))
    with pytest.raises(ValueError, match="at least one modality"):
        Autoencoder(settings(), {})


def test_training_reconstructs_better_and_each_level_leaves_less_over():
    report = RqVae(settings()).fit(tiny_items(400), FitOptions(seed=0, settings=training(max_epochs=40, learning_rate=3e-3)))
    assert report.curves["loss/reconstruction"][-1] < 0.5 * report.curves["loss/reconstruction"][0]
    left = [report.metrics[f"left_over/level_{level}"] for level in range(3)]
    assert left == sorted(left, reverse=True)
    assert report.metrics["nmse/text"] < 0.6
    assert report.metrics["dead_codes"] == 0


def test_training_may_assign_the_last_level_evenly_and_counts_what_it_assigned():
    torch.manual_seed(0)
    network = Autoencoder(settings(), WIDTHS)
    prepared, most = network.prepare(tiny_items()), []
    for even in (False, True):
        network.settings = settings(sinkhorn=even, sinkhorn_epsilon=0.02)
        made, terms = network.losses(prepared, quantise=True, world=World())
        most.append(torch.bincount(made.codes_BL[:, -1], minlength=12).max())
        assert terms["total"].isfinite()
    assert most[1] < 0.5 * most[0]
    assert network.usage_LK.sum(1).tolist() == [2 * 96] * 3
    assert (network(prepared, quantise=True).codes_BL == network.losses(prepared, quantise=False, world=World())[0].codes_BL).all()


def test_dead_codes_move_and_living_ones_stay():
    items = tiny_items()
    network = Autoencoder(settings(), WIDTHS)
    network.fit_inputs(items)
    prepared, training_view = network.prepare(items), Training(network)
    training_view.start_codes(prepared, generator=torch.Generator().manual_seed(0))
    network.usage_LK.fill_(5.0)
    network.usage_LK[1, 4] = 1.0
    before = network.codebook_LKD.detach().clone()
    moved = training_view.revive(prepared, generator=torch.Generator().manual_seed(1), world=World())["codebook_LKD"]
    assert torch.nonzero(moved).tolist() == [[1, 4]]
    assert torch.nonzero((network.codebook_LKD != before).any(2)).tolist() == [[1, 4]]
    assert not network.usage_LK.any()


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    contract.resumes_bit_for_bit("rq_vae", settings(sinkhorn=True), tmp_path)


def test_what_every_tokenizer_owes():
    contract.repeats_and_survives_storage("rq_vae", settings())
    contract.speaks_in_shape("rq_vae", settings())
    contract.begins_at_its_champion("rq_vae", settings())
    contract.renames_and_holds("rq_vae", settings())
    with pytest.raises(ValueError, match="not fitted"):
        RqVae(settings()).encode(tiny_items(3))
