"""Table support: what each backend runs, and where that was tested."""

from __future__ import annotations

from benchmarks.harness.environment import ROOT

from . import _format as f

#: What the tests of the repository, which run without a GPU, do with each backend.
TESTED = {
    "reference": "CI",
    "cpu": "CI, every instruction set the machine has; address and undefined-behaviour sanitizers",
    "triton": "CI: Triton's interpreter, and ahead-of-time compilation for sm_80 and sm_90",
    "cuda": "CI: an emulator of the GPU on a CPU ([docs/cuda.md](docs/cuda.md)), and nvcc for sm_80 and sm_90a",
}
DTYPES = {
    "reference": "float64, float32, bfloat16, float16",
    "cpu": "float32, bfloat16, float16",
    "triton": "float32, bfloat16, float16",
    "cuda": "float32, bfloat16, float16; forward only",
}
DEVICES = {
    "reference": "any",
    "cpu": "x86-64: AVX-512 with bf16, AVX-512, AVX2; any other CPU by portable code",
    "triton": "NVIDIA GPUs from compute capability 8.0",
    "cuda": "NVIDIA GPUs from compute capability 8.0, where `LINATTN_BACKEND=cuda` asks for it",
}
#: Op family -> its ops; the family's name is that of its kernel files.
FAMILIES = {
    "linear_attention": "linear_attention, linear_attention_state, linear_attention_apply",
    "window_attention": "window_attention, pool_tokens",
    "block_causal_attention": "block_causal_attention",
}


def exists(backend: str, family: str) -> bool:
    """Whether the checkout has this backend's kernels of a family."""
    files = {
        "reference": "linattn/reference.py",
        "cpu": f"csrc/cpu/{family}.cpp",
        "triton": f"triton_kernels/{family}.py",
        "cuda": f"csrc/cuda/{family}.cu",
    }
    return (ROOT / files[backend]).exists()


def render(results) -> str:
    lines = []
    for family, ops in FAMILIES.items():
        for backend in DTYPES:
            if not exists(backend, family):
                lines.append([ops, backend, "none yet", "", ""])
                continue
            lines.append([ops, backend, DTYPES[backend], DEVICES[backend], _tested(results, family, backend)])
    return f.table(["ops, forward and backward", "backend", "dtypes", "runs on", "tested"], lines)


def _tested(results, family: str, backend: str) -> str:
    if backend not in ("triton", "cuda"):
        return TESTED[backend]
    ran = sorted(
        {
            row["device"]
            for rows in results.of("cuda").values()
            for row in f.ours(rows, family)
            if row["provider"] == f"linattn-{backend}"
        }
    )
    return TESTED[backend] + ("; on " + ", ".join(ran) if ran else "; **never run on a GPU yet**")
