"""One tester for every op, backend and device: same inputs, a float64 definition, and the error-ratio rule.

A result passes when

    max |result - truth|  <=  factor * max |plain - truth| + two roundings

where truth is the definition in float64, plain is the same formula by ordinary torch operations in the precision of the
inputs, and a rounding is what adding and subtracting 0.3 does to the truth in the result's dtype. The factor is 2 for
outputs and 3 for gradients, as flash-attention has it: a gradient passes through more roundings, and both sides of the
comparison are maxima of noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest
import torch

import linattn
from linattn import backend as backends

Tensor = torch.Tensor
FORWARD, GRADIENT = 2.0, 3.0
#: Tokens of all heads together that Triton's interpreter gets through in about a second, forward and backward.
INTERPRETED_TOKENS = {torch.float32: 48, torch.float16: 160, torch.bfloat16: 160}


def targets(op: str = "linear_attention", only: tuple[str, ...] = backends.BACKENDS) -> Iterator[pytest.param]:
    """(backend, device) pairs as test parameters; what cannot run here is skipped with the library's own reason."""
    for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        for name in only:
            if name == {"cpu": "cuda", "cuda": "cpu"}[device]:
                continue
            if name == "triton" and device == "cpu" and torch.cuda.is_available():
                continue  # the kernels run for real; interpreted and compiled they cannot be in one process
            reason = backends.why_not(op, name, torch.device(device), torch.float32)
            marks = [pytest.mark.skip(reason=f"backend {name} on {device}: {reason}")] if reason else []
            marks += [pytest.mark.gpu] if device == "cuda" else []
            yield pytest.param(name, device, id=f"{name}-{device}", marks=marks)


def on_every_backend(op: str = "linear_attention", only: tuple[str, ...] = backends.BACKENDS):
    """Decorator: the test runs once for each (backend, device)."""
    return pytest.mark.parametrize(("backend", "device"), list(targets(op, only)))


def interpreted(backend: str, device: str) -> bool:
    """Whether this target is Triton's interpreter, where tests must be small."""
    return backend == "triton" and device == "cpu"


def skip_if_slow(backend: str, device: str, tokens: int, dtype: torch.dtype) -> None:
    """Skip a case with more tokens (over all heads, queries and keys) than Triton's interpreter takes in a second."""
    if interpreted(backend, device) and tokens > INTERPRETED_TOKENS.get(dtype, 48):
        pytest.skip("too large for Triton's interpreter")


def evaluate(
    function: Callable, tensors: Mapping[str, Tensor | None], options: Mapping, upstream: tuple[Tensor, ...] | None
) -> dict[str, Tensor]:
    """{"output 0": ...} of function(**tensors, **options) and, with upstream, {"gradient of q": ...} beside it."""
    leaves = {
        name: None if x is None else x.detach().requires_grad_(upstream is not None) for name, x in tensors.items()
    }
    outputs = function(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    if upstream is not None:
        present = {name: x for name, x in leaves.items() if x is not None}
        grads = [g.to(x.dtype) for g, x in zip(upstream, outputs, strict=True)]
        # A tensor without a part in the result (q_denom where nothing is divided) has gradient zero, or None.
        found = torch.autograd.grad(outputs, list(present.values()), grads, allow_unused=True)
        for (name, x), g in zip(present.items(), found, strict=True):
            results[f"gradient of {name}"] = torch.zeros_like(x) if g is None else g
    return results


def roundings(truth: Tensor, dtype: torch.dtype) -> float:
    """Two rounding steps at the magnitude of the data."""
    if truth.numel() == 0:
        return 0.0
    x = truth.to(dtype)
    return 2 * ((x + 0.3 - 0.3) - x).abs().max().item()


def distance(x: Tensor, truth: Tensor) -> float:
    """max |x - truth|; NaN where x has one."""
    return (x.double() - truth.to(x.device)).abs().max().item() if x.numel() else 0.0


def assert_within_rule(what: str, result: Tensor, truth: Tensor, plain: Tensor, factor: float = FORWARD) -> None:
    """The error-ratio rule for one tensor."""
    assert result.shape == truth.shape, f"{what}: shape {tuple(result.shape)}, expected {tuple(truth.shape)}"
    assert truth.isfinite().all(), f"{what}: the truth is not finite, this case tests nothing"
    allowed = factor * distance(plain, truth) + roundings(truth, result.dtype)
    assert allowed < float("inf"), f"{what}: the plain formula is not finite, this case tests nothing"
    error = distance(result, truth)
    assert error <= allowed, f"{what}: error {error:.3e} exceeds {allowed:.3e} = {factor} * plain + two roundings"


def check(
    op: Callable,
    definition: Callable,
    plain: Callable,
    tensors: Mapping[str, Tensor | None],
    options: Mapping,
    backend: str,
    gradients: bool = True,
) -> dict[str, Tensor]:
    """Run op under `backend` and hold every output and gradient against the rule; returns what op gave."""
    wide = {name: None if x is None else x.double() for name, x in tensors.items()}
    upstream = None
    if gradients:
        outputs = definition(**wide, **options)
        model = next(x for x in tensors.values() if x is not None)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        # Rounded to the narrow type once, so that all three are asked for the gradient of the same number.
        upstream = tuple(torch.randn_like(x).to(model.dtype) for x in outputs)
    truth = evaluate(definition, wide, options, upstream)
    rough = evaluate(plain, tensors, options, upstream)
    with linattn.use_backend(backend):
        actual = evaluate(op, tensors, options, upstream)
    for what, value in actual.items():
        factor = GRADIENT if what.startswith("gradient") else FORWARD
        assert_within_rule(what, value, truth[what], rough[what], factor)
    return actual
