"""SASRec: windows, losses, determinism, what it learns, and rows that are trained against a frozen base."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graph_world import sequences
from torch.nn import functional as F

from pipeline.config import SasRec as Params
from pipeline.encoders import sasrec
from pipeline.errors import ContractError

SMALL = Params(
    dim=8, num_blocks=1, num_heads=2, max_length=6, dropout=0.1, batch_size=16, max_epochs=3, patience=3, valid_users=10, row_steps=8, learning_rate=0.01
)
pytestmark = pytest.mark.usefixtures("one_thread")


def cycles(users: int, num_items: int, length: int, seed: int = 0) -> sasrec.Sequences:
    """Every user walks the circle of items from another start: the next item is always the same."""
    starts = np.random.default_rng(seed).integers(0, num_items, users)
    return sequences([((start + np.arange(length)) % num_items).tolist() for start in starts])


def test_every_pair_of_events_lies_in_exactly_one_window() -> None:
    lists = [list(range(n)) for n in (0, 1, 2, 7, 8, 20)]
    data = sequences(lists)
    start, stop = sasrec.window_bounds(data.offsets, 6)
    covered = [index for low, high in zip(start.tolist(), stop.tolist(), strict=True) for index in range(low, high)]
    expected = [index for low, high in zip(data.offsets[:-1].tolist(), data.offsets[1:].tolist(), strict=True) for index in range(low, high - 1)]
    assert sorted(covered) == expected
    assert int((stop - start).max()) <= 6


def test_gather_pads_at_the_end() -> None:
    assert sasrec.gather(torch.arange(5), torch.tensor([0, 3, 5]), torch.tensor([2, 5, 5]), 3, 9).tolist() == [[0, 1, 9], [3, 4, 9], [9, 9, 9]]


def test_holdout_takes_the_whole_last_basket_and_asks_for_one_of_it() -> None:
    data = sequences([[0, 1, 2, 3], [4, 5, 6], [7, 8], [1, 2, 3]], [[0, 0, 1, 1], [0, 1, 2], [0, 0], [0, 0, 0]])
    rest, questions = sasrec.holdout(data, 10, 6, seed=0)
    assert questions.users.tolist() == [0, 1]  # the third has no earlier event, the fourth one basket
    assert questions.targets.tolist() == [2, 6]
    assert rest.offsets.tolist() == [0, 2, 4, 6, 9]
    assert rest.items.tolist() == [0, 1, 4, 5, 7, 8, 1, 2, 3]
    assert [rest.items[a:b].tolist() for a, b in zip(questions.start, questions.stop, strict=True)] == [[0, 1], [4, 5]]


def test_holdout_may_ask_for_new_items_alone() -> None:
    data = sequences([[0, 1, 0], [0, 1, 2], [], [5, 5, 5, 6], [3, 4, 3, 4], [7, 8, 9]], [[0, 1, 2], [0, 1, 2], [], [0, 1, 2, 3], [0, 1, 2, 2], [0, 1, 2]])
    rest, questions = sasrec.holdout(data, 10, 6, seed=0, new=True)
    assert questions.users.tolist() == [1, 3, 5]
    assert questions.targets.tolist() == [2, 6, 9]
    assert rest.users(torch.tensor([0, 4])).items.tolist() == [0, 1, 0, 3, 4, 3, 4]  # who is not asked is learnt from whole
    assert sasrec.holdout(data, 10, 6, seed=0)[1].users.tolist() == [0, 1, 3, 4, 5]


def test_holdout_asks_at_most_the_users_it_may() -> None:
    _, questions = sasrec.holdout(cycles(30, 9, 8), 7, 4, seed=3)
    assert questions.users.numel() == 7
    assert (questions.stop - questions.start == 4).all()


def test_sequences_of_some_users() -> None:
    part = sequences([[0, 1], [2], [3, 4, 5]], [[0, 1], [0], [0, 1, 1]]).users(torch.tensor([2, 0]))
    assert part.offsets.tolist() == [0, 3, 5]
    assert part.items.tolist() == [3, 4, 5, 0, 1]
    assert part.baskets is not None
    assert part.baskets.tolist() == [0, 1, 1, 0, 1]


def test_the_losses_equal_slow_loops_and_each_other() -> None:
    torch.manual_seed(0)
    hidden, table, targets = torch.randn(5, 4), torch.randn(7, 4), torch.tensor([0, 3, 3, 6, 1])
    logits = (hidden @ table.T).tolist()
    slow = [-np.log(np.exp(row[t]) / sum(np.exp(x) for x in row)) for row, t in zip(logits, targets.tolist(), strict=True)]
    full = sasrec.full_softmax(hidden, targets, table)
    assert float(full) == pytest.approx(np.mean(slow), rel=1e-5)
    everything = sasrec.sampled_softmax(hidden, targets, table, torch.arange(7))
    assert float(everything) == pytest.approx(float(full), rel=1e-5)


def test_the_sampled_loss_estimates_the_full_one() -> None:
    torch.manual_seed(0)
    hidden, table, targets = torch.randn(64, 8), torch.randn(500, 8) * 0.3, torch.randint(500, (64,))
    sampled = torch.stack([sasrec.sampled_softmax(hidden, targets, table, torch.randint(500, (200,))) for _ in range(30)]).mean()
    assert float(sampled) == pytest.approx(float(sasrec.full_softmax(hidden, targets, table)), abs=0.02)


def test_attention_is_causal_and_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    model = sasrec.SasRec(9, SMALL).eval()
    short = model(torch.tensor([[1, 2, 3, 9, 9, 9]]))
    longer = model(torch.tensor([[1, 2, 3, 4, 5, 6]]))
    torch.testing.assert_close(short[:, :3], longer[:, :3])
    assert not torch.allclose(short[:, 3], longer[:, 3])


@pytest.mark.parametrize("tied", [False, True])
def test_training_is_bit_deterministic_and_learns(tied: bool) -> None:
    data = cycles(60, 12, 9)
    params = SMALL.model_copy(update={"tied": tied, "max_epochs": 25, "patience": 25})
    before = torch.random.get_rng_state()
    first, again = sasrec.train(data, 12, params, seed=5), sasrec.train(data, 12, params, seed=5)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.are_deterministic_algorithms_enabled()
    assert all(torch.equal(first.state[name], again.state[name]) for name in first.state)
    assert first.curves == again.curves
    assert not torch.equal(first.item_vectors, sasrec.train(data, 12, params, seed=6).item_vectors)
    assert first.metrics["valid_recall@10"] == 1
    assert first.metrics["valid_ndcg@10"] > 0.7
    assert ("output_rows.weight" in first.state) is not tied
    assert first.item_vectors.shape == (12, 8)
    torch.testing.assert_close(first.item_vectors, first.state["input_rows.weight"][:12])
    assert (first.state["input_rows.weight"][12] == 0).all()
    assert first.item_vectors.norm(dim=1).std() > 0  # exported as they are, not normalised


def test_the_sampled_path_learns_too() -> None:
    data = cycles(60, 40, 9)
    params = SMALL.model_copy(update={"sampled_above": 20, "num_negatives": 16, "max_epochs": 25, "patience": 25})
    result = sasrec.train(data, 40, params, seed=5)
    assert result.metrics["valid_recall@10"] > 0.5
    assert result.curves["loss"][-1] < result.curves["loss"][0]


def test_early_stopping_keeps_the_best_epoch() -> None:
    params = SMALL.model_copy(update={"max_epochs": 30, "patience": 2, "learning_rate": 0.05})
    result = sasrec.train(cycles(30, 12, 7), 12, params, seed=1)
    scores = result.curves["valid_ndcg@10"]
    assert result.metrics["valid_ndcg@10"] == max(scores)
    assert len(scores) == min(30, int(result.metrics["best_epoch"]) + 2)


def test_without_questions_all_epochs_run_and_without_pairs_it_refuses() -> None:
    result = sasrec.train(sequences([[0, 1], [1, 2], [2, 0]]), 3, SMALL, seed=0)
    assert result.metrics["epochs"] == result.metrics["best_epoch"] == 3
    with pytest.raises(ValueError, match="two events"):
        sasrec.train(sequences([[0], [1]]), 2, SMALL, seed=0)


def test_answers_may_leave_the_history_out() -> None:
    data = cycles(40, 12, 9)
    rest, questions = sasrec.holdout(data, 40, 6, seed=0)
    model = sasrec.restore(sasrec.train(data, 12, SMALL, seed=0).state, SMALL)
    free, masked = sasrec.answer(model, rest, questions), sasrec.answer(model, rest, questions, mask_history=True)
    assert (masked <= free).all()
    assert masked.max() <= 12 - 7  # the target and at most the 4 items not yet seen


# ---------------------------------------------------------------- rows of a frozen generation


ROWS = SMALL.model_copy(update={"max_epochs": 12, "patience": 12, "row_steps": 30})


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return sasrec.train(cycles(60, 12, 9), 12, ROWS, seed=5).state


@pytest.fixture(scope="module")
def base(state: dict[str, torch.Tensor]) -> tuple[sasrec.SasRec, Params]:
    return sasrec.restore(state, ROWS), ROWS


@pytest.fixture(params=["stays as next item", "learns as next item"])
def contexts(request: pytest.FixtureRequest, state: dict[str, torch.Tensor]) -> sasrec.Contexts | None:
    return sasrec.Contexts.of(state) if request.param == "learns as next item" else None


def nightly(seed: int = 0) -> sasrec.Sequences:
    """Items 12 and 13 are new: 12 behaves like 3, 13 appears among others."""
    lists = [part.tolist() for part in np.split(cycles(40, 12, 9, seed).items.numpy(), 40)]
    return sequences([[12 if item == 3 and user % 3 == 0 else 13 if item == 8 and user % 4 == 0 else item for item in part] for user, part in enumerate(lists)])


def trained(
    base: tuple[sasrec.SasRec, Params], data: sasrec.Sequences, moved: list[int], seeds: list[int], contexts: sasrec.Contexts | None = None
) -> tuple[torch.Tensor, list[float]]:
    model, params = base
    start, near = sasrec.initial_rows(model, data, torch.tensor(moved))
    assert near.all()
    return sasrec.train_rows(model, data, torch.tensor(moved), start, torch.tensor(seeds), params, contexts)


@pytest.mark.parametrize("competitors", [1000, 6])
def test_a_row_does_not_depend_on_which_others_moved(
    base: tuple[sasrec.SasRec, Params], contexts: sasrec.Contexts | None, competitors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sasrec, "ROW_NEGATIVES", competitors)
    together, _ = trained(base, nightly(), [12, 5, 13], [7, 8, 9], contexts)
    for place, (item, seed) in enumerate([(12, 7), (5, 8), (13, 9)]):
        alone, _ = trained(base, nightly(), [item], [seed], contexts)
        torch.testing.assert_close(alone[0], together[place], rtol=1e-4, atol=1e-5)


def test_chunks_of_moved_items_do_not_matter(base: tuple[sasrec.SasRec, Params], contexts: sasrec.Contexts | None, monkeypatch: pytest.MonkeyPatch) -> None:
    together, _ = trained(base, nightly(), [12, 5, 13], [7, 8, 9], contexts)
    monkeypatch.setattr(sasrec, "CELLS", 1)
    apart, curve = trained(base, nightly(), [12, 5, 13], [7, 8, 9], contexts)
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-5)
    assert len(curve) == base[1].row_steps


def test_users_without_a_moved_item_say_nothing(base: tuple[sasrec.SasRec, Params], contexts: sasrec.Contexts | None) -> None:
    lists = [part.tolist() for part in np.split(nightly().items.numpy(), 40)]
    whole, _ = trained(base, sequences(lists), [12, 13], [1, 2], contexts)
    holding, _ = trained(base, sequences([part for part in lists if {12, 13} & set(part)]), [12, 13], [1, 2], contexts)
    assert torch.equal(holding, whole)


def test_rows_are_bit_deterministic_and_follow_their_seed(base: tuple[sasrec.SasRec, Params], contexts: sasrec.Contexts | None) -> None:
    first, _ = trained(base, nightly(), [12, 13], [1, 2], contexts)
    again, _ = trained(base, nightly(), [12, 13], [1, 2], contexts)
    other, _ = trained(base, nightly(), [12, 13], [3, 2], contexts)
    assert torch.equal(first, again)
    assert not torch.equal(first[0], other[0])
    torch.testing.assert_close(first[1], other[1], rtol=1e-4, atol=1e-5)


def test_the_base_stays_as_it_was_and_rows_learn(base: tuple[sasrec.SasRec, Params], contexts: sasrec.Contexts | None) -> None:
    model, _ = base
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows, curve = trained(base, nightly(), [12], [1], contexts)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert np.mean(curve[-5:]) < np.mean(curve[:5])
    closest = F.cosine_similarity(rows, model.input_table()).argmax()
    assert int(closest) == 3  # the item it stands in for


@pytest.mark.parametrize("tied", [False, True])
def test_a_row_that_is_never_read_stays(tied: bool) -> None:
    """Item 12 stands last in every list: as a next item alone its row learns nothing."""
    data = sequences([[0, 1, 12], [3, 4, 12]])
    params = SMALL.model_copy(update={"tied": tied})
    model = sasrec.restore(sasrec.train(cycles(60, 12, 9), 12, params, seed=5).state, params)
    start, _ = sasrec.initial_rows(model, data, torch.tensor([12]))
    rows, _ = sasrec.train_rows(model, data, torch.tensor([12]), start, torch.tensor([1]), params)
    assert torch.equal(rows, start.inputs)


def test_a_row_that_learns_to_come_next_ends_nearer_to_what_a_full_training_gives(base: tuple[sasrec.SasRec, Params], state: dict[str, torch.Tensor]) -> None:
    """Items 3 and 8 begin like new ones, under another name: their own rows are known."""
    moved, table = [12, 13], base[0].input_table()[[3, 8]]
    data = sequences([[{3: 12, 8: 13}.get(item, item) for item in part.tolist()] for part in np.split(cycles(60, 12, 9).items.numpy(), 60)])
    without, _ = trained(base, data, moved, [1, 2])
    learnt, _ = trained(base, data, moved, [1, 2], sasrec.Contexts.of(state))
    assert (F.cosine_similarity(learnt, table) > F.cosine_similarity(without, table)).all()


def test_contexts_are_kept_with_one_table_and_missing_ones_are_none(state: dict[str, torch.Tensor]) -> None:
    found = sasrec.Contexts.of(state)
    assert found is not None
    assert found.events == 60 * 9  # held-out events count, because an item's own are counted with them on a frozen night
    two = sasrec.train(cycles(60, 12, 9), 12, SMALL.model_copy(update={"tied": False, "max_epochs": 1}), seed=5).state
    assert sasrec.Contexts.of(two) is None
    before = {name: tensor for name, tensor in state.items() if not name.startswith(sasrec.CONTEXT)}
    assert sasrec.Contexts.of(before) is None
    assert torch.equal(sasrec.restore(before, ROWS).input_table(), sasrec.restore(state, ROWS).input_table())


def task_of(model: sasrec.SasRec, data: sasrec.Sequences, item: int, seed: int, params: Params, contexts: sasrec.Contexts | None = None) -> sasrec._RowTask:
    moved = torch.tensor([item])
    return sasrec._RowTask(model, data, moved, sasrec.OwnEvents.of(data, moved), torch.tensor([seed]), params, contexts)


def test_the_events_of_a_chunk_are_those_of_its_items_alone() -> None:
    data, moved = nightly(), torch.tensor([12, 5, 3])
    whole = sasrec.OwnEvents.of(data, moved)
    for chunk in torch.arange(3).split(2):
        part = whole.part(chunk)
        for slot, item in enumerate(moved[chunk].tolist()):
            assert part.at_O[part.offsets_M[slot] : part.offsets_M[slot + 1]].tolist() == torch.nonzero(data.items == item).flatten().tolist()


@pytest.mark.parametrize("item", [12, 5])
def test_as_next_item_a_row_adds_what_it_adds_to_the_full_softmax(base: tuple[sasrec.SasRec, Params], item: int) -> None:
    """Slow form: the softmax over all places and the base's other items, once with one row, once with another; what does not hold the row cancels."""
    model, data = base[0], nightly()
    places, table = torch.randn(40, SMALL.dim), model.output_table()
    contexts = sasrec.Contexts(places, torch.logsumexp(places @ table.T, 1), events=40)
    task = task_of(model, data, item, 1, base[1], contexts)
    count = int((data.items == item).sum())
    own = places[:count]  # the places after which the item came

    def slow(row: torch.Tensor) -> float:
        """Sum of the negative log-likelihoods at all places, of those targets the row is part of."""
        others = [other for other in range(12) if other != item]
        total = 0.0
        for place in places:
            total += float(np.log(sum(np.exp(float(place @ table[other])) for other in others) + np.exp(float(place @ row))))
        return total - sum(float(place @ row) for place in own)

    rows = torch.randn(2, SMALL.dim)
    found = [float(task.as_next(contexts, 0, own, torch.zeros(count, dtype=torch.int64), torch.ones(count), row[None])) for row in rows]
    assert found[0] - found[1] == pytest.approx(slow(rows[0]) - slow(rows[1]), rel=1e-4)


