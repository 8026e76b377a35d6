"""Delta weights: the original's merges, the way back to the bit, files, policies, and LoRA."""

import json

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", reason='delta weights are shown on UNets: pip install "linattn[diffusers]"')
pytest.importorskip("peft", reason='LoRA needs the extra: pip install "linattn[diffusers]"')

from diffusers import UNet2DConditionModel
from helpers import goldens
from helpers.tiny_pipelines import UNETS, tiny_pipeline
from safetensors.torch import save_file

from linattn import delta_weights
from linattn.schedulers import PeRFlowScheduler

pytestmark = pytest.mark.usefixtures("one_thread_in_module")

HALF, SINGLE = torch.float16, torch.float32
FLOAT32 = 2.0**-23


def unet(seed=0, dtype=SINGLE, **config):
    torch.manual_seed(seed)
    return UNet2DConditionModel(**{**UNETS["sd15"], **config}).to(dtype).eval()


def delta_of(model, size=0.1, seed=1, dtype=SINGLE):
    generator = torch.Generator().manual_seed(seed)
    return {
        key: (size * torch.randn(value.shape, generator=generator)).to(dtype)
        for key, value in model.state_dict().items()
    }


def copied(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(model, state):
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class Layers(nn.Module):
    """Modules that have the keys of a state dict."""

    def __init__(self, state):
        super().__init__()
        for key, value in state.items():
            module, *names = self, *key.split(".")
            for name in names[:-1]:
                if name not in module._modules:
                    module.add_module(name, nn.Module())
                module = module._modules[name]
            module.register_parameter(names[-1], nn.Parameter(value.clone()))


# ------------------------------------------------------------------------------------------------ against the original


def golden_merge(base_bits, delta_bits):
    tensors, _ = goldens.load("perflow", "delta_merge")
    prefix = f"b{base_bits}_d{delta_bits}"
    return [
        {key.removeprefix(f"{prefix}.{part}."): t for key, t in tensors.items() if key.startswith(f"{prefix}.{part}.")}
        for part in ("base", "delta", "merged")
    ]


@goldens.needs_goldens
@pytest.mark.parametrize("delta_bits", [16, 32])
def test_merge_of_half_precision_models_is_that_of_the_original_bit_for_bit(delta_bits):
    base, delta, merged = golden_merge(16, delta_bits)
    model = Layers(base)
    made = delta_weights.merge(model, delta)
    assert made.merged == list(base) and len(base) == 24
    assert same(model, merged)


@goldens.needs_goldens
def test_merge_does_not_round_a_float32_model_to_the_type_of_the_delta():
    base, delta, merged = golden_merge(32, 16)
    # The original does: as if the model had been half precision.
    model = Layers(base).half()
    delta_weights.merge(model, delta)
    assert all(torch.equal(value.float(), merged[key]) for key, value in model.state_dict().items())
    model = Layers(base)
    delta_weights.merge(model, delta)
    for key, value in model.state_dict().items():
        exact = base[key].double() + delta[key].double()
        assert torch.equal(value, exact.float())
    assert any((merged[key] - base[key] - delta[key]).norm() > 1e-4 for key in base)


@goldens.needs_goldens
def test_sample_of_a_merged_model_is_that_of_the_original():
    tensors, _ = goldens.load("perflow", "delta_merge")
    settings = json.loads(goldens.path("perflow", "scalars.json").read_text())["e2e"]
    config = dict(settings["unet"])
    blocks = {"down_block_types": config.pop("down"), "up_block_types": config.pop("up")}
    model = UNet2DConditionModel(**config, **blocks).eval()
    model.load_state_dict({k.removeprefix("e2e.base."): v for k, v in tensors.items() if k.startswith("e2e.base.")})
    delta_weights.merge(
        model, {k.removeprefix("e2e.delta."): v for k, v in tensors.items() if k.startswith("e2e.delta.")}
    )
    scheduler = PeRFlowScheduler(prediction_type=settings["prediction_type"])
    scheduler.set_timesteps(settings["steps"])
    x = tensors["e2e.x"]
    for t in scheduler.timesteps:
        with torch.no_grad():
            x = scheduler.step(model(x, t, tensors["e2e.ctx"]).sample, t, x).prev_sample
    # Four steps of a network of some fifty layers, each with sums of a hundred terms in an order of its own.
    assert goldens.relative_error(x, tensors["e2e.final"]) < 1e-5


# ------------------------------------------------------------------------------------------- extract, merge and back


@pytest.mark.parametrize("dtype", [torch.float64, SINGLE, HALF, torch.bfloat16])
def test_merging_what_was_extracted_gives_the_tuned_model_and_unmerging_the_base(dtype):
    base, tuned = unet(0, dtype), unet(1, dtype)
    before = copied(base)
    delta = delta_weights.extract(base, tuned)
    assert {value.dtype for value in delta.values()} == {torch.promote_types(dtype, SINGLE)}
    made = delta_weights.merge(base, delta)
    for key, value in base.state_dict().items():
        # The difference was rounded once in float32, the sum once in the model's type.
        assert torch.allclose(value, tuned.state_dict()[key], rtol=torch.finfo(dtype).eps, atol=1e-7), key
    assert not same(base, before)
    made.unmerge()
    assert same(base, before)
    made.unmerge()
    assert same(base, before)


@pytest.mark.parametrize("scale", [0.5, 0.0, -2.0])
def test_delta_is_scaled(scale):
    model = unet()
    before, delta = copied(model), delta_of(model)
    with delta_weights.merge(model, delta, scale):
        for key, value in model.state_dict().items():
            assert torch.allclose(value, before[key] + scale * delta[key], rtol=0, atol=1e-6)
    assert same(model, before)


def test_unmerging_without_a_copy_leaves_a_rounding():
    model = unet()
    before, delta = copied(model), delta_of(model)
    made = delta_weights.merge(model, delta, exact=False)
    made.unmerge()
    assert not same(model, before)
    for key, value in model.state_dict().items():
        assert (value - before[key]).abs().max() <= FLOAT32 * (before[key].abs() + delta[key].abs()).max()


def test_unmerging_follows_the_model_to_another_type():
    model = unet()
    expected = copied(unet().half())
    made = delta_weights.merge(model, delta_of(model))
    model.half()
    made.unmerge()
    assert same(model, expected)


def test_merges_are_undone_in_order_and_training_is_not_thrown_away():
    model = unet()
    before = copied(model)
    first, second = (delta_weights.merge(model, delta_of(model, seed=seed)) for seed in (1, 2))
    with pytest.raises(ValueError, match=r"conv_in.weight was changed after this delta was merged: undo that first"):
        first.unmerge()
    second.unmerge()
    first.unmerge()
    assert same(model, before)
    first = delta_weights.merge(model, delta_of(model))
    with torch.no_grad():
        model.conv_out.bias += 1
    with pytest.raises(ValueError, match=r"conv_out.bias was changed"):
        first.unmerge()


def test_nothing_is_changed_where_an_error_is_raised():
    model = unet()
    before, delta = copied(model), delta_of(model)
    delta["conv_out.bias"] = torch.zeros(7)  # the last key
    with pytest.raises(ValueError, match=r"conv_out.bias must have the model's shape \(4,\), got \(7,\)"):
        delta_weights.merge(model, delta)
    assert same(model, before)


# ------------------------------------------------------------------------------------------------------------- policies


def test_keys_that_one_of_the_two_lacks_are_refused_or_reported():
    model = unet()
    before, delta = copied(model), delta_of(model)
    del delta["conv_out.bias"]
    delta["other.weight"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"the model lacks other.weight, the delta conv_out.bias"):
        delta_weights.merge(model, delta)
    made = delta_weights.merge(model, delta, missing="skip")
    assert made.skipped == ["other.weight"] and made.untouched == ["conv_out.bias"]
    assert set(made.merged) == set(before) - {"conv_out.bias"}
    assert torch.equal(model.conv_out.bias, before["conv_out.bias"])


@pytest.mark.parametrize("policy", ["pad", "skip"])
@pytest.mark.parametrize("exact", [True, False])
def test_inpainting_unet_takes_the_delta_in_its_first_channels_or_not(policy, exact):
    model, delta = unet(in_channels=9), delta_of(unet())
    before = copied(model)
    with pytest.raises(ValueError, match=r"conv_in.weight has 9 input channels in the model and 4 in the delta"):
        delta_weights.merge(model, delta)
    made = delta_weights.merge(model, delta, extra_channels=policy, exact=exact)
    assert made.padded == (["conv_in.weight"] if policy == "pad" else [])
    assert made.skipped == (["conv_in.weight"] if policy == "skip" else [])
    weight, old = model.conv_in.weight, before["conv_in.weight"]
    expected = delta["conv_in.weight"] if policy == "pad" else torch.zeros(1)
    assert torch.allclose(weight[:, :4] - old[:, :4], expected, atol=1e-6)
    assert torch.equal(weight[:, 4:], old[:, 4:])
    assert torch.allclose(model.conv_out.bias, before["conv_out.bias"] + delta["conv_out.bias"])
    made.unmerge()
    assert torch.allclose(model.conv_in.weight, old, atol=1e-7) and (not exact or same(model, before))


def test_unet_with_linear_attention_takes_the_keys_it_has():
    adapters = pytest.importorskip("linattn.adapters")
    model = unet()
    delta = delta_of(model)
    linfusion = adapters.LinFusion.construct_for(model, load_pretrained=False)
    before = copied(model)
    with pytest.raises(ValueError, match=r"the model lacks none, the delta .*attn1.to_k_.0.bias.* and \d+ more"):
        delta_weights.merge(model, delta)
    made = delta_weights.merge(model, delta, missing="skip")
    assert made.untouched and all(".attn1.to_" in key for key in made.untouched) and not made.skipped
    made.unmerge()
    assert same(model, before)
    linfusion.unmount()


def test_layers_that_lora_wraps_get_the_delta_themselves():
    pipe = tiny_pipeline("sd15")
    delta = delta_of(pipe.unet)
    made = delta_weights.merge(pipe.unet, delta)
    expected = copied(pipe.unet)
    made.unmerge()
    pipe.load_lora_weights(delta_weights.to_lora(delta_of(pipe.unet, seed=5), 1).state_dict)
    made = delta_weights.merge(pipe.unet, delta)
    assert made.merged and not made.untouched and not made.skipped
    pipe.unload_lora_weights()
    assert same(pipe.unet, expected)


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (lambda m, d: None, dict(missing="ignore"), "missing must be one of raise, skip, got 'ignore'"),
        (lambda m, d: None, dict(extra_channels="zero"), "extra_channels must be one of raise, pad, skip, got 'zero'"),
        (
            lambda m, d: d.update({"conv_in.bias": torch.ones(16).int()}),
            {},
            "conv_in.bias of the delta must be floating",
        ),
        (lambda m, d: m.to("meta"), {}, "no data .*before the model is offloaded"),
        (
            lambda m, d: m.conv_out.register_buffer("scale", torch.ones(4, dtype=torch.int8)),
            {},
            "conv_out.scale must be floating point, got torch.int8: merge before the model is quantised",
        ),
        # Fewer channels than the delta is not something to pad.
        (
            lambda m, d: d.update({"conv_in.weight": torch.ones(16, 9, 3, 3)}),
            dict(extra_channels="pad"),
            r"conv_in.weight must have the model's shape \(16, 4, 3, 3\), got \(16, 9, 3, 3\)",
        ),
    ],
)
def test_merges_that_mean_nothing_are_refused(spoil, options, message):
    model = unet()
    delta = delta_of(model)
    spoil(model, delta)
    with pytest.raises(ValueError, match=message):
        delta_weights.merge(model, delta, **options)


