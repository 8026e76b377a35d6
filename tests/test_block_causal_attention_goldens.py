"""Recorded results of Inf-DiT's own block attention, on every backend: the attention alone, with slot embeddings, with
norm and rotation before it, in the other direction, its gradients, and one layer of the model in its real geometry.

What its `ar` mode gives (`hi.ar` of model_forward) is no golden: it is a defect of the original, whose `full` is what
was trained.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import goldens, tester
from test_block_causal_attention import (
    attention,
    check,
    less_in_the_interpreter,  # noqa: F401 (a fixture)
    plain_attention,
)
from test_linear_attention import NAME

import linattn
from linattn import reference

pytestmark = [goldens.needs_goldens, pytest.mark.usefixtures("poison", "one_thread")]

FAMILY = "infdit"
FILES = goldens.names(FAMILY, "block_attention_")

# README of the goldens: recorded in float32, reached to 1e-6 by an independent implementation; 1e-5 is suggested.
FLOAT64, FLOAT32 = 1e-6, 1e-5


def rotated(x, rows, columns):
    """2-D RoPE of (..., tokens, D): the first half of D by the row of a token, the second by its column, in pairs."""
    half = x.shape[-1] // 2
    frequency = 1 / 10000.0 ** (torch.arange(0, half, 2, device=x.device, dtype=torch.float64) / half)
    token = torch.arange(rows * columns, device=x.device)
    angle = torch.cat([(token // columns)[:, None] * frequency, (token % columns)[:, None] * frequency], 1)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def plain(attend, q, k, v, **options):
    return attend(q, k, v, **options)[0]


def repos(attend, q, k, v, slot_embed, **options):
    return attend(q, k, v, slot_embed=slot_embed, **options)[0]


def whole(attend, q, k, v, slot_embed, weight, bias, height, width, **options):
    """Norm (one for q and k) and rotation before it."""
    q, k = (rotated(F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6), height, width) for x in (q, k))
    return attend(q, k, v, slot_embed=slot_embed, height=height, width=width, **options)[0]


def right_bottom(attend, q, k, v, slot_embed, weight, bias, **options):
    """The other direction: tokens in reverse order; its slots are [self, bottom-right, bottom, right]."""

    def backwards(q, k, v, slot_embed, **options):
        out, lse = attend(q.flip(2), k.flip(2), v.flip(2), slot_embed=slot_embed[[0, 1, 3, 2]], **options)
        return out.flip(2), lse.flip(2)

    return whole(backwards, q, k, v, slot_embed, weight, bias, **options)


def self_only(attend, q, k, v, height, width, block, **options):
    """Each block an image of its own."""

    def cut(x):
        x = x.unflatten(2, (height // block, block, width // block, block)).permute(0, 2, 4, 1, 3, 5, 6)
        return x.flatten(4, 5).flatten(0, 2)

    out = attend(cut(q), cut(k), cut(v), height=block, width=block, block=block, edge="drop", **options)[0]
    out = out.unflatten(0, (q.shape[0], height // block, width // block)).unflatten(4, (block, block))
    return out.permute(0, 3, 1, 4, 2, 5, 6).flatten(2, 5)


VARIANTS = {"plain": plain, "repos": repos, "all": whole, "all_rb": right_bottom, "self_only": self_only}
RECORDED = [
    (file, variant) for file in FILES for variant in VARIANTS if "hd80" not in file or variant in ("repos", "all")
]
INPUTS = {
    "plain": ("q", "k", "v"),
    "repos": ("q", "k", "v", "slot_embed"),
    "all": ("q", "k", "v", "slot_embed", "weight", "bias"),
    "all_rb": ("q", "k", "v", "slot_embed", "weight", "bias"),
    "self_only": ("q", "k", "v"),
}
every_recording = pytest.mark.parametrize(("golden", "variant"), RECORDED)


def case(name, variant, dtype, device="cpu"):
    """(tensors, options, grad_out, expected) of one variant; expected is named as tester.evaluate names it."""
    file, _ = goldens.load(FAMILY, name)
    tensors = {key: file[key].transpose(1, 2) for key in "qkv"}
    tensors |= {"slot_embed": file["re_pos_embed"], "weight": file["q_norm.weight"], "bias": file["q_norm.bias"]}
    tensors = {key: tensors[key].to(device=device, dtype=dtype) for key in INPUTS[variant]}
    height, width = file["hw_tokens"].tolist()
    options = {"height": height, "width": width, "block": file["block"].item()}
    expected = {"output 0": file[f"{variant}.out"].transpose(1, 2)}
    if variant == "all":
        expected |= {f"gradient of {key}": file[f"all.d{key}"].transpose(1, 2) for key in "qkv"}
        expected |= {"gradient of slot_embed": file["all.d_re_pos_embed"]}
        expected |= {f"gradient of {key}": file[f"all.d_q_norm.{key}"] for key in ("weight", "bias")}
    return tensors, options, file["grad_out"].transpose(1, 2).to(device=device, dtype=dtype), expected


def assert_equals_the_golden(name, variant, dtype, backend, device, bound):
    tensors, options, grad, expected = case(name, variant, dtype, device)

    def call(**arguments):
        return VARIANTS[variant](attention, **arguments)

    with linattn.use_backend(backend):
        actual = tester.evaluate(call, tensors, options, (grad,) if variant == "all" else None)
    assert actual.keys() == expected.keys()
    for what, truth in expected.items():
        assert goldens.relative_error(actual[what].cpu(), truth) < bound, what


@pytest.mark.parametrize("backend", ["reference"])
@every_recording
def test_float64_equals_the_golden(golden, variant, backend):
    assert_equals_the_golden(golden, variant, torch.float64, backend, "cpu", FLOAT64)


@tester.on_every_backend("block_causal_attention")
@every_recording
def test_float32_equals_the_golden(golden, variant, backend, device):
    quick = variant in ("plain", "repos") or (golden, variant) == ("block_attention_hd80", "all")
    if tester.interpreted(backend, device) and not quick:
        pytest.skip("too slow in Triton's interpreter")
    assert_equals_the_golden(golden, variant, torch.float32, backend, device, FLOAT32)


@tester.on_every_backend("block_causal_attention")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=NAME.get)
@pytest.mark.parametrize(("golden", "variant"), [row for row in RECORDED if row[1] in ("plain", "repos")])
def test_half_precision_keeps_within_the_rule_of_the_golden(golden, variant, dtype, backend, device):
    if tester.interpreted(backend, device) and (dtype == torch.float16 or "hd80" not in golden):
        pytest.skip("too slow in Triton's interpreter")
    tensors, options, _, expected = case(golden, variant, dtype, device)
    kinds = (attention, reference.block_causal_attention, plain_attention)
    found = check(*kinds, tensors, options, backend)["output 0"]
    # And the whole stays as near to the recorded result as inputs of this precision allow.
    rough = plain_attention(**tensors, **options)[0]
    ours, theirs = (goldens.relative_error(x.cpu(), expected["output 0"]) for x in (found, rough))
    assert ours < max(2 * theirs, torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", ["reference"])
@pytest.mark.parametrize("golden", ["block_attention_small"])
def test_neither_the_order_of_the_slots_nor_the_repeated_blocks_are_free(golden, backend):
    tensors, options, _, expected = case(golden, "repos", torch.float64)
    embed = tensors.pop("slot_embed")
    wrong = {
        "reading order": {"slot_embed": embed[[0, 1, 3, 2]]},
        "no repeated blocks": {"slot_embed": embed, "edge": "drop"},
        "no embedding": {},
    }
    for what, change in wrong.items():
        out = linattn.block_causal_attention(**tensors, **options, **change)
        assert goldens.relative_error(out, expected["output 0"]) > 1e-3, what


# ------------------------------------------------------------------------------------- a layer in the real geometry


def one_layer(attend, file, dtype, device):
    """Inf-DiT of one layer and one head, 2 x 2 blocks of 32 x 32 tokens, as spelled in its checkpoint: D(x, sigma)."""
    w = {key[2:]: x.to(device=device, dtype=dtype) for key, x in file.items() if key.startswith("w.")}

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x, name=None):
        affine = (None, None) if name is None else (w[f"{name}.weight"], w[f"{name}.bias"])
        return F.layer_norm(x, x.shape[-1:], *affine, 1e-6)

    def modulated(x, shift, scale):
        return x * (1 + scale) + shift

    mixin = "mixins.adaln_layer."
    x, sigma = file["hi.x"].to(device=device, dtype=dtype), file["hi.sigma"].to(device=device, dtype=dtype)
    lr = file["lr_u8"].to(device=device, dtype=dtype) / 127.5 - 1
    lr_up = F.interpolate(lr, scale_factor=4, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    root = (sigma**2 + 0.25).sqrt()
    frequency = 1 / 10000.0 ** (torch.arange(96, device=device, dtype=dtype) / 96)
    phase = sigma.log() / 4 * frequency
    time = linear("time_embed.mlp.2", F.silu(linear("time_embed.mlp.0", torch.cat([phase.cos(), phase.sin()])[None])))
    vector = file["vector"].to(device=device, dtype=dtype)
    vector = linear("cond_embed.map_vector.2", F.silu(linear("cond_embed.map_vector.0", vector)))
    emb = F.silu(time + vector)
    assert goldens.relative_error(emb.cpu(), file["hi.act.emb"]) < 1e-5

    side, block = x.shape[-1] // 4, 32  # tokens
    conv = "mixins.patch_embed.proj"
    image = torch.cat([x, lr_up], 1) / root
    tokens = F.conv2d(image, w[f"{conv}.weight"], w[f"{conv}.bias"], stride=4).flatten(2).mT

    shift1, scale1, shift2, scale2 = linear(f"{mixin}adaLN_modulations.0.1", F.silu(emb)).chunk(4, -1)
    attn = "transformer.layers.0.attention"
    qkv = linear(f"{attn}.query_key_value", modulated(norm(tokens), shift1, scale1))
    q, k, v = (x.unsqueeze(1) for x in qkv.chunk(3, -1))
    q, k = (rotated(norm(x, f"{mixin}q_layer_norm.0"), side, side) for x in (q, k))
    embed = w[f"{mixin}re_pos_embed"][0]
    out = attend(q, k, v, side, side, block, slot_embed=embed)[0].squeeze(1)
    tokens = tokens + linear(f"{attn}.dense", out)

    # Cross-attention of each block over the low-resolution tokens of 3 x 3 blocks around it.
    def cut(x):
        x = x.unflatten(1, (side // block, block, side // block, block)).transpose(2, 3)
        return x.flatten(3, 4).flatten(1, 2)

    lr_tokens = F.conv2d(lr, w[f"{mixin}proj_lr.weight"], w[f"{mixin}proj_lr.bias"], stride=2)
    windows = F.pad(lr_tokens, (16,) * 4).unfold(2, 48, 16).unfold(3, 48, 16).permute(0, 2, 3, 4, 5, 1)
    windows = windows.flatten(3, 4).flatten(1, 2)
    cross = f"{mixin}cross_attention"
    q = norm(linear(f"{cross}.query", cut(norm(tokens))), f"{mixin}cross_q_ln")
    k, v = linear(f"{cross}.key_value", windows).chunk(2, -1)
    k = norm(k, f"{mixin}cross_k_ln") + w[f"{mixin}lr_key_position_embedding"].squeeze(2)
    q = q + w[f"{mixin}lr_query_position_embedding"].squeeze(2)
    out = linear(f"{cross}.dense", F.scaled_dot_product_attention(q, k, v))
    out = out.unflatten(2, (block, block)).unflatten(1, (side // block, side // block)).transpose(2, 3).flatten(1, 4)
    tokens = tokens + out

    hidden = modulated(norm(tokens, f"{mixin}post_cross_attention_layernorm"), shift2, scale2)
    mlp = "transformer.layers.0.mlp"
    tokens = tokens + linear(f"{mlp}.dense_4h_to_h", F.gelu(linear(f"{mlp}.dense_h_to_4h", hidden), approximate="tanh"))

    shift, scale = linear("mixins.final_layer.adaLN_modulation.1", F.silu(emb)).chunk(2, -1)
    pixels = linear("mixins.final_layer.linear", modulated(norm(norm(tokens)), shift, scale))
    pixels = pixels.unflatten(2, (4, 4, 3)).unflatten(1, (side, side)).permute(0, 5, 1, 3, 2, 4)
    pixels = pixels.flatten(4, 5).flatten(2, 3)
    return 0.25 / root**2 * x + sigma * 0.5 / root * pixels


@tester.on_every_backend("block_causal_attention", ("cuda", "cpu", "reference"))
@pytest.mark.parametrize("golden", ["real_block"])
def test_one_layer_in_the_real_geometry_equals_the_golden(golden, backend, device):
    file, _ = goldens.load(FAMILY, golden)
    with linattn.use_backend(backend), torch.no_grad():
        pixels = one_layer(attention, file, torch.float32, device).cpu()
    found = {
        "full_crop_every4": pixels[..., ::4, ::4],
        "full_block_mean": F.avg_pool2d(pixels, 16),
        "full_row_around_seam": pixels[..., 126:130, :],
    }
    for what, x in found.items():
        # README of the goldens: 1e-5 per call.
        assert goldens.relative_error(x, file[f"hi.{what}"]) < 1e-5, what
