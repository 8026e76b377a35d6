"""CLEAR beside the rest of diffusers, on tiny FLUX and SD3 pipelines of the real classes.

The first part is a matrix. For each plugin and family: it does to the mounted pipeline what it does (effect), the
picture is the same whether it came before or after mounting (order), it is still there after unmounting (stays), and
nothing is left of either after unmounting and unloading (gone). Mounted is a small window with pooled keys and weights
other than the model's own. The strongest is the last (whole): with the model's own weights, a window that covers the
grid and no pooled keys, CLEAR is the attention that it replaces, so the plugin must give the stock picture.

The second part is what does not fit in a matrix: sizes, compiled graphs, copies and files, several pipelines at once.
"""

import atexit
import contextlib
import copy
import functools
import inspect
import shutil
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", reason='plugins need the extra: pip install "linattn[diffusers]"')
pytest.importorskip("transformers", reason='plugins need the extra: pip install "linattn[diffusers]"')
pytest.importorskip("accelerate", reason='plugins need the extra: pip install "linattn[diffusers]"')
pytest.importorskip("peft", reason='plugins need the extra: pip install "linattn[diffusers]"')

import accelerate
import diffusers
import peft
from helpers.goldens import relative_error
from helpers.tiny_pipelines import IMAGE_SIZE, TRANSFORMERS, tiny_controlnet, tiny_ip_adapter, tiny_pipeline

from linattn.adapters import CLEAR

# What reordered float32 arithmetic may change in two steps of a tiny transformer (the goldens' README: 1e-5 for one),
# and what an effect must exceed to be none of that.
ROUNDING = 1e-5
EFFECT = 100 * ROUNDING

WINDOW, DOWN = 2, 2  # a query sees itself and its eight neighbours, and 2 x 2 tokens pooled
WHOLE = 64  # a radius beyond every grid here
HEIGHT, WIDTH = 32, 48  # pixels: 8 x 12 tokens

pytestmark = pytest.mark.usefixtures("one_thread_in_module", "diffusers_attention_backend")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def picture(channels=3, height=HEIGHT, width=WIDTH):
    return torch.rand(1, channels, height, width, generator=seeded(channels))


def draw(pipe, **call):
    """The latents after a few steps: nothing is clipped in them, so that no difference is hidden."""
    size = {"height": HEIGHT, "width": WIDTH}
    call = {"prompt": "a fox", "num_inference_steps": 2, "max_sequence_length": 16, **size, **call}
    pipe.set_progress_bar_config(disable=True)
    # Not every pipeline passes the generator on to its VAE.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return pipe(generator=seeded(0), output_type="latent", **call).images


