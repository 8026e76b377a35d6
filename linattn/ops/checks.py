"""Argument checks that the op families share. Each error names the argument, what was expected, and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch

HEAD_DIMS = range(1, 257)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def same_kind(op: str, tensors: dict[str, torch.Tensor | None], like: str) -> None:
    """All tensors share the floating dtype and the device of `tensors[like]`."""
    model = tensors[like]
    if model.dtype not in _DTYPES:
        raise TypeError(f"{op}: {like} must be float32, float16, bfloat16 or float64, got {_name(model.dtype)}")
    for name, x in tensors.items():
        if x is None:
            continue
        if x.dtype != model.dtype:
            raise TypeError(f"{op}: {name} must have the dtype of {like}, {_name(model.dtype)}, got {_name(x.dtype)}")
        same_device(op, name, x, like, model)


def same_device(op: str, name: str, x: torch.Tensor, like: str, model: torch.Tensor) -> None:
    """x is on the device of `model`."""
    if x.device != model.device:
        raise ValueError(f"{op}: {name} must be on the device of {like}, {model.device}, got {x.device}")


def floating(op: str, name: str, x: torch.Tensor) -> None:
    """x is of a floating dtype that can be computed with in float32."""
    if x.dtype not in _DTYPES:
        raise TypeError(f"{op}: {name} must be float32, float16, bfloat16 or float64, got {_name(x.dtype)}")


def shape(op: str, name: str, x: torch.Tensor, expected: Sequence, letters: str) -> None:
    """x has the expected sizes; an entry of None is free. `letters` spells them for the message, "B, H, N, D"."""
    wrong = x.dim() != len(expected) or any(e is not None and s != e for s, e in zip(x.shape, expected, strict=True))
    if wrong:
        sizes = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{op}: {name} must have shape ({letters}) = ({sizes}), got {tuple(x.shape)}")


def rank(op: str, name: str, x: torch.Tensor, letters: str) -> None:
    """x has as many dimensions as `letters` names."""
    if x.dim() != len(letters.split(", ")):
        raise ValueError(f"{op}: {name} must have shape ({letters}), got {tuple(x.shape)}")


def head_dim(op: str, name: str, x: torch.Tensor, supported: range = HEAD_DIMS) -> None:
    """The last size of x is a supported head dim."""
    low, high = supported.start, supported.stop - 1
    if x.shape[-1] < low or x.shape[-1] > high:
        raise ValueError(f"{op}: the head dim of {name} must be in {low}..{high}, got {x.shape[-1]}")


def at_least(op: str, name: str, value: int, least: int) -> None:
    """value >= least."""
    if value < least:
        raise ValueError(f"{op}: {name} must be >= {least}, got {value}")


def choice(op: str, name: str, value: str, choices: Sequence[str]) -> None:
    """value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {tuple(choices)}, got {value!r}")
