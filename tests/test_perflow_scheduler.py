"""PeRFlowScheduler: the original's goldens, its own identities, and diffusers' pipelines at tiny size."""

import json
import subprocess
import sys

import numpy
import pytest
import torch

pytest.importorskip("diffusers", reason='the scheduler needs the extra: pip install "linattn[diffusers]"')
pytest.importorskip("transformers", reason='pipelines need the extra: pip install "linattn[diffusers]"')

import diffusers
from helpers import goldens
from helpers.tiny_pipelines import IMAGE_SIZE, TEXT_DIM, tiny_pipeline

from linattn.schedulers import PeRFlowScheduler, piecewise

pytestmark = pytest.mark.usefixtures("one_thread_in_module")

KINDS = piecewise.PREDICTIONS
# Relative, of one rounding: between two orders of float32 arithmetic, and in float64.
FLOAT32, FLOAT64 = 2.0**-23, 1e-12


def scalars():
    return json.loads(goldens.path("perflow", "scalars.json").read_text())


def golden(name="scheduler"):
    return goldens.load("perflow", name)[0]


def network(x, t, c=0.0):
    """The network of the goldens: in float64, rounded to the type of x."""
    a, b = scalars()["config"]["a"], scalars()["config"]["b"]
    return torch.tanh(a * x.double() + b * float(t) + c).to(x.dtype)


def scheduler(kind="ddim_eps", windows=4, steps=None, **config):
    made = PeRFlowScheduler(prediction_type=kind, num_time_windows=windows, **config)
    if steps:
        made.set_timesteps(steps)
    return made


def flow(windows=4, steps=None, **config):
    return scheduler("velocity", windows, steps, use_flow_sigmas=True, **config)


def sampled(made, x, model=network):
    """The sample after each step."""
    states = []
    for t in made.timesteps:
        x = made.step(model(x, t), t, x).prev_sample
        states.append(x)
    return torch.stack(states)


