"""Distillation of CLEAR: the recorded step with every gradient, and what of a transformer is trained and written."""

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", reason='distillation needs the extra: pip install "linattn[train]"')

from diffusers import FluxTransformer2DModel
from helpers import goldens
from helpers.tiny_pipelines import tiny_pipeline, tiny_transformer
from safetensors.torch import load_file

from linattn.adapters import CLEAR
from linattn.distill import pipelines
from linattn.distill.denoiser import SD3Denoiser, pack, recorded_outputs, unpack
from linattn.distill.objectives.attention import AttentionDistillation
from linattn.distill.student import Student

pytestmark = pytest.mark.usefixtures("one_thread_in_module")

#: The reference rotates in float32 within its float64 run (README of the goldens).
RECORDED = 1e-6


# -------------------------------------------------------------------------------------------------- the recorded step


@pytest.fixture(scope="module")
def recorded():
    """The golden's tensors; one step of the objective from them in float64: losses, student, what the models saw."""
    tensors, metadata = goldens.load("clear", "model_local_w3")
    pipe = tiny_pipeline("flux")
    teacher = FluxTransformer2DModel(**metadata["config"])
    teacher.load_state_dict({k.removeprefix("sd."): v for k, v in tensors.items() if k.startswith("sd.")})
    pipe.register_modules(transformer=teacher)
    models = pipelines.Flux(pipe)
    nn.Module.to(teacher, torch.float64)
    student = Student(teacher, CLEAR, options={"window_size": int(metadata["window"])})
    student.train_fully()
    captured = models.compared_modules(4)
    assert [f"{name}.processor" for name in captured] == metadata["distill_captured"].split(","), "the layers compared"
    guidance = tensors["guidance"][0].item()
    objective = Watched(
        models.denoiser(student.model, guidance=guidance),
        models.denoiser(teacher, guidance=guidance),
        models.schedule(),
        features=captured,
    )
    grid = int(metadata["height"]), int(metadata["width"])
    losses = objective(
        unpack(tensors["x0"].double(), *grid),
        unpack(tensors["noise"].double(), *grid),
        tensors["timestep"].double() * 1000,
        {key: tensors[key].double() for key in ("encoder_hidden_states", "pooled_projections")},
    )
    losses["loss"].backward()
    return tensors, losses, student, objective.seen


class Watched(AttentionDistillation):
    """Keeps what the teacher, then the student, was given and made."""

    def _run(self, denoiser, inputs):
        prediction, features = super()._run(denoiser, inputs)
        self.seen = [*getattr(self, "seen", []), (inputs, prediction, features)]
        return prediction, features


@pytest.mark.parametrize(
    ("own", "published"),
    [("loss", "loss"), ("noise", "loss_fm"), ("prediction", "loss_distill"), ("feature", "loss_attn")],
)
def test_losses_are_the_recorded_ones(recorded, own, published):
    tensors, losses, _, _ = recorded
    assert goldens.relative_error(losses[own].view(1), tensors[f"distill.{published}"]) < RECORDED


def test_every_gradient_is_the_recorded_one_and_there_are_no_others(recorded):
    tensors, _, student, _ = recorded
    gradients = {f"distill.grad.{name}": p.grad for name, p in student.model.named_parameters() if p.grad is not None}
    assert gradients.keys() == {key for key in tensors if key.startswith("distill.grad.")}
    for key, gradient in gradients.items():
        assert goldens.relative_error(gradient, tensors[key]) < RECORDED, key


def test_noisy_latents_predictions_and_attention_are_the_recorded_ones(recorded):
    tensors, _, _, seen = recorded
    for name, (inputs, prediction, features) in zip(("teacher", "student"), seen, strict=True):
        assert goldens.relative_error(pack(inputs[0]), tensors["hidden_states"]) < RECORDED
        assert goldens.relative_error(pack(prediction), tensors[f"distill.{name}_pred"]) < RECORDED
        (made,) = features.values()
        assert goldens.relative_error(made, tensors[f"distill.attn_{name}.0"]) < RECORDED


def test_recorded_joint_attention_is_that_of_image_and_text_tokens():
    model = tiny_transformer("sd35")
    wanted = {}
    for name in ("attn", "attn2"):
        model.get_submodule(f"transformer_blocks.0.{name}").register_forward_hook(
            lambda _module, _inputs, output, name=name: wanted.update({f"transformer_blocks.0.{name}": output})
        )
    text = torch.randn(2, 7, model.config.joint_attention_dim)
    condition = {
        "encoder_hidden_states": text,
        "pooled_projections": torch.randn(2, model.config.pooled_projection_dim),
    }
    with (
        torch.no_grad(),
        recorded_outputs(model, tuple(f"transformer_blocks.0.{n}" for n in ("attn", "attn2"))) as made,
    ):
        SD3Denoiser(model)(torch.randn(2, 16, 8, 12), torch.tensor([1.0, 900.0]), condition)
    image, text = wanted["transformer_blocks.0.attn"]
    assert image.shape[1:] == (24, 32) and text.shape[1:] == (7, 32)
    assert torch.equal(made["transformer_blocks.0.attn"], torch.cat([image, text], dim=1))
    assert torch.equal(made["transformer_blocks.0.attn2"], wanted["transformer_blocks.0.attn2"])


