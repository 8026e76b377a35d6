"""Linear and nearly linear attention for high-resolution image generation.

Ops are registered under `torch.ops.linattn` and offered here with documentation. Needs torch only; Triton, diffusers
and the compiled libraries are used where they are present (`python -m linattn` says which and why).
"""

from . import reference
from ._version import __version__
from .backend import use_backend
from .ops.linear_attention import linear_attention, linear_attention_apply, linear_attention_state

__all__ = [
    "__version__",
    "linear_attention",
    "linear_attention_apply",
    "linear_attention_state",
    "reference",
    "use_backend",
]