def some(shape=(3, 4, 4, 4), seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ------------------------------------------------------------------------------------------------ against the original


@goldens.needs_goldens
def test_timesteps_are_those_of_the_original_bit_for_bit():
    for name, expected in scalars()["timesteps"].items():
        windows, steps = (int(part[1:]) for part in name.split("_"))
        made = scheduler(windows=windows, steps=steps, fewer_steps="clamp")
        assert made.timesteps.dtype == torch.int64 and made.timesteps.tolist() == expected, name


@pytest.mark.parametrize(
    ("windows", "steps", "at", "expected"),
    [
        (1, 20, (7, 11), [649, 449]),  # the original's truncation of 650 and 450
        (2, 10, (8, 9), [199, 99]),
        (3, 13, (3,), [799]),
        (3, 3, (0, 1, 2), [1000, 666, 333]),
        (5, 5, (0, 1, 2, 3, 4), [1000, 800, 600, 400, 200]),
    ],
)
def test_timesteps_are_truncated_where_the_original_truncates(windows, steps, at, expected):
    assert scheduler(windows=windows, steps=steps).timesteps[list(at)].tolist() == expected


@goldens.needs_goldens
def test_windows_hold_the_timesteps_that_they_hold_in_the_original():
    runs = {**scalars()["window_runs"], "w3": [[1, 333, 1 / 3, 0], [334, 666, 2 / 3, 1 / 3], [667, 1000, 1, 2 / 3]]}
    for name, windows in runs.items():
        bounds = piecewise.window_bounds(int(name[1:]))
        for first, last, start, end in windows:
            # As integers divided, and as training has them: in float32.
            for t in (torch.arange(first, last + 1) / 1000, torch.arange(first, last + 1, dtype=torch.float64) / 1000):
                found = piecewise.windows_of(t, bounds)
                assert all(
                    torch.allclose(f, torch.tensor(v).double()) for f, v in zip(found, (start, end), strict=True)
                )


@goldens.needs_goldens
def test_noise_levels_are_looked_up_where_the_original_looks_them_up():
    marginal = scheduler()._marginal
    for name, golden_window in scalars()["window_alpha"].items():
        bounds = piecewise.window_bounds(int(name[1]))
        start, end = piecewise.windows_of(torch.tensor(int(name.split("_t")[1]) / 1000), bounds)
        for t, key in ((start, "abar_start"), (end, "abar_end")):
            signal, noise = marginal.levels(t)
            assert signal**2 == pytest.approx(
                golden_window[key], rel=FLOAT64
            ) and signal**2 + noise**2 == pytest.approx(1)
        gamma = 1 / piecewise.window_map(start, end, marginal, "diff_eps")[0]
        assert gamma == pytest.approx(golden_window["gamma"], rel=FLOAT32)
    thirds = piecewise.window_bounds(3)
    assert marginal.index(thirds).tolist() == [999, 665, 332, 0]


@goldens.needs_goldens
def test_noise_schedules_are_those_of_the_original():
    for index, value in scalars()["alphas_cumprod_at"].items():
        assert scheduler().alphas_cumprod[int(index)] == value
    for name, config in (("linear", dict(beta_start=1e-4, beta_end=0.02)), ("squaredcos_cap_v2", {})):
        made = scheduler(beta_schedule=name, **config).alphas_cumprod[[0, 1, 10, 249, 499, 749, 998, 999]]
        assert goldens.relative_error(made, golden()[f"alphas_cumprod.{name}"]) < FLOAT32


@goldens.needs_goldens
@pytest.mark.parametrize("kind", KINDS)
def test_trajectories_are_those_of_the_original(kind):
    cases = [key for key in golden() if key.startswith(f"traj.{kind}.")]
    assert len(cases) == 9
    for case in cases:
        windows, steps = (int(part[1:]) for part in case.split(".")[2:])
        made = sampled(scheduler(kind, windows, steps, fewer_steps="clamp"), golden()["x_init"])
        assert goldens.relative_error(made, golden()[case]) < len(made) * FLOAT32, case


@goldens.needs_goldens
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_from_any_timestep_is_that_of_the_original(kind):
    output, sample = golden()["single.model_output"], golden()["single.sample"]
    variants = {"": dict(steps=8)}
    if kind == "diff_eps":
        variants[".linear"] = dict(steps=4, beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
        variants[".squaredcos_cap_v2"] = dict(steps=4, beta_schedule="squaredcos_cap_v2")
    for variant, config in variants.items():
        made = scheduler(kind, **config)
        steps = torch.stack([made.step(output, t, sample).prev_sample for t in made.timesteps])
        assert goldens.relative_error(steps, golden()[f"single.{kind}{variant}.prev"]) < FLOAT32, variant


@goldens.needs_goldens
@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision_steps_are_nearer_to_exact_than_the_original(name, dtype):
    output, sample = (golden()[key].to(dtype) for key in ("single.model_output", "single.sample"))
    made = scheduler(steps=8)

    def steps(widen):
        return torch.stack([made.step(widen(output), t, widen(sample)).prev_sample for t in made.timesteps])

    exact, ours = steps(torch.Tensor.double), steps(torch.Tensor.contiguous)
    assert ours.dtype == dtype
    error = goldens.relative_error(ours, exact)
    assert error <= goldens.relative_error(golden()[f"single.ddim_eps.{name}.prev"], exact)
    assert error < torch.finfo(dtype).eps


@goldens.needs_goldens
@pytest.mark.parametrize(("kind", "scale"), [("ddim_eps", 2.0), ("diff_eps", 4.5), ("velocity", 7.5)])
def test_guided_samples_are_those_of_the_original(kind, scale):
    def guided(x, t):
        without = network(x, t, -0.05)
        return without + scale * (network(x, t, 0.1) - without)

    made = sampled(scheduler(kind, steps=6), golden()["x_init"], guided)[-1]
    # Guidance multiplies each rounding of a network's output.
    assert goldens.relative_error(made, golden()[f"cfg.{kind}.g{scale}.n6.final"]) < 6 * scale * FLOAT32


@goldens.needs_goldens
def test_noise_is_added_as_in_the_original_except_at_zero():
    clean, noise, t, expected = (golden()[f"add_noise.{key}"] for key in ("clean", "noise", "t", "out"))
    assert goldens.relative_error(scheduler().add_noise(clean, noise, t), expected) < FLOAT32
    with pytest.raises(ValueError, match=r"above 0 and at most 1000, got \[1, 0\]"):
        scheduler().add_noise(clean[:2], noise[:2], torch.tensor([1, 0]))


@goldens.needs_goldens
def test_defaults_are_those_of_the_original():
    ours = scheduler().config
    # set_alpha_to_one has no effect in the original; here it is among the keys that are kept and have none.
    for key, value in scalars()["defaults"].items():
        assert key == "set_alpha_to_one" or ours[key] == value, key
    PeRFlowScheduler.from_config(scalars()["defaults"])


# ---------------------------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("windows", [1, 2, 4, 8, 20])
def test_a_step_for_each_window_is_ddim_for_an_untuned_model(windows):
    ddim = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    ddim.set_timesteps(windows)
    made, x = scheduler(windows=windows, steps=windows), some(dtype=torch.float32)

    def model(x, t):
        return torch.tanh(0.7 * x + 0.001 * float(t))

    expected = x
    for t in made.timesteps:
        expected = ddim.step(model(expected, t), int(t) - 1, expected).prev_sample
    assert goldens.relative_error(sampled(made, x, model)[-1], expected) < windows * 4 * FLOAT32


@pytest.mark.parametrize("make", [*(pytest.param(lambda k=k: scheduler(k, 3, 9), id=k) for k in KINDS), flow])
def test_perfect_output_stays_on_the_chord_and_says_where_it_leads(make):
    """From every timestep of every window: to the chord's next point or its end, to its end, and to the data."""
    made = make()
    made.set_timesteps(12)
    clean, noise = some(seed=1), some(seed=2)
    marginal = made._marginal
    points = made.timesteps.tolist()
    for t, following in zip(points, [*points[1:], 0], strict=True):
        here, after = (torch.tensor(x / 1000, dtype=torch.float64) for x in (t, following))
        start, end = piecewise.windows_of(here, made._bounds)
        z_start, z_end = marginal.noised(clean, noise, start), marginal.noised(clean, noise, end)
        p, q = piecewise.target_coefficients(start, end, marginal, made.config.prediction_type)
        output = p * z_start + q * z_end

        def chord(at, start=start, end=end, z_start=z_start, z_end=z_end):
            return z_start + (at - start) / (end - start) * (z_end - z_start)

        out = made.step(output, t, chord(here))
        assert goldens.relative_error(out.prev_sample, chord(after)) < FLOAT64
        assert goldens.relative_error(out.pred_window_end, z_end) < FLOAT64
        assert goldens.relative_error(out.pred_original_sample, clean) < FLOAT64


@pytest.mark.parametrize("kind", KINDS)
def test_timesteps_may_be_numbers_or_tensors_and_steps_leave_no_memory(kind):
    made, x, output = scheduler(kind, steps=8), some(), some(seed=1)
    t = torch.tensor([625, 1000, 125])
    together = made.step(output, t, x)
    for row, one in enumerate(t.tolist()):
        rows = slice(row, row + 1)
        for form in (one, float(one), t[row], t[rows], t[row].float()):
            alone = made.step(output[rows], form, x[rows])
            assert all(torch.equal(alone[key], together[key][rows]) for key in alone)
    assert torch.equal(made.step(output, 625, x, return_dict=False)[0][0], together.prev_sample[0])
    assert torch.equal(made.step(output, 625, x, return_dict=False)[1][0], together.pred_original_sample[0])


def test_flow_matching_without_training_is_eulers_method():
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler.set_timesteps(sigmas=numpy.linspace(1, 1 / 8, 8))
    # Eight windows that are shifted as the model's noise levels are.
    made, x = flow(8, 8, window_shift=3.0), some(dtype=torch.float32)
    assert torch.allclose(made.timesteps, euler.timesteps)
    expected = x
    for t in euler.timesteps:
        expected = euler.step(torch.tanh(expected + t / 1000), t, expected).prev_sample
    ours = sampled(made, x, lambda x, t: torch.tanh(x + t / 1000))[-1]
    assert goldens.relative_error(ours, expected) < 8 * FLOAT32
    t = torch.tensor([1000.0, 123.4, 1.0])
    noised = made.scale_noise(x, t, 2 * x)
    assert torch.allclose(noised, x * (1 + t.view(-1, 1, 1, 1) / 1000))


# ----------------------------------------------------------------------------------------------------------- timesteps


def test_fewer_steps_than_windows_are_refused_unless_clamped():
    with pytest.raises(ValueError, match=r"at least the number of windows, 4, got 3.*clamp"):
        scheduler(steps=3)
    assert scheduler(steps=1, fewer_steps="clamp").timesteps.tolist() == [1000, 750, 500, 250]


def test_custom_timesteps_are_used_and_must_not_cross_windows():
    made = scheduler()
    made.set_timesteps(timesteps=[900, 750, 500, 490, 250, 3])
    assert made.timesteps.tolist() == [900, 750, 500, 490, 250, 3] and made.num_inference_steps == 6
    made.set_timesteps(timesteps=torch.tensor([200, 100]))
    assert made.timesteps.tolist() == [200, 100]
    with pytest.raises(ValueError, match=r"must contain \[500\].*clamp.*got \[900, 750, 250\]"):
        made.set_timesteps(timesteps=[900, 750, 250])
    made = scheduler(fewer_steps="clamp")
    made.set_timesteps(timesteps=[900, 750, 100])
    assert made.timesteps.tolist() == [900, 750, 500, 250, 100]
    made = flow()
    made.set_timesteps(sigmas=[1.0, 0.75, 0.6, 0.5, 0.25])
    assert made.timesteps.tolist() == [1000, 750, 600, 500, 250]
    made.set_timesteps(sigmas=numpy.linspace(1, 1 / 6, 6), mu=0.9)
    assert made.timesteps.tolist() == [1000, 875, 750, 625, 500, 250]


@pytest.mark.parametrize(
    ("windows", "steps", "begin", "expected"),
    [
        (4, 8, 2, [750, 625, 500, 375, 250, 125]),  # a start: nothing to do
        (4, 8, 3, [500, 416, 333, 250, 125]),  # 625: 750 and 500 are equally near, the less noisy is taken
        (4, 10, 1, [1000, 916, 833, 750, 625, 500, 375, 250, 125]),  # 916
        (4, 8, 7, [250]),  # 125: the last start, although 0 is as near
        (4, 5, 1, [750, 625, 500, 250]),  # 875
        (2, 3, 1, [500, 250]),  # 750
        (1, 8, 4, [1000, 750, 500, 250]),  # there is one start
        (3, 6, 1, [666, 555, 444, 333, 166]),  # 833
    ],
)
def test_a_run_that_begins_later_begins_at_the_start_of_a_window(windows, steps, begin, expected):
    made = scheduler(windows=windows, steps=steps)
    before, held = made.timesteps.tolist(), made.timesteps[begin:]
    made.set_begin_index(begin)
    assert held.tolist() == expected and made.timesteps.tolist() == before[:begin] + expected
    made.step(some(), expected[0], some())


def test_a_snapped_run_has_a_step_for_each_window():
    made = scheduler()
    made.set_timesteps(timesteps=[950, 750, 500, 250])
    made.set_begin_index(0)
    assert made.timesteps.tolist() == [950, 750, 500, 250]  # what was asked for
    made.set_timesteps(timesteps=[1000, 990, 900, 750, 500, 250])
    made.set_begin_index(2)
    assert made.timesteps.tolist() == [1000, 990, 1000, 750, 500, 250]
    made.set_timesteps(5)
    made.set_begin_index(5)
    assert made.timesteps.tolist() == [1000, 875, 750, 500, 250]


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(prediction_type="epsilon"), "must be one of ddim_eps, diff_eps, velocity, got 'epsilon'"),
        (dict(num_time_windows=0), "num_time_windows must be between 1 and 1000, got 0"),
        (dict(num_time_windows=600), "rise in every window"),
        (dict(fewer_steps="ignore"), "fewer_steps must be one of raise, clamp, got 'ignore'"),
        (dict(beta_schedule="sigmoid"), "beta_schedule must be one of linear.*got 'sigmoid'"),
        (dict(trained_betas=[0.1, 0.2]), "trained_betas must be 1000 numbers, got 2"),
        (dict(t_clean=0.1), "t_noise=1, t_clean=0.1"),
        (dict(use_flow_sigmas=True), "needs prediction_type=\"velocity\", got 'ddim_eps'"),
        (dict(window_shift=3.0), "window_shift is for flow matching.*got 3.0"),
        (dict(prediction_type="velocity", use_flow_sigmas=True, window_shift=0.0), "shift > 0"),
        (dict(rescale_betas_zero_snr=True), "signal level must be positive"),
    ],
)
def test_settings_that_mean_nothing_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        PeRFlowScheduler(**config)


