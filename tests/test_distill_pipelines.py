"""A pipeline as the source of training data: the same text, sizes, latents and pictures as the pipeline itself has."""

import contextlib

import numpy
import pytest
import torch

pytest.importorskip("diffusers", reason='distillation needs the extra: pip install "linattn[train]"')

from diffusers import DiffusionPipeline
from helpers.tiny_pipelines import FAMILIES, tiny_pipeline

from linattn.adapters import LinFusion
from linattn.distill import pipelines

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
    return pipelines.load(str(folders / family))


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
        else:
            expected = stock.text_encoder(token_ids(stock.tokenizer)).last_hidden_state
            assert set(made) == {"encoder_hidden_states"}
    assert torch.equal(made["encoder_hidden_states"], expected)


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
    expected = (posterior.mean + posterior.std * noise) * stock.vae.config.scaling_factor
    assert mean.shape == (2, 4, 16, 24) and mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(models.latents(mean, std, noise), expected, rtol=0, atol=0)


def test_denoiser_is_the_unet_with_its_conditions(models, stock, family):
    condition = models.encode_text(CAPTIONS) | models.encode_sizes(*torch.randint(1, 64, (3, 3, 2)))
    noisy, t = torch.randn(3, 4, 16, 16), torch.tensor([0, 500, 999])
    added = {k: condition[k] for k in ("text_embeds", "time_ids")} if family == "sdxl" else None
    with torch.no_grad():
        made = models.denoiser(models.model)(noisy, t, condition)
        expected = stock.unet(noisy, t, condition["encoder_hidden_states"], added_cond_kwargs=added).sample
    assert torch.equal(made, expected)
    assert not any(p.requires_grad for part in (models.model, models.pipeline.vae) for p in part.parameters())


def test_drawn_pictures_are_those_of_the_pipeline(models, stock):
    options = {"steps": 2, "guidance": 3.0, "height": 32, "width": 48, "seed": 5}
    made = models.draw(models.model, ["a two", "a three"], **options, autocast=contextlib.nullcontext)
    for prompt, picture in zip(["a two", "a three"], made, strict=True):
        expected = stock(
            prompt, num_inference_steps=2, guidance_scale=3.0, height=32, width=48, generator=torch.manual_seed(5)
        ).images[0]
        assert (numpy.asarray(picture) == numpy.asarray(expected)).all()


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
