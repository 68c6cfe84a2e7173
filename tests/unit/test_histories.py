"""Questions, contexts and the next-item loss against loops; what every tokenizer that learns from histories promises."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from draws import rand
from tokenizer_items import Interrupted, das_settings, mmq_settings, stop_after, tiny_history, tiny_items, training, unger_settings

from pipeline.errors import ContractError
from pipeline.tokenizers import TOKENIZERS, from_state, histories
from pipeline.tokenizers.base import MODALITIES, FitOptions, History, Keep, Start, Tokenizer, codebook_digest

SETTINGS = {"mmq": mmq_settings, "das": das_settings, "unger": unger_settings}


class Memory:
    """A checkpoint in memory."""

    def __init__(self) -> None:
        self.kept = None

    def load(self):
        return self.kept

    def save(self, tensors, document):
        self.kept = ({name: value.clone() for name, value in tensors.items()}, document)


def fitted(name: str, *, count: int = 96, seed: int = 1, history: History | None = None, **changes: object) -> Tokenizer:
    tokenizer = TOKENIZERS[name](SETTINGS[name](**changes))
    tokenizer.fit(tiny_items(count), FitOptions(seed=seed, settings=training(max_epochs=4), history=history or tiny_history(count)))
    return tokenizer


@pytest.fixture(scope="module")
def made() -> dict[str, Tokenizer]:
    return {name: fitted(name) for name in SETTINGS}


# ---------------------------------------------------------------- questions


def test_contexts_are_the_latest_items_before_the_event_newest_first():
    history = tiny_history(users=6, length=5)
    events = histories.events(history, 96, who="x")
    at = torch.arange(len(history.index_T))
    rows, shown = events.context(at, 3)
    for t in range(30):
        before = history.index_T[(t // 5) * 5 : t].tolist()[::-1][:3]
        assert rows[t][shown[t]].tolist() == before
        assert int(shown[t].sum()) == len(before)


def test_with_baskets_a_context_ends_where_the_events_own_basket_begins():
    plain = tiny_history(users=7, length=5)
    baskets = torch.tensor([0, 0, 1, 1, 1] * 6 + [7] * 5)  # the last user has one basket, of the number that follows nobody's
    events = histories.events(replace(plain, basket_T=baskets), 96, who="x")
    rows, shown = events.context(torch.arange(len(plain.index_T)), 3)
    for t in range(35):
        start = (t // 5) * 5
        before = plain.index_T[start : start + 2].tolist()[::-1] if t % 5 >= 2 and t < 30 else []
        assert rows[t][shown[t]].tolist() == before
    assert set(torch.cat([events.train_P, events.held_P]).tolist()) == {t for t in range(30) if t % 5 >= 2}
    assert events.digest != histories.events(plain, 96, who="x").digest
    alone = histories.events(replace(plain, basket_T=torch.arange(len(plain.index_T))), 96, who="x")
    assert torch.equal(alone.stop_T, histories.events(plain, 96, who="x").stop_T)


def test_nothing_after_an_event_reaches_its_context():
    history = tiny_history()
    changed = history.index_T.clone()
    changed[7::8] = 0  # the last event of every user
    at = torch.arange(len(changed))[torch.arange(len(changed)) % 8 < 7]
    one, two = (histories.events(replace(history, index_T=items), 96, who="x").context(at, 5) for items in (history.index_T, changed))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


def test_held_out_questions_are_last_events_and_no_context_of_a_training_question_holds_them():
    events = histories.events(tiny_history(), 96, who="x")
    assert len(events.held_P) == 4
    assert (events.held_P % 8 == 7).all()
    assert not torch.isin(events.train_P, events.held_P).any()
    assert (events.train_P % 8 > 0).all()
    assert len(events.train_P) == 40 * 7 - 4


def test_draws_reach_every_question_and_twins_have_the_same_answer():
    events = histories.events(tiny_history(), 96, who="x")
    noise = torch.rand(20_000, 8, generator=torch.Generator().manual_seed(0))
    at = events.draw(noise)
    assert torch.equal(at.unique(), events.train_P)
    twin = events.twins(at, noise[:, 2])
    assert torch.equal(events.item_T[twin], events.item_T[at])
    assert torch.isin(twin, events.train_P).all()
    answers = torch.bincount(events.item_T[events.train_P], minlength=96)
    other = answers[events.item_T[at]] > 1
    assert float((twin != at)[other].double().mean()) > 0.4
    assert torch.equal(twin[~other], at[~other])


def test_next_item_loss_against_a_loop():
    rng = torch.Generator().manual_seed(0)
    wanted, answer, bias = (torch.randn(*shape, generator=rng) for shape in ((4, 3), (4, 3), (4, 4)))
    key, share = torch.tensor([5, 7, 5, 9]), torch.tensor([0.4, 0.3, 0.4, 0.1])
    asked = histories.candidates(key, histories.alone())
    found = histories.next_item_loss(wanted, answer, asked, share.log(), temperature=0.2, bias_BC=bias)
    for b in range(4):
        logits = {}
        for c in range(4):
            if c == b or key[c] != key[b]:
                cosine = float(wanted[b] @ answer[c] / (wanted[b].norm() * answer[c].norm()))
                logits[c] = cosine / 0.2 + float(bias[b, c]) - math.log(float(share[c]))
        assert float(found[b]) == pytest.approx(math.log(sum(map(math.exp, logits.values()))) - logits[b], rel=1e-4)


@pytest.mark.parametrize("popularity", [0.0, 0.5, 1.0])
def test_as_much_of_popularity_is_learnt_as_asked_for(popularity):
    torch.manual_seed(0)
    events, vectors, reader = histories.events(tiny_history(), 96, who="x"), rand(96, 4), histories.Reader(4, 5, 8)
    at = events.train_P[:12]
    found = histories.ask(events, at, lambda rows: vectors[rows], reader, temperature=0.2, world=histories.alone(), popularity=popularity).detach()
    rows, shown = events.context(at, 5)
    wanted, answers, share = reader(vectors[rows], shown).detach().numpy(), events.item_T[at].tolist(), events.share_N.tolist()
    for b, answer in enumerate(answers):
        logits = {}
        for c, other in enumerate(answers):
            if c == b or other != answer:
                vector = vectors[other].numpy()
                logits[c] = float(wanted[b] @ vector) / np.linalg.norm(wanted[b]) / np.linalg.norm(vector) / 0.2 - popularity * math.log(share[other])
        assert float(found[b]) == pytest.approx(math.log(sum(map(math.exp, logits.values()))) - logits[b], rel=1e-4)


def test_the_mean_over_filled_places():
    x, shown = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]]).bool()
    slow = [[np.mean([x[b, t, d] for t in range(4) if shown[b, t]]) if shown[b].any() else 0.0 for d in range(2)] for b in range(3)]
    np.testing.assert_allclose(histories.shown_mean(x, shown).numpy(), slow, rtol=1e-5)


def test_the_reader_does_not_see_empty_places():
    torch.manual_seed(0)
    reader = histories.Reader(4, 3, 8)
    x, shown = torch.randn(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])
    loud = torch.where(shown[..., None], x, 1e3)
    assert torch.allclose(reader(x, shown), reader(loud, shown))


@pytest.mark.parametrize(
    ("history", "message"),
    [
        (None, "got none"),
        (History(index_T=torch.tensor([1, 2]), offset_U=torch.tensor([0, 1, 2])), "too short"),
        (History(index_T=torch.tensor([1, 2]), offset_U=torch.tensor([0, 1])), "offsets"),
        (History(index_T=torch.tensor([1, 96]), offset_U=torch.tensor([0, 2])), "outside the catalogue"),
        (History(index_T=torch.zeros(0, dtype=torch.int64), offset_U=torch.tensor([0, 0])), "too short"),
    ],
)
@pytest.mark.parametrize("name", SETTINGS)
def test_histories_that_cannot_be_used_are_refused(name, history, message):
    with pytest.raises(ContractError, match=message):
        TOKENIZERS[name](SETTINGS[name]()).fit(tiny_items(), FitOptions(seed=0, settings=training(), history=history))


# ---------------------------------------------------------------- checkpoints of parts


def test_parts_of_a_checkpoint_do_not_touch_each_other():
    whole = Memory()
    one, two = histories.Part(whole, "one", "a"), histories.Part(whole, "two", "a")
    assert one.load() is None
    one.save({"x": torch.ones(1)}, {"epoch": 1})
    two.save({"x": torch.zeros(1)}, {"epoch": 7})
    assert one.load() == ({"x": torch.ones(1)}, {"epoch": 1})
    assert two.load()[1] == {"epoch": 7}
    assert histories.Part(whole, "one", "another history").load() is None


# ---------------------------------------------------------------- every variant


@pytest.mark.parametrize(("name", "phase"), [("mmq", 1), ("mmq", 2), ("das", 1), ("unger", 1)])
def test_a_resumed_run_gives_the_same_bits(made, name, phase):
    checkpoint, resumed = Memory(), TOKENIZERS[name](SETTINGS[name]())
    arguments = {"seed": 1, "settings": training(max_epochs=4), "checkpoint": checkpoint, "history": tiny_history()}
    with pytest.raises(Interrupted):
        TOKENIZERS[name](SETTINGS[name]()).fit(tiny_items(), FitOptions(**arguments, progress=stop_after(3, run=phase)))
    resumed.fit(tiny_items(), FitOptions(**arguments))
    assert all(torch.equal(value, resumed.state()[key]) for key, value in made[name].state().items())


@pytest.mark.parametrize("name", SETTINGS)
def test_a_checkpoint_of_another_history_is_not_resumed(made, name):
    checkpoint, again = Memory(), TOKENIZERS[name](SETTINGS[name]())
    arguments = {"seed": 1, "settings": training(max_epochs=4), "checkpoint": checkpoint}
    with pytest.raises(Interrupted):
        TOKENIZERS[name](SETTINGS[name]()).fit(tiny_items(), FitOptions(**arguments, history=tiny_history(seed=5), progress=stop_after(1)))
    again.fit(tiny_items(), FitOptions(**arguments, history=tiny_history()))
    assert codebook_digest(again.codebooks()) == codebook_digest(made[name].codebooks())


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("change", [{"seed": 2}, {"history": tiny_history(seed=9)}])
def test_seed_and_histories_matter(made, name, change):
    assert codebook_digest(fitted(name, **change).codebooks()) != codebook_digest(made[name].codebooks())


@pytest.mark.parametrize("name", SETTINGS)
def test_state_and_config_rebuild_the_tokenizer(made, name):
    one = made[name]
    again = from_state(one.config(), safetensors.torch.load(safetensors.torch.save(one.state())))
    for field in ("codes_NL", "weights_NL", "quantized_ND"):
        assert torch.equal(getattr(one.encode(tiny_items()), field), getattr(again.encode(tiny_items()), field))
    assert codebook_digest(one.codebooks()) == codebook_digest(again.codebooks())
    broken = {key: value[..., :1] if key.endswith("codebook_LKD") else value for key, value in one.state().items()}
    with pytest.raises(RuntimeError):
        from_state(one.config(), broken)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_company_of_an_item_and_values_behind_masks_move_nothing(made, name):
    items = tiny_items(1100, seed=3)
    whole = made[name].encode(items)
    rows = torch.tensor([1050, 3, 3, 700])
    some = made[name].encode(items.take(rows))
    assert torch.equal(some.codes_NL, whole.codes_NL[rows])
    assert torch.equal(some.quantized_ND, whole.quantized_ND[rows])
    loud = replace(items, **{f"{each}_ND": torch.where(items.mask(each)[:, None], items.vectors(each), 1e3) for each in MODALITIES})
    assert torch.equal(made[name].encode(loud).codes_NL, whole.codes_NL)


@pytest.mark.parametrize("name", SETTINGS)
def test_an_item_with_nothing_to_read_is_masked_everywhere(made, name):
    nobody = torch.zeros(4, dtype=torch.bool)
    out = made[name].encode(replace(tiny_items(4), text_N=nobody, image_N=nobody, behavior_N=nobody))
    assert (out.codes_NL == 12).all()
    assert (out.weights_NL == 0).all()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_refit_begins_at_the_champion_and_a_pull_keeps_it_there(made, name):
    base, ways = made[name], []
    for pull in (0.0, 1e4):
        refit = TOKENIZERS[name](SETTINGS[name]())
        few = training(max_epochs=8, patience=8, revive_until=0.0)
        refit.fit(tiny_items(), FitOptions(seed=5, settings=few, start=Start(tokenizer=base, pull=pull), history=tiny_history(seed=2)))
        ways.append(sum(float((new - old).square().sum()) for new, old in zip(refit.codebooks(), base.codebooks(), strict=True)))
    assert 0 < ways[1] < 0.5 * ways[0]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_refit_of_other_sizes_is_refused(made, name):
    refit = TOKENIZERS[name](SETTINGS[name](codebook_size=9))
    with pytest.raises(ContractError, match="champion"):
        refit.fit(tiny_items(), FitOptions(seed=5, settings=training(), start=Start(tokenizer=made[name]), history=tiny_history()))


@pytest.mark.parametrize("name", SETTINGS)
def test_codes_can_be_renamed_and_held(made, name):
    items = tiny_items()
    again = from_state(made[name].config(), made[name].state())
    before = again.encode(items).codes_NL
    again.relabel([torch.arange(12).flip(0)] * len(again.slots))
    after = again.encode(items).codes_NL
    assert torch.equal(torch.where(before < 12, 11 - before, before), after)
    wished = torch.where(after < 12, (after + 1) % 12, after)
    held = again.encode(items, Keep(codes_NL=wished, margin=1e9)).codes_NL
    assert torch.equal(held, wished)
    assert torch.equal(again.encode(items, Keep(codes_NL=wished, margin=0.0)).codes_NL, after)


@pytest.mark.parametrize("name", SETTINGS)
def test_an_unfitted_tokenizer_says_so(name):
    with pytest.raises(ValueError, match="not fitted"):
        TOKENIZERS[name](SETTINGS[name]()).encode(tiny_items(4))


@pytest.mark.parametrize(("name", "present"), [("mmq", "behavior"), ("das", "text"), ("das", "behavior"), ("unger", "text"), ("unger", "behavior")])
def test_a_data_set_without_what_is_needed_is_refused(name, present):
    items = tiny_items(modalities=(present,), gaps=False)
    with pytest.raises(ValueError, match=name.upper()):
        TOKENIZERS[name](SETTINGS[name]()).fit(items, FitOptions(seed=0, settings=training(), history=tiny_history()))