@functools.cache
def scratch(name):
    """A folder for files that several tests load, gone when the process ends."""
    folder = Path(mkdtemp(prefix=f"linattn-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def weights(family, shallow=False):
    """Saved CLEAR weights for a family, other than its transformer's own."""
    folder = scratch(f"clear-{family}-{shallow}")
    pipe = shallow_pipeline(family) if shallow else tiny_pipeline(family)
    clear = CLEAR.construct_for(pipe, WINDOW, DOWN, load_pretrained=False)
    generator = seeded(3)
    with torch.no_grad():
        for parameter in clear.trainable_parameters().values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    clear.save_pretrained(folder)
    return folder


def shallow_pipeline(family):
    """One layer of each kind: where each one costs time, in compilers."""
    flux = {"num_layers": 1, "num_single_layers": 1}
    return tiny_pipeline(family, **flux if family == "flux" else {"num_layers": 2, "dual_attention_layers": (0,)})


def mount(pipe, family):
    path = weights(family, shallow=pipe.transformer.config.num_layers < TRANSFORMERS[family]["num_layers"])
    return CLEAR.construct_for(pipe, pretrained_model_name_or_path=path)


def mount_whole(pipe):
    return CLEAR.construct_for(pipe, WHOLE, 1, load_pretrained=False)


@contextlib.contextmanager
def quiet():
    """Without the warnings that the tests below ask for one by one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ------------------------------------------------------------------------------ plugins, as people load and unload them


# What CLEAR's weights replace; and every other layer there is, among them the text side of the same attentions.
IMAGE_SIDE = r".*attn2?\.(to_q|to_k|to_v|to_out\.0)"
ALL_LINEAR = "all-linear"


@functools.cache
def lora_file(family, targets=IMAGE_SIDE, seed=2, **options):
    pipe = tiny_pipeline(family)
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, **options))
    layers = {
        key: (0.3 if ".lora_" in key else 1.0) * torch.randn(value.shape, generator=seeded(seed + i))
        for i, (key, value) in enumerate(sorted(peft.get_peft_model_state_dict(pipe.transformer).items()))
    }
    folder = scratch(f"lora-{family}-{seed}")
    type(pipe).save_lora_weights(folder, transformer_lora_layers=layers)
    return folder / "pytorch_lora_weights.safetensors"


def load_lora(pipe, family):
    pipe.load_lora_weights(str(lora_file(family)), adapter_name="a")
    return pipe


def load_lora_of_all_layers(pipe, family):
    pipe.load_lora_weights(str(lora_file(family, ALL_LINEAR, seed=200)), adapter_name="all")
    pipe.set_adapters("all", 0.3)
    return pipe


def load_two_loras(pipe, family):
    pipe.load_lora_weights(str(lora_file(family)), adapter_name="a")
    pipe.load_lora_weights(str(lora_file(family, seed=60)), adapter_name="b")
    pipe.set_adapters(["a", "b"], adapter_weights=[0.7, -0.4])
    return pipe


def load_fused_lora(pipe, family):
    load_lora(pipe, family)
    pipe.fuse_lora(components=["transformer"], lora_scale=0.7)
    return pipe


def unload_lora(pipe):
    pipe.unload_lora_weights()
    return pipe


def unload_fused_lora(pipe):
    pipe.unfuse_lora(components=["transformer"])
    return unload_lora(pipe)


def load_ip_adapter(pipe, family):
    tensors, encoder = tiny_ip_adapter(family)
    pipe.register_modules(image_encoder=encoder)
    pipe.load_ip_adapter(tensors, weight_name=None)
    pipe.set_ip_adapter_scale(0.8)
    return pipe


def unload_ip_adapter(pipe):
    pipe.unload_ip_adapter()
    return pipe


def remade(pipe, ending, **components):
    """The pipeline of another task from the same components, by the ending of its class's name in diffusers."""
    prefix = "Flux" if hasattr(pipe, "text_encoder_2") and not hasattr(pipe, "text_encoder_3") else "StableDiffusion3"
    cls = getattr(diffusers, f"{prefix}{ending}")
    accepted = inspect.signature(cls).parameters
    return cls(**{key: value for key, value in {**pipe.components, **components}.items() if key in accepted})


def without(pipe):
    return remade(pipe, "Pipeline")


def with_controlnet(pipe, family):
    return remade(pipe, "ControlNetPipeline", controlnet=tiny_controlnet(family))


def as_image_to_image(pipe, _):
    return remade(pipe, "Img2ImgPipeline")


def as_inpainting(pipe, _):
    return remade(pipe, "InpaintPipeline")


def load_everything(pipe, family):
    if family == "flux":
        load_ip_adapter(pipe, family)
    load_lora(pipe, family)
    return with_controlnet(pipe, family)


def unload_everything(pipe):
    pipe = without(pipe)
    if getattr(pipe.transformer, "encoder_hid_proj", None) is not None:
        unload_ip_adapter(pipe)
    return unload_lora(pipe)


FACE = picture(height=IMAGE_SIZE, width=IMAGE_SIZE)
MASK = (picture(1) > 0.5).float()
REPAINT = {"image": picture(), "mask_image": MASK}

# The CPU stands in for the accelerator: the hooks are the same ones, and do all their work.
CPU = torch.device("cpu")


def offload_models(pipe, _):
    for model in (pipe.text_encoder, pipe.transformer, pipe.vae):
        accelerate.cpu_offload_with_hook(model, CPU)
    return pipe


def offload_layers(pipe, _):
    accelerate.cpu_offload(pipe.transformer, CPU)
    return pipe


def remove_hooks(pipe):
    for model in (pipe.text_encoder, pipe.transformer, pipe.vae):
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
    return pipe


def load_lora_and_offload(pipe, family):
    return offload_layers(load_lora(pipe, family), family)


def unload_lora_and_hooks(pipe):
    return unload_lora(remove_hooks(pipe))


def compile_transformer(pipe, _):
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    return pipe


def without_compiled_transformer(pipe):
    pipe.transformer = pipe.transformer._orig_mod
    return pipe


def compile_blocks(pipe, _):
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    return pipe


def without_compiled_blocks(pipe):
    for module in pipe.transformer.modules():
        module._compiled_call_impl = None
    return pipe


def offload_groups(kind, **options):
    def load(pipe, _):
        pipe.transformer.enable_group_offload(CPU, CPU, kind, **options)
        return pipe

    return load


def cast_layerwise(pipe, _):
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return pipe


def set_backend(pipe, _):
    pipe.transformer.set_attention_backend("_native_math")
    return pipe


def reset_backend(pipe):
    pipe.transformer.reset_attention_backend()
    return pipe


def fuse_projections(pipe, _):
    pipe.transformer.fuse_qkv_projections()
    return pipe


def unfuse_projections(pipe):
    pipe.transformer.unfuse_qkv_projections()
    return pipe


def cache_first_block(pipe, _):
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=100.0))
    return pipe


def without_cache(pipe):
    pipe.transformer.disable_cache()
    return pipe


