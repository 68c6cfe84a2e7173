"""What training and assignment do on an accelerator: `python tests/bench/accelerator.py --out FOLDER`, or with `--device cpu --quick` anywhere.

Every case runs the product's own code (`fit`, `encode`, an epoch) on generated vectors, which are made on the device in half precision. The device's limits
are measured in the same run, float operations are counted. A case that fails or outlasts its seconds is reported as failed and costs no other case its turn.
accelerator.json is written anew after every case; `--page accelerator.json` prints the section for docs/results.md from it.
Suffixes: N items, B rows of a block or step, D width, T events.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import platform
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rows.assign import counted_flops
from torch import Tensor

from pipeline import config
from pipeline.device import best_device, deterministic
from pipeline.encoders import sasrec
from pipeline.retrievers import build, training
from pipeline.retrievers.base import Catalogue, numbered
from pipeline.tokenizers import ada_sid, fit
from pipeline.tokenizers.ada_sid import AdaSid
from pipeline.tokenizers.base import FitOptions, ItemBatch, Tokenizer
from pipeline.tokenizers.rq_kmeans import RqKmeans
from pipeline.tokenizers.world import World

WIDTHS = {"text": 256, "image": 256, "behavior": 64}
SHOWN = {"text": 1.0, "image": 0.9, "behavior": 0.8}  # share of the items that have the modality
CENTRES, LATENT, BLOCK = 4_096, 32, 1 << 19
USERS, ITEMS, MEAN_LENGTH = 22_363, 12_101, 8.9  # Amazon Beauty, 5-core
LARGE_STEP = 512  # windows of a step large enough to keep an accelerator busy
HEADER = ("case", "seconds", "items/s", "ms a step", "floor", "quality", "peak GB")
GIGA = 1e9
SECONDS = 150.0  # for all cases


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    small: int = 1_000_000
    large: int = 10_000_000
    batch: int = 4_096
    epochs: int = 4
    recorded_epochs: int = 8
    large_epochs: int = 3
    users: int = USERS
    square: int = 8_192
    copied: int = 1 << 32
    repeats: int = 20_000


QUICK = Sizes(small=1_000, large=1_500, batch=128, epochs=2, recorded_epochs=2, large_epochs=2, users=60, square=512, copied=1 << 24, repeats=300)


@dataclass
class Bench:
    """The device, its limits, what was made on the way, and what was found."""

    device: torch.device
    sizes: Sizes
    path: Path | None = None
    limits: dict[str, float] = field(default_factory=dict)
    catalogues: dict[int, ItemBatch] = field(default_factory=dict)
    fitted: dict[str, Tokenizer] = field(default_factory=dict)
    records: bool = False

    def clock(self) -> float:
        """Seconds, after everything that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def median(self, work: Callable[[], Any], rounds: int = 3) -> float:
        """Median seconds of a call, after one that is not counted."""
        work()
        seconds = []
        for _ in range(rounds):
            start = self.clock()
            work()
            seconds.append(self.clock() - start)
        return statistics.median(seconds)

    def catalogue(self, count: int) -> ItemBatch:
        """Clustered items with gaps; only one size is kept at a time."""
        if count not in self.catalogues:
            self.catalogues.clear()
            self.catalogues[count] = catalogue(count, self.device)
        return self.catalogues[count]

    def floor(self, flops: float, moved: float, limit: str) -> float:
        """Seconds below which nothing runs: float operations at the limit's rate, or bytes at the memory's."""
        return max(flops / self.limits[limit], moved / self.limits["memory"])


# ---------------------------------------------------------------- what is worked on


def catalogue(count: int, device: torch.device) -> ItemBatch:
    """Items of clusters in a narrow space that all modalities share, half precision, with gaps; a behaviour vector's norm grows with its richness."""
    generator = torch.Generator(device).manual_seed(0)
    centre_CD = torch.randn(CENTRES, LATENT, generator=generator, device=device)
    axes = {name: torch.randn(LATENT, width, generator=generator, device=device) / LATENT**0.5 for name, width in WIDTHS.items()}
    parts: dict[str, list[Tensor]] = {name: [] for name in WIDTHS}
    richness_N = torch.rand(count, generator=generator, device=device)
    masks = {name: torch.rand(count, generator=generator, device=device) < share for name, share in SHOWN.items()}
    for start in range(0, count, BLOCK):
        rows = min(BLOCK, count - start)
        cluster_B = (CENTRES * torch.rand(rows, generator=generator, device=device) ** 2).long()
        latent_BD = centre_CD[cluster_B] + 0.5 * torch.randn(rows, LATENT, generator=generator, device=device)
        for name, width in WIDTHS.items():
            vectors_BD = F.normalize(latent_BD @ axes[name] + 0.5 * torch.randn(rows, width, generator=generator, device=device), dim=1)
            scale_B = 1 + richness_N[start : start + rows] if name == "behavior" else torch.ones(rows, device=device)
            parts[name].append((vectors_BD * scale_B[:, None]).half())
    richness_N = richness_N * masks["behavior"]
    return ItemBatch(
        **{f"{name}_ND": torch.cat(blocks) for name, blocks in parts.items()},
        **{f"{name}_N": mask_N for name, mask_N in masks.items()},
        richness_N=richness_N,
        strength_N=torch.sigmoid(10 * richness_N - 6) * masks["behavior"],
    )


