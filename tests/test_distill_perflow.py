"""Training of PeRFlow students: the recorded losses, convergence to a known flow, whole runs, what they export."""

import contextlib
import itertools
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", reason='distillation needs the extra: pip install "linattn[train]"')
pytest.importorskip("pydantic", reason='distillation needs the extra: pip install "linattn[train]"')

import scipy.stats
from diffusers import DiffusionPipeline
from helpers import goldens, runs
from helpers.pictures import captioned_noise
from helpers.tiny_pipelines import tiny_pipeline
from PIL import Image
from safetensors.torch import load_file

from linattn import delta_weights
from linattn.adapters import LinFusion
from linattn.cli import main
from linattn.cli.distill import resolve
from linattn.distill import checkpoint, noise, recipe
from linattn.distill.objectives import perflow
from linattn.distill.trainer import Trainer
from linattn.schedulers import PeRFlowScheduler, piecewise

pytestmark = pytest.mark.usefixtures("one_thread_in_module")

# Relative, of one rounding in float32, and of a few in float64.
FLOAT32, FLOAT64 = 2.0**-23, 1e-12
#: Chance that a right distribution is taken for a wrong one, at a seed that is fixed.
UNLIKELY = 1e-3


@pytest.fixture(autouse=True)
def fresh_accelerator():
    runs.reset_accelerator()
    yield
    runs.reset_accelerator()


# ------------------------------------------------------------------------------------------------ against the original


def scalars():
    return json.loads(goldens.path("perflow", "scalars.json").read_text())


def shaped(values, like):
    return values.view(-1, *[1] * (like.ndim - 1))


class GoldenStudent(nn.Module):
    """The goldens' student as a `Denoiser`, which remembers what it was asked."""

    def forward(self, noisy, timesteps, condition):
        self.asked = noisy, timesteps, condition
        text = condition["prompt"].double().mean((1, 2))
        return torch.tanh(0.3 * noisy.double() + shaped(0.0005 * timesteps.double() + text, noisy)).float()


def golden_teacher(noisy, timesteps, condition):
    a, b = scalars()["config"]["a"], scalars()["config"]["b"]
    text = condition["prompt"].double().mean((1, 2))
    if "pooled" in condition:
        text = text + 0.1 * condition["pooled"].double().mean(1) + 1e-4 * (4 * 1024 / 6)
    return torch.tanh(a * noisy.double() + shaped(b * timesteps.double() + text, noisy)).float()


@goldens.needs_goldens
@pytest.mark.parametrize("case", [f"{i:02d}" for i in range(18)])
def test_objective_gives_the_losses_of_the_original(case):
    tensors, _ = goldens.load("perflow", "train_step")
    settings = scalars()["train_cases"][case]
    golden = {key.removeprefix(f"{case}."): value for key, value in tensors.items() if key.startswith(f"{case}.")}
    condition, unconditional = {"prompt": tensors["text_embeds"]}, {"prompt": tensors["null_embeds"]}
    if "sdxl" in settings["script"]:
        condition["pooled"], unconditional["pooled"] = tensors["pooled"], tensors["null_pooled"]
    student = GoldenStudent()
    objective = perflow.PeRFlowTraining(
        student,
        golden_teacher,
        PeRFlowScheduler()._marginal,
        piecewise.window_bounds(settings["windows"]),
        prediction_type=settings["pred_type"],
        steps=settings["solving_steps"],
        guidance=None if settings["cfg_sync"] else settings["teacher_guidance"],
        begin_at_noise=settings["zero_snr"],
        legacy_grid=True,
        **{key: settings[key] for key in ("distance", "huber_c", "reweighting")},
    )
    dropped = torch.tensor([0, 0, 1, 0, 0, 1]).bool()
    losses = objective(tensors["latents"], golden["noises"], golden["timepoints"], condition, unconditional, dropped)
    noisy, told, seen = student.asked
    rounding = FLOAT32 * settings["solving_steps"] * settings["teacher_guidance"]
    assert goldens.relative_error(noisy, golden["latents_t"]) < rounding
    assert told.dtype == torch.float32 and torch.allclose(told, golden["model_t"])
    assert torch.equal(seen["prompt"], tensors["text_embeds_dropped"])
    # As in test_perflow_targets: what is left of the targets after cancellation has the rounding of their terms.
    assert losses["loss"].item() == pytest.approx(settings["loss"], rel=1e-4)


# ---------------------------------------------------------------------------------------------------------- convergence


