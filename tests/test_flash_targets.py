"""Flash Diffusion: what the student learns from, against the original's goldens and against exactly known processes."""

import collections
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers", reason='distillation needs the extra: pip install "linattn[train]"')

from helpers import goldens

from linattn.distill.denoiser import recorded_outputs
from linattn.distill.noise_process import Grid, NoiseProcess, clean_of, noise_of, prediction_of
from linattn.distill.objectives import flash
from linattn.distill.objectives.perflow import teacher_of

pytestmark = pytest.mark.usefixtures("one_thread_in_module")

# Relative, of one rounding: between two orders of float32 arithmetic, and in float64.
FLOAT32, FLOAT64 = 2.0**-23, 1e-12

STABLE_DIFFUSION = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, steps_offset=1
)


@functools.cache
def diffusion(prediction_type="epsilon"):
    return NoiseProcess.from_scheduler(STABLE_DIFFUSION, prediction_type=prediction_type)


def zero_terminal_snr():
    config = {**STABLE_DIFFUSION, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    return NoiseProcess.from_scheduler(config)


@functools.cache
def scalars():
    return json.loads(goldens.path("flashdiff", "scalars.json").read_text())


def elementary():
    return goldens.load("flashdiff", "elementary")[0]


def rows(values, like):
    return values.view(-1, *[1] * (like.ndim - 1))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --------------------------------------------------------------------------------------- against the original: one step


class Network:
    """The goldens' denoiser g tanh(a x + b t / 1000 + C), and the features that its discriminator sees."""

    def __init__(self, a_b_g, *, flow=False, learns=False):
        self.parameters = torch.tensor(a_b_g, dtype=torch.float64, requires_grad=learns)
        self.flow = flow

    def __call__(self, noisy, timesteps, condition):
        a, b, g = self.parameters
        text = condition["text"].mean((1, 2)) + 0.1 * condition["pooled"].mean(1)
        for name, factor in (("lowres", 0.05), ("wide", 1), ("narrow", 1)):
            if name in condition:
                text = text + factor * condition[name].mean((1, 2, 3))
        return g * torch.tanh(a * noisy + rows(b * timesteps.double() / 1000 + text, noisy))

    def features(self, noisy, timesteps, condition):
        if self.flow:
            return self(noisy, timesteps, condition)
        added = 0.1 * timesteps.double() / 1000 + condition["text"].mean((1, 2))
        for name in ("wide", "narrow"):
            if name in condition:
                added = added + condition[name].mean((1, 2, 3))
        wave = 0.5 * (self.parameters[0] * noisy).cos() + rows(added, noisy)
        return F.avg_pool2d(torch.cat([noisy.sin(), wave], 1), 2)


def discriminate(weights, features):
    hidden = F.silu(F.conv2d(features, weights["0.weight"], stride=2, padding=1))
    return F.conv2d(hidden, weights["2.weight"]).flatten(1)


class AsMultistepSolversAddNoise(NoiseProcess):
    """Noise as DPMSolverMultistepScheduler adds it: to a timestep that is not in its list, that of the last entry."""

    listed = ()

    def add_noise(self, clean, noise, timesteps):
        known = torch.isin(timesteps, self.listed)
        return super().add_noise(clean, noise, torch.where(known, timesteps, self.listed[-1]))


class Case:
    """One training step of the original, of its stored inputs and random numbers, by the functions of `flash`.

    In float64, so that what differs is the rounding of the goldens.
    """

    def __init__(self, golden, settings, student, teacher, condition, absent, features=None):
        self.golden, self.settings, self.student, self.teacher = golden, settings, student, teacher
        self.condition, self.absent, self.features = condition, absent, features or teacher.features
        draws = [golden[key] for key in sorted(golden) if key.startswith("rng.") and not key.endswith("prob")]
        self.noise, self.index, self.uniform = draws[0].double(), draws[1], draws[2].double()
        self.dmd_draws = draws[3:6] if settings["use_dmd"] else None
        self.gan_noise, self.gan_level = draws[-2].double(), draws[-1]
        self.probabilities = next(golden[key] for key in sorted(golden) if key.endswith("prob"))
        scheduler, steps = settings["scheduler"], settings["K"][settings["phase"]]
        if scheduler == "flow":
            self.process = NoiseProcess(shift=settings["flow_shift"])
            self.grid = self.process.grid(steps, spacing="euler")
        elif scheduler == "ddim":
            self.process = diffusion()
            self.grid = self.process.grid(steps, end="least_noisy")
        else:
            self.process = AsMultistepSolversAddNoise(diffusion().alphas_cumprod)
            self.grid = self.process.grid(steps)
            self.process.listed = self.grid.timesteps
        self.phase = flash.Phases.of(
            steps=settings["num_iterations_per_K"],
            grid_steps=settings["K"],
            guidance=(settings["guidance_min"], settings["guidance_max"]),
            distribution=settings["timestep_distribution"],
            weights=settings["mode_probs"] or [1.0] * settings["mixture_num_components"],
            variance=settings["mixture_var"],
            distillation=settings["distill_scale"],
            dmd=settings["dmd_scale"] if settings["use_dmd"] else 0,
            adversarial=settings["adversarial_scale"],
        ).at(settings["forward_call"])

    def guided(self, uniform):
        return teacher_of(self.teacher, self.condition, self.absent, self.phase.guidance_of(uniform))

    def run(self):
        z, n = self.golden["z"].double(), len(self.golden["z"])
        self.noisy = flash.noised_start(z, self.noise, self.index, self.grid)
        t = self.grid.timesteps[self.index].expand(n)
        said = self.student(self.noisy, t, self.condition)
        self.output = self.process.clean(said, self.noisy, t)
        if not self.process.is_flow:
            self.output = flash.at_boundary(self.output, self.noisy, t)
        kind = self.process.prediction_type
        order = 2 if self.settings["scheduler"] == "dpm" else 1
        teacher = self.guided(self.uniform)
        self.target = flash.rollout(teacher, self.noisy, self.index, self.grid, prediction_type=kind, order=order)
        losses = {"distill": flash.distillation_loss(self.output, self.target, self.settings["distill_type"])}
        losses["dmd"] = self.dmd() if self.settings["use_dmd"] else None
        losses["gan_G"], losses["gan_D"] = self.adversarial(z)
        generators_turn = self.settings["step"] % 2 == 0
        losses["gan_D" if generators_turn else "gan_G"] = torch.zeros(())
        losses["total_G"] = self.phase.total(losses["distill"], losses["dmd"], losses["gan_G"])
        losses["total_D"] = losses["gan_D"]
        return losses

    def dmd(self):
        noise, number, uniform = (draw.double() for draw in self.dmd_draws)
        teacher, fake = self.guided(uniform), lambda x, t: self.student(x, t, self.condition)
        if not self.process.is_flow:
            return flash.distribution_matching(self.output, noise, number.long(), teacher, fake, self.process)
        # The original takes velocities for clean samples: see the next but one test.
        t = self.process.timesteps_of(1000 - number)
        with torch.no_grad():
            noisy = self.process.add_noise(self.output, noise, t)
            real, fake = teacher(noisy, t), fake(noisy, t)
        return flash.dmd_loss(self.output, real, real + (real - fake))

    def adversarial(self, z):
        # In the middle of the numbers that choose this level.
        t = flash.adversarial_timesteps((self.gan_level + 0.5) / 4, self.process)
        real = self.target if self.settings["use_teacher_as_real"] else z
        fake, real = (self.process.add_noise(x, self.gan_noise, t) for x in (self.output, real))
        weights = {k.removeprefix("disc."): v.double() for k, v in self.golden.items() if k.startswith("disc.")}
        self.weights = {name: value.requires_grad_() for name, value in weights.items()}
        logits = [discriminate(self.weights, self.features(x, t, self.condition)) for x in (real, fake)]
        kind = self.settings["gan_type"]
        # The student's turn trains the student alone, the discriminator's the discriminator.
        if self.settings["step"] % 2:
            logits[1] = discriminate(self.weights, self.features(fake.detach(), t, self.condition))
        return flash.generator_loss(kind, logits[1]), flash.discriminator_loss(kind, *logits)


def analytic_case(number):
    tensors, _ = goldens.load("flashdiff", "train_step")
    golden = {key.removeprefix(f"{number}."): v for key, v in tensors.items() if key.startswith(f"{number}.")}
    settings = scalars()["cases"][number]
    student = Network(scalars()["student_a_b_g"], flow=settings["flow_matching"], learns=True)
    teacher = Network(scalars()["teacher_a_b_g"], flow=settings["flow_matching"])
    if settings["flow_matching"]:
        condition, absent = ({"text": golden[f"{x}e"], "pooled": golden[f"{x}po" if x == "n" else "po"]} for x in "pn")
        absent = flash.unconditional(condition, absent)
    else:
        condition = {name: golden[name] for name in ("text", "pooled", "lowres") if name in golden}
        if settings["adapter"]:
            condition |= {"wide": 0.8 * 0.5 * golden["edge"], "narrow": 0.8 * 0.25 * F.avg_pool2d(golden["edge"], 2)}
        absent = flash.unconditional(condition, dict.fromkeys(condition, "keep") | {"text": "zero"})
    condition, absent = ({name: v.double() for name, v in part.items()} for part in (condition, absent))
    return Case(golden, settings, student, teacher, condition, absent)


def check(case, losses, tolerance):
    """Samples by their norm, losses by their value; both are of float32."""
    golden = case.golden
    for name, made in (("noisy_sample", case.noisy), ("student_output", case.output), ("teacher_output", case.target)):
        assert goldens.relative_error(made, golden[name]) < tolerance, name
    for name, loss in losses.items():
        key = name if name.startswith("total") else f"loss_{name}"
        expected = case.settings[key]
        if expected is None:
            assert loss is None, name
        else:
            assert loss.item() == pytest.approx(expected, rel=4 * tolerance), name


CASES = [f"{i:02d}" for i in range(20) if i not in (15, 16)]


@goldens.needs_goldens
@pytest.mark.parametrize("number", CASES)
def test_training_step_is_that_of_the_original(number):
    case = analytic_case(number)
    assert goldens.relative_error(case.phase.probabilities(), case.probabilities) < 4 * FLOAT32
    assert case.index.item() == case.settings["start_idx"]
    told = case.grid.timesteps[case.settings["start_idx"]].item()
    assert told == pytest.approx(case.settings["start_timestep"], rel=FLOAT32)
    losses = case.run()
    check_case(case, losses)


def check_case(case, losses):
    # A rounding for each of the teacher's steps, which guidance multiplies.
    tolerance = len(case.grid.timesteps) * case.settings["guidance_max"] * FLOAT32
    check(case, losses, tolerance)
    if "grad_student_a_b_g" in case.golden:
        (gradient,) = torch.autograd.grad(losses["total_G"], case.student.parameters)
        assert goldens.relative_error(gradient, case.golden["grad_student_a_b_g"]) < 4 * tolerance
    else:
        gradients = torch.autograd.grad(losses["total_D"], list(case.weights.values()))
        for name, gradient in zip(case.weights, gradients, strict=True):
            assert goldens.relative_error(gradient, case.golden[f"grad_disc.{name}"]) < 4 * tolerance, name


@goldens.needs_goldens
@pytest.mark.parametrize("number", ["15", "16"])
def test_legacy_parity_with_a_multistep_solver_that_adds_the_wrong_noise(number):
    """What the original trains with as it is shipped. Not a way that `flash` has: see `AsMultistepSolversAddNoise`."""
    case = analytic_case(number)
    check_case(case, case.run())


@goldens.needs_goldens
def test_matching_of_flows_compares_clean_samples_and_not_velocities():
    """x_0 = y - sigma v, so fake - real = sigma (v_real - v_fake): the original has neither the sigma nor the x_0."""
    case = analytic_case("17")
    case.run()
    noise, number, uniform = (draw.double() for draw in case.dmd_draws)
    t = case.process.timesteps_of(1000 - number)
    teacher, fake = case.guided(uniform), lambda x, t: case.student(x, t, case.condition)
    loss = flash.distribution_matching(case.output, noise, t, teacher, fake, case.process)
    with torch.no_grad():
        sigma = rows(t / 1000, noise)
        noisy = (1 - sigma) * case.output + sigma * noise
        real = noisy - sigma * teacher(noisy, t)
        difference = sigma * (teacher(noisy, t) - fake(noisy, t))
        weight = 1 / ((case.output - real).abs().mean((1, 2, 3), keepdim=True) + 1e-5)
    torch.testing.assert_close(loss, ((weight * difference) ** 2).mean())


@goldens.needs_goldens
@pytest.mark.parametrize("step", [0, 1])
def test_training_step_of_a_unet_is_that_of_the_original(step):
    """A conditional model of diffusers: low resolution beside the sample, features after the middle block."""
    from diffusers import UNet2DConditionModel

    tensors, _ = goldens.load("flashdiff", "unet_case")
    stored = scalars()["unet_case"]
    config = {**stored["unet"]}
    config |= {f"{side}_block_types": tuple(config.pop(side)) for side in ("down", "up")} | {"out_channels": 4}
    golden = {key.removeprefix(f"step{step}."): v for key, v in tensors.items() if key.startswith(f"step{step}.")}
    golden |= {key: v for key, v in tensors.items() if key.startswith("disc.")} | {"z": tensors["batch.image"]}

    def network(name):
        model = UNet2DConditionModel(**config).double().requires_grad_(name == "student")
        weights = {key.removeprefix(f"{name}."): v for key, v in tensors.items() if key.startswith(f"{name}.")}
        model.load_state_dict(weights)
        return model

    student, teacher = network("student"), network("teacher")

    def denoiser(model):
        def call(noisy, timesteps, condition):
            noisy = torch.cat([noisy, condition["lowres"]], 1)
            return model(noisy, timesteps, condition["text"], class_labels=condition["pooled"], return_dict=False)[0]

        return call

    def features(noisy, timesteps, condition):
        with recorded_outputs(teacher, ["mid_block"]) as outputs:
            denoiser(teacher)(noisy, timesteps, condition)
        return outputs["mid_block"]

    condition = {name: tensors[f"batch.{name}"].double() for name in ("text", "pooled", "lowres")}
    absent = flash.unconditional(condition, {"text": "zero", "pooled": "keep", "lowres": "keep"})
    settings = dict(scheduler="ddim", K=[4], num_iterations_per_K=[10], phase=0, forward_call=0, step=step)
    settings |= dict(use_dmd=True, use_teacher_as_real=False, distill_type="l2", gan_type="lsgan", mode_probs=None)
    settings |= dict(distill_scale=[1.0], dmd_scale=[0.5], adversarial_scale=[0.3], mixture_num_components=4)
    settings |= dict(guidance_min=3.0, guidance_max=7.0, timestep_distribution="mixture", mixture_var=0.5)
    case = Case(golden, settings, denoiser(student), denoiser(teacher), condition, absent, features)
    losses = case.run()
    results = stored[f"step{step}"]
    settings |= {key if key.startswith("total") else f"loss_{key}": v for key, v in results.items()}
    # Networks of about twenty layers, where the analytic ones have one.
    tolerance = 4 * 7 * 20 * FLOAT32
    check(case, losses, tolerance)
    if step == 0:
        expected = {key.removeprefix("grad."): v for key, v in golden.items() if key.startswith("grad.")}
        parameters = dict(student.named_parameters())
        gradients = torch.autograd.grad(losses["total_G"], [parameters[name] for name in expected])
        assert len(expected) == 4
        for name, gradient in zip(expected, gradients, strict=True):
            assert goldens.relative_error(gradient, expected[name]) < 4 * tolerance, name
    mid = features(tensors["feature.x"].double(), tensors["feature.t"], condition)
    assert goldens.relative_error(mid, tensors["feature.mid"]) < 20 * FLOAT32
    said = denoiser(teacher)(tensors["feature.x"].double(), tensors["feature.t"], condition)
    assert goldens.relative_error(said, tensors["feature.eps"]) < 20 * FLOAT32


# ------------------------------------------------------------------------------------- against the original: the pieces


@goldens.needs_goldens
def test_start_distributions_are_those_of_the_original():
    for settings in scalars()["timestep_distribution"]:
        weights = settings["modes"] or [1.0] * settings["ncomp"]
        made = flash.start_distribution(settings["K"], settings["dist"], weights, settings["var"])
        expected = torch.tensor(settings["prob"], dtype=torch.float64)
        # Below 1e-37 float32 has fewer digits, and then none.
        torch.testing.assert_close(made, expected, rtol=2 * FLOAT32, atol=1e-37, msg=str(settings))
        assert diffusion().grid(settings["K"]).timesteps.tolist() == settings["timesteps"]


@goldens.needs_goldens
def test_phases_begin_where_the_original_reaches_its_boundaries():
    stored = scalars()["phase_by_forward_call"]
    phases = flash.Phases.of(steps=stored["num_iterations_per_K"])
    expected = dict(enumerate(stored["phase"], start=1))
    # Where the last phase ends the original falls back to the first, for one call.
    end = sum(stored["num_iterations_per_K"])
    assert expected[end] == 0
    assert {call: phases.index(call) for call in expected} == expected | {end: 2}


@goldens.needs_goldens
def test_distances_are_those_of_the_original():
    torch.manual_seed(scalars()["distill_l2_72x68"]["seed"])
    student, teacher = torch.randn(2, 3, 72, 68), torch.randn(2, 3, 72, 68)
    perceptual = flash.decoded_distance(lambda x: 1.5 * x, lambda x, y: (x - y).square().mean((1, 2, 3)))
    for kind, name in (("l2", "l2"), ("l1", "l1"), ("perceptual", "lpips")):
        made = flash.distillation_loss(student, teacher, kind, perceptual=perceptual)
        # A sum of some 30,000 float32 numbers, in two orders.
        assert made.item() == pytest.approx(scalars()[f"distill_{name}_72x68"]["value"], rel=8 * FLOAT32)


@goldens.needs_goldens
def test_clean_samples_are_those_of_the_original():
    golden, process = elementary(), diffusion()
    sample, said, t = (golden[f"x0.{name}"] for name in ("sample", "model_output", "t"))
    alpha, sigma = process.levels(t)
    for kind in ("epsilon", "v_prediction"):
        made = diffusion(kind).clean(said, sample, t)
        assert made.dtype == torch.float32 and goldens.relative_error(made, golden[f"x0.{kind}"]) < 2 * FLOAT32
    alpha = alpha.clone()
    alpha[-1] = 0
    made = clean_of(said, sample, alpha, sigma, "epsilon", undefined=golden["x0.z"])
    assert goldens.relative_error(made, golden["x0.epsilon.zero_alpha_at_last"]) < 2 * FLOAT32
    for made, name in zip(flash.boundary(golden["cskip.t"]), ("c_skip", "c_out"), strict=True):
        # 1 - c_skip of the original is rounded, c_skip is not.
        torch.testing.assert_close(made.float(), golden[f"cskip.{name}"], rtol=4 * FLOAT32, atol=0)


@goldens.needs_goldens
def test_noise_is_that_of_the_timestep_and_not_of_a_solvers_list():
    from diffusers import DPMSolverMultistepScheduler

    golden = elementary()
    t = golden["dpm_add_noise.t"]
    solver = DPMSolverMultistepScheduler(**{**STABLE_DIFFUSION, "steps_offset": 0}, timestep_spacing="trailing")
    solver.set_timesteps(32)
    alpha, sigma = NoiseProcess.from_scheduler(solver).levels(t)
    torch.testing.assert_close(alpha.float(), golden["ddim_add_noise.alpha_used"], rtol=2 * FLOAT32, atol=0)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
    # What the solver itself does: right where its list has the timestep (the last four), of t = 30 elsewhere.
    one = torch.ones(len(t), 1)
    theirs = solver.add_noise(one, 0 * one, t)[:, 0]
    assert torch.equal(theirs, golden["dpm_add_noise.alpha_used"])
    wrong = (theirs - alpha).abs() > 1e-3
    assert wrong.tolist() == [True] * 4 + [False] * 4


@goldens.needs_goldens
@pytest.mark.parametrize("steps", [2, 4])
def test_sampling_a_student_alternates_clean_samples_and_noise(steps):
    golden, process = elementary(), diffusion()
    z, noises = golden[f"lcm.n{steps}.x_init"].double(), golden[f"lcm.n{steps}.noises"].double()
    timesteps = golden[f"lcm.timesteps.n{steps}"]
    for i, t in enumerate(timesteps):
        said = torch.tanh(0.7 * z + 0.001 * t.double())
        clean = flash.at_boundary(process.clean(said, z, t), z, t)
        z = process.add_noise(clean, noises[i], timesteps[i + 1]) if i + 1 < steps else clean
        assert goldens.relative_error(z, golden[f"lcm.n{steps}.traj"][i]) < 4 * FLOAT32


@goldens.needs_goldens
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_sampling_a_flow_alternates_clean_samples_and_noise(shift, steps):
    golden, process = elementary(), NoiseProcess(shift=shift)
    key = f"flow.shift{shift}.n{steps}"
    grid = process.grid(steps, spacing="euler")
    torch.testing.assert_close(grid.timesteps.float(), golden[f"{key}.timesteps"], rtol=4 * FLOAT32, atol=0)
    torch.testing.assert_close(grid.sigmas.float(), golden[f"{key}.sigmas"], rtol=4 * FLOAT32, atol=0)
    z = golden[f"{key}.x_init"].double()
    for i, t in enumerate(grid.timesteps):
        clean = process.clean(torch.tanh(0.7 * z + 0.001 * t), z, t)
        if i + 1 < steps:
            z = process.add_noise(clean, golden[f"{key}.noises"][i].double(), grid.timesteps[i + 1])
        else:
            z = clean
        assert goldens.relative_error(z, golden[f"{key}.traj"][i]) < 4 * steps * FLOAT32


@goldens.needs_goldens
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_student_is_sampled_at_the_timesteps_it_was_trained_at(steps):
    from diffusers import LCMScheduler

    ours = flash.sampling_timesteps(diffusion().grid(32), steps).tolist()
    assert ours == elementary()[f"lcm.custom_trailing.n{steps}"].tolist()
    scheduler = LCMScheduler(**{**STABLE_DIFFUSION, "steps_offset": 0}, original_inference_steps=50)
    scheduler.set_timesteps(timesteps=ours)
    assert scheduler.timesteps.tolist() == ours
    # As many steps of training's grid, or of a coarser one.
    assert ours == diffusion().grid(steps).timesteps.tolist()


@goldens.needs_goldens
@pytest.mark.parametrize(
    ("case", "zeroed"), [("plain", []), ("ucg_text", ["text"]), ("ucg_mask_pooled", ["mask", "pooled"])]
)
def test_conditions_are_dropped_by_name(case, zeroed):
    from diffusers.models.embeddings import get_timestep_embedding

    golden = elementary()
    condition = {name: golden[f"cond.in.{name}"] for name in ("text", "text2", "pooled", "size", "mask", "masked")}
    sinusoids = get_timestep_embedding(condition["size"].flatten(), 8, flip_sin_to_cos=True, downscale_freq_shift=0)
    condition["size"] = sinusoids.view(2, 16)
    made = flash.unconditional(condition, {name: "zero" if name in zeroed else "keep" for name in condition})
    merged = {"crossattn": ("text", "text2"), "vector": ("pooled", "size"), "concat": ("mask", "masked")}
    for kind, names in merged.items():
        together = torch.cat([made[name] for name in names], 2 if kind == "crossattn" else 1)
        assert goldens.relative_error(together, golden[f"cond.out.{case}.{kind}"]) < 4 * FLOAT32, kind


# ------------------------------------------------------------------------------------------------------------ processes

EVERY_KIND = ["epsilon", "v_prediction", "sample", "flow"]


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("name", ["diffusion", "flow matching", "zero terminal SNR"])
def test_sample_and_noise_come_back_from_every_kind_of_prediction(kind, name):
    process = {
        "diffusion": lambda: diffusion(kind),
        "flow matching": lambda: NoiseProcess(prediction_type=kind, shift=3),
        "zero terminal SNR": zero_terminal_snr,
    }[name]()
    t = process.random_timesteps(torch.tensor([0.0, 0.3, 0.7, 0.999]))
    clean, noise = normal(2, 4, 3, 2, 2).unbind()
    alpha, sigma = process.levels(t)
    if kind == "epsilon":  # which says nothing about the sample where there is no signal
        t, clean, noise, alpha, sigma = (part[alpha > 0] for part in (t, clean, noise, alpha, sigma))
    noisy = process.add_noise(clean, noise, t)
    torch.testing.assert_close(noisy, rows(alpha, clean) * clean + rows(sigma, clean) * noise)
    said = prediction_of(clean, noise, alpha, sigma, kind)
    tolerance = FLOAT64 / alpha[alpha > 0].min().item() / sigma.min().item()
    assert goldens.relative_error(clean_of(said, noisy, alpha, sigma, kind), clean) < tolerance
    assert goldens.relative_error(noise_of(said, noisy, alpha, sigma, kind), noise) < tolerance
    if process.prediction_type == kind:
        assert torch.equal(process.target(clean, noise, t), said)
        assert torch.equal(process.clean(said, noisy, t), clean_of(said, noisy, alpha, sigma, kind))
        assert torch.equal(process.noise(said, noisy, t), noise_of(said, noisy, alpha, sigma, kind))


def test_predictions_have_their_definitions():
    x, eps = torch.tensor([2.0]), torch.tensor([5.0])
    alpha, sigma = torch.tensor([0.6]), torch.tensor([0.8])
    made = [prediction_of(x, eps, alpha, sigma, kind).item() for kind in EVERY_KIND]
    assert made == pytest.approx([5, 0.6 * 5 - 0.8 * 2, 2, 3])


@pytest.mark.parametrize(
    ("name", "options", "kind", "shift"),
    [
        ("DDPMScheduler", {}, "epsilon", None),
        ("DDIMScheduler", dict(prediction_type="v_prediction", rescale_betas_zero_snr=True), "v_prediction", None),
        ("PNDMScheduler", dict(prediction_type="v_prediction"), "v_prediction", None),
        ("EulerDiscreteScheduler", dict(prediction_type="sample"), "sample", None),
        ("LCMScheduler", dict(trained_betas=[0.1, 0.2, 0.3], num_train_timesteps=3), "epsilon", None),
        ("FlowMatchEulerDiscreteScheduler", dict(shift=3.0), "flow", 3.0),
        ("FlowMatchLCMScheduler", {}, "flow", 1.0),
        ("UniPCMultistepScheduler", dict(use_flow_sigmas=True, flow_shift=5.0), "flow", 5.0),
        ("DPMSolverMultistepScheduler", dict(use_flow_sigmas=True, prediction_type="flow_prediction"), "flow", 1.0),
    ],
)
def test_process_is_read_from_schedulers_of_every_family(name, options, kind, shift):
    import diffusers

    scheduler = getattr(diffusers, name)(**options)
    process = NoiseProcess.from_scheduler(scheduler)
    assert process.prediction_type == kind and process.is_flow == (shift is not None)
    assert process.num_timesteps == scheduler.config.num_train_timesteps
    if shift is None:
        t = torch.tensor([0, 1, process.num_timesteps - 1])
        abar = scheduler.alphas_cumprod.double()[t]
        torch.testing.assert_close(process.levels(t)[0] ** 2, abar)
    else:
        assert process.shift == shift
    again = NoiseProcess.from_scheduler(dict(scheduler.config))
    assert again.prediction_type == kind and again.is_flow == process.is_flow


def test_levels_of_a_flow_are_shifted_as_its_scheduler_shifts_them():
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    process = NoiseProcess.from_scheduler(scheduler)
    every = process.timesteps_of(torch.arange(1000, 0, -1))
    torch.testing.assert_close(every.float(), scheduler.timesteps, rtol=4 * FLOAT32, atol=0)
    # Evenly spaced levels, which FLUX's pipeline passes explicitly.
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(process.grid(4).timesteps.float(), scheduler.timesteps, rtol=4 * FLOAT32, atol=0)
    # So a student that was trained on the finer grid is sampled where it was trained.
    sampler = FlowMatchLCMScheduler(shift=3.0)
    sampler.set_timesteps(4, sigmas=[1.0, 0.75, 0.5, 0.25])
    ours = flash.sampling_timesteps(process.grid(32), 4).float()
    torch.testing.assert_close(ours, sampler.timesteps, rtol=4 * FLOAT32, atol=0)
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    assert NoiseProcess.from_scheduler(dynamic, shift=2.5).shift == 2.5


def test_random_timesteps_are_every_level_equally_often():
    uniform = torch.arange(3000, dtype=torch.float64) / 3000
    drawn, counts = diffusion().random_timesteps(uniform).unique(return_counts=True)
    assert drawn.tolist() == list(range(1000)) and (counts - 3).abs().max() <= 1  # 1000 k / 3000 is rounded
    process = NoiseProcess(shift=3)
    drawn = process.random_timesteps(uniform)
    torch.testing.assert_close(drawn.unique(), process.timesteps_of(torch.arange(1, 1001)))
    assert drawn.min() > 0
    levels = flash.adversarial_timesteps(torch.arange(8) / 8, diffusion())
    assert levels.tolist() == [10, 10, 250, 250, 500, 500, 750, 750]
    torch.testing.assert_close(
        flash.adversarial_timesteps(torch.tensor([0.3]), process), torch.tensor([3 * 250 / 1.5], dtype=torch.float64)
    )


# --------------------------------------------------------------------------------------------- starts, phases and paths


def test_starts_are_drawn_by_their_probabilities_and_never_where_these_are_zero():
    probabilities = torch.tensor([0.0, 0.3, 0.0, 0.6, 0.1, 0.0])
    drawn = flash.start_index((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000, probabilities)
    assert torch.bincount(drawn, minlength=6).tolist() == [0, 300, 0, 600, 100, 0]
    assert flash.start_index(torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64), probabilities).tolist() == [1, 4]


def test_path_starts_at_the_noise_itself_or_at_a_level_of_the_grid():
    clean, noise = normal(2, 3, 2).unbind()
    grid = diffusion().grid(4)
    made = flash.noised_start(clean, noise, torch.tensor([0, 1, 3]), grid)
    alpha, sigma = diffusion().levels(torch.tensor([749, 249]))
    assert torch.equal(made[0], noise[0])
    torch.testing.assert_close(made[1:], alpha[:, None] * clean[1:] + sigma[:, None] * noise[1:])


def test_every_phase_has_as_many_steps_as_it_says_and_the_last_goes_on():
    phases = flash.Phases.of(steps=[3, 1, 4], dmd=[0, 0.5, 1.0], weights=[[0, 1], [1, 1], [1, 0]], guidance=(2, 4))
    counts = collections.Counter(phases.index(step) for step in range(8))
    assert counts == {0: 3, 1: 1, 2: 4} and phases.index(8) == phases.index(10**9) == 2
    assert [phases.at(step).dmd for step in (0, 3, 4)] == [0, 0.5, 1.0]
    assert phases.at(3).weights == (1, 1) and phases.at(3).guidance == (2, 4)
    assert phases.at(0).probabilities()[16] > 0.6 > phases.at(4).probabilities()[16]
    assert len(flash.Phases.of(weights=[0.5, 0.5], steps=2).phases) == 1


def test_terms_that_do_not_count_do_not_reach_the_total():
    phase = flash.Phase(steps=1, distillation=0.5, dmd=0.0, adversarial=2.0)
    made = phase.total(torch.tensor(4.0), torch.tensor(float("nan")), torch.tensor(3.0))
    assert made.item() == 8.0 and phase.guidance_of(torch.tensor(0.5)).item() == 8.0


def gaussian_teacher(process, mean, spread):
    """The exact network for data ~ N(mean, spread^2), of the process's kind of prediction."""

    def teacher(z, timesteps):
        alpha, sigma = (rows(part, z) for part in process.levels(timesteps))
        clean = mean + alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * (z - alpha * mean)
        return process.target(clean, (z - alpha * clean) / sigma, timesteps)

    return teacher


def ideal_end(process, z, t, mean, spread):
    """The flow of a Gaussian keeps (z - alpha mean) / deviation."""
    alpha, sigma = (rows(part, z) for part in process.levels(t))
    return mean + spread * (z - alpha * mean) / (alpha**2 * spread**2 + sigma**2).sqrt()


PROCESSES = {
    "epsilon": diffusion,
    "v_prediction": zero_terminal_snr,
    "sample": lambda: diffusion("sample"),
    "flow": lambda: NoiseProcess(shift=3.0),
}


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_paths_converge_to_the_exact_flow_in_the_order_of_their_solver(kind):
    process, mean, spread = PROCESSES[kind](), 0.7, 0.4
    z, start, teacher = normal(50, 3), torch.tensor([0]), gaussian_teacher(process, mean, spread)
    for order in (1, 2):
        errors = []
        for steps in (10, 20, 40):
            t = torch.linspace(900, 300, steps + 1, dtype=torch.float64)
            t = t if process.is_flow else t.long()
            grid = Grid(t[:-1], *process.levels(t))
            made = flash.rollout(teacher, z, start, grid, prediction_type=process.prediction_type, order=order)
            alpha, sigma = process.levels(t[-1:])
            end = ideal_end(process, z, t[:1], mean, spread)
            exact = alpha * mean + (alpha**2 * spread**2 + sigma**2).sqrt() * (end - mean) / spread
            errors.append(goldens.relative_error(made, exact))
        assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)
        assert errors[1] / errors[2] == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_paths_from_pure_noise_end_at_data(kind):
    process, mean, spread = PROCESSES[kind](), 0.7, 0.4
    z, errors = normal(200, 3), {}
    for order, steps in ((1, 8), (1, 32), (2, 8), (2, 32)):
        grid, teacher = process.grid(steps), gaussian_teacher(process, mean, spread)
        start = torch.tensor([0])
        made = flash.rollout(teacher, z, start, grid, prediction_type=process.prediction_type, order=order)
        exact = ideal_end(process, z, grid.timesteps[:1], mean, spread)
        errors[order, steps] = goldens.relative_error(made, exact)
    # The step to no noise is of first order in both, and shorter on the finer grid.
    assert errors[1, 32] < 0.5 * errors[1, 8] and errors[2, 32] < 0.5 * errors[2, 8]
    assert errors[2, 8] < errors[1, 8] and errors[2, 32] < errors[1, 32]


