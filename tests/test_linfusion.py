"""The LinFusion adapter: its attention module, whole UNets, checkpoints, plugins, and everything it must refuse."""

import contextlib
import copy
import functools
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

import linattn
import linattn.bundled
from linattn import backend as backends

pytest.importorskip("diffusers", reason='the adapters need the extra: pip install "linattn[diffusers]"')

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, SlicedAttnProcessor
from helpers import goldens
from safetensors.torch import load_file, save_file

from linattn.adapters import LinearAttention, LinearAttnProcessor, LinFusion
from linattn.adapters.linfusion import KNOWN_REPOSITORIES, PUBLISHED

load, relative_error = goldens.load, goldens.relative_error
FAMILY = "linfusion"
UNETS = ["unet_tiny_sd", "unet_tiny_sdxl"]

# README of the goldens: what a float32 kernel may differ from the float64 truth. Gradients are stored in float32, so
# float64 ones cannot agree better than its rounding (2^-24).
EXACT = 1e-12
STORED_IN_FLOAT32 = 2.0**-24
MODULE_FLOAT32 = 2e-6
UNET_FLOAT32 = 1e-5


def runnable_backends():
    """(backend, device) pairs that this machine can run in float32, as test parameters."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    pairs = [
        (name, device)
        for device in devices
        for name in backends.BACKENDS
        if name != {"cpu": "cuda", "cuda": "cpu"}[device]
    ]
    for name, device in pairs:
        reason = backends.why_not("linear_attention", name, torch.device(device), torch.float32)
        marks = [pytest.mark.skip(reason=f"backend {name} on {device}: {reason}")] if reason else []
        marks += [pytest.mark.gpu] if device == "cuda" else []
        yield pytest.param(name, device, id=f"{name}-{device}", marks=marks)


BACKENDS = pytest.mark.parametrize(("backend", "device"), list(runnable_backends()))


def golden_module(name, dtype=torch.float64, device="cpu"):
    tensors, metadata = load(FAMILY, name)
    case = metadata["case"]
    module = LinearAttention(case["dim"], case["heads"], case["mid"])
    if name.startswith("gla_hash"):
        goldens.fill_linfusion_module(module, metadata["seed"])
    else:
        module.load_state_dict(prefixed(tensors, "w."))
    return module.to(device=device, dtype=dtype)


def prefixed(tensors, prefix):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def leaf(tensor, dtype=torch.float64, device="cpu"):
    return tensor.detach().to(device=device, dtype=dtype, copy=True).requires_grad_()


def golden_unet(name, dtype=torch.float64, device="cpu"):
    tensors, metadata = load(FAMILY, name)
    unet = UNet2DConditionModel(**metadata["unet_config"])
    unet.load_state_dict(prefixed(tensors, "unet."))
    return nn.Module.to(unet, device=device, dtype=dtype)


def golden_linfusion(name, **kwargs):
    return LinFusion.from_pretrained(goldens.path(FAMILY, f"{name}_checkpoint"), **kwargs)


def run_unet(unet, name, **kwargs):
    tensors, _ = load(FAMILY, name)
    move = {"dtype": unet.dtype, "device": unet.device}
    if "text_embeds" in tensors:
        kwargs["added_cond_kwargs"] = {key: tensors[key].to(**move) for key in ("text_embeds", "time_ids")}
    inputs = (tensors["sample"].to(**move), tensors["timesteps"].to(unet.device))
    return unet(*inputs, tensors["encoder_hidden_states"].to(**move), **kwargs).sample


def small_unet(**overrides):
    """A random UNet of the tiny SD configuration; needs no golden data."""
    config = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": 2,
    }
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**config, **overrides}).eval()


FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def run_small(unet, **kwargs):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, 8, 8, generator=generator).to(unet.dtype)
    text = torch.randn(2, 5, 24, generator=generator).to(unet.dtype)
    with torch.no_grad():
        return unet(sample, torch.tensor([3, 800]), text, **kwargs).sample


def trace(model):
    """Everything by which mounting could leave a mark: modules in order, parameters, processors, attributes."""
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "state": [(key, value.data_ptr(), value.dtype) for key, value in model.state_dict().items()],
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "processors": [(name, id(p)) for name, p in model.attn_processors.items()],
        "attributes": [(name, sorted(vars(module))) for name, module in model.named_modules()],
        "config": dict(model.config),
    }


pytestmark = pytest.mark.usefixtures("one_thread_in_module")


# ---------------------------------------------------------------------------------------------- the attention module


def module_errors(name, dtype, device="cpu"):
    """Relative error against the golden of everything one forward and backward of its module makes, by name."""
    return (hashed_errors if name.startswith("gla_hash") else stored_errors)(name, dtype, device)


def stored_errors(name, dtype, device):
    tensors, _ = load(FAMILY, name)
    module = golden_module(name, dtype, device)
    x = leaf(tensors["x"], dtype, device)
    out = module(x)
    out.backward(tensors["dy"].to(device=device, dtype=dtype))
    gradients = {f"grad.{key}": parameter.grad for key, parameter in module.named_parameters()}
    assert set(gradients) == {key for key in tensors if key.startswith("grad.")}
    made = {"out": (out, "out_f64"), "dx": (x.grad, "dx")} | {key: (value, key) for key, value in gradients.items()}
    return {label: relative_error(value.cpu(), tensors[key]) for label, (value, key) in made.items()}


def hashed_errors(name, dtype, device):
    tensors, metadata = load(FAMILY, name)
    module = golden_module(name, dtype, device)
    x = leaf(hashed_input(metadata, 5001), dtype, device)
    out = module(x)
    out.backward(hashed_input(metadata, 5003).to(device=device, dtype=dtype))
    out, dx, rows = out.cpu(), x.grad.cpu(), tensors["rows"]
    made = {
        "out": (out[:, rows], "out_f64"),
        "sum of out": (out.double().sum(1), "out_colsum_f64"),
        "dx": (dx[:, rows], "dx"),
        "sum of dx": (dx.double().sum(1), "dx_colsum"),
    }
    for key, parameter in module.named_parameters():
        gradient = parameter.grad.cpu().double()
        if gradient.ndim == 1:
            made[f"grad.{key}"] = gradient, f"grad.{key}"
            continue
        right = goldens.filler(metadata["seed"] + 6001, (gradient.shape[1],)).double()
        left = goldens.filler(metadata["seed"] + 6002, (gradient.shape[0],)).double()
        made[f"right.{key}"] = gradient @ right, f"gradprobe_right.{key}"
        made[f"left.{key}"] = left @ gradient, f"gradprobe_left.{key}"
    return {label: relative_error(value, tensors[key]) for label, (value, key) in made.items()}


def hashed_input(metadata, offset):
    case = metadata["case"]
    return goldens.filler(metadata["seed"] + offset, (case["B"], case["N"], case["dim"]), 1.7)


def plain_linear_attention(q, k, v, *, feature_map, eps):
    """The formula in the dtype of its inputs, as the original computes it: what a kernel's error is measured by."""
    assert feature_map == "elu1"
    q, k = nn.functional.elu(q) + 1, nn.functional.elu(k) + 1
    root = k.shape[2] ** -0.5
    return q @ ((k * root).transpose(-1, -2) @ (v * root)) / (q @ k.mean(2).unsqueeze(-1) + eps)


