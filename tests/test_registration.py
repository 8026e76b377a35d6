"""What every op of the namespace must offer, whatever its family: schemas, kernels per backend, layouts."""

import importlib.util
import inspect

import pytest
import torch

from linattn import backend as backends
from linattn.ops import families, registration

NAMES = sorted(
    name.removeprefix("linattn::")
    for name in {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    if name.startswith("linattn::")
)
KERNELS = [name for name in NAMES if name.startswith("_") and name.rsplit("_", 1)[1] in backends.BACKENDS]
#: Arguments that describe sizes; each must be a SymInt, or every size costs a compilation.
SIZES = {"height", "width", "radius", "text_length", "block", "q_row", "q_text_length", "count"}


def schema(name):
    return registration.overload(name)._schema


def test_every_public_op_has_a_documented_function_of_the_same_name_and_arguments():
    functions = {name: getattr(family, name) for family in families for name in family.__all__}
    assert set(registration.public_ops()) <= set(functions)
    for name in registration.public_ops():
        function = functions[name]
        assert function.__doc__ and "Returns" in function.__doc__
        # return_lse chooses among the results, which the op has in any case.
        parameters = set(inspect.signature(function).parameters) - {"return_lse"}
        assert parameters == {argument.name for argument in schema(name).arguments}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in KERNELS])
def test_sizes_are_symbolic_in_the_schema(name):
    for argument in schema(name).arguments:
        if argument.name in SIZES:
            kind = argument.real_type
            kind = kind.getElementType() if isinstance(kind, torch.OptionalType) else kind
            assert isinstance(kind, torch.SymIntType), argument.name


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_returns_nothing_and_every_backend_has_the_same_arguments(name):
    stem = name.rsplit("_", 1)[0]
    assert not schema(name).returns
    arguments = str(schema(name)).partition("(")[2]
    for other in backends.BACKENDS:
        assert str(schema(f"{stem}_{other}")).partition("(")[2] == arguments


@pytest.mark.parametrize("name", [name for name in KERNELS if name.endswith(("_reference", "_triton"))])
def test_backends_written_in_python_implement_every_kernel(name):
    stem, backend = name.rsplit("_", 1)
    family = next(family for family in families if stem.startswith(tuple(f"_{op}" for op in family.__all__)))
    module = f"linattn.triton_kernels.{family.__name__.rpartition('.')[2]}"
    if backend == "triton" and importlib.util.find_spec(module) is None:
        pytest.skip(f"there is no {module}")
    assert backends.has_kernel(stem, backend, "cpu")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in KERNELS])
def test_ops_that_allocate_their_results_mutate_nothing(name):
    assert not schema(name).is_mutable


@pytest.mark.parametrize("shape", [(2, 3, 4, 8), (1, 3, 4, 8), (2, 1, 4, 8), (2, 3, 1, 8), (1, 1, 1, 8), (2, 3, 0, 8)])
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 2, 0)])
def test_results_are_allocated_dense_in_the_order_of_their_model(shape, order):
    inverse = [order.index(dim) for dim in range(3)]
    model = torch.empty([shape[dim] for dim in order] + [8]).permute(*inverse, 3)
    assert model.shape == shape
    out = registration.empty_like_heads(model, 5)
    assert out.shape == (*shape[:3], 5)
    expected = torch.empty([shape[dim] for dim in order] + [5]).permute(*inverse, 3)
    # Strides of dimensions of length 1 mean nothing.
    for dim in range(4):
        assert out.shape[dim] <= 1 or 0 in shape or out.stride(dim) == expected.stride(dim)


def test_an_expanded_model_gets_memory_for_every_element():
    out = registration.empty_like_heads(torch.empty(1, 3, 1, 8).expand(4, 3, 6, 8), 8)
    out.copy_(torch.arange(out.numel()).reshape(out.shape))
    assert out.unique().numel() == 4 * 3 * 6 * 8


def test_a_head_dim_of_stride_1_is_read_in_place_and_another_is_copied_once():
    x = torch.rand(2, 3, 4, 16)
    assert registration.readable(x.transpose(1, 2)).data_ptr() == x.data_ptr()
    assert registration.readable(x[..., 1:9]).data_ptr() == x[..., 1:].data_ptr()
    copied = registration.readable(x[..., ::2])
    assert copied.is_contiguous()
    assert torch.equal(copied, x[..., ::2])
