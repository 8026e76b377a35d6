"""Training of Flash Diffusion students: the recorded steps, convergence to a known flow, whole runs, their results."""

import contextlib
import math

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", reason='distillation needs the extra: pip install "linattn[train]"')
pytest.importorskip("pydantic", reason='distillation needs the extra: pip install "linattn[train]"')

import scipy.stats
import test_flash_targets as recorded
from diffusers import DiffusionPipeline, FlowMatchLCMScheduler, LCMScheduler
from helpers import goldens, runs
from helpers.pictures import captioned_noise
from helpers.tiny_pipelines import tiny_pipeline
from safetensors.torch import load_file

from linattn.adapters import LinFusion
from linattn.cli import main
from linattn.cli.distill import resolve
from linattn.distill import checkpoint, noise, recipe
from linattn.distill.denoiser import UNetDenoiser, recorded_outputs
from linattn.distill.discriminator import PREDICTION, Discriminator, features_of
from linattn.distill.noise_process import NoiseProcess
from linattn.distill.objectives import flash
from linattn.distill.recipe import RecipeError
from linattn.distill.trainer import Trainer
from linattn.schedulers import few_step_arguments

pytestmark = pytest.mark.usefixtures("one_thread_in_module")

#: Chance that a right distribution is taken for a wrong one, at a seed that is fixed.
UNLIKELY = 1e-3


@pytest.fixture(autouse=True)
def fresh_accelerator():
    runs.reset_accelerator()
    yield
    runs.reset_accelerator()


# ------------------------------------------------------------------------------------------------ against the original


class GoldenStudent(nn.Module):
    """The goldens' student as a `Denoiser` whose three numbers are parameters."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.numbers = network.parameters = nn.Parameter(network.parameters.detach().clone())

    def forward(self, noisy, timesteps, condition):
        return self.network(noisy, timesteps, condition)


class GoldenDiscriminator(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.first, self.last = nn.Parameter(weights["0.weight"]), nn.Parameter(weights["2.weight"])

    def forward(self, features):
        (feature,) = features.values()
        return recorded.discriminate({"0.weight": self.first, "2.weight": self.last}, feature)

    judge = Discriminator.judge


def middle_of(index, probabilities):
    """A number in [0, 1) that chooses this index."""
    ends = probabilities.double().cumsum(0)
    return (ends[index] - probabilities.double()[index] / 2) / ends[-1]


#: Flows with distribution matching compare velocities in the original, and the samples that they imply here.
WHOLE = [f"{i:02d}" for i in range(15)]


@goldens.needs_goldens
@pytest.mark.parametrize("number", WHOLE)
def test_objective_gives_the_losses_and_gradients_of_the_original(number, monkeypatch):
    case = recorded.analytic_case(number)
    settings, golden, phase = case.settings, case.golden, case.phase
    if case.process.is_flow and settings["use_dmd"]:
        pytest.skip("the original compares velocities: test_flash_targets")
    weights = {k.removeprefix("disc."): v.double() for k, v in golden.items() if k.startswith("disc.")}
    student, discriminator = GoldenStudent(case.student), GoldenDiscriminator(weights)
    objective = flash.FlashTraining(
        student,
        case.teacher,
        case.process,
        order=2 if settings["scheduler"] == "dpm" else 1,
        distance=settings["distill_type"],
        discriminator=discriminator,
        adversarial=settings["gan_type"],
        real="teacher" if settings["use_teacher_as_real"] else "data",
    )
    objective._grids[len(case.grid.timesteps)] = case.grid
    monkeypatch.setattr(flash, "features_of", lambda denoiser, names, x, t, c: {"": case.features(x, t, c)})
    z = golden["z"].double()
    ours = noise.draw_flash([0] * len(z), z.shape[1:], seed=0)
    draws = ours._replace(
        noise=case.noise,
        start=middle_of(case.index, phase.probabilities()),
        guidance=case.uniform,
        adversarial_noise=case.gan_noise,
        adversarial_level=(case.gan_level.double() + 0.5) / 4,
    )
    if case.dmd_draws:
        renoise, level, guidance = (draw.double() for draw in case.dmd_draws)
        draws = draws._replace(renoise=renoise, renoise_level=(level + 0.5) / 1000, renoise_guidance=guidance)
    losses = objective(z, draws, case.condition, case.absent, phase)
    losses["loss"].backward()
    tolerance = 4 * len(case.grid.timesteps) * settings["guidance_max"] * recorded.FLOAT32
    assert losses["distillation"].item() == pytest.approx(settings["loss_distill"], rel=tolerance)
    if phase.dmd:
        assert losses["dmd"].item() == pytest.approx(settings["loss_dmd"], rel=tolerance)
    if settings["step"] % 2 == 0:
        if phase.adversarial:
            assert losses["adversarial"].item() == pytest.approx(settings["loss_gan_G"], rel=tolerance)
        assert goldens.relative_error(student.numbers.grad, golden["grad_student_a_b_g"]) < tolerance
    else:
        assert losses["discriminator"].item() == pytest.approx(settings["loss_gan_D"], rel=tolerance)
        for name, parameter in (("0.weight", discriminator.first), ("2.weight", discriminator.last)):
            assert goldens.relative_error(parameter.grad, golden[f"grad_disc.{name}"]) < tolerance


# ----------------------------------------------------------------------------------------------- who is trained by what


class Plain(nn.Module):
    """A convolution as a denoiser, which has a module to look at."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.model = nn.Module()
        self.model.inner, self.model.outer = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
        self.calls = 0

    def forward(self, noisy, timesteps, condition):
        self.calls += 1
        shift = (timesteps.float() / 1000 + condition["text"].mean((1, 2))).view(-1, 1, 1, 1)
        return self.model.outer(torch.tanh(self.model.inner(noisy.float()) + shift))


