"""Distillation as pure functions: losses against the goldens, noise schedules, random numbers, recorded outputs."""

import numpy
import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", reason='distillation needs the extra: pip install "linattn[train]"')

from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from helpers import goldens
from helpers.tiny_pipelines import UNETS

from linattn.adapters import LinFusion
from linattn.distill import noise
from linattn.distill.denoiser import UNetDenoiser, recorded_outputs
from linattn.distill.objectives.attention import AttentionDistillation, attention_losses, feature_loss
from linattn.distill.student import Student, shared_copy

EXACT = 1e-12
STORED_IN_FLOAT32 = 2.0**-24


pytestmark = pytest.mark.usefixtures("one_thread_in_module")


def tiny_unet(dtype=torch.float64):
    torch.manual_seed(0)
    return UNet2DConditionModel(**UNETS["sd15"]).eval().to(dtype)


def inputs(batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(batch, 4, 16, 16, generator=generator, dtype=dtype),
        "noise": torch.randn(batch, 4, 16, 16, generator=generator, dtype=dtype),
        "timesteps": torch.randint(0, 1000, (batch,), generator=generator),
        "condition": {"encoder_hidden_states": torch.randn(batch, 5, 16, generator=generator, dtype=dtype)},
    }


class Given:
    """A schedule that returns what a golden stores."""

    def __init__(self, sample, target):
        self.sample, self.wanted = sample, target

    def add_noise(self, *_):
        return self.sample

    def target(self, *_):
        return self.wanted

    def loss_weights(self, *_):
        return None


# -------------------------------------------------------------------------------------------------------------- losses


@goldens.needs_goldens
@pytest.mark.parametrize("name", ["unet_tiny_sd", "unet_tiny_sdxl"])
def test_objective_equals_the_golden_losses_and_gradients(name):
    tensors, metadata = goldens.load("linfusion", name)
    teacher = UNet2DConditionModel(**metadata["unet_config"])
    teacher.load_state_dict({k.removeprefix("unet."): v for k, v in tensors.items() if k.startswith("unet.")})
    nn.Module.to(teacher, torch.float64)
    student = Student(teacher, LinFusion, pretrained=str(goldens.path("linfusion", f"{name}_checkpoint")))
    student.train_fully()
    nn.Module.to(student.model, torch.float64)
    condition = {
        key: tensors[key].double() for key in ("encoder_hidden_states", "text_embeds", "time_ids") if key in tensors
    }
    schedule = Given(tensors["sample"].double(), tensors["noise_target"].double())
    objective = AttentionDistillation(UNetDenoiser(student.model), UNetDenoiser(teacher), schedule)
    losses = objective(schedule.sample, schedule.wanted, tensors["timesteps"], condition)
    losses["loss"].backward()
    made = torch.stack([losses[key].detach() for key in ("loss", "noise", "prediction", "feature")])
    assert goldens.relative_error(made, tensors["losses_f64"]) < EXACT
    gradients = {f"grad.{key}": p.grad for key, p in student.adapter.named_parameters()}
    assert gradients.keys() == {key for key in tensors if key.startswith("grad.")}
    for key, gradient in gradients.items():
        assert goldens.relative_error(gradient, tensors[key]) < STORED_IN_FLOAT32, key


def test_losses_are_weighted_means_in_float32():
    student, teacher, target = torch.randn(3, 2, 8).bfloat16().unbind()
    features = {"a": torch.randn(2, 7), "b": torch.randn(2, 30)}
    others = {"b": torch.randn(2, 30), "a": torch.randn(2, 7)}
    losses = attention_losses(student, teacher, target, features, others, {"noise": 2, "prediction": 3, "feature": 5})

    def mse(a, b):
        return ((a.float() - b.float()) ** 2).mean()

    feature = (mse(features["a"], others["a"]) + mse(features["b"], others["b"])) / 2
    expected = 2 * mse(student, target) + 3 * mse(student, teacher) + 5 * feature
    assert losses["loss"].dtype == torch.float32
    torch.testing.assert_close(losses["loss"], expected)
    torch.testing.assert_close(losses["feature"], feature)


