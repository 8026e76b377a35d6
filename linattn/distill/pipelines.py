"""A diffusers pipeline as the source of everything but pictures: teacher, encoders, noise schedule, validation images.

One class per kind of pipeline, found by the class name in `model_index.json`. All are used in the same way:

    models = load("stable-diffusion-v1-5/stable-diffusion-v1-5")
    models.place(device, torch.bfloat16)
    condition = models.encode_text(captions) | models.encode_sizes(original, crop, target)
    latents = models.latents(*models.encode_image(pixels), noise)
    prediction = models.denoiser(models.model)(noisy, timesteps, condition)

What a kind asks of a recipe it says by `objectives` (the kinds of objective that fit its noise schedule), `multiple`
(of how many pixels the sides of a picture are multiples) and `needs_pixels` (whether the picture itself is part of the
condition, beside its caption).

Pipelines that draw from captions (`StableDiffusion` and the others that encode text) are teachers. `InfDiT`, which
enlarges pictures, is trained itself.
"""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import bundled
from .._quiet import quiet_diffusers
from ..evaluate import call_arguments
from .denoiser import Denoiser, FluxDenoiser, InfDiTDenoiser, SD3Denoiser, UNetDenoiser, unpack
from .noise import DiscreteSchedule, EDMSchedule, FlowSchedule, NoiseSchedule
from .noise_process import NoiseProcess


