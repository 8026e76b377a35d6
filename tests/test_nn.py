"""The Focused and Mamba-like attention layers: goldens, any grid, any head dim, half precision."""

import pytest
import torch
from helpers import goldens
from torch import nn
from torch.nn import functional as F

import linattn
from linattn import backend as backends
from linattn.nn import FocusedLinearAttention, MambaLikeLinearAttention

EXACT = 1e-12
STORED_IN_FLOAT32 = 2.0**-24
FLOAT32 = 2e-6  # README of the goldens


def layer_of(name):
    tensors, metadata = goldens.load("linfusion", name)
    case = metadata["case"]
    if name.startswith("layer_focused"):
        height, width = case["HW"]
        layer = FocusedLinearAttention(
            case["dim"],
            height,
            width,
            case["num_heads"],
            focusing_factor=case["focusing_factor"],
            kernel_size=case["kernel_size"],
        )
    else:
        height, width = case["input_resolution"]
        layer = MambaLikeLinearAttention(case["dim"], height, width, case["num_heads"])
    layer.load_state_dict({key[2:]: value for key, value in tensors.items() if key.startswith("w.")})
    return layer


def errors_against_golden(name, dtype):
    """Relative error of the output and of every gradient against the best stored version, by name."""
    tensors, _ = goldens.load("linfusion", name)
    layer = layer_of(name).to(dtype)
    x = tensors["x"].to(dtype, copy=True).requires_grad_()
    out = layer(x)
    out.backward(tensors["dy"].to(dtype))
    best = "f64" if "out_f64" in tensors else "f32"
    errors = {
        "out": goldens.relative_error(out, tensors[f"out_{best}"]),
        "dx": goldens.relative_error(x.grad, tensors[f"dx_{best}"]),
    }
    gradients = {f"grad.{key}": parameter.grad for key, parameter in layer.named_parameters()}
    assert set(gradients) == {key for key in tensors if key.startswith("grad.")}
    return errors | {key: goldens.relative_error(value, tensors[key]) for key, value in gradients.items()}


def cpu_backends():
    for name in ("triton", "cpu", "reference"):
        reason = backends.why_not("linear_attention", name, torch.device("cpu"), torch.float32)
        yield pytest.param(name, marks=[pytest.mark.skip(reason=f"backend {name}: {reason}")] if reason else [])


BACKENDS = pytest.mark.parametrize("backend", list(cpu_backends()))


pytestmark = pytest.mark.usefixtures("one_thread_in_module")


@goldens.needs_goldens
@pytest.mark.parametrize("name", goldens.names("linfusion", "layer_focused"))
def test_focused_layer_in_float64_equals_the_golden(name):
    for label, error in errors_against_golden(name, torch.float64).items():
        assert error < (EXACT if label in ("out", "dx") else STORED_IN_FLOAT32), label


@goldens.needs_goldens
@BACKENDS
@pytest.mark.parametrize("name", goldens.names("linfusion", "layer_"))
def test_layer_in_float32_equals_the_golden(name, backend):
    with linattn.use_backend(backend):
        errors = errors_against_golden(name, torch.float32)
    assert max(errors.values()) < FLOAT32, errors


@goldens.needs_goldens
@pytest.mark.parametrize("name", goldens.names("linfusion", "layer_mlla"))
def test_rotation_table_equals_the_golden(name):
    tensors, _ = goldens.load("linfusion", name)
    layer = layer_of(name)
    torch.testing.assert_close(layer.rope.rotations, tensors["w.rope.rotations"], rtol=0, atol=FLOAT32)
    assert set(layer.state_dict()) == {key[2:] for key in tensors if key.startswith("w.")}


# What the layers compute, written anew as slowly and plainly as possible, token by token, in float64.


def plain_focused(layer, x, height, width):
    def focus(t):
        u = (t.relu() + 1e-6) / F.softplus(layer.scale)
        return u.norm(dim=-1, keepdim=True) * F.normalize(u**layer.focusing_factor, dim=-1, eps=0)

    k, v = (x @ layer.kv.weight.T).chunk(2, -1)
    phi_q, phi_k = focus(x @ layer.q.weight.T), focus(k + layer.positional_encoding)
    heads = []
    for part in range(0, x.shape[-1], layer.head_dim):
        q_h, k_h, v_h = (t[..., part : part + layer.head_dim] for t in (phi_q, phi_k, v))
        weights = q_h @ k_h.transpose(1, 2) / x.shape[1]
        out = weights @ v_h / (weights.sum(-1, keepdim=True) + 1e-6)
        grid = v_h.transpose(1, 2).reshape(x.shape[0], -1, height, width)
        heads.append(out + layer.dwc(grid).flatten(2).transpose(1, 2))
    return torch.cat(heads, -1) @ layer.proj.weight.T + layer.proj.bias


