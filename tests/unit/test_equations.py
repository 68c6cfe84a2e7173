"""Every equation of the tokenizer against a slow loop over plain numbers, and a check that none is forgotten."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
from draws import rand

from pipeline.tokenizers import ada_sid, alignment, prior, quantize, router
from pipeline.tokenizers.world import World

MODULES = (ada_sid, alignment, prior, quantize, router)
WHOLES = {"Network", "Training"}  # what the modules read and how the terms are summed: nothing to loop over
TESTED: set[str] = set()


def equation(*names: str):
    """Marks a test as the slow loop of those functions."""
    TESTED.update(names)
    return lambda test: test


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def close(found: torch.Tensor, slow: object) -> None:
    np.testing.assert_allclose(found.detach().numpy(), np.asarray(slow, dtype=np.float64), rtol=2e-5, atol=1e-6)


@equation("nearest_code")
def test_nearest_code_is_the_arg_max_of_the_cosine():
    z, book = rand(5, 3, 4), rand(3, 7, 4, seed=1)
    slow = [[int(np.argmax([cosine(z[b, p].numpy(), book[p, k].numpy()) for k in range(7)])) for p in range(3)] for b in range(5)]
    assert quantize.nearest_code(z, book).tolist() == slow


@equation("straight_through")
def test_straight_through_as_printed():
    z, zq = rand(4, 3).requires_grad_(), rand(4, 3, seed=1).requires_grad_()
    printed = z + (zq - z).detach()
    out = quantize.straight_through(z, zq, code_gradient=False)
    assert torch.equal(out, printed)
    assert torch.equal(torch.autograd.grad(out.sum(), z)[0], torch.ones(4, 3))
    close(quantize.straight_through(z, zq, code_gradient=True), zq.detach().numpy())


@equation("codebook_loss", "commitment_loss")
def test_code_losses_are_squared_distances():
    z, zq = rand(4, 2, 3), rand(4, 2, 3, seed=1)
    slow = [[sum(float(z[b, p, d] - zq[b, p, d]) ** 2 for d in range(3)) for p in range(2)] for b in range(4)]
    close(quantize.codebook_loss(z, zq), slow)
    close(quantize.commitment_loss(z, zq), slow)


@equation("residual_codes")
def test_residual_walk():
    points, books = rand(6, 3).numpy(), rand(2, 4, 3, seed=1).numpy()
    codes, total = quantize.residual_codes(torch.from_numpy(points), torch.from_numpy(books))
    for n in range(6):
        rest, added = points[n].astype(np.float64), np.zeros(3)
        for level in range(2):
            k = int(np.argmin([((rest - books[level, j]) ** 2).sum() for j in range(4)]))
            assert k == int(codes[n, level])
            rest, added = rest - books[level, k], added + books[level, k]
        close(total[n], added)


@equation("balanced_codes")
def test_balanced_codes_raise_the_price_of_crowded_codes():
    points, book, start = rand(9, 2), rand(3, 2, seed=1), rand(3, seed=2)
    codes, price = quantize.balanced_codes(points, book, start, rounds=2, sharpness=4.0)
    far = [[sum(float(points[n, d] - book[k, d]) ** 2 for d in range(2)) for k in range(3)] for n in range(9)]
    scale = 4.0 / (sum(min(row) for row in far) / 9)
    slow = start.double().tolist()
    for _ in range(2):
        shares = [[math.exp(-scale * row[k] - slow[k]) for k in range(3)] for row in far]
        held = [sum(row[k] / sum(row) for row in shares) for k in range(3)]
        slow = [slow[k] + math.log(held[k] / (9 / 3)) for k in range(3)]
    close(price, slow)
    assert codes.tolist() == [int(np.argmin([scale * row[k] + slow[k] for k in range(3)])) for row in far]


@equation("sinkhorn")
def test_sinkhorn_scales_columns_and_rows_in_turn():
    far = rand(6, 3).square()
    low, high = float(far.min()), float(far.max())
    plan = np.exp(-(far.double().numpy() - (high + low) / 2) / ((high - low) / 2) / 0.5)
    for _ in range(3):
        plan = plan / plan.sum(0, keepdims=True) * (6 / 3)
        plan = plan / plan.sum(1, keepdims=True)
    close(quantize.sinkhorn(far, epsilon=0.5, rounds=3), plan)
    even = quantize.sinkhorn(far, epsilon=0.1, rounds=500)
    close(even.sum(0), [2.0] * 3)
    close(even.sum(1), [1.0] * 6)


@equation("softmax_gate")
def test_softmax_gate():
    logit = rand(3, 4)
    close(ada_sid.softmax_gate(logit), [[math.exp(a) / sum(math.exp(b) for b in row) for a in row] for row in logit.tolist()])


@equation("fuse")
def test_fusion_is_the_gated_sum():
    vectors, gates = rand(3, 4, 2), rand(3, 4, seed=1)
    slow = [[sum(float(gates[b, p] * vectors[b, p, d]) for p in range(4)) for d in range(2)] for b in range(3)]
    close(ada_sid.fuse(vectors, gates), slow)


@equation("reconstruction_error")
def test_reconstruction_error_is_a_mean_over_the_width():
    x, y = rand(3, 4), rand(3, 4, seed=1)
    close(ada_sid.reconstruction_error(x, y), [sum(float(x[b, d] - y[b, d]) ** 2 for d in range(4)) / 4 for b in range(3)])


@equation("export_weight")
def test_exported_weights_are_scaled_and_clamped():
    weights = torch.tensor([[0.0, 0.1], [0.3, 0.9]])
    close(ada_sid.export_weight(weights, torch.tensor(0.3)), [[0.0, 1 / 3], [1.0, 2.0]])


@equation("behavior_router")
def test_router():
    logit, richness = rand(4, 3), torch.tensor([0.0, 0.3, 0.7, 1.0])
    slow = [[sigmoid(float(richness[b])) * max(0.0, math.tanh(float(logit[b, e]))) for e in range(3)] for b in range(4)]
    close(router.behavior_router(logit, richness), slow)


def test_the_router_reads_richness_on_a_fixed_scale():
    close(router.router_feature(torch.tensor([0.0, 0.5, 1.0])), [[-2.0], [0.0], [2.0]])


@equation("sparsity_target")
def test_sparsity_target_falls_with_richness():
    close(router.sparsity_target(torch.tensor([0.0, 0.25, 1.0]), 0.4), [0.4, 0.3, 0.0])


@equation("load_factor")
def test_load_factor_is_one_when_balanced_and_on_target():
    active, items, target = torch.tensor([30.0, 60.0, 90.0]), torch.tensor(100.0), torch.tensor(0.4)
    close(router.load_factor(active, items, target), [a / ((1 - 0.4) * 100) for a in (30, 60, 90)])


@equation("gate_penalty")
def test_gate_penalty_presses_due_gates_and_carries_no_gradient_into_the_load():
    weights, load, strength = rand(3, 2).abs().requires_grad_(), torch.tensor([0.5, 2.0], requires_grad=True), torch.tensor([1.0, 0.1, 0.0])
    due = torch.tensor([[True, False], [True, True], [True, True]])
    penalty = router.gate_penalty(weights, load, strength, due)
    close(penalty, [float(strength[b]) * sum(float((weights[b, e] * load[e]).detach()) for e in range(2) if due[b, e]) for b in range(3)])
    penalty.sum().backward()
    assert load.grad is None
    close(weights.grad, strength[:, None] * load.detach() * due)


@equation("wake_penalty")
def test_wake_penalty_lifts_closed_gates_that_shall_be_open():
    logit, due = torch.tensor([[-2.0, 1.0], [-0.5, -0.1], [3.0, -4.0]], requires_grad=True), torch.tensor([[False, False], [False, True], [True, True]])
    loss = router.wake_penalty(logit, due)
    close(loss, [router.WAKE * 2.0 / 2, router.WAKE * 0.5 / 2, 0.0])
    loss.sum().backward()
    assert (logit.grad < 0).tolist() == [[True, False], [True, False], [False, False]]


@equation("lambda_step")
def test_lambda_moves_towards_the_target_and_is_clamped():
    start = [math.log(0.01), math.log(0.01), math.log(9.99), math.log(1e-10)]
    target, current = [0.4, 0.4, 0.4, 0.0], [0.2, 0.41, 0.0, 1.0]
    found = router.lambda_step(torch.tensor(start), torch.tensor(target), torch.tensor(current), step=1.1, most=10.0)
    slow = []
    for log, want, have in zip(start, target, current, strict=True):
        direction = min(1.0, max(-1.0, (want - have) / 0.05))
        slow.append(min(math.log(10.0), max(math.log(1e-10), log + math.log(1.1) * direction)))
    close(found, slow)


def slow_info_nce(x: np.ndarray, y: np.ndarray, valid: np.ndarray, tau: float) -> list[float]:
    losses = []
    for i in range(len(x)):
        terms = [math.exp(cosine(x[i], y[k]) / tau) if valid[k] or k == i else 0.0 for k in range(len(y))]
        losses.append(-math.log(terms[i] / sum(terms)))
    return losses


@equation("info_nce")
@pytest.mark.parametrize("hidden", [[], [1, 3]])
def test_info_nce(hidden):
    x, y, valid = rand(5, 3), rand(5, 3, seed=1), torch.ones(5, dtype=torch.bool)
    valid[hidden] = False
    found = alignment.info_nce(x, y, torch.arange(5), valid, temperature=0.2)
    close(found, slow_info_nce(x.double().numpy(), y.double().numpy(), valid.numpy(), 0.2))


def views(masks: dict[str, list[bool]]) -> dict[str, alignment.View]:
    made = {}
    for seed, (name, mask) in enumerate(masks.items()):
        h, m = rand(len(mask), 3, seed=seed), torch.tensor(mask)
        made[name] = alignment.View(h, m, h, m, 0)
    return made


MASKS = {"text": [True, True, False, True], "image": [True, False, True, True], "behavior": [True, True, True, False]}


def slow_mean(loss: list[float], rows: np.ndarray, weight: np.ndarray) -> float:
    return float(sum(weight[i] * loss[i] for i in range(len(loss)) if rows[i]) / max(1, rows.sum()))


@equation("alignment_v3")
def test_alignment_v3():
    shown, w = views(MASKS), torch.tensor([0.9, 0.5, 0.1, 0.3])
    found = alignment.alignment_v3(shown, w, temperature=0.3, world=World())
    h = {name: part.own_BD.double().numpy() for name, part in shown.items()}
    m = {name: part.own_B.numpy() for name, part in shown.items()}
    both = m["text"] & m["image"]
    content = np.add(slow_info_nce(h["text"], h["image"], m["image"], 0.3), slow_info_nce(h["image"], h["text"], m["text"], 0.3)).tolist()
    assert float(found["align_content"]) == pytest.approx(slow_mean(content, both, np.ones(4)), rel=1e-5)
    for name in ("text", "image"):
        loss = slow_info_nce(h[name], h["behavior"], m["behavior"], 0.3)
        assert float(found[f"align_{name}"]) == pytest.approx(slow_mean(loss, m[name] & m["behavior"], w.numpy()), rel=1e-5)


@equation("alignment_v2")
def test_alignment_v2_anchors_behaviour_on_the_sum_of_contents():
    shown, w = views(MASKS), torch.tensor([0.9, 0.5, 0.1, 0.3])
    found = alignment.alignment_v2(shown, w, temperature=0.3, world=World())
    h = {name: part.own_BD.double().numpy() for name, part in shown.items()}
    m = {name: part.own_B.numpy() for name, part in shown.items()}
    content = np.stack([sum(h[name][i] for name in ("text", "image") if m[name][i]) for i in range(4)])
    loss = slow_info_nce(h["behavior"], content, np.ones(4, bool), 0.3)
    assert float(found["align_behavior"]) == pytest.approx(slow_mean(loss, m["behavior"], w.numpy()), rel=1e-5)
    assert set(found) == {"align_content", "align_behavior"}


@equation("ExpertBank")
def test_expert_bank_runs_each_expert_on_its_own():
    bank = ada_sid.ExpertBank(2, 3, 5, 4).requires_grad_(False)
    bank.start_on(rand(20, 3, seed=1))
    x = rand(6, 3)
    out = bank(x)
    for e in range(2):
        first, bias = bank.first.weight[5 * e : 5 * e + 5], bank.first.bias[5 * e : 5 * e + 5]
        for b in range(6):
            hidden = [max(0.0, float(first[j] @ x[b] + bias[j])) for j in range(5)]
            straight = [sum(float(x[b, i] * bank.direct_EDD[e, i, d]) for i in range(3)) for d in range(4)]
            slow = [straight[d] + sum(hidden[j] * float(bank.second_EHD[e, j, d]) for j in range(5)) + float(bank.second_ED[e, d]) for d in range(4)]
            close(out[b, e], slow)


@equation("shrunk")
def test_poor_behaviour_is_drawn_towards_the_guess():
    behavior, guess, richness = rand(4, 3), rand(4, 3, seed=1), torch.tensor([0.0, 0.25, 0.5, 1.0])
    slow = [[float(richness[n] * behavior[n, d] + (1 - richness[n]) * guess[n, d]) for d in range(3)] for n in range(4)]
    close(prior.shrunk(behavior, guess, richness), slow)


@equation("_plus_plus")
def test_seeds_are_drawn_by_their_squared_distance_to_the_seeds_so_far():
    points = rand(40, 3)
    draws = torch.rand(5, generator=torch.Generator().manual_seed(7), dtype=torch.float64).numpy()
    chosen = [int(draws[0] * 40)]
    for draw in draws[1:]:
        gaps = [min(float(np.square(points[n].double().numpy() - points[row].double().numpy()).sum()) for row in chosen) for n in range(40)]
        running, mass = 0.0, draw * sum(gaps)
        for n, gap in enumerate(gaps):
            running += gap
            if running >= mass:
                chosen.append(n)
                break
    found = quantize._plus_plus(points, 5, torch.Generator().manual_seed(7))
    assert torch.equal(found, points[chosen])


def test_every_equation_has_its_loop():
    cited = {
        name
        for module in MODULES
        for name, thing in vars(module).items()
        if getattr(thing, "__module__", "") == module.__name__ and (inspect.isfunction(thing) or inspect.isclass(thing)) and "Source:" in (thing.__doc__ or "")
    }
    assert cited - WHOLES == TESTED
