"""linattn.report: what it says of a model's attention layers is what they are."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import linattn
from linattn import backend as backends

pytest.importorskip("diffusers", reason='the models are diffusers\': pip install "linattn[diffusers]"')

from diffusers import FluxTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

import linattn.bundled
from linattn.adapters import CLEAR, LinearAttnProcessor, LinFusion

FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"

pytestmark = pytest.mark.usefixtures("diffusers_attention_backend")


def small_unet():
    """Four transformer blocks, 2 heads of 8 channels in three of them and of 16 in the last."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=2,
    )


def small_flux():
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )


def mounted_unet():
    unet = small_unet()
    LinFusion.construct_for(unet, load_pretrained=False)
    return unet


def layer(model, name=FIRST):
    (found,) = [layer for layer in linattn.report(model).layers if layer.name == name]
    return found


# ---- what runs --------------------------------------------------------------------------------------------------


def test_a_stock_unet_is_softmax_everywhere():
    unet = small_unet()
    layers = linattn.report(unet).layers
    assert [x.name for x in layers] == [name.removesuffix(".processor") for name in unet.attn_processors]
    assert {(x.runs, x.by, x.backend, x.dtype, x.device) for x in layers} == {
        ("softmax", "AttnProcessor2_0", None, "float32", "cpu")
    }
    assert [x.kind for x in layers] == ["self", "cross"] * 4
    assert [x.shape for x in layers if x.kind == "self"] == ["2x8", "2x8", "2x8", "2x16"]
    assert not any(x.warnings or x.plugins or x.why_not for x in layers)


def test_mounting_changes_the_self_attentions_and_nothing_else():
    unet = small_unet()
    before = linattn.report(unet)
    linfusion = LinFusion.construct_for(unet, load_pretrained=False)
    mounted = linattn.report(unet)
    assert [x.name for x in mounted.layers] == [x.name for x in before.layers]
    for old, new in zip(before.layers, mounted.layers, strict=True):
        if new.kind == "cross":
            assert new == old
            continue
        assert (new.runs, new.by, new.processor) == ("linear_attention", "LinFusion", "LinearAttnProcessor")
        assert (new.shape, new.dtype, new.device) == (old.shape, old.dtype, old.device)
        assert new.options == {"feature_map": "elu1", "eps": 1e-4}
        assert new.attention_backend == "no effect"
        assert new.warnings == ("no attention mask: a call with one raises",)
    linfusion.unmount()
    assert linattn.report(unet) == before


def test_a_foreign_processor_on_a_mounted_layer_is_reported_as_what_it_runs():
    unet = mounted_unet()
    attention = unet.get_submodule(FIRST)
    object.__setattr__(attention, "processor", AttnProcessor2_0())  # past what the module refuses
    found = layer(unet)
    assert (found.runs, found.by, found.backend) == ("softmax", "AttnProcessor2_0", None)
    assert "LinFusion mounted it for linear_attention, but its processor is AttnProcessor2_0" in found.warnings[0]
    attention.set_processor(LinearAttnProcessor())
    assert layer(unet).runs == "linear_attention"


def test_a_processor_from_elsewhere_is_not_guessed_at():
    class TheirProcessor(AttnProcessor2_0):
        pass

    unet = small_unet()
    unet.get_submodule(FIRST).set_processor(TheirProcessor())
    found = layer(unet)
    assert (found.runs, found.by) == ("unknown", "TheirProcessor")


def test_a_processor_can_speak_for_its_module():
    class Windowed:
        _attention_backend = None

        def __call__(self, attn):
            raise AssertionError("report runs nothing")

        def attention_spec(self, attn):
            return {"op": "linear_attention", "adapter": "Theirs", "options": {"radius": (4, 4)}, "heads": attn.heads}

    flux = small_flux()
    name = "transformer_blocks.0.attn"
    flux.get_submodule(name).processor = Windowed()
    found = layer(flux, name)
    assert (found.runs, found.by, found.shape) == ("linear_attention", "Theirs", "2x8")
    assert found.options == {"radius": (4, 4)} and found.warnings == ()
    assert found.attention_backend == "no effect", "the op does not go through diffusers' dispatcher"


