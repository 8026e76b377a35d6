"""The CLEAR adapter: recorded models, grids, position ids, checkpoints, plugins on layers, and what it must refuse."""

import json
import shutil

import pytest
import torch
from torch import nn

import linattn
from linattn import backend as backends

pytest.importorskip("diffusers", reason='the adapters need the extra: pip install "linattn[diffusers]"')

import torch._dynamo.testing
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_processor import JointAttnProcessor2_0, SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from helpers import goldens
from helpers.tiny_pipelines import tiny_transformer
from safetensors.torch import load_file, save_file

from linattn.adapters import CLEAR
from linattn.adapters._clear_files import PUBLISHED
from linattn.adapters._grid import read_grid

FAMILY = "clear"
MODELS = ["model_local_w3", "model_down4_text512"]
MODEL_FLOAT32 = 1e-5  # README of the goldens
TEXT = 7
KINDS = (".attn.to_q.", ".attn.to_k.", ".attn.to_v.", ".attn.to_out.", "spatial_weight")  # spec: what a file holds

pytestmark = pytest.mark.usefixtures("one_thread_in_module")


def runnable_backends():
    for name in backends.BACKENDS:
        reason = backends.why_not("window_attention", name, torch.device("cpu"), torch.float32)
        yield name, [pytest.mark.skip(reason=f"backend {name}: {reason}")] if reason else []


def published(state_dict):
    return {key: value for key, value in state_dict.items() if any(kind in key for kind in KINDS)}


def golden_model(name):
    """(transformer whose layers that CLEAR replaces are wrong, published weights, inputs, golden outputs, metadata)."""
    tensors, metadata = goldens.load(FAMILY, name)
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**metadata["config"]).eval()
    weights = {key.removeprefix("sd."): value for key, value in tensors.items() if key.startswith("sd.")}
    own = published(weights)
    rest = {key: value for key, value in weights.items() if key not in own}
    missing, unexpected = model.load_state_dict(rest, strict=False)
    assert not unexpected
    assert set(missing) == {key for key in own if "spatial_weight" not in key}
    names = (
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        "timestep",
        "guidance",
        "img_ids",
        "txt_ids",
    )
    return model, own, {key: tensors[key] for key in names if key in tensors}, tensors, metadata


def file_name(metadata):
    f = metadata["down_factor"]
    return f"clear_local_{metadata['window']}" + (f"_down_{f}" if f > 1 else "") + ".safetensors"


def raster(height, width, dtype=torch.float32):
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], -1).reshape(-1, 3).to(dtype)


