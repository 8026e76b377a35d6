"""Inf-DiT in few steps: convergence to a known flow, levels that are trained and visited, whole runs, their results."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", reason='distillation needs the extra: pip install "linattn[train]"')
pytest.importorskip("pydantic", reason='distillation needs the extra: pip install "linattn[train]"')
pytest.importorskip("scipy", reason='distillation needs the extra: pip install "linattn[train]"')

import scipy.stats
import test_distill_infdit as whole
from helpers import runs
from PIL import Image
from safetensors.torch import load_file

from linattn.adapters import InfDiTTransformer2DModel, InfDiTUpscalePipeline
from linattn.cli import main
from linattn.distill import noise, recipe
from linattn.distill.objectives import flash
from linattn.distill.objectives.edm import EDMStepDistillation, Starts
from linattn.distill.recipe import RecipeError
from linattn.distill.trainer import Trainer
from linattn.schedulers import EDMScheduler

pytestmark = pytest.mark.usefixtures("one_thread_in_module")

#: Chance that a right distribution is taken for a wrong one, at a seed that is fixed.
UNLIKELY = 1e-3
SIDE = 32  # of the crops: 2 x 2 blocks
#: Of the pipelines: not the defaults, so that what is not handed on is seen.
LEVELS = {"sigma_min": 0.01, "sigma_max": 5.0, "rho": 5.0, "sigma_data": 0.4}


@pytest.fixture(autouse=True)
def fresh_accelerator():
    runs.reset_accelerator()
    yield
    runs.reset_accelerator()


# ------------------------------------------------------------------------------------------------------- a known flow

MEAN, SPREAD = 0.7, 0.4


def gaussian(x, sigmas, condition=None, position_offset=(0, 0)):
    """D of data N(MEAN, SPREAD^2)."""
    sigmas = sigmas.double().view(-1, *[1] * (x.ndim - 1))
    return (SPREAD**2 * x + sigmas**2 * MEAN) / (SPREAD**2 + sigmas**2)


class Affine(nn.Module):
    """A student of one-dimensional data: affine in x, with an own slope and shift at each level of a grid."""

    def __init__(self, levels):
        super().__init__()
        self.levels = levels
        self.slope, self.shift = nn.Parameter(torch.zeros(len(levels))), nn.Parameter(torch.zeros(len(levels)))

    def forward(self, x, sigmas, condition, *, position_offset):
        at = (sigmas[:, None] - self.levels).abs().argmin(1)
        # Of samples at deviation 1, so that all levels are equally easy to fit.
        scale = (SPREAD**2 + sigmas.double() ** 2).rsqrt()
        return (self.slope[at] * scale)[:, None] * x + self.shift[at][:, None]


@pytest.mark.parametrize("start", ["lr", "noise"])
def test_student_of_a_gaussian_draws_the_data_in_four_steps(start):
    """The teacher and where its path ends are known, and affine in the sample. So the student can say it, and its
    sampler gives back mean and deviation of the data."""
    starts = Starts(20)
    grid, count = starts.grid, 3000
    student = Affine(grid.timesteps).double()
    objective = EDMStepDistillation(student, gaussian, grid, start=start)
    generator = torch.Generator().manual_seed(0)
    clean = MEAN + SPREAD * torch.randn(count, 1, generator=generator, dtype=torch.float64)
    fixed = {
        "clean": clean,
        "noise": torch.randn(count, 1, generator=generator, dtype=torch.float64),
        "index": flash.start_index(torch.rand(count, generator=generator), starts.probabilities),
        "condition": {"lr_up": torch.full_like(clean, MEAN)},
    }
    first = objective(**fixed)["loss"].item()
    optimizer = torch.optim.LBFGS(student.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = objective(**fixed)["loss"]
        loss.backward()
        return loss

    optimizer.step(closure)
    assert objective(**fixed)["loss"] < 1e-6 * first

    sampler = EDMScheduler(sampler="lcm", grid_steps=20)
    sampler.set_timesteps(4)

    def drawn(clean_of):
        generator = torch.Generator().manual_seed(1)
        x = sampler.init_noise_sigma * torch.randn(20000, 1, generator=generator, dtype=torch.float64)
        x = x + MEAN if start == "lr" else x
        for call in sampler.calls:
            fresh = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                x = call.update(x, clean_of(x, torch.full((len(x),), call.sigma)), None, fresh)
        return x

    x = drawn(lambda x, sigmas: student(x, sigmas, {}, position_offset=(0, 0)))
    index = {round(level, 4): i for i, level in enumerate(grid.timesteps.tolist())}
    walked = drawn(
        lambda x, sigmas: flash.rollout(
            gaussian, x, torch.tensor([index[round(sigmas[0].item(), 4)]]), grid, prediction_type="sample", order=2
        )
    )
    assert (x - walked).abs().mean() < 0.01 * SPREAD, "as if the teacher had walked from each level"
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x.std().item() == pytest.approx(SPREAD, rel=0.1)


@pytest.mark.parametrize(("order", "sampler"), [(1, "ddim"), (2, "dpmsolver++")])
def test_teacher_walks_as_its_own_sampler_does(order, sampler):
    made = EDMScheduler(sampler=sampler, eta=0.0, **LEVELS)
    made.set_timesteps(7)
    x = torch.randn(3, 2, 5, dtype=torch.float64) * made.init_noise_sigma
    grid = Starts(7, weights=(1.0,), **{key: LEVELS[key] for key in ("sigma_min", "sigma_max", "rho")}).grid
    walked = flash.rollout(gaussian, x, torch.tensor([0]), grid, prediction_type="sample", order=order)
    history = None
    for call in made.calls:
        denoised = gaussian(x, torch.full((3,), call.sigma, dtype=torch.float64))
        x, history = call.update(x, denoised, history, None), denoised
    torch.testing.assert_close(walked, x, rtol=1e-6, atol=1e-6)  # the levels that the teacher is told are float32


# ------------------------------------------------------------------------------------------------------ where it starts


def test_training_starts_at_the_levels_that_are_sampled():
    for count in (1, 2, 4):
        starts = Starts(20, weights=(1.0,) * count, variance=0.02)
        assert set(starts.probabilities.nonzero().flatten().tolist()) >= set(flash.modes(20, count).tolist())
        assert starts.probabilities[flash.modes(20, count)].sum() > 1 - 1e-9
        sampler = EDMScheduler(sampler="lcm", grid_steps=20)
        sampler.set_timesteps(count)
        assert torch.equal(starts.grid.timesteps[flash.modes(20, count)], sampler.sigmas[:-1])


def test_starts_are_drawn_by_their_distribution_and_belong_to_the_sample():
    starts = Starts(8, weights=(0.6, 0.4), variance=2.0)

    def drawn(numbers, seed=3):
        options = {"seed": seed, "schedule": starts, "dropout": 0.0, "max_offset": 4}
        return noise.draw_pairs(numbers, (3, 4, 4), **options)

    many = drawn(range(3000)).timesteps
    found = torch.bincount(many, minlength=8).double()
    assert scipy.stats.chisquare(found.numpy(), 3000 * starts.probabilities.numpy()).pvalue > UNLIKELY
    assert torch.equal(drawn([7, 8]).timesteps, many[7:9]) and torch.equal(drawn([8]).noise, drawn([7, 8]).noise[1:])
    assert not torch.equal(drawn(range(50), seed=4).timesteps, many[:50])


@pytest.mark.parametrize("start", ["lr", "noise"])
def test_noisiest_level_is_what_sampling_starts_from_and_others_are_of_the_picture(start):
    grid = Starts(6, weights=(1.0,)).grid
    clean, added, lr_up = torch.randn(3, 3, 2, 4, 4)
    objective = EDMStepDistillation(nn.Identity(), gaussian, grid, start=start)
    made = objective.noisy(clean, added, torch.tensor([0, 2, 0]), lr_up)
    around = lr_up if start == "lr" else torch.zeros_like(lr_up)
    for i, base in ((0, around), (1, clean), (2, around)):
        level = grid.sigmas[2 if i == 1 else 0].float()
        torch.testing.assert_close(made[i], base[i] + level * added[i], msg=str(i))
    torch.testing.assert_close(objective.noisy(clean, added, torch.tensor([0]), lr_up), around + 40 * added)


class Recorder(nn.Module):
    """A denoiser that says its parameter, and keeps what it was told."""

    def __init__(self):
        super().__init__()
        self.value, self.told = nn.Parameter(torch.tensor(0.5)), []

    def forward(self, x, sigmas, condition, *, position_offset):
        self.told.append((sigmas.tolist(), position_offset, torch.is_grad_enabled()))
        return self.value.expand_as(x)


@pytest.mark.parametrize(("distance", "loss"), [("l2", 0.25), ("l1", 0.5), ("huber", math.hypot(0.5, 0.1) - 0.1)])
def test_teacher_walks_once_without_gradients_and_both_are_told_the_same(distance, loss):
    starts = Starts(6, weights=(1.0,))
    student, teacher = Recorder(), Recorder()
    teacher.value.data.fill_(1.0)
    objective = EDMStepDistillation(student, teacher, starts.grid, distance=distance, huber_c=0.1)
    clean = torch.zeros(2, 3, 4, 4)
    made = objective(clean, torch.randn(2, 3, 4, 4), torch.tensor([2]), {"lr_up": clean}, (3, 5))
    made["loss"].backward()
    levels = starts.grid.timesteps.tolist()
    assert teacher.told == [([level] * 2, (3, 5), False) for level in levels[2:]]
    assert student.told == [([levels[2]] * 2, (3, 5), True)]
    assert student.value.grad is not None and teacher.value.grad is None
    assert [name for name, _ in objective.named_parameters()] == ["student.value"]
    assert made["loss"].item() == pytest.approx(loss) and made["error"].item() == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda grid: EDMStepDistillation(nn.Identity(), gaussian, grid, start="zero"), "start must be one of lr, no"),
        (lambda grid: EDMStepDistillation(nn.Identity(), gaussian, grid, order=3), "order must be 1 or 2, got 3"),
        (lambda grid: EDMStepDistillation(nn.Identity(), gaussian, grid, distance="lpips"), "distance must be l2, l1"),
        (lambda grid: Starts(3), "expected from 1 to 3 modes on a grid of 3 steps, got 4"),
        (lambda grid: Starts(20, sigma_max=0.001), "expected 0 < sigma_min < sigma_max"),
    ],
)
def test_what_means_nothing_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(Starts(4).grid)


# --------------------------------------------------------------------------------------------------------- whole runs

SMALL = (
    "data.kind=images",
    f"data.resolution={SIDE}",
    "data.workers=0",
    "objective.grid_steps=4",
    "objective.weights=[0.5, 0.5]",
    "training.batch_size=2",
    "training.gradient_accumulation=1",
    "training.steps=3",
    "training.lr_schedule=constant",
    "training.warmup_steps=0",
    "training.learning_rate=1e-3",
    "training.gradient_checkpointing=false",
    "training.ema_decay=null",
    "student.lora.rank=2",
    "output.log_with=null",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pipeline with an image vector, one without, and pictures."""
    root = tmp_path_factory.mktemp("infdit_steps")
    torch.manual_seed(1)
    for name, vector_dim, encoder in (("infdit", 8, whole.tiny_clip()), ("plain", 0, None)):
        model = InfDiTTransformer2DModel(**whole.TINY | {"vector_dim": vector_dim})
        for parameter in model.parameters():  # nothing of a trained model is zero
            parameter.data.add_(torch.randn(parameter.shape) * 0.02)
        InfDiTUpscalePipeline(model, EDMScheduler(**LEVELS), encoder).save_pretrained(root / name)
    (root / "images").mkdir()
    for name in whole.LARGE:
        (root / "images" / f"{name}.png").write_bytes(whole.stored(name))
    return root