def test_models_that_have_no_difference_are_refused():
    base = unet()
    with pytest.raises(ValueError, match=r"conv_in.weight must have one shape, got \(16, 4, 3, 3\) in base"):
        delta_weights.extract(base, unet(in_channels=9))
    with pytest.raises(ValueError, match="same keys, a, b are in one only"):
        delta_weights.extract({"a": torch.ones(1)}, {"b": torch.ones(1)})


# ---------------------------------------------------------------------------------------------------------------- files


def test_delta_is_saved_and_loaded(tmp_path):
    delta = delta_of(unet(), dtype=HALF)
    assert delta_weights.save(delta, tmp_path / "new") == tmp_path / "new" / "delta_weights.safetensors"
    for place in (tmp_path / "new", tmp_path / "new" / "delta_weights.safetensors"):
        loaded = delta_weights.load(place)
        assert loaded.keys() == delta.keys() and all(torch.equal(loaded[key], delta[key]) for key in delta)


@pytest.mark.parametrize("shard", ["10GB", "100KB"])
def test_delta_in_the_form_of_a_unet_is_loaded(tmp_path, shard):
    model = unet()
    delta = delta_of(model)
    model.load_state_dict(delta)
    model.save_pretrained(tmp_path / "unet", variant="v0-1", max_shard_size=shard)
    assert (len(list((tmp_path / "unet").glob("*.safetensors"))) > 1) == (shard == "100KB")
    for place in (tmp_path, tmp_path / "unet"):
        loaded = delta_weights.load(place, variant="v0-1")
        assert loaded.keys() == delta.keys() and all(torch.equal(loaded[key], delta[key]) for key in delta)
    with pytest.raises(FileNotFoundError, match=r"has none of delta_weights.safetensors, diffusion_pytorch_model"):
        delta_weights.load(tmp_path)