def inputs_for(model, height, width, batch=1, text=TEXT, **overrides):
    """The keywords of a call on an image of height x width tokens."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    config = model.config

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    if isinstance(model, FluxTransformer2DModel):
        made = {
            "hidden_states": draw(batch, height * width, config.in_channels),
            "img_ids": raster(height, width),
            "txt_ids": torch.zeros(text, 3),
        }
        if config.guidance_embeds:
            made["guidance"] = torch.full((batch,), 3.5)
    else:
        p = config.patch_size
        made = {"hidden_states": draw(batch, config.in_channels, height * p, width * p)}
    made |= {
        "encoder_hidden_states": draw(batch, text, config.joint_attention_dim),
        "pooled_projections": draw(batch, config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.5),
    }
    return {**made, **overrides}


def run(model, height=4, width=6, **overrides):
    with torch.no_grad():
        return model(**inputs_for(model, height, width, **overrides)).sample


def mounted(family="flux", window_size=2, down_factor=1, **options):
    model = tiny_transformer(family)
    return model, CLEAR.construct_for(model, window_size, down_factor, load_pretrained=False, **options)


def trace(model):
    """Everything by which mounting could leave a mark: modules in order, parameters, processors, attributes."""
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "state": [(key, value.data_ptr(), value.dtype, value.clone()) for key, value in model.state_dict().items()],
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "processors": [(name, id(p)) for name, p in model.attn_processors.items()],
        "attributes": [(name, sorted(vars(module))) for name, module in model.named_modules()],
        "hooks": [(len(m._forward_pre_hooks), len(m._forward_pre_hooks_with_kwargs)) for m in model.modules()],
        "theta": getattr(model.pos_embed, "theta", None),
        "config": dict(model.config),
    }


def assert_same_trace(now, before):
    for key in before:
        if key == "state":
            assert [x[:3] for x in now[key]] == [x[:3] for x in before[key]]
            assert all(torch.equal(x[3], y[3]) for x, y in zip(now[key], before[key], strict=True))
        else:
            assert now[key] == before[key], key


# ---------------------------------------------------------------------------------------------- recorded models


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(name, backend, marks=marks)
        for backend, marks in runnable_backends()
        for name in MODELS
        if (name, backend) != ("model_down4_text512", "triton")  # a minute in the interpreter
    ],
)
def test_the_mounted_transformer_gives_the_recorded_outputs(name, backend, tmp_path):
    model, weights, inputs, tensors, metadata = golden_model(name)
    save_file(weights, tmp_path / file_name(metadata))
    clear = CLEAR.construct_for(model, pretrained_model_name_or_path=tmp_path / file_name(metadata))
    settings = {"out": (), "out_stock_diffusers": (), "out_prop": (1.0, True), "out_ntk10_prop": (10.0, True)}
    if backend == "triton":  # interpreted: one of them takes as long as all others of this file
        settings = {"out_ntk10_prop": settings["out_ntk10_prop"]}
    for key, setting in settings.items():
        clear.set_high_resolution(*setting)
        with linattn.use_backend(backend), torch.no_grad():
            error = (model(**inputs).sample - tensors[key]).abs().max().item()
        assert error < MODEL_FLOAT32, (key, error)


@pytest.mark.parametrize(("backend", "marks"), list(runnable_backends()))
def test_pooled_keys_are_the_same_on_every_backend(backend, marks):
    if marks:
        pytest.skip(marks[0].kwargs["reason"])
    model, _ = mounted("flux", 2, 2, layers=[0, 2])
    with linattn.use_backend("reference"):
        expected = run(model, 3, 4)
    with linattn.use_backend(backend):
        assert (run(model, 3, 4) - expected).abs().max() < MODEL_FLOAT32


@pytest.mark.parametrize("name", MODELS)
def test_the_window_the_pooled_keys_and_both_scales_matter(name):
    """What the recorded outputs would not tell apart, they could not check."""
    tensors, _ = goldens.load(FAMILY, name)
    outputs = [tensors[key] for key in ("out", "out_prop", "out_ntk10_prop", "out_full_attention")]
    apart = [(a - b).abs().max().item() for i, a in enumerate(outputs) for b in outputs[:i]]
    assert min(apart) > 10 * MODEL_FLOAT32


# ---------------------------------------------------------------------------------------------- unmounting


@pytest.mark.parametrize("family", ["flux", "sd3", "sd35"])
@pytest.mark.parametrize("down_factor", [1, 2])
def test_unmounting_leaves_no_trace(family, down_factor):
    model = tiny_transformer(family)
    stock, before = run(model), trace(model)
    clear = CLEAR.construct_for(model, 2, down_factor, load_pretrained=False)
    if family == "flux":
        clear.set_high_resolution(10.0, True)
    assert not torch.equal(run(model), stock)
    clear.unmount()
    assert not clear.mounted
    assert_same_trace(trace(model), before)
    assert torch.equal(run(model), stock)


def test_mounting_again_gives_the_same_and_keeps_the_settings():
    model, clear = mounted(down_factor=2)
    with torch.no_grad():
        for value in clear.trainable_parameters().values():
            value.add_(0.01)
    clear.set_high_resolution(4.0, True)
    first = run(model)
    clear.unmount()
    theta = model.pos_embed.theta
    clear.mount_to(model)
    assert torch.equal(run(model), first)
    clear.unmount()
    assert model.pos_embed.theta == theta


@pytest.mark.parametrize("family", ["flux", "sd3", "sd35"])
def test_training_the_mounted_layers_leaves_the_originals_alone(family):
    model = tiny_transformer(family)
    before = trace(model)
    clear = CLEAR.construct_for(model, 2, 2, load_pretrained=False)
    with torch.no_grad():
        for parameter in clear.trainable_parameters().values():
            parameter.add_(1)
    clear.unmount()
    assert_same_trace(trace(model), before)


def test_misuse_of_mounting_is_refused():
    model, clear = mounted()
    with pytest.raises(RuntimeError, match=r"mounted on this transformer already \(at transformer_blocks.0.attn\)"):
        CLEAR.construct_for(model, 2, load_pretrained=False)
    with pytest.raises(RuntimeError, match="mounted already"):
        clear.mount_to(tiny_transformer("flux"))
    block = model.transformer_blocks[0]
    taken, block.attn = block.attn, nn.Identity()
    with pytest.raises(RuntimeError, match=r"no longer holds CLEAR's modules at transformer_blocks.0.attn"):
        clear.unmount()
    block.attn = taken
    clear.unmount()
    with pytest.raises(RuntimeError, match="not mounted"):
        clear.unmount()


# ---------------------------------------------------------------------------------------------- what is attended


@pytest.mark.parametrize("family", ["flux", "sd3", "sd35"])
def test_a_window_over_everything_is_the_stock_transformer_at_every_size(family):
    model = tiny_transformer(family)
    sizes = [(4, 6), (6, 4), (3, 8), (1, 5), (5, 1)]
    stock = [run(model, *size, batch=2) for size in sizes]
    CLEAR.construct_for(model, 9, load_pretrained=False)
    for size, expected in zip(sizes, stock, strict=True):
        out = run(model, *size, batch=2)
        assert (out - expected).abs().max() < MODEL_FLOAT32, size


@pytest.mark.parametrize("family", ["flux", "sd35"])
def test_pooling_takes_grids_that_it_does_not_divide(family):
    model, _ = mounted(family, 2, 2)
    assert run(model, 5, 7).isfinite().all()
    assert not torch.equal(run(model, 5, 7), run(mounted(family, 2, 1)[0], 5, 7))


@pytest.mark.parametrize("family", ["flux", "sd3", "sd35"])
def test_a_token_outside_the_window_changes_nothing_in_one_layer(family):
    """One block with a window of radius 2: an image token reaches its neighbours there, and no others."""
    model, _ = mounted(family, 2, layers=[0, 1] if family == "sd35" else [0])
    kwargs = inputs_for(model, 5, 5)
    seen = {}
    last = "attn2" if family == "sd35" else "attn"
    getattr(model.transformer_blocks[0], last).register_forward_hook(lambda m, a, out: seen.update(out=out))

    def image():
        with torch.no_grad():
            model(**kwargs)
        out = seen["out"]
        return out[0] if isinstance(out, tuple) else out

    before = image()
    hidden = kwargs["hidden_states"] = kwargs["hidden_states"].clone()
    if family == "flux":
        hidden[:, 12] += 1
    else:
        hidden[:, :, 4:6, 4:6] += 1
    changed = (image() != before).any(-1)[0].reshape(5, 5)
    expected = torch.tensor([[(y - 2) ** 2 + (x - 2) ** 2 < 4 for x in range(5)] for y in range(5)])
    assert torch.equal(changed, expected)


def test_layers_choose_by_name_and_by_number():
    model = tiny_transformer("flux")
    names = ["transformer_blocks.1.attn", "single_transformer_blocks.0.attn"]
    clear = CLEAR.construct_for(model, 2, layers=[names[0], 2], load_pretrained=False)
    assert list(clear.modules_dict) == names
    assert [x.name for x in linattn.report(model).layers if x.by == "CLEAR"] == names
    clear.unmount()
    for wrong in ["transformer_blocks.9.attn", -1, 5, True]:
        with pytest.raises(ValueError, match=r"layers: this FluxTransformer2DModel has no attention"):
            CLEAR.construct_for(model, 2, layers=[wrong], load_pretrained=False)
    with pytest.raises(ValueError, match="at least one attention"):
        CLEAR.construct_for(model, 2, layers=[], load_pretrained=False)
    with pytest.raises(TypeError, match="several of them"):
        CLEAR.construct_for(model, 2, layers=names[0], load_pretrained=False)


# ---------------------------------------------------------------------------------------------- grids and position ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (3, 5), (3, 400), (400, 3)])
def test_the_grid_is_read_from_ids_of_any_dtype(size, dtype):
    height, width, exact = read_grid(raster(*size, dtype))
    assert (height, width) == size
    assert torch.equal(exact.float(), raster(*size))


def test_bfloat16_ids_collide_beyond_256_and_ours_do_not():
    ids = raster(2, 384, torch.bfloat16)
    assert len(ids[:, 2].unique()) == 321  # spec: 384 columns, 321 ids
    assert len(read_grid(ids)[2][:, 2].unique()) == 384


def test_a_call_with_bfloat16_ids_is_the_call_with_exact_ones():
    model = tiny_transformer("flux")
    rounded = raster(1, 300, torch.bfloat16)
    stock = run(model, 1, 300)
    assert not torch.equal(run(model, 1, 300, img_ids=rounded), stock)
    clear = CLEAR.construct_for(model, 3, load_pretrained=False)
    exact = run(model, 1, 300)
    assert torch.equal(run(model, 1, 300, img_ids=rounded), exact)
    assert torch.equal(run(model, 1, 300, img_ids=rounded[None]), exact)
    clear.set_grid(1, 300)
    assert torch.equal(run(model, 1, 300, img_ids=rounded), exact)
    kwargs = inputs_for(model, 1, 300, img_ids=rounded)
    order = (
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        "timestep",
        "img_ids",
        "txt_ids",
        "guidance",
    )
    with torch.no_grad():
        assert torch.equal(model(*(kwargs[name] for name in order)).sample, exact)


def test_ids_that_say_more_than_a_count_are_kept():
    shifted = raster(4, 6) * 0.5 + torch.tensor([1.0, 3.0, 7.0])
    assert read_grid(shifted)[:2] == (4, 6)
    assert read_grid(shifted)[2] is shifted
    half = shifted.bfloat16()  # these survive bfloat16, so there is nothing to count again
    assert read_grid(half)[2] is half


def test_ids_are_read_again_when_they_change():
    model, _ = mounted()
    kwargs = inputs_for(model, 4, 6)
    with torch.no_grad():
        first = model(**kwargs).sample
        assert torch.equal(model(**kwargs).sample, first)
        kwargs["img_ids"].copy_(raster(6, 4))  # the same tensor, another grid
        second = model(**kwargs).sample
        expected = model(**{**kwargs, "img_ids": raster(6, 4)}).sample
    assert torch.equal(second, expected)
    assert not torch.equal(second, first)


def test_ids_that_are_no_single_raster_are_refused():
    kontext = torch.cat([raster(4, 6), raster(4, 6) + torch.tensor([1.0, 0, 0])])
    side_by_side = torch.cat([raster(4, 6), raster(4, 6) + torch.tensor([0, 0, 6.0])])
    below = torch.cat([raster(4, 6), raster(2, 6) + torch.tensor([1.0, 4.0, 0])])
    columns_first = raster(4, 6)[:, [0, 2, 1]]
    shuffled = raster(4, 6)[torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    for ids in (kontext, side_by_side, below, columns_first, shuffled, raster(4, 6)[:-1], torch.zeros(6, 3)):
        for dtype in (torch.float32, torch.bfloat16):
            with pytest.raises(ValueError, match=r"img_ids must be one image.*Kontext.*unmount"):
                read_grid(ids.to(dtype))
    with pytest.raises(ValueError, match=r"shape \(tokens, 3\), got \(24, 2\)"):
        read_grid(raster(4, 6)[:, :2])
    model, _ = mounted()
    with pytest.raises(ValueError, match="Kontext"):
        run(model, img_ids=kontext)
    with pytest.raises(ValueError, match="img_ids is needed"):
        run(model, img_ids=None)


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_a_grid_that_does_not_fit_the_call_is_refused(family):
    model, clear = mounted(family)
    expected = run(model)
    clear.set_grid(4, 6)
    assert torch.equal(run(model), expected)
    with pytest.raises(ValueError, match=r"set_grid\(4, 6\) was called.*set_grid\(\) without arguments"):
        run(model, 4, 5)
    clear.set_grid()
    assert run(model, 4, 5).isfinite().all()
    for wrong in [(4, None), (None, 4), (0, 4), (4, -1), (4.0, 6)]:
        with pytest.raises(ValueError, match=r"height|width"):
            clear.set_grid(*wrong)


def test_tokens_that_do_not_fit_the_grid_are_refused():
    model, _ = mounted()
    run(model)
    with pytest.raises(ValueError, match=r"hidden_states must hold 4 x 6 image tokens.*\(1, 23, 32\)"):
        model.transformer_blocks[0].attn(torch.zeros(1, 23, 32), torch.zeros(1, 7, 32))
    with pytest.raises(ValueError, match=r"hidden_states must hold 4 x 6 image tokens.*\(1, 23, 32\)"):
        model.single_transformer_blocks[0].attn(torch.zeros(1, 23, 32))
    with pytest.raises(RuntimeError, match="height and width of the image are not known"):
        mounted()[0].transformer_blocks[0].attn(torch.zeros(1, 24, 32), torch.zeros(1, 7, 32))


# ---------------------------------------------------------------------------------------------- high resolution


def test_high_resolution_ends_where_it_ends():
    model, clear = mounted()
    plain = run(model)
    with clear.high_resolution(10.0, True) as inside:
        assert inside is clear
        changed = run(model)
        assert model.pos_embed.theta == 100000
    assert not torch.equal(changed, plain)
    assert torch.equal(run(model), plain)
    with pytest.raises(KeyError), clear.high_resolution(10.0):
        raise KeyError
    assert torch.equal(run(model), plain)


def test_wrong_high_resolution_settings_are_refused():
    _, clear = mounted()
    for wrong in [0, -1.0, float("nan"), float("inf"), "10"]:
        with pytest.raises(ValueError, match="ntk_factor must be a positive number"):
            clear.set_high_resolution(wrong)
    with pytest.raises(TypeError, match="proportional_attention must be True or False, got 1"):
        clear.set_high_resolution(1.0, 1)
    _, clear = mounted("sd3")
    with pytest.raises(ValueError, match="rotary positions, which SD3 does not have"):
        clear.set_high_resolution(10.0)


@pytest.mark.parametrize("down_factor", [1, 2])
def test_proportional_attention_of_sd3_is_its_factor_on_the_scores(down_factor):
    """SD3 with normalised queries: the factor on the norm's weight of every query does the same."""
    model, clear = mounted("sd35", 2, down_factor)
    clear.set_high_resolution(1.0, True)
    out = run(model, 4, 6)
    clear.set_high_resolution()
    training = 8**2 + 333
    for name, module in clear.modules_dict.items():
        tokens = (24 + (0 if name.endswith("attn2") else TEXT)) * (10 if down_factor > 1 else 1)
        factor = (torch.tensor(float(tokens)).log() / torch.tensor(float(training)).log()).sqrt()
        with torch.no_grad():
            module.norm_q.weight.mul_(factor)
            if hasattr(module.norm_added_q, "weight"):
                module.norm_added_q.weight.mul_(factor)
    assert (run(model, 4, 6) - out).abs().max() < MODEL_FLOAT32
    assert not torch.allclose(out, run(mounted("sd35", 2, down_factor)[0], 4, 6), atol=1e-3)


