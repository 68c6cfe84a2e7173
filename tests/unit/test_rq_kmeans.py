"""Residual k-means: the walk, masks, and what is stored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tokenizer_items import WIDTHS, rq_settings, tiny_items, training

from pipeline.tokenizers import from_state
from pipeline.tokenizers.base import FitOptions
from pipeline.tokenizers.metrics import code_use
from pipeline.tokenizers.rq_kmeans import RqKmeans, concatenate


@pytest.fixture(scope="module")
def fitted() -> RqKmeans:
    tokenizer = RqKmeans(rq_settings())
    tokenizer.fit(tiny_items(), FitOptions(seed=1, settings=training()))
    return tokenizer


def test_blocks_are_unit_or_zero():
    items = tiny_items()
    blocks = dict(zip(WIDTHS, concatenate(items, WIDTHS).split(list(WIDTHS.values()), 1), strict=True))
    for name, block in blocks.items():
        assert torch.allclose(block.norm(dim=1), items.mask(name).float(), atol=1e-6)
    lacking = replace(items, text_ND=None, text_N=torch.zeros(96, dtype=torch.bool))
    assert (concatenate(lacking, WIDTHS)[:, :12] == 0).all()


def test_codes_weights_and_sum_of_rows(fitted):
    out = fitted.encode(tiny_items())
    assert out.codes_NL.shape == (96, 3)
    assert (out.weights_NL == 1).all()
    rows = torch.stack([book[codes] for book, codes in zip(fitted.codebooks(), out.codes_NL.unbind(1), strict=True)]).sum(0)
    assert torch.allclose(rows, out.quantized_ND, atol=1e-5)


def test_each_level_leaves_less_over():
    report = RqKmeans(rq_settings()).fit(tiny_items(400), FitOptions(seed=0, settings=training()))
    lost = report.curves["loss/reconstruction"]
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] < 0.6 * lost[0]
    assert report.metrics["nmse/text"] < 0.6


def test_balanced_levels_use_their_codes_more_evenly():
    items = tiny_items(900, gaps=False)
    spread = []
    for balanced in (True, False):
        tokenizer = RqKmeans(rq_settings(balanced=balanced, codebook_size=40, iterations=25))
        tokenizer.fit(items, FitOptions(seed=0, settings=training()))
        spread.append(code_use(tokenizer.encode(items).codes_NL, tokenizer.codebook_sizes, tokenizer.slots)["gini"])
    assert spread[0] < spread[1]


def test_same_seed_same_codes_and_a_round_trip(fitted):
    again = RqKmeans(rq_settings())
    again.fit(tiny_items(), FitOptions(seed=1, settings=training()))
    codes = fitted.encode(tiny_items()).codes_NL
    assert torch.equal(codes, again.encode(tiny_items()).codes_NL)
    assert torch.equal(codes, from_state(fitted.config(), fitted.state()).encode(tiny_items()).codes_NL)
    with pytest.raises(RuntimeError, match="shape"):
        from_state(fitted.config(), {"codebook_LKD": fitted.state()["codebook_LKD"][:1]})


def test_nothing_to_fit_on_is_refused():
    with pytest.raises(ValueError, match="at least one modality"):
        RqKmeans(rq_settings()).fit(tiny_items(modalities=()), FitOptions(seed=0, settings=training()))
    with pytest.raises(ValueError, match="not fitted"):
        RqKmeans(rq_settings()).encode(tiny_items(3))