def test_the_steps_take_all_contexts_by_turns(base: tuple[sasrec.SasRec, Params], state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = sasrec.Contexts.of(state)
    assert contexts is not None

    def losses(at_once: int) -> list[float]:
        monkeypatch.setattr(sasrec, "STEP_CONTEXTS", at_once)
        task = task_of(base[0], nightly(), 12, 1, base[1], contexts)
        nowhere = torch.zeros(1, dtype=torch.int64)
        return [float(task.as_next(contexts, step, torch.zeros(1, SMALL.dim), nowhere, nowhere + 1, base[0].input_table()[:1])) for step in range(10)]

    total, parts = len(contexts.hidden_SD), losses(len(contexts.hidden_SD) // 5)
    assert total % 5 == 0
    assert parts[:5] == parts[5:]
    assert len(set(parts)) == 5
    assert np.mean(parts) == pytest.approx(losses(total)[0], rel=1e-5)


def row_task(setting: tuple[sasrec.SasRec, Params], item: int) -> sasrec._RowTask:
    return task_of(setting[0], nightly(), item, 1, setting[1])


@pytest.mark.parametrize("item", [12, 5])
def test_all_of_a_small_catalogue_competes_and_the_moved_item_with_its_own_row(base: tuple[sasrec.SasRec, Params], item: int) -> None:
    """Slow form: softmax over the base table with the moved item's row in its place, or behind it."""
    table, hidden, own = base[0].output_table().detach(), torch.randn(5, SMALL.dim), torch.randn(1, SMALL.dim)
    after = torch.tensor([0, 7, 13, 3, 11])  # 13 = `own` of a base of 12
    found = row_task(base, item).cross_entropy(hidden, after, torch.zeros(5, dtype=torch.int64), own, step=0)
    whole = torch.cat([table, own]) if item == 12 else torch.cat([table[:item], own, table[item + 1 :]])
    at = torch.where(after == 13, item, after)
    torch.testing.assert_close(found, F.cross_entropy(hidden @ whole.T, at, reduction="none"))


def test_sampled_competitors_estimate_the_whole_catalogue(base: tuple[sasrec.SasRec, Params], monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, own, after, slots = torch.randn(6, SMALL.dim), torch.randn(1, SMALL.dim), torch.arange(6), torch.zeros(6, dtype=torch.int64)
    whole = row_task(base, 12).cross_entropy(hidden, after, slots, own, step=0)
    monkeypatch.setattr(sasrec, "ROW_NEGATIVES", 8)
    task = row_task(base, 12)
    sampled = torch.stack([task.cross_entropy(hidden, after, slots, own, step) for step in range(400)])
    assert not torch.equal(sampled[0], sampled[1])
    torch.testing.assert_close(sampled.mean(0), whole, atol=0.15, rtol=0)


@pytest.mark.parametrize("item", [12, 5])
@pytest.mark.parametrize("draws", [1, 3, 11])
def test_a_sampled_softmax_is_the_one_written_out(base: tuple[sasrec.SasRec, Params], item: int, draws: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow form: every draw stands for its share of the catalogue, a draw of the target or of the moved item's base row for none; and its gradient."""
    monkeypatch.setattr(sasrec, "ROW_NEGATIVES", draws)
    table, own, slots = base[0].output_table(), torch.randn(1, SMALL.dim), torch.zeros(5, dtype=torch.int64)
    hidden, after = torch.randn(5, SMALL.dim, requires_grad=True), torch.tensor([0, 7, 13, 3, 11])  # 13 = `own` of a base of 12

    def slow(at: int, drawn: list[int]) -> torch.Tensor:
        target = int(after[at])
        rivals = [hidden[at] @ table[other] + np.log(12 / draws) for other in drawn if other not in (target, item)]
        chosen = hidden[at] @ (own[0] if target == 13 else table[target])
        return torch.logsumexp(torch.stack([*rivals, hidden[at] @ own[0], *([] if target == 13 else [chosen])]), 0) - chosen

    for step in range(6):
        drawn = torch.randint(12, (draws,), generator=torch.Generator().manual_seed(step)).tolist()
        found, expected = row_task(base, item).cross_entropy(hidden, after, slots, own, step), torch.stack([slow(at, drawn) for at in range(5)])
        torch.testing.assert_close(found, expected)
        ways = torch.randn(5)
        torch.testing.assert_close(torch.autograd.grad(found, hidden, ways), torch.autograd.grad(expected, hidden, ways))


def test_a_window_that_a_step_draws_again_counts_again(base: tuple[sasrec.SasRec, Params]) -> None:
    data, moved, seeds = nightly(), torch.tensor([12, 13, 5]), torch.tensor([1, 2, 3])
    events = sasrec.OwnEvents.of(data, moved)
    task = sasrec._RowTask(base[0], data, moved, events, seeds, base[1])
    drawn = events.drawn(seeds, base[1].row_steps * sasrec.ROW_WINDOWS).unflatten(1, (base[1].row_steps, sasrec.ROW_WINDOWS))
    repeated = 0
    for step in range(base[1].row_steps):
        tokens, slots, times = task.windows(step)
        repeated += int((times > 1).sum())
        for slot, item in enumerate(moved):
            each = tokens[slots == slot].repeat_interleave(times[slots == slot], 0)
            expected = task.tokens(drawn[slot, step].sort().values, item.expand(sasrec.ROW_WINDOWS))
            assert torch.equal(each, expected)
    assert repeated


def test_a_known_item_starts_from_its_row_and_a_new_one_from_its_neighbours(base: tuple[sasrec.SasRec, Params]) -> None:
    model, _ = base
    rows, near = sasrec.initial_rows(model, sequences([[1, 12, 2], [13, 14], [12, 13]]), torch.tensor([2, 12, 13]))
    torch.testing.assert_close(rows.inputs[0], model.input_table()[2])
    torch.testing.assert_close(rows.inputs[1], model.input_table()[[1, 2]].mean(0))
    assert near.tolist() == [True, True, False]
    assert (rows.inputs[2] == 0).all()


def test_nothing_moved_is_nothing_to_train(base: tuple[sasrec.SasRec, Params]) -> None:
    model, params = base
    nothing = sasrec.Rows(torch.zeros(0, 8), torch.zeros(0, 8))
    none, curve = sasrec.train_rows(model, nightly(), torch.tensor([], dtype=torch.int64), nothing, torch.tensor([], dtype=torch.int64), params)
    assert none.shape == (0, 8)
    assert curve == []


def test_an_item_without_events_cannot_be_trained(base: tuple[sasrec.SasRec, Params]) -> None:
    model, params = base
    start = sasrec.Rows(torch.zeros(1, 8), torch.zeros(1, 8))
    with pytest.raises(ValueError, match="no event"):
        sasrec.train_rows(model, sequences([[0, 1, 2]]), torch.tensor([5]), start, torch.tensor([1]), params)


def test_windows_hold_the_item_and_drop_what_the_base_lacks(base: tuple[sasrec.SasRec, Params]) -> None:
    model, params = base
    data = sequences([[0, 13, 12, 1, 14, 2, 3, 4, 5, 12]])
    task = task_of(model, data, 12, 0, params)
    pad, own = 12, 13
    assert task.tokens(torch.tensor([2]), torch.tensor([12])).tolist() == [[0, own, 1, 2, 3, pad, pad]]
    assert task.tokens(torch.tensor([9]), torch.tensor([12])).tolist() == [[1, 2, 3, 4, 5, own, pad]]


def test_numbers_of_a_seed_are_its_own_and_uniform() -> None:
    together = sasrec.uniform(np.array([3, 4, 2**31 - 1]), 4000)
    np.testing.assert_array_equal(together[1], sasrec.uniform(np.array([4]), 4000)[0])
    assert together.min() >= 0
    assert together.max() < 1
    np.testing.assert_allclose(np.histogram(together, 10, (0, 1))[0] / together.size, 0.1, atol=0.012)
    assert abs(np.corrcoef(together[0], together[1])[0, 1]) < 0.05


def test_procrustes_finds_a_rotation_again_and_keeps_norms() -> None:
    torch.manual_seed(0)
    target, rotation = torch.randn(50, 6), torch.linalg.qr(torch.randn(6, 6)).Q
    found = sasrec.procrustes(target @ rotation.T, target)
    torch.testing.assert_close(found, rotation, rtol=1e-4, atol=1e-5)
    noisy = sasrec.procrustes(torch.randn(50, 6), target)
    torch.testing.assert_close(noisy @ noisy.T, torch.eye(6), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((target @ noisy).norm(dim=1), target.norm(dim=1))


def test_training_begins_at_the_champions_rows_of_the_items_it_knows() -> None:
    params = Params(dim=8, num_blocks=1, num_heads=1, max_length=4, max_epochs=1, tied=False)
    torch.manual_seed(0)
    old, new = sasrec.SasRec(5, params), sasrec.SasRec(4, params)
    place = torch.tensor([3, -1, 0, 4])
    fresh = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    sasrec.lay(sasrec.Champion(old.state_dict(), place), new)
    for table in sasrec.TABLES:
        rows = new.state_dict()[table]
        assert torch.equal(rows[[0, 2, 3]], old.state_dict()[table][[3, 0, 4]])
        assert torch.equal(rows[1], fresh[table][1]), "an unknown item keeps its random row"
    assert torch.equal(new.positions.weight, old.positions.weight)
    assert torch.equal(new.input_rows.weight[4], torch.zeros(8)), "the padding row stays zero"


def test_one_table_begins_at_the_input_table_of_two_and_not_the_other_way_round() -> None:
    two, one = (sasrec.SasRec(4, Params(dim=8, num_blocks=1, num_heads=1, tied=tied)) for tied in (False, True))
    sasrec.lay(sasrec.Champion(two.state_dict(), torch.arange(4)), one)
    assert torch.equal(one.input_table(), two.input_table())
    with pytest.raises(ContractError, match="cannot begin"):
        sasrec.lay(sasrec.Champion(one.state_dict(), torch.arange(4)), two)


def test_a_champion_of_other_sizes_is_refused() -> None:
    wide = sasrec.SasRec(5, Params(dim=16, num_heads=1))
    with pytest.raises(ContractError, match="cannot begin"):
        sasrec.lay(sasrec.Champion(wide.state_dict(), torch.arange(5)), sasrec.SasRec(5, Params(dim=8, num_heads=1)))


def test_the_floors_know_what_the_encoder_learnt_from_not_the_asked_users_alone() -> None:
    """The one user who is asked has not seen 7 yet; all others have, after 3."""
    from jobs.train_behavior_encoder import floors
    from pipeline.config import TrainBehaviorEncoder

    found = floors(sequences([[1, 3, 7]] * 30), 300, TrainBehaviorEncoder(sasrec=Params(valid_users=1)), 0)
    assert found["floor/markov_ndcg@10"] == 1.0
    assert found["floor/popularity_recall@10"] == 1.0