# ---------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("down_factor", [1, 2])
@pytest.mark.parametrize("family", ["flux", "sd3", "sd35"])
def test_what_is_saved_loads_and_has_the_published_keys(family, down_factor, tmp_path):
    model, clear = mounted(family, 3, down_factor)
    with torch.no_grad():
        for value in clear.trainable_parameters().values():
            value.add_(0.1 * torch.randn(value.shape))
    out = run(model)
    clear.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    live = model.state_dict()
    expected = {
        key for key in live if any(kind.replace("attn.", a) in key for kind in KINDS for a in ("attn.", "attn2."))
    }
    assert saved.keys() == expected == clear.published_state_dict().keys() == clear.trainable_parameters().keys()
    assert all(torch.equal(live[key], value) for key, value in saved.items())
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["window_size"], config["down_factor"], config["base"]) == (3, down_factor, type(model).__name__)
    clear.unmount()
    again = CLEAR.construct_for(model, pretrained_model_name_or_path=tmp_path)
    assert torch.equal(run(model), out)
    again.unmount()
    alone = CLEAR.from_pretrained(tmp_path)
    assert torch.equal(run(alone.mount_to(model)._mount.model), out)
    blank = CLEAR.from_config(clear.config)
    assert {k: v.shape for k, v in blank.state_dict().items()} == {k: v.shape for k, v in saved.items()}


