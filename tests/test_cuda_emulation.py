"""The emulator of CUDA kernels itself: what it must find, what it must not, and the layouts that it assumes.

Each small kernel of cuda_emulation/self_test.cpp is right or has one mistake. Fragment layouts are compared with the
index formulas of the PTX manual (mma.m16n8k16, ldmatrix), written down here once more.
"""

import ctypes
import itertools
from pathlib import Path

import pytest
import torch
from cuda_emulation import Device, library, needs_emulator, pointer

pytestmark = needs_emulator

CLEAN = [
    "sum_after_barrier", "warp_exchange", "producer_and_consumer", "last_block_sums", "atomics_alone", "copy_then_wait",
]  # fmt: skip
MISTAKES = {
    "sum_without_barrier": {"race: read after write", "race: write after read", "uninitialised read"},
    "overwrite_without_barrier": {"race: write after read", "race: read after write"},
    "warp_exchange_without_barrier": {"race: read after write", "race: write after read"},
    "overwrite_after_shuffle": {"race: write after read"},
    "first_of_many_readers_overwrites": {"race: write after read"},
    "reads_what_a_former_block_left": {"uninitialised read"},
    "warp_barrier_across_warps": {"race: read after write", "race: write after read", "uninitialised read"},
    "blocks_write_one_place": {"race: write after write"},
    "block_reads_what_another_writes": {"race: read after write", "race: write after read", "uninitialised read"},
    "uninitialised_shared": {"uninitialised read"},
    "uninitialised_global": {"uninitialised read"},
    "shared_out_of_bounds": {"out of bounds"},
    "global_out_of_bounds": {"out of bounds"},
    "misaligned": {"misaligned"},
    "writes_an_input": {"write to an input"},
    "barrier_after_exit": {"barrier after exit"},
    "lanes_diverge": {"divergent collective"},
    "lane_missing": {"divergent collective", "deadlock"},
    "producer_does_not_wait": {"race: read after write", "race: write after read"},
    "arrives_before_it_writes": {"race: read after write", "race: write after read", "uninitialised read"},
    "nobody_arrives": {"deadlock"},
    "barrier_counts_differ": {"barrier mismatch", "deadlock"},
    "last_block_sums_relaxed": {"race: read after write"},
    "last_block_sums_without_barrier_before": {"race: read after write"},
    "last_block_sums_without_barrier_after": {
        "race: read after write", "race: write after read", "race: write after write", "uninitialised read",
    },
    "ticket_without_barrier": {"race: read after write", "race: write after read", "uninitialised read"},
    "atomic_and_plain_store": {"race: write after write"},
    "copy_without_wait": {"race with a copy"},
    "copy_without_commit": {"race with a copy"},
    "copy_without_barrier": {
        "race: read after write", "race: write after read", "race with a copy", "uninitialised read",
    },
    "copy_over_what_is_read": {"race: write after read", "race: read after write", "race with a copy"},
    "copy_misaligned": {"misaligned"},
    "bank_conflict": {"bank conflict"},
}  # fmt: skip
SCHEDULES = [
    (seed, copies) for seed, copies in zip(range(6), itertools.cycle(["late", "eager", "mixed"]), strict=False)
]


def run(case, seed, copies):
    """(findings, in, out, counter) of one case."""
    device = Device(library("self_test"))
    writes_in = case.startswith(("last_block", "ticket"))
    values = device.input(torch.arange(64, dtype=torch.float32), "in", writable=writes_in)
    out = device.output(torch.empty(64), "out")
    counter = device.input(torch.zeros(1, dtype=torch.int32), "counter", writable=True)
    findings = device.run(
        "self_test", case.encode(), pointer(values), pointer(out), pointer(counter), seed=seed, copies=copies
    )
    return findings, values, out, counter


def test_every_case_is_listed_here():
    cases = library("self_test").self_test_cases
    cases.restype = ctypes.c_char_p
    assert set(cases().decode().split()) == {*CLEAN, *MISTAKES}


@pytest.mark.parametrize("case", CLEAN)
def test_right_kernels_have_no_findings_and_right_results(case):
    for seed, copies in SCHEDULES:
        findings, values, out, counter = run(case, seed, copies)
        assert not findings, "\n".join(map(str, findings))
        lanes = torch.arange(32, dtype=torch.float32)
        if case == "sum_after_barrier":
            assert out[:4].tolist() == [64.0] * 4
        elif case == "warp_exchange":
            assert out.tolist() == [float(i % 32 ^ 1) for i in range(64)]
        elif case == "producer_and_consumer":
            assert torch.equal(out[:32], lanes.flip(0) + 2)
        elif case == "last_block_sums":
            assert values[0] == 4 * 120 and counter == 4
        elif case == "atomics_alone":
            assert counter == 5 * 64
        elif case == "copy_then_wait":
            assert torch.equal(out[:32], lanes) and out[32:36].tolist() == [0.0] * 4


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_found_under_every_schedule_and_nothing_else_is_said(case):
    for seed, copies in SCHEDULES:
        kinds = {finding.kind for finding in run(case, seed, copies)[0]}
        assert kinds and kinds <= MISTAKES[case], f"seed {seed}, {copies}: {kinds}"


