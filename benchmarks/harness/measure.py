"""Time several contenders against each other on a machine that other jobs use as well.

All contenders of a case run in one loop, one sample each per round, so that a slow stretch of the machine hits them
alike; ratios are taken round by round and only then reduced to a median. A canary, a fixed matrix product, is timed
before and after every round: rounds in which it was slow are dropped, and the number of them is reported.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

#: A round is dropped when its canary took this much longer than the fastest canary of the run.
CANARY_LIMIT = 1.25
#: One sample on a CPU repeats the call until it takes about this long: clocks and barriers cost microseconds.
SAMPLE_SECONDS = 2e-3


class Skip(Exception):
    """A contender that cannot or should not run a case; the message is recorded."""


@dataclass(frozen=True)
class Contender:
    """One way to do a case's work: `call` does it once; `scope` is entered around a sample, outside the clock."""

    call: Callable[[], object]
    scope: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


@dataclass(frozen=True)
class Statistics:
    """Quantiles and minimum of the kept samples, in seconds."""

    p20: float
    p50: float
    p80: float
    best: float


def quantile(values: list[float], q: float) -> float:
    """Linear interpolation between the order statistics, as numpy's default."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass
class Measurement:
    """Seconds per call and round (None: the contender sat that round out) and which rounds count."""

    times: dict[str, list[float | None]]
    canary: list[float] = field(default_factory=list)
    kept: list[bool] = field(default_factory=list)

    def _kept(self, name: str) -> list[float]:
        return [t for t, keep in zip(self.times[name], self.kept, strict=True) if keep and t is not None]

    def statistics(self, name: str) -> Statistics:
        values = self._kept(name)
        return Statistics(*(quantile(values, q) for q in (0.2, 0.5, 0.8)), min(values))

    def speedup(self, name: str, baseline: str) -> float | None:
        """How many times faster than the baseline: the median of the ratios of rounds that hold both."""
        pairs = zip(self.times[name], self.times[baseline], self.kept, strict=True)
        ratios = [b / t for t, b, keep in pairs if keep and t is not None and b is not None]
        return quantile(ratios, 0.5) if ratios else None

    def rounds(self, name: str) -> tuple[int, int]:
        """(rounds that count, rounds that were dropped because the machine was slow) for one contender."""
        taken = [keep for t, keep in zip(self.times[name], self.kept, strict=True) if t is not None]
        return sum(taken), len(taken) - sum(taken)


class Canary:
    """A fixed piece of work whose time tells how much of the machine we have at this moment."""

    def __init__(self, sample: Callable[[], float]):
        self._sample = sample
        self.best = math.inf
        #: Seconds that a run may still spend waiting for a quiet machine.
        self.patience = 0.0

    def __call__(self) -> float:
        seconds = self._sample()
        self.best = min(self.best, seconds)
        return seconds

    def wait_until_quiet(self, clock: Callable[[], float] = time.perf_counter, pause: float = 0.1) -> float:
        """The canary's time, after waiting for a quick one as long as there is patience left."""
        seconds = self()
        while seconds > CANARY_LIMIT * self.best and self.patience > 0:
            began = clock()
            time.sleep(pause)
            seconds = self()
            self.patience -= clock() - began
        return seconds


def kept_rounds(canary: list[float], best: float, taking_part: Mapping[str, list[bool]], least: int = 3) -> list[bool]:
    """Which rounds count: those with a quick canary, and the `least` quickest of every contender in any case."""
    kept = [seconds <= CANARY_LIMIT * best for seconds in canary]
    for rounds in taking_part.values():
        mine = sorted((i for i, here in enumerate(rounds) if here), key=lambda i: canary[i])
        for i in mine[:least]:
            kept[i] = True
    return kept


def interleave(
    samplers: Mapping[str, Callable[[], float]],
    canary: Canary,
    *,
    seconds: float,
    least: int = 3,
    most: int = 60,
    clock: Callable[[], float] = time.perf_counter,
) -> Measurement:
    """Sample all contenders in turn, A B C A B C, for about `seconds`.

    A sampler returns the seconds of one call. Its first sample warms up and is not counted. Each contender gets the
    same share of the time: one that is much slower than the others sits out rounds, evenly spread, but takes part in
    at least `least`. The order rotates, so that nobody always follows the same neighbour.
    """
    names = list(samplers)
    cost = {}
    for name in names:
        start = clock()
        samplers[name]()
        cost[name] = max(clock() - start, 1e-9)
    share = seconds / len(names)
    wanted = {name: min(most, max(least, int(share / cost[name]))) for name in names}
    total = max(wanted.values())
    result = Measurement({name: [] for name in names})
    for r in range(total):
        before = canary.wait_until_quiet(clock)
        turn = r % len(names)
        for name in names[turn:] + names[:turn]:
            here = (r + 1) * wanted[name] // total > r * wanted[name] // total
            result.times[name].append(samplers[name]() if here else None)
        result.canary.append(max(before, canary()))
    taking_part = {name: [t is not None for t in result.times[name]] for name in names}
    result.kept = kept_rounds(result.canary, canary.best, taking_part, least)
    return result


# ---- samplers ---------------------------------------------------------------------------------------------------


def cpu_sampler(
    contender: Contender, clock: Callable[[], float] = time.perf_counter, once: float | None = None
) -> Callable[[], float]:
    """Seconds per call by the host's clock; short calls are repeated within a sample. `once`: what a call takes."""
    if once is None:
        with contender.scope():
            contender.call()
            start = clock()
            contender.call()
            once = clock() - start
    repeat = max(1, min(1000, math.ceil(SAMPLE_SECONDS / max(once, 1e-7))))

    def sample() -> float:
        with contender.scope():
            start = clock()
            for _ in range(repeat):
                contender.call()
            return (clock() - start) / repeat

    return sample


def cuda_sampler(contender: Contender, flush: torch.Tensor, graph: bool = False) -> Callable[[], float]:
    """Seconds per call by CUDA events, with a cold L2 cache: `flush` (larger than it) is overwritten before each call.

    Overwriting also gives the host a head start, so that the events bracket the device's work; what the host needs
    beyond that shows up in the time, as it would in a model that waits for it. `graph` replays a captured CUDA graph
    instead: the device's time alone.
    """
    call = contender.call
    with contender.scope():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                kept = call()  # the graph's memory belongs to what it made

            def call(captured=captured, kept=kept):
                captured.replay()

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        with contender.scope():
            flush.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e-3

    return sample


def canary_for(device: torch.device) -> Canary:
    """A matrix product of about a millisecond on a CPU, of some tens of microseconds on a GPU."""
    size, dtype = (512, torch.float32) if device.type == "cpu" else (2048, torch.bfloat16)
    a = torch.randn(size, size, dtype=dtype, device=device)
    out = torch.empty_like(a)
    contender = Contender(lambda: torch.mm(a, a, out=out))
    if device.type == "cpu":
        return Canary(cpu_sampler(contender))
    return Canary(cuda_sampler(contender, torch.empty(1 << 20, dtype=torch.int8, device=device)))
