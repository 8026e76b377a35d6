"""Repairs for Triton's interpreter (TRITON_INTERPRET=1), which runs our kernels on CPU tensors.

1. triton 3.6 keeps scalars as one-element arrays and turns them into loop bounds by `int(array)`; NumPy 2.4 made that a
   TypeError (triton issue 9171).
2. bfloat16 is stored as raw uint16. `tl.dot` multiplies those integers, and the conversion from float32 truncates
   instead of rounding to nearest even, as the hardware does.

`install()` does nothing outside the interpreter, and a second call does nothing.
"""

import os

import numpy as np


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits -> float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits, to nearest even; NaN stays a (quiet) NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


def install() -> None:
    if not interpreting():
        return
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "_linattn_repaired", False):
        return
    builder._linattn_repaired = True
    handle = interpreter.TensorHandle

    patch_lang_tensor = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    interpreter._patch_lang_tensor = patch_with_index

    cast_impl = builder.cast_impl

    def cast(self, src, dst_type):
        old, new = src.dtype.scalar, dst_type.scalar
        if old == tl.bfloat16 and new == tl.float32:
            return handle(_widen(src.data), tl.float32)
        if old == tl.float32 and new == tl.bfloat16:
            return handle(_narrow(src.data), tl.bfloat16)
        return cast_impl(self, src, dst_type)

    builder.cast_impl = cast

    create_dot = builder.create_dot

    def operand(h):
        return handle(_widen(h.data), tl.float32) if h.dtype.scalar == tl.bfloat16 else h

    def dot(self, a, b, *rest):
        return create_dot(self, operand(a), operand(b), *rest)

    builder.create_dot = dot
