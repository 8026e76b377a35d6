"""LinFusion beside the rest of diffusers, on tiny pipelines of the real classes.

The first part is a matrix. For each plugin and family: it does to the mounted pipeline what it does (its effect), the
picture is the same whether it came before or after mounting (order), it is still there after unmounting (stays), and
nothing is left of either after unmounting and unloading (gone). The table in docs/linfusion.md is written from it:
`python -m tests.helpers.plugin_matrix`.

The second part is what does not fit in a table: what must be refused or reported, and half precision.
"""

import atexit
import contextlib
import copy
import functools
import inspect
import os
import runpy
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace

import numpy
import pytest
import torch

pytest.importorskip("diffusers", reason='plugins need the extra: pip install "linattn[diffusers]"')
pytest.importorskip("transformers", reason='plugins need the extra: pip install "linattn[diffusers]"')
pytest.importorskip("accelerate", reason='plugins need the extra: pip install "linattn[diffusers]"')
pytest.importorskip("peft", reason='plugins need the extra: pip install "linattn[diffusers]"')

import accelerate
import diffusers
import peft
from diffusers.models import attention_dispatch
from diffusers.models.attention_processor import AttnProcessor2_0
from helpers import plugin_matrix
from helpers.goldens import relative_error
from helpers.tiny_pipelines import FAMILIES, IMAGE_SIZE, TEXT_DIM, tiny_pipeline
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import linattn
import linattn.bundled
from linattn.adapters import LinearAttention, LinearAttnProcessor, LinFusion

# What reordered float32 arithmetic may change in two steps of a tiny UNet (the goldens' README: 1e-5 for one), and what
# an effect must exceed to be none of that.
ROUNDING = 1e-5
EFFECT = 100 * ROUNDING

FIRST = {
    "sd15": "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
    "sd21": "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
    "sdxl": "down_blocks.1.attentions.0.transformer_blocks.0.attn1",
}


pytestmark = pytest.mark.usefixtures("one_thread_in_module", "diffusers_attention_backend")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def picture(channels=3):
    return torch.rand(1, channels, IMAGE_SIZE, IMAGE_SIZE, generator=seeded(channels))


def draw(pipe, **call):
    """The latents after a few steps: nothing is clipped in them, so that no difference is hidden."""
    call = {"prompt": "a <thing> in the snow", "num_inference_steps": 2, "guidance_scale": 3.0, **call}
    pipe.set_progress_bar_config(disable=True)
    return pipe(generator=seeded(0), output_type="latent", **call).images


@functools.cache
def scratch(name):
    """A folder for files that several tests load, gone when the process ends."""
    folder = Path(mkdtemp(prefix=f"linattn-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def weights(family, levels):
    """Saved LinFusion weights for a family, other than its UNet's own."""
    folder = scratch(f"linfusion-{family}-{levels}")
    pipe = one_level_pipeline(family) if levels == 1 else tiny_pipeline(family)
    linfusion = LinFusion.construct_for(pipe, load_pretrained=False)
    generator = seeded(3)
    with torch.no_grad():
        for parameter in linfusion.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    linfusion.unmount().save_pretrained(folder)
    return folder


def mount(pipe, family):
    path = weights(family, len(pipe.unet.config.block_out_channels))
    return LinFusion.construct_for(pipe, pretrained_model_name_or_path=path)


def one_level_pipeline(family):
    """With four self-attentions: where each one costs time, in compilers."""
    return tiny_pipeline(
        family,
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )


# ------------------------------------------------------------------------------ plugins, as people load and unload them


SELF_ATTENTION = r".*attn1\.(to_q|to_k|to_v|to_out\.0)"


@functools.cache
def lora_file(family, seed=2):
    """A LoRA of the self-attentions alone: what changes the picture went through the modules that LinFusion mounts."""
    pipe = tiny_pipeline(family)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=SELF_ATTENTION))
    layers = {
        key: 0.3 * torch.randn(value.shape, generator=seeded(seed + i))
        for i, (key, value) in enumerate(sorted(peft.get_peft_model_state_dict(pipe.unet).items()))
    }
    folder = scratch(f"lora-{family}-{seed}")
    type(pipe).save_lora_weights(folder, unet_lora_layers=layers)
    return folder / "pytorch_lora_weights.safetensors"


@functools.cache
def kohya_file(family):
    """A LoRA in the layout of kohya's trainer, on one self-attention of the family."""
    pipe = tiny_pipeline(family)
    tensors = {}
    for i, slot in enumerate(("to_q", "to_k", "to_v", "to_out.0")):
        rows, columns = pipe.unet.get_submodule(f"{FIRST[family]}.{slot}").weight.shape
        key = "lora_unet_" + f"{FIRST[family]}.{slot}".replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = torch.randn(2, columns, generator=seeded(i))
        tensors[f"{key}.lora_up.weight"] = torch.randn(rows, 2, generator=seeded(i + 10))
        tensors[f"{key}.alpha"] = torch.tensor(2.0)
    file = scratch(f"kohya-{family}") / "kohya.safetensors"
    save_file(tensors, file)
    return file


