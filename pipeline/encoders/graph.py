"""Users and items as a sparse graph: pairs, normalised adjacency, propagation, BPR with sampled negatives, one training loop, rows of a frozen generation.

Everything the graph encoders share; a network says how it propagates and what its loss is. No dense adjacency, no loop over users, items or events.
Bit-deterministic for a seed on one machine and one number of threads.
Tensor suffixes: E pairs, U users, N items, V nodes (users, then items), B batch, D width, F width of final vectors, M moved items, P samples per row and step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import evaluation
from pipeline.config import GraphEncoder as Params
from pipeline.device import deterministic
from pipeline.encoders.behavior import Champion, MovedRows, Sequences, TrainedEncoder
from pipeline.encoders.sasrec import Best, Holdout, holdout, uniform
from pipeline.log import progress

REDRAWS = 10  # rounds in which a negative that the user has is drawn again
ROW_PAIRS = 16  # P
ROW_CHUNK = 1024  # moved rows that are trained side by side
RIDGE = 1e-3  # of the mean squared feature

# ---------------------------------------------------------------- pairs and sparse matrices


@dataclass(frozen=True)
class Edges:
    """Pairs of a user and an item, each once.

    Args:
        keys: user * num_items + item, int64 [E], ascending.
    """

    keys: Tensor
    num_users: int
    num_items: int

    @cached_property
    def users(self) -> Tensor:
        """User of each pair, int64 [E]."""
        return self.keys // self.num_items

    @cached_property
    def items(self) -> Tensor:
        """Item of each pair, int64 [E]."""
        return self.keys % self.num_items

    def degrees(self) -> tuple[Tensor, Tensor]:
        """(items per user [U], users per item [N]), float32."""
        return torch.bincount(self.users, minlength=self.num_users).float(), torch.bincount(self.items, minlength=self.num_items).float()

    def contains(self, users: Tensor, items: Tensor) -> Tensor:
        """Whether each pair is an edge, bool, in the shape of both arguments together."""
        asked = users * self.num_items + items
        if not self.keys.numel():
            return torch.zeros_like(asked, dtype=torch.bool)
        return self.keys[torch.searchsorted(self.keys, asked).clamp(max=self.keys.numel() - 1)] == asked

    def to(self, device: str) -> Edges:
        """The same pairs on a device."""
        return Edges(self.keys.to(device), self.num_users, self.num_items)


def edges_of(sequences: Sequences, num_items: int) -> Edges:
    """The distinct (user, item) pairs of the sequences; an item_index >= N is left out."""
    num_users = sequences.offsets.numel() - 1
    user_T = torch.repeat_interleave(torch.arange(num_users), sequences.offsets.diff())
    known_T = sequences.items < num_items
    return Edges(torch.unique(user_T[known_T] * num_items + sequences.items[known_T]), num_users, num_items)


@dataclass(frozen=True)
class Sparse:
    """A sparse matrix and its transpose, both CSR: the gradient of a product needs the transpose."""

    matrix: Tensor
    transpose: Tensor

    def __matmul__(self, dense: Tensor) -> Tensor:
        """The product with a dense matrix; its gradient reaches the dense one only."""
        return _Product.apply(self, dense)


class _Product(torch.autograd.Function):
    """A sparse times a dense matrix."""

    @staticmethod
    def forward(ctx: Any, sparse: Sparse, dense: Tensor) -> Tensor:
        """The product; its transpose is kept for the gradient."""
        ctx.transpose = sparse.transpose
        return sparse.matrix @ dense

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        """The gradient of the dense matrix; the sparse one has none."""
        return None, ctx.transpose @ gradients[0]


def sparse(rows_E: Tensor, columns_E: Tensor, values_E: Tensor, shape: tuple[int, int]) -> Sparse:
    """The matrix with values_E at distinct (rows_E, columns_E)."""
    return Sparse(_csr(rows_E, columns_E, values_E, shape), _csr(columns_E, rows_E, values_E, (shape[1], shape[0])))


def _csr(rows_E: Tensor, columns_E: Tensor, values_E: Tensor, shape: tuple[int, int]) -> Tensor:
    order = (rows_E * shape[1] + columns_E).argsort()
    starts = F.pad(torch.bincount(rows_E, minlength=shape[0]).cumsum(0), (1, 0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")  # torch says so once per process
        return torch.sparse_csr_tensor(starts.int(), columns_E[order].int(), values_E[order], shape, check_invariants=False)


def laplacian(edges: Edges, form: Literal["symmetric", "row_loops"] = "symmetric") -> Sparse:
    """Normalised adjacency of users and items [V, V]: D^-1/2 A D^-1/2 without self loops, or D^-1 (A + I); a node without pairs has no neighbour.

    Source: NGCF, 2019, Laplacian, and LightGCN, 2020, for `symmetric`; NGCF's released code for `row_loops`.
    """
    nodes = edges.num_users + edges.num_items
    rows_E, columns_E = torch.cat([edges.users, edges.items + edges.num_users]), torch.cat([edges.items + edges.num_users, edges.users])
    degree_V = torch.cat(edges.degrees())
    if form == "symmetric":
        return sparse(rows_E, columns_E, (degree_V[rows_E] * degree_V[columns_E]).rsqrt(), (nodes, nodes))
    own_V = torch.arange(nodes, device=rows_E.device)
    rows_E, columns_E = torch.cat([rows_E, own_V]), torch.cat([columns_E, own_V])
    return sparse(rows_E, columns_E, 1 / (degree_V[rows_E] + 1), (nodes, nodes))


def mean_of_items(edges: Edges) -> Sparse:
    """The matrix [U, N] that averages over each user's items; zeros for a user without any."""
    user_U, _ = edges.degrees()
    return sparse(edges.users, edges.items, 1 / user_U[edges.users], (edges.num_users, edges.num_items))