class Spread(nn.Module):
    """A student of one-dimensional Gaussian data: affine in z, with an own slope and shift for each of four windows.

    It can say the chord of a window at the window's start without error, where four steps ask it.
    """

    def __init__(self):
        super().__init__()
        self.slope, self.shift = nn.Parameter(torch.zeros(4, 6)), nn.Parameter(torch.zeros(4, 6))

    def forward(self, z, timesteps, condition):
        t = timesteps.double() / 1000
        start, end = piecewise.windows_of(t, piecewise.window_bounds(4))
        window = (4 * (1 - start)).round().long()
        powers = ((t - start) / (end - start))[:, None] ** torch.arange(6)
        slope, shift = ((w[window].double() * powers).sum(1)[:, None] for w in (self.slope, self.shift))
        return slope * z + shift


@pytest.mark.parametrize(
    ("kind", "is_flow"), [("ddim_eps", False), ("diff_eps", False), ("velocity", False), ("velocity", True)]
)
def test_student_of_a_gaussian_reaches_the_end_of_its_teachers_path_in_four_steps(kind, is_flow):
    """Data ~ N(m, s^2) has a linear flow and a teacher that is known exactly. So the loss has a minimum of zero, the
    map that takes each window in one step, and the objective has to lead there with nothing but its gradient."""
    mean, spread = 0.7, 0.4
    scheduler = PeRFlowScheduler(prediction_type=kind, use_flow_sigmas=is_flow)
    marginal, bounds = scheduler._marginal, piecewise.window_bounds(4)

    def teacher(z, timesteps, condition=None):
        if is_flow:
            a, c = 1 - timesteps.double() / 1000, timesteps.double() / 1000
        else:
            abar = marginal.alphas_cumprod[timesteps]
            a, c = abar.sqrt(), (1 - abar).sqrt()
        a, c = shaped(a, z), shaped(c, z)
        clean = mean + a * spread**2 / (a**2 * spread**2 + c**2) * (z - a * mean)
        noise = (z - a * clean) / c
        return noise - clean if is_flow else noise

    solver = {"steps": 5, "teacher_prediction_type": "flow" if is_flow else "epsilon"}
    student = Spread().double()
    objective = perflow.PeRFlowTraining(student, teacher, marginal, bounds, prediction_type=kind, **solver)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, 1, generator=generator, dtype=torch.float64)
    wanted = noise
    for start, end in itertools.pairwise(bounds):
        times = start.expand(200), end.expand(200)
        solve = {"steps": 5, "prediction_type": solver["teacher_prediction_type"]}
        wanted = perflow.solve(teacher, wanted, *times, marginal, **solve)

    def error():
        scheduler.set_timesteps(4)
        z = noise
        for t in scheduler.timesteps:
            with torch.no_grad():
                z = scheduler.step(student(z, t.expand(len(z)), {}), t, z).prev_sample
        return (z - wanted).abs().mean().item()

    def batch(count=2000):
        clean = mean + spread * torch.randn(count, 1, generator=generator, dtype=torch.float64)
        added = torch.randn(count, 1, generator=generator, dtype=torch.float64)
        t = perflow.times(torch.rand(count, generator=generator, dtype=torch.float64))
        return {"latents": clean, "noise": added, "timesteps": t, "condition": {}}

    before, first = error(), objective(**batch())
    # One batch, and the minimum of a quadratic: where L-BFGS stops there is no gradient left.
    optimizer, fixed = torch.optim.LBFGS(student.parameters(), max_iter=300, line_search_fn="strong_wolfe"), batch()

    def closure():
        optimizer.zero_grad()
        loss = objective(**fixed)["loss"]
        loss.backward()
        return loss

    optimizer.step(closure)
    last = objective(**batch())
    assert last["loss"] < 1e-3 * first["loss"] and last["end"] < 1e-3 * first["end"], "on samples that are new"
    assert error() < 0.02 * before