def test_bytes_between_the_rows_of_an_output_may_not_be_written():
    device = Device(library("self_test"))
    values = device.input(torch.arange(64, dtype=torch.float32), "in")
    out = device.output(torch.empty(128)[::2], "out")
    arguments = [b"warp_exchange", pointer(values), pointer(out), pointer(None)]
    findings = device.run("self_test", *arguments)
    assert [f.kind for f in findings] == ["out of bounds"] and "between its rows" in findings[0].text


def test_a_finding_names_both_source_lines():
    lines = (Path(__file__).parent / "cuda_emulation" / "self_test.cpp").read_text().splitlines()
    (finding,) = [f for f in run("copy_without_wait", 0, "late")[0] if f.kind == "race with a copy"]

    def source(place):
        name, number = place.split(" <- ")[0].split(":")
        assert name == "self_test.cpp"
        return lines[int(number) - 1]

    assert "p.out[lane()] = shared()[lane()]" in source(finding.at)
    assert "copy_async_16(shared()" in source(finding.other)


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float16", "bfloat16"])
def test_fragments_lie_as_the_ptx_manual_has_them(bfloat16):
    dtype = torch.bfloat16 if bfloat16 else torch.float16
    left = torch.randperm(256).sub(128).view(16, 16).to(dtype)
    right = torch.randperm(128).sub(64).view(8, 16).to(dtype)  # [n][k]
    sums = torch.randn(16, 8)
    device = Device(library("self_test"))
    inputs = [device.input(x, name) for x, name in ((left, "left"), (right, "right"), (sums, "sum"))]
    a, a_transposed, b = (device.output(torch.empty(32, 4, dtype=torch.int32), n) for n in ("a", "transposed", "b"))
    d = device.output(torch.empty(32, 4), "d")
    # Rows of 32 bytes: this small matrix does have bank conflicts.
    arguments = [pointer(x) for x in (*inputs, a, a_transposed, b, d)]
    findings = device.run("self_test_fragments", int(bfloat16), *arguments)
    assert {f.kind for f in findings} <= {"bank conflict"}

    lane = torch.arange(32)[:, None]
    group, member = lane // 4, lane % 4  # groupID and threadID_in_group of the manual
    i = torch.arange(8)[None, :]  # a0 .. a7
    row = group + torch.where((i // 2) % 2 == 1, 8, 0)
    column = member * 2 + i % 2 + torch.where(i >= 4, 8, 0)
    values = a.view(torch.int16).view(dtype).view(32, 8)
    assert torch.equal(values, left[row, column])

    i = torch.arange(4)[None, :]  # b0 .. b3
    k = member * 2 + i % 2 + torch.where(i >= 2, 8, 0)
    assert torch.equal(b[:, :2].contiguous().view(torch.int16).view(dtype).view(32, 4), right[group.expand(-1, 4), k])

    # .trans: every 8 x 8 matrix turned over where it stands.
    i = torch.arange(8)[None, :]
    row = torch.where((i // 2) % 2 == 1, 8, 0) + member * 2 + i % 2
    column = torch.where(i >= 4, 8, 0) + group
    assert torch.equal(a_transposed.view(torch.int16).view(dtype).view(32, 8), left[row, column])

    i = torch.arange(4)[None, :]  # c0 .. c3
    row, column = group + torch.where(i >= 2, 8, 0), member * 2 + i % 2
    expected = left.double() @ right.double().T + sums.double()
    assert torch.allclose(d.double(), expected[row, column], rtol=0, atol=1e-2)
    assert not torch.allclose(d.double(), (expected - sums)[row, column], rtol=0, atol=1e-2)


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float16", "bfloat16"])
def test_conversions_are_those_of_torch(bfloat16):
    dtype = torch.bfloat16 if bfloat16 else torch.float16
    emulator = library("self_test")
    bits = torch.arange(0, 65536, 97, dtype=torch.int32)
    wide = bits.to(torch.int16).view(dtype).float()
    finite = wide.isfinite()
    ours = torch.tensor([emulator.emulation_to_float(ctypes.c_uint16(int(x)), int(bfloat16)) for x in bits[finite]])
    assert torch.equal(ours, wide[finite])
    x = torch.cat(
        [torch.randn(500), torch.randn(500) * 1e-6, wide[finite][:300] * 1.0004, torch.tensor([65520.0, 1e9])]
    )
    ours = [emulator.emulation_from_float(ctypes.c_float(float(value)), int(bfloat16)) for value in x]
    assert torch.equal(torch.tensor(ours, dtype=torch.int32).to(torch.int16), x.to(dtype).view(torch.int16))


@pytest.mark.parametrize(
    "grid, threads, shared", [((0, 1), 32, 0), ((1, 65536), 32, 0), ((1, 1), 1025, 0), ((1, 1), 32, 164 * 1024)]
)
def test_what_a_gpu_would_not_launch_is_refused(grid, threads, shared):
    device = Device(library("self_test"))
    with pytest.raises(RuntimeError, match="emulation"):
        device.run("self_test_launch", ctypes.c_int64(grid[0]), ctypes.c_int64(grid[1]), threads, shared)
    assert device.run("self_test_launch", ctypes.c_int64(2), ctypes.c_int64(1), 32, 1024) == []


def test_a_fault_that_no_kernel_has_is_an_error():
    device = Device(library("self_test"))
    with pytest.raises(AssertionError, match="has no fault"):
        device.run("self_test_launch", ctypes.c_int64(1), ctypes.c_int64(1), 32, 0, fault="no such thing")
