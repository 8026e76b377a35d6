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


def test_draws_belong_to_the_sample_and_the_seed():
    together = noise.draw([5, 6, 7], (4, 3, 2), seed=1, num_timesteps=1000)
    alone = [noise.draw([n], (4, 3, 2), seed=1, num_timesteps=1000) for n in (7, 5, 6)]
    for field in noise.Draws._fields:
        parts = torch.cat([getattr(alone[i], field) for i in (1, 2, 0)])
        assert torch.equal(getattr(together, field), parts), field
    other = noise.draw([5], (4, 3, 2), seed=2, num_timesteps=1000)
    assert not torch.equal(other.noise, alone[1].noise)
    assert not torch.equal(together.noise, together.posterior)


def test_draws_are_standard_normal_and_uniform():
    made = noise.draw(range(4000), (2, 2), seed=0, num_timesteps=10)
    for part in (made.noise, made.posterior):
        # 16,000 numbers: six standard errors of mean and variance.
        assert abs(part.mean()) < 6 / 16000**0.5 and abs(part.var() - 1) < 6 * (2 / 16000) ** 0.5
    counts = torch.bincount(made.timesteps, minlength=10)
    assert len(counts) == 10 and (abs(counts - 400) < 6 * 20).all()
    correlation = numpy.corrcoef(made.noise.flatten(), made.posterior.flatten())[0, 1]
    assert abs(correlation) < 6 / 16000**0.5