def test_ends_of_windows_are_compared_and_nothing_but_the_loss_has_a_gradient():
    """A student that says the target points to the window's end from everywhere, whatever its prediction type."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "latents": torch.randn(6, 2, 3, generator=generator, dtype=torch.float64),
        "noise": torch.randn(6, 2, 3, generator=generator, dtype=torch.float64),
        "timesteps": torch.tensor([1.0, 0.8, 0.75, 0.4, 0.26, 0.001], dtype=torch.float64),
        "condition": {},
    }
    marginal, bounds = PeRFlowScheduler()._marginal, piecewise.window_bounds(4)

    def teacher(z, timesteps, condition=None):
        return torch.tanh(0.7 * z + 0.001 * shaped(timesteps.double(), z))

    for kind in piecewise.PREDICTIONS:
        made = perflow.segment(
            inputs["latents"],
            inputs["noise"],
            inputs["timesteps"],
            teacher,
            marginal,
            bounds,
            prediction_type=kind,
            steps=2,
        )
        perfect = Constant(made.target)
        losses = perflow.PeRFlowTraining(perfect, teacher, marginal, bounds, prediction_type=kind, steps=2)(**inputs)
        assert losses["loss"] == 0 and losses["end"] < FLOAT64**2 * made.z_end.square().mean()
        assert losses["loss"].requires_grad and not losses["end"].requires_grad
        perfect.output.data.add_(1)
        losses = perflow.PeRFlowTraining(perfect, teacher, marginal, bounds, prediction_type=kind, steps=2)(**inputs)
        assert losses["loss"].item() == pytest.approx(1) and losses["end"] > 1e-3


class Constant(nn.Module):
    """A student that says the same whatever it is asked."""

    def __init__(self, output):
        super().__init__()
        self.output = nn.Parameter(output.clone())

    def forward(self, noisy, timesteps, condition):
        return self.output


# --------------------------------------------------------------------------------------------------- random numbers


def test_times_belong_to_the_samples_and_every_window_is_drawn_equally_often():
    for shift in (1.0, 3.0):
        times = perflow.Times(200, shift)
        drawn = noise.draw(range(2000), (1,), seed=3, schedule=times).timesteps
        assert drawn.dtype == torch.float64 and drawn.min() > 0 and drawn.max() == 1
        assert len(drawn.unique()) <= 200
        starts, counts = piecewise.windows_of(drawn, piecewise.window_bounds(4, shift))[0].unique(return_counts=True)
        assert len(starts) == 4 and scipy.stats.chisquare(counts.numpy()).pvalue > UNLIKELY
    again = noise.draw([5, 1999], (1,), seed=3, schedule=times).timesteps
    assert torch.equal(again, drawn[[5, 1999]])
    assert not torch.equal(noise.draw(range(20), (1,), seed=4, schedule=times).timesteps, drawn[:20])


def test_dropped_captions_belong_to_the_samples_and_are_independent_of_their_times():
    numbers = range(3000)
    dropped = noise.chosen(numbers, 0.1, seed=3)
    assert dropped.dtype == torch.bool
    assert scipy.stats.binomtest(int(dropped.sum()), 3000, 0.1).pvalue > UNLIKELY
    assert torch.equal(noise.chosen([7, 8, 9], 0.5, seed=3), noise.chosen(numbers, 0.5, seed=3)[7:10])
    assert not torch.equal(noise.chosen(numbers, 0.1, seed=4), dropped)
    assert not noise.chosen(numbers, 0.0, seed=3).any() and noise.chosen(numbers, 1.0, seed=3).all()
    t = noise.draw(numbers, (1,), seed=3, schedule=perflow.Times()).timesteps
    assert scipy.stats.ks_2samp(t[dropped], t[~dropped]).pvalue > UNLIKELY


# --------------------------------------------------------------------------------------------------------- whole runs

FAMILIES = {
    "perflow_sd15": "sd15",
    "perflow_sd21": "sd21",
    "perflow_sdxl": "sdxl",
    "perflow_flux": "flux",
    "perflow_tiny_sd": "sd21",
}
#: Small and quick, on the CPU; everything else is as the shipped recipe has it.
SMALL = (
    "training.batch_size=2",
    "training.gradient_accumulation=1",
    "training.steps=3",
    "training.lr_schedule=constant",
    "training.warmup_steps=0",
    "training.learning_rate=1e-3",
    "training.ema_decay=null",
    "objective.solver_steps=2",
    "data.resolution=32",
    "data.workers=0",
    "data.cache={}",
    "output.log_with=null",
    "output.validation.prompts=[]",
)
SMALL_FLUX = ("model.text_length=12", "student.lora.rank=2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved tiny pipelines by family, and "pictures": a folder of 7 pictures with captions."""
    root = tmp_path_factory.mktemp("perflow")
    for family in {*FAMILIES.values(), "sd3"}:
        tiny_pipeline(family).save_pretrained(root / family)
    captioned_noise(root / "pictures", 7)
    return root


def small(folders, out, *overrides, name="perflow_sd15", family=None):
    family = family or FAMILIES[name]
    places = (f"model.pretrained={folders / family}", f"data.path={folders / 'pictures'}", f"output.folder={out}")
    precision = () if any("mixed_precision" in o for o in overrides) else ("training.mixed_precision=no",)
    flux = SMALL_FLUX if name == "perflow_flux" else ()
    return recipe.load(name, [*SMALL, *flux, *places, *precision, *overrides])


def trainer_of(*arguments, **options):
    runs.reset_accelerator()
    wanted = small(*arguments, **options)
    adapter = resolve(wanted.student.adapter) if wanted.student.adapter else None
    return Trainer(wanted, adapter, say=lambda _: None)


def train(*arguments, **options):
    trainer = trainer_of(*arguments, **options)
    trainer.final = trainer.run()
    return trainer


