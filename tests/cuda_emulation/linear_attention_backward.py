"""Backward passes of linear attention on which the CUDA kernels are tried: in the emulator, and on a GPU."""

from __future__ import annotations

import torch
from helpers.tester import GRADIENT, assert_within_rule

from linattn import reference

from .linear_attention import DTYPES, MAPS, SIZES, Case, lay_out, tensors

#: Results of the two passes, in the order of the ops' arguments.
APPLY = ("grad_q", "grad_q_denom", "grad_kv", "grad_k_sum")
STATE = ("grad_k", "grad_v", "grad_k_denom")
EPS = 1e-4


def inputs(case: Case) -> dict[str, torch.Tensor | None]:
    """Everything that both passes read: q, k, v, grad_out as the case lays them out, the state and its gradients."""
    given = tensors(case)
    wide = {name: None if x is None else x.double() for name, x in given.items()}
    state = reference.linear_attention_state(wide["k"], wide["v"], case.feature_map, wide["k_denom"])
    torch.manual_seed(1)
    out = torch.randn(case.B, case.H, case.N, case.E).to(case.dtype)
    given |= {"grad_out": lay_out(out, case.layout), "kv": state[0].float(), "k_sum": state[1].float()}
    # About as large as they come from apply: sums over queries, with q's spread, over the number of keys.
    given["grad_kv"] = torch.randn(case.B, case.H, case.D, case.E) / case.M
    given["grad_k_sum"] = torch.randn(case.B, case.H, case.D) / case.M
    return given


def outputs(case: Case, device: str = "cpu") -> dict[str, torch.Tensor | None]:
    """Memory for the results, full of NaN; None for those that the case has not."""
    sizes = {"grad_q": (case.N, case.D), "grad_q_denom": (case.N, case.D), "grad_k": (case.M, case.D)}
    sizes |= {"grad_v": (case.M, case.E), "grad_k_denom": (case.M, case.D)}
    made = {}
    for name, size in sizes.items():
        x = torch.full((case.B, case.H, *size), float("nan"), dtype=case.dtype, device=device)
        made[name] = lay_out(x, case.layout) if case.denoms or "denom" not in name else None
    made["grad_kv"] = torch.full((case.B, case.H, case.D, case.E), float("nan"), device=device)
    made["grad_k_sum"] = torch.full((case.B, case.H, case.D), float("nan"), device=device)
    return made


def plain_apply(case: Case, q, kv, k_sum, q_denom):
    """apply by ordinary torch operations in the precision of q, for autograd."""
    phi_q = reference.feature(q, case.feature_map)
    out = phi_q @ (kv / case.M).to(q.dtype)
    if case.normalize:
        phi_qd = phi_q if q_denom is None else reference.feature(q_denom, case.feature_map)
        out = out / (phi_qd @ (k_sum / case.M).to(q.dtype).unsqueeze(-1) + EPS)
    return out


def plain_state(case: Case, k, v, k_denom):
    phi_k = reference.feature(k, case.feature_map)
    phi_kd = phi_k if k_denom is None else reference.feature(k_denom, case.feature_map)
    return phi_k.mT @ v, (torch.ones_like(phi_kd[..., :1]).mT @ phi_kd).squeeze(-2)


def gradients(function, leaves, upstream):
    leaves = [None if x is None else x.detach().requires_grad_() for x in leaves]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    present = [x for x in leaves if x is not None]
    upstream = [g.to(x.dtype) for g, x in zip(upstream, results, strict=True)]
    found = iter(torch.autograd.grad(results, present, upstream, allow_unused=True))
    given = [None if x is None else (next(found), x) for x in leaves]
    return [None if pair is None else torch.zeros_like(pair[1]) if pair[0] is None else pair[0] for pair in given]


def assert_right(case: Case, results: dict[str, torch.Tensor | None], names: tuple[str, ...]) -> None:
    """The results against the definition in float64, by the error-ratio rule."""
    x = inputs(case)
    wide = {name: None if t is None else t.double() for name, t in x.items()}
    if names == APPLY:
        truth = reference.linear_attention_apply_backward(
            *(wide[n] for n in ("grad_out", "q", "kv", "k_sum")), case.M, case.feature_map, case.normalize, None, EPS,
            wide["q_denom"],
        )  # fmt: skip
        leaves = [x[n] for n in ("q", "kv", "k_sum", "q_denom")]
        q, kv, k_sum, q_denom = gradients(lambda *t: plain_apply(case, *t), leaves, [x["grad_out"]])
        plain = q, q_denom, kv, k_sum
    else:
        truth = reference.linear_attention_state_backward(
            *(wide[n] for n in ("grad_kv", "grad_k_sum", "k", "v")), case.feature_map, wide["k_denom"]
        )
        leaves = [x[n] for n in ("k", "v", "k_denom")]
        plain = gradients(lambda *t: plain_state(case, *t), leaves, [x["grad_kv"], x["grad_k_sum"]])
    for name, true, rough in zip(names, truth, plain, strict=True):
        if results[name] is not None:
            assert_within_rule(f"{case} {name}", results[name], true, rough, GRADIENT)


CASES = [
    *(Case(N=n, M=n, D=64, E=64, H=2, dtype=d) for n in SIZES for d in DTYPES[1:]),
    *(Case(N=n, M=n, D=d, E=d) for d, n in ((40, 65), (40, 150), (80, 65), (128, 65), (160, 65), (256, 65))),
    *(Case(N=n, M=n, D=40, E=40, dtype=torch.float32) for n in SIZES),
    *(Case(N=33, M=65, D=d, E=d, dtype=torch.float32) for d in (64, 80, 128, 160, 256)),
    Case(N=600, M=33, D=40, E=40, dtype=torch.float32, multiprocessors=8),
    Case(N=20, M=40, D=9, E=37, dtype=torch.float32),
    *(Case(N=33, M=40, D=40, E=40, dtype=torch.float32, denoms=d, layout="odd") for d in (False, True)),
    Case(N=600, M=70, D=40, E=40, multiprocessors=8),  # splits
    Case(N=300, M=300, D=40, E=40, multiprocessors=1),  # several tiles per warp
    Case(N=90, M=33, D=24, E=72), Case(N=90, M=33, D=72, E=24), Case(N=40, M=20, D=8, E=200),
    Case(N=40, M=50, D=20, E=20), Case(N=50, M=50, D=9, E=37, layout="bhnd"),
    Case(N=50, M=50, B=2, H=2, D=40, E=40, layout="packed"), Case(N=50, M=50, B=2, layout="odd"),
    *(Case(N=70, M=40, D=40, E=40, feature_map=m, normalize=n) for m in MAPS for n in (True, False)),
    Case(N=70, M=70, denoms=True), Case(N=33, M=33, D=160, E=160, denoms=True, dtype=torch.float16),
    Case(N=33, M=33, D=40, E=40, denoms=True, normalize=False),
    *(Case(N=40, M=33, D=256, E=256, denoms=True, dtype=d) for d in (torch.bfloat16, torch.float32)),
    Case(N=64, M=192, dtype=torch.float16, magnitude=3000),  # kv is past 65504
]  # fmt: skip
