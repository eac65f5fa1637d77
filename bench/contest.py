"""Contestants timed in turn, on a CPU or a GPU, and what a machine can copy in that time.

A drift of the machine, which is larger than many a difference between contestants, then hits all of
them; what is compared are medians.
"""

from __future__ import annotations

import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

MIN_ROUNDS, MAX_ROUNDS = 5, 100
NO_MEMORY = "out of GPU memory"
# The GPU overwrites this much memory before each timed run, and for this long: no cache keeps what
# the run reads, and the CPU is done launching before the clock starts.
_FLUSH_BYTES = 256 * 2**20
_FLUSH_SECONDS = 1e-3


@dataclass(frozen=True)
class Contestant:
    """What is timed.

    Attributes:
        run: takes what ``prepare`` returned.
        prepare: runs before every ``run``, outside the clock.
        moved: bytes that ``run`` reads and writes at least, or None where nobody counted.
        images: that ``run`` processes, or None where that is not the point.
    """

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None
    moved: int | None = None
    images: int | None = None


class Case(ABC):
    """A question with several answers: its contestants do the same work.

    Attributes:
        names: of the contestants, in the order in which they are listed.
    """

    names: tuple[str, ...]

    @abstractmethod
    def __str__(self) -> str:
        """Its name, in letters that a command line takes."""

    @abstractmethod
    def contestants(self) -> dict[str, Callable[[], Contestant]]:
        """What makes each of them, by name, ready to run on the device."""

    @abstractmethod
    def check(self, name: str, contestant: Contestant) -> None:
        """Assert that a contestant computes what it should, before it is timed."""


@dataclass
class Outcome:
    """What came of a contestant: seconds of each round, or why there are none.

    Attributes:
        skipped: why it could not take part, for no fault of its own.
        error: what is wrong with it.
    """

    seconds: list[float] = field(default_factory=list)
    info: dict[str, float] = field(default_factory=dict)
    skipped: str | None = None
    error: Exception | None = None


def hold(
    case: Case, names: list[str], device: torch.device, seconds: float, copy_rate: float
) -> dict[str, Outcome]:
    """Check the contestants of a case, then time them in turn.

    Args:
        case: what is compared.
        names: of the contestants that take part.
        device: where they run.
        seconds: for the rounds; there are :data:`MIN_ROUNDS` of them even if that takes longer.
        copy_rate: bytes per second, see :func:`copy_bandwidth`.
    """
    # Else the compiled contestants of all cases together would meet dynamo's limit of versions.
    torch.compiler.reset()
    outcomes = {name: Outcome() for name in names}
    contestants = {}
    # One that fails takes none of the others with it.
    for name, make in case.contestants().items():
        if name in names:
            try:
                contestant = make()
                case.check(name, contestant)
                outcomes[name].info = {"peak_memory_bytes": peak_memory(contestant, device)}
                contestants[name] = contestant
            except torch.OutOfMemoryError:
                outcomes[name].skipped = NO_MEMORY
            except Exception as error:
                outcomes[name].error = error
    times = _cuda_rounds if device.type == "cuda" else _cpu_rounds
    try:
        rounds = times(contestants, seconds, copy_rate) if contestants else {}
    except torch.OutOfMemoryError:
        rounds = {}
        for name in contestants:
            outcomes[name].skipped = NO_MEMORY
    for name, measured in rounds.items():
        contestant, outcome = contestants[name], outcomes[name]
        outcome.seconds = measured
        median = statistics.median(measured)
        if contestant.moved is not None:
            outcome.info["bytes"] = contestant.moved
            outcome.info["gb_per_second"] = contestant.moved / median / 1e9
            outcome.info["share_of_copy_bandwidth"] = contestant.moved / median / copy_rate
        if contestant.images is not None:
            outcome.info["images_per_second"] = contestant.images / median
    return outcomes


def _turns(
    contestants: Mapping[str, Contestant], seconds: float, one_run: Mapping[str, float]
) -> Iterator[str]:
    """Who runs, turn after turn: as often as the time allows, the slow less often than the fast,
    and everybody spread over the whole time."""
    share = seconds / len(contestants)
    counts = {
        name: max(MIN_ROUNDS, min(MAX_ROUNDS, int(share / max(took, 1e-9))))
        for name, took in one_run.items()
    }
    most = max(counts.values())
    for turn in range(most):
        for name, count in counts.items():
            if (turn + 1) * count // most > turn * count // most:
                yield name


def _cpu_rounds(
    contestants: Mapping[str, Contestant], seconds: float, _: float
) -> dict[str, list[float]]:
    def once(name: str) -> float:
        contestant = contestants[name]
        prepared = contestant.prepare()
        start = time.perf_counter()
        result = contestant.run(prepared)
        end = time.perf_counter()
        del result  # what it takes to free it is not timed
        return end - start

    one_run = {}
    for name in contestants:
        once(name)
        start = time.perf_counter()
        once(name)
        one_run[name] = time.perf_counter() - start
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for name in _turns(contestants, seconds, one_run):
        times[name].append(once(name))
    return times


def _cuda_rounds(
    contestants: Mapping[str, Contestant], seconds: float, copy_rate: float
) -> dict[str, list[float]]:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    flushes = math.ceil(_FLUSH_SECONDS * copy_rate / _FLUSH_BYTES)

    def once(name: str) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        prepared = contestants[name].prepare()
        for _ in range(flushes):
            flush.zero_()
        start.record()
        contestants[name].run(prepared)
        end.record()
        return start, end

    one_run = {}
    for name in contestants:
        for _ in range(3):  # kernels are compiled, cuDNN chooses its own
            once(name)
        torch.cuda.synchronize()
        start = time.perf_counter()
        once(name)
        torch.cuda.synchronize()
        one_run[name] = time.perf_counter() - start
    pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]]
    pairs = {name: [] for name in contestants}
    for name in _turns(contestants, seconds, one_run):
        pairs[name].append(once(name))
    torch.cuda.synchronize()
    # Events tell milliseconds.
    return {
        name: [start.elapsed_time(end) / 1e3 for start, end in events]
        for name, events in pairs.items()
    }


def peak_memory(contestant: Contestant, device: torch.device) -> int:
    """Bytes that a run needs at most on top of what is there before, preparation included."""

    def once() -> None:
        contestant.run(contestant.prepare())

    once()  # what stays after the first run is not its own: gradients, caches, compiled code
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        once()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
        once()
    # The profiler's own tables have sums of allocations, not what was there at a time.
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy that no cache holds; measured."""
    source = torch.empty(256 * 2**20, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    contestants = {"copy": Contestant(lambda _: target.copy_(source))}
    if device.type == "cuda":
        times = _cuda_rounds(contestants, 0.2, 1e12)
    else:
        times = _cpu_rounds(contestants, 1.0, 0)
    return 2 * source.numel() / statistics.median(times["copy"])


class ReplayClock:
    """A clock for pytest-benchmark, which asks it at the start and at the end of each round: it
    shows the durations of rounds that were timed before, in turn with others."""

    def __init__(self) -> None:
        self._readings: list[float] = []

    def load(self, seconds: list[float]) -> None:
        self._readings = [reading for duration in reversed(seconds) for reading in (duration, 0.0)]

    def __call__(self) -> float:
        return self._readings.pop()
