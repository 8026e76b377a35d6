"""What LinFusion's attention module costs and what it must not do: the paper walk-through of docs/linfusion.md, pinned.

That it computes the right thing is tests/test_linfusion.py's business.
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import linattn

pytest.importorskip("diffusers", reason='the adapters need the extra: pip install "linattn[diffusers]"')

from linattn.adapters import LinearAttention

CHANNELS, HEADS, TOKENS = 64, 4, 96
WIDTHS = pytest.mark.parametrize("width", [None, 4, -1], ids=["as wide", "narrow", "identity"])


def made(width, **where):
    torch.manual_seed(0)
    return LinearAttention(CHANNELS, HEADS, width).to(**where), torch.randn(2, TOKENS, CHANNELS, **where)


def width_of(width):
    return {None: CHANNELS, -1: 0}.get(width, width)


class Calls(TorchDispatchMode):
    """Names of the ops that run, as the dispatcher sees them."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


@WIDTHS
def test_flops_are_those_of_the_paper(width):
    """8 C^2 of the projections, 8 C r of the branches, 4 C D of the attention, per token."""
    from torch.utils.flop_counter import FlopCounterMode

    import linattn.flops  # noqa: F401

    module, x = made(width)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(x)
    per_token = 8 * CHANNELS**2 + 8 * CHANNELS * width_of(width) + 4 * CHANNELS * CHANNELS // HEADS
    assert counter.get_total_flops() == 2 * TOKENS * per_token


@WIDTHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_are_eight_products_six_elementwise_passes_and_no_copy(width, dtype):
    module, x = made(width, dtype=dtype)
    with torch.no_grad(), Calls() as calls:
        module(x)
    kinds = (
        "mm",
        "addmm",
        "native_layer_norm",
        "leaky_relu_",
        "add",
        "_linear_attention",
        "clone",
        "copy_",
        "_to_copy",
    )
    counts = {kind: sum(name.split("::")[1] == kind for name in calls.names) for kind in kinds}
    products = counts.pop("mm") + counts.pop("addmm")
    branches = 0 if width == -1 else 2
    assert products == 4 + 2 * branches
    assert counts == {
        "native_layer_norm": branches, "leaky_relu_": branches, "add": 2,
        "_linear_attention": 1, "clone": 0, "copy_": 0, "_to_copy": 0,
    }  # fmt: skip


@WIDTHS
def test_a_training_step_keeps_what_the_paper_counts(width):
    """7 + 4 r / C tensors of the size of x; without branches x + x takes the place of x, and LayerNorms have none."""
    module, x = made(width)
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = module(x.requires_grad_())
    one, tokens = x.untyped_storage().nbytes(), 2 * TOKENS
    statistics = 0 if width == -1 else 2 * 2 * tokens * 4  # mean and 1 / deviation of each LayerNorm, float32
    head = CHANNELS // HEADS
    state = 2 * HEADS * (head * head + head) * 4
    assert sum(kept.values()) == 7 * one + 4 * one * width_of(width) // CHANNELS + statistics + state
    out.sum().backward()


class OnlyCalled(nn.Module):
    """Stands for a quantised, wrapped or offloaded layer: it can be called, and its weights are nobody's business."""

    def __init__(self, layer):
        super().__init__()
        self.call = layer.forward
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.call(x)


def test_every_layer_is_called_once_and_its_weights_are_never_read():
    module, x = made(8)
    with torch.no_grad():
        expected = module(x)
    for name in ("to_q", "to_k", "to_v", "to_out.0", *(f"to_{s}_.{i}" for s in "qk" for i in range(4))):
        parent, _, child = name.rpartition(".")
        owner = module.get_submodule(parent)
        owner._modules[child] = OnlyCalled(owner._modules[child])
    assert not list(module.parameters())
    with torch.no_grad():
        assert torch.equal(module(x), expected)
    stubs = [m for m in module.modules() if isinstance(m, OnlyCalled)]
    assert len(stubs) == 12 and {stub.calls for stub in stubs} == {1}


@WIDTHS
def test_the_input_stays_as_it_was(width):
    """A residual that is added in place would write into x where the branch is the identity."""
    module, x = made(width)
    before = x.clone()
    with torch.no_grad():
        module(x)
    assert torch.equal(x, before)


def test_the_layers_output_may_be_kept_by_a_hook():
    """What a branch hands to a hook is not overwritten afterwards, as a residual in place would do."""
    module, x = made(8)
    kept = []
    module.to_q_.register_forward_hook(lambda _module, _inputs, out: kept.append((out, out.clone())))
    with torch.no_grad():
        module(x)
    assert all(torch.equal(now, then) for now, then in kept) and kept
    assert linattn.report(module).layers[0].plugins == ("hooks",)