def test_one_step_of_a_path_is_ddim_or_euler():
    z, said = normal(2, 2, 3).unbind()
    for process in (diffusion(), NoiseProcess(shift=3.0)):
        grid = Grid(*(part[1:3] for part in process.grid(4)))
        grid = Grid(grid.timesteps[:1], grid.alphas, grid.sigmas)
        made = flash.rollout(lambda z, t: said, z, torch.tensor([0]), grid, prediction_type=process.prediction_type)
        (a, b), (s, e) = grid.alphas, grid.sigmas
        wanted = z + (e - s) * said if process.is_flow else b * (z - s * said) / a + e * said
        torch.testing.assert_close(made, wanted, rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.parametrize("order", [1, 2])
def test_samples_that_start_apart_walk_as_they_would_alone(order):
    process = diffusion()
    grid, z, calls = process.grid(6), normal(3, 2, 2), []

    def teacher(z, t):
        calls.append(t.tolist())
        return torch.tanh(0.7 * z + 0.001 * rows(t, z))

    together = flash.rollout(teacher, z, torch.tensor([4, 1, 5]), grid, order=order)
    assert len(calls) == 5 and calls[0] == grid.timesteps[[4, 1, 5]].tolist()
    for i, start in enumerate((4, 1, 5)):
        calls.clear()
        alone = flash.rollout(teacher, z[i : i + 1], torch.tensor([start]), grid, order=order)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=FLOAT64, atol=FLOAT64)
        assert [t for (t,) in calls] == grid.timesteps[start:].tolist()
    half = flash.rollout(lambda z, t: z, z.half(), torch.tensor([0]), grid)
    assert half.dtype == torch.float16