def test_zero_terminal_snr_serves_velocity():
    made = scheduler("velocity", steps=4, rescale_betas_zero_snr=True)
    out = made.step(some(), 1000, some(seed=1))
    assert all(torch.isfinite(value).all() for value in out.values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(), "expected one of num_inference_steps, timesteps and sigmas"),
        (dict(num_inference_steps=4, timesteps=[1000]), "expected one of"),
        (dict(num_inference_steps=0), "at least 1, got 0"),
        (dict(num_inference_steps=1500), "1500 is too many"),
        (dict(timesteps=[]), "at least one"),
        (dict(timesteps=[750, 750, 500, 250]), "falling integers"),
        (dict(timesteps=[999.5, 750, 500, 250]), "falling integers"),
        (dict(timesteps=[1001, 750, 500, 250]), "at most 1000, got 1001"),
        (dict(timesteps=[250, 0]), "above 0 and at most 1000, got 250.0 to 0.0"),
        (dict(sigmas=[1.0, 0.5]), "sigmas are for flow matching"),
    ],
)
def test_timesteps_that_mean_nothing_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        scheduler().set_timesteps(**call)


def test_steps_that_mean_nothing_are_refused():
    x = some()
    with pytest.raises(ValueError, match="call set_timesteps first"):
        scheduler().step(x, 1000, x)
    made = scheduler(steps=4)
    for t in (999, 0, 750.5, torch.tensor(1)):
        with pytest.raises(ValueError, match=r"must be one of \[1000, 750, 500, 250\], got"):
            made.step(x, t, x)
    with pytest.raises(ValueError, match="one number or 3, got"):
        made.step(x, torch.tensor([1000, 750]), x)
    with pytest.raises(ValueError, match=r"same shape, got \(3, 8, 4, 4\) and \(3, 4, 4, 4\)"):
        made.step(torch.cat([x, x], 1), 1000, x)
    with pytest.raises(ValueError, match="between 0 and 4, got 5"):
        made.set_begin_index(5)
    with pytest.raises(ValueError, match="must be integers"):
        made.add_noise(x, x, torch.tensor([1.5]))


