"""The CUDA kernels of linear attention, run by the emulator (docs/cuda.md): numbers, findings, planted faults.

These kernels have not run on a GPU. What is shown here is that they compute the op within the error-ratio rule under
every order in which their threads, warps, blocks and copies may run, that the checker has nothing to say about them,
and that it, or the numbers, notice each fault planted into them.
"""

import ctypes
import itertools
from dataclasses import dataclass

import pytest
import torch
from cuda_emulation import Device, library, needs_emulator, pointer
from helpers.tester import assert_within_rule

from linattn import reference

pytestmark = needs_emulator

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # their positions are the kernels' codes
MAPS = ["identity", "relu", "elu1"]


class View(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 3)]


class Call(ctypes.Structure):
    """Call of cuda_emulation/linear_attention.cpp."""

    _fields_ = [
        *((name, View) for name in ("q", "k", "v", "q_denom", "k_denom", "out")),
        *((name, ctypes.c_void_p) for name in ("kv", "k_sum", "workspace")),
        *((n, ctypes.c_int64) for n in ("dtype", "B", "H", "N", "M", "D", "E", "feature_map", "normalize")),
        ("multiprocessors", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("scale", "inv_count", "eps")),
    ]


@dataclass(frozen=True)
class Case:
    """One call: sizes, and how the tensors lie in memory."""

    N: int = 64
    M: int = 64
    D: int = 64
    E: int = 64
    B: int = 1
    H: int = 1
    dtype: torch.dtype = torch.bfloat16
    feature_map: str = "elu1"
    normalize: bool = True
    denoms: bool = False
    layout: str = "bnhd"  # as models have it; bhnd: dense; packed: one interleaved qkv buffer; odd: rows begin anywhere
    multiprocessors: int = 4  # of the device that the splits are chosen for
    magnitude: float = 1.0  # of v

    def __str__(self):
        changed = {k: v for k, v in vars(self).items() if v != getattr(Case(), k)}
        return "-".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in changed.items()) or "default"


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """x (B, H, N, width) with the strides of a layout."""
    b, h, n, width = x.shape
    if layout == "bhnd":
        return x.contiguous()
    if layout == "bnhd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    # Two more tensors lie in between; `odd` shifts every row off the multiples of 16 bytes.
    extra = 1 if layout == "odd" else 0
    buffer = x.new_zeros(b, n, 3, h, width + extra)
    view = buffer[:, :, 1, :, extra:].transpose(1, 2)
    return view.copy_(x)


def tensors(case: Case) -> dict[str, torch.Tensor | None]:
    torch.manual_seed(0)
    shape = {"q": (case.N, case.D), "k": (case.M, case.D), "v": (case.M, case.E)}
    shape |= {"q_denom": (case.N, case.D), "k_denom": (case.M, case.D)}
    made = {name: torch.randn(case.B, case.H, *rest) for name, rest in shape.items()}
    if case.feature_map == "identity":  # so that denominators are not near 0
        made = {name: x if name == "v" else x.abs() + 0.1 for name, x in made.items()}
    made["v"] *= case.magnitude
    made = {name: lay_out(x.to(case.dtype), case.layout) for name, x in made.items()}
    return made if case.denoms else made | {"q_denom": None, "k_denom": None}


def prepare(case: Case, device: Device, given: dict[str, torch.Tensor | None]):
    """The call, and its results (out, kv, k_sum) in the emulator's memory."""
    call = Call(
        dtype=DTYPES.index(case.dtype), B=case.B, H=case.H, N=case.N, M=case.M, D=case.D, E=case.E,
        feature_map=MAPS.index(case.feature_map), normalize=case.normalize, multiprocessors=case.multiprocessors,
        scale=1 / case.M, inv_count=1 / case.M, eps=1e-4,
    )  # fmt: skip
    results = [
        device.output(lay_out(torch.empty(case.B, case.H, case.N, case.E, dtype=case.dtype), case.layout), "out"),
        device.output(torch.empty(case.B, case.H, case.D, case.E), "kv"),
        device.output(torch.empty(case.B, case.H, case.D), "k_sum"),
    ]
    placed = {name: device.input(x, name) for name, x in given.items() if x is not None} | {"out": results[0]}
    for name, x in placed.items():
        setattr(call, name, View(x.data_ptr(), (ctypes.c_int64 * 3)(*x.stride()[:3])))
    device.library.workspace_bytes.restype = ctypes.c_int64
    size = device.library.workspace_bytes(ctypes.byref(call))
    workspace = device.output(torch.empty(size, dtype=torch.uint8), "workspace") if size else None
    call.kv, call.k_sum, call.workspace = (pointer(x).value for x in (*results[1:], workspace))
    return call, results


