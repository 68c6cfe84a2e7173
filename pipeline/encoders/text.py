"""Texts in, vectors out: MiniLM from its package, or any Hugging Face text model in a local folder.

A text is padded to the smallest bucket that holds it and runs in a pass of fixed shape, so its vector has the same bits alone and in a crowd.
Torch is loaded with the first encoder, never by importing this module: the Spark driver names encoders without it.
Not here: where a model folder comes from (the job knows).
Legend: B batch, T tokens, D width.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pipeline.device import best_device, has_bfloat16
from pipeline.encoders.base import EncoderOptions, Vectors, bucket_of, encoder_id, finished, length_buckets, padded, rows_per_pass, weights_digest
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)
WEIGHTS = "*.safetensors"
POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last"}


class TextModel:
    """A Hugging Face text model: tokens, transformer, pooled to one vector.

    Args:
        folder: config.json, tokenizer files, *.safetensors and, from sentence-transformers, 1_Pooling/config.json.
        options: `size` is the number of tokens read.
    Raises: ContractError without safetensors weights; ConfigError for an unknown pooling.
    """

    sha256: ClassVar[str] = ""

    def __init__(self, folder: Path, options: EncoderOptions) -> None:
        from transformers import AutoTokenizer

        self.encoder_id = self.identify(folder, options)
        self._options = options
        self._pooling = read_pooling(folder)
        self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        self._model = load_model(folder)
        if options.precision == "bfloat16" and self._model.device.type == "cpu" and not has_bfloat16():
            logger.warning("this CPU has no bfloat16 products: content_embedding.text_precision=float32 would be faster here")
        self._buckets = length_buckets(min(options.size, self._tokenizer.model_max_length))
        self.dim = int(self._model.config.hidden_size)

    @classmethod
    def identify(cls, folder: Path, options: EncoderOptions) -> str:
        """The encoder's id: name, weights, pooling, tokens, pass size, normalisation."""
        return encoder_id(options, weights_digest(folder, WEIGHTS, cls.sha256), read_pooling(folder))

    def encode(self, batch: Sequence[str]) -> Vectors:
        """Vectors (B, D) float32, in the order of the texts."""
        import torch

        if not batch:
            return np.zeros((0, self.dim), dtype=np.float32)
        tokens = self._tokenizer(list(batch), add_special_tokens=True, truncation=True, max_length=self._buckets[-1])["input_ids"]
        lengths = np.fromiter(map(len, tokens), dtype=np.int64, count=len(tokens))
        buckets = bucket_of(lengths, self._buckets)
        vectors = np.zeros((len(tokens), self.dim), dtype=np.float32)
        with torch.inference_mode(), torch.autocast(self._model.device.type, torch.bfloat16, enabled=self._options.precision == "bfloat16"):
            for bucket in np.unique(buckets):
                rows = np.flatnonzero(buckets == bucket)
                size = rows_per_pass(self._buckets[bucket], self._options.batch)
                for start in range(0, len(rows), size):
                    chosen = rows[start : start + size]
                    vectors[chosen] = self._pass([tokens[row] for row in chosen], lengths[chosen], self._buckets[bucket], size)
        return finished(vectors, normalize=self._options.normalize)

    def _pass(self, tokens: list[list[int]], lengths: NDArray[np.int64], length: int, size: int) -> Vectors:
        """Pooled vectors of one pass; missing texts are one padding token each, so that no row attends to nothing."""
        import torch

        lengths_B = padded(lengths, size)
        lengths_B[len(tokens) :] = 1
        mask_BT = np.arange(length) < lengths_B[:, None]
        ids_BT = np.full((size, length), self._tokenizer.pad_token_id or 0, dtype=np.int64)
        ids_BT[: len(tokens)][mask_BT[: len(tokens)]] = np.concatenate(tokens)
        device = self._model.device
        mask = torch.from_numpy(mask_BT).to(device)
        hidden_BTD = self._model(input_ids=torch.from_numpy(ids_BT).to(device), attention_mask=mask.long()).last_hidden_state
        return np.asarray(pooled(hidden_BTD.float(), mask, self._pooling)[: len(tokens)].cpu().numpy())


class MiniLM(TextModel):
    """all-MiniLM-L6-v2: 384 wide, mean over tokens; weights are accepted only with the published digest."""

    sha256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def pooled(hidden_BTD: Tensor, mask_BT: Tensor, pooling: str) -> Tensor:
    """One vector per text, (B, D): the mean over its tokens, its first or its last token; padding never counts."""
    import torch

    if pooling == "cls":
        return hidden_BTD[:, 0]
    if pooling == "last":
        last_B = mask_BT.long().sum(1) - 1
        return hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B]
    weight_BT1 = mask_BT.unsqueeze(-1).to(hidden_BTD.dtype)
    return (hidden_BTD * weight_BT1).sum(1) / weight_BT1.sum(1)


def read_pooling(folder: Path) -> str:
    """How tokens become one vector (mean | cls | last), as 1_Pooling/config.json of the model says; mean when the model does not say.

    Raises: ConfigError for a pooling that is none of them.
    """
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    wanted = [name for name, on in json.loads(path.read_text(encoding="utf-8")).items() if name.startswith("pooling_mode_") and on is True]
    if len(wanted) != 1 or wanted[0] not in POOLINGS:
        raise ConfigError("the text model pools in a way that is not supported", expected=", ".join(POOLINGS), found=", ".join(wanted), where=str(path))
    return POOLINGS[wanted[0]]


def load_model(folder: Path) -> Any:
    """The model of a local folder in float32, ready to infer, on the accelerator if there is one; only safetensors, never code from the folder."""
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(str(folder), local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32)
    return model.eval().to(best_device())
