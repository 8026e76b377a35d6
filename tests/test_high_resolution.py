"""High resolution by stages of SDEdit: what diffusers gives by hand, nothing left changed, mistakes at no cost."""

import contextlib
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from diffusers.pipelines.flux import pipeline_flux_img2img
from helpers import goldens
from helpers.tiny_pipelines import tiny_pipeline
from PIL import Image

from linattn.adapters import CLEAR
from linattn.pipelines import Stage, high_resolution, size_rule

pytestmark = pytest.mark.usefixtures("one_thread_in_module")

PROMPT = "a seven and a two"
SIBLINGS = {
    "flux": FluxImg2ImgPipeline,
    "sd3": StableDiffusion3Img2ImgPipeline,
    "sd15": StableDiffusionImg2ImgPipeline,
    "sdxl": StableDiffusionXLImg2ImgPipeline,
}
FAST = {"height": 16, "width": 24, "num_inference_steps": 4}
STAGE = Stage(32, 48)


@pytest.fixture(params=SIBLINGS, scope="module")
def family(request):
    return request.param


def of_family(family):
    """Options of a call: T5 pads to its maximum unless told."""
    return {} if family in ("sd15", "sdxl") else {"max_sequence_length": 16}


@pytest.fixture(scope="module")
def pipes():
    return {family: tiny_pipeline(family) for family in SIBLINGS}


