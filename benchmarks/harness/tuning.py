"""Rows per step, warps and pipeline stages of the Triton kernels, tried out: `python -m benchmarks.harness.tuning`.

The kernels take one fixed choice per kernel and head dims (`blocks` in triton_kernels/linear_attention.py); nothing is
tuned while a model runs. This measures the alternatives, each launcher by itself, and writes them to a CSV from which
a person moves the winners into `blocks`.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
import time
from pathlib import Path

import torch

from .measure import Contender, cpu_sampler, cuda_sampler, quantile
from .roofline import DTYPES, l2_flush

COLUMNS = (
    "kernel",
    "B",
    "H",
    "N",
    "D",
    "dtype",
    "BLOCK_N",
    "num_warps",
    "num_stages",
    "p50_ms",
    "GB_per_s",
    "default",
    "error",
)
#: Launchers; each may be several kernels.
KERNELS = ("apply", "state", "apply_backward", "state_backward", "forward_short")
HEAD_DIMS = (64, 40, 128, 80, 160)


def candidates(default: dict) -> list[dict]:
    """The present choice first, then every other combination."""
    axes = {"BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)}
    grid = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    present = {name: default[name] for name in axes}
    return [present] + [choice for choice in grid if choice != present]


def launch(module, kernel: str, tokens: int, heads: int, batch: int, dim: int, dtype: torch.dtype, device):
    """(a function that launches one kernel on random data, the bytes that it must move)."""
    q, k, v, grad, out, out2 = (
        torch.randn(batch, tokens, heads, dim, device=device).to(dtype).transpose(1, 2) for _ in range(6)
    )
    kv = torch.rand(batch, heads, dim, dim, device=device)
    k_sum = torch.rand(batch, heads, dim, device=device) + 1
    grad_kv, grad_k_sum = torch.empty_like(kv), torch.empty_like(k_sum)
    inv = 1 / tokens
    row = batch * heads * tokens * dim * q.element_size()
    if kernel == "state":
        return lambda: module.state(k, v, None, 2, kv, k_sum), 2 * row
    if kernel == "apply":
        return lambda: module.apply(q, None, kv, k_sum, 2, True, inv, inv, 1e-4, out), 2 * row
    if kernel == "apply_backward":
        outputs = (out, None, grad_kv, grad_k_sum)
        return lambda: module.apply_backward(grad, q, None, kv, k_sum, 2, True, inv, inv, 1e-4, *outputs), 3 * row
    if kernel == "state_backward":
        return lambda: module.state_backward(kv, k_sum, k, v, None, 2, out, out2, None), 4 * row
    return lambda: module.forward(q, k, v, None, None, 2, True, inv, 1e-4, out, None, None), 4 * row


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.harness.tuning", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda", help="cpu: Triton's interpreter, for tests"
    )
    parser.add_argument("--out", type=Path, default=Path("tuning.csv"))
    parser.add_argument("--budget", type=float, default=300.0)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--dims", nargs="+", type=int, default=list(HEAD_DIMS))
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--most", type=int, help="alternatives per kernel and head dim")
    args = parser.parse_args(argv)
    from linattn.triton_kernels import linear_attention as module

    choose = getattr(module, "blocks", None)
    if choose is None:
        print("the Triton kernels offer no choice of blocks any more: this sweep has to follow them")
        return 1
    device, deadline = torch.device(args.device), time.perf_counter() + args.budget
    flush = l2_flush() if device.type == "cuda" else None
    args.out.parent.mkdir(parents=True, exist_ok=True)
    left_out = 0
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for dim, kernel in itertools.product(args.dims, args.kernels):
            default = choose(kernel, dim, dim)
            tokens = min(args.tokens, 512) if kernel == "forward_short" else args.tokens
            call, moved = launch(module, kernel, tokens, 8, 2, dim, DTYPES[args.dtype], device)
            for i, choice in enumerate(candidates(default)[: args.most]):
                if time.perf_counter() > deadline:
                    left_out += 1
                    continue
                sizes = {"B": 2, "H": 8, "N": tokens, "D": dim, "dtype": args.dtype}
                row = {"kernel": kernel, **sizes, **choice, "default": int(i == 0)}
                # A launcher may be several kernels: the present choice leaves each its own, others go to all.
                changed = choice if i else {}
                module.blocks = lambda *names, changed=changed: choose(*names) | changed
                try:
                    seconds = _median(call, flush)
                    row |= {"p50_ms": f"{seconds * 1e3:.5g}", "GB_per_s": f"{moved / seconds / 1e9:.5g}"}
                except Exception as error:  # out of shared memory, say: a result too
                    row["error"] = f"{type(error).__name__}: {str(error).strip()[:120]}"
                finally:
                    module.blocks = choose
                writer.writerow(row)
                file.flush()
                print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    print(f"written: {args.out}; {left_out} combinations left out for lack of time")
    return 0


def _median(call, flush: torch.Tensor | None) -> float:
    contender = Contender(call)
    sampler = cpu_sampler(contender) if flush is None else cuda_sampler(contender, flush)
    return quantile([sampler() for _ in range(3 if flush is None else 15)], 0.5)


if __name__ == "__main__":
    sys.exit(main())