# ------------------------------------------------------------------------------------------------------------ pipelines


def test_config_is_saved_and_loaded(tmp_path):
    made = scheduler("velocity", 3, trained_betas=numpy.linspace(0.001, 0.02, 1000), fewer_steps="clamp")
    made.save_pretrained(tmp_path)
    loaded = PeRFlowScheduler.from_pretrained(tmp_path)
    assert loaded.config.prediction_type == "velocity" and loaded.config.num_time_windows == 3
    assert torch.equal(loaded.alphas_cumprod, made.alphas_cumprod)
    assert len(loaded) == 1000


@pytest.mark.parametrize(
    "cls", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_config_of_another_scheduler_gives_the_same_noise(cls):
    noise = dict(beta_start=0.001, beta_end=0.01, beta_schedule="linear", timestep_spacing="leading")
    other = getattr(diffusers, cls)(**noise, prediction_type="epsilon")
    made = PeRFlowScheduler.from_config(other.config, prediction_type="diff_eps", num_time_windows=2)
    assert torch.equal(made.alphas_cumprod, other.alphas_cumprod)
    assert made.config.num_time_windows == 2 and made.config.timestep_spacing == "leading"
    with pytest.raises(ValueError, match="got 'epsilon': pass what the student was trained with"):
        PeRFlowScheduler.from_config(other.config)


def with_perflow(pipe, kind="ddim_eps", **config):
    pipe.scheduler = PeRFlowScheduler.from_config(pipe.scheduler.config, prediction_type=kind, **config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, network="unet", **call):
    """The latents of a call, and the timesteps that the network was told."""
    told = []
    hook = getattr(pipe, network).register_forward_pre_hook(
        lambda _module, args, kwargs: told.append(
            float((args[1] if len(args) > 1 else kwargs["timestep"]).flatten()[0])
        ),
        with_kwargs=True,
    )
    call = {"prompt": "a <thing> in the snow", "guidance_scale": 3.0, **call}
    try:
        latents = pipe(generator=torch.Generator().manual_seed(0), output_type="latent", **call).images
    finally:
        hook.remove()
    assert torch.isfinite(latents).all()
    return latents, told


def picture(**size):
    return torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(3))


