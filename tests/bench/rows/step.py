"""One training step of the tokenizer, batch 1024, 768-512-256-128-32, 3 x 256: our RQ-VAE against the same network of others.

vector-quantize-pytorch is a package; LC-Rec (the code line of LETTER and MiniOneRec too) and RQ-VAE-Recommender (compiled, as it comes) are repositories:
LCREC_CHECKOUT and RVR_CHECKOUT (it needs `gin-config`) name checkouts. Each is started, fed and timed as it comes; the errors after the same steps are shown
beside the times.
Two of them take the mean over the latent's width for the terms of the code rows and over the input's for the reconstruction, the third takes sums as the
paper does and as we do, so ours is trained with the weights of either form: the same loss, the same number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from bench import Case, peer, repository
from torch import Tensor, nn

from pipeline import config
from pipeline.device import has_bfloat16
from pipeline.tokenizers import ada_sid, rq_vae
from pipeline.tokenizers.base import ItemBatch
from pipeline.tokenizers.world import World
from rows.assign import counted_flops, embeddings

NUMBER, TITLE = 2, "one tokenizer training step"
BATCH, WIDTH, LEVELS, SIZE, LATENT = 1024, 768, 3, 256, 32
HIDDEN = [512, 256, 128]
STEPS = {"quick": 20, "normal": 100, "full": 2_000}
CALLS = 10  # steps per timed call
WORSE = 0.05  # share by which our error after the same steps may be above theirs
FORMS = {"sums": 1.0, "means": WIDTH / LATENT}  # factor on the weights of the code rows' terms


def cases(scale: str) -> Iterator[Case]:
    points_ND = embeddings(16 * BATCH)
    points_ND = (points_ND - points_ND.mean(0)) / points_ND.std()
    plain, flops = our_step(points_ND)
    forms = {form: our_step(points_ND, factor, bfloat16=has_bfloat16())[0] for form, factor in FORMS.items()}
    peer_steps = {name: step for name, (make, _) in PEERS.items() if (step := make(points_ND)) is not None}
    reached: dict[str, float] = {}

    def many(step: Callable[[], float]) -> Callable[[], float]:
        """CALLS steps as one piece of work."""
        return lambda: [step() for _ in range(CALLS)][-1]

    def trained(name: str, step: Callable[[], float]) -> float:
        """Mean error of the last 16 steps; kept under the name."""
        reached[name] = round(sum([step() for _ in range(STEPS[scale])][-16:]) / 16, 4)
        return reached[name]

    for form, step in forms.items():
        trained(f"ours, {form}", step)
    peers = {"ours, float32": many(plain)}
    for name, step in peer_steps.items():
        trained(name, step)
        peers[name] = many(step)
    worse = [name for name in peer_steps if reached[f"ours, {PEERS[name][1]}"] > (1 + WORSE) * reached[name]]
    yield Case(
        name=f"RQ-VAE, {CALLS} steps of {BATCH}, loss equal after {STEPS[scale]} steps",
        ours=many(forms["means"]),
        peers=peers,
        equal=lambda mine, other: "",
        units=CALLS * BATCH,
        work=CALLS * flops,
        limit="bf16" if has_bfloat16() else "fp32",
        target=2.0,
        judged=tuple(peer_steps),
        facts=lambda: {
            "GFLOP a step": round(flops / 1e9, 2),
            **{f"reconstruction after {STEPS[scale]} steps, {name}": value for name, value in reached.items()},
        },
        notices=(
            *(f"{name} is not there" for name in PEERS if name not in peer_steps),
            *(f"{name} reaches an error more than {WORSE:.0%} below ours in as many steps" for name in worse),
        ),
    )
    full, full_flops = ada_step()
    yield Case(
        name=f"ADA-SID's full step, {CALLS} of {BATCH}",
        ours=many(full),
        peers={"our RQ-VAE step": many(plain)},
        units=CALLS * BATCH,
        work=CALLS * full_flops,
        limit="fp32",
        facts=lambda: {"GFLOP a step": round(full_flops / 1e9, 2), "of them in the RQ-VAE": round(flops / 1e9, 2)},
    )


def drawn(count: int) -> Callable[[], Tensor]:
    """The same sequence of batches for everybody."""
    generator = torch.Generator().manual_seed(3)
    return lambda: torch.randint(0, count, (BATCH,), generator=generator)


def our_step(points_ND: Tensor, factor: float = 1.0, *, bfloat16: bool = False) -> tuple[Callable[[], float], float]:
    """A step of pipeline.tokenizers.rq_vae from k-means rows, as the training loop takes it, and its FLOPs; a step answers the reconstruction error.

    Args:
        factor: on the weights of codebook and commitment terms.
    """
    torch.manual_seed(0)
    base = config.RqVae(num_levels=LEVELS, codebook_size=SIZE, latent_dim=LATENT, hidden_dims=HIDDEN)
    settings = base.model_copy(update={"codebook_weight": factor * base.codebook_weight, "commitment": factor * base.commitment})
    network, world, rows = rq_vae.Autoencoder(settings, {"text": WIDTH}), World(), drawn(len(points_ND))
    items = only_text(points_ND)
    network.start_codes(items, torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            _, terms = network.losses(items.take(rows()), quantise=True, world=world)
        optimizer.zero_grad()
        terms["total"].backward()
        optimizer.step()
        return float(terms["reconstruction"].detach())

    return step, counted_flops(step)


def only_text(points_ND: Tensor) -> ItemBatch:
    yes_N, no_N, zeros_N = torch.ones(len(points_ND), dtype=torch.bool), torch.zeros(len(points_ND), dtype=torch.bool), torch.zeros(len(points_ND))
    return ItemBatch(text_ND=points_ND, image_ND=None, behavior_ND=None, text_N=yes_N, image_N=no_N, behavior_N=no_N, richness_N=zeros_N, strength_N=zeros_N)


def their_step(points_ND: Tensor) -> Callable[[], float] | None:
    """The same perceptrons, rates and batches around ResidualVQ with learnable rows started by k-means."""
    package: Any = peer("vector_quantize_pytorch")
    if package is None:
        return None
    torch.manual_seed(0)
    widths = [WIDTH, *HIDDEN, LATENT]
    encoder, decoder = rq_vae.perceptron(widths), rq_vae.perceptron(widths[::-1])
    quantizer = package.ResidualVQ(
        dim=LATENT, num_quantizers=LEVELS, codebook_size=SIZE, learnable_codebook=True, ema_update=False, kmeans_init=True, kmeans_iters=10
    )
    network, rows = nn.ModuleList([encoder, quantizer, decoder]), drawn(len(points_ND))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)

    def step() -> float:
        batch_BD = points_ND[rows()]
        quantized_1BD, _, loss_1L = quantizer(encoder(batch_BD)[None])
        error = F.mse_loss(decoder(quantized_1BD[0]), batch_BD)
        optimizer.zero_grad()
        (error + loss_1L.sum()).backward()
        optimizer.step()
        return float(error.detach())

    step()
    return step


def lcrec_step(points_ND: Tensor) -> Callable[[], float] | None:
    """LC-Rec's RQVAE without Sinkhorn, its loss, AdamW."""
    found = repository("LCREC_CHECKOUT", "models.rqvae", below="index")
    if found is None:
        return None
    torch.manual_seed(0)
    model = found[0].RQVAE(in_dim=WIDTH, num_emb_list=[SIZE] * LEVELS, e_dim=LATENT, layers=HIDDEN, kmeans_init=True, sk_epsilons=[0.0] * LEVELS).train()
    optimizer, rows = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), drawn(len(points_ND))

    def step() -> float:
        batch_BD = points_ND[rows()]
        made_BD, quantised, _ = model(batch_BD)
        loss, error = model.compute_loss(made_BD, quantised, xs=batch_BD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(error.detach())

    step()
    return step


def rvr_step(points_ND: Tensor) -> Callable[[], float] | None:
    """RQ-VAE-Recommender's RqVae with straight-through estimators, compiled as it comes, AdamW."""
    found = repository("RVR_CHECKOUT", "modules.rqvae", "modules.quantize", "data.schemas")
    if found is None:
        return None
    torch.manual_seed(0)
    model = found[0].RqVae(WIDTH, LATENT, HIDDEN, SIZE, codebook_mode=found[1].QuantizeForwardMode.STE, n_layers=LEVELS, n_cat_features=0).train()
    optimizer, rows, none_B = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), drawn(len(points_ND)), torch.zeros(0)

    def step() -> float:
        made = model(found[2].SeqBatch(none_B, none_B, none_B, points_ND[rows()], none_B, none_B), 0.2)
        optimizer.zero_grad()
        made.loss.backward()
        optimizer.step()
        return float(made.reconstruction_loss.detach()) / WIDTH

    model.get_semantic_ids(points_ND[rows()], 0.2)  # its k-means start lies outside what is compiled
    step()
    return step


