"""The CUDA kernels of linear attention's backward pass, run by the emulator (docs/cuda.md).

These kernels have not run on a GPU. Shown here, as for the forward: the gradients keep within the error-ratio rule
whatever the order in which threads, warps, blocks and copies run; the checker has nothing to say; faults planted into
the kernels are noticed by it or by the numbers.
"""

import ctypes
import itertools

import pytest
import torch
from cuda_emulation import Device, library, needs_emulator, pointer
from cuda_emulation.linear_attention import Case, View, call_of
from cuda_emulation.linear_attention_backward import APPLY, CASES, STATE, assert_right, inputs, outputs

pytestmark = needs_emulator

READ = {
    APPLY: ("grad_out", "q", "q_denom", "kv", "k_sum"),
    STATE: ("k", "v", "k_denom", "grad_kv", "grad_k_sum"),
}
ENTRY = {APPLY: "apply_backward", STATE: "state_backward"}


def prepare(case: Case, names: tuple[str, ...], device: Device, given=None):
    """The call of one of the passes, and its results by name in the emulator's memory."""
    given = inputs(case) if given is None else given
    call = call_of(case)
    empty = outputs(case)
    results = {name: None if empty[name] is None else device.output(empty[name], name) for name in names}
    placed = {name: device.input(given[name], name) for name in READ[names] if given[name] is not None}
    for name, x in (placed | results).items():
        if x is not None:
            setattr(call, name, View.of(x) if x.dim() == 4 and "kv" not in name else pointer(x).value)
    size_of = device.library.apply_backward_workspace_bytes
    size_of.restype = ctypes.c_int64
    size = size_of(ctypes.byref(call)) if names == APPLY else 0
    if size:
        call.workspace = pointer(device.output(torch.empty(size, dtype=torch.uint8), "workspace")).value
    return call, results


def run(case: Case, names: tuple[str, ...], given=None, **schedule):
    device = Device(library("linear_attention"))
    call, results = prepare(case, names, device, given)
    return device.run(ENTRY[names], ctypes.byref(call), **schedule), results


def report(findings) -> str:
    return "\n".join(map(str, findings))


def same_bits(a: dict, b: dict) -> bool:
    return all(x is None or torch.equal(x, b[name]) for name, x in a.items())


PASSES = pytest.mark.parametrize("names", [APPLY, STATE], ids=["apply", "state"])
SCHEDULES = list(zip(range(6), itertools.cycle(["late", "eager", "mixed"]), strict=False))


@PASSES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_right_and_nothing_is_found(case, names):
    seed, copies = SCHEDULES[CASES.index(case) % len(SCHEDULES)]
    findings, results = run(case, names, seed=seed, copies=copies)
    assert not findings, report(findings)
    assert_right(case, results, names)


@PASSES
@pytest.mark.parametrize(
    "case",
    [
        Case(N=520, M=40, D=40, E=40, multiprocessors=8),
        Case(N=33, M=33, D=200, E=40),  # rows take turns in one tile
        Case(N=33, M=33, D=40, E=40, dtype=torch.float32),
    ],
    ids=str,
)
def test_every_schedule_gives_the_same_bits(case, names):
    expected = None
    for seed, copies in SCHEDULES:
        findings, results = run(case, names, seed=seed, copies=copies)
        assert not findings, report(findings)
        expected = expected or results
        assert same_bits(results, expected), f"{seed}, {copies}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_sample_alone_has_the_gradients_that_it_has_in_a_batch(dtype):
    case = Case(N=520, M=40, B=3, D=40, E=40, multiprocessors=6, dtype=dtype)
    together = run(case, APPLY, check=False)[1]
    given = {name: None if x is None else x[1:2] for name, x in inputs(case).items()}
    alone = run(Case(**{**vars(case), "B": 1}), APPLY, given, check=False)[1]
    assert same_bits(alone, {name: None if x is None else x[1:2] for name, x in together.items()})


