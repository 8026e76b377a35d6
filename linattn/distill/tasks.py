"""What a run is about: the parts of it that differ between teaching attention and training a model on data alone.

The trainer asks its task for the source of pictures, the models, the student, the objective and the batches, has it
turn each batch into the objective's arguments, and has it draw the pictures that show how far the student is. Loop,
checkpoints and processes are the same for all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader

from ..paths import expand
from . import pipelines
from .data import LargeEnough, Order, Source, loader, open_source, pair_loader
from .data.degradation import FACTOR
from .data.pictures import decode
from .noise import NoiseSchedule, draw, draw_pairs
from .objectives.attention import AttentionDistillation
from .objectives.edm import EDMTraining, with_dropped
from .recipe import Recipe
from .student import Student, WholeModel


class AttentionTask:
    """A student whose attention was replaced learns to do what the model did before (`objective.kind: attention` and
    `flow_attention`).

    Args:
        adapter_class: what `student.adapter` names (see `Student` for what it must offer).
        pipeline_class: what `model.pipeline` names.
    """

    #: What the pictures of a row are, from the left.
    columns = "teacher | student"

    def __init__(self, recipe: Recipe, *, adapter_class: type | None, pipeline_class: type | None):
        if adapter_class is None:
            raise TypeError(f"expected the class that student.adapter names ({recipe.student.adapter!r}), got None")
        self.recipe = recipe
        self._adapter_class, self._pipeline_class = adapter_class, pipeline_class

    def open_source(self) -> Source:
        return open_source(self.recipe.data)

    def load(self) -> pipelines.Kind:
        """The pipeline, everything in it frozen."""
        model = self.recipe.model
        return pipelines.load(
            model.pretrained,
            revision=model.revision,
            variant=model.variant,
            text_length=model.text_length,
            pipeline_class=self._pipeline_class,
        )

    def problems(self, models: pipelines.Kind) -> list[str]:
        """What in the recipe does not fit the model, beside its kind and the sizes of pictures."""
        return []

    def start(self, models: pipelines.Kind, *, share: bool) -> Student:
        """The student as training starts with it, on the CPU.

        Args:
            share: one copy of what teacher and student have in common, unless the recipe decides.
        """
        wanted = self.recipe.student
        chosen = self.recipe.training.share_frozen
        student = Student(
            models.model,
            self._adapter_class,
            pretrained=wanted.pretrained,
            options=wanted.options,
            share=share if chosen is None else chosen,
        )
        if wanted.train == "lora":
            low_rank = wanted.lora
            student.train_lora(
                rank=low_rank.rank,
                alpha=low_rank.alpha or low_rank.rank,
                dropout=low_rank.dropout,
                targets=low_rank.targets,
                also_train=low_rank.also_train,
            )
        else:
            student.train_fully()
        return student

    def objective(self, models: pipelines.Kind, student: Student) -> tuple[nn.Module, NoiseSchedule]:
        wanted = self.recipe.objective
        if wanted.kind == "flow_attention":
            names = ("weighting", "logit_mean", "logit_std", "mode_scale", "shift")
            schedule = models.schedule(**{name: getattr(wanted, name) for name in names})
            denoiser = functools.partial(models.denoiser, guidance=wanted.guidance)
            features = models.compared_modules(wanted.feature_interval) if wanted.weights.feature else ()
        else:
            schedule, denoiser, features = models.schedule(), models.denoiser, wanted.features
        objective = AttentionDistillation(
            denoiser(student.model),
            denoiser(models.model),
            schedule,
            weights=wanted.weights.model_dump(),
            features=features,
        )
        return objective, schedule

    def batches(self, source: Source, order: Order, *, text_cache, latent_cache, **share) -> DataLoader:
        """The micro batches of this process; share: see `loader`."""
        seed = self.recipe.training.seed
        caches = {"text_cache": text_cache, "latent_cache": latent_cache}
        return loader(source, order, self.recipe.data, seed=seed, **caches, **share)

    def encode(self, batch: dict, models: pipelines.Kind, schedule: NoiseSchedule, device: torch.device) -> dict:
        """A batch of the loader as the objective's arguments."""
        if "latent_mean" in batch:
            mean, std = batch["latent_mean"].to(device), batch["latent_std"].to(device)
        else:
            mean, std = models.encode_image(batch["pixels"])
        random = draw(
            batch["number"].tolist(),
            mean.shape[1:],
            seed=self.recipe.training.seed,
            schedule=schedule,
        )
        if "condition" in batch:
            dtype = models.model.dtype
            condition = {name: value.to(device, dtype) for name, value in batch["condition"].items()}
        else:
            condition = models.encode_text(batch["caption"])
        condition |= models.encode_sizes(batch["original_size"], batch["crop"], batch["target_size"])
        return {
            "latents": models.latents(mean, std, random.posterior.to(device)),
            "noise": random.noise.to(device),
            "timesteps": random.timesteps.to(device),
            "condition": condition,
        }

    @property
    def shown(self) -> bool:
        """Whether the recipe asks for pictures."""
        return bool(self.recipe.output.validation.prompts)

    def compared(self, models: pipelines.Kind, autocast: Callable) -> list:
        """The pictures that the student's are shown beside."""
        return self.pictures(models, models.model, autocast)

    def pictures(self, models: pipelines.Kind, model: nn.Module, autocast: Callable) -> list:
        """What `model` draws, one picture per prompt."""
        wanted = self.recipe.output.validation
        options = wanted.model_dump(exclude={"prompts", "images", "every"})
        return models.draw(model, wanted.prompts, **options, autocast=autocast)

    def summary(self, models: pipelines.Kind, student: Student) -> list[tuple[str, str]]:
        """What is trained, for `Trainer.plan`: (word, text) per line."""
        count, total = _counts(student)
        wanted = self.recipe.student
        return [
            ("teacher", f"{self.recipe.model.pretrained} ({type(models.pipeline).__name__})"),
            (
                "student",
                f"{wanted.adapter}, {len(student.modules)} modules; trains {count:,} of {total:,} parameters "
                f"({wanted.train})",
            ),
        ]