class Quantised(nn.Linear):
    """Stands in for the layers of torchao, bitsandbytes and their kin: a Linear to be called, that has no `.weight`.

    Eight bits a weight and a scale for each row.
    """

    def __init__(self, linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        with torch.no_grad():
            scale = linear.weight.abs().amax(1, keepdim=True) / 127
            self.register_buffer("scale", scale)
            self.register_buffer("packed", (linear.weight / scale).round().to(torch.int8))
            self.register_buffer("bias", linear.bias)

    @property
    def weight(self):
        raise AttributeError("the weight of a quantised layer was read: call the layer")

    def forward(self, x):
        return nn.functional.linear(x, self.packed.float() * self.scale, self.bias)


def quantise(pipe, _=None):
    for module in list(pipe.transformer.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Quantised(child))
    return pipe


def nothing(pipe, *_):
    return pipe


CHANGES, KEEPS = "changes", "unchanged"
EQUAL, ROUNDED = "equal", "equal but for rounding"


@dataclass(frozen=True)
class Plugin:
    """How a plugin is put on a pipeline and taken off again, and how exactly each property of the matrix holds.

    base makes the pipeline without it, which draws with base_call. gone=None: it cannot be taken off.
    """

    load: Callable = nothing
    unload: Callable | None = nothing
    call: dict = field(default_factory=dict)
    effect: str = CHANGES
    order: str = EQUAL
    stays: str = EQUAL
    gone: str | None = EQUAL
    families: tuple[str, ...] = ("flux", "sd3", "sd35")
    base: Callable = tiny_pipeline
    base_call: dict = field(default_factory=dict)


FLUX, SD3 = ("flux",), ("sd3", "sd35")

PLUGINS = {
    "LoRA": Plugin(load_lora, unload_lora, families=("flux", "flux-schnell", "sd3", "sd35")),
    "LoRA of every linear layer": Plugin(load_lora_of_all_layers, unload_lora),
    "LoRA, its scale given in the call": Plugin(
        load_lora, unload_lora, call={"joint_attention_kwargs": {"scale": 0.4}}, families=("flux", "sd35")
    ),
    "two LoRAs, weighted by set_adapters": Plugin(load_two_loras, unload_lora),
    # Fusing adds to the weights and unfusing subtracts: each rounds them once, in diffusers as here.
    "LoRA, fused with a scale": Plugin(load_fused_lora, unload_fused_lora, gone=ROUNDED),
    "LoRA, Fill": Plugin(load_lora, unload_lora, call=REPAINT, base_call=REPAINT, families=("flux-fill",)),
    "IP-Adapter": Plugin(
        load_ip_adapter,
        unload_ip_adapter,
        call={"ip_adapter_image": FACE},
        families=FLUX,
    ),
    "IP-Adapter, true CFG": Plugin(
        load_ip_adapter,
        unload_ip_adapter,
        call={
            "ip_adapter_image": FACE,
            "negative_ip_adapter_image": 1 - FACE,
            "negative_prompt": "a dog",
            "true_cfg_scale": 2.0,
        },
        families=FLUX,
    ),
    "ControlNet": Plugin(with_controlnet, without, call={"control_image": picture()}),
    "LoRA and ControlNet together": Plugin(
        load_everything, unload_everything, call={"control_image": picture()}, families=SD3
    ),
    "LoRA, ControlNet and IP-Adapter together": Plugin(
        load_everything,
        unload_everything,
        call={"control_image": picture(), "ip_adapter_image": FACE},
        families=FLUX,
    ),
    "image to image": Plugin(as_image_to_image, without, call={"image": picture(), "strength": 0.7}),
    "inpainting": Plugin(as_inpainting, without, call=REPAINT),
    "true CFG": Plugin(call={"negative_prompt": "a dog", "true_cfg_scale": 2.0}, families=FLUX),
    "negative prompt": Plugin(call={"negative_prompt": "a dog"}, families=SD3),
    "guidance that skips a layer": Plugin(
        call={"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0},
        families=("sd35",),
    ),
    "several prompts, several pictures of each": Plugin(
        call={"prompt": ["a fox", "a dog"], "num_images_per_prompt": 2},
        base_call={"prompt": ["a fox", "a fox"], "num_images_per_prompt": 2},
        families=("flux", "sd35"),
    ),
    # Stock attention reads its projections from one fused layer, where CLEAR's stay layers of their own. (diffusers'
    # own fails at the second attention of SD3.5.)
    "fuse_qkv_projections": Plugin(
        fuse_projections, unfuse_projections, effect=KEEPS, stays=ROUNDED, gone=ROUNDED, families=("flux", "sd3")
    ),
    "first block cache": Plugin(cache_first_block, without_cache, families=FLUX),
    "torch.compile": Plugin(
        compile_transformer,
        without_compiled_transformer,
        effect=KEEPS,
        families=("flux", "sd35"),
        base=shallow_pipeline,
    ),
    "compile_repeated_blocks": Plugin(
        compile_blocks, without_compiled_blocks, effect=KEEPS, families=FLUX, base=shallow_pipeline
    ),
    # Resetting leaves the process at the other formula: stock attention rounds differently ever after.
    "set_attention_backend": Plugin(
        set_backend, reset_backend, effect=KEEPS, stays=ROUNDED, gone=ROUNDED, families=FLUX
    ),
    "enable_model_cpu_offload": Plugin(offload_models, remove_hooks, effect=KEEPS, families=("flux", "sd35")),
    "enable_sequential_cpu_offload": Plugin(offload_layers, remove_hooks, effect=KEEPS),
    "LoRA and enable_sequential_cpu_offload together": Plugin(
        load_lora_and_offload, unload_lora_and_hooks, families=("flux", "sd35")
    ),
    "group offloading, of blocks": Plugin(
        offload_groups("block_level", num_blocks_per_group=1), None, effect=KEEPS, gone=None
    ),
    "group offloading, of layers": Plugin(offload_groups("leaf_level"), None, effect=KEEPS, gone=None),
    "enable_layerwise_casting": Plugin(cast_layerwise, None, gone=None),
}
CASES = [(name, family) for name, plugin in PLUGINS.items() for family in plugin.families]


@functools.cache
def story(name, family):
    """The latents of every stage of both orders; a stage is called by what is on the pipeline then."""
    plugin = PLUGINS[name]
    drawn = {}
    with quiet():
        pipe = plugin.base(family)
        drawn["stock"] = draw(pipe, **plugin.base_call)
        clear = mount(pipe, family)
        drawn["mounted"] = draw(pipe, **plugin.base_call)
        pipe = plugin.load(pipe, family)
        drawn["mounted, then loaded"] = draw(pipe, **plugin.call)
        clear.unmount()
        drawn["mounted, loaded, unmounted"] = draw(pipe, **plugin.call)
        if plugin.unload:
            drawn["mounted, loaded, unmounted, unloaded"] = draw(plugin.unload(pipe), **plugin.base_call)

        pipe = plugin.load(plugin.base(family), family)
        drawn["loaded"] = draw(pipe, **plugin.call)
        clear = mount(pipe, family)
        drawn["loaded, then mounted"] = draw(pipe, **plugin.call)
        if plugin.unload:
            pipe = plugin.unload(pipe)
            drawn["loaded, mounted, unloaded"] = draw(pipe, **plugin.base_call)
            clear.unmount()
            drawn["loaded, mounted, unloaded, unmounted"] = draw(pipe, **plugin.base_call)

        pipe = plugin.base(family)
        mount_whole(pipe)
        drawn["mounted whole, then loaded"] = draw(plugin.load(pipe, family), **plugin.call)
        pipe = plugin.load(plugin.base(family), family)
        mount_whole(pipe)
        drawn["loaded, then mounted whole"] = draw(pipe, **plugin.call)
    return drawn


def check_same(drawn, first, second, how):
    if how == EQUAL:
        assert torch.equal(drawn[first], drawn[second]), f"{first} | {second}"
    else:
        assert relative_error(drawn[first], drawn[second]) < ROUNDING, f"{first} | {second}"


# By class: the tests of a case follow each other, so that its story is drawn once.
@pytest.mark.parametrize("case", CASES, ids="-".join, scope="class")
class TestMatrix:
    def test_effect_on_the_mounted_pipeline_is_the_plugins(self, case):
        plugin, drawn = PLUGINS[case[0]], story(*case)
        assert relative_error(drawn["mounted"], drawn["stock"]) > EFFECT
        assert relative_error(drawn["mounted, then loaded"], drawn["loaded"]) > EFFECT, "the plugin undid the mounting"
        assert torch.isfinite(drawn["mounted, then loaded"]).all()
        change = relative_error(drawn["mounted, then loaded"], drawn["mounted"])
        assert change > EFFECT if plugin.effect == CHANGES else change < ROUNDING

    def test_order_of_mounting_and_loading_does_not_matter(self, case):
        check_same(story(*case), "mounted, then loaded", "loaded, then mounted", PLUGINS[case[0]].order)

    def test_plugin_stays_with_the_unmounted_pipeline(self, case):
        check_same(story(*case), "mounted, loaded, unmounted", "loaded", PLUGINS[case[0]].stays)

    def test_nothing_is_left_of_either_after_unmounting_and_unloading(self, case):
        plugin, drawn = PLUGINS[case[0]], story(*case)
        if plugin.gone is None:
            assert plugin.unload is None
            return
        check_same(drawn, "mounted, loaded, unmounted, unloaded", "stock", plugin.gone)
        check_same(drawn, "loaded, mounted, unloaded", "mounted", plugin.gone)
        check_same(drawn, "loaded, mounted, unloaded, unmounted", "stock", plugin.gone)

    def test_window_that_covers_the_grid_gives_the_stock_picture_with_the_plugin(self, case):
        for stage in ("mounted whole, then loaded", "loaded, then mounted whole"):
            check_same(story(*case), stage, "loaded", ROUNDED)


# --------------------------------------------------------------------------------- that the plugins were really at work


EVERY = pytest.mark.parametrize("family", ["flux", "sd35"])
ORDERS = pytest.mark.parametrize("first", ["mount", "enable"])


def enabled(enable, family, first):
    """A transformer with something enabled before or after mounting, and the CLEAR that is mounted."""
    pipe = tiny_pipeline(family)
    clear = mount(pipe, family) if first == "mount" else None
    enable(pipe, family)
    return pipe.transformer, clear or mount(pipe, family)


def everything_of(model):
    """What a model is made of: its modules, what hangs on them, and its weights, in their order."""
    modules = [(name, id(module)) for name, module in model.named_modules()]
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    return modules, hooks, [(name, id(parameter)) for name, parameter in model.named_parameters()]


@EVERY
def test_unmounting_puts_back_the_same_objects_with_a_lora_and_a_controlnet_on_them(family):
    pipe = with_controlnet(load_lora(tiny_pipeline(family), family), family)
    before, beside = everything_of(pipe.transformer), everything_of(pipe.controlnet)
    keys = list(pipe.transformer.state_dict())
    clear = mount(pipe, family)
    assert everything_of(pipe.transformer) != before
    assert everything_of(pipe.controlnet) == beside, "a ControlNet keeps its own attention"
    draw(pipe, control_image=picture())
    clear.unmount()
    assert everything_of(pipe.transformer) == before
    assert list(pipe.transformer.state_dict()) == keys


@EVERY
def test_lora_is_trained_on_a_mounted_transformer_and_is_all_that_is_trained(family):
    pipe = tiny_pipeline(family)
    pipe.transformer.requires_grad_(False)
    mount(pipe, family)
    pipe.transformer.requires_grad_(False)
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=IMAGE_SIDE, init_lora_weights=False))
    call_transformer(pipe.transformer).square().mean().backward()
    trained = {name for name, parameter in pipe.transformer.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in pipe.transformer.named_parameters() if ".lora_" in name}
    assert all(parameter.grad.abs().max() > 0 for parameter in pipe.transformer.parameters() if parameter.requires_grad)


