"""What a tokenizer eats and gives: `ItemBatch`, `TokenizerOutput`, `FitReport`, the `Tokenizer` protocol, and the Arrow join in front of it.

Not here: the variants (one file each), their registry (registry.py), reading or writing anything.
Suffixes: N items, B batch, D width, L positions, K codes, M modalities.
"""

# ruff: noqa: N815 - tensor fields carry shape suffixes

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import Section, TrainTokenizer
from pipeline.device import fits
from pipeline.errors import ContractError
from pipeline.tokenizers.quantize import take_rows

MODALITIES = ("text", "image", "behavior")
ENCODE_ROWS = 1024  # every encode runs at this height, so that the company an item keeps cannot move its code
ENCODE_ROWS_THERE = 16_384  # the height on an accelerator, which is not busy with fewer
CPU = torch.device("cpu")
N = TypeVar("N", bound=nn.Module)
S = TypeVar("S", bound=Section)
ProgressBar = Callable[[Iterable[Any], str, int], Iterator[Any]]


@dataclass(frozen=True, kw_only=True)
class ItemBatch:
    """Items as tensors; row i of every field is the same item.

    Args:
        text_ND / image_ND / behavior_ND: float32 vectors, None = the data set lacks the modality; masked rows hold anything finite.
        text_N / image_N / behavior_N: True where the item has the vector.
        richness_N: N in [0, 1], how informative the behaviour is (0 where masked).
        strength_N: alignment strength w of eq. 17.
        popularity_N: decayed events, None where nobody asks.
    """

    text_ND: Tensor | None
    image_ND: Tensor | None
    behavior_ND: Tensor | None
    text_N: Tensor
    image_N: Tensor
    behavior_N: Tensor
    richness_N: Tensor
    strength_N: Tensor
    popularity_N: Tensor | None = None

    def __post_init__(self) -> None:
        """Raises: ValueError if the rows of the fields do not line up."""
        heights = {item.name: len(value) for item in fields(self) if (value := getattr(self, item.name)) is not None}
        if len(set(heights.values())) > 1:
            raise ValueError(f"an item batch has fields of different heights: {heights}")

    def __len__(self) -> int:
        """Number of items."""
        return len(self.richness_N)

    def vectors(self, modality: str) -> Tensor | None:
        """The vectors of a modality, (N, D), or None."""
        vectors: Tensor | None = getattr(self, f"{modality}_ND")
        return vectors

    def known(self, modality: str) -> Tensor:
        """The vectors of a modality that must be there, (N, D).

        Raises: ValueError if the data set lacks it.
        """
        vectors = self.vectors(modality)
        if vectors is None:
            raise ValueError(f"no {modality} vectors")
        return vectors

    def mask(self, modality: str) -> Tensor:
        """True where the item has the modality, (N,)."""
        mask: Tensor = getattr(self, f"{modality}_N")
        return mask

    def widths(self) -> dict[str, int]:
        """Modality -> width of its vectors, for the modalities that at least one item has."""
        return {name: vectors.shape[1] for name in MODALITIES if (vectors := self.vectors(name)) is not None and bool(self.mask(name).any())}

    def changed(self, fields: Mapping[str, Tensor | None]) -> ItemBatch:
        """The batch with other tensors in the fields named."""
        return replace(self, **cast(dict[str, Any], fields))

    def map(self, change: Callable[[Tensor], Tensor]) -> ItemBatch:
        """The batch with `change` applied to every tensor in it."""
        return replace(self, **{item.name: change(value) for item in fields(self) if (value := getattr(self, item.name)) is not None})

    def take(self, rows: Tensor | slice) -> ItemBatch:
        """The items of those rows, in that order; a bool tensor takes those where it is True."""
        there = rows.to(self.device) if isinstance(rows, Tensor) else rows
        return self.map(lambda value: value[there])

    @property
    def device(self) -> torch.device:
        """Where the items are."""
        return self.richness_N.device

    def to(self, device: torch.device) -> ItemBatch:
        """The same items on a device."""
        return self.map(lambda value: value.to(device))

    def settle(self, device: torch.device | str) -> ItemBatch:
        """The same items on the device if they fit beside what training needs, else where they are."""
        size = sum(value.nbytes for value in vars(self).values() if value is not None)
        return self.to(torch.device(device)) if fits(size, torch.device(device)) else self


