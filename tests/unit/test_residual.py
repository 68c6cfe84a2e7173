"""The residual walk from one matrix product: the codes of the plain walk, with and without bfloat16, alone and in a crowd."""

from __future__ import annotations

import pytest
import torch

from pipeline.tokenizers import residual
from pipeline.tokenizers.quantize import residual_codes

WIDTH, SIZE, LEVELS = 160, 20, 3


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def world(count: int = 600) -> tuple[torch.Tensor, torch.Tensor]:
    books = torch.randn(LEVELS, SIZE, WIDTH, generator=rng(1)) + 3.0
    return torch.randn(count, WIDTH, generator=rng(2)) + 1.0, books


def loop(points: torch.Tensor, books: torch.Tensor) -> torch.Tensor:
    """Float64, one point and level at a time."""
    codes = []
    for point in points.double():
        rest, row = point, []
        for book in books.double():
            row.append(int((rest - book).square().sum(1).argmin()))
            rest = rest - book[row[-1]]
        codes.append(row)
    return torch.tensor(codes)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_codes_are_those_of_the_walk(bfloat16):
    points, books = world()
    codes = residual.ResidualSearch(books, bfloat16=bfloat16).codes(points)
    assert torch.equal(codes, loop(points, books))
    assert torch.equal(codes, residual_codes(points, books)[0])


def test_the_second_look_is_taken_and_needed(monkeypatch):
    points, books = world()
    search = residual.ResidualSearch(books, bfloat16=True)
    search.codes(points)
    assert 0 < search.in_doubt < LEVELS * len(points)
    monkeypatch.setattr(residual, "SLACK", -1e9)  # no margin at all
    assert not torch.equal(search.codes(points), loop(points, books))


@pytest.mark.parametrize("bfloat16", [False, True])
def test_near_ties_are_decided_in_float32(bfloat16):
    points, books = world(64)
    books[0, 1] = books[0, 0] * (1 + 1e-4)  # the same row once it is rounded
    assert torch.equal(residual.ResidualSearch(books, bfloat16=bfloat16).codes(points), loop(points, books))


@pytest.mark.parametrize("bfloat16", [False, True])
def test_equal_rows_give_the_lower_code(bfloat16):
    points, books = world(50)
    books[:] = books[:, :1]
    assert residual.ResidualSearch(books, bfloat16=bfloat16).codes(points).eq(0).all()


def test_an_item_keeps_its_code_whoever_is_with_it():
    points, books = world(300)
    search = residual.ResidualSearch(books, bfloat16=True)
    crowd = search.codes(points)
    assert torch.equal(torch.cat([search.codes(point[None]) for point in points]), crowd)
    assert torch.equal(search.codes(points.flip(0)).flip(0), crowd)


@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_and_threads_change_nothing(threads, monkeypatch):
    points, books = world(500)
    search, before = residual.ResidualSearch(books, bfloat16=True), torch.get_num_threads()
    whole = search.codes(points)
    monkeypatch.setattr(residual, "BLOCK", 64)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(search.codes(points), whole)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_no_points_give_no_codes():
    _, books = world()
    assert residual.ResidualSearch(books).codes(torch.zeros(0, WIDTH)).shape == (0, LEVELS)


def test_narrow_points_stay_in_float32():
    assert not residual.ResidualSearch(torch.randn(2, 4, 32, generator=rng())).bfloat16


def test_the_sum_of_rows_is_what_the_codes_stand_for():
    points, books = world(40)
    codes, quantised = residual_codes(points, books)
    assert torch.allclose(residual.sum_of_rows(codes, books), quantised, atol=1e-4)