def call_transformer(transformer, height=4, width=6, text=5, batch=2):
    """One call of a transformer with arguments as its pipeline makes them."""
    config = transformer.config
    given = {
        "encoder_hidden_states": torch.randn(batch, text, config.joint_attention_dim, generator=seeded(1)),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim, generator=seeded(2)),
    }
    if "axes_dims_rope" in config:
        given["hidden_states"] = torch.randn(batch, height * width, config.in_channels, generator=seeded(3))
        given["timestep"], given["guidance"] = torch.full((batch,), 0.5), torch.full((batch,), 3.5)
        given["txt_ids"], given["img_ids"] = torch.zeros(text, 3), position_ids(height, width)
    else:
        latents = torch.randn(batch, config.in_channels, 2 * height, 2 * width, generator=seeded(3))
        given["hidden_states"], given["timestep"] = latents, torch.full((batch,), 500.0)
    return transformer(**given, return_dict=False)[0]


@functools.cache
def position_ids(height, width):
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(-1, 3).float()


@EVERY
def test_gradient_checkpointing_gives_the_same_gradients(family):
    gradients = []
    for checkpointing in (False, True):
        transformer = tiny_pipeline(family).transformer.train()
        clear = mount_with_own_weights(transformer)
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        for size in [(4, 6), (3, 5)]:
            call_transformer(transformer, *size).square().mean().backward()
        gradients.append({key: parameter.grad for key, parameter in clear.trainable_parameters().items()})
    plain, recomputed = gradients
    assert all(value.abs().max() > 0 for value in plain.values())
    for key, value in plain.items():
        assert torch.equal(value, recomputed[key]), key


