"""What every tokenizer owes its callers, as checks that the variants' tests run on their own settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizer_items import Interrupted, stop_after, tiny_items, training

from jobs.train_tokenizer import FileCheckpoint
from pipeline.errors import ContractError
from pipeline.tokenizers import TOKENIZERS, from_state
from pipeline.tokenizers.base import FitOptions, Keep, Start, Tokenizer


def fitted(name: str, settings: Any, *, seed: int = 1, start: Start | None = None, items: Any = None) -> Tokenizer:
    """A tokenizer of that name, fitted on the tiny catalogue."""
    tokenizer = TOKENIZERS[name](settings)
    tokenizer.fit(tiny_items() if items is None else items, FitOptions(seed=seed, settings=training(tokenizer=name), start=start))
    return tokenizer


def repeats_and_survives_storage(name: str, settings: Any) -> None:
    """Same items and seed, same bits; another seed, other rows; config and state rebuild the tokenizer, and tensors of other sizes are refused."""
    items, one, two = tiny_items(), fitted(name, settings), fitted(name, settings)
    state = one.state()
    assert state.keys() == two.state().keys()
    assert all(torch.equal(value, two.state()[key]) for key, value in state.items())
    assert any(not torch.equal(a, b) for a, b in zip(one.codebooks(), fitted(name, settings, seed=2).codebooks(), strict=True))
    assert all(value.is_contiguous() and value.device.type == "cpu" for value in state.values())
    again = from_state(one.config(), state)
    for made, copy in zip(vars(one.encode(items)).values(), vars(again.encode(items)).values(), strict=True):
        assert torch.equal(made, copy)
    key = next(key for key in state if "codebook" in key)
    with pytest.raises(RuntimeError, match="shape"):
        from_state(one.config(), {**state, key: state[key][:1]})


def resumes_bit_for_bit(name: str, settings: Any, folder: Path) -> None:
    """A training that was broken off and resumed equals one that ran through: its curves and its state."""
    items, how, checkpoint = tiny_items(), training(tokenizer=name, max_epochs=8), FileCheckpoint(folder / "state.safetensors")
    straight, broken, resumed = (TOKENIZERS[name](settings) for _ in range(3))
    report = straight.fit(items, FitOptions(seed=3, settings=how))
    with pytest.raises(Interrupted):
        broken.fit(items, FitOptions(seed=3, settings=how, checkpoint=checkpoint, progress=stop_after(5)))
    assert resumed.fit(items, FitOptions(seed=3, settings=how, checkpoint=checkpoint)).curves == report.curves
    assert all(torch.equal(value, resumed.state()[key]) for key, value in straight.state().items())


def speaks_in_shape(name: str, settings: Any, *, items: Any = None) -> None:
    """Codes in range, one per position; an item alone, among others or with rubbish under its masks gets the same; nothing is encoded before a fit."""
    items = tiny_items() if items is None else items
    tokenizer = fitted(name, settings, items=items)
    made = tokenizer.encode(items)
    assert made.codes_NL.shape == made.weights_NL.shape == (len(items), len(tokenizer.slots))
    assert made.codes_NL.dtype == torch.int64
    assert made.weights_NL.dtype == made.quantized_ND.dtype == torch.float32
    sizes_L, shown_N = torch.tensor(tokenizer.codebook_sizes), (made.weights_NL > 0).any(1)
    assert bool(((made.codes_NL >= 0) & (made.codes_NL < sizes_L))[shown_N].all())
    assert bool((made.codes_NL == sizes_L)[~shown_N].all())
    assert [len(rows) for rows in tokenizer.codebooks()] == list(tokenizer.codebook_sizes)
    assert torch.equal(tokenizer.encode(items.take(slice(5, 6))).codes_NL, made.codes_NL[5:6])
    rubbish = {f"{key}_ND": torch.where(items.mask(key)[:, None], items.vectors(key), 77.0) for key in ("text", "image", "behavior")}
    assert torch.equal(tokenizer.encode(replace(items, **rubbish)).codes_NL, made.codes_NL)
    nothing = {f"{key}_N": torch.zeros(len(items), dtype=torch.bool) for key in ("text", "image", "behavior")}
    unread = tokenizer.encode(replace(items, **nothing))
    assert bool((unread.codes_NL == sizes_L).all()), "an item with nothing to read is masked everywhere"
    assert not bool(unread.weights_NL.any() | unread.quantized_ND.any())


def begins_at_its_champion(name: str, settings: Any) -> None:
    """A strong pull keeps the champion's rows, none lets them go; a champion of other sizes is refused."""
    items, champion = tiny_items(seed=5), fitted(name, settings)
    ways = []
    for pull in (0.0, 1e4):
        tokenizer = fitted(name, settings, seed=9, start=Start(tokenizer=champion, pull=pull), items=items)
        ways.append(sum(float((new - old).square().mean()) for new, old in zip(tokenizer.codebooks(), champion.codebooks(), strict=True)))
    assert ways[1] < 0.3 * ways[0]
    bigger = settings.model_copy(update={"codebook_size": settings.codebook_size + 1})
    with pytest.raises(ContractError, match="cannot begin"):
        fitted(name, bigger, start=Start(tokenizer=champion))


def renames_and_holds(name: str, settings: Any) -> None:
    """Renamed codes stand for the same rows; codes are held under a wide margin and let go under none."""
    items, tokenizer = tiny_items(), fitted(name, settings)
    before = tokenizer.encode(items)
    order = [torch.randperm(size, generator=torch.Generator().manual_seed(at)) for at, size in enumerate(tokenizer.codebook_sizes)]
    tokenizer.relabel(order)
    after = tokenizer.encode(items)
    assert not torch.equal(after.codes_NL, before.codes_NL)
    called = [torch.cat([names, torch.tensor([len(names)])]) for names in order]  # a masked position keeps its reserved code
    assert torch.equal(torch.stack([names[codes] for names, codes in zip(called, after.codes_NL.T, strict=True)], 1), before.codes_NL)
    assert torch.allclose(after.quantized_ND, before.quantized_ND, atol=1e-5)
    wished = (after.codes_NL + 1) % torch.tensor(tokenizer.codebook_sizes)
    held = (tokenizer.encode(items, Keep(codes_NL=wished, margin=1e9)).codes_NL == wished)[(after.weights_NL > 0).any(1)]
    assert float(held.double().mean()) > 0.9  # a row that lies on an item at distance 0 is not left for any margin
    assert torch.equal(tokenizer.encode(items, Keep(codes_NL=wished, margin=0.0)).codes_NL, after.codes_NL)
