"""Import this module to have `torch.utils.flop_counter.FlopCounterMode` count linattn's ops.

    import linattn.flops

A module of its own, because torch.utils.flop_counter imports triton, or warns where there is none, and `import linattn`
does neither. A multiply-add counts as two; elementwise work and denominators are left out, as torch does for SDPA.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

from .ops import registration

for _name, _formula in registration.flop_formulas().items():
    register_flop_formula(getattr(getattr(torch.ops, registration.NAMESPACE), _name))(_formula)