def sequences(users: int, path: Path | None) -> tuple[sasrec.Sequences, int]:
    """Users' events and the number of items: of a file (user_id, item_id, position), or generated with Beauty's counts."""
    if path is None:
        generator = np.random.default_rng(0)
        lengths = 5 + generator.geometric(1 / (MEAN_LENGTH - 4), users) - 1
        items = (ITEMS * generator.random(int(lengths.sum())) ** 2).astype(np.int64)
        return sasrec.Sequences(torch.from_numpy(np.append(0, np.cumsum(lengths))), torch.from_numpy(items)), ITEMS
    from pyarrow import csv

    table = csv.read_csv(path).sort_by([("user_id", "ascending"), ("position", "ascending")])
    user_T, item_T = (table[name].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64) for name in ("user_id", "item_id"))
    return sasrec.Sequences(torch.from_numpy(np.append(0, np.cumsum(np.bincount(user_T)))), torch.from_numpy(item_T)), int(item_T.max()) + 1


# ---------------------------------------------------------------- cases


def limits(bench: Bench) -> dict[str, Any]:
    """Float operations per second of a large product in both precisions, and bytes per second of a copy."""
    size = bench.sizes.square
    square = torch.randn(size, size, device=bench.device)
    half, source = square.to(torch.bfloat16), torch.ones(bench.sizes.copied, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    bench.limits.update(
        float32=2 * size**3 / bench.median(lambda: square @ square),
        bfloat16=2 * size**3 / bench.median(lambda: half @ half),
        memory=2 * source.nbytes / bench.median(lambda: target.copy_(source)),
    )
    return {}


class Epochs:
    """A progress bar that notes how long each epoch took."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.seconds = clock, list[float]()

    def __call__(self, epochs: Iterable[Any], what: str, total: int) -> Iterator[Any]:
        for epoch in epochs:
            start = self.clock()
            yield epoch
            self.seconds.append(self.clock() - start)


def train_ada(bench: Bench, count: int, epochs: int, precision: str, *, recorded: bool) -> dict[str, Any]:
    """`AdaSid.fit`; items per second of the last epoch, in which codes are used and everything is allocated and recorded."""
    items, watch, batch = bench.catalogue(count), Epochs(bench.clock), bench.sizes.batch
    tokenizer = AdaSid(config.AdaSid())
    settings = config.TrainTokenizer(max_epochs=epochs, patience=epochs, batch_size=batch, precision=precision, cuda_graph=recorded)
    report = tokenizer.fit(items, FitOptions(seed=0, settings=settings, progress=watch))
    bench.fitted["ada_sid"], bench.records = tokenizer, recorded
    rows = count - int(count * settings.valid_share)
    seconds, steps = watch.seconds[-1], fit.steps_per_epoch(rows, batch)
    flops, moved = step_cost(items.take(slice(0, batch)))
    return {
        "items_s": rows / seconds,
        "share": bench.floor(flops, moved, precision) * rows / batch / seconds,
        "step_ms": 1000 * seconds / steps,
        "epoch_s": watch.seconds,
        "quality": quality(report.metrics),
        "recorded": recorded,
    }


def largest(bench: Bench) -> dict[str, Any]:
    """The large catalogue, with recorded steps where recording was seen to work."""
    return train_ada(bench, bench.sizes.large, bench.sizes.large_epochs, "bfloat16", recorded=bench.records)


def step_cost(items: ItemBatch) -> tuple[float, float]:
    """Float operations of one step on these items, and the fewest bytes it moves: inputs read, weights and moments read and written."""
    network = ada_sid.Network(config.AdaSid(), items.widths()).to(items.device)
    prepared, learner = network.prepare(items), ada_sid.Training(network)
    noise_BU = torch.rand(len(items), 8, device=items.device)
    flops = counted_flops(lambda: learner.losses(prepared, noise_BU, quantise=True, world=World())["total"].backward())
    return flops, sum(value.nbytes for value in vars(prepared).values() if value is not None) + 7 * sum(part.nbytes for part in network.parameters())


def quality(metrics: Mapping[str, float]) -> dict[str, float]:
    """What a precision could spoil."""
    return {name: round(metrics[name], 4) for name in ("nmse/text", "nmse/image", "nmse/behavior", "utilisation", "collision_rate")}


def train_rq(bench: Bench, count: int) -> dict[str, Any]:
    """`RqKmeans.fit`, with the codes and metrics of the whole catalogue."""
    items, tokenizer = bench.catalogue(count), RqKmeans(config.RqKmeans())
    start = bench.clock()
    report = tokenizer.fit(items, FitOptions(seed=0, settings=config.TrainTokenizer(tokenizer="rq_kmeans")))
    seconds = bench.clock() - start
    bench.fitted["rq_kmeans"] = tokenizer
    return {"items_s": count / seconds, "quality": quality(report.metrics)}


def assign(bench: Bench, name: str, count: int) -> dict[str, Any]:
    """`encode` of the catalogue by the tokenizer fitted last, codes, weights and sums brought to the host; and one block without that."""
    items, tokenizer = bench.catalogue(count), bench.fitted[name]
    start = bench.clock()
    made = tokenizer.encode(items)
    seconds = bench.clock() - start
    block = items.take(slice(0, min(count, 1 << 14)))
    flops = counted_flops(lambda: tokenizer.encode(block)) / len(block) * count
    moved = sum(value.nbytes for value in (*vars(items).values(), *vars(made).values()) if value is not None)
    return {"items_s": count / seconds, "share": bench.floor(flops, moved, "float32") / seconds}


def sasrec_epoch(bench: Bench, batch: int) -> dict[str, Any]:
    """An epoch of SASRec, full softmax."""
    events, num_items = sequences(bench.sizes.users, bench.path)
    params = config.SasRec(batch_size=batch)
    start_B, stop_B = sasrec.window_bounds(events.offsets, params.max_length)
    with deterministic(0):
        model = sasrec.SasRec(num_items, params).to(bench.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=params.learning_rate, weight_decay=0.0, fused=bench.device.type != "cpu" or None)
        seconds = bench.median(lambda: sasrec._epoch(model, optimizer, events.items, start_B, stop_B, params), 2)
    return {"items_s": len(events.items) / seconds, "epoch_s": [seconds]}


def parallel_epoch(bench: Bench, batch: int) -> dict[str, Any]:
    """An epoch of the retriever with parallel heads, codes drawn at random."""
    events, num_items = sequences(bench.sizes.users, bench.path)
    codes_NL = torch.randint(100, (num_items, 6), generator=torch.Generator().manual_seed(0))
    number_N = numbered(codes_NL)
    whole = Catalogue(codes_NL, torch.ones(num_items, 6), number_N, (100,) * 6, int(number_N.max()) + 1)
    settings = config.TrainRetriever(batch_size=batch)
    with deterministic(0):
        learner = training._Learner(build(whole, settings).to(bench.device), events, settings, None, str(bench.device))
        seconds = bench.median(lambda: learner.epoch(0), 2)
    return {"items_s": len(events.items) / seconds, "epoch_s": [seconds]}


def repeats(bench: Bench) -> dict[str, Any]:
    """Whether two runs with one seed give the same bits."""
    users = min(2_000, bench.sizes.users)

    def base() -> str:
        """Digest of a short training of the behaviour encoder."""
        events, num_items = sequences(users, None)
        return bits(sasrec.train(events, num_items, config.SasRec(max_epochs=1), seed=0, device=str(bench.device)).state)

    fits = {"ada_sid": partial(short_fit, bench, AdaSid(config.AdaSid())), "rq_kmeans": partial(short_fit, bench, RqKmeans(config.RqKmeans())), "sasrec": base}
    return {"same_bits": {f"{name}, twice": work() == work() for name, work in fits.items()}}


def recorded_repeats(bench: Bench) -> dict[str, Any]:
    """Whether recorded steps give the bits of steps as they come."""
    one, other = (short_fit(bench, AdaSid(config.AdaSid()), recorded=recorded) for recorded in (True, False))
    return {"same_bits": {"ada_sid, recorded and as it comes": one == other}}


def short_fit(bench: Bench, tokenizer: Tokenizer, *, recorded: bool = False) -> str:
    """Digest of what a few epochs on a small catalogue leave."""
    tokenizer.fit(bench.catalogue(bench.sizes.repeats), FitOptions(seed=0, settings=config.TrainTokenizer(max_epochs=4, cuda_graph=recorded)))
    return bits(tokenizer.state())


def bits(state: Mapping[str, Tensor]) -> str:
    """Digest of the tensors' bytes."""
    return hashlib.sha256(b"".join(state[name].contiguous().numpy().tobytes() for name in sorted(state))).hexdigest()


def cases(sizes: Sizes, *, cuda: bool) -> list[tuple[str, float, Callable[[Bench], dict[str, Any]]]]:
    """(name, seconds it may take, what it does); recordings come late, because a failed one may upset the device."""
    small, large = f"{sizes.small:,} items", f"{sizes.large:,} items"
    as_it_comes = partial(train_ada, count=sizes.small, epochs=sizes.epochs, recorded=False)
    recorded = partial(train_ada, count=sizes.small, epochs=sizes.recorded_epochs, recorded=True)
    recordings = [
        (f"train ada_sid, {small}, float32, recorded", 30, partial(recorded, precision="float32")),
        (f"train ada_sid, {small}, bfloat16, recorded", 30, partial(recorded, precision="bfloat16")),
        ("a recorded step against one as it comes", 20, recorded_repeats),
    ]
    return [
        ("limits", 20, limits),
        (f"train ada_sid, {small}, float32", 40, partial(as_it_comes, precision="float32")),
        (f"train ada_sid, {small}, bfloat16", 40, partial(as_it_comes, precision="bfloat16")),
        (f"assign ada_sid, {small}", 15, partial(assign, name="ada_sid", count=sizes.small)),
        (f"train rq_kmeans, {small}", 15, partial(train_rq, count=sizes.small)),
        (f"assign rq_kmeans, {small}", 15, partial(assign, name="rq_kmeans", count=sizes.small)),
        ("epoch of sasrec, 64 windows a step", 15, partial(sasrec_epoch, batch=64)),
        (f"epoch of sasrec, {LARGE_STEP} windows a step", 15, partial(sasrec_epoch, batch=LARGE_STEP)),
        ("epoch of parallel, 128 windows a step", 15, partial(parallel_epoch, batch=128)),
        (f"epoch of parallel, {LARGE_STEP} windows a step", 15, partial(parallel_epoch, batch=LARGE_STEP)),
        ("the same bits twice", 30, repeats),
        (f"train rq_kmeans, {large}", 30, partial(train_rq, count=sizes.large)),
        (f"assign rq_kmeans, {large}", 30, partial(assign, name="rq_kmeans", count=sizes.large)),
        *(recordings if cuda else []),
        (f"train ada_sid, {large}, bfloat16", 60, largest),
        (f"assign ada_sid, {large}", 30, partial(assign, name="ada_sid", count=sizes.large)),
    ]


# ---------------------------------------------------------------- running them


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises: TimeoutError inside when they are over."""

    def over(*_: Any) -> None:
        raise TimeoutError(f"outlasted its {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(bench: Bench, name: str, seconds: float, work: Callable[[Bench], dict[str, Any]]) -> dict[str, Any]:
    """What the case found, or how it failed; warnings of operations without a deterministic kernel are kept."""
    on_cuda = bench.device.type == "cuda"
    gc.collect()
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        try:
            with within(seconds):
                found = work(bench)
        except Exception as error:  # noqa: BLE001 - one case must not cost the others their turn; its text is the result
            found = {"failed": f"{type(error).__name__}: {error}"}
    told = sorted({str(warning.message).split("\n")[0][:200] for warning in said})
    peak = torch.cuda.max_memory_allocated() if on_cuda else 0
    return {"case": name, "seconds": time.perf_counter() - start, **found, "peak_bytes": peak, "warnings": told}


def run(bench: Bench, seconds: float, out: Path) -> dict[str, Any]:
    """All cases one after the other as long as seconds are left; the file is written anew after each."""
    begun = time.perf_counter()
    document: dict[str, Any] = {
        "command": command(bench, seconds),
        "machine": machine(bench.device),
        "sizes": vars(bench.sizes),
        "limits": bench.limits,
        "cases": [],
    }
    for name, most, work in cases(bench.sizes, cuda=bench.device.type == "cuda"):
        left = seconds - (time.perf_counter() - begun)
        document["cases"].append(attempt(bench, name, min(most, left), work) if left > 1 else {"case": name, "failed": "no time was left", "seconds": 0.0})
        document["wall_s"] = time.perf_counter() - begun
        last = document["cases"][-1]
        sys.stderr.write(f"{document['wall_s']:6.1f} s  {name}: {last.get('failed') or rate(last)}\n")
        (out / "accelerator.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document


def command(bench: Bench, seconds: float) -> str:
    """How to do it again, without the folders of this machine."""
    words = ["python tests/bench/accelerator.py", *(["--device cpu"] if bench.device.type == "cpu" else []), *(["--quick"] if bench.sizes is QUICK else [])]
    words += ([f"--seconds {seconds:g}"] if seconds != SECONDS else []) + ([f"--path {bench.path.name}"] if bench.path else [])
    return " ".join(words)


def machine(device: torch.device) -> dict[str, Any]:
    """What this was measured on."""
    facts = {"device": platform.processor() or platform.machine(), "torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count()}
    if device.type != "cuda":
        return facts
    found = torch.cuda.get_device_properties(device)
    return facts | {"device": found.name, "memory_bytes": found.total_memory, "cuda": torch.version.cuda}


# ---------------------------------------------------------------- the page


def rate(case: Mapping[str, Any]) -> str:
    return f"{case['items_s']:,.0f}" if "items_s" in case else "-"


def page(document: Mapping[str, Any]) -> str:
    """The section of docs/results.md: the machine, the table, what failed, which runs repeat."""
    facts, found, sizes = document["machine"], document["limits"], document["sizes"]
    ceilings = [f"{name} {found[name] / GIGA / 1000:,.3g} TFLOP/s" for name in ("float32", "bfloat16") if name in found]
    ceilings += [f"memory {found['memory'] / GIGA:,.0f} GB/s"] if "memory" in found else []
    lines = [
        "## On an accelerator",
        "",
        f"`{document['command']}`, {document['wall_s']:.0f} s in all on {facts['device']}, torch {facts['torch']}; measured in the run: {', '.join(ceilings)}.",
        f"Vectors of {' + '.join(map(str, WIDTHS.values()))} in half precision are made on the device; ADA-SID's steps hold {sizes['batch']:,} items. "
        "Items/s of a training are those of its last epoch with its validation, of an epoch its events.",
        "Floor: the share of the time that the counted float operations or the fewest bytes would take at the measured limits. "
        "Recorded: `train_tokenizer.cuda_graph`.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
        *("| " + " | ".join(row(case)) + " |" for case in document["cases"] if case["case"] != "limits" and "same_bits" not in case),
        "",
    ]
    for case in document["cases"]:
        lines += [f"* One seed, {name}: {'the same bits' if same else 'other bits'}." for name, same in case.get("same_bits", {}).items()]
        lines += [f"* {case['case']}: {said}" for said in case.get("warnings", ()) if "deterministic" in said]
    return "\n".join(lines) + "\n"


def row(case: Mapping[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    if "failed" in case:
        return (case["case"], f"{case['seconds']:.1f}", "failed", "-", "-", str(case["failed"]).split("\n")[0][:160].replace("|", "/"), "-")
    said = ", ".join(f"{name} {value:.3f}" for name, value in case.get("quality", {}).items())
    share = f"{case['share']:.1%}" if "share" in case else "-"
    step = f"{case['step_ms']:.2f}" if "step_ms" in case else "-"
    name = case["case"] + ", recorded" * (case.get("recorded", False) and "recorded" not in case["case"])
    return (name, f"{case['seconds']:.1f}", rate(case), step, share, said or "-", f"{case['peak_bytes'] / GIGA:.1f}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the cases and prints the page, or prints the page of an earlier run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="all cases together; what is left over is reported as failed")
    parser.add_argument("--path", type=Path, help="interactions.csv with user_id, item_id, position, in place of generated events")
    parser.add_argument("--out", type=Path, default=Path(".sid") / "bench")
    parser.add_argument("--page", type=Path, help="print the page of this accelerator.json and do nothing else")
    args = parser.parse_args(arguments)
    if args.page:
        sys.stdout.write(page(json.loads(args.page.read_text(encoding="utf-8"))))
        return 0
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the product takes the best device it sees
    if best_device() != args.device:  # asked before the first product, because it also settles in which order products add up
        parser.error(f"the product would compute on {best_device()}, not on {args.device}")
    torch.zeros(1, device=args.device)  # what starting the device takes is no case's time
    args.out.mkdir(parents=True, exist_ok=True)
    document = run(Bench(torch.device(args.device), QUICK if args.quick else Sizes(), args.path), args.seconds, args.out)
    (args.out / "accelerator.md").write_text(page(document), encoding="utf-8")
    sys.stdout.write(page(document))
    return 0 if not any("failed" in case for case in document["cases"]) else 1


if __name__ == "__main__":
    sys.exit(main())
