"""A diffusers pipeline as the source of everything but pictures: teacher, encoders, noise schedule, validation images.

One class per kind of pipeline, found by the class name in `model_index.json`. All are used in the same way:

    models = load("stable-diffusion-v1-5/stable-diffusion-v1-5")
    models.place(device, torch.bfloat16)
    condition = models.encode_text(captions) | models.encode_sizes(original, crop, target)
    latents = models.latents(*models.encode_image(pixels), noise)
    prediction = models.denoiser(models.model)(noisy, timesteps, condition)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import bundled
from .._quiet import quiet_diffusers
from .denoiser import Denoiser, UNetDenoiser
from .noise import DiscreteSchedule, NoiseSchedule


def move(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """nn.Module.to: diffusers' own warns about modules that are kept in float32 even where there are none."""
    nn.Module.to(model, device=device, dtype=dtype)


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x: UNet, one CLIP text encoder, VAE."""

    #: Name of the component that is distilled.
    component = "unet"

    def __init__(self, pipeline):
        self.pipeline = pipeline
        self.pipeline.set_progress_bar_config(disable=True)
        for part in (pipeline.components[name] for name in pipeline.components):
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        self.schedule: NoiseSchedule = DiscreteSchedule(pipeline.scheduler)

    @property
    def model(self) -> nn.Module:
        """The denoising network of the pipeline: the teacher."""
        return getattr(self.pipeline, self.component)

    def denoiser(self, model: nn.Module) -> Denoiser:
        return UNetDenoiser(model)

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
    def draw(self, model: nn.Module, prompts: Sequence[str], *, steps, guidance, height, width, seed, autocast) -> list:
        """One picture (PIL) per prompt by `model` in the place of the pipeline's own, each from the same seed.

        Args:
            autocast: function that returns the context in which the model runs; the VAE decodes outside of it.
        """
        own, vae = self.model, self.pipeline.vae
        pictures = []
        self.pipeline.register_modules(**{self.component: model})
        try:
            for prompt in prompts:
                with autocast():
                    latents = self.pipeline(
                        prompt,
                        num_inference_steps=steps,
                        guidance_scale=guidance,
                        height=height,
                        width=width,
                        generator=torch.Generator().manual_seed(seed),
                        output_type="latent",
                    ).images
                latents = latents.to(vae.dtype) / vae.config.scaling_factor + self._shift
                pictures += self.pipeline.image_processor.postprocess(vae.decode(latents).sample.float())
        finally:
            self.pipeline.register_modules(**{self.component: own})
        return pictures

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


#: Class names of pipelines in `model_index.json` -> how to use them.
KINDS = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
}


def load(name_or_path: str, *, revision: str | None = None, variant: str | None = None) -> StableDiffusion:
    """Load a text-to-image pipeline in float32, safetensors only, without the parts that training has no use for.

    Raises:
        ValueError: not a pipeline that can be distilled; the message lists those that can.
        OSError: nothing is there, only pickles are, or no network; diffusers' message says what was looked for.
    """
    from diffusers import DiffusionPipeline

    name_or_path = bundled.resolve(name_or_path)
    options = {key: value for key, value in {"revision": revision, "variant": variant}.items() if value is not None}
    config = DiffusionPipeline.load_config(name_or_path, **{k: v for k, v in options.items() if k == "revision"})
    kind = KINDS.get(config.get("_class_name"))
    if kind is None:
        raise ValueError(
            f"model.pretrained: expected a pipeline of one of {', '.join(KINDS)}; {name_or_path!r} is a "
            f"{config.get('_class_name')}"
        )
    without = {name: None for name in ("safety_checker", "feature_extractor", "image_encoder") if name in config}
    if "safety_checker" in config:
        without["requires_safety_checker"] = False
    with quiet_diffusers():  # it warns that the safety checker is off, which matters where pictures are served
        pipeline = DiffusionPipeline.from_pretrained(name_or_path, use_safetensors=True, **without, **options)
    return kind(pipeline)
