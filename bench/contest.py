"""Contestants timed in turn, on a CPU or a GPU, and what a machine can copy in that time.

A drift of the machine, which is larger than many a difference between contestants, then hits all of
them; what is compared are medians.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

MIN_ROUNDS, MAX_ROUNDS = 5, 50
# The GPU overwrites this much memory before each timed run, so often: no cache keeps what the run
# reads, and the CPU is done launching before the clock starts.
FLUSH_BYTES, FLUSHES = 256 * 2**20, 10


class Contestant(NamedTuple):
    run: Callable[..., object]  # what is timed; takes what `prepare` returned
    prepare: Callable[[], tuple[Any, ...]] = tuple  # runs before every `run`, outside the clock
    moved: float | None = None  # bytes that `run` reads and writes at least, where that is counted
    images: int | None = None  # that `run` processes, where that is the point


# What makes a contestant, by name; it raises AssertionError where that one computes something else
# than it should. A case is a question with several answers: its contestants do the same work.
Makers = Mapping[str, Callable[[], Contestant]]


class Outcome(NamedTuple):
    seconds: list[float]  # of each round
    info: dict[str, float]  # what follows from their median


def hold(makers: Makers, device: torch.device, seconds: float) -> dict[str, Outcome | Exception]:
    """Check the contestants of a case, then time them in turn, each for so many seconds and
    :data:`MIN_ROUNDS` at least; the outcome of one that fails is its exception, and takes none of
    the others with it.
    """
    # Else the compiled contestants of all cases together would meet dynamo's limit of versions.
    torch.compiler.reset()
    copy_rate = copy_bandwidth(device)
    outcomes: dict[str, Outcome | Exception] = {}
    contestants, peaks = {}, {}
    for name, make in makers.items():
        try:
            contestant = make()
            peaks[name] = peak_memory(contestant, device)
            contestants[name] = contestant
        except Exception as error:
            outcomes[name] = error
    try:
        rounds = time_in_turn(contestants, device, seconds)
    except torch.OutOfMemoryError as error:  # of all of them together
        return outcomes | dict.fromkeys(contestants, error)
    for name, contestant in contestants.items():
        median = statistics.median(rounds[name])
        info: dict[str, float] = {"peak_memory_bytes": peaks[name]}
        if contestant.moved is not None:
            rate = contestant.moved / median
            info["bytes"], info["gb_per_second"] = contestant.moved, rate / 1e9
            info["share_of_copy_bandwidth"] = rate / copy_rate
        if contestant.images is not None:
            info["images_per_second"] = contestant.images / median
        outcomes[name] = Outcome(rounds[name], info)
    return outcomes


def time_in_turn(
    contestants: Mapping[str, Contestant], device: torch.device, seconds: float
) -> dict[str, list[float]]:
    """Seconds of each run of each contestant."""
    cuda, synchronize = device.type == "cuda", getattr(torch, device.type).synchronize
    flush = torch.empty(FLUSH_BYTES if cuda else 0, dtype=torch.uint8, device=device)

    def once(contestant: Contestant) -> Callable[[], float]:
        """What tells how long it took, once the GPU is done."""
        prepared = contestant.prepare()
        if not cuda:
            start = time.perf_counter()
            result = contestant.run(*prepared)
            took = time.perf_counter() - start
            del result  # what it takes to free it is not timed
            return lambda: took
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(FLUSHES):
            flush.zero_()
        begin.record()
        contestant.run(*prepared)
        end.record()
        return lambda: begin.elapsed_time(end) / 1e3  # events tell milliseconds

    one_run = {}
    for name, contestant in contestants.items():
        for _ in range(2):  # the first compiles
            start = time.perf_counter()
            once(contestant)
            synchronize()
            one_run[name] = time.perf_counter() - start
    runs: dict[str, list[Callable[[], float]]] = {name: [] for name in contestants}
    for name in turns(seconds, one_run):
        runs[name].append(once(contestants[name]))
    synchronize()
    return {name: [seconds() for seconds in told] for name, told in runs.items()}


def turns(seconds: float, one_run: Mapping[str, float]) -> list[str]:
    """Who runs, turn after turn: as often as the time allows, the slow less often than the fast,
    and everybody spread over the whole time."""
    counts = {
        name: max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / max(took, 1e-9))))
        for name, took in one_run.items()
    }
    runs = [((n + 1) / count, name) for name, count in counts.items() for n in range(count)]
    return [name for _, name in sorted(runs)]


def peak_memory(contestant: Contestant, device: torch.device) -> int:
    """Bytes that a run needs at most on top of what is there before, preparation included."""

    def once() -> None:
        contestant.run(*contestant.prepare())

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
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes, initial=0))


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy that no cache holds; measured."""
    source = torch.empty(256 * 2**20, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copy = Contestant(lambda: target.copy_(source))
    return 2 * source.numel() / statistics.median(time_in_turn({"": copy}, device, 0.5)[""])
