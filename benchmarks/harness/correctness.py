"""A sweep over every kernel against float64, for machines on which the tests may not run: no pytest, no second chance.

    python -m benchmarks.harness.correctness --device cuda --out correctness.json --budget 150

Outputs and all gradients of every backend that runs here, over head dims, dtypes, layouts and options. An error passes
when it is at most twice that of the plain formula evaluated in the same precision, plus two roundings of the largest
value. Memory that torch hands out is filled with NaN meanwhile, so an element that a kernel forgot to write fails.
Each check also asks for the same bits a second time, and for a sample alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

import linattn
from linattn import backend, reference

from .roofline import DTYPES

HEAD_DIMS = (40, 64, 80, 128, 160, 256)
#: Enough tokens that the Triton forward takes its two-pass form and every split is used; and few.
LONG, SHORT = 3001, 197


@dataclass(frozen=True)
class Check:
    """One configuration of linear_attention; `options` are keyword arguments of the op."""

    name: str
    dtype: str
    D: int
    E: int
    N: int = LONG
    M: int = LONG
    layout: str = "BNHD"
    denominators: bool = False
    options: dict = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"{self.name} D{self.D} E{self.E} N{self.N} M{self.M} {self.dtype} {self.layout}"


def checks(quick: bool = False) -> Iterator[Check]:
    """The important ones first: a run that is out of time leaves out the end."""
    if quick:
        for dtype in DTYPES:
            yield Check("plain", dtype, 40, 40, N=150, M=140)
        return
    for dtype in ("bfloat16", "float32", "float16"):
        for d in HEAD_DIMS:
            yield Check("plain", dtype, d, d)
        yield Check("few tokens", dtype, 64, 64, N=SHORT, M=SHORT)
        yield Check("few tokens", dtype, 40, 40, N=SHORT, M=SHORT)
        yield from _options(dtype)
    for d in (8, 17, 33, 96, 100, 250):
        for dtype in ("bfloat16", "float32"):
            yield Check("odd head dim", dtype, d, d)


def _options(dtype: str) -> Iterator[Check]:
    yield Check("own denominators", dtype, 64, 64, denominators=True)
    yield Check("not normalized", dtype, 40, 40, options={"normalize": False})
    yield Check("relu", dtype, 64, 64, options={"feature_map": "relu"})
    yield Check("identity, no division", dtype, 64, 64, options={"feature_map": "identity", "normalize": False})
    yield Check("(B, H, N, D) memory", dtype, 80, 80, layout="BHND")
    yield Check("M < D", dtype, 64, 64, N=SHORT, M=17)
    yield Check("M < N, E < D", dtype, 80, 40, M=1000)
    yield Check("one query", dtype, 64, 64, N=1)
    yield Check("one key", dtype, 40, 40, N=SHORT, M=1)
    yield Check("given scale and eps", dtype, 160, 160, options={"scale": 0.01, "eps": 1e-2})


def plain(q, k, v, feature_map="elu1", normalize=True, scale=None, eps=1e-4, q_denom=None, k_denom=None):
    """The formula in the precision of its inputs, as one writes it in PyTorch: the yardstick for a kernel's error."""
    m = k.shape[2]
    root = m**-0.5
    phi_q, phi_k = reference.feature(q, feature_map), reference.feature(k, feature_map)
    kv = (phi_k.transpose(-1, -2) * root) @ (v * root)
    out = phi_q @ (kv if scale is None else kv * (scale * m))
    if not normalize:
        return out
    phi_qd = phi_q if q_denom is None else reference.feature(q_denom, feature_map)
    phi_kd = phi_k if k_denom is None else reference.feature(k_denom, feature_map)
    return out / (phi_qd @ phi_kd.mean(2, keepdim=True).transpose(-1, -2) + eps)