# ---------------------------------------------------------------- equations


def propagate(adjacency: Sparse, ego_VD: Tensor, num_layers: int) -> list[Tensor]:
    """Layers 0 .. K of plain propagation, [V, D] each: every layer is the adjacency times the one before.

    Source: LightGCN, 2020, propagation.
    """
    layers = [ego_VD]
    for _ in range(num_layers):
        layers.append(adjacency @ layers[-1])
    return layers


def layer_mean(layers: list[Tensor]) -> Tensor:
    """Mean of the layers, in their shape.

    Source: LightGCN, 2020, layer combination with alpha_k = 1 / (K + 1).
    """
    return torch.stack(layers).mean(0)


def bpr_loss(positive: Tensor, negative: Tensor) -> Tensor:
    """-ln sigmoid(positive - negative) of each pair of scores, nats, in their shape.

    Source: BPR, 2009, BPR-OPT (without its regulariser, see `squared_norm`).
    """
    return F.softplus(negative - positive)


def squared_norm(*rows: Tensor) -> Tensor:
    """Half the sum of all squares over the number of rows of the first [B, D], scalar: what `decay` weighs.

    Source: NGCF's released code, decay.
    """
    return torch.stack([part.square().sum() for part in rows]).sum() / (2 * rows[0].shape[0])


def sample_negatives(edges: Edges, candidates: Tensor, users_B: Tensor) -> tuple[Tensor, Tensor]:
    """(an item that the user does not have, uniform over the candidates, int64 [B]; whether one was found, bool [B])."""

    def draw(count: int) -> Tensor:
        """So many candidates, with replacement."""
        return candidates[torch.randint(candidates.numel(), (count,), device=candidates.device)]

    items_B = draw(users_B.numel())
    for _ in range(REDRAWS):
        again = torch.nonzero(edges.contains(users_B, items_B)).flatten()
        if not again.numel():
            break
        items_B[again] = draw(again.numel())
    return items_B, ~edges.contains(users_B, items_B)


