"""Ours beside its peers, in one process and one run: `make bench`, or `python tests/bench/bench.py --rows 1,6 --scale quick --out FOLDER`.

A row is one file in rows/ with NUMBER, TITLE and `cases(scale)`. Every case says what "equal" means; times of unequal answers are not printed. Contestants
take turns, the figure is the median over rounds of the ratio within a round, so that a slow minute of the machine hits all of them. Wall and CPU time are
kept apart: on a machine with other load only the ratios, and the CPU times first, can be trusted. A peer that is not installed is skipped with a notice;
one that is a repository is read from a checkout that an environment variable names. Cases of one series at several sizes are fitted: growth of time and memory.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).parent
SCALES = ("quick", "normal", "full")
GIGA = 1e9
CLEAR_PEAK = "5"  # what /proc/self/clear_refs takes for: forget the peak
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
        rounds: calls of each contestant after its first one, which is checked and kept as the cold time; 0 = the first call is the figure.
        series / size: name of what is measured at several sizes, and this one's.
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
    series: str = ""
    size: float = 0.0
    notices: tuple[str, ...] = ()
    facts: Callable[[], Mapping[str, Any]] = dict


@dataclass(frozen=True)
class Timed:
    """An answer whose work says itself how long it took, start-up apart; `seconds` and `cpu` take the place of the clocks."""

    seconds: float
    cpu: float = math.nan
    answer: Any = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured: seconds per contestant ("ours" first) of the first call and of every round, our peak memory in MB, and what differs."""

    row: int
    title: str
    case: str
    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]
    first: dict[str, float]
    peak: float
    differs: dict[str, str]
    units: float
    unit: str
    work: float
    limit: str
    target: float
    judged: list[str]
    seconds: float
    load: float
    series: str
    size: float
    notices: list[str]
    facts: dict[str, Any]


def peer(name: str) -> ModuleType | None:
    """The module of a peer, None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


def repository(variable: str, *modules: str, below: str = "") -> tuple[ModuleType, ...] | None:
    """Modules of a peer that is a repository: the environment variable names its checkout; None where it does not.

    None, too, and a line that says so, where the checkout needs a package that is not there: one peer less, not a bench that ends.
    """
    if variable not in os.environ:
        return None
    folder = str(Path(os.environ[variable]).resolve() / below)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        return tuple(importlib.import_module(name) for name in modules)
    except ModuleNotFoundError as error:
        sys.stderr.write(f"left out: the checkout in {variable} needs the package {error.name}\n")
        return None


def answered(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """The answer of one call, its wall seconds and its CPU seconds (all threads of this process, and child processes that ended)."""
    wall, cpu = time.perf_counter(), _cpu()
    answer = work()
    wall, cpu = time.perf_counter() - wall, _cpu() - cpu
    return (answer.answer, answer.seconds, answer.cpu) if isinstance(answer, Timed) else (answer, wall, cpu)


def _cpu() -> float:
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


def clocked(work: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    return answered(work)[1:]


def peak_of(work: Callable[[], Any]) -> tuple[Any, float]:
    """The answer of a call and the peak of this process's memory during it, MB above what it held before; NaN where the system does not say."""
    try:
        Path("/proc/self/clear_refs").write_text(CLEAR_PEAK, encoding="ascii")
    except OSError:
        return work(), float("nan")
    before = resident("VmRSS")
    return work(), resident("VmHWM") - before