# --------------------------------------------------------------------------------------------------------- the student


@pytest.fixture(params=["flux", "sd3", "sd35"])
def student(request):
    teacher = tiny_transformer(request.param)
    made = Student(teacher, CLEAR, options={"window_size": 3, "down_factor": 2})
    made.teacher = teacher
    return made


def is_published(name):
    """The rule of the published files."""
    return any(
        part in name for part in (".attn.to_q.", ".attn.to_k.", ".attn.to_v.", ".attn.to_out.", "spatial_weight")
    )


def test_trained_are_exactly_the_published_keys(student):
    student.train_fully()
    names = {name.replace(".attn2.", ".attn.") for name in student.trainable()}  # FLUX has no attn2 to name
    everything = {name.replace(".attn2.", ".attn.") for name, _ in student.model.named_parameters()}
    assert names == {name for name in everything if is_published(name)}
    assert student.trainable().keys() == student.adapter.published_state_dict().keys()


def test_student_starts_from_the_teacher_and_training_it_leaves_the_teacher_alone(student):
    student.train_fully()
    before = {name: value.clone() for name, value in student.teacher.state_dict().items()}
    for name, parameter in student.trainable().items():
        assert "spatial_weight" in name or torch.equal(parameter, before[name]), name
        parameter.data.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in student.teacher.state_dict().items())
    shared = {id(p) for p in student.model.parameters()} & {id(p) for p in student.teacher.parameters()}
    assert len(shared) == len(list(student.model.parameters())) - len(student.trainable()), "all else is one copy"


class Borrowing:
    """An adapter that leaves the model's own layers in place and trains them."""

    def __init__(self, model):
        self.model = model
        self.modules_dict = {"layer": model.layer}

    @classmethod
    def construct_for(cls, model, *, load_pretrained):
        return cls(model)

    def trainable_parameters(self):
        return {"layer.weight": self.model.layer.weight}


def test_parameters_that_an_adapter_leaves_to_the_teacher_as_well_are_copied():
    teacher = nn.ModuleDict({"layer": nn.Linear(2, 2)})
    teacher.layer = teacher["layer"]
    student = Student(teacher, Borrowing)
    student.train_fully()
    assert list(student.trainable()) == ["layer.weight"]
    assert student.model.layer.weight is not teacher.layer.weight and student.model.layer.bias is teacher.layer.bias
    assert torch.equal(student.model.layer.weight, teacher.layer.weight)
    teacher.to(torch.bfloat16)
    student.widen()
    assert student.model.layer.weight.dtype == torch.float32 and teacher.layer.bias.dtype == torch.bfloat16


def test_what_is_saved_is_the_published_layout_and_loads_strictly(student, tmp_path):
    student.train_fully()
    for parameter in student.trainable().values():
        parameter.data.add_(torch.randn(parameter.shape))
    student.save(tmp_path, None)
    (file,) = tmp_path.glob("*.safetensors")
    stored = load_file(file)
    assert stored.keys() == student.trainable().keys()
    assert all(torch.equal(stored[name], parameter) for name, parameter in student.trainable().items())
    loaded = CLEAR.from_pretrained(tmp_path)
    assert (loaded.config.window_size, loaded.config.down_factor) == (3, 2)
    # As one of the published files: alone, with what it is distilled for in its name only.
    published = tmp_path / "clear_local_3_down_2.safetensors"
    file.rename(published)
    again = CLEAR.construct_for(student.teacher, pretrained_model_name_or_path=published)
    assert all(torch.equal(value, stored[key]) for key, value in again.published_state_dict().items())


def test_low_rank_training_is_saved_merged(tmp_path):
    student = Student(tiny_transformer("flux"), CLEAR, options={"window_size": 3})
    student.train_lora(rank=2, alpha=4, dropout=0.0, targets=["to_q", "to_k", "to_v"], also_train=[])
    assert len(student.trainable()) == 5 * 3 * 2 and all(".lora_" in name for name in student.trainable())
    for parameter in student.trainable().values():
        parameter.data.normal_()
    pipe = tiny_pipeline("flux")
    student.save(tmp_path, pipelines.Flux(pipe))
    loaded = CLEAR.construct_for(pipe, pretrained_model_name_or_path=tmp_path)
    tokens = torch.randn(1, 12, pipe.transformer.config.in_channels)
    models = pipelines.Flux(pipe)
    inputs = unpack(tokens, 3, 4), torch.tensor([400.0]), models.encode_text(["a two"])
    with torch.no_grad():
        made, wanted = (models.denoiser(model)(*inputs) for model in (pipe.transformer, student.model.eval()))
        loaded.unmount()
        plain = models.denoiser(pipe.transformer)(*inputs)
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)
    assert (plain - wanted).abs().max() > 1e-2, "the updates do something"
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()