def move(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """nn.Module.to: diffusers' own warns about modules that are kept in float32 even where there are none."""
    nn.Module.to(model, device=device, dtype=dtype)


class Kind:
    """What all kinds have: a pipeline whose parts are frozen and in evaluation mode, and one of them that denoises."""

    #: Name of the component that denoises.
    component: str
    #: The kinds of objective that fit: `objective.kind` of a recipe.
    objectives: tuple[str, ...]
    #: Sides of a picture are multiples of so many pixels.
    multiple: int
    #: Tokens of the longest text encoder, where that can be chosen; None: fixed by the model, or there is none.
    text_length: int | None = None
    #: Components that training has no use for, and that are not loaded.
    unused: tuple[str, ...] = ()
    #: Whether part of the condition is made of the picture (`picture_condition`), so that its latents are not enough.
    needs_pixels: bool = False

    def __init__(self, pipeline):
        self.pipeline = pipeline
        self.pipeline.set_progress_bar_config(disable=True)
        for part in (pipeline.components[name] for name in pipeline.components):
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()

    @property
    def model(self) -> nn.Module:
        """The denoising network of the pipeline."""
        return getattr(self.pipeline, self.component)

    @contextlib.contextmanager
    def _with(self, model: nn.Module, scheduler=None) -> Iterator[None]:
        """The pipeline with `model` in the place of its own, and with a scheduler, if one is given."""
        new = {self.component: model} if scheduler is None else {self.component: model, "scheduler": scheduler}
        own = {name: getattr(self.pipeline, name) for name in new}
        self.pipeline.register_modules(**new)
        try:
            yield
        finally:
            self.pipeline.register_modules(**own)

    def save(self, folder: Path, model: nn.Module, scheduler=None) -> None:
        """Write the pipeline, with `model` and the scheduler in the place of its own, as its class loads it."""
        with self._with(model, scheduler):
            self.pipeline.save_pretrained(folder)


class StableDiffusion(Kind):
    """Stable Diffusion 1.x and 2.x: UNet, one CLIP text encoder, VAE."""

    component = "unet"
    objectives = ("attention", "perflow", "flash")
    multiple = 8
    unused = ("safety_checker", "feature_extractor", "image_encoder")

    def schedule(self) -> NoiseSchedule:
        return DiscreteSchedule(self.pipeline.scheduler)

    def process(self, shift: float | None = None) -> NoiseProcess:
        """The process that the model was trained on.

        Args:
            shift: of flow matching; None: as the pipeline's scheduler shifts.

        Raises:
            ValueError: as `NoiseProcess.from_scheduler`; so without a shift where that depends on the picture's size.
        """
        return NoiseProcess.from_scheduler(self.pipeline.scheduler, shift=shift)

    def denoiser(self, model: nn.Module) -> Denoiser:
        return UNetDenoiser(model)

    def feature_modules(self) -> tuple[str, ...]:
        """Modules of the network whose outputs a discriminator looks at; none: it looks at the prediction."""
        return ("mid_block",)

    def policies(self) -> dict[str, str]:
        """What takes the place of each entry of the condition where there is none.

        "empty": that entry of the encoded empty caption. "zero". "keep": the entry itself, which is no prompt.
        """
        return {"encoder_hidden_states": "empty"}

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move everything frozen to the device, in the type that it computes in.

        The VAE stays in float32 unless its config says that 16 bits are enough (`force_upcast: false`).
        """
        vae = self.pipeline.vae
        for part in self.pipeline.components.values():
            if isinstance(part, nn.Module):
                wide = part is vae and vae.config.get("force_upcast", False)
                move(part, device, torch.float32 if wide else dtype)

    @property
    def _device(self) -> torch.device:
        return self.pipeline.vae.device

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The part of a denoiser's condition that comes from the captions, one row each."""
        embeds = self.pipeline.encode_prompt(list(captions), self._device, 1, do_classifier_free_guidance=False)[0]
        return {"encoder_hidden_states": embeds}

    def encode_sizes(self, original: Tensor, crop: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The part that says where the pixels come from; each argument (B, 2), (height, width) or (top, left)."""
        return {}

    def picture_condition(self, pixels: Tensor, numbers: Sequence[int], seed: int) -> dict[str, Tensor]:
        """The part that is made of the pictures themselves (`needs_pixels`).

        Args:
            pixels: (B, 3, H, W) in -1..1.
            numbers: the samples' running numbers. What is random about the result depends on them and the seed alone.
        """
        return {}

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's posterior: (B, 3, H, W) in -1..1 -> twice (B, c, h, w), float32."""
        vae = self.pipeline.vae
        posterior = vae.encode(pixels.to(device=self._device, dtype=vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    def latents(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """A sample of the posterior, at the scale of the diffusion model."""
        return (mean + std * noise - self._shift) * self.pipeline.vae.config.scaling_factor

    @property
    def _shift(self) -> float:
        return self.pipeline.vae.config.get("shift_factor", None) or 0.0

    @torch.no_grad()
    def draw(
        self,
        model: nn.Module,
        prompts: Sequence[str],
        *,
        steps,
        guidance,
        height,
        width,
        seed,
        autocast,
        scheduler=None,
        arguments: Mapping[str, object] | None = None,
    ) -> list:
        """One picture (PIL) per prompt by `model` in the place of the pipeline's own, each from the same seed.

        Args:
            scheduler: in the place of the pipeline's own; None: that.
            autocast: function that returns the context in which the model runs; the VAE decodes outside of it.
            arguments: more of the pipeline's call, such as timesteps; where it has one already, in its place.
        """
        vae = self.pipeline.vae
        pictures = []
        with self._with(model, scheduler):
            for prompt in prompts:
                options = {
                    "num_inference_steps": steps,
                    "height": height,
                    "width": width,
                    "generator": torch.Generator().manual_seed(seed),
                    **self._call_arguments(guidance),
                    **(arguments or {}),
                }
                with autocast():
                    latents = self._sample(prompt, **options)
                latents = latents.to(vae.dtype) / vae.config.scaling_factor + self._shift
                pictures += self.pipeline.image_processor.postprocess(vae.decode(latents).sample.float())
        return pictures

    def _sample(self, prompt: str, **options) -> Tensor:
        """Latents (1, c, h, w) of a picture that the pipeline draws."""
        return self.pipeline([prompt], output_type="latent", **options).images

    def _call_arguments(self, guidance: float) -> dict:
        lengths = {} if self.text_length is None else {"max_sequence_length": self.text_length}
        return call_arguments(self.pipeline, 1, guidance) | lengths

    def save_lora(self, folder, layers: dict[str, Tensor], settings: dict) -> None:
        """Write LoRA weights in the layout that `pipeline.load_lora_weights` reads.

        Args:
            settings: of the LoraConfig, kept in the file's metadata.
        """
        parts = {f"{self.component}_lora_layers": layers, f"{self.component}_lora_adapter_metadata": settings}
        type(self.pipeline).save_lora_weights(folder, **parts)


class StableDiffusionXL(StableDiffusion):
    """SDXL: two text encoders, and the sizes as a condition."""

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(captions), device=self._device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeds, "text_embeds": pooled}

    def encode_sizes(self, original: Tensor, crop: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"time_ids": torch.cat([original, crop, target], dim=1).to(self._device, self.model.dtype)}

    def policies(self) -> dict[str, str]:
        # As the pipeline guides without a negative prompt; sizes are no prompt.
        text = "zero" if self.pipeline.config.get("force_zeros_for_empty_prompt", True) else "empty"
        return {"encoder_hidden_states": text, "text_embeds": text, "time_ids": "keep"}


class _FlowTransformer(StableDiffusion):
    """What FLUX and Stable Diffusion 3 have in common: a transformer, flow matching, T5 beside CLIP."""

    component = "transformer"
    objectives = ("flow_attention", "perflow", "flash")

    def __init__(self, pipeline):
        super().__init__(pipeline)
        self.text_length = call_arguments(pipeline, 1, 1.0)["max_sequence_length"]

    def schedule(self, **options) -> NoiseSchedule:
        """The flow matching schedule; options: see `FlowSchedule`."""
        return FlowSchedule(self.pipeline.scheduler, **options)

    def feature_modules(self) -> tuple[str, ...]:
        return ()

    def policies(self) -> dict[str, str]:
        return {"encoder_hidden_states": "empty", "pooled_projections": "empty"}

    def compared_modules(self, interval: int) -> tuple[str, ...]:
        """Names of the attention modules whose outputs student and teacher are compared by.

        Args:
            interval: every how many blocks.

        Raises:
            ValueError: there is no such module.
        """
        names = tuple(self._compared_modules(interval))
        if not names:
            raise ValueError(
                f"objective.feature_interval: {interval} leaves no attention module of this model to compare; choose a "
                "smaller one, or set objective.weights.feature to 0"
            )
        return names

    def _compared_modules(self, interval: int) -> Iterator[str]:
        raise NotImplementedError


class Flux(_FlowTransformer):
    """FLUX.1 (dev, schnell): double and single blocks, CLIP's pooled embedding, T5's tokens, latents packed 2 x 2."""

    @property
    def multiple(self) -> int:
        return 2 * self.pipeline.vae_scale_factor

    def denoiser(self, model: nn.Module, guidance: float = 3.5) -> Denoiser:
        return FluxDenoiser(model, guidance=guidance, num_timesteps=self.pipeline.scheduler.config.num_train_timesteps)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            list(captions), device=self._device, max_sequence_length=self.text_length
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def _compared_modules(self, interval: int) -> Iterator[str]:
        # As CLEAR's training has it: counted over all blocks, the double ones first, and of the single ones only (whose
        # attention has no output projection, so these are raw outputs of text and image together).
        double = len(self.model.transformer_blocks)
        for place in range(len(self.model.single_transformer_blocks)):
            if (double + place) % interval == 0:
                yield f"single_transformer_blocks.{place}.attn"

    def _sample(self, prompt: str, *, height, width, **options) -> Tensor:
        pipeline = self.pipeline
        height, width = (side or pipeline.default_sample_size * pipeline.vae_scale_factor for side in (height, width))
        tokens = super()._sample(prompt, height=height, width=width, **options)
        return unpack(tokens, height // self.multiple, width // self.multiple)


class StableDiffusion3(_FlowTransformer):
    """Stable Diffusion 3 and 3.5: joint blocks, two CLIP encoders, and T5 where it is loaded."""

    @property
    def multiple(self) -> int:
        return self.model.config.patch_size * self.pipeline.vae_scale_factor

    def denoiser(self, model: nn.Module, guidance: float | None = None) -> Denoiser:
        """Guidance is ignored: no Stable Diffusion 3 is told one."""
        return SD3Denoiser(model)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(captions),
            None,
            None,
            device=self._device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def _compared_modules(self, interval: int) -> Iterator[str]:
        # The authors of CLEAR have not published how they train SD3; this is ours. All blocks are joint ones, so all
        # count, with every attention that is replaced in them; but for the last, whose text output nobody reads.
        for place, block in enumerate(self.model.transformer_blocks):
            if place % interval == 0 and not block.context_pre_only:
                yield f"transformer_blocks.{place}.attn"
                if block.attn2 is not None:
                    yield f"transformer_blocks.{place}.attn2"


class InfDiT(Kind):
    """Inf-DiT: a transformer in pixel space that enlarges pictures, and a CLIP image encoder where it wants one.

    Whatever the pipeline, its network is trained itself: nothing in it is a teacher.
    """

    component = "transformer"
    objectives = ("edm",)

    @property
    def multiple(self) -> int:
        return self.model.block_pixels

    @property
    def factor(self) -> int:
        """Of the sides, from the low resolution picture that the network sees to what it makes of it."""
        return self.model.config.sr_scale

    def schedule(self, **options) -> NoiseSchedule:
        """options: see `EDMSchedule`."""
        return EDMSchedule(sigma_data=self.pipeline.scheduler.config.sigma_data, **options)

    def denoiser(self, model: nn.Module) -> Denoiser:
        return InfDiTDenoiser(model, sigma_data=self.pipeline.scheduler.config.sigma_data)

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move what is frozen to the device: the image encoder, in float32. Beside a step of training it costs nothing,
        and it is saved with the result as it came."""
        if self.pipeline.image_encoder is not None:
            move(self.pipeline.image_encoder, device, torch.float32)

    @property
    def lacks_image_encoder(self) -> bool:
        """Whether the network wants the vector of a picture, and there is nobody to make it."""
        return bool(self.model.config.vector_dim) and self.pipeline.image_encoder is None

    @property
    def image_vector_dim(self) -> int:
        """Of the vectors that the image encoder makes."""
        return self.pipeline.image_encoder.config.projection_dim

    def encode_lr(self, lr_image: Tensor) -> dict[str, Tensor]:
        """A denoiser's condition from low resolution pictures (B, 3, h, w) in [-1, 1]."""
        condition = {"lr_image": lr_image, "lr_up": self.enlarge(lr_image)}
        if self.model.config.vector_dim:
            with torch.no_grad(), torch.autocast(lr_image.device.type, enabled=False):
                condition["image_embeds"] = self.pipeline.encode_image(lr_image)
        return condition

    def enlarge(self, lr_image: Tensor) -> Tensor:
        """Bicubic, smoothed, clamped: what the network improves on."""
        size = [self.factor * side for side in lr_image.shape[2:]]
        return F.interpolate(lr_image, size, mode="bicubic", antialias=True).clamp(-1, 1)

    @torch.no_grad()
    def draw(self, model: nn.Module, pictures: Sequence, *, steps, seed, autocast) -> list:
        """The pictures (PIL) enlarged by `model`, each from the same seed.

        Args:
            autocast: function that returns the context in which the model runs.
        """
        with self._with(model), autocast():
            return [
                self.pipeline(
                    picture,
                    self.factor,
                    num_inference_steps=steps,
                    generator=torch.Generator().manual_seed(seed),
                ).images[0]
                for picture in pictures
            ]


#: Class names of pipelines in `model_index.json` -> how to use them.
KINDS: dict[str, type[Kind]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "FluxPipeline": Flux,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "InfDiTUpscalePipeline": InfDiT,
}
#: Kinds that diffusers does not know, so that somebody has to hand in the class of the pipeline.
FOREIGN = ("InfDiTUpscalePipeline",)


def load(
    name_or_path: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    text_length: int | None = None,
    pipeline_class: type | None = None,
    image_encoder: str | None = None,
) -> Kind:
    """Load a pipeline in float32, safetensors only, without the parts that training has no use for.

    Args:
        text_length: tokens that T5 sees of a caption; None: as many as its tokenizer says, at most the pipeline's
            default (FLUX: 512, Stable Diffusion 3: 256).
        pipeline_class: of pipelines that diffusers does not know (`FOREIGN`).
        image_encoder: name or folder of one, in the place of the pipeline's own.

    Raises:
        ValueError: not a pipeline that can be trained; the message lists those that can. Or an option that it has no
            use for, or one that it lacks.
        OSError: nothing is there, only pickles are, or no network; diffusers' message says what was looked for.
    """
    from diffusers import DiffusionPipeline

    name_or_path = bundled.resolve(name_or_path)
    options = {key: value for key, value in {"revision": revision, "variant": variant}.items() if value is not None}
    config = DiffusionPipeline.load_config(name_or_path, **{k: v for k, v in options.items() if k == "revision"})
    name = config.get("_class_name")
    kind = KINDS.get(name)
    if kind is None:
        raise ValueError(
            f"model.pretrained: expected a pipeline of one of {', '.join(KINDS)}; {name_or_path!r} is a {name}"
        )
    if name in FOREIGN and (pipeline_class is None or pipeline_class.__name__ != name):
        given = "null" if pipeline_class is None else repr(pipeline_class.__name__)
        raise ValueError(f"model.pipeline: expected the import path of {name} for {name_or_path!r}, got {given}")
    if text_length is not None and not issubclass(kind, _FlowTransformer):
        raise ValueError(
            f"model.text_length: expected null for a {name}, whose text encoder has one length; got {text_length}"
        )
    without = {part: None for part in kind.unused if part in config}
    if "safety_checker" in config:
        without["requires_safety_checker"] = False
    loader = pipeline_class if name in FOREIGN else DiffusionPipeline
    from ..schedulers import PeRFlowScheduler  # noqa: F401 (pipelines saved with it: diffusers imports nothing)

    with quiet_diffusers():  # it warns that the safety checker is off, which matters where pictures are served
        pipeline = loader.from_pretrained(name_or_path, use_safetensors=True, **without, **options)
    if image_encoder is not None:
        _give_image_encoder(pipeline, kind, image_encoder)
    models = kind(pipeline)
    models.text_length = text_length or models.text_length
    return models


def fresh(pipeline_class: type, config: Mapping[str, object], *, image_encoder: str | None = None) -> Kind:
    """A pipeline whose network has the weights that training starts from: random ones, of torch's own generator.

    Args:
        pipeline_class: of one of the `FOREIGN` kinds; its annotations say of which classes its parts are.
        config: what the class of the network is called with.
        image_encoder: name or folder of one.

    Raises:
        ValueError: another class, or a config that the class of the network refuses.
    """
    kind = KINDS.get(pipeline_class.__name__)
    if pipeline_class.__name__ not in FOREIGN or kind is None:
        raise ValueError(
            f"model.config: expected model.pipeline to be one of {', '.join(FOREIGN)} beside it, got "
            f"{pipeline_class.__name__!r}"
        )
    parts = typing.get_type_hints(pipeline_class.__init__)
    try:
        network = parts[kind.component](**config)
    except (TypeError, ValueError) as error:  # an option that it does not know, or sizes that do not fit together
        raise ValueError(f"model.config: {error}") from error
    pipeline = pipeline_class(**{kind.component: network, "scheduler": parts["scheduler"]()})
    if image_encoder is not None:
        _give_image_encoder(pipeline, kind, image_encoder)
    return kind(pipeline)


def _give_image_encoder(pipeline, kind: type[Kind], name_or_path: str) -> None:
    if "image_encoder" in kind.unused or "image_encoder" not in pipeline.components:
        raise ValueError(f"model.image_encoder: expected null for a {type(pipeline).__name__}, got {name_or_path!r}")
    from transformers import CLIPVisionModelWithProjection

    encoder = CLIPVisionModelWithProjection.from_pretrained(name_or_path, use_safetensors=True)
    pipeline.register_modules(image_encoder=encoder)