def resident(what: str, process: str = "self") -> float:
    """A memory figure of a process in MB: VmRSS (now) or VmHWM (peak); nothing of one that has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(what)), 0.0)


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
    (ours, *seconds), peak = peak_of(lambda: answered(case.ours))
    first, differs = {"ours": seconds}, {}
    for name, work in case.peers.items():
        theirs, *first[name] = answered(work)
        said = case.equal(ours, theirs)
        if said:
            differs[name] = said
    del ours
    contestants = {"ours": case.ours} | {name: work for name, work in case.peers.items() if name not in differs}
    wall, cpu = alternate(contestants, case.rounds) if case.rounds else [{name: [first[name][at]] for name in contestants} for at in (0, 1)]
    return Result(
        row=row, title=title, case=case.name, wall=wall, cpu=cpu, first={name: seconds[0] for name, seconds in first.items()}, peak=round(peak, 1),
        differs=differs, units=case.units, unit=case.unit, work=case.work, limit=case.limit, target=case.target, judged=list(case.judged),
        seconds=case.seconds, load=round(os.getloadavg()[0], 1), series=case.series, size=case.size, notices=list(case.notices), facts=dict(case.facts()),
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


def table(results: Sequence[Result], limits: Mapping[str, float]) -> str:
    """The Markdown table, one line per contestant, followed by titles, notices and facts."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    remarks: list[str] = []
    for result in results:
        lines += ["| " + " | ".join(cells) + " |" for cells in _cells(result, limits)]
        remarks += [f"* {result.row} {result.case}: {name} is not clocked, {said}" for name, said in result.differs.items()]
        remarks += [f"* {result.row} {result.case}: {notice}" for notice in result.notices]
        remarks += [f"* {result.row} {result.case}: " + ", ".join(f"{name} {value}" for name, value in result.facts.items())] if result.facts else []
        colds = ", ".join(f"{name} {seconds:.4g} s" for name, seconds in result.first.items())
        remarks += [f"* {result.row} {result.case}: first call {colds}; our peak {result.peak:,.0f} MB above the start"]
    return "\n".join([*lines, "", *remarks, *growth(results)]) + "\n"


def growth(results: Sequence[Result]) -> list[str]:
    """Per series: seconds = start + slope * size for each contestant, from where on we are cheaper, and the power with which our time and memory grow."""
    found = []
    for name in dict.fromkeys(result.series for result in results if result.series):
        members = [result for result in results if result.series == name]
        if len({result.size for result in members}) < 2:
            continue
        lines = {who: _line(members, who) for who in members[0].wall if all(who in result.wall for result in members)}
        said = ", ".join(f"{who} {start:.3g} s + {slope:.3g} s each" + _crossing(lines["ours"], (start, slope), who) for who, (start, slope) in lines.items())
        times, peaks = [statistics.median(result.wall["ours"]) for result in members], [result.peak for result in members]
        sizes = ", ".join(f"{result.size:,.0f}" for result in members)
        found.append(f"* growth of {name} ({sizes}): {said}; our time grows as size^{_power(members, times)}, our peak memory as size^{_power(members, peaks)}")
    return found


def _line(members: Sequence[Result], who: str) -> tuple[float, float]:
    """Least squares of seconds over size: (start, slope)."""
    fitted = statistics.linear_regression([result.size for result in members], [statistics.median(result.wall[who]) for result in members])
    return fitted.intercept, fitted.slope


def _crossing(ours: tuple[float, float], theirs: tuple[float, float], who: str) -> str:
    """From which size on our line lies below theirs."""
    if who == "ours":
        return ""
    gain = theirs[1] - ours[1]
    meet = (ours[0] - theirs[0]) / gain if gain else float("inf")
    if gain > 0:
        return f" (ours is cheaper from {max(meet, 0):,.0f} on)"
    return f" (ours is cheaper up to {meet:,.0f})" if meet > 0 else " (ours is never cheaper)"


def _power(members: Sequence[Result], values: Sequence[float]) -> str:
    """The exponent of a power law through (size, value)."""
    if min(values) <= 0 or any(value != value for value in values):
        return "?"
    return f"{statistics.linear_regression([math.log(result.size) for result in members], [math.log(value) for value in values]).slope:.2f}"


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
    limits: dict[str, float] = {}
    results: list[Result] = []
    args.out.mkdir(parents=True, exist_ok=True)
    for module in rows(int(number) for number in args.rows.split(",") if number):
        found = machine_limits(args.threads)  # anew for every row, the best counts: other load only lowers them
        limits = {name: max(value, limits.get(name, 0.0)) for name, value in found.items()}
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