# ---------------------------------------------------------------- networks and their training


class GraphNetwork(nn.Module):
    """A network on the graph it is attached to; a score is the product of a user's and an item's final vector, or their cosine."""

    cosine = False
    edges: Edges
    candidates: Tensor

    def attach(self, edges: Edges) -> None:
        """Propagate over these pairs from now on; negatives are items with a pair."""
        self.edges = edges
        self.candidates = torch.unique(edges.items)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Final vectors of all users [U, F] and items [N, F]."""
        raise NotImplementedError

    def loss(self, users_B: Tensor, items_B: Tensor) -> Tensor:
        """Loss of a batch of pairs, scalar."""
        raise NotImplementedError

    def pairwise(self, final: tuple[Tensor, Tensor], penalised: tuple[Tensor, Tensor], users_B: Tensor, items_B: Tensor, decay: float) -> Tensor:
        """Mean BPR loss on final vectors plus decay times the squared rows of the batch in `penalised`; one negative per pair."""
        negatives_B, found_B = sample_negatives(self.edges, self.candidates, users_B)
        (users_UF, items_NF), (users_UD, items_ND) = final, penalised
        user_BF = users_UF[users_B]
        loss_B = bpr_loss((user_BF * items_NF[items_B]).sum(1), (user_BF * items_NF[negatives_B]).sum(1))
        loss = (loss_B * found_B).sum() / found_B.sum().clamp(min=1)
        return loss + decay * squared_norm(users_UD[users_B], items_ND[items_B], items_ND[negatives_B])


@dataclass(frozen=True)
class Fitted:
    """A network at its best epoch, attached to every pair before the cutoff (the held-out baskets too), and how it came there."""

    network: GraphNetwork
    edges: Edges
    curves: dict[str, list[float]]
    metrics: dict[str, float]

    def final(self) -> tuple[Tensor, Tensor]:
        """Final vectors of users [U, F] and items [N, F] on the CPU, without gradient."""
        with torch.no_grad():
            users_UF, items_NF = self.network.eval()()
        return users_UF.detach().cpu(), items_NF.detach().cpu()


def fit(make: Callable[[Edges], GraphNetwork], sequences: Sequences, num_items: int, params: Params, *, seed: int, device: str, what: str) -> Fitted:
    """The network at its best epoch by validation NDCG@10 (full ranking, history masked: a pair is an edge or it is not).

    The last basket of up to `valid_users` users is held out for that, as SASRec does it, of users to whom the item asked for is new; without such users all
    epochs are run.
    Raises: ValueError when there is no pair.
    """
    rest, questions = holdout(sequences, params.valid_users, 2, seed, new=True)
    edges, everything = edges_of(rest, num_items).to(device), edges_of(sequences, num_items).to(device)
    if not edges.keys.numel():
        raise ValueError("no user has an item: there is no graph to learn from")
    with deterministic(seed):
        network = make(edges).to(device)
        network.attach(edges)
        optimizer = torch.optim.Adam(network.parameters(), lr=params.learning_rate)
        best = Best(network, params.patience)
        curves: dict[str, list[float]] = {"loss": [], "valid_ndcg@10": []}
        for _ in progress(range(params.max_epochs), what, params.max_epochs):
            curves["loss"].append(_epoch(network, optimizer, params))
            metrics = evaluation.ranking_metrics(answer(network, rest, questions), (10, 20, 50)) if questions.users.numel() else {}
            curves["valid_ndcg@10"].append(metrics.get("ndcg@10", float("nan")))
            if best.stop(metrics):
                break
    network.load_state_dict(best.state)
    network.attach(everything)
    found = {"epochs": float(len(curves["loss"])), "best_epoch": float(best.epoch), "valid_users": float(questions.users.numel())}
    return Fitted(network, everything, curves, found | {f"valid_{name}": value for name, value in best.metrics.items()})


def _epoch(network: GraphNetwork, optimizer: torch.optim.Optimizer, params: Params) -> float:
    """Mean loss of one pass over all pairs, in a new random order."""
    network.train()
    edges = network.edges
    count = edges.keys.numel()
    size = max(params.batch_size, -(-count // params.max_steps))
    losses = []
    for rows_B in torch.randperm(count).to(edges.keys.device).split(size):
        loss = network.loss(edges.users[rows_B], edges.items[rows_B])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def answer(network: GraphNetwork, sequences: Sequences, questions: Holdout) -> Any:
    """Rank of every question's target over the full catalogue without the user's history, float64 [B]."""
    network.eval()
    with torch.no_grad():
        users_UF, items_NF = network()
        if network.cosine:
            users_UF, items_NF = F.normalize(users_UF, dim=1), F.normalize(items_NF, dim=1)
        asked_BF = users_UF[questions.users.to(users_UF.device)]
        history = sequences.users(questions.users)
        packed = evaluation.Packed(history.offsets.numpy(), history.items.numpy())
        return evaluation.ranks_in_chunks(lambda rows: (asked_BF[rows] @ items_NF.T).cpu(), questions.targets.numpy(), items_NF.shape[0], packed)


# ---------------------------------------------------------------- rows of a frozen generation


def trained(fitted: Fitted) -> TrainedEncoder:
    """What training leaves of a network whose items have rows of their own.

    The state holds no user: a night's users are made from their items by `user_map`, so that new users count and no user id is kept with the model.
    """
    users_UF, items_NF = fitted.final()
    edges = fitted.edges.to("cpu")
    degree_N = edges.degrees()[1]
    features_UF = user_features(edges, items_NF, degree_N)
    map_FF = user_map(features_UF, users_UF)
    fit = F.cosine_similarity(features_UF @ map_FF, users_UF).mean()
    mean_degree = edges.keys.numel() / max(int((degree_N > 0).sum()), 1)
    state = {"items": items_NF, "item_degrees": degree_N, "user_map": map_FF, "mean_degree": torch.tensor(mean_degree)}
    return TrainedEncoder(items_NF.clone(), state, fitted.curves, fitted.metrics | {"user_map_cosine": float(fit)})


def user_features(edges: Edges, items_NF: Tensor, degree_N: Tensor) -> Tensor:
    """Sum over each user's items of their vectors / sqrt(degree of user * degree of item) [U, F]: one propagation from items to users."""
    user_U, _ = edges.degrees()
    values_E = (user_U[edges.users] * degree_N[edges.items].clamp(min=1)).rsqrt()
    return _csr(edges.users, edges.items, values_E, (edges.num_users, edges.num_items)) @ items_NF