@contextlib.contextmanager
def plain_formula():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linattn, "linear_attention", plain_linear_attention)
        yield


@functools.cache
def plain_errors(name, dtype):
    """The same errors with the plain formula in place of the op: the accuracy that the dtype allows."""
    with plain_formula():
        return module_errors(name, dtype)


MODULES = goldens.names(FAMILY, "gla_full") + goldens.names(FAMILY, "gla_extreme") + goldens.names(FAMILY, "gla_hash")


@goldens.needs_goldens
@pytest.mark.parametrize("name", MODULES)
def test_module_in_float64_equals_the_golden(name):
    for label, error in module_errors(name, torch.float64).items():
        assert error < (EXACT if "out" in label.split() else STORED_IN_FLOAT32), label


@goldens.needs_goldens
@BACKENDS
@pytest.mark.parametrize("name", MODULES)
def test_module_in_float32_equals_the_golden(name, backend, device):
    if (backend, device) == ("triton", "cpu") and name.startswith("gla_hash"):
        pytest.skip("too large for Triton's interpreter; the gla_full cases run there")
    with linattn.use_backend(backend):
        errors = module_errors(name, torch.float32, device)
    assert errors["out"] < MODULE_FLOAT32
    for label, error in errors.items():
        assert error < max(MODULE_FLOAT32, 2 * plain_errors(name, torch.float32)[label]), label


@goldens.needs_goldens
@pytest.mark.parametrize("name", goldens.names(FAMILY, "gla_hash"))
def test_filler_makes_the_weights_of_the_hashed_goldens(name):
    tensors, metadata = load(FAMILY, name)
    module = golden_module(name, torch.float32)
    expected = prefixed(tensors, "check_w.")
    assert set(expected) == {key for key, _ in module.named_parameters()}
    for key, parameter in module.named_parameters():
        torch.testing.assert_close(goldens.fingerprint(parameter), expected[key], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        goldens.fingerprint(hashed_input(metadata, 5001)), tensors["check_x"], rtol=1e-12, atol=1e-12
    )


@goldens.needs_goldens
@pytest.mark.parametrize("name", goldens.names(FAMILY, "gla_quirk_cross"))
def test_reference_scales_cross_attention_by_the_query_length(name):
    """The goldens divide the numerator by N, we by M: equal to theirs with scale=1/N, M/N times ours as it is."""
    tensors, _ = load(FAMILY, name)
    module = golden_module(name)
    x, context = leaf(tensors["x"]), leaf(tensors["enc"])
    q = module.to_q(x + module.to_q_(x))
    k = module.to_k(context + module.to_k_(context))
    q, k, v = (t.unflatten(-1, (module.heads, -1)).transpose(1, 2) for t in (q, k, module.to_v(context)))
    n, m = x.shape[1], context.shape[1]
    attended = linattn.linear_attention(q, k, v, feature_map="elu1", eps=1e-4, scale=1 / n)
    out = module.to_out[0](attended.transpose(1, 2).flatten(2))
    out.backward(tensors["dy"].double())
    assert relative_error(out, tensors["out_f64"]) < EXACT
    assert relative_error(x.grad, tensors["dx"]) < STORED_IN_FLOAT32
    assert relative_error(context.grad, tensors["denc"]) < STORED_IN_FLOAT32
    for key, expected in prefixed(tensors, "grad.").items():
        assert relative_error(module.get_parameter(key).grad, expected) < STORED_IN_FLOAT32, key

    bias = module.to_out[0].bias
    ours, theirs = module(x.detach(), context.detach()) - bias, tensors["out_f64"] - bias
    assert relative_error(ours * (m / n), theirs) < EXACT


@goldens.needs_goldens
@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", goldens.names(FAMILY, "gla_full"))
def test_module_in_half_precision_is_as_good_as_the_plain_formula(name, dtype, backend, device):
    with linattn.use_backend(backend):
        errors = module_errors(name, dtype, device)
    plain = plain_errors(name, dtype)
    assert errors["out"] < 2 * plain["out"]
    assert errors["dx"] < 2 * plain["dx"]
    # Of the parameters all together: one small gradient, a sum that cancels, is a matter of luck in either.
    assert root_mean_square_of_gradients(errors) < 2 * root_mean_square_of_gradients(plain)


def root_mean_square_of_gradients(errors):
    squares = [error**2 for label, error in errors.items() if label.startswith("grad.")]
    return (sum(squares) / len(squares)) ** 0.5


def test_module_runs_under_autocast():
    module = LinearAttention(32, heads=2, projection_mid_dim=8)
    x = leaf(torch.randn(2, 40, 32), torch.float32)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16 and torch.isfinite(x.grad).all()
    module.to(torch.bfloat16)
    # As exact as the module in bfloat16, which rounds the same products (and its input and weights besides).
    rounded = relative_error(module(x.to(torch.bfloat16)), expected)
    assert relative_error(out, expected) < 2 * rounded


