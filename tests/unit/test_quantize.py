"""Code books: lookups, estimators, k-means, revival, principal axes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pipeline.tokenizers import quantize
from pipeline.tokenizers.metrics import code_counts, gini


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(clusters: int = 6, each: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    centres = 10 * torch.randn(clusters, 5, generator=rng(1))
    label = torch.arange(clusters).repeat_interleave(each)
    return centres[label] + 0.1 * torch.randn(clusters * each, 5, generator=rng(2)), label


def test_cosine_lookup_ignores_lengths():
    z, book = torch.randn(7, 3, 4, generator=rng()), torch.randn(3, 9, 4, generator=rng(1))
    codes = quantize.nearest_code(z, book)
    assert codes.shape == (7, 3)
    lengths = torch.rand(3, 9, 1, generator=rng(2)) + 0.1
    assert torch.equal(codes, quantize.nearest_code(z * 17.0, book * lengths))


def test_gather_codes_gives_the_rows_of_each_position():
    book = torch.randn(2, 5, 3, generator=rng())
    codes = torch.tensor([[4, 0], [1, 1]])
    rows = quantize.gather_codes(codes, book)
    assert torch.equal(rows[0, 0], book[0, 4])
    assert torch.equal(rows[1, 1], book[1, 1])


@pytest.mark.parametrize("code_gradient", [True, False])
def test_straight_through_has_the_codes_value_and_the_right_gradients(code_gradient):
    z, zq = torch.randn(4, 3, generator=rng(), requires_grad=True), torch.randn(4, 3, generator=rng(1), requires_grad=True)
    out = quantize.straight_through(z, zq, code_gradient=code_gradient)
    assert torch.allclose(out, zq)
    (out * torch.arange(3.0)).sum().backward()
    assert torch.equal(z.grad, torch.arange(3.0).expand(4, 3))
    assert (zq.grad is not None and torch.equal(zq.grad, z.grad)) if code_gradient else zq.grad is None


def test_codebook_and_commitment_losses_move_one_side_each():
    z, zq = torch.randn(4, 2, 3, generator=rng(), requires_grad=True), torch.randn(4, 2, 3, generator=rng(1), requires_grad=True)
    quantize.codebook_loss(z, zq).sum().backward()
    assert z.grad is None
    assert torch.allclose(zq.grad, 2 * (zq - z).detach())
    zq.grad = None
    quantize.commitment_loss(z, zq).sum().backward()
    assert zq.grad is None
    assert torch.allclose(z.grad, 2 * (z - zq).detach())


def test_kmeans_finds_separated_clusters_and_repeats_itself():
    points, label = blobs()
    centroids = quantize.kmeans(points, 6, generator=rng(3))
    codes = quantize.nearest_centroid(points, centroids)
    assert all(len(codes[label == at].unique()) == 1 for at in range(6))
    assert torch.equal(centroids, quantize.kmeans(points, 6, generator=rng(3)))
    assert not torch.equal(centroids, quantize.kmeans(points, 6, generator=rng(4)))


def test_kmeans_with_fewer_points_than_codes():
    centroids = quantize.kmeans(torch.eye(3), 5, generator=rng())
    assert centroids.shape == (5, 3)
    assert torch.isfinite(centroids).all()
    with pytest.raises(ValueError, match="at least one point"):
        quantize.kmeans(torch.zeros(0, 3), 5, generator=rng())


def test_spherical_kmeans_stays_on_the_sphere():
    centroids = quantize.kmeans(F.normalize(torch.randn(200, 4, generator=rng()), dim=1), 8, generator=rng(), spherical=True)
    assert torch.allclose(centroids.norm(dim=1), torch.ones(8), atol=1e-5)


def test_balanced_fitting_evens_out_skewed_points():
    points = torch.randn(1500, 6, generator=rng()) * torch.linspace(0.2, 2.0, 1500)[:, None]
    spread = [gini(code_counts(quantize.nearest_centroid(points, quantize.kmeans(points, 40, generator=rng(2), balanced=even)), 40)) for even in (True, False)]
    assert spread[0] < 0.8 * spread[1]


def test_prices_fill_every_code_about_equally():
    points, centroids = torch.randn(1000, 3, generator=rng()), torch.randn(10, 3, generator=rng(1))
    price = torch.zeros(10)
    for _ in range(8):
        codes, price = quantize.balanced_codes(points, centroids, price)
    counts = code_counts(codes, 10)
    assert int(counts.max()) < 1.5 * int(counts.min())


@pytest.mark.parametrize("far", [1e2, 1e4])
def test_prices_stay_finite_where_shares_vanish(far):
    points = torch.cat([torch.zeros(50, 2), torch.randn(50, 2, generator=rng()) * 1e-3])
    book = torch.tensor([[0.0, 0.0], [1e-3, 0.0], [far, far]])
    price = torch.zeros(3)
    for _ in range(12):
        codes, price = quantize.balanced_codes(points, book, price, rounds=30)
        assert torch.isfinite(price).all()
    assert int(codes.max()) < 3


def test_points_that_stand_still_early_are_evened_out_all_the_same(monkeypatch):
    seen, even = [], quantize.balanced_codes
    monkeypatch.setattr(quantize, "balanced_codes", lambda *tensors: seen.append(tensors) or even(*tensors))
    points, _ = blobs()
    quantize.kmeans(points, 6, generator=rng(3), iterations=20)
    assert not seen
    quantize.kmeans(points, 6, generator=rng(3), iterations=20, balanced=True)
    assert len(seen) == 7, "a third of the iterations"


def test_axes_are_dealt_in_equal_hands_of_like_spread():
    variance = torch.tensor([64.0, 32, 16, 8, 4, 2, 1, 1, 1])
    hands = quantize.deal_axes(variance, 3)
    assert sorted(axis for hand in hands for axis in hand) == list(range(9))
    assert {len(hand) for hand in hands} == {3}
    product = [float(variance[hand].prod()) for hand in hands]
    assert max(product) / min(product) < 16
    assert quantize.deal_axes(variance, 1) == [list(range(9))]


def test_nearest_centroid_in_blocks_equals_the_distance_matrix(monkeypatch):
    points, centroids = torch.randn(101, 4, generator=rng()), torch.randn(7, 4, generator=rng(1))
    monkeypatch.setattr(quantize, "CHUNK", 70)
    assert torch.equal(quantize.nearest_centroid(points, centroids), torch.cdist(points, centroids).argmin(1))


def test_revival_moves_exactly_the_dead_codes_onto_points():
    points, _ = blobs()
    book = torch.cat([points[:3], torch.full((2, 5), 1e4)])
    codes = quantize.nearest_centroid(points, book)
    counts = code_counts(codes, 5)
    revived, moved = quantize.revive_codes(book, counts, points, codes, generator=rng())
    assert moved.tolist() == (counts < 2).tolist()
    assert torch.equal(revived[~moved], book[~moved])
    assert all((points == row).all(1).any() for row in revived[moved])
    assert float((points - revived[quantize.nearest_centroid(points, revived)]).square().sum()) < float((points - book[codes]).square().sum())


def test_revival_leaves_a_living_code_book_alone():
    book = torch.eye(3)
    revived, moved = quantize.revive_codes(book, torch.tensor([5, 2, 9]), book, torch.arange(3), generator=rng())
    assert revived is book
    assert not moved.any()


def test_residual_codes_add_up_to_the_quantised_vector():
    points, books = torch.randn(60, 4, generator=rng()), torch.randn(3, 10, 4, generator=rng(1))
    codes, quantised = quantize.residual_codes(points, books)
    rest = points
    for level in range(3):
        assert torch.equal(codes[:, level], torch.cdist(rest, books[level]).argmin(1))
        rest = rest - books[level][codes[:, level]]
    assert torch.allclose(quantised, points - rest, atol=1e-5)


def test_principal_axes_are_orthonormal_signed_and_ordered():
    points = torch.randn(300, 6, generator=rng()) * torch.tensor([9.0, 5, 3, 2, 1, 0.5])
    mean, axes = quantize.principal_axes(points, 4)
    assert torch.allclose(axes.T @ axes, torch.eye(4), atol=1e-5)
    assert (axes.gather(0, axes.abs().argmax(0, keepdim=True)) > 0).all()
    variance = ((points - mean) @ axes).var(0)
    assert (variance[:-1] >= variance[1:]).all()
    assert torch.allclose(axes, quantize.principal_axes(points, 4)[1])
    assert quantize.principal_axes(points, 10)[1].shape == (6, 6)