def test_gradient_reaches_the_student_alone():
    student, teacher, target = (torch.randn(2, 8, requires_grad=True) for _ in range(3))
    made, wanted = {"a": torch.randn(2, 3, requires_grad=True)}, {"a": torch.randn(2, 3, requires_grad=True)}
    attention_losses(student, teacher, target, made, wanted)["loss"].backward()
    assert student.grad is not None and made["a"].grad is not None
    assert teacher.grad is None and target.grad is None and wanted["a"].grad is None


def test_loss_of_weight_zero_is_reported_and_left_out():
    student, teacher, target = torch.randn(3, 2, 8).unbind()
    losses = attention_losses(student, teacher, target, weights={"noise": 0, "prediction": 1, "feature": 0})
    assert losses["loss"] == losses["prediction"] and losses["noise"] > 0 and "feature" not in losses


def test_features_of_different_layers_are_refused():
    with pytest.raises(ValueError, match=r"same layers .*'b'"):
        feature_loss({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)})
    with pytest.raises(ValueError, match="at least one"):
        feature_loss({}, {})


def test_teacher_is_no_part_of_the_objective():
    teacher = tiny_unet()
    student = Student(teacher, LinFusion, share=False)
    objective = AttentionDistillation(UNetDenoiser(student.model), UNetDenoiser(teacher), schedule())
    owned = {id(p) for p in objective.parameters()}
    assert owned == {id(p) for p in student.model.parameters()} and not owned & {id(p) for p in teacher.parameters()}


# ------------------------------------------------------------------------------------------------- features by hooks


def test_recorded_outputs_are_those_of_the_named_modules_and_leave_no_hooks():
    unet, data = tiny_unet(), inputs()
    denoiser = UNetDenoiser(unet)
    with recorded_outputs(unet, ("attn1",)) as outputs:
        expected = denoiser(data["latents"], data["timesteps"], data["condition"])
    names = [name for name, _ in unet.named_modules() if name.endswith("attn1")]
    assert set(outputs) == set(names) and len(names) == 7
    assert next(iter(outputs)).startswith("down_blocks.0") and list(outputs)[-1].startswith("up_blocks.2")
    assert not any(module._forward_hooks for module in unet.modules())
    assert torch.equal(denoiser(data["latents"], data["timesteps"], data["condition"]), expected)
    with pytest.raises(ValueError, match="no module whose name ends in attn9"), recorded_outputs(unet, ("attn9",)):
        pass


def test_gradient_checkpointing_changes_no_loss_and_no_gradient():
    data, made = inputs(), []
    for checkpointing in (False, True):
        teacher = tiny_unet()
        student = Student(teacher, LinFusion)
        student.train_fully()
        if checkpointing:
            student.model.enable_gradient_checkpointing()
        objective = AttentionDistillation(UNetDenoiser(student.model), UNetDenoiser(teacher), schedule()).train()
        losses = objective(**data)
        losses["loss"].backward()
        made.append((losses, {name: p.grad for name, p in student.trainable().items()}))
    (plain, gradients), (checkpointed, others) = made
    assert {k: v.item() for k, v in plain.items()} == {k: v.item() for k, v in checkpointed.items()}
    assert gradients.keys() == others.keys()
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)


# --------------------------------------------------------------------------------------------------------- the student


def test_shared_copy_has_the_same_weights_and_modules_of_its_own():
    unet = tiny_unet()
    copy = shared_copy(unet)
    assert {id(p) for p in copy.parameters()} == {id(p) for p in unet.parameters()}
    assert not {id(m) for m in copy.modules()} & {id(m) for m in unet.modules()}
    before = dict(unet.named_modules())
    LinFusion.construct_for(copy, load_pretrained=False)
    assert dict(unet.named_modules()) == before


def test_student_with_shared_weights_computes_what_one_with_its_own_does():
    data, made = inputs(), []
    for share in (True, False):
        teacher = tiny_unet()
        student = Student(teacher, LinFusion, options={"mid_dim_scale": 4}, share=share)
        made.append(UNetDenoiser(student.model)(data["latents"], data["timesteps"], data["condition"]))
        shared = {id(p) for p in student.model.parameters()} & {id(p) for p in teacher.parameters()}
        assert bool(shared) == share
    assert torch.equal(*made)


# --------------------------------------------------------------------------------------------------------------- noise