def test_text_to_image_of_an_untuned_model_is_ddim_at_the_same_noise():
    pipe = with_perflow(tiny_pipeline("sd15"))
    start = some((1, 4, 16, 16), dtype=torch.float32)
    latents, told = draw(pipe, num_inference_steps=4, latents=start)
    assert told == [1000, 750, 500, 250]
    text, empty = pipe.encode_prompt("a <thing> in the snow", "cpu", 1, True)
    ddim = diffusers.DDIMScheduler.from_config(
        {**pipe.scheduler.config, "prediction_type": "epsilon"}, clip_sample=False
    )
    ddim.set_timesteps(4)
    x = start
    for t in told:
        with torch.no_grad():
            without, towards = (pipe.unet(x, int(t), prompt).sample for prompt in (empty, text))
        x = ddim.step(without + 3.0 * (towards - without), int(t) - 1, x).prev_sample
    # Two samples in one batch or one by one: what that changes in the network, guidance and four steps multiply.
    assert goldens.relative_error(latents, x) < 1e-5


@pytest.mark.parametrize(("family", "kind"), [("sd21", "velocity"), ("sdxl", "ddim_eps"), ("sd15", "diff_eps")])
def test_text_to_image_of_every_family(family, kind):
    pipe = with_perflow(tiny_pipeline(family), kind)
    assert draw(pipe, num_inference_steps=6)[1] == [1000, 875, 750, 625, 500, 250]
    timesteps = [1000, 750, 700, 500, 250]
    assert draw(pipe, timesteps=timesteps)[1] == timesteps


