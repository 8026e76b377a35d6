"""Few steps and cheap attention together: students of step distillation on which LinFusion or CLEAR is mounted."""

import contextlib

import pytest
import torch

pytest.importorskip("diffusers", reason='distillation needs the extra: pip install "linattn[train]"')
pytest.importorskip("pydantic", reason='distillation needs the extra: pip install "linattn[train]"')

from diffusers import DiffusionPipeline
from helpers import runs
from helpers.pictures import captioned_noise
from helpers.tiny_pipelines import tiny_pipeline

from linattn.adapters import CLEAR, LinFusion
from linattn.cli.distill import resolve
from linattn.distill import recipe
from linattn.distill.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread_in_module")

FAMILIES = {
    "perflow_linfusion_sd15": ("sd15", LinFusion, {}),
    "flash_linfusion_sdxl": ("sdxl", LinFusion, {}),
    "flash_clear_flux": ("flux", CLEAR, {"window_size": 3, "down_factor": 1}),
}
#: Small and quick, on the CPU; everything else is as the shipped recipe has it.
SMALL = (
    "training.batch_size=2",
    "training.gradient_accumulation=1",
    "training.steps=3",
    "training.lr_schedule=constant",
    "training.warmup_steps=0",
    "training.learning_rate=1e-2",
    "training.gradient_checkpointing=false",
    "training.mixed_precision=no",
    "training.ema_decay=null",
    "data.resolution=32",
    "data.workers=0",
    "output.log_with=null",
    "output.validation={prompts: [a two], steps: 4, height: 32, width: 32, every: 100, teacher_steps: 2}",
)
OF_KIND = {
    "perflow": ("objective.solver_steps=2",),
    "flash": ("objective.phases.steps=1", "objective.phases.grid_steps=4", "student.lora.rank=2"),
}


@pytest.fixture(autouse=True)
def fresh_accelerator():
    runs.reset_accelerator()
    yield
    runs.reset_accelerator()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved tiny pipelines by family; adapters that are no longer what they started as; and "pictures"."""
    root = tmp_path_factory.mktemp("together")
    for family, adapter_class, options in FAMILIES.values():
        pipe = tiny_pipeline(family)
        pipe.save_pretrained(root / family)
        adapter = adapter_class.construct_for(pipe, load_pretrained=False, **options)
        with torch.no_grad():
            for i, parameter in enumerate(adapter.parameters()):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
        adapter.save_pretrained(root / f"{family}_adapter")
    captioned_noise(root / "pictures", 5)
    return root


def trainer_of(folders, out, name, *overrides):
    family, _, options = FAMILIES[name]
    settings = [
        f"model.pretrained={folders / family}",
        f"student.pretrained={folders / f'{family}_adapter'}",
        f"data.path={folders / 'pictures'}",
        f"output.folder={out}",
        *(f"student.options.{key}={value}" for key, value in options.items()),
        *(["model.text_length=12"] if family == "flux" else []),
        *OF_KIND[name.split("_")[0]],
    ]
    wanted = recipe.load(name, [*SMALL, *settings, *overrides])
    return Trainer(wanted, resolve(wanted.student.adapter), say=lambda _: None)


def predicted(models, network):
    """What a network says about a fixed sample."""
    generator = torch.Generator().manual_seed(0)
    channels = models.pipeline.vae.config.latent_channels
    sizes = torch.tensor([[32, 32]])
    condition = models.encode_text(["a two"]) | models.encode_sizes(sizes, 0 * sizes, sizes)
    with torch.no_grad():
        return models.denoiser(network)(
            torch.randn(1, channels, 8, 8, generator=generator), torch.tensor([500]), condition
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_recipe_trains_on_top_of_the_adapter_s_weights_and_its_result_draws_what_the_student_does(
    folders, tmp_path, name
):
    family, adapter_class, _ = FAMILIES[name]
    trainer = trainer_of(folders, tmp_path, name)
    stock = DiffusionPipeline.from_pretrained(folders / family)
    network = trainer.models.component
    teacher = trainer.objective._frozen[0].model
    torch.testing.assert_close(predicted(trainer.models, teacher), predicted(trainer.models, getattr(stock, network)))
    adapter_class.construct_for(stock, pretrained_model_name_or_path=str(folders / f"{family}_adapter"))
    begun = predicted(trainer.models, trainer.student.model)
    torch.testing.assert_close(begun, predicted(trainer.models, getattr(stock, network)), rtol=1e-4, atol=1e-5)
    assert (begun - predicted(trainer.models, teacher)).abs().max() > 1e-3, "the adapter makes a difference"

    final = trainer.run()
    if trainer.recipe.student.train == "lora":
        assert all(".lora_" in key for key in trainer.trainable)
        stock.load_lora_weights(final)
        made = predicted(trainer.models, getattr(stock, network))
        wanted = predicted(trainer.models, trainer.student.model)
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)
        assert (wanted - begun).abs().max() > 1e-4, "three steps make a difference"
    else:
        assert (final / "adapter").is_dir() and (final / "delta_weights.safetensors").is_file()
    (picture,) = trainer.task.pictures(trainer.models, trainer.student.model, contextlib.nullcontext)
    assert picture.size == (32, 32)


@pytest.mark.parametrize("name", ["flash_clear_flux", "flash_linfusion_sdxl"])
def test_the_student_as_it_starts_can_be_its_own_teacher(folders, tmp_path, name):
    trainer = trainer_of(folders, tmp_path, name, "objective.teacher=student")
    teacher = trainer.objective._frozen[0].model
    start = predicted(trainer.models, trainer.student.model)
    torch.testing.assert_close(predicted(trainer.models, teacher), start, rtol=1e-4, atol=1e-5)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    trainer.run()
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert (predicted(trainer.models, trainer.student.model) - start).abs().max() > 1e-4