def user_map(features_UF: Tensor, users_UF: Tensor) -> Tensor:
    """The ridge regression [F, F] of users' vectors on their features."""
    features = features_UF.double()
    gram_FF = features.T @ features
    lift = RIDGE * gram_FF.diagonal().mean().clamp(min=1e-12) * torch.eye(gram_FF.shape[0], dtype=torch.float64)
    return torch.linalg.solve(gram_FF + lift, features.T @ users_UF.double()).float()


def train_rows(state: Mapping[str, Tensor], sequences: Sequences, moved_M: Tensor, seeds_M: Tensor, params: Params, *, device: str) -> MovedRows:
    """Final vectors of the moved items, trained by BPR against users and items that are held at the base.

    A user stands where `user_map` puts the base items that it has tonight; a known item starts from its base vector, a new one from the mean of its users'.
    A row is pulled by its own pairs and, as a sampled negative would, pushed by others' pairs, in the proportion that uniform negatives give them. So it is a
    function of the base, of its users' base items and of its own seed, and does not depend on which other items moved, up to rounding of batched products.
    differs from training everything: the final vector is free; it is not propagated from neighbours, because layers of users are not kept.

    Args:
        sequences: item_index >= N marks items that the base does not have.
        seeds_M: int64, one per moved item.
    """
    edges = edges_of(sequences, state["items"].shape[0])
    users_UF = user_features(edges, state["items"], state["item_degrees"]) @ state["user_map"]
    own = own_pairs(sequences, moved_M, edges)
    start_MF = initial_rows(state["items"], edges, own, moved_M)
    near_M = torch.bincount(own.users, minlength=moved_M.numel()) > 0
    kept = torch.nonzero(near_M).flatten()
    rows, losses = [], []
    held = {name: tensor.to(device) for name, tensor in state.items()}, edges.to(device), users_UF.to(device), own.to(device)
    chunks = kept.split(ROW_CHUNK) if kept.numel() else ()
    for chunk in progress(chunks, "behaviour rows", len(chunks)):
        task = _RowTask(held, moved_M, chunk, seeds_M, params)
        row_CF, loss = task.fit(start_MF[chunk])
        rows.append(row_CF)
        losses.append(torch.tensor(loss) * chunk.numel())
    vectors = torch.cat(rows) if rows else start_MF[:0]
    curve = (torch.stack(losses).sum(0) / kept.numel()).tolist() if losses else []
    return MovedRows.of(vectors, start_MF[kept], near_M, curve)