# --------------------------------------------------------------------------------------------------------------- losses


def test_distances_follow_their_formulas_and_reach_the_student_alone():
    student, teacher = normal(2, 4, 3, 5, 5).unbind()
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    difference = student - teacher
    huber = ((difference**2 + 0.25).sqrt() - 0.5).mean()
    per_sample = lambda x, y: (x - y).abs().sum((1, 2, 3))  # noqa: E731
    picture = flash.decoded_distance(lambda x: 3 * x, per_sample, crop=3)
    of_centres = (3 * student).clamp(-1, 1)[..., 1:4, 1:4] - (3 * teacher).clamp(-1, 1)[..., 1:4, 1:4]
    for kind, wanted in (
        ("l2", (difference**2).mean()),
        ("l1", difference.abs().mean()),
        ("huber", huber),
        ("perceptual", of_centres.abs().sum((1, 2, 3)).mean()),
    ):
        made = flash.distillation_loss(student, teacher, kind, huber_c=0.5, perceptual=picture)
        torch.testing.assert_close(made, wanted)
        (gradient,) = torch.autograd.grad(made, student)
        assert gradient.abs().sum() > 0
        with pytest.raises(RuntimeError, match=r"unused|does not require grad"):
            torch.autograd.grad(flash.distillation_loss(student, teacher, kind, perceptual=picture), teacher)
        assert flash.distillation_loss(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32
    small = flash.decoded_distance(lambda x: x, lambda x, y: torch.tensor(float(x.shape[-1])), crop=64)
    assert small(student, teacher) == 5  # not cut from a negative start


def test_matching_has_the_gradient_of_its_formula():
    student, real, fake = normal(3, 2, 3, 4).unbind()
    student.requires_grad_()
    loss = flash.dmd_loss(student, real, fake)
    (gradient,) = torch.autograd.grad(loss, student)
    weight = 1 / ((student - real).abs().mean((1, 2), keepdim=True) + 1e-5)
    torch.testing.assert_close(gradient, 2 * weight.detach() * (fake - real) / student.numel())
    # With the student where the teacher would have it, the floor divides.
    still = flash.dmd_loss(real.clone().requires_grad_(), real, fake)
    assert still.isfinite() and flash.dmd_loss(student, real, real).item() == 0


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_matching_moves_a_distribution_onto_the_teachers(kind):
    """Student samples m + s eps, its own exact score as the fake one, data N(2, 0.5^2): m goes to 2 and s to 0.5.

    Samples of 32 independent elements: the weight is meant to be much the same for all samples.
    """
    process = PROCESSES[kind]()
    generator = torch.Generator().manual_seed(0)
    parameters = torch.tensor([-1.0, 1.5], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([parameters], lr=0.05)
    real = gaussian_teacher(process, 2.0, 0.5)
    for _ in range(120):
        eps, noise = torch.randn(2, 64, 32, generator=generator, dtype=torch.float64).unbind()
        t = process.random_timesteps(torch.rand(64, generator=generator, dtype=torch.float64))
        mean, spread = parameters.detach().tolist()
        fake = gaussian_teacher(process, mean, spread)
        loss = flash.distribution_matching(parameters[0] + parameters[1] * eps, noise, t, real, fake, process)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert parameters.tolist() == pytest.approx([2.0, 0.5], abs=0.1)


def test_fake_score_may_predict_another_thing_than_the_teacher():
    process, other = diffusion(), diffusion("v_prediction")
    student, noise = normal(2, 6, 2).unbind()
    t = torch.arange(100, 700, 100)
    real = gaussian_teacher(process, 1.0, 0.5)
    same = flash.distribution_matching(student, noise, t, real, gaussian_teacher(process, 0.0, 1.0), process)
    velocity = gaussian_teacher(other, 0.0, 1.0)
    made = flash.distribution_matching(student, noise, t, real, velocity, process, fake_process=other)
    torch.testing.assert_close(made, same)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_fake_score_learns_the_students_distribution_and_leaves_the_student(kind):
    process, spread = PROCESSES[kind](), 0.5
    student = (1.0 + spread * normal(2000, 1)).requires_grad_()
    noise = normal(2000, 1, seed=1)
    t = process.random_timesteps((torch.arange(2000) + 0.5) / 2000)
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    losses = {}
    for mean in (0.5, 1.0, 1.5):
        exact = gaussian_teacher(process, mean, spread)
        losses[mean] = flash.fake_score_loss(lambda z, t: exact(z, t) + shift, student, noise, t, process)  # noqa: B023
    assert losses[1.0] < losses[0.5] and losses[1.0] < losses[1.5]
    losses[0.5].backward()
    assert shift.grad is not None and student.grad is None


@pytest.mark.parametrize("kind", flash.ADVERSARIAL)
def test_adversaries_pull_in_opposite_directions(kind):
    logits = torch.tensor([-0.9, 0.0, 0.5], dtype=torch.float64)
    real, fake = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    towards = torch.autograd.grad(flash.generator_loss(kind, fake), fake)[0]
    of_real, of_fake = torch.autograd.grad(flash.discriminator_loss(kind, real, fake), (real, fake))
    assert (towards < 0).all() and (of_real < 0).all() and (of_fake > 0).all()
    extreme = torch.tensor([-200.0, 200.0])
    assert (
        flash.generator_loss(kind, extreme).isfinite() and flash.discriminator_loss(kind, extreme, extreme).isfinite()
    )


def test_adversarial_losses_have_their_values():
    real, fake = torch.tensor([2.0, -0.5]), torch.tensor([0.5, -3.0])
    s = torch.sigmoid
    wanted = {
        "hinge": (1.25, 0.75 + 0.75),
        "wgan": (1.25, -1.25 - 0.75),
        "lsgan": (((s(fake) - 1) ** 2).mean(), 0.5 * (((s(real) - 1) ** 2).mean() + (s(fake) ** 2).mean())),
        "vanilla": (
            F.binary_cross_entropy_with_logits(fake, torch.ones(2)),
            F.binary_cross_entropy_with_logits(real, torch.ones(2))
            + F.binary_cross_entropy_with_logits(fake, torch.zeros(2)),
        ),
    }
    wanted["non-saturating"] = wanted["vanilla"]
    for kind, (generator, discriminator) in wanted.items():
        assert flash.generator_loss(kind, fake).item() == pytest.approx(float(generator), rel=4 * FLOAT32), kind
        made = flash.discriminator_loss(kind, real, fake).item()
        assert made == pytest.approx(float(discriminator), rel=4 * FLOAT32), kind
    head = torch.nn.Linear(3, 2)
    before = head.weight.detach().clone()
    flash.clamp_weights(head)
    assert torch.equal(head.weight, before.clamp(-0.01, 0.01)) and head.bias.abs().max() <= 0.01


# ----------------------------------------------------------------------------------------------------------- conditions


def test_absent_conditions_follow_their_policies():
    condition = {"text": normal(2, 3, 4), "mask": normal(2, 1, 2, 2), "pooled": normal(2, 5)}
    empty = normal(1, 3, 4, seed=1)
    made = flash.unconditional(condition, {"text": empty, "mask": "keep", "pooled": "zero"})
    assert torch.equal(made["text"], empty.expand(2, 3, 4)) and torch.equal(made["mask"], condition["mask"])
    assert made["pooled"].shape == (2, 5) and not made["pooled"].any()


def test_each_sample_and_each_condition_is_dropped_for_itself():
    condition = {"text": torch.ones(4, 3, 2), "pooled": torch.ones(4, 5), "mask": torch.ones(4, 1, 2, 2)}
    absent = {name: -value for name, value in condition.items()}
    uniform = {"text": torch.tensor([0.05, 0.1, 0.5, 0.9]), "pooled": torch.tensor([0.9, 0.6, 0.0, 0.05])}
    made = flash.with_dropped(condition, absent, {"text": 0.1, "pooled": 0.6}, uniform)
    assert made["text"][:, 0, 0].tolist() == [-1, 1, 1, 1] and made["pooled"][:, 0].tolist() == [1, 1, -1, -1]
    assert torch.equal(made["mask"], condition["mask"])
    together = flash.with_dropped(condition, absent, dict.fromkeys(condition, 0.2), uniform["text"])
    assert all((value.flatten(1)[:, 0] < 0).tolist() == [True, True, False, False] for value in together.values())
    assert torch.equal(condition["text"], torch.ones(4, 3, 2))


def test_training_step_of_the_page_runs_and_trains_the_student_alone():
    page = Path(__file__).resolve().parents[1] / "docs" / "flash.md"
    (code,) = (block.split("```")[0] for block in page.read_text().split("```python\n") if "Phases.of(" in block)
    weight, others = torch.ones((), requires_grad=True), torch.ones((), requires_grad=True)
    text, uniform = torch.randn(4, 3, 5), torch.tensor([0.4])

    def denoiser(noisy, timesteps, condition):
        return torch.tanh(others * noisy + rows(condition["encoder_hidden_states"].mean((1, 2)), noisy))

    given = dict(flash=flash, NoiseProcess=NoiseProcess, teacher_of=teacher_of, denoiser=denoiser)
    given |= dict(pipe=SimpleNamespace(scheduler=STABLE_DIFFUSION), WEIGHTS=[0.25] * 4, step=6000, uniform=uniform)
    given |= dict(latents=torch.randn(4, 2, 3, 3), noise=torch.randn(4, 2, 3, 3), noise2=torch.randn(4, 2, 3, 3))
    given |= dict(
        uniform_rows=torch.rand(4), uniform_guidance=uniform, uniform2=torch.rand(4), logits_of_student=weight
    )
    given |= dict(condition={"encoder_hidden_states": text}, empty_prompt=torch.zeros(1, 3, 5))
    given |= dict(student=lambda x, t, c: weight * denoiser(x, t, c).detach(), fake=lambda x, t: 0.5 * x)
    exec(code, given)
    assert given["phase"].dmd == 0.3 and given["index"].tolist() == [8]
    given["loss"].backward()
    assert weight.grad.abs() > 0 and others.grad is None


# ------------------------------------------------------------------------------------------------------------ bad input

ONE = torch.ones(2, 3)


def dropping(rates, uniform=ONE[:, 0]):
    return flash.with_dropped({"a": ONE}, {"a": ONE}, rates, uniform)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NoiseProcess(prediction_type="x0"), "prediction_type must be one of epsilon, .*, got 'x0'"),
        (lambda: NoiseProcess(shift=0), "shift must be above 0, .*, got 0"),
        (lambda: NoiseProcess(torch.tensor([0.5]), shift=3), "and 1 for a process that is not flow matching, got 3"),
        (lambda: NoiseProcess(num_timesteps=0), "num_timesteps must be at least 1, got 0"),
        (lambda: NoiseProcess(torch.tensor([0.5, 0.9])), r"in \[0, 1\] and not increase"),
        (lambda: NoiseProcess(torch.tensor([0.5, 0.0])), "alpha is 0 at timestep 1 .*expected v_prediction or sample"),
        (lambda: NoiseProcess.from_scheduler({"_class_name": "EDMx"}), "expected a scheduler with betas, .*got a EDMx"),
        (lambda: NoiseProcess.from_scheduler(dict(shift=1.0, use_dynamic_shifting=True)), r"expected shift=exp\(mu\)"),
        (lambda: diffusion().levels(torch.tensor([1000])), r"must be whole, 0 .. 999, got \[1000\]"),
        (lambda: diffusion().levels(torch.tensor([1.5])), r"must be whole, 0 .. 999, got \[1.5\]"),
        (lambda: NoiseProcess().levels(torch.tensor([-1.0])), r"must be in \[0, 1000\], got \[-1.0\]"),
        (lambda: diffusion().grid(0), "steps must be from 1 to 1000, got 0"),
        (lambda: diffusion().grid(4, spacing="euler"), "spacing must be trailing for this process, got 'euler'"),
        (lambda: NoiseProcess().grid(4, end="least_noisy"), "end must be clean for this process"),
        (lambda: clean_of(ONE, ONE, torch.zeros(2), torch.ones(2), "epsilon"), "does not give x_0 where alpha is 0"),
        (lambda: noise_of(ONE, ONE, torch.ones(2), torch.zeros(2), "sample"), "not give the noise where sigma is 0"),
        (lambda: flash.modes(4, 5), "expected from 1 to 4 modes on a grid of 4 steps, got 5"),
        (lambda: flash.start_distribution(8, "normal"), "distribution must be one of uniform, .*, got 'normal'"),
        (lambda: flash.start_distribution(0), "steps must be at least 1, got 0"),
        (lambda: flash.start_distribution(8, variance=0), "variance must be above 0, got 0"),
        (lambda: flash.start_distribution(8, weights=[0, 0]), r"nor all 0, got \[0, 0\]"),
        (lambda: flash.start_distribution(8, weights=[-1, 2]), r"must not be negative, .* got \[-1, 2\]"),
        (lambda: flash.Phase(steps=0), "steps must be at least 1, got 0"),
        (lambda: flash.Phase(steps=1, guidance=(0.5, 2)), r"1 <= lowest <= highest, got \(0.5, 2\)"),
        (lambda: flash.Phase(steps=1, dmd=-1), "dmd must be at least 0, got -1"),
        (lambda: flash.Phase(steps=1, grid_steps=2), "expected from 1 to 2 modes"),
        (lambda: flash.Phases([]), "expected at least one phase, got none"),
        (lambda: flash.Phases.of(steps=[1, 2], dmd=[0, 0, 1]), "one entry for each phase, got {'steps': 2, 'dmd': 3}"),
        (lambda: flash.Phases.of(steps=1, K=4), "expected arguments among steps, .*, got K"),
        (lambda: flash.Phases.of(steps=1).index(-1), "step must be at least 0, got -1"),
        (lambda: flash.solver(diffusion().grid(4), 3), "order must be 1 or 2, got 3"),
        (lambda: flash.rollout(None, ONE, torch.tensor([4]), diffusion().grid(4)), r"from 0 to 3, got \[4\]"),
        (lambda: flash.distillation_loss(ONE, ONE, "lpips"), "kind must be one of l2, .*, got 'lpips'"),
        (lambda: flash.distillation_loss(ONE, ONE, "perceptual"), "needs a distance, got perceptual=None"),
        (lambda: flash.distillation_loss(ONE, ONE[0]), r"same shape, got \(2, 3\), \(3,\)"),
        (lambda: flash.decoded_distance(None, None, crop=0), "crop must be at least 1, got 0"),
        (lambda: flash.dmd_loss(ONE, ONE[:1], ONE), r"student and real must have the same shape"),
        (lambda: flash.dmd_loss(ONE, ONE, ONE[:1]), r"student and fake must have the same shape"),
        (lambda: flash.generator_loss("lsgan2", ONE), "kind must be one of hinge, .*, got 'lsgan2'"),
        (lambda: flash.discriminator_loss("", ONE, ONE), "kind must be one of hinge, .*, got ''"),
        (lambda: flash.unconditional({"a": ONE}, {}), r"expected \['a'\], got \[\]"),
        (lambda: flash.unconditional({"a": ONE}, {"a": "drop"}), 'policy of a must be "zero", "keep" or a tensor'),
        (lambda: flash.unconditional({"a": ONE}, {"a": ONE.T}), r"its shape \(2, 3\), or 1 first, got \(3, 2\)"),
        (lambda: dropping({"b": 0.1}), r"conditions \['a'\], got 'b'"),
        (lambda: dropping({"a": 2}), r"rate of a must be in \[0, 1\], got 2"),
        (lambda: dropping({"a": 0.1}, {}), r"an entry for each rate, got \[\] and not a"),
    ],
)  # fmt: skip
def test_arguments_that_mean_nothing_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
