"""The command line that every family shares: run its cases, print a line for each contender, write CSV and figure."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import tempfile
import time
from pathlib import Path

import torch

from . import environment, roofline
from .family import Case, Family
from .measure import Canary, Measurement, Skip, canary_for, cpu_sampler, cuda_sampler, interleave
from .memory import peak_in_subprocess
from .record import BASELINES, Recorder

RESULTS = environment.ROOT / "benchmarks" / "results"

#: Per level (smoke is for tests): seconds of sampling per case, that one call may take, of the whole run.
LEVELS = {
    "smoke": (0.2, 1.0, 20.0),
    "quick": (1.0, 1.5, 60.0),
    "default": (2.5, 4.0, 360.0),
    "full": (6.0, 60.0, 3600.0),
}


_CLOCKS = {"eager": time.perf_counter, "cpu-time": time.process_time}


def parser(family: Family) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog=f"python -m benchmarks.{family.name}", description=family.title)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    level = p.add_mutually_exclusive_group()
    level.add_argument("--quick", dest="level", action="store_const", const="quick", help="a few cases, about a minute")
    level.add_argument("--full", dest="level", action="store_const", const="full", help="every size and type")
    level.add_argument("--smoke", dest="level", action="store_const", const="smoke", help="tiny sizes: does it run?")
    p.add_argument("--providers", nargs="+", help="these contenders only (default: all that can run)")
    p.add_argument("--budget", type=float, help="seconds for all cases; what does not fit is not started")
    p.add_argument("--seconds", type=float, help="seconds of sampling per case")
    p.add_argument("--limit", type=float, help="leave out contenders of which one call takes longer (seconds)")
    p.add_argument("--only", help="cases whose description contains this text")
    p.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    p.add_argument("--patience", type=float, default=0.0, help="seconds to spend, in all, waiting for quiet moments")
    p.add_argument("--cpu-time", action="store_true", help="CPU time of one thread: for a machine that is never quiet")
    p.add_argument("--out", type=Path, help="folder for the CSV and the figure (default: a temporary one)")
    p.add_argument("--csv", type=Path, help="the CSV file, appended to if it exists (instead of one in --out)")
    p.add_argument("--save", action="store_true", help="write to benchmarks/results/<this device>/")
    p.add_argument("--no-memory", action="store_true", help="leave out the peak memory measurements")
    p.set_defaults(level="default")
    return p


def main(family: Family, argv: list[str] | None = None) -> int:
    if argv is None:
        environment.apply_allocation_policy()
    args = parser(family).parse_args(argv)
    if args.threads or args.cpu_time:
        torch.set_num_threads(1 if args.cpu_time else args.threads)
    seconds, limit, budget = LEVELS[args.level]
    seconds, limit, budget = args.seconds or seconds * family.sampling, args.limit or limit, args.budget or budget
    device = torch.device(args.device)
    began = time.perf_counter()

    facts = environment.collect(device)
    print("\n".join(environment.header(facts)), flush=True)
    machine = roofline.measure(device, {"smoke": 0.5, "quick": 2.0}.get(args.level, 6.0))
    print("\n".join(machine.lines()), "\n", flush=True)

    if args.save:
        out = RESULTS / environment.short_name(device, facts)
    else:
        out = args.out or Path(tempfile.mkdtemp(prefix="linattn-benchmarks-"))
    recorder = Recorder(args.csv or out / f"{family.name}.csv", append=args.csv is not None)
    canary, unstarted = canary_for(device), []
    for _ in range(20):
        canary()
    canary.patience = args.patience
    cases = [c for c in family.cases(device, args.level) if not args.only or args.only in str(c)]
    if args.cpu_time:
        cases = [dataclasses.replace(case, timing="cpu-time") for case in cases]
    for case in cases:
        if time.perf_counter() - began > budget:
            unstarted.append(case)
            continue
        chosen = [name for name in family.providers(device) if not args.providers or name in args.providers]
        reasons = {name: why for name in chosen if (why := family.left_out(name, case, device, args.level))}
        run_case(
            *(family, case, chosen, device, machine, canary, recorder, facts),
            seconds=seconds,
            limit=limit,
            left_out=reasons,
        )
    quick = args.no_memory or args.only or args.level in ("smoke", "quick")
    for provider, case in [] if quick else family.memory_cases(device):
        if time.perf_counter() - began < budget:
            run_memory(family, provider, case, device, recorder, facts, limit=120.0)
    recorder.close()
    figure = out / f"{family.name}.png"
    try:
        figure.parent.mkdir(parents=True, exist_ok=True)
        family.figure(recorder.rows, figure)
    except Exception as error:  # the numbers are written; a figure is not worth an error
        figure = None
        print(f"no figure: {error}")
    if unstarted:
        print(f"\n{len(unstarted)} cases did not fit into {budget:.0f} s: " + "; ".join(map(str, unstarted)))
    print(f"\n{time.perf_counter() - began:.0f} s; written: {recorder.path}" + (f", {figure}" if figure else ""))
    return 0


def _columns(family: Family, case: Case, facts: dict[str, str]) -> dict[str, object]:
    columns = {
        name: getattr(case, name) for name in ("B", "H", "N", "M", "D", "E", "dtype", "layout", "mode", "timing")
    }
    columns |= {"family": family.name, "case": case.name}
    return columns | {
        name: facts[name] for name in ("device", "isa", "threads", "torch", "triton", "linattn", "commit", "date")
    }


def build(
    family: Family,
    case: Case,
    providers: list[str],
    device: torch.device,
    machine: roofline.Machine,
    limit: float,
) -> tuple[dict, dict[str, str]]:
    """(samplers by provider, reasons of those that were left out)."""
    samplers, skipped = {}, {}
    for provider in providers:
        try:
            contender = family.prepare(provider, case, device, machine, limit)
            if device.type == "cuda":
                sampler = cuda_sampler(contender, roofline.l2_flush(), case.timing == "graph")
            else:
                with contender.scope():
                    contender.call()  # compiles, loads, touches memory
                    start = time.perf_counter()
                    contender.call()
                    took = time.perf_counter() - start
                if took > limit:
                    raise Skip(f"one call took {took:.1f} s, the limit is {limit:g} s")
                sampler = cpu_sampler(contender, _CLOCKS[case.timing], once=took)
            samplers[provider] = sampler
        except Skip as reason:
            skipped[provider] = str(reason)
        except (RuntimeError, ValueError, TypeError, ImportError, torch.OutOfMemoryError) as error:
            # One contender that fails must not lose the others' numbers; the row says what happened.
            skipped[provider] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
    return samplers, skipped


def run_case(
    family: Family,
    case: Case,
    providers: list[str],
    device: torch.device,
    machine: roofline.Machine,
    canary: Canary,
    recorder: Recorder,
    facts: dict[str, str],
    *,
    seconds: float,
    limit: float,
    left_out: dict[str, str],
) -> None:
    """Measure one case and record a row per provider; `left_out` says why some are not even tried."""
    torch._dynamo.reset()
    columns = _columns(family, case, facts) | {"metric": "time", "unit": "ms"}
    tried = [name for name in providers if name not in left_out]
    samplers, skipped = build(family, case, tried, device, machine, limit)
    skipped = left_out | skipped
    print(case, flush=True)
    if samplers:
        measured = interleave(samplers, canary, seconds=seconds)
        for provider in samplers:
            print("  " + _record_time(family, case, provider, measured, machine, recorder, columns), flush=True)
    for provider, reason in skipped.items():
        recorder.add(**columns, provider=provider, skipped=reason)
        print(f"  {provider:<22}left out: {reason}", flush=True)
    samplers.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _record_time(
    family: Family,
    case: Case,
    provider: str,
    measured: Measurement,
    machine: roofline.Machine,
    recorder: Recorder,
    columns: dict[str, object],
) -> str:
    statistics = measured.statistics(provider)
    moved, flops = family.work(case)
    floor, bound = machine.floor(moved, flops, case.dtype)
    over = {name: measured.speedup(provider, name) for name in BASELINES if name in measured.times and name != provider}
    rounds, dropped = measured.rounds(provider)
    recorder.add(
        **columns,
        provider=provider,
        **{name: getattr(statistics, name) * 1e3 for name in ("p20", "p50", "p80", "best")},
        rounds=rounds,
        dropped=dropped,
        **{f"over_{name}": value for name, value in over.items()},
        floor=floor * 1e3,
        bound=bound,
        fraction_of_floor=floor / statistics.p50,
        GB_per_s=moved / statistics.p50 / 1e9,
        TFLOP_per_s=flops / statistics.p50 / 1e12,
        copy_GB_per_s=machine.copy_rate(moved) / 1e9,
        peak_TFLOP_per_s=machine.peak[case.dtype] / 1e12,
    )
    p20, p50, p80 = (x * 1e3 for x in (statistics.p20, statistics.p50, statistics.p80))
    text = f"{provider:<22}{p50:10.3f} ms  (20-80 %: {p20:.3f}..{p80:.3f})"
    text += f"  {floor / statistics.p50:5.0%} of the floor  {moved / statistics.p50 / 1e9:7.1f} GB/s"
    text += "".join(f"  {ratio:.2f}x over {name}" for name, ratio in over.items() if ratio is not None)
    return text + (f"  [{dropped} of {rounds + dropped} rounds dropped]" if dropped else "")


def run_memory(
    family: Family, provider: str, case: Case, device: torch.device, recorder: Recorder, facts: dict, *, limit: float
) -> None:
    """Record the peak memory of one call beyond its inputs, and how it compares with the tensors of the case."""
    columns = _columns(family, case, facts) | {"provider": provider, "metric": "peak_memory", "unit": "MiB"}
    try:
        peak = peak_in_subprocess(family.name, provider, case, device, limit)
    except Skip as reason:
        recorder.add(**columns, skipped=str(reason))
        print(f"{case}\n  {provider:<22}peak memory: {reason}", flush=True)
        return
    recorder.add(**columns, p50=peak / 2**20, best=peak / 2**20, rounds=1)
    print(f"{case}\n  {provider:<22}peak memory beyond the inputs {peak / 2**20:.1f} MiB", flush=True)