@pytest.mark.parametrize("mid_dim", [None, 8, -1])
def test_module_makes_one_call_of_the_op_on_views(mid_dim, monkeypatch):
    calls = []

    def recorded(q, k, v, **options):
        calls.append((q, k, v, options))
        return real(q, k, v, **options)

    real = linattn.linear_attention
    monkeypatch.setattr(linattn, "linear_attention", recorded)
    module = LinearAttention(32, heads=4, projection_mid_dim=mid_dim)
    out = module(torch.randn(2, 10, 32))
    ((q, _, _, options),) = calls
    assert out.shape == (2, 10, 32)
    assert options == {"feature_map": "elu1", "eps": 1e-4}
    assert q.shape == (2, 4, 10, 8) and q.stride() == (320, 8, 32, 1), "heads are split without a copy"


def test_module_compiles_into_one_graph():
    module = LinearAttention(32, heads=2, projection_mid_dim=8)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for tokens in (40, 65):
        x = leaf(torch.randn(2, tokens, 32), torch.float32)
        expected = module(x)
        (wanted,) = torch.autograd.grad(expected.square().sum(), x)
        out = compiled(x)
        (got,) = torch.autograd.grad(out.square().sum(), x)
        assert relative_error(out, expected) < MODULE_FLOAT32
        assert relative_error(got, wanted) < MODULE_FLOAT32


# --------------------------------------------------------------------------------------------------------- whole UNets


@goldens.needs_goldens
@pytest.mark.parametrize("name", UNETS)
def test_unet_in_float64_equals_the_golden_before_during_and_after_mounting(name):
    check_unet(name, torch.float64, "reference", "cpu", EXACT)


@goldens.needs_goldens
@BACKENDS
@pytest.mark.parametrize("name", UNETS)
def test_unet_in_float32_equals_the_golden_before_during_and_after_mounting(name, backend, device):
    check_unet(name, torch.float32, backend, device, UNET_FLOAT32)


def check_unet(name, dtype, backend, device, tolerance):
    tensors, _ = load(FAMILY, name)
    unet = golden_unet(name, dtype, device)
    with torch.no_grad(), linattn.use_backend(backend):
        before = run_unet(unet, name)
        linfusion = golden_linfusion(name).mount_to(unet)
        mounted = run_unet(unet, name)
        linfusion.unmount()
        after = run_unet(unet, name)
    assert relative_error(before.cpu(), tensors["out_base_f64"]) < tolerance
    assert relative_error(mounted.cpu(), tensors["out_linfusion_f64"]) < tolerance
    assert torch.equal(before, after)


@goldens.needs_goldens
@pytest.mark.parametrize("name", UNETS)
def test_distillation_in_float64_equals_the_golden(name):
    for label, error in distillation_errors(name, torch.float64).items():
        assert error < (EXACT if label == "losses" else STORED_IN_FLOAT32), label


@goldens.needs_goldens
@BACKENDS
@pytest.mark.parametrize("name", UNETS)
def test_distillation_in_float32_equals_the_golden(name, backend, device):
    with linattn.use_backend(backend):
        errors = distillation_errors(name, torch.float32, device)
    for label, error in errors.items():
        assert error < max(UNET_FLOAT32, 2 * plain_distillation_errors(name)[label]), label


@functools.cache
def plain_distillation_errors(name):
    with plain_formula():
        return distillation_errors(name, torch.float32)


def distillation_errors(name, dtype, device="cpu"):
    """noise + 0.5 prediction + 0.5 feature, all mean squared errors; feature = mean over the outputs of the attn1."""
    tensors, _ = load(FAMILY, name)
    teacher, student = golden_unet(name, dtype, device), golden_unet(name, dtype, device)
    teacher.requires_grad_(False)
    student.requires_grad_(False)
    linfusion = golden_linfusion(name).mount_to(student)
    assert {id(p) for p in student.parameters() if p.requires_grad} == {id(p) for p in linfusion.parameters()}
    mse = nn.functional.mse_loss
    with attention_outputs(teacher) as teacher_outputs, torch.no_grad():
        teacher_prediction = run_unet(teacher, name)
    with attention_outputs(student) as student_outputs:
        prediction = run_unet(student, name)
    noise = mse(prediction, tensors["noise_target"].to(prediction))
    prediction_loss = mse(prediction, teacher_prediction)
    features = [mse(student_outputs[key], teacher_outputs[key]) for key in teacher_outputs]
    feature = sum(features) / len(features)
    total = noise + 0.5 * prediction_loss + 0.5 * feature
    total.backward()

    first = next(iter(student_outputs))
    made = {
        "losses": (torch.stack([total, noise, prediction_loss, feature]), "losses_f64"),
        "student's first attention": (student_outputs[first], "attn_outputs_student.first"),
        "teacher's first attention": (teacher_outputs[first], "attn_outputs_teacher.first"),
    }
    gradients = {f"grad.{key}": parameter.grad for key, parameter in linfusion.named_parameters()}
    assert set(gradients) == {key for key in tensors if key.startswith("grad.")}
    made |= {key: (value, key) for key, value in gradients.items()}
    return {label: relative_error(value.cpu(), tensors[key]) for label, (value, key) in made.items()}


@contextlib.contextmanager
def attention_outputs(unet):
    """Outputs of every attn1 (after to_out, before the residual), by name, in the order of execution."""
    outputs = {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: outputs.__setitem__(name, out))
        for name, module in unet.named_modules()
        if name.endswith("attn1")
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


# --------------------------------------------------------------------------------------------------------- checkpoints