def test_an_incomplete_specification_is_refused():
    class Bad(nn.Module):
        def attention_spec(self):
            return {"op": "linear_attention"}

    with pytest.raises(ValueError, match=r"Bad.attention_spec\(\) lacks \['adapter'\]"):
        linattn.report(Bad())


# ---- on which backend -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_backend_is_the_one_that_runs(dtype):
    """Compared with the kernel op that a call of the layer really reaches."""
    unet = mounted_unet()
    nn.Module.to(unet, dtype)
    with torch.no_grad(), torch.profiler.profile() as profile:
        unet.get_submodule(FIRST)(torch.zeros(1, 6, 16, dtype=dtype))
    ran = {event.name for event in profile.events() if event.name.startswith("linattn::_linear_attention_")}
    found = layer(unet)
    assert ran == {f"linattn::_linear_attention_{found.backend}"}
    assert found.dtype == str(dtype).removeprefix("torch.")
    for name in backends.BACKENDS[: backends.BACKENDS.index(found.backend)]:
        reason = backends.why_not("linear_attention", name, torch.device("cpu"), dtype)
        assert found.why_not[name] == (reason or "Triton's interpreter has to be asked for")
    assert any("no kernel runs here" in text for text in found.warnings) == (found.backend == "reference")


def test_a_forced_backend_is_the_reason():
    unet = mounted_unet()
    with linattn.use_backend("reference"):
        found = layer(unet)
    assert found.backend == "reference"
    if backends.why_not("linear_attention", "cpu", torch.device("cpu"), torch.float32) is None:
        assert found.why_not["cpu"] == "reference is forced"


def test_a_forced_backend_that_cannot_run_is_a_warning():
    with linattn.use_backend("cuda"):
        found = layer(mounted_unet())
    assert found.backend is None
    assert found.why_not == {"cuda": "it runs on cuda tensors, not on cpu"}
    assert any("cannot run: linear_attention: backend 'cuda' was asked for" in text for text in found.warnings)


# ---- diffusers' own setting -------------------------------------------------------------------------------------


def test_where_set_attention_backend_is_honoured_and_where_it_is_not():
    flux, unet = small_flux(), mounted_unet()
    assert {x.attention_backend for x in linattn.report(flux).layers} == {"honoured: native"}
    flux.set_attention_backend("flex")
    assert {x.attention_backend for x in linattn.report(flux).layers} == {"honoured: flex"}
    assert not any(x.warnings for x in linattn.report(flux).layers)
    for found in linattn.report(unet).layers:
        assert found.attention_backend == "no effect"
        assert "diffusers' attention backend is set to flex, which has no effect here" in found.warnings


# ---- what sits on a layer ---------------------------------------------------------------------------------------


def test_lora_is_seen_with_its_name_places_and_state():
    peft = pytest.importorskip("peft")
    unet = mounted_unet()
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"]), "style")
    assert layer(unet).plugins == ("LoRA (style) x2",)
    unet.get_submodule(FIRST).to_q.merge()
    assert set(layer(unet).plugins) == {"LoRA (style, fused)", "LoRA (style)"}
    unet.delete_adapters("style")
    assert "style" not in str(linattn.report(unet))


