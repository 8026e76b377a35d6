"""Calls of linear attention on which the CUDA kernels are tried: in the emulator, and on a GPU where there is one."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from helpers.tester import assert_within_rule

from linattn import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # their positions are the kernels' codes
MAPS = ["identity", "relu", "elu1"]


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


class View(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 3)]

    @classmethod
    def of(cls, x: torch.Tensor) -> View:
        return cls(x.data_ptr(), (ctypes.c_int64 * 3)(*x.stride()[:3]))


class Call(ctypes.Structure):
    """Call of linear_attention.cpp."""

    _fields_ = [
        *((name, View) for name in ("q", "k", "v", "q_denom", "k_denom", "out")),
        *((name, ctypes.c_void_p) for name in ("kv", "k_sum", "workspace")),
        *((n, ctypes.c_int64) for n in ("dtype", "B", "H", "N", "M", "D", "E", "feature_map", "normalize")),
        ("multiprocessors", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("scale", "inv_count", "eps")),
        *((f"grad_{name}", View) for name in ("out", "q", "q_denom", "k", "v", "k_denom")),
        *((name, ctypes.c_void_p) for name in ("grad_kv", "grad_k_sum")),
    ]


def call_of(case: Case) -> Call:
    """The call without its tensors."""
    return Call(
        dtype=DTYPES.index(case.dtype), B=case.B, H=case.H, N=case.N, M=case.M, D=case.D, E=case.E,
        feature_map=MAPS.index(case.feature_map), normalize=case.normalize, multiprocessors=case.multiprocessors,
        scale=1 / case.M, inv_count=1 / case.M, eps=1e-4,
    )  # fmt: skip


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
    counted = phi(k if k_denom is None else k_denom).float()
    k_sum = (torch.ones_like(counted[..., :1]).transpose(-1, -2) @ counted).squeeze(-2)  # summed as the rest is
    out = phi(q) @ ((phi(k) / case.M).transpose(-1, -2) @ v)
    if case.normalize:
        mean = phi(k if k_denom is None else k_denom).mean(-2, keepdim=True)
        out = out / ((phi(q if q_denom is None else q_denom) * mean).sum(-1, keepdim=True) + 1e-4)
    return out, kv, k_sum


SIZES = [1, 63, 64, 65, 150, 192]
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
    *(Case(N=70, M=40, D=256, E=256, denoms=True, dtype=d) for d in (torch.bfloat16, torch.float32)),
    Case(N=64, M=192, dtype=torch.float16, magnitude=3000),  # kv is past 65504
]  # fmt: skip
