"""AlphaRec: no row per id; text vectors of items, one map shared by users and items, LightGCN propagation, cosine scores, InfoNCE.

Source: AlphaRec, Sheng et al. 2025. differs: the sampled negatives are shared by the pairs of a step (those that a user has do not count for it); the exported
vectors are the propagated ones before the cosine's normalisation. A user's text vector is the mean over its items, so the first linear map of users is the mean
of the items' and is never made from stored user texts.
An item without pairs is its mapped text over K + 1: the mean of its layers, of which only the first is not zero. This is what a cold item is given.
Tensor suffixes: U users, N items, M moved items, V nodes, B batch, S negatives, C content width, H hidden width, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import AlphaRec as Params
from pipeline.encoders import graph
from pipeline.encoders.behavior import Champion, MovedRows, Sequences, TrainedEncoder


def info_nce(users_BD: Tensor, items_BD: Tensor, negatives_SD: Tensor, hit_BS: Tensor, temperature: float) -> Tensor:
    """-ln of the positive's share among itself and the negatives, exp(cosine / temperature) each, nats [B].

    Source: AlphaRec, 2025, its InfoNCE objective (the positive stands in the denominator).

    Args:
        hit_BS: negatives that the user has; they leave the denominator.
    """
    users_BD, items_BD, negatives_SD = (F.normalize(part, dim=1) for part in (users_BD, items_BD, negatives_SD))
    positive_B1 = (users_BD * items_BD).sum(1, keepdim=True) / temperature
    negative_BS = (users_BD @ negatives_SD.T / temperature).masked_fill(hit_BS, -torch.inf)
    return torch.logsumexp(torch.cat([positive_B1, negative_BS], 1), 1) - positive_B1[:, 0]


class TextMap(nn.Module):
    """The shared map: two linear layers with an activation between them, or a single one without bias."""

    def __init__(self, width: int, params: Params) -> None:
        super().__init__()
        linear = params.form == "linear"
        self.first = nn.Linear(width, params.dim if linear else params.hidden_dim, bias=not linear)
        self.second = None if linear else nn.Linear(params.hidden_dim, params.dim)

    def finish(self, first_VH: Tensor) -> Tensor:
        """Mapped vectors [V, D] from the first layer's outputs; a user's are the mean of its items'."""
        return first_VH if self.second is None else self.second(F.leaky_relu(first_VH))

    def forward(self, content_VC: Tensor) -> Tensor:
        """Mapped vectors [V, D] of text vectors."""
        return self.finish(self.first(content_VC))


def mapped(state: Mapping[str, Tensor], content_BC: Tensor, params: Params) -> Tensor:
    """The mapped vectors [B, D] of text vectors, or of means of them, under a trained encoder's state."""
    text_map = TextMap(content_BC.shape[1], params)
    text_map.load_state_dict({name.removeprefix("map."): tensor for name, tensor in state.items() if name.startswith("map.")}, strict=True)
    with torch.no_grad():
        return text_map(content_BC)


class Network(graph.GraphNetwork):
    """The shared map and the graph; content is data, not a parameter."""

    cosine = True

    def __init__(self, content_NC: Tensor, params: Params) -> None:
        super().__init__()
        self.params = params
        self.map = TextMap(content_NC.shape[1], params)
        self.register_buffer("content", content_NC, persistent=False)

    def attach(self, edges: graph.Edges) -> None:
        """Propagate over these pairs from now on."""
        super().attach(edges)
        self.adjacency, self.mean = graph.laplacian(edges, "symmetric"), graph.mean_of_items(edges)

    def layers(self) -> list[Tensor]:
        """Layers 0 .. K of users and items [V, D] each."""
        items_NH = self.map.first(self.content)
        ego_VD = self.map.finish(torch.cat([self.mean @ items_NH, items_NH]))
        return graph.propagate(self.adjacency, ego_VD, self.params.num_layers)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Means over the layers of users [U, D] and items [N, D]."""
        final_VD = graph.layer_mean(self.layers())
        return final_VD[: self.edges.num_users], final_VD[self.edges.num_users :]

    def loss(self, users_B: Tensor, items_B: Tensor) -> Tensor:
        """Mean InfoNCE of a batch of pairs plus decay on the map's weights, scalar."""
        users_UD, items_ND = self()
        drawn_S = torch.randint(self.candidates.numel(), (self.params.num_negatives,), device=self.candidates.device)
        negatives_S = self.candidates[drawn_S]
        hit_BS = self.edges.contains(users_B[:, None], negatives_S[None, :])
        loss_B = info_nce(users_UD[users_B], items_ND[items_B], items_ND[negatives_S], hit_BS, self.params.temperature)
        weights = sum(parameter.square().sum() for parameter in self.parameters())
        return loss_B.mean() + self.params.decay * weights


