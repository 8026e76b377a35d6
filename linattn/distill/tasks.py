"""What a run is about: the parts that differ between teaching attention, distilling steps, and training on data alone.

The trainer asks its task for the source of pictures, the models, the student, the objective and the batches, has it
turn each batch into the objective's arguments, and has it draw the pictures that show how far the student is. Loop,
checkpoints and processes are the same for all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader

from ..paths import expand
from ..schedulers import EDMScheduler, PeRFlowScheduler
from ..schedulers.piecewise import Marginal, window_bounds
from . import pipelines
from .data import LargeEnough, Order, Source, loader, open_source, pair_loader
from .data.degradation import FACTOR
from .data.pictures import decode
from .discriminator import Discriminator, features_of
from .noise import FlowSchedule, NoiseSchedule, chosen, draw, draw_flash, draw_pairs
from .noise_process import NoiseProcess
from .objectives.attention import AttentionDistillation
from .objectives.edm import EDMStepDistillation, EDMTraining, Starts, with_dropped
from .objectives.flash import FlashTraining, Phases, decoded_distance, unconditional
from .objectives.perflow import PeRFlowTraining, Times
from .recipe import Recipe, RecipeError
from .student import Student, TunedModel, WholeModel


class Auxiliary(NamedTuple):
    """A module that is trained beside the student, with a learning rate of its own."""

    module: nn.Module
    learning_rate: float


class AttentionTask:
    """A student whose attention was replaced learns to do what the model did before (`objective.kind: attention` and
    `flow_attention`).

    Args:
        adapter_class: what `student.adapter` names (see `Student` for what it must offer).
        pipeline_class: what `model.pipeline` names.
        named: what other keys of the recipe name, by key.
    """

    #: What the pictures of a row are, from the left.
    columns = "teacher | student"
    #: Key of the recipe that asks for something to be trained beside the student; None: nothing is.
    beside_the_student: str | None = None

    def __init__(
        self,
        recipe: Recipe,
        *,
        adapter_class: type | None,
        pipeline_class: type | None,
        named: Mapping[str, object] | None = None,
    ):
        if adapter_class is None and recipe.student.adapter is not None:
            raise TypeError(f"expected the class that student.adapter names ({recipe.student.adapter!r}), got None")
        self.recipe = recipe
        self.named = dict(named or {})
        if recipe.model.kind is not None and "model.kind" not in self.named:
            raise TypeError(f"expected the class that model.kind names ({recipe.model.kind!r}), got None")
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
            kind=self.named.get("model.kind"),
            options=model.options,
        )

    def problems(self, models: pipelines.Kind) -> list[str]:
        """What in the recipe does not fit the model, beside its kind and the sizes of pictures."""
        name, shown, problems = type(models.pipeline).__name__, self.recipe.output.validation, []
        if models.needs_pixels and self.recipe.data.cache.latents:
            problems.append(
                f"data.cache.latents: expected false for a {name} (its condition is made of the pictures), got true"
            )
        if models.needs_pixels and shown.prompts and not shown.images:
            problems.append(
                f"output.validation.images: expected pictures for a {name} to see beside the prompts, got []"
            )
        if shown.images and not models.needs_pixels:
            got = list(shown.images)
            problems.append(f"output.validation.images: expected [] for a {name} (which sees prompts alone), got {got}")
        return problems

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

    def auxiliary(self, objective: nn.Module) -> dict[str, Auxiliary]:
        """What is trained beside the student."""
        return {}

    def begin(self, step: int) -> None:
        """Told before each optimizer step: its number, from 0."""

    def batches(self, source: Source, order: Order, *, text_cache, latent_cache, **share) -> DataLoader:
        """The micro batches of this process; share: see `loader`."""
        seed = self.recipe.training.seed
        caches = {"text_cache": text_cache, "latent_cache": latent_cache}
        return loader(source, order, self.recipe.data, seed=seed, **caches, **share)

    def encode(self, batch: dict, models: pipelines.Kind, schedule: NoiseSchedule, device: torch.device) -> dict:
        """A batch of the loader as the objective's arguments."""
        mean, std = self._posterior(batch, models, device)
        random = draw(
            batch["number"].tolist(),
            mean.shape[1:],
            seed=self.recipe.training.seed,
            schedule=schedule,
        )
        return {
            "latents": models.latents(mean, std, random.posterior.to(device)),
            "noise": random.noise.to(device),
            "timesteps": random.timesteps.to(device),
            "condition": self._condition(batch, models, device),
        }

    @staticmethod
    def _posterior(batch: dict, models: pipelines.Kind, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the latents."""
        if "latent_mean" in batch:
            return batch["latent_mean"].to(device), batch["latent_std"].to(device)
        return models.encode_image(batch["pixels"])

    def _condition(self, batch: dict, models: pipelines.Kind, device: torch.device) -> dict[str, torch.Tensor]:
        if "condition" in batch:
            dtype = models.model.dtype
            condition = {name: value.to(device, dtype) for name, value in batch["condition"].items()}
        else:
            condition = models.encode_text(batch["caption"])
        condition |= models.encode_sizes(batch["original_size"], batch["crop"], batch["target_size"])
        if models.needs_pixels:
            seed = self.recipe.training.seed
            condition |= models.picture_condition(batch["pixels"].to(device), batch["number"].tolist(), seed)
        return condition

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
        if models.needs_pixels:
            options["pictures"] = [decode(Path(expand(path))) for path in wanted.images]
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


class _StepTask(AttentionTask):
    """What all tasks have in common in which a student learns to do in a few steps what its teacher does in many."""

    @staticmethod
    def _is_flow(models: pipelines.Kind) -> bool:
        return isinstance(models.schedule(), FlowSchedule)

    def _scheduler(self, models: pipelines.Kind):
        """That samples from the student; saved with it."""
        raise NotImplementedError

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

    def _denoisers(self, models: pipelines.Kind, student: TunedModel) -> tuple[Callable, nn.Module, nn.Module]:
        """What makes a denoiser of a network; and those of the student and of its teacher."""
        wanted = self.recipe.objective
        of = functools.partial(models.denoiser, guidance=wanted.guidance) if self._is_flow(models) else models.denoiser
        teacher = models.model if wanted.teacher == "model" else student.as_it_is(models.model)
        return of, of(student.model), of(teacher)

    def batches(self, source: Source, order: Order, *, text_cache, latent_cache, **share) -> DataLoader:
        # Nothing is dropped here: a guided teacher sees every caption. `encode` does it.
        data = self.recipe.data.model_copy(update={"caption_drop": 0.0})
        seed = self.recipe.training.seed
        return loader(source, order, data, seed=seed, text_cache=text_cache, latent_cache=latent_cache, **share)

    def _encoded(self, models: pipelines.Kind, text: str) -> dict[str, torch.Tensor]:
        """The condition of a caption, encoded once."""
        if text not in self._prompts:
            self._prompts[text] = models.encode_text([text])
        return self._prompts[text]

    @functools.cached_property
    def _prompts(self) -> dict[str, dict[str, torch.Tensor]]:
        return {}

    def _tuned_summary(
        self, models: pipelines.Kind, student: TunedModel, does: str, says: str
    ) -> list[tuple[str, str]]:
        """Lines about teacher and student.

        Args:
            does, says: of the teacher; of the student.
        """
        count, total = _counts(student)
        taught = "" if self.recipe.objective.teacher == "model" else f", with {self.recipe.student.adapter}"
        adapter = f" with {self.recipe.student.adapter}" if student.adapter else ""
        trained = f"trains {count:,} of {total:,} parameters ({self.recipe.student.train})"
        return [
            ("teacher", f"{self.recipe.model.pretrained} ({type(models.pipeline).__name__}){taught}, {does}"),
            ("student", f"a copy{adapter}, {says}; {trained}"),
        ]


class PeRFlowTask(_StepTask):
    """A student learns that its teacher's path is straight in each window of time (`objective.kind: perflow`)."""

    def problems(self, models: pipelines.Kind) -> list[str]:
        wanted, name, problems = self.recipe.objective, type(models.pipeline).__name__, super().problems(models)
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

    def _scheduler(self, models: pipelines.Kind) -> PeRFlowScheduler:
        """Its process and its windows are those of the training."""
        wanted = self.recipe.objective
        return PeRFlowScheduler.from_config(
            models.pipeline.scheduler.config,
            prediction_type=wanted.prediction_type,
            num_time_windows=wanted.windows,
            use_flow_sigmas=self._is_flow(models),
            window_shift=wanted.window_shift,
        )

    def objective(self, models: pipelines.Kind, student: TunedModel) -> tuple[nn.Module, Times]:
        wanted, schedule, config = self.recipe.objective, models.schedule(), student.scheduler.config
        _, own, teacher = self._denoisers(models, student)
        names = ("prediction_type", "begin_at_noise", "legacy_grid", "distance", "huber_c", "reweighting")
        objective = PeRFlowTraining(
            own,
            teacher,
            Marginal(student.scheduler.alphas_cumprod),
            window_bounds(config.num_time_windows, config.window_shift),
            steps=wanted.solver_steps,
            teacher_prediction_type="flow" if self._is_flow(models) else schedule.prediction_type,
            num_timesteps=schedule.num_timesteps,
            guidance=wanted.teacher_guidance,
            **{name: getattr(wanted, name) for name in names},
        )
        return objective, Times(wanted.levels, wanted.window_shift)

    def encode(self, batch: dict, models: pipelines.Kind, schedule: Times, device: torch.device) -> dict:
        """A batch of the loader as the objective's arguments."""
        encoded = super().encode(batch, models, schedule, device)
        drop = self.recipe.data.caption_drop
        if drop or self.recipe.objective.teacher_guidance is not None:
            # Sizes, which captions do not say, are the same.
            encoded["unconditional"] = encoded["condition"] | self._encoded(models, "")
        if drop:
            encoded["dropped"] = chosen(batch["number"].tolist(), drop, seed=self.recipe.training.seed).to(device)
        return encoded

    def pictures(self, models: pipelines.Kind, model: nn.Module, autocast: Callable) -> list:
        return self._drawn(models, model, autocast, scheduler=self._scheduler(models))

    def _teacher_draws(self) -> dict:
        guidance = self.recipe.objective.teacher_guidance
        return super()._teacher_draws() | ({} if guidance is None else {"guidance": guidance})

    def summary(self, models: pipelines.Kind, student: TunedModel) -> list[tuple[str, str]]:
        wanted = self.recipe.objective
        guided = "not guided" if wanted.teacher_guidance is None else f"guided by {wanted.teacher_guidance}"
        does = f"{guided}, {wanted.windows} windows of {wanted.solver_steps} steps"
        return self._tuned_summary(models, student, does, wanted.prediction_type)


class FlashTask(_StepTask):
    """A student learns to say in one step where its guided teacher's path ends (`objective.kind: flash`)."""

    def __init__(self, recipe: Recipe, **classes):
        super().__init__(recipe, **classes)
        wanted = recipe.objective
        self.phases = Phases.of(**wanted.phases.model_dump())
        self._phase = self.phases.at(0)
        for key in ("discriminator", "fake_score"):
            if getattr(wanted, key) is not None:
                self.beside_the_student = f"objective.{key}"
        if wanted.perceptual is not None and "objective.perceptual" not in self.named:
            raise TypeError(f"expected the function that objective.perceptual names ({wanted.perceptual!r}), got None")

    def begin(self, step: int) -> None:
        self._phase = self.phases.at(step)

    def problems(self, models: pipelines.Kind) -> list[str]:
        wanted, name, problems = self.recipe.objective, type(models.pipeline).__name__, super().problems(models)
        try:
            process = models.process(wanted.shift)
            process.with_prediction(self._prediction(process))
            for steps in {phase.grid_steps for phase in self.phases.phases}:
                process.grid(steps)
        except ValueError as error:
            problems.append(f"objective (process of a {name}): {error}")
        else:
            if (wanted.prediction_type == "flow") != process.is_flow and wanted.prediction_type is not None:
                expected = "'flow'" if process.is_flow else "epsilon, v_prediction or sample"
                problems.append(
                    f"objective.prediction_type: expected {expected} for a {name}, got {wanted.prediction_type!r}"
                )
        entries = list(models.policies())
        for key in ("drop", "unconditional"):
            if unknown := [entry for entry in getattr(wanted, key) if entry not in entries]:
                problems.append(
                    f"objective.{key}: expected conditions of a {name}, {', '.join(entries)}; got {unknown[0]!r}"
                )
        return problems

    def _prediction(self, process: NoiseProcess) -> str:
        return self.recipe.objective.prediction_type or process.prediction_type

    def _scheduler(self, models: pipelines.Kind):
        from diffusers import FlowMatchLCMScheduler, LCMScheduler

        config, process = models.pipeline.scheduler.config, models.process(self.recipe.objective.shift)
        if process.is_flow:
            return FlowMatchLCMScheduler.from_config(config)
        # Of as many steps as there are timesteps: then it takes every n-th of these by itself, as training does where n
        # divides its grid, and has no words about timesteps that are none of fifty.
        return LCMScheduler.from_config(
            config,
            prediction_type=self._prediction(process),
            timestep_spacing="trailing",
            clip_sample=False,
            original_inference_steps=process.num_timesteps,
        )

    def objective(self, models: pipelines.Kind, student: TunedModel) -> tuple[nn.Module, NoiseProcess]:
        wanted = self.recipe.objective
        of, own, teacher = self._denoisers(models, student)
        process = models.process(wanted.shift)
        names = ("order", "distance", "huber_c")
        options: dict[str, object] = {name: getattr(wanted, name) for name in names}
        if wanted.perceptual is not None:
            options["perceptual"] = decoded_distance(
                models.decode, self.named["objective.perceptual"], crop=wanted.crop
            )
        if wanted.discriminator is not None:
            judge = wanted.discriminator
            features = models.feature_modules() if judge.features is None else judge.features
            shapes = self._feature_shapes(models, teacher, features)
            options |= {
                "discriminator": Discriminator(shapes, width=judge.width, levels=judge.levels),
                "features": features,
                "adversarial": judge.loss,
                "real": judge.real,
                "levels": judge.noise_levels,
            }
        if wanted.fake_score is not None:
            options["fake_score"] = of(self._fake(models, student))
        objective = FlashTraining(
            own, teacher, process, student_prediction=self._prediction(process), drop=wanted.drop, **options
        )
        return objective, process

    def _feature_shapes(self, models: pipelines.Kind, teacher, names) -> dict[str, tuple[int, ...]]:
        """Shapes of the features of one sample, by running the teacher on one."""
        side = self.recipe.data.resolution
        device, dtype = models.model.device, models.model.dtype
        with torch.no_grad():
            pixels = torch.zeros(1, 3, side, side, device=device)
            mean, _ = models.encode_image(pixels)
            sizes = torch.tensor([[side, side]])
            condition = models.encode_text([""]) | models.encode_sizes(sizes, 0 * sizes, sizes)
            if models.needs_pixels:
                condition |= models.picture_condition(pixels, [0], self.recipe.training.seed)
            level = torch.zeros(1, device=device, dtype=torch.long)
            try:
                features = features_of(teacher, names, mean.to(dtype), level, condition)
            except ValueError as error:  # no module of such a name
                raise RecipeError("recipe", [f"objective.discriminator.features: {error}"]) from None
        return {name: tuple(value.shape[1:]) for name, value in features.items()}

    def _fake(self, models: pipelines.Kind, student: TunedModel) -> nn.Module:
        """A network like the teacher, trained as the student is: all of it, or low-rank updates."""
        wanted = self.recipe.student
        low_rank = wanted.lora if wanted.train == "lora" else None
        fake = TunedModel(models.model, student.scheduler, low_rank=low_rank)
        fake.place(models.model.device, models.model.dtype)
        if self.recipe.training.gradient_checkpointing:
            fake.model.enable_gradient_checkpointing()
        return fake.model

    def auxiliary(self, objective: FlashTraining) -> dict[str, Auxiliary]:
        wanted = self.recipe.objective
        return {
            name: Auxiliary(module, getattr(wanted, name).learning_rate) for name, module in objective.auxiliary.items()
        }

    def encode(self, batch: dict, models: pipelines.Kind, schedule: NoiseProcess, device: torch.device) -> dict:
        """A batch of the loader as the objective's arguments."""
        seed, numbers = self.recipe.training.seed, batch["number"].tolist()
        mean, std = self._posterior(batch, models, device)
        random = draw_flash(numbers, mean.shape[1:], seed=seed, per_sample=self.recipe.objective.per_sample).to(device)
        condition = self._condition(batch, models, device)
        return {
            "latents": models.latents(mean, std, random.posterior),
            "draws": random,
            "condition": condition,
            "absent": unconditional(condition, self._policies(models)),
            "phase": self._phase,
        }

    def _policies(self, models: pipelines.Kind) -> dict[str, str | torch.Tensor]:
        """What takes the place of each entry of the condition where there is none."""
        policies: dict[str, str | torch.Tensor] = {}
        for name, policy in (models.policies() | self.recipe.objective.unconditional).items():
            if policy == "empty":
                policies[name] = self._encoded(models, "")[name]
            elif isinstance(policy, dict):
                policies[name] = self._encoded(models, policy["prompt"])[name]
            else:
                policies[name] = policy
        return policies

    def pictures(self, models: pipelines.Kind, model: nn.Module, autocast: Callable) -> list:
        """What `model` draws at the levels that it was trained on, unguided: the guidance is in it."""
        steps, grid = self.recipe.output.validation.steps, self._phase.grid_steps
        arguments = models.few_step_arguments(steps, grid)
        return self._drawn(
            models, model, autocast, guidance=1.0, scheduler=self._scheduler(models), arguments=arguments
        )

    def summary(self, models: pipelines.Kind, student: TunedModel) -> list[tuple[str, str]]:
        wanted, last = self.recipe.objective, self.phases.phases[-1]
        does = f"guided by {last.guidance[0]} to {last.guidance[1]}, {last.grid_steps} steps of order {wanted.order}"
        says = f"{self._prediction(models.process(wanted.shift))}, {len(self.phases.phases)} phases"
        lines = self._tuned_summary(models, student, does, says)
        parts = [
            f"{name} ({getattr(wanted, name).learning_rate:g})"
            for name in ("discriminator", "fake_score")
            if getattr(wanted, name) is not None
        ]
        return [*lines, ("beside it", ", ".join(parts))] if parts else lines


class UpscalingTask:
    """A model that enlarges pictures is trained on pairs, whole and without a teacher (`objective.kind: edm`)."""

    columns = "bicubic | student"
    beside_the_student: str | None = None

    def __init__(self, recipe: Recipe, *, adapter_class: type | None = None, pipeline_class: type | None, named=None):
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

    def auxiliary(self, objective: nn.Module) -> dict[str, Auxiliary]:
        return {}

    def begin(self, step: int) -> None:
        pass

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


class UpscalingStepsTask(UpscalingTask):
    """A student learns to enlarge pictures in few steps as its teacher does in many (`objective.kind: edm_steps`)."""

    columns = "teacher | student"

    def start(self, models: pipelines.Kind, *, share: bool) -> TunedModel:
        wanted, shared = self.recipe.student, self.recipe.training.share_frozen
        low_rank = wanted.lora if wanted.train == "lora" else None
        share = share if shared is None else shared
        return TunedModel(models.model, self._scheduler(models), low_rank=low_rank, share=share)

    def _scheduler(self, models: pipelines.Kind) -> EDMScheduler:
        """Estimates and noise in turn, at the levels of the training."""
        own = {"sampler": "lcm", "grid_steps": self.recipe.objective.grid_steps, "s_churn": 0.0}
        return EDMScheduler.from_config(models.pipeline.scheduler.config, **own)

    def objective(self, models: pipelines.Kind, student: TunedModel) -> tuple[nn.Module, Starts]:
        wanted, config = self.recipe.objective, models.pipeline.scheduler.config
        levels = {name: config[name] for name in ("sigma_min", "sigma_max", "rho")}
        starts = Starts(wanted.grid_steps, weights=wanted.weights, variance=wanted.variance, **levels)
        options = {name: getattr(wanted, name) for name in ("start", "order", "distance", "huber_c")}
        own, teacher = models.denoiser(student.model), models.denoiser(models.model)
        return EDMStepDistillation(own, teacher, starts.grid, **options), starts

    def encode(self, batch: dict, models: pipelines.Kind, schedule: Starts, device: torch.device) -> dict:
        """A batch of the loader as the objective's arguments."""
        wanted, clean = self.recipe.objective, batch["image"].to(device)
        # Nothing is dropped: both always see the low resolution, as in sampling.
        random = draw_pairs(
            batch["number"].tolist(),
            clean.shape[1:],
            seed=self.recipe.training.seed,
            schedule=schedule,
            dropout=0.0,
            max_offset=wanted.max_offset,
            factor=models.factor,
        )
        index = random.timesteps if wanted.per_sample else random.timesteps[:1]
        return {
            "clean": clean,
            "noise": random.noise.to(device),
            "index": index.to(device),
            "condition": models.encode_lr(batch["lr_image"].to(device)),
            "position_offset": random.offset,
        }

    def compared(self, models: pipelines.Kind, autocast: Callable) -> list:
        """`output.validation.images`, enlarged by the teacher with its own sampler."""
        steps = self.recipe.output.validation.teacher_steps or self.recipe.objective.grid_steps
        return self._drawn(models, models.model, autocast, steps=steps)

    def pictures(self, models: pipelines.Kind, model: nn.Module, autocast: Callable) -> list:
        """`output.validation.images`, enlarged by `model` at the levels that it was trained at."""
        steps = self.recipe.output.validation.steps
        return self._drawn(models, model, autocast, steps=steps, scheduler=self._scheduler(models))

    def _drawn(self, models: pipelines.Kind, model: nn.Module, autocast: Callable, **options) -> list:
        own = {"seed": self.recipe.output.validation.seed, "start": self.recipe.objective.start}
        return models.draw(model, self._inputs, **own, autocast=autocast, **options)

    def summary(self, models: pipelines.Kind, student: TunedModel) -> list[tuple[str, str]]:
        wanted = self.recipe.objective
        count, total = _counts(student)
        does = f"{self.recipe.model.pretrained} ({type(models.pipeline).__name__}), {wanted.grid_steps} steps"
        says = f"a copy, {len(wanted.weights)} steps; trains {count:,} of {total:,} parameters"
        return [
            ("teacher", f"{does} of order {wanted.order}"),
            ("student", f"{says} ({self.recipe.student.train})"),
        ]


TASKS = {
    "attention": AttentionTask,
    "flow_attention": AttentionTask,
    "edm": UpscalingTask,
    "edm_steps": UpscalingStepsTask,
    "perflow": PeRFlowTask,
    "flash": FlashTask,
}


def _counts(student: Student | TunedModel | WholeModel) -> tuple[int, int]:
    """Numbers that are trained, and all."""
    trained = sum(p.numel() for p in student.trainable().values())
    return trained, sum(p.numel() for p in student.model.parameters())
