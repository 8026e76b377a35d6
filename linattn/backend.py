"""Which backend can run which op, on which device and dtype, and why the others cannot.

The public ops choose among private per-backend ops at run time, inside the op: raw `torch.ops.linattn.*` calls and
graphs compiled long before see the same choice. `use_backend` or the environment variable `LINATTN_BACKEND` force
one; a forced backend never falls back, it raises with the reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator

import torch

from . import _library

#: Every backend, in the order in which "auto" prefers them.
BACKENDS = ("cuda", "triton", "cpu", "reference")

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_forced: str | None = None


def _validated(name: str, source: str) -> str | None:
    if name == "auto":
        return None
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {('auto', *BACKENDS)}, got {name!r}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force the backend of every linattn op: "reference", "cpu", "triton", "cuda", or "auto" to choose as usual.

    The setting belongs to the process, as torch's own backend flags do: the autograd engine runs CUDA backwards in
    threads of its own, and they must see it. It takes precedence over the environment variable `LINATTN_BACKEND`.

    Raises ValueError for an unknown name here, and from the op when the forced backend cannot run it.
    """
    global _forced
    _validated(name, "use_backend(name)")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def forced() -> str | None:
    """The backend that is forced at this moment, or None when ops choose for themselves."""
    if _forced is not None:
        return _validated(_forced, "use_backend(name)")
    return _validated(os.environ.get("LINATTN_BACKEND") or "auto", "environment variable LINATTN_BACKEND")


def triton_interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def has_kernel(op: str, backend: str, device_type: str) -> bool:
    """Whether a kernel of `backend` is registered for the private op `_<op>_<backend>`."""
    name = f"linattn::{op}_{backend}" if op.startswith("_") else f"linattn::_{op}_{backend}"
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type, "CompositeExplicitAutograd")
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key) or torch._C._dispatch_has_kernel_for_dispatch_key(
        name, "CompositeExplicitAutograd"
    )


def _why_not_compiled(op: str, backend: str, device: torch.device) -> str | None:
    if device.type != backend:
        return f"it runs on {backend} tensors, not on {device.type}"
    if not _library.loaded(backend):
        return _library.reason(backend)
    if not has_kernel(op, backend, device.type):
        return f"the library has no {backend} kernel for {op.lstrip('_')}"
    return None


def _why_not_triton(op: str, device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not has_kernel(op, "triton", device.type):
        return f"there is no Triton kernel for {op.lstrip('_')}"
    if device.type == "cpu":
        return None if triton_interpreted() else "on CPU tensors it needs Triton's interpreter (TRITON_INTERPRET=1)"
    if device.type != "cuda":
        return f"it runs on cuda tensors, not on {device.type}"
    if triton_interpreted():
        return "TRITON_INTERPRET is set: the interpreter takes CPU tensors"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"it needs compute capability 8.0 or newer, this device has {major}.{minor}"
    return None


def why_not(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason for which `backend` cannot run `op` on this device and dtype, or None when it can."""
    if backend == "reference":
        return None
    if dtype not in _KERNEL_DTYPES:
        return f"it takes float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if backend == "triton":
        return _why_not_triton(op, device)
    return _why_not_compiled(op, backend, device)


@functools.lru_cache(maxsize=1024)
def _choose(op: str, device: torch.device, dtype: torch.dtype, wanted: str | None) -> str:
    if wanted is not None:
        reason = why_not(op, wanted, device, dtype)
        if reason is not None:
            raise ValueError(f"{op.lstrip('_')}: backend {wanted!r} was asked for, but {reason}")
        return wanted
    for backend in BACKENDS:
        if backend == "triton" and device.type == "cpu":
            continue  # the interpreter is for tests: it must be asked for
        if why_not(op, backend, device, dtype) is None:
            return backend
    raise AssertionError("the reference backend runs everywhere")


def choose(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs `op` for tensors of this device and dtype now.

    Raises ValueError when a forced backend cannot, with the reason.
    """
    return _choose(op, device, dtype, forced())


def report() -> list[dict]:
    """One row per op, device of this machine and dtype: the backend that would run and why the others would not.

    Each row is {"op", "device", "dtype", "backend", "why_not": {backend: reason}}; "backend" is None, and "error"
    says why, when a forced backend cannot run the op.
    """
    from .ops import registration

    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    rows = []
    for op in registration.public_ops():
        for device in devices:
            for dtype in _KERNEL_DTYPES:
                reasons = {b: why_not(op, b, device, dtype) for b in BACKENDS}
                row = {"op": op, "device": str(device), "dtype": str(dtype).removeprefix("torch.")}
                row["why_not"] = {b: reason for b, reason in reasons.items() if reason is not None}
                try:
                    row["backend"] = choose(op, device, dtype)
                except ValueError as error:
                    row["backend"], row["error"] = None, str(error)
                rows.append(row)
    return rows
