"""Random codes: the control every reader is measured against; a code tuple says which item it is and nothing else.

Suffixes: N items, B batch, D width, L positions, K codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import config as profile
from pipeline.context import derive_seed
from pipeline.tokenizers import metrics
from pipeline.tokenizers.base import (
    MODALITIES,
    FitOptions,
    FitReport,
    ItemBatch,
    Keep,
    TokenizerOutput,
    encode_in_chunks,
    shows,
    unweighted,
)
from pipeline.tokenizers.fit import generator_for
from pipeline.tokenizers.quantize import gather_codes, take_rows
from pipeline.tokenizers.refresh import champion

ROW_WIDTH = 8  # width of the code rows, which no item is near to
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio


def scramble(word: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A one-to-one map of 64-bit words in which every input bit moves about half of the output bits; any shape.

    Source: SplitMix64 (Steele, Lea, Flood 2014), its last step
    """
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def fingerprints(vectors_ND: Tensor) -> NDArray[np.uint64]:
    """One word per row that depends on every bit of it and on their order, (N,)."""
    bits = (vectors_ND.float() + 0.0).contiguous().numpy().view(np.uint32).astype(np.uint64)  # + 0.0: one zero, not two
    place = scramble(np.arange(1, bits.shape[1] + 1, dtype=np.uint64) * np.uint64(GOLDEN))
    return scramble(scramble(bits + place).sum(1, dtype=np.uint64))


class RandomCodes:
    """Codes drawn by a hash of the item's content vectors, or of its behaviour vector where it has no content (`base.Tokenizer`).

    Content comes first because behaviour moves every night: an item whose code moved with it would not be the item it was.

    Args:
        settings: the [train_tokenizer.random_codes] section.
    """

    needs_history: ClassVar[bool] = False

    def __init__(self, settings: profile.RandomCodes) -> None:
        self.settings = settings
        self.widths: dict[str, int] = {}
        self.salt_L = torch.zeros(settings.num_positions, dtype=torch.int64)
        self.name_LK = torch.arange(settings.codebook_size).repeat(settings.num_positions, 1)
        self.codebook_LKD = torch.zeros(settings.num_positions, settings.codebook_size, ROW_WIDTH)

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the positions."""
        return tuple(f"random_{position}" for position in range(self.settings.num_positions))

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K per position."""
        return (self.settings.codebook_size,) * self.settings.num_positions

    def fit(self, items: ItemBatch, options: FitOptions) -> FitReport:
        """Draw the hash and rows to stand for the codes; with `start` both are the champion's. There is nothing to learn, so nothing to resume.

        Raises: ContractError if the champion reads other vectors or has other sizes.
        """
        self.widths = items.widths()
        if options.start is None:
            self.salt_L = torch.tensor([derive_seed(options.seed, "salt", position) for position in range(self.settings.num_positions)], dtype=torch.int64)
            self.codebook_LKD = torch.randn(self.codebook_LKD.shape, generator=generator_for(options.seed, "rows"))
        else:
            old = champion(options.start, RandomCodes, self.settings, self.widths)
            self.salt_L, self.name_LK, self.codebook_LKD = old.salt_L.clone(), old.name_LK.clone(), old.codebook_LKD.clone()
        return FitReport(metrics=metrics.code_use(self.encode(items).codes_NL, self.codebook_sizes, self.slots))

    def encode(self, items: ItemBatch, keep: Keep | None = None) -> TokenizerOutput:
        """Codes, weights of one, and the sum of the code rows; an item with nothing to read is masked everywhere.

        There is no distance by which a code could be kept, so `keep` changes nothing.
        """

        def block(rows: ItemBatch, keep: Keep | None) -> TokenizerOutput:
            """One block of exactly `ENCODE_ROWS` items."""
            codes_BL = self._codes(self._words(rows))
            quantized_BD = gather_codes(codes_BL, self.codebook_LKD).sum(1)
            return unweighted(codes_BL, quantized_BD, shows(rows, MODALITIES), self.settings.codebook_size)

        return encode_in_chunks(items.to(torch.device("cpu")), block, keep)

    def _words(self, items: ItemBatch) -> NDArray[np.uint64]:
        """A word per item of the modalities that name it, (B,)."""
        words = {name: fingerprints(vectors) * items.mask(name).numpy() for name in MODALITIES if (vectors := items.vectors(name)) is not None}
        empty = np.zeros(len(items), dtype=np.uint64)
        content = scramble(words.get("text", empty) + np.uint64(1)) ^ scramble(words.get("image", empty) + np.uint64(2))
        return np.where((items.text_N | items.image_N).numpy(), content, words.get("behavior", empty))

    def _codes(self, word_B: NDArray[np.uint64]) -> Tensor:
        salt_L = scramble(self.salt_L.numpy().astype(np.uint64))
        drawn = scramble(scramble(word_B)[:, None] ^ salt_L) % np.uint64(self.settings.codebook_size)
        return self.name_LK.gather(1, torch.from_numpy(drawn.astype(np.int64)).T).T.contiguous()

    def relabel(self, order: Sequence[Tensor]) -> None:
        """Rename codes: code k of position l is what order[l][k] was."""
        self.name_LK = torch.stack([order_K.argsort()[name_K] for name_K, order_K in zip(self.name_LK, order, strict=True)])
        self.codebook_LKD = take_rows(self.codebook_LKD, order)

    def codebooks(self) -> list[Tensor]:
        """Rows that stand for the codes, (K, D) per position."""
        return [rows_KD.clone() for rows_KD in self.codebook_LKD]

    def state(self) -> dict[str, Tensor]:
        """The hash, the names of what it draws, and the code rows."""
        return {"salt_L": self.salt_L.clone(), "name_LK": self.name_LK.contiguous(), "codebook_LKD": self.codebook_LKD.contiguous()}

    def config(self) -> dict[str, Any]:
        """Settings and input widths, JSON."""
        return {"tokenizer": "random_codes", "settings": self.settings.model_dump(), "raw_widths": self.widths}

    @classmethod
    def load(cls, config: dict[str, Any], state: dict[str, Tensor]) -> RandomCodes:
        """The tokenizer that gave `config` and `state`.

        Raises: RuntimeError if the tensors do not fit the configuration.
        """
        tokenizer = cls(profile.RandomCodes(**config["settings"]))
        tokenizer.widths = {name: int(width) for name, width in config["raw_widths"].items()}
        for name, value in tokenizer.state().items():
            if state[name].shape != value.shape:
                raise RuntimeError(f"{name} has shape {tuple(state[name].shape)}, the configuration says {tuple(value.shape)}")
            setattr(tokenizer, name, state[name].clone())
        return tokenizer
