"""Recorded results of CLEAR's own attention processors (op_*), on every backend: output, lse, the gradients of q, k, v
and of the pooling weight, and how many keys each query sees."""

import pytest
import torch
from helpers import goldens, tester
from test_linear_attention import NAME
from test_window_attention import attention, pattern, plain_attention, plain_pool

import linattn
from linattn import geometry, reference

pytestmark = [goldens.needs_goldens, pytest.mark.usefixtures("poison", "one_thread")]

FAMILY = "clear"
FILES = goldens.names(FAMILY, "op_")

# README of the goldens: large cases are stored in float32, and cannot agree better than its rounding.
EXACT = 1e-12
STORED_IN_FLOAT32 = 2.0**-24
FLOAT32 = 2e-6


def clear(attend, pool):
    """CLEAR's attention as a function of q, k, v and, where it pools, the pooling weight."""

    def call(q, k, v, weight=None, **options):
        pooled = {}
        if weight is not None:
            height, width, text = options["height"], options["width"], options["text_length"]
            pooled = {f"pooled_{name}": pool(x[:, :, text:], weight, height, width) for name, x in (("k", k), ("v", v))}
        return attend(q, k, v, **options, **pooled)

    return call


OURS = clear(attention, linattn.pool_tokens)
DEFINITION = clear(reference.window_attention, reference.pool_tokens)
PLAIN = clear(plain_attention, plain_pool)


def case(name, dtype, device="cpu"):
    """(tensors, options, upstream, expected) of one file; expected is named as tester.evaluate names it."""
    file, metadata = goldens.load(FAMILY, name)
    factor = metadata["down_factor"]
    weights = {"weight": file["spatial_weight"].reshape(factor, factor)} if factor > 1 else {}
    tensors = {
        key: x.to(device=device, dtype=dtype) for key, x in ({key: file[key] for key in "qkv"} | weights).items()
    }
    options = {"height": metadata["height"], "width": metadata["width"], "radius": metadata["window"]}
    options |= {"text_length": metadata["text_len"], "scale": metadata["scale"]}
    # The recorded gradients are those of the output alone.
    upstream = (file["grad_out"].to(device=device, dtype=dtype), torch.zeros_like(file["lse"]).to(device))
    expected = {"output 0": file["out"], "output 1": file["lse"]}
    expected |= {f"gradient of {key}": file[f"d{key}"] for key in "qkv"}
    if weights:
        expected["gradient of weight"] = file["dspatial_weight"].reshape(factor, factor)
    return tensors, options, upstream, expected


def results(name, dtype, backend, device="cpu"):
    tensors, options, upstream, expected = case(name, dtype, device)
    with linattn.use_backend(backend):
        actual = tester.evaluate(OURS, tensors, options, upstream)
    assert actual.keys() == expected.keys()
    return actual, expected


@pytest.mark.parametrize("backend", ["reference"])
@pytest.mark.parametrize("golden", FILES)
def test_float64_equals_the_golden(golden, backend):
    actual, expected = results(golden, torch.float64, backend)
    for what, truth in expected.items():
        bound = EXACT if truth.dtype == torch.float64 else STORED_IN_FLOAT32
        assert goldens.relative_error(actual[what], truth) < bound, what


@tester.on_every_backend("window_attention")
@pytest.mark.parametrize("golden", FILES)
def test_float32_equals_the_golden(golden, backend, device):
    actual, expected = results(golden, torch.float32, backend, device)
    for what, truth in expected.items():
        assert goldens.relative_error(actual[what].cpu(), truth) < FLOAT32, what


@tester.on_every_backend("window_attention")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=NAME.get)
@pytest.mark.parametrize("golden", FILES)
def test_half_precision_keeps_within_the_rule_of_the_golden(golden, dtype, backend, device):
    if tester.interpreted(backend, device) and dtype == torch.float16 and "text512" in golden:
        pytest.skip("too large for Triton's interpreter")
    tensors, options, upstream, expected = case(golden, dtype, device)
    plain = tester.evaluate(PLAIN, tensors, options, upstream)
    # What rounding the recorded inputs alone changes is no error of the kernel: the truth has the rounded inputs.
    wide = {key: x.double() for key, x in tensors.items()}
    truth = tester.evaluate(DEFINITION, wide, options, upstream)
    actual, _ = results(golden, dtype, backend, device)
    step = torch.finfo(dtype).eps
    for what, value in actual.items():
        factor = tester.GRADIENT if what.startswith("gradient") else tester.FORWARD
        tester.assert_within_rule(what, value, truth[what], plain[what], factor)
        # And the whole stays as near to the recorded result as inputs of this precision allow.
        ours, theirs = (goldens.relative_error(x.cpu(), expected[what]) for x in (value, plain[what]))
        assert ours < max(2 * theirs, step), what


@tester.on_every_backend("window_attention")
@pytest.mark.parametrize("golden", FILES)
def test_every_query_sees_as_many_keys_as_in_the_golden(golden, backend, device):
    tensors, options, _, _ = case(golden, torch.float32, device)
    tensors["q"] = torch.zeros_like(tensors["q"])
    with linattn.use_backend(backend):
        _, lse = OURS(**tensors, **options)
    # Equal scores: lse is the logarithm of their number.
    assert torch.equal(lse[0, 0].exp().round().int().cpu(), goldens.load(FAMILY, golden)[0]["keys_per_query"])


@pytest.mark.parametrize("backend", ["reference"])
@pytest.mark.parametrize("golden", FILES)
def test_pairs_are_counted_as_in_the_golden(golden, backend):
    file, metadata = goldens.load(FAMILY, golden)
    text, radius = metadata["text_len"], metadata["window"]
    height, width = metadata["height"], metadata["width"]
    pooled = metadata["kv_len"] - text - height * width
    assert geometry.pairs(height, width, radius, text, pooled) == file["keys_per_query"].sum()
    if "mask" in file:
        assert file["mask"].sum() == file["keys_per_query"].sum()


@pytest.mark.parametrize("backend", ["reference"])
@pytest.mark.parametrize("golden", FILES)
def test_who_sees_whom_is_as_in_the_golden(golden, backend):
    file, metadata = goldens.load(FAMILY, golden)
    if "mask" not in file:
        pytest.skip("the golden holds no mask")
    text, grid = metadata["text_len"], (metadata["height"], metadata["width"])
    pooled = metadata["kv_len"] - text - grid[0] * grid[1]
    assert torch.equal(pattern(*grid, metadata["window"], text, pooled), file["mask"].bool())