@pytest.mark.parametrize("name", [name.removesuffix(".safetensors") for name in PUBLISHED])
def test_published_names_say_the_pattern(name, tmp_path):
    f = 4 if name.endswith("_down_4") else 1
    model, clear = mounted("flux", 2, f)
    save_file(clear.published_state_dict(), tmp_path / f"{name}.safetensors")
    clear.unmount()
    loaded = CLEAR.construct_for(model, pretrained_model_name_or_path=tmp_path, weight_name=name)
    assert loaded.config.window_size == int(name.split("_")[2])
    assert loaded.config.down_factor == f
    assert CLEAR.from_pretrained(tmp_path / f"{name}.safetensors").config.modules_list == loaded.config.modules_list


def test_loading_takes_the_dtype_of_the_transformer(tmp_path):
    model, clear = mounted("flux", 2, 2)
    clear.save_pretrained(tmp_path)
    clear.unmount()
    model.to(torch.bfloat16)
    clear = CLEAR.construct_for(model, pretrained_model_name_or_path=tmp_path)
    assert {value.dtype for value in clear.published_state_dict().values()} == {torch.bfloat16}
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}


@pytest.fixture
def weights(tmp_path):
    """A function that writes published weights of the tiny FLUX, changed by a function, and gives their path."""
    _, clear = mounted("flux", 2, 2)

    def write(change=None, name="weights", down_factor=2):
        tensors = {k: v.clone() for k, v in clear.published_state_dict().items()}
        if down_factor == 1:
            tensors = {key: value for key, value in tensors.items() if "spatial" not in key}
        if change is not None:
            change(tensors)
        save_file(tensors, tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    return write


FIRST_Q = "transformer_blocks.0.attn.to_q.weight"


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            None,
            {"window_size": 2, "down_factor": 1},
            r"1 says down_factor=, 2 says the weights.*pass down_factor=2, or leave",
        ),
        (None, {"window_size": 2, "down_factor": 4}, r"4 says down_factor=, 2 says the weights"),
        (None, {}, r"does not say its window_size: pass window_size="),
        (lambda t: t.pop(FIRST_Q), {"window_size": 2}, rf"1 missing: {FIRST_Q}"),
        (lambda t: t.update(extra=torch.zeros(1)), {"window_size": 2}, r"1 unexpected: extra"),
        (
            lambda t: t.update({FIRST_Q: torch.zeros(4, 4)}),
            {"window_size": 2},
            rf"shape: {FIRST_Q} \(4, 4\), needed \(32, 32\)",
        ),
        (
            lambda t: t.pop("single_transformer_blocks.1.attn.processor.spatial_weight"),
            {"window_size": 2},
            r"1 missing: single_transformer_blocks.1.attn.processor.spatial_weight",
        ),
        (
            lambda t: t.update({"transformer_blocks.7.attn.to_q.weight": torch.zeros(32, 32)}),
            {"window_size": 2},
            r"1 unexpected: transformer_blocks.7.attn.to_q.weight",
        ),
        (
            lambda t: t.update({"transformer_blocks.0.attn.processor.spatial_weight": torch.zeros(2, 2)}),
            {"window_size": 2},
            r"every spatial_weight must have one shape",
        ),
    ],
)
def test_weights_that_are_not_what_is_needed_are_refused_before_anything_changes(weights, change, options, message):
    file, model = weights(change), tiny_transformer("flux")
    before = trace(model)
    with pytest.raises(ValueError, match=message):
        CLEAR.construct_for(model, pretrained_model_name_or_path=file, **options)
    assert_same_trace(trace(model), before)