def final_weights(out):
    folder = out / "final"
    (file,) = [*folder.glob("delta_weights.safetensors"), *folder.glob("pytorch_lora_weights.safetensors")]
    return load_file(file)


def assert_same_weights(a, b):
    a, b = final_weights(a), final_weights(b)
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, {different[0]} the first"


@pytest.mark.parametrize("name", FAMILIES)
def test_shipped_recipe_moves_the_student_and_nothing_else(folders, tmp_path, name):
    stock = DiffusionPipeline.from_pretrained(folders / FAMILIES[name])
    # fp16 needs a GPU; that recipe is run in float32, the others in the type that they ask for.
    precision = recipe.load(name).training.mixed_precision.replace("fp16", "no")
    checkpointing = "training.gradient_checkpointing=false" if precision == "no" else "output.log_every=10"
    trainer = train(folders, tmp_path, f"training.mixed_precision={precision}", checkpointing, name=name)
    narrow = torch.bfloat16 if precision == "bf16" else torch.float32
    for part, module in trainer.models.pipeline.components.items():
        if isinstance(module, nn.Module):
            after = module.state_dict()
            for key, value in stock.components[part].state_dict().items():
                assert torch.equal(after[key], value.to(after[key].dtype)), f"{part}.{key} moved"
    assert all(p.dtype == torch.float32 for p in trainer.trainable.values())
    base = getattr(stock, trainer.models.component).state_dict()
    if trainer.recipe.student.train == "lora":
        assert all(".lora_" in key for key in trainer.trainable)
        for key, value in trainer.student.model.state_dict().items():
            if ".lora_" not in key:
                assert torch.equal(value, base[key.replace(".base_layer.", ".")].to(narrow)), f"{key} moved"
        still = [key for key, p in trainer.trainable.items() if ".lora_B" in key and not p.any()]
    else:
        assert set(trainer.trainable) == {key for key, _ in getattr(stock, trainer.models.component).named_parameters()}
        state = trainer.student.model.state_dict()
        still = [key for key in trainer.trainable if torch.equal(state[key], base[key])]
    assert not still, f"{still} did not move in three steps"


def drawn(pipe, steps=4):
    """Latents of a picture from a fixed seed."""
    options = {"generator": torch.Generator().manual_seed(0), "height": 32, "width": 32, "output_type": "latent"}
    if "Flux" in type(pipe).__name__:
        options["max_sequence_length"] = 12
    pipe.set_progress_bar_config(disable=True)
    return pipe("a two", num_inference_steps=steps, **options).images


@pytest.mark.parametrize(("name", "precision"), [("perflow_sd15", "no"), ("perflow_sdxl", "bf16")])
def test_result_is_a_pipeline_and_a_difference_to_the_exact_weights_of_the_teacher(folders, tmp_path, name, precision):
    trainer = train(folders, tmp_path, f"training.mixed_precision={precision}", name=name)
    pipe = DiffusionPipeline.from_pretrained(trainer.final)
    assert type(pipe.scheduler) is PeRFlowScheduler
    wanted = trainer.recipe.objective
    config = pipe.scheduler.config
    assert (config.prediction_type, config.num_time_windows) == (wanted.prediction_type, wanted.windows)
    tuned = trainer.student.model.state_dict()
    assert all(torch.equal(value, tuned[key]) for key, value in pipe.unet.state_dict().items())
    stock = DiffusionPipeline.from_pretrained(folders / FAMILIES[name])
    delta = delta_weights.load(trainer.final)
    assert all(torch.equal(delta[key], tuned[key] - value) for key, value in stock.unet.state_dict().items())
    delta_weights.merge(stock.unet, delta)
    stock.scheduler = PeRFlowScheduler.from_pretrained(trainer.final, subfolder="scheduler")
    if precision == "no":
        # Differences and sums of float32: a rounding of each weight.
        torch.testing.assert_close(drawn(stock), drawn(pipe), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "family", "options"),
    [
        ("perflow_flux", "flux", ()),
        ("perflow_flux", "sd3", ("data.caption_drop=0.5", "model.text_length=12", "SD3")),
        ("perflow_sdxl", "sdxl", ("student.train=lora", "CONV")),
    ],
)
def test_low_rank_student_is_read_by_stock_diffusers(folders, tmp_path, name, family, options):
    targets = {
        "SD3": "student.lora.targets=[to_q, to_k, to_v, to_out.0, add_q_proj, ff.net.0.proj, ff.net.2]",
        "CONV": "student.lora={rank: 2, alpha: 4, targets: [to_q, to_out.0, conv1, conv_shortcut, time_emb_proj, "
        "proj_in, ff.net.0.proj], also_train: []}",
    }
    options = [targets.get(option, option) for option in options]
    shown = "output.validation={prompts: [a two], steps: 4, height: 32, width: 32}"
    trainer = train(folders, tmp_path, "training.learning_rate=0.05", shown, *options, name=name, family=family)
    pipe = DiffusionPipeline.from_pretrained(folders / family)
    before = drawn_by(pipe, trainer)
    pipe.load_lora_weights(trainer.final)
    made, wanted = drawn_by(pipe, trainer), trainer.task.pictures(trainer.models, trainer.student.model, no_autocast)
    # The same layers in another order of the same sums.
    difference = np.abs(made - np.asarray(wanted[0], dtype=int)).max()
    assert difference <= 1 and np.abs(before - made).max() > 10 * max(difference, 1), "the LoRA is what makes them"