def mount_with_own_weights(model, window=WINDOW, down=DOWN):
    return CLEAR.construct_for(model, window, down, load_pretrained=False)


@ORDERS
@EVERY
def test_weights_that_accelerate_offloads_are_away_between_calls_and_home_after_unmounting(family, first):
    transformer, clear = enabled(offload_layers, family, first)
    assert all(parameter.is_meta for parameter in transformer.parameters())
    clear.unmount()
    assert all(parameter.is_meta for parameter in transformer.parameters()), "the originals are offloaded like the rest"
    written = CLEAR.from_pretrained(weights(family)).state_dict()
    own = clear.state_dict()
    assert own.keys() == written.keys() and all(torch.equal(own[key], written[key]) for key in own)


@EVERY
def test_layers_are_copied_from_weights_that_are_offloaded(family):
    plain, offloaded = tiny_pipeline(family), offload_layers(tiny_pipeline(family), family)
    for pipe in (plain, offloaded):
        mount_with_own_weights(pipe)
    assert torch.equal(draw(plain), draw(offloaded))


@ORDERS
@EVERY
def test_group_offloading_reaches_the_layers_that_are_mounted_and_leaves_those_that_are_not(family, first):
    def grouped(layers):
        registries = [getattr(layer, "_diffusers_hook", None) for layer in layers]
        return [bool(registry and registry.get_hook("group_offloading")) for registry in registries]

    transformer, clear = enabled(offload_groups("leaf_level"), family, first)
    mounted = [layer for module in clear.modules_dict.values() for layer in linear_layers(module)]
    assert all(grouped(mounted))
    clear.unmount()
    assert all(grouped(linear_layers(transformer)))
    assert not any(grouped(linear_layers(clear)))


def linear_layers(module):
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


@ORDERS
@EVERY
def test_layerwise_casting_reaches_the_layers_that_are_mounted(family, first):
    def enable(pipe, _):
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)

    _, clear = enabled(enable, family, first)
    layers = [layer for module in clear.modules_dict.values() for layer in linear_layers(module)]
    assert {layer.weight.dtype for layer in layers} == {torch.float8_e4m3fn}


@EVERY
def test_quantised_layers_are_called_and_never_read(family):
    """Mounted on what is quantised, with its own weights, in either order; and unmounted to the last bit."""
    pipe = quantise(tiny_pipeline(family))
    stock = draw(pipe)
    clear = mount_whole(pipe)
    assert relative_error(draw(pipe), stock) < ROUNDING
    clear.unmount()
    assert torch.equal(draw(pipe), stock)

    clear = mount_with_own_weights(pipe)
    small = draw(pipe)
    assert relative_error(small, stock) > EFFECT
    clear.unmount()
    after = tiny_pipeline(family)
    mount_with_own_weights(after)
    assert torch.equal(draw(quantise(after)), small)