def test_pooling_that_the_weights_do_not_have_is_refused(weights):
    plain = weights(down_factor=1)
    with pytest.raises(
        ValueError, match=r"4 says down_factor=, 1 says the weights.*pass down_factor=1, or leave it out"
    ):
        CLEAR.construct_for(tiny_transformer("flux"), 2, 4, pretrained_model_name_or_path=plain)
    named = weights(name="clear_local_2_down_2", down_factor=1)
    with pytest.raises(ValueError, match=r"2 says the name clear_local_2_down_2.safetensors, 1 says the weights"):
        CLEAR.from_pretrained(named)


def test_two_window_sizes_are_refused(weights, tmp_path):
    with pytest.raises(ValueError, match=r"8 says window_size=, 2 says the name clear_local_2_down_2.safetensors"):
        CLEAR.from_pretrained(weights(name="clear_local_2_down_2"), window_size=8)
    mounted("flux", 3)[1].save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"8 says window_size=, 3 says config.json"):
        CLEAR.from_pretrained(tmp_path / "saved", window_size=8)
    assert CLEAR.from_pretrained(tmp_path / "saved", window_size=3).config.window_size == 3


def test_weights_for_another_transformer_are_refused(tmp_path):
    mounted("sd3", 3)[1].save_pretrained(tmp_path)
    model = tiny_transformer("flux")
    with pytest.raises(ValueError, match=r"for a SD3Transformer2DModel, this is a FluxTransformer2DModel"):
        CLEAR.construct_for(model, pretrained_model_name_or_path=tmp_path)
    with pytest.raises(ValueError, match=r"does not fit this SD3.*transformer_blocks.0.attn2.*no such attention"):
        mounted("sd35", 3)[1].save_pretrained(tmp_path / "35")
        CLEAR.construct_for(tiny_transformer("sd3"), pretrained_model_name_or_path=tmp_path / "35")
    with pytest.raises(ValueError, match="CLEAR is for FluxTransformer2DModel and SD3Transformer2DModel, got a Linear"):
        CLEAR.construct_for(nn.Linear(2, 2), 3, load_pretrained=False)
    with pytest.raises(TypeError, match="pipeline that has a transformer"):
        CLEAR.construct_for(3, 3, load_pretrained=False)


