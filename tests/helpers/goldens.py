"""Golden data: where it lies, how it is read, and the deterministic filler its large cases are made of.

The folder is `../shared/golden` beside the repository, or `LINATTN_GOLDEN`. It is not part of the repository; a test
that needs it carries `needs_goldens` (or calls `load`) and is skipped, with the reason, where it is absent.
"""

from __future__ import annotations

import functools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(os.environ.get("LINATTN_GOLDEN") or Path(__file__).resolve().parents[3] / "shared" / "golden")

needs_goldens = pytest.mark.skipif(
    not ROOT.is_dir(), reason=f"no golden data at {ROOT}: set LINATTN_GOLDEN to the folder that holds it"
)


def path(family: str, name: str = "") -> Path:
    """A file or folder of a family, e.g. path("linfusion", "unet_tiny_sd_checkpoint")."""
    found = ROOT / family / name
    if not found.exists():
        pytest.skip(f"no golden data at {found}: set LINATTN_GOLDEN to the folder that holds it")
    return found


@functools.cache
def load(family: str, name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and metadata of `<family>/<name>.safetensors`; metadata values that are JSON come decoded.

    Cached: treat the tensors as read-only.
    """
    safetensors = pytest.importorskip("safetensors", reason="golden data needs safetensors")
    with safetensors.safe_open(str(path(family, f"{name}.safetensors")), "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no dict)
        metadata = {key: _decoded(value) for key, value in (file.metadata() or {}).items()}
    return tensors, metadata


def names(family: str, prefix: str) -> list[str]:
    """Names of the files of a family that start with `prefix`; one placeholder where the data is absent."""
    found = sorted(file.stem for file in (ROOT / family).glob(f"{prefix}*.safetensors"))
    return found or [f"{prefix}absent"]


def filler(seed: int, shape: tuple[int, ...], amp: float = 1.0) -> torch.Tensor:
    """H(seed, shape, amp): uniform in [-amp, amp), float32, the same on every machine (splitmix64 of the index)."""
    with np.errstate(over="ignore"):
        n = np.arange(1, math.prod(shape) + 1, dtype=np.uint64)
        z = n * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed) * np.uint64(0xD1342543DE82EF95)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    unit = (z >> np.uint64(11)).astype(np.float64) / 2.0**53
    return torch.from_numpy(((2 * unit - 1) * amp).astype(np.float32)).reshape(shape)


def fill_linfusion_module(module: torch.nn.Module, seed: int) -> None:
    """Fill the parameters of one LinFusion attention as the generator did (order and amplitudes of its README)."""
    branch = ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias")
    order = ["to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias"]
    order += [f"{side}.{name}" for side in ("to_q_", "to_k_") for name in branch]
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for i, name in enumerate(name for name in order if name in parameters):
            parameter = parameters[name]
            is_norm = name.endswith(("_.1.weight", "_.1.bias"))
            amp = 0.2 if is_norm else math.sqrt(3 / parameter.shape[1]) if parameter.ndim == 2 else 0.1
            offset = 1.0 if is_norm and name.endswith("weight") else 0.0
            parameter.copy_(filler(seed + 7 * i + 1, tuple(parameter.shape), amp) + offset)


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """[sum, sum of absolutes, first, last], as the `check_*` entries of the hashed cases hold it."""
    flat = tensor.detach().double().flatten()
    return torch.stack([flat.sum(), flat.abs().sum(), flat[0], flat[-1]])


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected| in the Euclidean norm, in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, golden {tuple(expected.shape)}"
    return ((actual - expected).norm() / expected.norm()).item()


def _decoded(value: str):
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