def drawn_by(pipe, trainer):
    models = type(trainer.models)(pipe)
    models.text_length = trainer.models.text_length
    (picture,) = trainer.task.pictures(models, models.model, no_autocast)
    return np.asarray(picture, dtype=int)


def no_autocast():
    return contextlib.nullcontext()


def test_scheduler_of_the_result_has_the_process_and_the_windows_of_the_training(folders, tmp_path):
    flow = trainer_of(folders, tmp_path, "objective.window_shift=2.5", name="perflow_flux")
    config = flow.student.scheduler.config
    assert (config.use_flow_sigmas, config.window_shift, config.prediction_type) == (True, 2.5, "velocity")
    teacher, marginal, bounds = flow.objective._frozen
    assert torch.equal(bounds, flow.student.scheduler._bounds) and marginal.alphas_cumprod is None
    assert flow.schedule.shift == 2.5 and teacher.guidance == flow.objective.student.guidance == 3.5
    assert flow.objective._segment["teacher_prediction_type"] == "flow"
    velocity = trainer_of(folders, tmp_path, "objective.levels=200", name="perflow_sd21")
    assert velocity.objective._segment["teacher_prediction_type"] == "v_prediction"
    assert velocity.schedule.levels == 200 and not velocity.student.scheduler.config.use_flow_sigmas
    levels = velocity.models.schedule()._scheduler.alphas_cumprod
    assert torch.equal(velocity.objective._frozen[1].alphas_cumprod, levels.double())


@pytest.mark.parametrize("name", ["perflow_sd15", "perflow_sdxl"])
def test_student_is_dropped_captions_and_a_guided_teacher_is_not(folders, tmp_path, name):
    trainer = trainer_of(folders, tmp_path, "training.batch_size=6", "data.caption_drop=0.5", name=name)
    (batch,) = trainer.task.batches(trainer.source, trainer.order, first=0, count=1, text_cache=None, latent_cache=None)
    assert all(caption.startswith("a handwritten") for caption in batch["caption"])
    made = trainer._encode(batch)
    wanted = noise.chosen(batch["number"].tolist(), 0.5, seed=0)
    assert torch.equal(made["dropped"], wanted) and 0 < wanted.sum() < 6
    empty = trainer.models.encode_text([""])
    for key, value in trainer.models.encode_text(batch["caption"]).items():
        assert torch.equal(made["condition"][key], value)
        assert torch.equal(made["unconditional"][key].expand_as(value), empty[key].expand_as(value))
    asked = {"teacher": [], "student": []}
    teacher, *rest = trainer.objective._frozen

    def heard(who, denoiser):
        return lambda noisy, t, condition: asked[who].append(condition) or denoiser(noisy, t, condition)

    trainer.objective._frozen = (heard("teacher", teacher), *rest)
    trainer.objective.student.register_forward_pre_hook(lambda _, inputs: asked["student"].append(inputs[2]))
    trainer.objective(**made)
    assert len(asked["teacher"]) == 4 - 2 and len(asked["student"]) == 1, "two steps of the teacher, one of the student"
    (seen,) = asked["student"]
    text = made["condition"]["encoder_hidden_states"]
    nothing = empty["encoder_hidden_states"].expand_as(text)
    assert torch.equal(seen["encoder_hidden_states"][wanted], nothing[wanted])
    assert torch.equal(seen["encoder_hidden_states"][~wanted], text[~wanted])
    for told in asked["teacher"]:
        if name == "perflow_sd15":  # cfg-sync
            assert torch.equal(told["encoder_hidden_states"], seen["encoder_hidden_states"])
        else:
            assert torch.equal(told["encoder_hidden_states"], torch.cat([nothing, text]))
            assert torch.equal(told["time_ids"], torch.cat([made["condition"]["time_ids"]] * 2))
    if name == "perflow_sdxl":
        assert torch.equal(seen["time_ids"], made["condition"]["time_ids"]), "sizes are not dropped"


