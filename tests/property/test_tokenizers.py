"""Properties of codes that hold for any items: order and company do not matter, masks rule, metrics agree with definitions."""

from __future__ import annotations

from collections import Counter
from functools import cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import AdaSid as AdaSettings
from pipeline.config import Das, Letter, Mmq, Opq, RandomCodes, RqVae, TrainTokenizer, Unger
from pipeline.config import RqKmeans as RqSettings
from pipeline.tokenizers import TOKENIZERS, metrics
from pipeline.tokenizers.base import FitOptions, History, ItemBatch, Tokenizer
from pipeline.tokenizers.quantize import nearest_code
from pipeline.tokenizers.router import behavior_router, lambda_step

ITEMS = 60
SETTINGS = {
    "ada_sid": AdaSettings(codebook_size=6, latent_dim=4, projection_dim=4, hidden_dim=8, num_behavior=2, warmup_epochs=1, sparsity_buckets=2),
    "rq_kmeans": RqSettings(num_levels=2, codebook_size=6, iterations=5),
    "rq_vae": RqVae(num_levels=2, codebook_size=6, latent_dim=4, hidden_dims=[8], warmup_epochs=1, sinkhorn=True),
    "letter": Letter(num_levels=2, codebook_size=6, latent_dim=4, hidden_dims=[8], warmup_epochs=1),
    "opq": Opq(num_positions=4, codebook_size=6, pca_dim=10, iterations=4),
    "random_codes": RandomCodes(num_positions=2, codebook_size=6),
    "mmq": Mmq(num_shared=1, num_image=1, codebook_size=6, latent_dim=4, hidden_dim=8, warmup_epochs=1, tune_epochs=1, max_history=4),
    "das": Das(num_levels=2, codebook_size=6, latent_dim=4, hidden_dims=[8], tower_dim=8, warmup_epochs=1, max_history=4),
    "unger": Unger(num_levels=2, codebook_size=6, latent_dim=4, hidden_dim=8, iterations=5, max_history=4),
}
names = st.sampled_from(sorted(TOKENIZERS))
masks = st.lists(st.booleans(), min_size=3 * ITEMS, max_size=3 * ITEMS)
small = settings(max_examples=20, deadline=None, derandomize=True)


@cache
def catalogue() -> ItemBatch:
    rng = torch.Generator().manual_seed(0)
    everyone = torch.ones(ITEMS, dtype=torch.bool)
    vectors = {f"{name}_ND": torch.randn(ITEMS, width, generator=rng) for name, width in (("text", 5), ("image", 4), ("behavior", 3))}
    return ItemBatch(
        **vectors, text_N=everyone, image_N=everyone, behavior_N=everyone, richness_N=torch.rand(ITEMS, generator=rng), strength_N=torch.ones(ITEMS)
    )


@cache
def fitted(name: str) -> Tokenizer:
    tokenizer = TOKENIZERS[name](SETTINGS[name])
    history = None
    if tokenizer.needs_history:
        index_T = torch.randint(ITEMS, (120,), generator=torch.Generator().manual_seed(1))
        history = History(index_T=index_T, offset_U=torch.arange(0, 121, 6))
    tokenizer.fit(catalogue(), FitOptions(seed=0, settings=TrainTokenizer(max_epochs=3, batch_size=30), history=history))
    return tokenizer


@small
@given(names, st.permutations(range(ITEMS)), st.integers(1, ITEMS))
def test_order_and_company_move_no_code(name, order, count):
    rows = torch.tensor(order[:count])
    whole, some = fitted(name).encode(catalogue()), fitted(name).encode(catalogue().take(rows))
    assert torch.equal(some.codes_NL, whole.codes_NL[rows])
    assert torch.equal(some.weights_NL, whole.weights_NL[rows])


@small
@given(names, masks)
def test_codes_and_weights_stay_in_range_under_any_mask(name, flags):
    shown = torch.tensor(flags).view(3, ITEMS)
    items = catalogue()
    items = ItemBatch(**{**vars(items), "text_N": shown[0], "image_N": shown[1], "behavior_N": shown[2]})
    out = fitted(name).encode(items)
    for codes, weights, size, slot in zip(out.codes_NL.T, out.weights_NL.T, fitted(name).codebook_sizes, fitted(name).slots, strict=True):
        assert int(codes.min()) >= 0
        assert int(codes.max()) <= size
        assert (weights[codes == size] == 0).all()
        assert ((weights >= 0) & (weights <= 2)).all()
        modality = slot.rsplit("_", 1)[0]
        if modality in ("text", "image", "behavior"):
            assert torch.equal(codes == size, ~items.mask(modality))


@small
@given(names, st.integers(0, ITEMS - 1))
def test_a_masked_modality_of_one_item_moves_no_other_item(name, row):
    items = catalogue()
    mask = items.behavior_N.clone()
    mask[row] = False
    one, two = fitted(name).encode(items), fitted(name).encode(ItemBatch(**{**vars(items), "behavior_N": mask}))
    others = torch.arange(ITEMS) != row
    assert torch.equal(one.codes_NL[others], two.codes_NL[others])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_collision_rate_is_the_share_of_items_in_shared_tuples(tuples):
    counted = Counter(tuples)
    assert metrics.collision_rate(torch.tensor(tuples)) == sum(counted[key] > 1 for key in tuples) / len(tuples)
    ids = metrics.tuple_ids(torch.tensor(tuples)).tolist()
    assert len(set(ids)) == len(counted)
    assert len(set(zip(ids, tuples, strict=True))) == len(counted)


@given(st.lists(st.integers(0, 50), min_size=2, max_size=30))
def test_code_use_stays_in_its_bounds(counts):
    counts_K = torch.tensor(counts)
    assert 0.0 <= metrics.gini(counts_K) < 1.0
    assert 1.0 - 1e-9 <= metrics.perplexity(counts_K) <= len(counts) + 1e-6
    assert metrics.utilisation(counts_K) <= 1 - metrics.dead_codes(counts_K) / len(counts) + 1e-12


@given(st.integers(0, 2**31), st.floats(0.01, 100.0))
def test_lookup_does_not_see_lengths(seed, length):
    rng = torch.Generator().manual_seed(seed)
    z, book = torch.randn(3, 2, 4, generator=rng), torch.randn(2, 5, 4, generator=rng)
    assert torch.equal(nearest_code(z, book), nearest_code(z * length, book))


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=10), st.floats(0, 1))
def test_router_is_bounded_and_switches_off_exactly(logits, richness):
    weight = behavior_router(torch.tensor([logits]), torch.tensor([richness]))
    assert ((weight >= 0) & (weight < 0.7311)).all()
    assert (weight[torch.tensor([logits]) <= 0] == 0).all()
    assert (weight[torch.tensor([logits]) > 1e-6] > 0).all()


@given(st.floats(-30, 30), st.floats(0, 1), st.floats(0, 1))
def test_lambda_moves_the_right_way_and_stays_bounded(log_lambda, target, current):
    start = torch.tensor([log_lambda])
    moved = lambda_step(start, torch.tensor([target]), torch.tensor([current]), step=1.02, most=10.0)
    assert -23.1 < float(moved) < 2.4
    inside = start.clamp(-23.0, 2.3)
    again = lambda_step(inside, torch.tensor([target]), torch.tensor([current]), step=1.02, most=10.0)
    assert (float(again) - float(inside)) * (target - current) >= 0