def plain_objective(**options):
    process = NoiseProcess(torch.linspace(0.999, 0.01, 1000))
    teacher = Plain(1).requires_grad_(False)
    torch.manual_seed(3)
    judge = Discriminator({"inner": (4, 6, 6)}, width=8, levels=1)
    made = {"discriminator": judge, "features": ("inner",), "fake_score": Plain(2)} | options
    return flash.FlashTraining(Plain(0), teacher, process, **made)


def plain_batch(count=3, **options):
    generator = torch.Generator().manual_seed(0)
    condition = {"text": torch.randn(count, 2, 3, generator=generator)}
    return {
        "latents": torch.randn(count, 2, 6, 6, generator=generator),
        "draws": noise.draw_flash(range(count), (2, 6, 6), seed=0),
        "condition": condition,
        "absent": flash.unconditional(condition, {"text": "zero"}),
        "phase": flash.Phase(1, 4, guidance=(1.5, 3), dmd=0.5, adversarial=0.2)
        if not options
        else flash.Phase(**options),
    }


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_each_part_of_the_loss_trains_its_own_network_and_no_other():
    objective, batch = plain_objective(), plain_batch()
    objective(**batch)["loss"].backward()
    together = {name: gradients(getattr(objective, name)) for name in ("student", "discriminator", "fake_score")}
    assert all(value.abs().max() > 0 for part in together.values() for value in part.values())
    assert set(objective.auxiliary) == {"discriminator", "fake_score"}
    assert not any(p.grad is not None for p in objective._frozen[0].parameters())

    # The student as if nothing were trained beside it: the others are there, and fixed.
    alone = plain_objective()
    alone.discriminator.requires_grad_(False)
    alone.fake_score.requires_grad_(False)
    losses = alone(**batch)
    losses["loss"].backward()
    for name, value in gradients(alone.student).items():
        torch.testing.assert_close(value, together["student"][name], rtol=1e-5, atol=1e-9)
    # The others as if the student were fixed.
    fixed = plain_objective()
    fixed.student.requires_grad_(False)
    fixed(**batch)["loss"].backward()
    for part in ("discriminator", "fake_score"):
        for name, value in gradients(getattr(fixed, part)).items():
            torch.testing.assert_close(value, together[part][name], rtol=1e-5, atol=1e-9)


def test_loss_is_the_weighted_sum_of_the_terms_and_those_of_the_others():
    objective = plain_objective()
    losses = objective(**plain_batch())
    assert list(losses) == ["loss", "distillation", "dmd", "adversarial", "discriminator", "fake_score"]
    parts = losses["distillation"] + 0.5 * losses["dmd"] + 0.2 * losses["adversarial"]
    torch.testing.assert_close(losses["loss"], parts + losses["discriminator"] + losses["fake_score"])
    assert [name for name, value in losses.items() if value.requires_grad] == ["loss"]


def test_teacher_walks_its_path_once_and_terms_without_weight_cost_nothing():
    objective = plain_objective(discriminator=None, fake_score=None)
    batch = plain_batch(steps=1, grid_steps=4, guidance=(1.5, 3))
    losses = objective(**batch)
    start = flash.start_index(batch["draws"].start, batch["phase"].probabilities())
    assert objective._frozen[0].calls == 4 - start.item() and objective.student.calls == 1
    assert list(losses) == ["loss", "distillation"]


