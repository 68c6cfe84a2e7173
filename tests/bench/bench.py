"""Ours beside its peers, in one process and one run: `make bench`, or `python tests/bench/bench.py --rows 1,6 --scale quick --out FOLDER`.

A row is one file in rows/ with NUMBER, TITLE and `cases(scale)`. Every case says what "equal" means; times of unequal answers are not printed. Contestants
take turns, the figure is the median over rounds of the ratio within a round, so that a slow minute of the machine hits all of them. Wall and CPU time are
kept apart: on a machine with other load only the ratios, and the CPU times first, can be trusted. A peer that is not installed is skipped with a notice.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).parent
SCALES = ("quick", "normal", "full")
GIGA = 1e9
HEADER = ("row", "case", "ours s", "peer", "peer s", "ratio", "CPU ratio", "per second", "limit reached", "target", "verdict", "load")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison.

    Args:
        ours: does the work and answers something `equal` can look at.
        peers: name -> the same work elsewhere.
        equal: "" when (our answer, their answer) agree, else what differs.
        units / unit: how much work one call is.
        work / limit: floating-point operations or bytes of one call, and which of the machine's limits bounds them.
        target: how many times the best of `judged` (all peers when empty) we should be; 0 = only shown.
        seconds: our own time should stay below this; 0 = only shown.
        notices: what was left out and why.
        facts: further numbers, evaluated after the run.
    """

    name: str
    ours: Callable[[], Any]
    peers: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    equal: Callable[[Any, Any], str] = lambda ours, theirs: ""
    units: float = 0.0
    unit: str = "items"
    work: float = 0.0
    limit: str = ""
    target: float = 0.0
    judged: tuple[str, ...] = ()
    seconds: float = 0.0
    rounds: int = 5
    warm: bool = True
    notices: tuple[str, ...] = ()
    facts: Callable[[], Mapping[str, Any]] = dict


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured: seconds per contestant ("ours" first) and round, and what differs."""

    row: int
    title: str
    case: str
    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]
    differs: dict[str, str]
    units: float
    unit: str
    work: float
    limit: str
    target: float
    judged: list[str]
    seconds: float
    load: float
    notices: list[str]
    facts: dict[str, Any]


def peer(name: str) -> ModuleType | None:
    """The module of a peer, None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


def clocked(work: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds (all threads of this process) of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def alternate(contestants: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[Callable[[], Any]], tuple[float, float]] = clocked) -> list[dict]:
    """[wall, cpu], each name -> seconds per round; every round another contestant begins."""
    names = list(contestants)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds = clock(contestants[name])
            wall[name].append(seconds[0])
            cpu[name].append(seconds[1])
    return [wall, cpu]


def ratio(seconds: Mapping[str, list[float]], name: str) -> float:
    """How many times faster we are than `name`: the median of the ratios within a round."""
    return statistics.median(theirs / max(ours, 1e-9) for theirs, ours in zip(seconds[name], seconds["ours"], strict=True))


def measure(row: int, title: str, case: Case) -> Result:
    """The case's answers compared, then its contestants in turns; a peer with another answer is not clocked."""
    ours = case.ours()
    differs = {name: said for name, work in case.peers.items() if (said := case.equal(ours, work()))}
    del ours
    contestants = {"ours": case.ours} | {name: work for name, work in case.peers.items() if name not in differs}
    wall, cpu = alternate(contestants, case.rounds)
    return Result(
        row=row, title=title, case=case.name, wall=wall, cpu=cpu, differs=differs, units=case.units, unit=case.unit, work=case.work, limit=case.limit,
        target=case.target, judged=list(case.judged), seconds=case.seconds, load=round(os.getloadavg()[0], 1), notices=list(case.notices),
        facts=dict(case.facts()),
    )  # fmt: skip


def verdict(result: Result) -> str:
    """`met`, `missed`, or `-` where no target is set or nobody is there to be compared with."""
    if result.seconds:
        return "met" if statistics.median(result.wall["ours"]) <= result.seconds else "missed"
    rivals = [name for name in result.wall if name != "ours" and (name in result.judged or not result.judged)]
    if not result.target or not rivals:
        return "-"
    return "met" if min(ratio(result.wall, name) for name in rivals) >= result.target else "missed"