@pytest.fixture
def flux(pipes):
    return pipes["flux"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(pipe, stages=(STAGE,), family="flux", **options):
    options = FAST | of_family(family) | {"generator": seeded(), "output_type": "np"} | options
    return high_resolution(pipe, options.pop("prompt", PROMPT), stages=list(stages), **options)


def pixels(images):
    return np.stack([np.asarray(image) for image in images])


class Attention:
    """What an adapter offers, noting what is done to it. Mounted it changes the model, and at high resolution more."""

    def __init__(self):
        self.mounted, self.settings, self.log, self.grids, self.hook = False, None, [], [], None

    def mount_to(self, model):
        assert not self.mounted
        self.mounted = True
        self.log.append("mount")
        self.hook = model.register_forward_hook(self._changed)

    def unmount(self):
        assert self.mounted
        self.mounted = False
        self.log.append("unmount")
        self.hook.remove()

    def _changed(self, model, args, output):
        self.log.append(self.settings or "plain")
        return (output[0] * (0.5 if self.settings else 0.9),)

    @contextlib.contextmanager
    def high_resolution(self, ntk_factor=1.0, proportional_attention=False):
        self.settings = (ntk_factor, proportional_attention)
        yield
        self.settings = None

    def set_grid(self, height=None, width=None):
        self.grids.append((height, width))


# --------------------------------------------------------------------------------------------------------- the stages


def test_a_stage_is_what_diffusers_draws_from_the_enlarged_picture(pipes, family):
    pipe = pipes[family]
    made = draw(pipe, family=family, guidance_scale=3.0)

    generator, options = seeded(), of_family(family) | {"num_inference_steps": 4, "guidance_scale": 3.0}
    first = pipe(PROMPT, height=16, width=24, generator=generator, **options).images
    assert np.array_equal(pixels(made.before[0]), pixels(first))
    second = SIBLINGS[family](**pipe.components)
    second.set_progress_bar_config(disable=True)
    second.vae.enable_tiling()
    if family in ("flux", "sd3"):
        second.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        options |= {"height": 32, "width": 48}
    large = first[0].resize((48, 32), Image.Resampling.BICUBIC)
    expected = second(PROMPT, image=large, strength=0.7, generator=generator, output_type="np", **options).images
    second.vae.disable_tiling()
    assert expected.shape == (1, 32, 48, 3)
    assert np.array_equal(made.images, expected)


def test_stages_follow_one_another_each_from_the_pictures_before_it(flux):
    stages = [Stage(24, 32, seed=1), Stage(24, 32, strength=0.5, num_inference_steps=4, seed=2), Stage(32, 48, seed=3)]
    made = draw(flux, stages)
    assert [images[0].size for images in made.before] == [(24, 16), (32, 24), (32, 24)]
    # With a seed of its own every stage can be drawn again, alone, from what it was given.
    for index, stage in enumerate(stages):
        again = draw(flux, [stage], image=made.before[index], height=None, width=None, output_type="pil")
        later = made.before[index + 1] if index < 2 else None
        if later is None:
            assert np.abs(pixels(again.images) / 255 - made.images).max() <= 0.5 / 255 + 1e-6
        else:
            assert np.array_equal(pixels(again.images), pixels(later))


def test_a_stage_has_its_own_steps_strength_and_guidance(flux):
    seen = []

    def note(pipe, step, timestep, tensors):
        seen.append((pipe.num_timesteps, pipe.guidance_scale))
        return tensors

    stages = [Stage(16, 24, strength=0.5, num_inference_steps=6, guidance_scale=7.5), Stage(16, 24, strength=1.0)]
    draw(flux, stages, num_inference_steps=2, guidance_scale=3.5, callback_on_step_end=note)
    assert seen == [(2, 3.5)] * 2 + [(3, 7.5)] * 3 + [(2, 3.5)] * 2


def test_what_is_not_said_is_what_the_text_to_image_pipeline_does_unasked(flux):
    # 3.5 in text to image; image to image alone would take 7.
    assert np.array_equal(draw(flux).images, draw(flux, guidance_scale=3.5).images)
    assert not np.array_equal(draw(flux).images, draw(flux, [Stage(32, 48, guidance_scale=7.0)]).images)


def test_options_of_a_stage_count_for_this_stage(flux):
    other = draw(flux, [Stage(32, 48, options={"prompt": "a four"})])
    same = draw(flux, [Stage(32, 48, options={"prompt": PROMPT})], base_options={"prompt": PROMPT}, prompt="a four")
    plain = draw(flux)
    assert np.array_equal(pixels(other.before[0]), pixels(plain.before[0]))
    assert not np.array_equal(other.images, plain.images)
    assert np.array_equal(same.images, plain.images)


def test_one_seed_decides_the_whole_result(flux):
    first, again, other = (draw(flux, generator=seeded(seed)).images for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_the_noise_of_a_stage_goes_on_where_the_first_picture_s_ended(flux):
    generator = seeded()
    made = draw(flux, generator=generator)
    start_again = draw(flux, image=made.before[0], height=None, width=None, generator=seeded())
    assert not np.array_equal(made.images, start_again.images)
    assert not torch.equal(generator.get_state(), seeded().get_state())


@pytest.mark.parametrize(
    ("prompts", "options", "generators"),
    [
        pytest.param([PROMPT, "a four"], {}, 2, id="two-prompts"),
        pytest.param(PROMPT, {"num_images_per_prompt": 2}, 2, id="two-of-a-prompt"),
    ],
)
def test_pictures_of_a_batch_are_those_drawn_alone(flux, prompts, options, generators):
    both = draw(flux, prompt=prompts, generator=[seeded(i) for i in range(generators)], **options).images
    for i in range(generators):
        alone = draw(flux, prompt=prompts[i] if isinstance(prompts, list) else prompts, generator=[seeded(i)]).images
        assert np.abs(both[i] - alone[0]).max() < 1 / 255


def test_the_stages_run_on_the_modules_of_the_pipeline_itself(flux):
    seen = []

    def note(pipe, step, timestep, tensors):
        seen.append([getattr(pipe, name) is module for name, module in flux.components.items() if name != "scheduler"])
        return tensors

    draw(flux, callback_on_step_end=note)
    assert len(seen) == 7 and all(map(all, seen))


def test_latents_are_taken_and_given(flux):
    latents = torch.randn(1, flux.vae.config.latent_channels, 16, 24, generator=seeded(5))
    none = {"height": None, "width": None, "output_type": "latent"}
    made = draw(flux, image=latents, **none)
    assert made.images.shape == (1, 8 * 12, 4 * latents.shape[1])
    other = draw(flux, image=latents + 1, **none)
    assert not torch.equal(made.images, other.images)


def test_an_image_to_image_pipeline_will_do_as_well(flux):
    sibling = FluxImg2ImgPipeline(**flux.components)
    sibling.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(sibling).images, draw(flux).images)


# ------------------------------------------------------------------------------------------------------ the scheduler


def schedules(pipe, **options):
    """(scheduler, its noise levels) of each call of a pipeline."""
    found = []

    def note(pipe, step, timestep, tensors):
        if step == 0:
            found.append((pipe.scheduler, pipe.scheduler.sigmas.double()))
        return tensors

    draw(pipe, callback_on_step_end=note, **options)
    return found


@pytest.mark.parametrize(("shift", "expected"), [("auto", 3.0), (3.0, 3.0), (5.0, 5.0)])
def test_the_noise_levels_of_a_stage_are_shifted_by_a_constant_and_the_first_picture_s_are_not(flux, shift, expected):
    before, config = flux.scheduler, dict(flux.scheduler.config)
    (first, dynamic), (second, static) = schedules(flux, stages=[Stage(32, 48, shift=shift)])
    s = torch.linspace(1, 1 / 4, 4, dtype=torch.float64)
    torch.testing.assert_close(static[:-1], expected * s / (1 + (expected - 1) * s), rtol=1e-6, atol=0)
    assert first is before and first.config.use_dynamic_shifting
    assert not torch.allclose(dynamic, static)
    assert flux.scheduler is before and dict(before.config) == config and second is not before


def test_without_a_shift_the_scheduler_of_the_pipeline_is_used_as_it_is(flux):
    stages = [Stage(16, 24, shift=5.0), Stage(16, 24, strength=1.0, shift=None)]
    (_, first), _, (scheduler, second) = schedules(flux, stages=stages)
    assert scheduler is flux.scheduler and torch.equal(first, second)


# ------------------------------------------------------------------------------------------------------ the attention


@pytest.mark.parametrize("mounted", [False, True])
@pytest.mark.parametrize("in_base", [False, True])
def test_the_attention_is_mounted_where_it_is_wanted_and_left_as_it_was(flux, mounted, in_base):
    attention = Attention()
    if mounted:
        attention.mount_to(flux.transformer)
    stages = [Stage(16, 24, ntk_factor=4.0, proportional_attention=False), STAGE]
    draw(flux, stages, attention=attention, attention_in_base=in_base, num_inference_steps=2)
    log = [what for what in attention.log if what not in ("mount", "unmount")]
    assert log == ["plain"] * 2 * in_base + [(4.0, False)] * 2 + [(10.0, True)] * 2
    assert attention.mounted is mounted and attention.settings is None
    sizes = [(4, 6)] * in_base + [(4, 6), (8, 12)]  # in tokens of 4 pixels
    assert attention.grids == [call for size in sizes for call in (size, (None, None))]
    if mounted:
        attention.unmount()


def test_the_first_picture_is_the_stock_pipeline_s_and_the_stage_is_not(flux):
    stock = draw(flux)
    attended = draw(flux, attention=Attention())
    everywhere = draw(flux, attention=Attention(), attention_in_base=True)
    assert np.array_equal(pixels(stock.before[0]), pixels(attended.before[0]))
    assert not np.array_equal(stock.images, attended.images)
    assert not np.array_equal(pixels(stock.before[0]), pixels(everywhere.before[0]))


@pytest.mark.parametrize("mounted", [False, True])
def test_everything_is_put_back_after_an_interruption(flux, mounted):
    attention, scheduler = Attention(), flux.scheduler
    if mounted:
        attention.mount_to(flux.transformer)

    def stop(pipe, step, timestep, tensors):
        if pipe is not flux:
            raise KeyboardInterrupt
        return tensors

    with pytest.raises(KeyboardInterrupt):
        draw(flux, attention=attention, callback_on_step_end=stop)
    assert attention.mounted is mounted and flux.scheduler is scheduler and not flux.vae.use_tiling
    if mounted:
        attention.unmount()


def test_an_adapter_without_settings_for_high_resolution_is_mounted_all_the_same(flux):
    class Plain(Attention):
        high_resolution = property()

    attention = Plain()
    draw(flux, attention=attention)
    assert attention.log == ["mount", *["plain"] * 3, "unmount"]


# ---------------------------------------------------------------------------------------------------------- the VAE


def test_the_vae_works_in_tiles_in_the_stages_only_unless_told_otherwise(flux):
    seen = []

    def note(pipe, step, timestep, tensors):
        seen.append(pipe.vae.use_tiling)
        return tensors

    tiled = draw(flux, callback_on_step_end=note)
    assert seen == [False] * 4 + [True] * 3 and not flux.vae.use_tiling
    whole = draw(flux, vae_tiling=False)
    assert np.array_equal(pixels(tiled.before[0]), pixels(whole.before[0]))
    assert not np.array_equal(tiled.images, whole.images)


def test_tiling_that_was_on_stays_on(flux):
    flux.vae.enable_tiling()
    draw(flux)
    assert flux.vae.use_tiling
    flux.vae.disable_tiling()


def test_offloaded_models_are_sent_home_after_every_stage(flux, monkeypatch):
    # Only the pipeline that was told to offload knows of it; the one that draws the stages has no hooks of its own.
    times = []
    monkeypatch.setattr(flux, "maybe_free_model_hooks", lambda: times.append(flux.vae.use_tiling), raising=False)
    draw(flux, [STAGE, STAGE])
    assert len(times) == 3  # the first picture by itself, then two stages


# ------------------------------------------------------------------------------------------------------------- CLEAR


@pytest.fixture(params=["flux", "sd3"])
def clear(request, pipes):
    """(pipeline, CLEAR for it that is not mounted, name of the family)"""
    clear = CLEAR.construct_for(pipes[request.param], 3, load_pretrained=False).unmount()
    yield pipes[request.param], clear, request.param
    assert not clear.mounted


def test_a_stage_with_clear_is_what_the_mounted_pipeline_draws_at_its_settings(clear):
    pipe, clear, family = clear
    made = draw(pipe, family=family, attention=clear)
    stock = draw(pipe, family=family)
    assert np.array_equal(pixels(made.before[0]), pixels(stock.before[0]))
    assert not np.array_equal(made.images, stock.images)

    clear.mount_to(pipe)
    clear.set_high_resolution(ntk_factor=10.0 if family == "flux" else 1.0, proportional_attention=True)
    stage = {"image": made.before[0], "height": None, "width": None}
    generator = seeded()
    pipe(PROMPT, height=16, width=24, num_inference_steps=1, generator=generator, **of_family(family))
    by_hand = draw(pipe, family=family, generator=generator, **stage)
    clear.set_high_resolution()
    clear.unmount()
    assert np.array_equal(by_hand.images, made.images)


def test_golden_sdedit_local_w3(monkeypatch, flux):
    golden, facts = goldens.load("clear", "sdedit_local_w3")
    transformer = FluxTransformer2DModel(**facts["config"]).eval()
    transformer.load_state_dict({key[3:]: value for key, value in golden.items() if key.startswith("sd.")})
    channels = golden["image_latents"].shape[1]
    vae = AutoencoderKL.from_config(flux.vae.config, latent_channels=channels)
    pipe = FluxPipeline(**flux.components | {"transformer": transformer, "vae": vae})
    pipe.set_progress_bar_config(disable=True)
    clear = CLEAR.construct_for(pipe, facts["window"], load_pretrained=False).unmount()

    # The noise is given. All else is drawn as ever, by the pipeline.
    monkeypatch.setattr(pipeline_flux_img2img, "randn_tensor", lambda *args, **kwargs: golden["noise"])
    calls, results = [], []
    transformer.register_forward_pre_hook(lambda model, args, options: calls.append(options), with_kwargs=True)
    transformer.register_forward_hook(lambda model, args, output: results.append(output[0]))
    pixels_per_token = size_rule(pipe)[0]
    stage = Stage(
        facts["height_tokens"] * pixels_per_token,
        facts["width_tokens"] * pixels_per_token,
        strength=facts["strength"],
        num_inference_steps=facts["steps"],
        guidance_scale=facts["guidance_scale"],
        ntk_factor=facts["ntk_factor"],
        proportional_attention=bool(facts["proportional"]),
    )
    made = high_resolution(
        pipe,
        stages=[stage],
        image=golden["image_latents"],
        attention=clear,
        prompt_embeds=golden["encoder_hidden_states"],
        pooled_prompt_embeds=golden["pooled_projections"],
        output_type="latent",
    )
    timesteps = torch.stack([options["timestep"][0] * 1000 for options in calls]).double()
    torch.testing.assert_close(timesteps, golden["timesteps"].double(), rtol=1e-6, atol=0)
    first = FluxPipeline._unpack_latents(calls[0]["hidden_states"], stage.height, stage.width, pipe.vae_scale_factor)
    for actual, name in ((first, "init_latents"), (results[0], "first_pred"), (made.images, "final_latents")):
        torch.testing.assert_close(actual.double(), golden[name].double(), rtol=0, atol=1e-4)


# -------------------------------------------------------------------------------------------------------- the example


def test_the_example_draws_what_the_helper_draws(tmp_path):
    pipe = tiny_pipeline("flux-schnell")
    pipe.tokenizer_2.model_max_length = 32
    pipe.save_pretrained(tmp_path / "model")
    clear = CLEAR.construct_for(pipe, 3, 2, load_pretrained=False)
    clear.save_pretrained(tmp_path / "weights")
    command = [sys.executable, Path(__file__).parents[1] / "examples" / "clear_high_resolution.py"]
    command += ["--model", tmp_path / "model", "--weights", tmp_path / "weights", "--out", tmp_path / "a.png"]
    command += ["--height", 16, "--width", 24, "--scale", 2, 3, "--steps", 4, "--guidance", 2, "--stage-guidance", 3]
    # One thread as here: with another number torch's own layers round differently.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    stages = [Stage(32, 48, options={"true_cfg_scale": 3.0}), Stage(48, 72, options={"true_cfg_scale": 3.0})]
    options = {"true_cfg_scale": 2.0, "negative_prompt": "", "max_sequence_length": 32, "output_type": "pil"}
    made = draw(pipe, stages, prompt="a seven, a two and a four", attention=clear, **options)
    drawn = np.asarray(Image.open(tmp_path / "a.png"), dtype="float32")
    assert drawn.shape == (48, 72, 3)
    assert abs(drawn - np.asarray(made.images[0], dtype="float32")).max() <= 1


def test_the_example_says_that_another_model_needs_weights(capsys):
    script = Path(__file__).parents[1] / "examples" / "clear_high_resolution.py"
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script))["main"](["--model", "somewhere"])
    assert stopped.value.code == 2 and "--weights: which?" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- mistakes