@functools.cache
def ip_adapter_folder(family):
    """An IP-Adapter in the published layout: an image encoder, and one file with a projection and the keys' weights."""
    unet, folder, tokens = tiny_pipeline(family).unet, scratch(f"ip-{family}"), 4
    dim = unet.config.cross_attention_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=IMAGE_SIZE,
                patch_size=8,
                projection_dim=TEXT_DIM,
            )
        )
    encoder.save_pretrained(folder / "models" / "image_encoder")
    tensors = {
        "image_proj.proj.weight": torch.randn(tokens * dim, TEXT_DIM, generator=seeded(1)),
        "image_proj.proj.bias": torch.zeros(tokens * dim),
        "image_proj.norm.weight": torch.ones(dim),
        "image_proj.norm.bias": torch.zeros(dim),
    }
    cross = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for i, name in enumerate(cross):
        channels = unet.get_submodule(name.removesuffix(".processor")).inner_dim
        for j, slot in enumerate(("to_k_ip", "to_v_ip")):
            weight = torch.randn(channels, dim, generator=seeded(2 * i + j)) / dim**0.5
            tensors[f"ip_adapter.{2 * i + 1}.{slot}.weight"] = weight
    save_file(tensors, folder / "models" / "ip-adapter.safetensors")
    return folder


def load_ip_adapter(pipe, family):
    pipe.load_ip_adapter(str(ip_adapter_folder(family)), subfolder="models", weight_name="ip-adapter.safetensors")
    pipe.set_ip_adapter_scale(0.8)
    return pipe


def unload_ip_adapter(pipe):
    pipe.unload_ip_adapter()
    return pipe


@functools.cache
def controlnet(family):
    """A ControlNet of the UNet's own weights, whose zero convolutions have been trained away from zero."""
    net = diffusers.ControlNetModel.from_unet(
        tiny_pipeline(family).unet, conditioning_channels=3, conditioning_embedding_out_channels=(8, 16)
    )
    generator = seeded(4)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.startswith(("controlnet_", "controlnet_cond_embedding.conv_out")):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net.eval()


def with_controlnet(pipe, family):
    return remade(pipe, "ControlNetPipeline", controlnet=copy.deepcopy(controlnet(family)))


def with_t2i_adapter(pipe, family):
    xl = family == "sdxl"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        adapter = diffusers.T2IAdapter(
            in_channels=3,
            channels=[16, 32, 32, 32] if xl else [16, 32, 32],
            num_res_blocks=1,
            downscale_factor=4 if xl else 2,
            adapter_type="full_adapter_xl" if xl else "full_adapter",
        )
    return remade(pipe, "AdapterPipeline", adapter=adapter)


def remade(pipe, ending, **components):
    """The pipeline of another task from the same components, by the ending of its class's name in diffusers."""
    xl = hasattr(pipe, "text_encoder_2")
    cls = getattr(diffusers, f"StableDiffusion{'XL' if xl else ''}{ending}")
    options = {"add_watermarker": False, "requires_safety_checker": False}
    accepted = inspect.signature(cls).parameters
    given = {**pipe.components, **options, **components}
    return cls(**{key: value for key, value in given.items() if key in accepted})


def without(pipe):
    return remade(pipe, "Pipeline")


def as_image_to_image(pipe, _):
    return remade(pipe, "Img2ImgPipeline")


def as_inpainting(pipe, _):
    return remade(pipe, "InpaintPipeline")


MASK = (picture(1) > 0.5).float()


def load_textual_inversion(pipe, family):
    embedding = torch.randn(1, TEXT_DIM, generator=seeded(6))
    encoders = [(pipe.text_encoder, pipe.tokenizer)]
    if family == "sdxl":
        encoders.append((pipe.text_encoder_2, pipe.tokenizer_2))
    for encoder, tokenizer in encoders:
        pipe.load_textual_inversion({"<thing>": embedding}, text_encoder=encoder, tokenizer=tokenizer)
    return pipe