def test_whole_model_is_loaded_as_its_difference_to_the_base(tmp_path):
    base, tuned = unet(0), unet(1)
    tuned.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="looks like a whole model: pass base="):
        delta_weights.load(tmp_path)
    expected = delta_weights.extract(base, tuned)
    loaded = delta_weights.load(tmp_path, base=base)
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    delta_weights.save(loaded, tmp_path / "delta")
    with pytest.raises(ValueError, match="looks like delta weights already"):
        delta_weights.load(tmp_path / "delta", base=base)


def test_files_that_cannot_be_used_are_refused(tmp_path):
    torch.save({}, tmp_path / "delta_weights.bin")
    with pytest.raises(ValueError, match=r"expected a safetensors file, got .*bin"):
        delta_weights.load(tmp_path / "delta_weights.bin")
    with pytest.raises(FileNotFoundError, match=r"none of delta_weights.safetensors"):
        delta_weights.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file .*missing.safetensors"):
        delta_weights.load(tmp_path / "missing.safetensors")
    index = {"weight_map": {"conv_in.weight": "gone.safetensors"}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"no gone.safetensors, which its index names"):
        delta_weights.load(tmp_path)


def test_names_that_are_no_folders_are_looked_up_on_the_hub(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    delta = delta_of(unet())
    path, asked = delta_weights.save(delta, tmp_path), []

    def download(name, file, revision):
        asked.append((name, file, revision))
        if file != "unet/diffusion_pytorch_model.fp16.safetensors":
            raise EntryNotFoundError(file)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    loaded = delta_weights.load("someone/some-delta", variant="fp16", revision="main")
    assert loaded.keys() == delta.keys()
    assert asked[0] == ("someone/some-delta", "delta_weights.fp16.safetensors", "main")


# ----------------------------------------------------------------------------------------------------------------- LoRA


def test_lora_of_full_rank_is_the_delta(tmp_path):
    pipe = tiny_pipeline("sd15")
    inputs = torch.randn(1, 4, 16, 16), 500, torch.randn(1, 5, 16)
    delta = delta_of(pipe.unet, 0.05)
    only_lora = {key: value if value.ndim > 1 else torch.zeros_like(value) for key, value in delta.items()}
    with torch.no_grad(), delta_weights.merge(pipe.unet, only_lora):
        expected = pipe.unet(*inputs).sample
    made = delta_weights.to_lora(delta, 300)
    assert made.left_out == [key for key, value in delta.items() if value.ndim == 1]
    assert not delta_weights.to_lora(only_lora, 1).left_out
    assert max(made.error.values()) == 0
    save_file(made.state_dict, tmp_path / "pytorch_lora_weights.safetensors")
    pipe.load_lora_weights(tmp_path)
    with torch.no_grad():
        # A product of two matrices instead of one matrix, in each layer.
        assert goldens.relative_error(pipe.unet(*inputs).sample, expected) < 1e-5


def test_lora_is_the_best_of_its_rank():
    conv, linear = torch.randn(6, 3, 3, 3, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    made = delta_weights.to_lora({"a.weight": conv, "b.weight": linear}, 4, prefix="net", dtype=torch.float64)
    for name, delta in (("a", conv), ("b", linear)):
        down, up = made.state_dict[f"net.{name}.lora_A.weight"], made.state_dict[f"net.{name}.lora_B.weight"]
        values = torch.linalg.svdvals(delta.flatten(1))
        lost = (delta.flatten(1) - up.flatten(1) @ down.flatten(1)).norm()
        torch.testing.assert_close(lost, values[4:].norm())
        assert made.error[name] == pytest.approx(lost / delta.norm())
    assert made.state_dict["net.a.lora_A.weight"].shape == (4, 3, 3, 3)
    assert made.state_dict["net.a.lora_B.weight"].shape == (6, 4, 1, 1)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        delta_weights.to_lora({}, 0)


def test_lora_has_one_rank_even_where_a_layer_has_less():
    delta = {"a.weight": torch.randn(2, 9), "b.weight": torch.zeros(7, 7)}
    made = delta_weights.to_lora(delta, 5)
    assert {t.shape[0] for k, t in made.state_dict.items() if "lora_A" in k} == {5}
    assert made.error == {"a": 0, "b": 0}
    for name in ("a", "b"):
        product = made.state_dict[f"unet.{name}.lora_B.weight"] @ made.state_dict[f"unet.{name}.lora_A.weight"]
        torch.testing.assert_close(product, delta[f"{name}.weight"])