class AlphaRec:
    """AlphaRec as a behaviour encoder; with `cold_items` an item with a text has a vector from the start."""

    masks_history, reads_text, local_rows = True, True, True

    def __init__(self, params: Params) -> None:
        self.params = params
        self.cold_items = params.cold_items

    def begin_at(self, champion: Champion) -> bool:
        """False: what it learns is one map of the texts, which is soon learned anew."""
        return False

    def train(
        self, sequences: Sequences, num_items: int, *, seed: int, device: str = "cpu", what: str = "alpharec", content: Tensor | None = None
    ) -> TrainedEncoder:
        """The propagated vectors at the best epoch [N, D]; the state holds the map and the items' layers, no user."""
        fitted = self.fit(sequences, num_items, content, seed=seed, device=device, what=what)
        network = fitted.network.eval()
        assert isinstance(network, Network)
        with torch.no_grad():
            layers_KND = torch.stack([layer_VD[fitted.edges.num_users :] for layer_VD in network.layers()]).cpu()
        state = {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
        state |= {"item_layers": layers_KND[:-1].contiguous(), "item_degrees": fitted.edges.degrees()[1].cpu()}
        return TrainedEncoder(layers_KND.mean(0), state, fitted.curves, fitted.metrics)

    def fit(self, sequences: Sequences, num_items: int, content: Tensor | None, *, seed: int, device: str, what: str) -> graph.Fitted:
        """The network at its best epoch."""
        if content is None:
            raise ValueError("AlphaRec needs text vectors")
        content_NC = content[:num_items]
        return graph.fit(lambda _: Network(content_NC, self.params), sequences, num_items, self.params, seed=seed, device=device, what=what)

    def train_rows(
        self, state: Mapping[str, Tensor], sequences: Sequences, moved_M: Tensor, seeds_M: Tensor, *, device: str = "cpu", content: Tensor | None = None
    ) -> MovedRows:
        """Vectors of the moved items by propagation, with the map and the base items' layers held: nothing is trained and no seed is used.

        A user's layers come from the base items that it has tonight, an item's from its users'. An item with neither a text nor such a user has none.
        """
        if content is None:
            raise ValueError("AlphaRec needs text vectors")
        num_items = state["item_degrees"].numel()
        edges, own = graph.edges_of(sequences, num_items), graph.own_pairs(sequences, moved_M, graph.edges_of(sequences, num_items))
        text_MD = mapped(state, content[moved_M], self.params)
        near_M = (content[moved_M] != 0).any(1) | (torch.bincount(own.users, minlength=moved_M.numel()) > 0)
        user_layers = self.user_layers(state, edges, content)
        neighbours = [self.from_users(own, edges, layer_UD) for layer_UD in user_layers]
        vectors_MD = graph.layer_mean([text_MD, *neighbours])
        return MovedRows.of(vectors_MD[near_M], text_MD[near_M], near_M, [])

    def user_layers(self, state: Mapping[str, Tensor], edges: graph.Edges, content_NC: Tensor) -> list[Tensor]:
        """Layers 0 .. K - 1 of tonight's users [U, D] each, from base items alone."""
        if not self.params.num_layers:
            return []
        num_items = edges.num_items
        mean_UC = graph.mean_of_items(edges).matrix @ content_NC[:num_items]
        first_UD = mapped(state, mean_UC, self.params)
        later = [graph.user_features(edges, layer_ND, state["item_degrees"]) for layer_ND in state["item_layers"][:-1]]
        return [first_UD, *later]

    def from_users(self, own: graph.Edges, edges: graph.Edges, layer_UD: Tensor) -> Tensor:
        """Sum over each moved item's users of their layer / sqrt(degree of item * degree of user) [M, D]."""
        return graph.user_features(own, layer_UD, edges.degrees()[0])

    def probe(self, sequences: Sequences, num_items: int, *, seed: int, device: str = "cpu", content: Tensor | None = None) -> dict[str, float]:
        """`probe/<recall@20 | ndcg@20>` of a linear map of the text vectors without graph, `probe/dealt_<...>` of the same vectors dealt out at random.

        A new text encoder whose probe falls is not worth a new tokenizer; `probe_lift`, recall over recall of the dealt ones, is what a gate judges.
        """
        if content is None or not self.params.probe:
            return {}
        linear = AlphaRec(self.params.model_copy(update={"form": "linear", "num_layers": 0}))
        dealt = content[:num_items][torch.randperm(num_items, generator=torch.Generator().manual_seed(seed))]
        found: dict[str, float] = {}
        for name, vectors in (("", content), ("dealt_", dealt)):
            metrics = linear.fit(sequences, num_items, vectors, seed=seed, device=device, what=f"{name}linear probe").metrics
            found |= {f"probe/{name}{metric}": metrics[f"valid_{metric}"] for metric in ("recall@20", "ndcg@20") if f"valid_{metric}" in metrics}
        if "probe/recall@20" in found:
            found["probe_lift"] = found["probe/recall@20"] / max(found["probe/dealt_recall@20"], 1e-12)
        return found