MISTAKES = {
    "no stages": ({"stages": []}, "stages: expected a list of one Stage or more"),
    "no list": ({"stages": STAGE}, "stages: expected a list of one Stage or more"),
    "height": ({"stages": [Stage(30, 48)]}, r"stages\[0\]: height must be a multiple of 4 .* got height=30"),
    "width of the second": ({"stages": [STAGE, Stage(32, 49)]}, r"stages\[1\]: width must be a multiple of 4"),
    "a fraction": ({"stages": [Stage(32.0, 48)]}, "height must be a multiple of 4"),
    "no size": ({"stages": [Stage(0, 48)]}, "height must be a multiple of 4 .* got height=0"),
    "base": ({"height": 14}, "the first picture: height must be a multiple of 4 .* got height=14"),
    "smaller": ({"stages": [Stage(12, 48)]}, r"stages\[0\]: must not be smaller than the first picture, .*height=16"),
    "smaller than the stage before": (
        {"stages": [STAGE, Stage(32, 44)]},
        r"stages\[1\]: must not be smaller than stages\[0\], which is height=32, width=48; got height=32, width=44",
    ),
    "smaller than the image": (
        {"image": Image.new("RGB", (49, 32)), "height": None, "width": None},
        "smaller than image",
    ),
    "no strength": ({"stages": [Stage(32, 48, strength=0)]}, r"stages\[0\]: strength must be above 0 .* strength=0"),
    "much strength": ({"stages": [Stage(32, 48, strength=1.1)]}, "at most 1, got strength=1.1"),
    "no step": ({"stages": [Stage(32, 48, strength=0.2)]}, "less than one step: give num_inference_steps=5 or more"),
    "steps": ({"stages": [Stage(32, 48, num_inference_steps=0)]}, "num_inference_steps must be 1 or more"),
    "shift": ({"stages": [Stage(32, 48, shift=0.0)]}, "shift must be a positive number, got shift=0.0"),
    "shift by name": ({"stages": [Stage(32, 48, shift="dynamic")]}, "shift must be .* got shift='dynamic'"),
    "size and image": ({"image": Image.new("RGB", (24, 16))}, "image= replaces it"),
    "image of another kind": ({"image": "a.png", "height": None, "width": None}, "expected a PIL image, .* got str"),
    "images of two sizes": (
        {"image": [Image.new("RGB", (24, 16)), Image.new("RGB", (24, 18))], "height": None, "width": None},
        "pictures of one size",
    ),
    "latents": (
        {"image": torch.zeros(1, 16, 16, 20), "height": None, "width": None},
        r"latents of the first stage's size, \(B, 16, 16, 24\), got \(1, 16, 16, 20\)",
    ),
    "strength for all": ({"strength": 0.5}, "strength: given by arguments of their own"),
    "strength among a stage's": (
        {"stages": [Stage(32, 48, options={"strength": 0.5})]},
        "strength: given by arguments",
    ),
    "output of the base": ({"base_options": {"output_type": "np"}}, "output_type: given by arguments of their own"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_before_anything_is_drawn(flux, mistake):
    options, message = MISTAKES[mistake]
    hook = flux.transformer.register_forward_pre_hook(lambda *args: pytest.fail("something was drawn"))
    try:
        with pytest.raises(ValueError, match=message):
            high_resolution(flux, PROMPT, **FAST | of_family("flux") | {"stages": [STAGE]} | options)
    finally:
        hook.remove()


def test_a_pipeline_without_an_image_to_image_sibling_is_refused():
    with pytest.raises(ValueError, match="pipe: FluxFillPipeline has no image-to-image pipeline in diffusers"):
        high_resolution(tiny_pipeline("flux-fill"), PROMPT, stages=[STAGE])


def test_a_shift_is_refused_where_the_scheduler_has_none(pipes):
    with pytest.raises(ValueError, match=r"stages\[0\]: DDIMScheduler has no shift to set, got shift=3"):
        draw(pipes["sd15"], [Stage(32, 48, shift=3.0)], family="sd15")


def test_sd3_ends_where_its_table_of_positions_ends(pipes):
    assert size_rule(pipes["sd3"]) == (4, 96)
    with pytest.raises(ValueError, match=r"width must be at most 96 pixels, .* got width=100"):
        draw(pipes["sd3"], [Stage(96, 100)], family="sd3")


@pytest.mark.parametrize(("family", "multiple"), [("flux", 4), ("sd3", 4), ("sd15", 8), ("sdxl", 8)])
def test_the_rule_of_sizes_is_the_pipeline_s_own(pipes, family, multiple):
    pipe = pipes[family]
    assert size_rule(pipe)[0] == multiple
    side = 3 * multiple
    drawn = pipe(PROMPT, height=side, width=32, num_inference_steps=1, output_type="np", **of_family(family)).images
    assert drawn.shape[1:3] == (side, 32)
    try:
        drawn = pipe(PROMPT, height=side + multiple // 2, width=32, num_inference_steps=1, **of_family(family)).images
    except ValueError:
        return
    assert drawn[0].height != side + multiple // 2  # FLUX draws another size instead of an error


def test_the_first_picture_has_the_pipeline_s_own_size_unless_told(pipes):
    pipe = pipes["sdxl"]
    made = high_resolution(pipe, PROMPT, stages=[Stage(40, 40)], num_inference_steps=2, generator=seeded())
    unasked = pipe(PROMPT, num_inference_steps=2, generator=seeded()).images
    assert np.array_equal(pixels(made.before[0]), pixels(unasked))