def run(case: Case, entry: str = "forward", **schedule):
    device = Device(library("linear_attention"))
    call, results = prepare(case, device, tensors(case))
    return device.run(entry, ctypes.byref(call), **schedule), results


def assert_right(case: Case, results, what: str = "") -> None:
    """out, kv and k_sum against the definition in float64, by the error-ratio rule."""
    given = tensors(case)
    options = {"feature_map": case.feature_map}

    def evaluate(cast):
        x = {name: None if t is None else cast(t) for name, t in given.items()}
        state = reference.linear_attention_state(x["k"], x["v"], k_denom=x["k_denom"], **options)
        out = reference.linear_attention(
            x["q"], x["k"], x["v"], normalize=case.normalize, q_denom=x["q_denom"], k_denom=x["k_denom"], **options
        )
        return out, *state

    truth, plain = evaluate(lambda t: t.double()), plain_formula(case, given)
    for name, result, true, rough in zip(("out", "kv", "k_sum"), results, truth, plain, strict=True):
        assert_within_rule(f"{case} {what} {name}", result, true, rough)


def plain_formula(case: Case, given):
    """The formula by ordinary torch operations in the precision of the inputs; the state in float32, which it is."""

    def phi(x):
        if case.feature_map == "elu1":
            return torch.nn.functional.elu(x) + 1
        return x.relu() if case.feature_map == "relu" else x

    q, k, v, q_denom, k_denom = (given[n] for n in ("q", "k", "v", "q_denom", "k_denom"))
    kv = phi(k).float().transpose(-1, -2) @ v.float()
    k_sum = phi(k if k_denom is None else k_denom).float().sum(-2)
    out = phi(q) @ ((phi(k) / case.M).transpose(-1, -2) @ v)
    if case.normalize:
        mean = phi(k if k_denom is None else k_denom).mean(-2, keepdim=True)
        out = out / ((phi(q if q_denom is None else q_denom) * mean).sum(-1, keepdim=True) + 1e-4)
    return out, kv, k_sum


def report(findings) -> str:
    return "\n".join(map(str, findings))


SIZES = [1, 63, 64, 65, 150, 192]
SCHEDULES = list(zip(range(6), itertools.cycle(["late", "eager", "mixed"]), strict=False))

CASES = [
    *(Case(N=n, M=n, D=64, E=64, H=2, dtype=d) for n in SIZES for d in DTYPES[1:]),
    *(Case(N=n, M=n, D=d, E=d) for d in (40, 80, 128, 160, 256) for n in (65, 150)),
    *(Case(N=n, M=n, D=40, E=40, dtype=torch.float32) for n in SIZES),
    *(Case(N=33, M=65, D=d, E=d, dtype=torch.float32) for d in (64, 80, 128, 160, 256)),
    Case(N=33, M=600, D=40, E=40, dtype=torch.float32, multiprocessors=8),
    Case(N=20, M=40, D=9, E=37, dtype=torch.float32),
    *(Case(N=33, M=40, D=40, E=40, dtype=torch.float32, denoms=d, layout="odd") for d in (False, True)),
    Case(N=70, M=600, multiprocessors=8),  # splits
    Case(N=600, M=70, multiprocessors=1, D=40, E=40),  # several tiles per warp
    Case(N=33, M=90, D=24, E=72), Case(N=33, M=90, D=72, E=24), Case(N=20, M=40, D=8, E=200),
    Case(N=50, M=50, D=20, E=20), Case(N=50, M=50, D=9, E=37, layout="bhnd"),
    Case(N=50, M=50, B=2, H=2, D=40, E=40, layout="packed"), Case(N=50, M=50, B=2, layout="odd"),
    *(Case(N=70, M=70, D=40, E=40, feature_map=m, normalize=n) for m in MAPS for n in (True, False)),
    Case(N=70, M=150, denoms=True), Case(N=70, M=150, D=160, E=160, denoms=True, dtype=torch.float16),
    Case(N=64, M=192, dtype=torch.float16, magnitude=3000),  # kv is past 65504
]  # fmt: skip


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
