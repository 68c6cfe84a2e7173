"""Retrievers on small catalogues: equations against slow loops, masked slots, constrained search, short histories, training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from draws import rand

from pipeline import retrievers
from pipeline.config import DiscRec, Parallel, Sequential, Tiger, TrainRetriever
from pipeline.encoders.sasrec import Sequences, holdout, next_baskets
from pipeline.errors import ConfigError, ContractError, VersionMismatch
from pipeline.evaluation import Packed
from pipeline.retrievers import base, parallel, search, tiger, training, trie
from pipeline.retrievers.discrec import Branch
from pipeline.retrievers.trie import DEAD

SIZES = (3, 4, 2)
SMALL = TrainRetriever(
    max_history=4,
    max_epochs=2,
    batch_size=32,
    valid_users=20,
    beams=12,
    mask_history=False,
    parallel=Parallel(dim=16, num_blocks=1),
    tiger=Tiger(dim=16, num_heads=2, feed_dim=16, encoder_layers=1, decoder_layers=1),
    discrec=DiscRec(feed_dim=16),
    sequential=Sequential(dim=16, num_heads=2, feed_dim=16, encoder_layers=1),
)
NAMES = tuple(retrievers.RETRIEVERS)
GENERATORS = ("tiger", "discrec", "sequential")
pytestmark = pytest.mark.usefixtures("one_thread")


def catalogue(items: int = 12, seed: int = 0, sizes: tuple[int, ...] = SIZES) -> base.Catalogue:
    """Random codes; item 1 has a masked slot, item 2 none at all, items 4 and 5 share their codes."""
    draw = np.random.default_rng(seed)
    codes = np.stack([draw.integers(0, size, items) for size in sizes], axis=1)
    codes[1, 1], codes[2], codes[5] = sizes[1], sizes, codes[4]
    weights = draw.uniform(0.2, 1.0, codes.shape) * (codes != np.asarray(sizes))
    codes_NL = torch.from_numpy(codes)
    number_N = base.numbered(codes_NL)
    return base.Catalogue(codes_NL, torch.from_numpy(weights.astype(np.float32)), number_N, sizes, int(number_N.max()) + 2)


def model_of(name: str, items: base.Catalogue, **changes) -> retrievers.AnyRetriever:
    torch.manual_seed(0)
    model = retrievers.build(items, SMALL.model_copy(update={"retriever": name, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval().requires_grad_(requires_grad=False)


HISTORY = torch.tensor([[3, 1, 7, 12], [4, 12, 12, 12], [0, 5, 6, 8]])  # 12 = padding


# ---------------------------------------------------------------- catalogue, histories


def test_numbers_within_a_tuple_follow_the_order_of_items() -> None:
    codes = torch.tensor([[1, 1], [0, 2], [1, 1], [1, 1], [0, 2], [2, 0]])
    seen: dict[tuple[int, ...], int] = {}
    slow = [seen[key] for row in codes.tolist() for key in [tuple(row)] if seen.update({key: seen.get(key, -1) + 1}) is None]
    assert base.numbered(codes).tolist() == slow


def test_random_codes_keep_masked_slots_and_stay_unique() -> None:
    items = catalogue()
    drawn = base.random_codes(items, seed=1)
    assert torch.equal(drawn.present_NL, items.present_NL)
    assert len(torch.unique(drawn.tokens_NS, dim=0)) == len(torch.unique(items.tokens_NS, dim=0))
    assert (drawn.codes_NL != items.codes_NL).any()
    drawn.constraint()
    assert torch.equal(base.random_codes(items, seed=1).codes_NL, drawn.codes_NL)


def test_padded_histories_prefixes_and_recency_equal_slow_loops() -> None:
    lists = [[5, 6, 7], [8], [], [1, 2, 3, 4, 9]]
    packed = Packed(np.cumsum([0] + [len(part) for part in lists]), np.array([item for part in lists for item in part], np.int64))
    found = base.padded(packed, 4, 12)
    assert found.tolist() == [(part[-4:] + [12] * 4)[:4] for part in lists]
    assert base.recency(found, 12).tolist() == [[max(min(len(part), 4) - 1 - t, 0) for t in range(4)] for part in lists]
    start, stop = base.prefix_bounds(torch.from_numpy(packed.offsets), 3)  # what follows a history stands at its stop
    slow = [(max(low, at - 3), at) for low, high in zip(packed.offsets, packed.offsets[1:], strict=False) for at in range(low + 1, high)]
    assert list(zip(start.tolist(), stop.tolist(), strict=True)) == slow
    assert base.last_targets(torch.tensor([[12, 3, 12], [4, 5, 6]]), 12).tolist() == [3, 6]


def baskets() -> Sequences:
    """Three users: baskets of 2, 1, 3 events; one basket; nothing."""
    return Sequences(torch.tensor([0, 6, 8, 8]), torch.tensor([4, 5, 6, 7, 8, 9, 4, 5]), torch.tensor([0, 0, 1, 2, 2, 2, 0, 0]))


def test_the_next_basket_of_every_event_equals_a_slow_loop() -> None:
    after, size = next_baskets(baskets())
    assert [list(range(a, a + s)) for a, s in zip(after.tolist(), size.tolist(), strict=True)] == [[2], [2], [3, 4, 5], [], [], [], [], []]
    after, size = next_baskets(Sequences(baskets().offsets, baskets().items))
    assert [list(range(a, a + s)) for a, s in zip(after.tolist(), size.tolist(), strict=True)] == [[1], [2], [3], [4], [5], [], [7], []]
    assert [part.tolist() for part in next_baskets(Sequences(torch.tensor([0]), torch.tensor([], dtype=torch.int64)))] == [[], []]


@pytest.mark.parametrize("name", ["parallel", "tiger"])
def test_readers_learn_items_of_the_next_basket_and_never_of_their_own(name: str) -> None:
    settings = SMALL.model_copy(update={"retriever": name})
    learner = training._Learner(retrievers.build(catalogue(), settings), baskets(), settings, None, "cpu")
    seen: dict[tuple[int, ...], set[int]] = {}
    torch.manual_seed(0)
    for _ in range(60):
        for history, targets in zip(*learner.batch(torch.arange(len(learner.start_B))), strict=True):
            filled = [item for item in history.tolist() if item != learner.model.pad]
            for at in range(len(filled)) if learner.model.every_position else [len(filled) - 1]:
                if (target := int(targets[at])) != learner.model.pad:
                    seen.setdefault(tuple(filled[: at + 1]), set()).add(target)
    if name == "tiger":
        assert seen == {(4,): {6}, (4, 5): {6}, (4, 5, 6): {7, 8, 9}}
    else:  # windows end where the last pair does, so the second begins where the first one stops
        assert set().union(*seen.values()) == {6, 7, 8, 9}
        assert all(not set(history) & found for history, found in seen.items())


def test_one_basket_alone_teaches_nothing() -> None:
    one = Sequences(torch.tensor([0, 3]), torch.tensor([1, 2, 3]), torch.tensor([0, 0, 0]))
    with pytest.raises(ContractError, match="two baskets"):
        training.fit(catalogue(), one, SMALL, seed=0)


# ---------------------------------------------------------------- equations


@pytest.mark.parametrize("every_position", [True, False])
def test_a_pass_deals_every_history_once_in_steps_of_equal_weight_and_little_padding(every_position: bool) -> None:
    torch.manual_seed(0)
    length_B = 1 + torch.randint(20, (5_000,))
    asked_B = length_B if every_position else torch.ones_like(length_B)
    steps = training.dealt(length_B, asked_B, 64)
    assert torch.equal(torch.cat(steps).sort().values, torch.arange(5_000))
    said = np.array([int(asked_B[rows].sum()) for rows in steps])
    assert len(steps) == math.ceil(5_000 / 64)
    assert abs(said / said.mean() - 1).max() < 0.05
    places = sum(len(rows) * int(length_B[rows].max()) for rows in steps)
    assert places < 1.1 * int(length_B.sum())
    means = [float(length_B[rows].float().mean()) for rows in steps]
    assert means != sorted(means)


@pytest.mark.parametrize(("count", "batch"), [(1, 128), (3, 1), (129, 128)])
def test_a_pass_over_few_histories(count: int, batch: int) -> None:
    steps = training.dealt(torch.arange(1, count + 1), torch.arange(1, count + 1), batch)
    assert torch.equal(torch.cat(steps).sort().values, torch.arange(count))
    assert all(len(rows) for rows in steps)


def test_weights_and_weighted_mean_equal_slow_loops() -> None:
    items, share = catalogue(), 0.7
    found = base.slot_weights(items.weights_NL, items.present_NL, share)
    for item in range(len(items)):
        for position, size in enumerate(SIZES):
            masked = items.codes_NL[item, position] == size
            assert found[item, position].item() == pytest.approx(0 if masked else 0.3 + 0.7 * items.weights_NL[item, position].item(), rel=1e-5)
    said = rand(len(items), 3)
    slow = [sum(a * p for a, p in zip(w, row, strict=True)) / sum(w) if sum(w) else 0.0 for w, row in zip(found.tolist(), said.tolist(), strict=True)]
    np.testing.assert_allclose(base.weighted_mean(said, found).numpy(), slow, rtol=1e-5)


def test_distillation_is_cross_entropy_over_other_items_by_cosine() -> None:
    student, teacher, items, tau = rand(4, 5), rand(4, 5, seed=1), torch.tensor([7, 3, 7, 2]), 0.5
    losses = []
    for row in range(4):
        cosines = {k: float(torch.cosine_similarity(student[row], teacher[k], dim=0)) / tau for k in range(4) if k == row or items[k] != items[row]}
        losses.append(-cosines[row] + math.log(sum(math.exp(value) for value in cosines.values())))
    assert float(base.distillation(student, teacher, items, tau)) == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_an_item_without_a_teacher_teaches_nobody() -> None:
    student, teacher, items = rand(4, 5).requires_grad_(), rand(4, 5, seed=1), torch.tensor([7, 3, 5, 2])
    teacher[2] = 0
    loss = base.distillation(student, teacher, items, 0.5)
    loss.backward()
    kept = torch.tensor([0, 1, 3])
    torch.testing.assert_close(loss, base.distillation(student[kept], teacher[kept], items[kept], 0.5))
    assert student.grad is not None
    assert student.grad.any(1).tolist() == [True, True, False, True]
    assert base.distillation(student, torch.zeros(4, 5), items, 0.5).item() == 0.0


@pytest.mark.parametrize("total", [False, True])
def test_item_scores_equal_a_slow_loop_over_items(total: bool) -> None:
    items = catalogue()
    log_probs = [torch.log_softmax(rand(2, size, seed=size), dim=1) for size in SIZES]
    weights = base.slot_weights(items.weights_NL, items.present_NL, 1.0)
    found = parallel.item_scores(log_probs, items.codes_NL, weights, total=total)
    for row in range(2):
        for item in range(len(items)):
            terms = [(float(weights[item, p]), float(log_probs[p][row, c])) for p, c in enumerate(items.codes_NL[item].tolist()) if c < SIZES[p]]
            slow = sum(w * p for w, p in terms) / (1 if total else sum(w for w, _ in terms)) if terms else parallel.NOWHERE
            assert float(found[row, item]) == pytest.approx(slow, rel=1e-5)
    assert float(found[0, 4]) == pytest.approx(float(found[0, 5]), rel=0.5)


def test_marginal_scores_equal_a_slow_loop_and_give_an_unknown_slot_the_chance_of_any_code() -> None:
    items, users = catalogue(), 2
    log_probs = [torch.log_softmax(rand(users, size, seed=position), 1) for position, size in enumerate(SIZES)]
    share = [torch.softmax(rand(size, seed=9 + position), 0) for position, size in enumerate(SIZES)]
    prior_LK = torch.stack([torch.nn.functional.pad(part.log(), (0, max(SIZES) - len(part))) for part in share])
    weights = torch.rand(items.codes_NL.shape, generator=torch.Generator().manual_seed(3)) * 2 * items.present_NL
    found = parallel.marginal_scores(log_probs, prior_LK, items.codes_NL, weights)
    for user in range(users):
        for item, codes in enumerate(items.codes_NL.tolist()):
            total = norm = 0.0
            for position, code in enumerate(codes):
                weight = float(weights[item, position])
                anything = float(np.log(sum(float(share[position][k]) * float(log_probs[position][user, k].exp()) for k in range(SIZES[position]))))
                total += (weight * float(log_probs[position][user, code]) if weight else 0.0) + max(0.0, 1 - weight) * anything
                norm += max(1.0, weight)
            slow = total / norm if float(weights[item].sum()) else parallel.NOWHERE
            assert float(found[user, item]) == pytest.approx(slow, rel=1e-5)


def test_the_heads_of_parallel_equal_their_formula_and_prior_scoring_subtracts_the_codes_share() -> None:
    items = catalogue()
    model = model_of("parallel", items)
    state = rand(2, 16)
    for position, found in enumerate(model.log_probs(state)):
        head, rows = model.heads[position], model.table.predicted(position).detach().numpy()
        assert len(rows) == SIZES[position], "the reserved code is never predicted"
        for row in range(2):
            h = state[row].numpy()
            z = head.weight.detach().numpy() @ h + head.bias.detach().numpy()
            q = h + z / (1 + np.exp(-z))
            logits = np.array([q @ c / np.linalg.norm(q) / np.linalg.norm(c) for c in rows]) / 0.07
            np.testing.assert_allclose(found[row].detach().numpy(), logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max(), rtol=1e-4, atol=1e-4)
    events_N = torch.arange(len(items)) % 5
    model.count(events_N)
    for position, prior in enumerate(model.prior_LK):
        pairs = list(zip(items.codes_NL[:, position].tolist(), events_N.tolist(), strict=True))
        counts = [1 + sum(events for code, events in pairs if code == k) for k in range(SIZES[position])]
        np.testing.assert_allclose(prior[: SIZES[position]].exp().numpy(), np.array(counts) / sum(counts), rtol=1e-6)


def test_the_branch_of_discrec_equals_its_formula() -> None:
    torch.manual_seed(0)
    branch = Branch(3, 4, DiscRec(num_heads=1, feed_dim=5), causal=False).eval()
    rows = rand(1, 2, 3, 4)
    w = {name: value.detach().numpy() for name, value in branch.named_parameters()}

    def norm(x: np.ndarray, number: int) -> np.ndarray:
        z = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return z * w[f"norms.{number}.weight"] + w[f"norms.{number}.bias"]

    for block in range(2):
        s = rows[0, block].numpy()
        c = norm(s + w["places"], 0)
        q, k, v = np.split(c @ w["attention.in_proj_weight"].T + w["attention.in_proj_bias"], 3, axis=1)
        scores = np.exp(q @ k.T / 2)
        c = c + (scores / scores.sum(1, keepdims=True)) @ v @ w["attention.out_proj.weight"].T + w["attention.out_proj.bias"]
        c = c + np.maximum(norm(c, 1) @ w["feed.0.weight"].T + w["feed.0.bias"], 0) @ w["feed.3.weight"].T + w["feed.3.bias"]
        gates = np.exp(np.stack([s @ w["gates"][0], c @ w["gates"][1]], axis=1))
        gates /= gates.sum(1, keepdims=True)
        np.testing.assert_allclose(branch(rows)[0, block].detach().numpy(), gates[:, :1] * s + gates[:, 1:] * c, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- masked slots, short histories


@pytest.mark.parametrize("name", NAMES)
def test_a_masked_slot_has_a_row_of_its_own_and_no_term_in_the_loss(name: str) -> None:
    items = catalogue()
    model = model_of(name, items, router_share=0.0)
    assert model.table.rows.num_embeddings == sum(size + 1 for size in SIZES) + (0 if name == "parallel" else items.numbers)
    targets = torch.full_like(HISTORY, 12).scatter_(1, torch.tensor([[2], [0], [3]]), torch.tensor([[1], [1], [1]]))
    before = model(HISTORY, targets).nll_P
    reserved = model.table.starts[1] + SIZES[1]
    with torch.no_grad():
        model.table.rows.weight[reserved] += rand(16)
    after = model(HISTORY, targets).nll_P
    assert (before[0] - after[0]).abs() > 1e-6, "it is read in a history"
    if name == "parallel":  # a generator reads the target's own earlier tokens as well
        torch.testing.assert_close(before[1:], after[1:])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", [(3, 4), (3, 4, 2, 5)])
def test_padding_and_neighbours_in_the_batch_change_nothing_and_the_length_is_the_releases(name: str, sizes: tuple[int, ...]) -> None:
    items = catalogue(sizes=sizes)
    model = model_of(name, items)
    target = torch.full_like(HISTORY, 12).scatter_(1, torch.tensor([[2], [0], [3]]), torch.tensor([[0], [3], [4]]))
    with torch.no_grad():
        together = model(HISTORY, target).nll_P
        alone = [model(HISTORY[row : row + 1, :width], target[row : row + 1, :width]).nll_P[0] for row, width in enumerate((3, 1, 4))]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_discrec_looks_inside_items_and_its_ablation_does_not() -> None:
    items = catalogue()
    changed = HISTORY.clone()
    changed[0, 0] = 9
    for local in (True, False):
        model = model_of("discrec", items, discrec=DiscRec(feed_dim=16, local=local))
        rows = [model.branch(model.table.items(part), part == 12) for part in (HISTORY, changed)]
        assert torch.allclose(rows[0][0, 1:3], rows[1][0, 1:3], atol=1e-6) is local
        assert not torch.allclose(rows[0][0, 0], rows[1][0, 0])
    summed = model_of("discrec", items, discrec=DiscRec(feed_dim=16, gate=False))
    assert summed.memory(HISTORY).states_BMD.isfinite()[0].all()


# ---------------------------------------------------------------- search


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("beams", [3, 40])
def test_every_beam_of_a_constrained_search_is_an_item_with_the_score_of_its_own_tokens(name: str, beams: int) -> None:
    items = catalogue()
    model, table = model_of(name, items), items.constraint()
    found = search.beam_search(model, model.memory(HISTORY), table, beams, weights_NS=model.weights_NS)
    usable = set(torch.nonzero(items.usable_N).flatten().tolist())
    for row in range(3):
        listed = [item for item in found.items[row].tolist() if item != DEAD]
        assert len(listed) == len(set(listed)) == min(beams, len(usable))
        assert set(listed) <= usable
        assert beams < 40 or set(listed) == usable
        assert found.tokens[row, : len(listed)].tolist() == items.tokens_NS[listed].tolist()
        for item, score in zip(listed, found.scores[row].tolist(), strict=False):
            prediction = base.generated(model, model.table, model.weights_NS, HISTORY[row : row + 1], torch.tensor([item]))
            assert score == pytest.approx(-prediction.nll_P[0].item(), rel=1e-4, abs=1e-4)
        assert found.scores[row].tolist() == sorted(found.scores[row].tolist(), reverse=True)
    assert (found.items[:, len(usable) :] == DEAD).all()


@pytest.mark.parametrize("beams", [2, 5, 40])
def test_a_search_without_some_items_is_a_search_of_a_table_that_never_had_them(beams: int) -> None:
    items = catalogue()
    model, table = model_of("tiger", items), items.constraint()
    usable = torch.nonzero(items.usable_N).flatten()
    gone = [usable[:1], usable[2:9], usable[:0]]
    packed = Packed(np.cumsum([0, *map(len, gone)]), torch.cat(gone).numpy())
    memory = model.memory(HISTORY)
    found = search.beam_search(model, memory, table, beams, gone_BT=training.gone_leaves(table, packed))
    for row, absent in enumerate(gone):
        left = usable[~torch.isin(usable, absent)]
        alone = search.beam_search(model, memory, trie.build(items.tokens_NS[left], items.sizes, left), beams)
        listed = found.items[row][found.items[row] != DEAD]
        assert listed.tolist() == alone.items[row][alone.items[row] != DEAD].tolist()
        assert len(listed) == min(beams, len(left)), "no beam is spent on what has gone"


def test_the_targets_rank_by_search_is_that_among_items_the_user_has_not_had() -> None:
    items = catalogue()
    model, table = model_of("sequential", items), items.constraint()
    histories = Packed(np.array([0, 3, 4, 8]), HISTORY[HISTORY != 12].numpy())
    settings = SMALL.model_copy(update={"retriever": "sequential", "beams": 3})
    usable = torch.nonzero(items.usable_N).flatten().tolist()
    seen = Packed(np.array([0, 3, 5, 6]), np.array([usable[0], usable[0], usable[4], usable[1], usable[2], usable[5]]))
    for target in usable:
        found = training.ranks(model, table, histories, np.full(3, target), settings, seen)
        for row in range(3):
            had = {*seen.items[seen.offsets[row] : seen.offsets[row + 1]].tolist()} - {target}
            left = [item for item in usable if item not in had]
            scores = -base.generated(model, model.table, model.weights_NS, HISTORY[row].expand(len(left), -1), torch.tensor(left)).nll_P
            rank = 1 + int((scores > scores[left.index(target)] + 1e-5).sum())
            best = search.beam_search(model, model.memory(HISTORY[row : row + 1]), trie.build(items.tokens_NS[left], items.sizes, torch.tensor(left)), 3)
            missed = (3 + 1 + 12 - len(had)) / 2
            assert found[row] == (rank if target in best.items[0].tolist() else missed)


def test_without_the_constraint_beams_leave_the_table_and_the_share_says_how_many() -> None:
    items = catalogue()
    model, table = model_of("tiger", items), items.constraint()
    memory = model.memory(HISTORY)
    found = search.beam_search(model, memory, table, 60, constrained=False)
    slow = [tuple(row) in {tuple(known) for known in items.tokens_NS[items.usable_N].tolist()} for row in found.tokens.flatten(0, 1).tolist()]
    assert (found.items != DEAD).flatten().tolist() == slow
    assert search.invalid_share(model, memory, table, 60) == pytest.approx(1 - sum(slow) / len(slow))
    assert 0 < sum(slow) < len(slow)


def test_ranks_by_search_equal_exact_ranks_when_the_beams_hold_every_item() -> None:
    items = catalogue()
    model, table = model_of("sequential", items), items.constraint()
    histories = Packed(np.array([0, 3, 4, 8]), HISTORY[HISTORY != 12].numpy())
    settings = SMALL.model_copy(update={"retriever": "sequential", "beams": 40})
    usable = torch.nonzero(items.usable_N).flatten()
    for target in usable.tolist():
        found = training.ranks(model, table, histories, np.full(3, target), settings)
        for row in range(3):
            scores = -base.generated(model, model.table, model.weights_NS, HISTORY[row].expand(len(usable), -1), usable).nll_P
            own = scores[usable.tolist().index(target)]
            assert found[row] == 1 + int((scores > own + 1e-5).sum())
    assert (training.ranks(model, table, histories, np.full(3, 2), settings) == 12).all(), "an item without codes stands behind all that were found"


# ---------------------------------------------------------------- training


def shop(items: int = 60, users: int = 150, length: int = 8, seed: int = 0) -> tuple[base.Catalogue, Sequences]:
    """Users walk from cluster to cluster in a ring; the first code is the cluster, the second half of it, the third noise."""
    draw = np.random.default_rng(seed)
    cluster = np.arange(items) % 6
    codes = torch.from_numpy(np.stack([cluster, draw.integers(0, 3, items), draw.integers(0, 4, items)], axis=1))
    at = (draw.integers(0, 6, (users, 1)) + np.arange(length)) % 6
    events = at + 6 * draw.integers(0, items // 6, (users, length))
    sequences = Sequences(torch.arange(0, users * length + 1, length), torch.from_numpy(events.ravel()))
    return base.Catalogue(codes, torch.ones(items, 3), base.numbered(codes), (6, 3, 4), 6), sequences


@pytest.mark.parametrize("name", ["parallel", "sequential"])
def test_codes_that_say_something_beat_the_same_codes_dealt_out_anew(name: str) -> None:
    items, sequences = shop()
    dealt = items.rearranged(torch.randperm(len(items), generator=torch.Generator().manual_seed(1)))
    settings = SMALL.model_copy(
        update={"retriever": name, "max_epochs": 8 if name == "parallel" else 4, "valid_users": 100, "stop_on": "loss", "learning_rate": 1e-2}
    )
    found = {arm: training.fit(codes, sequences, settings, seed=0).metrics["valid_loss"] for arm, codes in (("real", items), ("dealt", dealt))}
    assert found["real"] < found["dealt"] - 0.1


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_bits_and_validation_users_are_not_trained_on(name: str) -> None:
    items, sequences = shop(users=40, length=5)
    settings = SMALL.model_copy(update={"retriever": name, "max_epochs": 1, "valid_users": 40, "beams": 5})
    changed = sequences.items.clone()
    changed[sequences.offsets[1:] - 1] = 0  # the last event of every user: held out
    runs = [training.fit(items, part, settings, seed=seed) for part, seed in ((sequences, 3), (Sequences(sequences.offsets, changed), 3), (sequences, 4))]
    states = [run.state() for run in runs]
    assert all(states[0][key].numpy().tobytes() == states[1][key].numpy().tobytes() for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])
    assert runs[0].metrics["valid_users"] == 40
    assert len(runs[0].curves["valid_ndcg@50"]) == 1


def test_validation_leaves_the_whole_history_out_of_the_ranking() -> None:
    shelf, draw = catalogue(), np.random.default_rng(1)
    bought = np.stack([draw.permutation(12)[:9] for _ in range(30)])
    whole = Sequences(torch.arange(0, 9 * 30 + 1, 9), torch.from_numpy(bought.flatten()))
    rest, questions = holdout(whole, 20, SMALL.max_history, 0, new=True)
    model = model_of("parallel", shelf)
    found = training._validate(model, rest, questions, SMALL.model_copy(update={"mask_history": True}), shelf.constraint())
    gains = []
    for user in questions.users.tolist():
        score_N = model.scores(torch.from_numpy(bought[user, 4:8])[None])[0]  # it reads the latest four
        rivals = score_N[[item for item in range(12) if item not in bought[user]]]  # and none of the eight is a rival
        own = score_N[bought[user, 8]]
        gains.append(1 / math.log2(2 + float((rivals > own).sum() + 0.5 * (rivals == own).sum())))
    assert found["ndcg@10"] == pytest.approx(np.mean(gains))


@pytest.mark.parametrize("name", ["parallel", "tiger"])
def test_distillation_is_a_switch_that_wants_a_teacher(name: str) -> None:
    items, sequences = shop(users=30, length=4)
    settings = SMALL.model_copy(update={"retriever": name, "max_epochs": 1, "stop_on": "loss"})
    distilled = settings.model_copy(update={"distill_weight": 0.5})
    with pytest.raises(ValueError, match="vectors"):
        training.fit(items, sequences, distilled, seed=0)
    plain, pulled = (training.fit(items, sequences, part, seed=0, teacher_ND=rand(60, 7)) for part in (settings, distilled))
    assert plain.state().keys() == pulled.state().keys()
    assert any(not torch.equal(plain.state()[key], pulled.state()[key]) for key in plain.state())


def test_what_cannot_be_built_trained_or_read_says_why() -> None:
    items, sequences = shop(users=5, length=3)
    with pytest.raises(ConfigError, match="no such retriever"):
        retrievers.build(items, SMALL.model_copy(update={"retriever": "rpg"}))
    with pytest.raises(ContractError, match="two baskets"):
        training.fit(items, Sequences(torch.arange(6), torch.arange(5)), SMALL, seed=0)
    fitted = training.fit(items, sequences, SMALL.model_copy(update={"max_epochs": 1}), seed=0)
    with pytest.raises(ValueError, match="history is empty"):
        training.ranks(fitted.model, fitted.table, Packed(np.array([0, 0]), np.array([], np.int64)), np.array([1]), SMALL)
    assert math.isnan(training.invalid_beams(fitted.model, fitted.table, Packed(np.array([0, 1]), np.array([1])), SMALL))


def test_a_checkpoint_reads_a_later_release_and_refuses_another_codebook() -> None:
    items, sequences = shop(users=30, length=4)
    settings = SMALL.model_copy(update={"retriever": "tiger", "max_epochs": 1})
    fitted = training.fit(items, sequences, settings, seed=0)
    config = {"settings": settings.model_dump(mode="json"), "codebook_digest": "abc", "sid_version": "d20260101"}
    later = base.Catalogue(
        torch.cat([items.codes_NL, torch.tensor([[0, 0, 0]])]), torch.ones(61, 3), torch.cat([items.number_N, torch.tensor([5])]), items.codebook_sizes, 6
    )
    loaded = training.load(config, fitted.state() | {"trie.items": items.number_N}, later, codebook_digest="abc")
    state = torch.tensor([[3, 9, 2, 60], [61, 61, 61, 61]])
    old = fitted.model.memory(torch.tensor([[3, 9, 2]])).states_BMD
    torch.testing.assert_close(loaded.model.memory(torch.tensor([[3, 9, 2]])).states_BMD, old)
    assert loaded.model.memory(state[:1]).states_BMD.isfinite().all()
    assert loaded.table.digest() != fitted.table.digest()
    with pytest.raises(VersionMismatch, match="another codebook"):
        training.load(config, fitted.state(), later, codebook_digest="other")
    assert training.load(config, fitted.state(), later, codebook_digest="other", allow_foreign_codebook=True).settings == settings


def test_router_weights_enter_the_history_only_when_asked() -> None:
    items = catalogue()
    for weighted in (False, True):
        table = tiger.Tiger(items, tiger.TigerSettings(SMALL.tiger, 4, 1.0, weighted)).table
        expected = torch.where(items.present_NL & weighted, items.weights_NL, 1.0)
        torch.testing.assert_close(table.factors_NS[:-1, :3], expected)
        assert (table.factors_NS[:-1, 3] == 1).all()
        assert not table.factors_NS[-1].any()