def test_wgan_keeps_the_heads_small():
    objective = plain_objective(adversarial="wgan")
    with torch.no_grad():
        for parameter in objective.discriminator.parameters():
            parameter.fill_(1)
    objective(**plain_batch())
    assert all((p == 0.01).all() for p in objective.discriminator.parameters())


def test_discriminator_sees_the_teacher_s_own_end_where_that_is_what_is_real():
    batch = plain_batch()
    seen = []
    for real in ("data", "teacher"):
        objective = plain_objective(real=real)
        original = objective.process.add_noise
        calls = []
        objective.process.add_noise = lambda clean, *rest, o=original, calls=calls: (
            calls.append(clean) or o(clean, *rest)
        )
        objective(**batch)
        seen.append(calls)
    assert any(x is batch["latents"] for x in seen[0]) and not any(x is batch["latents"] for x in seen[1])


def test_student_is_shown_what_is_not_dropped():
    objective = plain_objective(drop={"text": 0.5})
    batch = plain_batch(8)
    dropped = batch["draws"].dropout < 0.5
    assert 0 < dropped.sum() < 8
    told = []
    objective.student.register_forward_pre_hook(lambda _, inputs: told.append(inputs[2]["text"]))
    objective(**batch)
    for text in told:
        assert not text[dropped].any() and torch.equal(text[~dropped], batch["condition"]["text"][~dropped])


@pytest.mark.parametrize("shapes", [{"a": (4, 9, 7)}, {"a": (5, 6)}, {"a": (4, 1, 1), "b": (3, 8)}])
def test_heads_take_any_size_and_learn_to_tell_two_kinds_apart(shapes):
    torch.manual_seed(0)
    judge = Discriminator(shapes, width=8, levels=2)
    optimizer = torch.optim.Adam(judge.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)

    def batch(mean):
        return {name: mean + torch.randn(16, *shape, generator=generator) for name, shape in shapes.items()}

    for _ in range(60):
        optimizer.zero_grad()
        flash.discriminator_loss("hinge", judge(batch(0.5)), judge(batch(-0.5))).backward()
        optimizer.step()
    real, fake = judge(batch(0.5)).mean(1), judge(batch(-0.5)).mean(1)
    assert (real > fake.mean()).float().mean() > 0.9 and (fake < real.mean()).float().mean() > 0.9
    other_size = {
        name: torch.randn(2, shape[0], *[2 * s + 1 for s in shape[1:]])
        for name, shape in shapes.items()
        if len(shape) == 3
    }
    if len(other_size) == len(shapes):
        assert judge(other_size).shape[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shapes": {}}, "at least one feature"),
        ({"shapes": {"a": (3, 4, 4)}, "width": 6}, "multiple of 4, got 6"),
        ({"shapes": {"a": (3, 4, 4)}, "levels": -1}, "levels must be at least 0, got -1"),
        ({"shapes": {"a": (3,)}}, r"expected a to be \(C, h, w\) or \(N, C\), got \(3,\)"),
    ],
)
def test_discriminators_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Discriminator(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": "lpips"}, "distance must be one of"),
        ({"adversarial": "gan"}, "kind must be one of"),
        ({"real": "both"}, "real must be 'data' or 'teacher', got 'both'"),
        ({"student_prediction": "noise"}, "prediction_type must be one of"),
    ],
)
def test_objectives_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plain_objective(**options)


def test_features_are_the_module_s_output_and_the_rest_of_the_network_is_not_run():
    unet = tiny_pipeline("sd15").unet.requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 4, 8, 8, generator=generator, requires_grad=True)
    condition = {"encoder_hidden_states": torch.randn(2, 5, unet.config.cross_attention_dim, generator=generator)}
    timesteps, ran = torch.tensor([3, 500]), []
    unet.conv_out.register_forward_hook(lambda *_: ran.append("conv_out"))
    made = features_of(UNetDenoiser(unet), ["mid_block"], noisy, timesteps, condition)
    assert not ran and list(made) == ["mid_block"]
    with recorded_outputs(unet, ["mid_block"]) as whole:
        prediction = UNetDenoiser(unet)(noisy, timesteps, condition)
    assert ran and torch.equal(made["mid_block"], whole["mid_block"])
    (gradient,) = torch.autograd.grad(made["mid_block"].square().sum(), noisy)
    assert gradient.abs().sum() > 0
    assert torch.equal(features_of(UNetDenoiser(unet), [], noisy, timesteps, condition)[PREDICTION], prediction)
    unet.enable_gradient_checkpointing()
    unet.train()
    checkpointed = features_of(UNetDenoiser(unet), ["mid_block"], noisy, timesteps, condition)["mid_block"]
    torch.testing.assert_close(torch.autograd.grad(checkpointed.square().sum(), noisy)[0], gradient)