def small(folders, out, *overrides, start="plain"):
    places = [f"data.path={folders / 'images'}", f"output.folder={out}", f"model.pretrained={folders / start}"]
    precision = () if any("mixed_precision" in o for o in overrides) else ("training.mixed_precision=no",)
    return recipe.load("infdit_few_steps", [*SMALL, *places, *precision, *overrides])


def trainer_of(*arguments, **options):
    runs.reset_accelerator()
    return Trainer(small(*arguments, **options), pipeline_class=InfDiTUpscalePipeline, say=lambda _: None)


def train(*arguments, **options):
    trainer = trainer_of(*arguments, **options)
    trainer.final = trainer.run()
    return trainer


def assert_same_weights(a, b):
    a, b = (load_file(out / "final" / "transformer" / "diffusion_pytorch_model.safetensors") for out in (a, b))
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, {different[0]} the first"


def student_of(folders, final, start="plain"):
    """The result as users load it."""
    if (final / "model_index.json").is_file():
        pipe = InfDiTUpscalePipeline.from_pretrained(final)
    else:
        pipe = InfDiTUpscalePipeline.from_pretrained(folders / start)
        pipe.scheduler = EDMScheduler.from_pretrained(final / "scheduler")
        pipe.transformer.load_lora_adapter(final, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def visited(pipe, monkeypatch, steps):
    """What the network is told in each of its calls."""
    told, original = [], InfDiTTransformer2DModel.strips

    def strips(self, read, height, width, timestep, *rest, **options):
        told.append(float(timestep))
        return original(self, read, height, width, timestep, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(InfDiTTransformer2DModel, "strips", strips)
        pipe(Image.new("RGB", (9, 7)), num_inference_steps=steps)
    return told


@pytest.mark.parametrize("way", ["full", "lora"])
def test_shipped_recipe_moves_the_student_and_nothing_else(folders, tmp_path, way):
    """In bfloat16 with checkpointing, as shipped; and the result is read and drawn as users do it."""
    precision = recipe.load("infdit_few_steps").training.mixed_precision
    shown = f"output.validation={{images: ['{folders / 'images' / 'f.png'}'], every: 9, steps: 2}}"
    options = [f"training.mixed_precision={precision}", "training.gradient_checkpointing=true", shown]
    trainer = trainer_of(folders, tmp_path, *options, f"student.train={way}", start="infdit")
    models = trainer.models
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in models.model.parameters())
    assert all(p.dtype == torch.float32 for p in trainer.trainable.values())
    teacher = {key: value.clone() for key, value in models.model.state_dict().items()}
    before = {key: value.detach().clone() for key, value in trainer.trainable.items()}
    assert all(".lora_" in key for key in before) == (way == "lora")
    final = trainer.run()
    assert all(torch.equal(value, teacher[key]) for key, value in models.model.state_dict().items())
    # Low-rank updates begin at zero: the first factor has a gradient from the second step on, and barely one in bf16.
    still = [k for k, value in trainer.trainable.items() if torch.equal(value, before[k]) and ".lora_A" not in k]
    assert not still, f"{still} did not move in three steps"
    assert len(list((tmp_path / "validation").iterdir())) == 1

    pipe, stock = student_of(folders, final, "infdit"), InfDiTUpscalePipeline.from_pretrained(folders / "infdit")
    assert {key: pipe.scheduler.config[key] for key in LEVELS} == LEVELS
    picture = Image.open(folders / "images" / "f.png")

    def drawn(pipe):
        options = {"num_inference_steps": 2, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
        return pipe(picture, **options).images

    stock.set_progress_bar_config(disable=True)
    stock.scheduler = pipe.scheduler
    assert (drawn(pipe) - drawn(stock)).abs().max() > 1e-4
    loaded = pipe.transformer.state_dict()
    for key, value in trainer.trainable.items():
        assert torch.equal(loaded[key.replace(".default.", ".default_0.")], value), key


def test_student_needs_4_calls_where_its_teacher_needs_39_at_the_levels_it_was_trained_at(
    folders, tmp_path, monkeypatch
):
    levels = ["objective.grid_steps=20", "objective.weights=[1, 1, 1, 1]", "objective.variance=0.02"]
    trainer = trainer_of(folders, tmp_path, *levels, "training.steps=12", "training.batch_size=1")
    trained, teacher = set(), []
    trainer.objective.student.register_forward_pre_hook(lambda _, args: trained.update(args[1].tolist()))
    trainer.models.model.register_forward_pre_hook(lambda *_: teacher.append(1))
    pipe = student_of(folders, trainer.run())
    told = visited(pipe, monkeypatch, 4)
    assert len(told) == 4 and told == sorted(told, reverse=True)
    assert [math.exp(4 * t) for t in told] == pytest.approx(sorted(trained, reverse=True), rel=1e-5)
    assert 12 * 5 <= len(teacher) <= 12 * 20, "as many calls of the teacher as there are steps to the end"
    stock = InfDiTUpscalePipeline.from_pretrained(folders / "plain")
    stock.set_progress_bar_config(disable=True)
    assert len(visited(stock, monkeypatch, 20)) == 39
    with pytest.raises(ValueError, match=r"num_inference_steps must be from 1 to grid_steps \(20\), got 21"):
        pipe(Image.new("RGB", (9, 7)), num_inference_steps=21)


def test_students_enlarge_in_strips_what_they_enlarge_as_a_whole(folders):
    """Also of several pictures together, with noise of each picture's own generator."""
    pipe = InfDiTUpscalePipeline.from_pretrained(folders / "plain")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EDMScheduler.from_config(pipe.scheduler.config, sampler="lcm", grid_steps=8)
    pictures = [Image.fromarray(np.asarray(Image.open(folders / "images" / "f.png"))[:18, k : k + 14]) for k in (0, 9)]

    def drawn(pictures, seeds, schedule, **options):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options |= {"schedule": schedule, "max_memory": None, "output_type": "latent", "num_inference_steps": 4}
        return pipe(pictures, generator=generators, **options).images

    together = drawn(pictures, [3, 4], "full", batch_size=2)
    assert together.shape == (2, 3, 72, 56)
    for schedule in ("layer_major", "streaming"):
        torch.testing.assert_close(drawn(pictures, [3, 4], schedule), together, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawn(pictures[1:], [4], "full"), together[1:], rtol=1e-4, atol=1e-4)
    assert (drawn(pictures[1:], [5], "full") - together[1:]).abs().max() > 1e-2


def test_the_batch_becomes_what_the_objective_needs(folders, tmp_path):
    settings = ["training.batch_size=4", "objective.per_sample=true", "objective.max_offset=9", "objective.start=noise"]
    trainer = trainer_of(folders, tmp_path, *settings, "objective.order=1", "objective.distance=l1", start="infdit")
    (batch,) = trainer.task.batches(trainer.source, trainer.order, first=0, count=1, text_cache=None, latent_cache=None)
    made = trainer._encode(batch)
    options = {"seed": 0, "schedule": trainer.schedule, "dropout": 0.0, "max_offset": 9}
    random = noise.draw_pairs(range(4), (3, SIDE, SIDE), **options)
    assert torch.equal(made["noise"], random.noise) and torch.equal(made["index"], random.timesteps)
    assert made["position_offset"] == random.offset and torch.equal(made["clean"], batch["image"])
    condition = trainer.models.encode_lr(batch["lr_image"])
    assert all(torch.equal(made["condition"][name], value) for name, value in condition.items())
    objective = trainer.objective
    assert (objective.start, objective.order, objective._distance["kind"]) == ("noise", 1, "l1")
    (teacher,) = objective._frozen
    assert objective.student.sigma_data == teacher.sigma_data == LEVELS["sigma_data"]
    assert teacher.model is trainer.models.model is not objective.student.model
    wanted = {key: LEVELS[key] for key in ("sigma_min", "sigma_max", "rho")}
    assert torch.equal(objective.grid.sigmas, Starts(4, weights=(1,), **wanted).grid.sigmas)
    trainer = trainer_of(folders, tmp_path, "training.batch_size=4")
    assert torch.equal(trainer._encode(batch)["index"], random.timesteps[:1]), "one for the batch: of its first sample"


EVERYTHING = (
    "training.steps=4",
    "training.gradient_accumulation=2",
    "training.ema_decay=0.9",
    "training.lr_schedule=cosine",
    "objective.distance=huber",
    "output.checkpoint_every=1",
)


def test_run_killed_at_random_moments_ends_in_the_same_bits(folders, tmp_path):
    def run(out):
        train(folders, out, *EVERYTHING)

    duration = runs.timed(run, tmp_path / "whole")
    assert runs.killed_until_done(run, tmp_path / "killed", duration=duration) >= 1
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")


def test_two_processes_end_in_the_bits_of_one_that_accumulates_twice_as_much(folders, tmp_path):
    def run(out, *options):
        train(folders, out, "training.steps=2", "objective.per_sample=true", *options)

    run(tmp_path / "one", "training.gradient_accumulation=2")
    assert runs.together(run, tmp_path / "two") == [0, 0]
    assert_same_weights(tmp_path / "one", tmp_path / "two")


def test_training_brings_the_student_to_where_its_teacher_ends(folders, tmp_path):
    """On pictures that training has not drawn, from the noisiest level."""
    options = ["training.steps=15", "training.learning_rate=5e-3", "training.batch_size=4"]
    trainer = trainer_of(folders, tmp_path, *options, "objective.weights=[1.0]")
    tasks = trainer.task.batches(trainer.source, trainer.order, first=999, count=1, text_cache=None, latent_cache=None)
    batch = trainer._encode(next(iter(tasks)))
    losses = []
    for run in (lambda: None, trainer.run):
        run()
        with torch.no_grad():
            losses.append(trainer.objective(**batch)["loss"].item())
    assert losses[1] < 0.5 * losses[0], losses


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["student.adapter=a:B"], "student.adapter: expected null beside objective.kind: edm_steps, got 'a:B'"),
        (["model.pretrained=null", "model.config={}"], "model.config: expected null beside objective.kind: edm_steps"),
        (["training.share_frozen=true"], "training.share_frozen: expected false or null beside objective.kind: edm_st"),
        (["data.caption_drop=0.1"], "data.caption_drop: expected 0.0 beside objective.kind: edm_steps"),
        (["data.image_key=file"], "data.image_key: expected null beside objective.kind: edm_steps"),
        (["output.validation.prompts=[a cat]"], "output.validation.prompts: expected [] beside objective.kind: edm_s"),
        (
            ["output.validation={images: [a.png], steps: 5}"],
            "output.validation.steps: expected at most objective.grid_steps (4) beside objective.kind: edm_steps",
        ),
        (["objective.weights=[]"], "objective.weights: expected from 1 to objective.grid_steps (4) numbers, got 0"),
        (["objective.weights=[1, 1, 1, 1, 1]"], "objective.weights: expected from 1 to objective.grid_steps (4)"),
        (["objective.weights=[0, 0]"], "objective.weights: expected at least one above 0, got [0.0, 0.0]"),
        (["objective.weights=[-1]"], "objective.weights[0]: expected a number"),
        (["objective.order=3"], "objective.order: expected a number"),
        (["objective.start=zero"], "objective.start: expected 'lr' or 'noise', got 'zero'"),
        (["objective.distance=perceptual"], "objective.distance: expected 'l2', 'l1' or 'huber'"),
        (["objective.lr_dropout=0.1"], "objective.lr_dropout: unknown key; expected only beside objective.kind: edm"),
    ],
)
def test_what_does_not_go_together_is_told_by_key(folders, tmp_path, options, line):
    with pytest.raises(RecipeError) as caught:
        small(folders, tmp_path, *options)
    assert any(problem.startswith(line) for problem in caught.value.problems), caught.value.problems


