"""What a run is about: the parts that differ between teaching attention, distilling steps, and training on data alone.

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
from ..schedulers import PeRFlowScheduler
from ..schedulers.piecewise import Marginal, window_bounds
from . import pipelines
from .data import LargeEnough, Order, Source, loader, open_source, pair_loader
from .data.degradation import FACTOR
from .data.pictures import decode
from .noise import FlowSchedule, NoiseSchedule, chosen, draw, draw_pairs
from .objectives.attention import AttentionDistillation
from .objectives.edm import EDMTraining, with_dropped
from .objectives.perflow import PeRFlowTraining, Times
from .recipe import Recipe
from .student import Student, TunedModel, WholeModel


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
        if adapter_class is None and recipe.student.adapter is not None:
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
        return self._drawn(models, models.model, autocast, **self._teacher_draws())

    def pictures(self, models: pipelines.Kind, model: nn.Module, autocast: Callable) -> list:
        """What `model` draws, one picture per prompt."""
        return self._drawn(models, model, autocast)

    def _teacher_draws(self) -> dict:
        """In what its pictures differ from the student's."""
        wanted = self.recipe.output.validation
        return {"steps": wanted.teacher_steps or wanted.steps}

    def _drawn(self, models: pipelines.Kind, model: nn.Module, autocast: Callable, **changes) -> list:
        wanted = self.recipe.output.validation
        options = wanted.model_dump(include={"steps", "guidance", "height", "width", "seed"}) | changes
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


class PeRFlowTask(AttentionTask):
    """A student learns to do in a few steps what its teacher does in many (`objective.kind: perflow`)."""

    _empty: dict[str, torch.Tensor] | None = None  # the condition of the empty caption

    def problems(self, models: pipelines.Kind) -> list[str]:
        wanted, name, problems = self.recipe.objective, type(models.pipeline).__name__, []
        if self._is_flow(models):
            if wanted.prediction_type != "velocity":
                problems.append(
                    f"objective.prediction_type: expected 'velocity' for a {name} (flow matching), got "
                    f"'{wanted.prediction_type}'"
                )
        elif wanted.window_shift != 1:
            problems.append(
                f"objective.window_shift: expected 1.0 for a {name} (no flow matching), got {wanted.window_shift}"
            )
        if not problems:
            try:
                self._scheduler(models)
            except ValueError as error:  # levels of noise that this prediction divides by
                problems.append(f"objective.prediction_type: {error}")
        return problems

    @staticmethod
    def _is_flow(models: pipelines.Kind) -> bool:
        return isinstance(models.schedule(), FlowSchedule)

    def _scheduler(self, models: pipelines.Kind) -> PeRFlowScheduler:
        """That samples from the student; its process and its windows are those of the training."""
        wanted = self.recipe.objective
        return PeRFlowScheduler.from_config(
            models.pipeline.scheduler.config,
            prediction_type=wanted.prediction_type,
            num_time_windows=wanted.windows,
            use_flow_sigmas=self._is_flow(models),
            window_shift=wanted.window_shift,
        )

    def start(self, models: pipelines.Kind, *, share: bool) -> TunedModel:
        wanted = self.recipe.student
        shared = self.recipe.training.share_frozen
        return TunedModel(
            models.model,
            self._scheduler(models),
            adapter_class=self._adapter_class if wanted.adapter else None,
            pretrained=wanted.pretrained,
            options=wanted.options,
            low_rank=wanted.lora if wanted.train == "lora" else None,
            share=share if shared is None else shared,
        )

    def objective(self, models: pipelines.Kind, student: TunedModel) -> tuple[nn.Module, Times]:
        wanted, schedule, config = self.recipe.objective, models.schedule(), student.scheduler.config
        is_flow = isinstance(schedule, FlowSchedule)
        denoiser = functools.partial(models.denoiser, guidance=wanted.guidance) if is_flow else models.denoiser
        teacher = models.model if wanted.teacher == "model" else student.as_it_is(models.model)
        names = ("prediction_type", "begin_at_noise", "legacy_grid", "distance", "huber_c", "reweighting")
        objective = PeRFlowTraining(
            denoiser(student.model),
            denoiser(teacher),
            Marginal(student.scheduler.alphas_cumprod),
            window_bounds(config.num_time_windows, config.window_shift),
            steps=wanted.solver_steps,
            teacher_prediction_type="flow" if is_flow else schedule.prediction_type,
            num_timesteps=schedule.num_timesteps,
            guidance=wanted.teacher_guidance,
            **{name: getattr(wanted, name) for name in names},
        )
        return objective, Times(wanted.levels, wanted.window_shift)

    def batches(self, source: Source, order: Order, *, text_cache, latent_cache, **share) -> DataLoader:
        # Nothing is dropped here: a guided teacher sees every caption. `encode` does it.
        data = self.recipe.data.model_copy(update={"caption_drop": 0.0})
        seed = self.recipe.training.seed
        return loader(source, order, data, seed=seed, text_cache=text_cache, latent_cache=latent_cache, **share)

    def encode(self, batch: dict, models: pipelines.Kind, schedule: Times, device: torch.device) -> dict:
        """A batch of the loader as the objective's arguments."""
        encoded = super().encode(batch, models, schedule, device)
        drop = self.recipe.data.caption_drop
        if drop or self.recipe.objective.teacher_guidance is not None:
            if self._empty is None:
                self._empty = models.encode_text([""])
            # Sizes, which captions do not say, are the same.
            encoded["unconditional"] = encoded["condition"] | self._empty
        if drop:
            encoded["dropped"] = chosen(batch["number"].tolist(), drop, seed=self.recipe.training.seed).to(device)
        return encoded

    def pictures(self, models: pipelines.Kind, model: nn.Module, autocast: Callable) -> list:
        return self._drawn(models, model, autocast, scheduler=self._scheduler(models))

    def _teacher_draws(self) -> dict:
        guidance = self.recipe.objective.teacher_guidance
        return super()._teacher_draws() | ({} if guidance is None else {"guidance": guidance})

    def summary(self, models: pipelines.Kind, student: TunedModel) -> list[tuple[str, str]]:
        count, total = _counts(student)
        wanted = self.recipe.objective
        guided = "not guided" if wanted.teacher_guidance is None else f"guided by {wanted.teacher_guidance}"
        taught = "" if wanted.teacher == "model" else f", with {self.recipe.student.adapter}"
        adapter = f" with {self.recipe.student.adapter}" if student.adapter else ""
        return [
            (
                "teacher",
                f"{self.recipe.model.pretrained} ({type(models.pipeline).__name__}){taught}, {guided}, "
                f"{wanted.windows} windows of {wanted.solver_steps} steps",
            ),
            (
                "student",
                f"a copy{adapter}, {wanted.prediction_type}; trains {count:,} of {total:,} parameters "
                f"({self.recipe.student.train})",
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


TASKS = {
    "attention": AttentionTask,
    "flow_attention": AttentionTask,
    "edm": UpscalingTask,
    "perflow": PeRFlowTask,
}


def _counts(student: Student | TunedModel | WholeModel) -> tuple[int, int]:
    """Numbers that are trained, and all."""
    trained = sum(p.numel() for p in student.trainable().values())
    return trained, sum(p.numel() for p in student.model.parameters())