@dataclass(frozen=True, kw_only=True)
class TokenizerOutput:
    """Codes of N items.

    Args:
        codes_NL: int64, in [0, K) or K where the position is masked.
        weights_NL: float32, router weights; 1 for content positions, 0 for masked or switched-off ones.
        quantized_ND: float32, what the codes stand for in the tokenizer's latent space.
    """

    codes_NL: Tensor
    weights_NL: Tensor
    quantized_ND: Tensor


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """What a fit saw: `curves` name -> one value per epoch, `metrics` of the fitted tokenizer on its catalogue."""

    curves: dict[str, list[float]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class History:
    """Users' sequences before the cutoff, end to end: the events of user u are index_T[offset_U[u] : offset_U[u + 1]], oldest first.

    Args:
        index_T: int64, rows of the ItemBatch they come with.
        offset_U: int64, one more than there are users.
        basket_T: int64, equal = no order between the events of a user; None = every event stands alone.
    """

    index_T: Tensor
    offset_U: Tensor
    basket_T: Tensor | None = None


def basket_begins(user_T: Tensor, basket_T: Tensor | None) -> Tensor:
    """Which events begin a basket of their user, bool (T,); without baskets all do.

    Args:
        user_T: number of the user per event, users one after the other.
    """
    begins_T = torch.ones_like(user_T, dtype=torch.bool)
    if basket_T is not None:
        begins_T[1:] = (basket_T.diff() != 0) | (user_T.diff() != 0)
    return begins_T


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a refit begins: at the champion instead of at random numbers, without warm-up and k-means.

    Args:
        tokenizer: the champion, of the same variant and sizes.
        pull: weight of the pull of code rows towards the champion's; 0 = `warm`, above = `anchored`.
    """

    tokenizer: Tokenizer
    pull: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Codes that shall stay unless another one wins clearly.

    Args:
        codes_NL: int64, the items' codes so far; K or above where there is none to keep.
        margin: the best code replaces the old one when the old one's distance is above (1 + margin) times the best one's.
    """

    codes_NL: Tensor
    margin: float

    def take(self, rows: Tensor | slice) -> Keep:
        """The wishes of those rows."""
        return replace(self, codes_NL=self.codes_NL[rows])


class Checkpoint(Protocol):
    """A place that keeps the latest training state; the caller decides where (a folder, object storage, memory)."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The last saved tensors and JSON document, None before the first save."""

    def save(self, tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
        """Keep tensors and document as one unit: a reader sees the old or the new state, never half of one."""


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How a tokenizer is fitted to a catalogue.

    Args:
        seed: of everything that is drawn.
        settings: the [train_tokenizer] section.
        checkpoint: where the state is kept after each epoch; None = nowhere.
        progress: makes the epochs visible.
        start: a champion to begin at; None = cold.
        history: users' sequences, for variants whose `needs_history` is True.
    """

    seed: int
    settings: TrainTokenizer
    checkpoint: Checkpoint | None = None
    progress: ProgressBar | None = None
    start: Start | None = None
    history: History | None = None


class Tokenizer(Protocol):
    """Maps item vectors to code tuples; positions are named by `slots`, position l has codes [0, codebook_sizes[l])."""

    @property
    def needs_history(self) -> bool:
        """Whether `fit` reads users' histories."""

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K per position."""

    @property
    def slots(self) -> tuple[str, ...]:
        """Name per position."""

    def fit(self, items: ItemBatch, options: FitOptions) -> FitReport:
        """Fit on a catalogue; the same arguments give the same tokenizer."""

    def encode(self, items: ItemBatch, keep: Keep | None = None) -> TokenizerOutput:
        """Codes and weights; an item's row depends on that item (and its kept codes) alone."""

    def relabel(self, order: Sequence[Tensor]) -> None:
        """Rename codes: code k of position l is what order[l][k] was, so that a refit can speak the champion's words."""

    def codebooks(self) -> list[Tensor]:
        """Code rows per position, (K, D) float32 on the CPU."""

    def state(self) -> dict[str, Tensor]:
        """Everything learned, as contiguous CPU tensors."""

    def config(self) -> dict[str, Any]:
        """Everything chosen, as JSON; with `state` it rebuilds the tokenizer."""

    @classmethod
    def load(cls, config: dict[str, Any], state: dict[str, Tensor]) -> Tokenizer:
        """The tokenizer that gave `config` and `state`."""


class Networked(Generic[S, N]):
    """What variants with one network have in common (`Tokenizer` but for `fit` and `encode`): the network is there after `fit` or `load`.

    A variant names itself as the registry does, and says what its settings and its network are: `build(settings, raw_widths)`.

    Args:
        settings: the variant's section of [train_tokenizer].
    """

    name: ClassVar[str]
    section: ClassVar[type[Section]]
    build: ClassVar[type[nn.Module]]

    def __init__(self, settings: S) -> None:
        self.settings = settings
        self.network: N | None = None

    @property
    def needs_history(self) -> bool:
        """Whether `fit` reads users' histories."""
        return False

    @property
    def fitted(self) -> N:
        """The network.

        Raises: ValueError before `fit` or `load`.
        """
        if self.network is None:
            raise ValueError("the tokenizer is not fitted: call fit or load")
        return self.network

    @property
    def coder(self) -> Any:
        """The part of the network that has `slots` and code rows `codebook_LKD`."""
        return self.fitted

    @property
    def slots(self) -> tuple[str, ...]:
        """Name per position."""
        return tuple(self.coder.slots)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K per position."""
        positions, size, _ = self.coder.codebook_LKD.shape
        return (size,) * positions

    @torch.no_grad()
    def relabel(self, order: Sequence[Tensor]) -> None:
        """Rename codes: code k of position l is what order[l][k] was."""
        self.coder.codebook_LKD.copy_(take_rows(self.coder.codebook_LKD, order))

    def codebooks(self) -> list[Tensor]:
        """Code rows per position, (K, D)."""
        return [rows_KD.clone() for rows_KD in self.coder.codebook_LKD.detach().cpu()]

    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers, as contiguous CPU tensors."""
        return {name: value.detach().cpu().contiguous() for name, value in self.fitted.state_dict().items()}

    def config(self) -> dict[str, Any]:
        """Settings and input widths, JSON."""
        return {"tokenizer": self.name, "settings": self.settings.model_dump(), "raw_widths": self.fitted.raw_widths}

    @classmethod
    def load(cls, config: dict[str, Any], state: dict[str, Tensor]) -> Self:
        """The tokenizer that gave `config` and `state`.

        Raises: RuntimeError if the tensors do not fit the configuration.
        """
        tokenizer = cls(cls.section(**config["settings"]))  # type: ignore[arg-type]
        tokenizer.network = cls.build(tokenizer.settings, config["raw_widths"]).eval()  # type: ignore[assignment]
        tokenizer.fitted.load_state_dict(state)
        return tokenizer


def codebook_digest(codebooks: Sequence[Tensor]) -> str:
    """sha256 over shapes and float32 bytes of the code rows: two tokenizers with one digest speak one vocabulary."""
    digest = hashlib.sha256()
    for codebook_KD in codebooks:
        rows = codebook_KD.detach().cpu().to(torch.float32).contiguous().numpy().astype("<f4")
        digest.update(f"{rows.shape}".encode())
        digest.update(rows.tobytes())
    return digest.hexdigest()


def encode_in_chunks(
    items: ItemBatch, encode: Callable[[ItemBatch, Keep | None], TokenizerOutput], keep: Keep | None = None, *, device: torch.device = CPU
) -> TokenizerOutput:
    """The items' codes, encoded in blocks of one height; the last block is filled up by repeating its last item.

    A matrix product may round differently at another height; at one height an item gets one code, whoever else is encoded with it.

    Args:
        device: where `encode` computes; the height is `ENCODE_ROWS` on a CPU and `ENCODE_ROWS_THERE` elsewhere.
    Raises: ValueError if there are no items.
    """
    if not len(items):
        raise ValueError("nothing to encode: the batch has no items")
    height = ENCODE_ROWS if device.type == "cpu" else ENCODE_ROWS_THERE
    outputs = []
    for start in range(0, len(items), height):
        rows: Tensor | slice = slice(start, start + height)  # a view where a block is full
        if start + height > len(items):
            rows = torch.arange(start, start + height, device=items.device).clamp_(max=len(items) - 1)
        outputs.append(encode(items.take(rows), keep.take(rows if isinstance(rows, slice) else rows.cpu()) if keep else None))
    joined = {item.name: torch.cat([getattr(output, item.name) for output in outputs])[: len(items)].cpu() for item in fields(TokenizerOutput)}
    return TokenizerOutput(**joined)


def aligned(rows_BX: Tensor) -> Tensor:
    """The rows with zeros added up to a multiple of four columns.

    A product of rows that begin off a 16-byte boundary rounds differently from row to row; a stored number must not depend on an item's place in a block.
    """
    return F.pad(rows_BX, (0, -rows_BX.shape[1] % 4))


def masked_codes(codes_BL: Tensor, shown_BL: Tensor, size: int) -> Tensor:
    """The codes with the reserved code `size` where a position is masked, (B, L) int64."""
    return torch.where(shown_BL, codes_BL, torch.full_like(codes_BL, size))


def shows(items: ItemBatch, names: Iterable[str]) -> Tensor:
    """True for items that have at least one of those modalities, (N,); the others say nothing that a code could stand for."""
    masks = [items.mask(name) for name in names if items.vectors(name) is not None]
    return torch.stack(masks).any(0) if masks else torch.zeros_like(items.text_N)


def unweighted(codes_NL: Tensor, quantized_ND: Tensor, shown_N: Tensor, size: int) -> TokenizerOutput:
    """The output of a tokenizer without a router: weight 1, and the reserved code `size`, weight 0 and a zero vector for items that are not shown."""
    shown_N1 = shown_N.to(codes_NL.device)[:, None]
    weights_NL = shown_N1.float().expand(codes_NL.shape)
    return TokenizerOutput(codes_NL=masked_codes(codes_NL, shown_N1, size), weights_NL=weights_NL, quantized_ND=quantized_ND * shown_N1)


def items_from_arrow(table: pa.Table | pa.RecordBatch) -> ItemBatch:
    """An ItemBatch from columns item_id, text, image, behavior (list<float>, nullable), richness, strength and, if there, popularity; row order is kept.

    Raises: ContractError for a missing column, vectors of unequal width or a value that is not finite.
    """
    if missing := {"item_id", *MODALITIES, "richness", "strength"} - set(table.schema.names):
        raise ContractError("item vectors lack columns", expected="item_id, text, image, behavior, richness, strength", found=f"without {sorted(missing)}")
    tensors: dict[str, Tensor | None] = {}
    for modality in MODALITIES:
        tensors[f"{modality}_ND"], tensors[f"{modality}_N"] = _vectors(table, modality)
    return ItemBatch(
        **tensors,  # type: ignore[arg-type]
        richness_N=_scalars(table, "richness"),
        strength_N=_scalars(table, "strength"),
        popularity_N=_scalars(table, "popularity") if "popularity" in table.schema.names else None,
    )


def _vectors(table: pa.Table | pa.RecordBatch, modality: str) -> tuple[Tensor | None, Tensor]:
    column = table.column(modality)
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    present = column.is_valid().to_numpy(zero_copy_only=False)
    mask_N = torch.from_numpy(present.copy())
    if not present.any():
        return None, mask_N
    widths = np.unique(pc.list_value_length(column.drop_null()).to_numpy(zero_copy_only=False))
    if len(widths) != 1:
        raise ContractError("vectors of one modality have one width", expected="one width", found=f"{widths.tolist()[:5]}", where=f"column {modality}")
    vectors = np.zeros((len(column), int(widths[0])), dtype=np.float32)
    vectors[present] = column.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, int(widths[0]))
    if broken := int((~np.isfinite(vectors).all(axis=1)).sum()):
        first = table.column("item_id")[int((~np.isfinite(vectors).all(axis=1)).argmax())]
        raise ContractError(
            "item vectors must be finite", expected="finite numbers", found=f"{broken} rows with NaN or infinity", where=f"{modality} of {first}"
        )
    return torch.from_numpy(vectors), mask_N


def _scalars(table: pa.Table | pa.RecordBatch, name: str) -> Tensor:
    values = table.column(name).to_numpy(zero_copy_only=False) if isinstance(table, pa.RecordBatch) else table.column(name).to_numpy()
    values = np.array(values, dtype=np.float32)
    if not np.isfinite(values).all():
        raise ContractError(
            "item scalars must be finite", expected="finite numbers", found=f"{int((~np.isfinite(values)).sum())} others", where=f"column {name}"
        )
    return torch.from_numpy(values)


def join_vectors(feature: pa.Table, content: pa.Table, behavior: pa.Table) -> pa.Table:
    """Rows of feature.item_feature with their vectors beside them, sorted by item_id; a masked modality is a null vector.

    Args:
        feature: item_feature of one night.
        content: item_content_vector rows (encoder_id, modality, content_hash, vector).
        behavior: item_behavior_vector rows (logical_date, item_id, vector).
    Raises: ContractError if the manifest points at a vector that is not there.
    """
    feature = feature.sort_by("item_id")
    text = _lookup(content.filter(pc.equal(content["modality"], "text")), ("encoder_id", "content_hash"))
    image = _lookup(content.filter(pc.equal(content["modality"], "image")), ("encoder_id", "content_hash"))
    columns = {
        "item_id": feature["item_id"],
        "text": _joined(feature, ("text_encoder_id", "text_hash"), text, "text"),
        "image": _joined(feature, ("image_encoder_id", "image_hash"), image, "image"),
        "behavior": _joined(feature, ("behavior_date", "item_id"), _lookup(behavior, ("logical_date", "item_id")), "behavior"),
    }
    return pa.table({**columns, **{name: feature[name] for name in ("richness", "strength", "popularity")}})


def _key(table: pa.Table, names: tuple[str, str]) -> pa.ChunkedArray:
    """Two columns as one string key; null as soon as the first is null."""
    return pc.binary_join_element_wise(*(pc.cast(table[name], pa.string()) for name in names), "\x1f")


def _lookup(table: pa.Table, names: tuple[str, str]) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    return _key(table, names), table["vector"]


def _joined(feature: pa.Table, names: tuple[str, str], lookup: tuple[pa.ChunkedArray, pa.ChunkedArray], what: str) -> pa.Array:
    wanted = _key(feature, names)
    keys, vectors = lookup
    rows = pc.index_in(wanted, value_set=keys.combine_chunks()) if len(keys) else pa.nulls(len(wanted), pa.int32())
    rows = pc.if_else(wanted.is_valid(), rows, pa.scalar(None, pa.int32()))
    if absent := pc.sum(pc.and_(wanted.is_valid(), rows.is_null())).as_py():
        raise ContractError(
            "the night's manifest names vectors that are not stored",
            expected=f"a vector for each {' and '.join(names)}",
            found=f"{absent} of {len(feature)} items without",
            where=f"feature.item_feature, {what}",
            next_command="sid run item_feature --date D",
        )
    return vectors.take(rows)