@EVERY
def test_weights_that_are_loaded_stand_in_for_quantised_layers(family):
    """A checkpoint replaces the layers it has weights for; those it has none for stay quantised."""
    pipe = quantise(tiny_pipeline(family))
    stock = draw(pipe)
    clear = mount(pipe, family)
    name, module = next(iter(clear.modules_dict.items()))
    assert type(module.to_q) is nn.Linear and type(module.add_q_proj) is Quantised
    assert torch.equal(module.to_q.weight, CLEAR.from_pretrained(weights(family)).state_dict()[f"{name}.to_q.weight"])
    assert relative_error(draw(pipe), stock) > EFFECT
    clear.unmount()
    assert torch.equal(draw(pipe), stock)


# ------------------------------------------------------------------------------------------------------- IP-Adapter


def with_ip_adapter(first, scale):
    pipe = tiny_pipeline("flux")
    if first == "mount":
        mount(pipe, "flux")
    load_ip_adapter(pipe, "flux")
    if first == "load":
        mount(pipe, "flux")
    pipe.set_ip_adapter_scale(scale)
    return draw(pipe, ip_adapter_image=FACE)


@pytest.mark.parametrize("first", ["mount", "load"])
def test_scale_of_an_ip_adapter_is_heard_where_clear_is_mounted(first):
    plain = tiny_pipeline("flux")
    mount(plain, "flux")
    without_adapter = draw(plain)
    assert relative_error(with_ip_adapter(first, 0.0), without_adapter) < ROUNDING
    drawn = [with_ip_adapter(first, scale) for scale in (0.5, 1.0, [1.0, 0.0])]
    for i, one in enumerate(drawn):
        assert relative_error(one, without_adapter) > EFFECT
        assert all(relative_error(one, other) > EFFECT for other in drawn[:i])


# --------------------------------------------------------------------------------------------------- a layer subset


@EVERY
def test_lora_reaches_the_attentions_with_and_without_a_window(family):
    """Two of the attentions are mounted; a LoRA on all of them acts on both kinds, in either order."""
    names = list(mount_with_own_weights(tiny_pipeline(family)).modules_dict)[1:3]
    before, after = tiny_pipeline(family), tiny_pipeline(family)
    options = {"layers": names, "pretrained_model_name_or_path": weights(family)}
    load_lora(before, family)
    stock = draw(before)
    CLEAR.construct_for(before, **options)
    clear = CLEAR.construct_for(after, **options)
    assert list(clear.modules_dict) == names
    partly = draw(after)
    load_lora(after, family)
    drawn = draw(after)
    assert torch.equal(draw(before), drawn)
    assert relative_error(drawn, partly) > EFFECT and relative_error(drawn, stock) > EFFECT
    clear.unmount()
    assert torch.equal(draw(after), stock)


# ------------------------------------------------------------------------------------------------------------- sizes


# In tokens: odd ones, a single row, and what two does not divide.
SIZES = [(8, 12), (5, 7), (12, 8), (1, 9), (13, 3), (8, 12)]


def draw_tokens(pipe, height, width, **call):
    return draw(pipe, height=4 * height, width=4 * width, **call)


@EVERY
def test_one_mounted_pipeline_draws_every_size_as_one_that_is_mounted_for_it(family):
    pipe = tiny_pipeline(family)
    mount(pipe, family)
    for size in SIZES:
        fresh = tiny_pipeline(family)
        mount(fresh, family)
        assert torch.equal(draw_tokens(pipe, *size), draw_tokens(fresh, *size)), size


@EVERY
def test_window_that_covers_the_grid_is_stock_attention_at_every_size(family):
    stock, pipe = tiny_pipeline(family), tiny_pipeline(family)
    mount_whole(pipe)
    for size in SIZES:
        assert relative_error(draw_tokens(pipe, *size), draw_tokens(stock, *size)) < ROUNDING, size


@pytest.mark.parametrize("family", ["flux", "sd3", "sd35"])
def test_small_window_is_stock_attention_under_the_mask_of_the_circle(family, monkeypatch):
    """With a LoRA on top, on a grid whose sides differ; every attention of the stock transformer gets the mask."""
    height, width, text, radius = 4, 6, 5, 3
    tokens, text_first = height * width, family == "flux"
    y, x = torch.arange(tokens) // width, torch.arange(tokens) % width
    near = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < radius**2
    joint = torch.ones(tokens + text, tokens + text, dtype=torch.bool)
    image = slice(text, None) if text_first else slice(tokens)
    joint[image, image] = near
    masks = {tokens: near, tokens + text: joint}
    attend, calls = nn.functional.scaled_dot_product_attention, []

    def masked(query, key, value, **_):
        calls.append(query.shape[2])
        return attend(query, key, value, attn_mask=masks[query.shape[2]])

    pipe = load_lora(tiny_pipeline(family), family)
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(nn.functional, "scaled_dot_product_attention", masked)
            expected = call_transformer(pipe.transformer, height, width, text)
        clear = mount_with_own_weights(pipe, radius, 1)
        assert len(calls) == len(clear.modules_dict)
        assert relative_error(call_transformer(pipe.transformer, height, width, text), expected) < ROUNDING