@goldens.needs_goldens
@pytest.mark.parametrize("name", UNETS)
def test_checkpoint_is_read_and_written_unchanged(name, tmp_path):
    folder = goldens.path(FAMILY, f"{name}_checkpoint")
    linfusion = LinFusion.from_pretrained(folder)
    linfusion.mount_to(golden_unet(name, torch.float32)).save_pretrained(tmp_path)

    theirs, ours = (load_file(where / "diffusion_pytorch_model.safetensors") for where in (folder, tmp_path))
    assert list(ours) == list(theirs)
    for key, tensor in theirs.items():
        assert tensor.dtype == ours[key].dtype and torch.equal(tensor, ours[key]), key
    stored = prefixed(load(FAMILY, name)[0], "linfusion.")
    assert set(stored) == set(ours) and all(torch.equal(stored[key], ours[key]) for key in ours)

    theirs, ours = (json.loads((where / "config.json").read_text()) for where in (folder, tmp_path))
    assert ours["modules_list"] == theirs["modules_list"]
    assert ours["_class_name"] == theirs["_class_name"] == "LinFusion"
    assert (ours["feature_map"], ours["eps"]) == ("elu1", 1e-4), "weights carry the attention they belong to"


@goldens.needs_goldens
def test_checkpoint_loads_straight_into_the_dtype_of_the_unet():
    unet = golden_unet("unet_tiny_sd", torch.bfloat16)
    linfusion = LinFusion.construct_for(
        unet, pretrained_model_name_or_path=goldens.path(FAMILY, "unet_tiny_sd_checkpoint")
    )
    assert {p.dtype for p in linfusion.parameters()} == {torch.bfloat16}
    assert linfusion.training == unet.training


@pytest.fixture
def saved(tmp_path):
    """A folder with LinFusion weights for small_unet(), made from its own projections."""
    linfusion = LinFusion.construct_for(small_unet(), load_pretrained=False)
    linfusion.save_pretrained(tmp_path / "linfusion")
    return tmp_path / "linfusion"


def edit_weights(folder, edit):
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})


def test_saved_weights_come_back(saved):
    edit_weights(saved, lambda weights: [weight.add_(0.01) for weight in weights.values()])
    unet = small_unet()
    linfusion = LinFusion.construct_for(unet, pretrained_model_name_or_path=saved)
    written = load_file(saved / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, written[key]) for key, value in linfusion.state_dict().items())
    mounted = run_small(unet)
    linfusion.unmount()
    LinFusion.from_pretrained(saved).mount_to(unet)
    assert torch.equal(run_small(unet), mounted)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop("0.to_q_.3.bias"), f"0.to_q_.3.bias ({FIRST})"),
        (lambda w: w.update({"0.to_q.bias": torch.zeros(16)}), f"0.to_q.bias ({FIRST})"),
        (lambda w: w.update({"0.to_k.weight": torch.zeros(16, 8)}), f"0.to_k.weight ({FIRST})"),
        (lambda w: w.update({"0.to_q_.0.weight": torch.zeros(4, 16)}), f"0.to_q_.0.weight ({FIRST})"),
        (lambda w: w.update({"99.to_q.weight": torch.zeros(16, 16)}), "99.to_q.weight"),
    ],
    ids=["missing", "unexpected", "wrong shape", "wrong width of a branch", "unknown module"],
)
def test_checkpoint_that_does_not_match_its_config_is_refused_with_the_name_of_the_module(saved, edit, message):
    edit_weights(saved, edit)
    with pytest.raises(ValueError, match=re.escape(message)):
        LinFusion.from_pretrained(saved)
    (saved.parent / "there").mkdir()
    saved.rename(saved.parent / "there" / "weights")
    with pytest.raises(ValueError, match=re.escape(message)):
        LinFusion.from_pretrained(saved.parent / "there", subfolder="weights")


def test_pickled_weights_are_refused(saved):
    with pytest.raises(ValueError, match="safetensors only"):
        LinFusion.from_pretrained(saved, use_safetensors=False)
    file = saved / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), saved / "diffusion_pytorch_model.bin")
    file.unlink()
    with pytest.raises(OSError, match="safetensors"):
        LinFusion.from_pretrained(saved)


def test_weights_for_another_attention_are_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "feature_map": "softmax"}))
    with pytest.raises(ValueError, match="softmax"):
        LinFusion.from_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projection_mid_dim": 0}, r"modules_list\[0\]: projection_mid_dim .* got 0"),
        ({"heads": 3}, "query_dim=16, heads=3"),
        ({"bias": True}, r"modules_list\[0\] must have the keys"),
    ],
)
def test_malformed_config_is_refused(change, message):
    config = LinFusion.get_default_config(small_unet())
    config["modules_list"][0].update(change)
    with pytest.raises(ValueError, match=message):
        LinFusion(**config)


# ------------------------------------------------------------------------------------------- construction from the base