def test_rows_and_sums_are_split_where_heads_are_few():
    device = Device(library("linear_attention"))

    def blocks(tokens):
        case = Case(N=tokens, M=16, D=40, E=40, H=2, multiprocessors=8)
        call, _ = prepare(case, APPLY, device)
        assert not device.run("apply_backward", ctypes.byref(call), check=False)
        assert device.counter("launches") == 2
        return device.counter("blocks")

    assert blocks(2048) == 2 * 8 + 2 * 8  # of 256 tokens each: those of the rows, then those of the sums
    assert blocks(256) == 2 * 4 + 2 * 1  # rows by 64 tokens instead of 128


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_not_a_number_in_a_query_stays_in_its_row_and_reaches_the_state(dtype):
    case = Case(N=40, M=40, D=40, E=40, dtype=dtype)
    given = inputs(case)
    given["q"][0, 0, 7, 3] = float("nan")
    findings, results = run(case, APPLY, given)
    assert not findings, report(findings)
    bad = results["grad_q"][0, 0].isnan()
    assert bad[7].all() and not bad[:7].any() and not bad[8:].any()
    assert results["grad_kv"].isnan().any() and results["grad_k_sum"].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_without_division_no_denominator_is_looked_at(dtype):
    case = Case(N=40, M=40, D=40, E=40, dtype=dtype, normalize=False, denoms=True)
    given = inputs(case)
    given["q_denom"].fill_(float("nan"))
    given["k_sum"].fill_(float("nan"))
    findings, results = run(case, APPLY, given)
    assert not findings, report(findings)
    assert not results["grad_q"].isnan().any()
    assert not results["grad_q_denom"].any() and not results["grad_k_sum"].any()


def test_no_query_gives_a_gradient_of_zero():
    for sizes, launches in (({"N": 0}, 0), ({"B": 0}, 0)):
        device = Device(library("linear_attention"))
        case = Case(**sizes)
        call, results = prepare(case, APPLY, device)
        assert not device.run("apply_backward", ctypes.byref(call)) and device.counter("launches") == launches
        assert not results["grad_kv"].any() and not results["grad_k_sum"].any()


# Faults planted into the kernels, by name, with a pass and a case in which they matter; and whether the checker must
# see them (wrong order, wrong places) or the numbers must (wrong arithmetic), under every schedule.
SMALL = Case(N=20, M=20, D=40, E=40)
LONG = Case(N=200, M=200, D=40, E=40, multiprocessors=1)
TURNS = Case(N=20, M=20, D=200, E=40)
SPLIT = Case(N=1200, M=16, D=40, E=40, multiprocessors=8)
FLOAT32 = Case(N=70, M=70, D=40, E=40, dtype=torch.float32, multiprocessors=1)
FAULTS = {
    "no barrier after the peaks": (STATE, SMALL, "checker"),
    "no barrier after the state": (STATE, SMALL, "checker"),
    "rows wait for one copy too few": (APPLY, SMALL, "checker"),
    "no barrier after the rows": (APPLY, SMALL, "checker"),
    "rows swap fragment registers": (STATE, SMALL, "numbers"),
    "no barrier after the product": (APPLY, TURNS, "checker"),
    "no barrier after the second rows": (STATE, TURNS, "checker"),
    "half of a row's product": (APPLY, SMALL, "numbers"),
    "a weight past the last is stored": (APPLY, SMALL, "checker"),
    "no barrier before the gradients": (APPLY, TURNS, "checker"),
    "no barrier after the gradients": (STATE, SMALL, "checker"),
    "no barrier before the second gradients": (STATE, TURNS, "checker"),
    "a row past the last is stored": (STATE, SMALL, "checker"),
    "no barrier between stages": (APPLY, LONG, "checker"),
    "state waits for one copy too few": (APPLY, LONG, "checker"),
    "half of a row's sum": (APPLY, SMALL, "numbers"),
    "relaxed ticket": (APPLY, SPLIT, "checker"),
    "one split is left out": (APPLY, SPLIT, "numbers"),
    "float32: no barrier before the rows": (STATE, FLOAT32, "checker"),
    "float32: no barrier after the rows": (APPLY, FLOAT32, "checker"),
    "float32: half of a row's product": (APPLY, FLOAT32, "numbers"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_under_every_schedule(fault):
    names, case, by = FAULTS[fault]
    for seed, copies in ((0, "late"), (1, "eager"), (2, "mixed")):
        findings, results = run(case, names, seed=seed, copies=copies, fault=fault)
        if by == "checker":
            assert findings, f"{fault}: not found with seed {seed}, {copies} copies"
        else:
            with pytest.raises(AssertionError, match="exceeds"):
                assert_right(case, results, names)