def test_captions_are_encoded_once_where_they_are_cached(folders, tmp_path):
    options = ["data.caption_drop=0.5", "training.learning_rate=1e-4"]
    train(folders, tmp_path / "a", *options)
    train(folders, tmp_path / "b", *options, "data.cache={text: true, latents: true}")
    plain, cached = final_weights(tmp_path / "a"), final_weights(tmp_path / "b")
    for key, value in plain.items():
        # Encoded one by one instead of in batches, so rounded differently; Adam makes that a share of its step of 1e-4.
        torch.testing.assert_close(cached[key], value, rtol=0, atol=3e-5)


# ---------------------------------------------------------------------------------- killed, going on, several processes

EVERYTHING = [
    "training.steps=4",
    "training.gradient_accumulation=2",
    "training.ema_decay=0.9",
    "training.lr_schedule=cosine",
    "data.caption_drop=0.3",
    "data.random_flip=true",
    "output.checkpoint_every=1",
]
LOW_RANK = ["training.steps=8", "student.lora.dropout=0.4", "output.checkpoint_every=2"]


@pytest.mark.parametrize(("name", "options"), [("perflow_sd15", EVERYTHING), ("perflow_flux", LOW_RANK)])
def test_run_killed_at_random_moments_ends_in_the_same_bits(folders, tmp_path, name, options):
    def run(out):
        train(folders, out, *options, name=name)

    duration = runs.timed(run, tmp_path / "whole")
    assert runs.killed_until_done(run, tmp_path / "killed", duration=duration) >= 1
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    state, other = (checkpoint.read_state(checkpoint.latest(tmp_path / out)) for out in ("whole", "killed"))
    assert state == other


@pytest.mark.parametrize("name", ["perflow_sdxl", "perflow_flux"])
def test_two_processes_end_in_the_bits_of_one_that_accumulates_twice_as_much(folders, tmp_path, name):
    """DDP halves each process's gradients and adds them; accumulation halves each micro step's and adds them."""

    def run(out, *options):
        train(folders, out, "training.ema_decay=0.5", "data.caption_drop=0.5", *options, name=name)

    run(tmp_path / "one", "training.gradient_accumulation=2")
    assert runs.together(run, tmp_path / "two") == [0, 0]
    assert_same_weights(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("perflow_sd15", "training.gradient_checkpointing=true"),
        ("perflow_flux", "training.gradient_checkpointing=false"),
        ("perflow_flux", "training.share_frozen=false"),
    ],
)
def test_saving_memory_changes_no_bit(folders, tmp_path, name, option):
    train(folders, tmp_path / "a", name=name)
    train(folders, tmp_path / "b", option, name=name)
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_a_blank_student_saves_what_it_is_given(folders, tmp_path):
    """What gathers a sharded run: weights on the CPU, beside the teacher's as they were loaded."""
    for name, precision in (("perflow_sd15", "bf16"), ("perflow_flux", "no")):
        options = [f"training.mixed_precision={precision}"]
        trainer = train(folders, tmp_path / name, *options, name=name)
        blank = trainer.student.blank()
        assert blank.model is not trainer.student.model and blank.trainable().keys() == trainer.trainable.keys()
        blank.model.load_state_dict(trainer.student.model.state_dict())
        blank.save(tmp_path / name / "blank" / "final", trainer.models)
        assert_same_weights(tmp_path / name, tmp_path / name / "blank")


def train_sharded(folders, out, *overrides):
    """One process of a run under FSDP."""
    accelerator = runs.sharded_accelerator("BasicTransformerBlock")
    trainer = Trainer(small(folders, out, *overrides), accelerator=accelerator, say=lambda _: None)
    trainer.run()
    pieces = {type(p).__name__ for p in trainer.student.model.parameters()}
    assert pieces == {"DTensor"}, f"nothing was sharded: {pieces}"


def test_fully_sharded_run_ends_where_the_replicated_one_does(folders, tmp_path):
    options = ["training.steps=2", "training.max_grad_norm=0.5"]
    assert runs.together(train, folders, tmp_path / "replicated", *options) == [0, 0]
    assert runs.together(train_sharded, folders, tmp_path / "sharded", *options) == [0, 0]
    replicated, sharded = final_weights(tmp_path / "replicated"), final_weights(tmp_path / "sharded")
    assert replicated.keys() == sharded.keys()
    for key, value in replicated.items():
        # Gradients are reduced in other orders; Adam turns a rounding into a small share of its step of 1e-3.
        torch.testing.assert_close(sharded[key], value, rtol=0, atol=2e-5)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "sharded" / "final")
    assert type(pipe.unet).__name__ == "UNet2DConditionModel" and type(pipe.scheduler) is PeRFlowScheduler


# ------------------------------------------------------------------------------------------- beside linear attention