def test_files_that_are_not_there_or_not_safetensors_are_refused(weights, tmp_path):
    folder = weights(name="clear_local_2_down_2").parent
    weights(name="clear_local_8", down_factor=1)
    with pytest.raises(
        OSError, match=r"clear_local_2_down_2.safetensors, clear_local_8.safetensors: pass one as weight_name="
    ):
        CLEAR.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"safetensors only, got weights.bin"):
        CLEAR.from_pretrained(folder, weight_name="weights.bin")
    with pytest.raises(ValueError, match=r"weight_name='a.safetensors' has no meaning"):
        CLEAR.from_pretrained(folder / "clear_local_8.safetensors", weight_name="a")
    with pytest.raises(OSError, match="no file, no folder, and no name on the hub"):
        CLEAR.from_pretrained(tmp_path / "absent" / "folder")
    (tmp_path / "clear_local_3.safetensors").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        CLEAR.from_pretrained(tmp_path / "clear_local_3.safetensors")
    shutil.rmtree(tmp_path / "absent", ignore_errors=True)
    (tmp_path / "other").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "other" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(ValueError, match="holds a UNet2DConditionModel, not a CLEAR"):
        CLEAR.from_pretrained(tmp_path / "other")


def test_nothing_is_guessed():
    model = tiny_transformer("flux")
    with pytest.raises(
        ValueError, match=r"pretrained_model_name_or_path= is needed.*clear_local_8_down_4.*load_pretrained=False"
    ):
        CLEAR.construct_for(model, 16)
    with pytest.raises(ValueError, match="window_size is needed where nothing is loaded"):
        CLEAR.construct_for(model, load_pretrained=False)
    with pytest.raises(TypeError, match="nothing is loaded, so"):
        CLEAR.construct_for(model, 2, load_pretrained=False, weight_name="x")
    for wrong in [0, -3, 2.0, True, "8"]:
        with pytest.raises(ValueError, match="window_size must be an integer of at least 1"):
            CLEAR.construct_for(model, wrong, load_pretrained=False)
        with pytest.raises(ValueError, match="down_factor must be an integer of at least 1"):
            CLEAR.construct_for(model, 2, wrong, load_pretrained=False)


def test_a_chosen_subset_takes_its_part_of_a_file(weights):
    file = weights(name="clear_local_2_down_2")
    model = tiny_transformer("flux")
    clear = CLEAR.construct_for(model, layers=[0, 4], pretrained_model_name_or_path=file)
    names = ["transformer_blocks.0.attn", "single_transformer_blocks.2.attn"]
    assert list(clear.modules_dict) == names
    assert {key.split(".to_")[0].split(".processor")[0] for key in clear.published_state_dict()} == set(names)


FLUX_DEV = {"guidance_embeds": True}  # every other default of the class is FLUX.1-dev's


@pytest.mark.parametrize("down_factor", [1, 4])
def test_the_real_architecture_mounts_and_has_the_published_keys(down_factor):
    path = goldens.ROOT.parent / "spec" / "clear_ckpt_keys.json"
    if not path.exists():
        pytest.skip(f"no list of published keys at {path}")
    lists = json.loads(path.read_text())
    expected = lists["clear_local"]["keys"] | (lists["clear_local_down_4_extra"]["keys"] if down_factor > 1 else {})
    with torch.device("meta"):
        model = FluxTransformer2DModel(**FLUX_DEV)
    before = [(key, tuple(value.shape)) for key, value in model.state_dict().items()]
    clear = CLEAR.construct_for(model, 16, down_factor, load_pretrained=False)
    found = {key: list(value.shape) for key, value in clear.published_state_dict().items()}
    assert found == expected
    assert len(found) == 380 + (57 if down_factor > 1 else 0)
    live = {key: list(value.shape) for key, value in published(model.state_dict()).items()}
    assert live == expected
    clear.unmount()
    assert [(key, tuple(value.shape)) for key, value in model.state_dict().items()] == before


# ---------------------------------------------------------------------------------------------- what sits on the layers


def sd3_ip_adapters(model):
    """An IP-Adapter's processor for every attention of an SD3 transformer, and the keywords of a call with it."""
    dim, head_dim = 32, 16
    torch.manual_seed(5)
    processors = {
        name: SD3IPAdapterJointAttnProcessor2_0(dim, dim, head_dim, timesteps_emb_dim=8, scale=0.7)
        for name in model.attn_processors
    }
    with torch.no_grad():
        for parameter in nn.ModuleList(processors.values()).parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape))
    generator = torch.Generator().manual_seed(6)
    images, temb = torch.randn(1, 4, dim, generator=generator), torch.randn(1, 8, generator=generator)
    return processors, {"joint_attention_kwargs": {"ip_hidden_states": images, "temb": temb}}


def flux_ip_adapters(model):
    torch.manual_seed(5)
    processors = {
        name: FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=16, scale=0.7)
        if name.startswith("transformer_blocks")
        else type(processor)()
        for name, processor in model.attn_processors.items()
    }
    images = [torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(6))]
    return processors, {"joint_attention_kwargs": {"ip_hidden_states": images}}