class Int8Linear(nn.Module):
    """The outside of a quantised layer."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)


def test_quantised_layers_hooks_and_parametrizations_are_seen():
    unet = mounted_unet()
    attention = unet.get_submodule(FIRST)
    attention.to_q = Int8Linear(attention.to_q)
    attention.to_k.register_forward_hook(lambda *_: None)
    attention.register_forward_pre_hook(lambda *_: None)
    nn.utils.parametrizations.weight_norm(attention.to_out[0])
    assert set(layer(unet).plugins) == {"quantised: Int8Linear", "hooks x2", "parametrized weights"}
    assert layer(unet).dtype == "float32", "what it computes in, not what a weight is packed in"


def test_ip_adapter_is_seen():
    unet = small_unet()
    name = FIRST.replace("attn1", "attn2")
    unet.get_submodule(name).set_processor(IPAdapterAttnProcessor2_0(hidden_size=16, cross_attention_dim=24))
    found = layer(unet, name)
    assert (found.runs, found.by, found.plugins) == ("softmax", "IPAdapterAttnProcessor2_0", ("IP-Adapter",))


def test_layerwise_casting_is_reported_by_what_is_computed_in():
    unet = mounted_unet()
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    found = layer(unet)
    assert (found.dtype, found.storage) == ("bfloat16", "float8_e4m3fn")
    assert found.plugins == ("diffusers hook layerwise_casting",)
    assert found.backend == backends.choose("linear_attention", torch.device("cpu"), torch.bfloat16)
    assert "bfloat16, stored as float8_e4m3fn on cpu" in str(linattn.report(unet))


def test_an_offloaded_layer_is_reported_by_where_it_will_run():
    accelerate = pytest.importorskip("accelerate")
    unet = mounted_unet()
    unet.to("meta")
    assert layer(unet).device == "meta"
    hook = accelerate.hooks.AlignDevicesHook(execution_device=torch.device("cpu"))
    accelerate.hooks.add_hook_to_module(unet, hook)
    found = layer(unet)
    assert found.device == "cpu" and "accelerate hook" in found.plugins


@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
def test_a_layer_under_group_offloading_is_reported_by_where_it_will_run(level):
    unet = mounted_unet()
    blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
    unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type=level, **blocks)
    for module in unet.modules():  # a device to run on that is not where the weights wait
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
            hook.group.onload_device = torch.device("meta")
    assert layer(unet).device == "meta"


# ---- the whole --------------------------------------------------------------------------------------------------


def test_equal_layers_are_grouped():
    with torch.device("meta"):
        unet = UNet2DConditionModel(attention_head_dim=8, cross_attention_dim=768)  # the widths of SD 1.5
    lines = str(linattn.report(unet)).splitlines()
    assert lines[0] == "UNet2DConditionModel: 32 attention layers"
    self_attention, cross_attention = (line for line in lines if "heads x head dim" in line)
    assert self_attention.strip().startswith("16 self layers: 5 x 8x40, 5 x 8x80, 6 x 8x160 ")
    assert cross_attention.strip().startswith("16 cross layers: 5 x 8x40, 5 x 8x80, 6 x 8x160 ")
    assert len(lines) == 7


def test_the_text_says_what_is_mounted_and_warns_once():
    text = str(linattn.report(mounted_unet()))
    assert "linear_attention (LinFusion), float32 on cpu, backend" in text
    assert text.count("4 layers: no attention mask") == 1


def test_the_report_is_plain_data_too():
    made = linattn.report(mounted_unet())
    again = json.loads(json.dumps(made.to_dict()))
    assert again["model"] == "UNet2DConditionModel"
    assert [x["name"] for x in again["layers"]] == [x.name for x in made.layers]
    assert again["layers"][0]["options"] == {"feature_map": "elu1", "eps": 1e-4}
    assert again["layers"][0]["warnings"] == ["no attention mask: a call with one raises"]


def test_a_pipeline_is_reported_with_the_names_of_its_components():
    unet, flux = mounted_unet(), small_flux()
    components = {"unet": unet, "transformer": flux, "text_encoder": nn.Linear(2, 2), "scheduler": object()}
    made = linattn.report(SimpleNamespace(components=components))
    names = [x.name for x in made.layers]
    assert names == [f"unet.{x.name}" for x in linattn.report(unet).layers] + [
        f"transformer.{x.name}" for x in linattn.report(flux).layers
    ]


def test_the_bundled_pipeline_is_reported():
    pipe = StableDiffusionPipeline.from_pretrained(linattn.bundled.path())
    before = linattn.report(pipe)
    assert {x.runs for x in before.layers} == {"softmax"}
    LinFusion.construct_for(pipe, load_pretrained=False)
    linear = [x.name for x in linattn.report(pipe).layers if x.runs == "linear_attention"]
    assert linear == [x.name for x in before.layers if x.name.startswith("unet.") and x.kind == "self"]


def test_layers_of_clear_say_their_window_their_pooling_and_the_backend_of_their_op():
    flux = small_flux()
    names = [x.name for x in linattn.report(flux).layers]
    clear = CLEAR.construct_for(flux, 8, 4, layers=[1], load_pretrained=False)
    dense, window = linattn.report(flux).layers
    assert [dense.name, window.name] == names
    assert (dense.runs, dense.options) == ("softmax", {})
    assert (window.runs, window.by, window.shape) == ("window_attention", "CLEAR", "2x8")
    assert window.options == {"radius": 8, "text_first": True, "down_factor": 4}
    assert window.backend == backends.choose("window_attention", torch.device("cpu"), torch.float32)
    assert "window_attention (CLEAR), radius 8, down_factor 4, float32 on cpu" in str(linattn.report(flux))
    clear.unmount()
    CLEAR.construct_for(flux, 2, load_pretrained=False)
    assert "window_attention (CLEAR), radius 2, float32 on cpu" in str(linattn.report(flux))
    with linattn.use_backend("reference"):
        assert {x.backend for x in linattn.report(flux).layers} == {"reference"}


def test_an_ip_adapter_beside_a_window_is_seen():
    flux = small_flux()
    CLEAR.construct_for(flux, 2, load_pretrained=False)
    attention = flux.transformer_blocks[0].attn
    attention.set_processor(FluxIPAdapterAttnProcessor(hidden_size=16, cross_attention_dim=16))
    double, single = linattn.report(flux).layers
    assert (double.runs, double.plugins, single.plugins) == ("window_attention", ("IP-Adapter",), ())


def test_compilation_changes_no_name():
    unet = mounted_unet()
    plain = linattn.report(unet)
    assert linattn.report(torch.compile(unet)) == plain
    block = unet.down_blocks[0].attentions[0].transformer_blocks
    block[0] = torch.compile(block[0])
    assert linattn.report(unet) == plain


def test_layers_of_linattn_nn_say_what_they_run():
    from linattn.nn import FocusedLinearAttention, MambaLikeLinearAttention

    model = nn.Sequential(
        FocusedLinearAttention(32, 4, 4, num_heads=4), MambaLikeLinearAttention(48, 4, 4, num_heads=3)
    )
    layers = linattn.report(model).layers
    assert [(x.name, x.runs, x.by, x.shape) for x in layers] == [
        ("0", "linear_attention", "linattn.nn", "4x8"),
        ("1", "linear_attention", "linattn.nn", "3x16"),
    ]
    assert {x.backend for x in layers} == {
        linattn.backend.choose("linear_attention", torch.device("cpu"), torch.float32)
    }
    assert all(x.options["feature_map"] == "identity" for x in layers)


def test_models_without_attention_and_other_things():
    assert linattn.report(nn.Linear(2, 2)).layers == []
    assert "no attention layer" in str(linattn.report(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match=r"expected a diffusers pipeline or a torch\.nn\.Module, got <class 'str'>"):
        linattn.report("runwayml/stable-diffusion-v1-5")


def test_report_loads_nothing_but_torch_and_stays_a_function():
    code = (
        "import sys, torch, linattn; linattn.report(torch.nn.Linear(2, 2)); import linattn.report; "
        "from linattn.report import AttentionLayer, Report, report; assert linattn.report is report; "
        "assert not {'diffusers', 'peft', 'accelerate', 'linattn.adapters'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