@EVERY
def test_window_follows_the_shape_of_the_grid_and_not_its_number_of_tokens(family):
    """Neighbours in a wide grid are other ones than in a narrow grid of as many tokens."""
    pipe = tiny_pipeline(family)
    clear = mount_with_own_weights(pipe, 2, 1)
    wide = draw_tokens(pipe, 4, 6)
    clear.set_grid(4, 6)
    assert torch.equal(draw_tokens(pipe, 4, 6), wide)
    clear.set_grid()
    assert relative_error(draw_tokens(pipe, 6, 4).flatten(), wide.flatten()) > EFFECT


@EVERY
def test_set_grid_that_is_not_the_grid_of_the_call_is_refused(family):
    pipe = tiny_pipeline(family)
    clear = mount(pipe, family)
    clear.set_grid(8, 10)
    with pytest.raises(ValueError, match=r"set_grid.*8, 10"):
        draw_tokens(pipe, 8, 12)


def test_second_image_in_the_sequence_is_refused():
    pipe = tiny_pipeline("flux")
    clear = mount(pipe, "flux")
    kontext = remade(pipe, "KontextPipeline")
    call = {"image": picture(), "_auto_resize": False, "max_area": HEIGHT * WIDTH}
    with pytest.raises(ValueError, match="Kontext"):
        draw(kontext, **call)
    clear.unmount()
    assert draw(kontext, **call).isfinite().all()


# ---------------------------------------------------------------------------------------------------- compiled graphs


def counting(graphs):
    """A compiler that notes how many window attentions each graph has, and runs it as it is."""

    def backend(graph, _):
        graphs.append(sum("window_attention" in str(node.target) for node in graph.graph.nodes))
        return graph

    return backend


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("family, attentions", [("flux", 2), ("sd35", 3)])
def test_compiled_transformer_is_one_graph_for_all_sizes(family, attentions, fresh_dynamo):
    """fullgraph=True raises at a graph break, so that the ops are in the graph shows that nothing was skipped."""
    pipe, graphs = shallow_pipeline(family), []
    clear = mount_with_own_weights(pipe)
    sizes = [(4, 6), (5, 7), (8, 3)]
    expected = []
    for size in sizes:
        with torch.no_grad():
            expected.append(call_transformer(pipe.transformer, *size))
    compiled = torch.compile(pipe.transformer, backend=counting(graphs), fullgraph=True, dynamic=True)
    for size, eager in zip(sizes, expected, strict=True):
        clear.set_grid(*size)
        with torch.no_grad():
            assert relative_error(call_transformer(compiled, *size), eager) < ROUNDING
        # What notes the grid before the forward may be a graph of its own.
        assert [count for count in graphs if count] == [attentions] and len(graphs) <= 2


