"""What a benchmark family has to say about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .measure import Contender
from .roofline import DTYPES, Machine


@dataclass(frozen=True)
class Case:
    """One piece of work. `mode`: forward, backward or forward+backward; `timing`: eager, graph (CUDA) or cpu-time."""

    name: str
    B: int
    H: int
    N: int
    M: int
    D: int
    E: int
    dtype: str
    layout: str = "BNHD"
    mode: str = "forward"
    timing: str = "eager"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def __str__(self) -> str:
        sizes = f"B{self.B} H{self.H} N{self.N} D{self.D} {self.dtype} {self.layout}"
        return f"{self.name}: {sizes} {self.mode}" + ("" if self.timing == "eager" else f" ({self.timing})")


def _nobody(provider: str, case: Case, device: torch.device, level: str) -> None:
    return None


@dataclass(frozen=True)
class Family:
    """A benchmark family.

    cases(device, level) lists the cases, the important ones first; level is "smoke", "quick", "default" or
    "full".
    providers(device) names the contenders; prepare(provider, case, device, machine, limit_s) builds one, or raises
    Skip(reason), for instance where one call would take longer than limit_s.
    work(case) is (bytes that must move, floating-point operations).
    figure(rows, path) draws recorded rows; memory_cases(device) are those whose peak memory is measured as well.
    left_out(provider, case, device, level) is the reason why a contender sits a case out at this level, or None.
    weight: this family's share of the time when all of them run (benchmarks/gpu.py); sampling: of the seconds that a
    level gives to each case.
    """

    name: str
    title: str
    cases: Callable[[torch.device, str], list[Case]]
    providers: Callable[[torch.device], list[str]]
    prepare: Callable[[str, Case, torch.device, Machine | None, float], Contender]
    work: Callable[[Case], tuple[float, float]]
    figure: Callable[[list[dict[str, str]], Path], None]
    memory_cases: Callable[[torch.device], list[tuple[str, Case]]]
    left_out: Callable[[str, Case, torch.device, str], str | None] = _nobody
    weight: float = 1.0
    sampling: float = 1.0