@pytest.mark.parametrize("teacher", ["model", "student"])
def test_student_with_linear_attention_learns_steps_from_either_teacher(folders, tmp_path, teacher):
    stock = DiffusionPipeline.from_pretrained(folders / "sd15")
    linear = LinFusion.construct_for(stock, load_pretrained=False)
    with torch.no_grad():
        for i, parameter in enumerate(linear.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    linear.save_pretrained(tmp_path / "linear")
    options = ["student.adapter=linattn.adapters:LinFusion", f"student.pretrained={tmp_path / 'linear'}"]
    trainer = trainer_of(folders, tmp_path / "run", *options, f"objective.teacher={teacher}")
    taught_by = trainer.objective._frozen[0].model
    x, t, condition = torch.randn(1, 4, 16, 16), torch.tensor([500]), trainer.models.encode_text(["a two"])
    wanted = stock.unet if teacher == "student" else DiffusionPipeline.from_pretrained(folders / "sd15").unet
    with torch.no_grad():
        before = trainer.models.denoiser(taught_by)(x, t, condition)
        torch.testing.assert_close(before, trainer.models.denoiser(wanted)(x, t, condition))
        start = trainer.models.denoiser(trainer.student.model)(x, t, condition)
        torch.testing.assert_close(start, trainer.models.denoiser(stock.unet)(x, t, condition))
        assert teacher == "student" or (start - before).abs().max() > 1e-3
    assert set(trainer.trainable) == {key for key, _ in trainer.student.model.named_parameters()}
    final = trainer.run()
    with torch.no_grad():
        assert torch.equal(trainer.models.denoiser(taught_by)(x, t, condition), before), "the teacher stays"

    loaded = DiffusionPipeline.from_pretrained(folders / "sd15")
    LinFusion.construct_for(loaded, pretrained_model_name_or_path=final / "adapter")
    merged = delta_weights.merge(loaded.unet, delta_weights.load(final / "delta_weights.safetensors"), missing="skip")
    assert not merged.skipped and all(".attn1." in key for key in merged.untouched)
    tuned = trainer.student.model.state_dict()
    for key, value in loaded.unet.state_dict().items():
        torch.testing.assert_close(value, tuned[key], rtol=1e-6, atol=1e-7)
    assert PeRFlowScheduler.from_pretrained(final, subfolder="scheduler").config.prediction_type == "diff_eps"


# -------------------------------------------------------------------------------------------------------- pictures


def test_validation_draws_the_teacher_in_its_steps_and_the_student_in_fewer_and_changes_nothing(folders, tmp_path):
    shown = "output.validation={prompts: [a two, a three], every: 2, steps: 4, teacher_steps: 6, height: 32, width: 32}"
    trainer = trainer_of(folders, tmp_path / "a", shown, name="perflow_sdxl")
    calls, draw = [], trainer.models.draw

    def seen(model, prompts, **options):
        calls.append((model, options["steps"], options["guidance"], type(options.get("scheduler"))))
        return draw(model, prompts, **options)

    trainer.models.draw = seen
    own = trainer.models.pipeline.scheduler
    trainer.run()
    student = (trainer.student.model, 4, 7.5, PeRFlowScheduler)
    assert calls == [(trainer.models.model, 6, 7.5, type(None)), student, student]
    assert trainer.models.pipeline.scheduler is own
    train(folders, tmp_path / "b", name="perflow_sdxl")
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    first, second = (
        np.asarray(Image.open(tmp_path / "a" / "validation" / f"step-0000000{step}.png"), dtype=int) for step in (2, 3)
    )
    assert first.shape == (64, 64, 3) and (first[:, :32] == second[:, :32]).all()
    assert (first[:, 32:] != second[:, 32:]).any(), "the student has learnt"


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("perflow_sd15", ["objective.teacher_guidance=0.5"], "objective.teacher_guidance: expected a number"),
        ("perflow_sd15", ["objective.prediction_type=epsilon"], "objective.prediction_type: expected 'ddim_eps'"),
        ("perflow_sd15", ["objective.windows=0"], "objective.windows: expected a number"),
        ("perflow_sd15", ["objective.reweighting=rcp_win"], "objective.reweighting: expected 'reciprocal'"),
        ("perflow_sd15", ["student.pretrained=a/b"], "student.pretrained: expected null beside student.adapter: null"),
        ("perflow_sd15", ["student.options={a: 1}"], "student.options: expected {} beside student.adapter: null"),
        ("perflow_sd15", ["objective.teacher=student"], "objective.teacher: expected 'model' beside student.adapter"),
        ("perflow_sd15", ["training.share_frozen=true"], "training.share_frozen: expected false or null beside"),
        (
            "perflow_sd15",
            ["student={adapter: 'a:B', train: lora}"],
            "student.pretrained: expected the adapter's weights",
        ),
        ("perflow_sd15", ["student={adapter: 'a:B', train: lora}"], "student.lora.also_train: expected [] beside obj"),
        (
            "perflow_sd15",
            ["objective.solver_step=3"],
            "objective.solver_step: unknown key; did you mean 'objective.solv",
        ),
    ],
)
def test_what_does_not_go_together_is_told_by_key(folders, tmp_path, name, options, line):
    with pytest.raises(recipe.RecipeError) as caught:
        small(folders, tmp_path, *options, name=name)
    assert any(problem.startswith(line) for problem in caught.value.problems), caught.value.problems


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "perflow_flux",
            ["objective.prediction_type=ddim_eps"],
            r"objective\.prediction_type: expected 'velocity' for a F",
        ),
        (
            "perflow_sd15",
            ["objective.window_shift=3"],
            r"objective\.window_shift: expected 1\.0 for a StableDiffusionP",
        ),
        (
            "perflow_flux",
            ["student.lora.targets=[to_x]"],
            r"student\.lora\.targets: FluxTransformer2DModel has no layer",
        ),
        (
            "perflow_flux",
            ["student.lora.also_train=[to_q_]"],
            r"student\.lora\.also_train: .*whose name ends in 'to_q_'",
        ),
        ("zero", [], r"objective\.prediction_type: .*rescale_betas_zero_snr=True, prediction_type='diff_eps'"),
        ("perflowed", [], r"prediction_type must be epsilon or v_prediction, got 'ddim_eps'"),
    ],
)
def test_what_does_not_fit_the_model_is_one_line_and_exit_status_one(folders, tmp_path, capsys, name, options, message):
    family = FAMILIES.get(name, "sd15")
    start = folders / family
    if name not in FAMILIES:
        pipe = DiffusionPipeline.from_pretrained(start)
        if name == "zero":
            pipe.scheduler.register_to_config(rescale_betas_zero_snr=True)
        else:
            pipe.scheduler = PeRFlowScheduler()
        start, name = tmp_path / name, "perflow_sd15"
        pipe.save_pretrained(start)
    given = [*SMALL, *(SMALL_FLUX if name == "perflow_flux" else ()), "training.mixed_precision=no"]
    given += [f"model.pretrained={start}", f"data.path={folders / 'pictures'}", f"output.folder={tmp_path / 'run'}"]
    arguments = [part for option in (*given, *options) for part in ("--set", option)]
    assert main(["distill", name, *arguments]) == 1
    told = capsys.readouterr().err
    assert re.search(message, told) and "Traceback" not in told
    assert not (tmp_path / "run").exists()