def machine_limits(threads: int) -> dict[str, float]:
    """Best of several: bytes/s of reading memory, and float operations/s of fp32 and bf16 matrix products, here and now."""
    import torch

    torch.set_num_threads(threads)
    block, square = torch.ones(64 << 20), torch.randn(2048, 2048)
    half = square.to(torch.bfloat16)
    found = {"read": block.nbytes / best(block.sum), "fp32": 2 * 2048**3 / best(lambda: square @ square), "bf16": 2 * 2048**3 / best(lambda: half @ half)}
    return {name: round(value / GIGA, 1) * GIGA for name, value in found.items()}


def best(work: Callable[[], Any], times: int = 7) -> float:
    """Shortest wall time of a few calls."""
    work()
    return min(clocked(work)[0] for _ in range(times))


def rows(numbers: Iterable[int] = ()) -> Iterator[ModuleType]:
    """The modules of rows/ by NUMBER; none asked for = all of them."""
    found = [importlib.import_module(f"rows.{path.stem}") for path in sorted((HERE / "rows").glob("*.py")) if path.stem != "__init__"]
    wanted = set(numbers)
    return iter(sorted((module for module in found if not wanted or module.NUMBER in wanted), key=lambda module: module.NUMBER))


def table(results: Iterable[Result], limits: Mapping[str, float]) -> str:
    """The Markdown table, one line per contestant, followed by titles, notices and facts."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    remarks: list[str] = []
    for result in results:
        lines += ["| " + " | ".join(cells) + " |" for cells in _cells(result, limits)]
        remarks += [f"* {result.row} {result.case}: {name} is not clocked, {said}" for name, said in result.differs.items()]
        remarks += [f"* {result.row} {result.case}: {notice}" for notice in result.notices]
        remarks += [f"* {result.row} {result.case}: " + ", ".join(f"{name} {value}" for name, value in result.facts.items())] if result.facts else []
    return "\n".join([*lines, "", *remarks]) + "\n"


def _cells(result: Result, limits: Mapping[str, float]) -> Iterator[tuple[str, ...]]:
    ours = statistics.median(result.wall["ours"])
    share = f"{result.work / ours / limits[result.limit]:.0%} of {result.limit}" if result.limit else "-"
    target = f"<= {result.seconds:g} s" if result.seconds else f"{result.target:g}x" if result.target else "-"
    rate = f"{result.units / ours:,.0f} {result.unit}" if result.units else "-"
    end = (rate, share, target, verdict(result), f"{result.load:.1f}")
    rivals = [name for name in result.wall if name != "ours"]
    for name in rivals or [""]:
        times = (
            (f"{statistics.median(result.wall[name]):.4g}", f"{ratio(result.wall, name):.2f}", f"{ratio(result.cpu, name):.2f}") if name else ("-", "-", "-")
        )
        yield (str(result.row), result.case, f"{ours:.4g}", name or "-", *times, *end)


def main(arguments: list[str] | None = None) -> int:
    """Measures the rows asked for, writes bench.json and bench.md, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="", help="numbers with commas between; all when left out")
    parser.add_argument("--scale", choices=SCALES, default="normal")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(".sid") / "bench")
    args = parser.parse_args(arguments)
    limits = machine_limits(args.threads)
    results: list[Result] = []
    args.out.mkdir(parents=True, exist_ok=True)
    for module in rows(int(number) for number in args.rows.split(",") if number):
        for case in module.cases(args.scale):
            results.append(measure(module.NUMBER, module.TITLE, case))
            sys.stderr.write(table(results[-1:], limits).split("\n", 2)[2])
            write(args.out, results, limits, args)
    sys.stdout.write((args.out / "bench.md").read_text(encoding="utf-8") if results else "no such row\n")
    return 0


def write(folder: Path, results: list[Result], limits: Mapping[str, float], args: argparse.Namespace) -> None:
    """Both files, anew after every case: an interrupted run keeps what it has."""
    facts = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": args.threads, "scale": args.scale, "limits": dict(limits)}
    document = {"machine": facts, "results": [asdict(result) | {"verdict": verdict(result)} for result in results]}
    (folder / "bench.json").write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")
    ceilings = ", ".join(f"{name} {value / GIGA:,.0f} {'GB/s' if name == 'read' else 'GFLOP/s'}" for name, value in limits.items())
    head = f"{facts['cores']} cores, {args.threads} threads, scale {args.scale}; limits measured in this run: {ceilings}.\n\n"
    (folder / "bench.md").write_text(head + table(results, limits), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(importlib.import_module("bench").main())  # rows import `bench`: there must be one of it