@pytest.mark.parametrize("first", ["mount", "load"])
@pytest.mark.parametrize("family", ["flux", "sd3", "sd35"])
def test_the_part_of_an_ip_adapter_is_added_to_the_window(family, first):
    """A window over everything is dense attention, so there it is the stock transformer with the adapter."""
    adapters = flux_ip_adapters if family == "flux" else sd3_ip_adapters
    stock = tiny_transformer(family)
    without, original = run(stock), dict(stock.attn_processors)
    processors, call = adapters(stock)
    stock.set_attn_processor(dict(processors))
    with_adapter = run(stock, **call)
    assert (with_adapter - without).abs().max() > 100 * MODEL_FLOAT32

    model = tiny_transformer(family)
    if first == "load":
        model.set_attn_processor(adapters(model)[0])
    clear = CLEAR.construct_for(model, 9, load_pretrained=False)
    if first == "mount":
        model.set_attn_processor(adapters(model)[0])
    assert (run(model, **call) - with_adapter).abs().max() < MODEL_FLOAT32
    for name, processor in model.attn_processors.items():
        assert name.startswith("single") or type(processor) is type(processors[name])
        processor.scale = [0.0] if family == "flux" else 0.0  # as pipelines set it
    assert (run(model, **call) - without).abs().max() < MODEL_FLOAT32
    for processor in model.attn_processors.values():
        processor.scale = [0.7] if family == "flux" else 0.7
    clear.unmount()
    assert torch.equal(run(model, **call), with_adapter)
    clear.mount_to(model)
    # As pipelines unload: stock processors where an adapter's are, the others built again.
    is_adapter = {name: type(processor) is type(processors[name]) for name, processor in model.attn_processors.items()}
    rebuilt = {name: type(p)() for name, p in model.attn_processors.items() if not is_adapter[name]}
    model.set_attn_processor({name: rebuilt.get(name) or type(original[name])() for name in original})
    clear.unmount()
    assert torch.equal(run(model), without)


@pytest.mark.parametrize("family", ["flux", "sd35"])
def test_a_window_with_an_ip_adapter_is_neither_dense_nor_without_it(family):
    adapters = flux_ip_adapters if family == "flux" else sd3_ip_adapters
    drawn = []
    for radius, loaded in ((9, True), (2, True), (2, False)):
        model, _ = mounted(family, radius)
        processors, call = adapters(model)
        if loaded:
            model.set_attn_processor(processors)
        drawn.append(run(model, **call))
    apart = [(a - b).abs().max() for i, a in enumerate(drawn) for b in drawn[:i]]
    assert min(apart) > 100 * MODEL_FLOAT32


def test_the_weight_of_the_pooled_keys_survives_processors_that_are_rebuilt():
    model, clear = mounted("flux", 2, 2)
    with torch.no_grad():
        for key, value in clear.trainable_parameters().items():
            if "spatial" in key:
                value.normal_()
    out = run(model)
    model.set_attn_processor({name: type(processor)() for name, processor in model.attn_processors.items()})
    assert torch.equal(run(model), out)
    assert all(key in model.state_dict() for key in clear.published_state_dict())


@pytest.mark.filterwarnings("ignore:FusedJointAttnProcessor2_0 refused")
@pytest.mark.parametrize("family", ["flux", "sd35"])
def test_other_processors_and_masks_are_refused(family):
    model, _ = mounted(family)
    out, module = run(model), model.transformer_blocks[0].attn
    stock = FluxAttnProcessor() if family == "flux" else JointAttnProcessor2_0()
    with pytest.warns(UserWarning, match="refused: CLEAR is mounted on this attention"):
        model.set_attn_processor(stock)
    with pytest.warns(UserWarning, match="refused: CLEAR is mounted on this attention"):
        module.processor = stock
    with pytest.warns(UserWarning, match="fuse_qkv_projections has no effect"):
        model.fuse_qkv_projections()
    assert torch.equal(run(model), out)
    with pytest.raises(ValueError, match=r"CLEAR has no attention_mask, got one of shape \(1, 31\)"):
        module(torch.zeros(1, 24, 32), torch.zeros(1, 7, 32), torch.zeros(1, 31))
    with pytest.warns(UserWarning, match=r"joint_attention_kwargs \['colour'\] have no meaning for CLEAR"):
        assert torch.equal(run(model, joint_attention_kwargs={"colour": 1}), out)


@pytest.mark.parametrize("family", ["flux", "sd35"])
def test_mounting_on_fused_projections_calls_them_one_by_one_and_gives_the_fused_back(family):
    model = tiny_transformer(family)
    plain = tiny_transformer(family)
    CLEAR.construct_for(plain, 2, load_pretrained=False)
    model.fuse_qkv_projections()
    before = trace(model)
    clear = CLEAR.construct_for(model, 2, load_pretrained=False)
    assert torch.equal(run(model), run(plain))
    assert model.state_dict().keys() == plain.state_dict().keys()  # no copy of weights that are not in use
    clear.unmount()
    assert_same_trace(trace(model), before)


ALL_LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


def add_lora(model, fuse=False):
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    torch.manual_seed(7)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=ALL_LINEAR, init_lora_weights=False), "style")
    if fuse:
        model.fuse_lora()