def inputs(check: Check, device: torch.device, seed: int = 0) -> dict[str, torch.Tensor]:
    """q, k, v, the denominators where the check has them, and the output's gradient ("grad")."""
    sizes = {"q": (check.N, check.D), "k": (check.M, check.D), "v": (check.M, check.E), "grad": (check.N, check.E)}
    if check.denominators:
        sizes |= {"q_denom": (check.N, check.D), "k_denom": (check.M, check.D)}
    tensors = {}
    generator = torch.Generator().manual_seed(seed)
    for name, (tokens, dim) in sizes.items():
        shape = (2, 3, tokens, dim) if check.layout == "BHND" else (2, tokens, 3, dim)
        x = torch.randn(shape, generator=generator).to(device, DTYPES[check.dtype])
        tensors[name] = x if check.layout == "BHND" else x.transpose(1, 2)
    return tensors


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its kin hand out NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def results(function, tensors: dict[str, torch.Tensor], options: dict) -> dict[str, torch.Tensor]:
    """The output and the gradient of every input."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items() if name != "grad"}
    q, k, v = (leaves[name] for name in "qkv")
    denominators = {name: leaves[name] for name in ("q_denom", "k_denom") if name in leaves}
    out = function(q, k, v, **options, **denominators)
    # Without normalisation the denominators take no part, and their gradients are absent or zero.
    gradients = torch.autograd.grad(out, tuple(leaves.values()), tensors["grad"])
    return {"out": out.detach()} | {f"grad_{name}": g for name, g in zip(leaves, gradients, strict=True)}


def run_check(check: Check, name: str, device: torch.device) -> list[dict]:
    """One entry per compared tensor, and one for each property that failed."""
    tensors = inputs(check, device)
    exact = results(reference.linear_attention, {n: x.double() for n, x in tensors.items()}, check.options)
    yardstick = results(plain, tensors, check.options)
    with linattn.use_backend(name), poisoned_memory():
        ours = results(linattn.linear_attention, tensors, check.options)
        again = results(linattn.linear_attention, tensors, check.options)
        alone = results(linattn.linear_attention, {n: x[1:] for n, x in tensors.items()}, check.options)
        with torch.no_grad():  # takes another path than with gradients: the state is not kept
            denominators = {n: tensors[n] for n in ("q_denom", "k_denom") if n in tensors}
            no_grad = linattn.linear_attention(*(tensors[n] for n in "qkv"), **check.options, **denominators)
    ours["out, no gradients"], exact["out, no gradients"], yardstick["out, no gradients"] = (
        no_grad,
        exact["out"],
        yardstick["out"],
    )
    entries = []
    for quantity, value in ours.items():
        entry = compare(value, exact[quantity], yardstick[quantity])
        entries.append({"backend": name, "check": str(check), "quantity": quantity, **entry})
    for claim, others, part in (("same bits again", again, slice(None)), ("same bits alone", alone, slice(1, None))):
        for quantity, value in others.items():
            if not torch.equal(value, ours[quantity][part]):
                worst = (value.double() - ours[quantity][part].double()).abs().max().item()
                failure = {"quantity": f"{claim}: {quantity}", "error": worst, "allowed": 0.0, "ok": False}
                entries.append({"backend": name, "check": str(check), **failure})
    return entries


def compare(value: torch.Tensor, exact: torch.Tensor, yardstick: torch.Tensor) -> dict:
    """Largest error, what it may be, and whether it is; NaN never passes."""
    error = (value.double() - exact).abs().max().item() if value.numel() else 0.0
    plain_error = (yardstick.double() - exact).abs().nan_to_num(0.0, 0.0).max().item() if value.numel() else 0.0
    rounding = 2 * torch.finfo(value.dtype).eps * (exact.abs().max().item() if exact.numel() else 0.0)
    allowed = 2 * plain_error + rounding
    return {"error": error, "allowed": allowed, "ok": bool(error <= allowed)}


def far_offsets(name: str, device: torch.device) -> list[dict]:
    """The largest layer of a 16K x 8K image in SD 1.5: views of one fused buffer, element offsets beyond 2**31.

    Checked at rows of both ends, against float64 sums over the whole. Needs about 40 GiB.
    """
    tokens, heads, dim = 2_097_152, 8, 40
    free = torch.cuda.mem_get_info(device)[0]
    label = f"far offsets N{tokens} {heads}x{dim} bfloat16, fused q, k, v"
    if free < 45 << 30:
        return [{"backend": name, "check": label, "quantity": "left out: too little memory", "ok": True}]
    fused = torch.empty(2, tokens, 3, heads, dim, device=device, dtype=torch.bfloat16).normal_()
    q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))
    with linattn.use_backend(name), torch.no_grad():
        out = linattn.linear_attention(q, k, v)
    worst, allowed = 0.0, 0.0
    for b, h in ((0, 0), (1, heads - 1)):
        phi_k = reference.feature(k[b, h].double(), "elu1")
        kv, k_sum = phi_k.T @ v[b, h].double(), phi_k.sum(0)
        for rows in (slice(0, 512), slice(tokens - 512, tokens)):
            exact = reference.linear_attention_apply(q[b, h, rows].double()[None, None], kv, k_sum, tokens)[0, 0]
            worst = max(worst, (out[b, h, rows].double() - exact).abs().max().item())
            # phi(q), the state and the result are each rounded once to bfloat16.
            size = reference.feature(q[b, h, rows].double(), "elu1").amax() * (kv / tokens).abs().sum(0).amax()
            z = (reference.feature(q[b, h, rows].double(), "elu1") @ (k_sum / tokens)).amin()
            allowed = max(allowed, 2 * torch.finfo(torch.bfloat16).eps * (size / z + exact.abs().max()).item())
    return [
        {"backend": name, "check": label, "quantity": "out", "error": worst, "allowed": allowed, "ok": worst <= allowed}
    ]


def backends(device: torch.device) -> list[str]:
    """Our kernels that can run on this device (Triton's interpreter counts)."""
    dtype = torch.float32
    return [n for n in ("cuda", "triton", "cpu") if backend.why_not("_linear_attention", n, device, dtype) is None]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.harness.correctness", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file; written anew after every check")
    parser.add_argument(
        "--budget", type=float, default=600.0, help="seconds; what does not fit is left out and counted"
    )
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    device, began = torch.device(args.device), time.perf_counter()
    torch.backends.cuda.matmul.allow_tf32 = False
    names = backends(device)
    work = [(check, name) for check in checks(args.quick) for name in names]
    summary = {"backends": names, "checks": 0, "compared": 0, "left_out": 0, "failures": [], "worst": {}}

    def count(entries: list[dict]) -> None:
        summary["checks"] += bool(entries)
        for entry in entries:
            summary["compared"] += 1
            if not entry["ok"]:
                summary["failures"].append(entry)
                print("FAILED", json.dumps(entry), flush=True)
            elif entry.get("allowed"):
                key = f"{entry['backend']} {entry['quantity']}"
                share = entry["error"] / entry["allowed"]
                if share >= summary["worst"].get(key, {}).get("share", -1.0):
                    summary["worst"][key] = {"share": round(share, 3), "check": entry["check"]}
        if args.out:
            args.out.write_text(json.dumps(summary, indent=1))

    if device.type == "cuda" and not args.quick:
        for name in names:
            count(_guarded(lambda name=name: far_offsets(name, device), "far offsets", name))
            torch.cuda.empty_cache()
    for check, name in work:
        if time.perf_counter() - began > args.budget:
            summary["left_out"] += 1
            continue
        count(_guarded(lambda check=check, name=name: run_check(check, name, device), str(check), name))
    count([])  # writes the number of those left out
    text = f"{summary['checks']} checks, {summary['compared']} tensors compared on {', '.join(names) or 'no backend'}: "
    print(text + f"{len(summary['failures'])} failures; {summary['left_out']} checks left out for lack of time")
    return 1 if summary["failures"] or not summary["checks"] else 0


def _guarded(run, check: str, name: str) -> list[dict]:
    """A check that raises is a failure like any other; the next ones still run."""
    try:
        return run()
    except Exception as error:  # whatever a kernel's launch may raise
        message = f"raised {type(error).__name__}: {str(error).strip()[:300]}"
        return [{"backend": name, "check": check, "quantity": message, "ok": False}]


if __name__ == "__main__":
    sys.exit(main())