class RowEncoder:
    """A network whose items have rows of their own, as a behaviour encoder (`behavior.BehaviorEncoder`); it reads no text."""

    masks_history, reads_text, cold_items, local_rows = True, False, False, False  # a row is pushed by the pairs of all users
    network: Callable[[int, int, Any], GraphNetwork]  # (users, items, params)

    def __init__(self, params: Params) -> None:
        self.params = params

    def begin_at(self, champion: Champion) -> bool:
        """False: the champion keeps final vectors, not the rows that its layers began with."""
        return False

    def train(
        self, sequences: Sequences, num_items: int, *, seed: int, device: str = "cpu", what: str = "graph", content: Tensor | None = None
    ) -> TrainedEncoder:
        """The final vectors of the items at the best epoch [N, F]."""

        def make(edges: Edges) -> GraphNetwork:
            """An untrained network for these users and items."""
            return type(self).network(edges.num_users, edges.num_items, self.params)

        return trained(fit(make, sequences, num_items, self.params, seed=seed, device=device, what=what))

    def train_rows(
        self, state: Mapping[str, Tensor], sequences: Sequences, moved_M: Tensor, seeds_M: Tensor, *, device: str = "cpu", content: Tensor | None = None
    ) -> MovedRows:
        """Rows trained against the base, see the function `train_rows`; an item whose users have no base item waits for more events."""
        return train_rows(state, sequences, moved_M, seeds_M, self.params, device=device)

    def probe(self, sequences: Sequences, num_items: int, *, seed: int, device: str = "cpu", content: Tensor | None = None) -> dict[str, float]:
        """Nothing: no text is read."""
        return {}


def own_pairs(sequences: Sequences, moved_M: Tensor, edges: Edges) -> Edges:
    """(moved item, user) pairs; the first coordinate is the position in moved_M, users without a base item are left out."""
    user_T = torch.repeat_interleave(torch.arange(edges.num_users), sequences.offsets.diff())
    lookup = torch.full((int(torch.cat([sequences.items, moved_M]).max()) + 1,), -1)
    lookup[moved_M] = torch.arange(moved_M.numel())
    slot_T = lookup[sequences.items]
    good_T = (slot_T >= 0) & (edges.degrees()[0] > 0)[user_T]
    return Edges(torch.unique(slot_T[good_T] * edges.num_users + user_T[good_T]), moved_M.numel(), edges.num_users)


