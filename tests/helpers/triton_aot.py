"""Compiles Triton kernels for GPUs that are not there and reads back what the compiler made of them.

Run as a program in a process without TRITON_INTERPRET (interpreted kernels cannot be compiled):

    python triton_aot.py '[["state", 40, 40, "bf16", 90, {}], ...]'     one JSON line per entry on stdout

An entry names a kernel of linear_attention.py or linear_attention_wide.py, head dims, dtype, architecture and constants
that differ from the usual (an elu1 map, normalised, no denominators, rows aligned to 16 bytes).
"""

import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FLOAT32_POINTERS = {"KV", "KSUM", "GKV", "GKSUM", "MEAN", "PART0", "PART1", "OUT0", "OUT1"}
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def configuration(kernel, D, E, dtype):
    """(jit function, constants, warps, stages) as the launchers choose them."""
    import torch
    import triton

    try:
        from linattn.triton_kernels import common, linear_attention, linear_attention_wide
    except ModuleNotFoundError:
        sys.path.insert(0, str(Path(__file__).parents[2]))
        from triton_kernels import common, linear_attention, linear_attention_wide
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    if kernel == "reduce":
        return common.reduce_kernel, {"BLOCK": 1024}, 4, 3
    if kernel.startswith("wide_"):
        function = getattr(linear_attention_wide, f"{kernel.removesuffix('_weighted')}_kernel")
        holds_rows = kernel == "wide_grad_q"
        choice = dict(linear_attention_wide.row_blocks(kind, holds_rows))
        if "state" in kernel:
            choice = dict(linear_attention_wide.state_blocks(D, E, kind))
        D0, D1 = common.head_tile(D)
        E0, E1 = common.head_tile(E)
        if holds_rows and dtype != "fp32":
            D0, D1 = (128, 128) if D > 128 else (triton.next_power_of_2(D), 0)
        choice |= {"D0": D0, "D1": D1, "E0": E0, "E1": E1}
    else:
        base = "apply_backward" if kernel.startswith("apply_backward") else kernel
        function = getattr(linear_attention, f"{base}_kernel")
        choice = dict(linear_attention.blocks(kernel, D, E))
    choice |= {
        "D": D, "E": E, "FEATURE": 2, "HAS_DENOM": False, "HAS_QD": False, "HAS_KD": False, "NORMALIZE": True,
        "ROWS": not kernel.endswith("_state"), "STATE": not kernel.endswith("_rows"),
        "WEIGHTED": kernel.endswith("_weighted"), "UNIT": 4 if dtype == "fp32" else 8,
    }  # fmt: skip
    return function, choice, choice.pop("num_warps"), choice.pop("num_stages")


def compile_one(kernel, D, E, dtype, arch, constants):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    function, choice, warps, stages = configuration(kernel, D, E, dtype)
    constants = {n: v for n, v in {**choice, **constants}.items() if n in function.arg_names}
    signature, attributes = {}, {}
    for position, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name[0].isupper():
            signature[name] = "*fp32" if name in FLOAT32_POINTERS else f"*{dtype}"
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in ("scale", "inv_count", "eps") else "i32"
    index = {name: position for position, name in enumerate(function.arg_names)}
    source = ASTSource(
        fn=function, signature=signature, constexprs={(index[n],): v for n, v in constants.items()}, attrs=attributes
    )
    compiled = compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": stages})
    return compiled, warps


def report(kernel, D, E, dtype, arch, constants):
    import triton

    compiled, warps = compile_one(kernel, D, E, dtype, arch, constants)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
        sass = subprocess.run([tools / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True)
    numbers = {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass.stdout, re.M)
    count = collections.Counter(lines)
    ptx = compiled.asm["ptx"]
    tensor_core = "wgmma" if "wgmma.mma_async" in ptx else "mma" if re.search(r"\bmma\.sync|tcgen05\.mma", ptx) else ""
    return {
        **numbers,
        "warps": warps,
        "shared": compiled.metadata.shared,
        "tensor_core": tensor_core,
        "spills": sum(n for op, n in count.items() if op.split(".")[0] in ("LDL", "STL")),
        "global": {op: n for op, n in count.items() if op.split(".")[0] in ("LDG", "STG", "LDGSTS")},
    }


def main():
    for entry in json.loads(sys.argv[1]):
        try:
            result = report(*entry)
        except Exception as error:  # what the compiler raises is its own affair; the test shows it
            result = {"error": f"{type(error).__name__}: {error}"[-2000:]}
        print(json.dumps([entry, result]), flush=True)


if __name__ == "__main__":
    main()