def schedule(**config):
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return noise.DiscreteSchedule(DDIMScheduler(**{**betas, **config}))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_schedule_follows_its_formula(prediction_type):
    made = schedule(prediction_type=prediction_type)
    clean, eps = torch.randn(2, 5, 4, 3, 3, dtype=torch.float64).unbind()
    t = torch.tensor([0, 1, 500, 998, 999])
    betas = numpy.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = torch.from_numpy(numpy.cumprod(1 - betas))[t].view(-1, 1, 1, 1)
    # The scheduler keeps its table in float32.
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(made.add_noise(clean, eps, t), abar.sqrt() * clean + (1 - abar).sqrt() * eps, **close)
    velocity = abar.sqrt() * eps - (1 - abar).sqrt() * clean
    wanted = eps if prediction_type == "epsilon" else velocity
    torch.testing.assert_close(made.target(clean, eps, t), wanted, **close)


def test_schedule_is_read_from_whatever_scheduler_the_pipeline_has():
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    euler = noise.DiscreteSchedule(EulerDiscreteScheduler(**betas))
    clean, eps, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([1, 400, 999])
    assert torch.equal(euler.add_noise(clean, eps, t), schedule().add_noise(clean, eps, t))


def test_schedules_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match="prediction_type must be epsilon or v_prediction, got 'sample'"):
        schedule(prediction_type="sample")
    with pytest.raises(ValueError, match="scheduler with betas, got a FlowMatchEulerDiscreteScheduler"):
        noise.DiscreteSchedule(FlowMatchEulerDiscreteScheduler())


def flow(**options):
    return noise.FlowSchedule(FlowMatchEulerDiscreteScheduler(), **options)


def test_flow_matching_follows_its_formula():
    clean, eps = torch.randn(2, 5, 4, 3, 3, dtype=torch.float64).unbind()
    t = torch.tensor([1, 37.5, 500, 999, 1000], dtype=torch.float64)
    sigma = (t / 1000).view(-1, 1, 1, 1)
    made = flow()
    torch.testing.assert_close(made.add_noise(clean, eps, t), (1 - sigma) * clean + sigma * eps, rtol=1e-15, atol=0)
    assert torch.equal(made.target(clean, eps, t), eps - clean)
    assert made.loss_weights(t) is None


@pytest.mark.parametrize("scheduler", [{"shift": 3.0}, {"shift": 3.0, "use_dynamic_shifting": True}, {}])
def test_noise_levels_are_the_scheduler_s_before_any_shift(scheduler):
    levels = FlowMatchEulerDiscreteScheduler(num_train_timesteps=8).timesteps
    schedule = noise.FlowSchedule(FlowMatchEulerDiscreteScheduler(num_train_timesteps=8, **scheduler))
    made = noise.draw(range(4000), (1, 1), seed=0, schedule=schedule).timesteps
    assert made.dtype == torch.float32
    drawn, counts = made.unique(return_counts=True)
    assert torch.equal(drawn, levels.flip(0))
    assert (abs(counts - 500) < 6 * (4000 / 8 * 7 / 8) ** 0.5).all(), "uniform"


def test_shift_moves_the_noise_levels_as_the_scheduler_does():
    made = noise.draw(range(200), (1, 1), seed=0, schedule=flow(shift=3.0)).timesteps
    plain = noise.draw(range(200), (1, 1), seed=0, schedule=flow()).timesteps
    shifted = FlowMatchEulerDiscreteScheduler(shift=3.0).timesteps  # the noisiest first
    torch.testing.assert_close(made, shifted[1000 - plain.long()], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "below_half", "in_the_middle"),
    [
        # P(sigma < 1/2) and P(1/4 < sigma < 3/4) by the densities of arXiv 2403.03206, section 3.1.
        ({"weighting": "none"}, 0.5, 0.5),
        ({"weighting": "sigma_sqrt"}, 0.5, 0.5),
        ({"weighting": "logit_normal"}, 0.5, 0.7280),
        # sigma = 1 - sigmoid(z), so z > 0 is P(z' > -1) = 0.8413.
        ({"weighting": "logit_normal", "logit_mean": 1.0}, 0.8413, 0.5220),
        ({"weighting": "logit_normal", "logit_std": 0.5}, 0.5, 0.9720),
        ({"weighting": "mode"}, 0.5, None),
        ({"weighting": "mode", "mode_scale": 0.0}, 0.5, 0.5),
    ],
    ids=str,
)
def test_densities_of_the_noise_level(options, below_half, in_the_middle):
    sigma = noise.draw(range(4000), (1, 1), seed=3, schedule=flow(**options)).timesteps / 1000
    assert sigma.min() > 0 and sigma.max() <= 1
    six_errors = 6 * 0.5 / 4000**0.5
    assert abs((sigma <= 0.5).float().mean() - below_half) < six_errors
    middle = ((sigma > 0.25) & (sigma <= 0.75)).float().mean()
    if in_the_middle is None:  # mode, scale 1.29: sigma(u) = 1 - u - 1.29 (cos^2(pi u / 2) - 1 + u), by bisection
        u = torch.linspace(0, 1, 100001, dtype=torch.float64)
        curve = 1 - u - 1.29 * (torch.cos(torch.pi * u / 2) ** 2 - 1 + u)
        in_the_middle = ((curve > 0.25) & (curve <= 0.75)).double().mean()
    assert abs(middle - in_the_middle) < six_errors