class UpscalingTask:
    """A model that enlarges pictures is trained on pairs, whole and without a teacher (`objective.kind: edm`)."""

    columns = "bicubic | student"

    def __init__(self, recipe: Recipe, *, adapter_class: type | None = None, pipeline_class: type | None):
        self.recipe = recipe
        self._pipeline_class = pipeline_class

    def open_source(self) -> Source:
        data = self.recipe.data
        return LargeEnough(open_source(data, captions=False), data.resolution)

    def load(self) -> pipelines.Kind:
        model = self.recipe.model
        if model.config is None:
            return pipelines.load(
                model.pretrained,
                revision=model.revision,
                variant=model.variant,
                pipeline_class=self._pipeline_class,
                image_encoder=model.image_encoder,
            )
        if self._pipeline_class is None:
            raise TypeError(f"expected the class that model.pipeline names ({model.pipeline!r}), got None")
        set_seed(self.recipe.training.seed)  # the same weights in every process and every run
        return pipelines.fresh(self._pipeline_class, model.config, image_encoder=model.image_encoder)

    def problems(self, models: pipelines.Kind) -> list[str]:
        problems = []
        if models.lacks_image_encoder:
            problems.append(
                f"model.image_encoder: expected the name or folder of a CLIPVisionModelWithProjection (the network has "
                f"vector_dim = {models.model.config.vector_dim}, and the pipeline no image_encoder), got null"
            )
        elif models.model.config.vector_dim and models.image_vector_dim != models.model.config.vector_dim:
            problems.append(
                f"model.image_encoder: expected one with vectors of {models.model.config.vector_dim} numbers (the "
                f"network's vector_dim), got {models.image_vector_dim}"
            )
        if models.factor != FACTOR:
            problems.append(
                f"model.{'pretrained' if self.recipe.model.config is None else 'config'}: expected sr_scale = {FACTOR} "
                f"(what degradation reduces by), got {models.factor}"
            )
        return problems

    def start(self, models: pipelines.Kind, *, share: bool) -> WholeModel:
        student = WholeModel(models.model)
        student.train_fully()
        return student

    def objective(self, models: pipelines.Kind, student: WholeModel) -> tuple[nn.Module, NoiseSchedule]:
        wanted = self.recipe.objective
        schedule = models.schedule(
            log_mean=wanted.log_sigma_mean, log_std=wanted.log_sigma_std, sigma_min=wanted.sigma_min
        )
        return EDMTraining(models.denoiser(student.model), schedule), schedule

    def batches(self, source: Source, order: Order, *, text_cache, latent_cache, **share) -> DataLoader:
        return pair_loader(source, order, self.recipe.data, seed=self.recipe.training.seed, **share)

    def encode(self, batch: dict, models: pipelines.Kind, schedule: NoiseSchedule, device: torch.device) -> dict:
        """A batch of the loader as the objective's arguments.

        The image vector is that of the low resolution picture, also where that is dropped: then it is all there is.
        """
        wanted = self.recipe.objective
        clean, lr_image = batch["image"].to(device), batch["lr_image"].to(device)
        random = draw_pairs(
            batch["number"].tolist(),
            clean.shape[1:],
            seed=self.recipe.training.seed,
            schedule=schedule,
            dropout=wanted.lr_dropout,
            max_offset=wanted.max_offset,
            factor=models.factor,
        )
        condition = models.encode_lr(lr_image)
        dropped = random.dropped.to(device)
        for name, noise in (("lr_image", random.lr_noise), ("lr_up", random.lr_up_noise)):
            condition[name] = with_dropped(condition[name], noise.to(device), dropped)
        return {
            "clean": clean,
            "noise": random.noise.to(device),
            "timesteps": random.timesteps.to(device),
            "condition": condition,
            "position_offset": random.offset,
        }

    @property
    def shown(self) -> bool:
        return bool(self.recipe.output.validation.images)

    def compared(self, models: pipelines.Kind, autocast: Callable) -> list:
        from PIL import Image

        def enlarged(picture):
            return picture.resize(
                (models.factor * picture.width, models.factor * picture.height), Image.Resampling.BICUBIC
            )

        return [enlarged(picture) for picture in self._inputs]

    def pictures(self, models: pipelines.Kind, model: nn.Module, autocast: Callable) -> list:
        """`output.validation.images`, enlarged by `model`."""
        wanted = self.recipe.output.validation
        return models.draw(model, self._inputs, steps=wanted.steps, seed=wanted.seed, autocast=autocast)

    @functools.cached_property
    def _inputs(self) -> list:
        return [decode(Path(expand(path))) for path in self.recipe.output.validation.images]

    def summary(self, models: pipelines.Kind, student: WholeModel) -> list[tuple[str, str]]:
        count, total = _counts(student)
        start = self.recipe.model.pretrained or "new weights"
        return [
            ("model", f"{start} ({type(models.pipeline).__name__}); trains {count:,} of {total:,} parameters (whole)")
        ]


TASKS = {"attention": AttentionTask, "flow_attention": AttentionTask, "edm": UpscalingTask}


def _counts(student: Student | WholeModel) -> tuple[int, int]:
    """Numbers that are trained, and all."""
    trained = sum(p.numel() for p in student.trainable().values())
    return trained, sum(p.numel() for p in student.model.parameters())
