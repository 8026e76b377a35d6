"""The network of Inf-DiT: recorded results of the original, its weights and names, gradients, what reaches what."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import goldens, tester
from helpers.goldens import relative_error

pytest.importorskip("diffusers", reason='Inf-DiT needs the extra: pip install "linattn[diffusers]"')

import linattn
from linattn.adapters import InfDiTTransformer2DModel
from linattn.adapters.infdit import official
from linattn.schedulers.edm import preconditioning

pytestmark = pytest.mark.usefixtures("one_thread")

#: README of the goldens: float32, relative, per call; and for the network in bfloat16.
FLOAT32, BFLOAT16 = 1e-5, 2e-2
SMALL = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "block_size": 4, "vector_dim": 0}
PUBLISHED = goldens.ROOT.parent / "spec" / "infdit_state_dict.txt"


def from_golden(name, weights=None):
    """A model with the weights of a golden file, and its tensors, 16-bit ones widened."""
    tensors, metadata = goldens.load("infdit", name)
    stored, _ = goldens.load("infdit", weights or name)
    sizes = metadata["meta"]
    model = InfDiTTransformer2DModel(
        **{key: sizes[key] for key in ("hidden_size", "num_layers", "num_attention_heads", "vector_dim")},
        block_size=sizes["image_block_size"] // 4,
    )
    model.load_official_state_dict({key[2:]: x.float() for key, x in stored.items() if key.startswith("w.")})
    tensors = {key: x.float() if x.dtype == torch.float16 else x for key, x in tensors.items()}
    return model.eval(), tensors


def enlarged(lr):
    return F.interpolate(lr, scale_factor=4, mode="bicubic", antialias=True).clamp(-1, 1)


def denoised(model, x, sigma, lr, vector, **options):
    """D(x, sigma) of the preconditioned network, in the type of x."""
    c = preconditioning(sigma)
    inputs = torch.cat([x, enlarged(lr.float())], 1) * c.c_in.view(-1, 1, 1, 1)
    out = model(inputs.to(x.dtype), c.c_noise, lr.to(x.dtype), vector, **options).sample
    return c.c_skip.view(-1, 1, 1, 1) * x + c.c_out.view(-1, 1, 1, 1) * out


def small(seed=0, **sizes):
    """A small model whose parameters are all at work: those that start at zero are drawn as well."""
    torch.manual_seed(seed)
    model = InfDiTTransformer2DModel(**SMALL | sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def inputs(model, height, width, batch=1, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    size = model.config.sr_scale
    x = torch.randn(batch, model.config.in_channels, height, width, generator=generator, dtype=dtype)
    lr = torch.randn(batch, 3, height // size, width // size, generator=generator, dtype=dtype)
    time = torch.randn(batch, generator=generator)
    vector = None
    if model.config.vector_dim:
        vector = torch.randn(batch, model.config.vector_dim, generator=generator, dtype=dtype)
    return x, time, lr, vector


# ------------------------------------------------------------------------------------------------------------- goldens


@goldens.needs_goldens
@tester.on_every_backend("block_causal_attention")
@pytest.mark.parametrize("noise", ["hi", "lo"])
def test_whole_network_gives_what_the_original_gave(noise, backend, device):
    tester.skip_if_slow(backend, device, 4 * 1024, torch.float32)
    model, golden = from_golden("model_forward", "tiny_weights")
    arguments = [golden[key] for key in (f"{noise}.x", f"{noise}.sigma", "lr", "vector")]
    with linattn.use_backend(backend), torch.no_grad():
        found = denoised(model.to(device), *(x.to(device) for x in arguments)).cpu()
    model.to("cpu")
    assert relative_error(found, golden[f"{noise}.full"]) < FLOAT32
    if noise == "hi":
        # The original's own "ar" is another function; that of this name here is exact.
        assert relative_error(golden["hi.ar"], golden["hi.full"]) > 1e-2
        assert relative_error(denoised(model, *arguments, schedule="ar"), golden["hi.full"]) < FLOAT32


@tester.on_every_backend("block_causal_attention", only=("cpu", "triton", "cuda"))
def test_small_network_gives_the_same_on_every_backend(backend, device):
    model = small(num_layers=1)
    arguments = inputs(model, 32, 16)[:3]
    with torch.no_grad():
        with linattn.use_backend("reference"):
            expected = model(*arguments).sample
        with linattn.use_backend(backend):
            found = model.to(device)(*(x.to(device) for x in arguments)).sample.cpu()
    assert relative_error(found, expected) < FLOAT32


@goldens.needs_goldens
def test_every_stage_gives_what_the_original_gave():
    model, golden = from_golden("model_forward", "tiny_weights")
    seen = {}

    def keep(name, place=lambda output: output):
        return lambda module, args, output: seen.setdefault(name, place(output))

    first = model.transformer_blocks[0]
    model.patch_embed.register_forward_hook(keep("patch"))
    first.cross_attn.register_forward_hook(keep("cross"))
    for index, layer in enumerate(model.transformer_blocks):
        layer.register_forward_hook(keep(f"hidden{index}"))
        layer.modulation.register_forward_pre_hook(lambda module, args: seen.setdefault("emb", args[0]))
    denoised(model, *(golden[key] for key in ("hi.x", "hi.sigma", "lr", "vector")))
    assert relative_error(seen["emb"], F.silu(golden["hi.act.emb"])) < FLOAT32
    tokens = seen["patch"].flatten(2).transpose(1, 2)
    assert relative_error(tokens[:, :64], golden["hi.act.patch_tokens_head"]) < FLOAT32
    assert relative_error(seen["cross"].flatten(1, 2)[:, :8], golden["hi.act.lr_cross_out_head"][:, :8]) < FLOAT32
    for index in range(2):
        hidden = seen[f"hidden{index}"]
        assert relative_error(hidden[:, :64], golden[f"hi.act.hidden{index}_head"]) < FLOAT32
        assert relative_error(hidden.mean(-1), golden[f"hi.act.hidden{index}_mean"]) < FLOAT32


@goldens.needs_goldens
def test_windows_of_the_low_resolution_are_those_of_the_original():
    model, golden = from_golden("model_forward", "tiny_weights")
    side = model.transformer_blocks[0].cross_attn.lr_side
    padded = F.pad(model.lr_embed(golden["lr"]), (side,) * 4).permute(0, 2, 3, 1)[..., None, :]
    windows = model.transformer_blocks[0].cross_attn._windows(padded).flatten(1, 2).squeeze(3)
    assert relative_error(windows[:, 0], golden["hi.act.lr_tokens_block0"]) < FLOAT32
    torch.testing.assert_close(
        windows[0].sum(-1), golden["hi.act.process_lr_all_sum_over_channels"], rtol=0, atol=FLOAT32
    )


@goldens.needs_goldens
def test_layer_in_its_real_geometry_gives_what_the_original_gave():
    model, golden = from_golden("real_block")
    lr = golden["lr_u8"].float() / 127.5 - 1
    with torch.no_grad():
        found = denoised(model, golden["hi.x"], golden["hi.sigma"], lr, golden["vector"])
    assert relative_error(found[:, :, ::4, ::4], golden["hi.full_crop_every4"]) < FLOAT32
    assert relative_error(F.avg_pool2d(found, 16), golden["hi.full_block_mean"]) < FLOAT32
    assert relative_error(found[:, :, 126:130], golden["hi.full_row_around_seam"]) < FLOAT32


@goldens.needs_goldens
def test_bfloat16_is_as_close_as_the_original_is():
    model, golden = from_golden("model_forward", "tiny_weights")
    arguments = [golden[key].bfloat16() for key in ("hi.x",)] + [golden["hi.sigma"]]
    model = model.bfloat16()
    with torch.no_grad():
        found = denoised(model, *arguments, golden["lr"].bfloat16(), golden["vector"])
    error = relative_error(found, golden["hi.full"])
    theirs = relative_error(golden["hi.full_reference_run_in_bf16"], golden["hi.full"])
    assert error < min(BFLOAT16, 2 * theirs)


# ---------------------------------------------------------------------------------------------------- names and weights


@goldens.needs_goldens
def test_published_architecture_takes_the_726_published_keys():
    lines = [line.split(maxsplit=2) for line in PUBLISHED.read_text().splitlines() if not line.startswith("#")]
    published = {key: tuple(int(n) for n in shape.strip("()").split(",") if n.strip()) for _, key, shape in lines}
    assert len(published) == 726
    with torch.device("meta"):
        model = InfDiTTransformer2DModel()
        state = {key: torch.empty(shape) for key, shape in published.items()}
    own = official.to_own_names(model, state)
    assert {name: tuple(x.shape) for name, x in own.items()} == {
        name: tuple(x.shape) for name, x in model.state_dict().items()
    }
    unused = {key: math.prod(shape) for key, shape in published.items() if "k_layer_norm" in key}
    unused["position"] = 256 * 1280
    total = sum(p.numel() for p in model.parameters()) + sum(unused.values())
    assert total == 753_762_928, "without the image encoder"


def test_official_names_lead_back_to_the_same_weights():
    model, other = small(vector_dim=5), small(seed=9, vector_dim=5)
    other.load_official_state_dict(official.to_official_names(model))
    for name, x in model.state_dict().items():
        assert torch.equal(x, other.state_dict()[name]), name


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("mixins.adaln_layer.re_pos_embed"), "1 missing (mixins.adaln_layer.re_pos_embed)"),
        (lambda state: state.update({"module.a": torch.zeros(1)}), "1 unknown (module.a)"),
        (
            lambda state: state.update({"mixins.final_layer.linear.bias": torch.zeros(5)}),
            "1 of another shape (proj_out.bias: (5,) instead of (48,))",
        ),
        (lambda state: state.update({"time_embed.mlp.0.biased": state.pop("time_embed.mlp.0.bias")}), "1 missing"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_key(change, message):
    model = small()
    state = official.to_official_names(model)
    change(state)
    with pytest.raises(ValueError) as error:
        small(seed=3).load_official_state_dict(state)
    assert message in str(error.value)


def test_keys_without_use_are_passed_over():
    model = small()
    state = official.to_official_names(model) | {
        "mixins.adaln_layer.k_layer_norm.0.weight": torch.full((16,), 7.0),
        "mixins.adaln_layer.rope.freqs_cos": torch.zeros(3),
        "transformer.position_embeddings.weight": torch.zeros(3),
        "image_encoder.model.visual.proj": torch.zeros(3),
    }
    small(seed=2).load_official_state_dict(state)


def test_saved_model_loads_again(tmp_path):
    model = small(vector_dim=5)
    model.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    again = InfDiTTransformer2DModel.from_pretrained(tmp_path).eval()
    assert {name: again.config[name] for name in SMALL} == SMALL | {"vector_dim": 5}
    arguments = inputs(model, 32, 48)
    for name, x in model.state_dict().items():
        assert torch.equal(x, again.state_dict()[name]), name
    # Mapped files lie otherwise in memory, and matrix products take another way through them.
    torch.testing.assert_close(again(*arguments).sample, model(*arguments).sample, rtol=1e-4, atol=1e-4)


def test_fresh_weights_begin_as_the_authors_begin():
    torch.manual_seed(0)
    model = InfDiTTransformer2DModel(**SMALL | {"vector_dim": 5})
    zero = {name for name, x in model.named_parameters() if not x.any()}
    wanted = {name for name, x in model.named_parameters() if name.endswith("bias") or "modulation" in name}
    wanted |= {f"transformer_blocks.{i}.attn.slot_embed" for i in range(2)} | {"vector_embed.linear_2.weight"}
    assert zero == wanted
    layer = model.transformer_blocks[1]
    assert layer.attn.to_out[0].weight.std() < 0.6 * layer.attn.to_q.weight.std(), "divided by sqrt(2 * layers) = 2"
    x, time, lr, vector = inputs(model, 32, 32)
    a, b = (model(x, t, lr, vector).sample for t in (time, time + 1))
    assert torch.equal(a, b), "modulations that are zero know nothing of the time"


# --------------------------------------------------------------------------------------------------- what it depends on


def test_block_depends_on_what_is_above_and_left_and_on_the_low_resolution_around():
    model = small()
    side, grid = model.block_pixels, (4, 4)
    x, time, lr, _ = inputs(model, grid[0] * side, grid[1] * side)

    def changed(x, lr):
        difference = (model(x, time, lr).sample - before).abs().amax((0, 1))
        return F.max_pool2d(difference[None], side)[0] > 0

    with torch.no_grad():
        before = model(x, time, lr).sample
        moved = x.clone()
        moved[:, :, side, side] += 1  # in block (1, 1)
        rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
        reach = (rows >= 1) & (columns >= 1) & (rows <= 3) & (columns <= 3)  # a block further with each of two layers
        assert torch.equal(changed(moved, lr), reach)
        moved = lr.clone()
        moved[:, :, 3 * side // 4, 3 * side // 4] += 1  # of block (3, 3): seen by its neighbours in the first layer
        assert torch.equal(changed(x, moved), (rows >= 2) & (columns >= 2))


def test_pictures_of_a_batch_do_not_see_each_other():
    model = small(vector_dim=5)
    x, time, lr, vector = inputs(model, 48, 32, batch=3)
    with torch.no_grad():
        together = model(x, time, lr, vector).sample
        for i in range(3):
            alone = model(x[i : i + 1], time[i : i + 1], lr[i : i + 1], vector[i : i + 1]).sample
            torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offset", [(5, 0), (0, 7), (896, 896), (5000, 3000)])
def test_positions_matter_by_their_differences_alone(offset):
    """So there is no border at 1024 tokens, where the original's positions begin anew.

    But for the slot embeddings: they are added to rotated keys and not rotated themselves, so through them a query
    knows where it is. Training shifts positions at random.
    """
    model = small().double()
    embeds = [layer.attn.slot_embed.detach().clone() for layer in model.transformer_blocks]
    for layer in model.transformer_blocks:
        torch.nn.init.zeros_(layer.attn.slot_embed)
    x, time, lr, _ = inputs(model, 32, 48, dtype=torch.float64)
    with torch.no_grad():
        near, far = (model(x, time, lr, position_offset=at).sample for at in ((0, 0), offset))
        # Angles are float32: of 5000 radians 2.4e-4 is a rounding.
        torch.testing.assert_close(far, near, rtol=0, atol=1e-6 * (1 + max(offset)))
        for layer, embed in zip(model.transformer_blocks, embeds, strict=True):
            layer.attn.slot_embed.copy_(embed)
        near, far = (model(x, time, lr, position_offset=at).sample for at in ((0, 0), offset))
        assert (far - near).abs().max() > 1e-2


def test_keys_and_values_of_the_low_resolution_are_made_once_for_all_calls():
    model = small()
    x, time, lr, _ = inputs(model, 48, 32)
    calls = []
    model.lr_embed.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        context, lean = model.prepare_lr(lr), model.prepare_lr(lr, keep=False)
        assert len(calls) == 1
        results = [model(x, time, lr_context=context).sample for _ in range(3)]
        assert len(calls) == 1
        assert torch.equal(results[0], results[2])
        torch.testing.assert_close(model(x, time, lr_context=lean).sample, results[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(model(x, time, lr).sample, results[0])


# ------------------------------------------------------------------------------------------------------------ training


def test_gradients_reach_every_parameter_and_checkpointing_does_not_change_them():
    gradients = []
    for checkpointing in (False, True):
        model = small(vector_dim=5).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        x, time, lr, vector = inputs(model, 32, 32, batch=2)
        model(x, time, lr, vector, position_offset=(3, 4)).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        if name == "transformer_blocks.0.cross_attn.norm_k.bias":  # moves all scores of a query alike
            assert gradient.abs().max() < 1e-6
        else:
            assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_gradient_is_that_of_finite_differences():
    model = small().double()
    x, time, lr, _ = inputs(model, 16, 32, dtype=torch.float64)
    weight = torch.randn(1, 3, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def value():
        return (model(x, time, lr).sample * weight).sum()

    value().backward()
    generator = torch.Generator().manual_seed(5)
    for name in (
        "transformer_blocks.1.attn.slot_embed",
        "transformer_blocks.0.cross_attn.key_position",
        "lr_embed.weight",
    ):
        parameter = model.get_parameter(name)
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                parameter.add_(step * direction)
                values.append(value())
        with torch.no_grad():
            parameter.add_(1e-5 * direction)
        slope = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close((parameter.grad * direction).sum(), slope, rtol=1e-5, atol=1e-7)


def test_compiles_into_one_graph():
    model = small()
    x, time, lr, _ = inputs(model, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, time, lr).sample, model(x, time, lr).sample, rtol=1e-5, atol=1e-5)


def test_takes_a_lora():
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    model = small()
    arguments = inputs(model, 16, 16)[:3]
    before = model(*arguments).sample
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert not torch.allclose(model(*arguments).sample, before)
    model.disable_adapters()
    assert torch.equal(model(*arguments).sample, before)


def test_report_says_what_its_layers_run():
    found = linattn.report(small())
    assert [(x.name, x.runs, x.by, x.kind, x.heads, x.head_dim) for x in found.layers] == [
        (f"transformer_blocks.{i}.attn", "block_causal_attention", "Inf-DiT", "self", 2, 16) for i in range(2)
    ]
    assert found.layers[0].options == {"block": 4, "edge": "clamp"}


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"hidden_size": 30}, "hidden_size must be a multiple of 4 * num_attention_heads = 8"),
        ({"num_layers": 0}, "num_layers must be a whole number, at least 1, got 0"),
        ({"vector_dim": -1}, "vector_dim must be a whole number, at least 0, got -1"),
        ({"block_size": 3}, "block_size * patch_size must be a multiple of sr_scale * lr_patch_size = 8, got 3 * 4"),
    ],
)
def test_sizes_of_a_model_that_do_not_fit_are_named(sizes, message):
    with pytest.raises(ValueError) as error:
        InfDiTTransformer2DModel(**SMALL | sizes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_states": torch.zeros(1, 3, 32, 32)}, "hidden_states must be (B, 6, H, W), got (1, 3, 32, 32)"),
        (
            {"hidden_states": torch.zeros(1, 6, 40, 32)},
            "height must be a positive multiple of block_size * patch_size = 16",
        ),
        ({"lr_image": torch.zeros(1, 3, 8, 12)}, "the low-resolution picture must be (1, 3, 8, 8)"),
        ({"lr_image": torch.zeros(1, 3, 7, 8)}, "lr_image must be (B, 3, h, w) with h and w multiples of"),
        ({"lr_image": None}, "expected lr_image or lr_context"),
        ({"timestep": torch.zeros(3)}, "timestep must be a number or (1,), got (3,)"),
        ({"image_embeds": torch.zeros(1, 5)}, "image_embeds must be None (vector_dim = 0 of this model), got (1, 5)"),
        ({"schedule": "rows"}, "schedule must be one of full, layer_major, streaming or a Plan, got 'rows'"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change, message):
    model = small()
    arguments = dict(zip(("hidden_states", "timestep", "lr_image", "image_embeds"), inputs(model, 32, 32), strict=True))
    with pytest.raises(ValueError) as error:
        model(**arguments | change)
    assert message in str(error.value)


def test_config_of_the_published_weights_is_the_default():
    with torch.device("meta"):
        config = dict(InfDiTTransformer2DModel().config)
    shapes = {
        "hidden_size": 1280,
        "num_layers": 28,
        "num_attention_heads": 16,
        "patch_size": 4,
        "block_size": 32,
        "in_channels": 6,
        "out_channels": 3,
        "vector_dim": 768,
        "lr_patch_size": 2,
        "sr_scale": 4,
    }
    assert {name: config[name] for name in shapes} == shapes