def plain_mamba_like(layer, x, height, width):
    q, k = (F.elu(t) + 1 for t in layer.qk(x).chunk(2, -1))
    bands = x.shape[-1] // 4
    theta = layer.rope.base ** (-torch.arange(bands, dtype=torch.float64) / bands)
    token = torch.arange(height * width)
    angles = torch.cat([(token // width)[:, None] * theta, (token % width)[:, None] * theta], -1)
    turn = torch.polar(torch.ones_like(angles), angles)
    rotate = lambda t: torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turn).flatten(-2)  # noqa: E731
    heads = []
    for part in range(0, x.shape[-1], layer.head_dim):
        take = slice(part, part + layer.head_dim)
        numerator = rotate(q)[..., take] @ rotate(k)[..., take].transpose(1, 2) / x.shape[1]
        denominator = (q[..., take] @ k[..., take].transpose(1, 2)).mean(-1, keepdim=True) + 1e-6
        heads.append(numerator @ x[..., take] / denominator)
    grid = x.transpose(1, 2).reshape(x.shape[0], -1, height, width)
    return torch.cat(heads, -1) + layer.lepe(grid).flatten(2).transpose(1, 2)


def randomised(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape) / max(parameter.shape[-1], 4) ** 0.5)
    return layer


# Head dims that flash-bidirectional-linear-attention gets wrong (beyond 64) or cannot compile (not a power of two).
@pytest.mark.parametrize("head_dim", [8, 40, 80, 128, 160])
@pytest.mark.parametrize("kind", [FocusedLinearAttention, MambaLikeLinearAttention])
def test_layer_is_right_at_every_head_dim_and_on_grids_that_are_not_square(kind, head_dim):
    torch.manual_seed(head_dim)
    height, width = 5, 7
    layer = randomised(kind(2 * head_dim, height, width, num_heads=2)).double()
    plain = plain_focused if kind is FocusedLinearAttention else plain_mamba_like
    x = torch.randn(2, height * width, 2 * head_dim, dtype=torch.float64)
    with torch.no_grad():
        assert goldens.relative_error(layer(x), plain(layer, x, height, width)) < EXACT


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", [FocusedLinearAttention, MambaLikeLinearAttention])
def test_layer_in_half_precision_is_as_good_as_its_rounding(kind, dtype, backend):
    """Not further from the truth than 2 x the layer in float64 whose projections and result alone are rounded."""
    torch.manual_seed(3)
    height, width = 9, 33
    exact = randomised(kind(80, height, width, num_heads=2)).double()
    layer = kind(80, height, width, num_heads=2).to(dtype)
    layer.load_state_dict(exact.state_dict())
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(2, height * width, 80).to(dtype)
    with torch.no_grad():
        truth = exact(x.double())
        with linattn.use_backend(backend):
            error = goldens.relative_error(layer(x), truth)
        for module in exact.children():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.register_forward_hook(lambda _module, _inputs, out: out.to(dtype).double())
        rounded = goldens.relative_error(exact(x.double()).to(dtype), truth)
    assert error < 2 * rounded


def test_rotation_keeps_float32_angles_when_the_layer_is_cast():
    layer = MambaLikeLinearAttention(16, 30, 40, num_heads=2)
    exact = layer.rope.rotations.clone()
    layer.to(torch.bfloat16)
    assert layer.qk.weight.dtype == torch.bfloat16
    assert torch.equal(layer.rope.rotations, exact)
    layer.load_state_dict({key: value.to(torch.bfloat16) for key, value in layer.state_dict().items()})
    assert torch.equal(layer.rope.rotations, exact)
    assert layer.double().rope.rotations.dtype == torch.float64
    torch.testing.assert_close(layer.rope.rotations.float(), exact, rtol=0, atol=4e-6)


def test_rotation_survives_the_meta_device():
    layer = MambaLikeLinearAttention(16, 3, 5, num_heads=2)
    with torch.device("meta"):
        emptied, assigned = (MambaLikeLinearAttention(16, 3, 5, num_heads=2) for _ in range(2))
    emptied.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assigned.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(1, 15, 16)
    assert torch.equal(emptied(x), layer(x)) and torch.equal(assigned(x), layer(x))


def test_mamba_like_layer_runs_on_another_grid_than_its_own():
    torch.manual_seed(0)
    layer = randomised(MambaLikeLinearAttention(16, 4, 4, num_heads=2)).double()
    x = torch.randn(1, 15, 16, dtype=torch.float64)
    with torch.no_grad():
        assert goldens.relative_error(layer(x, 3, 5), plain_mamba_like(layer, x, 3, 5)) < FLOAT32
        assert not torch.allclose(layer(x, 3, 5), layer(x, 5, 3))
    other = MambaLikeLinearAttention(16, 3, 5, num_heads=2).double()
    other.load_state_dict(
        {key: value for key, value in layer.state_dict().items() if key != "rope.rotations"}, strict=False
    )
    with torch.no_grad():
        assert torch.equal(other(x), layer(x, 3, 5))


def test_focused_layer_resizes_its_positions_to_another_grid():
    torch.manual_seed(0)
    layer = randomised(FocusedLinearAttention(16, 4, 6, num_heads=2)).double()
    x = torch.randn(1, 96, 16, dtype=torch.float64)
    with torch.no_grad():
        out = layer(x, 8, 12)
        positions = layer.positional_encoding.reshape(1, 4, 6, 16).permute(0, 3, 1, 2)
        larger = FocusedLinearAttention(16, 8, 12, num_heads=2).double()
        larger.load_state_dict({**layer.state_dict(), "positional_encoding": larger.positional_encoding})
        larger.positional_encoding.copy_(F.interpolate(positions, scale_factor=2, mode="bilinear").flatten(2).mT)
        assert goldens.relative_error(out, larger(x)) < EXACT


def test_focused_layer_with_reduced_keys_attends_to_the_reduced_grid():
    torch.manual_seed(0)
    layer = randomised(FocusedLinearAttention(16, 9, 6, num_heads=2, sr_ratio=2)).double()
    seen = []
    layer.kv.register_forward_hook(lambda _module, inputs, _out: seen.append(inputs[0].shape))
    x = torch.randn(2, 54, 16, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    out.square().sum().backward()
    assert out.shape == x.shape and seen == [(2, 12, 16)], "9 x 6 tokens reduced to 4 x 3"
    assert torch.isfinite(x.grad).all()
    assert all(parameter.grad.abs().max() > 0 for parameter in layer.parameters())


@pytest.mark.parametrize("kind", [FocusedLinearAttention, MambaLikeLinearAttention])
def test_layer_gradients_are_finite_and_follow_the_definition(kind):
    torch.manual_seed(1)
    layer = randomised(kind(16, 3, 5, num_heads=2)).double()
    plain = plain_focused if kind is FocusedLinearAttention else plain_mamba_like
    x = torch.randn(1, 15, 16, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(layer(x).sin().sum(), x)
    (theirs,) = torch.autograd.grad(plain(layer, x, 3, 5).sin().sum(), x)
    assert goldens.relative_error(ours, theirs) < 1e-10


@pytest.mark.parametrize("kind", [FocusedLinearAttention, MambaLikeLinearAttention])
def test_layer_compiles_into_one_graph(kind):
    torch.manual_seed(2)
    layer = randomised(kind(32, 4, 6, num_heads=2))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 24, 32)
    assert goldens.relative_error(compiled(x), layer(x)) < FLOAT32


@pytest.mark.parametrize("kind", [FocusedLinearAttention, MambaLikeLinearAttention])
@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((1, 16, 16), (), "height=3, width=5, got (1, 16, 16)"),
        ((1, 15, 16), (4, 4), "height=4, width=4, got (1, 15, 16)"),
        ((1, 15, 16), (15,), "give both height and width"),
        ((15, 16), (), "got (15, 16)"),
    ],
)
def test_tokens_that_do_not_fill_the_grid_are_refused(kind, shape, grid, message):
    with pytest.raises(ValueError) as error:
        kind(16, 3, 5, num_heads=2)(torch.randn(shape), *grid)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FocusedLinearAttention(30, 4, 4, num_heads=4), "dim=30, num_heads=4"),
        (lambda: MambaLikeLinearAttention(30, 4, 4, num_heads=4), "dim=30, num_heads=4"),
        (lambda: MambaLikeLinearAttention(18, 4, 4, num_heads=2), "multiple of 4"),
        (lambda: FocusedLinearAttention(16, 4, 4, num_heads=2, kernel_size=4), "kernel_size must be odd, got 4"),
        (lambda: FocusedLinearAttention(16, 2, 4, num_heads=2, sr_ratio=3), "sr_ratio=3"),
    ],
)
def test_impossible_layers_are_refused(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)