def test_low_rank_students_share_what_is_frozen_with_their_teacher(folders, tmp_path):
    trainer = trainer_of(folders, tmp_path, "student.train=lora")
    own = {id(p) for p in trainer.models.model.parameters()}
    others = {id(p) for p in trainer.student.model.parameters()} - own
    assert others == {id(p) for p in trainer.trainable.values()}
    with pytest.raises(ValueError, match=r"student\.lora\.targets: InfDiTTransformer2DModel has no layer .* 'to_x'"):
        trainer_of(folders, tmp_path / "b", "student.train=lora", "student.lora.targets=[to_x]")


def test_command_says_what_it_will_do(folders, tmp_path, capsys):
    given = [*SMALL, f"data.path={folders / 'images'}", f"output.folder={tmp_path / 'run'}"]
    given += [f"model.pretrained={folders / 'plain'}", "training.mixed_precision=no"]
    arguments = ["distill", "infdit_few_steps", *(part for option in given for part in ("--set", option))]
    assert main([*arguments, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "InfDiTUpscalePipeline), 4 steps of order 2" in told and "a copy, 2 steps; trains" in told


def test_command_enlarges_with_the_student_s_own_sampler(folders, tmp_path, capsys):
    pipe = InfDiTUpscalePipeline.from_pretrained(folders / "plain")
    pipe.scheduler = EDMScheduler.from_config(pipe.scheduler.config, sampler="lcm", grid_steps=8)
    pipe.save_pretrained(tmp_path / "student")
    picture = str(folders / "images" / "f.png")
    arguments = ["upscale", picture, "--model", str(tmp_path / "student"), "--steps", "4", "--out", str(tmp_path / "a")]
    assert main(arguments) == 0
    told = capsys.readouterr()
    assert "4 steps of lcm" in told.out + told.err
    (made,) = (tmp_path / "a").glob("*.png")
    assert Image.open(made).size == (128, 128)


def test_example_distils_the_bundled_model_and_scores_both(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "examples")
    import few_steps_infdit as example

    original = example.photographs.original
    monkeypatch.setattr(example.photographs, "original", lambda name: original(name).crop((0, 0, 96, 64)))
    assert example.main(["--out", str(tmp_path), "--bundled", "--steps", "1"]) == 0
    facts = json.loads((tmp_path / "scores.json").read_text())
    assert facts["student's training, CPU seconds"] > 0 and list(facts["scores"]) == ["chelsea", "china"]
    for rows in facts["scores"].values():
        assert {row: fact["calls"] for row, fact in rows.items()} == {
            "bicubic": 0,
            "teacher, 2 steps of heun": 3,
            "teacher, 1 steps of lcm": 1,
            "student, 1 steps of lcm": 1,
        }
        assert all(fact["psnr"][0] > 15 and 0 <= fact["detail"] < 2 for fact in rows.values())
    assert "student, 1 steps of lcm" in capsys.readouterr().out
