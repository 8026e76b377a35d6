"""Linear and nearly linear attention for high-resolution image generation.

Ops are registered under `torch.ops.linattn` and offered here with documentation. Needs torch only; Triton, diffusers
and the compiled libraries are used where they are present (`python -m linattn` says which and why).
"""

from . import reference
from ._version import __version__
from .backend import use_backend
from .ops.block_causal_attention import block_causal_attention
from .ops.linear_attention import linear_attention, linear_attention_apply, linear_attention_state
from .ops.window_attention import pool_tokens, window_attention

# The function shadows the module of its name, which loads nothing but torch. (Were it imported on first use, importing
# anything from linattn.report would put the module in the function's place.)
from .report import report

__all__ = [
    "__version__",
    "block_causal_attention",
    "linear_attention",
    "linear_attention_apply",
    "linear_attention_state",
    "pool_tokens",
    "reference",
    "report",
    "use_backend",
    "window_attention",
]
