"""Recorded results of flash-bidirectional-linear-attention's two bidirectional ops (op_*), on every backend.

There q and k come mapped already, so the feature map is the identity. "linear" divides, with 1e-6 in the denominator
and 1 / L in the numerator unless the case names another scale; "simple" does not divide, and scales by D^-0.5.
"""

import pytest
import torch
from helpers import goldens, tester
from test_linear_attention import NAME, plain_attention

import linattn
from linattn import reference

pytestmark = [goldens.needs_goldens, pytest.mark.usefixtures("poison", "one_thread")]

FAMILY = "linfusion"
FILES = goldens.names(FAMILY, "op_")

# README of the goldens. Gradients are stored in float32: float64 ones cannot agree better than its rounding.
EXACT = 1e-12
STORED_IN_FLOAT32 = 2.0**-24
FLOAT32 = 2e-6


def case(name, dtype, device="cpu"):
    """(tensors, options, upstream, expected) of one file; expected is named as tester.evaluate names it."""
    file, metadata = goldens.load(FAMILY, name)
    described = metadata.get("case", metadata)
    tensors = {key: file[key].to(device=device, dtype=dtype) for key in "qkv"}
    options = {"feature_map": "identity", "scale": described.get("scale")}
    if name.startswith("op_simple"):
        options["normalize"] = False
        options["scale"] = options["scale"] or tensors["q"].shape[-1] ** -0.5
    else:
        options["eps"] = 1e-6
    expected = {"output 0": file["o"].double()}
    expected |= {f"gradient of {key}": file[f"d{key}"].double() for key in "qkv"}
    return tensors, options, (file["do"].to(device=device, dtype=dtype),), expected


def results(name, dtype, backend, device="cpu"):
    tensors, options, upstream, expected = case(name, dtype, device)
    with linattn.use_backend(backend):
        actual = tester.evaluate(linattn.linear_attention, tensors, options, upstream)
    assert actual.keys() == expected.keys()
    return actual, expected


@pytest.mark.parametrize("backend", ["reference"])
@pytest.mark.parametrize("golden", FILES)
def test_float64_equals_the_golden(golden, backend):
    actual, expected = results(golden, torch.float64, backend)
    for what, truth in expected.items():
        bound = STORED_IN_FLOAT32 if what.startswith("gradient") else EXACT
        assert goldens.relative_error(actual[what], truth) < bound, what


@tester.on_every_backend()
@pytest.mark.parametrize("golden", FILES)
def test_float32_equals_the_golden(golden, backend, device):
    actual, expected = results(golden, torch.float32, backend, device)
    for what, truth in expected.items():
        assert goldens.relative_error(actual[what].cpu(), truth) < FLOAT32, what


@tester.on_every_backend()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=NAME.get)
@pytest.mark.parametrize("golden", FILES)
def test_half_precision_keeps_within_the_rule_of_the_golden(golden, dtype, backend, device):
    tensors, options, upstream, expected = case(golden, dtype, device)
    plain = tester.evaluate(plain_attention, tensors, options, upstream)
    # What rounding the recorded inputs alone changes is no error of the kernel: the truth has the rounded inputs.
    wide = {key: x.double() for key, x in tensors.items()}
    truth = tester.evaluate(reference.linear_attention, wide, options, tuple(x.double() for x in upstream))
    actual, _ = results(golden, dtype, backend, device)
    step = torch.finfo(dtype).eps
    for what, value in actual.items():
        factor = tester.GRADIENT if what.startswith("gradient") else tester.FORWARD
        tester.assert_within_rule(what, value, truth[what], plain[what], factor)
        # And the whole stays as near to the recorded result as inputs of this precision allow.
        ours, theirs = (goldens.relative_error(x.cpu(), expected[what]) for x in (value, plain[what]))
        assert ours < max(2 * theirs, step), what