PEERS: dict[str, tuple[Callable[[Tensor], Callable[[], float] | None], str]] = {  # how to make a step, and the form of its loss
    "vector-quantize-pytorch": (their_step, "means"), "LC-Rec RQVAE": (lcrec_step, "means"), "RQ-VAE-Recommender, compiled": (rvr_step, "sums"),
}  # fmt: skip


def ada_step() -> tuple[Callable[[], float], float]:
    """A full step of ADA-SID on three modalities of 768, 1280 and 64."""
    torch.manual_seed(0)
    widths = {"text": 768, "image": 1280, "behavior": 64}
    count = 4 * BATCH
    yes_N = torch.ones(count, dtype=torch.bool)
    vectors = {f"{name}_ND": embeddings(count, width, seed=index) for index, (name, width) in enumerate(widths.items())}
    items = ItemBatch(**vectors, text_N=yes_N, image_N=yes_N, behavior_N=yes_N, richness_N=torch.rand(count), strength_N=torch.rand(count))
    network = ada_sid.Network(config.AdaSid(), widths)
    network.fit_inputs(items)
    network.controller.fit_buckets(items.richness_N)
    prepared, training, world, rows = network.prepare(items), ada_sid.Training(network), World(), drawn(count)
    training.start_codes(prepared, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)

    def step() -> float:
        terms = training.losses(prepared.take(rows()), torch.rand(BATCH, 8), quantise=True, world=world)
        optimizer.zero_grad()
        terms["total"].backward()
        optimizer.step()
        training.after_step()
        return float(terms["reconstruction"].detach())

    return step, counted_flops(step)