def test_weights_of_the_noise_level():
    t = torch.tensor([10.0, 500.0, 1000.0])
    torch.testing.assert_close(flow(weighting="sigma_sqrt").loss_weights(t), torch.tensor([1e4, 4.0, 1.0]))
    # 2 / (pi (1 - 2 sigma + 2 sigma^2)): twice as much in the middle as at the end.
    cosmap = flow(weighting="cosmap").loss_weights(t)
    torch.testing.assert_close(cosmap[1:], torch.tensor([4 / torch.pi, 2 / torch.pi]))
    assert flow(weighting="logit_normal").loss_weights(t) is None


def test_weights_of_the_samples_are_on_the_predictions_alone():
    student, teacher, target = torch.randn(3, 2, 8).unbind()
    features, others = {"a": torch.randn(2, 7)}, {"a": torch.randn(2, 7)}
    weights = torch.tensor([3.0, 0.5])
    weighted = attention_losses(student, teacher, target, features, others, sample_weights=weights)
    plain = attention_losses(student, teacher, target, features, others)
    for name, wanted in (("noise", target), ("prediction", teacher)):
        torch.testing.assert_close(weighted[name], (weights * ((student - wanted) ** 2).mean(dim=1)).mean())
    assert torch.equal(weighted["feature"], plain["feature"])
    ones = attention_losses(student, teacher, target, features, others, sample_weights=torch.ones(2))
    torch.testing.assert_close(ones, plain)


def test_flow_schedules_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match="flow matching scheduler, got a DDIMScheduler"):
        noise.FlowSchedule(DDIMScheduler())
    with pytest.raises(ValueError, match=r"weighting must be one of none, .*, got 'cosine'"):
        flow(weighting="cosine")
    with pytest.raises(ValueError, match=r"shift must be positive, got 0\.0"):
        flow(shift=0.0)


@pytest.mark.parametrize(
    "schedule", [schedule(), flow(), flow(weighting="logit_normal")], ids=["discrete", "flow", "u"]
)
def test_draws_belong_to_the_sample_and_the_seed(schedule):
    together = noise.draw([5, 6, 7], (4, 3, 2), seed=1, schedule=schedule)
    alone = [noise.draw([n], (4, 3, 2), seed=1, schedule=schedule) for n in (7, 5, 6)]
    for field in noise.Draws._fields:
        parts = torch.cat([getattr(alone[i], field) for i in (1, 2, 0)])
        assert torch.equal(getattr(together, field), parts), field
    other = noise.draw([5], (4, 3, 2), seed=2, schedule=schedule)
    assert not torch.equal(other.noise, alone[1].noise)
    assert not torch.equal(together.noise, together.posterior)


def test_draws_are_standard_normal_and_uniform():
    made = noise.draw(range(4000), (2, 2), seed=0, schedule=schedule(num_train_timesteps=10))
    for part in (made.noise, made.posterior):
        # 16,000 numbers: six standard errors of mean and variance.
        assert abs(part.mean()) < 6 / 16000**0.5 and abs(part.var() - 1) < 6 * (2 / 16000) ** 0.5
    counts = torch.bincount(made.timesteps, minlength=10)
    assert len(counts) == 10 and (abs(counts - 400) < 6 * 20).all()
    correlation = numpy.corrcoef(made.noise.flatten(), made.posterior.flatten())[0, 1]
    assert abs(correlation) < 6 / 16000**0.5