@pytest.mark.parametrize("fuse", [False, True], ids=["attached", "fused"])
@pytest.mark.parametrize("family", ["flux", "sd35"])
def test_a_lora_on_every_layer_stays_with_the_model_in_both_directions(family, fuse):
    """Projections of the text belong to both modules: there a delta is neither lost nor added twice."""
    stock = tiny_transformer(family)
    before = run(stock)
    add_lora(stock, fuse)
    expected = run(stock)
    assert (expected - before).abs().max() > 100 * MODEL_FLOAT32
    early, late = tiny_transformer(family), tiny_transformer(family)
    add_lora(early, fuse)
    clears = [CLEAR.construct_for(model, 9, load_pretrained=False) for model in (early, late)]
    add_lora(late, fuse)
    assert torch.equal(run(early), run(late))
    assert (run(early) - expected).abs().max() < MODEL_FLOAT32
    if fuse:
        with pytest.raises(
            ValueError, match=r"a LoRA is fused into transformer_blocks.0.attn.to_q: unfuse_lora\(\) first"
        ):
            clears[0].published_state_dict()
    else:
        own = clears[0].published_state_dict()
        assert not any("lora" in key or "base_layer" in key for key in own)
        assert all(torch.equal(value, tiny_transformer(family).state_dict()[key]) for key, value in own.items())
    for clear, model in zip(clears, (early, late), strict=True):
        clear.unmount()
        assert torch.equal(run(model), expected)
    for model in (early, late):
        if fuse:
            model.unfuse_lora()
        model.delete_adapters("style")
        assert (run(model) - before).abs().max() < MODEL_FLOAT32


class Packed(nn.Module):
    """A quantised layer, whose weight nobody may read."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", linear.weight.detach().half())
        self.register_buffer("shift", linear.bias.detach())

    @property
    def weight(self):
        raise AssertionError("the weight of a quantised layer was read")

    def forward(self, x):
        return nn.functional.linear(x, self.packed.float(), self.shift)


def test_layers_that_cannot_be_copied_stay_in_use_and_are_not_saved(tmp_path):
    model = tiny_transformer("flux")
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        for name in ("to_q", "to_k", "to_v", "add_q_proj"):
            if hasattr(block.attn, name):
                setattr(block.attn, name, Packed(getattr(block.attn, name)))
    stock = run(model)
    before = trace(model)
    clear = CLEAR.construct_for(model, 9, load_pretrained=False)
    assert (run(model) - stock).abs().max() < MODEL_FLOAT32
    for refused in (clear.trainable_parameters, clear.published_state_dict, lambda: clear.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match=r"transformer_blocks.0.attn.to_q.*transformer's own layers.*quantis"):
            refused()
    clear.unmount()
    assert_same_trace(trace(model), before)


def test_a_frozen_transformer_stays_frozen():
    model = tiny_transformer("flux").requires_grad_(False)
    clear = CLEAR.construct_for(model, 2, 2, load_pretrained=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    clear.unmount()
    model.requires_grad_(True)
    assert all(p.requires_grad for p in CLEAR.construct_for(model, 2, 2, load_pretrained=False).parameters())


def test_the_mounted_modules_train_and_only_what_is_published_need_be():
    model, clear = mounted("flux", 2, 2)
    model.requires_grad_(False)
    for parameter in clear.trainable_parameters().values():
        parameter.requires_grad_(True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == clear.published_state_dict().keys()
    model(**inputs_for(model, 4, 6)).sample.square().sum().backward()
    # In the last block a query of the text is seen by nothing that comes after; the rest has a gradient.
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in clear.trainable_parameters().values())


def test_modules_are_cast_moved_and_switched_with_the_model():
    model, clear = mounted("flux", 2, 2)
    model.to(torch.bfloat16).train()
    clear.unmount()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(module.training for module in model.modules())
    clear.mount_to(model)
    assert {p.dtype for p in clear.parameters()} == {torch.bfloat16}
    model.eval()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("first", ["mount", "offload"])
def test_layers_and_pooling_weights_are_offloaded_with_the_model(first):
    accelerate = pytest.importorskip("accelerate", reason="offloading needs accelerate")
    plain, _ = mounted("flux", 2, 2)
    expected = run(plain)
    model = tiny_transformer("flux")

    def offload():
        accelerate.cpu_offload(model, torch.device("cpu"))

    if first == "offload":
        offload()
    clear = CLEAR.construct_for(model, 2, 2, load_pretrained=False)
    if first == "mount":
        offload()
    assert torch.equal(run(model), expected)
    assert all(parameter.is_meta for parameter in clear.parameters())
    with pytest.raises(ValueError, match="offloaded by accelerate"):
        clear.published_state_dict()
    clear.unmount()
    assert torch.equal(run(model), run(tiny_transformer("flux")))
    assert not any(parameter.is_meta for parameter in clear.parameters())


@pytest.mark.parametrize("proportional", [False, True])
def test_blocks_compile_once_for_all_sizes(proportional):
    model, clear = mounted("flux", 2, 2)
    clear.set_high_resolution(2.0, proportional)
    sizes = [(4, 6), (5, 7), (6, 4)]
    expected = [run(model, *size) for size in sizes]
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    model.transformer_blocks[0].compile(backend=counter, fullgraph=True, dynamic=True)
    model.single_transformer_blocks[0].compile(backend=counter, fullgraph=True, dynamic=True)
    for size, eager in zip(sizes, expected, strict=True):
        assert (run(model, *size) - eager).abs().max() < MODEL_FLOAT32
    torch._dynamo.reset()
    assert counter.frame_count == 2


def test_a_whole_transformer_in_one_graph_needs_its_grid_set_ahead():
    model, clear = mounted("flux", 2)
    expected = run(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"call set_grid\(height, width\) ahead"):
        run_compiled(compiled, model)
    clear.set_grid(4, 6)
    torch._dynamo.reset()
    assert (run_compiled(compiled, model) - expected).abs().max() < MODEL_FLOAT32
    torch._dynamo.reset()


def run_compiled(compiled, model):
    with torch.no_grad():
        return compiled(**inputs_for(model, 4, 6)).sample