def unload_textual_inversion(pipe):
    pipe.unload_textual_inversion(text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
    if hasattr(pipe, "text_encoder_2"):
        pipe.unload_textual_inversion(text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2)
    return pipe


def does(*calls):
    """A step that calls methods by name, with arguments, and goes on with the same pipeline."""

    def step(pipe, *_):
        for path, *arguments in calls:
            owner, _, method = path.rpartition(".")
            options = arguments.pop() if arguments and isinstance(arguments[-1], dict) else {}
            getattr(getattr(pipe, owner) if owner else pipe, method)(*arguments, **options)
        return pipe

    return step


def load_lora(pipe, family):
    pipe.load_lora_weights(str(lora_file(family)), adapter_name="a")
    return pipe


def load_two_loras(pipe, family):
    pipe.load_lora_weights(str(lora_file(family)), adapter_name="a")
    pipe.load_lora_weights(str(lora_file(family, seed=60)), adapter_name="b")
    pipe.set_adapters(["a", "b"], adapter_weights=[0.7, -0.4])
    return pipe


def load_fused_lora(pipe, family):
    load_lora(pipe, family)
    pipe.fuse_lora(components=["unet"], lora_scale=0.7)
    return pipe


def unload_fused_lora(pipe):
    pipe.unfuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    return pipe


def load_kohya(pipe, family):
    pipe.load_lora_weights(str(kohya_file(family)), adapter_name="kohya")
    return pipe


def load_everything(pipe, family):
    load_ip_adapter(pipe, family)
    load_lora(pipe, family)
    return with_controlnet(pipe, family)


def unload_everything(pipe):
    pipe.unload_lora_weights()
    return without(unload_ip_adapter(pipe))


# The CPU stands in for the accelerator: the hooks are the same ones, and do all their work.
CPU = torch.device("cpu")


def offload_models(pipe, _):
    for model in (pipe.text_encoder, pipe.unet, pipe.vae):
        accelerate.cpu_offload_with_hook(model, CPU)
    return pipe


def offload_layers(pipe, _):
    accelerate.cpu_offload(pipe.unet, CPU)
    return pipe


def remove_hooks(pipe):
    for model in (pipe.text_encoder, pipe.unet, pipe.vae):
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
    return pipe


def load_lora_and_offload(pipe, family):
    return offload_layers(load_lora(pipe, family), family)


def unload_lora_and_hooks(pipe):
    pipe = remove_hooks(pipe)
    pipe.unload_lora_weights()
    return pipe


def compile_unet(pipe, _):
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    return pipe


def without_compiled_unet(pipe):
    pipe.unet = pipe.unet._orig_mod
    return pipe


def compile_blocks(pipe, _):
    pipe.unet.compile_repeated_blocks(backend="eager", fullgraph=True)
    return pipe


def without_compiled_blocks(pipe):
    for module in pipe.unet.modules():
        module._compiled_call_impl = None
    return pipe


def restore_processors(pipe):
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    return pipe


def set_backend(pipe, _):
    pipe.unet.set_attention_backend("_native_math")
    return pipe


def reset_backend(pipe):
    pipe.unet.reset_attention_backend()
    return pipe


CHANGES, KEEPS = "changes", "unchanged"
EQUAL, ROUNDED = "equal", "equal but for rounding"


@dataclass(frozen=True)
class Plugin:
    """How a plugin is put on a pipeline and taken off again, and how exactly each property of the matrix holds.

    base makes the pipeline without it, which draws with base_call. gone=None: it cannot be taken off.
    """

    load: Callable
    unload: Callable | None
    call: dict = field(default_factory=dict)
    effect: str = CHANGES
    order: str = EQUAL
    stays: str = EQUAL
    gone: str | None = EQUAL
    families: tuple[str, ...] = FAMILIES
    base: Callable = tiny_pipeline
    base_call: dict = field(default_factory=dict)


unload_lora = does(("unload_lora_weights",))

PLUGINS = {
    "LoRA": Plugin(load_lora, unload_lora),
    "LoRA, its scale given in the call": Plugin(
        load_lora, unload_lora, call={"cross_attention_kwargs": {"scale": 0.4}}
    ),
    "two LoRAs, weighted by `set_adapters`": Plugin(load_two_loras, unload_lora),
    # Fusing adds to the weights and unfusing subtracts: each rounds them once, in diffusers as here.
    "LoRA, fused with a scale": Plugin(load_fused_lora, unload_fused_lora, gone=ROUNDED),
    "LoRA, a file of kohya's trainer": Plugin(load_kohya, unload_lora),
    "IP-Adapter": Plugin(load_ip_adapter, unload_ip_adapter, call={"ip_adapter_image": picture()}),
    "IP-Adapter, with a mask": Plugin(
        load_ip_adapter,
        unload_ip_adapter,
        call={"ip_adapter_image": picture(), "cross_attention_kwargs": {"ip_adapter_masks": [MASK]}},
    ),
    "ControlNet": Plugin(with_controlnet, without, call={"image": picture()}),
    "T2I-Adapter": Plugin(with_t2i_adapter, without, call={"image": picture()}),
    "LoRA, IP-Adapter and ControlNet together": Plugin(
        load_everything, unload_everything, call={"image": picture(), "ip_adapter_image": picture()}
    ),
    "image to image": Plugin(as_image_to_image, without, call={"image": picture(), "strength": 0.7}),
    "inpainting": Plugin(as_inpainting, without, call={"image": picture(), "mask_image": MASK}),
    "inpainting by a UNet of 9 channels, LoRA": Plugin(
        load_lora,
        unload_lora,
        call={"image": picture(), "mask_image": MASK},
        base=lambda family: as_inpainting(tiny_pipeline(family, in_channels=9), family),
        base_call={"image": picture(), "mask_image": MASK},
    ),
    "textual inversion": Plugin(load_textual_inversion, unload_textual_inversion),
    "FreeU": Plugin(does(("enable_freeu", 0.9, 0.2, 1.5, 1.6)), does(("disable_freeu",))),
    # Cross-attention is sliced, which orders its sums differently.
    "`enable_attention_slicing`": Plugin(
        does(("enable_attention_slicing", 1)),
        restore_processors,
        effect=KEEPS,
        stays=ROUNDED,
        gone=ROUNDED,
    ),
    "`fuse_qkv_projections`": Plugin(
        does(("unet.fuse_qkv_projections",)),
        does(("unet.unfuse_qkv_projections",)),
        effect=KEEPS,
        stays=ROUNDED,
        gone=ROUNDED,
    ),
    "`set_attention_backend`": Plugin(set_backend, reset_backend, effect=KEEPS),
    "`torch.compile`": Plugin(
        compile_unet, without_compiled_unet, effect=KEEPS, families=("sd15",), base=one_level_pipeline
    ),
    "`compile_repeated_blocks`": Plugin(
        compile_blocks, without_compiled_blocks, effect=KEEPS, families=("sd15",), base=one_level_pipeline
    ),
    "`enable_model_cpu_offload`": Plugin(offload_models, remove_hooks, effect=KEEPS),
    "`enable_sequential_cpu_offload`": Plugin(offload_layers, remove_hooks, effect=KEEPS),
    "LoRA and `enable_sequential_cpu_offload` together": Plugin(load_lora_and_offload, unload_lora_and_hooks),
    "group offloading, of blocks": Plugin(
        does(("unet.enable_group_offload", CPU, CPU, "block_level", 1)), None, effect=KEEPS, gone=None
    ),
    "group offloading, of layers": Plugin(
        does(("unet.enable_group_offload", CPU, CPU, "leaf_level")), None, effect=KEEPS, gone=None
    ),
    "`enable_layerwise_casting`": Plugin(
        does(("unet.enable_layerwise_casting", {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32})),
        None,
        gone=None,
    ),
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
        linfusion = mount(pipe, family)
        drawn["mounted"] = draw(pipe, **plugin.base_call)
        pipe = plugin.load(pipe, family)
        drawn["mounted, then loaded"] = draw(pipe, **plugin.call)
        linfusion.unmount()
        drawn["mounted, loaded, unmounted"] = draw(pipe, **plugin.call)
        if plugin.unload:
            drawn["mounted, loaded, unmounted, unloaded"] = draw(plugin.unload(pipe), **plugin.base_call)

        pipe = plugin.load(plugin.base(family), family)
        drawn["loaded"] = draw(pipe, **plugin.call)
        linfusion = mount(pipe, family)
        drawn["loaded, then mounted"] = draw(pipe, **plugin.call)
        if plugin.unload:
            pipe = plugin.unload(pipe)
            drawn["loaded, mounted, unloaded"] = draw(pipe, **plugin.base_call)
            linfusion.unmount()
            drawn["loaded, mounted, unloaded, unmounted"] = draw(pipe, **plugin.base_call)
    return drawn


@contextlib.contextmanager
def quiet():
    """Without the warnings that the tests below ask for one by one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_same(drawn, first, second, how):
    if how == EQUAL:
        assert torch.equal(drawn[first], drawn[second]), f"{first} | {second}"
    else:
        assert relative_error(drawn[first], drawn[second]) < ROUNDING, f"{first} | {second}"


# By class: the four tests of a case follow each other, so that its story is drawn once.
@pytest.mark.parametrize("case", CASES, ids="-".join, scope="class")
class TestMatrix:
    def test_effect_on_the_mounted_pipeline_is_the_plugins(self, case, request):
        plugin, drawn = PLUGINS[case[0]], story(*case)
        plugin_matrix.note(request, *case, "effect", plugin.effect)
        assert relative_error(drawn["mounted"], drawn["stock"]) > EFFECT
        assert relative_error(drawn["mounted, then loaded"], drawn["loaded"]) > EFFECT, "the plugin undid the mounting"
        assert torch.isfinite(drawn["mounted, then loaded"]).all()
        change = relative_error(drawn["mounted, then loaded"], drawn["mounted"])
        assert change > EFFECT if plugin.effect == CHANGES else change < ROUNDING

    def test_order_of_mounting_and_loading_does_not_matter(self, case, request):
        plugin = PLUGINS[case[0]]
        plugin_matrix.note(request, *case, "order", plugin.order)
        check_same(story(*case), "mounted, then loaded", "loaded, then mounted", plugin.order)

    def test_plugin_stays_with_the_unmounted_pipeline(self, case, request):
        plugin = PLUGINS[case[0]]
        plugin_matrix.note(request, *case, "stays", stays(plugin))
        check_same(story(*case), "mounted, loaded, unmounted", "loaded", plugin.stays)

    def test_nothing_is_left_of_either_after_unmounting_and_unloading(self, case, request):
        plugin, drawn = PLUGINS[case[0]], story(*case)
        plugin_matrix.note(request, *case, "gone", gone(plugin))
        if plugin.gone is None:
            assert plugin.unload is None
            return
        check_same(drawn, "mounted, loaded, unmounted, unloaded", "stock", plugin.gone)
        check_same(drawn, "loaded, mounted, unloaded", "mounted", plugin.gone)
        check_same(drawn, "loaded, mounted, unloaded, unmounted", "stock", plugin.gone)


def stays(plugin):
    return f"stays, {plugin.stays}"


def gone(plugin):
    return "cannot be undone" if plugin.gone is None else f"stock, {plugin.gone}"


def test_table_in_the_document_is_that_of_these_tests():
    cells = []
    for name, family in CASES:
        plugin = PLUGINS[name]
        words = {"effect": plugin.effect, "order": plugin.order, "stays": stays(plugin), "gone": gone(plugin)}
        cells += [(name, family, column, word) for column, word in words.items()]
    assert plugin_matrix.committed() == plugin_matrix.render(cells), "run python -m tests.helpers.plugin_matrix"


def test_table_says_where_families_differ_and_what_failed():
    reports = [
        SimpleNamespace(when="call", outcome=outcome, user_properties=[("linfusion plugin", [*cell, "equal"])])
        for outcome, cell in (
            ("passed", ("LoRA", "sd15", "order")),
            ("failed", ("LoRA", "sdxl", "order")),
            ("skipped", ("FreeU", "sd21", "gone")),
        )
    ]
    results = plugin_matrix._Results()
    for report in reports:
        results.pytest_runtest_logreport(report)
    rows = plugin_matrix.render(results.cells).splitlines()
    assert rows[2] == "| LoRA |  | SD 1.5: equal; SDXL: FAILS |  |  | SD 1.5, SDXL |"
    assert rows[3] == "| FreeU |  |  |  | not run | SD 2.1 |"


# --------------------------------------------------------------------------------- that the plugins were really at work


def unet_and_linfusion(enable, family="sd15", first="mount"):
    """A UNet with something enabled before or after mounting."""
    pipe = tiny_pipeline(family)
    linfusion = mount(pipe, family) if first == "mount" else None
    with quiet():
        enable(pipe, family)
    return pipe.unet, linfusion or mount(pipe, family)


ORDERS = pytest.mark.parametrize("first", ["mount", "enable"])


@ORDERS
def test_weights_that_accelerate_offloads_are_away_between_calls_and_home_after_unmounting(first, tmp_path):
    unet, linfusion = unet_and_linfusion(offload_layers, first=first)
    assert all(parameter.is_meta for parameter in linfusion.parameters())
    with pytest.raises(ValueError, match=r"offloaded by accelerate .* unmount\(\) first"):
        linfusion.save_pretrained(tmp_path)
    linfusion.unmount()
    assert all(parameter.is_meta for parameter in unet.parameters()), "the originals are offloaded like the rest"
    written = LinFusion.from_pretrained(weights("sd15", 3)).state_dict()
    assert all(torch.equal(value, written[key]) for key, value in linfusion.state_dict().items())
    assert not any(hasattr(module, "_hf_hook") for module in linfusion.modules())


def test_projections_are_copied_from_weights_that_are_offloaded():
    plain, offloaded = tiny_pipeline("sd15"), offload_layers(tiny_pipeline("sd15"), "sd15")
    for pipe in (plain, offloaded):
        LinFusion.construct_for(pipe, load_pretrained=False)
    assert torch.equal(draw(plain), draw(offloaded))


def test_lora_fused_into_weights_that_are_offloaded_is_refused():
    pipe = offload_layers(load_fused_lora(tiny_pipeline("sd15"), "sd15"), "sd15")
    before = [(name, id(module)) for name, module in pipe.unet.named_modules()]
    with pytest.raises(ValueError, match=f"fused into {FIRST['sd15']}.to_q: its weights are offloaded"):
        mount(pipe, "sd15")
    assert [(name, id(module)) for name, module in pipe.unet.named_modules()] == before


@ORDERS
def test_group_offloading_reaches_the_layers_that_are_mounted_and_leaves_those_that_are_not(first):
    def enable(pipe, _):
        pipe.unet.enable_group_offload(CPU, CPU, "leaf_level")

    def grouped(module):
        registries = [getattr(layer, "_diffusers_hook", None) for layer in module.modules()]
        return sum(bool(registry and registry.get_hook("group_offloading")) for registry in registries)

    unet, linfusion = unet_and_linfusion(enable, first=first)
    linear = sum(isinstance(layer, torch.nn.Linear) for layer in linfusion.modules())
    assert grouped(linfusion) >= linear
    linfusion.unmount()
    assert grouped(linfusion) == 0
    assert grouped(unet.get_submodule(FIRST["sd15"])) >= 4


@ORDERS
def test_layerwise_casting_reaches_the_layers_that_are_mounted(first):
    def enable(pipe, _):
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)

    unet, linfusion = unet_and_linfusion(enable, first=first)
    layers = [layer for layer in linfusion.modules() if isinstance(layer, torch.nn.Linear)]
    assert {layer.weight.dtype for layer in layers} == {torch.float8_e4m3fn}
    # What is not cast for storage (the layer norms) must be in the dtype that is computed in, which is the UNet's.
    norms = [layer for layer in linfusion.modules() if isinstance(layer, torch.nn.LayerNorm)]
    assert {norm.weight.dtype for norm in norms} == {unet.conv_norm_out.weight.dtype}


@ORDERS
def test_compiled_unet_is_one_graph_with_linear_attention_in_it(first):
    """fullgraph=True raises at a graph break; that the op is in the graph shows that it was traced, not skipped."""
    seen = []

    def backend(graph, _):
        seen.append(sum("linear_attention" in str(node.target) for node in graph.graph.nodes))
        return graph

    def enable(pipe, _):
        pipe.unet = torch.compile(pipe.unet, backend=backend, fullgraph=True)

    pipe = one_level_pipeline("sd15")
    steps = [lambda: mount(pipe, "sd15"), lambda: enable(pipe, "sd15")]
    for step in steps if first == "mount" else reversed(steps):
        step()
    draw(pipe, num_inference_steps=1)
    assert seen and set(seen) == {4}, "one call for each of the four self-attentions"


def test_mounted_unet_is_exported_with_the_op_in_the_graph():
    pipe = one_level_pipeline("sd15")
    mount(pipe, "sd15")
    inputs = torch.randn(2, 4, 16, 16), torch.tensor(500), torch.randn(2, 7, TEXT_DIM)
    with torch.no_grad():
        exported = torch.export.export(pipe.unet, inputs)
        assert torch.equal(exported.module()(*inputs).sample, pipe.unet(*inputs).sample)
    assert sum("linattn" in str(node.target) for node in exported.graph.nodes) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_to_a_gpu_gives_the_same_picture_in_either_order(method):
    first, second, resident = (tiny_pipeline("sd15") for _ in range(3))
    linfusion = mount(first, "sd15")
    getattr(first, method)()
    getattr(second, method)()
    mount(second, "sd15")
    mount(resident.to("cuda"), "sd15")
    expected = draw(resident)
    assert torch.equal(draw(first), expected) and torch.equal(draw(second), expected)
    linfusion.unmount()
    assert relative_error(draw(first), draw(tiny_pipeline("sd15").to("cuda"))) < ROUNDING


@pytest.mark.gpu
@pytest.mark.parametrize("use_stream", [False, True])
def test_group_offloading_to_a_gpu_gives_the_same_picture_in_either_order(use_stream):
    drawn = []
    for first in ("mount", "enable"):
        pipe = tiny_pipeline("sd15").to("cuda")
        linfusion = mount(pipe, "sd15") if first == "mount" else None
        pipe.unet.enable_group_offload(torch.device("cuda"), CPU, "leaf_level", use_stream=use_stream)
        linfusion = linfusion or mount(pipe, "sd15")
        drawn.append(draw(pipe))
        linfusion.unmount()
        drawn.append(draw(pipe))
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[3])


# ---------------------------------------------------------------------------- copies and files of a mounted pipeline


def test_copy_of_a_mounted_pipeline_stays_mounted_when_the_pipeline_is_not():
    pipe = tiny_pipeline("sd15")
    linfusion = mount(pipe, "sd15")
    clone, mounted = copy.deepcopy(pipe), draw(pipe)
    linfusion.unmount()
    assert torch.equal(draw(clone), mounted)


def test_pipeline_saved_while_mounted_draws_the_same_when_it_is_mounted_again(tmp_path):
    pipe = tiny_pipeline("sd15")
    linfusion = mount(pipe, "sd15")
    mounted = draw(pipe)
    pipe.save_pretrained(tmp_path / "pipeline")
    linfusion.save_pretrained(tmp_path / "linfusion")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    LinFusion.construct_for(loaded, pretrained_model_name_or_path=tmp_path / "linfusion")
    assert torch.equal(draw(loaded), mounted)


def test_pipeline_saved_after_unmounting_is_the_stock_one(tmp_path):
    pipe = tiny_pipeline("sd15")
    stock = draw(pipe)
    mount(pipe, "sd15").unmount()
    pipe.save_pretrained(tmp_path)
    assert torch.equal(draw(diffusers.DiffusionPipeline.from_pretrained(tmp_path)), stock)


# ------------------------------------------------------------------------------------------- refused, and reported


def test_controlnet_keeps_its_own_attention():
    pipe = with_controlnet(tiny_pipeline("sd15"), "sd15")
    before = [(name, id(module)) for name, module in pipe.controlnet.named_modules()]
    mount(pipe, "sd15")
    assert [(name, id(module)) for name, module in pipe.controlnet.named_modules()] == before
    assert any(isinstance(module, LinearAttention) for module in pipe.unet.modules())


def test_controlnet_is_not_made_from_a_mounted_unet_in_silence():
    pipe = tiny_pipeline("sd15")
    mount(pipe, "sd15")
    with pytest.raises(RuntimeError, match="to_q_"):
        diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 16))


def test_perturbed_attention_guidance_is_reported_to_have_no_effect():
    """It assigns processors that are softmax or nothing; on linear weights the one would be noise."""
    pipe = tiny_pipeline("sd15")
    mount(pipe, "sd15")
    plain = draw(pipe)
    guided = diffusers.StableDiffusionPAGPipeline(
        **pipe.components, requires_safety_checker=False, pag_applied_layers=["mid"]
    )
    with pytest.warns(UserWarning, match="PAGCFGIdentitySelfAttnProcessor2_0 refused"):
        drawn = draw(guided, pag_scale=3.0)
    assert relative_error(drawn, plain) < ROUNDING


class Louder(AttnProcessor2_0):
    """A processor of somebody's own, with an effect of its own."""

    def __call__(self, *args, **kwargs):
        return 3 * super().__call__(*args, **kwargs)


def test_processor_that_mounting_sets_aside_is_reported_and_comes_back():
    pipe = tiny_pipeline("sd15")
    pipe.unet.get_submodule(FIRST["sd15"]).set_processor(Louder())
    loud = draw(pipe)
    with pytest.warns(UserWarning, match=f"sets aside the attention processors Louder of {FIRST['sd15']}"):
        linfusion = mount(pipe, "sd15")
    linfusion.unmount()
    assert torch.equal(draw(pipe), loud)


def test_mounting_over_stock_processors_says_nothing():
    for enable in (lambda unet: None, lambda unet: unet.set_attention_slice(1), lambda u: u.fuse_qkv_projections()):
        pipe = tiny_pipeline("sd15")
        enable(pipe.unet)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mount(pipe, "sd15")


def test_qkv_fused_while_mounted_and_unfused_after_leaves_no_linear_processor_behind():
    pipe = tiny_pipeline("sd15")
    linfusion = mount(pipe, "sd15")
    with pytest.warns(UserWarning, match="fuse_qkv_projections has no effect"):
        pipe.unet.fuse_qkv_projections()
    linfusion.unmount()
    pipe.unet.unfuse_qkv_projections()
    assert not any(isinstance(processor, LinearAttnProcessor) for processor in pipe.unet.attn_processors.values())


def test_xformers_is_refused_on_mounted_modules():
    pipe = tiny_pipeline("sd15")
    mount(pipe, "sd15")
    mounted = draw(pipe)
    if not diffusers.utils.is_xformers_available():
        with pytest.raises(ModuleNotFoundError, match="xformers"):
            pipe.enable_xformers_memory_efficient_attention()
    with pytest.warns(UserWarning, match="refused"):
        pipe.disable_xformers_memory_efficient_attention()
    with pytest.warns(UserWarning, match="XFormersAttnProcessor refused"):
        pipe.unet.get_submodule(FIRST["sd15"]).set_processor(
            diffusers.models.attention_processor.XFormersAttnProcessor()
        )
    assert torch.equal(draw(pipe), mounted)


def test_mask_of_the_prompt_reaches_cross_attention():
    pipe = tiny_pipeline("sd15")
    mount(pipe, "sd15")
    latents, text = torch.randn(2, 4, 16, 16), torch.randn(2, 7, TEXT_DIM)
    mask = torch.ones(2, 7)
    mask[:, 4:] = 0
    with torch.no_grad():
        masked = pipe.unet(latents, 500, text, encoder_attention_mask=mask).sample
        short = pipe.unet(latents, 500, text[:, :4]).sample
    assert relative_error(masked, short) < ROUNDING


def test_attention_backend_context_leaves_linear_attention_alone():
    pipe = tiny_pipeline("sd15")
    mount(pipe, "sd15")
    mounted = draw(pipe)
    with attention_dispatch.attention_backend("_native_math"):
        assert torch.equal(draw(pipe), mounted)


# ------------------------------------------------------------------------------------------------- half precision


def plain_linear_attention(q, k, v, *, feature_map, eps):
    """The formula in the dtype of its inputs, kv as a mean: what a kernel's error is measured by."""
    q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    root = k.shape[2] ** -0.5
    return q @ ((k * root).mT @ (v * root)) / (q @ k.mean(2).unsqueeze(-1) + eps)


@pytest.fixture
def plain_formula():
    @contextlib.contextmanager
    def inside():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(linattn, "linear_attention", plain_linear_attention)
            yield

    return inside


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_large_activations_of_many_tokens_stay_finite_and_exact(dtype, plain_formula):
    """The first level of SD 2.1 at 512 x 512: 4096 tokens. Their sum of k v overflows float16, their mean does not."""
    module = LinearAttention(320, heads=5).requires_grad_(False).to(dtype)
    x = (12 * torch.randn(1, 4096, 320) + 2).to(dtype)
    k = module.to_k(x + module.to_k_(x)).unflatten(-1, (5, 64)).transpose(1, 2)
    v = module.to_v(x).unflatten(-1, (5, 64)).transpose(1, 2)
    k = torch.nn.functional.elu(k) + 1
    assert k.isfinite().all() and v.isfinite().all()
    largest = (k.double().mT @ v.double()).abs().max()
    assert largest > torch.finfo(torch.float16).max, f"the sum must overflow, or this shows nothing: {largest}"

    out = module(x)
    with plain_formula():
        plain = module(x)
    exact = module.double()(x.double())
    assert out.isfinite().all()
    assert relative_error(out, exact) < 2 * relative_error(plain, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_mounted_pipeline_in_half_precision_is_as_exact_as_the_plain_formula(family, dtype, plain_formula):
    """upcast_attention (SD 2.1) is a flag of the modules that are replaced: the op needs none."""
    pipe = tiny_pipeline(family)
    mount(pipe, family)
    exact = draw(pipe)
    pipe.to(dtype=dtype)
    drawn = draw(pipe)
    with plain_formula():
        plain = draw(pipe)
    assert drawn.dtype == dtype and drawn.isfinite().all()
    assert relative_error(drawn, exact) < 2 * relative_error(plain, exact)


# ------------------------------------------------------------------------------------------------- the examples


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run_example(name, *options):
    command = [sys.executable, EXAMPLES / name, *options]
    # One thread as here: with another number torch's own layers round differently.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)


def pixels(file):
    return numpy.asarray(pytest.importorskip("PIL.Image").open(file), dtype="float32")


def bundled_pipeline():
    return diffusers.StableDiffusionPipeline.from_pretrained(linattn.bundled.path("tiny_sd"))


def mount_bundled_student(pipe):
    LinFusion.construct_for(pipe, pretrained_model_name_or_path=linattn.bundled.path("tiny_sd_linfusion"))


def test_img2img_example_draws_what_the_mounted_pipelines_draw(tmp_path):
    result = run_example("linfusion_img2img.py", "--steps", 3, "--scale", 1.5, "--out", tmp_path / "a.png")
    assert result.returncode == 0, result.stderr
    pipe = bundled_pipeline()
    mount_bundled_student(pipe)
    generator, common = seeded(0), {"num_inference_steps": 3, "guidance_scale": 2.5}
    first = pipe("a one and a seven", generator=generator, **common).images[0]
    side = round(first.width * 1.5 / 8) * 8
    first = first.resize((side, side))
    second = as_image_to_image(pipe, None)
    expected = second("a two and a three", image=first, strength=0.7, generator=generator, **common).images[0]
    drawn = pixels(tmp_path / "a.png")
    assert drawn.shape == (side, side, 3)
    assert abs(drawn - numpy.asarray(expected, dtype="float32")).max() <= 1


def test_lora_example_draws_what_the_mounted_pipeline_draws(tmp_path):
    pipe = bundled_pipeline()
    common = {"num_inference_steps": 3, "guidance_scale": 2.5}
    mount_bundled_student(pipe)
    without_lora = numpy.asarray(
        pipe("a seven, a two and a four", generator=seeded(0), **common).images[0], dtype="float32"
    )
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=SELF_ATTENTION), adapter_name="made")
    layers = {
        key: 0.3 * torch.randn(value.shape, generator=seeded(i))
        for i, (key, value) in enumerate(peft.get_peft_model_state_dict(pipe.unet, adapter_name="made").items())
    }
    pipe.unload_lora_weights()
    type(pipe).save_lora_weights(tmp_path, unet_lora_layers=layers)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    result = run_example(
        "linfusion_lora.py", "--lora", file, "--lora-scale", 0.5, "--steps", 3, "--out", tmp_path / "a.png"
    )
    assert result.returncode == 0, result.stderr
    pipe.load_lora_weights(str(file), adapter_name="lora")
    pipe.set_adapters("lora", 0.5)
    expected = numpy.asarray(
        pipe("a seven, a two and a four", generator=seeded(0), **common).images[0], dtype="float32"
    )
    assert abs(expected - without_lora).max() > 10
    assert abs(pixels(tmp_path / "a.png") - expected).max() <= 1


def test_lora_example_says_what_to_pass(capsys):
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / "linfusion_lora.py"))["main"]([])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "--lora with a file" in said and "None comes with this package" in said
