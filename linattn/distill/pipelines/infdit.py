"""Inf-DiT: trained itself, on pictures alone; or the teacher of a copy that needs fewer steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..denoiser import Denoiser, InfDiTDenoiser
from ..noise import EDMSchedule, NoiseSchedule
from .kind import Kind, move


class InfDiT(Kind):
    """Inf-DiT: a transformer in pixel space that enlarges pictures, and a CLIP image encoder where it wants one.

    Its network is trained itself, or is frozen and teaches a copy.
    """

    component = "transformer"
    objectives = ("edm", "edm_steps")

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

    def denoiser(self, model: torch.nn.Module) -> Denoiser:
        return InfDiTDenoiser(model, sigma_data=self.pipeline.scheduler.config.sigma_data)

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move what is frozen to the device: the image encoder, in float32. Beside a step of training it costs nothing,
        and it is saved with the result as it came. A network that teaches: in the given type."""
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            move(self.model, device, dtype)
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
    def draw(
        self, model: torch.nn.Module, pictures: Sequence, *, steps, seed, autocast, scheduler=None, start="lr"
    ) -> list:
        """The pictures (PIL) enlarged by `model`, each from the same seed.

        Args:
            autocast: function that returns the context in which the model runs.
            scheduler: in the place of the pipeline's own.
            start: of the pipeline's call.
        """
        with self._with(model, scheduler), autocast():
            return [
                self.pipeline(
                    picture,
                    self.factor,
                    num_inference_steps=steps,
                    start=start,
                    generator=torch.Generator().manual_seed(seed),
                ).images[0]
                for picture in pictures
            ]

    def save_lora(self, folder, layers: dict[str, Tensor], settings: dict) -> None:
        """Write LoRA weights in the layout that `pipeline.transformer.load_lora_adapter` reads (use_safetensors=True).

        Args:
            settings: of the LoraConfig, kept in the file's metadata.
        """
        from diffusers.loaders.lora_base import LoraBaseMixin

        weights, told = ({f"{self.component}.{key}": v for key, v in part.items()} for part in (layers, settings))
        LoraBaseMixin.write_lora_layers(weights, folder, True, None, None, True, lora_adapter_metadata=told)