PICTURE_TO_PICTURE = {
    "sd15 img2img": ("sd15", "StableDiffusionImg2ImgPipeline"),
    "sd15 inpainting": ("sd15", "StableDiffusionInpaintPipeline"),
    "sd15 ControlNet img2img": ("sd15", "StableDiffusionControlNetImg2ImgPipeline"),
    "sdxl img2img": ("sdxl", "StableDiffusionXLImg2ImgPipeline"),
    "sdxl inpainting": ("sdxl", "StableDiffusionXLInpaintPipeline"),
}


@pytest.mark.parametrize("family, cls", PICTURE_TO_PICTURE.values(), ids=PICTURE_TO_PICTURE)
@pytest.mark.parametrize(
    "strength, expected", [(1.0, [1000, 875, 750, 500, 250]), (0.8, [750, 625, 500, 250]), (0.2, [250])]
)
def test_strength_below_one_begins_at_the_start_of_a_window(family, cls, strength, expected, monkeypatch):
    text_to_image = tiny_pipeline(family)
    parts, call = text_to_image.components, {}
    if "ControlNet" in cls:
        parts["controlnet"] = control_net(text_to_image.unet)
        call["control_image"] = picture()
    if "Inpaint" in cls:
        call["mask_image"] = torch.ones(1, 1, IMAGE_SIZE, IMAGE_SIZE)
    pipe = with_perflow(getattr(diffusers, cls)(**parts))
    noised_to = []
    add_noise = PeRFlowScheduler.add_noise

    def watched(self, clean, noise, timesteps):
        noised_to.append(timesteps.tolist())
        return add_noise(self, clean, noise, timesteps)

    monkeypatch.setattr(PeRFlowScheduler, "add_noise", watched)
    _, told = draw(pipe, image=picture(), num_inference_steps=5, strength=strength, **call)
    assert told == expected
    # At strength 1 inpainting begins with noise alone.
    if strength < 1 or "Inpaint" not in cls:
        assert noised_to[0] == expected[:1]


