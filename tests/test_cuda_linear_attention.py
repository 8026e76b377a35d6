"""The CUDA kernels of linear attention, run by the emulator (docs/cuda.md): numbers, findings, planted faults.

These kernels have not run on a GPU. What is shown here is that they compute the op within the error-ratio rule under
every order in which their threads, warps, blocks and copies may run, that the checker has nothing to say about them,
and that it, or the numbers, notice each fault planted into them.
"""

import ctypes
import itertools

import pytest
import torch
from cuda_emulation import Device, library, needs_emulator, pointer
from cuda_emulation.linear_attention import CASES, Case, View, assert_right, call_of, lay_out, tensors

pytestmark = needs_emulator


def prepare(case: Case, device: Device, given: dict[str, torch.Tensor | None]):
    """The call, and its results (out, kv, k_sum) in the emulator's memory."""
    call = call_of(case)
    results = [
        device.output(lay_out(torch.empty(case.B, case.H, case.N, case.E, dtype=case.dtype), case.layout), "out"),
        device.output(torch.empty(case.B, case.H, case.D, case.E), "kv"),
        device.output(torch.empty(case.B, case.H, case.D), "k_sum"),
    ]
    placed = {name: device.input(x, name) for name, x in given.items() if x is not None} | {"out": results[0]}
    for name, x in placed.items():
        setattr(call, name, View.of(x))
    device.library.workspace_bytes.restype = ctypes.c_int64
    size = device.library.workspace_bytes(ctypes.byref(call))
    workspace = device.output(torch.empty(size, dtype=torch.uint8), "workspace") if size else None
    call.kv, call.k_sum, call.workspace = (pointer(x).value for x in (*results[1:], workspace))
    return call, results


def run(case: Case, entry: str = "forward", **schedule):
    device = Device(library("linear_attention"))
    call, results = prepare(case, device, tensors(case))
    return device.run(entry, ctypes.byref(call), **schedule), results


def report(findings) -> str:
    return "\n".join(map(str, findings))


SCHEDULES = list(zip(range(6), itertools.cycle(["late", "eager", "mixed"]), strict=False))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_right_and_nothing_is_found(case):
    seed, copies = SCHEDULES[CASES.index(case) % len(SCHEDULES)]
    findings, results = run(case, seed=seed, copies=copies)
    assert not findings, report(findings)
    assert_right(case, results)


@pytest.mark.parametrize("case", [Case(N=150, M=150, D=40, E=40, H=2), Case(N=65, M=1030, D=40, E=40, H=1)], ids=str)
def test_every_schedule_gives_the_same_bits(case):
    expected = None
    for seed, copies in SCHEDULES:
        findings, results = run(case, seed=seed, copies=copies)
        assert not findings, report(findings)
        expected = expected or results
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)), f"{seed}, {copies}"


def test_splits_are_many_where_heads_are_few_and_do_not_depend_on_the_batch():
    device = Device(library("linear_attention"))

    def blocks(**sizes):
        case = Case(D=40, E=40, N=1, **sizes)
        call, _ = prepare(case, device, tensors(case))
        assert not device.run("state", ctypes.byref(call), check=False)
        return device.counter("blocks")

    assert blocks(M=4096, H=2, multiprocessors=8) == 16
    assert blocks(M=4096, H=2, B=2, multiprocessors=8) == 2 * 16
    assert blocks(M=200, H=2, multiprocessors=8) == 2


def test_a_sample_alone_has_the_bits_that_it_has_in_a_batch():
    case = Case(N=65, M=700, B=3, D=40, E=40, multiprocessors=6)
    together = run(case, check=False)[1]
    device = Device(library("linear_attention"))
    alone = {name: None if x is None else x[1:2] for name, x in tensors(case).items()}
    call, results = prepare(Case(**{**vars(case), "B": 1}), device, alone)
    assert not device.run("forward", ctypes.byref(call), check=False)
    assert all(torch.equal(a[1:2], b) for a, b in zip(together, results, strict=True))


def test_not_a_number_stays_in_its_row_of_q_and_reaches_every_query_from_a_key():
    case = Case(N=40, M=40, D=40, E=40)
    for name in ("q", "k", "v"):
        device = Device(library("linear_attention"))
        given = tensors(case)
        given[name][0, 0, 7, 3] = float("nan")
        call, (out, *_) = prepare(case, device, given)
        assert not device.run("forward", ctypes.byref(call))
        bad = out[0, 0].isnan()
        if name == "q":
            assert bad[7].all() and not bad[:7].any() and not bad[8:].any()
        else:
            assert bad.any(-1).all()


def test_nothing_to_do_launches_nothing():
    device = Device(library("linear_attention"))
    for sizes in ({"N": 0}, {"B": 0}):
        case = Case(**sizes)
        call, _ = prepare(case, device, tensors(case))
        assert not device.run("apply", ctypes.byref(call)) and device.counter("launches") == 0


# Faults planted into the kernels, by name, with a case in which they matter; and whether the checker must see them
# (it finds wrong order and wrong places) or the numbers must (wrong arithmetic), under every schedule.
SPLIT = Case(N=1, M=1200, D=40, E=40, multiprocessors=8)
LONG = Case(N=200, M=200, D=40, E=40, multiprocessors=1)
FAULTS = {
    "no barrier between stages": (LONG, "checker"),
    "state waits for one copy too few": (LONG, "checker"),
    "state refills the stage in use": (LONG, "checker"),
    "state swaps fragment registers": (LONG, "numbers"),
    "k_sum counts rows past the end": (Case(N=16, M=50, D=40, E=40), "numbers"),
    "no barrier before the ticket": (SPLIT, "checker"),
    "no barrier after the ticket": (SPLIT, "checker"),
    "relaxed ticket": (SPLIT, "checker"),
    "one split is left out": (SPLIT, "numbers"),
    "kv is stored past its last row": (Case(N=16, M=16, D=40, E=40), "checker"),
    "no barrier after the peaks": (Case(N=16, M=16, D=40, E=40), "checker"),
    "no barrier after the state": (Case(N=16, M=16, D=40, E=40), "checker"),
    "apply waits for one copy too few": (LONG, "checker"),
    "no barrier after the queries": (LONG, "checker"),
    "half of a row's denominator": (LONG, "numbers"),
    "no barrier before the result": (LONG, "checker"),
    "no barrier after the result": (LONG, "checker"),
    "no barrier before the refill": (Case(N=400, M=16, D=200, E=40, multiprocessors=1), "checker"),
    "a row past the last is stored": (Case(N=50, M=16, D=40, E=40), "checker"),
    "float32: no barrier after phi": (Case(N=16, M=50, D=40, E=40, dtype=torch.float32), "checker"),
    "float32: no barrier before the queries": (
        Case(N=70, D=40, E=40, dtype=torch.float32, multiprocessors=1),
        "checker",
    ),
    "float32: no barrier after the queries": (
        Case(N=70, D=40, E=40, dtype=torch.float32, multiprocessors=1),
        "checker",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_under_every_schedule(fault):
    case, by = FAULTS[fault]
    for seed, copies in ((0, "late"), (1, "eager"), (2, "mixed")):
        findings, results = run(case, seed=seed, copies=copies, fault=fault)
        if by == "checker":
            assert findings, f"{fault}: not found with seed {seed}, {copies} copies"
        else:
            with pytest.raises(AssertionError, match="exceeds"):
                assert_right(case, results)