# ---------------------------------------------------------------------------------------------------------- convergence


class Affine(nn.Module):
    """A student of one-dimensional data: affine in z, with an own slope and shift at each level of a grid."""

    def __init__(self, timesteps):
        super().__init__()
        self.timesteps = timesteps.double()
        self.slope, self.shift = nn.Parameter(torch.zeros(len(timesteps))), nn.Parameter(torch.zeros(len(timesteps)))

    def forward(self, z, timesteps, condition):
        at = (timesteps.double()[:, None] - self.timesteps).abs().argmin(1)
        return self.slope[at][:, None] * z + self.shift[at][:, None]


@pytest.mark.parametrize("is_flow", [False, True])
def test_student_of_a_gaussian_draws_the_data_in_four_steps(is_flow):
    """Data ~ N(m, s^2): the teacher and where its path ends are known, and affine in the sample. So the student can say
    it, and sampling it by alternating clean samples and noise gives back mean and deviation of the data."""
    mean, spread = 0.7, 0.4
    process = NoiseProcess() if is_flow else NoiseProcess(NoiseProcess.from_scheduler(LCMScheduler()).alphas_cumprod)

    def teacher(z, timesteps, condition=None):
        a, c = (part.view(-1, 1) for part in process.levels(timesteps))
        clean = mean + a * spread**2 / (a**2 * spread**2 + c**2) * (z - a * mean)
        eps = (z - a * clean) / c
        return eps - clean if is_flow else eps

    grid = process.grid(16)
    student = Affine(grid.timesteps).double()
    objective = flash.FlashTraining(student, teacher, process, order=2)
    phase = flash.Phase(1, 16, guidance=(1, 1), distribution="uniform")
    generator = torch.Generator().manual_seed(0)
    count = 4000
    draws = noise.draw_flash(range(count), (1,), seed=1, per_sample=True)
    clean = mean + spread * torch.randn(count, 1, generator=generator, dtype=torch.float64)
    fixed = {"latents": clean, "draws": draws, "condition": {}, "absent": {}, "phase": phase}
    first = objective(**fixed)["loss"].item()
    optimizer = torch.optim.LBFGS(student.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = objective(**fixed)["loss"]
        loss.backward()
        return loss

    optimizer.step(closure)
    assert objective(**fixed)["loss"] < 1e-4 * first
    levels = flash.sampling_timesteps(grid, 4)

    def drawn(clean_of):
        """Clean samples and noise in turn, as an LCM scheduler has them."""
        generator = torch.Generator().manual_seed(1)
        z = torch.randn(20000, 1, generator=generator, dtype=torch.float64)
        for i, t in enumerate(levels):
            with torch.no_grad():
                clean = clean_of(z, t.expand(len(z)), torch.tensor([4 * i]))
            renoise = torch.randn(z.shape, generator=generator, dtype=torch.float64)
            z = process.add_noise(clean, renoise, levels[i + 1]) if i < 3 else clean
        return z

    z = drawn(lambda z, t, index: objective.estimate(z, t, {}))
    options = {"prediction_type": process.prediction_type, "order": 2}
    wanted = drawn(lambda z, t, index: flash.rollout(teacher, z, index, grid, **options))
    assert (z - wanted).abs().mean() < 0.02 * spread, "as if the teacher had walked from each level"
    # Sixteen steps of the teacher end a little short of the data's spread.
    assert z.mean().item() == pytest.approx(mean, abs=0.03)
    assert z.std().item() == pytest.approx(spread, rel=0.25)


# ------------------------------------------------------------------------------------------------------- random numbers


def test_draws_belong_to_the_samples_and_what_a_batch_shares_to_its_first():
    whole = noise.draw_flash(range(6), (2, 3), seed=4)
    assert whole.noise.shape == (6, 2, 3) and whole.noise.dtype == torch.float32
    assert whole.start.shape == whole.guidance.shape == whole.renoise_guidance.shape == (1,)
    own = noise.draw_flash(range(6), (2, 3), seed=4, per_sample=True)
    assert own.start.shape == (6,) and torch.equal(own.start[:1], whole.start)
    part = noise.draw_flash([2, 3], (2, 3), seed=4)
    for name in ("posterior", "noise", "renoise", "adversarial_noise", "fake_noise", "dropout", "fake_level"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[2:4]), name
    assert torch.equal(part.start, own.start[2:3])
    other = noise.draw_flash(range(6), (2, 3), seed=5)
    assert not torch.equal(other.noise, whole.noise) and not torch.equal(other.start, whole.start)
    parts = torch.stack([whole.posterior, whole.noise, whole.renoise, whole.adversarial_noise, whole.fake_noise])
    assert len(parts.flatten().unique()) == parts.numel(), "no noise is used twice"


def test_draws_have_their_distributions():
    draws = noise.draw_flash(range(2000), (1,), seed=2, per_sample=True)
    for name, values in zip(draws._fields, draws, strict=True):
        law = "norm" if values.ndim > 1 else "uniform"
        assert scipy.stats.kstest(values.flatten().double().numpy(), law).pvalue > UNLIKELY, name


# --------------------------------------------------------------------------------------------------------- whole runs

FAMILIES = {
    "flash_sd15": "sd15",
    "flash_sdxl": "sdxl",
    "flash_sd3": "sd3",
    "flash_flux": "flux",
    "flash_tiny_sd": "sd21",
}
#: Small and quick, on the CPU; everything else is as the shipped recipe has it.
SMALL = (
    "training.batch_size=2",
    "training.gradient_accumulation=1",
    "training.steps=3",
    "training.lr_schedule=constant",
    "training.warmup_steps=0",
    "training.learning_rate=1e-3",
    "training.gradient_checkpointing=false",
    "training.ema_decay=null",
    "objective.phases.grid_steps=4",
    "data.resolution=32",
    "data.workers=0",
    "data.cache={}",
    "output.log_with=null",
    "output.validation.prompts=[]",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved tiny pipelines by family, and "pictures": a folder of 7 pictures with captions."""
    root = tmp_path_factory.mktemp("flash")
    for family in FAMILIES.values():
        tiny_pipeline(family).save_pretrained(root / family)
    captioned_noise(root / "pictures", 7)
    return root


def small(folders, out, *overrides, name="flash_sd15"):
    family = FAMILIES[name]
    places = (f"model.pretrained={folders / family}", f"data.path={folders / 'pictures'}", f"output.folder={out}")
    phases = () if name == "flash_tiny_sd" else ("objective.phases.steps=1", "student.lora.rank=2")
    length = ("model.text_length=12",) if family in ("flux", "sd3") else ()
    precision = () if any("mixed_precision" in o for o in overrides) else ("training.mixed_precision=no",)
    return recipe.load(name, [*SMALL, *phases, *length, *places, *precision, *overrides])


def trainer_of(*arguments, named=None, **options):
    runs.reset_accelerator()
    wanted = small(*arguments, **options)
    adapter = resolve(wanted.student.adapter) if wanted.student.adapter else None
    return Trainer(wanted, adapter, named=named, say=lambda _: None)


def train(*arguments, **options):
    trainer = trainer_of(*arguments, **options)
    trainer.final = trainer.run()
    return trainer


def final_weights(out):
    folder = out / "final"
    (file,) = [*folder.glob("delta_weights.safetensors"), *folder.glob("pytorch_lora_weights.safetensors")]
    return load_file(file)


def assert_same_weights(a, b):
    """Of the student, and of all that is trained beside it."""
    pairs = [(final_weights(a), final_weights(b))]
    pairs.append(tuple(load_file(checkpoint.latest(x) / "trainable.safetensors") for x in (a, b)))
    for one, other in pairs:
        assert one.keys() == other.keys()
        different = [key for key in one if not torch.equal(one[key], other[key])]
        assert not different, f"{len(different)} of {len(one)} tensors differ, {different[0]} the first"


@pytest.mark.parametrize("name", FAMILIES)
def test_shipped_recipe_moves_the_student_and_its_judge_and_nothing_else(folders, tmp_path, name):
    precision = recipe.load(name).training.mixed_precision
    rate = [] if name == "flash_tiny_sd" else ["objective.discriminator.learning_rate=1e-3"]
    trainer = trainer_of(folders, tmp_path, f"training.mixed_precision={precision}", *rate, name=name)
    before = {
        part: {key: value.clone() for key, value in module.state_dict().items()}
        for part, module in trainer.models.pipeline.components.items()
        if isinstance(module, nn.Module)
    }
    heads = {key: value.clone() for key, value in trainer._trained().items()}
    trainer.run()
    for part, state in before.items():
        for key, value in getattr(trainer.models.pipeline, part).state_dict().items():
            assert torch.equal(value, state[key]), f"{part}.{key} moved"
    after = trainer._trained()
    assert all(p.dtype == torch.float32 for p in after.values())
    # Low-rank updates begin at zero: the first factor has a gradient from the second step on, and barely one in bf16.
    still = [key for key, value in after.items() if torch.equal(value, heads[key]) and ".lora_A" not in key]
    assert not still, f"{still} did not move in three steps"
    if name != "flash_tiny_sd":
        assert any(key.startswith("discriminator:") for key in after)
        assert all(".lora_" in key for key in trainer.trainable)


def test_phases_change_with_the_optimizer_s_steps_and_not_with_the_batches(folders, tmp_path):
    options = ["training.steps=5", "training.gradient_accumulation=2", "objective.phases.steps=[2, 1, 1, 9]"]
    trainer = trainer_of(folders, tmp_path, *options)
    seen = []
    trainer.objective.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["phase"]), with_kwargs=True)
    trainer.run()
    wanted = [trainer.task.phases.phases[i] for i in (0, 0, 1, 2, 3) for _ in range(2)]
    assert seen == wanted


EVERYTHING = (
    "training.steps=4",
    "training.gradient_accumulation=2",
    "training.lr_schedule=cosine",
    "training.ema_decay=0.9",
    "objective.phases={steps: 3, grid_steps: [4, 6], dmd: [0, 0.5], adversarial: [0, 0.5]}",
    "objective.fake_score={learning_rate: 1.0e-3}",
    "objective.discriminator.learning_rate=1e-3",
    "objective.drop={encoder_hidden_states: 0.4}",
    "output.checkpoint_every=1",
)


def test_run_killed_at_random_moments_and_in_the_middle_of_a_phase_ends_in_the_same_bits(folders, tmp_path):
    def run(out):
        train(folders, out, *EVERYTHING)

    duration = runs.timed(run, tmp_path / "whole")
    assert runs.killed_until_done(run, tmp_path / "killed", duration=duration) >= 1
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    # And stopped after step 2 of a phase of 3.
    with contextlib.suppress(RuntimeError):
        stopped = trainer_of(folders, tmp_path / "stopped", *EVERYTHING)
        step = stopped._step

        def until(objective, optimizer, schedule, batches, number):
            if number == 2:
                raise RuntimeError("stopped")
            return step(objective, optimizer, schedule, batches, number)

        stopped._step = until
        stopped.run()
    assert checkpoint.read_state(checkpoint.latest(tmp_path / "stopped"))["step"] == 2
    run(tmp_path / "stopped")
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")


def test_two_processes_end_in_the_bits_of_one_that_accumulates_twice_as_much(folders, tmp_path):
    beside = [option for option in EVERYTHING if "accumulation" not in option and "training.steps" not in option]

    def run(out, *options):
        train(folders, out, *beside, "training.steps=4", *options)

    run(tmp_path / "one", "training.gradient_accumulation=2")
    assert runs.together(run, tmp_path / "two") == [0, 0]
    assert_same_weights(tmp_path / "one", tmp_path / "two")


def test_saving_memory_changes_no_bit(folders, tmp_path):
    train(folders, tmp_path / "a")
    train(folders, tmp_path / "b", "training.gradient_checkpointing=true")
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_each_has_its_own_learning_rate_and_its_own_limit_of_the_gradient(folders, tmp_path):
    rates = ["objective.discriminator.learning_rate=0.02", "objective.fake_score={learning_rate: 0.03}"]
    trainer = trainer_of(folders, tmp_path, *rates, "training.learning_rate=0.01", "training.max_grad_norm=1e-8")
    clipped = []
    clip = trainer.accelerator.clip_grad_norm_
    trainer.accelerator.clip_grad_norm_ = lambda parameters, norm: (
        clipped.append(len(list(parameters))) or clip(parameters, norm)
    )
    trainer.run()
    (optimizer,) = trainer.accelerator._optimizers
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.02, 0.03]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    assert clipped == sizes * 3 and sizes[0] == len(trainer.trainable)


def test_low_rank_student_is_read_by_stock_diffusers_and_drawn_at_the_trained_levels(folders, tmp_path):
    shown = "output.validation={prompts: [a two], steps: 4, height: 32, width: 32}"
    for name in ("flash_sd15", "flash_flux"):
        trainer = train(
            folders, tmp_path / name, "training.learning_rate=0.02", "student.lora.alpha=4", shown, name=name
        )
        pipe = DiffusionPipeline.from_pretrained(folders / FAMILIES[name])
        pipe.set_progress_bar_config(disable=True)
        kind = FlowMatchLCMScheduler if name == "flash_flux" else LCMScheduler
        pipe.scheduler = kind.from_pretrained(trainer.final, subfolder="scheduler")
        length = {"max_sequence_length": 12} if name == "flash_flux" else {}

        def drawn(pipe=pipe, length=length):
            options = {"height": 32, "width": 32, "generator": torch.Generator().manual_seed(0), **length}
            made = pipe(
                ["a two"],
                guidance_scale=0.0 if not length else 3.5,
                **few_step_arguments(pipe, 4, grid_steps=4),
                **options,
            )
            return np.asarray(made.images[0], dtype=int)

        stock = drawn()
        pipe.load_lora_weights(trainer.final)
        made = drawn()
        (wanted,) = trainer.task.pictures(trainer.models, trainer.student.model, contextlib.nullcontext)
        if name == "flash_flux":
            assert np.abs(made - stock).max() > 0
            continue
        assert np.abs(made - np.asarray(wanted, dtype=int)).max() <= 1 < np.abs(made - stock).max()


@pytest.mark.parametrize("steps", [1, 2, 4, 3])
def test_pipelines_visit_the_levels_that_training_begins_at(folders, steps):
    for family, kind in (("sd15", LCMScheduler), ("flux", FlowMatchLCMScheduler)):
        pipe = DiffusionPipeline.from_pretrained(folders / family)
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        asked = []
        length = {"max_sequence_length": 12} if family == "flux" else {}
        network = pipe.transformer if family == "flux" else pipe.unet
        network.register_forward_pre_hook(
            lambda _, args, kwargs, asked=asked: asked.append(
                kwargs.get("timestep", args[1] if len(args) > 1 else None)
            ),
            with_kwargs=True,
        )
        pipe(
            ["a two"],
            height=32,
            width=32,
            output_type="latent",
            guidance_scale=1.0,
            **few_step_arguments(pipe, steps),
            **length,
        )
        mu = getattr(pipe.scheduler, "_shift", None)
        if family == "sd15":
            grid = NoiseProcess.from_scheduler(pipe.scheduler).grid(32)
            assert [int(t) for t in asked] == flash.sampling_timesteps(grid, steps).tolist()
        else:
            sigmas = pipe.scheduler.sigmas[:-1]
            assert [t.item() for t in asked] == pytest.approx(sigmas.tolist(), rel=1e-5)
            # One shift by the size of the picture: u -> s u / (1 + (s - 1) u), of which the first gives s.
            u = torch.tensor([1 - m * (32 // steps) / 32 for m in range(steps)], dtype=torch.float64)
            if steps > 1:
                s = sigmas[1].double() * (1 - u[1]) / (u[1] * (1 - sigmas[1].double()))
                torch.testing.assert_close(sigmas.double(), s * u / (1 + (s - 1) * u), rtol=1e-5, atol=1e-6)
        assert mu is None or math.isfinite(mu)


def test_steps_that_no_grid_has_are_refused(folders):
    pipe = DiffusionPipeline.from_pretrained(folders / "sd15")
    with pytest.raises(ValueError, match=r"steps must be from 1 to grid_steps \(8\), got 9"):
        few_step_arguments(pipe, 9, grid_steps=8)


@pytest.mark.parametrize("teacher", ["model", "student"])
def test_student_with_linear_attention_learns_steps_from_either_teacher(folders, tmp_path, teacher):
    options = ["student={adapter: linattn.adapters:LinFusion, train: full}", f"objective.teacher={teacher}"]
    trainer = train(folders, tmp_path, *options, name="flash_sd15")
    attention = {type(m).__name__ for m in trainer.objective._frozen[0].model.modules()}
    assert (any("Linear" in kind and "Attention" in kind for kind in attention)) == (teacher == "student")
    assert (trainer.final / "adapter").is_dir() and (trainer.final / "scheduler").is_dir()
    pipe = DiffusionPipeline.from_pretrained(folders / "sd15")
    LinFusion.construct_for(pipe, pretrained_model_name_or_path=str(trainer.final / "adapter"))


def test_what_is_trained_in_full_beside_low_rank_updates_is_not_the_teacher_s(folders, tmp_path):
    trainer = trainer_of(folders, tmp_path, "student.lora.also_train=[conv_in]", "training.share_frozen=true")
    before = {key: value.clone() for key, value in trainer.models.model.state_dict().items()}
    trainer.run()
    after = trainer.models.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert not torch.equal(trainer.student.model.conv_in.weight, before["conv_in.weight"])
    assert trainer.student.model.conv_out.weight is trainer.models.model.conv_out.weight, "the rest is one copy"


def test_distance_of_pictures_is_the_one_that_is_named(folders, tmp_path):
    shapes = []

    def distance(a, b):
        shapes.append((tuple(a.shape), a.requires_grad, b.requires_grad))
        return (a - b).abs().mean((1, 2, 3))

    options = ["objective.distance=perceptual", "objective.perceptual=somewhere:distance", "objective.crop=2"]
    train(folders, tmp_path, *options, named={"objective.perceptual": distance})
    assert len(shapes) == 3 and {s[1:] for s in shapes} == {(True, False)}
    assert {s[0][:2] for s in shapes} == {(2, 3)} and all(s[0][2] < 32 for s in shapes), "the centre of the latents"
    with pytest.raises(TypeError, match=r"objective.perceptual names \('somewhere:distance'\)"):
        trainer_of(folders, tmp_path / "b", *options)


def test_prompts_take_the_place_of_conditions_where_they_are_named(folders, tmp_path):
    wanted = "objective.unconditional={encoder_hidden_states: {prompt: a blurry picture}}"
    trainer = trainer_of(folders, tmp_path, wanted)
    (batch,) = trainer.task.batches(trainer.source, trainer.order, first=0, count=1, text_cache=None, latent_cache=None)
    made = trainer._encode(batch)
    negative = trainer.models.encode_text(["a blurry picture"])["encoder_hidden_states"]
    assert torch.equal(made["absent"]["encoder_hidden_states"], negative.expand(2, -1, -1))


@pytest.mark.parametrize(
    ("options", "line", "name"),
    [
        (["objective.discriminator=null"], "objective.discriminator: expected a section", "flash_sd15"),
        (
            ["objective.perceptual=a:b"],
            "objective.perceptual: expected null beside objective.distance: l2",
            "flash_sd15",
        ),
        (["objective.distance=perceptual"], "objective.perceptual: expected module:function beside", "flash_sd15"),
        (["training.optimizer=prodigy"], "training.optimizer: expected 'adamw' beside objective.disc", "flash_sd15"),
        (["data.caption_drop=0.1"], "data.caption_drop: expected 0.0 beside objective.kind: flash", "flash_sd15"),
        (["objective.phases.guidance=[0.5, 2]"], "objective.phases.guidance: expected [lowest, highest]", "flash_sd15"),
        (["objective.phases.dmd=[1, 2, 3]"], "objective.phases: lists must have one entry for each", "flash_sd15"),
        (["objective.unconditional={text: empty}"], "objective.unconditional: expected conditions of a", "flash_sd15"),
        (["objective.unconditional={encoder_hidden_states: blank}"], "expected zero, keep, empty or", "flash_sd15"),
        (["objective.drop={time: 0.1}"], "objective.drop: expected conditions of a Stable", "flash_sd15"),
        (["objective.prediction_type=flow"], "objective.prediction_type: expected epsilon, v_pr", "flash_sd15"),
        (["objective.prediction_type=epsilon"], "objective.prediction_type: expected 'flow'", "flash_flux"),
        (["objective.shift=null"], "shifts its levels by the size of the picture", "flash_flux"),
        (["objective.phases.grid_steps=2000"], "steps must be from 1 to 1000, got 2000", "flash_sd15"),
        (["objective.discriminator.features=[mid_blok]"], "objective.discriminator.features: UNet2D", "flash_sd15"),
    ],
)
def test_what_does_not_go_together_is_told_by_key(folders, tmp_path, options, line, name):
    with pytest.raises(RecipeError) as caught:
        trainer_of(folders, tmp_path, *options, name=name)
    assert any(line in problem for problem in caught.value.problems), caught.value.problems


def test_what_is_trained_beside_the_student_is_refused_where_weights_are_sharded(folders, tmp_path, monkeypatch):
    runs.reset_accelerator()
    monkeypatch.setattr(Trainer, "_sharded", property(lambda self: True))
    with pytest.raises(RecipeError, match=r"objective\.discriminator: expected none with FSDP or DeepSpeed"):
        Trainer(small(folders, tmp_path), say=lambda _: None)


def test_command_trains_the_bundled_model_and_says_where_the_result_is(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    settings = [*SMALL, f"data.path={folders / 'pictures'}", f"output.folder={tmp_path / 'run'}"]
    words = ["distill", "flash_tiny_sd", *(word for setting in settings for word in ("--set", setting))]
    assert main([*words, "--set", "training.steps=1", "--set", "training.batch_size=1"]) == 0
    out = capsys.readouterr().out
    assert f"done: {tmp_path / 'run' / 'final'}" in out and "2 phases" in out
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "run" / "final")
    assert type(pipe.scheduler) is LCMScheduler and pipe.scheduler.config.prediction_type == "v_prediction"
