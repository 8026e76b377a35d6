"""A pipeline as the source of training data: the same text, sizes, latents and pictures as the pipeline itself has."""

import contextlib

import numpy
import pytest
import torch

pytest.importorskip("diffusers", reason='distillation needs the extra: pip install "linattn[train]"')

from diffusers import DiffusionPipeline
from helpers.tiny_pipelines import FAMILIES as UNETS
from helpers.tiny_pipelines import tiny_pipeline

from linattn.adapters import LinFusion
from linattn.distill import pipelines
from linattn.distill.denoiser import pack, raster_ids, unpack

FLOWS = ("flux", "flux-schnell", "sd3", "sd35")
FAMILIES = (*UNETS, *FLOWS)
TEXT_LENGTH = 24
CAPTIONS = ["a seven, a two and a four", "", "two words"]


pytestmark = pytest.mark.usefixtures("one_thread_in_module")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    for family in FAMILIES:
        tiny_pipeline(family).save_pretrained(root / family)
    return root


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def models(family, folders):
    return pipelines.load(str(folders / family), text_length=TEXT_LENGTH if family in FLOWS else None)


@pytest.fixture(scope="module")
def stock(family, folders):
    pipe = DiffusionPipeline.from_pretrained(folders / family)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def token_ids(tokenizer):
    return tokenizer(
        CAPTIONS, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


def test_text_is_encoded_as_the_family_was_trained(models, stock, family):
    """The last hidden state, normalised; SDXL: the last but one of both encoders, and the projection of the second."""
    made = models.encode_text(CAPTIONS)
    with torch.no_grad():
        if family == "sdxl":
            first = stock.text_encoder(token_ids(stock.tokenizer), output_hidden_states=True)
            second = stock.text_encoder_2(token_ids(stock.tokenizer_2), output_hidden_states=True)
            expected = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
            assert torch.equal(made["text_embeds"], second.text_embeds)
        elif family in FLOWS:
            expected, pooled = flow_text(stock, family)
            assert torch.equal(made["pooled_projections"], pooled)
        else:
            expected = stock.text_encoder(token_ids(stock.tokenizer)).last_hidden_state
            assert set(made) == {"encoder_hidden_states"}
    assert torch.equal(made["encoder_hidden_states"], expected)


def flow_text(stock, family):
    """FLUX: the tokens of T5, and CLIP's pooled output. SD3: the tokens of both CLIPs, padded to T5's width, before
    those of T5, and both CLIPs' projections.
    """
    t5_number = 2 if family.startswith("flux") else 3
    t5_tokens = stock.components[f"tokenizer_{t5_number}"](
        CAPTIONS, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    )
    t5 = stock.components[f"text_encoder_{t5_number}"](t5_tokens.input_ids).last_hidden_state
    if family.startswith("flux"):
        return t5, stock.text_encoder(token_ids(stock.tokenizer)).pooler_output
    clips = [
        stock.components[f"text_encoder{n}"](token_ids(stock.components[f"tokenizer{n}"]), output_hidden_states=True)
        for n in ("", "_2")
    ]
    tokens = torch.cat([clip.hidden_states[-2] for clip in clips], dim=-1)
    tokens = torch.nn.functional.pad(tokens, (0, t5.shape[-1] - tokens.shape[-1]))
    return torch.cat([tokens, t5], dim=1), torch.cat([clip.text_embeds for clip in clips], dim=-1)


def test_sizes_come_in_the_order_of_the_pipeline(models, stock, family):
    original, crop, target = (
        torch.tensor([[40, 50], [7, 9]]),
        torch.tensor([[1, 2], [3, 4]]),
        torch.tensor([[32, 48]] * 2),
    )
    made = models.encode_sizes(original, crop, target)
    if family != "sdxl":
        assert made == {}
        return
    rows = [
        stock._get_add_time_ids(tuple(o), tuple(c), tuple(t), torch.float32, stock.text_encoder_2.config.projection_dim)
        for o, c, t in zip(original.tolist(), crop.tolist(), target.tolist(), strict=True)
    ]
    assert torch.equal(made["time_ids"], torch.cat(rows))


def test_latents_are_samples_of_the_posterior_at_the_scale_of_the_model(models, stock):
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    mean, std = models.encode_image(pixels)
    noise = torch.randn(mean.shape)
    with torch.no_grad():
        posterior = stock.vae.encode(pixels).latent_dist
    config = stock.vae.config
    expected = (posterior.mean + posterior.std * noise - (config.shift_factor or 0)) * config.scaling_factor
    assert mean.shape == (2, config.latent_channels, 16, 24) and mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(models.latents(mean, std, noise), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", UNETS, indirect=True)
def test_denoiser_is_the_unet_with_its_conditions(models, stock, family):
    condition = models.encode_text(CAPTIONS) | models.encode_sizes(*torch.randint(1, 64, (3, 3, 2)))
    noisy, t = torch.randn(3, 4, 16, 16), torch.tensor([0, 500, 999])
    added = {k: condition[k] for k in ("text_embeds", "time_ids")} if family == "sdxl" else None
    with torch.no_grad():
        made = models.denoiser(models.model)(noisy, t, condition)
        expected = stock.unet(noisy, t, condition["encoder_hidden_states"], added_cond_kwargs=added).sample
    assert torch.equal(made, expected)
    assert not any(p.requires_grad for part in (models.model, models.pipeline.vae) for p in part.parameters())


@pytest.mark.parametrize("family", FLOWS, indirect=True)
def test_denoiser_is_called_as_the_pipeline_calls_its_transformer(models, stock, family):
    """Packing, position ids, timestep, guidance: from what the pipeline itself hands over in a step."""
    calls = []
    handle = stock.transformer.register_forward_hook(
        lambda _module, _inputs, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    try:
        # Told its guidance, or unguided: one evaluation a step either way.
        guidance = 4.0 if family == "flux" else 0.5
        options = {"height": 32, "width": 48, "generator": torch.manual_seed(1), "max_sequence_length": TEXT_LENGTH}
        stock(CAPTIONS[:1], num_inference_steps=2, guidance_scale=guidance, **options, output_type="latent")
    finally:
        handle.remove()
    options = {"guidance": guidance} if family.startswith("flux") else {}
    denoiser = models.denoiser(models.model, **options)
    condition = models.encode_text(CAPTIONS[:1])
    for kwargs, output in calls:
        noisy, expected, timestep = kwargs["hidden_states"], output, kwargs["timestep"]
        if family.startswith("flux"):
            # As diffusers unpacks what its pipeline has packed.
            noisy, expected = (stock._unpack_latents(t, 32, 48, stock.vae_scale_factor) for t in (noisy, output))
            timestep = timestep * 1000
        with torch.no_grad():
            made = denoiser(noisy, timestep, condition)
        assert made.shape == noisy.shape == (1, 16, 16, 24)
        # Its timestep is divided by 1000 and multiplied again.
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2


def test_position_ids_stay_exact_in_sixteen_bits():
    """bfloat16 has eight bits: from 256 on, columns would fall together."""
    ids = raster_ids(2, 300, torch.device("cpu"))
    assert ids.dtype == torch.float32 and ids.shape == (600, 3)
    assert ids[:300, 2].tolist() == list(range(300)) and ids[300:, 1].unique().tolist() == [1]
    assert len(ids[:, 2].bfloat16().unique()) < 300, "the reason"


def test_packing_is_undone_and_needs_even_sides():
    latents = torch.randn(2, 3, 4, 10)
    tokens = pack(latents)
    assert tokens.shape == (2, 10, 12) and torch.equal(unpack(tokens, 2, 5), latents)
    # Token (1, 3), channel 2, lower left pixel.
    assert torch.equal(tokens[0, 1 * 5 + 3, 2 * 4 + 1 * 2 + 0], latents[0, 2, 2 * 1 + 1, 2 * 3])
    with pytest.raises(ValueError, match=r"must be even, got \(1, 3, 4, 5\)"):
        pack(torch.randn(1, 3, 4, 5))


@pytest.mark.parametrize(
    ("family", "interval", "expected"),
    [
        # Two double and three single blocks: number 4 of all is the third single one.
        ("flux", 4, ["single_transformer_blocks.2.attn"]),
        ("flux", 1, [f"single_transformer_blocks.{i}.attn" for i in range(3)]),
        ("flux", 3, ["single_transformer_blocks.1.attn"]),
        # Three blocks, of which the last has no use for its text; SD3.5's first two attend twice.
        ("sd3", 1, ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]),
        ("sd35", 4, ["transformer_blocks.0.attn", "transformer_blocks.0.attn2"]),
    ],
)
def test_compared_modules_are_counted_over_all_blocks(folders, family, interval, expected):
    assert pipelines.load(str(folders / family)).compared_modules(interval) == tuple(expected)


def test_compared_modules_of_flux_dev_are_those_of_the_published_training():
    """Ten of 57: single blocks 1, 5, ... 37, with 19 double ones before them."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        pipe = tiny_pipeline("flux")
        pipe.transformer = FluxTransformer2DModel(
            num_layers=19, num_single_layers=38, attention_head_dim=8, num_attention_heads=1, axes_dims_rope=(2, 2, 4)
        )
    made = pipelines.Flux(pipe).compared_modules(4)
    assert made == tuple(f"single_transformer_blocks.{i}.attn" for i in range(1, 38, 4)) and len(made) == 10


def test_interval_that_leaves_nothing_to_compare_is_refused_by_key(folders):
    with pytest.raises(ValueError, match=r"objective\.feature_interval: 7 leaves no attention module"):
        pipelines.load(str(folders / "flux")).compared_modules(7)


def test_text_length_is_the_tokenizer_s_unless_it_is_given(folders, tmp_path):
    pipe = tiny_pipeline("flux-schnell")
    pipe.tokenizer_2.model_max_length = 40
    pipe.save_pretrained(tmp_path)
    for given, expected in ((None, 40), (16, 16)):
        models = pipelines.load(str(tmp_path), text_length=given)
        assert models.encode_text(["a two"])["encoder_hidden_states"].shape[1] == models.text_length == expected
    with pytest.raises(ValueError, match=r"model\.text_length: expected null for a StableDiffusionPipeline.*got 16"):
        pipelines.load(str(folders / "sd15"), text_length=16)


def test_drawn_pictures_are_those_of_the_pipeline(models, stock, family):
    options = {"steps": 2, "guidance": 3.0, "height": 32, "width": 48, "seed": 5}
    own = {"max_sequence_length": TEXT_LENGTH} if family in FLOWS else {}
    own |= {"true_cfg_scale": 3.0, "negative_prompt": ""} if family == "flux-schnell" else {"guidance_scale": 3.0}
    made = models.draw(models.model, ["a two", "a three"], **options, autocast=contextlib.nullcontext)
    for prompt, picture in zip(["a two", "a three"], made, strict=True):
        expected = stock(
            prompt, num_inference_steps=2, height=32, width=48, generator=torch.manual_seed(5), **own
        ).images[0]
        assert (numpy.asarray(picture) == numpy.asarray(expected)).all()


@pytest.mark.parametrize("family", UNETS, indirect=True)
def test_drawing_with_a_student_leaves_the_pipeline_its_own_model(models):
    own, options = models.model, {"steps": 1, "guidance": 1.0, "height": 32, "width": 32, "seed": 0}
    student = tiny_pipeline("sdxl" if "XL" in type(models.pipeline).__name__ else "sd15").unet
    LinFusion.construct_for(student, load_pretrained=False)
    drawn = models.draw(student, ["a two"], **options, autocast=contextlib.nullcontext)
    stock = models.draw(own, ["a two"], **options, autocast=contextlib.nullcontext)
    assert models.model is own and (numpy.asarray(drawn[0]) != numpy.asarray(stock[0])).any()

    def broken(*_, **__):
        raise RuntimeError("stop")

    student.forward = broken
    with pytest.raises(RuntimeError, match="stop"):
        models.draw(student, ["a two"], **options, autocast=contextlib.nullcontext)
    assert models.model is own


def test_pickled_weights_are_not_read(tmp_path):
    tiny_pipeline("sd15").save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "unet" / "diffusion_pytorch_model.bin").is_file()
    with pytest.raises(OSError, match="safetensors"):
        pipelines.load(str(tmp_path))


def test_moving_casts_all_but_a_vae_that_asks_for_float32(folders, family):
    models = pipelines.load(str(folders / family))
    models.place(torch.device("cpu"), torch.bfloat16)
    wide = models.pipeline.vae.config.force_upcast
    assert models.model.dtype == models.pipeline.text_encoder.dtype == torch.bfloat16
    assert models.pipeline.vae.dtype == (torch.float32 if wide else torch.bfloat16)
    mean, _ = models.encode_image(torch.rand(1, 3, 32, 32))
    assert mean.dtype == torch.float32
    assert models.encode_text(["a two"])["encoder_hidden_states"].dtype == torch.bfloat16