def test_flow_schedules_are_those_of_flow_matching_models():
    """PeRFlowScheduler has the methods of both kinds."""
    assert noise.FlowSchedule(PeRFlowScheduler(prediction_type="velocity", use_flow_sigmas=True)).num_timesteps == 1000
    with pytest.raises(ValueError, match="expected a flow matching scheduler, got a PeRFlowScheduler"):
        noise.FlowSchedule(PeRFlowScheduler())


def test_command_says_what_it_will_do(folders, tmp_path, capsys):
    wanted = [f"model.pretrained={folders / 'sd15'}", f"data.path={folders / 'pictures'}", f"output.folder={tmp_path}"]
    arguments = [part for option in (*SMALL, *wanted, "training.mixed_precision=no") for part in ("--set", option)]
    assert main(["distill", "perflow_sd15", *arguments, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "not guided, 4 windows of 2 steps" in told and "a copy, diff_eps; trains" in told and "(full)" in told


def test_recipe_of_the_bundled_model_makes_a_pipeline_that_draws_in_four_steps(folders, tmp_path):
    """The commands of docs/distillation.md, with two steps of two samples."""
    text = (Path(__file__).resolve().parents[1] / "docs" / "distillation.md").read_text()
    (command,) = re.findall(r"^    linattn (distill perflow_tiny_sd .*)$", text, re.MULTILINE)
    command = command.replace("canvases", str(folders / "pictures")).replace("=run", f"={tmp_path / 'run'}")
    options = [
        "training.steps=2",
        "training.warmup_steps=1",
        "training.batch_size=2",
        "output.validation.teacher_steps=1",
    ]
    assert main([*shlex.split(command), *(part for option in options for part in ("--set", option))]) == 0
    assert (tmp_path / "run" / "validation" / "step-00000002.png").is_file()
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "run" / "final")
    pipe.set_progress_bar_config(disable=True)
    (picture,) = pipe("a seven", num_inference_steps=4, guidance_scale=1.0).images
    assert picture.size == (144, 144) and len(pipe.scheduler.timesteps) == 4
    with pytest.raises(ValueError, match="num_inference_steps must be at least the number of windows"):
        pipe("a seven", num_inference_steps=3)
