"""What the compiler makes of the Triton kernels, without a GPU: tensor cores, no spills, shared memory, wide accesses.

The head dims of Stable Diffusion on sm_90 and a sample of the rest by default; LINATTN_AOT_FULL=1 compiles everything
for sm_80, sm_90 and sm_100 (about ten minutes).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
import torch
from helpers.triton_aot import SHARED_LIMIT

try:
    from linattn.triton_kernels import linear_attention
except ModuleNotFoundError:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from triton_kernels import linear_attention

HELPER = Path(__file__).parent / "helpers" / "triton_aot.py"
PROCESSES = 2
FULL = os.environ.get("LINATTN_AOT_FULL", "0") != "0"


def launched(D, E, dtype, arch):
    """The kernels that the five launchers start for these head dims on this architecture."""
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]

    def resident(kernel):
        return linear_attention.resident(kernel, D, E, kind, {80: "mma", 90: "wgmma"}.get(arch, ""))

    yield "state" if resident("state") else "wide_state"
    yield "apply" if resident("apply") else "wide_apply"
    if resident("forward_short"):
        yield "forward_short"
    if resident("apply_backward_both"):
        yield "apply_backward_both"
    else:
        yield "apply_backward_rows" if resident("apply_backward_rows") else "wide_grad_q"
        yield "apply_backward_state" if resident("apply_backward_state") else "wide_state_weighted"
    if resident("state_backward"):
        yield "state_backward"
    else:
        yield "wide_grad_k"
        if resident("apply"):
            yield "wide_apply"


def cases():
    if FULL:
        for arch in (80, 90, 100):
            yield "reduce", 64, 64, "bf16", arch, {}
            for dtype in ("bf16", "fp16", "fp32"):
                for D in (16, 40, 64, 80, 96, 128, 160, 256):
                    for kernel in launched(D, D, dtype, arch):
                        yield kernel, D, D, dtype, arch, {}
                        if kernel == "forward_short":
                            yield kernel, D, D, dtype, arch, {"STATE": False}
        return
    for D in (40, 80):
        for kernel in launched(D, D, "bf16", 90):
            yield kernel, D, D, "bf16", 90, {}
    for arch, D, kernels in (
        (90, 64, ("state", "apply", "apply_backward_both", "state_backward")),
        (90, 160, ("state", "apply", "wide_grad_q", "wide_grad_k")),
        (80, 64, ("state", "apply", "wide_grad_q", "wide_grad_k")),
        (80, 80, ("wide_state", "wide_apply")),
    ):
        for kernel in kernels:
            assert kernel in launched(D, D, "bf16", arch)
            yield kernel, D, D, "bf16", arch, {}
    yield "forward_short", 80, 80, "bf16", 90, {"STATE": False}
    yield "state", 128, 128, "fp16", 90, {}
    yield "apply", 128, 128, "fp16", 90, {}
    yield "wide_state", 64, 64, "fp32", 90, {}
    yield "wide_apply", 64, 64, "fp32", 80, {}
    yield "reduce", 64, 64, "bf16", 90, {}
    # Other branches of the source, which the interpreter executes but does not type-check.
    yield "forward_short", 24, 48, "fp16", 90, {"HAS_QD": True, "HAS_KD": True, "STATE": True, "FEATURE": 0, "UNIT": 1}
    yield "apply_backward_both", 24, 48, "fp16", 90, {"HAS_DENOM": True, "FEATURE": 1}
    yield "state_backward", 24, 48, "fp16", 90, {"HAS_DENOM": True, "FEATURE": 0}
    yield "apply_backward_both", 32, 32, "bf16", 90, {"NORMALIZE": False}
    yield "wide_state_weighted", 80, 80, "fp32", 90, {"HAS_DENOM": True}
    yield "wide_grad_k", 160, 160, "fp32", 90, {"HAS_DENOM": True}
    yield "wide_grad_q", 80, 80, "fp32", 90, {"HAS_DENOM": True}


CASES = list(cases())


def name(case):
    kernel, D, E, dtype, arch, constants = case
    return "-".join([kernel, f"{D}" if D == E else f"{D}x{E}", dtype, f"sm{arch}", *map(str.lower, constants)])


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Reports by case name; two processes share the work, each with a cache of its own."""
    jobs = []
    for part in range(PROCESSES):
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
        command = [sys.executable, str(HELPER), json.dumps(CASES[part::PROCESSES])]
        jobs.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    results = {}
    for job in jobs:
        output, errors = job.communicate()
        assert job.returncode == 0, errors[-4000:]
        for line in output.splitlines():
            case, result = json.loads(line)
            results[name(case)] = result
    return results


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_compiler_agrees(case, reports):
    kernel, D, E, dtype, arch, constants = case
    result = reports[name(case)]
    assert "error" not in result, result["error"]
    assert result["shared"] <= SHARED_LIMIT[arch]
    if constants.get("UNIT", 16) > 1:  # rows aligned to nothing are read element by element: right, not fast
        assert result["stack"] == 0 and result["local"] == 0 and result["spills"] == 0, result
    if kernel == "reduce":
        return
    if dtype != "fp32":  # float32 multiplies exactly, on the FMA units
        assert result["tensor_core"], "no tensor core instruction"
        if arch == 90 and D >= 40 and E >= 40:
            assert result["tensor_core"] == "wgmma"
    if constants.get("UNIT", 16) > 1 and D % 8 == 0 and E % 8 == 0:
        narrow = {op: n for op, n in result["global"].items() if not re.search(r"\.(128|64)\b", op)}
        wide = {op: n for op, n in result["global"].items() if re.search(r"\.128\b", op)}
        assert sum(wide.values()) > 0
        # Vectors of D float32 numbers (k_sum) are the only accesses of 4 bytes.
        assert sum(narrow.values()) <= 16, result["global"]