def control_net(unet):
    torch.manual_seed(0)
    return diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8)).eval()


def test_control_net_draws():
    pipe = tiny_pipeline("sd15")
    parts = {**pipe.components, "controlnet": control_net(pipe.unet)}
    pipe = with_perflow(diffusers.StableDiffusionControlNetPipeline(**parts), "diff_eps")
    assert draw(pipe, image=picture(), num_inference_steps=4)[1] == [1000, 750, 500, 250]


def test_pipeline_is_saved_and_loaded_with_its_scheduler(tmp_path):
    pipe = with_perflow(tiny_pipeline("sd15"), "diff_eps", num_time_windows=2)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is PeRFlowScheduler
    assert torch.equal(draw(loaded, num_inference_steps=2)[0], draw(pipe, num_inference_steps=2)[0])


def flux_parts():
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        axes_dims_rope=(4, 2, 2),
    ).eval()
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    vae = tiny_pipeline("sd15").vae
    vae.register_to_config(shift_factor=0.0)
    return {**parts, "vae": vae, "transformer": transformer, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}


def test_flux_draws_and_without_training_is_eulers_method():
    words = {
        "prompt": None,
        "prompt_embeds": some((1, 5, TEXT_DIM), dtype=torch.float32),
        "pooled_prompt_embeds": some((1, TEXT_DIM), dtype=torch.float32),
        "height": IMAGE_SIZE,
        "width": IMAGE_SIZE,
    }
    pipe = diffusers.FluxPipeline(**flux_parts())
    pipe.set_progress_bar_config(disable=True)
    euler, _ = draw(pipe, "transformer", num_inference_steps=8, **words)
    with_perflow(pipe, "velocity", use_flow_sigmas=True)
    ours, told = draw(pipe, "transformer", num_inference_steps=8, **words)
    assert told == [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    # Both make the same eight steps; the last figures of the timesteps differ.
    assert goldens.relative_error(ours, euler) < 1e-5
    again = diffusers.FluxImg2ImgPipeline(**pipe.components)
    again.set_progress_bar_config(disable=True)
    _, told = draw(again, "transformer", image=picture(), strength=0.8, num_inference_steps=5, **words)
    assert told == [0.75, 0.625, 0.5, 0.25]


def test_import_needs_torch_only():
    code = (
        "import sys, linattn, linattn.schedulers.piecewise\n"
        "print([name for name in ('diffusers', 'transformers', 'safetensors') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
