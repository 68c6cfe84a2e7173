"""A tiny catalogue for the tokenizer tests: items in clusters that text, image and behaviour share, with gaps in each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from pipeline.config import AdaSid, Das, Mmq, RqKmeans, TrainTokenizer, Unger
from pipeline.tokenizers.ada_sid import AdaSid as AdaSidTokenizer
from pipeline.tokenizers.base import FitOptions, History, ItemBatch

WIDTHS = {"text": 12, "image": 8, "behavior": 6}


def tiny_items(count: int = 96, *, seed: int = 0, modalities: tuple[str, ...] = ("text", "image", "behavior"), gaps: bool = True) -> ItemBatch:
    """Items of 8 clusters; every 7th lacks text, every 5th an image, the poorest quarter behaviour (without `gaps` nothing is missing)."""
    rng = torch.Generator().manual_seed(seed)
    cluster = torch.arange(count) % 8
    vectors, masks = {}, {}
    for name, width in WIDTHS.items():
        centres = torch.randn(8, width, generator=rng)
        noise = torch.randn(count, width, generator=rng)
        vectors[name] = (centres[cluster] + 0.3 * noise) if name in modalities else None
    masks = {"text": torch.arange(count) % 7 != 6, "image": torch.arange(count) % 5 != 4, "behavior": torch.arange(count) >= count // 4}
    masks = {name: (mask if gaps else torch.ones_like(mask)) & (name in modalities) for name, mask in masks.items()}
    richness = torch.linspace(0, 1, count) * masks["behavior"]
    return ItemBatch(
        text_ND=vectors["text"],
        image_ND=vectors["image"],
        behavior_ND=vectors["behavior"],
        text_N=masks["text"],
        image_N=masks["image"],
        behavior_N=masks["behavior"],
        richness_N=richness,
        strength_N=torch.sigmoid(10 * richness - 6) * masks["behavior"],
    )


def noise() -> torch.Tensor:
    """A uniform number for each of 96 rows and 8 columns: what a training step draws."""
    return torch.rand(96, 8, generator=torch.Generator().manual_seed(0))


def tiny_history(count: int = 96, *, users: int = 40, length: int = 8, seed: int = 0) -> History:
    """Users of one cluster each who take its items (row modulo 8) in any order; the last user took nothing."""
    rng = torch.Generator().manual_seed(seed)
    cluster_U1 = torch.arange(users)[:, None] % 8
    index_T = (torch.randint(count // 8, (users, length), generator=rng) * 8 + cluster_U1).flatten()
    offset_U = torch.cat([torch.arange(0, users * length + 1, length), torch.tensor([users * length])])
    return History(index_T=index_T, offset_U=offset_U)


def mmq_settings(**changes: object) -> Mmq:
    """Four positions and a short tuning."""
    small = {"num_shared": 1, "num_text": 2, "num_image": 1, "codebook_size": 12, "latent_dim": 8, "hidden_dim": 16, "warmup_epochs": 2}
    return Mmq(**{**small, "tune_epochs": 4, "max_history": 5, **changes})


def das_settings(**changes: object) -> Das:
    """Two levels for items and users."""
    small = {"num_levels": 2, "codebook_size": 12, "latent_dim": 8, "hidden_dims": [16], "tower_dim": 16, "warmup_epochs": 2, "max_history": 5}
    return Das(**{**small, **changes})


def unger_settings(**changes: object) -> Unger:
    """Two levels on a vector of twice 8."""
    return Unger(**{"num_levels": 2, "codebook_size": 12, "latent_dim": 8, "hidden_dim": 16, "iterations": 10, "max_history": 5, **changes})


def ada_settings(**changes: object) -> AdaSid:
    """A network that trains in well under a second."""
    small = {"codebook_size": 12, "latent_dim": 8, "projection_dim": 8, "hidden_dim": 16, "num_behavior": 2, "warmup_epochs": 2, "sparsity_buckets": 3}
    return AdaSid(**{**small, **changes})


def rq_settings(**changes: object) -> RqKmeans:
    """Three small levels."""
    return RqKmeans(**{"num_levels": 3, "codebook_size": 12, "iterations": 10, **changes})


def training(**changes: object) -> TrainTokenizer:
    """A few steps of training."""
    return TrainTokenizer(**{"max_epochs": 6, "batch_size": 32, "patience": 6, **changes})


class Interrupted(Exception):
    """Stands for a machine that goes away in the middle of a training."""


def stop_after(epochs: int, *, run: int = 1) -> Callable[[Iterable[int], str, int], Iterator[int]]:
    """A progress bar that breaks off after so many epochs of the n-th training run; residual k-means afterwards is no training run."""
    begun = 0

    def bar(items: Iterable[int], what: str, total: int) -> Iterator[int]:
        """The items, up to the break."""
        nonlocal begun
        begun += 1
        for done, item in enumerate(items):
            if begun == run and done == epochs:
                raise Interrupted
            yield item

    return bar


def fit_in_one_of_several_processes(results: Path) -> None:
    """Trains as the job does under torchrun and leaves `<rank>.safetensors` with the state and the losses."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    tokenizer = AdaSidTokenizer(ada_settings())
    report = tokenizer.fit(tiny_items(), FitOptions(seed=3, settings=training(max_epochs=4, batch_size=48)))
    losses = torch.tensor(report.curves["loss/total"], dtype=torch.float64)
    save_file({**tokenizer.state(), "losses": losses}, results / f"{torch.distributed.get_rank()}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    fit_in_one_of_several_processes(Path(sys.argv[1]))