def initial_rows(items_NF: Tensor, edges: Edges, own: Edges, moved_M: Tensor) -> Tensor:
    """Where moved rows start [M, F]: the base row, or the mean over an item's users of the mean of their base items."""
    means_MF = mean_of_items(own).matrix @ (mean_of_items(edges).matrix @ items_NF)
    is_base_M1 = (moved_M < items_NF.shape[0])[:, None]
    return torch.where(is_base_M1, items_NF[moved_M.clamp(max=items_NF.shape[0] - 1)], means_MF)


class _RowTask:
    """Some moved items that are trained side by side; `C` counts these."""

    def __init__(self, held: tuple[dict[str, Tensor], Edges, Tensor, Edges], moved_M: Tensor, chunk: Tensor, seeds_M: Tensor, params: Params) -> None:
        state, self.edges, self.users_UF, self.own = held
        device = self.users_UF.device
        self.items_NF, self.params = state["items"], params
        self.moved_C1, self.slot_C1 = moved_M[chunk].to(device)[:, None], chunk.to(device)[:, None]
        count_M = torch.bincount(self.own.users, minlength=self.own.num_users)
        self.count_C1, self.first_C1 = count_M[self.slot_C1], (count_M.cumsum(0) - count_M)[self.slot_C1]
        self.push_C = state["mean_degree"] / self.count_C1[:, 0]
        self.candidates = torch.nonzero(state["item_degrees"]).flatten()
        draws = torch.from_numpy(uniform(seeds_M[chunk].numpy(), params.row_steps * 3 * ROW_PAIRS))
        self.draws = draws.view(-1, params.row_steps, 3, ROW_PAIRS).to(device)

    def fit(self, start_CF: Tensor) -> tuple[Tensor, list[float]]:
        """(trained rows, mean loss per step); the step size falls linearly to nothing."""
        row_CF = start_CF.to(self.users_UF.device).clone().requires_grad_()
        optimizer = torch.optim.Adam([row_CF], lr=self.params.learning_rate)
        curve = []
        for step in range(self.params.row_steps):
            optimizer.param_groups[0]["lr"] = self.params.learning_rate * (1 - step / self.params.row_steps)
            loss_C = self.loss(step, row_CF)
            optimizer.zero_grad()
            loss_C.sum().backward()
            optimizer.step()
            curve.append(loss_C.detach().mean())
        return row_CF.detach().cpu(), torch.stack(curve).tolist()

    def loss(self, step: int, row_CF: Tensor) -> Tensor:
        """BPR loss of each item as a positive, plus as a negative of others' pairs, nats [C]; pairs that contradict the graph do not count."""
        pick_CP, other_CP, rival_CP = self.draws[:, step].unbind(1)
        user_CP = self.own.items[self.first_C1 + (pick_CP * self.count_C1).long()]
        negative_CP = self.candidates[(other_CP * self.candidates.numel()).long()]
        free_CP = (negative_CP != self.moved_C1) & ~self.edges.contains(user_CP, negative_CP)
        pull_CP = bpr_loss(self.score(user_CP, row_CF), (self.users_UF[user_CP] * self.items_NF[negative_CP]).sum(2))
        pair_CP = (rival_CP * self.edges.keys.numel()).long()
        rival_user_CP, rival_item_CP = self.edges.users[pair_CP], self.edges.items[pair_CP]
        absent_CP = ~self.own.contains(self.slot_C1.expand_as(rival_user_CP), rival_user_CP)
        push_CP = bpr_loss((self.users_UF[rival_user_CP] * self.items_NF[rival_item_CP]).sum(2), self.score(rival_user_CP, row_CF))
        pull_C, push_C = ((loss_CP * mask_CP).sum(1) / ROW_PAIRS for loss_CP, mask_CP in ((pull_CP, free_CP), (push_CP, absent_CP)))
        return pull_C + self.push_C * push_C + self.params.decay * row_CF.square().sum(1) / 2

    def score(self, user_CP: Tensor, row_CF: Tensor) -> Tensor:
        """Product of users' vectors with the item's row [C, P]."""
        return torch.einsum("cpf,cf->cp", self.users_UF[user_CP], row_CF)