@pytest.mark.parametrize("mid_dim_scale", [None, 4])
def test_without_weights_the_projections_are_those_of_the_unet(mid_dim_scale):
    unet = small_unet()
    attention = unet.get_submodule(FIRST)
    x = torch.randn(2, 64, 16)
    q, k, v = (t(x).unflatten(-1, (2, 8)).transpose(1, 2) for t in (attention.to_q, attention.to_k, attention.to_v))
    expected = linattn.linear_attention(q, k, v, feature_map="elu1", eps=1e-4)
    expected = attention.to_out[0](expected.transpose(1, 2).flatten(2))

    linfusion = LinFusion.construct_for(unet=unet, load_pretrained=False, mid_dim_scale=mid_dim_scale)
    widths = {module.to_q_[0].out_features for module in linfusion.modules_dict.values()}
    assert widths == {channels // (mid_dim_scale or 1) for channels in (16, 32)}
    assert unet.get_submodule(FIRST) is linfusion.modules_dict[FIRST]
    assert torch.equal(unet.get_submodule(FIRST)(x), expected)


def test_width_of_branches_that_cannot_be_or_are_given_by_the_weights_is_refused(saved):
    unet = small_unet()
    for scale in (0, -1, 17):
        with pytest.raises(ValueError, match=f"mid_dim_scale must be from 1 to 16, .* got {scale}"):
            LinFusion.construct_for(unet, load_pretrained=False, mid_dim_scale=scale)
    with pytest.raises(TypeError, match="mid_dim_scale=4 belongs to load_pretrained=False"):
        LinFusion.construct_for(unet, pretrained_model_name_or_path=saved, mid_dim_scale=4)
    assert LinFusion.construct_for(unet, pretrained_model_name_or_path=saved).mounted


def test_branches_that_start_at_zero_receive_gradients():
    unet = small_unet()
    linfusion = LinFusion.construct_for(unet, load_pretrained=False)
    module = linfusion.modules_dict[FIRST]
    module(torch.randn(2, 64, 16)).square().sum().backward()
    for branch in (module.to_q_, module.to_k_):
        assert branch[3].weight.grad.abs().max() > 0 and branch[3].bias.grad.abs().max() > 0


def test_base_weights_are_copied_not_shared():
    unet = small_unet()
    before = copy.deepcopy(unet.state_dict())
    linfusion = LinFusion.construct_for(unet, load_pretrained=False)
    with torch.no_grad():
        for parameter in linfusion.parameters():
            parameter.add_(1.0)
    linfusion.unmount()
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


def test_base_weights_of_a_quantised_layer_are_read_by_calling_it():
    class Packed(nn.Module):
        """Stands for a quantised linear layer: its parameter is not the weight matrix."""

        def __init__(self, linear):
            super().__init__()
            self.packed = nn.Parameter(linear.weight.detach().T / 2)
            self.bias = linear.bias

        def forward(self, x):
            return x @ (self.packed * 2) + (0 if self.bias is None else self.bias)

    unet = small_unet()
    attention = unet.get_submodule(FIRST)
    weights = attention.to_q.weight, attention.to_out[0].weight
    attention.to_q, attention.to_out[0] = Packed(attention.to_q), Packed(attention.to_out[0])
    module = LinFusion.construct_for(unet, load_pretrained=False).modules_dict[FIRST]
    torch.testing.assert_close(module.to_q.weight, weights[0], rtol=0, atol=0)
    torch.testing.assert_close(module.to_out[0].weight, weights[1], rtol=1e-6, atol=1e-7)


PUBLISHED_UNETS = {
    "sd1.5": ({"cross_attention_dim": 768, "attention_head_dim": 8}, None, 16, 272, 99_235_520),
    "sd2.1": (
        {
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        None,
        16,
        272,
        99_235_520,
    ),
    "sdxl": (
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        16,
        70,
        1190,
        435_480_800,
    ),
}


@pytest.mark.parametrize("family", PUBLISHED_UNETS)
def test_real_architectures_are_recognised_and_laid_out_as_published(family, monkeypatch):
    config, mid_dim_scale, modules, tensors, parameters = PUBLISHED_UNETS[family]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        linfusion = LinFusion(**LinFusion.get_default_config(unet, mid_dim_scale))
    assert LinFusion.architecture(unet) == family
    assert len(linfusion.modules_dict) == modules
    assert len(linfusion.state_dict()) == tensors
    assert sum(p.numel() for p in linfusion.parameters()) == parameters
    assert list(linfusion.modules_dict)[-1].startswith("mid_block"), "named_modules order: the mid block comes last"

    loaded = []
    monkeypatch.setattr(
        LinFusion, "from_pretrained", classmethod(lambda cls, path, **_: loaded.append(path) or linfusion)
    )
    LinFusion.construct_for(unet)
    assert loaded == [PUBLISHED[family]]
    assert all(isinstance(unet.get_submodule(name), LinearAttention) for name in linfusion.modules_dict)


@pytest.mark.parametrize("name", ["stabilityai/sdxl-turbo", "Lykon/dreamshaper-8"])
def test_known_repository_is_looked_up_by_name(name, monkeypatch):
    loaded = []

    def record(cls, path, **options):
        loaded.append((path, options))
        raise FileNotFoundError

    monkeypatch.setattr(LinFusion, "from_pretrained", classmethod(record))
    with pytest.raises(FileNotFoundError):
        LinFusion.construct_for(small_unet(), pipe_name_path=name, revision="main")
    assert loaded == [(PUBLISHED[KNOWN_REPOSITORIES[name]], {"torch_dtype": torch.float32, "revision": "main"})]


def test_unknown_unet_without_weights_names_the_three_remedies():
    with pytest.raises(ValueError, match="no published LinFusion weights") as error:
        LinFusion.construct_for(small_unet())
    for remedy in ("pretrained_model_name_or_path=", "pipe_name_path=", "load_pretrained=False"):
        assert remedy in str(error.value)


def test_what_to_mount_on_must_be_clear():
    unet = small_unet()
    with pytest.raises(ValueError, match="either a pipeline"):
        LinFusion.construct_for(load_pretrained=False)
    with pytest.raises(ValueError, match="either a pipeline"):
        LinFusion.construct_for(unet, unet=unet, load_pretrained=False)
    with pytest.raises(TypeError, match="a UNet"):
        LinFusion.construct_for("stabilityai/sdxl-turbo", load_pretrained=False)
    with pytest.raises(ValueError, match="no self-attention"):
        LinFusion.construct_for(nn.Linear(2, 2), load_pretrained=False)
    with pytest.raises(TypeError, match="revision"):
        LinFusion.construct_for(unet, load_pretrained=False, revision="main")
    assert LinFusion.construct_for(unet=unet, load_pretrained=False).mounted


# ------------------------------------------------------------------------------------------------ mounting, unmounting


def test_unmounting_leaves_no_trace():
    unet = small_unet()
    before, image = trace(unet), run_small(unet)
    linfusion = LinFusion.construct_for(unet, load_pretrained=False)
    assert trace(unet)["modules"] != before["modules"]
    assert not torch.equal(run_small(unet), image)
    linfusion.unmount()
    assert trace(unet) == before
    assert torch.equal(run_small(unet), image)
    linfusion.mount_to(unet)
    linfusion.unmount()
    assert trace(unet) == before


def test_state_dict_of_the_unet_holds_the_mounted_weights():
    unet = small_unet()
    plain = list(unet.state_dict())
    linfusion = LinFusion.construct_for(unet, load_pretrained=False)
    state = unet.state_dict()
    assert [key for key in state if ".to_q_." not in key and ".to_k_." not in key] == plain
    for i, name in enumerate(linfusion.modules_dict):
        weight = linfusion.get_parameter(f"{i}.to_q_.0.weight")
        assert state[f"{name}.to_q_.0.weight"].data_ptr() == weight.data_ptr()


def test_originals_follow_a_unet_that_was_cast_while_mounted():
    unet = small_unet()
    linfusion = LinFusion.construct_for(unet, load_pretrained=False)
    nn.Module.to(unet, torch.float64)
    unet.train()
    assert {p.dtype for p in linfusion.parameters()} == {torch.float64}
    linfusion.unmount()
    assert {p.dtype for p in unet.parameters()} == {torch.float64}
    assert all(module.training for module in unet.modules())
    assert run_small(unet).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_mounting_follows_the_unet_without_a_warning(dtype, caplog):
    unet = nn.Module.to(small_unet(), dtype)
    with warnings.catch_warnings(), caplog.at_level("WARNING"):
        warnings.simplefilter("error")
        linfusion = LinFusion.construct_for(unet, load_pretrained=False)
        out = run_small(unet)
    assert out.dtype == dtype and torch.isfinite(out).all()
    assert {p.dtype for p in linfusion.parameters()} == {dtype}
    assert not caplog.records


def test_mounted_unet_can_be_copied():
    unet = small_unet()
    LinFusion.construct_for(unet, load_pretrained=False)
    clone = copy.deepcopy(unet)
    assert torch.equal(run_small(clone), run_small(unet))
    assert not {id(p) for p in clone.parameters()} & {id(p) for p in unet.parameters()}


def test_compiled_unet_is_looked_through():
    unet = small_unet()
    compiled = torch.compile(unet, backend="eager")
    linfusion = LinFusion.construct_for(compiled, load_pretrained=False)
    assert isinstance(unet.get_submodule(FIRST), LinearAttention)
    with torch.no_grad():
        assert relative_error(run_small(compiled), run_small(unet)) < UNET_FLOAT32
    linfusion.unmount()


def test_mounting_twice_is_refused():
    unet, other = small_unet(), small_unet()
    linfusion = LinFusion.construct_for(unet, load_pretrained=False)
    before = trace(unet)
    with pytest.raises(RuntimeError, match=f"mounted on this UNet already \\({FIRST}"):
        LinFusion.construct_for(unet, load_pretrained=False)
    with pytest.raises(RuntimeError, match="this LinFusion is mounted already"):
        linfusion.mount_to(other)
    with pytest.raises(RuntimeError, match="mounted on this UNet already"):
        LinFusion(**LinFusion.get_default_config(other)).mount_to(unet)
    assert trace(unet) == before
    linfusion.unmount()


def test_unmounting_what_is_not_mounted_is_refused():
    unet = small_unet()
    linfusion = LinFusion(**LinFusion.get_default_config(unet))
    with pytest.raises(RuntimeError, match="not mounted"):
        linfusion.unmount()
    linfusion.mount_to(unet).unmount()
    with pytest.raises(RuntimeError, match="not mounted"):
        linfusion.unmount()


def test_unmounting_is_refused_where_somebody_else_replaced_a_module():
    unet = small_unet()
    linfusion = LinFusion.construct_for(unet, load_pretrained=False)
    parent, foreign = unet.get_submodule(FIRST.rpartition(".")[0]), nn.Identity()
    parent.attn1 = foreign
    with pytest.raises(RuntimeError, match=FIRST):
        linfusion.unmount()
    assert parent.attn1 is foreign and linfusion.mounted


MISFITS = {
    "channels": ({"dim_n": 64}, {}, "32 channels and 2 heads, these weights are for 64 and 2"),
    "heads": ({"heads": 4}, {}, "32 channels and 2 heads, these weights are for 32 and 4"),
    "absent": ({"module_name": "down_blocks.7.attn1"}, {}, "down_blocks.7.attn1: the UNet has no such module"),
    "no attention": ({"module_name": "conv_in"}, {}, "conv_in: expected a diffusers Attention, found Conv2d"),
    "residual": ({}, {"residual_connection": True}, "residual_connection"),
    "rescale": ({}, {"rescale_output_factor": 2.0}, "rescale_output_factor"),
    "group norm": ({}, {"norm_num_groups": 4}, "group_norm"),
    "qk norm": ({}, {"qk_norm": "layer_norm"}, "norm_q, norm_k"),
    "bias": ({}, {"bias": True}, "bias"),
    "cross attention": ({}, {"cross_attention_dim": 24}, "cross_attention_dim"),
    "grouped heads": ({}, {"kv_heads": 1}, "inner_kv_dim=16"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_module_that_does_not_fit_is_refused_by_name_before_anything_changes(case):
    entry_change, attention_options, message = MISFITS[case]
    unet = small_unet()
    config = LinFusion.get_default_config(unet)
    names = [entry["module_name"] for entry in config["modules_list"]]
    # The last module is the one that does not fit: the earlier ones must not have been touched by then.
    if attention_options:
        parent = unet.get_submodule(names[-1].rpartition(".")[0])
        heads = parent.attn1.heads
        dim = parent.attn1.query_dim
        parent.attn1 = Attention(dim, heads=heads, dim_head=dim // heads, **attention_options)
    config["modules_list"][-1].update(entry_change)
    linfusion = LinFusion(**config)
    before = trace(unet)
    name = config["modules_list"][-1]["module_name"]
    with pytest.raises(ValueError, match="does not fit") as error:
        linfusion.mount_to(unet)
    assert name in str(error.value) and message in str(error.value)
    assert trace(unet) == before and not linfusion.mounted


# ------------------------------------------------------------------------------- what reaches the modules from outside


def test_attention_mask_is_refused():
    unet = small_unet()
    linfusion = LinFusion.construct_for(unet, load_pretrained=False)
    module = linfusion.modules_dict[FIRST]
    with pytest.raises(ValueError, match="no attention_mask, got one of shape \\(2, 1, 64\\)"):
        module(torch.randn(2, 64, 16), attention_mask=torch.zeros(2, 1, 64))
    with pytest.raises(ValueError, match="no attention_mask"):
        run_small(unet, attention_mask=torch.ones(2, 64))
    with pytest.raises(ValueError, match="batch, tokens, channels"):
        module(torch.randn(2, 16, 8, 8))


def test_other_tokens_as_keys_are_used_not_ignored():
    module = LinearAttention(32, heads=2, projection_mid_dim=8)
    x, context = torch.randn(2, 10, 32), torch.randn(2, 7, 32)
    out = module(x, encoder_hidden_states=context)
    assert out.shape == x.shape and not torch.allclose(out, module(x))
    # The attention is a mean over the keys, so repeating each of them changes nothing.
    assert relative_error(module(x, encoder_hidden_states=context.repeat(1, 3, 1)), out) < MODULE_FLOAT32


@pytest.mark.parametrize(
    "intrude",
    [
        lambda unet: unet.set_attn_processor(AttnProcessor2_0()),
        lambda unet: unet.set_attn_processor({name: AttnProcessor2_0() for name in unet.attn_processors}),
        lambda unet: unet.set_attention_slice(1),
        lambda unet: unet.get_submodule(FIRST).set_processor(SlicedAttnProcessor(1)),
        lambda unet: unet.fuse_qkv_projections(),
    ],
    ids=["one processor", "a dict of processors", "slicing", "module", "fused qkv"],
)
def test_processors_from_outside_are_refused_with_a_warning(intrude):
    unet = small_unet()
    LinFusion.construct_for(unet, load_pretrained=False)
    expected = run_small(unet)
    with pytest.warns(UserWarning, match="LinFusion"):
        intrude(unet)
    assert isinstance(unet.attn_processors[f"{FIRST}.processor"], LinearAttnProcessor)
    assert relative_error(run_small(unet), expected) < UNET_FLOAT32


def test_processor_can_be_rebuilt_without_arguments():
    """IP-Adapter loading rebuilds every processor as `type(processor)()`: this must pass without a warning."""
    unet = small_unet()
    LinFusion.construct_for(unet, load_pretrained=False)
    expected = run_small(unet)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unet.set_attn_processor({name: type(processor)() for name, processor in unet.attn_processors.items()})
    assert torch.equal(run_small(unet), expected)


# ---------------------------------------------------------------------------------------------------------------- LoRA


def add_lora(unet):
    peft = pytest.importorskip("peft", reason='LoRA needs peft: pip install "linattn[diffusers]"')
    unet.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in sorted(unet.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def test_lora_after_mounting_changes_the_output_and_is_trained_through_the_op():
    unet = small_unet()
    linfusion = LinFusion.construct_for(unet, load_pretrained=False)
    plain = run_small(unet)
    add_lora(unet)
    changed = run_small(unet)
    assert relative_error(changed, plain) > 1e-3
    module = linfusion.modules_dict[FIRST]
    module(torch.randn(2, 64, 16)).square().sum().backward()
    for slot in ("to_q", "to_k", "to_v", "to_out.0"):
        assert module.get_submodule(slot).lora_A["default"].weight.grad.abs().max() > 0, slot
    unet.disable_adapters()
    assert torch.equal(run_small(unet), plain)


def test_lora_before_and_after_mounting_gives_the_same_image():
    first, second = small_unet(), small_unet()
    add_lora(first)
    mounted = [LinFusion.construct_for(first, load_pretrained=False)]
    mounted.append(LinFusion.construct_for(second, load_pretrained=False))
    add_lora(second)
    assert torch.equal(run_small(first), run_small(second))
    with_softmax = small_unet()
    add_lora(with_softmax)
    for unet, linfusion in zip((first, second), mounted, strict=True):
        linfusion.unmount()
        assert torch.equal(run_small(unet), run_small(with_softmax)), "the LoRA stays with the UNet"


def test_unmounting_with_a_lora_from_before_leaves_no_trace():
    unet = small_unet()
    add_lora(unet)
    before = trace(unet)
    linfusion = LinFusion.construct_for(unet, load_pretrained=False)
    linfusion.unmount()
    assert trace(unet) == before


def test_lora_unloaded_while_mounted_is_gone_after_unmounting():
    unet, plain = small_unet(), small_unet()
    add_lora(unet)
    linfusion = LinFusion.construct_for(unet, load_pretrained=False)
    unet.unload_lora()
    reference = LinFusion.construct_for(plain, load_pretrained=False)
    assert torch.equal(run_small(unet), run_small(plain))
    linfusion.unmount()
    reference.unmount()
    assert list(unet.state_dict()) == list(plain.state_dict())
    assert torch.equal(run_small(unet), run_small(plain))


def test_fused_lora_goes_with_the_unet_both_ways_to_the_last_bit():
    unet, plain = small_unet(), small_unet()
    add_lora(unet)
    unet.fuse_lora()
    before, image = trace(unet), run_small(unet)
    weights = copy.deepcopy(unet.state_dict())
    linfusion = LinFusion.construct_for(unet, load_pretrained=False)
    LinFusion.construct_for(plain, load_pretrained=False)
    add_lora(plain)
    plain.fuse_lora()
    # Taken out of the projections that were copied, then merged again: one rounding of the weights each.
    assert relative_error(run_small(unet), run_small(plain)) < UNET_FLOAT32
    linfusion.unmount()
    assert trace(unet) == before and torch.equal(run_small(unet), image)
    assert all(torch.equal(value, weights[key]) for key, value in unet.state_dict().items())


def test_fused_lora_leaves_weights_that_are_saved_without_it(saved):
    unet = small_unet()
    add_lora(unet)
    unet.fuse_lora()
    linfusion = LinFusion.construct_for(unet, pretrained_model_name_or_path=saved).unmount()
    written = load_file(saved / "diffusion_pytorch_model.safetensors")
    for key, value in linfusion.state_dict().items():
        torch.testing.assert_close(value, written[key], rtol=0, atol=2 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("unload", [False, True], ids=["kept", "unloaded"])
def test_lora_unfused_while_mounted_is_out_of_the_originals_too(unload):
    unet, plain = small_unet(), small_unet()
    add_lora(unet)
    unet.fuse_lora()
    linfusion = LinFusion.construct_for(unet, load_pretrained=False)
    unet.unfuse_lora()
    # What happens to the LoRA afterwards must not matter to the weights it was fused into before.
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.mul_(3)
    unet.unload_lora() if unload else unet.disable_adapters()
    linfusion.unmount()
    assert relative_error(run_small(unet), run_small(plain)) < UNET_FLOAT32


def test_lora_changed_and_fused_anew_while_mounted_is_fused_into_the_originals():
    unet, plain = small_unet(), small_unet()
    add_lora(unet)
    unet.fuse_lora()
    linfusion = LinFusion.construct_for(unet, load_pretrained=False)
    add_lora(plain)
    for model in (unet, plain):
        model.unfuse_lora() if model is unet else None
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", 0.25)
        model.fuse_lora()
    linfusion.unmount()
    assert relative_error(run_small(unet), run_small(plain)) < UNET_FLOAT32


def test_lora_fused_and_unloaded_while_mounted_stays_where_it_was_fused():
    unet, fused = small_unet(), small_unet()
    for model in (unet, fused):
        add_lora(model)
        model.fuse_lora()
    linfusion = LinFusion.construct_for(unet, load_pretrained=False)
    unet.unload_lora()
    linfusion.unmount()
    fused.unload_lora()
    assert torch.equal(run_small(unet), run_small(fused))


def test_fused_lora_that_cannot_be_taken_out_is_refused_by_name():
    peft = pytest.importorskip("peft", reason='LoRA needs peft: pip install "linattn[diffusers]"')
    unet = small_unet()
    unet.add_adapter(peft.LoraConfig(r=2, use_dora=True, target_modules=["to_q"]))
    linfusion = LinFusion.construct_for(unet, load_pretrained=False).unmount()
    unet.fuse_lora()
    before = trace(unet)
    with pytest.raises(ValueError, match=f"cannot mount while a LoRA is fused into {FIRST}.to_q: .*DoRA"):
        linfusion.mount_to(unet)
    assert trace(unet) == before and not linfusion.mounted
    unet.unfuse_lora()
    linfusion.mount_to(unet)
    unet.fuse_lora()
    with pytest.raises(ValueError, match="cannot unmount while a LoRA is fused"):
        linfusion.unmount()
    assert linfusion.mounted


def test_lora_fused_into_a_quantised_layer_is_refused_by_name():
    class Packed(nn.Linear):
        """Stands for a quantised linear layer: what is in its weight cannot be taken out by subtraction."""

    unet = small_unet()
    add_lora(unet)
    unet.fuse_lora()
    wrapper = unet.get_submodule(FIRST).to_v
    wrapper.base_layer = Packed(16, 16, bias=False)
    with pytest.raises(ValueError, match=f"fused into {FIRST}.to_v: the layer under it is a Packed"):
        LinFusion.construct_for(unet, load_pretrained=False)
    assert wrapper is unet.get_submodule(FIRST).to_v


def test_lora_in_the_modules_is_not_saved_with_them(tmp_path):
    unet = small_unet()
    add_lora(unet)
    linfusion = LinFusion.construct_for(unet, load_pretrained=False)
    with pytest.raises(ValueError, match=r"attached at 0\.to_q"):
        linfusion.save_pretrained(tmp_path)
    linfusion.unmount().save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "diffusion_pytorch_model.safetensors")) == 17 * len(linfusion.modules_dict)


# ----------------------------------------------------------------------------------------------- pipelines, the example


@pytest.fixture(scope="module")
def pipeline():
    pytest.importorskip("transformers", reason='the pipeline needs the extra: pip install "linattn[diffusers]"')
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(linattn.bundled.path("tiny_sd"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, steps=2, **kwargs):
    generator = torch.Generator().manual_seed(0)
    kwargs = {"prompt": "a seven, a two and a four", "guidance_scale": 2.5, "output_type": "np", **kwargs}
    return pipe(num_inference_steps=steps, generator=generator, **kwargs).images


def test_pipeline_draws_with_linear_attention_at_any_size_and_is_restored(pipeline):
    before, drawn = trace(pipeline.unet), draw(pipeline)
    linfusion = LinFusion.construct_for(pipeline, load_pretrained=False)
    mounted = draw(pipeline)
    assert mounted.shape == drawn.shape and abs(mounted - drawn).max() > 1e-3
    assert draw(pipeline, height=72, width=104).shape == (1, 72, 104, 3)
    linfusion.unmount()
    assert trace(pipeline.unet) == before
    assert (draw(pipeline) == drawn).all()


def test_image_to_image_pipeline_shares_the_mounted_unet(pipeline):
    from diffusers import StableDiffusionImg2ImgPipeline

    second = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 144, 144, generator=torch.Generator().manual_seed(5))
    stock = draw(second, steps=4, image=image, strength=0.5)
    linfusion = LinFusion.construct_for(second, load_pretrained=False)
    mounted = draw(second, steps=4, image=image, strength=0.5)
    linfusion.unmount()
    assert mounted.shape == stock.shape and abs(mounted - stock).max() > 1e-4


def test_example_draws_what_the_mounted_pipeline_draws(pipeline, tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    script = Path(__file__).resolve().parents[1] / "examples" / "linfusion_text2image.py"
    linfusion = LinFusion.construct_for(
        pipeline, pretrained_model_name_or_path=linattn.bundled.path("tiny_sd_linfusion")
    )
    expected = (draw(pipeline, steps=3) * 255).round()
    linfusion.unmount()
    linfusion.save_pretrained(tmp_path / "weights")
    for name, options in {
        "a.png": [],
        "b.png": ["--model", linattn.bundled.path("tiny_sd"), "--weights", tmp_path / "weights"],
    }.items():
        command = [sys.executable, script, "--steps", "3", "--out", tmp_path / name, *options]
        # One thread as here: with another number torch's own layers round differently.
        subprocess.run(list(map(str, command)), check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        drawn = numpy.asarray(image_module.open(tmp_path / name), dtype="float32")
        assert drawn.shape == expected.shape[1:]
        assert abs(drawn - expected[0]).max() <= 1


# ------------------------------------------------------------------------------------------------------------ packaging


def test_adapters_import_without_diffusers_and_say_what_is_missing():
    code = """
import sys
sys.modules["diffusers"] = None
import linattn.adapters
try:
    linattn.adapters.LinFusion
except ImportError as error:
    assert 'pip install "linattn[diffusers]"' in str(error), error
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