@pytest.mark.parametrize("family, attentions", [("flux", [1, 1]), ("sd35", [2, 1])])
def test_compiled_blocks_serve_every_size_with_one_graph_each(family, attentions, fresh_dynamo):
    """The grid is found outside the blocks, so nothing needs to be set ahead."""
    pipe, graphs = shallow_pipeline(family), []
    mount_with_own_weights(pipe)
    transformer = pipe.transformer
    with torch.no_grad():
        expected = {size: call_transformer(transformer, *size) for size in [(4, 6), (5, 7), (8, 3)]}
    blocks = [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", [])]
    for block in blocks:
        block.compile(backend=counting(graphs), fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size, eager in expected.items():
            assert relative_error(call_transformer(transformer, *size), eager) < ROUNDING
            assert graphs == attentions


# ------------------------------------------------------------------------------------------ several pipelines at once


@EVERY
def test_mounted_pipelines_do_not_know_of_each_other(family):
    """Two of different windows, poolings and sizes draw in turns; beside them stock attention stays stock."""
    stock, small, large = (tiny_pipeline(family) for _ in range(3))
    alone = draw(stock)
    mount_with_own_weights(small, 2, 1)
    drawn_small = draw_tokens(small, 5, 7)
    clear = mount_with_own_weights(large, 3, 2)
    drawn_large = draw_tokens(large, 8, 6)
    assert torch.equal(draw_tokens(small, 5, 7), drawn_small)
    assert torch.equal(draw_tokens(large, 8, 6), drawn_large)
    assert torch.equal(draw(stock), alone)
    clear.unmount()
    assert torch.equal(draw_tokens(small, 5, 7), drawn_small)
    assert torch.equal(draw(large), alone)


@EVERY
def test_pipelines_draw_at_once_in_threads(family):
    pipes, sizes = [tiny_pipeline(family) for _ in range(2)], [(5, 7), (8, 6)]
    for pipe, (window, down) in zip(pipes, [(2, 1), (3, 2)], strict=True):
        mount_with_own_weights(pipe, window, down)
    expected = [call_transformers(pipe, *size) for pipe, size in zip(pipes, sizes, strict=True)]
    drawn, barrier = [None, None], threading.Barrier(2)

    def work(i):
        torch.set_num_threads(1)
        barrier.wait()
        drawn[i] = call_transformers(pipes[i], *sizes[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(*pair) for pair in zip(drawn, expected, strict=True))


def call_transformers(pipe, height, width, times=5):
    with torch.no_grad():
        return torch.stack([call_transformer(pipe.transformer, height, width) for _ in range(times)])


# --------------------------------------------------------------------------------------- copies, files, half precision


@EVERY
def test_copy_of_a_mounted_pipeline_has_a_grid_of_its_own_and_stays_mounted(family):
    pipe = tiny_pipeline(family)
    clear = mount(pipe, family)
    small, mounted = draw_tokens(pipe, 5, 7), draw(pipe)
    clone = copy.deepcopy(pipe)

    def interrupt(*_):
        assert torch.equal(draw_tokens(clone, 5, 7), small)

    # After the first block of a call, when its grid has been found.
    handle = pipe.transformer.transformer_blocks[0].register_forward_hook(interrupt)
    assert torch.equal(draw(pipe), mounted)
    handle.remove()
    clear.unmount()
    assert torch.equal(draw(clone), mounted)


@EVERY
def test_pipeline_saved_while_mounted_draws_the_same_when_it_is_mounted_again(family, tmp_path):
    pipe = tiny_pipeline(family)
    clear = mount(pipe, family)
    mounted = draw(pipe)
    pipe.save_pretrained(tmp_path / "pipeline")
    clear.save_pretrained(tmp_path / "clear")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    CLEAR.construct_for(loaded, pretrained_model_name_or_path=tmp_path / "clear")
    assert torch.equal(draw(loaded), mounted)


@EVERY
def test_pipeline_saved_after_unmounting_is_the_stock_one(family, tmp_path):
    pipe = tiny_pipeline(family)
    stock = draw(pipe)
    mount(pipe, family).unmount()
    pipe.save_pretrained(tmp_path)
    assert torch.equal(draw(diffusers.DiffusionPipeline.from_pretrained(tmp_path)), stock)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@EVERY
def test_mounted_pipeline_in_half_precision_is_as_exact_as_the_stock_one(family, dtype):
    stock, pipe = tiny_pipeline(family), tiny_pipeline(family)
    exact = draw(stock)
    plain = draw(stock.to(dtype=dtype))
    pipe.to(dtype=dtype)
    mount_whole(pipe)
    drawn = draw(pipe)
    assert drawn.dtype == dtype and drawn.isfinite().all()
    assert relative_error(drawn, exact) < 2 * relative_error(plain, exact)


# ------------------------------------------------------------------------------------------- refused, and reported


@EVERY
def test_other_attention_processors_are_refused_and_change_nothing(family):
    pipe = tiny_pipeline(family)
    stock_processor = next(iter(pipe.transformer.attn_processors.values())).__class__
    mount(pipe, family)
    mounted = draw(pipe)
    with pytest.warns(UserWarning, match=f"{stock_processor.__name__} refused"):
        pipe.transformer.set_attn_processor(stock_processor())
    assert torch.equal(draw(pipe), mounted)


def louder(family):
    """A processor of somebody's own, with an effect of its own."""
    kind = next(iter(tiny_pipeline(family).transformer.attn_processors.values())).__class__

    class Louder(kind):
        def __call__(self, *args, **kwargs):
            out = super().__call__(*args, **kwargs)
            return tuple(3 * part for part in out) if isinstance(out, tuple) else 3 * out

    return Louder()


@EVERY
def test_processor_that_mounting_sets_aside_is_reported_and_comes_back(family):
    pipe = tiny_pipeline(family)
    pipe.transformer.transformer_blocks[0].attn.set_processor(louder(family))
    loud = draw(pipe)
    with pytest.warns(UserWarning, match=r"Louder.*transformer_blocks.0.attn"):
        clear = mount(pipe, family)
    clear.unmount()
    assert torch.equal(draw(pipe), loud)


@EVERY
def test_mounting_over_stock_processors_says_nothing(family):
    pipe = tiny_pipeline(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mount(pipe, family)


# --------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@EVERY
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_to_a_gpu_gives_the_same_picture_in_either_order(family, method):
    first, second, resident = (tiny_pipeline(family) for _ in range(3))
    clear = mount(first, family)
    getattr(first, method)()
    getattr(second, method)()
    mount(second, family)
    mount(resident.to("cuda"), family)
    expected = draw(resident)
    assert torch.equal(draw(first), expected) and torch.equal(draw(second), expected)
    clear.unmount()
    assert relative_error(draw(first), draw(tiny_pipeline(family).to("cuda"))) < ROUNDING


@pytest.mark.gpu
@EVERY
@pytest.mark.parametrize("use_stream", [False, True])
def test_group_offloading_to_a_gpu_gives_the_same_picture_in_either_order(family, use_stream):
    drawn = []
    for first in ("mount", "enable"):
        pipe = tiny_pipeline(family).to("cuda")
        clear = mount(pipe, family) if first == "mount" else None
        pipe.transformer.enable_group_offload(torch.device("cuda"), CPU, "leaf_level", use_stream=use_stream)
        clear = clear or mount(pipe, family)
        drawn.append(draw(pipe))
        clear.unmount()
        drawn.append(draw(pipe))
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[3])
